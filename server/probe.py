"""`kvstore-probe SOCKET [--ready]`: how a daemon of this machine is, for exec probes.

It loads next to nothing: the whole `kvstore` command takes longer to load than probes may.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

_SECONDS: Final = 2.0
_ASK: Final = b"\x81\xa4type\xa5stats"  # protocol.Stats, as the first message


def main() -> None:
    """Print what the daemon says of itself; exit code 1 unless it serves (--ready: all comers)."""
    path, *options = sys.argv[1:] or ["--help"]
    if options not in ([], ["--ready"]) or path.startswith("--"):
        sys.exit("usage: kvstore-probe SOCKET [--ready]")
    wanted = ("ready",) if options else ("ready", "draining")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(path)
            connection.sendall(struct.pack("<IQ", len(_ASK), 1) + _ASK)
            said = connection.makefile("rb").read()
    except OSError as e:
        sys.exit(f"no daemon answers at {path}: {e.strerror or e}")
    text = said[said.find(b'{"status"') :].decode(errors="replace")  # Of the reply, the JSON.
    print(text)
    sys.exit(0 if any(f'"status": "{state}"' in text for state in wanted) else 1)


if __name__ == "__main__":
    main()
