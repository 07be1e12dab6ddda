"""Prefix reuse for Hugging Face transformers, across requests, processes and restarts.

    cache = KVStoreCache.open(model)
    output = cache.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64)
    print(cache.last)

or step by step, with `model.generate` called by hand::

    past = cache.load(input_ids)
    sequences = model.generate(input_ids, past_key_values=past, max_new_tokens=64)
    cache.save(sequences, past)

The tokens generated are saved too, so the next turn of a chat starts where the last one ended.
"""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from msgspec import structs
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from kvstore.blend import calibration
from kvstore.blend.reuse import Reuse, asked
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.client.session import Session
from kvstore.client.transfer import Saved
from kvstore.codecs.quantized import quantised
from kvstore.connectors.common.shards import shards_of
from kvstore.connectors.transformers.arguments import attended, refused, tokens_of
from kvstore.connectors.transformers.contents import Contents
from kvstore.connectors.transformers.model import (
    FilledCache,
    cache_group,
    cache_part,
    model_identity,
)
from kvstore.connectors.transformers.pieces import Approximate, Pieces
from kvstore.connectors.transformers.planes import allocate, pages
from kvstore.connectors.transformers.state import unfit
from kvstore.connectors.transformers.weights import Weights
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.quantized import QuantisingCopier
from kvstore.errors import KVStoreError, SpecError
from kvstore.sources import load_config
from kvstore.telemetry import QuietLog

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from kvstore.client.planner import LoadPlan
    from kvstore.config import Config

__all__ = ["KVStoreCache", "Report", "cache_part", "model_identity"]

