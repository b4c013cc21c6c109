"""What type checkers see: the package's own code, and a user's."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_kernels
from peft_kernels import adapters, checkpoints, nn, ops, serving

ROOT = Path(__file__).parent.parent
USER = Path(__file__).parent / "user_code.py"


def check(*command):
    """Runs a type checker of this environment on the sources, with what is installed here."""
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"needs {command[0]}, of the extra 'test'")
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # which a newer version would be one of
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_mypy_finds_nothing():
    check("mypy", "--strict", "peft_kernels", str(USER))


@pytest.mark.slow
def test_pyright_finds_nothing_in_a_users_code():
    check("pyright", "--pythonpath", sys.executable, str(USER))


@pytest.mark.parametrize(
    "module", [peft_kernels, adapters, checkpoints, nn, ops, serving], ids=lambda module: module.__name__
)
def test_users_code_has_all_that_is_public(module):
    nodes = list(ast.walk(ast.parse(USER.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(module.__all__) - names == set()
