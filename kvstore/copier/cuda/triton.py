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
from kvstore.copier.segments import Segments
from kvstore.errors import SpecError, StoreUnavailable

try:
    import torch
    import triton
    import triton.language as tl
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


@triton.jit  # type: ignore[untyped-decorator]
def _widen(x: tl.tensor, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    """The float32 (as int32) equal to number `x` (bits in an int32)."""
    if MANTISSA == 23:
        return x
    else:
        rest = x & ((1 << (EXPONENT + MANTISSA)) - 1)
        sign = (x >> (EXPONENT + MANTISSA)) << 31
        wide = rest << (23 - MANTISSA)
        if EXPONENT < 8:
            bias: tl.constexpr = 128 - (1 << (EXPONENT - 1))
            tiny = rest.to(tl.float32) * (2.0 ** (bias - 126 - MANTISSA))
            value = wide + (bias << 23)
            value = tl.where(rest < (1 << MANTISSA), tiny.to(tl.int32, bitcast=True), value)
            if EXPONENT == 4:
                wide = tl.where(rest == 0x7F, 0x7FC00000, value)
            else:
                wide = tl.where(rest >= (31 << MANTISSA), wide | 0x7F800000, value)
        return wide | sign


@triton.jit  # type: ignore[untyped-decorator]
def _narrow(x: tl.tensor, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    """Float32 `x` (as int32) rounded to the nearest number, ties to even; bits in an int32."""
    if MANTISSA == 23:
        return x
    else:
        drop: tl.constexpr = 23 - MANTISSA
        bias: tl.constexpr = 128 - (1 << (EXPONENT - 1))
        size = x & 0x7FFFFFFF
        code = size - (bias << 23)
        code = (code + ((1 << (drop - 1)) - 1) + ((code >> drop) & 1)) >> drop
        if EXPONENT < 8:
            # Below the smallest normal number: shift further; by 25 bits nothing is left.
            shift = tl.minimum(tl.maximum(bias + 1 + drop - (size >> 23), 1), 25)
            tiny = (size & 0x7FFFFF) | 0x800000
            tiny = (tiny + ((1 << (shift - 1)) - 1) + ((tiny >> shift) & 1)) >> shift
            code = tl.where(size < ((bias + 1) << 23), tiny, code)
        if EXPONENT == 4:  # has no infinity
            code = tl.where(size > 0x7F800000, 0x7F, tl.minimum(code, 0x7E))
        else:
            infinity: tl.constexpr = ((1 << EXPONENT) - 1) << MANTISSA
            nan: tl.constexpr = infinity | (3 if MANTISSA == 2 else 1 << (MANTISSA - 1))
            code = tl.where(size > 0x7F800000, nan, tl.minimum(code, infinity))
        return code | ((x >> 31) << (EXPONENT + MANTISSA))


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
            numbers = _widen(words.to(tl.int32), FROM_EXPONENT, FROM_MANTISSA)
            numbers = _narrow(numbers, TO_EXPONENT, TO_MANTISSA)
            if TO_SLOTS:
                words = numbers.to(SLOT_WORD)
            else:
                words = numbers.to(PAGE_WORD)
        if TO_SLOTS:
            tl.store(slot_at, words, mask)
        else:
            tl.store(page_at, words, mask)


class _Plan(NamedTuple):
    """A table on the device, and what else a launch needs."""

    table: Any
    tiles: tuple[int, int, int]
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
        self._plans: WeakKeyDictionary[Segments, dict[tuple[bool, Cast | None, int], _Plan]]
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
        each = len(segments.rows) // segments.layers
        first_row, rows = copy.first * each, (copy.last - copy.first) * each
        if not blocks or not pages or not rows:
            return
        if copy.to_slots and int(page_ids.min()) < 0:
            raise SpecError("only loads can leave pages out; saves need every page id")
        cast = None if copy.cast is None or copy.cast[0] == copy.cast[1] else copy.cast
        slot_align = math.gcd(16, int(np.bitwise_or.reduce(slots)))
        with self._lock, _device_errors():
            plan = self._plan(segments, copy.to_slots, cast, slot_align)
            # A launch has at most 2**31 - 1 programs, and its words fit in the ring.
            programs = rows * pages * math.prod(plan.tiles)
            step = min(self._ring.words // (1 + pages), (2**31 - 1) // programs)
            if not step:
                raise SpecError(f"a block of {pages} pages is too large for one launch")
            for start in range(0, blocks, step):
                some = slice(start, start + step)
                self._launch(plan, first_row, rows, page_ids[some], slots[some], stream)

    def close(self) -> None:
        """Wait for all copies. Before this the object must not be dropped."""
        with self._lock, _device_errors():
            self._ring.drain()

    def _plan(
        self, segments: Segments, to_slots: bool, cast: Cast | None, slot_align: int
    ) -> _Plan:
        plans, key = self._plans.setdefault(segments, {}), (to_slots, cast, slot_align)
        if key not in plans:
            tiling = tile(segments, cast, slot_align)
            table = torch.from_numpy(tiling.table)
            if self._device is not None:
                with torch.cuda.stream(self._uploads):
                    table = table.to(self._on_device.device)
                self._uploads.synchronize()
            plans[key] = _Plan(table, tiling.tiles, constants_of(tiling, to_slots, cast))
        return plans[key]

    def _launch(
        self,
        plan: _Plan,
        first_row: int,
        rows: int,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint64],
        stream: int,
    ) -> None:
        blocks, pages = page_ids.shape
        words = blocks * (1 + pages)
        at = self._ring.take(words)
        self._words[at : at + blocks] = slots.view(np.int64)
        self._words[at + blocks : at + words] = page_ids.reshape(-1)
        grid = (blocks * rows * pages * math.prod(plan.tiles),)
        numbers = (at, blocks, pages, first_row, rows, *plan.tiles)
        if self._device is None:
            copy_rows[grid](plan.table, self._on_device, *numbers, **plan.constants)
            return
        external = torch.cuda.ExternalStream(stream, self._device)
        with torch.cuda.stream(external):
            try:
                piece = slice(at, at + words)
                self._on_device[piece].copy_(self._pinned[piece], non_blocking=True)
                copy_rows[grid](
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
