"""`vllm serve` as users run it: two servers behind the OpenAI API share one store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.model_tools import APART
from tests.engines.server_tools import EngineServer
from tests.engines.vllm_tools import ENVIRONMENT, document, model, transfer
from tests.session_tools import ROOT, Served, Stores, eventually

pytestmark = pytest.mark.vllm


class Server(EngineServer):
    """One OpenAI-compatible server."""

    def __init__(self, connector: dict[str, Any]) -> None:
        super().__init__(
            "vllm",
            lambda port: [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server",
                "--model", str(model()),
                "--served-model-name", "small",
                "--port", str(port),
                "--dtype", "float32",
                "--max-model-len", "2560",
                "--enforce-eager",
                "--kv-transfer-config", json.dumps(connector),
            ],
            ENVIRONMENT | os.environ,
        )  # fmt: skip


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("512MiB")


@pytest.fixture(scope="module")
def servers(served: Served) -> Iterator[tuple[Server, Server]]:
    connector = transfer(address=f"unix://{served.socket}")
    connector["kv_connector_extra_config"]["kvstore.vllm.approximate"] = "uncalibrated"
    plain = transfer(address=f"unix://{served.socket}")
    one, other = Server(connector), Server(plain)
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
    apart = other.complete(prompt, cache_salt="x", kv_transfer_params=APART)
    assert apart["choices"][0]["text"] == cold
    assert other.metric("kvstore_loaded_tokens_total") == 1152


def _add(server: Server, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("kvstore"), "pieces", "add", *arguments]
    url = f"http://127.0.0.1:{server.port}"
    return subprocess.run(
        [*map(str, [*command[:3], "--url", url, *command[3:]])],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_texts_become_pieces_of_prompts(servers: tuple[Server, Server], tmp_path: Path) -> None:
    one, plain = servers
    text = (ROOT / "docs" / "recompute.md").read_text("utf-8")[:2400]
    file = tmp_path / "text"
    file.write_text(text)
    said = _add(one, file, "--tokens", 256)
    assert said.returncode == 0, said.stderr
    assert re.match(r"[23] pieces, \d+ tokens, for small", said.stdout)
    tokens = json.loads(one.ask("/tokenize", {"model": "small", "prompt": f"Read: {text} Why?"}))
    asks = {"reuse": "approximate", "selection": "none"}

    def met() -> bool:
        answer = one.complete(tokens["tokens"], max_tokens=2, kv_transfer_params=asks)
        told = answer["kv_transfer_params"]["approximate"]
        return bool(told["pieces"] >= 2 and told["reused"] > 400)

    eventually(met, 60)
    refused = _add(plain, file)
    assert refused.returncode == 1
    assert "not taken: off; set kvstore.vllm.approximate" in refused.stderr
    short = tmp_path / "short"
    short.write_text("Too short.")
    assert "a piece has 64 at least" in _add(one, short).stderr
    assert (
        "--url must be that of a vLLM server"
        in _add(one, file, "--url", "http://127.0.0.1:9").stderr
    )


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
    answers.add(
        one.complete(prompts[0], cache_salt="y", kv_transfer_params=APART)["choices"][0]["text"]
    )
    assert len(answers) == 1
    eventually(lambda: served.stats()["leases"] == 0)
