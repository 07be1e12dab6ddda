"""What reusing pieces does to a model's answers, measured so that engines may go by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
import transformers

from kvstore.benchmarks.blend import Outcome, judged, prompts
from kvstore.blend.calibration import USUAL, Quality, Verdict, keep, way
from kvstore.blocks.spec import ModelIdentity
from kvstore.connectors.transformers.cache import KVStoreCache, cache_part
from kvstore.connectors.transformers.pieces import Pieces
from kvstore.sources import load_config

_WAYS: Final = (("none", 0.0), ("first", 0.1), USUAL, ("question", 0.5))
_WAITS: Final = ("lookup_timeout", "load_timeout", "save_timeout")
"""Nobody waits for an answer here, and a piece that is missing would be exact."""


class Calibration:
    """Of one model; go through `run`, then there is a verdict."""

    def __init__(self, place: str, dtype: str, revision: str | None) -> None:
        """Load the model that is at `place`, or called so on a hub, with numbers of a type."""
        transformers.utils.logging.disable_progress_bar()
        self._place, self._revision = place, revision
        load = transformers.AutoModelForCausalLM.from_pretrained
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load(place, dtype=dtype).to(device).eval()
        self.prompts = list(prompts(transformers.AutoTokenizer.from_pretrained(place)))
        self._outcomes: dict[tuple[str, float], list[Outcome]] = {one: [] for one in _WAYS}
        self._identity: ModelIdentity | None = None

    def run(self) -> Iterator[None]:
        """Measure one prompt after the other.

        Raises:
            SpecError: this model's pieces cannot be reused, and why.
            BenchmarkError: the store did not keep them.
        """
        patient = load_config(overrides={"session": dict.fromkeys(_WAITS, 60.0)})
        with KVStoreCache.open(self._model, patient, revision=self._revision) as cache:
            pieces = Pieces(cache.session, self._model, cache_part(self._model).group)
            for prompt in self.prompts:
                for one, outcome in judged(self._model, pieces, prompt, _WAYS)[1].items():
                    self._outcomes[one].append(outcome)
                yield
            pieces.close()
            self._identity = cache.session.namespace.model

    def verdict(self) -> tuple[Verdict, str]:
        """What was found, and the file in which it is kept from now on."""
        assert self._identity is not None
        ways = {way(*one): _quality(outcomes) for one, outcomes in self._outcomes.items()}
        tokens = sum(len(outcome.kl) for outcome in self._outcomes[USUAL])
        verdict = Verdict(1, self._place, tokens, ways)
        return verdict, str(keep(self._identity, verdict))


def _quality(outcomes: Sequence[Outcome]) -> Quality:
    kl, same = (np.mean([getattr(o, name) for o in outcomes]) for name in ("kl", "same"))
    return Quality(float(kl), float(same))
