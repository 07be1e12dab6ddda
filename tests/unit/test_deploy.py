"""What lies in deploy/ fits the program: keys, flags, paths and commands that exist."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.server.access.access import Access
from kvstore.server.cli.main import app
from kvstore.server.process import notify
from kvstore.sources import load_config
from kvstore.values import parse_size

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
COMPUTED: Final = {"run_dir", "server.name"}
"""Settings whose default depends on the machine."""


@pytest.fixture(autouse=True)
def clean(no_settings: None) -> None:
    """No settings of the user who runs the tests."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def written_keys(content: dict[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if prefix + name in known or not isinstance(value, dict):
            yield prefix + name
        else:
            yield from written_keys(value, known, f"{prefix}{name}.")


def check_command(words: list[str]) -> None:
    """The `kvstore` command has these subcommands and options."""
    command: Any = typer.main.get_command(app)
    for number, word in enumerate(words):
        if not hasattr(command, "commands"):
            options = [w for w in words[number:] if w.startswith("--")]
            known = {name for parameter in command.params for name in parameter.opts}
            assert set(options) <= known, (words, known)
            return
        assert word in command.commands, words
        command = command.commands[word]


# -- kvstore.yaml -------------------------------------------------------------------------------


def test_the_example_lists_every_setting_with_its_default() -> None:
    path = DEPLOY / "kvstore.yaml"
    text = path.read_text()
    known = set(keys_of(Config))
    written = list(written_keys(yaml.safe_load(text), known))
    assert set(written) == known - COMPUTED
    assert len(written) == len(set(written))
    assert load_config(path) == Config()
    for key in COMPUTED:
        assert re.search(rf"^ *# {key.rpartition('.')[2]}: ", text, re.MULTILINE), key


