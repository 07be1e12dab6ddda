"""The KV caches of real models, as their engines lay them out in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Part
from kvstore.copier.base import Copy, PagedMemory, PlaneMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's cache in an engine's memory.

    `order` tells how the memory lies, outermost first: the axes of `Described` with `B` for the
    page, e.g. `LPBNHC` for pages of (token, head, channel) in one tensor per layer and plane.
    With `keys_transposed`, channels and tokens of the keys are the other way round.
    """

    name: str
    group: Group
    order: str
    page_tokens: int
    block_tokens: int = 64
    keys_transposed: bool = False

    @property
    def layout(self) -> str:
        """The axes of a block."""
        return "LPHNC" if self.keys_transposed else self.order.replace("B", "")

    @property
    def part(self) -> Part:
        """What is stored of a block."""
        return Part(self.group, Described(self.layout))

    @property
    def namespace(self) -> Namespace:
        """A namespace of this model."""
        return Namespace(ModelIdentity(self.name), "", self.block_tokens)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.group.nbytes(self.block_tokens)

    @property
    def pages_per_block(self) -> int:
        """Pages of the engine that a block takes."""
        return self.block_tokens // self.page_tokens

    @property
    def run_bytes(self) -> int:
        """Bytes that lie side by side in a page as well as in a block."""
        sizes, run = self.sizes(1), self.group.elem_size
        for axis in reversed(self.order):
            if axis == "B":
                break
            run *= sizes[axis]
            if axis == "N" and self.pages_per_block > 1:
                break  # the next token of the block is on another page
        return run

    def copy(
        self, to_slots: bool, memory: PagedMemory, ids: NDArray[np.int64], slots: Sequence[int]
    ) -> Copy:
        """A copy of blocks between pages of that memory and slots, objects lying as pages do."""
        at = np.array(slots, dtype=np.uint64)
        return Copy(to_slots, memory, ids, at, self.block_tokens, memory.part)

    def sizes(self, pages: int) -> dict[str, int]:
        """How long each axis of `order` is in a memory of `pages` pages."""
        return {
            "L": self.group.layers,
            "P": len(self.group.channels),
            "B": pages,
            "N": self.page_tokens,
            "H": self.group.heads,
            "C": self.group.channels[0],  # the planes of these models are equally wide
        }

    def memory(
        self, address: int, blocks: int, *, owner: Any = None, device: int | None = None
    ) -> PagedMemory:
        """Pages for `blocks` blocks at `address`; without `owner` the caller keeps them alive."""
        pages = blocks * self.pages_per_block
        sizes = self.sizes(pages)
        stride: dict[str, int] = {}
        inner = self.group.elem_size
        for axis in reversed(self.order):
            stride[axis] = inner
            inner *= sizes[axis]
        planes = []
        for layer, plane in product(range(sizes["L"]), range(sizes["P"])):
            start = address + layer * stride["L"] + plane * stride["P"]
            token, channel = stride["N"], stride["C"]
            if self.keys_transposed and not plane:
                token, channel = channel, channel * self.page_tokens
            planes.append(PlaneMemory(start, stride["B"], token, stride["H"], channel))
        return PagedMemory(self.part, self.page_tokens, pages, tuple(planes), owner, device)

    def page_ids(self, blocks: int) -> NDArray[np.int64]:
        """Pages of each block in no order, as in an engine that has run for a while."""
        pages = np.random.default_rng(blocks).permutation(blocks * self.pages_per_block)
        return pages.reshape(blocks, self.pages_per_block).astype(np.int64)


_LLAMA: Final = Group(layers=32, heads=8, channels=(128, 128), dtype="bfloat16")
_LLAMA_70B_RANK: Final = Group(layers=80, heads=1, channels=(128, 128), dtype="bfloat16")
_SMOLLM2: Final = {
    dtype: Group(layers=30, heads=3, channels=(64, 64), dtype=dtype)
    for dtype in ("float32", "bfloat16")
}
_MLA: Final = Group(layers=61, heads=1, channels=(576,), dtype="bfloat16", kind="mla")

LLAMA_NHD: Final = Shape("llama-3.1-8b", _LLAMA, "LPBNHC", 16)
"""K and V apart, pages of 16 tokens: runs of 32 KiB, blocks of 8 MiB."""

LLAMA_HND: Final = Shape("llama-3.1-8b", _LLAMA, "LPBHNC", 16)
"""The same with the head outside the token."""

LLAMA_VLLM: Final = Shape("llama-3.1-8b", _LLAMA, "LBHNPC", 16)
"""vLLM's pages on a GPU, K and V side by side."""

LLAMA_VLLM_NHD: Final = Shape("llama-3.1-8b", _LLAMA, "LBNHPC", 16)
"""The same with the token outside the head: runs of 64 KiB instead of 8 KiB."""

LLAMA_70B_VLLM: Final = Shape("llama-3.1-70b, TP 8", _LLAMA_70B_RANK, "LBNHPC", 16)
"""One rank of eight, with one head: runs of 8 KiB, blocks of 2.5 MiB."""

SMOLLM2_F32: Final = Shape("smollm2-135m", _SMOLLM2["float32"], "LPHBNC", 64)
"""One sequence in transformers: a (head, token, channel) tensor per layer and plane."""

SMOLLM2_VLLM_CPU: Final = Shape(
    "smollm2-135m, vLLM on a CPU", _SMOLLM2["float32"], "LBHPNC", 64, keys_transposed=True
)
"""vLLM's pages on CPUs without AMX: per head, keys as [channel, token], then values."""

SMOLLM2_BF16: Final = Shape("smollm2-135m", _SMOLLM2["bfloat16"], "LPHBNC", 64)

INDEX_ONLY: Final = Shape("index only", Group(1, 1, (1,), "uint8"), "LPBNHC", 64)
"""Objects of 64 bytes: lookups never touch bytes, so a long prompt need not fill the machine."""

DEEPSEEK_MLA: Final = Shape("deepseek-v3", _MLA, "LPBNHC", 64)
"""The latent of multi-head latent attention: one plane, one head."""
