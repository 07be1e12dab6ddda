"""What is let into memory and into the tiers below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

SAVE_RULES: Final = ("all", "none")
WRITE_RULES: Final = ("all", "reused", "none")


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules in force.

    `memory` is about saves: `all`, or `none`. `below` is about write-behind, by the name of the
    tier: `all`, which is meant where nothing is said; `reused`, which writes a block once a second
    request asks for it, be it here or not, and so spares flash from blocks nobody asks for again;
    or `none`. Saves of `denied_tenants` are dropped.

    Raises:
        ValueError: an unknown rule, with those there are.
    """

    memory: str = "all"
    below: Mapping[str, str] = field(default_factory=dict)
    denied_tenants: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        below = ((name, rule, WRITE_RULES) for name, rule in self.below.items())
        for name, rule, known in (("memory", self.memory, SAVE_RULES), *below):
            if rule not in known:
                raise ValueError(f"{rule!r} is no rule for {name}; use one of {', '.join(known)}")

    def rule(self, tier: str) -> str:
        """What is written to a tier below memory."""
        return self.below.get(tier, "all")

    def refuses(self, tenant: str) -> bool:
        """Whether saves of this tenant are dropped."""
        return self.memory == "none" or tenant in self.denied_tenants
