"""Names of the weights of a live model: their files', if it computes with what those say.

Another engine that loads these files, with the same configuration, computes with the same numbers
and so goes by the same name. That is not believed but looked at: each tensor of the files is
compared with the model's, bit by bit, rounded to the model's type as engines do while they load;
what no file holds (buffers, settings of modules), with a model made anew from the configuration.
Where anything differs, or cannot be told, the model's own tensors name it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from kvstore.blocks.weights import weights_digest
from kvstore.connectors.common.identity import folder_of
from kvstore.connectors.transformers.contents import Contents
from kvstore.connectors.transformers.state import is_plain, line_of, mark, precision, sha256
from kvstore.errors import SpecError

_log = logging.getLogger("kvstore.transformers")
_THREADS: Final = 4
_PIECE: Final = 8 << 20
_MOST_HEADER: Final = 100 << 20
_TYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class Differs(SpecError):
    """A model does not compute with what its files say, or that cannot be told."""


class Weights:
    """The tensors of one model, and all else that it computes with; not thread-safe."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hashed: dict[str, tuple[object, str]] = {}
        self._compared: tuple[str, dict[str, object]] = "", {}
        """A digest of files, and marks of the tensors that are known to be what these say."""

    def state(self) -> tuple[object, ...]:
        """Equal as long as nothing of the model has changed. Takes a few milliseconds."""
        held = Contents(self._model)
        marks = {name: mark(tensor) for name, tensor in held.tensors.items()}
        config = self._model.config.to_json_string(use_diff=False)
        return marks, held.told, config, precision(self._model)

    def digest(self) -> str:
        """64 hex digits that name every byte of every tensor, all else, and code of its own.

        Those of the files that the model was loaded from, if that is what it is. Tensors that have
        not changed since the last call are not read again.

        Raises:
            SpecError: a tensor is not in memory or in a private format, or code is in no file.
        """
        held = Contents(self._model)
        try:
            return self._of_files(held)
        except Exception as e:  # noqa: BLE001 - its tensors name it then
            why = str(e) if isinstance(e, (SpecError, OSError)) else f"{type(e).__name__}: {e}"
            _log.info("the model has no name that other engines know: %s", why)
            return self._of_tensors(held)

    def _of_tensors(self, held: Contents) -> str:
        known, self._hashed = self._hashed, {}

        def line(name: str) -> str:
            now, (before, made) = mark(held.tensors[name]), known.get(name, (None, ""))
            self._hashed[name] = now, made if now == before else line_of(name, held.tensors[name])
            return self._hashed[name][1]

        with ThreadPoolExecutor(_THREADS) as pool:
            lines = [*pool.map(line, held.tensors), *map(repr, held.told.items()), *held.code()]
        seen = {id(tensor) for tensor in held.tensors.values()}
        others = self._model.state_dict(keep_vars=True).items()
        lines += [line_of(name, value) for name, value in others if id(value) not in seen]
        return sha256("\n".join(sorted(lines)).encode())

    def _of_files(self, held: Contents) -> str:
        model = self._model
        if not (place := str(model.config.name_or_path)):
            raise Differs("it was loaded from no files")
        if code := held.code():
            raise Differs(f"it has code of its own ({code[0].partition(' ')[0]})")
        if replaced := held.replaced():
            raise Differs(f"{replaced} was replaced")
        folder = folder_of(place, getattr(model.config, "_commit_hash", None))
        digest = weights_digest(folder)
        if self._compared[0] != digest:
            self._compared = digest, {}
        same = self._compared[1]
        marks = {id(tensor): mark(tensor) for tensor in held.tensors.values()}
        named, dtype = model.state_dict(keep_vars=True), model.dtype
        found = set[int]()

        def compare(stored: _Stored) -> None:
            tensor = named.get(stored.name)
            if tensor is None and stored.name.endswith(".rotary_emb.inv_freq"):
                return  # Of old checkpoints; engines leave it out.
            if tensor is None or id(tensor) not in marks:
                raise Differs(f"there is no {stored.name} in the model")
            if tensor.is_floating_point() and tensor.dtype != dtype:
                raise Differs(f"{stored.name} is {tensor.dtype}, the model {dtype}")
            if same.get(stored.name) != marks[id(tensor)]:
                stored.compare(tensor, dtype)
                same[stored.name] = marks[id(tensor)]
            found.add(id(tensor))

        stored = [one for file in sorted(folder.glob("*.safetensors")) for one in _stored_in(file)]
        if len({one.name for one in stored}) != len(stored):
            raise Differs(f"a weight stands in several files of {folder}")
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(compare, stored))
        fresh = Contents(_made_anew(model))
        if held.told != fresh.told:
            raise Differs("its modules are not those of its configuration")
        for name in (name for name, tensor in held.tensors.items() if id(tensor) not in found):
            if name not in fresh.tensors or not _equal(held.tensors[name], fresh.tensors[name]):
                raise Differs(f"{name} is in no file of {folder}")
        if weights_digest(folder) != digest:
            raise Differs(f"the files in {folder} have changed meanwhile")
        return digest


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file of safetensors."""

    file: Path
    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def compare(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        """Find that `tensor` holds the same numbers, rounded to `dtype`.

        Raises:
            Differs: it does not.
        """
        floats = tensor.is_floating_point()
        if self.dtype is None or self.shape != tuple(tensor.shape) or not is_plain(tensor):
            raise Differs(f"{self.name} is of another shape, or in a private format")
        if self.dtype.is_floating_point != floats or not (floats or self.dtype == tensor.dtype):
            raise Differs(f"{self.name} is of another type")
        size, flat = self.dtype.itemsize, tensor.detach().reshape(-1)
        if len(flat) * size != self.nbytes:
            raise Differs(f"{self.name} has another number of bytes")
        room = bytearray(min(_PIECE, self.nbytes))
        # Read, not mapped: a file that is cut short meanwhile ends a process that looks at it.
        with self.file.open("rb", buffering=0) as opened:
            for at in range(0, len(flat), _PIECE // size):
                piece = flat[at : at + _PIECE // size]
                memory = memoryview(room)[: len(piece) * size]
                _fill(opened.fileno(), memory, self.start + at * size)
                read = torch.frombuffer(memory, dtype=self.dtype).to(tensor.device)
                if not _equal(read.to(dtype) if floats else read, piece):
                    raise Differs(f"{self.name} is not what {self.file} says")


def _stored_in(file: Path) -> Iterator[_Stored]:
    """What a file says that it holds."""
    with file.open("rb") as opened:
        nbytes = int.from_bytes(opened.read(8), "little")
        if nbytes > min(_MOST_HEADER, file.stat().st_size):
            raise Differs(f"{file} is damaged")
        header = json.loads(opened.read(nbytes))
    for name, told in header.items():
        if name != "__metadata__":
            first, last = told["data_offsets"]
            dtype, shape = _TYPES.get(told["dtype"]), tuple(told["shape"])
            yield _Stored(file, name, dtype, shape, 8 + nbytes + first, last - first)


def _fill(file: int, memory: memoryview, start: int) -> None:
    while memory:
        count = os.preadv(file, [memory], start)
        if not count:
            raise Differs("a file ended early")
        memory, start = memory[count:], start + count


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not (is_plain(one) and is_plain(other)):
        return False
    one, other = one.detach(), other.detach().to(one.device)
    return bool(torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))))


class _Unfilled(TorchFunctionMode):  # type: ignore[misc]
    """What modules make to be filled with weights takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.empty:
            given = given | {"device": "meta"}
        return func(*args, **given)


def _made_anew(model: Any) -> Any:
    """The model of the same configuration, without its weights."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]), _Unfilled():
        return type(model)(config).eval()
