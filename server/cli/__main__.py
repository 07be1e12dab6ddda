"""`kvstore`, also as `python -m kvstore.server.cli`: the command line."""

from __future__ import annotations

import sys
from typing import Final

_BROUGHT: Final = frozenset(
    {"aiohttp", "google", "grpc", "grpc_health", "grpc_reflection", "grpc_status"}
    | {"prometheus_client", "rich", "typer"}
)
"""Modules of the packages that `kvstore[server]` brings; `kvstore` alone does without them."""


def main() -> None:
    """Run the command, if what it needs is there."""
    try:
        from kvstore.server.cli.main import main as run

        run()
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in _BROUGHT:
            raise
        sys.exit(f"error: {e}, which this command needs: pip install 'kvstore[server]'")


if __name__ == "__main__":
    main()
