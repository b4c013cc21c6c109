"""What benchmarks take from the tests, which are on no path outside pytest."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent.parent / "tests"


def load(name: str) -> ModuleType:
    """A module or a package of the tests; what is beside it stays hidden."""
    if name not in sys.modules:
        package = TESTS / name / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, package if package.exists() else TESTS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
