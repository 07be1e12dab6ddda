"""What computing a prompt takes, learned from steps that the engine has computed."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_KEPT: Final = 0.9
"""What is left of a sample when the next one comes."""
_ENOUGH: Final = 6.0
"""Samples before more than a cost per token is read off them."""
_BETTER: Final = 0.8
"""A term more must leave at most this part of the error."""
_APART: Final = 1e-4
"""The least determinant of terms that can be told apart, each scaled to 1."""
_TERMS: Final = ([1], [0, 1], [1, 2], [0, 1, 2])


def looked_back(tokens: int, before: int) -> float:
    """How many tokens stand before each of `tokens` that come behind `before`, in sum."""
    return tokens * (before + tokens / 2)


class Prefill:
    """Seconds = fixed for each chunk + per token + per token and token before it.

    Terms that the samples do not tell apart, or that would be negative, are left out; what decodes
    within a step is part of what its chunk costs. Samples weigh by their tokens.
    """

    def __init__(self) -> None:
        self._products = np.zeros((4, 4))  # Of chunk, tokens, look-backs and seconds.
        self._samples = 0.0
        self._chunk = 1
        self._costs: NDArray[np.floating[Any]] | None = None
        self._solved = True

    @property
    def known(self) -> bool:
        """Whether there is any sample."""
        return self._samples > 0

    def add(self, tokens: int, seconds: float, looked_back: float) -> None:
        """A step of so many prompt tokens, which look back on so many in sum, took `seconds`."""
        if tokens <= 0 or not seconds > 0:
            return
        row = np.array([1.0, tokens, looked_back, seconds])
        self._products = self._products * _KEPT + np.outer(row, row) / tokens
        self._samples = self._samples * _KEPT + 1
        self._chunk = max(self._chunk, tokens)
        self._solved = False

    def seconds(self, tokens: int, before: int = 0) -> float:
        """What so many tokens behind `before` others take; 0 if nothing was measured."""
        if not self._solved:
            self._solved, self._costs = True, self._solve()
        if self._costs is None or tokens <= 0:
            return 0.0
        chunk, token, back = map(float, self._costs)
        chunks = max(1.0, tokens / self._chunk)
        return chunks * chunk + tokens * token + looked_back(tokens, before) * back

    def _solve(self) -> NDArray[np.floating[Any]]:
        """The least squares, by as few terms as explain the samples."""
        scale = np.sqrt(np.maximum(self._products.diagonal(), 1e-300))
        scaled = self._products / np.outer(scale, scale)
        best, least = np.zeros(3), np.inf
        for terms in _TERMS if self._samples >= _ENOUGH else _TERMS[:1]:
            known, wanted = scaled[np.ix_(terms, terms)], scaled[terms, 3]
            if np.linalg.det(known) < _APART:
                continue
            costs = np.linalg.solve(known, wanted)
            error = 1.0 - float(costs @ wanted)
            if (costs >= 0).all() and error < _BETTER * least:
                best, least = np.zeros(3), max(error, 1e-9)
                best[terms] = costs * scale[3] / scale[terms]
        return best
