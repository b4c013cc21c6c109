"""The command line as a whole: how commands are found, how what they return is printed, and what errors look like."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels import cli
from peft_kernels.cli import main, output
from peft_kernels.cli.output import Bytes, Share

PACKAGE = Path(cli.__file__).parent
SHARED = {"__init__", "arguments", "output"}


@pytest.fixture
def command(monkeypatch):
    """Has `info` do something else."""

    def replace(run):
        monkeypatch.setattr(importlib.import_module("peft_kernels.cli.info"), "run", run)

    return replace


def test_each_module_is_a_command():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - SHARED
    assert {name.replace("-", "_") for name in cli.COMMANDS} == modules


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and out.startswith(f"usage: peft-kernels {name} ") and "--json" in out


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and all(f"{name} {purpose}" in out for name, purpose in cli.COMMANDS.items())
    assert main(["--version"]) == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(("arguments", "said"), [([], "got no command"), (["fly"], "invalid choice: 'fly'")])
def test_no_command(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ModuleNotFoundError])
def test_errors_of_users_are_a_line(command, capsys, kind):
    def run(options):
        raise kind("r: got 0, wanted a positive number")

    command(run)
    assert main(["info"]) == 1
    assert capsys.readouterr() == ("", "peft-kernels info: r: got 0, wanted a positive number\n")


def test_other_errors_are_not_hidden(command):
    def run(options):
        raise AssertionError("a fault of this package")

    command(run)
    with pytest.raises(AssertionError):
        main(["info"])


def test_json(command, capsys):
    nan = float("nan")
    command(
        lambda options: {"a": Bytes(2048), "b": [{"c": nan, "d": Share(0.5)}], "e": None, "f": True, "g": Path("x")}
    )
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "a": 2048, "b": [{"c": None, "d": 0.5}], "e": None, "f": True, "g": "x",
    }  # fmt: skip


def test_tables(command, capsys):
    data = {
        "size": Bytes(1536), "share": Share(0.1234), "count": 12345, "none": [], "names": ["a", "b"],
        "inner_part": {"of [it]": 1.23456}, "rows": [{"n": 1, "text": "x"}, {"n": float("nan")}],
        "advice": ["one sentence", "another sentence"],
    }  # fmt: skip
    command(lambda options: data)
    assert main(["info"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for line in ("size   1.5 KiB", "share  12.3 %", "count  12,345", "none   –", "names  a, b", "inner part"):
        assert line in lines
    for line in ("of [it]  1.235", "• one sentence", "• another sentence"):
        assert line in lines
    assert any(re.fullmatch(r"nan", line) for line in lines) and any(re.fullmatch(r"1\s+x", line) for line in lines)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_bytes(size, text):
    assert str(Bytes(size)) == text


def test_progress_is_silent_where_stderr_is_no_terminal(capsys):
    with output.progress("reading", 2) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_process():
    """Importing the package imports no command; a pipe that is closed early is no fault."""
    code = (
        "import sys, peft_kernels; print([name for name in sys.modules if name.startswith('peft_kernels.cli')], "
        "file=sys.stderr); from peft_kernels.cli import main; sys.exit(main(['info']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "[]\n")


def test_the_document_has_what_there_is(monkeypatch):
    """Every command is in its table, and its examples are understood."""
    text = (PACKAGE.parent.parent / "docs/command_line.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == list(cli.COMMANDS)
    examples = re.findall(r"^peft-kernels (.+)$", text, re.MULTILINE)
    ran = []
    for example in examples:
        name, *_ = words = example.split()
        monkeypatch.setattr(
            importlib.import_module(f"peft_kernels.cli.{name}"), "run", lambda options: ran.append(options) or {}
        )
        assert main(words) == 0
    assert len(ran) == len(examples) >= 4
