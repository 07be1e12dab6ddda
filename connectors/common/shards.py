"""KV heads in shards, so that engines of different tensor-parallel sizes find each other's blocks.

What is stored of a block is a part for each shard. By default a shard is what one rank holds; with
more of them, a rank has several, as views of its pages.
"""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from kvstore.blocks.spec import Opaque, Part, Shard
from kvstore.copier.base import PagedMemory
from kvstore.errors import SpecError


def shards_of(part: Part, count: int) -> tuple[Part, ...]:
    """What is stored of the `part` that a rank holds, if all heads are `count` shards (0: as held).

    An MLA latent has no heads of its own: all ranks hold it alike, and it is stored once.

    Raises:
        SpecError: it cannot be cut so, and how it can.
    """
    group, held = part.group, part.shard.count
    if count in (0, held) or group.kind == "mla":
        return (part,)
    if isinstance(part.layout, Opaque):
        raise SpecError(
            f"session.head_shards is {count}, but this engine's pages are packed in a way of their "
            "own that cannot be cut by heads; set it to 0"
        )
    each, rest = divmod(count, held)
    if rest or group.heads % each:
        possible = [str(held * n) for n in range(1, group.heads + 1) if group.heads % n == 0]
        raise SpecError(
            f"session.head_shards is {count}; the {held * group.heads} KV heads of this model, "
            f"{group.heads} to a rank, can be stored in {' or '.join(possible)} shards (0: one for "
            "each rank that holds others)"
        )
    cut, first = structs.replace(group, heads=group.heads // each), part.shard.index * each
    return tuple(Part(cut, part.layout, Shard(first + i, count)) for i in range(each))


def views(memory: PagedMemory, count: int) -> list[PagedMemory]:
    """The same pages for each of `shards_of(memory.part, count)`.

    Raises:
        SpecError: as `shards_of`.
    """
    parts = shards_of(memory.part, count)
    return [
        replace(
            memory,
            part=part,
            planes=tuple(
                replace(plane, address=plane.address + i * part.group.heads * plane.head)
                for plane in memory.planes
            ),
        )
        for i, part in enumerate(parts)
    ]
