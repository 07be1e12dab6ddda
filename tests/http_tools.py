"""Plain HTTP to a daemon's face, as curl would talk."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any, NamedTuple

from tests.session_tools import PATIENCE, Served

ON: dict[str, Any] = {"http": "127.0.0.1:0"}
"""Settings of a daemon that serves HTTP, on a port of the system's choice."""


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def address(served: Served) -> str:
    """host:port of its HTTP face."""
    return served.addresses.get("http") or served.addresses["https"]


def ask(
    where: str,
    path: str,
    method: str = "GET",
    *,
    token: str | None = None,
    send: object = None,
    tls: ssl.SSLContext | None = None,
    **headers: str,
) -> Answer:
    """One request to host:port; `send` becomes JSON."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    body = None
    if send is not None:
        body = send if isinstance(send, bytes) else json.dumps(send).encode()
        headers.setdefault("Content-Type", "application/json")
    if tls is None:
        connection = http.client.HTTPConnection(where, timeout=PATIENCE)
    else:
        connection = http.client.HTTPSConnection(where, timeout=PATIENCE, context=tls)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()
