"""How KV bytes move between an engine's pages and arena slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvstore.errors import SpecError
from kvstore.spec import Opaque, Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PlaneMemory:
    """Where one (layer, plane) lies in an engine's memory.

    Page `i`, token `t` of the page, head `h`, channel `c` is at
    ``address + i*page + t*token + h*head + c*channel`` (strides in bytes).
    For opaque layouts a page is one run of bytes and only `address` and `page` count.
    """

    address: int
    page: int
    token: int = 0
    head: int = 0
    channel: int = 0


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PagedMemory:
    """An engine's paged memory for one part: `pages` pages of `page_tokens` tokens.

    `planes` has one entry per (layer, plane), layer by layer; for an opaque layout one per layer.
    `owner` keeps the memory alive for as long as this description.

    Raises:
        SpecError: planes missing or in excess, no pages, or pages that are not the layout's.
    """

    part: Part
    page_tokens: int
    pages: int
    planes: tuple[PlaneMemory, ...]
    owner: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        group, layout = self.part.group, self.part.layout
        wanted = group.layers * (1 if isinstance(layout, Opaque) else len(group.channels))
        if len(self.planes) != wanted:
            raise SpecError(
                f"paged memory of {group.name!r} has {len(self.planes)} planes; "
                f"{group.layers} layers need {wanted}"
            )
        if isinstance(layout, Opaque) and self.page_tokens != layout.page_tokens:
            raise SpecError(
                f"paged memory of {group.name!r} has pages of {self.page_tokens} tokens, its "
                f"layout {layout.name!r} pages of {layout.page_tokens}"
            )
        if self.page_tokens < 1 or self.pages < 1:
            raise SpecError(
                f"paged memory of {group.name!r} has {self.pages} pages of {self.page_tokens} "
                "tokens; give at least one of each"
            )


class Copier(Protocol):
    """Moves whole blocks; safe to call from several threads at once."""

    def save(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        checksum: bool = False,
    ) -> list[int] | None:
        """Copy blocks from pages into slots, in the layout of `memory.part`.

        `page_ids` has shape (blocks, pages per block); `slots` holds the addresses of the objects.
        Returns the XXH3 of each object when `checksum`.

        Raises:
            SpecError: a page id out of range, or shapes that do not fit the block.
        """

    def load(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
    ) -> list[int] | None:
        """Copy blocks from slots into pages; a page id of -1 leaves that page out.

        `stored` tells the layout of the slots where it is not `memory.part`'s.
        """
