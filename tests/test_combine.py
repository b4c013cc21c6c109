"""The combine family against the fp64 oracle, and against PEFT's functions where these are right."""

import pytest
import tolerances
import torch
from comparison import DTYPES, assert_close, short
from optional import if_installed

from peft_kernels.ops import combine, combine_products
from peft_kernels.ops.combine import METHODS
from peft_kernels.testing.reference import combine as oracle

merge_utils = if_installed("peft.utils.merge_utils")

pytestmark = pytest.mark.kernels

WEIGHTS = [0.5, -0.25, 1.5, 0.75]
SEEDS = [3, -4, 5, 1 << 40]


def deltas_of(shape, dtype=torch.float32):
    """Numbers of all magnitudes, so that each digit of the selection decides, without two that are equal in fp32."""
    return [(torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-6, 1)).to(dtype) for _ in WEIGHTS]


def wanted(deltas, method, density, majority_sign, of_product=False):
    elects, trims, drops = METHODS[method]
    deltas = [delta.double() for delta in deltas]
    if trims:
        deltas = [oracle.trim(delta, int(density * delta.numel())) for delta in deltas]
    if drops and density < 1:
        deltas = [
            oracle.drop(delta, 1 - density, torch.tensor([seed]), of_product=of_product)
            for delta, seed in zip(deltas, SEEDS, strict=True)
        ]
    return oracle.combine(deltas, WEIGHTS, majority_sign if elects else "none")


def check(deltas, method="ties", density=0.3, majority_sign="total"):
    y = combine(deltas, WEIGHTS, method, density=density, majority_sign=majority_sign, seeds=torch.tensor(SEEDS))
    assert y.dtype is deltas[0].dtype and y.is_contiguous()
    expected = wanted(deltas, method, density, majority_sign)
    assert_close(y, expected, tolerances.FP32_SUM + 2 * tolerances.ROUNDING[y.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1,), (5, 17), (2048,), (3, 2049), (7, 4777)], ids=str)
def test_shapes(backend, shape, dtype):
    check(deltas_of(shape, dtype))


@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(backend, method, majority_sign, density):
    check(deltas_of((40, 500)), method, density, majority_sign)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_density_zero_keeps_nothing(backend, method):
    assert not combine(deltas_of((30, 30)), WEIGHTS, method, density=0.0).any()


def test_of_equal_magnitudes_the_first_are_kept(backend):
    """Also where they are in several pieces, and are not all of the elements that are kept."""
    delta = torch.ones(3, 2048)
    delta[:, ::2] = -1
    delta[1, 100] = 7
    delta[2, 200] = 0.5
    for kept in (0, 1, 2, 2048, 2049, 5000, delta.numel() - 1, delta.numel()):
        y = combine([delta], [1.0], "magnitude_prune", density=min((kept + 0.5) / delta.numel(), 1.0))
        assert torch.equal(y, oracle.trim(delta, kept)), kept


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
def test_a_tied_election_is_positive(backend, majority_sign):
    y = combine([torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 1.0])], [1.0, 1.0], majority_sign=majority_sign)
    assert y.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_nan_and_infinity_are_not_lost(backend, method):
    deltas = deltas_of((4, 40))
    deltas[1][2, 3], deltas[2][1, 1] = float("nan"), float("inf")
    y = combine(deltas, WEIGHTS, method, density=0.2)
    assert y[2, 3].isnan() and not y[1, 1].isfinite()
    assert y.isfinite().sum() == y.numel() - 2


