"""Names of configurations: what a model's configuration says of its numbers, in any engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any, Final

from kvstore.errors import SpecError

# What configurations say beside the numbers: names, ids of tokens, what is handed out. The number
# type and the class of the model are entries of the identity themselves.
NOT_NUMBERS: Final = frozenset(
    {
        "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "initializer_range", "label2id", "name_or_path",
        "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
        "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    }
)  # fmt: skip


def config_digest(config: object) -> str:
    """32 hex digits that name a configuration's numbers: RoPE, epsilons, scalings, quantization …

    All that it holds counts, at any depth, but `NOT_NUMBERS` and keys that begin with `_`.

    Raises:
        SpecError: it holds something whose effect cannot be told, such as a function.
    """
    text = json.dumps(_plain(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item)
            for key, item in value.items()
            if key not in NOT_NUMBERS and not str(key).startswith("_")
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(item), sort_keys=True) for item in value)
    if isinstance(value, Enum):
        return value.name
    if not isinstance(value, type) and hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    raise SpecError(f"what {value!r:.200} does to the numbers cannot be told")
