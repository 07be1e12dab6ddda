"""What SGLang's requests are to the store: their tokens, what else changes their KV, their wishes.

SGLang names adapters by random ids, and images by numbers beyond all token ids that stand in their
place, from hashes that callers may choose. The store names an adapter by its files and an image by
what the model is given of it, and has an image's numbers beside tokens that are 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.keys import MAX_TOKEN, Media
from kvstore.blocks.spec import Namespace
from kvstore.blocks.weights import weights_digest
from kvstore.connectors.common.handoffs import HandOff
from kvstore.connectors.common.identity import started
from kvstore.connectors.common.media import feed
from kvstore.connectors.common.requests import Asked
from kvstore.connectors.common.settings import Settings, Wishes, is_tenant, wishes_of
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.common.uncomputed import Uncomputed
from kvstore.errors import SpecError
from kvstore.telemetry import QuietLog

_log = logging.getLogger("sglang.srt.kvstore.prompts")

_MOST: Final = 4096
"""Requests that are remembered."""
_MOST_SESSIONS: Final = 1024
"""Sessions of which the last request is remembered."""
_MOST_NUMBERS: Final = 1 << 18
"""Numbers for images that are remembered, four for each."""


class Adapters:
    """LoRA adapters by the digests of their files. Used by one thread."""

    def __init__(self, refs: Callable[[], Mapping[str, Any]]) -> None:
        """`refs` has what SGLang has loaded, by id."""
        self._refs = refs
        self._loaded_at: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    def loading(self, lora_id: str, now: float) -> None:
        """An adapter is about to be loaded, `now` in seconds since 1970."""
        for gone in (self._digests.keys() | self._loaded_at.keys()) - self._refs().keys():
            self._digests.pop(gone, None)
            self._loaded_at.pop(gone, None)
        self._loaded_at[lora_id] = now

    def refuse(self, lora_id: str) -> None:
        """An adapter comes from no files."""
        self._digests[lora_id] = ""

    def digest(self, lora_id: str | None) -> str:
        """What an adapter is called in keys; empty for none.

        Raises:
            SpecError: nobody knows what it holds.
            OSError: its files cannot be read.
        """
        if lora_id is None:
            return ""
        found = self._digests.get(lora_id)
        if found is None:
            ref = self._refs().get(lora_id)
            place = Path(str(getattr(ref, "lora_path", None))).expanduser()
            if ref is None or not place.exists():
                raise SpecError(f"LoRA adapter {lora_id} is not in a folder of this machine")
            since = self._loaded_at.get(lora_id, started())
            found = self._digests[lora_id] = weights_digest(place, loaded_at=since)
        if not found:
            raise SpecError(f"LoRA adapter {lora_id} was given as tensors")
        return found


@dataclass(slots=True)
class Prompt(Asked):
    """A request; `ids` are its tokens in SGLang's numbers, shape (n,)."""

    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    items: tuple[Media, ...] = ()
    """What the model is given of images and the like, by its content."""
    waits: bool = False
    """Whether the store is to be asked again in a moment."""
    handoff: HandOff = field(default_factory=HandOff)
    ended: bool = False
    """Nothing more comes of it than what is being saved."""

    def know(self, ids: NDArray[np.int64]) -> None:
        """Take in its tokens, from the first on; they grow as it is computed."""
        both = min(len(ids), len(self.ids))
        if not np.array_equal(ids[:both], self.ids[:both]):
            self.keys, self.found = [], None
        elif len(ids) <= len(self.ids):
            return
        self.ids = ids
        self.tokens, media = plain(ids, self.namespace.block_tokens)
        self.extras = {**self.extras, "media": self.items + media}


