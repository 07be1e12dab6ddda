"""Selective recompute in a worker: pieces come from the store, rows are chosen and computed again.

All of it happens at the beginning of the step that computes what follows, before the engine's own
pass. Whatever goes wrong has all promised rows computed there, which is exact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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

_STAGED: Final = 32 << 20
"""Bytes of pieces that are on their way at a time."""
_SAVED: Final = 1 << 30
_SAVES: Final = 4
"""The largest piece, in bytes, and how many, that may wait to be saved."""
_TILE: Final = 16
"""Rows that are chosen together: fewer, longer runs are faster to compute."""


class Staged(NamedTuple):
    """Memory for blocks, as (tokens, layers, keys and values, heads, channels)."""

    tensor: torch.Tensor
    memory: PagedMemory
    ids: NDArray[np.int64]


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
        self._block_bytes = self._part.nbytes(BLOCK_TOKENS)
        self._staged: Staged | None = None
        self._pending: list[Future[None]] = []
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
        engine, reason, done = self._engine, "", 0
        rows: Sequence[int] = range(job.start, job.end)
        exact = self._told(job, rows) if job.shadow else None
        try:
            reason = self._fill(job)
            if engine.agree(not reason):
                rows, done = self._choose(job)
            else:
                reason = reason or "another_rank"
        except Exception:  # noqa: BLE001 - all rows are computed then
            _log.exception("pieces could not be used; their rows are computed")
            reason = "failed"
        try:
            if not engine.agree(not reason):
                reason, rows, done = reason or "another_rank", range(job.start, job.end), 0
            engine.run(job.pages, job.tokens, rows)
        except Exception:  # noqa: BLE001 - the engine is told which pages to compute
            _log.exception("rows of a request could not be computed")
            return None
        kl = None
        if not reason and exact is not None and (got := self._told(job, ())) is not None:
            kl = float((exact.exp() * (exact - got)).sum())
        return Blended(done + len(rows), reason, kl)

    def _told(self, job: Blend, rows: Sequence[int]) -> torch.Tensor | None:
        """What follows the last token of this step, once `rows` are computed."""
        assert self._engine is not None
        try:
            self._engine.run(job.pages, job.tokens, rows)
            return self._engine.follows(job.pages, job.tokens, job.end)
        except Exception:  # noqa: BLE001 - the answer does without
            _log.exception("how far an answer is off could not be measured")
            return None

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

    def _fill(self, job: Blend) -> str:
        """Put pieces into the request's pages, rotated to where they stand now; or why not all."""
        assert self._engine is not None
        until = time.monotonic() + job.timeout
        try:
            session = self._open(job.namespace)
        except REFUSED:
            return "refused"
        held = self._staged = self._staged or self._stage(max(1, _STAGED // self._block_bytes))
        every = [(piece, number) for piece in job.pieces for number in range(len(piece.keys))]
        for first in range(0, len(every), len(held.ids)):
            some = every[first : first + len(held.ids)]
            keys, left = [piece.keys[n] for piece, n in some], max(0.0, until - time.monotonic())
            loaded = session.load(keys, [held.memory], [held.ids[: len(keys)]], timeout=left)
            if loaded.blocks < len(keys):
                return loaded.reason or "lost"
            start, low, high, by = torch.tensor([
                (p.start - p.skip + n * BLOCK_TOKENS, p.start, p.end, p.start - p.base)
                for p, n in some
            ]).T[..., None]  # fmt: skip
            # Where tokens stand in the prompt; the first and last blocks of a piece hold others.
            rows = start + torch.arange(BLOCK_TOKENS)
            rows[(rows < low) | (rows >= high)] = -1
            rows, by = rows.flatten(), by.expand_as(rows).flatten()
            self._engine.put(job.pages, rows, by, held.tensor[: len(rows)])
        return ""

    def _stage(self, blocks: int) -> Staged:
        group = self._part.group
        shape = (group.layers, 2, blocks * BLOCK_TOKENS, group.heads, group.channels[0])
        # Layer by layer, as they are rotated and written.
        whole = torch.empty(shape, dtype=getattr(torch, group.dtype))
        tensor = whole.permute(2, 0, 1, 3, 4)
        each, start = tensor.element_size(), tensor.data_ptr()
        row, layer, plane, head = (stride * each for stride in tensor.stride()[:4])
        planes = tuple(
            PlaneMemory(start + n * layer + p * plane, BLOCK_TOKENS * row, row, head, each)
            for n in range(group.layers)
            for p in range(2)
        )
        memory = PagedMemory(self._part, BLOCK_TOKENS, blocks, planes, tensor)
        return Staged(tensor, memory, np.arange(blocks, dtype=np.int64)[:, None])

    def _choose(self, job: Blend) -> tuple[list[int], int]:
        """The rows to compute: those of no piece, and what the selection picks of the pieces.

        And how many have been computed for good on the way.
        """
        assert self._engine is not None
        spans = [(piece.start, piece.end) for piece in job.pieces]
        covered = {row for start, end in spans for row in range(start, end)}
        fresh = [row for row in range(job.start, job.end) if row not in covered]
        selection, scores, before = SELECTIONS[job.selection], None, 0
        if selection.needs == "question" and 0 < job.ratio < 1:
            scores = self._engine.attention(job.pages, job.tokens, fresh, job.end).numpy()
            before = spans[0][0] - job.start  # They see no piece.
        rows = selection.rows(spans, job.ratio, scores, tile=_TILE if selection.needs else 1)
        return sorted({*fresh[before:], *rows.tolist()}), before

    def save(self, job: Registered, stats: Stats) -> None:
        """Copy a piece out of the request's pages now, and save it behind."""
        assert self._engine is not None
        self._pending = [one for one in self._pending if not one.done()]
        blocks = len(job.keys)
        if len(self._pending) >= _SAVES or blocks * self._block_bytes > _SAVED:
            stats.dropped(blocks, "no_room")
            return
        try:
            tensor, memory, ids = self._stage(blocks)
            with torch.inference_mode():
                held = tensor[: job.end - job.start]
                tensor[len(held) :] = 0
                for layer in range(self._engine.layers):
                    both = self._engine.read(layer, job.pages, job.start, job.end)
                    held[:, layer, 0], held[:, layer, 1] = both
            session = self._open(job.namespace)
            done = self._saving.submit(
                lambda: stats.saved(session.save(job.keys, [memory], [ids], ttl=job.ttl))
            )
            self._pending.append(done)
        except Exception:  # noqa: BLE001 - what is not saved is a miss later
            _log.exception("a piece could not be saved")
            stats.dropped(blocks, "failed")

    def close(self) -> None:
        """Let the last saves end, then the sessions."""
        self._saving.shutdown(wait=True)
        if self._sessions is not None:
            self._sessions.close()
