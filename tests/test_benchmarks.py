"""The benchmarks' command line, and what a benchmark loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import (
    adapter,
    adapter_fusion,
    architectures,
    attention,
    cross_entropy,
    dora_linear,
    dropout,
    experts,
    glu,
    ia3_linear,
    linear_cross_entropy,
    lora_linear,
    lora_linear_grouped,
    merge,
    model,
    nf4,
    options,
    prefix,
    rms_norm,
    rotary,
    train_many,
)
from peft_kernels import cpu

ROOT = Path(__file__).parent.parent
BENCHMARKS = {
    "lora_linear": lora_linear,
    "lora_linear_grouped": lora_linear_grouped,
    "dora_linear": dora_linear,
    "ia3_linear": ia3_linear,
    "attention": attention,
    "prefix": prefix,
    "experts": experts,
    "adapter": adapter,
    "adapter_fusion": adapter_fusion,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": rotary,
    "rms_norm": rms_norm,
    "glu": glu,
    "dropout": dropout,
    "merge": merge,
    "nf4": nf4,
    "architectures": architectures,
    "model": model,
    "train_many": train_many,
}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--filter", "(", "a regular expression"),
        ("--filter", "no such case", "one that some case matches: '"),
        ("--vs", "nothing", "some of "),
        ("--isa", "sse2", "some of portable,avx2"),
        ("--threads", "0", "a whole number of at least 1"),
        ("--threads", "two", "a whole number"),
    ],
)
def test_bad_option(name, option, value, wanted, capsys):
    with pytest.raises(SystemExit) as error:
        BENCHMARKS[name].main([option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: got '{value}', wanted {wanted}" in message


def parse(*arguments, cases=lora_linear.CASES, console=None):
    return options.parse("lora_linear", "", arguments, cases, list(lora_linear.BASELINES), ["compiled"], console)


def test_filter_sees_the_names_of_the_cases():
    _, cases = parse("--filter", r"eval M=(1|8) 4096x4096$")
    assert [case.rows for case in cases] == [1, 8]
    assert parse("--filter", "autocast")[1] == [case for case in lora_linear.CASES if case.autocast]


def test_quick_leaves_out_what_takes_long():
    given, cases = parse("--quick")
    assert given.vs == ("dense", "stock", "dequantize") and not any(case.large for case in cases)
    assert parse("--quick", "--vs", "stock,compiled")[0].vs == ("stock", "compiled")
    assert parse()[0].vs == tuple(lora_linear.BASELINES) and len(parse()[1]) == len(lora_linear.CASES)


def test_missing_instruction_sets_are_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "isas", lambda: ["portable", "avx2"])
    console = Console(file=sys.stdout)
    assert parse("--isa", "avx512,avx2,portable", console=console)[0].isas == ("avx2", "portable")
    assert "avx512: skipped, this processor lacks it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("--isa", "avx512")
    assert "argument --isa: got 'avx512', wanted one of portable,avx2" in capsys.readouterr().err


def test_threads():
    parse("--threads", "2")
    assert torch.get_num_threads() == 2


def test_help_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    command.main()
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command.BENCHMARKS)


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_every_benchmark_can_be_run_by_its_name(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--help"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0 and f"python -m benchmarks {name}" in capsys.readouterr().out


def test_device_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        lora_linear.main(["--device", "cuda"])
    assert "argument --device: got 'cuda', wanted cpu: there is no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nf4.main(["--device", "cuda"])
    assert "argument --device" in capsys.readouterr().err


def test_quick_and_a_large_case(capsys):
    with pytest.raises(SystemExit):
        parse("--quick", "--filter", "49152")
    assert "argument --filter: got '49152', wanted one that some case matches: " in capsys.readouterr().err


def test_names_of_cases_are_unique():
    for module in BENCHMARKS.values():
        assert len({str(case) for case in module.CASES}) == len(module.CASES)


# ---- What a benchmark loads -----------------------------------------------------------------------------------------


def test_a_family_is_timed_without_other_libraries():
    families = [
        "adapter",
        "adapter_fusion",
        "cross_entropy",
        "linear_cross_entropy",
        "rotary",
        "rms_norm",
        "glu",
        "dropout",
        "attention",
        "prefix",
    ]
    unwanted = ["peft", "transformers", "bitsandbytes", "examples"]
    script = f"""
import importlib, sys
for name in {families}:
    importlib.import_module("benchmarks." + name)
    found = [module for module in {unwanted} if module in sys.modules]
    assert not found, (name, found)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_emulator_is_found_without_a_path_to_the_tests():
    script = "import benchmarks.emulated, sys; assert not [p for p in sys.path if p.endswith('tests')], sys.path"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
