"""lora_linear and torch's machinery: what is saved and computed, checkpointing, compilation, threads, processes."""

import os
from dataclasses import replace

import pytest
import tolerances
import torch
from comparison import same_results, saved_for_backward
from lora_linear_cases import Recorder, assert_close, expected, make_case, run, short, stock
from torch.utils.checkpoint import checkpoint

from peft_kernels.ops import NF4Weight, lora_linear

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

DECODE, TRAINING = (4, 40, 128), (37, 40, 128)


def frozen_tensors(weight):
    return [weight.codes, weight.absmax, *weight.nested] if isinstance(weight, NF4Weight) else [weight]


# ---- what is saved, what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [(), (0.1, 0.0)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", [DECODE, TRAINING], ids=["decode", "training"])
def test_saves_x_s_and_seeds(platform, shape, base, dropout):
    m, _, k = shape
    case = make_case(*shape, (8, 3), base=base, bias=False, dropout=dropout)
    adapters = [tensor.requires_grad_() for tensor in case.lora_A + case.lora_B]

    def saved(x):
        arguments = case.weight, None, case.lora_A, case.lora_B, case.scaling, case.dropout
        return saved_for_backward(lambda: lora_linear(x, *arguments), adapters + frozen_tensors(case.weight))[1]

    x = case.x.clone().requires_grad_()
    sizes = saved(x)
    s_bytes, seed_bytes = m * (8 + 3) * 4, 2 * 8 if dropout else 0
    assert sizes.pop(x.data_ptr()) == m * k * 4
    assert sum(sizes.values()) == s_bytes + seed_bytes

    # A strided x is itself kept, not its copy.
    assert sum(saved(case.x.T.contiguous().T).values()) == m * k * 4 + s_bytes + seed_bytes

    for lora_A in case.lora_A:
        lora_A.requires_grad_(False)
    sizes = saved(x)
    assert sum(sizes.values()) == s_bytes + seed_bytes, "a frozen A saves s alone"
    for lora_B in case.lora_B:
        lora_B.requires_grad_(False)
    assert sum(saved(x).values()) == seed_bytes
    assert saved(case.x) == {}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_saves_less_than_stock(platform, base, autocast):
    m, k, rank = 64, 512, 8
    case = make_case(m, 96, k, (rank,), torch.bfloat16, base=base, weight_dtype=torch.bfloat16, bias=False,
                     dropout=(0.1,))  # fmt: skip
    layer = stock(case).requires_grad_(False)
    adapters = [tensor.requires_grad_() for tensor in case.lora_A + case.lora_B]
    theirs = [layer.lora_A["default"].weight.requires_grad_(), layer.lora_B["default"].weight.requires_grad_()]
    state = getattr(layer.base_layer.weight, "quant_state", None)
    theirs += [layer.base_layer.weight, *([] if state is None else [state.absmax])]
    x = case.x.requires_grad_()
    arguments = x, case.weight, None, case.lora_A, case.lora_B, case.scaling, case.dropout
    with torch.autocast(platform, torch.bfloat16, enabled=autocast):
        _, ours = saved_for_backward(lambda: lora_linear(*arguments), [x, *adapters, *frozen_tensors(case.weight)])
        _, stocks = saved_for_backward(lambda: layer(x), [x, *theirs])
    assert sum(ours.values()) == m * rank * 4 + 8
    # Stock keeps the mask, and the dropped x in the dtype of A.
    assert sum(stocks.values()) >= m * k * 4


