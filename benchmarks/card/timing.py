"""How long the kernels take beside what one would use without them, on weights that no cache holds."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.card.clock import Call, free, host_seconds, seconds_each
from benchmarks.card.correctness import emulating, on, program_within
from benchmarks.card.machine import ceiling, has
from benchmarks.card.run import FAILED, SKIPPED, TAIL, Context, NotHereError, Record, describe
from benchmarks.records import FUSED

RANK, SCALING = 16, 2.0
FEW, SOME, MANY = (1, 2, 4, 8, 16, 32), (64, 128, 256, 512), (2048, 4096, 8192)
FORWARD, BOTH = "forward", "forward and backward"
FUSED_LORA = f"{FUSED} + LoRA"
BNB, BNB_LORA = "bitsandbytes", "bitsandbytes + LoRA"
DEQUANTIZED, DENSE, UNSLOTH, COMPILED = (
    "dequantise + cuBLAS",
    "cuBLAS bf16",
    "Unsloth's order + LoRA",
    "compiled + LoRA",
)
CONTENDERS = (FUSED, FUSED_LORA, BNB, BNB_LORA, DEQUANTIZED, DENSE, UNSLOTH)
WEIGHTS = 8  # at least so many take turns
REHEARSED = (48, 128)  # N, K

Layer = Callable[[Tensor], Tensor]


# ---- Contenders -----------------------------------------------------------------------------------------------------


class _Unsloth(torch.autograd.Function):
    """Unsloth's order of operations: W in one buffer for all layers, each branch added into the result of the base."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Any, buffer: Tensor) -> Tensor:
        weight.dequantize_into(buffer)
        ctx.save_for_backward(x, A, B)
        ctx.weight, ctx.buffer = weight, buffer
        a, b = A.to(x.dtype), B.to(x.dtype)
        return (x @ buffer.T).addmm_(x @ a.T, b.T, alpha=SCALING)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        x, A, B = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        grad_s = grad_y @ b
        grad_a, grad_b = SCALING * (grad_s.T @ x), SCALING * (grad_y.T @ (x @ a.T))
        ctx.weight.dequantize_into(ctx.buffer)
        grad_x = (grad_y @ ctx.buffer).addmm_(grad_s, a, alpha=SCALING)
        return grad_x, grad_a.to(A.dtype), grad_b.to(B.dtype), None, None


class Weights:
    """Weights [N, K] that take turns, in every form that a contender wants; those are made when they are asked for."""

    def __init__(self, n: int, k: int, count: int, device: str) -> None:
        from peft_kernels.ops import quantize_4bit

        torch.manual_seed(0)
        self.n, self.k, self.device = n, k, device
        self.packed = [
            quantize_4bit((torch.randn(n, k, device=device) / k**0.5).bfloat16(), double_quant=True)
            for _ in range(count)
        ]
        self.A = (torch.randn(RANK, k, device=device) / k**0.5).requires_grad_()
        self.B = (torch.randn(n, RANK, device=device) / RANK**0.5).requires_grad_()
        self.buffer = torch.empty(n, k, dtype=torch.bfloat16, device=device)
        self._dense: list[Tensor] = []
        self._bnb: list[Layer] = []

    def layers(self, name: str) -> list[Layer]:
        """A contender's, one for each weight."""
        from peft_kernels.ops import lora_linear

        A, B = self.A, self.B
        if name == FUSED:
            return [lambda x, w=w: lora_linear(x, w) for w in self.packed]
        if name == FUSED_LORA:
            return [lambda x, w=w: lora_linear(x, w, None, [A], [B], [SCALING]) for w in self.packed]
        if name == DEQUANTIZED:
            return [lambda x, w=w: F.linear(x, w.dequantize()) for w in self.packed]
        if name == DENSE:
            return [lambda x, w=w: F.linear(x, w) for w in self.dense()]
        if name == UNSLOTH:
            return [lambda x, w=w: _Unsloth.apply(x, A, B, _Packed(w), self.buffer) for w in self.packed]
        if not has("bitsandbytes"):
            raise NotHereError("bitsandbytes is not installed")
        self._bnb = self._bnb or [_bnb_layer(w) for w in self.packed]
        if name == BNB:
            return self._bnb
        return [lambda x, f=f: f(x) + SCALING * F.linear(F.linear(x.float(), A), B).to(x.dtype) for f in self._bnb]

    def dense(self) -> list[Tensor]:
        self._dense = self._dense or [weight.dequantize() for weight in self.packed]
        return self._dense

    def forget(self) -> None:
        self._dense = []
        free()

    def stored_bytes(self, name: str) -> int:
        """Of one weight, as the contender stores it."""
        if name == DENSE:
            return 2 * self.n * self.k
        weight = self.packed[0]
        return sum(tensor.nbytes for tensor in (weight.codes, weight.absmax, *weight.nested))


