"""`vllm serve` as users run it: two servers behind the OpenAI API share one store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.engines.vllm_tools import ENVIRONMENT, document, model, transfer
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm

START_SECONDS: Final = 600.0


class Server:
    """One OpenAI-compatible server."""

    def __init__(self, connector: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log")  # noqa: SIM115
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model()),
            "--served-model-name", "small",
            "--port", str(self.port),
            "--dtype", "float32",
            "--max-model-len", "2560",
            "--enforce-eager",
            "--kv-transfer-config", json.dumps(connector),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=self._log,
            cwd="/",
            env=ENVIRONMENT | os.environ,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until it is ready."""
        eventually(self._ready, START_SECONDS)

    def _ready(self) -> bool:
        assert self.process.poll() is None, Path(self._log.name).read_text()[-6000:]
        try:
            self.get("/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def complete(self, prompt: list[int], timeout: float = 300.0, **more: Any) -> dict[str, Any]:
        body = {"model": "small", "prompt": prompt, "max_tokens": 16, "temperature": 0} | more
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass  # Ended below.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It has ended by itself.
        self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("512MiB")


@pytest.fixture(scope="module")
def servers(served: Served) -> Iterator[tuple[Server, Server]]:
    connector = transfer(address=f"unix://{served.socket}", session__lookup_timeout=2.0)
    one, other = Server(connector), Server(connector)
    try:
        one.wait()
        other.wait()
        yield one, other
    finally:
        one.close()
        other.close()


def test_the_second_server_answers_from_what_the_first_computed(
    servers: tuple[Server, Server],
) -> None:
    one, other = servers
    prompt = document(1200)
    cold = one.complete(prompt)["choices"][0]["text"]
    assert one.metric("kvstore_loaded_tokens_total") == 0
    eventually(lambda: _stored(one) >= 1024, 60)
    warm = other.complete(prompt)["choices"][0]["text"]
    assert warm == cold
    assert other.metric("kvstore_loaded_tokens_total") == 1152
    apart = other.complete(
        prompt, cache_salt="x", kv_transfer_params={"skip_load": True, "skip_save": True}
    )
    assert apart["choices"][0]["text"] == cold
    assert other.metric("kvstore_loaded_tokens_total") == 1152


def _stored(server: Server) -> float:
    # Counts come with the steps of the engine.
    server.complete([1, 2, 3], max_tokens=2)
    return server.metric("kvstore_saved_tokens_total")


def test_requests_that_are_given_up_leave_nothing_behind(
    servers: tuple[Server, Server], served: Served
) -> None:
    one, other = servers
    prompts = [[2000 + n, *document(900, 50 * n)] for n in range(6)]

    def give_up(server: Server, prompt: list[int], seconds: float) -> None:
        try:
            server.complete(prompt, timeout=seconds, max_tokens=400)
        except TimeoutError:
            pass  # As meant.

    threads = [
        threading.Thread(target=give_up, args=(server, prompt, 0.2 + 0.3 * number))
        for number, prompt in enumerate(prompts)
        for server in (one, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in (one, other):
        eventually(lambda server=server: server.metric("vllm:num_requests_running{") == 0, 60)
        _stored(server)
        # Pages in use: those of ended requests are all given back.
        eventually(lambda server=server: server.metric("vllm:kv_cache_usage_perc{") == 0, 60)
    answers = {server.complete(prompts[0])["choices"][0]["text"] for server in (one, other)}
    apart = {"skip_load": True, "skip_save": True}
    answers.add(
        one.complete(prompts[0], cache_salt="y", kv_transfer_params=apart)["choices"][0]["text"]
    )
    assert len(answers) == 1
    eventually(lambda: served.stats()["leases"] == 0)
