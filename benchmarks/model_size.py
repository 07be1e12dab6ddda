"""How many bytes the KV of a token takes, by the configuration of a model on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError

_MOST: Final = 16 << 20
_WIDTHS: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_REMEDY: Final = "give --token-bytes instead"


def token_bytes(model: str) -> int:
    """Bytes of KV per token of a model: a folder, a config.json, or a name in Hugging Face's cache.

    Raises:
        ConfigError: it is not there, or does not say so.
    """
    path = _config_of(model)
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MOST))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
        return _token_bytes(config)
    except (OSError, ValueError, TypeError, RecursionError, ZeroDivisionError) as e:
        raise ConfigError(f"{path}: {e}; {_REMEDY}") from None


def _config_of(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        return path / "config.json"
    if path.is_file():
        return path
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    folder = cache / f"models--{model.replace('/', '--')}"
    try:
        commit = (folder / "refs/main").read_text().strip()
    except (OSError, ValueError):
        text = f"--model {model!r:.200}: no folder, no config.json, nor a model in {cache}"
        raise ConfigError(f"{text}; {_REMEDY}") from None
    return folder / "snapshots" / commit / "config.json"


def _token_bytes(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    kind = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"
    layers: int = text.get("num_hidden_layers", 0)
    if isinstance(types := text.get("layer_types"), list):
        layers = sum("linear" not in str(one) and "attention" in str(one) for one in types)
    heads = text.get("num_attention_heads", 0)
    if rank := text.get("kv_lora_rank"):  # latent attention: one vector for all heads
        width = rank + text.get("qk_rope_head_dim", 0)
    else:
        size = text.get("head_dim") or text.get("hidden_size", 0) // heads
        width = 2 * (text.get("num_key_value_heads") or heads) * size
    if kind not in _WIDTHS:
        raise ValueError(f"numbers of type {kind!r:.40} are not known here")
    found = layers * width * _WIDTHS[kind]
    if type(found) is not int or not 0 < found < 1 << 30:
        raise ValueError("it does not say how many layers and heads there are")
    return found
