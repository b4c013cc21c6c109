"""`python -m benchmarks card`: its arguments and phases, and the whole command without a card."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ptx_emulator
import pytest
from card_runs import ends

from benchmarks import card
from benchmarks.card import correctness, hardware, machine, model, profile, run, steps, timing

ROOT = Path(__file__).parent.parent
OPTIONAL = ("bitsandbytes", "peft", "transformers", "matplotlib")
# A Python that finds this on its path can't import them.
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def command(*arguments, path=(), environment=None):
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])} | (environment or {})
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "card", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )


def test_every_step_has_a_function_and_a_name_of_its_own():
    assert len({(step.phase, step.name) for step in steps.STEPS}) == len(steps.STEPS)
    modules = {
        "correctness": correctness, "hardware": hardware, "machine": machine, "model": model, "profile": profile,
        "timing": timing,
    }  # fmt: skip
    for each in (steps.ENVIRONMENT, steps.BUILD, *steps.STEPS):
        module, name = each.function.split(":")
        assert callable(getattr(modules[module], name)), each
    for phase in steps.PHASES:
        assert next(each for each in steps.STEPS if each.phase == phase).name == "ceilings"


def test_the_steps_are_listed(capsys):
    card.main(["timing", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(step.phase == "timing" for step in steps.STEPS)
    assert lines[1].split() == ["timing", "90", "s", "linear", "4096x4096"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["speed"], "argument PHASE: got 'speed', wanted some of correctness, timing, profile, report"),
        (["--only", "no such step", "timing"], "argument --only: got 'no such step', wanted one that the name of"),
        (["--minutes", "0"], "argument --minutes: got 0, wanted a number above 0"),
        (["--only", "("], "argument --only: got '(', wanted a regular expression"),
    ],
)
def test_bad_arguments(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as end:
        card.main(arguments)
    assert end.value.code == 2 and wanted in capsys.readouterr().err


def test_a_card_s_name_as_a_folder():
    assert card.name_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_without_the_optional_packages(tmp_path):
    """The command in a Python without PEFT, bitsandbytes, transformers and matplotlib; a step of every phase."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = tmp_path / "out"
    only = "^(ceilings|kernels of (lora_linear|nf4)|linear .*|side stream|model)$"
    result = command("--device", "cpu", "--only", only, path=[tmp_path], environment={"OUT": str(out)})
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout) < 12_000 and "A REHEARSAL on cpu" in result.stdout
    assert {path.name for path in out.iterdir()} == {"correctness.jsonl", "timing.jsonl", "profile.jsonl", "card.md"}
    found = {phase: run.read(out / f"{phase}.jsonl") for phase in steps.PHASES}
    assert all(records[0]["packages"]["peft"] is None for records in found.values())
    assert ends(found["correctness"])["kernels of lora_linear"]["cases"] == {"ok": 6}
    assert ends(found["correctness"])["side stream"]["reason"] == "it needs a CUDA device, and this is cpu"
    linear = ends(found["timing"])["linear 4096x4096"]
    assert linear["status"] == "ok" and set(linear["cases"]) == {"ok", "skipped"}
    assert ends(found["profile"])["model"]["reason"] == "it needs transformers, which is not installed"
    assert "plot" in result.stdout and "matplotlib" in result.stdout
    assert "bitsandbytes is not installed" in (out / "card.md").read_text()


needs_emulator = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=needs_emulator)])
def test_the_whole_command(device, tmp_path):
    result = command("--device", device, "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok ") > 20 and "\nfailed" not in result.stdout
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"correctness.jsonl", "timing.jsonl", "profile.jsonl", "card.md", "card.png"}
    records = [record for phase in steps.PHASES for record in run.read(tmp_path / f"{phase}.jsonl")]
    found = {(record["phase"], record["step"]): record for record in records if record["kind"] == "step"}
    assert {(step.phase, step.name) for step in steps.STEPS} <= set(found)
    for step in steps.STEPS:
        record = found[step.phase, step.name]
        assert record["status"] == "ok" or record["reason"], step
        assert (record["status"] == "ok") or step.needs == "cuda" or step.name in ("compiled", "tune 4096x4096")
    if device == "emulated":
        launched = " ".join(name for record in records for name in record.get("kernels", ()))
        sources = [path.read_text() for path in ROOT.glob("csrc/*/cuda/*.cu*")]
        kernels = {name for source in sources for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\b", source)}
        assert len(kernels) > 30 and not {name for name in kernels if name not in launched}


def test_make_card_needs_no_environment(tmp_path):
    result = subprocess.run(
        ["make", "--silent", "card", f"PYTHON={sys.executable}", f"VENV={tmp_path}/none", "ARGS=timing --list"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "linear 4096x4096" in result.stdout, result.stderr
    assert not (tmp_path / "none").exists()
