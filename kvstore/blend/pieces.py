"""Pieces: stretches of text whose KV is kept by their own content, for wherever they stand later.

A piece is computed behind a fixed filler, in place of the text that will stand before it: that
halves the error of what comes of it. Its blocks are chained from its own first token, in a
namespace of the model's pieces, where no request for exact blocks ever looks.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from msgspec import structs

from kvstore.blocks.keys import MAX_TOKEN, block_keys, token_array
from kvstore.blocks.spec import Namespace
from kvstore.errors import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tokens = NDArray[np.uint32]
    AnyTokens = Sequence[int] | NDArray[np.integer]

BLOCK_TOKENS: Final = 16
BASE: Final = 512
"""Position of a piece's first token when it is computed: the length of the filler before it."""
SHORTEST: Final = 64
"""Tokens below which a piece is not worth it."""
LONGEST: Final = 1 << 15
_NAME: Final = "kvstore/pieces/1"
_STARTS: Final = (0, 4)
"""Where in a piece windows are known: behind other text, its first tokens may be others."""
_FACTOR: Final = 0x9E3779B97F4A7C15
_SAME_WINDOW: Final = 16
"""Pieces that may begin alike."""
_SEARCHED: Final = 1 << 14
_MOST_FOUND: Final = 64
_MOST_BLOCKS: Final = 1 << 15
"""Places of a prompt that a store is asked about, pieces that may begin there, and blocks of them
all that it is asked for then."""


def filler(encode: Callable[[str], Sequence[int]] | None, vocabulary: int) -> Tokens:
    """The `BASE` tokens that pieces of a model are computed behind.

    `encode` makes tokens of text as for a prompt, with what stands before it (BOS). Without it they
    are scattered over the `vocabulary`: the error is then about three times that with a text.

    Raises:
        SpecError: the tokenizer makes too few tokens of the text.
    """
    if encode is None:
        spread = (np.arange(BASE, dtype=np.uint64) * np.uint64(_FACTOR)) >> np.uint64(16)
        return (spread % np.uint64(vocabulary)).astype(np.uint32)
    text = files("kvstore.blend").joinpath("filler.txt").read_text("utf-8")
    tokens = token_array(encode(text))[:BASE]
    if len(tokens) < BASE:
        raise SpecError(
            f"the tokenizer makes {len(tokens)} tokens of the filler, which pieces need {BASE} of"
        )
    return tokens


def piece_namespace(namespace: Namespace, before: AnyTokens) -> Namespace:
    """Where the pieces live that were computed behind the filler `before`.

    Its tenant is that of `namespace`.
    """
    digest = hashlib.sha256(token_array(before).astype("<u4").tobytes()).hexdigest()
    extra = (*namespace.model.extra, (_NAME, digest))
    return Namespace(structs.replace(namespace.model, extra=extra), namespace.tenant, BLOCK_TOKENS)


def has_pieces_of(namespace: Namespace, exact: Namespace) -> bool:
    """Whether that is a `piece_namespace` of the namespace of `exact` blocks, behind any filler."""
    extra = tuple(pair for pair in namespace.model.extra if pair[0] != _NAME)
    return (
        extra != namespace.model.extra
        and namespace.tenant == exact.tenant
        and structs.replace(namespace.model, extra=extra) == exact.model
    )


def piece_keys(namespace: Namespace, tokens: AnyTokens) -> list[bytes]:
    """Keys of all blocks of a piece in its `piece_namespace`.

    The last block is filled up with a token that no text has; so its key names the whole piece.
    """
    ids = token_array(tokens)
    padding = np.full(-len(ids) % namespace.block_tokens, MAX_TOKEN, np.uint32)
    return block_keys(namespace, np.concatenate([ids, padding]))


class Placed(NamedTuple):
    """Tokens `start` to `end` of a prompt, which are those of a `piece` from `offset` on."""

    start: int
    end: int
    piece: Tokens
    offset: int = 0

    def within(self, start: int, end: int) -> Placed | None:
        """What of it lies between two places of the prompt; None if that is too little."""
        low, high = max(self.start, start), min(self.end, end)
        if high - low < SHORTEST:
            return None
        return self._replace(start=low, end=high, offset=self.offset + low - self.start)

    @property
    def blocks(self) -> range:
        """The piece's blocks that hold it."""
        return range(
            self.offset // BLOCK_TOKENS, -(-(self.offset + self.end - self.start) // BLOCK_TOKENS)
        )


def named(prompt: AnyTokens, spans: Iterable[tuple[int, int]]) -> list[Placed]:
    """The pieces that a request names by their places."""
    ids = token_array(prompt)
    return [Placed(start, end, ids[start:end]) for start, end in spans]


