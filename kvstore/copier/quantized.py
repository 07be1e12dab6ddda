"""Copies that quantise what goes into slots, and the reverse, by torch on the CPU.

Numbers are brought as they are by another copier, which knows how to reach pages, and turned here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch

from kvstore._native import xxh3_64
from kvstore.blocks.spec import Described, Part
from kvstore.codecs.quantized import LARGEST, SMALLEST, Section, sections_in
from kvstore.copier.base import Copier, Copy
from kvstore.memory.bounce import memory_at

_STAGING: Final = 16 << 20
"""Bytes of plain numbers at a time; at least one block."""
_AXES: Final = "LPHNC"


class QuantisingCopier(Copier):
    """The `Copier` for slots with numbers in few bits; others are left to `plain`. Thread-safe.

    Layers are waited for, and opened, all together.
    """

    casts = True

    def __init__(self, plain: Copier) -> None:
        self._plain = plain

    def check(self, copy: Copy) -> None:
        """See `Copier.check`."""
        if not copy.stored.lossy:
            self._plain.check(copy)
            return
        super().check(copy)
        sections_in(copy.stored, copy.block_tokens)

    def run(self, copy: Copy) -> list[int] | None:
        """See `Copier`."""
        stored, tokens = copy.stored, copy.block_tokens
        if not stored.lossy:
            return self._plain.run(copy)
        part = Part(stored.group, Described(_AXES), stored.shard)
        nbytes, size = part.nbytes(tokens), stored.nbytes(tokens)
        step, sums = max(1, _STAGING // nbytes), []
        room = torch.empty((min(step, len(copy.slots)), nbytes), dtype=torch.uint8)
        for first in range(0, len(copy.slots), step):
            slots = copy.slots[first : first + step].tolist()
            there = [room[i].data_ptr() for i in range(len(slots))]
            on_cpu = replace(copy.some(first, there), stored=part, checksum=False, then=None)
            if copy.to_slots:
                self._plain.copy(on_cpu)
            for slot, raw in zip(slots, room, strict=False):
                data = torch.from_numpy(np.frombuffer(memory_at(slot, size), np.uint8))
                _turn(copy, raw, data)
                if copy.checksum:
                    sums.append(xxh3_64(slot, size))
            if not copy.to_slots:
                self._plain.copy(on_cpu)
        if copy.then is not None:
            copy.then.open(copy.then.layers)
        return sums if copy.checksum else None

    def attach(self, address: int, nbytes: int) -> None:
        """See `Copier.attach`."""
        self._plain.attach(address, nbytes)

    def detach(self, address: int) -> None:
        """See `Copier.detach`."""
        self._plain.detach(address)


def _planes(part: Part, tokens: int, raw: torch.Tensor) -> list[torch.Tensor]:
    """Numbers of each plane, (layers, heads, tokens, channels), of an object in `_AXES`."""
    group = part.group
    numbers = raw.view(getattr(torch, group.dtype)).view(group.layers, -1)
    sizes = [group.heads * tokens * width for width in group.channels]
    return [
        plane.view(group.layers, group.heads, tokens, width)
        for plane, width in zip(numbers.split(sizes, dim=1), group.channels, strict=True)
    ]


def _places(part: Part, tokens: int, data: torch.Tensor) -> list[tuple[Section, torch.Tensor]]:
    """Sections of each plane in an object, (layers, heads, bytes)."""
    layers, heads = part.group.layers, part.group.heads
    rows = data.view(layers, -1)
    return [
        (s, rows[:, s.begins : s.begins + heads * s.nbytes].unflatten(1, (heads, s.nbytes)))
        for s in sections_in(part, tokens)
    ]


def _turn(copy: Copy, raw: torch.Tensor, data: torch.Tensor) -> None:
    """Quantise plain numbers into an object, or the reverse."""
    planes = _planes(copy.stored, copy.block_tokens, raw)
    places = _places(copy.stored, copy.block_tokens, data)
    for (section, place), numbers in zip(places, planes, strict=True):
        if copy.to_slots:
            place.copy_(encode(section, numbers.float()))
        else:
            numbers.copy_(decode(section, place, copy.block_tokens))


def encode(section: Section, numbers: torch.Tensor) -> torch.Tensor:
    """Sections (…, bytes) of what is (…, tokens, channels) in float32, not left as it was."""
    x = numbers.nan_to_num_(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)
    axis = -2 if section.by_token else -1
    x = x.unflatten(axis, (-1, section.group))
    (low, high), sides = section.range, []
    if section.minimum:
        least = x.amin(axis, keepdim=True).half()
        x -= least.float()
        sides.append(least)
        most = x.amax(axis, keepdim=True)
    else:
        most = torch.maximum(x.amax(axis, keepdim=True), -x.amin(axis, keepdim=True))
    scales = (most / high).clamp_(SMALLEST, LARGEST).half()
    x /= scales.float()
    codes = x.round_().clamp_(low, high).to(torch.int8).view(torch.uint8)
    parts = [_by_group(section, side).view(torch.uint8) for side in (scales, *sides)]
    parts.append(_pack(section, _by_group(section, codes)))
    rest = section.nbytes - sum(part.shape[-1] for part in parts)
    return torch.cat([*parts, codes.new_zeros((*parts[0].shape[:-1], rest))], dim=-1)


def decode(section: Section, data: torch.Tensor, tokens: int) -> torch.Tensor:
    """The reverse: (…, tokens, channels) in float32. Whatever the bytes are, they give numbers."""
    groups, group = section.groups, section.group
    end = section.codes + groups * group * section.bits // 8
    codes = _unpack(section, data[..., section.codes : end])
    if not section.minimum:
        codes = codes.view(torch.int8)
    head = data[..., : section.codes].contiguous().view(torch.float16).float()
    x = _in_place(section, codes, tokens, group).float()
    x *= _in_place(section, head[..., :groups], tokens, 1)
    if section.minimum:
        x += _in_place(section, head[..., groups:], tokens, 1)
    x = x.flatten(-3, -2) if section.by_token else x.flatten(-2)
    return x.nan_to_num_(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)


def _by_group(section: Section, x: torch.Tensor) -> torch.Tensor:
    """What is (…, runs, group, channels) or (…, tokens, runs, group), group by group, flat."""
    return (x.movedim(-1, -3) if section.by_token else x).flatten(-3)


def _in_place(section: Section, x: torch.Tensor, tokens: int, each: int) -> torch.Tensor:
    """The reverse, with so many of each group."""
    if section.by_token:
        return x.unflatten(-1, (-1, tokens // section.group, each)).movedim(-3, -1)
    return x.unflatten(-1, (tokens, -1, each))


def _pack(section: Section, codes: torch.Tensor) -> torch.Tensor:
    """Bytes of codes, which are in a byte each."""
    many, nbytes = section.together
    if many == 1:
        return codes
    codes, bits = codes.unflatten(-1, (-1, many)), section.bits
    packed = codes.new_zeros((*codes.shape[:-1], nbytes))
    for i, k in _overlaps(section):
        apart = k * bits - 8 * i
        one = codes[..., k]
        packed[..., i] |= one << apart if apart >= 0 else one >> -apart
    return packed.flatten(-2)


def _unpack(section: Section, packed: torch.Tensor) -> torch.Tensor:
    many, nbytes = section.together
    if many == 1:
        return packed.contiguous()
    packed, bits = packed.unflatten(-1, (-1, nbytes)), section.bits
    codes = packed.new_zeros((*packed.shape[:-1], many))
    for i, k in _overlaps(section):
        apart = k * bits - 8 * i
        one = packed[..., i]
        codes[..., k] |= one >> apart if apart >= 0 else one << -apart
    return (codes & ((1 << bits) - 1)).flatten(-2)


def _overlaps(section: Section) -> list[tuple[int, int]]:
    """Which bytes, of those packed together, have bits of which codes."""
    (many, nbytes), bits = section.together, section.bits
    return [
        (i, k)
        for i in range(nbytes)
        for k in range(many)
        if k * bits < 8 * (i + 1) and 8 * i < (k + 1) * bits
    ]
