"""Makes kvstore/api/v1.binpb and v1.pyi from the .proto files: `make proto`."""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
SOURCE = "kvstore/v1/orchestrator.proto"


def generate(folder: Path) -> None:
    """Write both files into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{HERE}",
            f"-I{files('grpc_tools') / '_proto'}",  # protobuf's own types
            f"--descriptor_set_out={folder / 'v1.binpb'}",
            f"--pyi_out={scratch}",
            SOURCE,
        ]
        if protoc.main(arguments):
            sys.exit("protoc failed")
        text = Path(scratch, SOURCE.replace(".proto", "_pb2.pyi")).read_text()
    # What protoc leaves open, strict type checkers want to know.
    text = text.replace(", _Mapping]", ", _Mapping[str, _Any]]")
    text = text.replace("from typing import ClassVar", "from typing import Any as _Any, ClassVar")
    (folder / "v1.pyi").write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "kvstore" / "api")
