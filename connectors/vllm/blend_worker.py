"""Selective recompute in a worker: pieces come from the store, rows are chosen and computed again.

All of it happens at the beginning of the step that computes what follows, before the engine's own
pass. Whatever goes wrong has all promised rows computed there, which is exact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from vllm.logger import init_logger

from kvstore.blend.pieces import BLOCK_TOKENS
from kvstore.blend.selection import SELECTIONS
from kvstore.connectors.common.sessions import REFUSED, Sessions
from kvstore.connectors.vllm.blend_engine import EngineRows, only_connector
from kvstore.connectors.vllm.messages import Blend, Blended, Ready, Registered, piece_part
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.errors import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.blocks.spec import ModelIdentity, Namespace, Part
    from kvstore.client.session import Session
    from kvstore.connectors.common.settings import Settings
    from kvstore.connectors.common.stats import Stats
    from kvstore.connectors.vllm.layout import Pages

_log = init_logger("vllm.kvstore.blend")

_TILE: Final = 16
"""Rows that are chosen together: fewer, longer runs are faster to compute."""


class BlendWorker:
    """Used by the worker's thread; saves go on behind, in one of its own."""

    def __init__(
        self, settings: Settings, pages: Pages, part: Part, config: Any, connector: object
    ) -> None:
        """`part` is what this rank holds of all KV."""
        self._settings, self._pages, self._part = settings, pages, piece_part(part)
        self._config, self._connector = config, connector
        self._engine: EngineRows | None = None
        self._model: ModelIdentity | None = None
        self._sessions: Sessions | None = None
        self._saving = ThreadPoolExecutor(1, thread_name_prefix="kvstore-pieces")
        self.ready = Ready("no pages were registered")
        """What the scheduler is told at start."""

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's pages, and see whether all of it works here: else `ready` says why."""
        try:
            if not only_connector(self._connector):
                raise SpecError("other connectors (MultiConnector) hear of what the model computes")
            engine = EngineRows(self._config, self._pages, caches)
            with torch.inference_mode():
                engine.check()
            self._engine, self.ready = engine, Ready("")
        except SpecError as e:
            self.ready = Ready(str(e))
        except Exception as e:  # noqa: BLE001 - whatever an unknown engine may raise is the reason
            _log.debug("the engine's internals are not known", exc_info=True)
            self.ready = Ready(f"the engine's internals do not fit: {type(e).__name__}: {e}")

    @property
    def busy(self) -> bool:
        """Whether the model computes for us, and not the engine's step."""
        return self._engine is not None and self._engine.busy

    def blend(self, job: Blend) -> Blended | None:
        """Fill the pages of one request; None: not even all rows could be computed."""
        with torch.inference_mode():
            return self._blend(job)

    def _blend(self, job: Blend) -> Blended | None:
        assert self._engine is not None
        engine, reason = self._engine, ""
        rows: Sequence[int] = range(job.start, job.end)
        try:
            staged, reason = self._load(job)
            if engine.agree(staged is not None) and staged is not None:
                self._place(job, staged)
                rows = self._choose(job)
            else:
                reason = reason or "another_rank"
        except Exception:  # noqa: BLE001 - all rows are computed then
            _log.exception("pieces could not be used; their rows are computed")
            reason = "failed"
        try:
            if not engine.agree(not reason):
                reason, rows = reason or "another_rank", range(job.start, job.end)
            engine.run(job.pages, job.tokens, rows)
        except Exception:  # noqa: BLE001 - the engine is told which pages to compute
            _log.exception("rows of a request could not be computed")
            return None
        return Blended(len(rows), reason)

    def _open(self, namespace: Namespace) -> Session:
        """The session of a tenant's pieces.

        Raises:
            REFUSED: there is none to be had now.
        """
        if self._sessions is None or self._model != namespace.model:
            if self._sessions is not None:
                self._sessions.close()
            self._sessions = Sessions(self._settings.config, namespace, [self._part])
            self._model = namespace.model
        return self._sessions.open(namespace.tenant)

    def _load(self, job: Blend) -> tuple[torch.Tensor | None, str]:
        """The blocks of all pieces, as `_stage` has them, or why some are missing."""
        until = time.monotonic() + job.timeout
        keys = [key for piece in job.pieces for key in piece.keys]
        staged, memory, ids = self._stage(len(keys))
        try:
            session = self._open(job.namespace)
        except REFUSED:
            return None, "refused"
        with session.acquire(keys, holes=True, timeout=job.timeout) as held:
            left = max(0.0, until - time.monotonic())
            loaded = held.load([memory], [ids], timeout=left)
        if loaded.blocks < len(keys):
            return None, loaded.reason or "lost"
        return staged, ""

    def _stage(self, blocks: int) -> tuple[torch.Tensor, PagedMemory, NDArray[np.int64]]:
        """Memory for so many blocks, as (tokens, layers, keys and values, heads, channels)."""
        group = self._part.group
        shape = (blocks * BLOCK_TOKENS, group.layers, 2, group.heads, group.channels[0])
        tensor = torch.zeros(shape, dtype=getattr(torch, group.dtype))
        each, start = tensor.element_size(), tensor.data_ptr()
        row, layer, plane, head = (stride * each for stride in tensor.stride()[:4])
        planes = tuple(
            PlaneMemory(start + n * layer + p * plane, BLOCK_TOKENS * row, row, head, each)
            for n in range(group.layers)
            for p in range(2)
        )
        memory = PagedMemory(self._part, BLOCK_TOKENS, blocks, planes, tensor)
        return tensor, memory, np.arange(blocks, dtype=np.int64)[:, None]

    def _place(self, job: Blend, staged: torch.Tensor) -> None:
        """Put pieces into the request's pages, rotated to where they stand now."""
        engine, cut, at = self._engine, [], 0
        assert engine is not None
        staged = staged.to(engine.device)
        for piece in job.pieces:
            first = at + piece.skip
            cut.append((staged[first : first + piece.end - piece.start], piece.start - piece.base))
            at += len(piece.keys) * BLOCK_TOKENS
        where = [row for piece in job.pieces for row in range(piece.start, piece.end)]
        slots = engine.slots(job.pages, where)
        for layer in range(engine.layers):
            keys = torch.cat([engine.rotate(layer, one[:, layer, 0], by) for one, by in cut])
            values = torch.cat([one[:, layer, 1] for one, _ in cut])
            engine.write(layer, slots, keys, values)

    def _choose(self, job: Blend) -> list[int]:
        """The rows to compute: those of no piece, and what the selection picks of the pieces."""
        assert self._engine is not None
        spans = [(piece.start, piece.end) for piece in job.pieces]
        covered = {row for start, end in spans for row in range(start, end)}
        fresh = [row for row in range(job.start, job.end) if row not in covered]
        selection, scores = SELECTIONS[job.selection], None
        if selection.needs == "question" and 0 < job.ratio < 1:
            self._engine.run(job.pages, job.tokens, fresh)
            last = len(job.tokens)
            scores = self._engine.attention(job.pages, job.tokens, job.end, last, job.end).numpy()
        rows = selection.rows(spans, job.ratio, scores, tile=_TILE if selection.needs else 1)
        return sorted({*fresh, *rows.tolist()})

    def save(self, job: Registered, stats: Stats) -> None:
        """Copy a piece out of the request's pages now, and save it behind."""
        assert self._engine is not None
        try:
            tensor, memory, ids = self._stage(len(job.keys))
            with torch.inference_mode():
                held = tensor[: job.end - job.start]
                for layer in range(self._engine.layers):
                    both = self._engine.read(layer, job.pages, job.start, job.end)
                    held[:, layer, 0], held[:, layer, 1] = both
            session = self._open(job.namespace)
            self._saving.submit(
                lambda: stats.saved(session.save(job.keys, [memory], [ids], ttl=job.ttl))
            )
        except Exception:  # noqa: BLE001 - what is not saved is a miss later
            _log.exception("a piece could not be saved")
            stats.dropped(len(job.keys), "failed")

    def close(self) -> None:
        """Let the last saves end, then the sessions."""
        self._saving.shutdown(wait=True)
        if self._sessions is not None:
            self._sessions.close()
