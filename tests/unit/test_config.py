"""Configuration: sources and their order, and what a wrong value is answered with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import Config
from kvstore.errors import ConfigError, KVStoreError
from kvstore.sources import load_config
from kvstore.values import format_size, parse_size, split_host_port
from tests.unit.test_deploy import keys_of

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
        (
            "memory: {size: 1KiB}",
            ["memory.size:", "must be greater than or equal to 1 MiB (1048576 bytes)"],
        ),
        ("memory: 5GiB", ["memory: must be `key: value` lines"]),
        ("memory: {policy: clock}", ["memory.policy:", "'lru', 's3fifo' or 'forecast'"]),
        ("memory: {prefault: maybe}", ["memory.prefault: must be a boolean"]),
        ("server: {grpc: 99999}", ["server.grpc: must be a text (in quotes)"]),
        ("server:\n\tgrpc: none", ["line 2, column 1: found", "indent with spaces"]),
        ("a: [1,\nb: 2}", ["no valid YAML: line 2, column 5: expected"]),
        ("disk: {size: 1MiB}", ["disk.size:", "greater than or equal to 4 MiB (4194304 bytes)"]),
        ("disk: {threads: 0}", ["disk.threads:", "greater than or equal to 1"]),
        ("disk: {threads: 65}", ["disk.threads:", "less than or equal to 64"]),
        ("disk: {sync_seconds: 0}", ["disk.sync_seconds:", "greater than or equal to 0.001"]),
        (
            "session: {load_timeout: -1}",
            ["session.load_timeout:", "greater than or equal to 0.001"],
        ),
        ("session: {load_timeout: soon}", ["session.load_timeout:", "number"]),
        ("session: {load_timeout: .nan}", ["session.load_timeout:"]),
        ("session: {start_timeout: .inf}", ["session.start_timeout:", "finite"]),
        ("linger_seconds: .inf", ["linger_seconds:", "finite"]),
        ("lease_seconds: 0", ["lease_seconds:", "greater than or equal to 0.001"]),
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
        ("log_level: debug\nlog_level: error", ["'log_level' is given twice", "line 2"]),
        ("memory: {size: 1GiB, 'size': 2GiB}", ["'size' is given twice"]),
        ("disk: {}\ndisk: {}", ["'disk' is given twice"]),
        ("a: " + "[" * 2000, ["nested too deeply"]),
        ("max_sessions: " + "9" * 5000, ["no valid YAML", "4300 digits"]),
        ("log_level: 2026-99-99", ["no valid YAML", "month"]),
        ("a: " + "x" * (1 << 20), ["larger than 1 MiB"]),
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
    for theirs in ("Input should", "Value error", "unicode string"):
        assert theirs not in str(caught.value)


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


def test_a_wrong_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_MEMORY__SIZE", "lots")
    with pytest.raises(
        ConfigError, match=r"^environment KVSTORE_\*: memory\.size: 'lots' is no size"
    ):
        load_config()


def test_what_kubernetes_injects_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a Pod finds it beside Services of these names."""
    for service in ("KVSTORE", "KVSTORE_NODE", "KVSTORE_SERVER", "KVSTORE_MEMORY", "KVSTORE_DISK"):
        link = f"{service}_PORT_7420_TCP"
        injected = {
            f"{service}_SERVICE_HOST": "10.96.0.7",
            f"{service}_SERVICE_PORT": "7420",
            f"{service}_SERVICE_PORT_GRPC": "7420",
            f"{service}_PORT": "tcp://10.96.0.7:7420",
            link: "tcp://10.96.0.7:7420",
            f"{link}_PROTO": "tcp",
            f"{link}_PORT": "7420",
            f"{link}_ADDR": "10.96.0.7",
        }
        for name, value in injected.items():
            monkeypatch.setenv(name, value)
    for name in ("KVSTORE_", "KVSTORE_NAME", "KVSTORE_ENV_GPG_KEY"):
        monkeypatch.setenv(name, "1")
    assert load_config() == Config()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KVSTORE_MEMORY__SISE", "KVSTORE_MEMORY__SIZE"),
        ("KVSTORE_MEMORY_SIZE", "KVSTORE_MEMORY__SIZE"),
        ("KVSTORE_MEMORY__SIZE__", "KVSTORE_MEMORY__SIZE"),
        ("KVSTORE_ADRESS", "KVSTORE_ADDRESS"),
        ("KVSTORE_LOGLEVEL", "KVSTORE_LOG_LEVEL"),
        ("KVSTORE_SESSION_LOAD_TIMEOUT", "KVSTORE_SESSION__LOAD_TIMEOUT"),
        ("KVSTORE_MEMORY", "KVSTORE_MEMORY__"),
    ],
)
def test_a_near_miss_in_the_environment_is_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, meant: str
) -> None:
    monkeypatch.setattr("kvstore.sources._suggested", set())
    monkeypatch.setenv(name, "8GiB")
    assert load_config() == load_config() == Config()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name} is no setting")
    assert meant in record.getMessage()


