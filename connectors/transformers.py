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

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from kvstore.connectors.transformers_model import (
    adapter_state,
    cache_group,
    cache_part,
    model_identity,
)
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.errors import SpecError
from kvstore.session import Session
from kvstore.spec import ModelIdentity, Namespace
from kvstore.transfer import Saved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.config import Config
    from kvstore.planner import LoadPlan

__all__ = ["KVStoreCache", "Report", "cache_part", "model_identity"]


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
    """

    prompt_tokens: int
    tiers: dict[str, int] = field(default_factory=dict)
    load_seconds: float = 0.0
    nbytes: int = 0
    reason: str = ""
    plan: LoadPlan | None = None
    first_token_seconds: float | None = None
    saved: Saved | None = None

    @property
    def loaded_tokens(self) -> int:
        """Tokens of the prompt that came from the store."""
        return sum(self.tiers.values())

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that the model has to compute; at least one."""
        return self.prompt_tokens - self.loaded_tokens


class KVStoreCache:
    """The KV cache of one model, kept in a store.

    A store that is down, slow or full costs hits, never an exception: `load` then returns an empty
    cache and `save` stores nothing, and `last.reason` says why. Wrong arguments raise `SpecError`.

    One sequence at a time, full attention only. Use one instance per thread; a session may be
    shared. Weights changed in place need a new instance; switched adapters are noticed and refused.
    """

    def __init__(self, session: Session, model: PreTrainedModel) -> None:
        """Use an open `session`, whose namespace must identify `model` (see `model_identity`).

        Raises:
            SpecError: the model's KV cannot be stored, or the session is for another shape of KV.
        """
        part = cache_part(model)
        if list(session.parts) != [part]:
            raise SpecError(
                f"the session holds {list(session.parts)}, but the model's cache is {part}; "
                "open the session with parts=[cache_part(model)]"
            )
        self.session = session
        self.model = model
        self.last: Report | None = None
        self._part = part
        self._adapters = adapter_state(model)

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
    ) -> KVStoreCache:
        """Open a session for `model`. Without an address in `config` a private store is started.

        Caches of different tenants never share a block. `revision` names the weights (a commit)
        and saves hashing them; `identity` replaces all that would be found out about the model.

        Raises:
            SpecError: the model's KV cannot be stored, and why.
            ConfigError: a setting is wrong.
            StoreUnavailable: the store refused the session.
        """
        part = cache_part(model)
        identity = identity or model_identity(model, part, revision=revision)
        namespace = Namespace(identity, tenant=tenant, block_tokens=block_tokens)
        return cls(Session.open(namespace, [part], config), model)

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    def __enter__(self) -> KVStoreCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def load(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> DynamicCache:
        """A cache that holds the longest stored prefix of `input_ids` worth loading.

        `input_ids` has shape [1, tokens]; at least one token is left to compute. Pass the result
        as `past_key_values`, together with all of `input_ids`, to `model.generate`.

        Raises:
            SpecError: a batch, padding, or adapters switched since this cache was opened.
        """
        start = time.perf_counter()
        self._check_adapters()
        tokens = _tokens(input_ids, attention_mask)
        size = self.session.block_tokens
        keys = self.session.keys(tokens[: (len(tokens) - 1) // size * size])
        past = DynamicCache(config=self.model.config)
        report = Report(len(tokens), reason=f"the prompt has no whole block of {size} tokens")
        if keys:
            plan = self.session.plan(keys)
            # A store that is away has nothing to offer; say so rather than "nothing found".
            reason = plan.reason if plan.found else self.session.problem or plan.reason
            report = replace(report, plan=plan, reason=reason)
            if plan.blocks:
                report = self._fill(past, keys[: plan.blocks], report)
        self.last = replace(report, load_seconds=time.perf_counter() - start)
        return past

    def save(self, sequences: torch.Tensor, past: DynamicCache) -> Saved:
        """Store the whole blocks of `past` that the store lacks, generated tokens included.

        `sequences`, shape [1, tokens], are the tokens whose KV `past` holds, in order. It may have
        more: the token generated last has not been through the model, and has no KV yet.

        Raises:
            SpecError: no `DynamicCache` of this model, more KV than tokens, a batch, or adapters
                switched since this cache was opened.
        """
        self._check_adapters()
        group = cache_group(past)
        if group != self._part.group:
            raise SpecError(f"past holds {group}; the model of this cache has {self._part.group}")
        tokens = _tokens(sequences)
        held = past.get_seq_length()
        if held > len(tokens):
            raise SpecError(
                f"past holds {held} tokens, sequences only {len(tokens)}; pass the prompt and "
                "everything generated after it"
            )
        size = self.session.block_tokens
        keys = self.session.keys(tokens[: held // size * size])
        # Only what is new should cross from a device; on the CPU the store looks for itself.
        on_cpu = past.layers[0].keys.device.type == "cpu"
        known = 0 if on_cpu else self.session.lookup(keys, again=True).blocks
        planes = [
            tensor[:, :, known * size : len(keys) * size].detach().to("cpu")
            for layer in past.layers
            for tensor in (layer.keys, layer.values)
        ]
        saved = Saved(had=known)
        if keys[known:]:
            new = len(keys) - known
            pages = np.arange(new, dtype=np.int64).reshape(-1, 1)
            saved = self.session.save(keys[known:], [self._memory(planes, new)], [pages])
            saved.had += known
        if self.last is not None:
            self.last = replace(self.last, saved=saved)
        return saved

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` with the stored prefix loaded before and the new blocks saved after.

        Takes what `model.generate` takes and returns what it returns. `last` tells what happened.

        Raises:
            SpecError: see `load`; also beams, several sequences, and arguments that change KV
                values in a way that keys do not cover.
        """
        self._check_arguments(kwargs)
        start = time.perf_counter()
        past = self.load(input_ids, attention_mask)
        first = _FirstToken()
        kwargs["logits_processor"] = LogitsProcessorList(
            [*(kwargs.get("logits_processor") or ()), first]
        )
        prefill = time.perf_counter()
        output = self.model.generate(
            input_ids, attention_mask=attention_mask, past_key_values=past, **kwargs
        )
        report = self.last
        assert report is not None
        if first.at is not None:
            self.last = replace(report, first_token_seconds=first.at - start)
            # A short prefill measures the overhead of a step, not the rate of many tokens.
            if report.computed_tokens >= self.session.block_tokens:
                self.session.report_prefill(report.computed_tokens, first.at - prefill)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self.save(sequences, past)
        return output

    def _fill(self, past: DynamicCache, keys: Sequence[bytes], report: Report) -> Report:
        """Load `keys` into `past`, as far as they arrive."""
        group, size = self._part.group, self.session.block_tokens
        length = len(keys) * size
        dtype = getattr(torch, group.dtype)
        whole = [
            _allocate((group.layers, 1, group.heads, length, width), dtype)
            for width in group.channels
        ]
        planes = [plane[layer] for layer in range(group.layers) for plane in whole]
        pages = np.arange(len(keys), dtype=np.int64).reshape(-1, 1)
        loaded = self.session.load(keys, [self._memory(planes, len(keys))], [pages])
        if not loaded.blocks:
            return replace(report, reason=loaded.reason or report.reason)
        arrived = loaded.blocks * size
        device = self.model.device
        for layer, keys_of, values_of in zip(past.layers, planes[::2], planes[1::2], strict=True):
            # Set, not `update`d: that would copy them, and the first step does so anyway.
            layer.keys = keys_of[:, :, :arrived].to(device)
            layer.values = values_of[:, :, :arrived].to(device)
            layer.dtype, layer.device = dtype, device
            layer.is_initialized = True
        return replace(
            report,
            tiers={tier: blocks * size for tier, blocks in loaded.tiers.items() if blocks},
            nbytes=loaded.nbytes,
            reason=loaded.reason or report.reason,
        )

    def _memory(self, planes: Sequence[torch.Tensor], blocks: int) -> PagedMemory:
        """`planes`, each [1, heads, tokens, channels] on the CPU, as pages of one block each."""
        size = self.session.block_tokens
        places = []
        for plane in planes:
            _, head, token, channel = (stride * plane.element_size() for stride in plane.stride())
            places.append(PlaneMemory(plane.data_ptr(), size * token, token, head, channel))
        return PagedMemory(self._part, size, blocks, tuple(places), owner=planes)

    def _check_adapters(self) -> None:
        now = adapter_state(self.model)
        if now != self._adapters:
            raise SpecError(
                f"the model's adapters are now {now or 'none'}, but this cache was opened for "
                f"{self._adapters or 'none'}; open a KVStoreCache for each"
            )

    def _check_arguments(self, kwargs: dict[str, Any]) -> None:
        if "past_key_values" in kwargs:
            raise SpecError("generate() makes past_key_values itself; call load() to make your own")
        config = kwargs.get("generation_config") or self.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            number = kwargs.get(name, getattr(config, name, None)) or 1
            if number > 1:
                raise SpecError(f"{name} is {number}; only one sequence at a time can be stored")
        for name in ("cache_implementation", "prefill_chunk_size"):
            value = kwargs.get(name, getattr(config, name, None))
            if value is not None:
                raise SpecError(f"{name}={value!r} cannot go on from a loaded prefix; leave it out")
        if kwargs.get("use_cache", True) is False:
            raise SpecError("use_cache=False leaves no KV to store; leave it out")
        tensors = sorted(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        if tensors:
            raise SpecError(
                f"{', '.join(tensors)} may change KV values, and block keys cover token ids only; "
                "leave it out, or call model.generate without a store"
            )


class _FirstToken:
    """A logits processor that changes nothing and notes when the first logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            scores[0, 0].item()  # waits for the device
            self.at = time.perf_counter()
        return scores


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, uninitialised.

    In numpy's memory, for which it asks the kernel for huge pages: touching it for the first time,
    which a load does, is three times as fast as with torch's.
    """
    memory = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def _tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> NDArray[np.int64]:
    """`input_ids` [1, tokens] as a flat array; refuses batches and padding."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise SpecError(
            f"input_ids has shape {tuple(input_ids.shape)}; one sequence, [1, tokens], is "
            "supported: call once per sequence"
        )
    if not input_ids.shape[1]:
        raise SpecError("input_ids is empty")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise SpecError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
                f"{tuple(input_ids.shape)}; they must be equal"
            )
        if not bool((attention_mask == 1).all()):
            raise SpecError(
                "attention_mask leaves tokens out (padding?), which block keys do not cover; "
                "pass the sequence without padding"
            )
    tokens: NDArray[np.int64] = input_ids[0].to("cpu", torch.int64).numpy()
    return tokens
