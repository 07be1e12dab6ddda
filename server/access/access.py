"""Who may do what: tokens with roles and tenants, and what a listener must offer to be opened."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import socket
import ssl
import stat
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import yaml

from kvstore.config import ServerConfig, split_host_port
from kvstore.errors import AccessDenied, ConfigError
from kvstore.transport.credentials import checked_token

if TYPE_CHECKING:
    import grpc

_MIN_TOKEN: Final = 16
_MAX_SECRET: Final = 16 << 20
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}\Z")
_KEYS: Final = ("name", "role", "token", "sha256", "tenants")


class Role(IntEnum):
    """What a token allows; each role includes those before it."""

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
        """Refuse what needs more than this role.

        Raises:
            Denied: names both roles.
        """
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
        """Refuse a tenant out of reach.

        Raises:
            Denied: names the tenant.
        """
        if not self.sees(tenant):
            text = f"{self.name!r} may not use the tenant {tenant!r}; use its token"
            raise Denied("tenant", text)


LOCAL = Grant("local", Role.ADMIN)
"""The daemon's own user on its sockets, and everybody where no tokens are configured."""


class Access:
    """The tokens a daemon knows, and the TLS it offers. Use `load`."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._tokens: dict[bytes, Grant] = {}
        self._seen: tuple[int, ...] = ()

    @classmethod
    def load(cls, config: ServerConfig) -> Self:
        """Read the tokens and certificates, and check that every listener may be opened.

        Raises:
            ConfigError: one cannot be read or makes no sense, or a listener is not protected.
        """
        access = cls(config)
        access.reload()
        access.server_context()
        for name in ("grpc", "http", "tcp"):
            address: str | None = getattr(config, name)
            if address is not None:
                access.check_listener(name, address)
        return access

    def reload(self) -> None:
        """Read the file of tokens again; if it is no good, those known so far stay.

        Raises:
            ConfigError: it cannot be read or makes no sense.
        """
        path = self._config.tokens
        if path is not None:
            self._seen = _version(path)
            self._tokens = {grant.digest: grant for grant in _read_tokens(path)}

    def changed(self) -> bool:
        """Whether the file of tokens is another one than `reload` saw last. Asks the disk."""
        return self._config.tokens is not None and _version(self._config.tokens) != self._seen

    def forget(self) -> None:
        """Have `changed` say so, whether it is or not."""
        self._seen = (-1,)

    @property
    def has_tokens(self) -> bool:
        """Whether callers must present a token."""
        return bool(self._tokens)

    def grant(self, token: str | None) -> Grant:
        """What the bearer of `token` may do.

        Raises:
            Denied: no token was given though one is needed, or it is not known.
        """
        if not self._tokens and not token:
            return LOCAL
        if not token:
            text = "a token is needed; send `authorization: Bearer TOKEN`"
            raise Denied("token_missing", text)
        found = self._tokens.get(_digest_of(token))
        if found is None:
            text = "this token is not known here; check it, and which daemon this is"
            raise Denied("token_unknown", text)
        return found

    def knows(self, grant: Grant) -> bool:
        """Whether what was granted is still granted: its token may have been revoked since."""
        return not grant.digest or self._tokens.get(grant.digest) == grant

    # -- listeners --------------------------------------------------------------------------------

    def check_listener(self, name: str, address: str) -> None:
        """Whether `server.<name>` may listen at `address` (host:port).

        Beyond loopback, callers must be known and nobody may listen in: TLS, and tokens or client
        certificates.

        Raises:
            ConfigError: names the key and what to set.
        """
        if self._config.insecure or _is_loopback(name, address):
            return
        missing = []
        if self._config.tls_cert is None:
            missing.append("server.tls_cert and server.tls_key (TLS)")
        if not self._tokens and self._config.tls_client_ca is None:
            missing.append("server.tokens or server.tls_client_ca (so that callers are known)")
        if missing:
            raise ConfigError(
                f"server.{name}: {address} can be reached from other machines; set "
                f"{' and '.join(missing)}, or listen on 127.0.0.1, or take the risk with "
                "server.insecure (--insecure)"
            )

    def server_context(self) -> ssl.SSLContext | None:
        """TLS of the listeners (1.2 at least; mutual with `tls_client_ca`); None without TLS.

        Raises:
            ConfigError: a certificate or key is missing or unusable; names the file.
        """
        config = self._config
        if config.tls_cert is None or config.tls_key is None:
            for name in ("tls_cert", "tls_key", "tls_client_ca"):
                if getattr(config, name) is not None:
                    missing = "tls_cert" if config.tls_cert is None else "tls_key"
                    raise ConfigError(
                        f"server.{name} is set but server.{missing} is not; TLS needs both "
                        "server.tls_cert and server.tls_key"
                    )
            return None
        _check_secret("server.tls_key", config.tls_key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Without the password argument an encrypted key would ask the terminal.
            context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: "")
        except OSError as e:
            raise ConfigError(
                f"server.tls_cert {config.tls_cert} with server.tls_key {config.tls_key}: "
                f"{_reason(e)}; give a PEM chain and the key it belongs to, without a password"
            ) from e
        if config.tls_client_ca is not None:
            try:
                context.load_verify_locations(config.tls_client_ca)
            except OSError as e:
                raise ConfigError(
                    f"server.tls_client_ca {config.tls_client_ca}: {_reason(e)}; give PEM "
                    "certificates"
                ) from e
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials | None:
        """The same for gRPC, which brings its own TLS; None without TLS.

        Raises:
            ConfigError: as for `server_context`.
        """
        config = self._config
        if self.server_context() is None:  # gRPC itself says nothing of bad files until called.
            return None
        import grpc

        assert config.tls_cert is not None
        assert config.tls_key is not None
        authority = config.tls_client_ca
        return grpc.ssl_server_credentials(
            [(config.tls_key.read_bytes(), config.tls_cert.read_bytes())],
            root_certificates=None if authority is None else authority.read_bytes(),
            require_client_auth=authority is not None,
        )


def _is_loopback(name: str, address: str) -> bool:
    host, port = split_host_port(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise ConfigError(
            f"server.{name}: {host!r} is no address of this machine ({e}); write an IP address"
        ) from e
    return all(ipaddress.ip_address(str(item[4][0]).split("%")[0]).is_loopback for item in found)


def _version(path: Path) -> tuple[int, ...]:
    """Tells one content of a file from another; empty where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _check_secret(key: str, path: Path) -> None:
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


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return error.strerror or str(error)


