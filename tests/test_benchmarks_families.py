"""The benchmarks of the families, on tiny problems; no timings."""

from dataclasses import replace

import pytest
import torch
from benchmark_cases import ROOFLINE, shout

from benchmarks import (
    adapter,
    adapter_fusion,
    attention,
    cross_entropy,
    dora_linear,
    dropout,
    experts,
    glu,
    harness,
    ia3_linear,
    linear_cross_entropy,
    lora_linear,
    lora_linear_grouped,
    nf4,
    report,
    rms_norm,
    rotary,
)
from benchmarks.lora_layers import OWN_BASE, STOCK
from benchmarks.lora_linear import DENSE, DENSE_LORA, DEQUANTIZE, FUNCTION
from benchmarks.records import FUSED, Below
from peft_kernels import cpu

EVAL = lora_linear.Case(3, (64, 128))
TRAIN = lora_linear.Case(9, (64, 128), training=True, dropout=0.25)


@pytest.mark.parametrize(
    ("module", "case", "other"),
    [
        (adapter, adapter.Case(9, 64, 8), adapter.EAGER),
        (adapter, adapter.Case(9, 64, 8, norm=True, activation="relu"), adapter.EAGER),
        (adapter_fusion, adapter_fusion.Case(9, 32, 3), adapter_fusion.UNFUSED),
        (adapter_fusion, adapter_fusion.Case(9, 32, 3, rank=8), adapter_fusion.UNFUSED),
        (cross_entropy, cross_entropy.Case(9, 50), cross_entropy.TORCH),
        (linear_cross_entropy, linear_cross_entropy.Case(9, 50, 32), linear_cross_entropy.LOGITS),
        (linear_cross_entropy, linear_cross_entropy.Case(300, 50, 32, trained=True), linear_cross_entropy.TORCH),
        (rotary, rotary.Case(1, 7, 4, 2, 16), rotary.TORCH),
        (rms_norm, rms_norm.Case(9, 50, trained=True), rms_norm.EAGER),
        (glu, glu.Case(9, 50), glu.EAGER),
        (dropout, dropout.Case(9, 50), dropout.TORCH),
        (experts, experts.Case(9, 4, 2, (64, 32)), experts.PEFT),
        (experts, experts.Case(9, 4, 2, (64, 32), is_4bit=True), experts.DENSE),
        (dora_linear, dora_linear.Case(9, (64, 128)), STOCK),
        (dora_linear, dora_linear.Case(9, (64, 128), False), STOCK),
    ],
    ids=str,
)
def test_functions(module, case, other):
    isas = cpu.isas()[-2:]
    found = module.run(case, [other], isas, 0.0, shout)
    phases = ["forward", "backward", "both"]
    wanted = [(FUSED, isa, phase) for isa in isas for phase in phases] + [(other, "", phase) for phase in phases]
    assert [(r.contender, r.isa, r.phase) for r in found] == wanted
    assert all(0 < r.error < module.TOLERANCE for r in found if r.contender == FUSED)
    saved = {r.contender: r.saved for r in found}
    if module is rotary:  # either keeps the angles alone
        assert 0 < saved[FUSED] == saved[other]
    else:
        assert (saved[FUSED] == 0) == (module is glu) and saved[FUSED] < saved[other]
    for size, flops in [(r.size, r.flops) for r in found]:
        assert size > 0 and (flops > 0 or module in (glu, dropout))


def test_functions_are_checked(monkeypatch):
    monkeypatch.setattr(adapter, "TOLERANCE", 1e-9)
    with pytest.raises(ArithmeticError, match=r"M=9 d=64 r=8, .*: got .* with a relative error of"):
        adapter.run(adapter.Case(9, 64, 8), [], [cpu.isa()], 0.0, shout)


