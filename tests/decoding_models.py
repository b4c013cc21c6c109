"""Small models that decode, projections, and what may change about a model after it has decoded."""

import copy
import inspect

import torch
from comparison import error
from optional import if_installed
from peft_models import randomize
from tiny_models import SAME_STEP, tiny
from torch import nn

from peft_kernels.ops import quantize_4bit
from peft_kernels.ops.projections import Projection

bnb, peft, transformers = map(if_installed, ("bitsandbytes", "peft", "transformers"))


def with_cache(cache):
    """The argument of a model's forward; newer versions of transformers have another name for it."""
    names = inspect.signature(transformers.LlamaModel.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def make_projection(n, k, dtype, base="nf4", bias=False, ranks=(4,)):
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    if base != "dense":
        weight = quantize_4bit(weight, quant_type="nf4", double_quant=base == "nested")
    lora_A = [torch.randn(r, k) / k**0.5 for r in ranks]
    lora_B = [torch.randn(n, r) for r in ranks]
    b = torch.randn(n).to(dtype) if bias else None
    return Projection(weight, b, lora_A, lora_B, [0.5] * len(ranks))


def quantised(model, dtype=torch.float32, storage=torch.uint8):
    """Replaces the linear layers of a model's blocks by bitsandbytes' layers."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                sizes = child.in_features, child.out_features
                layer = bnb.nn.Linear4bit(
                    *sizes, child.bias is not None, dtype, quant_type="nf4", quant_storage=storage
                )
                layer.load_state_dict(child.state_dict())
                layer.support_avx512bf16_for_cpu = False  # else stock would round its statistics to bf16
                setattr(module, name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def make(name="llama", base="4bit", lora=True, **config):
    model = tiny(name, hidden=64, intermediate=128, **config)
    for layer in model.modules():
        if "Norm" in type(layer).__name__:
            nn.init.normal_(layer.weight, 1, 0.2)
    if base == "4bit":
        model = quantised(model)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
        randomize(model)
    return model.eval()


def decode(model, steps=3, rows=2, prompt=12):
    """The logits of a few tokens, one by one after a prompt."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (rows, prompt + steps), generator=generator)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    cache, logits = transformers.DynamicCache(), []
    with torch.no_grad():
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + steps))]:
            out = model(ids[:, begin:end], attention_mask=padding[:, :end], **with_cache(cache))
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


def layers_of(model):
    return model.get_base_model().model.layers


def lora_of(model):
    return layers_of(model)[1].mlp.down_proj


def _replace_weight(model):
    layer = lora_of(model).lora_A["default"]
    layer.weight = nn.Parameter(2 * layer.weight)


def _change_base(model):
    base = lora_of(model).base_layer
    other = bnb.nn.Linear4bit(base.in_features, base.out_features, False, torch.float32, quant_type="nf4")
    nn.init.normal_(other.weight, std=0.1)
    base.weight = other.to("cpu").weight


def _change_memory(model):
    weight = lora_of(model).base_layer.weight
    weight.data = torch.randint_like(weight.data, 256)


def _move_statistics(model):
    absmax = lora_of(model).base_layer.weight.quant_state.state2.absmax
    absmax.data = 2 * absmax


def _replace_dict(model):
    layer = lora_of(model)
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(128, 4, bias=False)})


def _truncate(model):
    """Does what pruning of ranks does: the rest stays where it is in memory."""
    a, b = lora_of(model).lora_A["default"].weight, lora_of(model).lora_B["default"].weight
    a.data, b.data = a.data[:2], b.data[:, :2]


def _turn(model):
    weight = layers_of(model)[0].self_attn.o_proj.lora_B["default"].weight
    weight.data = weight.data.view(4, 64).T


def _new_adapter(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    randomize(model)
    model.set_adapter("other")


def _dora(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=r".*layers\.1\.mlp\.down_proj", use_dora=True))
    model.set_adapter("other")


def double(module, args, out):
    return 2 * out


CHANGES = {
    "adapter": _new_adapter,
    "dora": _dora,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scale": lambda model: lora_of(model).scale_layer(3.0),
    "scalings": lambda model: setattr(lora_of(model), "scaling", {"default": 5.0}),  # rescale_adapter_scale does so
    "weight of A": _replace_weight,
    "memory of A": lambda model: setattr(
        lora_of(model).lora_A["default"].weight, "data", 2 * lora_of(model).lora_A["default"].weight
    ),
    "numbers of A": lambda model: lora_of(model).lora_A["default"].weight.data.mul_(2),
    "bias of A": lambda model: setattr(lora_of(model).lora_A["default"], "bias", nn.Parameter(torch.ones(4))),
    "ranks": _truncate,
    "strides of B": _turn,
    "dictionary of A": _replace_dict,
    "weight of the base": _change_base,
    "memory of the statistics": _move_statistics,
    "memory of the base": _change_memory,
    "weight of a norm": lambda model: setattr(
        layers_of(model)[0].input_layernorm, "weight", nn.Parameter(torch.ones(64))
    ),
    "eps": lambda model: setattr(layers_of(model)[1].post_attention_layernorm, "variance_epsilon", 1.0),
    "activation": lambda model: setattr(layers_of(model)[0].mlp, "act_fn", nn.ReLU()),
    "projection": lambda model: setattr(layers_of(model)[0].self_attn, "v_proj", nn.Linear(64, 32, bias=False)),
    "block": lambda model: setattr(layers_of(model)[0], "mlp", nn.Identity()),
    "hook on A": lambda model: lora_of(model).lora_A["default"].register_forward_hook(double),
    "hook on a layer": lambda model: layers_of(model)[0].self_attn.k_proj.register_forward_hook(double),
    "hook on a block": lambda model: layers_of(model)[0].mlp.register_forward_hook(double),
    "hook on a norm": lambda model: layers_of(model)[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: (args[0] + 1,)
    ),
    "forward": lambda model: setattr(
        lora_of(model).lora_B["default"], "forward", lambda x: torch.zeros(*x.shape[:-1], 64)
    ),
}


def check_sees(change, optimize, calls):
    """Checks a model that changes after it has decoded, when its layers keep what they found out: its output has to be
    stock's, and the fused calls, which `calls` counts, have to go on."""
    model = make()
    ours = copy.deepcopy(model)
    before = decode(model)
    optimize(ours)
    assert error(decode(ours), before) <= SAME_STEP
    for changed in (model, ours):
        torch.manual_seed(5)
        CHANGES[change](changed)
    wanted = decode(model)
    assert error(wanted, before) > 10 * SAME_STEP
    calls.clear()
    assert error(decode(ours), wanted) <= SAME_STEP
    assert calls  # the other layers', at least
