"""Pieces of one model: kept in a session of their own, put where they stand in a prompt, mended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from kvstore.blend.pieces import (
    SHORTEST,
    PieceIndex,
    Placed,
    check_length,
    filler,
    named,
    piece_keys,
    piece_namespace,
    search,
)
from kvstore.blend.reuse import too_little
from kvstore.blend.selection import SELECTIONS
from kvstore.blocks.keys import token_array
from kvstore.client.transfer import Saved
from kvstore.connectors.transformers.planes import allocate, pages
from kvstore.connectors.transformers.repair import Repair
from kvstore.connectors.transformers.rows import Rotation, Rows
from kvstore.errors import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.blend.reuse import Reuse
    from kvstore.blocks.spec import Group
    from kvstore.client.session import Session

_log = logging.getLogger("kvstore.transformers")


@dataclass(frozen=True, slots=True)
class Approximate:
    """What became of the pieces of a prompt.

    Attributes:
        reused: tokens of pieces that were taken as they are.
        recomputed: tokens of pieces that were computed again.
        pieces: how many were used.
        missed: how many the store did not have.
        repaired: how many more were computed again while the answer grew.
        reason: why all was computed, though there are pieces: `short`, `small_saving`.
        kl: divergence of the first token from that of the whole prompt, where it was computed too.
    """

    reused: int = 0
    recomputed: int = 0
    pieces: int = 0
    missed: int = 0
    repaired: int = 0
    reason: str = ""
    kl: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.pieces} pieces reused, approximately: {self.recomputed} of "
            f"{self.reused + self.recomputed} tokens computed again, {self.missed} pieces missed"
        )
        text += f" ({self.reason})" if self.reason else ""
        return text if self.kl is None else f"{text}, KL {self.kl:.2g}"


class Pieces:
    """What a model computed of pieces; one for the session of its exact blocks."""

    def __init__(
        self,
        session: Session,
        model: PreTrainedModel,
        group: Group,
        before: NDArray[np.integer] | None = None,
    ) -> None:
        """Ready for pieces of `model`, whose cache has the shape of `group`.

        They are computed behind the tokens `before`, usually the filler.

        Raises:
            SpecError: its KV cannot be moved, and why.
            StoreUnavailable: the store refused the session.
        """
        self.index = PieceIndex()
        self._model = model
        self._group = group
        self._rotate = Rotation(model, group)
        vocabulary = model.get_input_embeddings().num_embeddings
        self._filler = token_array(filler(_encode(model), vocabulary) if before is None else before)
        self._base = len(self._filler)
        self._session = session.beside(piece_namespace(session.namespace, self._filler))
        self._behind: list[tuple[torch.Tensor, torch.Tensor]] = []

    def close(self) -> None:
        """Close the session of pieces."""
        self._session.close()

    def add(self, tokens: Sequence[int] | NDArray[np.integer]) -> Saved:
        """Compute a piece behind the filler and store it, unless it is stored; find it from now on.

        Raises:
            SpecError: it is too short or too long.
        """
        ids = token_array(tokens)
        check_length(len(ids))
        text = self._model.config.get_text_config(decoder=True)
        most = getattr(text, "max_position_embeddings", None) or self._base + len(ids)
        if self._base + len(ids) > most:
            raise SpecError(
                f"a piece of {len(ids)} tokens and the filler of {self._base} are more than the "
                f"{most} that the model was made for; cut it"
            )
        keys = piece_keys(self._session.namespace, ids)
        saved = Saved(had=self._session.lookup(keys).blocks)
        if saved.had < len(keys):
            past = self._computed(ids)
            room = len(keys) * self._session.block_tokens - len(ids)
            planes = [
                pad(tensor[:, :, self._base :], (0, 0, 0, room)).to("cpu").contiguous()
                for layer in past.layers
                for tensor in (layer.keys, layer.values)
            ]
            memory, numbers = pages(self._session, self._group, planes, len(keys))
            saved = self._session.save(keys, memory, numbers)
        self.index.add(ids)
        return saved

    def blend(
        self, past: DynamicCache, tokens: NDArray[np.int64], reuse: Reuse, *, shadow: bool = False
    ) -> Approximate:
        """Fill `past`, which holds an exact prefix, as far as the last piece of a prompt.

        Left alone where no piece is used. At least one token remains to be computed. With `shadow`
        the whole prompt is computed as well, and the first token compared.
        """
        prefix = past.get_seq_length()
        spans = reuse.pieces
        if spans is None:
            found = search(tokens, self.index, self._session.namespace, self._session.known)
        else:
            found = named(tokens, spans)
        wanted = [p for place in found if (p := place.within(prefix, len(tokens) - 1))]
        short = found and all(place.end - place.start < SHORTEST for place in found)
        if not wanted:
            return Approximate(reason="short" if short else "prefix" if found else "no_pieces")
        rows = Rows(self._model, self._group, tokens)
        if prefix:
            for layer, held in enumerate(past.layers):
                rows.put(layer, 0, held.keys, held.values)
        placed = [place for place in wanted if self._put(rows, place)]
        missed = len(wanted) - len(placed)
        own = [(place.start, place.end) for place in placed]
        reason = too_little(own, reuse, len(tokens) - prefix) if placed else ""
        if reason or not placed:
            return Approximate(missed=missed, reason=reason)
        end = own[-1][1]
        inside = np.concatenate([np.arange(*span) for span in own])
        others = np.setdiff1d(np.arange(prefix, end), inside)
        selection, scores = SELECTIONS[reuse.selection], None
        if selection.needs == "question" and 0 < reuse.recompute < 1:
            scores = rows.question(np.r_[others, np.arange(end, len(tokens))], end)
        elif selection.needs == "deviation" and 0 < reuse.recompute < 1:
            scores = rows.deviation(np.arange(prefix, end), end)
        if scores is None:
            scores = np.zeros(end)
        chosen = selection.rows(own, reuse.recompute, scores)
        rows.compute(np.union1d(chosen, others))
        for layer, (keys, values) in zip(past.layers, rows.planes, strict=True):
            layer.keys, layer.values = keys[:, :, :end], values[:, :, :end]
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.is_initialized = True
        if reuse.repair:
            left = np.setdiff1d(inside, chosen)
            worth = selection.worth(own, len(chosen), scores)[left]
            order = left[np.argsort(-worth, kind="stable")]
            past.repair = Repair(rows, past, order, reuse.repair)
        kl = self._divergence(past, tokens) if shadow else None
        return Approximate(len(inside) - len(chosen), len(chosen), len(placed), missed, kl=kl)

    def _divergence(self, past: DynamicCache, tokens: NDArray[np.int64]) -> float:
        """How far off the first token behind `past` is; nothing is added to that."""
        before, told = [(layer.keys, layer.values) for layer in past.layers], []
        try:
            for held in (DynamicCache(config=self._model.config), past):
                logits = self._step(held, tokens[held.get_seq_length() :])
                told.append(logits[0, -1].float().log_softmax(-1))
        finally:
            for layer, (keys, values) in zip(past.layers, before, strict=True):
                layer.keys, layer.values = keys, values
        return float((told[0].exp() * (told[0] - told[1])).sum())

    def _put(self, rows: Rows, place: Placed) -> bool:
        """Load a piece and move it to its place; whether all of it came."""
        size, blocks = self._session.block_tokens, place.blocks
        keys = piece_keys(self._session.namespace, place.piece)[blocks.start : blocks.stop]
        planes = allocate(self._group, len(keys) * size)
        memory, numbers = pages(self._session, self._group, planes, len(keys))
        if self._session.load(keys, memory, numbers).blocks < len(keys):
            return False
        first = place.offset - blocks.start * size
        cut = slice(first, first + place.end - place.start)
        for layer, (k, v) in enumerate(zip(planes[::2], planes[1::2], strict=True)):
            there = k[:, :, cut].to(self._model.device), v[:, :, cut].to(self._model.device)
            delta = place.start - self._base - place.offset
            rows.put(layer, place.start, self._rotate(there[0], delta), there[1])
        return True

    def _computed(self, ids: NDArray[np.uint32]) -> DynamicCache:
        """The KV of the filler and a piece; that of the filler is kept."""
        past = DynamicCache(config=self._model.config)
        if self._behind:
            for layer, held in zip(past.layers, self._behind, strict=True):
                layer.update(*held)
            self._step(past, ids)
        else:
            self._step(past, self._filler)
            self._behind = [(layer.keys, layer.values) for layer in past.layers]
            self._step(past, ids)
        return past

    def _step(self, past: DynamicCache, ids: NDArray[np.integer]) -> Any:
        inputs = torch.from_numpy(ids.astype(np.int64))[None].to(self._model.device)
        with torch.no_grad():
            return self._model(
                input_ids=inputs, past_key_values=past, use_cache=True, logits_to_keep=1
            ).logits


def _encode(model: Any) -> Callable[[str], list[int]] | None:
    """The tokenizer of the files that a model was loaded from; None: there is none."""
    try:
        place = str(model.config.name_or_path)
        encode: Callable[[str], list[int]] = AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        ).encode
    except Exception as e:  # noqa: BLE001 - a library's many errors; the filler does without
        _log.warning(
            "pieces are computed behind scattered tokens, which makes their error three times "
            "what it is behind a text: there is no tokenizer: %s", e
        )  # fmt: skip
        return None
    return encode
