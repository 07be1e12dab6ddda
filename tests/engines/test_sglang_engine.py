"""SGLang on this kind of machine, before KVStore has a part in it."""

from __future__ import annotations

import pytest

from tests.engines.model_tools import document
from tests.engines.sglang_tools import Engine

pytestmark = pytest.mark.sglang


def test_a_plain_engine_answers_from_its_own_cache(sglang_plain: Engine) -> None:
    prompts = [document(300, 100 * n) for n in range(3)]
    cold = sglang_plain.generate(*prompts)
    own = [sglang_plain.generate(prompt) for prompt in prompts]
    assert cold["cached"] == [0, 0, 0]
    assert [answer["cached"] for answer in own] == [[256], [256], [256]]
    assert cold["tokens"] == [answer["tokens"][0] for answer in own]
    assert set(cold["finish"]) == {"length"}
    assert all(0 < first <= cold["seconds"] for first in cold["first"])
    sglang_plain.forget()
    assert sglang_plain.generate(prompts[0])["cached"] == [0]
    info = sglang_plain.call("get_server_info")
    assert (info["page_size"], info["dtype"]) == (64, "float32")
