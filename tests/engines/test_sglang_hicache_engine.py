"""KVStore below SGLang's own hierarchical cache, turned on by flags alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.engines.model_tools import small_model
from tests.engines.sglang_tools import Engine
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.sglang

PAGE: Final = 64
PROMPT: Final = 650
WHOLE: Final = PROMPT // PAGE * PAGE


def hicache(served: Served, model: Path) -> dict[str, Any]:
    """Flags: of the cache; of KVStore, which is only behind it; and those that a CPU needs."""
    extra = {
        "backend_name": "kvstore",
        "module_path": "kvstore.connectors.sglang.hicache",
        "class_name": "KVStoreHiCache",
        "kvstore.address": f"unix://{served.socket}",
        "kvstore.session.lookup_timeout": 10,
        "kvstore.session.retry_max": 0.2,
    }
    return {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(extra),
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_write_policy": "write_through",
        "hicache_io_backend": "direct",
        "hicache_mem_layout": "layer_first",
    }


def prompts(seed: int, count: int = 3) -> list[list[int]]:
    drawn: list[list[int]] = (
        np.random.default_rng(seed).integers(4096, size=(count, PROMPT)).tolist()
    )
    return drawn


def test_what_one_engine_wrote_back_others_load(stores: Stores, tmp_path: Path) -> None:
    one, other = small_model(tmp_path / "one"), small_model(tmp_path / "other", seed=1)
    served = stores.serve("256MiB")
    asked, later = prompts(0), prompts(1)

    def stored() -> int:
        entries: int = served.stats()["objects"]
        return entries

    with Engine(**hicache(served, one)) as engine:
        first = engine.generate(*asked)
        assert first["cached"] == [0, 0, 0]
        # What is generated makes no whole page more.
        eventually(lambda: stored() == 3 * (WHOLE // PAGE))
    with Engine(**hicache(served, one)) as engine:
        again = engine.generate(*asked)
        assert again["cached"] == [WHOLE] * 3
        assert again["tokens"] == first["tokens"]
        # Without its store, and with another one in its place.
        served.kill()
        engine.forget()
        assert engine.generate(*asked)["tokens"] == first["tokens"]
        served.restart()

        def served_again() -> bool:
            engine.forget()
            answer = engine.generate(*later)
            fresh.append(answer["tokens"])
            return bool(answer["cached"] == [WHOLE] * 3)

        fresh: list[Any] = []
        eventually(served_again, 120)
        assert all(tokens == fresh[0] for tokens in fresh)
        # KV of old weights serves no new ones, which are not mixed with it either.
        assert engine.call("update_weights_from_disk", model_path=str(other))[0]
        objects = stored()
        updated = [engine.generate(*later)]
        engine.forget()
        updated.append(engine.generate(*later))
        assert [answer["cached"] for answer in updated] == [[0, 0, 0]] * 2
        assert updated[0]["tokens"] == updated[1]["tokens"] != fresh[0]
        assert stored() == objects
