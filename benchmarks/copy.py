"""Copies between an engine's pages and slots, block keys and checksums, against memory itself."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from kvstore import _native
from kvstore.benchmarks import shapes
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.shapes import Shape
from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import Described, Part
from kvstore.copier.cpu import CpuCopier
from kvstore.memory.bounce import Bounce

_SHAPES: Final[tuple[tuple[Shape, tuple[str, ...]], ...]] = (
    (shapes.LLAMA_NHD, ("LNHPC", "LHNPC")),
    (shapes.LLAMA_HND, ("LHNPC", "LPNHC")),
    (shapes.LLAMA_VLLM, ("LPNHC",)),
    (shapes.SMOLLM2_F32, ("LPNHC",)),
    (shapes.SMOLLM2_VLLM_CPU, ()),
    (shapes.SMOLLM2_BF16, ()),
    (shapes.DEEPSEEK_MLA, ()),
)
"""What is measured, and from which other layouts it is loaded as well."""

_KEY_TOKENS: Final = 1 << 17
_KEY_CALLS: Final = 10
_FILL: Final = 1 << 20


def run(report: Report, *, size: int, threads: int) -> None:
    """Measure with `size` bytes of pages and of slots, with one and with `threads` threads."""
    size = max(size, *(shape.block_bytes for shape, _ in _SHAPES))
    pages, slots = Bounce(size), Bounce(size)
    _fill(pages)
    _check(pages, slots)
    for shape, others in _SHAPES:
        for count in sorted({1, threads}):
            _measure_shape(report, shape, others, pages, slots, count)
    if importlib.util.find_spec("torch") is not None:
        for count in sorted({1, threads}):
            _measure_torch(report, shapes.LLAMA_NHD, pages, slots, count)
    _measure_checksum(report, pages)
    _measure_keys(report)


def _fill(memory: Bounce) -> None:
    """Bytes of every value but 0."""
    pattern = np.random.default_rng(0).integers(1, 256, _FILL, dtype=np.uint8)
    whole = np.frombuffer(memory.view, np.uint8)
    for start in range(0, len(whole), _FILL):
        whole[start : start + _FILL] = pattern[: len(whole) - start]


def _check(pages: Bounce, slots: Bounce) -> None:
    """What is measured must be right: a block through a slot and back."""
    shape = shapes.SMOLLM2_BF16
    memory = shape.memory(pages.address, 1)
    ids = shape.page_ids(1)
    copier = CpuCopier(1)
    before = bytes(pages.view[: shape.block_bytes])
    copier.copy(shape.copy(True, memory, ids, [slots.address]))
    np.frombuffer(pages.view, np.uint8)[: shape.block_bytes] = 1
    copier.copy(shape.copy(False, memory, ids, [slots.address]))
    if bytes(pages.view[: shape.block_bytes]) != before:
        raise BenchmarkError("a block came back changed; run the tests before the benchmarks")


def _measure_shape(
    report: Report,
    shape: Shape,
    others: tuple[str, ...],
    pages: Bounce,
    slots: Bounce,
    threads: int,
) -> None:
    blocks = pages.nbytes // shape.block_bytes
    nbytes = blocks * shape.block_bytes
    memory, ids = shape.memory(pages.address, blocks), shape.page_ids(blocks)
    addresses = [slots.address + i * shape.block_bytes for i in range(blocks)]
    copier = CpuCopier(threads)
    out, back = (shape.copy(to_slots, memory, ids, addresses) for to_slots in (True, False))
    cases = [
        (action, shape.layout, checksum, partial(copier.copy, replace(copy, checksum=checksum)))
        for checksum in (False, True)
        for action, copy in (("save", out), ("load", back))
    ]
    for axes in others:
        stored = Part(shape.group, Described(axes))
        copy, converting = replace(back, stored=stored), f"{axes}→{shape.layout}"
        cases.append(("load", converting, False, partial(copier.copy, copy)))
    runs = {"limit": Run(partial(_native.copy, slots.address, pages.address, nbytes, threads))}
    runs |= {str(number): Run(copy) for number, (_, _, _, copy) in enumerate(cases)}
    taken = report.race(f"{shape.name} {shape.layout}, {threads} threads", runs)
    for number, (action, layout, checksum, _) in enumerate(cases):
        how = _how(shape, layout, threads, checksum, nbytes)
        report.rate(f"{action} {shape.name}", nbytes, taken[str(number)], taken["limit"], **how)


def _measure_torch(
    report: Report, shape: Shape, pages: Bounce, slots: Bounce, threads: int
) -> None:
    """The peer: what torch itself offers for pages."""
    import torch

    blocks = pages.nbytes // shape.block_bytes
    nbytes = blocks * shape.block_bytes
    planes = shape.group.layers * len(shape.group.channels)
    ids = torch.from_numpy(shape.page_ids(blocks).reshape(-1))
    tensors = [
        torch.frombuffer(memory.view[:nbytes], dtype=torch.bfloat16).view(planes, len(ids), -1)
        for memory in (pages, slots)
    ]
    paged, packed = tensors
    actions = {"index_select": "save", "index_copy_": "load"}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report.measure(
            f"torch, {threads} threads",
            {
                "limit": Run(partial(_native.copy, slots.address, pages.address, nbytes, threads)),
                "index_select": Run(lambda: torch.index_select(paged, 1, ids, out=packed)),
                "index_copy_": Run(lambda: paged.index_copy_(1, ids, packed)),
            },
            {f"peer torch {p}: {a} {shape.name}": (p, "limit") for p, a in actions.items()},
            nbytes,
            **_how(shape, shape.layout, threads, False, nbytes),
        )
    finally:
        torch.set_num_threads(before)


def _how(shape: Shape, layout: str, threads: int, checksum: bool, nbytes: int) -> dict[str, Any]:
    return {
        "layout": layout,
        "dtype": shape.group.dtype,
        "threads": threads,
        "checksum": checksum,
        "bytes": nbytes,
        "against": "streaming copy of the same bytes",
    }


def _measure_checksum(report: Report, memory: Bounce) -> None:
    """XXH3 of cold memory; the limit is a linear read: a search for a byte that is not there."""
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    memchr.restype = ctypes.c_void_p
    _fill(memory)
    report.measure(
        "xxh3",
        {
            "limit": Run(lambda: memchr(memory.address, 0, memory.nbytes)),
            "xxh3": Run(lambda: _native.xxh3_64(memory.address, memory.nbytes)),
        },
        {"xxh3": ("xxh3", "limit")},
        memory.nbytes,
        bytes=memory.nbytes,
        against="linear read (memchr)",
    )


def _measure_keys(report: Report) -> None:
    """Keys of a long prompt; the limit is one SHA-256 over as many bytes, without the chain."""
    namespace = shapes.LLAMA_NHD.namespace
    ids = np.random.default_rng(0).integers(0, 128_000, _KEY_TOKENS, dtype=np.uint32)
    prompt: list[int] = ids.tolist()
    hashed = bytes(ids.nbytes + _KEY_TOKENS // namespace.block_tokens * 32)
    runs = {
        "keys of an array": Run(lambda: block_keys(namespace, ids)),
        "keys of a list": Run(lambda: block_keys(namespace, prompt)),
        "peer hashlib loop: keys of an array": Run(
            lambda: _hashlib_keys(namespace.digest, ids.tobytes(), namespace.block_tokens * 4)
        ),
    }
    report.measure(
        "block keys",
        {"limit": Run(lambda: hashlib.sha256(hashed))} | runs,
        {name: (name, "limit") for name in runs},
        _KEY_TOKENS,
        repeat=_KEY_CALLS,
        unit="Mtoken/s",
        tokens=_KEY_TOKENS,
        block_tokens=namespace.block_tokens,
        against="one SHA-256 of as many bytes",
    )


def _hashlib_keys(key: bytes, tokens: bytes, step: int) -> list[bytes]:
    keys = []
    for start in range(0, len(tokens), step):
        key = hashlib.sha256(key + tokens[start : start + step]).digest()
        keys.append(key)
    return keys
