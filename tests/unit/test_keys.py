"""Block keys: equal everywhere and for ever, and different whenever the values are.

The golden vectors were computed once from the definition alone, with nothing but `hashlib` and
`struct`:

    text(s)    = struct.pack("<I", len(s)) + s
    namespace  = sha256(text("kvstore/namespace/1") + text(name) + text(revision) + text(dtype)
                        + text(adapter) + text(tenant) + text(n) + text(v) for each sorted extra
                        + struct.pack("<I", block_tokens))
    key        = sha256(parent + struct.pack("<%dI" % n, *tokens) + text(e) for each extra)

They must never change: keys of other versions and hosts are in caches already.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from array import array

import numpy as np
import pytest

from kvstore.blocks.keys import (
    KEY_BYTES,
    Media,
    block_keys,
    partial_key,
    prompt_extras,
    split_keys,
    token_array,
)
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import SpecError

SMALL = Namespace(ModelIdentity("m"), "", 4)
FULL = Namespace(
    ModelIdentity(
        "meta-llama/Llama-3.1-8B",
        "0e9e39f2",
        "bfloat16",
        "lora-7",
        (("rope", "yarn"), ("a", "b")),
    ),
    "acme",
    16,
)
GOLDEN_SMALL = "a975792c6d9a7b71d31ae038c506e4f600f90296f4e2eae06c340b977f193e67"
GOLDEN_FULL = "2a5e404099b2e67b9afaa5105b10b810b5b22f4cbfeab5b2d36068e543fad0c0"
GOLDEN_0_TO_7 = [
    "4234ad5399f3cd1997b5d15f7f5d72472fd99f089405890d068f7789a3495d19",
    "ce071a0739b6393985e09eed31843787f1bc284b108a4169a409c9660ff02124",
]
GOLDEN_EDGES = "49fd8e5f655f6cab4e3f41ed69679f14a4e6f4e4ad109c0ec66703c4d62ceb13"
GOLDEN_EXTRAS = [  # of tokens 0 to 11, with the extras b"image" and b"" on block 1
    "4234ad5399f3cd1997b5d15f7f5d72472fd99f089405890d068f7789a3495d19",
    "9aaab864d7315ac128d8116a9d0bb9d08d19a230d81055bc3e405a1735dd1853",
    "411d49e3f35a7e0f26e90c5a8087d369039dccc3eb4d8873621ad783d003118b",
]


def hexes(keys: list[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def test_golden_namespaces() -> None:
    assert SMALL.digest.hex() == GOLDEN_SMALL
    assert FULL.digest.hex() == GOLDEN_FULL


def test_golden_keys() -> None:
    assert hexes(block_keys(SMALL, range(8))) == GOLDEN_0_TO_7
    assert hexes(block_keys(SMALL, [0, 1, 0xFFFFFFFF, 0x80000000])) == [GOLDEN_EDGES]
    extras = {1: [b"image", b""]}
    assert hexes(block_keys(SMALL, range(12), extras=extras)) == GOLDEN_EXTRAS


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_equal_in_processes_with_other_hash_seeds(seed: str) -> None:
    script = (
        "from kvstore.blocks.keys import block_keys\n"
        "from kvstore.blocks.spec import ModelIdentity, Namespace, Group, Part\n"
        "n = Namespace(ModelIdentity('m'), '', 4)\n"
        "keys = block_keys(n, range(12), extras={1: [b'image', b'']})\n"
        "part = Part(Group(layers=2, heads=4, channels=(8, 16), dtype='float16'))\n"
        "print(*[k.hex() for k in keys], part.variant.hex())\n"
    )
    from kvstore.blocks.spec import Group, Part

    part = Part(Group(layers=2, heads=4, channels=(8, 16), dtype="float16"))
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [*GOLDEN_EXTRAS, part.variant.hex()]


@pytest.mark.parametrize(
    "tokens",
    [
        np.arange(8, dtype=np.uint32),
        np.arange(8, dtype=np.int64),
        np.arange(8, dtype=np.uint8),
        np.arange(8, dtype=">u4"),
        np.arange(16, dtype=np.uint32)[::2] // 2,
        array("I", range(8)),
        array("q", range(8)),
        tuple(range(8)),
        bytes(range(8)),
        bytearray(range(8)),
        list(np.arange(8)),
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', '')}",
)
def test_equal_for_every_kind_of_sequence(tokens: object) -> None:
    assert hexes(block_keys(SMALL, tokens)) == GOLDEN_0_TO_7  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 1, -1, 3], r"token id -1 at position 2 is outside u32"),
        ([0, 1 << 32], r"token id 4294967296 at position 1 is outside u32"),
        ([0, 1.5], r"token 1 is 1\.5, no whole number"),
        ([0, None], r"token 1 is None, no whole number"),
        (["a"], r"token 0 is 'a', no whole number"),
        ("abcd", r"token 0 is 'a', no whole number"),
        (np.array([0, -5]), r"token id -5 is outside u32"),
        (np.array([0, 1 << 32]), r"token id 4294967296 is outside u32"),
        (np.array([(1 << 64) - 1], dtype=np.uint64), r"token id 18446744073709551615 is outside"),
        (np.array([0.0, 1.0]), r"flat array of whole numbers, not float64"),
        (np.zeros((2, 2), dtype=np.int64), r"flat array of whole numbers, not int64 \(2, 2\)"),
    ],
)
def test_what_is_no_token_is_refused(tokens: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        block_keys(SMALL, tokens)  # type: ignore[arg-type]


def test_a_partial_block_has_no_key() -> None:
    for count in range(9):
        assert hexes(block_keys(SMALL, range(count))) == GOLDEN_0_TO_7[: count // 4]


def test_a_partial_block_is_found_by_the_same_tokens_behind_the_same_prefix_only() -> None:
    tokens = [1, 2, 3]
    key = partial_key(SMALL, tokens)
    others = [
        partial_key(SMALL, tokens[:2]),
        partial_key(SMALL, [*tokens, 0]),  # as it is padded
        partial_key(SMALL, tokens, parent=key),
        partial_key(SMALL, tokens, extras=[b"salt:a"]),
        partial_key(FULL, tokens),
        *block_keys(SMALL, [*tokens, 0]),
    ]
    assert len({key, *others}) == 7
    assert key == partial_key(SMALL, np.array(tokens, np.uint32))


def test_a_continued_chain_equals_the_whole() -> None:
    whole = block_keys(SMALL, range(40), extras={3: [b"x"], 7: [b"y"]})
    for cut in range(1, 10):
        rest = {block - cut: extra for block, extra in ((3, [b"x"]), (7, [b"y"])) if block >= cut}
        tail = block_keys(SMALL, range(4 * cut, 40), extras=rest, parent=whole[cut - 1])
        assert whole[cut:] == tail


def test_a_parent_that_is_no_key_is_refused() -> None:
    with pytest.raises(SpecError, match="parent key has 31 bytes; a key has 32"):
        block_keys(SMALL, range(8), parent=bytes(31))


def test_extras_are_unambiguous() -> None:
    """However the same bytes are cut, and wherever they are put, the keys differ."""
    variants: list[dict[int, list[bytes]]] = [
        {},
        {0: [b""]},
        {0: [b"", b""]},
        {0: [b"ab"]},
        {0: [b"a", b"b"]},
        {0: [b"", b"ab"]},
        {0: [b"ab", b""]},
        {0: [b"\x01\x00\x00\x00a"]},
        {1: [b"ab"]},
    ]
    last = [block_keys(SMALL, range(8), extras=extras)[-1] for extras in variants]
    assert len(set(last)) == len(last)


def test_extras_change_their_block_and_all_after_it_only() -> None:
    plain = block_keys(SMALL, range(16))
    other = block_keys(SMALL, range(16), extras={2: [b"image"]})
    assert plain[:2] == other[:2]
    assert not set(plain[2:]) & set(other[2:])


def test_no_extras_are_no_extras() -> None:
    assert hexes(block_keys(SMALL, range(8), extras={0: [], 1: ()})) == GOLDEN_0_TO_7


def test_extras_beyond_the_whole_blocks_change_nothing() -> None:
    assert hexes(block_keys(SMALL, range(10), extras={2: [b"x"], -1: [b"y"]})) == GOLDEN_0_TO_7


def test_golden_extras_of_a_prompt() -> None:
    media = [Media("image", "cd", 9, 8), Media("audio", "ab", 3, 2)]
    extras = prompt_extras(8, range(4), salt="s", adapter="f0", media=media)
    assert extras == {
        0: [b"adapter:f0", b"salt:s", b"media:3:5:audioab"],
        1: [b"media:1:5:imagecd"],
        2: [b"media:-7:5:imagecd"],
    }
    assert prompt_extras(8, range(4)) == {}


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_extras_of_later_blocks_are_those_of_the_whole(first: int) -> None:
    media = [Media("image", "cd", 9, 8), Media("image", "ef", 17, 1), Media("image", "gh", 30, 99)]
    whole = prompt_extras(8, range(4), salt="s", adapter="f0", media=media)
    rest = prompt_extras(8, range(first, 4), salt="s", adapter="f0", media=media)
    assert rest == {block - first: values for block, values in whole.items() if block >= first}


def test_extras_of_a_prompt_are_unambiguous() -> None:
    said = [
        prompt_extras(8, range(4), salt="a"),
        prompt_extras(8, range(4), adapter="a"),
        prompt_extras(8, range(4), salt="\ud800"),  # As a client may send it.
        prompt_extras(8, range(4), media=[Media("a", "bc", 0, 1)]),
        prompt_extras(8, range(4), media=[Media("ab", "c", 0, 1)]),
        prompt_extras(8, range(4), media=[Media("a", "1:bc", 0, 1)]),
        prompt_extras(8, range(4), media=[Media("a", "bc", 1, 1)]),
        prompt_extras(8, range(4), media=[Media("a", "bc", 1, 8)]),
        prompt_extras(8, range(4), salt="media:0:1:abc"),
    ]
    assert len({str(extras) for extras in said}) == len(said)


def test_every_part_of_the_namespace_makes_other_keys() -> None:
    def of(name: str = "m", tenant: str = "", block: int = 4, **model: object) -> bytes:
        identity = ModelIdentity(name, **model)  # type: ignore[arg-type]
        return block_keys(Namespace(identity, tenant, block), range(16))[0]

    keys = [
        of(),
        of(name="n"),
        of(revision="x"),
        of(dtype="x"),
        of(adapter="x"),
        of(tenant="x"),
        of(block=8),
        of(extra=(("x", ""),)),
        of(extra=(("x", "x"),)),
        of(extra=(("x", ""), ("x", "x"))),
    ]
    for a, b in itertools.combinations(range(len(keys)), 2):
        assert keys[a] != keys[b], (a, b)


def test_fields_do_not_run_into_each_other() -> None:
    first = Namespace(ModelIdentity("ab", revision="c"))
    second = Namespace(ModelIdentity("a", revision="bc"))
    assert first.digest != second.digest


def test_the_order_of_model_extras_does_not_matter() -> None:
    pairs = (("a", "1"), ("b", "2"))
    one, other = (Namespace(ModelIdentity("m", extra=p)) for p in (pairs, pairs[::-1]))
    assert one.digest == other.digest


def test_keys_split_again() -> None:
    keys = block_keys(SMALL, range(40))
    assert all(len(key) == KEY_BYTES for key in keys)
    assert split_keys(b"".join(keys)) == keys


def test_token_arrays_are_contiguous_u32() -> None:
    made = token_array(np.arange(20, dtype=np.int16)[::-2])
    assert made.dtype == np.uint32
    assert made.flags.c_contiguous
    assert made.tolist() == list(range(19, -1, -2))


def test_lists_of_numpy_numbers_are_tokens_too() -> None:
    numbers = list(np.arange(40, dtype=np.int64))
    assert block_keys(SMALL, numbers) == block_keys(SMALL, list(range(40)))
