"""The compiled module: what it needs from outside, and what happens when it is missing or old."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import system_needs
from ptx_emulator.build import ROOT
from torch.utils.cpp_extension import include_paths

import peft_kernels
from peft_kernels import _extension, cuda

EXTENSION = Path(_extension._C.__file__)
TORCH_TARGET = "0x020a000000000000ULL"  # as in CMakeLists.txt: torch 2.10

# Versioned symbols name their library's version node; the few without one are listed.
SYSTEM_VERSIONS = re.compile(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
WEAK_TOOLCHAIN_SYMBOLS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
PYTHON_SYMBOLS = re.compile(r"_?Py_?[A-Z]\w+$")


def undefined_symbols():
    """(name with version, whether weak) of every symbol that the module takes from elsewhere."""
    output = subprocess.run(["readelf", "--dyn-syms", "--wide", EXTENSION], capture_output=True, text=True, check=True)
    for line in output.stdout.splitlines():
        columns = line.split()
        if len(columns) >= 8 and columns[6] == "UND":
            yield columns[7], columns[4] == "WEAK"


def stable_shim():
    """Every function that torch's stable C headers declare for the version that we target."""
    headers = ["torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h"]
    source = "".join(f"#include <{header}>\n" for header in headers)
    flags = [f"-I{path}" for path in include_paths()] + [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    command = [compiler, "-std=c++20", "-E", "-P", "-x", "c++", *flags, "-"]
    output = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", output))


needs_binutils = pytest.mark.skipif(
    not (shutil.which("readelf") and shutil.which(os.environ.get("CXX", "c++"))), reason="needs binutils and a compiler"
)


@needs_binutils
def test_only_stable_symbols_are_needed():
    shim = stable_shim()
    assert len(shim) > 100
    foreign = [
        symbol
        for symbol, weak in undefined_symbols()
        if not SYSTEM_VERSIONS.search(symbol)
        and symbol not in shim
        and not (weak and symbol in {*WEAK_TOOLCHAIN_SYMBOLS, "aoti_torch_get_current_cuda_stream"})
        and not PYTHON_SYMBOLS.match(symbol)
    ]
    assert foreign == []


@needs_binutils
def test_cuda_stream_symbol_is_weak():
    """A strong reference would keep the module from loading on a torch without CUDA."""
    stream = [weak for symbol, weak in undefined_symbols() if symbol == "aoti_torch_get_current_cuda_stream"]
    assert stream == ([True] if _extension.build_info["cuda"] else [])


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A machine with the card of a compute capability, or with none, whose nvcc knows of what its list names."""

    def play(capability, listed=""):
        for name, text in (("nvidia-smi", capability), ("nvcc", listed)):
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\necho '{text}'\n" if text else "#!/bin/sh\nexit 6\n")
            program.chmod(0o755)
        return str(tmp_path / "nvcc")

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("TORCH_CUDA_ARCH_LIST", "MAKEFLAGS"):  # which `make test` passes on
        monkeypatch.delenv(name, raising=False)
    return play


def cuda_architectures(nvcc):
    with mock.patch("setuptools.setup"):
        return runpy.run_path(ROOT / "setup.py")["cuda_architectures"](nvcc)


NVCC_12_8 = "sm_50 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_101 sm_120"
NVCC_13_0 = "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121"


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ("sm_70 sm_80", "80"),
        (NVCC_12_8, "80-real;86-real;90-real;100-real;120"),
        (NVCC_13_0, "80-real;86-real;90-real;100-real;110-real;120"),
    ],
    ids=["11.0", "12.8", "13.0"],
)
def test_without_a_card_there_is_code_for_every_major_number(card, listed, wanted):
    assert cuda_architectures(card("", listed.replace(" ", "\n"))) == wanted


def test_cards_and_names_come_first(card, monkeypatch):
    nvcc = card("8.9", NVCC_13_0)
    assert cuda_architectures(nvcc) == "89-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert cuda_architectures(nvcc) == "89-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert cuda_architectures(nvcc) == "80-real;90a"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_compiles_for_one_architecture(card, monkeypatch):
    """Those who run the tests or the demo without a card shall not wait for code that cannot run there."""

    def exported():
        command = ["make", "--silent", "-C", ROOT, "--eval=show: ; @printenv TORCH_CUDA_ARCH_LIST", "show"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    card("")
    assert exported() == "8.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert exported() == "9.0"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    card("8.9")
    assert exported() == ""


@pytest.fixture
def given_environment(card, tmp_path):
    """An environment whose Python only says what it was called with; on a machine with a card."""
    card("9.0")
    python = tmp_path / "given/bin/python3"
    python.parent.mkdir(parents=True)
    names = "$PEFT_KERNELS_CUDA,$TORCH_CUDA_ARCH_LIST,$PEFT_KERNELS_REQUIRE_ALL,$PYTHONPATH"
    python.write_text(f'#!/bin/sh\necho "python {names} $*"\n')
    python.chmod(0o755)
    return tmp_path / "given"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("current", [True, False], ids=["current", "old"])
def test_make_test_gpu_in_an_environment_that_is_there(given_environment, current, monkeypatch):
    """Nothing is installed and no environment is made: a machine with a card may have no network."""
    monkeypatch.delenv("PEFT_KERNELS_REQUIRE_ALL", raising=False)
    module = "--old-file=peft_kernels/_C.abi3.so" if current else "--new-file=setup.py"
    command = ["make", "--silent", "-C", ROOT, module, "test-gpu", f"VENV={given_environment}", "ARGS=-k nf4"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    calls = re.findall("^python (.*?) (.*)$", output, re.MULTILINE)
    assert {variables for variables, _ in calls} == {f"1,,,{ROOT}"}
    build = [] if current else ["setup.py --quiet build_ext --inplace"]
    init, *built, why_not, tests = [arguments for _, arguments in calls]
    assert "torch.cuda.init()" in init and built == build and "why_not" in why_not and tests == "-m pytest -k nf4"


def dynamic_section():
    command = ["readelf", "--dynamic", "--wide", EXTENSION]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_binutils
def test_needed_libraries():
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic_section()))
    system = {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "libdl", "librt", "ld-linux"}
    assert {re.split(r"\.so|-x86-64|-aarch64", library)[0] for library in needed} - system == {"libtorch"}


@needs_binutils
def test_no_folder_is_searched_for_libraries():
    """The folder of the torch that it was linked with may be pip's for one build, or belong to anyone later."""
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic_section()) == []


