"""All that the modules of a model hold, and the code that they run.

What a module computes follows from its class, its tensors, and whatever else its author put into
it: numbers, functions, dictionaries, objects. All of it is told by its place in the model. What
cannot be told, or is of code that nobody can name, must not be taken for something known.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedConfig

from kvstore.connectors.common.identity import config_digest
from kvstore.errors import SpecError

_LIBRARIES: Final = frozenset({"torch", "transformers", "peft"}) | sys.stdlib_module_names
"""Packages whose layers, hooks and functions do what a model's configuration says."""
_IMPORTED: Final = _LIBRARIES | {
    "accelerate", "einops", "huggingface_hub", "kernels", "numpy", "packaging", "safetensors",
    "tqdm", "typing_extensions",
}  # fmt: skip
"""Packages whose functions those import."""

_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes)
_SHOWN: Final = (torch.dtype, torch.device, Enum, range, slice, PurePath, np.generic)
_FUNCTIONS: Final = (FunctionType, BuiltinFunctionType, MethodType)
# What hooks, compilers, loading and training leave on modules; `unfit` looks at hooks itself.
_NOT_NUMBERS: Final = frozenset(vars(torch.nn.Module())) | {
    "_compiled_call_impl", "_is_hf_initialized", "_use_kernels", "_weight_conversions",
    "all_tied_weights_keys", "dynamo_ctx", "forward", "generation_config",
    "gradient_checkpointing", "loss_type", "name_or_path", "peft_config", "warnings_issued",
}  # fmt: skip
_MOST: Final = 1 << 18
"""Things told of one model."""
_MOST_FILES: Final = 1000


class Contents:
    """What a module and those in it hold: `tensors` and everything else, by their places.

    A tensor or module that is in several places is told once, the other times it `is` the first.
    """

    def __init__(self, model: Any, *, without: str = "") -> None:
        """`without` names modules, and all in them, that are left out."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.told: dict[str, str] = {}
        self.kinds: dict[type, None] = {}
        self.functions: dict[FunctionType, None] = {}
        self._without = without
        self._first: dict[int, str] = {}
        self._around: list[object] = []
        self._configs: dict[int, str] = {}
        self._add("", model)
        self.told |= {f"class {i}": _told_of(kind) for i, kind in enumerate(self.kinds)}

    def _add(self, place: str, value: Any) -> None:
        if isinstance(value, (*_PLAIN, *_SHOWN)):
            self.told[place] = repr(value)
        elif isinstance(value, (torch.Tensor, torch.nn.Module)):
            first = self._first.setdefault(id(value), place)
            if first != place:
                self.told[place] = f"is {first}"
            elif isinstance(value, torch.Tensor):
                self.tensors[place] = value
            else:
                self._enter(place, value, _of_module(value, self._without))
        elif isinstance(value, np.ndarray):
            raw = hashlib.sha256(value.tobytes()).hexdigest()
            self.told[place] = f"{value.dtype} {value.shape} {raw}"
        elif isinstance(value, PreTrainedConfig):
            if id(value) not in self._configs:
                self._configs[id(value)] = _config(value)
            self.told[place] = self._configs[id(value)]
        elif isinstance(value, partial):
            parts = {"func": value.func, "args": value.args, "kwargs": value.keywords}
            self._enter(place, value, parts.items())
        elif isinstance(value, _FUNCTIONS):
            self._function(place, value)
        elif isinstance(value, type):
            self.kinds[value] = None
            self.told[place] = _called(value)
        elif isinstance(value, Mapping):
            self._enter(place, value, ((repr(key), item) for key, item in value.items()))
        elif isinstance(value, Set):
            self.told[place] = repr(sorted(map(repr, value)))
        elif isinstance(value, (list, tuple)):
            self._enter(place, value, ((str(i), item) for i, item in enumerate(value)))
        else:
            slots = {name for kind in type(value).__mro__ for name in _slots(kind)}
            held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
            self._enter(place, value, (held | getattr(value, "__dict__", {})).items())

    def _enter(self, place: str, value: Any, items: Any) -> None:
        """Something that has things in it; what lies around it already is not told again."""
        self.told[place] = _called(type(value))
        if len(self.told) > _MOST:
            raise SpecError(f"the model holds too much to tell it from others, as in {place}")
        if any(other is value for other in self._around):
            return
        self.kinds[type(value)] = None
        self._around.append(value)
        for name, item in items:
            self._add(f"{place}.{name}" if place else name, item)
        self._around.pop()

    def _function(self, place: str, value: Any) -> None:
        if isinstance(value, MethodType):
            self._add(f"{place}.__self__", value.__self__)
            value = value.__func__
        self.told[place] = _called(value)
        if isinstance(value, FunctionType):
            around = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            self._enter(place, value, (("closure", around), ("defaults", value.__defaults__)))
            self.told[place] = f"{_called(value)} {_fingerprint(value)}"
            self.functions[value] = None

    def code(self) -> list[str]:
        """Digests of code that is no library's: files, and what was made of them.

        Raises:
            SpecError: it is in no file, or reaches too many.
        """
        strange = [f"{kind.__module__}" for kind in self.kinds if not own(kind)]
        strange += [str(f.__globals__.get("__name__")) for f in self.functions if not own(f)]
        lines, left, seen = [], sorted(set(strange)), set(strange)
        needed = set(strange)
        while left:
            module = sys.modules.get(name := left.pop())
            file = getattr(module, "__file__", None)
            if module is None or file is None or not Path(file).is_file():
                if name in needed:
                    raise SpecError(f"code of the model is in no file ({name}); pass revision=")
                continue
            lines.append(f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}")
            lines += [f"{name} {told}" for told in _made_of(module)]
            used = {_module_of(value) for value in vars(module).values()} - seen
            more = sorted(n for n in used if n.partition(".")[0] not in _IMPORTED)
            seen.update(more)
            left += more
            if len(seen) > _MOST_FILES:
                raise SpecError(f"code of the model uses too many files ({name}); pass revision=")
        return lines

    def replaced(self) -> str:
        """Something of a library's class or file that somebody replaced; empty: nothing."""
        bases = {base: None for kind in self.kinds for base in kind.__mro__ if own(base)}
        files = {kind.__module__: None for kind in self.kinds if own(kind)}
        for base in bases:
            for name, value in vars(base).items():
                if not (_plainly_own(value) or own(value)):
                    return f"{base.__qualname__}.{name}"
        for file in (*files, "transformers.masking_utils", "torch.nn.functional"):
            module = sys.modules.get(file)
            for name, value in vars(module).items() if module else ():
                # What dynamo compiles it leaves beside the functions, under such names.
                if not (name.startswith("__") or _plainly_own(value) or own(value, _IMPORTED)):
                    return f"{file}.{name}"
        return ""


