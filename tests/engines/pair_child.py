"""One engine in an environment of its own, for tests: orders come in, answers go out, as JSON.

    pair_child.py transformers|vllm|sglang ADDRESS

Blocks have 64 tokens. An answer has its greedy `tokens`, how many of the prompt's were `cached`,
and where it is known why.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final

from tests.engines.model_tools import APART, model

BLOCK: Final = 64
LONGEST: Final = 2560
_PATIENT: Final = {"session__lookup_timeout": 10.0, "planner__mode": "load"}


class Transformers:
    """Hugging Face transformers."""

    def __init__(self, address: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from kvstore.connectors.transformers import KVStoreCache
        from kvstore.sources import load_config

        settings = {"session": {"lookup_timeout": 10.0}, "planner": {"mode": "load"}}
        config = load_config(overrides={"address": address} | settings)
        self.model = AutoModelForCausalLM.from_pretrained(model(), dtype=torch.float32).eval()
        self.cache = KVStoreCache.open(self.model, config, block_tokens=BLOCK)

    def generate(self, prompt: list[int], *, alone: bool = False) -> dict[str, Any]:
        """The answer; `alone`: without the store."""
        import torch

        ids = torch.tensor([prompt])
        how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": []}
        said = (self.model if alone else self.cache).generate(ids, **how)
        report = None if alone else self.cache.last
        return {
            "tokens": said[0, len(prompt) :].tolist(),
            "cached": report.loaded_tokens if report else 0,
            "why": str(report),
        }

    def compare(self, prompt: list[int]) -> dict[str, Any]:
        """What the store has of a prompt, beside what this engine computes of it."""
        import torch
        from transformers import DynamicCache

        ids = torch.tensor([prompt])
        stored, own = self.cache.load(ids), DynamicCache(config=self.model.config)
        length = stored.get_seq_length()
        with torch.no_grad():
            self.model(ids, past_key_values=own)
        pairs = [
            (one, other[:, :, :length])
            for here, there in zip(stored.layers, own.layers, strict=True)
            for one, other in ((here.keys, there.keys), (here.values, there.values))
        ]
        return {
            "tokens": length,
            "equal": all(torch.equal(*pair) for pair in pairs),
            "close": all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in pairs),
            "apart": max(float((one - other).abs().max()) for one, other in pairs),
        }

    def forget(self) -> None:
        """It keeps nothing of its own."""

    def close(self) -> None:
        self.cache.close()


class Vllm:
    """vLLM, in this process."""

    def __init__(self, address: str) -> None:
        from tests.engines import vllm_child
        from tests.engines.vllm_tools import transfer

        self._obey = vllm_child.obey
        self._engine, _, self.close = vllm_child.make(
            {
                "model": str(model()),
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": LONGEST,
                "max_num_seqs": 2,
                "disable_log_stats": False,
                "block_size": BLOCK,
                "kv_transfer_config": transfer(address=address, **_PATIENT),
            }
        )

    def generate(self, prompt: list[int], *, alone: bool = False, **wishes: bool) -> dict[str, Any]:
        asked = APART if alone else wishes or None
        said = self._obey(self._engine, {"do": "generate", "prompts": [prompt], "wishes": asked})
        return {"tokens": said["tokens"][0], "cached": said["cached"][0]}

    def forget(self) -> None:
        assert self._obey(self._engine, {"do": "forget"})["done"]


class Sglang:
    """SGLang, and its processes."""

    def __init__(self, address: str) -> None:
        from kvstore.benchmarks import sglang_engine
        from tests.engines import sglang_child
        from tests.engines.sglang_tools import SETTINGS, linked

        self._generate, self._forget = sglang_child.generate, sglang_engine.forget
        settings = {"model_path": str(model()), "context_length": LONGEST}
        self._engine, _, self.close = sglang_child.make(
            SETTINGS | settings | linked(address, **_PATIENT)
        )

    def generate(self, prompt: list[int], *, alone: bool = False, **wishes: bool) -> dict[str, Any]:
        params = {"custom_params": {"kvstore": APART if alone else wishes}}
        said = self._generate(self._engine, [prompt], 16, {"sampling_params": params})
        return {"tokens": said["tokens"][0], "cached": said["cached"][0]}

    def forget(self) -> None:
        self._forget(self._engine)


ENGINES: Final = {"transformers": Transformers, "vllm": Vllm, "sglang": Sglang}


def main() -> None:
    """Answer until orders end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = ENGINES[sys.argv[1]](sys.argv[2])
    answers.write("{}\n")
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(getattr(engine, order.pop("do"))(**order)) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