class _Packed:
    """Dequantises into memory that is there; without bitsandbytes, by this package's kernel."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def dequantize_into(self, buffer: Tensor) -> None:
        from peft_kernels.ops import dequantize_4bit_rows

        dequantize_4bit_rows(self.weight, 0, buffer)


def _bnb_layer(weight: Any) -> Layer:
    """bitsandbytes' layer of the same values, quantised by itself."""
    import bitsandbytes as bnb

    n, k = weight.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    values = weight.dequantize()
    layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(values.device)


# ---- Linear layers --------------------------------------------------------------------------------------------------


def linear(context: Context, n: int, k: int) -> None:
    """Each contender at every number of rows, forward first, since it is asked for most."""
    tiny = context.is_rehearsal
    n, k = REHEARSED if tiny else (n, k)
    weights = Weights(n, k, 2 if tiny else count_of(n * k / 2), context.tensors_on)
    rows = (1, 40) if tiny else (*FEW, *SOME, *MANY)
    forward = [(m, FORWARD) for m in rows]
    both = [(m, BOTH) for m in ((40,) if tiny else (*SOME, *MANY, *FEW))]

    def cases() -> Iterator[tuple[str, Callable[[], Record]]]:
        for m, phase in [*forward, *both]:
            for name in CONTENDERS:
                yield f"M={m} {n}x{k}, {phase}: {name}", partial(measure, context, weights, m, phase, name)

    context.run("time", cases())


def count_of(size: float) -> int:
    """How many weights of so many bytes are more than the L2 holds twice."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(WEIGHTS, math.ceil(2 * cache / size) + 1)


@contextmanager
def skipping_others(name: str) -> Iterator[None]:
    """Another library's errors are reasons to skip it; this one's are failures."""
    try:
        yield
    except NotHereError:
        raise
    except Exception as error:
        if name in (FUSED, FUSED_LORA):
            raise
        raise NotHereError(describe(error)) from None


def measure(context: Context, weights: Weights, m: int, phase: str, name: str) -> Record:
    """Seconds of one layer."""
    x = torch.randn(m, weights.k, device=weights.device).bfloat16()
    try:
        with skipping_others(name), emulating(context):
            calls = calls_of(weights.layers(name), weights, x, phase)
            samples, how = seconds_each(calls, context.device, calls=20 if m < MANY[0] else 1)
    finally:
        if m >= MANY[0]:
            weights.forget()
    return timed(context, samples, how, *work(weights, m, phase, name)) | {
        "m": m, "n": weights.n, "k": weights.k, "direction": phase, "contender": name
    }  # fmt: skip


def calls_of(layers: Sequence[Layer], weights: Weights, x: Tensor, phase: str) -> list[Call]:
    if phase == FORWARD:

        def forward(layer: Layer) -> None:
            with torch.no_grad():
                layer(x)

        return [partial(forward, layer) for layer in layers]
    x = x.requires_grad_()
    grad = torch.randn(x.shape[0], weights.n, device=x.device).bfloat16()

    def both(layer: Layer) -> None:
        torch.autograd.grad(layer(x), (x, weights.A, weights.B), grad, allow_unused=True)

    return [partial(both, layer) for layer in layers]


def work(weights: Weights, m: int, phase: str, name: str) -> tuple[float, float]:
    """Bytes and operations that a layer can't do without."""
    n, k, has_lora = weights.n, weights.k, name in (FUSED_LORA, BNB_LORA, UNSLOTH, COMPILED)
    adapter = RANK * (n + k) if has_lora else 0
    size, flops = weights.stored_bytes(name) + 2 * m * (n + k) + 4 * adapter, 2 * m * (n * k + adapter)
    if phase == FORWARD:
        return size, flops
    return 2 * size + (2 * m * k + 4 * adapter if has_lora else 0), 2 * flops + 2 * m * adapter


