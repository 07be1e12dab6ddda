"""Tokens, roles and tenants; what a listener must offer; TLS files."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import AccessDenied, ConfigError
from kvstore.sections import ServerConfig
from kvstore.server.access.access import Access
from kvstore.server.access.grants import LOCAL, Grant, Role
from tests.certificates import Authority, Identity

SECRET = "a-secret-of-somebody-0123456789"
OTHER = "another-secret-987654321"


def token_file(folder: Path, *entries: Any) -> Path:
    path = folder / "tokens.yaml"
    path.write_text(json.dumps({"tokens": list(entries)}))
    path.chmod(0o600)
    return path


def entry(**more: Any) -> dict[str, Any]:
    return {"name": "router", "role": "read", "token": SECRET} | more


def load(**settings: Any) -> Access:
    return Access.load(ServerConfig(**settings))


# -- tokens -----------------------------------------------------------------------------------


def test_every_token_gets_its_own_grant(tmp_path: Path) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    path = token_file(
        tmp_path,
        entry(tenants=["a", ""]),
        {"name": "ops", "role": "admin", "sha256": digest.upper()},
    )
    access = load(tokens=path)
    assert access.has_tokens
    assert access.grant(SECRET) == Grant("router", Role.READ, frozenset({"a", ""}))
    assert access.grant(OTHER) == Grant("ops", Role.ADMIN, None)
    for wrong in (None, "", SECRET[:-1], SECRET + " ", digest, "ä\udcff"):
        with pytest.raises(AccessDenied):
            access.grant(wrong)


def test_without_tokens_everybody_who_gets_in_is_local() -> None:
    access = load()
    assert not access.has_tokens
    assert access.grant(None) is LOCAL
    with pytest.raises(AccessDenied, match="not known here"):
        access.grant(SECRET)


def test_a_grant_knows_its_role_and_its_tenants() -> None:
    grant = Grant("engine", Role.WRITE, frozenset({"a"}))
    grant.check(Role.READ, "lookup")
    grant.check(Role.WRITE, "saving")
    with pytest.raises(AccessDenied, match=r"drain needs the role admin, 'engine' has write"):
        grant.check(Role.ADMIN, "drain")
    grant.check_tenant("a")
    for tenant in ("", "b", "A"):
        assert not grant.sees(tenant)
        with pytest.raises(AccessDenied, match="tenant"):
            grant.check_tenant(tenant)
    assert LOCAL.sees("any")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "tokens: List should have at least 1 item"),
        (["text"], "entry 1: must be `key: value` lines;"),
        ([entry(tokn="x")], r"entry 1 \('router'\) tokn: is no key of this"),
        ([entry(name="")], "name: String should have at least 1"),
        ([entry(name=3)], r"entry 1 name: must be a text \(in quotes\)"),
        ([entry(role="owner")], "role: must be 'peer', 'read', 'write' or 'admin'"),
        ([entry(role=None)], "role: must be 'peer', 'read', 'write' or 'admin'"),
        ([entry(role=["read"])], "role: must be 'peer', 'read', 'write' or 'admin'"),
        ([entry(token=None)], "needs either `token` or `sha256`"),
        ([entry(sha256="0" * 64)], "needs either `token` or `sha256`"),
        ([entry(token="")], "token: String should have at least 16"),
        ([entry(token=SECRET[:15])], "token: String should have at least 16"),
        ([entry(token=12345678901234567)], r"token: must be a text \(in quotes\)"),
        ([entry(token=SECRET + "\n")], "a line break or characters beyond ASCII"),
        ([entry(token=SECRET + "é")], "a line break or characters beyond ASCII"),
        ([entry(token=SECRET + " " + SECRET)], "a space, a line break"),
        ([entry(token=None, sha256=SECRET)], "64 hex digits"),
        ([entry(token=None, sha256=10**63)], r"sha256: must be a text \(in quotes\)"),
        ([entry(tenants=None)], "tenants: must be a list"),
        ([entry(tenants=[])], "tenants: List should have at least 1 item"),
        ([entry(tenants="a")], "tenants: must be a list"),
        ([entry(tenants=[1])], r"tenants 0: must be a text \(in quotes\)"),
        ([entry(), entry(token=OTHER)], r"entry 2 \('router'\) has the name of entry 1"),
        ([entry(), entry(name="two")], r"entry 2 \('two'\) has the token of 'router'"),
    ],
)
def test_a_wrong_entry_is_named_and_no_token_is_shown(
    tmp_path: Path, entries: list[Any], message: str
) -> None:
    path = token_file(tmp_path, *entries)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tokens=path)
    assert str(path) in str(caught.value)
    assert "`kvstore token new` makes" in str(caught.value)
    assert SECRET[:15] not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"tokens: [{{name: a, token: {SECRET}", r"no valid YAML in line 1"),
        (f"tokens:\n- {SECRET}: {{", r"no valid YAML in line \d"),
        (f"tokens: [{{token: {SECRET}, at: 2026-99-99}}]", "no valid YAML"),
        (f"tokens: [{SECRET}, {'[' * 5000}", "no valid YAML"),
        (f"{'[' * 5000}{SECRET}{']' * 5000}", "no valid YAML"),
        ("", "the file: must be `key: value` lines;"),
        ("[]", "the file: must be `key: value` lines;"),
        (f"tokens: []\nother: {SECRET}", "other: is no key of this"),
        (f"tokens:\n- {SECRET}: 1", "a-secret-of-som: is no key of this"),
        (f"tokens: {SECRET}", "tokens: must be a list"),
    ],
)
def test_a_file_that_is_no_token_file_is_refused_without_quoting_it(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tokens=path)
    assert SECRET not in str(caught.value)


def test_secrets_that_others_can_read_or_change_are_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, entry())
    for mode in (0o600, 0o400, 0o640, 0o440):
        path.chmod(mode)
        load(tokens=path)
    for mode in (0o644, 0o604, 0o660, 0o602, 0o777):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 0600"):
            load(tokens=path)
    with pytest.raises(ConfigError, match="No such file"):
        load(tokens=tmp_path / "none")
    with pytest.raises(ConfigError, match="is no file"):
        load(tokens=tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_secrets_of_another_user_are_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, entry())
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        load(tokens=path)


# -- listeners --------------------------------------------------------------------------------


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Authority(tmp_path).issue("server")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "[::1]:7420", "localhost:0"])
def test_loopback_needs_nothing(address: str) -> None:
    load(grpc=address, http=address, tcp=address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7", "[fe80::1]:7"])
@pytest.mark.parametrize("face", ["grpc", "http", "tcp"])
def test_beyond_loopback_needs_tls_and_known_callers(
    address: str, face: str, tmp_path: Path, identity: Identity
) -> None:
    tokens = token_file(tmp_path, entry())
    tls = {"tls_cert": identity.cert, "tls_key": identity.key}
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, r"server\.tls_cert.*and server\.tokens or server\.tls_client_ca"),
        ({"tokens": tokens}, r"set server\.tls_cert and server\.tls_key"),
        (tls, r"set server\.tokens or server\.tls_client_ca"),
    ]
    for settings, message in refused:
        with pytest.raises(ConfigError, match=message) as caught:
            load(**settings, **{face: address})
        assert f"server.{face}: {address}" in str(caught.value)
        assert "--insecure" in str(caught.value)
    load(**{face: address}, insecure=True)
    load(**{face: address}, **tls, tokens=tokens)
    load(**{face: address}, **tls, tls_client_ca=tmp_path / "authority.pem")


def test_a_host_that_does_not_resolve_is_named() -> None:
    with pytest.raises(ConfigError, match=r"server\.tcp: 'no\.such\.invalid'"):
        load(tcp="no.such.invalid:1")


# -- TLS --------------------------------------------------------------------------------------


def test_tls_is_built_as_configured(tmp_path: Path, identity: Identity) -> None:
    tls: dict[str, Any] = {"tls_cert": identity.cert, "tls_key": identity.key}
    assert load().server_context() is None
    assert load().grpc_credentials() is None
    one_way = load(**tls).server_context()
    assert one_way is not None
    assert one_way.minimum_version is ssl.TLSVersion.TLSv1_2
    assert one_way.verify_mode is ssl.CERT_NONE
    mutual = load(**tls, tls_client_ca=tmp_path / "authority.pem")
    context = mutual.server_context()
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert mutual.grpc_credentials() is not None


def test_unusable_certificates_are_named(tmp_path: Path, identity: Identity) -> None:
    foreign = Authority(tmp_path, "foreign").issue("foreign-server")
    empty = tmp_path / "empty.pem"
    empty.touch(0o600)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tls_cert": identity.cert}, r"server\.tls_cert is set but server\.tls_key is not"),
        ({"tls_key": identity.key}, r"server\.tls_key is set but server\.tls_cert is not"),
        ({"tls_client_ca": identity.cert}, r"server\.tls_client_ca is set but server\.tls_cert"),
        ({"tls_cert": identity.cert, "tls_key": tmp_path / "no"}, r"tls_key .*/no: No such file"),
        ({"tls_cert": tmp_path / "no", "tls_key": identity.key}, r"tls_cert .*/no .*No such file"),
        ({"tls_cert": identity.cert, "tls_key": foreign.key}, r"foreign-server\.key: key values"),
        ({"tls_cert": empty, "tls_key": identity.key}, r"empty\.pem"),
        (
            {"tls_cert": identity.cert, "tls_key": identity.key, "tls_client_ca": empty},
            r"tls_client_ca .*empty\.pem",
        ),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            load(**settings)
    identity.key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"server\.tls_key .* mode 0644"):
        load(tls_cert=identity.cert, tls_key=identity.key)
