"""The words as types: what is refused, with which remedy, and where bytes lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest

from kvstore.blocks.spec import (
    AXES,
    DTYPE_BYTES,
    MAX_OBJECT_BYTES,
    Described,
    Group,
    ModelIdentity,
    Namespace,
    Opaque,
    Part,
    Shard,
    block_tokens_for,
    check_block_tokens,
    plane_strides,
)
from kvstore.errors import SpecError

LONG = "x" * 4097


def group(**changes: object) -> Group:
    fields: dict[str, object] = {"layers": 2, "heads": 3, "channels": (4, 6), "dtype": "float16"}
    return Group(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelIdentity(""), r"model\.name is empty; give it a name"),
        (lambda: ModelIdentity(LONG), r"model\.name is longer than 4096 bytes"),
        (lambda: ModelIdentity("m", revision=LONG), r"model\.revision is longer"),
        (lambda: ModelIdentity("m", adapter="ä" * 2049), r"model\.adapter is longer"),
        (lambda: ModelIdentity("m", extra=(("", "v"),)), r"model\.extra name is empty"),
        (lambda: ModelIdentity("m", extra=(("n", LONG),)), r"model\.extra\['n'\] is longer"),
        (lambda: ModelIdentity("m", extra=(("n", "v"),) * 65), r"65 pairs; at most 64"),
        (lambda: Namespace(ModelIdentity("m"), LONG), r"tenant is longer"),
        (lambda: Namespace(ModelIdentity("m"), "", 0), r"block_tokens is 0.* between 1 and 65536"),
        (lambda: Namespace(ModelIdentity("m"), "", 65537), r"block_tokens is 65537"),
        (lambda: group(name=""), r"group\.name is empty"),
        (lambda: group(layers=0), r"group\.layers is 0; it must lie between 1 and 4096"),
        (lambda: group(heads=-1), r"group\.heads is -1"),
        (lambda: group(first_layer=-1), r"group\.first_layer is -1"),
        (lambda: group(channels=()), r"group\.channels has 0 planes; give 1 to 4"),
        (lambda: group(channels=(1,) * 5), r"group\.channels has 5 planes"),
        (lambda: group(channels=(4, 0)), r"group\.channels is 0"),
        (lambda: group(dtype="fp16"), r"group\.dtype 'fp16' is not known; use one of float32"),
        (lambda: Shard(0, 0), r"shard\.count is 0"),
        (lambda: Shard(2, 2), r"shard\.index is 2; it must lie between 0 and 1"),
        (lambda: Described("LPNH"), r"'LPNH' must name each of L, P, N, H, C once"),
        (lambda: Described("LPNHCC"), r"must name each of"),
        (lambda: Described("LPNHX"), r"must name each of"),
        (lambda: Opaque("", 1, 1), r"layout\.name is empty"),
        (lambda: Opaque("o", 0, 1), r"layout\.page_tokens is 0"),
        (lambda: Opaque("o", 1, MAX_OBJECT_BYTES + 1), r"layout\.page_bytes is 1073741825"),
        (lambda: Opaque("o", 1, 1, (("", "v"),)), r"layout\.params name is empty"),
        (lambda: Opaque("o", 1, 1, (("n", "v"),) * 65), r"layout\.params has 65 pairs"),
    ],
)
def test_bad_specs_are_refused_with_field_and_limit(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_what_comes_over_the_wire_is_checked_alike() -> None:
    good = msgspec.msgpack.encode(Part(group()))
    assert msgspec.msgpack.decode(good, type=Part) == Part(group())
    bad = msgspec.msgpack.decode(good)
    bad["group"]["layers"] = 1 << 40
    with pytest.raises(msgspec.ValidationError, match=r"group\.layers is 1099511627776"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(bad), type=Part)


def test_sizes() -> None:
    assert group().elem_size == 2
    assert group().nbytes(16) == 2 * 3 * (4 + 6) * 2 * 16
    assert Part(group()).nbytes(16) == group().nbytes(16)
    assert Part(group(), Opaque("o", 8, 100)).nbytes(16) == 2 * 2 * 100
    assert {name: group(dtype=name).elem_size for name in DTYPE_BYTES} == DTYPE_BYTES


def test_an_opaque_page_must_divide_the_block() -> None:
    with pytest.raises(SpecError, match=r"block_tokens is 20, no multiple .* 8; use 24"):
        Part(group(), Opaque("o", 8, 100)).nbytes(20)


def test_an_object_has_a_largest_size() -> None:
    huge = group(layers=4096, heads=65536)
    with pytest.raises(SpecError, match=r"the limit is 1073741824: use fewer block_tokens"):
        Part(huge).nbytes(64)


def test_conversion() -> None:
    described = [Part(group(), Described(axes)) for axes in ("LPNHC", "LNHPC", "LPHNC")]
    opaque = Part(group(), Opaque("o", 16, 100))
    for a, b in itertools.product(described, repeat=2):
        assert a.converts_to(b)
    for part in described:
        assert not part.converts_to(opaque)
        assert not opaque.converts_to(part)
    assert opaque.converts_to(Part(group(), Opaque("o", 16, 100)))
    for other in (Opaque("p", 16, 100), Opaque("o", 8, 100), Opaque("o", 16, 100, (("isa", "x"),))):
        assert not opaque.converts_to(Part(group(), other))


def test_casts() -> None:
    half, whole = Part(group()), Part(group(dtype="float32"), Described("LNHPC"))
    small = Part(group(dtype="float8_e4m3fn"))
    for a, b in itertools.permutations([half, whole, small], 2):
        assert a.casts_to(b)
    others = [
        half,
        Part(group(dtype="int8")),
        Part(group(dtype="float32", layers=3)),
        Part(group(dtype="float32"), shard=Shard(0, 2)),
        Part(group(dtype="float32"), Opaque("o", 16, 100)),
    ]
    for other in others:
        assert not half.casts_to(other)
        assert not other.casts_to(half)


@pytest.mark.parametrize(
    "other",
    [
        Part(group(layers=3)),
        Part(group(heads=1)),
        Part(group(channels=(6, 4))),
        Part(group(dtype="bfloat16")),
        Part(group(name="other")),
        Part(group(kind="sliding")),
        Part(group(first_layer=2)),
        Part(group(), shard=Shard(0, 2)),
    ],
    ids=lambda part: str(part.group.name),
)
def test_other_numbers_are_another_content(other: Part) -> None:
    part = Part(group())
    assert part.content != other.content
    assert part.variant != other.variant
    assert not other.converts_to(part)


def test_a_layout_is_another_variant_of_the_same_content() -> None:
    same = group(channels=(4, 4))
    parts = [Part(same, Described("".join(axes))) for axes in itertools.permutations(AXES)]
    parts += [Part(same, Opaque("o", 16, 100)), Part(same, Opaque("o", 16, 101))]
    assert len({part.content for part in parts}) == 1
    assert len({part.variant for part in parts}) == len(parts)
    assert all(len(part.variant) == 16 for part in parts)


def test_strides_cover_every_byte_of_an_object_once() -> None:
    """For all axis orders, and planes of equal and of different widths."""
    tokens = 3
    for channels, axes in itertools.product([(4, 4), (4, 6), (5,)], itertools.permutations(AXES)):
        order = "".join(axes)
        if len(set(channels)) > 1 and order.index("C") < order.index("P"):
            with pytest.raises(SpecError, match="cannot lie inside the channel axis"):
                Part(group(channels=channels), Described(order))
            continue
        spec = group(channels=channels)
        seen: set[int] = set()
        widths = channels * spec.layers
        for s, width in zip(
            plane_strides(Part(spec, Described(order)), tokens), widths, strict=True
        ):
            seen |= {
                s.offset + n * s.token + h * s.head + c * s.channel
                for n, h, c in itertools.product(range(tokens), range(spec.heads), range(width))
            }
        assert sorted(seen) == list(range(0, spec.nbytes(tokens), spec.elem_size)), order


def test_the_default_block_is_the_smallest_that_is_large_enough() -> None:
    for page in (1, 7, 16, 48, 64, 65, 1024):
        block = block_tokens_for(page)
        assert block % page == 0
        assert block >= 64
        assert block - page < 64
    assert block_tokens_for(16, at_least=100) == 112


def test_a_block_is_made_of_whole_pages() -> None:
    check_block_tokens(64, 16)
    with pytest.raises(SpecError, match=r"block_tokens is 70, .* page size 16; use 80"):
        check_block_tokens(70, 16)
    with pytest.raises(SpecError, match=r"page_tokens is 0; it must lie between"):
        check_block_tokens(64, 0)


def test_specs_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        group().layers = 5  # type: ignore[misc]
