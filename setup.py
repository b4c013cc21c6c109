"""Builds `peft_kernels._C` with CMake and Ninja. Metadata lives in pyproject.toml.

Environment: PEFT_KERNELS_CUDA=0/1 leaves out or demands the CUDA kernels (by default they are built when nvcc is
found); TORCH_CUDA_ARCH_LIST names the architectures; PEFT_KERNELS_SANITIZE names sanitizers.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_directory = Path(self.build_temp).resolve()
        build_directory.mkdir(parents=True, exist_ok=True)
        options = {
            "Python_EXECUTABLE": sys.executable,
            "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "TORCH_LIBRARY_DIR": TORCH_LIB_PATH,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "PEFT_KERNELS_SANITIZE": os.environ.get("PEFT_KERNELS_SANITIZE", ""),
        }
        subprocess.check_call(
            ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_directory)]
            + [f"-D{name}={value}" for name, value in options.items()]
        )
        subprocess.check_call(["cmake", "--build", str(build_directory)])


setup(
    ext_modules=[Extension("peft_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
