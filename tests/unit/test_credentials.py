"""Tokens and TLS of clients: where they come from, and what is said when they do not."""

from __future__ import annotations

import ssl
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.connection import target
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.sources import load_config
from kvstore.transport.credentials import client_context, client_token
from tests.certificates import Authority


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_TOKEN", raising=False)


def config(**session: Any) -> Config:
    return load_config(overrides={"session": {k: str(v) for k, v in session.items()}})


def test_without_a_token_there_is_none() -> None:
    assert client_token(config()) == ""


def test_a_token_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("  from-the-file\n")
    assert client_token(config(token_file=file)) == "from-the-file"
    monkeypatch.setenv("KVSTORE_TOKEN", "from-the-environment\n")
    assert client_token(config(token_file=file)) == "from-the-environment"
    assert client_token(config()) == "from-the-environment"
    monkeypatch.setenv("KVSTORE_TOKEN", " ")
    assert client_token(config(token_file=file)) == "from-the-file"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"\n", "is empty"),
        (b"secret\xff\xfe", "the token"),
        (b"secret\nsecond", "a line break"),
        ("secret-é".encode(), "beyond ASCII"),
        (b"secret and more", "a space"),
        (b"secret\x00\x1b", "the token alone"),
    ],
)
def test_a_token_that_cannot_be_sent_is_refused_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, says: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    ways: list[tuple[str, Callable[[], object]]] = [
        ("session.token_file", lambda: client_token(config(token_file=file))),
        ("session.token_file", lambda: target("localhost:1", config(token_file=file), None)),
    ]
    if content is not None and b"s" in content and b"\xff" not in content:
        text = content.decode()
        ways.append(("token", lambda: target("localhost:1", config(), text)))
        if "\0" not in text:
            monkeypatch.setenv("KVSTORE_TOKEN", text)
            ways = [("KVSTORE_TOKEN", lambda: client_token(config())), ways[-1]]
    for source, way in ways:
        with pytest.raises(ConfigError, match=says) as e:
            way()
        assert source in str(e.value)
        shown = "".join(traceback.format_exception(e.value))
        assert "secret" not in "\n".join(
            line for line in shown.splitlines() if not line.startswith("    ")
        )


def test_contexts_check_names_and_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    mine = authority.issue("client")
    for session in ({}, {"tls_ca": authority.path, "tls_cert": mine.cert, "tls_key": mine.key}):
        context = client_context(config(**session).session)
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("missing", ["tls_ca", "tls_cert", "tls_key"])
def test_files_that_are_not_there_are_named(tmp_path: Path, missing: str) -> None:
    authority = Authority(tmp_path)
    mine = authority.issue("client")
    files = {"tls_ca": authority.path, "tls_cert": mine.cert, "tls_key": mine.key}
    gone = files[missing]
    gone.unlink()
    with pytest.raises(ConfigError, match=str(gone)) as e:
        client_context(config(**files).session)
    assert "; give " in str(e.value)


@pytest.mark.parametrize("only", ["tls_cert", "tls_key"])
def test_a_certificate_needs_its_key(tmp_path: Path, only: str) -> None:
    with pytest.raises(ConfigError, match="TLS needs both"):
        client_context(config(**{only: tmp_path / "file"}).session)