# -- the token file -------------------------------------------------------------------------------


def _read_tokens(path: Path) -> list[Grant]:
    """The grants of all tokens in `path`. No message holds any of the file's values but names, so
    that no token gets into a log, nor does an exception that has seen them.

    Raises:
        ConfigError: names the entry and what to do.
    """
    source = f"server.tokens {path}"
    _check_secret("server.tokens", path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{source}: {e.strerror}; check the path") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)  # The error's own text quotes the line.
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise ConfigError(f"{source} is no valid YAML{where}; see `kvstore token new`") from None
    entries = content.get("tokens") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{source} must hold `tokens:` with a list of at least one entry and nothing else; "
            "`kvstore token new` makes entries"
        )
    grants: list[Grant] = []
    names: dict[str, int] = {}
    digests: dict[bytes, str] = {}
    for number, entry in enumerate(entries, 1):
        try:
            grant = _read_entry(entry)
            if grant.name in names:
                raise ValueError(f"has the name of entry {names[grant.name]}; name each once")
            if grant.digest in digests:
                raise ValueError(f"has the token of {digests[grant.digest]!r}; make a new one")
        except ValueError as e:
            name = entry.get("name") if isinstance(entry, dict) else None
            named = f" ({name!r})" if isinstance(name, str) and name else ""
            raise ConfigError(f"{source}: entry {number}{named} {e}") from None
        names[grant.name] = number
        digests[grant.digest] = grant.name
        grants.append(grant)
    return grants


def _read_entry(entry: object) -> Grant:
    """
    Raises:
        ValueError: what is wrong and the remedy, as a predicate.
    """
    if not isinstance(entry, dict):
        raise ValueError("is no map; write `name: …`, `role: …` and `sha256: …`")
    if unknown := sorted(str(key)[: _MIN_TOKEN - 1] for key in entry if key not in _KEYS):
        raise ValueError(f"has unknown keys ({', '.join(unknown)}); known: {', '.join(_KEYS)}")
    name, role = entry.get("name"), entry.get("role")
    if not isinstance(name, str) or not name:
        raise ValueError("has no name; add `name: …` to tell it from others")
    roles = [known.name.lower() for known in Role]
    if role not in roles:
        raise ValueError(f"has no valid role; write `role: ` with one of {', '.join(roles)}")
    return Grant(name, Role[role.upper()], _tenants(entry), _digest(entry))


def _digest(entry: dict[Any, Any]) -> bytes:
    token, digest = entry.get("token"), entry.get("sha256")
    if (token is None) == (digest is None):
        raise ValueError("needs either `token` or `sha256`; give one of the two")
    if digest is not None:
        if not isinstance(digest, str) or not _SHA256.match(digest):
            raise ValueError("has a `sha256` that is not 64 hex digits in quotes")
        return bytes.fromhex(digest)
    if not isinstance(token, str):
        raise ValueError("has a `token` that is no text; put it in quotes")
    if len(token) < _MIN_TOKEN:
        raise ValueError(
            f"has a `token` of {len(token)} characters; {_MIN_TOKEN} are the least, "
            "`kvstore token new` makes one"
        )
    return _digest_of(checked_token(token, "has a `token` that"))


def _digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _tenants(entry: dict[Any, Any]) -> frozenset[str] | None:
    tenants = entry.get("tenants")
    if tenants is None:
        if "tenants" in entry:
            raise ValueError("has empty `tenants`; list them, or leave the key out for all")
        return None
    if not isinstance(tenants, list) or not tenants:
        raise ValueError("has `tenants` that are no list; list them, or leave the key out for all")
    if not all(isinstance(tenant, str) for tenant in tenants):
        raise ValueError("has a tenant that is no text; put it in quotes")
    return frozenset(tenants)
