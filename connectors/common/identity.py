"""Names of models, the same from every engine: what their numbers are, and nothing else.

Blocks can cross from one engine to another where namespaces are equal to the letter. So each engine
says here in the same words what it knows: the architecture, a digest of the files of weights, the
type of the cache; and by name only what departs from what those say.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from kvstore.blocks.spec import ModelIdentity
from kvstore.blocks.weights import weights_digest
from kvstore.errors import SpecError

_log = logging.getLogger("kvstore.identity")

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
_ALIKE: Final = frozenset(
    {
        "GemmaForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    }
)  # fmt: skip
_ROPES: Final = frozenset({"default", "linear", "llama3"})
"""Architectures and kinds of RoPE of which every engine caches the same keys and values, which a
test compares. Others may lie in another order or be scaled in an engine's own way."""
_OTHERWISE: Final = frozenset({("sglang", "GemmaForCausalLM")})
"""Engines that compute other numbers than the others: here by some 1e-4."""
_OTHER_MODELS: Final = r"[a-z]\w*_model_id"
"""Entries of configurations that name models whose weights are loaded along with this one's."""
_TICK: Final = 0.02
"""Seconds by which the kernel's times of files and of processes may differ."""
_BY_LENGTH: Final = re.compile("dynamic|longrope|^su$")


def identity(
    engine: str,
    architecture: str,
    place: str,
    config: Any,
    /,
    *,
    given: str,
    found: str,
    dtype: str,
    adapter: str = "",
    **told: str,
) -> ModelIdentity:
    """The name of a model of this `config` that lies at `place`, or is called so on a hub.

    `given` is the name of its weights that a user gave, `found` the one that was found out (empty:
    it was not asked for), `dtype` the cache's type. `told` is what else changes values; what is
    empty does not. The `engine` is a part where others may cache other numbers; the log says so.
    """
    if reason := _alone(engine, architecture, config):
        _log.info("blocks of this model are for %s alone: %s", engine, reason)
        told["engine"] = engine
    extra = tuple(sorted((key, value) for key, value in told.items() if value))
    name = _called(place) if given else architecture
    return ModelIdentity(name, given or found, dtype, adapter, extra)


def _alone(engine: str, architecture: str, config: Any) -> str:
    """Why engines do not share blocks of such a model; empty: they do."""
    if getattr(_text(config), "kv_lora_rank", None):
        return f"{architecture} has latent attention (MLA), which each keeps in a form of its own"
    if (engine, architecture) in _OTHERWISE:
        return f"{engine} computes {architecture} in a way of its own"
    if architecture in _ALIKE and _ropes(config) <= _ROPES:
        return ""
    return f"what each caches of {architecture}, or with its kind of RoPE, has not been compared"


def _text(config: Any) -> Any:
    """The part that is about the language model."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _ropes(config: Any) -> set[str]:
    """Kinds of RoPE, in new or old words; `several` and each if layers have their own."""
    ropes = [getattr(config, key, None) or {} for key in ("rope_parameters", "rope_scaling")]
    inner = [value for rope in ropes for value in rope.values() if isinstance(value, Mapping)]
    kinds = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes + inner}
    return kinds | ({"several"} if inner else set())


def depends_on_length(config: Any, *others: str) -> bool:
    """Whether a RoPE of this configuration, or another, scales keys by the longest sequence."""
    text = _text(config)
    own = bool(getattr(text, "use_dynamic_ntk", False))
    return own or any(_BY_LENGTH.search(kind) for kind in (*_ropes(text), *others))


def _called(place: str) -> str:
    """What people call the model: its repository, or its folder."""
    path = Path(place)
    for part in path.absolute().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.resolve().name if path.exists() else place


def folder_of(place: str, revision: str | None, cache: str | None = None) -> Path:
    """Where on this machine a model lies: a path, or the name of a repository on a hub.

    Raises:
        SpecError: it does not.
    """
    if Path(place).exists():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        found: str = snapshot_download(
            place, revision=revision, cache_dir=cache, local_files_only=True
        )
    except (OSError, ValueError) as e:
        raise SpecError(f"{place!r} is not on this machine") from e
    return Path(found)


def files_digest(config: Any, folder: Path) -> str:
    """The name of the weights in `folder` that this process, an engine, has loaded or is to load.

    Raises:
        SpecError: they are not all that belongs to the model, or have changed meanwhile.
        OSError: a file cannot be read.
    """
    for key, value in _named_elsewhere(config.to_dict()):
        raise SpecError(f"the configuration says {key} {value!r}: weights of that belong to it")
    commit = getattr(config, "_commit_hash", None)
    if commit and folder.parent.name == "snapshots" and folder.name != commit:
        raise SpecError(f"the model was at {commit} when the engine started, is at {folder.name}")
    return weights_digest(folder, loaded_at=started())


def _named_elsewhere(config: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _named_elsewhere(value)
        elif isinstance(value, str) and value and re.fullmatch(_OTHER_MODELS, str(key)):
            yield str(key), value


def started() -> float:
    """When this process was started, and so before it loaded anything, in seconds since 1970."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age + _TICK


def type_name(dtype: object) -> str:
    """A torch type as identities have it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


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
