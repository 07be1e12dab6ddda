"""Copies by Triton kernels: many short runs, axes in another order, numbers of another type.

Batched DMA moves long runs at the speed of the link, but pays for each run; a kernel reads pages
and writes slots (or the other way round) with all threads of the device. Slots must be addresses
that the device can use: its own memory, or memory of the host that is pinned and mapped.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kvstore.copier.cuda.tiles import NUMBERS, PAGES, SLOTS, Cast, KernelCopy, Tiling, tile
from kvstore.copier.segments import Quantised, Segments
from kvstore.errors import SpecError, StoreUnavailable

try:
    import torch
    import triton
    import triton.language as tl

    from kvstore.copier.cuda.numbers import group_constants, narrow, turn_groups, widen
except ImportError as error:
    raise StoreUnavailable(
        f"copies by kernels need torch and triton ({error}): install both"
    ) from error


_WARPS: Final = 4
_RING_WORDS: Final = 1 << 17
_WORDS: Final[dict[int, Any]] = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

# The interpreter keeps its state in globals of its module.
_interpreter: Final = threading.Lock()


@triton.jit  # type: ignore[untyped-decorator]
def _pointers(
    base: tl.tensor, b: tl.tensor, c: tl.tensor, b_stride: tl.tensor, c_stride: tl.tensor,
    WORD: tl.constexpr, LINE: tl.constexpr, ALIGN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(B, C) pointers; known to the compiler as neighbours along LINE, so that it can join them."""
    if LINE == "c":
        lines = (base + b * b_stride).to(tl.pointer_type(WORD))
        return tl.multiple_of(lines, ALIGN)[:, None] + c[None, :]
    elif LINE == "b":
        lines = (base + c * c_stride).to(tl.pointer_type(WORD))
        return tl.multiple_of(lines, ALIGN)[None, :] + b[:, None]
    else:
        offsets = (b * b_stride)[:, None] + (c * c_stride)[None, :]
        return (base + offsets).to(tl.pointer_type(WORD))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["at", "blocks", "pages", "first_row", "rows", "outer", "b_tiles", "c_tiles"]
)
def copy_rows(
    table: tl.tensor, ring: tl.tensor, at: tl.tensor, blocks: tl.tensor, pages: tl.tensor,
    first_row: tl.tensor, rows: tl.tensor, outer: tl.tensor, b_tiles: tl.tensor, c_tiles: tl.tensor,
    TO_SLOTS: tl.constexpr, FIELDS: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B_MULTIPLE: tl.constexpr, C_MULTIPLE: tl.constexpr,
    PAGE_WORD: tl.constexpr, PAGE_LINE: tl.constexpr, PAGE_ALIGN: tl.constexpr,
    SLOT_WORD: tl.constexpr, SLOT_LINE: tl.constexpr, SLOT_ALIGN: tl.constexpr,
    CAST: tl.constexpr, FROM_EXPONENT: tl.constexpr, FROM_MANTISSA: tl.constexpr,
    TO_EXPONENT: tl.constexpr, TO_MANTISSA: tl.constexpr,
) -> None:  # fmt: skip
    """One program: B × C words at one place of the outer loop, of one page, row and block.

    `ring` holds, from `at` on, the slots of the blocks and then their page ids, block by block.
    """
    place = tl.program_id(0)
    c_tile = place % c_tiles
    place = place // c_tiles
    b_tile = place % b_tiles
    place = place // b_tiles
    a = place % outer
    place = place // outer
    page = place % pages
    place = place // pages
    row = place % rows
    block = place // rows

    page_id = tl.load(ring + at + blocks + block * pages + page)
    fields = table + (first_row + row) * FIELDS
    a_count = tl.load(fields + 10)
    if (page_id >= 0) & (a < a_count):
        b_count = tl.multiple_of(tl.load(fields + 11), B_MULTIPLE)
        c_count = tl.multiple_of(tl.load(fields + 12), C_MULTIPLE)
        # Bytes, in 64 bits: pools of pages are larger than 2 GiB.
        b = (b_tile * B + tl.arange(0, B)).to(tl.int64)
        c = (c_tile * C + tl.arange(0, C)).to(tl.int64)
        mask = (b < b_count)[:, None] & (c < c_count)[None, :]
        in_pages = tl.load(fields) + page_id * tl.load(fields + 1) + a * tl.load(fields + 2)
        in_slot = tl.load(ring + at + block) + tl.load(fields + 5)
        in_slot += page * tl.load(fields + 6) + a * tl.load(fields + 7)
        page_at = _pointers(
            in_pages, b, c, tl.load(fields + 3), tl.load(fields + 4),
            PAGE_WORD, PAGE_LINE, PAGE_ALIGN,
        )  # fmt: skip
        slot_at = _pointers(
            in_slot, b, c, tl.load(fields + 8), tl.load(fields + 9),
            SLOT_WORD, SLOT_LINE, SLOT_ALIGN,
        )  # fmt: skip
        if TO_SLOTS:
            words = tl.load(page_at, mask)
        else:
            words = tl.load(slot_at, mask)
        if CAST:
            numbers = widen(words.to(tl.int32), FROM_EXPONENT, FROM_MANTISSA)
            numbers = narrow(numbers, TO_EXPONENT, TO_MANTISSA)
            if TO_SLOTS:
                words = numbers.to(SLOT_WORD)
            else:
                words = numbers.to(PAGE_WORD)
        if TO_SLOTS:
            tl.store(slot_at, words, mask)
        else:
            tl.store(page_at, words, mask)


