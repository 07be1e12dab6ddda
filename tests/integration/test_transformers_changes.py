"""A model that changes under a live KVStoreCache: no KV of what it was, none of it left behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from kvstore.blocks.spec import Namespace  # noqa: E402
from kvstore.client.session import Session  # noqa: E402
from kvstore.connectors.transformers.cache import KVStoreCache, cache_part, model_identity  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from tests.transformers_tools import BLOCK, greedy, llama, open_cache, prompt  # noqa: E402

IDS, MORE = prompt(5 * BLOCK), prompt(6 * BLOCK).flip(1)
LOADED = 4 * BLOCK


def tiny(seed: int = 0) -> Any:
    return llama(seed, initializer_range=0.3)


def adapted() -> Any:
    """The model with one adapter at work and another one at hand."""
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # of tiny matrices, more are slower


# -- weights ------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)


def a_step_of_training(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    model.zero_grad()


def through_data(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-1)


def one_row_through_data(model: Any) -> None:
    model.model.embed_tokens.weight.data[IDS[0, 1]] += 1


def through_numpy(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.detach().numpy()[:] *= 2


def parameter_replaced(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.1)


def tensor_replaced(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight.data = layer.weight.data + 0.1


def a_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def an_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.3


def columns_through_data(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data[:, 50] = 3.0  # more columns than rows


def an_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU().eval()


def an_activation_by_function(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = torch.nn.functional.relu


def a_whole_number(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 5


def layers_that_share(model: Any) -> None:
    first, second = (layer.mlp for layer in model.model.layers)
    second.gate_proj.weight, second.up_proj.weight = first.up_proj.weight, first.gate_proj.weight


@dataclasses.dataclass
class Steering:
    vector: Any = None


class Steered(torch.nn.Module):
    """As repeng wraps layers: what is added lies in an object of its own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.steering = layer, Steering()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, vector = self.layer(*args, **kwargs), self.steering.vector
        return output if vector is None else output + vector


def steerable() -> Any:
    model = tiny()
    model.model.layers[0] = Steered(model.model.layers[0])
    return model.eval()


def a_vector(model: Any) -> None:
    model.model.layers[0].steering.vector = torch.arange(32.0) - 16


def other_order(model: Any) -> None:
    layers = model.model.layers
    layers.insert(0, layers.pop(1))


def lora_weights(model: Any) -> None:
    state = peft.get_peft_model_state_dict(model, adapter_name="one")
    new = {name: torch.randn_like(value) for name, value in state.items()}
    peft.set_peft_model_state_dict(model, new, adapter_name="one")