def search(
    prompt: AnyTokens,
    index: PieceIndex,
    namespace: Namespace,
    stored: Callable[[Sequence[bytes]], Sequence[bool]],
) -> list[Placed]:
    """The pieces in a prompt, in order and apart: those of an index, and between them those that a
    store has in a piece `namespace`; `stored` tells which blocks are there.

    The latter are found by the key of their first block, asked for at every place (the first
    `_SEARCHED`), and end with their last whole block.
    """
    ids, size, found = token_array(prompt), BLOCK_TOKENS, index.find(prompt)
    free = np.ones(max(0, len(ids) - SHORTEST + 1), bool)
    ends = np.full(len(ids), len(ids))
    for one in found:
        free[max(0, one.start - SHORTEST + 1) : one.end] = False
        ends[: one.start] = np.minimum(ends[: one.start], one.start)
    places = np.flatnonzero(free)[:_SEARCHED].tolist()
    text, width, root = ids.astype("<u4").tobytes(), 4 * size, namespace.digest
    first = [hashlib.sha256(root + text[4 * at : 4 * at + width]).digest() for at in places]
    begin = [at for at, there in zip(places, stored(first), strict=False) if there][:_MOST_FOUND]
    most = _MOST_BLOCKS // max(1, len(begin)) * size
    chains = [block_keys(namespace, ids[at : min(at + most, ends[at])]) for at in begin]
    answers = iter(stored([key for chain in chains for key in chain]))
    end = 0
    for at, chain in zip(begin, chains, strict=True):
        there = [next(answers, False) for _ in chain]
        blocks = there.index(False) if False in there else len(there)
        if at >= end and blocks * size >= SHORTEST:
            end = at + blocks * size
            found.append(Placed(at, end, ids[at:end]))
    return sorted(found)


class PieceIndex:
    """Finds known pieces in prompts by their tokens alone; thread-safe.

    One for each piece namespace. It holds at most `limit` tokens; the pieces not seen for longest
    go first. What it says is true of the tokens; whether a store has the KV is another question.
    """

    def __init__(self, limit: int = 1 << 22) -> None:
        self._limit = limit
        self._held = 0
        self._pieces: OrderedDict[bytes, Tokens] = OrderedDict()  # the one unused for longest first
        self._windows: dict[int, list[tuple[bytes, int]]] = {}
        self._known: NDArray[np.uint64] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, tokens: AnyTokens) -> None:
        """Know a piece from now on.

        Raises:
            SpecError: it is too short or too long.
        """
        ids = token_array(tokens).copy()
        check_length(len(ids))
        name = hashlib.sha256(ids.tobytes()).digest()
        with self._lock:
            if name in self._pieces:
                self._pieces.move_to_end(name)
                return
            self._pieces[name], self._known = ids, None
            self._held += len(ids)
            for key, start in _starts(ids):
                alike = self._windows.setdefault(key, [])
                alike.append((name, start))
                del alike[:-_SAME_WINDOW]
            while self._held > self._limit:
                self._forget()

    def find(self, prompt: AnyTokens) -> list[Placed]:
        """The pieces in a prompt, in order and apart: of those that begin alike, the longest."""
        ids = token_array(prompt)
        found: list[Placed] = []
        with self._lock:
            if self._known is None:
                self._known = np.fromiter(self._windows, np.uint64, len(self._windows))
            windows, end = _windows(ids), 0
            for place in np.flatnonzero(np.isin(windows, self._known)).tolist():
                if place < end:
                    continue
                best, best_name = None, b""
                for name, start in self._windows[int(windows[place])]:
                    piece = self._pieces[name]
                    ahead = _alike(ids[place:], piece[start:])
                    room = min(start, place - end)
                    back = _alike(
                        ids[place - room : place][::-1], piece[start - room : start][::-1]
                    )
                    if ahead >= SHORTEST and (best is None or place + ahead > best.end):
                        best = Placed(place - back, place + ahead, piece, start - back)
                        best_name = name
                if best is not None:
                    self._pieces.move_to_end(best_name)
                    found.append(best)
                    end = best.end
        return found

    def _forget(self) -> None:
        name, ids = self._pieces.popitem(last=False)
        self._held, self._known = self._held - len(ids), None
        for key, start in _starts(ids):
            alike = [other for other in self._windows.pop(key, ()) if other != (name, start)]
            if alike:
                self._windows[key] = alike


def check_length(tokens: int) -> None:
    """Raises SpecError if so many tokens are no piece."""
    if not SHORTEST <= tokens <= LONGEST:
        raise SpecError(f"a piece has {SHORTEST} to {LONGEST} tokens, not {tokens}; cut it there")


def _starts(ids: Tokens) -> list[tuple[int, int]]:
    """The windows by which a piece is known, and where in it they begin."""
    starts = [start for start in _STARTS if start + SHORTEST <= len(ids)]
    return [(int(_windows(ids[start : start + SHORTEST])[0]), start) for start in starts]


def _windows(ids: Tokens) -> NDArray[np.uint64]:
    """A hash of each window of `SHORTEST` tokens, a power of 2; by doubling."""
    hashes, width, factor = ids.astype(np.uint64) + np.uint64(1), 1, _FACTOR
    while width < SHORTEST:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    return hashes


def _alike(one: Tokens, other: Tokens) -> int:
    """How many tokens are the same, from the first on; takes about that long."""
    most, at, step = min(len(one), len(other)), 0, 256
    while at < most:
        end = min(most, at + step)
        differ = one[at:end] != other[at:end]
        if differ.any():
            return at + int(differ.argmax())
        at, step = end, 2 * step
    return most
