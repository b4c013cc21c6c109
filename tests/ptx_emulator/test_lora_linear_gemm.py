"""The fused base products of lora_linear on the emulated GPU: right for every form of a weight and every shape
that they take, in any order of CTAs and warps; and what they cost, counted and read from machine code."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import tolerances
import torch
from lora_linear_cases import assert_close, error, short

import ptx_emulator
from peft_kernels.ops import NF4Weight, lora_linear, quantize_4bit
from peft_kernels.testing.reference.lora_linear import lora_linear as oracle
from ptx_emulator import cards, report

CSRC = Path(__file__).parent.parent.parent / "csrc"
PROFILES = ["sm_80", "sm_89", "sm_90"]
DECODE, GEMM, DEQUANTIZE = "matmul_few_rows_kernel", "matmul_many_rows_kernel", "nf4_dequantize_kernel"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def profiles_for(m):
    """The profiles where so many rows stay below the crossover, from which on the weight is dequantised."""
    return [profile for profile in PROFILES if m <= 160 or profile != "sm_90"]


def launched(launches, kernel):
    return [launch for launch in launches if kernel in launch["kernel"]]


@dataclass
class Product:
    """A weight and how it is multiplied."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    blocksize: int = 64
    quant_type: str = "nf4"
    nested: bool = False
    weight_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    ranks: tuple[int, ...] = ()
    adapter_dtype: torch.dtype = torch.float32
    bias: bool = False

    def __str__(self):
        parts = [f"m{self.m}-n{self.n}-k{self.k}", short(self.dtype), f"{self.quant_type}-{self.blocksize}"]
        parts += ["nested"] * self.nested + [f"r{'-'.join(map(str, self.ranks))}"] * bool(self.ranks)
        return "-".join(parts)

    def weight(self) -> NF4Weight:
        values = (torch.randn(self.n, self.k) / self.k**0.5).to(self.weight_dtype or self.dtype)
        return quantize_4bit(values, self.blocksize, self.quant_type, self.nested)


# Few rows: one to 32, in each of the three instances; more than a span of absmax; idle warps. Then tiles of 64, 128 and
# 256 rows, the last of which overlap; parts of a reduction that several CTAs share. Blocks straddle rows wherever K is
# no multiple of the blocksize.
FORWARD = [
    Product(1, 40, 64),
    Product(1, 33, 576, torch.float16, nested=True, bias=True),
    Product(5, 1, 320, blocksize=512, ranks=(3,)),
    Product(8, 50, 8192 + 576, blocksize=128, nested=True),
    Product(13, 48, 192, torch.float16, blocksize=4096, quant_type="fp4", ranks=(17, 2), bias=True),
    Product(16, 31, 1024, blocksize=2048, nested=True, weight_dtype=torch.float32),
    Product(17, 65, 256, blocksize=256, ranks=(40,), adapter_dtype=torch.bfloat16),
    Product(32, 70, 1152, torch.float16, blocksize=1024, nested=True, out_dtype=torch.float32),
    Product(40, 130, 576, blocksize=256, nested=True, bias=True),
    Product(64, 3, 1216, torch.float16, ranks=(5,)),
    Product(65, 129, 64, blocksize=512, quant_type="fp4", ranks=(3, 16, 33), bias=True),
    Product(128, 128, 1024, blocksize=4096, out_dtype=torch.float32),
    Product(130, 72, 2240, torch.float16, blocksize=1024, nested=True, ranks=(16,), adapter_dtype=torch.float16),
    Product(300, 150, 1280, blocksize=128, nested=True, ranks=(8,), weight_dtype=torch.float32),
]
BACKWARD = [
    Product(3, 200, 192, torch.float16, blocksize=512, ranks=(20,)),
    Product(64, 136, 64, nested=True),
    Product(70, 1032, 192, blocksize=128, nested=True, ranks=(7, 9), adapter_dtype=torch.bfloat16),
    Product(130, 72, 1152, torch.float16, blocksize=4096, quant_type="fp4", weight_dtype=torch.float32),
]


def assert_rounded_once(actual, exact, what):
    """Checks that a result is as near as the exact result is when it is rounded."""
    assert_close(actual, exact, tolerances.FP32_SUM + 1.02 * error(exact.to(actual.dtype), exact), what)


def operands(product: Product, transposed: bool = False):
    weight, ranks = product.weight(), product.ranks
    x = torch.randn(product.m, product.n if transposed else product.k).to(product.dtype)
    lora_A = [(torch.randn(r, product.k) / product.k**0.5).to(product.adapter_dtype) for r in ranks]
    lora_B = [(torch.randn(product.n, r) / r**0.5).to(product.adapter_dtype) for r in ranks]
    return x, weight, lora_A, lora_B, [0.5 + i for i in range(len(ranks))]


