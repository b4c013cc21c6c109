"""Builds `peft_kernels._C` with CMake and Ninja. Metadata lives in pyproject.toml.

Environment: PEFT_KERNELS_CUDA=0/1 leaves out or demands the CUDA kernels (by default they are built when nvcc is
found); TORCH_CUDA_ARCH_LIST names the architectures (by default those of the visible cards, or without a card every one
that nvcc knows); PEFT_KERNELS_SANITIZE names sanitizers;
PEFT_KERNELS_EMULATE_AMX=1 runs the kernels for AMX in software, for tests on a processor without it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, or of pip's nvidia-cuda-nvcc; None if the CUDA kernels are not to be built."""
    wanted = os.environ.get("PEFT_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"PEFT_KERNELS_CUDA: got '{wanted}', wanted 0, 1 or nothing")
    if wanted == "0":
        return None
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = [home for entry in sys.path for home in sorted(Path(entry or ".").glob("nvidia/cu*"), reverse=True)]
    candidates = [home / "bin/nvcc" for home in homes]
    candidates += [Path(path) for path in [shutil.which("nvcc")] if path]
    candidates += [home / "bin/nvcc" for home in wheels]
    for nvcc in candidates:
        if nvcc.is_file():
            return str(nvcc)
    if wanted == "1":
        raise SystemExit(
            "PEFT_KERNELS_CUDA=1, but there is no nvcc in CUDA_HOME, on the PATH or in pip's nvidia-cuda-nvcc. "
            "Install a CUDA toolkit (12.x or 13.x), or build for the CPU only with PEFT_KERNELS_CUDA=0"
        )
    return None


def cuda_architectures(nvcc: str) -> str:
    """CMAKE_CUDA_ARCHITECTURES from TORCH_CUDA_ARCH_LIST, else of the visible cards, else for every card of nvcc's."""
    names = re.split("[; ,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    architectures = []
    for name in filter(None, names):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got '{name}', wanted numbers like 8.0 or 9.0+PTX")
        major, minor, variant, ptx = match.groups()
        architectures.append(f"{major}{minor}{variant}" + ("" if ptx else "-real"))
    if not architectures:
        architectures = [f"{capability.replace('.', '')}-real" for capability in visible_cards()]
    return ";".join(architectures or every_architecture(nvcc))


def every_architecture(nvcc: str) -> list[str]:
    """Code for every card that nvcc knows from sm_80 on, and PTX for later ones.

    Code for an architecture runs on later ones of the same major number. sm_86 is there beside sm_80, because the many
    cards of sm_86 and sm_89 have fewer threads and less shared memory on a multiprocessor.
    """
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = sorted({int(number) for number in re.findall(r"\bsm_(\d+)\b", listed)})
    first = {number // 10: number for number in reversed(known) if number >= 80}
    *others, last = sorted({*first.values(), 86} & {*known})
    return [*(f"{number}-real" for number in others), str(last)]


def visible_cards() -> list[str]:
    """The compute capabilities of the machine's cards, such as '8.0'. nvidia-smi knows them whatever torch is for."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip() for line in output.splitlines() if re.fullmatch(r"\d+\.\d+", line.strip())})


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # setuptools gives an editable install a temporary folder, in which Ninja would start anew at every change.
        build_directory = ROOT / "build/editable" if self.editable_mode else Path(self.build_temp).resolve()
        build_directory.mkdir(parents=True, exist_ok=True)
        # Everything that a build tree remembers is said each time, so that one made with other settings can be reused.
        options = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "TORCH_LIBRARY_DIR": TORCH_LIB_PATH,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "PEFT_KERNELS_SANITIZE": os.environ.get("PEFT_KERNELS_SANITIZE", ""),
            "PEFT_KERNELS_EMULATE_AMX": os.environ.get("PEFT_KERNELS_EMULATE_AMX", "0"),
            "PEFT_KERNELS_WITH_CUDA": "OFF",
        }
        nvcc = find_nvcc()
        if not nvcc:
            return run_cmake(build_directory, options)
        print(f"peft_kernels: CUDA kernels are built with {nvcc} (PEFT_KERNELS_CUDA=0 leaves them out)")
        try:
            run_cmake(build_directory, options | cuda_options(nvcc))
        except subprocess.CalledProcessError:
            if os.environ.get("PEFT_KERNELS_CUDA") == "1":
                raise
            # An nvcc that is too old, or that rejects the host's compiler, is no reason to do without the CPU kernels.
            print(f"peft_kernels: {nvcc} failed, see above; building for the CPU only", file=sys.stderr)
            run_cmake(build_directory, options)


class HubKernel(Command):
    """Builds dist/hub/peft-kernels, a repository for Hugging Face's Hub that `kernels.get_kernel` loads.

    A build for CUDA and one for the CPU alone stand side by side there.
    """

    description = "build the package as a kernel for Hugging Face's Hub"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        nvcc = find_nvcc()
        backend = f"cu{toolkit_version(nvcc)}" if nvcc else "cpu"
        # The module's ABI is that of torch 2.10, and serves every later one.
        variant = f"torch-stable-abi210-{backend}-{platform.machine()}-linux"
        folder = ROOT / "dist/hub/peft-kernels/build" / variant
        shutil.rmtree(folder, ignore_errors=True)
        build = self.distribution.get_command_obj("build")
        build.build_lib, build.build_temp = str(folder), str(ROOT / f"build/hub-{backend}")
        self.run_command("build")
        version = self.distribution.get_version()
        metadata = {
            "id": f"_peft_kernels_{backend}_{re.sub(r'[^0-9a-z]', '_', version)}",  # of the module that is imported
            "name": "peft-kernels",
            "version": 1,  # of what the kernel offers
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": "cuda" if nvcc else "cpu"},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def toolkit_version(nvcc: str) -> str:
    """Such as '130'."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "".join(re.search(r"release (\d+)\.(\d+)", said).groups())


def cuda_options(nvcc: str) -> dict[str, str]:
    library = Path(nvcc).parent.parent / "lib"
    in_wheel = (library / "libcudart_static.a").is_file()  # pip's wheels: nvcc itself looks in lib64
    return {
        "PEFT_KERNELS_WITH_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": cuda_architectures(nvcc),
        "CMAKE_CUDA_FLAGS": f"-L{library}" if in_wheel else "",
    }


def run_cmake(build_directory: Path, options: dict[str, str]) -> None:
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.check_call(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_directory), *definitions])
    subprocess.check_call(["cmake", "--build", str(build_directory)])


setup(
    ext_modules=[Extension("peft_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "hub_kernel": HubKernel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
