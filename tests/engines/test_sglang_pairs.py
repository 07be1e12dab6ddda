"""What one engine has computed, the others read: vLLM, SGLang and transformers, nine pairs.

Each stands in its own environment; all share one daemon.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import pytest

from tests.engines.model_tools import ROOT, document
from tests.engines.sglang_tools import ENVIRONMENT
from tests.session_tools import Stores

pytestmark = pytest.mark.sglang

PYTHONS: Final = {
    "transformers": ROOT / ".venv/bin/python",
    "vllm": ROOT / ".venv-vllm/bin/python",
    "sglang": ROOT / ".venv-sglang/bin/python",
}
VARIABLES: Final = ENVIRONMENT | {
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # With one thread sums are made in one order, whichever engine makes them.
    "OMP_NUM_THREADS": "1",
}
PROMPT, SHARED = 1478, 1472
"""Tokens of a prompt, and of its whole blocks of 64 that leave one to compute."""


class Child:
    """An engine in a process of its environment."""

    def __init__(self, engine: str, address: str) -> None:
        self.engine = engine
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        child = Path(__file__).with_name("pair_child.py")
        self.process = subprocess.Popen(
            [PYTHONS[engine], child, engine, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | VARIABLES,
        )

    def order(self, do: str, **how: Any) -> None:
        """Give an order."""
        _pipe(self.process.stdin).write(json.dumps({"do": do} | how) + "\n")
        _pipe(self.process.stdin).flush()

    def answer(self) -> Any:
        """Wait for an answer."""
        line = _pipe(self.process.stdout).readline()
        if not line:
            self.log.seek(0)
            pytest.fail(f"{self.engine} has ended; its last words:\n{self.log.read()[-6000:]}")
        return json.loads(line)

    def ask(self, do: str, **how: Any) -> Any:
        """Both."""
        self.order(do, **how)
        return self.answer()

    def close(self) -> None:
        """End it."""
        _pipe(self.process.stdin).close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.log.close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture(scope="module")
def children(stores: Stores) -> Iterator[dict[str, Child]]:
    missing = [engine for engine, python in PYTHONS.items() if not python.exists()]
    if missing:
        pytest.skip(f"no environment for {', '.join(missing)}: make test-vllm makes its own")
    address = f"unix://{stores.serve('512MiB').socket}"
    made = {engine: Child(engine, address) for engine in PYTHONS}
    for child in made.values():
        child.answer()
    yield made
    for child in made.values():
        child.close()


def test_each_engine_reads_what_each_has_written(children: dict[str, Child]) -> None:
    prompts = {engine: document(PROMPT, 300 * i) for i, engine in enumerate(children)}
    own: dict[tuple[str, str], list[int]] = {}
    for turn in range(3):  # All three at once, each with the prompt of another one.
        readers = dict(zip(children, [*prompts][turn:] + [*prompts][:turn], strict=True))
        for reader, writer in readers.items():
            children[reader].order("generate", prompt=prompts[writer], alone=reader != writer)
        for reader, writer in readers.items():
            answer = children[reader].answer()
            assert answer["cached"] == 0
            own[writer, reader] = answer["tokens"]
    for child in children.values():
        child.ask("forget")
    found = {
        (writer, reader): child.ask("generate", prompt=prompts[writer])
        for reader, child in children.items()
        for writer in prompts
    }
    assert {p: a["cached"] for p, a in found.items()} == dict.fromkeys(own, SHARED), found
    assert {p: a["tokens"] for p, a in found.items()} == own

    numbers = {
        writer: children["transformers"].ask("compare", prompt=prompt)
        for writer, prompt in prompts.items()
    }
    print(f"\nfarthest from transformers: { {w: n['apart'] for w, n in numbers.items()} }")
    assert {writer: n["tokens"] for writer, n in numbers.items()} == dict.fromkeys(prompts, SHARED)
    assert {writer: n["equal"] for writer, n in numbers.items()} == {
        "transformers": True, "sglang": True, "vllm": False,
    }  # fmt: skip
    assert numbers["vllm"]["close"]


def test_what_one_engine_prefills_another_goes_on_with(children: dict[str, Child]) -> None:
    for start, (prefill, decode) in enumerate([("vllm", "sglang"), ("sglang", "vllm")]):
        prompt = document(470, 100 + 50 * start)
        own = children[decode].ask("generate", prompt=prompt, alone=True)
        children[decode].ask("forget")
        children[prefill].ask("generate", prompt=prompt, do_remote_decode=True)
        # At once, as a proxy asks: the last blocks are still being saved.
        found = children[decode].ask("generate", prompt=prompt, do_remote_prefill=True)
        assert (found["tokens"], found["cached"]) == (own["tokens"], 448), (prefill, decode)
