"""The least a request can take: messages of fixed sizes over a bare unix socket, and back."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Final, Self

from kvstore.errors import KVStoreError

_SECONDS: Final = 60.0


class PingPong:
    """Another process that answers `request` bytes with `reply` bytes; a context manager."""

    def __init__(self, request: int, reply: int) -> None:
        self._request = bytes(request)
        self._reply = bytearray(reply)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_SECONDS)
        with theirs:
            fd = theirs.fileno()
            self._server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(fd), str(request), str(reply)],
                pass_fds=[fd],
                cwd="/",
            )

    def __enter__(self) -> Self:
        self()  # Its start is not part of what is measured.
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._server.wait(_SECONDS)

    def __call__(self) -> None:
        """One round trip.

        Raises:
            KVStoreError: the other end is gone, or stands still.
        """
        try:
            self._socket.sendall(self._request)
            answered = _receive(self._socket, memoryview(self._reply))
        except OSError as e:
            raise KVStoreError(f"the other end of the ping-pong does not answer: {e}") from e
        if not answered:
            raise KVStoreError("the other end of the ping-pong is gone")


def _receive(connection: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False when the other side has closed."""
    while view:
        got = connection.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True


def main() -> None:
    """Answer on the socket that was passed until it is closed."""
    fd, request, reply = (int(argument) for argument in sys.argv[1:4])
    with socket.socket(fileno=fd) as connection:
        asked, answer = memoryview(bytearray(request)), bytes(reply)
        while _receive(connection, asked):
            connection.sendall(answer)


if __name__ == "__main__":
    main()
