"""The base product's kernel for sm_90a on the emulated GPU: right for every form of a weight, every shape and every
schedule; what it fetches, and what ptxas makes of it."""

from pathlib import Path

import pytest
import tolerances
import torch
from lora_linear_cases import assert_close

import ptx_emulator
from peft_kernels.ops import lora_linear
from peft_kernels.testing.reference.lora_linear import lora_linear as oracle
from ptx_emulator import report
from ptx_emulator.test_lora_linear_gemm import GEMM, Product, assert_rounded_once, launched, operands

WGMMA = "matmul_hopper_kernel"
CSRC = Path(__file__).parent.parent.parent / "csrc"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(autouse=True)
def wgmma_is_wanted(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_WGMMA", "1")


def multiply(product, seed=0):
    """y, what it should be, and the product's launch on an H100."""
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(product)
    bias = torch.randn(product.n) if product.bias else None
    with ptx_emulator.profile("sm_90"), ptx_emulator.set_checks(seed=seed), emulated() as launches:
        y = lora_linear(x, weight, bias, *adapters, out_dtype=product.out_dtype or product.dtype)
        *_, launch = launches()
    return y, oracle(x, weight.dequantize(product.dtype), bias, *adapters), launch


def with_schedules(run, product):
    """With each of three schedules: a result of `run`, the same bits, what it should be, and its launch."""
    found = []
    for seed in range(3):
        torch.manual_seed(0)
        found.append(run(product, seed))
    assert all(torch.equal(result, found[0][0]) for result, *_ in found)
    return found


# Tiles of 128 tokens that are not whole; one step, fewer than the ring holds, and more; shared by up to four CTAs.
# Blocks straddle rows; absmax is loaded one by one and, where K is a multiple of 256, in fours.
PRODUCTS = [
    Product(65, 129, 64, blocksize=512, quant_type="fp4", ranks=(3, 16, 33), bias=True),
    Product(97, 257, 576, torch.float16, nested=True, ranks=(8,), bias=True),
    Product(127, 5, 2048, ranks=(8, 16), weight_dtype=torch.float32),
    Product(128, 128, 1024, blocksize=4096, out_dtype=torch.float32),
    Product(131, 72, 2240, torch.float16, blocksize=1024, nested=True, ranks=(16,), adapter_dtype=torch.float16),
    Product(191, 100, 768, nested=True, ranks=(64,), adapter_dtype=torch.bfloat16, bias=True),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_tiles_of_128_tokens(product):
    for y, wanted, launch in with_schedules(multiply, product):
        assert WGMMA in launch["kernel"] and "Li128E" in launch["kernel"]
        assert launch["order_dependent_atomics"] == 0
        assert_rounded_once(y, wanted, str(product))


# More tiles of 128 tokens than multiprocessors, by a weight of 67 tiles.
@pytest.mark.slow
@pytest.mark.parametrize(
    "product",
    [
        Product(129, 8450, 64, ranks=(3,), bias=True),
        Product(250, 8450, 320, torch.float16, nested=True, ranks=(16, 8), adapter_dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_tiles_of_256_tokens(product):
    y, wanted, launch = multiply(product)
    assert "Li256E" in launch["kernel"] and launch["grid"][0] == 67
    assert_rounded_once(y, wanted, str(product))


def differentiate(product, seed=0):
    """The gradient of x, what it should be, and the launch that made it on an H100."""
    from ptx_emulator.ops import emulated

    grad_y, weight, *adapters = operands(product, transposed=True)
    exact = torch.randn(product.m, product.k, dtype=torch.float64, requires_grad=True)
    oracle(exact, weight.dequantize(product.dtype), None, *adapters).backward(grad_y.double())
    x = exact.detach().to(product.dtype).requires_grad_()
    with ptx_emulator.profile("sm_90"), ptx_emulator.set_checks(seed=seed), emulated() as launches:
        lora_linear(x, weight, None, *adapters).backward(grad_y)
        *_, launch = launches()
    return x.grad, exact.grad, launch


# Half a tile of outputs, and one and a half; rows of the weight that end within a step; more steps than the ring holds.
@pytest.mark.parametrize(
    "product",
    [
        Product(65, 72, 64, nested=True),
        Product(99, 200, 192, torch.float16, blocksize=512, quant_type="fp4", ranks=(20,)),
        Product(129, 392, 192, blocksize=128, nested=True, ranks=(8, 64), adapter_dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_transposed(product):
    for grad, wanted, launch in with_schedules(differentiate, product):
        assert WGMMA in launch["kernel"] and "Li128ELb1E" in launch["kernel"]
        assert_close(grad, wanted, tolerances.product(product.dtype, product.dtype), str(product))


@pytest.mark.slow
def test_transposed_with_256_tokens():
    product = Product(129, 328, 8512)
    grad, wanted, launch = differentiate(product)
    assert "Li256ELb1E" in launch["kernel"] and launch["grid"][0] == 67
    assert_close(grad, wanted, tolerances.product(product.dtype, product.dtype), str(product))


@pytest.mark.parametrize("value", ["0", "", None])
def test_it_is_taken_where_it_is_wanted(monkeypatch, value):
    """The kernel for sm_80 multiplies with the same weight, and the emulator adds in the same order."""
    product = Product(100, 140, 512, nested=True, ranks=(16,), bias=True)
    results = []
    for kernel in (WGMMA, GEMM):
        torch.manual_seed(0)
        y, _, launch = multiply(product)
        assert kernel in launch["kernel"]
        results.append(y)
        if value is None:
            monkeypatch.delenv("PEFT_KERNELS_WGMMA", raising=False)
        else:
            monkeypatch.setenv("PEFT_KERNELS_WGMMA", value)
    assert torch.equal(*results)


@pytest.mark.parametrize(("m", "kernel"), [(64, GEMM), (65, WGMMA), (512, WGMMA), (513, "nf4_dequantize_kernel")])
def test_range(m, kernel):
    _, _, launch = multiply(Product(m, 24, 64))
    assert kernel in launch["kernel"]


def test_rows_that_overlap_have_no_tensor_map():
    from ptx_emulator.ops import emulated

    x, weight, *_ = operands(Product(100, 40, 128))
    with ptx_emulator.profile("sm_90"), emulated() as launches:
        y = lora_linear(x[:1].expand(100, -1), weight)
        (launch,) = launches()
    assert GEMM in launch["kernel"]
    assert_rounded_once(y, oracle(x[:1].expand(100, -1), weight.dequantize(torch.bfloat16)), "one row")


def test_other_cards_have_their_own():
    from ptx_emulator.ops import emulated

    x, weight, *_ = operands(Product(100, 40, 128))
    for profile in ("sm_80", "sm_89", "sm_100", "sm_120"):
        with ptx_emulator.profile(profile), emulated() as launches:
            lora_linear(x, weight)
            assert len(launched(launches(), GEMM)) == 1


# ---- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_fetches_once_without_conflicts(nested):
    product = Product(128, 256, 768, nested=nested)  # 12 steps: no CTAs share a tile
    _, _, launch = multiply(product)
    fetched = {name: 32 * count for name, count in launch["sectors_read"].items()}
    codes = product.n * product.k // 2
    assert fetched["codes"] == codes and fetched["x"] == 2 * product.m * product.k * 2  # by each of two tiles
    # absmax of four steps is half a sector, or with nested statistics an eighth. Its other parts come out of the L1.
    assert fetched["absmax"] <= 8 * product.n * product.k // 64
    assert launch["global_store"]["sectors"] == launch["global_store"]["ideal_sectors"]
    assert launch["bulk_copies"] == 2 * 2 * (product.k // 64)  # x and codes, by each of two tiles
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert nested or wavefronts == ideal_wavefronts  # lookups of nested statistics go anywhere in a table


def test_transposed_fetches_once_without_conflicts():
    product = Product(128, 704, 256)  # 11 steps
    _, _, launch = differentiate(product)
    fetched = {name: 32 * count for name, count in launch["sectors_read"].items()}
    assert fetched["codes"] == product.n * product.k // 2
    assert fetched["grad_y"] == 2 * product.m * product.n * 2  # by each of two tiles
    assert fetched["absmax"] <= 32 * product.n * 4  # neighbours in a row meet in the L1 or the L2
    assert launch["global_store"]["sectors"] == launch["global_store"]["ideal_sectors"]
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert wavefronts == ideal_wavefronts


@pytest.fixture(scope="module")
def resources():
    return report.resources(CSRC / "matmul/cuda/hopper_launch.cu", "sm_90a", includes=(CSRC,))


@pytest.mark.slow  # ptxas takes ten seconds
def test_machine_code(resources):
    """ptxas warns, which is an error here, where it has wgmma wait for each other."""
    assert len(resources) == 8
    for kernel, used in resources.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        # Of 65,536. The launch has three warpgroups, between which tiles of 256 tokens then move registers.
        assert used.registers <= 168, kernel
        if isinstance(used.mma_share, str):
            pytest.skip("needs nvdisasm")
        # Forward there are four in a step, for which a thread decodes 32 weights. Transposed, others decode.
        is_forward = "Lb0E" in kernel
        assert used.mma_share >= (4 / 142 if is_forward else 4 / 72), kernel
        # Decoding is 2.75 of these; what the third warpgroup does for it is in another loop.
        assert not is_forward or used.latency.alu_per_weight <= 3.2, kernel