_log = logging.getLogger("kvstore.transformers")
_ASKED: Final = ("reuse", "pieces", "recompute", "selection", "repair")
_CHANGED: Final = (
    "the model is not what this cache was opened for: the store is left alone; open another cache"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What one request took from the store, what it computed, and what it gave back.

    Attributes:
        prompt_tokens: length of the prompt.
        tiers: tokens loaded, by the tier they came from.
        load_seconds: time to make keys, ask, plan and copy.
        nbytes: bytes loaded.
        reason: why that many tokens were loaded, or why no more.
        plan: what the planner decided; None if the prompt has no whole block to look for.
        first_token_seconds: from the call of `generate` to the first token's logits, the load
            included; None if `generate` of the model was called by hand.
        saved: what was stored afterwards; None before `save`.
        approximate: what became of reused pieces; None if none were asked for.
    """

    prompt_tokens: int
    tiers: dict[str, int] = field(default_factory=dict)
    load_seconds: float = 0.0
    nbytes: int = 0
    reason: str = ""
    plan: LoadPlan | None = None
    first_token_seconds: float | None = None
    saved: Saved | None = None
    approximate: Approximate | None = None

    def __str__(self) -> str:
        """For people; `repr` has all."""
        places = ", ".join(f"{count} from {tier}" for tier, count in self.tiers.items())
        text = f"{self.loaded_tokens} of {self.prompt_tokens} tokens loaded"
        text += f" ({places}) in {self.load_seconds:.3f} s" if places else ""
        text += f": {self.reason}" if self.reason else ""
        text += f"; {self.approximate}" if self.approximate else ""
        if self.first_token_seconds is not None:
            text += f"; first token after {self.first_token_seconds:.3f} s"
        return text + (f"; {self.saved.stored} blocks saved" if self.saved else "")

    @property
    def loaded_tokens(self) -> int:
        """Tokens of the prompt that came from the store and were not computed again."""
        pieces = self.approximate.reused if self.approximate else 0
        return sum(self.tiers.values()) + pieces

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that the model has to compute; at least one."""
        return self.prompt_tokens - self.loaded_tokens


class KVStoreCache:
    """The KV cache of one model, kept in a store.

    `generate` gives what `model.generate` would. Where KV cannot be shared, or the store is down,
    slow or full, the model computes it, and `last.reason` says why. `load` and `save`, for calls by
    hand, raise `SpecError` on wrong arguments.

    A model that has changed (weights written in place or replaced, adapters, settings) is named
    anew at the next call, which reads the weights that have changed. Where its name was given (a
    session, `revision`, `identity`), the store is left alone until the model is what it was. Single
    numbers written through `.data` or numpy can pass unseen; whole rows and columns cannot.

    One sequence at a time, full attention only. Use one instance per thread; a session may be
    shared.
    """

    def __init__(
        self,
        session: Session,
        model: PreTrainedModel,
        *,
        uncalibrated: bool = False,
        shadow: float = 0.01,
    ) -> None:
        """Use an open `session`, whose namespace must identify `model` (see `model_identity`).

        Pieces are reused if the model's calibration has passed, or `uncalibrated`. A share `shadow`
        of the calls that reuse some computes the whole prompt as well, for `last.approximate.kl`.

        Raises:
            SpecError: the model's KV cannot be stored, or the session is for another shape of KV.
        """
        part = cache_part(model)
        shards = shards_of(part, len(session.parts))
        pairs = list(zip(shards, session.parts, strict=False))
        fit = all(own == held or (held.lossy and own.casts_to(held)) for own, held in pairs)
        if not fit or len(shards) != len(session.parts):
            raise SpecError(
                f"the session holds {list(session.parts)}, but the model's cache is {part}; "
                "open the session with parts=[cache_part(model)]"
            )
        self.session = session
        self.model = model
        self.last: Report | None = None
        self._part = part
        self._quantised = session.parts[0].lossy
        self._anew: Callable[[], Session] | None = None
        self._weights = Weights(model)
        self._state = self._weights.state(Contents(model))
        self._problem = ""
        # For each cache that `load` made: whose KV it is, and how many tokens of it may be saved.
        self._made = WeakKeyDictionary[DynamicCache, tuple[Session | None, int]]()
        self._once = QuietLog(_log, math.inf)
        self._pieces: tuple[Session, Pieces] | None = None
        self._uncalibrated = uncalibrated
        self._shadow, self._chance = shadow, random.Random(0)

    @classmethod
    def open(
        cls,
        model: PreTrainedModel,
        config: Config | None = None,
        *,
        tenant: str = "",
        block_tokens: int = 64,
        revision: str | None = None,
        identity: ModelIdentity | None = None,
        codec: str = "",
        uncalibrated: bool = False,
        shadow: float = 0.01,
    ) -> KVStoreCache:
        """Open a session for `model`. Without an address in `config` a private store is started.

        Caches of different tenants never share a block. `revision` names the weights (a commit)
        and saves hashing them; `identity` replaces all that would be found out about the model.
        With a `codec` (`i8`, `i6`, `i4g32`; see docs/codecs.md) numbers are quantised in the store,
        and answers may change; exact caches never find such blocks, nor the reverse. Pieces are
        reused if `kvstore calibrate` has found that this model's answers stay close, or
        `uncalibrated`; `shadow` as above.

        Raises:
            SpecError: the model's KV cannot be stored, and why.
            ConfigError: a setting is wrong.
            StoreUnavailable: the store refused the session.
        """
        weights = Weights(model)

        def anew() -> Session:
            part, settings = cache_part(model), config or load_config()
            named = identity or model_identity(model, part, weights, revision=revision)
            parts, copier = shards_of(part, settings.session.head_shards), None
            if codec:
                parts = tuple(quantised(shard, codec, block_tokens) for shard in parts)
                named = structs.replace(named, extra=(*named.extra, ("stored", codec)))
                copier = QuantisingCopier(CpuCopier(settings.session.copy_threads))
            space = Namespace(named, tenant, block_tokens)
            return Session.open(space, parts, settings, copier=copier)

        cache = cls(anew(), model, uncalibrated=uncalibrated, shadow=shadow)
        cache._anew = None if revision or identity else anew
        return cache

    def close(self) -> None:
        """Close the session."""
        if self._pieces is not None:
            self._pieces[1].close()
        self.session.close()

    def __enter__(self) -> KVStoreCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def load(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> DynamicCache:
        """A cache that holds the longest stored prefix of `input_ids` worth loading.

        `input_ids` has shape [1, tokens]; at least one token is left to compute. Pass the result
        as `past_key_values`, with all of `input_ids`, the same mask and `options`, to
        `model.generate`. A masked token ends the prefix; without a mask, so does the pad token.

        Raises:
            SpecError: a batch, or a mask of another shape.
        """
        names = ", ".join(refused(self.model, options))
        problem = f"{names} may change KV" if names else ""
        past = FilledCache(config=self.model.config)
        past.problem = self._load(past, problem, input_ids, attention_mask, options)
        return past

    def _load(
        self,
        past: DynamicCache,
        problem: str,
        input_ids: Any,
        attention_mask: Any,
        options: Mapping[str, Any],
    ) -> str:
        """Fill `past`, unless there is a `problem`; returns why it is not to be saved later."""
        start = time.perf_counter()
        tokens = tokens_of(input_ids, attention_mask)
        problem = self._left_alone() or problem
        limit = attended(self.model, options, tokens, attention_mask)
        size, end = self.session.block_tokens, min(limit, len(tokens) - 1)
        keys = [] if problem else self.session.keys(tokens[: end // size * size])
        none = f"the prompt has no whole block of {size} tokens before token {end}"
        report = Report(len(tokens), reason=problem or none)
        if problem:
            self._once.warning(problem, "computed without the store: %s", problem)
        if keys:
            plan = self.session.plan(keys)
            # A store that is away has nothing to offer; say so rather than "nothing found".
            reason = plan.reason if plan.found else self.session.problem or plan.reason
            report = replace(report, plan=plan, reason=reason)
            if plan.blocks:
                report = self._fill(past, keys[: plan.blocks], report)
        session = None if problem else self.session
        past.quantised = self._quantised
        self._made[past] = session, limit if limit < len(tokens) else sys.maxsize
        self.last = replace(report, load_seconds=time.perf_counter() - start)
        return problem

    def save(self, sequences: torch.Tensor, past: DynamicCache) -> Saved:
        """Store the whole blocks of `past` that the store lacks, generated tokens included.

        `sequences`, shape [1, tokens], are the tokens whose KV `past` holds, in order. It may have
        more: the token generated last has not been through the model, and has no KV yet. Nothing is
        stored if the model has changed since `load` made `past`. Another `past` must come from the
        model as it was at the last load, without a mask.

        Raises:
            SpecError: no `DynamicCache` of this model, more KV than tokens, or a batch.
        """
        group = cache_group(past)
        if group != self._part.group:
            raise SpecError(f"past holds {group}; the model of this cache has {self._part.group}")
        tokens = tokens_of(sequences)
        held = past.get_seq_length()
        if held > len(tokens):
            raise SpecError(
                f"past holds {held} tokens, sequences only {len(tokens)}; pass the prompt and "
                "everything generated after it"
            )
        size = self.session.block_tokens
        own = self.session, attended(self.model, {}, tokens, None)
        session, limit = self._made.get(past, own)
        now = Contents(self.model)
        changed = session is not self.session or self._weights.state(now) != self._state
        problem = getattr(past, "problem", "") or ("the model has changed" if changed else "")
        problem = problem or self._problem or unfit(self.model, now)
        if getattr(past, "quantised", False) and not self._quantised:
            problem = "past was loaded from a cache with a codec"
        keys = [] if problem else self.session.keys(tokens[: min(held, limit) // size * size])
        # Only what is new should cross from a device; on the CPU the store looks for itself.
        on_cpu = past.layers[0].keys.device.type == "cpu"
        known = 0 if on_cpu else self.session.lookup(keys, again=True).blocks
        planes = [
            tensor[:, :, known * size : len(keys) * size].detach().to("cpu")
            for layer in past.layers
            for tensor in (layer.keys, layer.values)
        ]
        saved = Saved(had=known, dropped=held // size if problem else 0, reason=problem or None)
        if keys[known:]:
            new = len(keys) - known
            memory, numbers = pages(self.session, group, planes, new)
            saved = self.session.save(
                keys[known:],
                memory,
                numbers,
                parent=keys[known - 1] if known else b"",
                position=known,
            )
            saved.had += known
        if self.last is not None:
            self.last = replace(self.last, saved=saved)
        return saved

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` with the stored prefix loaded before and the new blocks saved after.

        Takes what `model.generate` takes and returns what it returns. `last` tells what happened.
        Calls with arguments or options that may change KV values go without the store.

        With any of `pieces`, `recompute` and `selection` (see `kvstore.blend.reuse`) pieces that
        `add_piece` has stored are reused wherever they stand: then the answer is approximate, and
        neither the prompt's blocks nor the answer's are stored.

        Raises:
            SpecError: these are not as they must be.
        """
        start = time.perf_counter()
        ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        words = {name: kwargs.pop(name) for name in _ASKED if name in kwargs}
        count = ids.shape[-1] if isinstance(ids, torch.Tensor) and ids.ndim else 0
        reuse = asked({"reuse": "approximate"} | words if words else None, count)
        if isinstance(attention_mask, GenerationConfig):  # where `model.generate` takes it
            kwargs["generation_config"], attention_mask = attention_mask, None
        past = None
        try:
            if names := refused(self.model, kwargs):
                raise SpecError(f"{', '.join(names)} may change KV, or needs a cache of its own")
            kind = FilledCache if reuse.approximate else DynamicCache
            past = kind(config=self.model.config)
            if not self._load(past, "", ids, attention_mask, kwargs) and reuse.approximate:
                self._blend(past, ids, reuse)
        except Exception as e:  # noqa: BLE001 - whatever is wrong, the model can compute
            why = str(e) if isinstance(e, KVStoreError) else f"{type(e).__name__}: {e}"
            past = None
            self.last = Report(count, reason=why)
            self._once.warning(why.split()[0], "computed without the store: %s", why)
        given = kwargs if attention_mask is None else kwargs | {"attention_mask": attention_mask}
        inputs = () if ids is None else (ids,)
        report = self.last
        if past is None or self._made[past][0] is None or report is None:
            return self.model.generate(*inputs, **given)
        first = _FirstToken()
        processors = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), first])
        given = given | {"past_key_values": past, "logits_processor": processors}
        repair = getattr(past, "repair", None)
        if repair is not None:
            criteria = [*(kwargs.get("stopping_criteria") or ()), repair]
            given["stopping_criteria"] = StoppingCriteriaList(criteria)
        prefill = time.perf_counter()
        output = self.model.generate(*inputs, **given)
        try:
            if repair is not None and report.approximate is not None:
                done = replace(report.approximate, repaired=repair.repaired)
                report = replace(report, approximate=done)
            if first.at is not None:
                self.last = replace(report, first_token_seconds=first.at - start)
                # A short prefill measures the overhead of a step, not the rate of many tokens.
                if report.computed_tokens >= self.session.block_tokens and not reuse.approximate:
                    count = report.computed_tokens
                    looked_back = count * (report.prompt_tokens - count / 2)
                    self.session.report_prefill(count, first.at - prefill, looked_back)
            self.save(output if isinstance(output, torch.Tensor) else output.sequences, past)
        except Exception as e:  # noqa: BLE001 - the answer is there; it must not be lost
            self._once.warning("save", "not saved: %s: %s", type(e).__name__, e)
        return output

    def add_piece(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> Saved:
        """Compute and store a piece of text, to be reused behind any other; see `generate`.

        `tokens` as they will stand in prompts. It is then also found where a prompt does not say
        that it is there: by this cache, until it is closed.

        Raises:
            SpecError: the piece is too short or too long, the model's KV cannot be moved, or it has
                passed no calibration.
            StoreUnavailable: the store refused a session for pieces.
        """
        if problem := self._left_alone():
            raise SpecError(problem)
        return self._of_pieces().add(tokens)

    def _of_pieces(self) -> Pieces:
        """The pieces of the model as it is now."""
        if self._pieces is None or self._pieces[0] is not self.session:
            old, named = self._pieces, self.session.namespace.model
            if not self._uncalibrated and (problem := calibration.uncalibrated(named)):
                raise SpecError(f"uncalibrated: {problem}")
            made = Pieces(self.session, self.model, self._part.group)
            self._pieces = self.session, made
            if old is not None:
                old[1].close()
        return self._pieces[1]

    def _blend(self, past: FilledCache, input_ids: torch.Tensor, reuse: Reuse) -> None:
        """Reuse pieces beyond the exact prefix in `past`; whatever fails, that stays as it is."""
        start, report, done = time.perf_counter(), self.last, Approximate()
        assert report is not None
        tokens, held = tokens_of(input_ids), past.get_seq_length()
        try:
            if self._made[past][1] < len(tokens):
                raise SpecError("not all tokens are attended to")
            shadow = self._chance.random() < self._shadow
            done = self._of_pieces().blend(past, tokens, reuse, shadow=shadow)
        except Exception as e:  # noqa: BLE001 - what is wrong with pieces, an exact answer is not
            why = str(e) if isinstance(e, KVStoreError) else f"{type(e).__name__}: {e}"
            report = replace(report, reason=f"no pieces reused: {why}")
            self._once.warning("pieces", "no pieces reused: %s", why)
        if past.get_seq_length() > held:
            past.problem = "it holds reused pieces, which are approximate"
        seconds = report.load_seconds + time.perf_counter() - start
        self.last = replace(report, approximate=done, load_seconds=seconds)

    def _fill(self, past: DynamicCache, keys: Sequence[bytes], report: Report) -> Report:
        """Load `keys` into `past`, as far as they arrive."""
        group, size = self._part.group, self.session.block_tokens
        planes = allocate(group, len(keys) * size)
        memory, numbers = pages(self.session, group, planes, len(keys))
        loaded = self.session.load(keys, memory, numbers)
        if not loaded.blocks:
            return replace(report, reason=loaded.reason or report.reason)
        arrived = loaded.blocks * size
        device = self.model.device
        for layer, keys_of, values_of in zip(past.layers, planes[::2], planes[1::2], strict=True):
            # Set, not `update`d: that would copy them, and the first step does so anyway.
            layer.keys = keys_of[:, :, :arrived].to(device)
            layer.values = values_of[:, :, :arrived].to(device)
            layer.dtype, layer.device = layer.keys.dtype, device
            layer.is_initialized = True
        return replace(
            report,
            tiers={tier: blocks * size for tier, blocks in loaded.tiers.items() if blocks},
            nbytes=loaded.nbytes,
            reason=loaded.reason or report.reason,
        )

    def _left_alone(self) -> str:
        """Why a call that begins now must leave the store alone; empty if it need not.

        A model that has changed is named anew, where that is this cache's business.
        """
        held = Contents(self.model)
        if problem := unfit(self.model, held):
            return problem
        state = self._weights.state(held)
        if state == self._state:
            return self._problem
        if self._anew is None:
            return _CHANGED
        self._state, self._problem = state, _CHANGED
        try:
            part, session = cache_part(self.model), self._anew()
        except KVStoreError as e:
            self._problem = str(e)
        else:
            self.session.close()
            self.session, self._part, self._problem = session, part, ""
        return self._problem


class _FirstToken:
    """A logits processor that changes nothing and notes when the first logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            scores[0, 0].item()  # waits for the device
            self.at = time.perf_counter()
        return scores