class _Plan(NamedTuple):
    """A kernel, its table on the device, and what else a launch needs.

    `numbers` of (pages, first layer, last layer) are further arguments; of a block, so many
    programs as `programs` says of the same.
    """

    kernel: Any
    table: Any
    programs: Callable[[int, int, int], int]
    numbers: Callable[[int, int, int], tuple[int, ...]]
    constants: dict[str, Any]


def constants_of(tiling: Tiling, to_slots: bool, cast: Cast | None) -> dict[str, Any]:
    """What `copy_rows` is compiled for."""
    numbers = [NUMBERS[name] for name in cast] if cast else [(0, 0), (0, 0)]
    source, target = numbers if to_slots else reversed(numbers)
    return {
        "TO_SLOTS": to_slots,
        "FIELDS": tiling.table.shape[1],
        "B": tiling.b,
        "C": tiling.c,
        "B_MULTIPLE": tiling.multiple[0],
        "C_MULTIPLE": tiling.multiple[1],
        "PAGE_WORD": _WORDS[tiling.word[PAGES]],
        "PAGE_LINE": tiling.line[PAGES],
        "PAGE_ALIGN": tiling.align[PAGES],
        "SLOT_WORD": _WORDS[tiling.word[SLOTS]],
        "SLOT_LINE": tiling.line[SLOTS],
        "SLOT_ALIGN": tiling.align[SLOTS],
        "CAST": cast is not None,
        "FROM_EXPONENT": source[0],
        "FROM_MANTISSA": source[1],
        "TO_EXPONENT": target[0],
        "TO_MANTISSA": target[1],
    }


def _row_plan(segments: Segments, tiling: Tiling, table: Any, constants: dict[str, Any]) -> _Plan:
    each = len(segments.rows) // segments.layers

    def programs(pages: int, first: int, last: int) -> int:
        return (last - first) * each * pages * math.prod(tiling.tiles)

    def numbers(pages: int, first: int, last: int) -> tuple[int, ...]:
        return first * each, (last - first) * each, *tiling.tiles

    return _Plan(copy_rows, table, programs, numbers, constants)


