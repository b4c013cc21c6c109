"""The command line: python -m peft_kernels COMMAND, or peft-kernels COMMAND."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
