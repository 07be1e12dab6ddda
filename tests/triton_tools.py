"""Pages and slots for the tests of kernels, and the kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvstore.blocks.spec import Group, Part
from kvstore.copier import base
from kvstore.copier.base import PagedMemory, PlaneMemory

SOURCE = Path(base.__file__).with_name("cuda") / "triton.py"
GUARD = 64


def fresh(monkeypatch: pytest.MonkeyPatch, *, interpret: bool) -> ModuleType:
    """The module anew: whether its kernels are interpreted is settled when it is imported."""
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, "kvstore.copier.cuda.numbers", raising=False)
    spec = importlib.util.spec_from_file_location("kernels_under_test", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreted() -> ModuleType:
    """Kernels for the interpreter; other modules find the environment as it was."""
    with pytest.MonkeyPatch.context() as patch:
        module = fresh(patch, interpret=True)
        # Triton imports this at the first launch, and asks once more what it is to do.
        importlib.import_module("triton.experimental.gluon")
        return module


class Memory:
    """Pages of a group, filled at random. `axes` orders page B and N, H, C of each plane.

    With `joined` the planes lie beside each other in C, otherwise one after the other. `gap` bytes
    follow each token or head, whichever comes first.
    """

    def __init__(
        self, group: Group, axes: str, pages: int, page_tokens: int, *, joined: bool, gap: int = 0
    ) -> None:
        elem, planes = group.elem_size, []
        widths = (sum(group.channels),) if joined else group.channels
        at = GUARD
        for _ in range(group.layers):
            for width in widths:
                sizes = {"B": pages, "N": page_tokens, "H": group.heads, "C": width}
                apart, inner = {}, elem
                for axis in reversed(axes):
                    apart[axis] = inner
                    inner = inner * sizes[axis] + (gap if axis == axes[2] else 0)
                strides = [apart[axis] for axis in "BNHC"]
                starts = [0]
                if joined:
                    starts = [sum(group.channels[:p]) for p in range(len(group.channels))]
                planes += [(at + start * apart["C"], *strides) for start in starts]
                at += inner
        self.bytes = np.random.default_rng(at).integers(0, 256, at + GUARD, dtype=np.uint8)
        self.address = self.bytes.ctypes.data
        places = tuple(PlaneMemory(self.address + first, *rest) for first, *rest in planes)
        self.paged = PagedMemory(Part(group), page_tokens, pages, places, self.bytes)


class Slots:
    """Objects with bytes between them, filled at random, each `shift` bytes past a line."""

    def __init__(self, nbytes: int, blocks: int, shift: int = 0) -> None:
        apart = -(-(nbytes + GUARD) // 64) * 64
        self.bytes = np.random.default_rng(7).integers(
            0, 256, blocks * apart + 2 * GUARD, dtype=np.uint8
        )
        first = self.bytes.ctypes.data + GUARD
        first += -first % 64 + shift
        self.addresses = np.array([first + i * apart for i in range(blocks)], dtype=np.uint64)
