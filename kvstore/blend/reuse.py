"""What a request asks of reuse, in the words of `kv_transfer_params`.

    {"reuse": "approximate", "recompute": 0.2, "pieces": [[24, 343], [343, 662]]}
    {"piece": {"start": 512, "end": 831}}

The first takes pieces that stand anywhere; the second registers one. Without either all is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvstore.blend.selection import SELECTIONS
from kvstore.errors import SpecError

SHARES: Final = {"fast": 0.1, "balanced": 0.2, "careful": 0.5}
"""Names for the share of a piece's rows that is computed again."""
LEAST: Final = 128
LEAST_SHARE: Final = 1 / 8
"""Tokens that reuse must spare, and their share of all that would be computed: loading, asking the
question twice and small passes take as long as computing 150 to 250 tokens did, measured."""
MAX_PIECES: Final = 256
MOST_REPAIRED: Final = 1024
_NAMES: Final = frozenset({"reuse", "recompute", "pieces", "selection", "piece", "repair"})


@dataclass(frozen=True, slots=True)
class Reuse:
    """What one request asks.

    Attributes:
        approximate: whether pieces may be reused behind other text than they were computed behind.
        recompute: the share of their rows, 0 to 1, that is computed again.
        selection: by what those are chosen; one of `SELECTIONS`.
        pieces: where they stand in the prompt, [start, end), in order; None: to be found.
        piece: where one to register stands; None: none.
        repair: how many rows more are computed again with each token of the answer.
    """

    approximate: bool = False
    recompute: float = SHARES["balanced"]
    selection: str = "question"
    pieces: tuple[tuple[int, int], ...] | None = None
    piece: tuple[int, int] | None = None
    repair: int = 0


def asked(params: Mapping[str, Any] | None, prompt_tokens: int) -> Reuse:
    """What the parameters of a request with a prompt of that length ask; other names are left.

    Raises:
        SpecError: what is wrong, and how to write it.
    """
    try:
        return _asked(params, prompt_tokens)
    except SpecError:
        raise
    except (OverflowError, ValueError) as e:  # Of numbers that even words cannot be made of.
        raise SpecError(f"a number in it is too large: {e}") from e


def _asked(params: Mapping[str, Any] | None, prompt_tokens: int) -> Reuse:
    if params is None:
        return Reuse()
    if not isinstance(params, Mapping):
        raise SpecError(f'{params!r:.60} is no object; write {{"reuse": "approximate"}}')
    given = {name: params[name] for name in _NAMES & params.keys() if params[name] is not None}
    kind = given.get("reuse", "exact")
    if kind not in ("exact", "approximate"):
        raise SpecError(f'reuse is {kind!r:.60}; it must be "exact" or "approximate"')
    share = given.get("recompute", "balanced")
    usual = "first" if share == "fast" else "question"
    selection = given.get("selection", usual)
    if not isinstance(selection, str) or selection not in SELECTIONS:
        known = ", ".join(SELECTIONS)
        raise SpecError(f"selection is {selection!r:.60}; it must be one of {known}")
    spans, piece, repair = given.get("pieces"), given.get("piece"), given.get("repair", 0)
    if type(repair) is not int or not 0 <= repair <= MOST_REPAIRED:
        raise SpecError(f"repair is {repair!r:.60}; it must be 0 to {MOST_REPAIRED} rows a token")
    if piece is not None and (not isinstance(piece, Mapping) or set(piece) != {"start", "end"}):
        raise SpecError(f'piece is {piece!r:.60}; write {{"start": 512, "end": 831}}')
    register = None if piece is None else [[piece["start"], piece["end"]]]
    if register and kind == "approximate":
        raise SpecError('a piece cannot be registered by a request with "reuse": "approximate"')
    made = Reuse(
        kind == "approximate",
        _share(share),
        selection,
        None if spans is None else _spans("pieces", spans, prompt_tokens),
        None if register is None else _spans("piece", register, prompt_tokens)[0],
        repair,
    )
    if "reuse" not in given and not given.keys() <= {"piece"}:
        names = ", ".join(sorted(given))
        raise SpecError(f'{names} stands alone; say "reuse": "approximate", or leave it out')
    return made


def too_little(spans: Sequence[tuple[int, int]], reuse: Reuse, rest: int) -> str:
    """Why pieces at `spans` are computed like any text, by name; empty: they are worth reuse.

    `rest` is how many tokens would be computed without them. Who asks for all rows gets that.
    """
    share = SELECTIONS[reuse.selection].share
    share = reuse.recompute if share is None else share
    spared = round(sum(end - start for start, end in spans) * (1 - share))
    return "small_saving" if share < 1 and spared < max(LEAST, rest * LEAST_SHARE) else ""


def _share(value: Any) -> float:
    if isinstance(value, str) and value in SHARES:
        return SHARES[value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        names = ", ".join(f'"{name}" ({share})' for name, share in SHARES.items())
        raise SpecError(f"recompute is {value!r:.60}; it must be 0 to 1, or one of {names}")
    return float(value)


def _spans(name: str, value: Any, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, (list, tuple)):
        raise SpecError(f"{name} is {value!r:.60}; write [[start, end], ...], counted in tokens")
    if len(value) > MAX_PIECES:
        raise SpecError(f"{name} has {len(value)} entries; at most {MAX_PIECES} are allowed")
    before, spans = 0, []
    for span in value:
        pair = isinstance(span, (list, tuple)) and len(span) == 2
        if not pair or not all(type(place) is int for place in span):
            raise SpecError(f"{span!r:.60} in {name} is no [start, end] of whole numbers")
        start, end = span
        if not before <= start < end <= prompt_tokens:
            raise SpecError(
                f"[{start}, {end}] in {name} is not in order: start must be below end, not below "
                f"the end of the one before ({before}), and end within the {prompt_tokens} tokens "
                "of the prompt"
            )
        spans.append((start, end))
        before = end
    return tuple(spans)
