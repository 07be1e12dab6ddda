"""The API's committed messages, its clients' methods, and values on their way in and out."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message_factory import GetMessageClass

import kvstore.api
import kvstore.client
from kvstore.api import v1
from kvstore.api.client import AsyncOrchestrator, Orchestrator
from kvstore.api.connection import target
from kvstore.api.convert import SERVICE, duration, namespace_message, namespace_of, timestamp
from kvstore.api.errors import RequestRefused
from kvstore.api.verbs import VERBS
from kvstore.blocks.keys import Media
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import ConfigError, SpecError
from kvstore.server.cli.options import limit_option, parse_duration
from kvstore.server.cli.output import plain
from kvstore.server.control.errors import CODES
from kvstore.sources import load_config

ROOT = Path(__file__).parents[2]
BY_NAME = {verb.name: verb for verb in VERBS}
API_GUIDE = (ROOT / "docs" / "api.md").read_text()
METHODS = [m.name for m in v1.DESCRIPTOR.services_by_name["Orchestrator"].methods]


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def test_what_is_committed_is_what_protoc_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.generate(tmp_path)
    committed = Path(kvstore.api.__file__).parent
    fresh, kept = (
        FileDescriptorSet.FromString((folder / "v1.binpb").read_bytes())
        for folder in (tmp_path, committed)
    )
    assert fresh == kept, "run `make proto`"
    assert (tmp_path / "v1.pyi").read_text() == (committed / "v1.pyi").read_text(), (
        "run `make proto`"
    )


def test_the_types_promise_what_is_there() -> None:
    text = Path(kvstore.api.__file__).with_name("v1.pyi").read_text()
    for name in re.findall(r"^(?:class )?(\w+)[(:]", text, re.MULTILINE):
        assert hasattr(v1, name), name
    assert v1.Operation.State.Value("STATE_DONE") == v1.Operation.STATE_DONE


def test_reasons_of_refusals_are_those_that_are_documented() -> None:
    rows = re.findall(r"^\| ([A-Z_, ]+) \| (`.*?) \| `\w+` \|$", API_GUIDE, re.MULTILINE)
    told = {
        reason: codes for codes, reasons in rows for reason in re.findall("`([A-Z_]+)`", reasons)
    }
    reasons = {reason: code.name for code, those in CODES.items() for reason in those}
    assert told.keys() == reasons.keys()
    assert all(code in told[reason].split(", ") for reason, code in reasons.items())


@pytest.mark.parametrize("kind", [Orchestrator, AsyncOrchestrator])
def test_clients_have_every_verb(kind: type[Any]) -> None:
    assert sorted(verb.rpc for verb in VERBS) == sorted(METHODS)
    for method in METHODS:
        function = getattr(kind, snake(method))
        assert inspect.isfunction(function)
        assert function.__doc__
        assert next(iter(inspect.signature(function).parameters)) == "self"


def test_the_older_name_of_the_clients_goes_on_working() -> None:
    assert kvstore.client.Orchestrator is Orchestrator
    assert kvstore.client.AsyncOrchestrator is AsyncOrchestrator
    assert not hasattr(kvstore.client, "Other")


def test_requests_are_of_the_type_that_the_method_takes() -> None:
    somewhere: dict[str, Any] = {"namespace": "abcdef", "keys": [bytes(32)]}
    arguments: dict[str, dict[str, Any]] = {
        "lookup": somewhere,
        "explain": somewhere,
        "prefetch": somewhere,
        "pin": somewhere | {"ttl": 1, "owner": "me"},
        "set_ttl": {"ttl": 5, "everything": True},
        "move": {"to": "disk", "everything": True},
        "copy": {"to": "disk", "everything": True},
        "compress": {"codec": "raw", "everything": True},
        "set_quota": {"tenant": "t", "limits": {}},
    } | {name: {"operation": "1"} for name in ("check_finish", "watch", "cancel")}
    for method in v1.DESCRIPTOR.services_by_name["Orchestrator"].methods:
        name = snake(method.name)
        call = BY_NAME[name].call(**arguments.get(name, {}))
        assert call.method == method.name
        assert call.request.DESCRIPTOR is method.input_type
        assert call.reply is GetMessageClass(method.output_type)


def test_choices_become_selections() -> None:
    namespace = Namespace(ModelIdentity("m"), "t", 16)
    request = (
        BY_NAME["clear"]
        .call(
            namespace=namespace, tenant="", tier="disk", older_than=1.5, unused_for=60, dry_run=True
        )
        .request
    )
    assert isinstance(request, v1.ClearRequest)
    chosen = request.selection
    assert request.dry_run
    assert chosen.namespace_id == namespace.digest.hex()
    assert chosen.HasField("tenant")
    assert (chosen.tier, chosen.older_than.seconds, chosen.older_than.nanos) == (
        "disk",
        1,
        500_000_000,
    )
    assert chosen.unused_for.seconds == 60
    assert not chosen.everything
    request = (
        BY_NAME["move"]
        .call(
            "memory",
            namespace=namespace,
            tokens=[1, 2],
            extras={0: [b"x"]},
            salt="s",
            adapter="a",
            media=[Media("image", "d", 1, 2)],
        )
        .request
    )
    assert isinstance(request, v1.MoveRequest)
    prefix = request.selection.prefix
    assert namespace_of(prefix.namespace) == namespace
    assert list(prefix.tokens.ids) == [1, 2]
    assert prefix.tokens.extras[0].values == [b"x"]
    assert (prefix.tokens.salt, prefix.tokens.adapter) == ("s", "a")
    assert list(prefix.tokens.media) == [v1.Media(modality="image", digest="d", offset=1, length=2)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BY_NAME["lookup"].call("abcdef"), "either tokens or keys"),
        (lambda: BY_NAME["lookup"].call("abcdef", tokens=[1], keys=[]), "either tokens or keys"),
        (lambda: BY_NAME["lookup"].call("abcdef", tokens=[-1]), "32 bits"),
        (lambda: BY_NAME["lookup"].call("abcdef", tokens=[1 << 32]), "32 bits"),
        (lambda: BY_NAME["lookup"].call("abcdef", tokens=["x"]), "32 bits"),  # type: ignore[list-item]
        (lambda: BY_NAME["lookup"].call("abcdef", keys=[bytes(32)], salt="s"), "keys cover salt"),
        (
            lambda: BY_NAME["lookup"].call("abcdef", tokens=[1], media=[Media("i", "d", -1, 1)]),
            "whole",
        ),
        (lambda: BY_NAME["clear"].call(tokens=[1]), "namespace"),
        (lambda: BY_NAME["clear"].call(namespace=""), "namespace is empty"),
        (lambda: BY_NAME["clear"].call(namespace="", tenant="t"), "namespace is empty"),
        (lambda: BY_NAME["watch_events"].call(""), "namespace is empty"),
        (lambda: BY_NAME["watch_events"].call(after=-1), "does not fit"),
        (lambda: BY_NAME["list_leases"].call(1 << 64), "does not fit"),
        (lambda: BY_NAME["list_namespaces"].call("\udcff"), "does not fit"),
        (lambda: BY_NAME["move"].call("", everything=True), "no name of a tier"),
        (lambda: BY_NAME["clear"].call(tier="\0"), "no name of a tier"),
        (lambda: BY_NAME["set_ttl"].call(math.inf, everything=True), "ttl"),
        (lambda: BY_NAME["set_ttl"].call(math.nan, everything=True), "ttl"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(build: Any, message: str) -> None:
    with pytest.raises(RequestRefused, match=message):
        build()


def test_namespaces_go_there_and_back() -> None:
    model = ModelIdentity("m", "r", "bfloat16", "lora", (("a", "1"), ("b", "")))
    namespace = Namespace(model, "tenant", 32)
    assert namespace_of(namespace_message(namespace)) == namespace
    message = namespace_message(namespace)
    message.tenant = "other"
    with pytest.raises(SpecError, match="id"):
        namespace_of(message)


@pytest.mark.parametrize(
    ("address", "reached", "secure"),
    [
        ("unix:///run/a.sock", "unix:/run/a.sock.control", False),
        ("unix:///run/a.sock.control", "unix:/run/a.sock.control", False),
        ("localhost:7420", "localhost:7420", False),
        ("[::1]:7420", "[::1]:7420", False),
        ("grpc://localhost:7420", "localhost:7420", False),
        ("grpcs://localhost:7420", "localhost:7420", True),
        (None, "unix:/tmp/x/kvstore.sock.control", False),
    ],
)
def test_addresses(address: str | None, reached: str, secure: bool) -> None:
    found = target(address, load_config(overrides={"run_dir": "/tmp/x"}), "")
    assert found.address == reached
    assert (found.credentials is not None) is secure


@pytest.mark.parametrize("address", ["localhost", "tcp://a:1", "unix://relative", "a:b", "a:99999"])
def test_addresses_that_are_none_are_explained(address: str) -> None:
    with pytest.raises(ConfigError, match="unix:///path/to/socket"):
        target(address, load_config(), "")


def test_an_address_of_sessions_elsewhere_is_explained() -> None:
    with pytest.raises(ConfigError, match="unix:///path/to/socket"):
        target(None, load_config(overrides={"address": "tcp://host:7422"}), "")


def test_plain_values() -> None:
    event = v1.Event(sequence=7, at=timestamp(0.5))
    event.stored.block_hashes.append(b"\x01\xff")
    event.stored.medium = "disk"
    told = plain(event)
    assert told["sequence"] == 7
    assert told["at"] == "1970-01-01T00:00:00.500+00:00"
    assert told["stored"]["block_hashes"] == ["01ff"]
    assert told["stored"]["medium"] == "disk"
    assert "removed" not in told
    assert plain(v1.LookupResponse(estimate=duration(0.25)))["estimate"] == 0.25
    assert plain(v1.StatsResponse(counters={"b": 1, "a": 2}))["counters"] == {"a": 2, "b": 1}
    assert plain(v1.Quota(tenant="x", limits={"far": 0}))["limits"] == {"far": 0}
    state = v1.Operation(state=9)  # type: ignore[arg-type]
    assert plain(state)["state"] == 9, "of a newer daemon"


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("2h", 7200), ("7d", 604800), ("1.5s", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "5 weeks", "-1s", "1s2m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="30s, 5m, 2h or 7d"):
        parse_duration(text)


def test_limits() -> None:
    assert limit_option("1GiB") == 1 << 30
    assert limit_option("none") == math.inf
    with pytest.raises(typer.BadParameter, match="is no size"):
        limit_option("much")


def test_neither_the_package_nor_the_command_loads_what_is_heavy_before_it_is_needed() -> None:
    grpc = ("grpc", "google.protobuf", "aiohttp", "torch", "transformers")
    values = ("pydantic", "yaml", "numpy")
    for script, names in (
        ("kvstore", (*grpc, *values, "asyncio", "typer")),
        ("kvstore.client.session", (*grpc, "kvstore.server", "kvstore.connectors")),
        ("kvstore.api", grpc),
        ("kvstore.server.cli.main", (*grpc, *values)),
    ):
        heavy = f"[m for m in sys.modules if m.startswith({names})]"
        code = f"import sys, {script}; print({heavy})"
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        assert out.stdout == "[]\n", out


def test_the_service_has_the_name_that_clients_call() -> None:
    assert v1.DESCRIPTOR.services_by_name["Orchestrator"].full_name == SERVICE


def test_a_request_that_is_too_large_is_not_sent() -> None:
    assert BY_NAME["lookup"].call("3f9a1c", tokens=[1] * 2_000_000)
    with pytest.raises(RequestRefused, match="some two million tokens") as caught:
        BY_NAME["lookup"].call("3f9a1c", tokens=[1] * 2_200_000)
    assert caught.value.reason == "TOO_LARGE"
