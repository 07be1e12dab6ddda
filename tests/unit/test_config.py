"""Configuration: sources and their order, and what a wrong value is answered with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import Config, format_size, load_config, parse_size
from kvstore.errors import ConfigError, KVStoreError

pytestmark = pytest.mark.usefixtures("no_settings")


def write(folder: Path, text: str) -> Path:
    path = folder / "kvstore.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        (4096, 4096),
        ("0", 0),
        ("10GiB", 10 * 2**30),
        (" 10 GiB ", 10 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("0.5MiB", 2**19),
        ("3kB", 3000),
        ("2KiB", 2048),
        ("7B", 7),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10 Gb", "unknown unit 'Gb'; use 10GB or 10GiB ('b' means bits)"),
        ("10G", "unknown unit 'G'; use 10GiB"),
        ("10gib", "unknown unit 'gib'; use 10GiB"),
        ("10KB", "unknown unit 'KB'"),
        ("-1", "'-1' is no size; write it like 10GiB"),
        (-1, "-1 is negative; write a size like 10GiB"),
        ("", "'' is no size"),
        ("ten", "'ten' is no size"),
        ("1e9", "'1e9' is no size"),
        ("0x10", "'0x10' is no size"),
        ("1 GiB extra", "is no size"),
        ("∞", "is no size"),
        (True, "True is no size"),
        (None, "None is no size"),
        (1.5, "1.5 is no size"),
    ],
)
def test_what_is_no_size_is_refused_with_the_remedy(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 * 2**30, "10 GiB"), (2**50, "1024 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_defaults() -> None:
    config = load_config()
    assert config == Config()
    assert config.address is None
    assert config.disk.path is None
    assert config.memory.size == 2**30


def test_later_sources_win_value_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path,
        "memory: {size: 1GiB, policy: lru}\ndisk: {threads: 3}\nlease_seconds: 7\nlog_level: error",
    )
    monkeypatch.setenv("KVSTORE_MEMORY__SIZE", "2GiB")
    monkeypatch.setenv("KVSTORE_LEASE_SECONDS", "8")
    monkeypatch.setenv("KVSTORE_LOG_LEVEL", "warning")
    config = load_config(path, {"log_level": "debug"})
    assert config.memory.size == 2 * 2**30, "environment over file"
    assert config.memory.policy == "lru", "the section's other values stay"
    assert config.disk.threads == 3
    assert config.lease_seconds == 8
    assert config.log_level == "debug", "flags over environment"


def test_the_file_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_CONFIG", str(write(tmp_path, "max_sessions: 5")))
    assert load_config().max_sessions == 5
    other = tmp_path / "other.yaml"
    other.write_text("max_sessions: 6")
    assert load_config(other).max_sessions == 6


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("memmory: {size: 1GiB}", ["memmory: unknown key; did you mean memory"]),
        ("memory: {sise: 1GiB}", ["memory.sise: unknown key; did you mean memory.size?"]),
        ("size: 1GiB", ["size: unknown key; did you mean"]),
        ("xyzzy: 1", ["xyzzy: unknown key; known: address, run_dir"]),
        ("1: 2", ["1: unknown key"]),
        ("memory: {1: 2}", ["memory.1: Keys should be strings"]),
        ("memory: {size: 10 Gb}", ["memory.size: '10 Gb' has the unknown unit 'Gb'", "10GiB"]),
        ("memory: {size: -5}", ["memory.size: -5 is negative"]),
        ("memory: {size: 1.5}", ["memory.size: 1.5 is no size"]),
        ("memory: {size: 1KiB}", ["memory.size:", "greater than or equal to 1048576"]),
        ("memory: 5GiB", ["memory:", "dictionary"]),
        ("memory: {policy: clock}", ["memory.policy:", "'lru' or 's3fifo'"]),
        ("memory: {prefault: maybe}", ["memory.prefault:", "boolean"]),
        ("disk: {size: 1MiB}", ["disk.size:", "greater than or equal to 4194304"]),
        ("disk: {threads: 0}", ["disk.threads:", "greater than or equal to 1"]),
        ("disk: {threads: 65}", ["disk.threads:", "less than or equal to 64"]),
        ("disk: {sync_seconds: 0}", ["disk.sync_seconds:", "greater than 0"]),
        ("session: {load_timeout: -1}", ["session.load_timeout:", "greater than 0"]),
        ("session: {load_timeout: soon}", ["session.load_timeout:", "number"]),
        ("session: {load_timeout: .nan}", ["session.load_timeout:"]),
        ("session: {start_timeout: .inf}", ["session.start_timeout:", "finite"]),
        ("linger_seconds: .inf", ["linger_seconds:", "finite"]),
        ("lease_seconds: 0", ["lease_seconds:", "greater than 0"]),
        ("max_sessions: 0", ["max_sessions:", "greater than or equal to 1"]),
        ("log_level: loud", ["log_level:", "'debug', 'info', 'warning' or 'error'"]),
        ("planner: {mode: guess}", ["planner.mode:", "'auto', 'load' or 'recompute'"]),
        ("address: localhost:80", ["address: 'localhost:80' is no address", "unix:///path"]),
        ("address: unix://relative", ["address:", "write unix:///path"]),
        ("address: unix:///", ["address:", "write unix:///path"]),
        ("- a list", ["must hold `key: value` lines"]),
        ("just text", ["must hold `key: value` lines"]),
        ("a: [", ["no valid YAML"]),
        ("a: !!python/object/apply:os.getcwd []", ["no valid YAML"]),
    ],
)
def test_a_wrong_file_is_refused_with_source_field_and_remedy(
    tmp_path: Path, text: str, messages: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"config file {path}" in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


def test_all_wrong_values_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log_level.*; memory\.size.*; disk\.threads"):
        load_config(write(tmp_path, "memory: {size: x}\ndisk: {threads: 0}\nlog_level: x"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file.*; check the path"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory; check the path"):
        load_config(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(binary)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"KVSTORE_MEMORY__SIZE": "lots"}, r"memory\.size: 'lots' is no size"),
        ({"KVSTORE_MEMORY__SISE": "1GiB"}, r"memory\.sise: unknown key; did you mean memory\.size"),
        ({"KVSTORE_MEMROY": "1GiB"}, r"memroy: unknown key"),
        ({"KVSTORE_MEMORY": "1GiB"}, r"memory: "),
        ({"KVSTORE_MEMORY": "1GiB", "KVSTORE_MEMORY__SIZE": "1GiB"}, "KVSTORE_MEMORY__SIZE contr"),
        ({"KVSTORE_MEMORY__SIZE": "1GiB", "KVSTORE_MEMORY": "1GiB"}, "KVSTORE_MEMORY contradicts"),
        ({"KVSTORE_MEMORY__SIZE__X": "1GiB"}, r"memory\.size"),
        ({"KVSTORE_": "1"}, r"unknown key"),
    ],
)
def test_a_wrong_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config()
    assert "environment KVSTORE_*" in str(caught.value)


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "memory: {size: 1GiB}")
    with pytest.raises(ConfigError, match=r"^settings: memory\.size"):
        load_config(path, {"memory": {"size": "1 Mb"}})


def test_our_errors_have_one_base() -> None:
    with pytest.raises(KVStoreError):
        load_config(None, {"nothing": 1})


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.memory.size = 1
    with pytest.raises(ValueError, match="frozen"):
        config.lease_seconds = 1


def test_paths_do_not_depend_on_where_a_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedded daemon starts in another folder than its engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(None, {"disk": {"path": "cache"}, "run_dir": "~/run"})
    assert config.disk.path == tmp_path / "cache"
    assert config.run_dir == Path("/home/someone/run")


def test_the_socket_follows_from_address_or_run_dir() -> None:
    assert load_config(None, {"address": "unix:///a/b.sock"}).socket == Path("/a/b.sock")
    assert load_config(None, {"run_dir": "/r"}).socket == Path("/r/kvstore.sock")


def test_the_run_dir_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/5")
    assert load_config().run_dir == Path("/run/user/5/kvstore")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert load_config().run_dir.name.startswith("kvstore-")


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({}, True),
        ({"session": {"lookup_timeout": 1}}, True),
        ({"planner": {"mode": "load"}}, True),
        ({"log_level": "debug"}, True),
        ({"memory": {"size": "2GiB"}}, False),
        ({"disk": {"path": "/somewhere"}}, False),
        ({"lease_seconds": 5}, False),
        ({"run_dir": "/elsewhere"}, False),
    ],
)
def test_only_what_the_daemon_is_made_of_names_it(settings: dict[str, Any], same: bool) -> None:
    assert (load_config(None, settings).instance == load_config().instance) is same


def test_a_configuration_survives_the_way_to_an_embedded_daemon() -> None:
    config = load_config(None, {"memory": {"size": "3MiB"}, "disk": {"path": "/d"}})
    assert Config.model_validate_json(config.model_dump_json()) == config