def plain(
    ids: NDArray[np.int64], block_tokens: int
) -> tuple[NDArray[np.uint32], tuple[Media, ...]]:
    """Tokens as keys have them, and what stands for the numbers that are none, block by block."""
    wide = (ids < 0) | (ids > MAX_TOKEN)
    if not wide.any():
        return ids.astype(np.uint32), ()
    at = np.flatnonzero(wide)
    begins = np.ones(len(at), np.bool_)
    begins[1:] = (np.diff(at) > 1) | (np.diff(ids[at]) != 0) | (at[1:] % block_tokens == 0)
    first = np.flatnonzero(begins)
    lengths = np.diff(np.append(first, len(at)))
    media = tuple(
        Media("ids", f"{ids[at[i]]:x}*{length}", int(at[i]), int(length))
        for i, length in zip(first, lengths, strict=True)
    )
    return np.where(wide, 0, ids).astype(np.uint32), media


def _left(known: tuple[ref[Any], Prompt | None]) -> tuple[int, bool] | None:
    of, prompt = known
    req = of()
    if prompt is None or req is None or req.output_ids:
        return None
    found, size = prompt.found, prompt.namespace.block_tokens
    stored = 0 if found is None else found.start + len(found.tiers) * size
    return max(0, len(prompt.ids) - stored), prompt.waits


def _session_of(req: Any) -> str | None:
    """The session of SGLang's that a request is in."""
    session: str | None = getattr(req, "session_id", None)
    return session or getattr(getattr(req, "session", None), "session_id", None)


def _content(item: Any) -> str:
    """What the model is given of an image or the like.

    Raises:
        SpecError: that is not known here, or not any more.
    """
    h = hashlib.sha256()
    given = {"feature": item.feature, "embeddings": item.precomputed_embeddings}
    given |= item.model_specific_data
    empty = item.feature is None and item.precomputed_embeddings is None
    if empty or not all([feed(h, name) and feed(h, given[name]) for name in sorted(given)]):
        raise SpecError("what the model is given of an image or the like is not known here")
    if not item.offsets:
        raise SpecError("where an image or the like stands is not known here")
    return h.hexdigest()


