"""What is let into memory and onto disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MEMORY_RULES: Final = ("all", "none")
DISK_RULES: Final = ("all", "reused", "none")


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules in force.

    `memory` is about saves: `all`, or `none`. `disk` is about write-behind: `all`; `reused`, which
    writes a block once a second request asks for it, be it here or not, and so spares flash from
    blocks nobody asks for again; or `none`. Saves of `denied_tenants` are dropped.

    Raises:
        ValueError: an unknown rule, with those there are.
    """

    memory: str = "all"
    disk: str = "all"
    denied_tenants: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, rule, known in (
            ("memory", self.memory, MEMORY_RULES),
            ("disk", self.disk, DISK_RULES),
        ):
            if rule not in known:
                raise ValueError(f"admission.{name} is {rule!r}; use one of {', '.join(known)}")

    def refuses(self, tenant: str) -> bool:
        """Whether saves of this tenant are dropped."""
        return self.memory == "none" or tenant in self.denied_tenants