def test_tenants_in_the_environment_keep_their_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_QUOTAS__Team-A__MEMORY", "1GiB")
    monkeypatch.setenv("KVSTORE_QUOTAS__a__b__DISK", "none")
    assert load_config(None, {"quotas": {"a__b": {"memory": 1}}}).model_dump()["quotas"] == {
        "Team-A": {"memory": 2**30, "disk": None},
        "a__b": {"memory": 1, "disk": None},
    }


def test_the_environment_has_rules_for_tiers_that_come_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVSTORE_QUOTAS__a__far", "1GiB")
    monkeypatch.setenv("KVSTORE_ADMISSION__FAR", "none")
    tiers = [{"kind": "x", "name": "far"}]
    in_file = load_config(write(tmp_path, "tiers: [{kind: x, name: far}]"))
    for config in (in_file, load_config(None, {"tiers": tiers})):
        assert config.quotas["a"].limits["far"] == 2**30
        assert config.admission.below["far"] == "none"
    with pytest.raises(ConfigError, match=r"^environment KVSTORE_\*: admission.far: there is no"):
        load_config(None, {"memory": {"size": "1GiB"}})


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ([{"kind": "my_kind"}], "tiers.0.name: must have a-z, 0-9 and -, at most 32 of them"),
        (
            [
                {"kind": "slab", "options": {"path": "/d"}},
                {"kind": "slab", "name": "b", "options": {"path": "/d/../d"}},
            ],
            "tiers: 'disk' and 'b' lie in one folder; give each a path of its own",
        ),
    ],
)
def test_what_is_wrong_with_tiers_is_said_in_plain_words(tiers: list[Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(None, {"tiers": tiers})


def test_the_environment_can_say_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "address: tcp://a:1\ndisk: {path: /d}\nserver: {grpc: 'a:1', group: g, tokens: /t}",
    )
    for name in ("ADDRESS", "DISK__PATH", "SERVER__GRPC", "SERVER__GROUP", "SERVER__TOKENS"):
        monkeypatch.setenv(f"KVSTORE_{name}", "none")
    config = load_config(path)
    assert (config.address, config.disk.path) == (None, None)
    assert config.server.model_dump(include={"grpc", "group", "tokens"}) == dict.fromkeys(
        ("grpc", "group", "tokens")
    )


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "memory: {size: 1GiB}")
    with pytest.raises(ConfigError, match=r"^settings: memory\.size"):
        load_config(path, {"memory": {"size": "1 Mb"}})


