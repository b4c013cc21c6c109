"""The experts of transformers' mixtures: which classes are known, what they compute, and the ways back."""

import copy
import importlib
import pickle
import pkgutil

import pytest
import torch
import torch.distributed as dist
import transformers
from comparison import Made, error, rms
from moe_models import (
    CONFIGS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    differentiate,
    experts_layer,
    experts_of,
    inputs_of,
    routed,
    step,
    tiny_moe,
    token_ids,
)
from peft_models import stock_path_reasons
from tiny_models import assert_same
from tolerances import FP32_SUM, VERSUS_STOCK
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.integrations import moe

import peft_kernels
from peft_kernels.integrations.registry import FusedLayer
from peft_kernels.integrations.transformers import experts as integration
from peft_kernels.integrations.transformers import lookalike

IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]
# A class of each kind of lines, flags and gates.
LAYERS = [
    "mixtral:MixtralExperts", "gpt_oss:GptOssExperts", "aria:AriaExperts", "deepseek_v4:DeepseekV4Experts",
    "hy_v4:HYV4Experts", "minimax_m3_vl:MiniMaxM3VLExperts", "beam:BeamExperts", "gemma4:Gemma4TextExperts",
    "zaya:ZayaExperts",
]  # fmt: skip
# Their lines are not compared with the functions'.
NOT_EAGER = [
    "nemotron_h:NemotronHExperts", "openai_privacy_filter:OpenAIPrivacyFilterExperts", "inkling2:Inkling2Experts",
]  # fmt: skip
# Those with but their own lines.
OWN = ["step3p7:Step3p7Experts", "llama4:Llama4TextExperts", "jetmoe:JetMoeParallelExperts"]


def accelerated(layer):
    """The layer itself, and why it was left alone, if it was."""
    report = peft_kernels.optimize(layer)
    return layer, report.layers[0].reason


def same_as_stock(layer, inputs, tolerance=FP32_SUM):
    wanted = differentiate(layer, inputs)
    assert accelerated(layer)[1] == ""
    actual = differentiate(layer, inputs)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype is value.dtype and error(actual[name], value) <= tolerance, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_what_stock_does(name, implementation):
    layer = experts_layer(name, implementation)
    same_as_stock(layer, inputs_of(layer))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
@pytest.mark.parametrize("name", NOT_EAGER)
def test_layers_whose_lines_are_their_own(name, implementation):
    layer = experts_layer(name, implementation)
    same_as_stock(layer, inputs_of(layer))
    layer.config._experts_implementation = "eager"
    assert "no model's that is known" in accelerated(layer)[1]


@pytest.mark.parametrize("name", OWN)
def test_layers_that_nothing_dispatches(name):
    layer = experts_layer(name)
    same_as_stock(layer, inputs_of(layer))


@pytest.mark.slow
def test_every_layer_that_is_dispatched():
    left_alone = {}
    count = 0
    for model in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{model.name}.modeling_{model.name}")
        except ImportError:  # it needs packages that are not installed
            continue
        for name, value in list(vars(module).items()):
            is_own = isinstance(value, type) and value.__module__ == module.__name__
            if is_own and hasattr(value, "_apply_gate") and value.forward.__code__.co_filename == moe.__file__:
                for implementation in IMPLEMENTATIONS:
                    layer = experts_layer(f"{model.name}:{name}", implementation)
                    if reason := accelerated(copy.deepcopy(layer))[1]:
                        left_alone[name, implementation] = reason
                    else:
                        same_as_stock(layer, inputs_of(layer))
                    count += 1
    assert count >= 3 * 68  # in transformers 5.24
    norm = {("MuseSparkExperts", each): "a norm follows its experts" for each in IMPLEMENTATIONS}
    assert set(left_alone) == set(norm) | {
        (name.partition(":")[2], "eager") for name in (*NOT_EAGER, ":Inkling2LoopExperts")
    }


