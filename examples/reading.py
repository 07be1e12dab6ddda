"""What the demo and its readers tell each other."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import IO, Any


def told() -> argparse.Namespace:
    """What a reader is to do."""
    parser = argparse.ArgumentParser(description="One process of the demo.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--new-tokens", type=int, default=32)
    return parser.parse_args()


def say(out: IO[str] = sys.stdout, **event: Any) -> None:
    """One JSON object per line: `step` when one begins, at last the `result`."""
    print(json.dumps(event), file=out, flush=True)
