"""The cross_entropy family against the fp64 oracle and torch."""

import pytest
import torch
import torch.nn.functional as F
from comparison import DTYPES, assert_close, error, short
from tolerances import FP32_SUM, ROUNDING, VERSUS_STOCK

from peft_kernels.ops import cross_entropy
from peft_kernels.testing.reference.cross_entropy import cross_entropy as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels


def make_case(m, classes, dtype=torch.float32, scale=3.0):
    """Logits and targets, every third of which is ignored."""
    targets = torch.randint(classes, (m,))
    targets[2::3] = -100
    return (scale * torch.randn(m, classes)).to(dtype), targets


def run(function, logits, targets, grad_losses=None):
    """The losses and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    losses = function(leaf, targets)
    losses.backward(torch.ones_like(losses) if grad_losses is None else grad_losses.to(losses.dtype))
    return losses.detach(), leaf.grad


def stock(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def check(logits, targets, grad_losses=None):
    actual, wanted = (
        run(cross_entropy, logits, targets, grad_losses),
        run(oracle, logits.double(), targets, grad_losses),
    )
    for name, got, value in zip(("losses", "gradient"), actual, wanted, strict=True):
        assert_close(got, value, FP32_SUM + 2 * ROUNDING[got.dtype], name)


# Around the vectors and blocks of the kernels, and a vocabulary whose rows are not aligned.
CLASSES = [1, 2, 7, 16, 33, 250, 2048, 2049, 50257]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("classes", CLASSES)
def test_shapes(backend, classes, dtype):
    check(*make_case(7, classes, dtype), grad_losses=torch.randn(7))


@pytest.mark.parametrize("confidence", [0, 10, 25])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_torch(backend, dtype, confidence):
    """Also where the target's probability is next to one, and its gradient a difference of nearly equal numbers."""
    logits, targets = make_case(300, 3000, dtype)
    logits[torch.arange(300), targets.clamp_min(0)] += confidence
    actual, theirs = run(cross_entropy, logits, targets), run(stock, logits, targets)
    for got, torchs, value in zip(actual, theirs, run(oracle, logits.double(), targets), strict=True):
        assert got.dtype is torchs.dtype
        assert error(got, value) <= VERSUS_STOCK * error(torchs, value)


