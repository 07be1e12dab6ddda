"""A caller of the orchestration API that knows only its descriptors, and daemons with tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help
from grpc_status import rpc_status

from kvstore.api import v1
from tests.session_tools import PATIENCE, Served, namespace

SERVICE: Final = v1.DESCRIPTOR.services_by_name["Orchestrator"]
NAMESPACE_ID: Final = namespace().digest.hex()


class Refusal(NamedTuple):
    """How a call was refused."""

    code: str
    reason: str
    field: str
    message: str
    remedy: str


class Api:
    """Calls methods by name with requests as dictionaries, and takes what comes as it comes."""

    def __init__(
        self, served: Served, token: str | None = None, *, tcp: bool = False, secure: Any = None
    ) -> None:
        address = served.addresses["grpc"] if tcp else f"unix:{served.socket}.control"
        # A fixed window: a stream that nobody reads holds the daemon up soon.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        if secure is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, secure, options)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def call(self, method: str, within: float = PATIENCE, **request: Any) -> Any:
        """The answer, or all answers of a stream."""
        return self.send(method, _request(method)(**request), within)

    def send(self, method: str, request: Message | bytes, within: float = PATIENCE) -> Any:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        path = f"/{SERVICE.full_name}/{method}"
        reply = GetMessageClass(SERVICE.methods_by_name[method].output_type)
        if SERVICE.methods_by_name[method].server_streaming:
            stream = self.channel.unary_stream(path, None, reply.FromString)
            return stream(data, timeout=within, metadata=self._metadata)
        unary = self.channel.unary_unary(path, None, reply.FromString)
        return unary(data, timeout=within, metadata=self._metadata)

    def refused(self, method: str, **request: Any) -> Refusal:
        """How a call is refused."""
        return self.refused_message(method, _request(method)(**request))

    def refused_message(self, method: str, request: Message | bytes) -> Refusal:
        try:
            answer = self.send(method, request)
            answer = next(answer) if isinstance(answer, Iterator) else answer
        except grpc.RpcError as e:
            return refusal(e)
        raise AssertionError(f"{method} was answered: {answer}")

    def outcome(self, method: str) -> str:
        """The status of a call with an empty request."""
        try:
            self.call(method)
        except grpc.RpcError as e:
            return refusal(e).code
        return "OK"

    def finished(self, operation: v1.Operation) -> v1.Operation:
        """Its state at the end."""
        *_, last = self.call("Watch", id=operation.id)
        found: v1.Operation = last
        return found

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refusal(error: Any) -> Refusal:
    """What a refusal says; its rich status agrees with the plain one."""
    status = rpc_status.from_call(error)
    reason = field = remedy = ""
    for detail in () if status is None else status.details:
        info, bad, help_ = ErrorInfo(), BadRequest(), Help()
        if detail.Unpack(info):
            assert info.domain == "kvstore"
            reason = info.reason
        elif detail.Unpack(bad):
            field = bad.field_violations[0].field
        elif detail.Unpack(help_):
            remedy = help_.links[0].description
    return Refusal(error.code().name, reason, field, error.details(), remedy)


def _request(method: str) -> Any:
    return GetMessageClass(SERVICE.methods_by_name[method].input_type)


def by_tokens(tokens: list[int], namespace_id: str = NAMESPACE_ID) -> dict[str, Any]:
    """A prefix."""
    return {"namespace_id": namespace_id, "tokens": {"ids": tokens}}


def by_keys(keys: list[bytes], namespace_id: str = NAMESPACE_ID) -> dict[str, Any]:
    """A prefix."""
    return {"namespace_id": namespace_id, "keys": {"keys": keys}}


def write_tokens(folder: Path, *entries: dict[str, Any]) -> str:
    """A file of tokens; each entry has a name and a role, its token is `secret(name)`."""
    path = folder / "tokens.yaml"
    new = path.with_suffix(".new")
    new.touch(0o600)
    tokens = [{"token": secret(entry["name"])} | entry for entry in entries]
    new.write_text(json.dumps({"tokens": tokens}))
    new.replace(path)  # A daemon that reads it meanwhile sees the one or the other.
    return str(path)


def secret(name: str) -> str:
    return f"the-secret-token-of-{name}"
