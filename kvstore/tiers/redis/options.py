"""What can be set of a Redis tier, checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import BeforeValidator, Field, FilePath
from pydantic import model_validator as checks

from kvstore.sections import Count, Name, Seconds
from kvstore.tiers.options import TierOptions

PASSWORD_VARIABLE: Final = "KVSTORE_REDIS_PASSWORD"

Node = tuple[str, int]
"""Host and port of a server; of one on a socket its path, and 0."""

_EXAMPLE: Final = "write redis://host:6379, rediss://host:6379 or unix:///path/to/socket"

Urls = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1, max_length=64, repr=False),
]


class RedisOptions(TierOptions):
    """`options` of a tier of this kind; docs/tiers.md says what they mean."""

    url: Urls
    mode: Literal["standalone", "sentinel", "cluster"] = "standalone"
    master: Name = "mymaster"
    prefix: str = Field("kvstore:", pattern=r"^[!-z|~]{0,64}$")
    ttl: Count | None = Field(None, ge=1, le=10 * 366 * 86400)
    connections: Count = Field(2, ge=1, le=16)
    timeout: Seconds = 2.0
    username: Name | None = None
    password_file: FilePath | None = None
    sentinel_username: Name | None = None
    sentinel_password_file: FilePath | None = None
    tls_ca: FilePath | None = None
    tls_cert: FilePath | None = None
    tls_key: FilePath | None = None
    tls_check_hostname: bool = True

    @checks(mode="after")
    def _check_together(self) -> RedisOptions:
        parts = [_split(url) for url in self.url]
        tls = self.tls_ca or self.tls_cert or self.tls_key
        wrong = {
            "url: all must be redis://, or all rediss://": len({p.scheme for p in parts}) > 1,
            "url: several are for mode: sentinel or cluster": self.mode == "standalone"
            and len(parts) > 1,
            f"url: mode {self.mode} needs redis://host:port": self.mode != "standalone"
            and parts[0].scheme == "unix",
            "url: a cluster has database 0 only; leave the number out": self.mode == "cluster"
            and self.db,
            "tls_…: TLS is turned on by a url of rediss://host:port": tls
            and parts[0].scheme != "rediss",
            "tls_cert and tls_key belong together; give both": bool(self.tls_cert)
            != bool(self.tls_key),
            "a password stands in url and in password_file; give one of them": parts[0].password
            and self.password_file,
        }
        if found := next((text for text, so in wrong.items() if so), None):
            raise ValueError(found)
        return self

    @property
    def nodes(self) -> list[Node]:
        """The servers, or Sentinels, that are named."""
        port = 26379 if self.mode == "sentinel" else 6379
        return [
            (p.path, 0) if p.scheme == "unix" else (p.hostname or "", p.port or port)
            for p in map(_split, self.url)
        ]

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
        files = {"ca_certs": self.tls_ca, "certfile": self.tls_cert, "keyfile": self.tls_key}
        given = {f"ssl_{name}": path and str(path) for name, path in files.items()}
        return given | {"ssl_check_hostname": self.tls_check_hostname}

    def credentials(self, *, sentinel: bool = False) -> tuple[str, ...]:
        """User, if there is one, and password, read anew; empty without. May raise OSError."""
        first, file, user = _split(self.url[0]), self.password_file, self.username
        password = unquote(first.password or "") or os.environ.get(PASSWORD_VARIABLE, "")
        user = user or unquote(first.username or "")
        if sentinel:
            file, user, password = self.sentinel_password_file, self.sentinel_username, ""
        if file is not None:
            password = Path(file).read_text().strip()
        return (user, password) if user else (password,) if password else ()


def _split(url: str) -> SplitResult:
    """Of a URL of a server; what is said about it does not repeat its password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"url: its host or port is none; {_EXAMPLE}") from None
    path = parts.path.strip("/")
    whole = path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not whole:
        raise ValueError(f"url: it is no address of a server; {_EXAMPLE}")
    if parts.query or parts.fragment:
        raise ValueError("url: it takes nothing behind ? or #; set that as options beside url")
    if parts.scheme != "unix" and path and not path.isdecimal():
        raise ValueError("url: it may end with the number of a database: redis://host:6379/0")
    return parts
