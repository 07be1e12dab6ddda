"""What clients of the orchestration API raise, besides StoreUnavailable and AccessDenied."""

from __future__ import annotations

from kvstore.errors import KVStoreError


class RequestRefused(KVStoreError, ValueError):
    """What was asked cannot be done: a field is wrong, something is not there, or it is too much.

    `reason` is stable (docs/api.md lists them; empty where the daemon was not even asked), `field`
    the path of the field that is wrong.
    """

    def __init__(self, message: str, reason: str = "", field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


class OperationFailed(KVStoreError):
    """A long operation failed; says why."""


class OperationUnfinished(KVStoreError, TimeoutError):
    """A long operation has not ended within the time that was given; it goes on."""
