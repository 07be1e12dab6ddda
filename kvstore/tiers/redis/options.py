"""What can be set of a Redis tier, checked; and how its connections are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from kvstore.config import Count, MaybeFolder, Name, Seconds
from kvstore.mistakes import explain

PASSWORD_VARIABLE: Final = "KVSTORE_REDIS_PASSWORD"

Node = tuple[str, int]
"""Host and port of a server; of one on a socket its path, and 0."""

_PORTS: Final = {"standalone": 6379, "cluster": 6379, "sentinel": 26379}
_SCHEMES: Final = ("redis", "rediss", "unix")
_OF_DAEMON: Final = ("direct", "retry_seconds", "stall_seconds")


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class RedisOptions(BaseModel):
    """`options` of a tier of this kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        min_length=1, max_length=64, repr=False
    )
    mode: Literal["standalone", "sentinel", "cluster"] = "standalone"
    master: Name = "mymaster"
    prefix: str = Field("kvstore:", pattern=r"^[!-z|~]{0,64}$")
    ttl: Annotated[Count | None, Field(ge=1, le=10 * 366 * 86400)] = None
    connections: Count = Field(2, ge=1, le=16)
    timeout: Seconds = 2.0
    username: Name | None = None
    password_file: MaybeFolder = None
    sentinel_username: Name | None = None
    sentinel_password_file: MaybeFolder = None
    tls_ca: MaybeFolder = None
    tls_cert: MaybeFolder = None
    tls_key: MaybeFolder = None
    tls_check_hostname: bool = True

    @field_validator("url")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        parts = [_split(url) for url in urls]
        if len({one.scheme for one in parts}) > 1:
            raise ValueError("all must be redis:// or all rediss:// (with TLS)")
        return urls

    @model_validator(mode="after")
    def _check_together(self) -> RedisOptions:
        first, scheme = _split(self.url[0]), _split(self.url[0]).scheme
        if self.mode == "standalone" and len(self.url) > 1:
            raise ValueError("url: several servers are for mode: sentinel or cluster")
        if self.mode != "standalone" and scheme == "unix":
            raise ValueError(f"url: mode {self.mode} needs redis://host:port")
        if self.mode == "cluster" and self.db:
            raise ValueError("url: a cluster has database 0 only; leave the number out")
        if scheme != "rediss" and (self.tls_ca or self.tls_cert or self.tls_key):
            raise ValueError("tls_…: TLS is turned on by a url of rediss://host:port")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key belong together; give both or none")
        if first.password and self.password_file:
            raise ValueError("there is a password in url and a password_file; give one of them")
        for field in ("password_file", "sentinel_password_file", "tls_ca", "tls_cert", "tls_key"):
            path = getattr(self, field)
            try:
                with open(path or os.devnull, "rb") as file:
                    file.read(1)
            except OSError as e:
                raise ValueError(f"{field}: {path}: {e.strerror}; check the path") from e
        return self

    @property
    def nodes(self) -> list[Node]:
        """The servers, or Sentinels, that are named."""
        parts = map(_split, self.url)
        port = _PORTS[self.mode]
        return [(p.path, 0) if p.scheme == "unix" else (p.hostname or "", p.port or port)
                for p in parts]  # fmt: skip

    @property
    def db(self) -> int:
        """The number of the database."""
        first = _split(self.url[0])
        return 0 if first.scheme == "unix" else int(first.path.strip("/") or 0)

    @property
    def tls(self) -> dict[str, Any]:
        """Arguments of connections with TLS; none without."""
        if _split(self.url[0]).scheme != "rediss":
            return {}
        return {
            "ssl_ca_certs": self.tls_ca and str(self.tls_ca),
            "ssl_certfile": self.tls_cert and str(self.tls_cert),
            "ssl_keyfile": self.tls_key and str(self.tls_key),
            "ssl_check_hostname": self.tls_check_hostname,
        }

    def credentials(self) -> tuple[str, ...]:
        """User, if there is one, and password, read anew; empty without.

        Raises:
            OSError: the file cannot be read.
        """
        first = _split(self.url[0])
        password = unquote(first.password or "") or os.environ.get(PASSWORD_VARIABLE, "")
        return _pair(self.username or unquote(first.username or ""), password, self.password_file)

    def sentinel_credentials(self) -> tuple[str, ...]:
        """The same for Sentinels."""
        return _pair(self.sentinel_username or "", "", self.sentinel_password_file)


def _pair(user: str, password: str, file: Path | None) -> tuple[str, ...]:
    if file is not None:
        password = file.read_text().strip()
    return (user, password) if user else (password,) if password else ()


def _split(url: str) -> SplitResult:
    """Of a URL of a server; what is said about it does not repeat its password."""
    example = "write redis://host:6379, rediss://host:6379 or unix:///path/to/socket"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"its host or port is none; {example}") from None
    whole = parts.path.strip("/") if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in _SCHEMES or not whole:
        raise ValueError(f"is no address of a server; {example}")
    if parts.query or parts.fragment:
        raise ValueError("takes nothing behind ? or #; set that as options beside url")
    if parts.scheme != "unix" and not parts.path.strip("/").isdecimal() and parts.path.strip("/"):
        raise ValueError("ends with the number of a database, or with none: redis://host:6379/0")
    return parts


def read_options(name: str, options: Mapping[str, Any]) -> RedisOptions:
    """Those of the tier of that name.

    Raises:
        ConfigError: names the option and the remedy, and never a password.
    """
    given = {key: value for key, value in options.items() if key not in _OF_DAEMON}
    try:
        return RedisOptions.model_validate(given)
    except ValidationError as e:
        known = [f"options.{field}" for field in RedisOptions.model_fields]
        raise explain(e, f"tier {name}", "options.", known) from None
