"""Tensor-parallel SGLang: ranks agree before anything is promised; other sizes share blocks."""

from __future__ import annotations

import pytest

from tests.engines.model_tools import document
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.sglang


def test_three_ranks_and_one(stores: Stores, sglang_plain: Engine) -> None:
    first, second = document(300), document(260, 700)
    expected = sglang_plain.generate(first, second)["tokens"]
    served = stores.serve("256MiB")
    flags = linked(served, session__head_shards=3)
    with Engine(flags, tp_size=3) as three:
        assert three.generate(first)["tokens"] == expected[:1]
        eventually(lambda: served.stats()["objects"] == 3 * 4, 60)
        three.forget()
        again = three.generate(first)
        assert (again["tokens"], again["cached"]) == (expected[:1], [256])
        with Engine(flags) as one:
            found = one.generate(first)
            assert (found["tokens"], found["cached"]) == (expected[:1], [256])
            one.generate(second)
            eventually(lambda: served.stats()["objects"] == 3 * 8, 60)
        found = three.generate(second)
        assert (found["tokens"], found["cached"]) == (expected[1:], [256])
