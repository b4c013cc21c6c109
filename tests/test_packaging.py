"""What is handed out: the source distribution, the wheel that is built from it, and an environment with that wheel."""

import json
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
import system_needs
from packaging.metadata import Metadata

import peft_kernels

ROOT = Path(__file__).parent.parent
# A folder with a source distribution and a wheel, which are then tested in the place of new ones.
DIST = os.environ.get("PEFT_KERNELS_DIST")
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
    if DIST:
        (archive,) = Path(DIST).glob("peft_kernels-*.tar.gz")
        return archive
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


def make_wheel(sdist, environment, folder):
    """Builds the wheel from the sdist alone."""
    if DIST:
        folder = Path(DIST)
    else:
        command = ["wheel", str(sdist), "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
        subprocess.run([*PIP, *command], cwd=folder, env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_metadata(wheel):
    """Everything that an index refuses to take, and what it shows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert str(metadata.version) == peft_kernels.__version__
    assert (metadata.license_expression, metadata.license_files) == ("Apache-2.0", ["LICENSE"])
    assert metadata.description.startswith("# peft_kernels") and metadata.description_content_type == "text/markdown"
    required = [requirement for requirement in metadata.requires_dist if not requirement.marker]
    assert [str(requirement) for requirement in required if not requirement.specifier] == []


def check_needs(module, built, tag):
    """What auditwheel judges: a tag promises that the module loads on every system with that glibc or a newer one."""
    if not tag.startswith("manylinux_2_28") and not built["compiler"].startswith(system_needs.COMPILER):
        return
    said = system_needs.documented(system_needs.build_of(built["cuda"], tag))
    assert {name: number for name, number in system_needs.found(module).items() if number > said[name]} == {}


@pytest.mark.slow
def test_wheel_of_the_sdist_installs_and_works(sdist, tracked, environment, tmp_path):
    """Installs the wheel beside this environment's torch, and trains where there is neither a compiler nor PEFT.

    One test, as several might be distributed over processes, each of which would build.
    """
    wheel = make_wheel(sdist, environment, tmp_path)
    (tag,) = re.fullmatch(r"peft_kernels-[\d.]+-cp310-abi3-([\w.]+)\.whl", wheel.name).groups()
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name and name[-1] != "/"}
    assert held == {name for name in tracked if name.startswith("peft_kernels/")} | {"peft_kernels/_C.abi3.so"}
    check_metadata(wheel)

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    (target,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([*PIP, *install], env=environment, check=True)
    # torch and the rest come from this environment, but only after what was installed. A plain line in a .pth file
    # adds a folder and leaves out that folder's own .pth files, so an editable install of this package stays out.
    # None makes an import fail as if the package were not there.
    hidden = "import sys; sys.modules.update(dict.fromkeys(('accelerate', 'bitsandbytes', 'peft', 'transformers')))"
    (target / "environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n{hidden}\n")
    command = [python, ROOT / "tests/qlora_step.py"]
    nowhere = environment | {"PATH": str(tmp_path / "nowhere")}
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=nowhere)
    built = json.loads(result.stdout)
    assert Path(built["file"]).is_relative_to(target) and built["version"] == peft_kernels.__version__
    check_needs(target / "peft_kernels/_C.abi3.so", built, tag)