@pytest.mark.parametrize(("tokens", "top_k"), [(9, 1), (1, 2), (1, 1), (40, 3), (0, 2)])
def test_numbers_of_tokens(tokens, top_k):
    layer = experts_layer("mixtral:MixtralExperts")
    same_as_stock(layer, routed(tokens, top_k=top_k))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_are_stocks(implementation, weights_dtype, x_dtype):
    layer = experts_layer("mixtral:MixtralExperts", implementation, torch.bfloat16)
    x, index, weights = routed()
    inputs = x.to(x_dtype), index, weights.to(weights_dtype)
    try:
        wanted = layer(*inputs)
    except RuntimeError as stock_error:
        accelerated(layer)
        with pytest.raises(type(stock_error)):
            layer(*inputs)
        return
    accelerated(layer)
    y = layer(*inputs)
    assert y.dtype is wanted.dtype and error(y, wanted) < 0.01


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral:MixtralExperts", "gpt_oss:GptOssExperts"])
def test_error_in_bf16(name, implementation, autocast):
    """Against fp64, over several seeds: a single layer's errors scatter by a few percent."""
    ours, stocks = {}, {}
    for seed in range(8):
        torch.manual_seed(seed)
        layer = experts_layer(name, implementation, torch.float32 if autocast else torch.bfloat16)
        layer.limit = 50.0  # else a rounding could take a value to the other side of GPT-OSS's
        exact = copy.deepcopy(layer).double()
        exact.config = copy.copy(layer.config)
        exact.config._experts_implementation = "eager"
        x, index, weights = routed(24, torch.bfloat16)
        wanted = differentiate(exact, (x.double(), index, weights.double()))
        inputs = (x.float(), index, weights.float()) if autocast else (x, index, weights)
        stock = differentiate(layer, inputs, autocast)
        assert accelerated(layer)[1] == ""
        fused = differentiate(layer, inputs, autocast)
        for key, value in wanted.items():
            assert fused[key].dtype is stock[key].dtype
            ours.setdefault(key, []).append(error(fused[key], value))
            stocks.setdefault(key, []).append(error(stock[key], value))
    for key, errors in ours.items():
        assert rms(torch.tensor(errors)) <= VERSUS_STOCK * rms(torch.tensor(stocks[key])) + FP32_SUM, key


@pytest.mark.parametrize("name", CONFIGS)
def test_models_train_as_stock_does(name):
    model = tiny_moe(name)
    ids = token_ids()
    wanted = step(model, ids)
    report = peft_kernels.optimize(model)
    layers = [layer for layer in report if layer.kind.endswith("Experts")]
    assert layers and all(layer.fused for layer in layers)
    assert_same(step(model, ids), wanted)
    peft_kernels.restore(model)
    assert not any(isinstance(module, FusedLayer) for module in model.modules())
    for key, value in step(model, ids).items():
        assert torch.equal(value, wanted[key]), key