@needs_binutils
@pytest.mark.skipif(
    not str(_extension.build_info["compiler"]).startswith(system_needs.COMPILER), reason="of modules by GCC 12"
)
def test_needs_no_newer_glibc_than_is_said():
    """A wheel's tag follows from the newest symbol, and one function more can raise it."""
    said = system_needs.documented(system_needs.build_of(bool(_extension.build_info["cuda"])))
    found = system_needs.found(EXTENSION)
    assert found.keys() == said.keys()
    assert {library: number for library, number in found.items() if number > said[library]} == {}


def test_the_readme_says_of_glibc_what_the_limits_say():
    cpu, both = (
        "{}.{}".format(*system_needs.documented(system_needs.build_of(cuda))["GLIBC"]) for cuda in (False, True)
    )
    assert f"needs glibc {both}, or {cpu} without CUDA kernels" in (ROOT / "README.md").read_text()


def test_the_drivers_that_are_said_are_those_that_are_asked_for():
    for name in ("README.md", "docs/limits.md"):
        text = " ".join((ROOT / name).read_text().split())
        said = re.findall(r"nvcc (\d+) (?:builds \w+(?: \w+)*? )?for drivers from (\d+) on", text)
        assert {int(nvcc): int(driver) for nvcc, driver in said} == cuda._LEAST_DRIVER, name


def test_the_version_is_written_once_and_has_notes():
    """As a name, in the package; a tag of git, the wheel and the command line take it from there."""
    version = peft_kernels.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "peft_kernels.__version__" }' in project and f'"{version}"' not in project
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_limited_api_name():
    assert EXTENSION.name == "_C.abi3.so"


def import_with(tmp_path, stub):
    """Imports a copy of the package that has `stub` for its compiled module; returns the error text."""
    package = Path(peft_kernels.__file__).parent
    copy = tmp_path / "peft_kernels"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if stub is not None:
        (copy / "_C.py").write_text(stub)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    # An editable install would supply its own compiled module.
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import peft_kernels"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_missing_module_says_what_to_do(tmp_path):
    error = import_with(tmp_path, None)
    assert error.startswith("ImportError: peft_kernels: the compiled module peft_kernels._C could not be loaded")
    assert "pip install" in error


def test_stale_module_says_what_to_do(tmp_path):
    error = import_with(tmp_path, "def build_info(): return {'ops_version': -1}")
    assert error.startswith("ImportError: peft_kernels: the compiled module") and "is stale" in error
    assert f"wants {_extension.EXPECTED_OPS_VERSION}" in error
    assert "pip install" in error


def test_refusals_are_value_errors_whatever_torch_makes_of_them():
    def op(message, *, error=RuntimeError):
        raise error(message)

    refusing = _extension.refusing(op)
    with pytest.raises(ValueError, match=r"^p: got 2, wanted a probability$"):
        refusing("p: got 2, wanted a probability")
    for error, message in ((RuntimeError, "out of memory"), (TypeError, "x: got 1, wanted 2")):
        with pytest.raises(error, match=message):
            refusing(message, error=error)
    assert _extension.refusing(max)(1, 2) == 2