NUL, SURROGATE = "a\0b", "a\udcffb"
NO_TEXT = [NUL, SURROGATE]
NO_NUMBER = ["", "ten", "\uff13", "\u0663", True, None, [], {}, "nan", "inf", ".", "1e400", "1 s"]
NO_SIZE = [*NO_NUMBER, 1.5, -1, "-1", "1GB\uff13", "10 Gb", 1 << 70, "9" * 500, "9" * 20 + "TiB"]
NO_SECONDS = [*NO_NUMBER, 0, -1, "1e-9", 604801, "9" * 500]
NO_PATH = [*NO_TEXT, "", 5, True, [], "~nobody-at-all/x"]
NO_LISTENER = [
    NUL, 5, True, [], "7420", ":7420", "localhost", "localhost:", "localhost:x", "localhost:65536",
    "localhost:-1", "localhost:\u0667\u0664", "localhost:\uff17", "::1:7422", "fe80::1:7422", "::1",
    "[::1]", "[localhost]:80", "[]:80", "a b:80", "a..b:80", "." * 5 + ":80", "x" * 64 + ".org:80",
    "b\u00fccher.example:80", "a/b:80", "user@host:80", SURROGATE + ":80", "localhost:080808080",
]  # fmt: skip
NO_ADDRESS = [
    *(value if not isinstance(value, str) else f"tcp://{value}" for value in NO_LISTENER),
    "", "tcp://", "tcp://host:0", "tls://::1:7422", "http://host:80", "unix://", "unix:///",
    "unix://relative", f"unix:///{NUL}", f"unix:///{SURROGATE}", "/run/kvstore.sock",
]  # fmt: skip
NO_NODE = [*NO_ADDRESS, "unix:///run/kvstore.sock"]
NO_NAME = [*NO_TEXT, "", "x" * 257, 5, True, []]
NO_CHOICE = ["", "ALL", "lru ", "\uff4cru", NUL, 5, True, None, []]
NO_FLAG = ["", "maybe", 2, "\uff11", None, [], 0.5]
NO_TENANTS = ["a", 5, True, {"a": 1}, [5], [NUL], [SURROGATE], ["x" * 4097]]
NO_QUOTAS: list[Any] = [
    "a", 5, ["a"], {"a": 5}, {"a": {"size": 1}}, {NUL: {}}, {SURROGATE: {}}, {"x" * 4097: {}},
    *({"a": {"memory": value}} for value in NO_SIZE if value is not None),
    *({"a": {"disk": value}} for value in NO_SIZE if value is not None),
]  # fmt: skip

WRONG: dict[str, list[Any]] = {
    "address": NO_ADDRESS,
    "run_dir": [*NO_PATH, None],
    "lease_seconds": NO_SECONDS,
    "linger_seconds": [value for value in NO_SECONDS if value not in (0, "1e-9")],
    "max_sessions": [*NO_NUMBER, 0, -1, 1.5, 65537],
    "log_level": NO_CHOICE,
    "memory.size": [*NO_SIZE, 0, "1023KiB", "1025TiB"],
    "memory.chunk": [*NO_SIZE, 1, 4095, 6000, "2GiB"],
    "memory.policy": NO_CHOICE,
    "memory.huge_dir": NO_PATH,
    "memory.prefault": NO_FLAG,
    "memory.path": NO_PATH,
    "memory.max_pinned": [*NO_NUMBER, -0.1, 1.1],
    "disk.path": NO_PATH,
    "disk.size": [*NO_SIZE, 0, "4095KiB", "1025TiB"],
    "disk.chunk": [*NO_SIZE, 1, 4095, 6000, "20GiB"],
    "disk.policy": NO_CHOICE,
    "disk.threads": [*NO_NUMBER, 0, -1, 1.5, 65],
    "disk.queue": [*NO_SIZE, 0],
    "disk.sync_seconds": NO_SECONDS,
    "disk.retry_seconds": NO_SECONDS,
    "disk.stall_seconds": NO_SECONDS,
    "disk.write_rate": [*NO_SIZE, "2000TiB"],
    "disk.read_rate": [*NO_SIZE, "2000TiB"],
    "peers.nodes": [5, True, {}, "tcp://host:7422", *([value] for value in NO_NODE)],
    "peers.dns": NO_LISTENER,
    "peers.directory": NO_NAME,
    "peers.address": NO_NODE,
    "peers.token_file": NO_PATH,
    "peers.tls_ca": NO_PATH,
    "peers.tls_cert": NO_PATH,
    "peers.tls_key": NO_PATH,
    "peers.tls_name": NO_NAME,
    "peers.streams": [*NO_NUMBER, 0, -1, 1.5, 17],
    "peers.probe_seconds": NO_SECONDS,
    "peers.max_serving": [*NO_SIZE, 0],
    "peers.copies": NO_CHOICE,
    "disk.codec": NO_CHOICE,
    "peers.transport": NO_CHOICE,
    "peers.queue": [*NO_SIZE, 0],
    "peers.retry_seconds": NO_SECONDS,
    "peers.stall_seconds": NO_SECONDS,
    "peers.write_rate": [*NO_SIZE, "2000TiB"],
    "peers.read_rate": [*NO_SIZE, "2000TiB"],
    "session.lookup_timeout": NO_SECONDS,
    "session.load_timeout": NO_SECONDS,
    "session.save_timeout": NO_SECONDS,
    "session.connect_timeout": NO_SECONDS,
    "session.start_timeout": NO_SECONDS,
    "session.retry_max": NO_SECONDS,
    "session.copy_threads": [*NO_NUMBER, 0, -1, 1.5, 65],
    "session.head_shards": [*NO_NUMBER, -1, 1.5, 257],
    "session.gpu_path": NO_CHOICE,
    "session.gpu_staging": [*NO_SIZE, "9GiB"],
    "session.checksum": NO_FLAG,
    "session.token_file": NO_PATH,
    "session.daemon_user": [value for value in NO_NAME if value != 5],
    "session.tls_ca": NO_PATH,
    "session.tls_cert": NO_PATH,
    "session.tls_key": NO_PATH,
    "session.streams": [*NO_NUMBER, 0, -1, 1.5, 17],
    "session.congestion": NO_NAME,
    "session.publish_tokens": NO_FLAG,
    "planner.mode": NO_CHOICE,
    "server.name": [*NO_NAME, None],
    "server.grpc": NO_LISTENER,
    "server.http": NO_LISTENER,
    "server.tcp": NO_LISTENER,
    "server.insecure": NO_FLAG,
    "server.tls_cert": NO_PATH,
    "server.tls_key": NO_PATH,
    "server.tls_client_ca": NO_PATH,
    "server.tokens": NO_PATH,
    "server.group": NO_NAME,
    "server.max_token_sessions": [*NO_NUMBER, 0, -1, 1.5, 65537],
    "server.max_held": [*NO_NUMBER, -0.1, 1.1],
    "server.max_labels": [*NO_NUMBER, -1, 1.5, 10_001],
    "server.stop_timeout": NO_SECONDS,
    "server.congestion": NO_NAME,
    "server.max_requests": [*NO_NUMBER, 0, -1, 1.5, 65537],
    "server.trace_file": NO_PATH,
    "server.trace_size": [*NO_SIZE, 0, "1KiB"],
    "admission.memory": NO_CHOICE,
    "admission.disk": NO_CHOICE,
    "admission.denied_tenants": NO_TENANTS,
    "quotas": NO_QUOTAS,
    "tiers": [
        "a",
        5,
        {"a": 5},
        [5],
        [{"kind": ""}],
        [{"kind": NUL}],
        [{"options": {}}],
        [{"kind": "x", "options": 5}],
        [{"kind": "x", "else": 5}],
        [{"kind": "x", "write": "some"}],
        [{"kind": "x", "promote": "far"}],
        [{"kind": "x"}, {"kind": "x"}],
        [{"kind": "slab"}, {"kind": "slab"}],
        [{"kind": "slab", "options": 5}],
    ],
}
"""What each setting must refuse. A new one needs a line here."""


