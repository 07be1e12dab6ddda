"""How KV bytes move between an engine's pages and arena slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvstore.blocks.spec import Opaque, Part
from kvstore.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvstore.copier.gate import LayerGate


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
    `owner` keeps the memory alive for as long as this description. `device` is the number of the
    CUDA device that holds it, None for memory of the CPU.

    Raises:
        SpecError: planes missing or in excess, no pages, or pages that are not the layout's.
    """

    part: Part
    page_tokens: int
    pages: int
    planes: tuple[PlaneMemory, ...]
    owner: Any = field(default=None, repr=False)
    device: int | None = None

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
    """Moves whole blocks; safe to call from several threads at once.

    Calls return when the bytes are where they belong. With gates they go layer by layer: `after`
    says from when on the pages of each layer may be touched, and `then` is opened for each layer
    whose pages are filled. A gate that fails, or does not open by `deadline` (monotonic seconds),
    ends the call.
    """

    def save(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
        after: LayerGate | None = None,
        deadline: float = math.inf,
    ) -> list[int] | None:
        """Copy blocks from pages into slots.

        `page_ids` has shape (blocks, pages per block); `slots` holds the addresses of the objects.
        `stored` tells the layout of the slots where it is not `memory.part`'s. Copiers with kernels
        round numbers to its type, and back again when they load.
        Returns the XXH3 of each object when `checksum`.

        Raises:
            SpecError: a page id out of range, or shapes that do not fit the block.
            StoreUnavailable: the gate did not open, or the device failed.
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
        after: LayerGate | None = None,
        then: LayerGate | None = None,
        deadline: float = math.inf,
    ) -> list[int] | None:
        """Copy blocks from slots into pages; a page id of -1 leaves that page out.

        `stored` tells the layout of the slots where it is not `memory.part`'s. `then` is not for
        calls with `checksum`: only their caller knows what is right.
        """

    def attach(self, address: int, nbytes: int) -> None:
        """Make memory that will hold slots ready for copies, such as by pinning it."""

    def detach(self, address: int) -> None:
        """End what `attach` began, before the memory is unmapped. No copy of it may be running."""
