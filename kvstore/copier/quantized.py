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


def encode(
    section: Section, numbers: torch.Tensor, salience: torch.Tensor | None = None
) -> torch.Tensor:
    """Sections (…, bytes) of what is (…, tokens, channels) in float32.

    `salience` (…, tokens), how much tokens matter, is for schemes that ask for it: none so far.
    """
    x = numbers.nan_to_num(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)
    x = x.transpose(-1, -2) if section.by_token else x
    x = x.reshape(*x.shape[:-2], section.groups, section.group)
    (low, high), minima = section.range, []
    if section.minimum:
        minima = [x.amin(-1).half()]
        x = x - minima[0].float()[..., None]
    most = x.amax(-1) if section.minimum else x.abs().amax(-1)
    scales = (most / high).clamp_(SMALLEST, LARGEST).half()
    codes = (x / scales.float()[..., None]).round_().clamp_(low, high).to(torch.int64)
    many, nbytes = section.together
    codes = (codes & ((1 << section.bits) - 1)).reshape(*codes.shape[:-2], -1, many)
    words = sum(codes[..., i] << (section.bits * i) for i in range(many))
    assert isinstance(words, torch.Tensor)
    packed = torch.stack([words >> (8 * i) & 255 for i in range(nbytes)], dim=-1)
    parts = [piece.view(torch.uint8) for piece in (scales, *minima)]
    parts.append(packed.to(torch.uint8).flatten(-2))
    rest = section.nbytes - sum(part.shape[-1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros((*parts[0].shape[:-1], rest))], dim=-1)


def decode(section: Section, data: torch.Tensor, tokens: int) -> torch.Tensor:
    """The reverse: (…, tokens, channels) in float32. Whatever the bytes are, they give numbers."""
    lead, groups, group = data.shape[:-1], section.groups, section.group
    many, nbytes = section.together
    end = section.codes + groups * group * section.bits // 8
    packed = data[..., section.codes : end].to(torch.int64).reshape(*lead, -1, nbytes)
    words = sum(packed[..., i] << (8 * i) for i in range(nbytes))
    assert isinstance(words, torch.Tensor)
    mask = (1 << section.bits) - 1
    codes = torch.stack([words >> (section.bits * i) & mask for i in range(many)], dim=-1)
    if not section.minimum:
        sign = 1 << (section.bits - 1)
        codes = (codes ^ sign) - sign
    head = data[..., : section.codes].contiguous().view(torch.float16).float()
    x = codes.reshape(*lead, groups, group).float() * head[..., :groups, None]
    if section.minimum:
        x += head[..., groups:, None]
    x = x.nan_to_num_(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)
    width = groups * group // tokens
    if section.by_token:
        return x.reshape(*lead, width, tokens).transpose(-1, -2)
    return x.reshape(*lead, tokens, width)