def test_every_setting_has_its_wrong_values() -> None:
    assert set(WRONG) == set(keys_of(Config))


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_key(key: str) -> None:
    *sections, leaf = key.split(".")
    for value in WRONG[key]:
        overrides: dict[str, Any] = {leaf: value}
        for section in sections:
            overrides = {section: overrides}
        with pytest.raises(ConfigError) as caught:
            pytest.fail(f"{value!r:.80} gives {load_config(None, overrides)}")
        told = str(caught.value)
        assert told.startswith(f"settings: {key}"), value
        assert len(told.splitlines()) == 1
        assert len(told) < 1000, value


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:7420", "127.0.0.1", 7420),
        ("localhost:0", "localhost", 0),
        ("node-7.example.org.:80", "node-7.example.org.", 80),
        ("a_b:080", "a_b", 80),
        ("[::]:7422", "::", 7422),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("[::ffff:127.0.0.1]:65535", "::ffff:127.0.0.1", 65535),
    ],
)
def test_addresses(address: str, host: str, port: int) -> None:
    assert split_host_port(address) == (host, port)
    assert load_config(None, {"server": {"tcp": address}}).server.tcp == address


def test_a_chunk_fits_its_space_and_both_its_index() -> None:
    for size, chunk in (("1MiB", "1MiB"), ("16GiB", 4096), ("1024TiB", "256MiB"), ("1024TiB", 0)):
        assert load_config(None, {"memory": {"size": size, "chunk": chunk}}).memory
    with pytest.raises(ConfigError, match="multiple of 4096 from 262144 to the size, or 0"):
        load_config(None, {"disk": {"size": "1TiB", "chunk": "64KiB"}})


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
