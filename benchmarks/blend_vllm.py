"""First tokens of real vLLM: prompts computed whole, and put together of stored pieces."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvstore.benchmarks.blend import Prompt, prompts
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.served import served
from kvstore.benchmarks.serving_engine import KVSTORE, ServingEngine
from kvstore.benchmarks.vllm_engine import VLLM
from kvstore.blend.pieces import BASE, filler

_SIZES: Final = ((24, 4, 511, 23), (24, 6, 639, 21))
"""Tokens before the pieces, how many of these, tokens of each, and of the question."""
_WAYS: Final = (("none", 0.0), ("first", 0.1), ("question", 0.2))
_MEMORY: Final = 2 << 30
_LONGEST: Final = 4096
_SAVED_SECONDS: Final = 60.0


def ask(llm: Any, prompt: list[int], wishes: dict[str, Any]) -> dict[str, Any]:
    """Have a prompt computed, in the engine's process; what the response tells of it."""
    from vllm import SamplingParams

    extra = {"kv_transfer_params": wishes}
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=extra)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output.kv_transfer_params or {}


def run(report: Report, folder: Path) -> None:
    """The least of all samples at each size of prompt; ways take turns.

    Raises:
        BenchmarkError: the engine did not run, or not all pieces were reused.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = filler(tokenizer.encode, 0).tolist()
    made = list(prompts(tokenizer))
    text = [token for prompt in made for piece in prompt.pieces for token in piece]
    with served(memory={"size": _MEMORY}) as daemon:
        address = str(daemon.config.address)
        contender = VLLM.connector(KVSTORE, address=address, memory=_MEMORY, folder=folder)
        transfer = contender.settings["kv_transfer_config"]
        transfer["kv_connector_extra_config"]["kvstore.vllm.approximate"] = "uncalibrated"
        contender.environment.update(VLLM.one_process or {}, HF_HUB_OFFLINE="1")
        with ServingEngine(
            VLLM, contender, model=str(folder.absolute()), dtype=None, longest=_LONGEST,
            requests=2, room=2 * _LONGEST, max_num_batched_tokens=_LONGEST,
        ) as engine:  # fmt: skip
            for head, count, length, asked in _SIZES:
                taken, text = text[: count * length], text[count * length :]
                pieces = [taken[at : at + length] for at in range(0, len(taken), length)]
                question = (made[0].question * asked)[:asked]
                _measure(report, engine, before, Prompt(text[:head], pieces, question))


def _measure(report: Report, engine: ServingEngine, before: list[int], prompt: Prompt) -> None:
    tokens = [int(token) for token in prompt.tokens]

    def told(ids: list[int], **wishes: Any) -> dict[str, Any]:
        engine.tell(ask, ids, wishes)
        answer: dict[str, Any] = engine.answer()
        return answer

    def way(selection: str, share: float) -> Callable[[], None]:
        wishes = {"selection": selection, "recompute": share, "pieces": prompt.spans}

        def blended() -> None:
            answer = told(tokens, reuse="approximate", skip_save=True, **wishes)
            if answer["approximate"]["pieces"] < len(prompt.pieces):
                raise BenchmarkError(f"not all pieces were reused: {answer}")

        return blended

    for piece in prompt.pieces:
        answer = told(before + piece, piece={"start": BASE, "end": BASE + len(piece)})
        if answer != {"piece": {}}:
            raise BenchmarkError(f"a piece was not taken: {answer}")
    until = time.monotonic() + _SAVED_SECONDS
    while True:
        engine.forget()
        try:
            way("none", 0.0)()
            break
        except BenchmarkError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
    whole = "all computed"
    runs = {whole: Run(lambda: told(tokens, skip_load=True, skip_save=True), engine.forget)}
    runs |= {f"{name} {share}": Run(way(name, share), engine.forget) for name, share in _WAYS}
    seconds = report.race(f"{len(tokens)} tokens", runs)
    for name, samples in seconds.items():
        report.duration(
            f"first token, {name}", samples, seconds[whole], unit="ms", q=0.0, tokens=len(tokens),
            against=f"{whole}; vLLM, the least of all samples",
        )  # fmt: skip
