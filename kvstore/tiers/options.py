"""Options of tiers, checked: those that the daemon says to all kinds, and what a kind adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvstore.mistakes import explain
from kvstore.sections import Seconds


class TierOptions(BaseModel):
    """What the daemon says to a tier, see `OpenTier`; kinds add options of theirs."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    retry_seconds: Seconds = 5.0
    stall_seconds: Seconds = 10.0
    direct: bool = False


T = TypeVar("T", bound=TierOptions)


def checked(kind: type[T], name: str, options: Mapping[str, Any]) -> T:
    """The options of the tier of that name.

    Raises:
        ConfigError: names what is wrong, and the remedy, and repeats no value.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as e:
        known = [f"options.{field}" for field in kind.__annotations__]
        raise explain(e, f"tier {name}", "options.", known) from None