def timed(context: Context, samples: Sequence[float], how: str, size: float = 0.0, flops: float = 0.0) -> Record:
    """The median and the quartiles, and what share of the measured ceilings they reach."""
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [median] * 3
    fields: Record = {"median": median, "quartile1": quartiles[0], "quartile3": quartiles[2],
                      "rounds": len(samples), "how": how}  # fmt: skip
    floor = max(size / ceiling(context, "copy", math.inf), flops / ceiling(context, "bf16 product", math.inf))
    if floor > 0:
        fields["share_of_ceiling"] = floor / median
    return fields


def eager(context: Context) -> None:
    """With the host's share, which is most of it where rows are few."""
    tiny = context.is_rehearsal
    n, k = REHEARSED if tiny else (4096, 4096)
    weights = Weights(n, k, 2 if tiny else count_of(n * k / 2), context.tensors_on)

    def run(m: int, phase: str, name: str) -> Record:
        x = torch.randn(m, k, device=weights.device).bfloat16()
        with skipping_others(name), emulating(context):
            calls = calls_of(weights.layers(name), weights, x, phase)

            def around() -> None:
                for call in calls:
                    call()

            around()
            samples = [s / len(calls) for s in host_seconds(around, context.device, 1 if tiny else 5)]
        return timed(context, samples, "host's clock") | {
            "m": m, "n": n, "k": k, "direction": f"{phase}, eager", "contender": name
        }  # fmt: skip

    context.run("time", (
        (f"M={m} {n}x{k}, {phase}, eager: {name}", partial(run, m, phase, name))
        for m, phase in ([(1, FORWARD)] if tiny else [(1, FORWARD), (16, FORWARD), (512, FORWARD), (512, BOTH)])
        for name in CONTENDERS
    ))  # fmt: skip


# ---- Other families -------------------------------------------------------------------------------------------------


def families(context: Context) -> None:
    """What is timed of each family, and the stock way beside it, in a graph; forward, and forward and backward."""
    from benchmarks.card.cases import FAMILIES, cases
    from benchmarks.functions import several

    def run(case, phase: str, name: str) -> Record:
        torch.manual_seed(0)
        with on(context):
            problem = case.make()
            function = next(f for key, f in problem.functions.items() if (key == FUSED) == (name == FUSED))
            leaves = {key: leaf.detach().requires_grad_(phase == BOTH) for key, leaf in problem.leaves.items()}
            grads = several(problem.grad)

            def call() -> None:
                with torch.set_grad_enabled(phase == BOTH):
                    results = several(function(leaves))
                    if phase == BOTH:
                        given = [grad.to(y.dtype) for grad, y in zip(grads, results, strict=True)]
                        torch.autograd.grad(results, list(leaves.values()), given, allow_unused=True)

            try:
                with skipping_others(name):
                    samples, how = seconds_each(call, context.device, calls=5)
            finally:
                free()
        size, flops = problem.phase_work("forward") if phase == FORWARD else (0.0, 0.0)
        return timed(context, samples, how, size, flops) | {
            "family": case.family, "case": case.name, "direction": phase, "contender": name
        }  # fmt: skip

    tiny = context.is_rehearsal
    known = sorted(cases(tiny), key=lambda case: FAMILIES.index(case.family))
    firsts = {case.family: case for case in reversed(known)}.values()
    chosen = [case for case in known if (case in firsts if tiny else case.timed) and case.family != "lora_linear"]
    context.run("time", (
        (f"{case.family} {case.name}, {phase}: {name}", partial(run, case, phase, name))
        for case in chosen
        for phase in ((FORWARD, BOTH) if case.training else (FORWARD,))
        for name in (FUSED, "stock")
        if name == FUSED or case.family != "nf4"  # which has no stock way without bitsandbytes
    ))  # fmt: skip


