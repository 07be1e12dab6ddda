"""Whatever happens to the store, requests finish, and with the same answers."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.fault_tools import TOKENS, Serving
from tests.engines.model_tools import APART
from tests.engines.vllm_tools import Engine, transfer
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm


class ServingVLLM(Serving):
    """vLLM and its store."""

    def __init__(self, served: Served, engine: Engine) -> None:
        self.engine = engine
        super().__init__(served)

    def without(self) -> Any:
        """Its own answers, the store left out."""
        self.engine.forget()
        return self.engine.generate(*self.prompts, max_tokens=TOKENS, wishes=APART)["tokens"]

    def begin(self) -> None:
        """See `Serving`."""
        self.engine.forget()
        self.engine.order(do="generate", prompts=self.prompts, max_tokens=TOKENS)

    def answer(self) -> dict[str, Any]:
        """See `Serving`."""
        found: dict[str, Any] = self.engine.answer()
        return found


@pytest.fixture(scope="module")
def serving(stores: Stores) -> Iterator[ServingVLLM]:
    served = stores.serve("256MiB", "512MiB")
    connector = transfer(
        address=f"unix://{served.socket}", session__lookup_timeout=1.0, session__retry_max=0.3
    )
    with Engine(connector, mode="multiprocess", block_size=32, max_model_len=1024) as engine:
        yield ServingVLLM(served, engine)


def test_a_store_that_is_killed_and_restarted(serving: ServingVLLM) -> None:
    serving.killed_and_restarted()


def test_a_store_that_stands_still(serving: ServingVLLM) -> None:
    serving.stands_still()


@pytest.mark.parametrize("damage", ["everything", "every other block"])
def test_bits_that_flip_on_disk(serving: ServingVLLM, damage: str) -> None:
    serving.bits_flip(4096 if damage == "everything" else 5 << 20)


def test_a_disk_that_is_full(serving: ServingVLLM) -> None:
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
