"""What is handed out: the source distribution, the wheel that is built from it, and an environment with that wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# For those who work on the repository, and what benchmarks measured.
NOT_IN_SDIST = re.compile(r"\.|benchmarks/results/")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def tracked():
    """The names of the files that git tracks; what a build leaves in the folder is not among them."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    output = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in output.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def environment():
    """Variables for a build by this environment's tools, and for a Python that does not know the checkout."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    ours = {"PEFT_KERNELS_CUDA": "0", "CMAKE_BUILD_PARALLEL_LEVEL": "2", "PATH": path}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ours


@pytest.fixture(scope="module")
def sdist(tracked, environment, tmp_path_factory):
    """A source distribution, made as pip and build make it, of a copy of the files that git tracks."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        copy = folder / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    subprocess.run(command, cwd=folder / "checkout", env=environment, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder / "checkout")
    (archive,) = folder.glob("peft_kernels-*.tar.gz")
    return archive


@pytest.mark.slow
def test_sdist_holds_what_builds_and_tests_the_package(sdist, tracked):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("peft_kernels.egg-info/")}
    assert held - made == {name for name in tracked if not NOT_IN_SDIST.match(name)}


@pytest.mark.slow
def test_wheel_of_the_sdist_installs_and_works(sdist, tracked, environment, tmp_path):
    """Builds the wheel from the sdist alone, installs it beside this environment's torch, and runs it."""
    command = ["wheel", str(sdist), "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([*PIP, *command], cwd=tmp_path, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"peft_kernels-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked if name.startswith("peft_kernels/")} | {"peft_kernels/_C.abi3.so"}

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    (target,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([*PIP, *install], env=environment, check=True)
    # torch and the rest come from this environment, but only after what was installed. A plain line in a .pth file
    # adds a folder and leaves out that folder's own .pth files, so an editable install of this package stays out.
    (target / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = (
        "import torch, peft_kernels; from peft_kernels.ops import quantize_4bit\n"
        "weight = quantize_4bit(torch.tensor([1.0, -1.0, 0.0]), double_quant=True)\n"
        "print(peft_kernels.__file__); print(weight.dequantize().tolist())"
    )
    result = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    location, values = result.stdout.splitlines()
    assert Path(location).is_relative_to(target)
    assert values == "[1.0, -1.0, 0.0]"
