"""The words as types: what the cached numbers mean, and how their bytes lie.

A *part* is what one rank stores of one block for one group of layers. Its size and the order of
its bytes follow from the group's dimensions, the shard and the layout alone, so both ends of a
connection compute the same strides and nothing about bytes has to be trusted from the wire.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property, lru_cache
from itertools import product
from typing import Final, Literal, NamedTuple

import msgspec

from kvstore.errors import SpecError

AXES: Final = "LPNHC"
"""Layer, plane (key / value), token, head, channel."""

DTYPE_BYTES: Final[dict[str, int]] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}

FLOATS: Final = frozenset(name for name in DTYPE_BYTES if name.startswith(("float", "bfloat")))
"""Types whose numbers can be rounded to one another."""

MAX_OBJECT_BYTES: Final = 1 << 30
MAX_BLOCK_TOKENS: Final = 1 << 16
_MAX_TEXT: Final = 4096

Kind = Literal["full", "sliding", "mla", "recurrent", "sidecar"]


def _digest(value: object, size: int) -> bytes:
    """First `size` bytes of SHA-256 over the deterministic MessagePack of `value`."""
    return hashlib.sha256(msgspec.msgpack.encode(value, order="deterministic")).digest()[:size]


def _check_text(field: str, text: str, *, empty: bool = False) -> None:
    if not text and not empty:
        raise SpecError(f"{field} is empty; give it a name")
    if len(text.encode("utf-8", "surrogatepass")) > _MAX_TEXT:
        raise SpecError(f"{field} is longer than {_MAX_TEXT} bytes")


def _check_pairs(field: str, pairs: tuple[tuple[str, str], ...]) -> None:
    if len(pairs) > 64:
        raise SpecError(f"{field} has {len(pairs)} pairs; at most 64 are allowed")
    for name, value in pairs:
        _check_text(f"{field} name", name)
        _check_text(f"{field}[{name!r}]", value, empty=True)


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SpecError(f"{field} is {value}; it must lie between {low} and {high}")


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that changes KV values besides the tokens.

    `name` and `revision` (a commit, or a hash of the weights) name the weights, `dtype` the number
    type of the cache, `adapter` a LoRA or similar; `extra` holds further (name, value) pairs, such
    as a RoPE scaling that a flag switched on.
    """

    name: str
    revision: str = ""
    dtype: str = ""
    adapter: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_text("model.name", self.name)
        for field in ("revision", "dtype", "adapter"):
            _check_text(f"model.{field}", getattr(self, field), empty=True)
        _check_pairs("model.extra", self.extra)


class Namespace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Model identity + tenant + block size: two namespaces never see each other's blocks."""

    model: ModelIdentity
    tenant: str = ""
    block_tokens: int = 64

    def __post_init__(self) -> None:
        _check_text("tenant", self.tenant, empty=True)
        _check_range("block_tokens", self.block_tokens, 1, MAX_BLOCK_TOKENS)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that start every chain of block keys in this namespace."""
        m = self.model
        fields = ["kvstore/namespace/1", m.name, m.revision, m.dtype, m.adapter, self.tenant]
        fields += [text for pair in sorted(m.extra) for text in pair]
        h = hashlib.sha256()
        for text in fields:
            raw = text.encode("utf-8", "surrogatepass")
            h.update(len(raw).to_bytes(4, "little"))
            h.update(raw)
        h.update(self.block_tokens.to_bytes(4, "little"))
        return h.digest()


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers that share one kind of cache.

    `channels` has one entry per plane: `(128, 128)` for keys and values of 128 channels each,
    `(576,)` for an MLA latent. `heads` counts the heads held by one shard. `first_layer` places
    the group in the model when a pipeline stage holds only some of its layers.
    """

    layers: int
    heads: int
    channels: tuple[int, ...]
    dtype: str
    name: str = "full"
    kind: Kind = "full"
    first_layer: int = 0

    def __post_init__(self) -> None:
        _check_text("group.name", self.name)
        _check_range("group.layers", self.layers, 1, 4096)
        _check_range("group.heads", self.heads, 1, 65536)
        _check_range("group.first_layer", self.first_layer, 0, 65536)
        if not 1 <= len(self.channels) <= 4:
            raise SpecError(f"group.channels has {len(self.channels)} planes; give 1 to 4")
        for width in self.channels:
            _check_range("group.channels", width, 1, 1 << 20)
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise SpecError(f"group.dtype {self.dtype!r} is not known; use one of {known}")

    @property
    def elem_size(self) -> int:
        """Bytes of one number."""
        return DTYPE_BYTES[self.dtype]

    def nbytes(self, tokens: int) -> int:
        """Bytes that `tokens` tokens take in this group, without padding."""
        return self.layers * self.heads * sum(self.channels) * self.elem_size * tokens


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's part of a group: `index` of `count`. What all ranks hold alike is 0 of 1."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        _check_range("shard.count", self.count, 1, 65536)
        _check_range("shard.index", self.index, 0, self.count - 1)


