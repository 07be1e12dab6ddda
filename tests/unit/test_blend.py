"""What requests ask of reuse, pieces in prompts, and the rows that are computed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from kvstore.blend.calibration import Quality, Verdict, keep, kept, uncalibrated
from kvstore.blend.pieces import (
    BASE,
    BLOCK_TOKENS,
    LONGEST,
    SHORTEST,
    PieceIndex,
    Placed,
    filler,
    named,
    piece_keys,
    piece_namespace,
    search,
)
from kvstore.blend.reuse import MAX_PIECES, Reuse, asked, too_little
from kvstore.blend.selection import SELECTIONS, runs
from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import SpecError

ROOM = Namespace(ModelIdentity("a-model", "1"), "someone", 64)
APPROXIMATE = {"reuse": "approximate"}


def text(count: int, seed: int = 0) -> Any:
    """Tokens of which no two stretches are alike."""
    return np.random.default_rng(seed).integers(0, 50_000, count, dtype=np.uint32)


# -- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (None, Reuse()),
        ({"do_remote_prefill": True, "recompute": None}, Reuse()),
        (APPROXIMATE, Reuse(approximate=True)),
        (APPROXIMATE | {"recompute": 1}, Reuse(True, 1.0)),
        (APPROXIMATE | {"recompute": "fast"}, Reuse(True, 0.1, "first")),
        (APPROXIMATE | {"recompute": "careful"}, Reuse(True, 0.5)),
        (
            APPROXIMATE | {"recompute": "fast", "selection": "all"},
            Reuse(True, 0.1, "all"),
        ),
        (
            APPROXIMATE | {"pieces": [[0, 10], (10, 100)]},
            Reuse(True, pieces=((0, 10), (10, 100))),
        ),
        ({"piece": {"start": 3, "end": 80}}, Reuse(piece=(3, 80))),
    ],
)
def test_a_request_asks(params: Any, wanted: Reuse) -> None:
    assert asked(params, 100) == wanted


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ([], "is no object"),
        ({"reuse": "blended"}, 'must be "exact" or "approximate"'),
        ({"reuse": ["exact"]}, 'must be "exact" or "approximate"'),
        ({"recompute": 1.1}, "must be 0 to 1"),
        ({"recompute": float("nan")}, "must be 0 to 1"),
        ({"recompute": True}, "must be 0 to 1"),
        ({"repair": 1.0}, "must be 0 to 1024 rows a token"),
        ({"repair": -1}, "must be 0 to 1024 rows a token"),
        ({"recompute": "slow"}, '"fast" (0.1)'),
        ({"selection": "best"}, "must be one of first, question"),
        ({"selection": {}}, "must be one of first, question"),
        ({"pieces": {"start": 1}}, "write [[start, end], ...]"),
        ({"pieces": [[1, 2]] * (MAX_PIECES + 1)}, "at most 256"),
        ({"pieces": [[1, 2, 3]]}, "no [start, end]"),
        ({"pieces": [[1.0, 2]]}, "whole numbers"),
        ({"pieces": [[False, True]]}, "whole numbers"),
        ({"pieces": [[5, 10], [9, 12]]}, "end of the one before (10)"),
        ({"pieces": [[7, 7]]}, "start must be below end"),
        ({"pieces": [[-1, 7]]}, "not in order"),
        ({"pieces": [[7, 101]]}, "the 100 tokens"),
        ({"piece": [1, 2]}, '"start": 512'),
        ({"piece": {"start": 1}}, '"start": 512'),
        ({"piece": {"start": 1, "end": 1000}}, "the 100 tokens"),
        (APPROXIMATE | {"piece": {"start": 1, "end": 99}}, "cannot be registered"),
        ({"recompute": 0.2, "pieces": [[0, 70]]}, 'say "reuse": "approximate"'),
        (APPROXIMATE | {"recompute": 10**400}, "must be 0 to 1"),
        (APPROXIMATE | {"recompute": -(10**5000)}, "too large"),
        (APPROXIMATE | {"pieces": [[0, 10**5000]]}, "too large"),
        (APPROXIMATE | {"repair": 10**5000}, "too large"),
    ],
)
def test_what_is_wrong_is_said(params: Any, problem: str) -> None:
    with pytest.raises(SpecError) as e:
        asked(params, 100)
    assert problem in str(e.value)


# -- pieces ----------------------------------------------------------------------------------------


def test_the_filler_is_the_same_everywhere_and_long_enough_for_any_tokenizer() -> None:
    def words(said: str) -> list[int]:
        """As few tokens of English as tokenizers make."""
        return [len(word) for word in said.split()]

    made = filler(words, 100)
    assert len(made) == BASE
    assert made[:5].tolist() == [4, 8, 9, 3, 3]
    scattered = filler(None, 300)
    assert scattered.max() < 300
    assert len(set(scattered.tolist())) > 200
    with pytest.raises(SpecError, match="makes 1 tokens"):
        filler(lambda _: [1], 100)


def test_pieces_have_names_of_their_own() -> None:
    before, tokens = text(BASE, 1), text(150)
    room = piece_namespace(ROOM, before)
    others = [
        piece_namespace(structs.replace(ROOM, tenant="another"), before),
        piece_namespace(structs.replace(ROOM, model=ModelIdentity("a-model", "2")), before),
        piece_namespace(ROOM, before[::-1]),
        structs.replace(ROOM, block_tokens=BLOCK_TOKENS),
    ]
    keys = piece_keys(room, tokens)
    assert len(keys) == -(-150 // BLOCK_TOKENS)
    assert keys[:-1] == block_keys(room, tokens)
    for other in others:
        assert not set(piece_keys(other, tokens)) & set(keys)
    # The last block's key tells how long the piece is.
    assert piece_keys(room, tokens[:149])[:-1] == keys[:-1]
    assert piece_keys(room, tokens[:149])[-1] != keys[-1]


def test_pieces_are_found_wherever_they_stand() -> None:
    index = PieceIndex()
    one, two, longer = text(200, 1), text(90, 2), text(300, 4)
    longer[:100] = one[:100]  # begins alike
    for piece in (one, two, longer, one):
        index.add(piece)
    assert len(index) == 3
    prompt = np.concatenate([text(37, 5), two, longer, one[:70], text(3, 6), two[3:], one[:60]])
    places = [(p.start, p.end, p.offset) for p in index.find(prompt)]
    assert places == [(37, 127, 0), (127, 427, 0), (427, 497, 0), (500, 587, 3)]
    assert index.find(prompt[:63]) == []
    assert index.find([]) == []
    for found in index.find(prompt):
        own = found.piece[found.offset : found.offset + found.end - found.start]
        assert np.array_equal(prompt[found.start : found.end], own)


def test_pieces_that_nobody_here_has_added_are_found_in_a_store() -> None:
    room, index = piece_namespace(ROOM, text(BASE, 1)), PieceIndex()
    one, two, known, short = text(200, 1), text(90, 2), text(150, 3), text(63, 4)
    held = {key for piece in (one, two, known, short) for key in piece_keys(room, piece)}
    index.add(known)
    asked: list[int] = []

    def stored(keys: Sequence[bytes]) -> list[bool]:
        asked.append(len(keys))
        return [key in held for key in keys]

    prompt = np.concatenate([text(5, 5), two, known, one[:70], text(3, 6), short, one, text(20, 7)])
    found = search(prompt, index, room, stored)
    assert [(p.start, p.end, p.offset) for p in found] == [
        (5, 85, 0), (95, 245, 0), (245, 309, 0), (381, 573, 0),
    ]  # fmt: skip
    assert all(key in held for p in found for key in piece_keys(room, p.piece))
    assert len(asked) == 2
    for nothing in (text(63, 8), np.zeros(0, np.uint32), text(500, 9)):
        assert search(nothing, index, room, stored) == []
    assert search(prompt, index, room, lambda _: []) == index.find(prompt)  # The store is away.
    # A piece that repeats itself begins everywhere.
    held.update(piece_keys(room, np.full(1000, 7)))
    asked.clear()
    begin = [(p.start, p.end) for p in search(np.full(100_000, 7), index, room, stored)]
    assert (begin[0], max(asked)) == ((0, 992), 1 << 15)


def test_a_place_is_cut_to_what_is_wanted_of_it() -> None:
    piece = text(200)
    placed = Placed(100, 300, piece)
    assert placed.blocks == range(13)
    assert placed.within(0, 300) == placed
    cut = placed.within(120, 299)
    assert cut is not None
    assert (cut.start, cut.end, cut.offset, cut.blocks) == (120, 299, 20, range(1, 13))
    assert placed.within(100, 100 + SHORTEST - 1) is None
    assert [(p.start, p.end) for p in named(piece, ((3, 70), (70, 80)))] == [(3, 70), (70, 80)]


def test_an_index_stays_small_and_forgets_what_is_not_used() -> None:
    index = PieceIndex(limit=400)
    pieces = [text(100, seed) for seed in range(6)]
    for piece in pieces[:4]:
        index.add(piece)
    assert index.find(pieces[0])  # used, so that it stays
    index.add(pieces[4])
    assert [bool(index.find(piece)) for piece in pieces[:5]] == [True, False, True, True, True]
    for length in (SHORTEST - 1, LONGEST + 1):
        with pytest.raises(SpecError, match="a piece has 64 to 32768 tokens"):
            index.add(text(length))
    begins = text(SHORTEST + 4)
    index = PieceIndex()
    for seed in range(100):  # more than are told apart by their first windows
        index.add(np.concatenate([begins, text(20, seed)]))
    assert index.find(np.concatenate([begins, text(20, 99)]))[0].end == SHORTEST + 24


def test_prompts_that_repeat_themselves_take_no_longer() -> None:
    index = PieceIndex()
    for count in (64, 1000, 30_000):
        index.add(np.full(count, 7))
        index.add(np.arange(count) % 2)
    began = time.thread_time()
    for prompt in (np.full(100_000, 7), np.arange(100_000) % 2, text(100_000)):
        index.find(prompt)
    assert time.thread_time() - began < 1.0


# -- rows ------------------------------------------------------------------------------------------

SPANS = [(10, 110), (110, 160), (200, 300)]


def rows_of(name: str, share: float, scores: Any = None, tile: int = 1) -> list[int]:
    return SELECTIONS[name].rows(SPANS, share, scores, tile=tile).tolist()


def test_all_and_none_do_not_ask_for_the_share() -> None:
    every = [row for span in SPANS for row in range(*span)]
    assert rows_of("all", 0.1) == every
    assert rows_of("none", 0.9) == []
    for name in ("first", "question", "deviation"):
        assert rows_of(name, 1.0) == every
        assert rows_of(name, 0.0) == []


def test_first_takes_the_head_of_each_piece() -> None:
    taken = SELECTIONS["first"].rows(SPANS, 0.2)
    assert runs(taken) == [(10, 30), (110, 120), (200, 220)]


def test_question_takes_heads_and_what_the_question_attends_to() -> None:
    scores = np.zeros(400)
    scores[[50, 77, 250, 399]] = 1.0, 3.0, 2.0, 9.0
    assert runs(SELECTIONS["question"].rows(SPANS, 50 / 250, scores)) == [
        (10, 26), (77, 78), (110, 126), (200, 216), (250, 251),
    ]  # fmt: skip
    in_tiles = SELECTIONS["question"].rows(SPANS, 60 / 250, scores, tile=16)
    assert runs(in_tiles) == [(10, 26), (74, 90), (110, 126), (200, 216)]
    few = SELECTIONS["question"].rows(SPANS, 9 / 250, scores)
    assert runs(few) == [(10, 13), (110, 113), (200, 203)]
    scores[:] = np.nan  # of an engine whose numbers ran over: any rows do
    assert len(rows_of("question", 0.3, scores)) == 75


def test_deviation_takes_the_rows_that_differ_most() -> None:
    scores = np.arange(300.0)
    assert rows_of("deviation", 0.1, scores) == list(range(275, 300))


def test_runs_of_rows() -> None:
    assert runs(np.array([], np.int64)) == []
    assert runs(np.array([3])) == [(3, 4)]
    assert runs(np.array([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]


@pytest.mark.parametrize(
    ("pieces", "share", "selection", "rest", "reason"),
    [
        ([(0, 160)], 0.2, "question", 300, ""),  # spares 128
        ([(0, 159)], 0.2, "question", 300, "small_saving"),
        ([(0, 80), (90, 170)], 0.2, "question", 1024, ""),  # an eighth
        ([(0, 80), (90, 170)], 0.2, "question", 1025, "small_saving"),
        ([(0, 1000)], 0.9, "first", 1000, "small_saving"),
        ([(0, 1000)], 0.9, "none", 1000, ""),
        ([(0, 64)], 1.0, "question", 1000, ""),
        ([(0, 64)], 0.2, "all", 1000, ""),
        ([], 0.2, "question", 1000, "small_saving"),
    ],
)
def test_what_saves_little_is_computed(
    pieces: list[tuple[int, int]], share: float, selection: str, rest: int, reason: str
) -> None:
    assert too_little(pieces, Reuse(True, share, selection), rest) == reason


# -- what a calibration found ---------------------------------------------------------------------


def verdict(kl: float = 0.02, same: float = 0.96, way: str = "question 0.2") -> Verdict:
    return Verdict(1, "a-model", 384, {way: Quality(kl, same)})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvstore" / "calibrated"


def test_a_verdict_is_of_one_model_whatever_the_engine(cache: Path) -> None:
    one = ModelIdentity("Llama", "a" * 64, "bfloat16", extra=(("config", "c"),))
    assert "`kvstore calibrate MODEL --dtype bfloat16`" in uncalibrated(one)
    keep(one, verdict())
    assert kept(one) == verdict()
    assert uncalibrated(one) == ""
    assert uncalibrated(structs.replace(one, extra=(*one.extra, ("engine", "vllm")))) == ""
    named = structs.replace(one, revision="v1")
    assert "--dtype bfloat16 --revision v1`" in uncalibrated(named)
    for other in (
        named,
        structs.replace(one, dtype="float16"),
        structs.replace(one, adapter="lora"),
        structs.replace(one, extra=(("config", "d"),)),
        structs.replace(one, extra=(*one.extra, ("stored", "i8"))),
    ):
        assert "has not been calibrated" in uncalibrated(other)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (verdict(kl=0.0301), "the mean KL is 0.0301; up to 0.03 is good enough"),
        (verdict(same=0.949), "94.9% of the likeliest tokens are the same; 95% would do"),
        (verdict(way="question 0.5"), "the usual selection was not measured"),
    ],
)
def test_a_bad_verdict_says_why(cache: Path, found: Verdict, problem: str) -> None:
    keep(ROOM.model, found)
    assert uncalibrated(ROOM.model) == f"a-model has failed its calibration: {problem}"


def test_a_verdict_that_is_not_whole_is_none(cache: Path) -> None:
    keep(ROOM.model, verdict(kl=0.03, same=0.95))
    assert uncalibrated(ROOM.model) == ""
    (file,) = cache.iterdir()
    good = file.read_bytes()
    for damaged in (
        good[:-5],
        b"",
        good.replace(b'"format": 1', b'"format": 2'),
        good.replace(b'"format": 1,', b""),
        good.replace(b'"tokens"', b'"more": 1, "tokens"'),
        good.replace(b"0.95", b"1.95"),
        good.replace(b"0.03", b"null"),
        good.replace(b'"model": "', b'"model": "\xff'),
        b" " * (1 << 16) + good,
    ):
        assert damaged != good
        file.write_bytes(damaged)
        assert kept(ROOM.model) is None
    file.write_bytes(good)
    cache.chmod(0o777)
    assert kept(ROOM.model) is None
    with pytest.raises(SpecError, match="XDG_CACHE_HOME"):
        keep(ROOM.model, verdict())
