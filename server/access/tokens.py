"""The file of tokens."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kvstore.errors import ConfigError
from kvstore.mistakes import plainly
from kvstore.server.access.grants import Grant, Role
from kvstore.transport.credentials import checked_token

_MAX_SECRET: Final = 16 << 20
_MOST_TOLD: Final = 5
_SHA256: Final = re.compile("[0-9a-fA-F]{64}")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    role: Literal["peer", "read", "write", "admin"]
    token: Annotated[str, Field(min_length=16)] | None = None
    sha256: str | None = None
    tenants: Annotated[list[str], Field(min_length=1)] = []

    @model_validator(mode="after")
    def _check_secret(self) -> _Entry:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("needs either `token` or `sha256`; give one of the two")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError("`sha256` must be 64 hex digits")
        if self.token is not None:
            checked_token(self.token, "its `token`")
        return self

    def grant(self) -> Grant:
        """What its bearer may do."""
        digest = bytes.fromhex(self.sha256) if self.sha256 else digest_of(self.token or "")
        tenants = frozenset(self.tenants) if self.tenants else None
        return Grant(self.name, Role[self.role.upper()], tenants, digest)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: Annotated[list[_Entry], Field(min_length=1)]


def read_tokens(path: Path) -> list[Grant]:
    """The grants of all tokens in `path`. No message holds any of the file's values but names, so
    that no token gets into a log, nor does an exception that has seen them.

    Raises:
        ConfigError: names the entry and what to do.
    """
    source = f"server.tokens {path}"
    check_secret("server.tokens", path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{source}: {e.strerror}; check the path") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)  # The error's own text quotes the line.
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise ConfigError(f"{source} is no valid YAML{where}; see `kvstore token new`") from None
    try:
        grants = [entry.grant() for entry in _File.model_validate(content).tokens]
    except ValidationError as e:
        problem = "; ".join(
            _told(item, content) for item in e.errors(include_input=False)[:_MOST_TOLD]
        )
    else:
        problem = _doubled(grants)
    if problem:
        raise ConfigError(f"{source}: {problem}; `kvstore token new` makes entries")
    return grants


def _told(item: ErrorDetails, content: Any) -> str:
    """What pydantic says, and of which entry. A key that is none may be a secret, too."""
    where = ".".join(str(part)[:15] for part in item["loc"])
    match item["loc"]:
        case ("tokens", int(number), *field):
            entry = content["tokens"][number]
            name = entry.get("name") if isinstance(entry, dict) else None
            where = f"entry {number + 1}" + (f" ({name!r})" if isinstance(name, str) else "")
            where += "".join(f" {str(part)[:15]}" for part in field)
    return f"{where or 'the file'}: {plainly(item)}"


def _doubled(grants: list[Grant]) -> str:
    names: dict[str, int] = {}
    digests: dict[bytes, str] = {}
    for number, grant in enumerate(grants, 1):
        entry = f"entry {number} ({grant.name!r})"
        if (first := names.setdefault(grant.name, number)) != number:
            return f"{entry} has the name of entry {first}; name each once"
        if (other := digests.setdefault(grant.digest, grant.name)) != grant.name:
            return f"{entry} has the token of {other!r}; make a new one"
    return ""


def digest_of(token: str) -> bytes:
    """What a token is known by."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def check_secret(key: str, path: Path) -> None:
    """Refuse a secret that other users can read or replace.

    Group may read, since containers are given their secrets like that.
    """
    try:
        found = path.stat()
    except OSError as e:
        raise ConfigError(f"{key} {path}: {e.strerror}; check the path") from e
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_SECRET:
        raise ConfigError(f"{key} {path} is no file of at most {_MAX_SECRET} bytes; name another")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{key} {path} belongs to user {found.st_uid}, who could change it; chown it to the "
            "daemon's user or root"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o027:
        raise ConfigError(
            f"{key} {path} has mode {mode:04o}, so others can read or change it; chmod 0600 it "
            "(0640 at most)"
        )
