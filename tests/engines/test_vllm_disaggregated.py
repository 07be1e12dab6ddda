"""One engine computes prompts, another goes on from there: the same answers, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

import pytest

from tests.engines.model_tools import APART
from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Served, Stores, eventually, no_leases
from tests.tcp_tools import TCP

pytestmark = pytest.mark.vllm

BLOCK: Final = 64
TOKENS: Final = 6
LONG: Final = 1200
PREFILL: Final[dict[str, Any]] = {
    # As vLLM's proxies say it for the NIXL connector.
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("512MiB", **TCP)


@pytest.fixture(scope="module")
def other(stores: Stores) -> Served:
    """That of another decode node."""
    return stores.serve("64MiB", **TCP)


def engine(address: str, role: str, **settings: Any) -> Engine:
    connector = transfer(
        address=address,
        vllm__block_tokens=BLOCK,
        planner__mode="load",
        **settings,
    )
    connector["kv_role"] = role
    return Engine(connector, block_size=BLOCK, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def engines(served: Served, other: Served) -> Iterator[tuple[Engine, Engine]]:
    """Both, which start at the same time."""
    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        # The first one from another host, into the store of the second one's.
        one = threads.submit(engine, tcp(served), "kv_producer", vllm__decoders=[tcp(other)])
        two = threads.submit(engine, f"unix://{served.socket}", "kv_consumer")
        yield stack.enter_context(one.result()), stack.enter_context(two.result())


def tcp(served: Served) -> str:
    return f"tcp://{served.addresses['tcp']}"


def saved(served: Served) -> int:
    counters = served.stats()["counters"]
    return int(counters.get("save.blocks", 0))


@pytest.fixture
def prefill(engines: tuple[Engine, Engine]) -> Engine:
    return engines[0]


@pytest.fixture
def decode(engines: tuple[Engine, Engine]) -> Engine:
    return engines[1]


def alone(decode: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """What one engine answers that does all of it."""
    told = decode.generate(*prompts, max_tokens=TOKENS, wishes=APART)
    decode.forget()
    tokens: list[list[int]] = told["tokens"]
    return tokens


def came(decode: Engine, reason: str = "came") -> float:
    return decode.metrics().get(f"kvstore_remote_prefills_total.{reason}", 0)


def test_many_requests_at_once_are_answered_as_by_one_engine(
    served: Served, prefill: Engine, decode: Engine
) -> None:
    text = document(1400)
    lengths = [BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, *range(33, 173, 5)]
    prompts = [text[n * 38 : n * 38 + length] for n, length in enumerate(lengths)]
    expected = alone(decode, prompts)
    computed = prefill.generate(*prompts, max_tokens=1, wishes=PREFILL)
    assert [tokens[:1] for tokens in expected] == computed["tokens"]
    for told, prompt in zip(computed["told"], prompts, strict=True):
        assert (told["do_remote_prefill"], told["do_remote_decode"]) == (True, False)
        assert told["remote_num_tokens"] == len(prompt)
    # At once: the last saves are under way.
    requests = [(p, told, 0) for p, told in zip(prompts, computed["told"], strict=True)]
    answered = decode.ask(do="mix", requests=requests, at_once=32, max_tokens=TOKENS)
    assert answered["tokens"] == expected
    assert came(decode) == len(prompts) == 32
    loaded = decode.metrics()["kvstore_loaded_tokens_total.memory"]
    assert loaded == sum(map(len, prompts)) - 32, "the last token of each is left to compute"
    eventually(lambda: no_leases(served))
    decode.forget()
    again = decode.generate(prompts[-1], max_tokens=TOKENS, wishes={"do_remote_prefill": True})
    # What is behind the last whole block was there once; a request has taken it.
    assert (again["tokens"], again["cached"]) == (expected[-1:], [2 * BLOCK])


def test_a_decode_that_is_asked_early_waits_for_the_prefill(
    served: Served, prefill: Engine, decode: Engine
) -> None:
    prompt = document(LONG, 10)
    [expected] = alone(decode, [prompt])
    before = came(decode)
    prefill.order(do="generate", prompts=[prompt], max_tokens=1, wishes=PREFILL)
    eventually(lambda: not no_leases(served))
    answered = decode.generate(prompt, max_tokens=TOKENS, wishes={"do_remote_prefill": True})
    prefill.answer()
    assert (answered["tokens"], answered["cached"]) == ([expected], [LONG - 1])
    assert came(decode) == before + 1
    eventually(lambda: no_leases(served))


def test_a_request_may_name_the_decode_node_but_not_any(
    served: Served, other: Served, prefill: Engine
) -> None:
    def answer(decoder: str, start: int) -> tuple[int, int]:
        wishes = PREFILL | {"remote_decoder": decoder}
        own, others = saved(served), saved(other)
        prefill.generate(document(2 * BLOCK + 5, start), max_tokens=1, wishes=wishes)
        eventually(lambda: saved(served) + saved(other) == own + others + 3)
        eventually(lambda: no_leases(served) and no_leases(other))
        return saved(served) - own, saved(other) - others

    assert answer(tcp(other), 40) == (0, 3), "two blocks and what is left"
    assert came(prefill, "refused") == 0
    assert answer("tcp://127.0.0.1:1", 41) == (3, 0)
    assert came(prefill, "refused") == 1


def test_requests_that_are_aborted_leave_nothing(
    served: Served, prefill: Engine, decode: Engine
) -> None:
    prompts = [document(500, 20 + n) for n in range(4)]
    mixed = [(p, PREFILL, n) for n, p in enumerate(prompts)]  # the first one ends
    prefill.ask(do="mix", requests=mixed, at_once=4, max_tokens=1)
    requests = [(p, {"do_remote_prefill": True}, 1 + n % 2) for n, p in enumerate(prompts)]
    decode.ask(do="mix", requests=requests, at_once=4, max_tokens=TOKENS)
    eventually(lambda: no_leases(served))


def test_a_prefill_that_dies_is_completed_by_the_decode(
    served: Served, prefill: Engine, decode: Engine
) -> None:
    prompt = document(LONG, 30)
    [expected] = alone(decode, [prompt])
    missing = came(decode, "missing")
    prefill.order(do="generate", prompts=[prompt], max_tokens=1, wishes=PREFILL)
    eventually(lambda: not no_leases(served))
    decode.order(do="generate", prompts=[prompt], max_tokens=TOKENS,
                 wishes={"do_remote_prefill": True})  # fmt: skip
    before = saved(served)
    eventually(lambda: saved(served) > before)
    prefill._process.kill()
    answered = decode.answer()
    assert answered["tokens"] == [expected]
    assert 0 < answered["cached"][0] < (LONG - 1) // BLOCK * BLOCK
    assert came(decode, "missing") == missing + 1
    eventually(lambda: no_leases(served))