class Prompts:
    """Requests as the store sees them. Used by one thread."""

    def __init__(
        self, settings: Settings, namespace: Namespace, adapters: Adapters, stats: Stats,
        ended: Callable[[Prompt], object] = lambda _: None,
    ) -> None:  # fmt: skip
        """`ended` is told of each that is forgotten."""
        self._ended = ended
        self._settings = settings
        self._namespace = namespace
        self._adapters = adapters
        self._stats = stats
        self._known: OrderedDict[str, tuple[ref[Any], Prompt | None]] = OrderedDict()
        self._meant: OrderedDict[int, str] = OrderedDict()
        """What stands for numbers beyond tokens in SGLang's tree; empty: more than one thing."""
        self._sessions: OrderedDict[str, Prompt] = OrderedDict()
        """The last request of each."""
        self._left: deque[tuple[str, ref[Any]]] = deque()
        self._quiet = QuietLog(_log)
        self.uncomputed = Uncomputed(_left)

    def known(self, rid: str) -> Prompt | None:
        """A request that has come up; None: it has not, or it goes without the store."""
        self.sweep()
        found = self._known.get(rid)
        return None if found is None else found[1]

    def of(self, req: Any, weights: str) -> Prompt | None:
        """A request; None: it goes without the store.

        `weights` names those of the engine, beside the namespace's.
        """
        known = self._known.get(req.rid)
        if known is None or known[0]() is not req:  # Callers choose names, and may do so again.
            self.forget(req.rid)
            try:
                found = self._take(req, weights)
            except (SpecError, OSError) as e:
                found = None
                self._quiet.warning("unkeyed", "a request goes without the store: %s", e)
                self._stats.skipped("unkeyed")
            known = ref(req, partial(self._gone, req.rid)), found
            self._known[req.rid] = known
            self.uncomputed.add(req.rid, known)
            session = _session_of(req)
            if session is not None and found is not None:
                self._sessions.pop(session, None)
                self._sessions[session] = found
                if len(self._sessions) > _MOST_SESSIONS:
                    self._sessions.popitem(last=False)
            if len(self._known) > _MOST:
                self.forget(next(iter(self._known)))
        return known[1]

    def _take(self, req: Any, weights: str) -> Prompt:
        if req.input_embeds is not None or req.positional_embed_overrides is not None:
            raise SpecError("prompts given as embeddings have no tokens to go by")
        tenant, salt = self._settings.tenant, req.cache_salt or ""
        if salt and self._settings.salt_is_tenant:
            tenant, salt = salt, ""
            if not is_tenant(tenant):
                raise SpecError(f"its cache_salt, {tenant!r:.80}, is no name of a tenant")
        extra = req.extra_key or ""
        if req.lora_id is not None:  # SGLang has put its id behind what the caller gave.
            before, _, after = extra.rpartition(req.lora_id)
            extra = before + after
        if extra:
            salt = json.dumps([salt, extra])
        named = {"salt": salt, "adapter": self._adapters.digest(req.lora_id), "weights": weights}
        given = (req.sampling_params.custom_params or {}).get("kvstore")
        if given is not None and not isinstance(given, Mapping):
            self._quiet.warning("wish", "custom_params: kvstore is %r, no object; left out", given)
            given = None
        wishes, wrong = wishes_of(given)
        if wishes.tenant is not None:
            wrong.append("tenant: SGLang's own cache knows none; give a cache_salt")
        if wishes.remote_decoder is not None:
            self._stats.handed("refused")
            wrong.append("remote_decoder: SGLang offers a block once, so all go to one store")
        if unknown := [str(name) for name in given or () if name not in Wishes.model_fields]:
            none = ("tenant", "remote_decoder")
            known = ", ".join(name for name in Wishes.model_fields if name not in none)
            wrong.append(f"{unknown!r:.200} are not known; known are {known}")
        if wrong:
            words = "; ".join(wrong)
            self._quiet.warning("wish", "custom_params: kvstore: %s; left out", words)
        namespace = Namespace(self._namespace.model, tenant, self._namespace.block_tokens)
        media = self._media(req.multimodal_inputs)
        return Prompt(namespace, wishes, np.empty(0, np.uint32), named, req.rid, items=media)

    def _media(self, inputs: Any) -> tuple[Media, ...]:
        """Images and the like of a request, and where they stand.

        Callers may say what SGLang is to call them (`mm_hashes`), and its tree goes by that. Where
        a name has stood for two of them, nobody knows what the tree has.

        Raises:
            SpecError: their content, or what the tree has of it, is not known.
        """
        found = []
        for item in [] if inputs is None else inputs.mm_items:
            modality, digest = str(item.modality.name), _content(item)
            for number in item.padding_values():
                before = self._meant.pop(number, digest)
                self._meant[number] = digest if before == digest else ""
                if before != digest:
                    self.clear()  # Of those, some may share it.
                    raise SpecError("the name of an image or the like has stood for another")
            for first, last in item.offsets:
                length = last - first + 1
                found.append(Media(modality, f"{digest}:{length}", first, length))
        while len(self._meant) > _MOST_NUMBERS:
            self._meant.popitem(last=False)
        return tuple(found)

    def _gone(self, rid: str, req: ref[Any]) -> None:
        """SGLang has let go of a request; in whichever thread, amid whatever that does."""
        self._left.append((rid, req))

    def sweep(self) -> None:
        """Forget requests that SGLang has let go of: those that ended without a word."""
        while self._left:
            rid, req = self._left.popleft()
            known = self._known.get(rid)
            if known is not None and known[0] is req:
                self.forget(rid)

    def forget(self, rid: str) -> None:
        """A request has ended."""
        _, prompt = self._known.pop(rid, (None, None))
        self.uncomputed.remove(rid)
        if prompt is not None:
            self._ended(prompt)
            prompt.ids = np.empty(0, np.int64)  # Its session may keep the rest for long.
            prompt.tokens = np.empty(0, np.uint32)

    def close(self, session: str) -> None:
        """A session has ended, and so does the conversation that its last request is of."""
        prompt = self._sessions.pop(session, None)
        if prompt is not None:
            prompt.closed = True
            if prompt.ended:
                self._ended(prompt)

    def clear(self, *, emptied: bool = False) -> None:
        """Forget all requests; SGLang's tree may have been `emptied`."""
        for rid in list(self._known):
            self.forget(rid)
        if emptied:
            self._meant.clear()
