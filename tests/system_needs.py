"""Which versions of glibc and libstdc++ the module needs: what readelf finds, and what docs/limits.md says."""

import re
import subprocess
from pathlib import Path

LIMITS = Path(__file__).parent.parent / "docs/limits.md"
COMPILER = "12."  # GCC's, for which docs/limits.md says it; a newer one may take newer parts of its library


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def found(module: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each library's symbols that a compiled module takes."""
    command = ["readelf", "--version-info", "--wide", module]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for library, number in re.findall(r"Name: (GLIBC|GLIBCXX)_([0-9.]+)", output):
        newest[library] = max(newest.get(library, ()), version(number))
    return newest


def documented(build: str) -> dict[str, tuple[int, ...]]:
    """The numbers of that row of the table in docs/limits.md."""
    row = re.escape(build) + r" \| `manylinux_\d+_\d+` \| glibc ([0-9.]+) \| `GLIBCXX_([0-9.]+)`"
    ((glibc, libstdcxx),) = re.findall(rf"^\| {row}", LIMITS.read_text(), re.MULTILINE)
    return {"GLIBC": version(glibc), "GLIBCXX": version(libstdcxx)}


def build_of(cuda: bool, tag: str = "") -> str:
    """The first column of that table."""
    if tag.startswith("manylinux_2_28"):
        return "the image `manylinux_2_28`, GCC 14"
    return "GCC 12, with CUDA kernels" if cuda else "GCC 12, for the CPU only"