@pytest.mark.parametrize("product", FORWARD, ids=str)
def test_forward(product):
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(product)
    bias = torch.randn(product.n) if product.bias else None
    wanted = oracle(x, weight.dequantize(product.dtype), bias, *adapters)
    dtype = product.out_dtype or product.dtype
    results = []
    for seed, profile in enumerate(profiles_for(product.m)):
        with ptx_emulator.profile(profile), ptx_emulator.set_checks(seed=seed), emulated() as launches:
            results.append(lora_linear(x, weight, bias, *adapters, out_dtype=dtype))
            assert len(launched(launches(), DECODE if product.m <= 32 else GEMM)) == 1
        assert_rounded_once(results[-1], wanted, profile)
    if product.m <= 32:  # from G1 on the device decides how the reduction is cut
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("product", BACKWARD, ids=str)
def test_backward(product):
    from ptx_emulator.ops import emulated

    grad_y, weight, lora_A, lora_B, scaling = operands(product, transposed=True)
    x = torch.randn(product.m, product.k, dtype=torch.float64, requires_grad=True)
    oracle(x, weight.dequantize(product.dtype), None, lora_A, lora_B, scaling).backward(grad_y.double())
    for seed, profile in enumerate(PROFILES):
        ours = x.detach().to(product.dtype).requires_grad_()
        with ptx_emulator.profile(profile), ptx_emulator.set_checks(seed=seed), emulated() as launches:
            lora_linear(ours, weight, None, lora_A, lora_B, scaling).backward(grad_y)
            assert len(launched(launches(), GEMM)) == (1 if product.m <= 32 else 2)
        assert_close(ours.grad, x.grad, tolerances.product(product.dtype, product.dtype), profile)


# With 64 rows of the weight a CTA: 163 tiles on 108 multiprocessors, then on 128, and 205 on 132, where a table decodes
# half of the rows.
WIDE = [
    ("sm_80", Product(13, 10390, 192, torch.float16, blocksize=4096, quant_type="fp4", ranks=(17, 2))),
    ("sm_89", Product(9, 10390, 64, nested=True, ranks=(40,), adapter_dtype=torch.bfloat16, bias=True)),
    ("sm_90", Product(16, 13057, 320, nested=True, ranks=(3, 16), bias=True)),
]
WIDE = [pytest.param(*case, marks=[pytest.mark.slow] * (case[1].k > 64)) for case in WIDE]


@pytest.mark.parametrize(("profile", "product"), WIDE, ids=str)
def test_many_rows_of_the_weight(profile, product):
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(product)
    bias = torch.randn(product.n) if product.bias else None
    with ptx_emulator.profile(profile), emulated() as launches:
        y = lora_linear(x, weight, bias, *adapters)
        (launch,) = launched(launches(), DECODE)
    assert launch["grid"][0] == -(-product.n // 64)
    assert_rounded_once(y, oracle(x, weight.dequantize(product.dtype), bias, *adapters), profile)


@pytest.mark.parametrize(
    "product",
    [Product(9, 12673, 192, nested=True), Product(12, 12673, 256, torch.float16, blocksize=128, quant_type="fp4")],
    ids=str,
)
def test_table_of_pairs_decodes_to_the_same_bits(product):
    """An A100 decodes by planes alone, and the emulator adds in the same order."""
    from ptx_emulator.ops import emulated

    x, weight, *_ = operands(product)
    results = []
    for seed, profile in enumerate(["sm_80", "sm_90", "sm_90", "sm_90"]):
        with ptx_emulator.profile(profile), ptx_emulator.set_checks(seed=seed), emulated() as launches:
            results.append(lora_linear(x, weight))
            (launch,) = launches()
        assert f"Li16ELi64ELb{int(profile == 'sm_90')}E" in launch["kernel"]
        assert torch.equal(results[-1], results[0])
        wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
        assert product.nested or wavefronts == ideal_wavefronts


@pytest.mark.slow
def test_parts_of_few_rows():
    """27 tiles, each shared by six CTAs, the last of which has fewer steps."""
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(Product(16, 1723, 18496, nested=True, ranks=(16,)))
    bias, results = torch.randn(1723), []
    for seed in range(2):
        with ptx_emulator.set_checks(seed=seed), emulated() as launches:
            results.append(lora_linear(x, weight, bias, *adapters))
            (launch,) = launched(launches(), DECODE)
        assert launch["grid"][0] == 27 * 6
    assert torch.equal(*results)
    assert_rounded_once(results[0], oracle(x, weight.dequantize(torch.bfloat16), bias, *adapters), "parts")


@pytest.mark.parametrize("m", [20, 100])
def test_same_bits_in_any_order(m):
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(Product(m, 130, 2048, nested=True, ranks=(16,)))
    results = []
    for seed in range(3):
        with ptx_emulator.set_checks(seed=seed), emulated() as launches:
            results.append(lora_linear(x, weight, None, *adapters))
            (launch,) = launched(launches(), DECODE if m <= 32 else GEMM)
    assert m <= 32 or launch["grid"][0] == 2 * 4  # two tiles, each shared by four CTAs
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("m", "ranks"), [(1, (16,)), (8, (3, 40)), (20, (70, 8, 1))])
def test_few_rows_with_lora_are_two_launches(m, ranks):
    """The product adds up what the CTAs of the shrink leave apart, to the bits of a sum made apart."""
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(Product(m, 48, 1024, ranks=ranks))
    results = []
    for given in (x, torch.nn.functional.pad(x, (0, 3))[:, :1024]):
        with emulated() as launches:
            results.append(torch.ops.peft_kernels.lora_linear_forward(given, *weight.arguments, *adapters))
            names = [launch["kernel"] for launch in launches()]
            if given is x:
                shrink, product = names
                assert "lora_shrink_kernel" in shrink and DECODE in product
            else:
                assert not any(DECODE in name for name in names)
    (_, s), (_, wanted) = results
    assert s.shape == (m, sum(ranks)) and torch.equal(s, wanted)


