"""LoftQ, PiSSA and OLoRA on 4-bit weights, against PEFT's arithmetic."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from comparison import error
from optional import if_installed
from peft_models import dense_weight, layer_of, linear4bit, lora_model, stock_path_reasons
from safetensors.torch import save_file
from torch import nn

import peft_kernels
from peft_kernels import initialize_lora
from peft_kernels.ops._svd import truncated_svd

loftq_utils = if_installed("peft.utils.loftq_utils")

N, K, RANK = 192, 320, 4
pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module")


def make(fused=True, **options):
    """A model on a 4-bit layer, and the weight that was quantised."""
    weight = torch.randn(N, K) * (0.5 + torch.rand(N, 1)) / K**0.5
    base = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, **{"quant_type": "nf4"} | options)
    base.load_state_dict({"weight": weight})
    base.support_avx512bf16_for_cpu = False  # else stock would round its statistics to bf16
    model = lora_model("4bit", base=base.to("cpu"), r=RANK, lora_alpha=12)
    if fused:
        peft_kernels.optimize(model)
    return model, weight


def product(model):
    layer = layer_of(model)
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * b @ a


def left(model, weight):
    """`‖W - Q - scaling · B A‖ / ‖W‖`."""
    return error(dense_weight(layer_of(model).base_layer) + product(model), weight.double())


def of_peft(weight):
    """LoftQ of PEFT, whose function is for GPUs: one quantisation, and one decomposition of what it loses."""
    quantised = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4").to("cpu")
    values = bnb.functional.dequantize_4bit(quantised.data, quantised.quant_state)
    found = loftq_utils._low_rank_decomposition(weight - values, reduced_rank=RANK)
    return error(values + found["L"] @ found["R"], weight)


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_loftq_leaves_less_than_pefts(nested, fused):
    model, weight = make(fused, compress_statistics=nested)
    before, stocks = left(model, weight), of_peft(weight)
    for iterations, limit in ((1, 1.001), (5, 0.96)):
        (row,) = initialize_lora(model, "loftq", {"lin.weight": weight}, iterations=iterations)
        assert row.after == pytest.approx(left(model, weight), rel=1e-4)
        assert row.after <= limit * stocks and row.after < row.before < before
    assert bool(layer_of(model).base_layer.weight.quant_state.nested) == nested


def test_loftq_brings_the_output_nearer():
    model, weight = make()
    x = torch.randn(2, K)
    errors = []
    with torch.no_grad():
        for _ in range(2):
            model(x)  # keeps what the layer was found to be
            initialize_lora(model, "loftq", {"lin.weight": weight}, iterations=len(errors) * 7 + 1)
            errors.append(error(model(x), x @ weight.T))
            reference = x.double() @ (dense_weight(layer_of(model).base_layer) + product(model)).T
            assert error(model(x), reference) < 1e-5
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_begins_as_peft_does_on_a_dense_weight(method, caplog):
    model, weight = make()
    dense = nn.Linear(K, N, bias=False)
    dense.load_state_dict({"weight": weight})
    stock = lora_model("dense", base=dense, nonzero=False, r=RANK, lora_alpha=12, init_lora_weights=method)
    (row,) = initialize_lora(model, method, {"lin.weight": weight})
    scale = float(product(stock).norm() / product(model).norm())  # PEFT's OLoRA has the scaling on top
    assert scale == pytest.approx(3 if method == "olora" else 1, rel=1e-3)
    assert error(scale * product(model), product(stock)) < (2e-3 if method == "pissa" else 1e-5)
    assert row.after == pytest.approx(left(model, weight), rel=1e-4) and row.after < row.before
    assert stock_path_reasons(model, caplog, torch.randn(3, K)) == []


def test_without_weights_begins_from_the_values_in_4_bits():
    model, _ = make()
    values = dense_weight(layer_of(model).base_layer).float()
    (row,) = initialize_lora(model, "pissa")
    assert row.before == 0 and row.after == pytest.approx(left(model, values), rel=1e-4)


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_reads_safetensors(tmp_path, as_folder):
    model, weight = make()
    again = copy.deepcopy(model)
    save_file({"lin.weight": weight}, tmp_path / "model.safetensors")
    path = tmp_path if as_folder else tmp_path / "model.safetensors"
    assert initialize_lora(model, "loftq", path) == initialize_lora(again, "loftq", {"lin.weight": weight})


def test_optimizers_keep_their_parameters_and_checkpoints_load(tmp_path):
    model, weight = make()
    parameters = [p for p in model.parameters() if p.requires_grad]
    initialize_lora(model, "loftq", {"lin.weight": weight})
    assert all(p is q for p, q in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh, _ = make(fused=False)
    layer_of(fresh).base_layer.weight = bnb.nn.Params4bit.from_prequantized(
        state["base_model.model.lin.base_layer.weight"],
        {k.removeprefix("base_model.model.lin.base_layer."): v for k, v in state.items() if "base_layer.weight." in k},
        device="cpu",
        module=layer_of(fresh).base_layer,
    )
    fresh.load_state_dict({k: v for k, v in state.items() if "lora_" in k}, strict=False)
    assert left(fresh, weight) == left(model, weight)


def test_the_decomposition():
    for shape, rank in (((200, 300), 3), ((40, 30), 8), ((300, 200), 3)):
        matrix = torch.randn(*shape)
        u, s, vh = truncated_svd(matrix, rank)
        best = torch.linalg.svdvals(matrix)
        assert error(s, best[:rank]) < 1e-3
        assert error(u.T @ u, torch.eye(rank)) < 1e-5 and error(vh @ vh.T, torch.eye(rank)) < 1e-5
        assert (matrix - (u * s) @ vh).norm() <= 1.0005 * best[rank:].norm()
    before = torch.random.get_rng_state()
    truncated_svd(matrix, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def merged(model):
    model.merge_adapter()


ERRORS = {
    "method": (None, ("svd",), "method: got 'svd', wanted one of 'loftq', 'pissa', 'olora'"),
    "method's type": (None, (["loftq"],), r"method: got \['loftq'\], wanted one of"),
    "weights' type": (None, ("pissa", 3), "weights: got 3, a int, wanted a path"),
    "no tensor": (None, ("pissa", {"lin.weight": 3}), r"weights: got none for lin.weight, wanted \[192, 320\]"),
    "none": (None, ("loftq",), "weights: got None, wanted the weights before quantisation"),
    "missing": (None, ("loftq", {}), r"weights: got none for lin.weight, wanted \[192, 320\]"),
    "shape": (None, ("pissa", {"lin.weight": torch.zeros(3, 3)}), r"weights: got shape \[3, 3\] for lin.weight"),
    "path": (None, ("pissa", "nowhere"), "weights: got 'nowhere', wanted a safetensors file or a folder of them"),
    "merged": (merged, ("pissa",), r"model: got merged adapters \['default'\] in lin, wanted them unmerged"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_errors_leave_the_model_as_it_was(what):
    change, arguments, message = ERRORS[what]
    model, _ = make()
    if change:
        change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_lora(model, *arguments)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_further_errors():
    model, weight = make()
    with pytest.raises(ValueError, match="adapter_name: got 'b', wanted an adapter on 4-bit weights"):
        initialize_lora(model, "pissa", adapter_name="b")
    with pytest.raises(ValueError, match="iterations: got 0, wanted an integer from 1 on"):
        initialize_lora(model, "loftq", {"lin.weight": weight}, iterations=0)
    with pytest.raises(TypeError, match="model: got int"):
        initialize_lora(3, "pissa")
    dora = lora_model("4bit", base=linear4bit(), use_dora=True)
    with pytest.raises(ValueError, match="a DoraLinearVariant in lin, wanted plain LoRA"):
        initialize_lora(dora, "pissa")
