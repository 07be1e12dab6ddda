"""Names of the weights of a live model: their files', if it computes with what those say.

Another engine that loads these files, with the same configuration, computes with the same numbers
and so goes by the same name. That is not believed but looked at: each tensor of the files is
compared with the model's, bit by bit, rounded to the model's type as engines do while they load;
what no file holds (buffers, settings of modules), with a model made anew from the configuration.
Where anything differs, or cannot be told, the model's own tensors name it.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from kvstore.blocks.weights import weights_digest
from kvstore.connectors.common.identity import folder_of
from kvstore.connectors.transformers.contents import Contents
from kvstore.connectors.transformers.state import is_plain, line_of, mark, precision, sha256
from kvstore.errors import SpecError

_log = logging.getLogger("kvstore.transformers")
_THREADS: Final = 4
_PIECE: Final = 1 << 20
"""Numbers that are compared at a time."""


class Differs(SpecError):
    """A model does not compute with what its files say, or that cannot be told."""


class Weights:
    """The tensors of one model, and all else that it computes with; not thread-safe."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hashed: dict[str, tuple[object, str]] = {}
        self._compared: tuple[str, dict[str, object]] = "", {}
        """A digest of files, and marks of the tensors that are known to be what these say."""

    def state(self, held: Contents) -> tuple[object, ...]:
        """Equal as long as nothing of the model, which holds this now, has changed.

        Takes a few milliseconds.
        """
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
        places: dict[str, Path] = {}

        def compare(file: Path, name: str, stored: torch.Tensor) -> None:
            if places.setdefault(name, file) != file:
                raise Differs(f"{name} stands in several files of {folder}")
            tensor = named.get(name)
            if tensor is None and name.endswith(".rotary_emb.inv_freq"):
                return  # Of old checkpoints; engines leave it out.
            if tensor is None or id(tensor) not in marks:
                raise Differs(f"there is no {name} in the model")
            if tensor.is_floating_point() and tensor.dtype != dtype:
                raise Differs(f"{name} is {tensor.dtype}, the model {dtype}")
            if same.get(name) != marks[id(tensor)]:
                if not holds(tensor, stored):
                    raise Differs(f"{name} is not what {file} says")
                same[name] = marks[id(tensor)]

        def compare_all(file: Path) -> None:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    compare(file, name, opened.get_tensor(name))

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(compare_all, sorted(folder.glob("*.safetensors"))))
        found = {id(named.get(name)) for name in places}
        fresh = Contents(_made_anew(model))
        if held.told != fresh.told:
            raise Differs("its modules are not those of its configuration")
        for name in (name for name, tensor in held.tensors.items() if id(tensor) not in found):
            if name not in fresh.tensors or not _equal(held.tensors[name], fresh.tensors[name]):
                raise Differs(f"{name} is in no file of {folder}")
        if weights_digest(folder) != digest:
            raise Differs(f"the files in {folder} have changed meanwhile")
        return digest


def holds(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a model's tensor is one of a file, rounded to its type; bit by bit."""
    floats = tensor.is_floating_point()
    if not is_plain(tensor) or tensor.shape != stored.shape or floats != stored.is_floating_point():
        return False
    pieces = zip(tensor.reshape(-1).split(_PIECE), stored.reshape(-1).split(_PIECE), strict=True)
    return all(
        _equal(piece, read.to(piece.device, piece.dtype if floats else read.dtype))
        for piece, read in pieces
    )


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
