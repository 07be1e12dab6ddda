"""What one request asks of pieces, what it is promised, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.blend.pieces import BASE, BLOCK_TOKENS, Placed
from kvstore.blend.selection import SELECTIONS
from kvstore.connectors.vllm.messages import Blended, Piece

if TYPE_CHECKING:
    from kvstore.blend.reuse import Reuse


@dataclass(slots=True)
class Blending:
    """What a request asks of pieces, and what it is promised."""

    reuse: Reuse
    reason: str = ""
    """Why it is exact after all."""
    placed: list[tuple[Placed, list[bytes]]] | None = None
    """Pieces that the store has, and their keys there; None: it has not answered."""
    missed: int = 0
    found: list[Placed] | None = None
    """Pieces in the prompt, whether the store has them or not; None: not looked for yet."""
    first: int | None = None
    """The first token that may be approximate; None: none."""
    start: int = 0
    end: int = 0
    """Tokens that are promised out of pieces."""
    seconds: float = 0.0
    """That loading them is expected to take."""
    asked: float = 0.0
    until: float = 0.0
    """When the store was asked, and when that is waited for no longer (monotonic)."""
    allocated: bool = False
    """Its pages are there, and the next step that computes it fills them."""
    number: int = 0
    """Of the job that workers were last given; 0: none."""
    sent: tuple[int, int, int] = (0, 0, 0)
    """Of that: tokens that were promised, those of them to be kept as they are, and pieces."""
    came: Blended | None = None
    registered: bool = False

    def pieces(self) -> list[Piece]:
        """What is promised, piece by piece."""
        cut = ((one.within(self.start, self.end), keys) for one, keys in self.placed or ())
        return [
            Piece(
                p.start,
                p.end,
                BASE + p.offset,
                p.offset - p.blocks.start * BLOCK_TOKENS,
                keys[p.blocks.start : p.blocks.stop],
            )
            for p, keys in cut
            if p is not None
        ]

    def drop(self, reason: str) -> None:
        """Have it computed after all."""
        self.reason, self.allocated, self.end = self.reason or reason, False, self.start

    def send(self, number: int) -> list[Piece]:
        """What workers are to put together now, as job `number`."""
        pieces = self.pieces()
        covered = sum(piece.end - piece.start for piece in pieces)
        share = SELECTIONS[self.reuse.selection].share
        kept = covered - round(covered * (self.reuse.recompute if share is None else share))
        self.sent = (self.end - self.start, kept, len(pieces))
        self.number, self.came, self.allocated = number, None, False
        return pieces

    def account(self) -> dict[str, Any]:
        """What a response says of it; of a request that was preempted, the last time.

        Of an answer of one token, what was planned: it ends before the worker's word is there.
        """
        promised, kept, pieces = self.sent
        if self.came is not None:
            kept = promised - self.came.rows
        reason = self.reason or (self.came.reason if self.came else "")
        told: dict[str, Any] = {"reused": kept, "recomputed": promised - kept, "pieces": pieces}
        told["missed"] = self.missed
        if reason:
            told["reason"] = reason
        if self.came is not None and self.came.kl is not None:
            told["kl"] = self.came.kl
        return told
