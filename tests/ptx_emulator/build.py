"""Builds the emulator and compiles CUDA sources to PTX, into build/ptx_emulator and only when something changed."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "ptx_emulator"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or of the PATH."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin/nvcc").is_file():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def find_tool(name: str) -> str | None:
    """A program on the PATH, or one that pip put beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def find_cuda_tool(name: str) -> str | None:
    """A program of the toolkit: on the PATH, beside nvcc, or of pip's wheel nvidia-cuda-NAME."""
    folders = [Path(nvcc).resolve().parent for nvcc in [find_nvcc()] if nvcc]
    folders += [folder for entry in sys.path for folder in sorted(Path(entry).glob("nvidia/*/bin"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def missing() -> str | None:
    """What this machine lacks to build and use the emulator; None if nothing."""
    if not find_nvcc():
        return "the emulator needs nvcc"
    for tool in (os.environ.get("CXX", "c++"), "cmake", "ninja"):
        if not find_tool(tool):
            return f"the emulator needs {tool}"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulator needs pybind11"
    return None


@functools.cache
def toolkit_include() -> Path:
    """The directory of the toolkit's headers, which nvcc itself knows."""
    output = subprocess.run([find_nvcc(), "--dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
    for word in output.split():
        path = Path(word.strip('"').removeprefix("-I").strip('"'))
        if word.startswith(('"-I', "-I")) and (path / "cuda_runtime.h").is_file():
            return path.resolve()
    return (Path(find_nvcc()).resolve().parent.parent / "include").resolve()


@contextmanager
def locked():
    """One process at a time: tests may run in several."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], **options) -> None:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")


def configure() -> None:
    import pybind11
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    options = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
        "CUDA_INCLUDE_DIR": str(toolkit_include()),
        "NVCC": find_nvcc(),
        "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
        "TORCH_LIBRARY_DIR": TORCH_LIB_PATH,
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run([find_tool("cmake"), "-G", "Ninja", "-S", str(HERE), "-B", str(BUILD), *definitions])


def build(target: str) -> Path:
    """Builds one target of CMakeLists.txt: a mistake in the library's kernels spares the emulator's own tests."""
    with locked():
        configure()
        run([find_tool("cmake"), "--build", str(BUILD), "--target", target])
    return BUILD


@functools.cache
def native():
    """The compiled half, built if need be."""
    build("_ptx_emulator")
    spec = importlib.util.spec_from_file_location("_ptx_emulator", BUILD / "_ptx_emulator.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def compile_to_ptx(
    source: Path, architecture: str, includes: tuple[Path, ...] = (), flags: tuple[str, ...] = ()
) -> str:
    """The PTX of a .cu file, from the cache if neither it nor any header of `includes` has changed."""
    command = [find_nvcc(), "-std=c++20", f"-arch=compute_{architecture.removeprefix('sm_')}", "-ptx", *flags]
    command += [f"-I{path}" for path in includes]
    digest = hashlib.sha256(repr((command, nvcc_version())).encode())
    for path in [source, *(file for root in includes for file in sorted(root.rglob("*.*h")))]:
        digest.update(path.read_bytes())
    ptx = BUILD / "ptx" / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.ptx"
    with locked():
        if not ptx.exists():
            ptx.parent.mkdir(exist_ok=True)
            run([*command, str(source), "-o", str(ptx.with_suffix(".tmp"))])
            ptx.with_suffix(".tmp").rename(ptx)
    return ptx.read_text()
