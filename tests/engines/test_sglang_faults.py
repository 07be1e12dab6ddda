"""Whatever happens to the store, SGLang's requests finish, and with the same answers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.engines.model_tools import document
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.sglang

TOKENS: Final = 12


class Serving:
    """An engine and its store, and what a plain engine answers."""

    def __init__(self, served: Served, engine: Engine, plain: Engine) -> None:
        self.served = served
        self.engine = engine
        text = document(1400)
        self.prompts = [text[n * 100 : n * 100 + 500] for n in range(5)]
        self.expected = plain.generate(*self.prompts, max_tokens=TOKENS)["tokens"]

    def ask(self) -> dict[str, Any]:
        """All prompts at once, with SGLang's own cache empty."""
        self.engine.forget()
        answer: dict[str, Any] = self.engine.generate(*self.prompts, max_tokens=TOKENS)
        return answer

    def check(self, answer: dict[str, Any]) -> None:
        """Every request ended as it should, with the right answer."""
        assert answer["finish"] == ["length"] * len(self.prompts)
        assert answer["tokens"] == self.expected

    def hits(self) -> bool:
        """Whether all prompts are served from the store now; checks their answers."""
        answer = self.ask()
        self.check(answer)
        return min(answer["cached"]) > 0


@pytest.fixture(scope="module")
def serving(stores: Stores, sglang_plain: Engine) -> Iterator[Serving]:
    served = stores.serve("256MiB", "512MiB")
    flags = linked(served, session__lookup_timeout=1.0, session__retry_max=0.3)
    with Engine(flags) as engine:
        yield Serving(served, engine, sglang_plain)


def test_a_store_that_is_killed_and_restarted(serving: Serving) -> None:
    eventually(serving.hits, 120)
    serving.engine.forget()
    serving.engine.order(*serving.prompts, max_tokens=TOKENS)
    time.sleep(0.3)  # Somewhere in the middle.
    serving.served.kill()
    serving.check(serving.engine.answer())
    serving.check(serving.ask())
    serving.served.restart()
    eventually(serving.hits, 120)


def test_a_store_that_stands_still(serving: Serving) -> None:
    eventually(serving.hits, 120)
    serving.engine.forget()
    serving.engine.order(*serving.prompts, max_tokens=TOKENS)
    time.sleep(0.2)
    serving.served.signal(signal.SIGSTOP)
    try:
        serving.check(serving.engine.answer())
        serving.check(serving.ask())
    finally:
        serving.served.signal(signal.SIGCONT)
    eventually(serving.hits, 120)


def test_bits_that_flip_on_disk(serving: Serving) -> None:
    eventually(serving.hits, 120)
    with serving.served.session() as session:
        assert session.flush() == 0
    serving.served.stop()
    slab = next((serving.served.folder / "disk").rglob("kvstore.slab"))
    with slab.open("r+b") as file:
        for offset in range(8192, slab.stat().st_size, 5 << 20):
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 4]))
    serving.served.restart()

    def noticed() -> bool:
        serving.check(serving.ask())
        return any("corrupt" in name for name in serving.served.stats()["counters"])

    eventually(noticed, 120)
    eventually(serving.hits, 120)


def test_blocks_on_disk_are_waited_for_outside_the_batch(serving: Serving) -> None:
    eventually(serving.hits, 120)
    with serving.served.session() as session:
        assert session.flush() == 0
    serving.served.stop()
    serving.served.restart()  # Memory is empty, the disk is not.
    eventually(serving.hits, 120)
    assert serving.engine.metrics()["kvstore_loaded_tokens_total.disk"] > 0


def test_a_store_that_comes_late(stores: Stores, serving: Serving) -> None:
    served = stores.serve("256MiB")
    served.stop()
    with Engine(linked(served, session__retry_max=0.3)) as engine:
        serving.check(engine.generate(*serving.prompts, max_tokens=TOKENS))
        served.restart()

        def hits() -> bool:
            engine.forget()
            answer = engine.generate(*serving.prompts, max_tokens=TOKENS)
            serving.check(answer)
            return min(answer["cached"]) > 0

        eventually(hits, 120)