def _group_plan(segments: Quantised, plane: int, table: Any, to_slots: bool, source: str) -> _Plan:
    """Of one plane."""
    constants = group_constants(segments, plane)
    planes, heads = len(segments.sections), int(segments.rows[plane, 9])
    tiles = -(-segments.sections[plane].groups // int(constants["G"]))
    exponent, mantissa = NUMBERS[source]
    constants |= {
        "TO_SLOTS": to_slots,
        "WORD": _WORDS[segments.elem_size],
        "EXPONENT": exponent,
        "MANTISSA": mantissa,
    }

    def programs(pages: int, first: int, last: int) -> int:
        return (last - first) * heads * tiles

    def numbers(pages: int, first: int, last: int) -> tuple[int, ...]:
        return first * planes + plane, last - first, planes, heads, tiles

    return _Plan(turn_groups, table, programs, numbers, constants)


class Ring:
    """What may be written of a buffer of `words` words that the device reads. Not thread-safe.

    `new_event` makes what marks a point in the work of the device: a `torch.cuda.Event`, say.
    """

    def __init__(self, words: int, new_event: Callable[[], Any]) -> None:
        self.words = words
        self._new_event = new_event
        self._next = 0
        self._busy: deque[tuple[int, int, Any]] = deque()

    def take(self, words: int) -> int:
        """Where `words`, at most all, may be written; waits until the device has read them."""
        while self._busy and self._busy[0][2].query():
            self._end_first()
        at = self._next if self._next + words <= self.words else 0
        while any(start < at + words and at < end for start, end, _ in self._busy):
            self._end_first()
        self._next = at + words
        return at

    def hold(self, at: int, words: int, stream: Any) -> None:
        """Keep `words` at `at` until what was enqueued on `stream` so far has ended."""
        event = self._new_event()
        event.record(stream)
        self._busy.append((at, at + words, event))

    def drain(self) -> None:
        """Wait until the device reads nothing any more."""
        while self._busy:
            self._end_first()

    def _end_first(self) -> None:
        self._busy[0][2].synchronize()
        self._busy.popleft()


class TritonKernels:
    """Enqueues copies between pages and slots on streams of one device. Thread-safe.

    `device` is the number of a CUDA device; None runs the kernels on the CPU in Triton's
    interpreter, to check them, and needs `TRITON_INTERPRET=1` before this module is imported.
    On the device stay a table for each kind of copy, as long as its `Segments`, and `ring_words`
    words of 8 bytes for page ids and slots, with as many in pinned memory. The first copy of a new
    kind compiles its kernel, which takes about a second.

    Raises:
        StoreUnavailable: no such device, or no interpreter.
    """

    def __init__(self, device: int | None, *, ring_words: int = _RING_WORDS) -> None:
        if (device is None) == isinstance(copy_rows, triton.runtime.JITFunction):
            raise StoreUnavailable(
                "kernels run on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1 before "
                "kvstore.copier.cuda.triton is imported"
                if device is None
                else "interpreted kernels cannot reach a device: unset TRITON_INTERPRET"
            )
        self._device = device
        self._lock = threading.Lock() if device is not None else _interpreter
        self._plans: WeakKeyDictionary[Segments, dict[tuple[bool, Cast | None, int], list[_Plan]]]
        self._plans = WeakKeyDictionary()
        with _device_errors():
            self._ring = Ring(ring_words, torch.cuda.Event)
            self._pinned = torch.empty(ring_words, dtype=torch.int64, pin_memory=device is not None)
            self._words: NDArray[np.int64] = self._pinned.numpy()
            self._on_device = self._pinned
            if device is not None:
                self._on_device = torch.empty_like(self._pinned, device=f"cuda:{device}")
                self._uploads = torch.cuda.Stream(device)

    def copy(self, copy: KernelCopy, stream: int) -> None:
        """See `Kernels`."""
        segments, page_ids, slots = copy.segments, copy.page_ids, copy.slots
        if page_ids.ndim != 2 or slots.shape != page_ids.shape[:1]:
            raise SpecError(f"page_ids of {page_ids.shape} do not fit slots of {slots.shape}")
        if not 0 <= copy.first <= copy.last <= segments.layers:
            raise SpecError(f"no layers {copy.first} to {copy.last} among {segments.layers}")
        blocks, pages = page_ids.shape
        if not blocks or not pages or copy.first == copy.last:
            return
        if copy.to_slots and int(page_ids.min()) < 0:
            raise SpecError("only loads can leave pages out; saves need every page id")
        cast = None if copy.cast is None or copy.cast[0] == copy.cast[1] else copy.cast
        slot_align = math.gcd(16, int(np.bitwise_or.reduce(slots)))
        with self._lock, _device_errors():
            shape = pages, copy.first, copy.last
            for plan in self._plans_of(segments, copy.to_slots, cast, slot_align):
                # A launch has at most 2**31 - 1 programs, and its words fit in the ring.
                step = min(self._ring.words // (1 + pages), (2**31 - 1) // plan.programs(*shape))
                if not step:
                    raise SpecError(f"a block of {pages} pages is too large for one launch")
                for start in range(0, blocks, step):
                    some = slice(start, start + step)
                    self._launch(plan, shape, page_ids[some], slots[some], stream)

    def close(self) -> None:
        """Wait for all copies. Before this the object must not be dropped."""
        with self._lock, _device_errors():
            self._ring.drain()

    def _plans_of(
        self, segments: Segments, to_slots: bool, cast: Cast | None, slot_align: int
    ) -> list[_Plan]:
        plans, key = self._plans.setdefault(segments, {}), (to_slots, cast, slot_align)
        if key not in plans:
            if isinstance(segments, Quantised):
                assert cast is not None
                table = self._table(segments.rows)
                planes = range(len(segments.sections))
                plans[key] = [_group_plan(segments, n, table, to_slots, cast[0]) for n in planes]
            else:
                tiling = tile(segments, cast, slot_align)
                constants = constants_of(tiling, to_slots, cast)
                plans[key] = [_row_plan(segments, tiling, self._table(tiling.table), constants)]
        return plans[key]

    def _table(self, rows: NDArray[np.int64]) -> Any:
        table = torch.from_numpy(rows)
        if self._device is not None:
            with torch.cuda.stream(self._uploads):
                table = table.to(self._on_device.device)
            self._uploads.synchronize()
        return table

    def _launch(
        self,
        plan: _Plan,
        shape: tuple[int, int, int],
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint64],
        stream: int,
    ) -> None:
        blocks, pages = page_ids.shape
        words = blocks * (1 + pages)
        at = self._ring.take(words)
        self._words[at : at + blocks] = slots.view(np.int64)
        self._words[at + blocks : at + words] = page_ids.reshape(-1)
        grid = (blocks * plan.programs(*shape),)
        numbers = (at, blocks, pages, *plan.numbers(*shape))
        if self._device is None:
            plan.kernel[grid](plan.table, self._on_device, *numbers, **plan.constants)
            return
        external = torch.cuda.ExternalStream(stream, self._device)
        with torch.cuda.stream(external):
            try:
                piece = slice(at, at + words)
                self._on_device[piece].copy_(self._pinned[piece], non_blocking=True)
                plan.kernel[grid](
                    plan.table, self._on_device, *numbers, **plan.constants, num_warps=_WARPS
                )
            finally:
                self._ring.hold(at, words, external)


@contextmanager
def _device_errors() -> Iterator[None]:
    """Errors of the device as ours."""
    try:
        yield
    except RuntimeError as error:
        raise StoreUnavailable(f"the device failed to copy by kernels: {error}") from error
