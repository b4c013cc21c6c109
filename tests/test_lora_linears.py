"""Layers of the same x in one operation: to the bits of one layer after the other; how many launches they take on a
GPU; and how layers of models find one another."""

import ptx_emulator
import pytest
import torch
from comparison import error
from decoding_models import make_projection
from torch import nn

from peft_kernels.inference import shared_input
from peft_kernels.inference.shared_input import sharing
from peft_kernels.ops import lora_linear, quantize_4bit
from peft_kernels.ops.lora_linears import are_alike, lora_linears_unchecked

pytestmark = pytest.mark.kernels

K = 320
# Queries, keys and values of a grouped attention: m, x's dtype, the product's, and the layers' features and ranks.
GROUPED = [(96, (4,)), (33, ()), (32, (3, 17))]
CASES = {
    "one-row": (1, torch.bfloat16, None, "nested", GROUPED),
    "8-rows": (8, torch.float16, None, "nf4", [(48, (16,)), (48, (16,))]),
    "13-rows": (13, torch.bfloat16, torch.bfloat16, "nf4", [(16, (5,)), (40, (2,)), (1, (1,)), (17, (40,))]),
    "32-rows": (32, torch.float16, None, "nested", [(40, ()), (64, ())]),
    "fp32-x": (2, torch.float32, torch.bfloat16, "nf4", GROUPED),
}


def make(name, bias=True):
    m, dtype, compute_dtype, base, layers = CASES[name]
    weight_dtype = compute_dtype or dtype
    projections = [make_projection(n, K, weight_dtype, base, bias, ranks) for n, ranks in layers]
    return torch.randn(m, K).to(dtype), projections, weight_dtype


def one_by_one(x, projections, compute_dtype):
    return [lora_linear(x, *projection, compute_dtype=compute_dtype) for projection in projections]


@pytest.mark.parametrize("name", list(CASES))
def test_same_bits_as_one_by_one(platform, name):
    x, projections, compute_dtype = make(name)
    ys = lora_linears_unchecked(x, projections, compute_dtype, x.dtype)
    for y, wanted in zip(ys, one_by_one(x, projections, compute_dtype), strict=True):
        assert y.is_contiguous() and torch.equal(y, wanted)


@pytest.fixture
def emulated():
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    from ptx_emulator.ops import emulated

    with emulated() as launches:
        yield lambda: [launch["kernel"] for launch in launches()]


@pytest.mark.parametrize("name", list(CASES))
def test_launches(emulated, name):
    x, projections, compute_dtype = make(name)
    emulated()  # those of quantising
    lora_linears_unchecked(x, projections, compute_dtype, x.dtype)
    together = emulated()
    assert [kernel for kernel in together if "shrink" in kernel] == together[:-1]
    assert "matmuls_few_rows_kernel" in together[-1]
    assert len(together) == (2 if any(p.lora_A for p in projections) else 1)
    one_by_one(x, projections, compute_dtype)
    assert len(emulated()) == sum(2 if p.lora_A else 1 for p in projections)


@pytest.mark.parametrize("profile", ["sm_89", "sm_90"])
def test_overlaps_the_shrink(emulated, profile):
    """Also what has no adapter of its own."""
    from ptx_emulator.build import native

    x, projections, compute_dtype = make("one-row")
    with ptx_emulator.profile(profile):
        emulated()
        lora_linears_unchecked(x, projections, compute_dtype, x.dtype)
        assert [launch["overlaps"] for launch in native().take_records()] == [False, profile == "sm_90"]


def test_says_why_one_by_one(emulated, monkeypatch, capfd):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    x, (first, second, _), compute_dtype = make("one-row")
    fp4 = second._replace(weight=quantize_4bit(torch.randn(33, K).bfloat16(), 64, "fp4", double_quant=True))
    many = make_projection(16, K, x.dtype, "nested", True, (4000,))
    calls = {
        "m=1 n=96, 33 k=320: together": (x, [first, second], compute_dtype),
        "m=33 n=96, 33 k=320: one by one (x has more than 32 rows": (x.repeat(33, 1), [first, second], compute_dtype),
        "n=96, 33, 33 k=320: one by one (the kernels do not make the product of one)": (
            x.float(), [first, second, second], torch.float32
        ),
        "n=33, 33 k=320: one by one (one is of another quant_type)": (x, [second, fp4], compute_dtype),
        "n=96, 16 k=320: one by one (the ranks of one are so many that its shrink is cut in another way)": (
            x, [first, many], compute_dtype
        ),
        "one by one (there are more than 4)": (x, [second] * 5, compute_dtype),
        "m=9 n=16, 10390 k=64: one by one (one has outputs enough to fill the device)": (
            torch.randn(9, 64).bfloat16(), [make_projection(n, 64, torch.bfloat16) for n in (16, 10390)], x.dtype
        ),
    }  # fmt: skip
    for given, layers, dtype in calls.values():
        ys = lora_linears_unchecked(given, layers, dtype, given.dtype)
        for y, wanted in zip(ys, one_by_one(given, layers, dtype), strict=True):
            assert torch.equal(y, wanted)
    printed = capfd.readouterr().err
    assert not [line for line in calls if line not in printed]


