"""Whatever happens to the store, requests finish, and with the same answers."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm

PROMPT: Final = 500
TOKENS: Final = 12
APART: Final[dict[str, Any]] = {"skip_load": True, "skip_save": True}


class Serving:
    """An engine and its store, and what the engine answers without that."""

    def __init__(self, served: Served, engine: Engine) -> None:
        self.served = served
        self.engine = engine
        text = document(1400)
        self.prompts = [text[n * 100 : n * 100 + PROMPT] for n in range(5)]
        self.expected = self.ask(wishes=APART)["tokens"]

    def ask(self, **order: Any) -> dict[str, Any]:
        """All prompts at once, with vLLM's own cache empty."""
        self.engine.forget()
        return self.engine.generate(*self.prompts, max_tokens=TOKENS, **order)

    def check(self, answer: dict[str, Any]) -> None:
        """Every request ended as it should, with the right answer."""
        assert answer["finish"] == ["length"] * len(self.prompts)
        assert answer["tokens"] == self.expected

    def missed(self) -> float:
        """Tokens promised by a store that was there, which did not come."""
        name = "kvstore_missed_tokens_total."
        counts = self.engine.metrics()
        return sum(
            count
            for label, count in counts.items()
            if label.startswith(name) and not label.endswith("unavailable")
        )

    def hits(self) -> bool:
        """Whether all prompts are served from the store now; checks their answers."""
        answer = self.ask()
        self.check(answer)
        return min(answer["cached"]) > 0


@pytest.fixture(scope="module")
def serving(stores: Stores) -> Iterator[Serving]:
    served = stores.serve("256MiB", "512MiB")
    connector = transfer(
        address=f"unix://{served.socket}", session__lookup_timeout=1.0, session__retry_max=0.3
    )
    with Engine(connector, mode="multiprocess", block_size=32, max_model_len=1024) as engine:
        yield Serving(served, engine)


def test_a_store_that_is_killed_and_restarted(serving: Serving) -> None:
    eventually(serving.hits, 120)
    serving.engine.forget()
    serving.engine.order(do="generate", prompts=serving.prompts, max_tokens=TOKENS)
    time.sleep(0.3)  # Somewhere in the middle.
    serving.served.kill()
    serving.check(serving.engine.answer())
    serving.check(serving.ask())
    serving.served.restart()
    eventually(serving.hits, 120)


def test_a_store_that_stands_still(serving: Serving) -> None:
    eventually(serving.hits, 120)
    serving.engine.forget()
    serving.engine.order(do="generate", prompts=serving.prompts, max_tokens=TOKENS)
    time.sleep(0.2)
    serving.served.signal(signal.SIGSTOP)
    try:
        serving.check(serving.engine.answer())
        serving.check(serving.ask())
    finally:
        serving.served.signal(signal.SIGCONT)
    eventually(serving.hits, 120)


@pytest.mark.parametrize("damage", ["everything", "every other block"])
def test_bits_that_flip_on_disk(serving: Serving, damage: str) -> None:
    eventually(serving.hits, 120)
    with serving.served.session() as session:
        assert session.flush() == 0
    serving.served.stop()
    slab = next((serving.served.folder / "disk").rglob("kvstore.slab"))
    step = 4096 if damage == "everything" else 5 << 20
    with slab.open("r+b") as file:
        for offset in range(8192, slab.stat().st_size, step):
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 4]))
    serving.served.restart()
    before = serving.missed()

    def noticed() -> bool:
        serving.check(serving.ask())
        return serving.missed() > before

    eventually(noticed, 120)
    eventually(serving.hits, 120)


def test_a_disk_that_is_full(serving: Serving) -> None:
    pid = serving.served.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    serving.engine.forget(store=True)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        serving.check(serving.ask())
        eventually(lambda: serving.served.stats()["tiers"]["disk"]["problem"])
        eventually(serving.hits, 120)  # From memory.
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    eventually(lambda: not serving.served.stats()["tiers"]["disk"]["problem"], 60)
