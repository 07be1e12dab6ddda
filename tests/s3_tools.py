"""A real S3 server for tests: moto, on loopback."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from kvstore.benchmarks.served import free_port

CREDENTIALS: Final = {"aws_access_key_id": "tester", "aws_secret_access_key": "not-to-be-told"}


class S3Server:
    """A server process; `options` are those of a tier in its bucket, without a prefix."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None and time.monotonic() < until  # noqa: PT018
                time.sleep(0.02)
            else:
                break
        request = urllib.request.Request(f"{self.endpoint}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=20).close()

    def options(self, prefix: str, **more: Any) -> dict[str, Any]:
        return {
            "url": f"s3://bucket/{prefix}",
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "config": CREDENTIALS,
            **more,
        }

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)


class Meddler:
    """A server before another one; `meddle` may answer instead, and change what comes back.

    It is given the method and headers of a request, and returns a status, or None to pass it on.
    """

    def __init__(self, server: S3Server) -> None:
        self.meddle: Callable[[str, Message], int | None] = lambda method, headers: None
        self.change: Callable[[bytes], bytes] = lambda body: body
        self.requests = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()

            def _pass(self) -> None:
                outer.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers = outer.meddle(self.command, self.headers), {}
                answer = b"<Error><Code>NotImplemented</Code></Error>" if status == 501 else b""
                if status is None:
                    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
                    link.request(self.command, self.path, body, dict(self.headers.items()))
                    reply = link.getresponse()
                    status, headers = reply.status, dict(reply.getheaders())
                    answer = outer.change(reply.read())
                    link.close()
                self.send_response(status)
                headers |= {"Content-Length": str(len(answer))}
                for name, value in headers.items():
                    if name.lower() not in ("date", "server", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_DELETE = _pass

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
