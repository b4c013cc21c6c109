"""The projections family against fp64; which layers are packed, and which changes they notice."""

import copy
import pickle

import pytest
import tolerances
import torch
from comparison import DTYPES, assert_close, error, short
from decoding_models import CHANGES, check_sees, decode, lora_of, make, make_projection
from tiny_models import SAME_STEP
from torch import nn

import peft_kernels
from peft_kernels.inference import packed as integration
from peft_kernels.integrations.registry import change_class
from peft_kernels.ops.projections import Projections, project
from peft_kernels.testing.reference import projections as oracle

pytestmark = pytest.mark.kernels

N, K = 96, 128


# ---- The operation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("ranks", [(), (4,), (3, 8)], ids=["plain", "one", "two"])
@pytest.mark.parametrize("base", ["nf4", "nested", "dense"])
def test_against_fp64(cpu_isa, base, ranks, dtype):
    projection = make_projection(N, K, dtype, base, bias=True, ranks=ranks)
    x = torch.randn(2, 3, K).to(dtype)
    y = project(x, Projections([projection]))
    assert y.dtype is dtype
    assert_close(y, oracle.project(x, projection), 2 * tolerances.product(dtype, dtype))


@pytest.mark.parametrize("rows", [(), (0,), (1,), (64,), (2, 5)])
def test_rows(rows):
    projection = make_projection(N, K, torch.float32)
    x = torch.randn(K, *rows).movedim(0, -1)  # whose rows are not dense
    assert_close(project(x, Projections([projection])), oracle.project(x, projection), tolerances.FP32_SUM)


def test_bad_arguments():
    projection, other = make_projection(N, K, torch.float32), make_projection(8, K, torch.float32)
    x, packed = torch.randn(1, K), Projections([projection])
    with pytest.raises(ValueError, match=r"projections: got one of 128 features, wanted 127 features"):
        project(x[:, 1:], packed)
    with pytest.raises(ValueError, match="projections: got 2 of them, wanted one"):
        project(x, Projections([projection, projection]))
    with pytest.raises(ValueError, match="x: got one that requires a gradient, or adapters that do"):
        project(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match="x: got float64"):
        project(x.detach().double(), packed)
    with pytest.raises(ValueError, match=r"lora_B: got shape \[8, 4\], wanted \[96, 4\]"):
        Projections([projection._replace(lora_B=other.lora_B)])
    with pytest.raises(ValueError, match=r"lora_A: got strides \[1, 4\], wanted dense rows"):
        Projections([projection._replace(lora_A=[projection.lora_A[0].T.contiguous().T])])
    with pytest.raises(ValueError, match="projections: got dense weights, wanted bfloat16, as x"):
        project(x.detach().bfloat16(), Projections([make_projection(N, K, torch.float32, "dense")]))
    two = Projections([projection, projection])
    for bytes_ in (packed.packed[:-1], two.packed, packed.packed.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="projections: got uint8"):
            torch.ops.peft_kernels.projections_forward(x, bytes_, N)
    with pytest.raises(ValueError, match="projections: got none"):
        Projections([])


def test_projections_that_differ():
    nf4, nested, dense = (make_projection(8, 64, torch.float32, base) for base in ("nf4", "nested", "dense"))
    biased = make_projection(8, 64, torch.float32, bias=True)
    for other in (nested, dense, biased):
        with pytest.raises(ValueError, match="projections: got some of another format than others"):
            Projections([nf4, nf4, other])


def test_memory_is_kept():
    projection, x = make_projection(N, K, torch.float32), torch.randn(1, K)
    projections = Projections([projection])
    wanted = project(x, projections)
    for matrix in projection.lora_A:
        matrix.data = torch.zeros_like(matrix)
    assert torch.equal(project(x, projections), wanted)


def test_opcheck():
    projections = Projections([make_projection(N, K, torch.float32)])
    op = torch.ops.peft_kernels.projections_forward.default
    torch.library.opcheck(op, (torch.randn(2, K), projections.packed, N))


# ---- Layers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often layers were computed from what was packed."""
    calls = []
    stock = integration.project
    monkeypatch.setattr(integration, "project", lambda *args: calls.append(1) or stock(*args))
    return calls


def optimize(model):
    """Without the decoder layers, which would not call their linear layers."""
    peft_kernels.optimize(model)
    for layer in model.modules():
        if hasattr(type(layer), "stock") and type(layer).__name__ == "LlamaDecoderLayer":
            change_class(layer, type(layer), type(layer).stock)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "no-lora"])
@pytest.mark.parametrize("base", ["4bit", "dense"])
def test_decodes_as_stock_does(base, lora, calls):
    model = make(base=base, lora=lora)
    wanted = decode(model)
    optimize(model)
    assert error(decode(model), wanted) <= SAME_STEP
    packed = base == "4bit" or lora  # a dense layer without adapters stays stock's
    assert len(calls) == (3 * 2 * 7 if packed else 0)  # tokens, blocks, linear layers


@pytest.mark.parametrize("change", CHANGES)
def test_sees_what_changes(change, calls):
    check_sees(change, optimize, calls)


@pytest.mark.parametrize("change", ["gradients", "autocast", "training", "rows", "features", "double"])
def test_left_to_the_operation(change, calls):
    model = make().train(change == "training")
    optimize(model)
    layer = lora_of(model)
    x = torch.randn(9 if change == "rows" else 1, 127 if change == "features" else 128)
    with (
        torch.set_grad_enabled(change == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
    ):
        try:
            layer(x.double() if change == "double" else x)
        except (RuntimeError, ValueError):
            assert change in ("features", "double")  # as stock refuses them
    assert not calls


def test_copies_pickles_and_moves(calls):
    model = make()
    optimize(model)
    wanted = decode(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert "_packed" in vars(lora_of(model))
    model.to("cpu")  # may replace what was packed, which would be kept alive
    assert not any("_packed" in vars(layer) for layer in model.modules())
    nn.init.zeros_(lora_of(model).lora_B["default"].weight)
    for copied in copies:
        calls.clear()
        assert "_packed" not in vars(lora_of(copied))
        assert torch.equal(decode(copied), wanted) and len(calls) == 42


def test_restored():
    model = make()
    wanted = decode(model)
    optimize(model)
    decode(model)
    peft_kernels.restore(model)
    assert torch.equal(decode(model), wanted)
    assert not any("_packed" in vars(layer) for layer in model.modules())
