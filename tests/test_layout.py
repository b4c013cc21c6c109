"""How csrc/ is laid out: the folder says the device, and a family shows others its header, binding and plans.

matmul, lora and lora_linear are the parts of one layer, whose product and branch share sums on a CPU: there each of
them may also include the kernels' headers of those before it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "peft_kernels"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
PARTS_OF_A_LAYER = ["matmul", "lora", "lora_linear"]
FAMILIES = sorted({path.relative_to(CSRC).parts[0] for path in SOURCES} - {"common", "module.cpp"})


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)


def may_include_torch(path: Path) -> bool:
    folders = path.relative_to(CSRC).parts[:-1]
    is_binding = path.name == "binding.h" or (path.suffix == ".cpp" and len(folders) <= 1)
    return is_binding or folders == ("common", "torch")


def test_cmake_lists_every_family():
    (listed,) = re.findall(r"set\(families ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed.split()) == FAMILIES


def test_includes_exist():
    for path in SOURCES:
        for include in includes(path):
            assert (CSRC / include).is_file(), f"{path.relative_to(CSRC)} includes {include}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_includes_only_what_others_show(family):
    public = {"binding.h", "cpu/plan.h", "cuda/plan.h", "cuda/binding.h"}
    for path in (path for path in SOURCES if path.is_relative_to(CSRC / family)):
        for include in includes(path):
            owner, _, name = include.partition("/")
            is_shown = owner in (family, "common") or name in public | {f"{owner}.h"}
            is_joined = family in PARTS_OF_A_LAYER and owner in PARTS_OF_A_LAYER and name.startswith("cpu/")
            assert is_shown or is_joined, f"{path.relative_to(CSRC)} includes {include}"


def test_the_folder_says_the_device():
    for path in SOURCES:
        folders, included = path.relative_to(CSRC).parts[:-1], includes(path)
        if may_include_torch(path):
            continue
        of_the_cpu = [name for name in included if "/cpu/" in name and name != "common/cpu/isa.h"]
        of_cuda = [name for name in included if "/cuda/" in name and not name.endswith("plan.h")]
        of_torch = [name for name in included if "/torch/" in name] + re.findall("#include <torch.*", path.read_text())
        assert not of_torch, f"{path.relative_to(CSRC)}: {of_torch}"
        # isa.h declares a launcher of every instruction set, which every family's header does.
        assert "cpu" in folders or not of_the_cpu, f"{path.relative_to(CSRC)}: {of_the_cpu}"
        assert "cuda" in folders or not of_cuda, f"{path.relative_to(CSRC)}: {of_cuda}"
        assert "cuda" in folders or path.suffix in {".h", ".cpp"}, path.relative_to(CSRC)


def test_families_do_not_include_each_other_in_a_circle():
    users = {family: set() for family in FAMILIES}
    for path in SOURCES:
        family = path.relative_to(CSRC).parts[0]
        if family in users:
            users[family] |= {include.split("/")[0] for include in includes(path)} - {family, "common"}
    while users:
        ready = [family for family, used in users.items() if not used & users.keys()]
        assert ready, f"a circle among {sorted(users)}"
        for family in ready:
            del users[family]


def test_lines_are_no_longer_than_120_columns():
    """Comments among them, which clang-format leaves as they are."""
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.relative_to(CSRC)}:{number}"


def test_plans_of_the_cpu_are_no_shared_symbols():
    """The linker keeps one copy of an inline function, which may be the one compiled with AVX-512."""
    for path in CSRC.glob("*/cpu/plan.h"):
        for line in path.read_text().splitlines():
            assert not re.match(r"constexpr [\w:]+ [a-z_]\w*\(", line), f"{path.relative_to(CSRC)}: {line}"


def test_the_dtypes_of_the_kernels_are_listed_once():
    listed = re.compile(r"\(torch\.float32, torch\.bfloat16, torch\.float16\)")
    assert [path.name for path in PACKAGE.rglob("*.py") for _ in listed.findall(path.read_text())] == ["_arguments.py"]


def test_what_is_refused_is_no_text_in_the_place_of_a_result():
    for path in PACKAGE.rglob("*.py"):
        found = re.findall(r"^.*-> .*\w\]? \| str\b.*$", path.read_text(), re.MULTILINE)
        assert not found, f"{path.relative_to(PACKAGE)}: {found}"


def libraries_imported_by(path: Path) -> set[str]:
    """Those that `optimize` is for, and that a user may be without."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.partition(".")[0] for name in names} & {"bitsandbytes", "peft", "transformers"}


def test_the_folder_says_whose_layers_are_fused():
    for path in (PACKAGE / "integrations").rglob("*.py"):
        folder = path.parent.name
        assert libraries_imported_by(path) <= {folder}, path.relative_to(PACKAGE)
