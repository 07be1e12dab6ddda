"""Which KV belongs together: the namespace of a model in vLLM, and the keys of a request.

Two engines share blocks only if their KV values are equal for equal tokens. So the namespace covers
the weights and every flag that changes values; the keys cover the tokens, what was put in the place
of some of them (images and the like), the LoRA adapter and vLLM's `cache_salt`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from kvstore.errors import SpecError
from kvstore.keys import Media
from kvstore.spec import ModelIdentity

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_WHOLE: Final = 64 << 20
"""Files up to this size are read in full, larger ones every MiB a page."""
_STRIDE: Final = 1 << 20
_PAGE: Final = 4096
_SNAPSHOT: Final = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})")


def identity_of(
    vllm_config: Any, dtype: str, revision: str = "", stored: str = ""
) -> ModelIdentity:
    """Everything about the engine's model that changes KV values; `dtype` is the cache's.

    `stored` is the type that they are rounded to in the store, if it is another one.

    Without a `revision` the weights name themselves: by their commit if they come from a Hugging
    Face cache, else by a digest of their files. The folder's place is no part of the identity.

    Raises:
        SpecError: the weights cannot be told from others.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    name, found = _weights(model.model, model.revision, bool(revision))
    extra = {
        "engine": "vllm",
        "weights": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization or ""),
        "cache": str(cache.cache_dtype),
    }
    if model.hf_overrides:
        extra["overrides"] = _digest(_stable(model.hf_overrides))
    if vllm_config.load_config.load_format == "dummy":
        extra["dummy"] = str(model.seed)
    if stored:
        extra["stored"] = stored
    if _depends_on_length(model.hf_config):
        extra["max_model_len"] = str(model.max_model_len)
    return ModelIdentity(name, revision or found, dtype, extra=tuple(sorted(extra.items())))


def _stable(value: Any) -> str:
    if callable(value):
        raise SpecError(
            "hf_overrides is a function, whose effect on KV values cannot be told; give a "
            "dictionary, or set kvstore.vllm.revision to name the weights it makes"
        )
    return json.dumps(value, sort_keys=True, default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _depends_on_length(config: Any) -> bool:
    """Whether RoPE's scaling is chosen by the longest sequence that the engine may see."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    entries = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = {entry.get("rope_type", entry.get("type")) for entry in entries}
    return bool(kinds & {"longrope", "su", "dynamic"})


def _weights(model: str, revision: str | None, known: bool) -> tuple[str, str]:
    """Name and revision of the weights at `model`, a folder or the name of a repository."""
    folder = Path(model)
    if not folder.exists():
        found = _cached(model, revision)
        if found is None and not known:
            raise SpecError(
                f"the weights of {model!r} cannot be told from others; set kvstore.vllm.revision "
                "in kv_connector_extra_config to a name that changes with them"
            )
        return model, found or ""
    snapshot = _SNAPSHOT.search(str(folder.absolute()))
    if snapshot:
        return snapshot[1].replace("--", "/"), snapshot[2]
    return folder.resolve().name, "" if known else fingerprint(folder)


def _cached(model: str, revision: str | None) -> str | None:
    """The commit under which a repository lies in the Hugging Face cache."""
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, "config.json", revision=revision)
    snapshot = _SNAPSHOT.search(path) if isinstance(path, str) else None
    return snapshot[2] if snapshot else None


def fingerprint(path: Path) -> str:
    """SHA-256 in hex over the files of weights in `path`, and their configuration.

    Large files are sampled, a page of every MiB: about a second for 100 GB. A change that leaves
    all of those bytes as they were needs a `revision` of its own.
    """
    files = sorted(_weight_files(path)) if path.is_dir() else [path]
    h = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            h.update(f"{file.name} {size}\n".encode())
            if size <= _WHOLE:
                h.update(hashlib.file_digest(opened, "sha256").digest())
                continue
            for offset in range(0, size, _STRIDE):
                h.update(os.pread(opened.fileno(), _PAGE, offset))
            h.update(os.pread(opened.fileno(), _PAGE, size - _PAGE))
    return h.hexdigest()


def _weight_files(folder: Path) -> Iterator[Path]:
    for file in folder.iterdir():
        counts = file.suffix in _WEIGHTS or file.name in ("config.json", "adapter_config.json")
        if counts and file.is_file():
            yield file


@lru_cache(maxsize=256)
def _adapter(name: str, number: int, path: str) -> str:
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(path))
    if not folder.exists():
        raise SpecError(f"LoRA adapter {name!r} is not at {path}, so it cannot be told from others")
    return fingerprint(folder)


def adapter_of(request: Any) -> str:
    """The digest of the request's LoRA adapter; empty without one.

    Raises:
        SpecError: it cannot be told from others.
    """
    lora = request.lora_request
    if lora is None:
        return ""
    if lora.load_inplace:
        raise SpecError(f"LoRA adapter {lora.lora_name!r} is changed in place")
    return _adapter(lora.lora_name, lora.lora_int_id, lora.lora_path)


def media_of(request: Any) -> list[Media]:
    """What lies in place of the request's tokens."""
    return [
        Media(f.modality, f.identifier, f.mm_position.offset, f.mm_position.length)
        for f in request.mm_features
    ]


def keyable(request: Any, hashed_media: bool) -> bool:
    """Whether keys can tell this request's KV from others'.

    `hashed_media`: vLLM names images and the like by their content, not by the request.
    """
    if request.prompt_embeds is not None or request.resumable:
        return False
    return hashed_media or not request.mm_features
