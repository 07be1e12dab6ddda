"""A real S3 server for tests: moto, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tests.redis_tools import free_port

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