def test_auxiliary_loss_is_the_models():
    model = tiny_moe("mixtral", output_router_logits=True, router_aux_loss_coef=0.5).train()
    ids = token_ids()
    wanted = model(ids, labels=ids)
    peft_kernels.optimize(model)
    actual = model(ids, labels=ids)
    assert wanted.aux_loss > 0 and torch.allclose(actual.aux_loss, wanted.aux_loss, rtol=1e-5)
    assert torch.allclose(actual.loss, wanted.loss, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_generates_what_stock_does(name):
    model = tiny_moe(name)
    ids = token_ids(1, 5)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    peft_kernels.optimize(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = tiny_moe("qwen3_moe").train()
    ids = token_ids()
    wanted = step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    peft_kernels.optimize(model)
    assert_same(step(model, ids), wanted)


def test_two_forwards_before_a_backward():
    layer = experts_layer("mixtral:MixtralExperts")
    inputs = [routed(9), routed(5)]
    wanted = sum((differentiate(layer, each)["gate_up_proj"] for each in inputs), torch.zeros(()))
    accelerated(layer)
    layer.zero_grad()
    outputs = [layer(*each) for each in inputs]
    for y in outputs:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert error(layer.gate_up_proj.grad, wanted) <= FP32_SUM


def test_frozen_stacks_are_neither_copied_nor_kept():
    layer = experts_layer("mixtral:MixtralExperts").requires_grad_(False)
    accelerated(layer)
    x, index, weights = routed()
    with Made() as made:
        layer(x.requires_grad_(), index, weights).sum().backward()
    assert max(tensor.numel() for tensor in made.tensors) < layer.down_proj.numel()


def test_copies_and_pickles_stay_fused():
    layer = experts_layer("mixtral:MixtralExperts")
    inputs = routed()
    layer, reason = accelerated(layer)
    assert reason == "" and type(layer).__name__ == "MixtralExperts"
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer) and torch.equal(copied(*inputs), layer(*inputs))


# ---- Which classes are known ---------------------------------------------------------------------------------------


def form_of(stock):
    return [form for form in lookalike._all_forms() if form.fits(stock)]


def test_classes_are_known_by_their_forward():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    class Other(MixtralExperts):
        def forward(self, *args):
            return 2 * super().forward(*args)

    class OtherGate(MixtralExperts):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, -1)[1]

    class OtherInterface(transformers.integrations.moe.ExpertsInterface):
        pass

    @moe.use_experts_implementation(experts_interface=OtherInterface())
    class Dispatched(torch.nn.Module):
        def forward(self, *args):
            return args[0]

    for stock in (MixtralExperts, Qwen3MoeExperts, MuseSparkExperts, OtherGate):
        assert form_of(stock) == [integration.FusedMixture]
    assert not form_of(Other) and not form_of(Dispatched) and not form_of(torch.nn.Linear)


def test_gate_of_a_subclass(monkeypatch):
    """The functions call it, and Mixtral's own lines do not."""
    from transformers.models.mixtral import modeling_mixtral

    class OtherGate(modeling_mixtral.MixtralExperts):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, -1)[1].tanh()

    OtherGate.__module__ = modeling_mixtral.__name__
    monkeypatch.setattr(modeling_mixtral, "OtherGate", OtherGate, raising=False)
    layer = experts_layer("mixtral:OtherGate")
    same_as_stock(layer, routed())
    layer.config._experts_implementation = "eager"
    assert "not what it says of them" in accelerated(layer)[1]


@pytest.mark.parametrize("change", ["parallel", "norm", "implementation", "registered", "forward", "flags"])
def test_layers_that_compute_something_else(change, monkeypatch):
    layer = experts_layer("mixtral:MixtralExperts")
    if change == "parallel":
        layer._is_expert_parallel = True
    elif change == "norm":
        layer.has_post_expert_norm, layer.post_expert_norm = True, torch.nn.LayerNorm(HIDDEN)
    elif change == "implementation":
        layer.config._experts_implementation = "mine"
        moe.ALL_EXPERTS_FUNCTIONS["mine"] = lambda self, x, index, weights: 3 * x
        monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "_local_mapping", dict(moe.ALL_EXPERTS_FUNCTIONS._local_mapping))
    elif change == "registered":
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda self, x, *_: 3 * x)
    elif change == "forward":
        layer.forward = lambda x, *_: 3 * x
    else:
        layer.config._experts_implementation, layer.is_transposed = "eager", True
    inputs = routed()
    wanted = layer(*inputs)
    reason = accelerated(layer)[1]
    assert (
        reason
        == {
            "parallel": "it has a part of the experts",
            "norm": "a norm follows its experts",
            "implementation": "its experts_implementation is mine",
            "registered": "grouped_mm of ALL_EXPERTS_FUNCTIONS was replaced",
            "forward": "its forward was replaced on the instance",
            "flags": "its experts_implementation is eager, and its class's lines are not what it says of them",
        }[change]
    )
    assert torch.equal(layer(*inputs), wanted)


def test_functions_that_were_replaced(monkeypatch, caplog):
    layer = experts_layer("mixtral:MixtralExperts")
    inputs = routed()
    assert accelerated(layer)[1] == ""
    stock = moe._grouped_linear
    monkeypatch.setattr(moe, "_grouped_linear", lambda *args, **kwargs: 2 * stock(*args, **kwargs))
    (message,) = stock_path_reasons(layer, caplog, *inputs)
    assert "_grouped_linear of transformers.integrations.moe was replaced" in message
    y = layer(*inputs)
    peft_kernels.restore(layer)
    assert torch.equal(layer(*inputs), y)
    assert "was replaced" in accelerated(experts_layer("mixtral:MixtralExperts"))[1]


