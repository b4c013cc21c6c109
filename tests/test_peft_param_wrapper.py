"""LoRA on the stacks of a mixture's experts (PEFT's `target_parameters`): the fused layers against stock."""

import copy

import pytest
import torch
from comparison import Made, error, rms
from moe_models import (
    CONFIGS,
    EXPERTS,
    HIDDEN,
    differentiate,
    experts_layer,
    experts_of,
    inputs_of,
    routed,
    step,
    targets,
    tiny_moe,
)
from moe_models import token_ids as tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.utils.hotswap import hotswap_adapter
from peft_models import stock_path_reasons
from tiny_models import assert_same
from tolerances import FP32_SUM, VERSUS_MERGED, VERSUS_STOCK
from torch import nn
from torch.nn.utils import parametrize

import peft_kernels
from peft_kernels.integrations.registry import FusedLayer


class OneMixture(nn.Module):
    """A model of one layer of experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *inputs):
        return self.experts(*inputs)


def randomize(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def config(name="mixtral", **changes):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": targets(name)} | changes)


def layer_model(name="mixtral:MixtralExperts", dtype=torch.float32, implementation="grouped_mm", **changes):
    """A PEFT model on a layer of experts, in which every B is random."""
    layer = experts_layer(name, implementation, dtype)
    parameters = [key for key, _ in layer.named_parameters(recurse=False) if not key.endswith("bias")]
    changes = {"target_parameters": [f"experts.{key}" for key in parameters], "autocast_adapter_dtype": False} | changes
    autocast = changes.pop("autocast_adapter_dtype")
    return randomize(get_peft_model(OneMixture(layer), config(**changes), autocast_adapter_dtype=autocast))


def language_model(name="mixtral", **changes):
    return randomize(get_peft_model(tiny_moe(name), config(name, **changes))).train()


def fuse(model):
    """Accelerates a model whose experts can all be fused."""
    report = peft_kernels.optimize(model)
    layers = [layer for layer in report if layer.kind == "peft.ParamWrapper" or layer.kind.endswith("Experts")]
    assert layers and all(layer.fused for layer in layers), layers
    return model


def same_as_stock(model, inputs, tolerance=FP32_SUM):
    wanted = differentiate(model, inputs)
    actual = differentiate(fuse(model), inputs)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype is value.dtype and error(actual[name], value) <= tolerance, name


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- What is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_models_train_as_stock_does(name):
    model = language_model(name)
    ids = tokens()
    wanted = step(model, ids)
    assert any("lora_A" in key for key in wanted)
    assert_same(step(fuse(model), ids), wanted)


@pytest.mark.parametrize("on", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_lora_on_one_of_the_stacks(name, on):
    model = language_model(name, target_parameters=[f"experts.{on}"])
    ids = tokens()
    wanted = step(model, ids)
    assert len(wrappers(model)) == len(experts_of(model))
    assert_same(step(fuse(model), ids), wanted)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", ["mixtral:MixtralExperts", "gpt_oss:GptOssExperts", "aria:AriaExperts",
                                  "nemotron_h:NemotronHExperts", "deepseek_v4:DeepseekV4Experts"])  # fmt: skip
def test_layers_compute_what_stock_does(name, implementation):
    if "nemotron" in name and implementation == "eager":
        pytest.skip("its own lines are not known")
    same_as_stock(layer_model(name, implementation=implementation), routed())


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (30, 1), (4, 4)])
def test_numbers_of_tokens(count, top_k):
    same_as_stock(layer_model(), routed(count, top_k=top_k))


@pytest.mark.parametrize("mode", ["bf16", "bf16-fp32-adapters", "autocast-grouped_mm", "autocast-batched_mm"])
def test_error_in_bf16(mode):
    """Against fp64 with the same numbers, over several seeds."""
    ours, stocks = {}, {}
    autocast = mode.startswith("autocast")
    dtype = torch.float32 if autocast else torch.bfloat16
    for seed in range(8):
        torch.manual_seed(seed)
        model = layer_model(dtype=dtype, implementation=mode.partition("-")[2] if autocast else "grouped_mm")
        if mode == "bf16-fp32-adapters":
            for wrapper in wrappers(model):
                wrapper.lora_A.float(), wrapper.lora_B.float()
        exact = copy.deepcopy(model).double()
        experts = exact.get_base_model().experts.get_base_layer()
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = "eager"
        x, index, weights = routed(24, dtype)
        wanted = differentiate(exact, (x.double(), index, weights.double()))
        stock = differentiate(model, (x, index, weights), autocast)
        fused = differentiate(fuse(model), (x, index, weights), autocast)
        for key, value in wanted.items():
            assert fused[key].dtype is stock[key].dtype
            ours.setdefault(key, []).append(error(fused[key], value))
            stocks.setdefault(key, []).append(error(stock[key], value))
    ratio = VERSUS_MERGED if mode == "autocast-batched_mm" else VERSUS_STOCK
    for key, errors in ours.items():
        assert rms(torch.tensor(errors)) <= ratio * rms(torch.tensor(stocks[key])) + FP32_SUM, key


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = language_model()
    ids = tokens()
    wanted = step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(step(fuse(model), ids), wanted)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_generates_what_stock_does(name):
    model = language_model(name).eval()
    ids = tokens(1, 5)
    wanted = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(fuse(model).generate(input_ids=ids, max_new_tokens=8, do_sample=False), wanted)


def test_no_parametrization_and_no_tensor_as_large_as_a_stack(monkeypatch):
    model = fuse(layer_model())
    monkeypatch.setattr(parametrize, "register_parametrization", None)
    x, index, weights = routed()
    with Made() as made:
        model(x.requires_grad_(), index, weights).sum().backward()
    assert (
        max(tensor.numel() for tensor in made.tensors)
        < model.get_base_model().experts.get_base_layer().down_proj.numel()
    )
    peft_kernels.restore(model)
    with pytest.raises(TypeError):
        model(x, index, weights)


def test_nothing_of_a_call_is_kept():
    model = fuse(layer_model())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    model(*routed())
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}


# ---- Adapters ------------------------------------------------------------------------------------------------------


def test_ranks_and_scalings_of_their_own():
    model = language_model(
        rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.gate_up_proj": 2}, use_rslora=True
    )
    assert {(wrapper.r["default"], wrapper.lora_alpha["default"]) for wrapper in wrappers(model)} == {(5, 5), (3, 2)}
    ids = tokens()
    wanted = step(model, ids)
    assert_same(step(fuse(model), ids), wanted)


def with_second(model, **changes):
    model.add_adapter("second", config(**{"r": 4, "lora_alpha": 3} | changes))
    return randomize(model)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_several_active_adapters(name):
    model = with_second(language_model(name), target_parameters=targets(name))
    model.base_model.set_adapter(["default", "second"])
    ids = tokens()
    wanted = step(model, ids)
    assert {key.split(".")[-2] for key in wanted if "lora_" in key} == {"default", "second"}
    assert_same(step(fuse(model), ids), wanted)


def test_switching_disabling_adding_and_deleting_adapters():
    model = with_second(language_model()).eval()
    fused = fuse(copy.deepcopy(model))
    ids = tokens()

    def compare():
        assert torch.allclose(fused(ids).logits, model(ids).logits, atol=1e-5)

    outputs = []
    for name in ("second", "default", "second"):
        for each in (model, fused):
            each.set_adapter(name)
        compare()
        outputs.append(fused(ids).logits)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3) and torch.equal(outputs[0], outputs[2])
    with model.disable_adapter(), fused.disable_adapter():
        compare()
        base = fused(ids).logits
    assert torch.equal(fused(ids).logits, outputs[2]) and not torch.allclose(base, outputs[2], atol=1e-3)
    for each in (model, fused):
        each.delete_adapter("default")
    compare()
    for each in (model, fused):
        torch.manual_seed(5)
        each.add_adapter("third", config(r=2, init_lora_weights=False))
        each.set_adapter("third")
    compare()
    assert set(fused.peft_config) == {"second", "third"}


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unmerging(safe_merge):
    model = language_model().eval()
    fused = fuse(copy.deepcopy(model))
    ids = tokens()
    unmerged, before = fused(ids).logits, state(fused)
    for each in (model, fused):
        each.merge_adapter(safe_merge=safe_merge)
    for key, value in state(model).items():
        assert torch.equal(state(fused)[key], value)
    assert torch.allclose(fused(ids).logits, model(ids).logits, atol=1e-5)
    assert torch.allclose(fused(ids).logits, unmerged, atol=1e-4)
    for each in (model, fused):
        each.unmerge_adapter()
    assert torch.allclose(fused(ids).logits, unmerged, atol=1e-4)
    assert all(torch.allclose(value, before[key], atol=1e-5) for key, value in state(fused).items())


def test_disabling_merged_adapters_unmerges_them():
    model = fuse(language_model().eval())
    ids = tokens()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(ids).logits
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.allclose(model(ids).logits, base, atol=1e-4)
    assert not any(wrapper.merged for wrapper in wrappers(model))


@pytest.mark.parametrize("merge", [True, False])
def test_unloading(merge):
    model = language_model().eval()
    ids = tokens()
    fused = fuse(copy.deepcopy(model))
    unload = "merge_and_unload" if merge else "unload"
    wanted, actual = getattr(model, unload)(), getattr(fused, unload)()
    assert not wrappers(actual) and torch.allclose(actual(ids).logits, wanted(ids).logits, atol=1e-5)
    assert all(isinstance(layer, FusedLayer) for layer in experts_of(actual))
    peft_kernels.restore(actual)
    assert torch.equal(actual(ids).logits, wanted(ids).logits)


def test_saving_and_loading(tmp_path):
    model = language_model().eval()
    base, ids = tiny_moe("mixtral"), tokens()
    base.load_state_dict(model.get_base_model().state_dict(), strict=False)
    before = state(model)
    fuse(model).save_pretrained(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model.unload()), tmp_path)
    for one, other in zip(wrappers(loaded), wrappers(model), strict=False):
        assert torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)
    wanted = loaded(ids).logits
    assert torch.allclose(fuse(loaded)(ids).logits, wanted, atol=1e-5)


def test_parameters_and_names_stay_and_restore_undoes_it():
    model = language_model()
    ids = tokens()
    wanted, before = step(model, ids), state(model)
    types = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    fuse(model)
    step(model, ids)
    assert parameters == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert list(before) == list(model.state_dict())
    peft_kernels.restore(model)
    assert types == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    for key, value in step(model, ids).items():
        assert torch.equal(value, wanted[key])
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def test_peft_on_experts_that_are_fused():
    """PEFT wraps them, and adds to their stacks by parametrizations, until the model is accelerated again."""
    base = tiny_moe("mixtral")
    stock = copy.deepcopy(base)
    peft_kernels.optimize(base)
    torch.manual_seed(1)
    model = randomize(get_peft_model(base, config()))
    torch.manual_seed(1)
    wanted = step(randomize(get_peft_model(stock, config())), ids := tokens())
    assert_same(step(model, ids), wanted)
    assert_same(step(fuse(model), ids), wanted)


def test_hot_swapping(tmp_path):
    model = with_second(language_model(), r=3).eval()
    ids = tokens()
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    wanted = model(ids).logits
    model.set_adapter("default")
    fuse(model)
    assert not torch.allclose(model(ids).logits, wanted, atol=1e-3)
    hotswap_adapter(model, str(tmp_path / "second"), "default", torch_device="cpu")
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


# ---- What keeps its own path ----------------------------------------------------------------------------------------


def reasons_of(model):
    return {layer.reason for layer in peft_kernels.optimize(model) if layer.kind == "peft.ParamWrapper"}


def stays_stock(model, reason, caplog):
    inputs = routed()
    wanted = differentiate(model, inputs)
    assert any(reason in each for each in reasons_of(model))
    actual = differentiate(model, inputs)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert error(actual[name], value) <= FP32_SUM, name
    assert any(reason in message for message in stock_path_reasons(model, caplog, *inputs))


def test_hooks_are_called(caplog):
    model, seen = layer_model(), []
    model.get_base_model().experts.base_layer.register_forward_hook(lambda *_: seen.append("inner"))
    model.get_base_model().experts.get_base_layer().register_forward_pre_hook(lambda *_: seen.append("experts"))
    stays_stock(model, "its base layer has hooks", caplog)
    assert seen.count("inner") == seen.count("experts") == 3


def test_forward_that_was_replaced(caplog):
    model = layer_model()
    experts = model.get_base_model().experts.get_base_layer()
    experts.forward = lambda x, *_: x * experts.down_proj.sum()
    inputs = routed()
    wanted = differentiate(model, inputs)
    assert reasons_of(model) == {"its base layer, a MixtralExperts, is no mixture's experts that are fused"}
    for name, value in differentiate(model, inputs).items():
        assert error(value, wanted[name]) <= FP32_SUM, name


@pytest.mark.parametrize("on", ["gate_up_proj", "down_proj"])
def test_other_parametrizations(on, caplog):
    model = layer_model(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    parametrize.register_parametrization(model.get_base_model().experts.get_base_layer(), on, nn.Tanh())
    with_stock = copy.deepcopy(model)
    inputs = routed()
    assert any(f"its {on} has a parametrization" in each for each in reasons_of(model))
    with torch.no_grad():
        torch.manual_seed(0)
        try:
            wanted = with_stock(*inputs)
        except Exception as stock_error:  # PEFT's, which takes its own parametrization away by another class's name
            with pytest.raises(type(stock_error)):
                model(*inputs)
        else:
            assert error(model(*inputs), wanted) <= FP32_SUM


def test_other_parameters_than_stacks():
    model = randomize(get_peft_model(tiny_moe("mixtral"), config(target_parameters=["mlp.gate.weight"])))
    ids = tokens()
    wanted = step(model, ids)
    assert reasons_of(model) == {"its base layer, a MixtralTopKRouter, is no mixture's experts that are fused"}
    assert_same(step(model, ids), wanted)


def test_biases_are_no_stacks():
    model = layer_model("gpt_oss:GptOssExperts", target_parameters=["experts.gate_up_proj_bias"])
    inputs = routed()
    wanted = differentiate(model, inputs)
    assert reasons_of(model) == {"gate_up_proj_bias is no stack of its base layer's"}
    for name, value in differentiate(model, inputs).items():
        assert error(value, wanted[name]) <= FP32_SUM, name


def test_mixed_batches_are_refused_as_stock_does():
    model = layer_model().eval()
    for each in (model, fuse(copy.deepcopy(model))):
        with pytest.raises(ValueError, match="mixed"):
            each(*routed(2), adapter_names=["default", "default"])


def test_adapters_in_fp64_are_left_to_stock(caplog):
    model = layer_model()
    for wrapper in wrappers(model):
        wrapper.lora_A.double(), wrapper.lora_B.double()
    stays_stock(model, "adapter 'default' is torch.float64 and torch.float64", caplog)


def test_one_expert_is_left_to_stock(caplog):
    layer = experts_layer("mixtral:MixtralExperts")
    layer.num_experts = 1
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer, name, nn.Parameter(getattr(layer, name)[:1].detach().clone()))
    model = randomize(get_peft_model(OneMixture(layer), config(r=2)))
    inputs = torch.randn(4, HIDDEN), torch.zeros(4, 1, dtype=torch.long), torch.rand(4, 1)
    wanted = differentiate(model, inputs)
    assert reasons_of(model) == {"its stack is of one expert"}
    for name, value in differentiate(model, inputs).items():
        assert error(value, wanted[name]) <= FP32_SUM, name


def test_sizes_are_those_that_the_tests_rely_on():
    assert all(wrapper.num_experts == EXPERTS for wrapper in wrappers(layer_model()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral:MixtralExperts", "llama4:Llama4TextExperts"])
def test_compiled_code_has_fewer_breaks_than_stock(name):
    model = layer_model(name).get_base_model()
    inputs = inputs_of(model.experts.get_base_layer())
    torch.compiler.reset()
    of_stock = torch._dynamo.explain(model)(*inputs).graph_break_count
    fuse(model)
    torch.compiler.reset()
    assert torch._dynamo.explain(model)(*inputs).graph_break_count <= 2 < of_stock


def test_compiled_code_computes_the_same():
    model = fuse(layer_model()).get_base_model()
    inputs = routed()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(*inputs), model(*inputs)) <= FP32_SUM
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = [torch.autograd.grad(each(*inputs).square().sum(), parameters) for each in (model, compiled)]
    assert len(parameters) == 4 and all(error(*pair) <= FP32_SUM for pair in zip(*grads, strict=True))
