"""What a request's KV depends on beside its tokens: adapters, media and whatever else.

Names that callers give mean nothing here. An adapter is named by the bytes of its files, media by
what the model is given of them. vLLM itself goes by names, which callers may choose (a LoRA's name
and number, `multi_modal_uuids`, the hashes of its token-in API): where one of those has meant two
things, nobody knows which of them vLLM has in its caches, and requests with it are not keyed.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from kvstore.blocks.keys import Media
from kvstore.blocks.weights import weights_digest
from kvstore.connectors.common.media import feed
from kvstore.errors import SpecError

_DIGEST: Final = "_kvstore_digest"
"""Attribute of a processed item, which vLLM keeps as long as it may be used again."""


class Unkeyed(SpecError):
    """A request's KV cannot be told from others'; `reason` is what that is counted under."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


class Inputs:
    """Finds what keys must cover, and what names have meant so far. Used by one thread."""

    def __init__(self, capacity: int, *, encoded_elsewhere: bool) -> None:
        """`capacity`: tokens in the engine's cache; it cannot hold more media, nor their names."""
        self._capacity = capacity
        self._encoded_elsewhere = encoded_elsewhere
        self._streamed = False
        self._adapters: dict[str | int, str] = {}
        self._items: dict[str | int, str] = {}

    def of(self, request: Any) -> dict[str, Any]:
        """What keys of `request` cover, as `prompt_extras` takes it; its names are taken note of.

        Raises:
            Unkeyed: its KV cannot be told from others'.
        """
        media = self._media(request.mm_features)
        adapter = "" if request.lora_request is None else self._adapter(request.lora_request)
        if media is None:
            raise Unkeyed("media", "nobody knows what vLLM has in store under names of its media")
        if request.prompt_embeds is not None:
            raise Unkeyed("embeddings", "prompts given as embeddings have no tokens to go by")
        if request.resumable:
            self._streamed = True
            raise Unkeyed("streamed", "a streamed prompt is not known as a whole")
        return {"adapter": adapter, "media": media}

    def loaded(self, lora: Any) -> None:
        """Take note of a LoRA adapter that is being loaded."""
        with suppress(Unkeyed):  # Requests that use it will say so.
            self._adapter(lora)

    def still(self, request: Any) -> bool:
        """Whether the names of a request that has been keyed mean what they meant then."""
        try:
            if request.lora_request is not None:
                self._adapter(request.lora_request)
        except Unkeyed:
            return False
        return True

    def _adapter(self, lora: Any) -> str:
        path, found = Path(lora.lora_path).expanduser(), ""
        words = f"LoRA adapter {lora.lora_name!r}"
        try:
            if not path.exists():
                words += f" is not at {path}: only adapters in folders of this machine have names"
            elif lora.load_inplace:
                words += " is loaded anew with every step"
            else:
                found = weights_digest(path) + (" 3d" if lora.is_3d_lora_weight else "")
                words += ", its number or its name have stood for others; give it new ones"
        except (SpecError, OSError) as e:
            words += f": {e}"
        names = lora.lora_name, lora.lora_int_id
        if not all([_means(self._adapters, name, found) for name in names]):
            raise Unkeyed("adapter", words)
        return found

    def _media(self, features: list[Any]) -> list[Media] | None:
        found = [(feature, self._content(feature)) for feature in features]
        same = [_means(self._items, f.identifier, digest) for f, digest in found]
        while len(self._items) > self._capacity:
            del self._items[next(iter(self._items))]
        if not all(same) or (features and self._streamed):
            return None
        return [
            Media(f.modality, digest, f.mm_position.offset, f.mm_position.length)
            for f, digest in found
        ]

    def _content(self, feature: Any) -> str:
        """What the model is given of an image or the like, and for which tokens; empty: unknown."""
        item, place = feature.data, feature.mm_position
        if item is None or "address" in item or self._encoded_elsewhere:
            return ""  # It lies in memory that this process does not see.
        digest = getattr(item, _DIGEST, None)
        if digest is None:
            h = blake3()
            if not all([feed(h, name) and feed(h, item[name].data) for name in sorted(item)]):
                return ""
            digest = h.hexdigest()
            setattr(item, _DIGEST, digest)
        mask = None if place.is_embed is None else place.is_embed.tolist()
        told = json.dumps([feature.modality, digest, place.length, mask])
        return hashlib.sha256(told.encode()).hexdigest()

    def shared(self, one: Any, other: Any) -> bool:
        """Whether two requests use a name that may mean another thing for each of them."""
        if other.resumable and one.mm_features:
            return True  # What it will stream is not known yet.
        if one.lora_request is not None and other.lora_request is not None:
            mine, its = one.lora_request, other.lora_request
            if mine.lora_name == its.lora_name or mine.lora_int_id == its.lora_int_id:
                return True
        return not {f.identifier for f in one.mm_features}.isdisjoint(
            f.identifier for f in other.mm_features
        )


def _means(meant: dict[str | int, str], name: str | int, digest: str) -> bool:
    """Note that `name` stands for `digest`; whether that is known and has always been so."""
    before = meant.pop(name, digest)
    meant[name] = digest if before == digest else ""
    return bool(digest) and before == digest
