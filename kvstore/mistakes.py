"""What is wrong with settings, in words that people know, with the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvstore.errors import ConfigError
from kvstore.values import format_size

TIER_NAME: Final = r"^[a-z][a-z0-9-]{0,31}$"

_PYDANTIC: Final = {
    "Value error, ": "", "Input should be a valid": "must be a", "Input should be": "must be",
    "a string": "a text (in quotes)", "a integer": "a whole number", "a tuple": "a list",
    "a dictionary": "`key: value` lines",
    "Field required": "is missing",
    f"String should match pattern '{TIER_NAME}'": "must have a-z, 0-9 and -, at most 32 of them, "
    "a letter first", "String should match pattern": "must match",
    "Extra inputs are not permitted": "is no key of this; take it out",
}  # fmt: skip


def plainly(item: ErrorDetails) -> str:
    """What pydantic says, in words of ours and without the value."""
    told = re.split(r" or instance of|, unable to", item["msg"])[0]
    for theirs, ours in _PYDANTIC.items():
        told = told.replace(theirs, ours)
    for bound in item.get("ctx", {}).values():
        if type(bound) is int and bound >= 4096 and not bound % 4096:
            told = told.replace(str(bound), f"{format_size(bound)} ({bound} bytes)")
    return told


def _near(where: str, loc: Sequence[int | str], known: Sequence[str]) -> str | None:
    """What a key that is none was meant for: beside `options` of a tier maybe one of a slab's."""
    if len(loc) == 3 and loc[0] == "tiers" and f"disk.{loc[2]}" in known:
        return f"tiers.{loc[1]}.options.{loc[2]}"
    return next(iter(difflib.get_close_matches(where, known, 1, 0.5)), None)


def explain(error: ValidationError, source: str, prefix: str, known: Sequence[str]) -> ConfigError:
    """What was wrong in `source`, where names have a `prefix`, in words that name the remedy.

    `known` names what may stand there.
    """
    lines = []
    for item in error.errors():
        where = prefix + ".".join(str(part) for part in item["loc"])[:200]
        if item["type"] == "extra_forbidden":
            near = _near(where, item["loc"], known)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{where}: unknown key; {hint}")
        else:
            lines.append(f"{where}: {plainly(item)}" if item["loc"] else plainly(item))
    return ConfigError(f"{source}: " + "; ".join(lines))