@pytest.mark.parametrize("profile", PROFILES)
def test_product_of_few_rows_overlaps_the_shrink(profile):
    from ptx_emulator.ops import emulated

    x, weight, *adapters = operands(Product(4, 48, 1024, ranks=(16,)))
    with ptx_emulator.profile(profile), emulated() as launches:
        lora_linear(x, weight, None, *adapters)
        lora_linear(x, weight)
        shrink, product, alone = launches()
    assert product["overlaps"] == (profile == "sm_90") and not shrink["overlaps"] and not alone["overlaps"]


REFUSED = {
    "x in fp32": (Product(4, 40, 128, torch.float32), lambda x: x),
    "blocks of 32": (Product(4, 40, 128, blocksize=32), lambda x: x),
    "k of 96": (Product(4, 40, 96), lambda x: x),
    "weight in fp16": (Product(4, 40, 128, weight_dtype=torch.float16), lambda x: x),
    "rows at any address": (Product(4, 40, 128), lambda x: torch.nn.functional.pad(x, (0, 3))[:, :128]),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_refused_operands_are_dequantised(reason):
    from ptx_emulator.ops import emulated

    product, change = REFUSED[reason]
    x, weight, *_ = operands(product)
    with emulated() as launches:
        y = lora_linear(change(x), weight)
        done = launches()
    assert launched(done, DEQUANTIZE) and not launched(done, DECODE)
    assert_rounded_once(y, oracle(x, weight.dequantize(product.dtype)), reason)


# ---- what it costs ------------------------------------------------------------------------------------------------


def multiply(m, n=1024, k=4096, nested=True, profile="sm_80"):
    """The launch of a product in bf16, and the weight."""
    from ptx_emulator.ops import emulated

    x, weight, *_ = operands(Product(m, n, k, nested=nested))
    with ptx_emulator.profile(profile), emulated() as launches:
        lora_linear(x, weight)
        (launch,) = launches()
    assert (DECODE if m <= 32 else GEMM) in launch["kernel"]
    return launch, weight


def bytes_of(weight):
    return sum(tensor.nbytes for tensor in (weight.codes, weight.absmax, *weight.nested))


# bitsandbytes 0.50's own GEMM for sm_80 on such an emulator, n = 1024, k = 4096, bf16, nested NF4: warp instructions in
# millions, sectors over compulsory bytes. Then the shares of these that this project's kernels may take, and their
# wavefronts of shared memory for each mma (bitsandbytes': 9.0, 5.5, 3.5, 2.75, with 2 to 3 times the wavefronts that
# its stores need).
BITSANDBYTES = {
    32: (1.38, 5.3, 0.45, 1.0, 3.0),
    64: (1.87, 8.5, 0.5, 0.6, 3.0),
    128: (2.29, 12.3, 0.5, 0.5, 2.0),
    256: (3.72, 10.5, 0.5, 0.5, 1.5),
}


@pytest.mark.parametrize("m", list(BITSANDBYTES))
def test_against_bitsandbytes(m):
    instructions, sectors, share_of_instructions, share_of_sectors, wavefronts_per_mma = BITSANDBYTES[m]
    launch, weight = multiply(m)
    assert launch["warp_instructions"] <= share_of_instructions * instructions * 1e6
    compulsory = 2 * m * 4096 + bytes_of(weight) + 2 * m * 1024
    assert report.moved_bytes(launch) <= share_of_sectors * sectors * compulsory
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert wavefronts <= wavefronts_per_mma * launch["mma"]
    # Without nested statistics, whose lookups go anywhere in a table, there are no conflicts at all.
    assert wavefronts <= 1.025 * ideal_wavefronts
    assert launch["shared_store"]["wavefronts"] == launch["shared_store"]["ideal_wavefronts"]


def test_instructions_of_a_weight_for_few_tokens():
    """Decoding is most of them. It is exact, whatever the number of tokens, and takes 3.1 instructions a weight (see
    test_decoding_for_products). A table of pairs of rounded centroids would take about 2, but would multiply with
    another weight than every other path."""
    launch, weight = multiply(8)
    assert 32 * launch["warp_instructions"] <= 5.1 * 2 * weight.codes.nbytes


@pytest.mark.parametrize("m", [1, 16, 32, 64, 128, 256])
def test_no_bank_conflicts(m):
    launch, _ = multiply(m, 256, 512, nested=False)
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert wavefronts == ideal_wavefronts


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("m", [1, 32, 64, 256])
def test_weight_is_fetched_once(m, nested):
    launch, weight = multiply(m, nested=nested)
    fetched = {name: 32 * count for name, count in launch["sectors_read"].items()}
    assert fetched["codes"] == weight.codes.nbytes
    assert fetched["codes"] + fetched["absmax"] <= 1.05 * (weight.codes.nbytes + weight.absmax.nbytes)
    assert fetched["x"] == 1024 // {1: 16, 32: 32}.get(m, 128) * m * 4096 * 2  # by each column of tiles
    loads = launch["global_load"]
    assert loads["sectors"] <= (1.03 if nested else 1.01) * loads["ideal_sectors"]
    assert launch["global_store"]["sectors"] == launch["global_store"]["ideal_sectors"]


def test_x_is_no_more_than_the_codes():
    """At 16 tokens, where the weight has rows enough, as 8192 x 28672 has: see matmul/cuda/kernel_plan.h."""
    launch, weight = multiply(16, 162 * 64, 256, nested=False)
    fetched = {name: 32 * count for name, count in launch["sectors_read"].items()}
    assert launch["grid"][0] == 162 and fetched["codes"] == weight.codes.nbytes
    assert fetched["x"] <= fetched["codes"]
    loads, (wavefronts, ideal_wavefronts) = launch["global_load"], report.shared_wavefronts(launch)
    assert loads["sectors"] <= 1.01 * loads["ideal_sectors"] and wavefronts == ideal_wavefronts
    assert launch["global_store"]["sectors"] == launch["global_store"]["ideal_sectors"]


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("m", [64, 128])
def test_transposed_weight_is_fetched_once(m, nested):
    from ptx_emulator.ops import emulated

    n, k = 1024, 2048
    grad_y, weight, *_ = operands(Product(m, n, k, nested=nested), transposed=True)
    x = torch.randn(m, k).bfloat16().requires_grad_()
    with emulated() as launches:
        lora_linear(x, weight).backward(grad_y)
        *_, launch = launches()
    assert GEMM in launch["kernel"]
    fetched = {name: 32 * count for name, count in launch["sectors_read"].items()}
    tiles = k // 128
    assert fetched["codes"] == weight.codes.nbytes
    # A tile reads two neighbouring absmax of each row, and so a sector, the rest of which other tiles read: they are in
    # flight together and meet in the L2. DRAM delivers each byte once.
    assert fetched["absmax"] == 32 * n * tiles
    assert fetched["grad_y"] == grad_y.nbytes * tiles
    assert launch["global_store"]["sectors"] == launch["global_store"]["ideal_sectors"]


@pytest.mark.parametrize(("m", "profile"), [(m, card) for m in (1, 32, 64, 128, 256) for card in profiles_for(m)])
def test_ctas_fill_the_card(m, profile):
    launch, _ = multiply(m, 4096, 2048 if m > 32 else 256, profile=profile)
    multiprocessors = {"sm_80": 108, "sm_89": 128, "sm_90": 132}[profile]
    assert launch["grid"][0] >= 0.8 * multiprocessors


@pytest.fixture(scope="module", params=[pytest.param("sm_80", marks=pytest.mark.slow), *cards.OTHERS])
def resources(request):
    return report.resources(CSRC / "matmul/cuda/launch.cu", request.param, includes=(CSRC,))


def test_machine_code(resources, request):
    architecture = request.node.callspec.params["resources"]
    assert len(resources) == 26
    for kernel, used in resources.items():
        # Two CTAs on a multiprocessor leave a thread of eight tokens 80 registers, of which sm_100 and sm_120 lack two.
        spills = architecture in ("sm_100", "sm_120") and "FewRowsTraits" in kernel and "Li8E" in kernel
        assert used.stack_bytes <= 8 * spills and used.spill_bytes <= 24 * spills, kernel
        if isinstance(used.mma_share, str):
            pytest.skip("needs nvdisasm")
    # G0 decodes exactly, to the bits of nf4_dequantize: a table of pairs of bytes would take a share of 12 %.
    for part, share in {
        "FewRowsTraits.*Li32E": 0.10,
        "ManyRowsTraits.*Li128E": 0.25,
        "ManyRowsTraits.*Li256E": 0.33,
    }.items():
        chosen = [used for kernel, used in resources.items() if re.search(part, kernel)]
        assert chosen and all(used.mma_share >= cards.least_share(share, architecture) for used in chosen), part


@dataclass
class Gate:
    """What sass.Latency may be at worst, in each instance and on each card."""

    waits: int  # before the first mma: for absmax and the table, and with few rows for bias and each of the addends
    together: int  # loads under way at once before it
    step_bytes: int  # of a thread, asked for before the first mma of a step
    copy_distance: int
    load_distance: int | None
    alu_per_weight: float


LATENCY = {
    "matmul_few.*Li8ELi16E": Gate(3, 28, 6 * 16, 50, None, 3.12),
    "matmuls_few.*Li8ELi16E": Gate(3, 28, 6 * 16, 50, None, 3.36),  # of several products
    "matmul_few.*Li16ELi16E": Gate(2, 31, 8 * 16, 58, None, 3.07),
    "matmuls_few.*Li16ELi16E": Gate(2, 31, 8 * 16, 58, None, 3.07),
    "FewRowsTraits.*Li16ELi64ELb0E": Gate(4, 92, 20 * 16, 205, None, 2.87),
    "FewRowsTraits.*Li16ELi64ELb1E": Gate(4, 92, 20 * 16, 205, None, 2.0),  # half of it by a table
    "matmul_few.*Li32ELi32E": Gate(3, 57, 16 * 16, 130, None, 2.95),
    "matmuls_few.*Li32ELi32E": Gate(3, 57, 16 * 16, 130, None, 2.95),
    "ManyRowsTraits.*Li64ELb0E": Gate(1, 75, 6 * 16, 340, 200, 3.55),
    "ManyRowsTraits.*Li128ELb0E": Gate(1, 79, 10 * 16, 410, 260, 3.77),
    "ManyRowsTraits.*Li256ELb0E": Gate(1, 44, 9 * 16, 320, 200, 4.6),
    "ManyRowsTraits.*Li64ELb1E": Gate(1, 13, 6 * 16, 330, 240, 3.57),
    "ManyRowsTraits.*Li128ELb1E": Gate(1, 17, 10 * 16, 400, 440, 3.79),
}


@pytest.mark.parametrize("part", list(LATENCY))
def test_latency(resources, part, request):
    """Chains of loads, each of which waits for the one before it, take hundreds of cycles a link and are in no count of
    the emulator. A step waits for nothing that it asked for itself."""
    gate = LATENCY[part]
    if request.node.callspec.params["resources"] in ("sm_100", "sm_120"):
        pytest.skip("the gates were read from machine code for sm_80 to sm_90")
    chosen = [used for kernel, used in resources.items() if re.search(part, kernel)]
    assert len(chosen) == 2  # for bf16 and fp16
    for used in chosen:
        if isinstance(used.mma_share, str):
            pytest.skip("needs nvdisasm")
        prologue, step = used.latency.prologue, used.latency.step
        assert prologue.waits <= gate.waits and prologue.looped == step.waits == 0
        assert prologue.loads >= gate.together and step.size >= gate.step_bytes
        assert used.latency.copy_distance >= gate.copy_distance
        assert gate.load_distance is None or used.latency.load_distance >= gate.load_distance
        assert used.latency.alu_per_weight <= gate.alu_per_weight