@pytest.mark.parametrize("wanted", ["x", "lora_A0", "lora_B1", "bias", "weight", "lora_A1 lora_B0", "x bias lora_B0"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", [DECODE, TRAINING], ids=["decode", "training"])
def test_computes_what_is_asked_for(platform, shape, base, wanted):
    case = make_case(*shape, (8, 3), base=base, dropout=(0.2, 0.5))
    leaves, wanted = case.leaves(), wanted.split()
    if base == "nf4" and "weight" in wanted:
        pytest.skip("a 4-bit weight is frozen")
    full = run(case)
    trained = {name: leaf.requires_grad_(name in wanted) for name, leaf in leaves.items()}
    recorder = Recorder()
    y = lora_linear(case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling, case.dropout,
                    seeds=case.seeds)  # fmt: skip
    with recorder:
        y.backward(case.grad_y)
    for name, leaf in trained.items():
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, full[name]), name
    sizes = [
        sum(leaves[name].numel() for name in wanted if name.startswith(kind)) for kind in ("x", "lora_A", "lora_B")
    ]
    assert recorder.results == ([sizes] if any(sizes) else [])


def test_nothing_asked_for(platform):
    case = make_case(*TRAINING)
    assert not lora_linear(case.x, case.weight, None, case.lora_A, case.lora_B, case.scaling).requires_grad
    with torch.no_grad():
        y = lora_linear(case.x, case.weight, None, [case.lora_A[0].requires_grad_()], case.lora_B, case.scaling)
    assert not y.requires_grad


def test_double_backward_is_refused(platform):
    case = make_case(*TRAINING)
    x = case.x.requires_grad_()
    y = lora_linear(x, case.weight, None, case.lora_A, case.lora_B, case.scaling)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_accumulates_over_micro_batches(platform):
    case = make_case(40, 24, 64, bias=False)
    wanted = expected(case)
    leaves = [tensor.requires_grad_() for tensor in (*case.lora_A, *case.lora_B)]
    for part, grad_y in zip(case.x.split(13), case.grad_y.split(13), strict=True):
        lora_linear(part, case.weight, None, case.lora_A, case.lora_B, case.scaling).backward(grad_y)
    for leaf, name in zip(leaves, ("lora_A0", "lora_B0"), strict=True):
        assert_close(leaf.grad, wanted[name], tolerances.FP32_SUM, name)


# ---- autocast and checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_autocast(platform, base, dtype):
    case = make_case(*TRAINING, base=base)
    with torch.autocast(platform, dtype):
        actual = run(case)
    same_results(actual, run(case, compute_dtype=dtype, out_dtype=dtype))
    assert actual["y"].dtype == dtype and actual["x"].dtype == torch.float32
    with torch.autocast(platform, dtype):
        assert run(case, out_dtype=torch.float32)["y"].dtype == torch.float32
        chosen = run(case, compute_dtype=torch.float32, out_dtype=torch.float32)
    same_results(chosen, run(case, compute_dtype=torch.float32, out_dtype=torch.float32))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_checkpointing(platform, base, autocast, reentrant):
    case = make_case(*TRAINING, (8, 3), base=base, dropout=(0.5, 0.1))
    case.seeds = None  # drawn inside, and once more when the segment runs again

    def checkpointed(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
        def segment(x):
            return lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout)

        return checkpoint(segment, x, use_reentrant=reentrant)

    with torch.autocast(platform, torch.bfloat16, enabled=autocast):
        torch.manual_seed(5)
        wanted = run(case)
        torch.manual_seed(5)
        same_results(run(case, checkpointed), wanted)


# ---- torch.compile -----------------------------------------------------------------------------------------------


def compile_and_compare(base, dropout, backend, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (37, 6, 50):
        case = make_case(rows, 24, 128, (8, 3), torch.bfloat16, base=base, dropout=dropout)
        actual, wanted = run(case, compiled), run(case)
        for name, value in wanted.items():
            assert_close(actual[name], value, tolerances.product(value.dtype, value.dtype), name)


not_emulated = pytest.mark.parametrize("platform", ["cpu", "cuda"], indirect=True)  # dynamo passes by dispatch modes


@not_emulated
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dropout", [(), (0.5, 0.0)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_compile(platform, base, dropout, dynamic):
    compile_and_compare(base, dropout, "aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_compile_with_inductor(base):
    compile_and_compare(base, (0.5, 0.0), "inductor", None)


@not_emulated
def test_compile_draws_seeds(platform):
    case = make_case(*TRAINING, dropout=(0.5,))
    arguments = case.x, case.weight, None, case.lora_A, case.lora_B, case.scaling, case.dropout
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    first, second = compiled(*arguments), compiled(*arguments)
    assert not torch.equal(first, second)


def forward_op_arguments(case):
    """With everything that is optional."""
    options = {"dropout": case.dropout, "seeds": case.seeds, "bias": case.bias, "add": torch.randn_like(case.grad_y)}
    return (
        (case.x, *case.weight.arguments, case.lora_A, case.lora_B, case.scaling),
        options | dict.fromkeys(("compute_dtype", "out_dtype"), case.x.dtype),
    )


def backward_op_arguments(case):
    """With everything that is optional."""
    count = len(case.lora_A)
    s = torch.randn(len(case.x), sum(a.shape[0] for a in case.lora_A))
    options = {"dropout": case.dropout, "seeds": case.seeds, "add": torch.randn_like(case.x)}
    return (
        (case.grad_y, case.x, s, *case.weight.arguments, case.lora_A, case.lora_B, case.scaling, True, [True] * count,
         [i % 2 == 0 for i in range(count)]),
        options | dict.fromkeys(("compute_dtype", "x_dtype"), case.x.dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [(), (0.5, 0.0)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "nested"])
@pytest.mark.parametrize("shape", [DECODE, TRAINING, (0, 40, 128)], ids=["decode", "training", "empty"])
def test_opcheck(platform, shape, base, dropout):
    case = make_case(*shape, (8, 3), torch.bfloat16, base=base, dropout=dropout)
    for op in (ops.lora_linear, ops.lora_linear_forward):
        torch.library.opcheck(op.default, *forward_op_arguments(case))
    torch.library.opcheck(ops.lora_linear_backward.default, *backward_op_arguments(case))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["same", "fp32"])
def test_opcheck_of_more_dimensions(platform, dtype):
    # Strided rows of three dimensions, and dtypes that the ops are left to know.
    m, n, k = 38, 40, 128
    case = make_case(m, n, k, (8, 3), torch.float32)
    x = case.x.view(2, m // 2, k).transpose(0, 1)
    grad_y = case.grad_y.view(2, m // 2, n).transpose(0, 1)
    weight, adapters = case.weight.arguments, (case.lora_A, case.lora_B, case.scaling)
    forward, backward = ops.lora_linear_forward.default, ops.lora_linear_backward.default
    arguments, options = (x, *weight, *adapters), dict.fromkeys(("compute_dtype", "out_dtype"), dtype)
    torch.library.opcheck(forward, arguments, options)
    y, s = forward(*arguments, **options)
    flat, flat_s = forward(x.reshape(m, k), *arguments[1:], **options)
    assert torch.equal(y.reshape(m, n), flat) and torch.equal(s, flat_s)

    arguments = (grad_y, x, s, *weight, *adapters, True, [True, True], [True, False])
    options = dict.fromkeys(("compute_dtype", "x_dtype"), dtype)
    torch.library.opcheck(backward, arguments, options)
    grads = backward(*arguments, **options)
    flat = backward(grad_y.reshape(m, n), x.reshape(m, k), *arguments[2:], **options)
    assert grads[0].shape == x.shape and torch.equal(grads[0].reshape(m, k), flat[0])
    assert torch.equal(grads[1], flat[1]) and torch.equal(grads[2], flat[2])


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_meta_shapes(base):
    case = make_case(*TRAINING, (8, 3), torch.bfloat16, base=base)
    wanted = run(case)
    for name in ("x", "bias", "grad_y"):
        setattr(case, name, getattr(case, name).to("meta"))
    case.lora_A, case.lora_B = [a.to("meta") for a in case.lora_A], [b.to("meta") for b in case.lora_B]
    if base == "nf4":
        weight = case.weight
        case.weight = replace(weight, codes=weight.codes.to("meta"), absmax=weight.absmax.to("meta"))
    else:
        case.weight = case.weight.to("meta")
    for name, value in run(case).items():
        assert value.is_meta and (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype), name


# ---- threads and processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", [(4, 300, 512), (150, 300, 512)], ids=["decode", "training"])
def test_same_bits_every_run(threads, shape, base, count):
    case = make_case(*shape, (8, 3), base=base, dropout=(0.2, 0.0))
    threads(count)
    wanted = run(case)
    for _ in range(3):
        same_results(run(case), wanted)


@pytest.mark.parametrize("shape", [(4, 300, 512), (150, 300, 512)], ids=["decode", "training"])
def test_thread_count_changes_no_bit(cpu_isa, threads, shape):
    case = make_case(*shape, (8, 3), bias=False, dropout=(0.2, 0.0))
    threads(2)
    wanted = run(case)
    for count in (1, 3, 8, 2):
        threads(count)
        same_results(run(case), wanted)


class Results(torch.utils.data.Dataset):
    def __init__(self, case):
        self.case = case

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return run(self.case)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("shape", [(4, 300, 512), (150, 300, 512)], ids=["decode", "training"])
def test_forked_child(threads, shape):
    # The parent's threads do not survive the fork; the child must neither wait for them nor compute otherwise.
    # DataLoader gives its workers one thread: with more, libgomp hangs in any parallel operation, torch's included.
    case = make_case(*shape, (8, 3), bias=False)
    threads(2)
    wanted = run(case)
    loader = torch.utils.data.DataLoader(
        Results(case), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    (actual,) = loader
    same_results(actual, wanted)
    same_results(run(case), wanted)
