"""What the machine is: the card, the versions, the tools; and the most that the card was seen to do."""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.card.clock import seconds_each
from benchmarks.card.run import Context, NotHereError, Record, describe

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "bitsandbytes", "peft", "transformers", "triton", "rich", "numpy", "safetensors", "matplotlib", "pytest",
    "hypothesis", "expecttest", "pybind11",
)  # fmt: skip
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cmake", "ninja", "c++")
OF_THE_CARD = "driver_version,pstate,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit,mig.mode.current"


# ---- Environment ----------------------------------------------------------------------------------------------------


def has(package: str) -> bool:
    """Whether it could be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def find_tool(name: str) -> str | None:
    """A program of the PATH, of CUDA_HOME, or of where toolkits are usually installed; the newest of them."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    homes += sorted(glob.glob("/usr/local/cuda*"), reverse=True) + sorted(glob.glob("/opt/nvidia/*/*"), reverse=True)
    folders = [folder for home in homes for folder in (f"{home}/bin", f"{home}/compute-sanitizer", home)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def output_of(*command: str, seconds: float = 30) -> str:
    """What a program prints; nothing if there is none, or if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def environment(context: Context) -> None:
    """The first record of every phase, so that each file says by itself what it is of."""
    describe_commit = ("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    fields: Record = {
        "device": context.device,
        "card": "emulated" if context.device == "emulated" else "cpu",
        "host": f"{platform.machine()}, {os.cpu_count()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {name: find_tool(name) for name in TOOLS},
        "commit": output_of("git", "-C", str(ROOT), *describe_commit),
        "module": _module(context.device),
    }
    if nvcc := find_tool("nvcc"):
        fields["nvcc"] = (re.findall(r"release ([\d.]+)", output_of(nvcc, "--version")) or [""])[0]
    if context.device == "cuda":
        fields |= _card()
    context.record("environment", **fields)


def _version(package: str) -> str | None:
    if not has(package):
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _card() -> Record:
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "devices": torch.cuda.device_count(),
        "architectures_of_torch": torch.cuda.get_arch_list(),
        "state": state(),
    }


def state() -> str:
    """Driver, clocks, temperature and power, as nvidia-smi says."""
    return output_of("nvidia-smi", "-i", "0", f"--query-gpu={OF_THE_CARD}", "--format=csv,noheader")


def _module(device: str) -> Record:
    """The compiled module, and why it can't be used here, if it can't."""
    try:
        import peft_kernels
        from peft_kernels import cuda
        from peft_kernels._extension import build_info
        from peft_kernels.ops import dropout
    except ImportError as error:
        return {"refusal": describe(error)}
    fields: Record = {"file": peft_kernels.__file__, **build_info, "refusal": None}
    if device == "cuda":
        try:
            fields["refusal"] = cuda.why_not(torch.device("cuda", 0))
            if not fields["refusal"]:
                dropout(torch.ones(8, device="cuda"), 0.5)  # it may be built for other cards only
                torch.cuda.synchronize()
        except Exception as error:
            fields["refusal"] = describe(error)
    return fields


def build(context: Context) -> None:
    """The module for this card alone, in place, with the machine's own nvcc, cmake and ninja."""
    major, minor = torch.cuda.get_device_capability(0) if context.device == "cuda" else (8, 0)
    variables = {
        "PEFT_KERNELS_CUDA": "1" if context.device == "cuda" else "0",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "CUDA_HOME": os.environ.get("CUDA_HOME") or _home(find_tool("nvcc")),
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True, timeout=max(1, context.left()))
    except subprocess.TimeoutExpired as late:
        text = f"the build takes longer than {late.timeout:.0f} s; call it again, and it goes on where it was"
        raise RuntimeError(text) from None
    context.record("check", name="build", status="ok", architectures=variables["TORCH_CUDA_ARCH_LIST"])


def _home(nvcc: str | None) -> str:
    return str(Path(nvcc).resolve().parent.parent) if nvcc else ""


# ---- Ceilings -------------------------------------------------------------------------------------------------------


def ceilings(context: Context) -> None:
    """On random numbers: a product of ones is faster, as it takes less power."""
    device, tiny = context.tensors_on, context.is_rehearsal
    properties = torch.cuda.get_device_properties(0) if context.device == "cuda" else None
    generator = torch.Generator(device).manual_seed(0)

    def random(count: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device, generator=generator)

    def copy() -> Record:
        count = 1 << 18 if tiny else 1 << 28  # 1 GiB
        source, target = random(count), random(count)
        return rate(lambda: target.copy_(source), 2 * source.nbytes, "bytes_per_second", "GB/s")

    def read() -> Record:
        source = random(1 << 18 if tiny else 1 << 28).view(torch.float32).nan_to_num_(0, 0, 0)
        return rate(lambda: source.amax(), source.nbytes, "bytes_per_second", "GB/s")

    def read_l2() -> Record:
        size = properties.L2_cache_size // 4 if properties else 1 << 18
        source = random(size // 4).view(torch.float32).nan_to_num_(0, 0, 0)
        return rate(lambda: source.amax(), source.nbytes, "bytes_per_second", "GB/s")

    def product() -> Record:
        side = 64 if tiny else 8192
        a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        return rate(lambda: a @ b.T, 2 * side**3, "flops_per_second", "TFLOP/s", 1e12)

    def launch() -> Record:
        x = torch.zeros(32, device=device)
        taken, how = seconds_each(lambda: x.add_(1), context.device, calls=200)
        return {"value": min(taken), "unit": "s", "how": how, "text": f"{min(taken) * 1e6:.2f} µs"}

    def launch_eager() -> Record:
        x = torch.zeros(32, device=device)
        taken, how = seconds_each(lambda: x.add_(1), context.device, calls=1000, graph=False)
        return {"value": min(taken), "unit": "s", "how": how, "text": f"{min(taken) * 1e6:.2f} µs"}

    def rate(call, amount: float, unit: str, shown: str, scale: float = 1e9) -> Record:
        taken, how = seconds_each(call, context.device, calls=10)
        value = amount / min(taken)
        return {"value": value, "unit": unit, "how": how, "text": f"{value / scale:.4g} {shown}"}

    cases = {
        "copy": copy, "read": read, "L2 read": read_l2, "bf16 product": product, "launch in a graph": launch,
        "launch, eager": launch_eager,
    }  # fmt: skip
    context.run("ceiling", cases.items())
    if context.device == "cuda":
        context.record("note", name="state after the ceilings", text=state())


def ceiling(context: Context, name: str, default: float = float("nan")) -> float:
    """What was measured in this phase."""
    found = [r for r in context.records if r["kind"] == "ceiling" and r["name"] == name and r["status"] == "ok"]
    return found[-1]["value"] if found else default


def need(*packages: str) -> None:
    """
    Raises:
        NotHereError: one of them is not here.
    """
    for package in packages:
        if not has(package):
            raise NotHereError(f"it needs {package}, which is not installed")
