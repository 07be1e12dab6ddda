"""Whether an engine's classes have the methods that a connector is written for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any


def difference(methods: Mapping[str, Mapping[str, str]]) -> str:
    """How an engine differs from "module:Class" → method → the names that its arguments begin with.

    In words; empty: it does not.
    """
    for place, wanted in methods.items():
        try:
            owner = resolve_name(place)
        except (ImportError, AttributeError):
            return f"there is no {place}"
        for method, names in wanted.items():
            if words := difference_of(owner, method, names):
                return words
    return ""


def difference_of(owner: Any, method: str, names: str) -> str:
    """The same of one method."""
    found = getattr(owner, method, None)
    if found is None:
        return f"{owner.__name__} has no {method}"
    has, expected = list(inspect.signature(found).parameters), names.split()
    return "" if has[: len(expected)] == expected else f"{owner.__name__}.{method} takes {has}"
