"""What tests have a vLLM engine do, in its process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

_SAMPLES: Final = 16_000
"""Of sound, a second."""


def _tone(hertz: float) -> Any:
    """Two seconds of sound."""
    import numpy as np

    return np.sin(2 * np.pi * hertz * np.arange(2 * _SAMPLES) / _SAMPLES).astype(np.float32)


def _generate(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    wishes = order.get("wishes")
    params = SamplingParams(
        temperature=0.0,
        max_tokens=order.get("max_tokens", 16),
        ignore_eos=True,
        logprobs=order.get("logprobs"),
        extra_args={"kv_transfer_params": wishes} if wishes else None,
    )
    lora = order.get("lora")
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    if "salt" in order:
        prompts = [prompt | {"cache_salt": order["salt"]} for prompt in prompts]
    if "tone" in order:
        sound = {"audio": (_tone(order["tone"]), _SAMPLES)}
        prompts = [prompt | {"multi_modal_data": sound} for prompt in prompts]
    if "uuid" in order:
        prompts = [prompt | {"multi_modal_uuids": {"audio": [order["uuid"]]}} for prompt in prompts]
    if "options" in order:
        prompts = [prompt | {"mm_processor_kwargs": order["options"]} for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(
        prompts,
        params,
        use_tqdm=False,
        lora_request=LoRARequest(*lora) if lora else None,
    )
    return {
        "seconds": time.perf_counter() - started,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "finish": [output.outputs[0].finish_reason for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "first": [output.metrics.first_token_latency for output in outputs],
        "told": [output.kv_transfer_params for output in outputs],
        "logprobs": [
            [{token: one.logprob for token, one in each.items()} for each in logprobs]
            for logprobs in (output.outputs[0].logprobs or [] for output in outputs)
        ],
    }


def _mix(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Answers to requests that come while others run: (prompt, wishes, steps before it is aborted).

    Of those that were aborted, None; and how many tokens each was spared.
    """
    from vllm import SamplingParams

    engine, waiting = llm.llm_engine, dict(enumerate(order["requests"]))
    left: dict[str, int] = {}
    tokens: list[list[int] | None] = [None] * len(waiting)
    while waiting or engine.has_unfinished_requests():
        for number in list(waiting)[: order["at_once"]]:
            prompt, wishes, steps = waiting.pop(number)
            params = SamplingParams(
                temperature=0.0,
                max_tokens=order["max_tokens"],
                ignore_eos=True,
                extra_args={"kv_transfer_params": wishes} if wishes else None,
            )
            engine.add_request(f"mix-{number}", {"prompt_token_ids": prompt}, params)
            if steps:
                left[f"mix-{number}"] = steps
        for output in engine.step():
            if output.finished:
                tokens[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
        left = {name: steps - 1 for name, steps in left.items()}
        if ended := [name for name, steps in left.items() if steps == 0]:
            engine.abort_request(ended)
    return {"tokens": tokens}


def _forget(llm: Any, store: bool) -> bool:
    """Empty the prefix cache, once the last saves have given back their pages."""
    for _ in range(100):
        if llm.reset_prefix_cache(reset_connector=store):
            return True
        # In this process nothing else moves the engine on.
        _generate(llm, {"prompts": [[1, 2, 3]], "max_tokens": 2})
    return False


def _reset(llm: Any, prompt: list[int]) -> dict[str, Any]:
    """Empty the prefix cache by force, with a load and a save under way; then answer `prompt`."""
    from threading import Event
    from unittest.mock import patch

    from vllm import SamplingParams

    from kvstore.client.session import Session

    load, save, go_on = Session.load, Session.save, Event()

    def late(call: Any) -> Any:
        return lambda self, *given, **more: go_on.wait(20) and call(self, *given, **more)

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    tokens: list[int] = []
    with patch.object(Session, "load", late(load)), patch.object(Session, "save", late(save)):
        _generate(llm, {"prompts": [[5, *prompt[1:]]], "max_tokens": 1})
        llm.llm_engine.add_request("reset", {"prompt_token_ids": prompt}, params)
        for _ in range(3):
            llm.llm_engine.step()
        done = llm.reset_prefix_cache(reset_running_requests=True)
        go_on.set()
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                tokens = list(output.outputs[0].token_ids)
    return {"done": done, "tokens": tokens}


def _change(llm: Any, how: str, path: str) -> None:
    """Change the model's weights: by those at `path`, or in place."""
    import torch

    def negate(model: Any) -> None:
        model.model.embed_tokens.weight.data.neg_()

    match how:
        case "reload_weights":
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        case "apply_model":
            llm.apply_model(negate)
        case "load_weights":
            from safetensors.torch import load_file

            # The others are packed for the CPU, and cannot be loaded twice.
            weights = load_file(f"{path}/model.safetensors").items()
            _model(llm).load_weights([(n, w) for n, w in weights if "embed_tokens" in n])
        case "in place":
            with torch.no_grad():
                _model(llm).model.embed_tokens.weight.neg_()
        case "hook":
            layer = _model(llm).model.layers[0].mlp
            layer.register_forward_hook(lambda module, args, output: output * -1)
        case "number":
            _model(llm).model.layers[0].input_layernorm.variance_epsilon = 3.0


def _model(llm: Any) -> Any:
    """As those do that train beside an engine in one process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def _change_midway(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Change the weights when some of an answer's tokens are there."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=order["max_tokens"], ignore_eos=True)
    llm.llm_engine.add_request("midway", {"prompt_token_ids": order["prompt"]}, params)
    tokens: list[int] = []
    changed = False
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
        if not changed and len(tokens) >= order["after"]:
            _change(llm, order["how"], order["path"])
            changed = True
    return {"tokens": tokens}


def _metrics(llm: Any) -> dict[str, Any]:
    from prometheus_client import REGISTRY

    values: dict[str, float] = {}
    for family in REGISTRY.collect():
        if not family.name.startswith(("kvstore", "vllm:num_preemptions", "vllm:spec_decode_num")):
            continue
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            label = sample.labels.get("tier") or sample.labels.get("reason")
            values[f"{sample.name}.{label}" if label else sample.name] = sample.value
    return values


def _events(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """KV events that vLLM publishes of a prompt, until those of the store have come."""
    import msgspec
    import zmq

    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.connect(order["endpoint"])
    socket.subscribe("")
    time.sleep(0.5)
    events: list[dict[str, Any]] = []
    until = time.monotonic() + order["seconds"]
    _generate(llm, {"prompts": [order["prompt"]], "max_tokens": 2})
    while time.monotonic() < until and not any(e["medium"] == "KVSTORE" for e in events):
        # Events go out with steps of the engine, and the last saves end behind the last step.
        _generate(llm, {"prompts": [[1, 2, 3]], "max_tokens": 4})
        while socket.poll(200):
            batch = msgspec.msgpack.decode(socket.recv_multipart()[-1])
            events += [event for event in batch[1] if "medium" in event]
    socket.close(0)
    for event in events:
        event["block_hashes"] = [str(name) for name in event.get("block_hashes", [])]
        event.pop("parent_block_hash", None)
        event.pop("extra_keys", None)
    return {"events": events}


def make(settings: dict[str, Any]) -> tuple[Any, None, Callable[[], object]]:
    """The engine, of which there is nothing to say, and what ends it."""
    from vllm import LLM

    llm = LLM(**settings)
    return llm, None, llm.llm_engine.engine_core.shutdown


def obey(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Do what the order says."""
    match order["do"]:
        case "generate":
            return _generate(llm, order)
        case "forget":
            return {"done": _forget(llm, order.get("store", False))}
        case "reset":
            return _reset(llm, order["prompt"])
        case "change":
            return {"done": _change(llm, order["how"], order["path"]) is None}
        case "midway":
            return _change_midway(llm, order)
        case "mix":
            return _mix(llm, order)
        case "metrics":
            return _metrics(llm)
        case "events":
            return _events(llm, order)
        case other:
            raise ValueError(f"unknown order {other!r}")