# -- systemd ------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """The values of each key of the unit file."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd/kvstore.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_starts_what_its_configuration_describes() -> None:
    (line,) = unit()["ExecStart"]
    program, *words = line.split()
    assert Path(program).name == "kvstore"
    check_command(words)
    config = load_config(DEPLOY / "systemd/kvstore.yaml")
    assert config.socket == Path("/run/kvstore/kvstore.sock")
    assert unit()["RuntimeDirectory"] == ["kvstore"]
    assert config.disk.path is not None
    assert config.disk.path.is_relative_to("/var/lib/kvstore")
    assert unit()["StateDirectory"] == ["kvstore"]
    assert [config.server.group] == unit()["Group"]
    Access.load(config.server)
    assert unit()["Type"] == ["notify"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd/kvstore.service").read_text()
    path = tmp_path / "kvstore.service"
    path.write_text(text.replace("/opt/kvstore/bin/kvstore", sys.executable))
    ended = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@kvstore-test-{tmp_path}"[:100] if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_a_manager_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
    assert "READY=1: [Errno 2]" in caplog.text


# -- Kubernetes ---------------------------------------------------------------------------------


def manifests(name: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
    return {document["kind"]: document for document in documents}


def test_the_daemon_set_fits_the_program(tmp_path: Path) -> None:
    found = manifests("daemonset.yaml")
    pod = found["DaemonSet"]["spec"]["template"]
    assert found["DaemonSet"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    check_command(container["args"])
    check_command(container["lifecycle"]["preStop"]["exec"]["command"][1:])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert volumes["tokens"]["secret"]["secretName"] == found["Secret"]["metadata"]["name"]

    path = tmp_path / "kvstore.yaml"
    path.write_text(found["ConfigMap"]["data"]["kvstore.yaml"])
    assert mounts["config"] in container["args"]
    for variable in container["env"]:
        section, _, key = variable["name"].removeprefix("KVSTORE_").lower().partition("__")
        assert section == "config" or f"{section}.{key}" in set(keys_of(Config))
    config = load_config(path)
    server = config.server
    assert config.socket.parent == Path(mounts["socket"])
    assert config.disk.path is not None
    assert config.disk.path.is_relative_to(mounts["disk"])
    secrets = {server.tls_cert: "tls", server.tls_key: "tls", server.tokens: "tokens"}
    for secret, folder in secrets.items():
        assert secret is not None
        assert secret.parent == Path(mounts[folder])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f":{ports['grpc']}" in str(server.grpc)
    assert f":{ports['http']}" in str(server.http)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in ("/healthz", "/readyz")
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    limit = parse_size(container["resources"]["limits"]["memory"] + "B")
    assert limit >= config.memory.size + 2**30
    assert volumes["tls"]["secret"]["defaultMode"] == 0o440


def test_the_secrets_of_the_daemon_set_must_be_replaced(tmp_path: Path) -> None:
    text = manifests("daemonset.yaml")["Secret"]["stringData"]["tokens.yaml"]
    path = tmp_path / "tokens.yaml"
    path.touch(0o440)

    def load() -> Access:
        path.write_text(text)
        return Access.load(load_config(overrides={"server": {"tokens": str(path)}}).server)

    with pytest.raises(ConfigError, match="64 hex digits"):
        load()
    text = re.sub(r"REPLACE-ME-(\d)", lambda m: f"'{m[1] * 64}'", text)
    assert load().has_tokens


def test_the_example_engine_reaches_the_daemon_of_its_node() -> None:
    daemon = manifests("daemonset.yaml")
    engine = manifests("engine-pod.yaml")["Pod"]["spec"]
    socket_folder = next(
        v["hostPath"]["path"]
        for v in daemon["DaemonSet"]["spec"]["template"]["spec"]["volumes"]
        if v["name"] == "socket"
    )
    assert engine["volumes"][0]["hostPath"]["path"] == socket_folder
    (container,) = engine["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    served = yaml.safe_load(daemon["ConfigMap"]["data"]["kvstore.yaml"])["address"]
    assert variables["KVSTORE_ADDRESS"] == served
    (group,) = engine["securityContext"]["supplementalGroups"]
    assert f"--gid {group} kvstore" in (DEPLOY / "Dockerfile").read_text()


POOL: Final = DEPLOY / "kubernetes/pool"


def pooled(name: str) -> list[dict[str, Any]]:
    """The documents of a file of the overlay `pool`."""
    return list(yaml.safe_load_all((POOL / name).read_text()))


def from_environment(variables: dict[str, str]) -> dict[str, Any]:
    """What such variables set."""
    said: dict[str, Any] = {}
    for variable, value in variables.items():
        section, _, key = variable.removeprefix("KVSTORE_").lower().partition("__")
        said.setdefault(section, {})[key] = value
    return said


def test_the_overlay_makes_a_pool_of_the_daemon_set(tmp_path: Path) -> None:
    (kustomization,) = pooled("kustomization.yaml")
    for resource in kustomization["resources"]:
        assert (POOL / resource).is_file()
    base = manifests("daemonset.yaml")
    (patch,) = pooled("daemonset-patch.yaml")
    assert patch["metadata"] == {"name": "kvstore", "namespace": "kvstore"}
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    (own,) = base["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == own["name"]

    (config,) = pooled("config-patch.yaml")
    assert config["metadata"]["name"] == base["ConfigMap"]["metadata"]["name"]
    path = tmp_path / "kvstore.yaml"
    path.write_text(config["data"]["kvstore.yaml"])
    said = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    said = {name: value.replace("$(POD_IP)", "10.0.0.7") for name, value in said.items()}
    merged = load_config(path, from_environment(said))
    alone = yaml.safe_load(base["ConfigMap"]["data"]["kvstore.yaml"])
    pool = yaml.safe_load(config["data"]["kvstore.yaml"])
    assert pool.pop("server") == alone.pop("server") | {"tcp": "0.0.0.0:7422"}
    assert pool.pop("peers")
    assert pool == alone
    assert merged.peers.on
    assert merged.reached_at == "tls://10.0.0.7:7422"
    (service,) = pooled("peers.yaml")
    meta = service["metadata"]
    assert merged.peers.certified == f"{meta['name']}.{meta['namespace']}.svc"
    assert merged.peers.dns == f"{merged.peers.certified}:7422"
    labels = base["DaemonSet"]["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == labels
    ports = {one["name"]: one["port"] for one in service["spec"]["ports"]}
    assert f":{ports['tcp']}" in str(merged.server.tcp)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert merged.peers.token_file == Path(mounts["peer"]) / "token"


def test_the_overlay_lets_in_who_is_to_come() -> None:
    budget, policy = pooled("access.yaml")
    labels = manifests("daemonset.yaml")["DaemonSet"]["spec"]["selector"]["matchLabels"]
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [p["port"] for rule in open_to_all for p in rule["ports"]] == [7421]
    (monitor,) = pooled("servicemonitor.yaml")
    (service,) = pooled("peers.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    names = {port["name"] for port in service["spec"]["ports"]}
    assert monitor["spec"]["endpoints"][0]["port"] in names


def test_the_overlay_with_valkey_names_it_instead_of_dns() -> None:
    (component,) = pooled("valkey/kustomization.yaml")
    added = [one["value"] for p in component["patches"] for one in yaml.safe_load(p["patch"])]
    said = from_environment({one["name"]: one["value"] for one in added})
    said["peers"]["address"] = "tls://10.0.0.7:7422"
    config = load_config(overrides=said)
    assert str(config.peers.directory).startswith("redis://valkey.kvstore.svc")
    assert config.peers.dns is None
    (own,) = pooled("config-patch.yaml")
    by_name = yaml.safe_load(own["data"]["kvstore.yaml"])["peers"]["dns"]
    assert config.peers.certified == by_name.partition(":")[0]
    (policy,) = pooled("valkey/access.yaml")
    (rule,) = policy["spec"]["ingress"]
    labels = manifests("daemonset.yaml")["DaemonSet"]["spec"]["selector"]["matchLabels"]
    assert [one["podSelector"]["matchLabels"] for one in rule["from"]] == [labels]


def test_the_composed_daemons_are_a_pool() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("a", "b"):
        service = services[name]
        assert service["hostname"] == name
        check_command(service["command"])
        said = from_environment(service["environment"])
        said["server"]["name"] = name
        config = load_config(overrides=said)
        assert config.reached_at == f"tcp://{name}:7422"
        assert config.peers.directory == "redis://valkey:6379"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_probe_of_the_guide_is_a_command() -> None:
    guide = (DEPLOY.parent / "docs/operations.md").read_text()
    (command,) = re.findall(r"`exec: \{command: (\[.*?\])\}`", guide)
    program, socket_path = yaml.safe_load(command)
    scripts = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[program] == "kvstore.server.probe:main"
    served = yaml.safe_load(manifests("daemonset.yaml")["ConfigMap"]["data"]["kvstore.yaml"])
    assert served["address"] == f"unix://{socket_path}"


# -- the image ----------------------------------------------------------------------------------


def test_the_image_runs_a_command_that_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])", text, re.MULTILINE)
    check_command(yaml.safe_load(command))
    kept = re.findall(r"^!(.*)", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    root = DEPLOY.parent
    assert all((root / name).exists() for name in kept)
    for name in ("kvstore", "connectors", "server", "benchmarks", "native", "pyproject.toml"):
        assert name in kept
