"""The tests on a machine without the packages that they can do without: which run, and what is said of the others."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import optional
import pytest

TESTS = Path(__file__).parent
ORACLES = TESTS.parent / "peft_kernels/testing/reference"
OF_KERNELS = {path.stem for path in TESTS.glob("test_*.py") if "pytestmark = pytest.mark.kernels" in path.read_text()}
FAMILIES = {path.stem for path in ORACLES.glob("*.py") if f"test_{path.stem}" in OF_KERNELS}


def run(absent, folder, *arguments):
    """pytest's exit status and output, how many tests of each file passed, and why others were skipped."""
    command = [
        sys.executable,
        TESTS / "without.py",
        ",".join(absent),
        "-q",
        "--junitxml",
        folder / "out.xml",
        *arguments,
    ]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    passed, skipped = Counter(), Counter()
    for case in ElementTree.parse(folder / "out.xml").iter("testcase"):
        reason = case.find("skipped")
        if reason is None:
            passed[case.get("classname").split(".")[-1]] += 1
        else:
            skipped[f"{reason.get('message')} {reason.text}"] += 1
    return result.returncode, result.stdout, passed, skipped


@pytest.mark.slow
def test_kernels_are_tested_without_any_of_them(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_KERNELS_REQUIRE_ALL", raising=False)
    one_backend = ["-m", "kernels and not slow", "-k", "not emulated and not avx512 and not portable"]
    status, output, passed, skipped = run(optional.NAMES, tmp_path, "tests", *one_backend)
    assert status == 0, output
    assert len(FAMILIES) > 10 and {family for family in FAMILIES if not passed[f"test_{family}"]} == set()
    assert sum(passed.values()) > 200
    for name in ("test_peft", "test_transformers_on_gpu", "test_bitsandbytes"):
        assert any(f"{name}.py needs " in reason for reason in skipped), f"{name}: {skipped}"


@pytest.mark.slow
def test_models_are_tested_without_bitsandbytes(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_KERNELS_REQUIRE_ALL", raising=False)
    paths = [f"tests/test_{name}.py" for name in ("insert_adapters_errors", "peft_ia3", "bitsandbytes")]
    status, output, passed, skipped = run(["bitsandbytes", "expecttest"], tmp_path, *paths)
    assert status == 0, output
    assert passed["test_insert_adapters_errors"] and passed["test_peft_ia3"] and not passed["test_bitsandbytes"]
    assert any("needs bitsandbytes" in reason for reason in skipped)


def test_all_of_them_can_be_demanded(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_REQUIRE_ALL", "1")
    command = [sys.executable, TESTS / "without.py", "peft,pybind11", "tests/test_rms_norm.py"]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "these are not installed: peft, pybind11" in result.stderr
