"""The `kvstore token` commands."""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Any, Final

import typer

from kvstore.server.access.grants import Role

token_app = typer.Typer(no_args_is_help=True, help="Tokens that let callers in.")

_TOKEN_BYTES: Final = 32
_MAX_NAME: Final = 256
_ROLES: Final = tuple(role.name.lower() for role in Role)


def _role(text: str) -> str:
    if text not in _ROLES:
        raise typer.BadParameter(f"{text!r} is no role; give one of {', '.join(_ROLES)}")
    return text


def _name(text: str) -> str:
    if not text or not text.isprintable() or len(text) > _MAX_NAME:
        raise typer.BadParameter(
            f"{text[:_MAX_NAME]!r} is no name; give one of up to {_MAX_NAME} printable characters"
        )
    return text


@token_app.command()
def new(
    name: Annotated[
        str,
        typer.Option(parser=_name, metavar="NAME", help="Who will use it; unique in the file."),
    ],
    role: Annotated[str, typer.Option(parser=_role, metavar="|".join(_ROLES))],
    tenant: Annotated[
        list[str] | None,
        typer.Option(parser=_name, metavar="NAME", help="Limit it to this one; may be repeated."),
    ] = None,
) -> None:
    """Make a random token.

    The token goes to stdout, and is not kept anywhere; the entry for the daemon's token file, which
    holds only its SHA-256, goes to stderr.
    """
    import yaml

    token = secrets.token_urlsafe(_TOKEN_BYTES)
    entry: dict[str, Any] = {"name": name, "role": role}
    entry["sha256"] = hashlib.sha256(token.encode()).hexdigest()
    if tenant:
        entry["tenants"] = tenant
    typer.echo(token)
    typer.echo("# add to the list `tokens:` in the file that server.tokens names:", err=True)
    typer.echo(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).rstrip(), err=True)