class Described(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="described"):
    """A dense layout given by its axis order, outermost first, e.g. `LPNHC`.

    L layer, P plane (key / value), N token, H head, C channel. vLLM's GPU pages `HNC` with K and V
    side by side are `LHNPC`, its `NHC` ones `LNHPC`; the separate K and V of transformers are
    `LPHNC`, those of SGLang `LPNHC`; an MLA latent has one plane and one head.
    """

    axes: str = AXES

    def __post_init__(self) -> None:
        if sorted(self.axes) != sorted(AXES):
            raise SpecError(
                f"layout.axes {self.axes!r} must name each of L, P, N, H, C once, e.g. 'LPNHC'"
            )


class Opaque(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="opaque"):
    """An engine's private packing, moved in whole pages and only between equals.

    `name` and `params` say what the packing depends on (engine, version, instruction set);
    a page holds `page_tokens` tokens of one layer in `page_bytes` bytes.
    """

    name: str
    page_tokens: int
    page_bytes: int
    params: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_text("layout.name", self.name)
        _check_range("layout.page_tokens", self.page_tokens, 1, MAX_BLOCK_TOKENS)
        _check_range("layout.page_bytes", self.page_bytes, 1, MAX_OBJECT_BYTES)
        _check_pairs("layout.params", self.params)


Layout = Described | Opaque

CODED: Final = "kvstore.codec."
"""Layouts of such names are those of `kvstore.codecs`: they lie in tiers, nobody saves them."""

