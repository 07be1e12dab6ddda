"""Whatever happens to the store, SGLang's requests finish, and with the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.fault_tools import TOKENS, Serving
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.sglang


class ServingSGLang(Serving):
    """SGLang and its store, beside a plain engine."""

    def __init__(self, served: Served, engine: Engine, plain: Engine) -> None:
        self.engine = engine
        self.plain = plain
        super().__init__(served)

    def without(self) -> Any:
        """See `Serving`."""
        return self.plain.generate(*self.prompts, max_tokens=TOKENS)["tokens"]

    def begin(self) -> None:
        """See `Serving`."""
        self.engine.forget()
        self.engine.order(*self.prompts, max_tokens=TOKENS)

    def answer(self) -> dict[str, Any]:
        """See `Serving`."""
        found: dict[str, Any] = self.engine.answer()
        return found


@pytest.fixture(scope="module")
def serving(stores: Stores, sglang_plain: Engine) -> Iterator[ServingSGLang]:
    served = stores.serve("256MiB", "512MiB")
    flags = linked(served, session__lookup_timeout=1.0, session__retry_max=0.3)
    with Engine(flags) as engine:
        yield ServingSGLang(served, engine, sglang_plain)


def test_a_store_that_is_killed_and_restarted(serving: ServingSGLang) -> None:
    serving.killed_and_restarted()


def test_a_store_that_stands_still(serving: ServingSGLang) -> None:
    serving.stands_still()


def test_bits_that_flip_on_disk(serving: ServingSGLang) -> None:
    serving.bits_flip(5 << 20)


def test_blocks_on_disk_are_waited_for_outside_the_batch(serving: ServingSGLang) -> None:
    serving.stop()
    serving.served.restart()  # Memory is empty, the disk is not.
    eventually(serving.hits, 120)
    assert serving.engine.metrics()["kvstore_loaded_tokens_total.disk"] > 0


def test_a_store_that_comes_late(stores: Stores, serving: ServingSGLang) -> None:
    served = stores.serve("256MiB")
    served.stop()
    with Engine(linked(served, session__retry_max=0.3)) as engine:
        late = ServingSGLang(served, engine, serving.plain)
        late.check(late.ask())
        served.restart()
        eventually(late.hits, 120)
