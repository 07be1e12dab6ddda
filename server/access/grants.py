"""What callers may do: roles, and the tenants that they are limited to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from kvstore.errors import AccessDenied


class Role(IntEnum):
    """What a token allows; each role includes those before it. A peer reads blocks, no more."""

    PEER = 0
    READ = 1
    WRITE = 2
    ADMIN = 3


class Denied(AccessDenied):
    """`reason` is a word, for programs and counters."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Grant:
    """What a caller may do. `tenants` of None means all of them.

    `digest` is the SHA-256 of the token that it comes from; empty: it comes from none.
    """

    name: str
    role: Role
    tenants: frozenset[str] | None = None
    digest: bytes = field(default=b"", repr=False, compare=False)

    def check(self, role: Role, what: str) -> None:
        """Refuse what needs more than this role. Raises Denied: names both roles."""
        if self.role < role:
            raise Denied(
                "role",
                f"{what} needs the role {role.name.lower()}, {self.name!r} has "
                f"{self.role.name.lower()}; use another token",
            )

    def sees(self, tenant: str) -> bool:
        """Whether blocks of this tenant exist for the caller."""
        return self.tenants is None or tenant in self.tenants

    def check_tenant(self, tenant: str) -> None:
        """Refuse a tenant out of reach. Raises Denied: names the tenant."""
        if not self.sees(tenant):
            text = f"{self.name!r} may not use the tenant {tenant!r}; use its token"
            raise Denied("tenant", text)


LOCAL = Grant("local", Role.ADMIN)
"""The daemon's own user on its sockets, and everybody where no tokens are configured."""
