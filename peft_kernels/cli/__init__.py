"""The command line, `peft-kernels` or `python -m peft_kernels`.

A command is a module of this package, which is imported when its name is given. It has two functions:

    add_arguments(parser)   adds the command's own options, whose types are those of `arguments.py`
    run(options)            does the work, and returns what it found; `output.py` prints it as tables or as JSON

What a user can mend is raised as a ValueError, an OSError or a ModuleNotFoundError, whose text is then all that is
printed. Progress is shown with `output.progress`, and goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import output

PROGRAM = "peft-kernels"

# A command's module has its name, with _ for -.
COMMANDS = {
    "info": "what is installed and built, and what would be fused on this machine: for a report of a fault",
    "inspect": "what an adapter's folder holds: method, layers, norms, and what is wrong with it",
    "merge": "merge adapters into a checkpoint, and write it as its base is: dense, or in the base's 4 bits",
    "export": "merge adapters into a checkpoint, and write it with dense weights: 16 bits, or what the base has",
    "quantize": "write a checkpoint with 4-bit weights as bitsandbytes stores them, with adapters merged or without",
    "combine": "make one LoRA adapter of several: sums, TIES, DARE, pruning, cut to a rank or not",
    "plan": "what fine-tuning a model would take: parameters, and memory with and without the fused kernels",
    "tune": "time linear layers against stock, and keep what was found for optimize",
    "bench": "time a layer stock and fused, or run one of the repository's benchmarks",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit status: 0; or 1 where the command could not be done, which stderr says why. Options that are not
        understood end the process with 2, as is argparse's way.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Tools for parameter-efficient fine-tuning.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if name in given[:1]:
            _module(name).add_arguments(command)
            command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(given)
    if options.version:
        from .. import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.error(f"got no command, wanted one of {', '.join(COMMANDS)}")
    try:
        output.show(_module(options.command).run(options), options.json)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`; what Python would flush at its end has nowhere to go either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(output.printable(f"{PROGRAM} {options.command}: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _module(command: str) -> Any:
    return importlib.import_module(f".{command.replace('-', '_')}", __package__)