def test_bad_arguments():
    x, (first, second, _), compute_dtype = make("one-row")
    assert are_alike(first, second)
    for other in (first._replace(bias=None), make_projection(8, K, torch.bfloat16, "nf4", True)):
        assert not are_alike(first, other)
    op = torch.ops.peft_kernels.lora_linears
    with pytest.raises(ValueError, match=r"x: got shape \[1, 319\]"):
        lora_linears_unchecked(x[:, 1:], [first, second], compute_dtype, x.dtype)
    weight, format = first.weight.arguments
    with pytest.raises(ValueError, match="num_adapters: got none, wanted one at least"):
        op(x, weight, format, [], [], [], [], [])
    with pytest.raises(ValueError, match="weights: got 5 items, wanted as many for each of 2 layers"):
        op(x, weight, format, [], [0, 0], [], [], [])
    for number in (-1, 2):
        with pytest.raises(ValueError, match=f"num_adapters: got {number}, wanted a part of lora_A, which has 1 item"):
            op(x, weight, format, [], [number], first.lora_A, first.lora_B, first.scaling)
    with pytest.raises(ValueError, match="lora_A: got 1 item, wanted as many as num_adapters says"):
        op(x, weight, format, [], [0], first.lora_A, first.lora_B, first.scaling)
    with pytest.raises(ValueError, match="lora_B: got 0 items, wanted 1"):
        op(x, weight, format, [], [1], first.lora_A, [], first.scaling)


def test_opcheck():
    x, projections, _ = make("one-row")
    tensors, formats = zip(*(p.weight.arguments for p in projections), strict=True)
    lists = [[item for p in projections for item in p[i]] for i in (2, 3, 4)]
    counts = [len(p.lora_A) for p in projections]
    tensors, formats = ([item for items in kind for item in items] for kind in (tensors, formats))
    arguments = x, tensors, formats, [p.bias for p in projections], counts, *lists
    torch.library.opcheck(torch.ops.peft_kernels.lora_linears.default, arguments, {"out_dtype": torch.float32})


# ---- Layers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the operation has computed."""
    calls, operation = [], shared_input.lora_linears_unchecked

    def count(x, projections, *dtypes):
        calls.append(len(projections))
        return operation(x, projections, *dtypes)

    monkeypatch.setattr(shared_input, "lora_linears_unchecked", count)
    return calls


@pytest.fixture
def model(monkeypatch):
    """A 4-bit model with LoRA, whose layers share as they do on a GPU."""
    import decoding_models

    import peft_kernels

    monkeypatch.setattr(shared_input.on_gpu, "is_on_gpu", lambda x: True)
    model = decoding_models.make("llama", "4bit")
    peft_kernels.optimize(model, exclude="decoder_layer")
    return model


IDS = torch.tensor([[7, 3, 11]])


@torch.no_grad()
def logits(model, shares=True):
    with pytest.MonkeyPatch.context() as patch:
        if not shares:
            patch.setattr(shared_input.on_gpu, "is_on_gpu", lambda x: False)
        return model(IDS, use_cache=False).logits


def test_layers_share(model, calls):
    wanted = logits(model, shares=False)
    assert not calls
    assert torch.equal(logits(model), wanted)
    assert calls == [3, 2] * 2  # q, k, v; gate and up; of two blocks
    model(IDS, use_cache=False)  # with gradients
    assert len(calls) == 4


def names_of(model, name):
    return [layer for path, layer in model.named_modules() if path.endswith(name)]


@pytest.mark.parametrize("change", ["input", "in-place", "output", "disabled", "dropout", "base"])
def test_layers_that_do_something_else(model, calls, change):
    """Each gives what it would have given by itself."""
    k, up = names_of(model, "k_proj")[0], names_of(model, "up_proj")[0]
    if change == "input":
        k.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    elif change == "in-place":
        up.register_forward_pre_hook(lambda layer, args: (args[0].mul_(2),))
    elif change == "output":
        up.register_forward_hook(lambda layer, args, y: y + 1)
    elif change == "disabled":
        k.enable_adapters(False)
    elif change == "dropout":
        k.lora_dropout["default"] = nn.Dropout(0.5)
        k.lora_dropout.train()
    else:
        k.base_layer.register_forward_hook(lambda layer, args, y: y * 2)
    torch.manual_seed(3)
    wanted = logits(model, shares=False)
    torch.manual_seed(3)
    assert torch.equal(logits(model), wanted)
    assert calls[-1] == 2 and len(calls) == 4


def test_compiled(model):
    """In one graph, with the operation in it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    mlp = names_of(model, "mlp")[0]
    attention = names_of(model, "self_attn")[0]
    x = torch.randn(1, 3, 64)
    angles = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    with torch.no_grad():
        for layer, arguments in ((mlp, {}), (attention, {"position_embeddings": angles, "attention_mask": None})):
            wanted, _ = (layer(x, **arguments), None) if layer is mlp else layer(x, **arguments)
            compiled = torch.compile(layer, fullgraph=True, backend=backend)
            got = compiled(x, **arguments)
            assert error(got if layer is mlp else got[0], wanted) < 1e-6
            assert sum("lora_linears" in target for target in graphs[-1]) == 1
    assert not shared_input._traced


def test_context_ends():
    layer = nn.Linear(2, 2)
    with sharing([layer, None]):
        assert shared_input.take(layer, torch.ones(1, 2)) is None
    assert shared_input._entered.get() is None