def own(value: Any, packages: frozenset[str] = _LIBRARIES) -> bool:
    """Whether a function, class, or what it was made of, is of these packages; others pass."""
    while value is not None:
        value = value.func if isinstance(value, partial) else getattr(value, "__func__", value)
        if _module_of(value).partition(".")[0] not in packages | {""}:
            return False
        value = vars(value).get("__wrapped__") if isinstance(value, FunctionType) else None
    return True


def _plainly_own(value: Any) -> bool:
    """The same for most that a library has, in a tenth of the time."""
    if not isinstance(value, FunctionType):
        return isinstance(value, (*_PLAIN, type, ModuleType, property))
    name: str = value.__globals__.get("__name__", "")
    return name.startswith(("torch.", "transformers.")) and not value.__dict__


def _of_module(module: Any, without: str) -> Iterator[tuple[str, Any]]:
    library = type(module).__module__.partition(".")[0] in ("torch", "transformers")
    # What peft puts around a model is told by the layers that it put in.
    around = any(kind.__name__ in ("PeftModel", "BaseTuner") for kind in type(module).__mro__)
    parts = vars(module)
    for name, value in (parts["_modules"] | parts["_parameters"] | parts["_buffers"]).items():
        if value is not None and name != without:
            yield name, value
    for name, value in () if around else parts.items():
        if name not in _NOT_NUMBERS and not (library and name.startswith("_")):
            yield name, value


def _config(config: Any) -> str:
    try:
        return config_digest(config)
    except SpecError:
        return str(config.to_json_string(use_diff=False))


def _module_of(value: Any) -> str:
    """The module that something's code is in; empty if it has none."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__"))
    if isinstance(value, type):
        return str(value.__module__)
    if isinstance(value, _FUNCTIONS):
        return str(value.__module__ or "")
    return "" if isinstance(value, (*_PLAIN, torch.Tensor)) else type(value).__module__


def _called(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _told_of(kind: type) -> str:
    """What class a class is, and what its methods do: those of others by their code."""
    forward = getattr(kind, "forward", None)
    if own(kind):
        return f"{_called(kind)} {_called(forward) if forward else ''}"
    methods = {n: f for n, f in vars(kind).items() if isinstance(f, FunctionType)}
    return f"{_called(kind)} {[(name, _fingerprint(f)) for name, f in sorted(methods.items())]}"


def _made_of(module: ModuleType) -> Iterator[str]:
    """What is in a module now, whatever its file says by now."""
    for name, value in sorted(vars(module).items()):
        if type(value) in (bool, int, float):
            yield f"{name} {value!r}"
        elif _module_of(value) == module.__name__:
            if isinstance(value, FunctionType):
                yield f"{name} {_fingerprint(value)}"
            elif isinstance(value, type):
                yield f"{name} {_told_of(value)}"


def _fingerprint(function: Callable[..., Any]) -> str:
    """What a function does, by its code."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    return hashlib.sha256(repr(code and _instructions(code)).encode()).hexdigest()[:16]


def _instructions(code: CodeType) -> tuple[Any, ...]:
    constants = [
        _instructions(c) if isinstance(c, CodeType)
        else sorted(map(repr, c)) if isinstance(c, frozenset)
        else repr(c)
        for c in code.co_consts
    ]  # fmt: skip
    return code.co_code, code.co_names, constants
