"""Which rows of reused pieces are computed again.

A piece's keys and values were computed behind other text. How far off a row is, and how much that
matters, differs: the first rows of a piece carry most of the error, those that the question looks
at most of its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Worth = NDArray[np.float64]

Span = tuple[int, int]

HEAD: Final = 16
"""Rows at the beginning of each piece that `question` always takes."""
ASKED: Final = 256
"""The last rows of a prompt, which are asked what they attend to."""


@dataclass(frozen=True, slots=True)
class Selection:
    """One way to choose rows.

    Attributes:
        worth: how much rows matter, one number for each row of the prompt, from the rows of the
            pieces ([start, end), in order), how many will be taken, and scores.
        needs: what the scores tell: how much the question attends to a row, times the norm of its
            values, summed over heads and layers; or by how much a row's keys and values, computed
            again in the first layers, differ. None: there need be none.
        share: how many are computed, whatever is asked; None: as asked.
    """

    worth: Callable[[Sequence[Span], int, Worth], Worth]
    needs: Literal["question", "deviation"] | None = None
    share: float | None = None

    def rows(
        self,
        spans: Sequence[Span],
        share: float,
        scores: NDArray[np.floating] | None = None,
        *,
        tile: int = 1,
    ) -> NDArray[np.int64]:
        """The rows of `spans` to compute, in order: a `share` of them all, 0 to 1.

        They are chosen in tiles of that many neighbours, which is faster to compute than the same
        number of single ones. `scores` has one number for each row of the prompt.
        """
        rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(*span) for span in spans)])
        count = round(len(rows) * (share if self.share is None else self.share))
        if count in (0, len(rows)):
            return rows[:count]
        given = np.zeros(spans[-1][1]) if scores is None else scores
        worth = self.worth(spans, count, np.nan_to_num(given.astype(np.float64)))
        first = np.concatenate([np.arange(start, end, tile) for start, end in spans])
        number = np.cumsum(np.isin(rows, first)) - 1
        order = np.argsort(-np.bincount(number, worth[rows]), kind="stable")
        enough = np.searchsorted(np.cumsum(np.bincount(number)[order]), count) + 1
        return rows[np.isin(number, order[:enough])]


def runs(rows: NDArray[np.int64]) -> list[Span]:
    """Sorted `rows` as runs of consecutive ones, [start, end)."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts, ends = rows[np.r_[0, cuts]], rows[np.r_[cuts, len(rows)] - 1] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _first(spans: Sequence[Span], count: int, scores: Worth) -> Worth:
    """The head of each piece, in proportion to its length."""
    worth = np.zeros_like(scores)
    for start, end in spans:
        worth[start:end] = 1.0 - np.arange(end - start) / (end - start)
    return worth


def _question(spans: Sequence[Span], count: int, scores: Worth) -> Worth:
    """The first rows of each piece, then those that matter to the question."""
    worth, head = scores.copy(), min(HEAD, count // len(spans))
    for start, end in spans:
        worth[start : min(start + head, end)] = np.inf
    return worth


def _scored(spans: Sequence[Span], count: int, scores: Worth) -> Worth:
    return scores


SELECTIONS: Final[dict[str, Selection]] = {
    "first": Selection(_first),
    "question": Selection(_question, needs="question"),
    "deviation": Selection(_scored, needs="deviation"),
    "all": Selection(_scored, share=1.0),
    "none": Selection(_scored, share=0.0),
}
"""By name; another is one entry."""