@pytest.mark.parametrize("m", [1, 3, 100])
def test_rows(threads, m):
    threads(2)
    check(*make_case(m, 3000, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_logits(backend, dtype):
    check(*make_case(30, 300, dtype, scale=1e4))
    ascending = torch.arange(5000).expand(2, -1).to(dtype)  # the largest so far is always the last
    check(ascending, torch.tensor([4990, 4999]))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_infinite_logits(backend, dtype):
    logits, targets = make_case(9, 5000, dtype)
    logits[:, :4000:2] = -torch.inf
    logits[:, 1:3000] = -torch.inf  # whole blocks, and the first of them
    targets = torch.where(targets < 0, targets, 4000 + targets % 1000)
    targets[1] = 0  # an infinite loss, with a finite gradient
    (losses, grad), wanted = run(cross_entropy, logits, targets), run(oracle, logits.double(), targets)
    assert losses[1] == wanted[0][1] == torch.inf
    finite = torch.arange(9) != 1
    assert_close(losses[finite], wanted[0][finite], FP32_SUM)
    assert_close(grad, wanted[1], ROUNDING[dtype] + FP32_SUM)
    lowest = torch.full((1, 50), torch.finfo(dtype).min, dtype=dtype)
    check(lowest, torch.tensor([3]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_what_has_no_loss_is_nan_as_torchs(backend, dtype, value):
    logits, targets = make_case(8, 40, dtype)
    logits[0, 11] = logits[1, 37] = logits[7, 20] = value
    logits[4] = -torch.inf
    actual, theirs = run(cross_entropy, logits, targets), run(stock, logits, targets)
    bad = torch.tensor([0, 1, 4, 7])
    for got, wanted in zip(actual, theirs, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan()) and got[bad].isnan().all()


def test_ignored_rows_are_not_read(backend):
    logits, targets = make_case(30, 70)
    logits[2::3] = torch.nan
    losses, grad = run(cross_entropy, logits, targets)
    assert not losses[2::3].any() and not grad[2::3].any()
    assert losses.isfinite().all() and grad.isfinite().all()
    losses, grad = run(cross_entropy, logits, torch.full_like(targets, -100))
    assert not losses.any() and not grad.any()


def test_other_ignore_index(platform):
    logits, targets = make_case(30, 7)
    targets.clamp_min_(0)
    for ours, theirs in zip(
        run(lambda *case: cross_entropy(*case, ignore_index=3), logits, targets),
        run(lambda *case: F.cross_entropy(*case, ignore_index=3, reduction="none"), logits, targets),
        strict=True,
    ):
        assert_close(ours, theirs, FP32_SUM)


def test_strides_and_leading_dimensions(backend):
    logits, targets = make_case(12, 50, torch.bfloat16)
    wanted = run(cross_entropy, logits, targets)
    apart = F.pad(logits, (3, 6))[:, 3:53]
    columns = logits.T.contiguous().T
    for strided, shape in ((apart, (12,)), (columns, (12,)), (logits, (3, 4)), (apart, (2, 2, 3))):
        losses, grad = run(cross_entropy, strided.view(*shape, 50), targets.view(shape))
        assert torch.equal(losses.flatten(), wanted[0]) and torch.equal(grad.reshape(12, 50), wanted[1])
    one, _ = run(cross_entropy, logits[0], targets[0])
    assert torch.equal(one, wanted[0][0])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)], ids=str)
def test_empty(shape):
    losses, grad = run(cross_entropy, torch.randn(shape), torch.full(shape[:-1], -100))
    assert losses.shape == shape[:-1] and grad.shape == shape and not losses.any()


@pytest.mark.parametrize("count", [2, 3])
def test_thread_count_changes_no_bit(threads, count):
    case = make_case(50, 9000, torch.bfloat16)
    wanted = run(cross_entropy, *case)
    threads(count)
    for got, value in zip(run(cross_entropy, *case), wanted, strict=True):
        assert torch.equal(got, value)


def test_saves_the_logits_and_two_numbers_a_row():
    logits, targets = make_case(40, 90, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(logits.requires_grad_(), targets)
    own = {t.data_ptr(): t.nbytes for t in saved if t.data_ptr() not in (logits.data_ptr(), targets.data_ptr())}
    assert sum(own.values()) == 40 * 2 * 4


def test_opcheck():
    logits, targets = make_case(7, 24)
    torch.library.opcheck(ops.cross_entropy_forward.default, (logits, targets, -100))
    _, statistics = ops.cross_entropy_forward(logits, targets, -100)
    torch.library.opcheck(ops.cross_entropy_backward.default, (torch.randn(7), logits, targets, statistics, -100))


def test_compile():
    case = make_case(7, 24)
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(run(compiled, *case), run(cross_entropy, *case), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("platform", ["cuda", "emulated"], indirect=True)
def test_target_out_of_range_on_a_gpu(platform):
    """An error would have to wait for the device: the row's numbers are NaN, and no others."""
    logits, targets = make_case(4, 70)
    targets[:] = torch.tensor([3, -1, 70, 69])
    losses, grad = run(cross_entropy, logits, targets)
    bad = torch.tensor([False, True, True, False])
    assert torch.equal(losses.isnan(), bad) and torch.equal(grad.isnan(), bad[:, None].expand_as(grad))


@pytest.mark.parametrize("target", [-1, 5, -101])
def test_target_out_of_range(target):
    with pytest.raises(IndexError, match=rf"targets: got {target} for row 2, wanted .* below 5, or -100"):
        cross_entropy(torch.randn(4, 5), torch.tensor([0, 4, target, -100]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(4, 5).double()}, r"logits: got float64 \[4, 5\], wanted a float32, bfloat16 or float16"),
        ({"logits": torch.tensor(1.0)}, r"logits: got float32 \[\], wanted"),
        ({"targets": torch.zeros(5).long()}, r"targets: got int64 \[5\], wanted an int64 tensor \[4\]"),
        ({"targets": torch.zeros(4)}, r"targets: got float32 \[4\], wanted an int64 tensor \[4\]"),
        ({"targets": None}, r"targets: got None, a NoneType, wanted an int64 tensor \[4\]"),
        ({"targets": torch.zeros(4, device="meta").long()}, "targets: got a tensor on meta, wanted one on cpu"),
    ],
    ids=["dtype", "scalar", "shape", "target-dtype", "none", "meta"],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"logits": torch.ones(4, 5), "targets": torch.zeros(4).long()} | change)


def test_bad_tensors_of_the_ops():
    logits, targets = make_case(4, 5)
    _, statistics = ops.cross_entropy_forward(logits, targets, -100)
    for arguments, message in (
        ((torch.ones(3), logits, targets, statistics), r"grad_losses: got float32 \[3\], wanted float32 with 4"),
        ((torch.ones(4), logits, targets, statistics[:2]), r"statistics: got float32 \[2, 2\], wanted float32 with 8"),
        ((torch.ones(4), logits.T, targets[:1], statistics), r"logits: got strides"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.cross_entropy_backward(*arguments, -100)