def test_function_that_reads_more_of_the_class(monkeypatch):
    def grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states * self.has_something_new

    assert not integration._attributes(grouped_mm_experts_forward.__code__) <= integration._ATTRIBUTES
    assert integration._attributes((lambda self: print(self)).__code__) is None
    for name in integration._IMPLEMENTATIONS.values():
        read = integration._attributes(getattr(moe, name).__code__)
        assert {"num_experts", "_apply_gate", "down_proj", "is_transposed"} <= read <= integration._ATTRIBUTES


@pytest.mark.parametrize("change", ["hook", "forward", "activation"])
def test_activations_that_are_called(change):
    layer = experts_layer("mixtral:MixtralExperts")
    seen = []
    if change == "hook":
        layer.act_fn.register_forward_hook(lambda *_: seen.append(1))
    elif change == "forward":
        layer.act_fn.forward = lambda x: x.sin()
    else:
        layer.act_fn = torch.nn.Softplus()
    same_as_stock(layer, routed())
    assert len(seen) == 2 * (change == "hook")


def test_parametrised_layers_are_left_to_stock(caplog):
    layer = experts_layer("mixtral:MixtralExperts")
    torch.nn.utils.parametrize.register_parametrization(layer, "down_proj", torch.nn.Softsign())
    cls = type(layer)
    inputs = routed()
    wanted = differentiate(layer, inputs)
    assert accelerated(layer)[1] == "its down_proj has a parametrization"
    assert "its down_proj has a parametrization" in stock_path_reasons(layer, caplog, *inputs)[0]
    for key, value in differentiate(layer, inputs).items():
        assert torch.equal(value, wanted[key])
    peft_kernels.restore(layer)
    assert type(layer) is cls


def test_other_parametrised_layers_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    linear = peft_kernels.optimize(model).layers[0]
    assert not linear.fused and linear.reason == "it has a parametrization" and linear.kind == "torch.Linear"


def test_other_devices_are_left_to_stock():
    layer = experts_layer("mixtral:MixtralExperts", "batched_mm").to("meta")
    assert accelerated(layer)[1] == "no fused kernel for meta"
    assert layer(*(value.to("meta") for value in routed())).shape == (9, HIDDEN)


def test_arguments_that_are_refused(caplog):
    layer, _ = accelerated(experts_layer("mixtral:MixtralExperts"))
    x, index, weights = routed()
    (message,) = stock_path_reasons(layer, caplog, hidden_states=x, top_k_index=index, top_k_weights=weights)
    assert "arguments were given by their names" in message


def test_sharded_models(tmp_path):
    model = tiny_moe("mixtral")
    ids = token_ids()
    wanted = step(model, ids)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in experts_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        report = peft_kernels.optimize(model)
        assert all(layer.fused for layer in report if layer.kind.endswith("Experts"))
        actual = {
            name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in step(model, ids).items()
        }
        assert_same(actual, wanted)
        peft_kernels.restore(model)
        assert not any(isinstance(module, FusedLayer) for module in model.modules())
    finally:
        dist.destroy_process_group()


def test_sizes_are_those_that_the_tests_rely_on():
    layer = experts_layer("mixtral:MixtralExperts")
    assert layer.gate_up_proj.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN) and TOP_K < EXPERTS


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", ["mixtral:MixtralExperts", "gpt_oss:GptOssExperts", "llama4:Llama4TextExperts"])
def test_compiles_into_one_graph_as_stock_does(name, grad):
    layer = experts_layer(name)
    inputs = inputs_of(layer)
    assert accelerated(layer)[1] == ""
    with torch.set_grad_enabled(grad):
        wanted = layer(*inputs)
        torch.compiler.reset()
        actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    assert error(actual.detach(), wanted.detach()) <= FP32_SUM