# ---- Compiled, and tune ---------------------------------------------------------------------------------------------


def compiled(context: Context) -> None:
    """The formula by torch.compile: dequantisation written in torch, and the adapter."""
    tiny = context.is_rehearsal
    if context.device == "emulated":
        raise NotHereError("torch.compile does not go through the emulator")
    n, k = REHEARSED if tiny else (4096, 4096)
    weights = Weights(n, k, 1 if tiny else WEIGHTS, context.tensors_on)
    codebook = codebook_on(context.tensors_on)

    def formula(x: Tensor, codes: Tensor, absmax: Tensor, A: Tensor, B: Tensor) -> Tensor:
        values = codebook[torch.stack([codes >> 4, codes & 15], -1).view(-1).int()]
        w = (values.view(-1, 64) * absmax[:, None]).view(n, k).to(torch.bfloat16)
        return F.linear(x, w) + SCALING * F.linear(F.linear(x.float(), A), B).to(x.dtype)

    function = torch.compile(formula, dynamic=False)
    plain = [(w.codes.view(-1), absmax_of(w)) for w in weights.packed]

    def run(m: int, phase: str) -> Record:
        x = torch.randn(m, k, device=weights.device).bfloat16()
        layers = [lambda x, p=p: function(x, *p, weights.A, weights.B) for p in plain]
        with skipping_others(COMPILED):
            samples, how = seconds_each(calls_of(layers, weights, x, phase), context.device, calls=20)
        return timed(context, samples, how, *work(weights, m, phase, COMPILED)) | {
            "m": m, "n": n, "k": k, "direction": phase, "contender": COMPILED
        }  # fmt: skip

    context.run("time", (
        (f"M={m} {n}x{k}, {phase}: {COMPILED}", partial(run, m, phase))
        for phase in ((FORWARD,) if tiny else (FORWARD, BOTH))
        for m in ((1,) if tiny else (1, 16, 128, 4096))
    ))  # fmt: skip


def codebook_on(device: str) -> Tensor:
    from peft_kernels.testing.reference.nf4 import CODEBOOKS

    return CODEBOOKS["nf4"].to(device)


def absmax_of(weight: Any) -> Tensor:
    from peft_kernels.testing.reference.nf4 import block_absmax

    return block_absmax(weight.absmax, weight.nested, weight.nested_blocksize)


def tune(context: Context, n: int, k: int) -> None:
    """`python -m peft_kernels.tune` of one shape. What it finds is recorded, and nothing of it stays on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "tuned.json"
        command = [sys.executable, "-m", "peft_kernels.tune", "--shape", str(n), str(k)]
        variables = os.environ | {"PEFT_KERNELS_CACHE": str(cache)}
        status, output = program_within(command, context.left(), variables)
        found = json.loads(cache.read_text()) if cache.exists() else None
    fields: Record = {"name": f"tune {n}x{k}", "exit_status": status, "output": output[-TAIL:], "found": found}
    if status is None:
        fields |= {"status": SKIPPED, "reason": "its time was up"}
    elif status and context.device != "cuda":
        fields |= {"status": SKIPPED, "reason": (output.strip().splitlines() or [""])[-1]}
    elif status:
        fields |= {"status": FAILED, "reason": (output.strip().splitlines() or [f"exit status {status}"])[-1]}
    context.record("tune", **{"status": "ok", **fields})
