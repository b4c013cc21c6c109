"""lora_linear_grouped and torch's machinery: what is saved and computed, checkpointing, compilation."""

from dataclasses import replace
from unittest import mock

import pytest
import tolerances
import torch
from comparison import same_results, saved_for_backward
from lora_linear_cases import Recorder, assert_close, expected, make_batch, make_case, run, short, with_index
from torch.utils.checkpoint import checkpoint

from peft_kernels.ops import NF4Weight, lora_linear_grouped
from peft_kernels.ops.lora_linear_grouped import _used
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels
not_emulated = pytest.mark.parametrize("platform", ["cpu", "cuda"], indirect=True)  # dynamo passes by dispatch modes


def rows_index(tokens, examples=6, adapters=3):
    return torch.randint(-1, adapters, (examples, tokens), device="cpu")


# ---- what is saved, what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [(), (0.1, 0.0, 0.5)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_saves_x_s_seeds_and_the_index(platform, base, dropout):
    case = make_batch(5, 40, 128, base=base, bias=False, dropout=dropout)
    index = rows_index(5)
    adapters = [tensor.requires_grad_() for tensor in case.lora_A + case.lora_B]
    weight = case.weight
    frozen = [weight.codes, weight.absmax, *weight.nested] if isinstance(weight, NF4Weight) else [weight]

    def saved(x):
        arguments = weight, None, case.lora_A, case.lora_B, case.scaling, index, case.dropout
        return saved_for_backward(lambda: lora_linear_grouped(x, *arguments), adapters + frozen)[1]

    x = case.x.clone().requires_grad_()
    sizes = saved(x)
    s_bytes, small = 30 * 20 * 4, 30 * 8 + (3 * 8 if dropout else 0)  # s is as wide as the largest rank, 17
    assert sizes.pop(x.data_ptr()) == 30 * 128 * 4
    assert sum(sizes.values()) == s_bytes + small
    for lora_A in case.lora_A:
        lora_A.requires_grad_(False)
    assert sum(saved(x).values()) == s_bytes + small, "a frozen A saves s alone"
    for lora_B in case.lora_B:
        lora_B.requires_grad_(False)
    assert sum(saved(x).values()) == small
    assert saved(case.x) == {}


