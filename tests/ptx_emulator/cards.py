"""The architectures for which tests look at what ptxas makes of the kernels."""

import re
import subprocess

import pytest

from .build import find_nvcc


def _known() -> set[str]:
    nvcc = find_nvcc()
    if not nvcc:
        return set()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    return {*re.findall(r"\bsm_\d+\b", listed)}


def _card(name: str) -> object:
    unknown = pytest.mark.skipif(name not in known, reason=f"this nvcc makes no code for {name}")
    return pytest.param(name, marks=[unknown, pytest.mark.slow])


def least_share(share: float, architecture: str) -> float:
    """How many of a main loop's instructions have to be products. On sm_120 more of the others make addresses: there it
    is at least 0.83 of what is wanted on sm_80 to sm_90."""
    return share if int(architecture.removeprefix("sm_")) < 100 else 0.83 * share


known = _known()
# ptxas takes half a minute for some sources, and on sm_100 nothing spilled that did not on sm_120. The limits that are
# sm_86's and sm_89's alone, of threads and shared memory, are in the tests of the plans.
OTHERS = [_card(name) for name in ("sm_90", "sm_120")]
ALL = ["sm_80", *OTHERS]
