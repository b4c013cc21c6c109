"""linear_cross_entropy against the fp64 oracle and torch, and what it allocates and keeps."""

import sys

import pytest
import torch
import torch.nn.functional as F
from comparison import DTYPES, Made, assert_close, error, saved_for_backward, short
from tolerances import FP32_SUM, VERSUS_STOCK, product
from torch.utils.checkpoint import checkpoint

from peft_kernels import cpu
from peft_kernels.ops import cross_entropy, linear_cross_entropy, lora_linear, quantize_4bit
from peft_kernels.testing.reference.linear_cross_entropy import linear_cross_entropy as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels
V, K, R = 300, 64, 4
LORA = ("lora_A", "lora_B")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Several chunks of few rows."""
    monkeypatch.setattr(sys.modules["peft_kernels.ops.linear_cross_entropy"], "CHUNK_ROWS", 32)


def make_case(m=77, dtype=torch.float32, adapters=True, classes=V):
    targets = torch.randint(classes, (m,))
    targets[2::3] = -100
    case = {
        "hidden": torch.randn(m, K).to(dtype), "weight": (torch.randn(classes, K) / 4).to(dtype),
        "targets": targets, "bias": torch.randn(classes).to(dtype),
    }  # fmt: skip
    if adapters:
        case |= {"lora_A": [torch.randn(R, K) / 8], "lora_B": [torch.randn(classes, R)], "scaling": [0.5]}
    return case


def run(function, case, grad=1.0, trained=("hidden", "weight", "bias", *LORA), **options):
    """The loss and the gradients, by name."""
    leaves = {}
    for name in trained:
        if name in case:
            value = case[name][0] if name in LORA else case[name]
            leaves[name] = value.detach().clone().requires_grad_()
    given = {name: [leaf] if name in LORA else leaf for name, leaf in leaves.items()}
    loss = function(**(case | given), **options)
    loss.backward(torch.tensor(grad, dtype=loss.dtype))
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def in_fp64(case):
    def of(value):
        if isinstance(value, list):
            return [of(item) for item in value]
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: of(value) for name, value in case.items()}


def by_torch(hidden, weight, targets, bias, lora_A=(), lora_B=(), scaling=(), **options):
    logits = F.linear(hidden, weight, bias)
    for a, b, s in zip(lora_A, lora_B, scaling, strict=True):
        logits = logits + s * F.linear(F.linear(hidden.to(a.dtype), a), b).to(logits.dtype)
    return F.cross_entropy(logits, targets, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_torch(dtype):
    case = make_case(300, dtype, classes=4000)  # as many as the errors' own spread asks for
    exact, actual, theirs = run(oracle, in_fp64(case)), run(linear_cross_entropy, case), run(by_torch, case)
    for name, value in exact.items():
        assert actual[name].dtype is (torch.float32 if name == "loss" else theirs[name].dtype)
        assert error(actual[name], value) <= max(VERSUS_STOCK * error(theirs[name], value), FP32_SUM), name


OPTIONS = [
    {"ignore_index": 7},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0},
    {"reduction": "sum"},
    {"num_items": 13},
    {"num_items": torch.tensor(13)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_options(dtype, options):
    case = make_case(dtype=dtype)
    if "ignore_index" in options:
        case["targets"] = case["targets"].where(case["targets"] >= 0, 7)
    exact = run(oracle, in_fp64(case), 3.0, **options)
    actual = run(linear_cross_entropy, case, 3.0, **options)
    for name, value in exact.items():
        # The logits are rounded, their gradients, and the result, with its scale.
        assert_close(actual[name], value, 2 * product(dtype, dtype), name)


def test_smoothing_is_that_of_torch():
    case = make_case()
    actual, theirs = (run(f, case, label_smoothing=0.3) for f in (linear_cross_entropy, by_torch))
    for name, value in theirs.items():
        assert error(actual[name], value) <= 2 * FP32_SUM, name


@pytest.mark.parametrize("m", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), LORA, ("hidden", "weight")], ids="-".join)
def test_rows_and_wanted_gradients(m, trained):
    case = make_case(m)
    exact = run(oracle, in_fp64(case), trained=trained, reduction="sum")
    for name, value in run(linear_cross_entropy, case, trained=trained, reduction="sum").items():
        assert_close(value, exact[name], 2 * FP32_SUM, name)


def test_leading_dimensions_and_strides():
    case = make_case(60, adapters=False)
    wanted = run(linear_cross_entropy, case)
    hidden = case["hidden"].view(3, 20, K).transpose(0, 1).contiguous().transpose(0, 1)
    got = run(linear_cross_entropy, case | {"hidden": hidden, "targets": case["targets"].view(3, 20)})
    assert torch.equal(got["hidden"].reshape(60, K), wanted["hidden"]) and torch.equal(got["loss"], wanted["loss"])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_nf4_weight(dtype):
    case = make_case(dtype=dtype)
    weight = quantize_4bit(case["weight"])
    trained = ("hidden", "bias", *LORA)
    exact = run(oracle, in_fp64(case | {"weight": weight.dequantize()}), trained=trained)
    for name, value in run(linear_cross_entropy, case | {"weight": weight}, trained=trained).items():
        assert_close(value, exact[name], 2 * product(dtype, dtype), name)


def test_dropout_of_an_adapter():
    case, options = make_case(64), {"dropout": [0.5], "seeds": torch.tensor([7])}

    def by_hand(hidden, weight, targets, bias, lora_A, lora_B, scaling):
        chunks = [
            lora_linear(hidden[rows], weight, bias, lora_A, lora_B, scaling, [0.5], seeds=torch.tensor([7 + number]))
            for number, rows in enumerate((slice(0, 32), slice(32, 64)))
        ]
        return cross_entropy(torch.cat(chunks), targets).sum() / (targets >= 0).sum()

    wanted = run(by_hand, case)
    for name, value in run(linear_cross_entropy, case, **options).items():
        assert error(value, wanted[name]) <= 2 * FP32_SUM, name


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["unscaled", "scaled"])
def test_fp16_gradients_do_not_underflow(scale):
    """Where each of them is divided by many rows, as a mean's are: also before a GradScaler's scale is known."""
    case = make_case(77, torch.float16, adapters=False)
    actual = run(linear_cross_entropy, case, scale, trained=("hidden", "weight"), num_items=2**14)
    exact = run(oracle, in_fp64(case), scale, trained=("hidden", "weight"), num_items=2**14)
    subnormal = 2.0**-24 if scale == 1 else 0.0
    for name in ("hidden", "weight"):
        limit = 2 * product(torch.float16, torch.float16) * exact[name].norm() + subnormal * exact[name].numel() ** 0.5
        assert (actual[name].double() - exact[name]).norm() <= limit, name


def test_nothing_counted():
    """What torch returns."""
    case = make_case() | {"targets": torch.full((77,), -100)}
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}):
        actual = run(linear_cross_entropy, case, **options)
        assert actual.pop("loss").isnan() and not any(grad.any() for grad in actual.values())
    theirs = run(by_torch, case)
    assert theirs.pop("loss").isnan() and not any(grad.any() for grad in theirs.values())
    assert run(linear_cross_entropy, case, reduction="sum")["loss"] == 0


def test_empty():
    case = make_case(0)
    actual, theirs = run(linear_cross_entropy, case), run(by_torch, case)
    assert actual["loss"].isnan() and theirs["loss"].isnan()
    assert all(actual[name].shape == theirs[name].shape and not actual[name].any() for name in ("hidden", "weight"))


@pytest.mark.parametrize("target", [-1, V, -101])
def test_target_out_of_range(target):
    case = make_case()
    case["targets"][70] = target
    with pytest.raises(IndexError, match=rf"targets: got {target} for row 70, wanted .* below {V}, or -100"):
        linear_cross_entropy(**case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(4, K + 1)}, rf"hidden: got float32 \[4, {K + 1}\], wanted \[..., {K}\]"),
        ({"hidden": torch.ones(4, K).double()}, "hidden: got float64"),
        ({"weight": torch.ones(V)}, "weight: got float32"),
        ({"targets": torch.zeros(5).long()}, r"targets: got int64 \[5\], wanted an int64 tensor \[4\]"),
        ({"targets": torch.zeros(4, device="meta").long()}, "targets: got a tensor on meta, wanted one on cpu"),
        ({"bias": torch.ones(V - 1)}, rf"bias: got float32 \[{V - 1}\]"),
        ({"lora_A": [torch.ones(2, K - 1)]}, rf"lora_A: got float32 \[2, {K - 1}\], wanted .* \[2, {K}\]"),
        ({"lora_B": [torch.ones(V, 3)]}, rf"lora_B: got float32 \[{V}, 3\], wanted .* \[{V}, 2\]"),
        ({"scaling": []}, "scaling: got 0 items, wanted 1"),
        ({"dropout": [1.0]}, "dropout: got 1.0"),
        ({"ignore_index": None}, "ignore_index: got None"),
        ({"label_smoothing": 1.5}, "label_smoothing: got 1.5"),
        ({"z_loss": -1.0}, "z_loss: got -1.0"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"reduction": "none"}, "reduction: got 'none', wanted 'mean' or 'sum'"),
        ({"num_items": torch.ones(2)}, r"num_items: got float32 \[2\]"),
        ({"num_items": 3, "reduction": "sum"}, "num_items: got 3"),
        ({"compute_dtype": torch.int8}, "compute_dtype: got torch.int8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    case = {
        "hidden": torch.ones(4, K), "weight": torch.ones(V, K), "targets": torch.zeros(4).long(),
        "lora_A": [torch.ones(2, K)], "lora_B": [torch.ones(V, 2)], "scaling": [1.0],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**case | change)


def test_autocast():
    """As F.linear is under it."""
    case = make_case(adapters=False)
    with torch.autocast("cpu", torch.bfloat16):
        actual, theirs = run(linear_cross_entropy, case), run(by_torch, case)
    for name, value in run(oracle, in_fp64(case)).items():
        assert actual[name].dtype is torch.float32
        assert error(actual[name], value) <= VERSUS_STOCK * error(theirs[name], value), name


def test_compile():
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for case, options in ((make_case(adapters=False), {"z_loss": 1e-2}), (make_case(), {})):
        wanted = run(linear_cross_entropy, case, **options)
        for name, value in run(compiled, case, **options).items():
            assert error(value, wanted[name]) <= FP32_SUM, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    case = make_case(adapters=False)

    def checkpointed(hidden, weight, targets, bias):
        return checkpoint(linear_cross_entropy, hidden, weight, targets, bias, use_reentrant=reentrant)

    wanted = run(linear_cross_entropy, case)
    for name, value in run(checkpointed, case).items():
        assert torch.equal(value, wanted[name]), name


def test_backward_twice():
    case = make_case(adapters=False)
    hidden = case["hidden"].requires_grad_()
    loss = linear_cross_entropy(**case)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


# ---- What it does without ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_allocates_a_chunk_of_logits_and_keeps_a_gradient(dtype, monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: False)  # the kernels' product makes new memory
    case = make_case(320, dtype, adapters=False)
    hidden = case["hidden"].requires_grad_()
    known = [case["hidden"], case["weight"], case["bias"]]
    with Made() as made:
        loss, saved = saved_for_backward(lambda: linear_cross_entropy(**case), known)
        loss.backward()
    assert max(tensor.numel() for tensor in made.tensors) == max(32 * V, hidden.numel())
    assert sum(saved.values()) <= hidden.nbytes + 16
    of_logits = {tensor.data_ptr() for tensor in made.tensors if tensor.numel() == 32 * V}
    assert len(of_logits) == 1  # memory that all chunks use, one after the other


def test_makes_no_gradient_that_is_not_wanted():
    case = make_case(adapters=False)
    with Made() as made, torch.no_grad():
        linear_cross_entropy(**case)
    assert not [name for name in made.names if "backward" in name or "in_place" in name]
    case["hidden"].requires_grad_()
    with Made() as made:
        linear_cross_entropy(**case).backward()
    assert case["weight"].shape not in [tensor.shape for tensor in made.tensors]


# ---- The kernel of a chunk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_in_place_is_both_ways(isa, dtype):
    for classes in (1, 7, 33, 2049, 5000):
        logits, targets = (3 * torch.randn(7, classes)).to(dtype), torch.randint(classes, (7,))
        targets[2::3] = -100
        factors = torch.randn(7)
        with cpu.use_isa(isa):
            losses, statistics = ops.cross_entropy_forward(logits, targets, -100)
            grad = ops.cross_entropy_backward(factors, logits, targets, statistics, -100)
            rows = F.pad(logits, (3, 2))[:, 3 : 3 + classes]  # which are not aligned
            for given in (logits.clone(), rows):
                assert torch.equal(ops.cross_entropy_in_place(given, targets, factors, -100), losses)
                assert torch.equal(given, grad)


def test_in_place_op():
    logits, targets = torch.randn(7, 24), torch.randint(24, (7,))
    torch.library.opcheck(ops.cross_entropy_in_place.default, (logits, targets, torch.ones(7), -100))
    with pytest.raises(IndexError, match="targets: got 24 for row 3"):
        ops.cross_entropy_in_place(logits, targets.index_fill(0, torch.tensor([3]), 24), torch.ones(7), -100)
    with pytest.raises(ValueError, match=r"grad_losses: got float32 \[6\]"):
        ops.cross_entropy_in_place(logits, targets, torch.ones(6), -100)