@pytest.mark.parametrize("wanted", ["x", "lora_A0", "lora_B2", "bias", "weight", "lora_A2 lora_B0", "x bias lora_B0"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_computes_what_is_asked_for(platform, base, wanted, monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: False)  # a dense product is torch's
    case = make_batch(7, 40, 128, base=base, dropout=(0.2, 0.5, 0.0))
    call, leaves, wanted = with_index([0, 2, -1, 2, 0, 2]), case.leaves(), wanted.split()
    if base == "nf4" and "weight" in wanted:
        pytest.skip("a 4-bit weight is frozen")
    full = run(case, call)
    trained = {name: leaf.requires_grad_(name in wanted) for name, leaf in leaves.items()}
    recorder = Recorder()
    y = call(case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling, case.dropout, seeds=case.seeds)
    with recorder:
        y.backward(case.grad_y)
    for name, leaf in trained.items():
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, full[name]), name
    sizes = [
        sum(leaves[name].numel() for name in wanted if name.startswith(kind)) for kind in ("x", "lora_A", "lora_B")
    ]
    assert recorder.results[-1:] == ([sizes] if any(sizes) else [])
    assert len(recorder.results) == any(sizes) + ("x" in wanted and base == "nf4")  # the base product's dx


@pytest.mark.may_launch_nothing
def test_adapters_without_rows_have_no_gradient(platform):
    case = make_batch(4, 40, 128)
    for index in ([1] * 6, [-1] * 6, [0, 2, 0, 2, 0, 2]):
        actual = run(case, with_index(index))
        for i in range(3):
            assert (actual[f"lora_A{i}"] is None) == (actual[f"lora_B{i}"] is None) == (i not in index)
    case.x, case.grad_y = case.x[:, :0], case.grad_y[:, :0]
    assert run(case, with_index([1] * 6))["lora_A1"] is None


def test_a_captured_graph_does_not_read_the_index():
    """Which adapters have rows may be another matter when it is replayed."""
    index = mock.Mock(is_meta=False, is_cuda=True, spec_set=["is_meta", "is_cuda"])  # it has no values to give
    with mock.patch("torch.cuda.is_current_stream_capturing", lambda: True):
        assert _used(index, torch.ones(3, 4), 2) == [True, True]


def test_double_backward_is_refused(platform):
    case = make_batch(4, 40, 128)
    x = case.x.requires_grad_()
    y = lora_linear_grouped(x, case.weight, None, case.lora_A, case.lora_B, case.scaling, [0, 1, 2, -1, 0, 1])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_finite_differences(platform):
    """Of all inputs at once, along a random direction."""
    case = make_batch(5, 30, 64, dropout=(0.3, 0.0, 0.5), ranks=(7, 3, 2))
    index = rows_index(5)
    gradients = run(case, with_index(index))
    wanted = expected(case, with_index(index, oracle))["y"]
    step, directions = 1e-5, {name: torch.randn_like(leaf) for name, leaf in case.leaves().items()}
    moved = replace(
        case, x=case.x.double() + step * directions["x"], bias=case.bias.double() + step * directions["bias"]
    )
    for kind in ("lora_A", "lora_B"):
        tensors = getattr(case, kind)
        setattr(moved, kind, [t.double() + step * directions[f"{kind}{i}"] for i, t in enumerate(tensors)])
    difference = (expected(moved, with_index(index, oracle))["y"] - wanted) / step
    along = sum((directions[name].double() * gradients[name]).sum() for name in directions)
    assert_close(along, (difference * case.grad_y).sum(), 1e-4)


# ---- autocast and checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_autocast(platform, base, dtype):
    case, call = make_batch(7, 40, 128, base=base), with_index(rows_index(7))
    with torch.autocast(platform, dtype):
        actual = run(case, call)
    same_results(actual, run(case, call, compute_dtype=dtype, out_dtype=dtype))
    assert actual["y"].dtype == dtype and actual["x"].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_checkpointing(platform, base, autocast, reentrant):
    case, index = make_batch(7, 40, 128, base=base, dropout=(0.5, 0.1, 0.0)), rows_index(7)
    case.seeds = None  # drawn inside, and once more when the segment runs again

    def checkpointed(x, *arguments, seeds):
        return checkpoint(lambda x: with_index(index)(x, *arguments), x, use_reentrant=reentrant)

    with torch.autocast(platform, torch.bfloat16, enabled=autocast):
        torch.manual_seed(5)
        wanted = run(case, with_index(index))
        torch.manual_seed(5)
        same_results(run(case, checkpointed), wanted)


# ---- torch.compile -----------------------------------------------------------------------------------------------


@not_emulated
@pytest.mark.parametrize("dropout", [(), (0.5, 0.0, 0.1)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_compile(platform, base, dropout):
    """Once for any number of rows and any index; adapters without rows get zeros."""
    torch.compiler.reset()
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lora_linear_grouped, fullgraph=True, backend=backend, dynamic=True)
    for tokens, adapters in ((5, 3), (30, 3), (13, 1)):
        case = make_batch(tokens, 24, 128, torch.bfloat16, base=base, dropout=dropout)
        index = rows_index(tokens, adapters=adapters)
        actual, wanted = run(case, with_index(index, compiled)), run(case, with_index(index))
        for name, value in wanted.items():
            if value is None:
                assert not actual[name].any()
            else:
                assert_close(actual[name], value, tolerances.product(value.dtype, value.dtype), name)
        counts.append(len(graphs))
    assert counts[0] == counts[-1]


@not_emulated
def test_compile_with_an_index_in_a_list(platform):
    torch.compiler.reset()
    compiled = torch.compile(lora_linear_grouped, fullgraph=True, backend="aot_eager")
    for index in ([0, 0, 1, 1, 2, 2], [2, 0, 1, 0, -1, 2], [1] * 6):
        case = make_batch(3, 24, 128, torch.bfloat16)
        arguments = case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling, index
        assert torch.equal(compiled(*arguments), lora_linear_grouped(*arguments))


@pytest.mark.parametrize("dropout", [(), (0.5, 0.0, 0.1)], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["same", "bf16"])
def test_opcheck(platform, dtype, dropout):
    case = make_batch(3, 40, 128, torch.float16, dropout=dropout)
    index = rows_index(3)
    adapters, options = (case.lora_A, case.lora_B, case.scaling), {}
    if dropout:
        options = {"dropout": case.dropout, "seeds": case.seeds}
    for some in (case.x, case.x.transpose(0, 1).contiguous().transpose(0, 1), case.x[:, :0]):
        x, rows = some, index[:, : some.shape[1]]
        arguments = x, torch.randn(*x.shape[:-1], 40), rows, *adapters
        for op in (ops.lora_linear_grouped, ops.lora_linear_grouped_forward):
            torch.library.opcheck(op.default, arguments, options | {"out_dtype": dtype})
        s = torch.randn(x.shape[:-1].numel(), 20)
        grad_y, base = torch.randn(*x.shape[:-1], 40).half(), torch.randn(x.shape)
        arguments = grad_y, x, s, base, rows, *adapters, [True] * 3, [True, False, True]
        torch.library.opcheck(ops.lora_linear_grouped_backward.default, arguments, options | {"x_dtype": dtype})


def test_meta_shapes():
    case = make_case(12, 24, 128, (3, 5), torch.bfloat16)
    wanted = run(case, with_index([0, 1] * 6))
    weight = case.weight
    case.weight = replace(weight, codes=weight.codes.to("meta"), absmax=weight.absmax.to("meta"))
    for name in ("x", "bias", "grad_y"):
        setattr(case, name, getattr(case, name).to("meta"))
    case.lora_A, case.lora_B = [a.to("meta") for a in case.lora_A], [b.to("meta") for b in case.lora_B]
    for index in ([0, 1] * 6, torch.tensor([0, 1] * 6, device="meta")):
        for name, value in run(case, with_index(index)).items():
            assert value.is_meta and (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype), name
