"""Loads the compiled module, or says what to do."""

import torch  # noqa: F401  (its libraries must be loaded before _C)

EXPECTED_OPS_VERSION = 15
_REBUILD = (
    "Build it with `pip install --editable .` in the project's folder; what is installed there without --editable, a "
    "Python started in that folder does not see."
)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"peft_kernels: the compiled module peft_kernels._C could not be loaded ({error}). {_REBUILD}"
    ) from error

build_info: dict[str, object] = _C.build_info()
if build_info["ops_version"] != EXPECTED_OPS_VERSION:
    raise ImportError(
        f"peft_kernels: the compiled module {_C.__file__} is stale: it has version {build_info['ops_version']} of the "
        f"ops, this Python code wants {EXPECTED_OPS_VERSION}. {_REBUILD}"
    )