# ---- lora_linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [EVAL, TRAIN, lora_linear.Case(9, (64, 128), True, autocast=True)], ids=str)
def test_lora_linear(case):
    isas = cpu.isas()[-2:]
    found = lora_linear.run(case, ["dense", "stock", "dequantize"], isas, 0.0, shout)
    names = [OWN_BASE, DENSE, DENSE_LORA, STOCK, DEQUANTIZE]
    phases = ["forward", "backward", "both"] if case.training else ["forward"]
    wanted = [(FUSED, isa, phase) for isa in isas for phase in phases]
    wanted += [(name, "", phase) for name in names for phase in phases]
    assert [(r.contender, r.isa, r.phase) for r in found] == wanted
    assert all(0 < r.error < 4e-3 for r in found if r.contender == FUSED)
    if case.training:
        saved = {r.contender: r.saved for r in found}
        assert saved[FUSED] < saved[STOCK] and saved[DENSE] == saved[OWN_BASE] == 0
        assert saved[FUSED] == 2 * 9 * 128 + 4 * 9 * 16 + 8 * bool(case.dropout)  # x, s, and the seed


def test_overhead_case_calls_the_function_too():
    target = Below("forward", 10.0)
    case = lora_linear.Case(1, (64, 64), repeat=3, wanted=(target,))
    found = lora_linear.run(case, ["stock"], [cpu.isas()[-1]], 0.0, shout)
    assert [r.contender for r in found] == [FUSED, FUNCTION] and found[0].peak is None
    assert [r.wanted for r in found] == [(target,), ()]
    assert report.case_table(found, ROOFLINE).row_count == 2


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setitem(lora_linear.TOLERANCES, "lora_B", 0.0)
    with pytest.raises(
        ArithmeticError, match=r"train M=9 64x128 dropout 0.25, \w+: got lora_B with .* wanted 0 at most"
    ):
        lora_linear.run(TRAIN, [], [cpu.isa()], 0.0, shout)


def test_contenders_compute_the_same():
    problem = lora_linear.Problem(EVAL)
    results = {}
    for name in (FUSED, FUNCTION, STOCK, DENSE_LORA):
        with torch.no_grad():
            results[name] = problem.layer(name)(problem.x)
    for name, y in results.items():
        assert harness.relative_error(y, results[STOCK].double()) < 1e-2, name


def test_training_starts_with_a_fresh_layer():
    problem = lora_linear.Problem(TRAIN)
    layer = problem.layer(STOCK)
    problem.contender(STOCK).run()
    assert layer.training and not vars(layer.base_layer.weight.quant_state).get("packing_format_for_cpu", False)
    assert layer.lora_A["default"].weight.grad is None  # put back


