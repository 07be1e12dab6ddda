"""Names of packages that are not installed, as far as importing SGLang on a CPU needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Names(type):
    def __getattr__(cls, name: str) -> Any:
        return absent(name)

    def __iter__(cls) -> Iterator[Any]:
        return iter(())  # As of `triton.backends.backends`: there are none.


class Absent(metaclass=_Names):
    """Can decorate, be a base class, and have attributes; as a kernel it cannot be launched."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __call__(self, *args: object, **options: object) -> Absent:
        return self

    def __getattr__(self, name: str) -> Any:
        return absent(name)

    def __getitem__(self, grid: object) -> None:
        raise NotImplementedError("a GPU's kernel was called, on a CPU")


def absent(name: str) -> Any:
    """A class that stands for the attribute of that name.

    Raises:
        AttributeError: Python itself asks, and must be told that there is none.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Absent,), {})


class _Submodules(MetaPathFinder, Loader):
    """Every module under a package that is not there."""

    def __init__(self, package: str, attribute: Callable[[str], Any]) -> None:
        self._package = package
        self._attribute = attribute

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        found = f"{name}.".startswith(f"{self._package}.")
        return ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = self._attribute


def submodules(package: str, attribute: Callable[[str], Any] = absent) -> None:
    """From now on, `package` and every module in it can be imported, with the attributes given."""
    sys.meta_path.append(_Submodules(package, attribute))
