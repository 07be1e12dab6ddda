"""What reusing pieces costs in quality and saves in time, in transformers, on a real model.

Each prompt is computed in full, and continued greedily; then with pieces reused. How far the
distribution of each next token is off is told by its KL divergence, the tokens before it being
those of the exact answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from transformers import DynamicCache

from kvstore.benchmarks.figures import BenchmarkError, Report, Samples
from kvstore.blend.calibration import USUAL, Quality, problems
from kvstore.blend.reuse import Reuse
from kvstore.connectors.transformers.cache import KVStoreCache, cache_part
from kvstore.connectors.transformers.pieces import Pieces

WAYS: Final = (
    ("none", 0.0), ("first", 0.1), ("first", 0.2), ("deviation", 0.2), ("question", 0.1),
    ("question", 0.2), ("question", 0.3), ("question", 0.5),
)  # fmt: skip
BARE: Final = "none 0.0, no filler"
REPAIR: Final = 16
REPAIRED: Final = f"{USUAL[0]} {USUAL[1]}, {REPAIR} rows repaired a token"
CONTINUED: Final = 32
"""Tokens after a prompt of which the divergence is told."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens: `before` pieces, pieces, and a question at the end."""

    before: list[int]
    pieces: list[list[int]]
    question: list[int]

    @property
    def tokens(self) -> Any:
        """All of them."""
        return np.concatenate([self.before, *self.pieces, self.question])

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where the pieces stand."""
        ends = len(self.before) + np.cumsum([len(piece) for piece in self.pieces])
        return tuple(
            (int(end) - len(piece), int(end)) for piece, end in zip(self.pieces, ends, strict=True)
        )


def prompts(tokenizer: Any) -> Iterator[Prompt]:
    """Questions on pieces of this project's documents."""
    read = json.loads(files("kvstore.benchmarks").joinpath("blend_prompts.json").read_text("utf-8"))

    def tokens(text: str) -> list[int]:
        made: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return made

    pieces = [tokens(text) for text in read["pieces"]]
    for asked in read["questions"]:
        chosen = [pieces[number] for number in asked["pieces"]]
        yield Prompt(tokens(read["system"]), chosen, tokens(asked["text"]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one prompt: divergence of each token, whether the likeliest is the same, and seconds."""

    kl: Any
    same: Any
    seconds: float


class Exact:
    """One prompt computed in full, which others are compared with."""

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self._model, self._prompt = model, prompt
        past, started = DynamicCache(config=model.config), time.perf_counter()
        told = [self._step(past, prompt.tokens)]
        self.seconds = time.perf_counter() - started
        self.answer: list[int] = []
        while len(told) < CONTINUED:
            self.answer.append(int(told[-1].argmax()))
            told.append(self._step(past, self.answer[-1:]))
        self._wanted = torch.cat(told)

    def judge(self, pieces: Pieces, selection: str, share: float, repair: int = 0) -> Outcome:
        """The same with `pieces`, the tokens before them being an exact prefix.

        With each token behind the first, so many rows are repaired.

        Raises:
            BenchmarkError: the store did not have them: what is computed instead is exact.
        """
        tokens, past = self._prompt.tokens, DynamicCache(config=self._model.config)
        self._step(past, self._prompt.before)
        started = time.perf_counter()
        reuse = Reuse(True, share, selection, self._prompt.spans, repair=repair)
        done = pieces.blend(past, tokens, reuse)
        if done.pieces < len(self._prompt.pieces):
            raise BenchmarkError(f"the store did not give all pieces ({done}); measure again")
        first = self._step(past, tokens[past.get_seq_length() :])
        seconds = time.perf_counter() - started
        rest = []
        for token in self.answer if repair else ():
            past.repair.step()
            rest.append(self._step(past, [token]))
        got = torch.cat([first, *(rest or [self._step(past, self.answer, CONTINUED - 1)])])
        kl = (self._wanted.exp() * (self._wanted - got)).sum(-1)
        return Outcome(kl.numpy(), (self._wanted.argmax(-1) == got.argmax(-1)).numpy(), seconds)

    def _step(self, past: DynamicCache, tokens: Sequence[int], last: int = 1) -> torch.Tensor:
        """Logarithms of the probabilities of what follows the last of `tokens`."""
        ids = torch.as_tensor(np.asarray(tokens), device=self._model.device)[None]
        with torch.no_grad():
            output = self._model(ids, past_key_values=past, logits_to_keep=last)
        told: torch.Tensor = output.logits[0].float().log_softmax(-1).cpu()
        return told


def judged(
    model: Any, pieces: Pieces, prompt: Prompt, ways: Iterable[tuple[str, float]]
) -> tuple[Exact, dict[tuple[str, float], Outcome]]:
    """A prompt computed in full, and in each way with its pieces reused."""
    for piece in prompt.pieces:
        pieces.add(piece)
    exact = Exact(model, prompt)
    return exact, {way: exact.judge(pieces, *way) for way in ways}


def run(report: Report, folder: Path, *, quick: bool) -> list[str]:
    """All ways to choose rows, on all prompts (quick: on two).

    Returns why this model's pieces had better not be reused.
    """
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = list(prompts(transformers.AutoTokenizer.from_pretrained(folder)))[
        : 2 if quick else None
    ]
    with KVStoreCache.open(model) as cache:
        group = cache_part(model).group
        pieces = Pieces(cache.session, model, group)
        taken: dict[tuple[str, float], list[Outcome]] = {way: [] for way in WAYS}
        apart: dict[str, list[Outcome]] = {BARE: [], REPAIRED: []}
        full = []
        for prompt in asked:
            exact, found = judged(model, pieces, prompt, WAYS)
            full.append(exact.seconds)
            for way, outcome in found.items():
                taken[way].append(outcome)
            behind = Pieces(cache.session, model, group, before=np.array(prompt.before))
            for piece in prompt.pieces:
                behind.add(piece)
            apart[BARE].append(exact.judge(behind, "none", 0.0))
            apart[REPAIRED].append(exact.judge(pieces, *USUAL, repair=REPAIR))
            behind.close()
        pieces.close()
    tokens = round(sum(len(prompt.tokens) for prompt in asked) / len(asked))
    stale, limit = _quality(taken["none", 0.0]), Samples(tuple(full))
    named = {f"{selection} {share}": outcomes for (selection, share), outcomes in taken.items()}
    for name, outcomes in (named | apart).items():
        for figure, value in _quality(outcomes).items():
            report.level(
                f"{name}: {figure}", value, 1.0 if "same" in figure else stale[figure],
                less_is_better="same" not in figure, samples=len(outcomes),
                against="the full prompt" if "same" in figure else "pieces as they are",
            )  # fmt: skip
        seconds = Samples(tuple(outcome.seconds for outcome in outcomes))
        against = "the full prompt computed"
        report.duration(
            f"{name}: first token", seconds, limit, unit="ms", tokens=tokens, against=against
        )
    usual = _quality(taken[USUAL])
    return problems(Quality(usual["KL"], usual["same likeliest token"]))


def _quality(outcomes: Sequence[Outcome]) -> dict[str, float]:
    first = [float(outcome.kl[0]) for outcome in outcomes]
    kl = np.concatenate([outcome.kl for outcome in outcomes])
    return {
        "KL": float(kl.mean()),
        "KL, 99 of 100 tokens": float(np.quantile(kl, 0.99)),
        "KL of the first token, median": float(np.median(first)),
        "KL of the first token, worst": max(first),
        "same likeliest token": float(np.concatenate([o.same for o in outcomes]).mean()),
    }