LOSSY: Final = "kvstore.lossy."
"""Layouts of such names are those of `kvstore.codecs.quantized`, of numbers in few bits."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One group × shard × layout: with a block key it names an object."""

    group: Group
    layout: Layout = Described()
    shard: Shard = Shard()

    def __post_init__(self) -> None:
        widths, layout = self.group.channels, self.layout
        if isinstance(layout, Described) and len(set(widths)) > 1:
            axes = layout.axes
            if axes.index("C") < axes.index("P"):
                raise SpecError(
                    f"planes of {widths} channels cannot lie inside the channel axis ({axes})"
                )

    @cached_property
    def content(self) -> bytes:
        """8 bytes equal for parts that hold the same numbers, whatever their layout."""
        return _digest(("kvstore/content/1", self.group, self.shard), 8)

    @cached_property
    def variant(self) -> bytes:
        """16 bytes that, after the block key, complete an object's name."""
        return self.content + _digest(("kvstore/layout/1", self.layout), 8)

    @cached_property
    def coded(self) -> bool:
        """Whether its bytes are coded ones, and its checksums those of what they stand for."""
        return isinstance(self.layout, Opaque) and self.layout.name.startswith(CODED)

    @cached_property
    def lossy(self) -> bool:
        """Whether its bytes are numbers in few bits."""
        return isinstance(self.layout, Opaque) and self.layout.name.startswith(LOSSY)

    def nbytes(self, block_tokens: int) -> int:
        """Bytes of one object of `block_tokens` tokens.

        Raises:
            SpecError: the block is no multiple of an opaque page, or the object is over 1 GiB.
        """
        if isinstance(self.layout, Opaque):
            page = self.layout.page_tokens
            check_block_tokens(block_tokens, page)
            size = self.group.layers * (block_tokens // page) * self.layout.page_bytes
        else:
            size = self.group.nbytes(block_tokens)
        if size > MAX_OBJECT_BYTES:
            raise SpecError(
                f"an object of {block_tokens} tokens takes {size} bytes; the limit is "
                f"{MAX_OBJECT_BYTES}: use fewer block_tokens"
            )
        return size

    def converts_to(self, other: Part) -> bool:
        """Whether bytes in this layout can be turned into `other`'s."""
        if self.content != other.content:
            return False
        if self.layout == other.layout:
            return True
        return isinstance(self.layout, Described) and isinstance(other.layout, Described)

    def casts_to(self, other: Part) -> bool:
        """Whether it is `other` once its numbers are rounded to `other`'s type, or quantised."""
        if other.lossy:
            return isinstance(self.layout, Described) and self.content == other.content
        own, wanted = self.group.dtype, other.group.dtype
        if own == wanted or not {own, wanted} <= FLOATS or isinstance(self.layout, Opaque):
            return False
        group = msgspec.structs.replace(self.group, dtype=wanted)
        return Part(group, self.layout, self.shard).converts_to(other)


class PlaneStrides(NamedTuple):
    """Where a plane of a layer lies in a described object: byte offset and strides."""

    offset: int
    token: int
    head: int
    channel: int


@lru_cache(maxsize=256)
def plane_strides(part: Part, tokens: int) -> tuple[PlaneStrides, ...]:
    """Those of all planes of all layers, layer by layer, in an object of `tokens` tokens.

    `part` has a described layout. Planes may differ in width, so a stride inside the plane axis
    depends on the plane.
    """
    group, layout = part.group, part.layout
    assert isinstance(layout, Described)
    widths = group.channels
    found = []
    for layer, plane in product(range(group.layers), range(len(widths))):
        size = {"L": group.layers, "N": tokens, "H": group.heads, "C": widths[plane]}
        stride: dict[str, int] = {}
        inner = group.elem_size
        for axis in reversed(layout.axes):
            if axis == "P":
                # Before this point `inner` counts this plane's bytes; from here on, all planes'.
                sizes = widths if "C" in stride else (1,) * len(widths)
                each = inner // sizes[plane]
                plane_offset, inner = each * sum(sizes[:plane]), each * sum(sizes)
                continue
            stride[axis] = inner
            inner *= size[axis]
        offset = stride["L"] * layer + plane_offset
        found.append(PlaneStrides(offset, stride["N"], stride["H"], stride["C"]))
    return tuple(found)


def block_tokens_for(page_tokens: int, *, at_least: int = 64) -> int:
    """The smallest multiple of the engine's page that holds `at_least` tokens."""
    _check_range("page_tokens", page_tokens, 1, MAX_BLOCK_TOKENS)
    return math.ceil(at_least / page_tokens) * page_tokens


def check_block_tokens(block_tokens: int, page_tokens: int) -> None:
    """Refuse a block that is not made of whole pages.

    Raises:
        SpecError: with the nearest size that works.
    """
    _check_range("block_tokens", block_tokens, 1, MAX_BLOCK_TOKENS)
    if page_tokens < 1 or block_tokens % page_tokens:
        better = block_tokens_for(page_tokens, at_least=block_tokens)
        raise SpecError(
            f"block_tokens is {block_tokens}, no multiple of the engine's page size "
            f"{page_tokens}; use {better}"
        )