def lora_scaling(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["one"] *= 3


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    **{change.__name__: (tiny, change) for change in (
        in_place, a_step_of_training, through_data, one_row_through_data, through_numpy,
        parameter_replaced, tensor_replaced, a_buffer, an_epsilon, columns_through_data,
        an_activation, an_activation_by_function, a_whole_number, layers_that_share,
    )},
    "steering vector": (steerable, a_vector),
    "load_state_dict": (tiny, lambda model: model.load_state_dict(tiny(seed=1).state_dict())),
    "layers in another order": (tiny, other_order),
    "another type": (tiny, lambda model: model.to(torch.bfloat16)),
    "LoRA weights": (adapted, lora_weights),
    "LoRA scaling": (adapted, lora_scaling),
    "LoRA switched": (adapted, lambda model: model.set_adapter("two")),
    "LoRA disabled": (adapted, lambda model: model.base_model.disable_adapter_layers()),
    "LoRA merged": (adapted, lambda model: model.merge_adapter()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_name_other_kv(shared_store: Any, change: str) -> None:
    make, apply = CHANGES[change]
    model, tenant = make(), f"changes {change}"
    with open_cache(model, shared_store, tenant) as cache:
        before = greedy(cache.generate, IDS)
        apply(model)
        alone = greedy(model.generate, IDS)
        assert change in ("LoRA merged", "another type") or alone != before, (
            "it must change something"
        )
        for loaded in (0, LOADED):  # what it has become is stored in its turn
            assert greedy(cache.generate, IDS) == alone
            assert cache.last.loaded_tokens == loaded
        greedy(cache.generate, MORE)
    model = make()
    with open_cache(model, shared_store, tenant) as cache:
        assert greedy(cache.generate, IDS) == before
        assert cache.last.loaded_tokens == LOADED
        assert greedy(cache.generate, MORE) == greedy(model.generate, MORE)
        assert cache.last.loaded_tokens == 0, "what the changed model saved is not its own"


def test_what_changes_back_finds_its_kv_again(shared_store: Any) -> None:
    model = adapted()
    with open_cache(model, shared_store, "back") as cache:
        greedy(cache.generate, IDS)
        model.set_adapter("two")
        greedy(cache.generate, IDS)
        for adapter in ("one", "two", "one"):
            model.set_adapter(adapter)
            assert greedy(cache.generate, IDS) == greedy(model.generate, IDS)
            assert cache.last.loaded_tokens == LOADED


def test_only_what_changed_is_read_again(
    shared_store: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with its files, all at first; hashed where it is not what they say, all at first."""
    from kvstore.connectors.transformers import weights

    compared, read = [], []
    holds, line = weights.holds, weights.line_of

    def noted(tensor: Any, stored: Any) -> bool:
        compared.extend(name for name, one in model.named_parameters() if one is tensor)
        return bool(holds(tensor, stored))

    monkeypatch.setattr(weights, "holds", noted)
    monkeypatch.setattr(
        weights, "line_of", lambda name, value: read.append(name) or line(name, value)
    )
    tiny().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    changed = "model.layers.0.self_attn.k_proj.weight"
    with open_cache(model, shared_store, "read again") as cache:
        assert len(compared) == len(set(compared)) == len(model.state_dict())
        assert not read
        for _ in range(2):
            compared.clear()
            before = len(read)
            in_place(model)
            greedy(cache.generate, IDS)
            assert compared == [changed]
        assert set(compared) < set(read[:before])
        assert read[before:] == [changed]


def test_a_model_moved_or_loaded_again_with_the_same_weights_keeps_its_name(
    shared_store: Any,
) -> None:
    model = tiny()
    with open_cache(model, shared_store, "same") as cache:
        greedy(cache.generate, IDS)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        greedy(cache.generate, IDS)
        assert cache.last.loaded_tokens == LOADED


@pytest.mark.parametrize("named", ["revision", "identity", "session"])
def test_a_name_that_was_given_is_not_used_for_what_became_of_the_model(
    shared_store: Any, named: str
) -> None:
    model, tenant = tiny(), f"given {named}"
    identity = model_identity(model, cache_part(model), revision="r")
    with contextlib.ExitStack() as stack:
        if named == "session":
            config = shared_store.config(planner={"mode": "load"})
            part = cache_part(model)
            session = Session.open(Namespace(identity, tenant, BLOCK), [part], config)
            cache = stack.enter_context(KVStoreCache(session, model))
        else:
            name = {"revision": "r"} if named == "revision" else {"identity": identity}
            cache = stack.enter_context(open_cache(model, shared_store, tenant, **name))
        before = greedy(cache.generate, IDS)
        scale = model.model.layers[0].self_attn
        scale.scaling *= 2
        for ids in (IDS, MORE):
            assert greedy(cache.generate, ids) == greedy(model.generate, ids)
            assert cache.last.loaded_tokens == 0
            assert "left alone" in cache.last.reason
            assert cache.last.saved is None
        past = cache.load(IDS)
        greedy(model.generate, IDS)
        scale.scaling /= 2  # it is what it was
        assert not cache.save(IDS, computed(model, IDS, past)).stored
        assert greedy(cache.generate, IDS) == before
        assert cache.last.loaded_tokens == LOADED
        assert greedy(cache.generate, MORE) == greedy(model.generate, MORE)
        assert cache.last.loaded_tokens == 0


def computed(model: Any, ids: Any, past: Any = None) -> Any:
    past = transformers.DynamicCache(config=model.config) if past is None else past
    with torch.no_grad():
        model(ids[:, past.get_seq_length() :], past_key_values=past)
    return past


def test_kv_begun_before_a_change_is_not_saved_after_it(shared_store: Any) -> None:
    model = tiny()
    with open_cache(model, shared_store, "between") as cache:
        past = computed(model, IDS, cache.load(IDS))
        in_place(model)
        saved = cache.save(IDS, past)
        assert (saved.stored, saved.dropped) == (0, 5)
        assert saved.reason == "the model has changed"
        cache.load(IDS)  # names the model anew
        assert not cache.save(IDS, past).stored
        assert cache.save(IDS, computed(model, IDS)).stored == 5


def test_kv_computed_by_hand_in_another_way_is_not_saved(shared_store: Any) -> None:
    model = tiny()
    positions = torch.arange(100, 100 + IDS.shape[1]).unsqueeze(0)
    with open_cache(model, shared_store, "by hand") as cache:
        past = cache.load(IDS)
        with torch.autocast("cpu", torch.bfloat16):
            computed(model, IDS, past)
        saved = cache.save(IDS, past)
        assert (saved.stored, saved.dropped) == (0, 5)
        assert "autocast" in saved.reason
        past = computed(model, IDS, cache.load(IDS, position_ids=positions))
        saved = cache.save(IDS, past)
        assert (saved.stored, saved.dropped) == (0, 5)
        assert saved.reason == cache.last.reason == "position_ids may change KV"


def test_options_are_taken_where_the_model_takes_them(shared_store: Any) -> None:
    model = tiny()
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    with open_cache(model, shared_store, "options") as cache:
        for loaded in (0, LOADED):
            assert cache.generate(IDS, options).tolist() == model.generate(IDS, options).tolist()
            assert cache.last.loaded_tokens == loaded


def test_a_change_during_an_answer_keeps_it_from_being_saved(shared_store: Any) -> None:
    model = tiny()

    def stop(ids: Any, scores: Any) -> Any:
        if ids.shape[1] == IDS.shape[1] + 3:
            in_place(model)
        return torch.tensor([False])

    with open_cache(model, shared_store, "during") as cache:
        cache.generate(IDS, max_new_tokens=8, stopping_criteria=[stop])
        assert (cache.last.saved.stored, cache.last.saved.dropped) == (0, 5)
        assert greedy(cache.generate, IDS) == greedy(model.generate, IDS)
        assert cache.last.loaded_tokens == 0


def test_weights_without_a_count_are_compared_whole(shared_store: Any) -> None:
    with torch.inference_mode():
        model = tiny()
    with open_cache(model, shared_store, "inference") as cache:
        before = greedy(cache.generate, IDS)
        with torch.inference_mode():
            model.model.embed_tokens.weight[IDS[0, 3], 5] += 4  # a single number
        alone = greedy(model.generate, IDS)
        assert alone != before
        assert greedy(cache.generate, IDS) == alone
        assert cache.last.loaded_tokens == 0


def test_a_model_that_cannot_be_named_any_more_goes_without_the_store(shared_store: Any) -> None:
    class Private(torch.nn.Parameter):
        pass

    model = tiny()
    with open_cache(model, shared_store, "unnamed") as cache:
        greedy(cache.generate, IDS)
        layer = model.model.layers[0].self_attn.k_proj
        plain, layer.weight = layer.weight, Private(layer.weight.detach() * 2)
        for _ in range(2):
            assert greedy(cache.generate, IDS) == greedy(model.generate, IDS)
            assert cache.last.loaded_tokens == 0
            assert "k_proj.weight (Private)" in cache.last.reason
        layer.weight = plain
        greedy(cache.generate, IDS)
        assert cache.last.loaded_tokens == LOADED


def test_adapters_chosen_by_an_argument_go_without_the_store(shared_store: Any) -> None:
    model, answers = adapted(), []
    with open_cache(model, shared_store, "adapter names") as cache:
        greedy(cache.generate, IDS)
        for name in ("one", "two", "__base__"):
            said = [
                generate(IDS, max_new_tokens=8, do_sample=False, adapter_names=[name])[0].tolist()
                for generate in (model.generate, cache.generate, cache.generate)
            ]
            assert said[0] == said[1] == said[2]
            assert cache.last.reason.startswith("adapter_names may change KV")
            answers.append(tuple(said[0]))
    assert len(set(answers)) == 3


# -- what comes and goes ------------------------------------------------------------------------


@contextlib.contextmanager
def steered(model: Any) -> Iterator[None]:
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: output + 1.0)
    yield
    handle.remove()


@contextlib.contextmanager
def steered_before(model: Any) -> Iterator[None]:
    layer = model.model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    yield
    handle.remove()


@contextlib.contextmanager
def steered_everywhere(model: Any) -> Iterator[None]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        return output * 2 if isinstance(module, torch.nn.Linear) else None

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    yield
    handle.remove()


@contextlib.contextmanager
def patched(model: Any) -> Iterator[None]:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) * 2
    yield
    del mlp.forward


@contextlib.contextmanager
def attending_otherwise(model: Any) -> Iterator[None]:
    def half(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output * 0.5, weights

    before = AttentionInterface._global_mapping["sdpa"]
    AttentionInterface.register("sdpa", half)
    yield
    AttentionInterface.register("sdpa", before)


@contextlib.contextmanager
def one_layer_attending_otherwise(model: Any) -> Iterator[None]:
    def half(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output * 0.5, weights

    AttentionInterface.register("half", half)
    attention = model.model.layers[0].self_attn
    before, attention.config = attention.config, copy.deepcopy(attention.config)
    attention.config._attn_implementation = "half"
    yield
    attention.config = before


@contextlib.contextmanager
def masking_otherwise(model: Any) -> Iterator[None]:
    def near(*args: Any, **kwargs: Any) -> Any:
        mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
        return mask.tril().triu(mask.shape[-1] - mask.shape[-2] - 40)

    AttentionInterface.register("near", sdpa_attention_forward)
    AttentionMaskInterface.register("near", near)
    model.set_attn_implementation("near")
    yield
    model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def class_patched(model: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x))
        )
        yield


@contextlib.contextmanager
def function_patched(model: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
        yield


class Louder(TorchDispatchMode):
    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = f(*args, **(kwargs or {}))
        return output * 1.5 if f is torch.ops.aten.silu.default else output


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    model.model.layers[1].train()
    yield
    model.eval()


@contextlib.contextmanager
def rounded(model: Any) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


STATES: dict[str, Callable[[Any], Any]] = {
    state.__name__: state
    for state in (
        steered, steered_before, steered_everywhere, patched, attending_otherwise, training,
        rounded, masking_otherwise, one_layer_attending_otherwise, class_patched, function_patched,
    )
} | {
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16), "mode": lambda model: Louder(),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_what_changes_values_for_a_time_keeps_them_from_the_store(
    shared_store: Any, name: str
) -> None:
    model, state = tiny(), STATES[name]
    with open_cache(model, shared_store, f"states {name}") as cache:
        before = greedy(cache.generate, IDS)
        with state(model):
            for ids in (IDS, MORE):
                assert greedy(cache.generate, ids) == greedy(model.generate, ids)
                assert cache.last.loaded_tokens == 0
                assert name == "rounded" or cache.last.saved is None
        assert greedy(cache.generate, IDS) == before
        assert cache.last.loaded_tokens == LOADED
        assert greedy(cache.generate, MORE) == greedy(model.generate, MORE)
        assert cache.last.loaded_tokens == 0


def test_hooks_and_attention_of_the_library_and_compiled_models_share_blocks(
    shared_store: Any,
) -> None:
    model = tiny()
    with open_cache(model, shared_store, "libraries") as cache:
        before = greedy(cache.generate, IDS)
        model.generate(
            IDS, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True
        )
        assert any(module._forward_hooks for module in model.modules())
        model.set_attn_implementation("eager")
        model.forward = torch.compile(model.forward, backend="eager")
        assert greedy(cache.generate, IDS) == before
        assert cache.last.loaded_tokens == LOADED


# -- faults of ours ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["plan", "load", "save"])
def test_a_fault_of_ours_never_costs_an_answer(
    shared_store: Any, at: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of everything")

    model = tiny()
    with open_cache(model, shared_store, f"faults {at}") as cache:
        before = greedy(cache.generate, IDS)
        monkeypatch.setattr(cache.session, at, fail)
        for _ in range(2):
            assert greedy(cache.generate, IDS) == before
    said = [record.getMessage() for record in caplog.records]
    assert [text.endswith("RuntimeError: out of everything") for text in said] == [True]


# -- names --------------------------------------------------------------------------------------


def name_of(model: Any) -> Any:
    return model_identity(model, cache_part(model))


def test_what_no_checkpoint_holds_is_part_of_the_name() -> None:
    halved, scaled, told = tiny(), tiny(), tiny()
    told.model.layers[1].config = copy.deepcopy(told.config)
    told.model.layers[1].config.rms_norm_eps = 0.5
    a_buffer(halved)
    an_epsilon(scaled)
    with torch.random.fork_rng():
        cast = tiny().to(torch.bfloat16)  # its RoPE too, unlike that of a model made in bfloat16
    made = llama(dtype=torch.bfloat16, initializer_range=0.3)
    made.load_state_dict(cast.state_dict())
    assert made.model.rotary_emb.inv_freq.dtype != cast.model.rotary_emb.inv_freq.dtype
    assert len({name_of(model) for model in (tiny(), halved, scaled, told, cast, made)}) == 6


def test_what_adapters_hold_is_part_of_the_name() -> None:
    def fourier(**settings: Any) -> Any:
        torch.manual_seed(7)
        config = peft.FourierFTConfig(n_frequency=20, target_modules=["v_proj"], **settings)
        return peft.get_peft_model(tiny(), config).eval()

    def lora(*scalings: float) -> Any:
        model = adapted()
        layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
        for layer, scaling in zip(layers, 2 * scalings, strict=True):
            layer.scaling["one"] = scaling
        return model

    models = (
        fourier(), fourier(scaling=9.0), fourier(random_loc_seed=1), lora(1.0, 5.0), lora(5.0, 1.0)
    )  # fmt: skip
    named = [model_identity(model, cache_part(model), revision="r") for model in models]
    assert len({name.adapter for name in named}) == len(models)


def test_a_model_that_attends_both_ways_is_refused() -> None:
    told, made = tiny(), tiny()
    told.config.is_causal = False
    for layer in made.model.layers:
        layer.self_attn.is_causal = False
    for model in (told, made):
        with pytest.raises(SpecError, match="both directions"):
            cache_part(model)


def test_a_model_loaded_from_here_has_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    tiny().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(".")
    assert model_identity(model, cache_part(model), revision="v1").name == tmp_path.name


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_weights_that_cannot_be_read_have_no_name() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(tiny(), {torch.nn.Linear})
    with pytest.raises(SpecError, match=r"_packed_params.* pass revision="):
        name_of(quantized)
    with torch.device("meta"):
        nowhere = tiny()
    with pytest.raises(SpecError, match="meta"):
        name_of(nowhere)
    scope: dict[str, Any] = {"torch": torch, "__name__": "cell"}
    exec("class Gate(torch.nn.Linear): ...", scope)
    model = tiny()
    model.model.layers[0].mlp.gate_proj = scope["Gate"](32, 64, bias=False)
    with pytest.raises(SpecError, match=r"code of the model .* pass revision="):
        name_of(model)
    assert model_identity(model, cache_part(model), revision="mine").revision == "mine"


def test_code_of_ones_own_is_part_of_the_name(tmp_path: Any, monkeypatch: Any) -> None:
    names = []
    for number in (1, 2):
        file = tmp_path / f"{number}" / "gate.py"
        file.parent.mkdir()
        file.write_text(f"import torch\nclass Gate(torch.nn.Linear):\n    times = {number}\n")
        monkeypatch.syspath_prepend(str(file.parent))
        monkeypatch.delitem(__import__("sys").modules, "gate", raising=False)
        gate = __import__("gate").Gate(32, 64, bias=False)
        model = tiny()
        gate.weight = model.model.layers[0].mlp.gate_proj.weight
        model.model.layers[0].mlp.gate_proj = gate
        names.append(name_of(model))
    assert names[0] != names[1]


def test_code_that_this_code_uses_is_part_of_the_name_as_it_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    layer, used = tmp_path / "kv_layer.py", tmp_path / "kv_used.py"
    text = (
        "import torch, kv_used\nclass Gate(torch.nn.Linear):\n    def forward(self, x): return {}\n"
    )
    names = []

    def name_now() -> None:
        model = tiny()
        gate = __import__("kv_layer").Gate(32, 64, bias=False)
        gate.weight = model.model.layers[0].mlp.gate_proj.weight
        model.model.layers[0].mlp.gate_proj = gate
        names.append(name_of(model))

    def forget() -> None:
        for name in ("kv_layer", "kv_used"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    layer.write_text(text.format("kv_used.act(super().forward(x))"))
    used.write_text("import torch\ndef act(x): return torch.relu(x)\n")
    name_now()
    used.write_text("import torch\ndef act(x): return torch.tanh(x)\n")
    forget()
    name_now()
    layer.write_text(text.format("super().forward(x)"))
    name_now()  # still what was imported, from a file that is gone
    forget()
    name_now()
    assert len(set(names)) == 4