def test_work_counts_each_operand_once():
    case = lora_linear.Case(2, (3, 5), True)
    size, flops = lora_linear.work(case, "forward", 100, lora=False)
    assert (size, flops) == (100 + 2 * 2 * 8, 2 * 2 * 3 * 5)
    with_lora = lora_linear.work(case, "forward", 100, lora=True)
    assert with_lora == (size + 4 * 16 * 8, flops + 2 * 2 * 16 * 8)
    problem = lora_linear.Problem(TRAIN)
    parts = [problem.work(phase, FUSED) for phase in ("forward", "backward")]
    assert harness.work(problem, "both", FUSED) == tuple(a + b for a, b in zip(*parts, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_lora_linear_grouped(monkeypatch, training):
    case = lora_linear_grouped.Case(2, (64, 128), training=training)
    isas = cpu.isas()[-2:]
    found = lora_linear_grouped.run(case, ["stock", "base", "one"], isas, 0.0, shout)
    names = [(FUSED, isa) for isa in isas] + [(STOCK, ""), (OWN_BASE, ""), (lora_linear_grouped.ONE, "")]
    assert [(r.contender, r.isa) for r in found if r.phase == "forward"] == names
    assert [r.phase for r in found[:3]] == (["forward", "backward", "both"] if training else ["forward"] * 3)
    assert all(0 < r.error < lora_linear_grouped.TOLERANCES["y"] for r in found if r.contender == FUSED)
    own = next(r for r in found if r.contender == OWN_BASE)
    assert found[0].size > own.size > 0 and found[0].flops > own.flops > 0
    monkeypatch.setitem(lora_linear_grouped.TOLERANCES, "y", 1e-9)
    with pytest.raises(ArithmeticError, match="got y with an error of"):
        lora_linear_grouped.run(case, [], isas, 0.0, shout)


# ---- ia3_linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bits", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_ia3_linear(training, feedforward, four_bits):
    case = ia3_linear.Case(9, (64, 128), feedforward, four_bits, training)
    found = ia3_linear.run(case, ["stock", "dense"], [cpu.isa()], 0.0, shout)
    assert {r.contender for r in found} == {FUSED, STOCK, ia3_linear.DENSE}
    assert {r.phase for r in found} == ({"forward", "backward", "both"} if training else {"forward"})
    if training:
        (saved,) = {r.saved for r in found if r.contender == FUSED}
        assert saved == (9 * 128 * 2 if feedforward else 9 * 64 * 2)


def test_ia3_linear_checks():
    problem = ia3_linear.Problem(ia3_linear.Case(9, (64, 128)))
    problem.check([cpu.isa()])
    problem.layers[FUSED].ia3_l["default"].data[3] *= 2
    problem.layers[FUSED].base_layer.weight.data ^= 1
    with pytest.raises(ArithmeticError, match="y: got an error of"):
        problem.check([cpu.isa()])


# ---- nf4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["dequantize", "quantize"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_nf4(phase, quant_type, nested):
    case = nf4.Case(phase, (32, 192), quant_type, nested, 256, "fp16")
    found = nf4.run(case, [nf4.STOCK, nf4.EAGER], [cpu.isa()], 0.0, shout)
    assert [r.contender for r in found] == [FUSED, nf4.STOCK, nf4.EAGER]
    statistics = 24 + 4 * (256 + 1 + 1) if nested else 4 * 24
    assert found[0].size == 2 * 32 * 192 + 32 * 192 // 2 + statistics


def test_nf4_finds_a_difference():
    case = nf4.Case("quantize", (32, 192))
    problem = nf4.Problem(case)
    with pytest.raises(ArithmeticError, match=r"got \d+ codes that differ"):
        problem.compare(nf4.quantize_4bit(problem.tensor.flip(0), double_quant=True))


# ---- attention and prefix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "training"), [(0, True), (0, False), (1, False)], ids=["train", "eval", "decode"])
@pytest.mark.parametrize("prefix_length", [0, 5])
def test_attention(prefix_length, queries, training):
    case = attention.Case(2, 4, 2, 40, 16, queries, prefix=prefix_length, training=training)
    isas = [cpu.isas()[0], cpu.isas()[-1]]
    found = attention.run(case, ["stock", "plain"], isas, 0.0, shout)
    phases = ["forward", "backward", "both"] if training else ["forward"]
    assert [r.phase for r in found] == phases * 4
    names = [FUSED, FUSED, attention.STOCK, attention.PLAIN]
    assert [r.contender for r in found] == [name for name in names for _ in phases]
    assert all((r.saved is not None) == training for r in found)
    assert all(0 < r.error < 0.01 for r in found if r.contender == FUSED)


def test_attention_with_dropout():
    case = attention.Case(2, 4, 2, 40, 16, dropout=0.1, training=True)
    found = attention.run(case, ["stock"], [cpu.isa()], 0.0, shout)
    assert {record.phase for record in found} == {"forward", "backward", "both"}


def test_attention_finds_a_difference(monkeypatch):
    monkeypatch.setattr(attention, "fused", lambda p: 1.01 * attention.stock(p))
    with pytest.raises(ArithmeticError, match="out: got an error of"):
        attention.run(attention.Case(1, 2, 2, 20, 16), [], [cpu.isa()], 0.0, shout)


def test_attention_work():
    case = attention.Case(2, 4, 2, 3, 8, prefix=1)
    seen = 1 + 2 + 3 + 3
    assert attention.work(case, "forward", True) == (2 * 2 * 8 * (2 * 4 * 3 + 2 * 2 * 3), 4 * 2 * 4 * 8 * seen)
    assert attention.work(replace(case, queries=1), "forward", False)[1] == 4 * 2 * 4 * 8 * 3
