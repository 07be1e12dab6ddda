"""The tokens a daemon knows, and what a listener must offer to be opened."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kvstore.errors import ConfigError
from kvstore.server.access.grants import LOCAL, Denied, Grant
from kvstore.server.access.tokens import check_secret, digest_of, read_tokens
from kvstore.transport.credentials import certify, tls_problem
from kvstore.values import split_host_port

if TYPE_CHECKING:
    import grpc

    from kvstore.sections import ServerConfig


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
            self._tokens = {grant.digest: grant for grant in read_tokens(path)}

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
            text = "a token is needed: KVSTORE_TOKEN, --token-file or `authorization: Bearer …`"
            raise Denied("token_missing", text)
        found = self._tokens.get(digest_of(token))
        if found is None:
            text = "this token is not known here; check it, and which daemon this is"
            raise Denied("token_unknown", text)
        return found

    def bearer(self, header: str | None) -> Grant:
        """What the sender of a header `authorization` may do. Raises Denied: as for `grant`."""
        scheme, _, token = (header or "").partition(" ")
        return self.grant(token.strip() if scheme.lower() == "bearer" else None)

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
        if self._config.insecure:
            return
        host, port = split_host_port(address)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as e:
            raise ConfigError(
                f"server.{name}: {host!r} is no address of this machine ({e}); write an IP address"
            ) from e
        if all(is_loopback(str(item[4][0])) for item in found):
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
        authority = config.tls_client_ca
        if authority is not None and config.tls_cert is None:
            text = "server.tls_client_ca is set but server.tls_cert is not"
            raise ConfigError(f"{text}; TLS needs server.tls_cert and server.tls_key")
        if config.tls_cert is None and config.tls_key is None:
            return None
        if config.tls_key is not None:
            check_secret("server.tls_key", config.tls_key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certify(context, "server", config.tls_cert, config.tls_key)
        if authority is not None:
            try:
                context.load_verify_locations(authority)
            except OSError as e:
                text = f"server.tls_client_ca {authority}: {tls_problem(e)}"
                raise ConfigError(f"{text}; give PEM certificates") from e
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


def is_loopback(host: str) -> bool:
    """Whether it is an address of loopback, also IPv4 by way of a listener at [::]."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return False


def _version(path: Path) -> tuple[int, ...]:
    """Tells one content of a file from another; empty where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