@pytest.mark.parametrize("ranks", [(1, 2, 3, 4), (16, 16, 16, 16)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_products(backend, method, ranks):
    n, k = 37, 2100
    lora_A = [torch.randn(r, k) for r in ranks]
    lora_B = [torch.randn(n, r) for r in ranks]
    scaling = [0.5, 1.0, 2.0, 0.25]
    y = combine_products(lora_A, lora_B, scaling, WEIGHTS, method, density=0.4, seeds=torch.tensor(SEEDS))
    # Products in fp32 may order two elements as those in fp64 do not: what is kept is decided by the former.
    products = [
        combine_products([a], [b], [s], [1.0], "linear") for a, b, s in zip(lora_A, lora_B, scaling, strict=True)
    ]
    for product, a, b, s in zip(products, lora_A, lora_B, scaling, strict=True):
        assert_close(product, s * (b.double() @ a.double()), tolerances.FP32_SUM)
    assert y.dtype is torch.float32
    assert_close(y, wanted(products, method, 0.4, "total", of_product=True), tolerances.FP32_SUM)


def test_thread_count_changes_no_bit(threads):
    deltas = deltas_of((50, 3000), torch.bfloat16)
    expected = combine(deltas, WEIGHTS, density=0.2)
    threads(3)
    assert torch.equal(combine(deltas, WEIGHTS, density=0.2), expected)


def test_strides():
    deltas = deltas_of((20, 30))
    assert torch.equal(combine([delta.T for delta in deltas], WEIGHTS, "linear"), combine(deltas, WEIGHTS, "linear").T)


def test_masks_are_drawn_from_torchs_generator():
    deltas, options = deltas_of((40, 40)), {"method": "dare_linear", "density": 0.5}
    torch.manual_seed(1)
    first = combine(deltas, WEIGHTS, **options)
    second = combine(deltas, WEIGHTS, **options)
    torch.manual_seed(1)
    assert torch.equal(combine(deltas, WEIGHTS, **options), first)
    assert not torch.equal(first, second)


def test_dropping_keeps_the_mean():
    ones = torch.ones(400, 400)
    y = combine([ones], [1.0], "dare_linear", density=0.25)
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert abs(float(y.mean()) - 1) < 0.02  # six standard deviations


def test_no_gradient_is_recorded():
    assert not combine([torch.randn(3, requires_grad=True)], [1.0]).requires_grad


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_pefts_functions(density, majority_sign):
    """Which are those of the papers, but that PEFT keeps any of equal magnitudes."""
    deltas, weights = deltas_of((60, 70)), torch.tensor(WEIGHTS)
    for method, arguments in (("ties", (majority_sign,)), ("magnitude_prune", ())):
        stock = getattr(merge_utils, method)(deltas, weights, density, *arguments)
        ours = combine(deltas, WEIGHTS, method, density=density, majority_sign=majority_sign)
        assert_close(ours, stock.double(), tolerances.FP32_SUM)
    assert_close(combine(deltas, WEIGHTS, "linear"), merge_utils.task_arithmetic(deltas, weights).double(),
                 tolerances.FP32_SUM)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_devices_without_the_kernel(method):
    """Torch's operations stand in there; their random masks are not Philox4x32-10's."""
    from peft_kernels.ops.combine import _by_torch, _pruning

    deltas, density = deltas_of((40, 50)), 1.0 if METHODS[method].drops else 0.3
    pruning = _pruning(len(deltas), 2000, WEIGHTS, method, density, "total", None, deltas[0])
    assert_close(_by_torch(deltas, WEIGHTS, *pruning), wanted(deltas, method, density, "total"), tolerances.FP32_SUM)


def test_errors():
    deltas = deltas_of((4, 5))
    for match, call in {
        "deltas: got float32 .4, 5. and float32 .20., wanted one shape": lambda: combine(
            [deltas[0], deltas[1].flatten()], [1, 1]
        ),
        "deltas: got .*, wanted a list of tensors, at least one": lambda: combine([], []),
        "weights: got .1., wanted a list of 4 numbers": lambda: combine(deltas, [1]),
        "method: got 'median', wanted one of linear, ": lambda: combine(deltas, WEIGHTS, "median"),
        "density: got 1.5, wanted a number from 0 to 1": lambda: combine(deltas, WEIGHTS, density=1.5),
        "density: got 0, wanted a number above 0 to 1": lambda: combine(deltas, WEIGHTS, "dare_ties", density=0),
        "seeds: got int64 .1., wanted an int64 tensor .4.": lambda: combine(deltas, WEIGHTS, seeds=torch.tensor([3])),
        "lora_B: got float32 .5, 2., wanted .* tensor .5, 3.": lambda: combine_products(
            [torch.randn(3, 4)], [torch.randn(5, 2)], [1.0], [1.0]
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
