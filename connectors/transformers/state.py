"""Whether a live model still computes what it did when it was named, and what its weights hash to.

torch counts what is written to a tensor in place, but neither what is written through `.data` or
numpy nor what is written to tensors made in inference mode. So some of the values are compared as
well: at least one of every row, all of a tensor without a count. That costs less than a token.
"""

from __future__ import annotations

import hashlib
import inspect
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.modules import module as torch_modules
from torch.utils.weak import WeakIdRef
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore import _native
from kvstore.errors import SpecError

_HASH_THREADS: Final = 4
_PLAIN: Final = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor))
_LIBRARIES: Final = frozenset({"torch", "transformers", "peft"})
"""Packages whose layers, hooks and attention functions do what a model's configuration says."""


class Weights:
    """The tensors and numbers that the modules of one model hold; not thread-safe."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hashed: dict[str, tuple[object, str]] = {}

    def state(self) -> tuple[object, ...]:
        """Equal as long as nothing of the model has changed. Takes a few milliseconds."""
        tensors, numbers = self._held()
        marks = {name: _mark(tensor) for name, tensor in tensors.items()}
        config = self._model.config.to_json_string(use_diff=False)
        return marks, numbers, _adapter_state(self._model), config, precision(self._model)

    def digest(self) -> str:
        """SHA-256 in hex over every byte of every tensor, the numbers, and code of the model's own.

        Tensors that have not changed since the last call are not read again.

        Raises:
            SpecError: a tensor is not in memory or in a private format, or code is in no file.
        """
        tensors, numbers = self._held()
        known, self._hashed = self._hashed, {}

        def line(name: str) -> str:
            mark, (before, made) = _mark(tensors[name]), known.get(name, (None, ""))
            self._hashed[name] = mark, made if mark == before else _line(name, tensors[name])
            return self._hashed[name][1]

        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            lines = [*pool.map(line, tensors), *map(repr, numbers), *_code(self._model)]
        own = {id(tensor) for tensor in tensors.values()}
        others = self._model.state_dict(keep_vars=True).items()
        lines += [_line(name, value) for name, value in others if id(value) not in own]
        return _sha256("\n".join(sorted(lines)).encode())

    def _held(self) -> tuple[dict[str, torch.Tensor], list[tuple[str, float]]]:
        """Parameters, buffers (those left out of checkpoints too), plain tensors; and numbers."""
        tensors: dict[int, tuple[str, torch.Tensor]] = {}
        numbers = []
        for place, module in self._model.named_modules():
            for key, value in (vars(module) | module._parameters | module._buffers).items():
                if isinstance(value, torch.Tensor):
                    tensors.setdefault(id(value), (f"{place}.{key}", value))
                elif type(value) is float:
                    numbers.append((f"{place}.{key}", value))
        return dict(tensors.values()), numbers


def unfit(model: Any) -> str:
    """Why `model` computes something now that no name of it covers; empty if it does not."""
    if torch.is_autocast_enabled(model.device.type):
        return "autocast computes with numbers of another type than the model's"
    kind = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    if not _own(ALL_ATTENTION_FUNCTIONS.get(kind)):
        return f"the attention function {kind!r} is not one of transformers"
    every = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
    hooked = [("all modules", hooks) for hooks in every]
    for place, module in model.named_modules():
        name = place or "the model"
        if module.training:
            return f"{name} is in training mode, where dropout changes KV; call model.eval()"
        forward = vars(module).get("forward")
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # compiled, but its own
        if forward and getattr(forward, "__func__", None) is not type(module).forward:
            return f"the forward of {name} was replaced"
        hooked += [(name, module._forward_hooks), (name, module._forward_pre_hooks)]
    for name, hooks in hooked:
        if not all(_own(hook) for hook in hooks.values()):
            return f"a hook on {name} may change values"
    return ""


def precision(model: Any) -> str:
    """What float32 matrices are rounded to when multiplied; empty if they are not."""
    kind = model.device.type
    backend = getattr(torch.backends, "mkldnn" if kind == "cpu" else kind, None)
    found = getattr(getattr(backend, "matmul", None), "fp32_precision", "none")
    return "" if found in ("none", "ieee") else str(found)


def adapter_identity(model: torch.nn.Module) -> str:
    """Which adapters are at work, how strongly, and a hash of all adapters; empty for none."""
    state = _adapter_state(model)
    lines = [
        _line(f"{name}.{parameter}", value)
        for name, layer in _adapted_layers(model)
        for parameter, value in layer.named_parameters()
        if not parameter.startswith("base_layer.")
    ]
    return f"{state} {_sha256(repr(sorted(lines)).encode())[:16]}" if state else ""


def _adapter_state(model: torch.nn.Module) -> str:
    states = set()
    for _, layer in _adapted_layers(model):
        names = [] if layer.disable_adapters else list(layer.active_adapters)
        scaling = getattr(layer, "scaling", {})
        state = [f"{name}*{scaling.get(name, 1.0):g}" for name in names]
        states.add(",".join(state + [f"{name} merged" for name in layer.merged_adapters]))
    return "; ".join(sorted(states - {""}))


def _adapted_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Those of peft, which may not be there."""
    modules = model.named_modules()
    return [(name, layer) for name, layer in modules if hasattr(type(layer), "merged_adapters")]


def _own(function: Any) -> bool:
    function = function.func if isinstance(function, partial) else function
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    return function is None or package in _LIBRARIES


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a tensor keeps as long as it is not changed."""
    count = None if tensor.is_inference() else tensor._version
    mark = WeakIdRef(tensor), tensor.dtype, tensor.shape, tensor.device, count
    if not _is_plain(tensor):
        return mark
    # A step of one less than a row: each has one, in another column than its neighbours.
    step = 1 if count is None or tensor.ndim < 2 else max(1, tensor.shape[-1] - 1)
    sample = tensor.detach().reshape(-1)[::step].contiguous().view(torch.uint8).cpu()
    seen = _native.xxh3_64(sample.data_ptr(), sample.numel())
    return *mark, tensor.data_ptr(), tensor.stride(), seen


def _is_plain(tensor: torch.Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return type(tensor) in _PLAIN and dense and not tensor.is_meta


def _line(name: str, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
            return f"{name} {value!r}"
    elif _is_plain(value):
        raw = value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
        return f"{name} {value.dtype} {tuple(value.shape)} {_sha256(raw.data)}"
    raise SpecError(
        f"the bytes of weight {name} ({type(value).__name__}) cannot be read to tell its model "
        "from others; pass revision="
    )


def _code(model: torch.nn.Module) -> list[str]:
    """Hashes of the files that the model's code is in, where that is no library's."""
    kinds = [kind for kind in {type(module) for module in model.modules()} if not _own(kind)]
    try:
        # A module that came with a checkpoint is named by its commit as well.
        return [f"{k.__module__} {_sha256(Path(inspect.getfile(k)).read_bytes())}" for k in kinds]
    except (TypeError, OSError) as e:
        raise SpecError(f"code of the model is in no file ({e}); pass revision=") from None


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
