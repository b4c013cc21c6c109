"""What only hardware shows: streams, graphs, races between launches, other devices, sizes, and memory that is short."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.card.clock import capture, free
from benchmarks.card.correctness import on
from benchmarks.card.run import FAILED, Context, NotHereError, Record, describe

N = K = 4096  # of the layers
ROWS, WIDTH = (1 << 18) + 8, 1 << 13  # of tensors with more than 2^31 elements
TAIL_ROWS = 64  # of these that are compared

Call = Callable[[], list[Tensor]]


def differing(got: list[Tensor], wanted: list[Tensor]) -> str:
    """Which of the results are not equal bit for bit; a NaN equals nothing."""
    counts = [int((a != b).sum()) for a, b in zip(got, wanted, strict=True)]
    return ", ".join(f"{count} elements of result {i}" for i, count in enumerate(counts) if count)


def verdict(wrong: str, **fields) -> Record:
    """Of a case: failed if it is said what is wrong."""
    return {"status": FAILED, "reason": wrong, **fields} if wrong else fields


def layer(m: int, n: int, k: int, r: int = 16, training: bool = True, drop: float = 0.0) -> tuple[Call, Tensor, Tensor]:
    """A call of lora_linear in bf16, with its backward; its x and its seeds, which may be given other values."""
    from benchmarks.card.linear_cases import weight4bit
    from peft_kernels.ops import lora_linear

    weight = weight4bit(n, k)
    x = torch.randn(m, k).bfloat16()
    A, B = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    seeds, grad = torch.tensor([7]), torch.randn(m, n).bfloat16()
    drops = [drop] if drop else []

    def call() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(training) for tensor in (x, A, B)]
        y = lora_linear(leaves[0], weight, None, leaves[1:2], leaves[2:], [2.0], drops, seeds=seeds)
        return [y.detach(), *(torch.autograd.grad(y, leaves, grad) if training else ())]

    return call, x, seeds


def repeated(context: Context) -> None:
    """The same numbers 200 times: sums that depend on which CTA comes first would differ sooner or later."""
    count = 3 if context.is_rehearsal else 200
    shapes = {"M=64 4096x4096": (64, 4096, 4096), "M=128 4096x4096": (128, 4096, 4096),
              "M=40 64x4096, split": (40, 64, 4096), "M=1 4096x4096": (1, 4096, 4096),
              "M=4096 4096x4096": (4096, 4096, 4096)}  # fmt: skip
    if context.is_rehearsal:
        shapes = {"M=40 64x128": (40, 64, 128)}

    def run(shape: tuple[int, int, int]) -> Record:
        torch.manual_seed(0)
        with on(context):
            call, _, _ = layer(*shape, drop=0.1)
            wanted = call()
            unequal = sum(1 for _ in range(count) if differing(call(), wanted))
        return verdict(f"{unequal} of {count} runs differ from the first" if unequal else "", runs=count)

    context.run("check", ((name, lambda shape=shape: run(shape)) for name, shape in shapes.items()))


def side_stream(context: Context) -> None:
    """What a side stream makes late is read there, whatever the default stream does meanwhile."""

    def run(m: int) -> Record:
        torch.manual_seed(0)
        with on(context):
            call, x, _ = layer(m, N, K)
            numbers = x.clone()
            wanted = call()
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            x.zero_()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # clocks: a kernel on another stream would find zeros
                x.copy_(numbers)
                got = call()
            stream.synchronize()
            return verdict(differing(got, wanted))

    context.run("check", ((f"M={m}", lambda m=m: run(m)) for m in (1, 40, 128, 1024)))


def graphs(context: Context) -> None:
    """A graph is replayed with other inputs and another seed; what it draws itself differs from replay to replay."""

    def replayed(m: int) -> Record:
        torch.manual_seed(0)
        with on(context):
            call, x, seeds = layer(m, N, K, drop=0.1)
            kept: list[Tensor] = []

            def step() -> None:
                kept[:] = call()

            graph = capture([step])
            problems = []
            for turn in range(3):
                x.copy_(torch.randn_like(x))
                seeds.fill_(100 + turn)
                graph.replay()
                got = [tensor.clone() for tensor in kept]
                if text := differing(got, call()):
                    problems.append(f"replay {turn}: {text}")
            return verdict("; ".join(problems))

    def drawn() -> Record:
        from benchmarks.card.clock import capture
        from peft_kernels.ops import dropout

        with on(context):
            x, kept = torch.ones(1 << 16), []
            graph = capture([lambda: kept.append(dropout(x, 0.5))])
            graph.replay()
            first = kept[-1].clone()
            graph.replay()
            return verdict("two replays drew the same mask" if torch.equal(first, kept[-1]) else "")

    def mixed() -> Record:
        from benchmarks.card.linear_cases import weight4bit
        from peft_kernels.ops import lora_linear_grouped

        torch.manual_seed(0)
        with on(context):
            weight, x = weight4bit(N, K), torch.randn(40, K).bfloat16().requires_grad_()
            A = [(torch.randn(16, K) / K**0.5).requires_grad_() for _ in range(4)]
            B = [torch.randn(N, 16).requires_grad_() for _ in range(4)]
            index, grad, kept = torch.arange(40) % 4, torch.randn(40, N).bfloat16(), []

            def call() -> list[Tensor]:
                y = lora_linear_grouped(x, weight, None, A, B, [0.5] * 4, index)
                return [y.detach(), *torch.autograd.grad(y, [x, *A, *B], grad)]

            graph = capture([lambda: kept.__setitem__(slice(None), call())])
            problems = []
            for turn in range(3):
                index.copy_(torch.cat([torch.arange(4), torch.randint(-1, 4, (36,))]))
                graph.replay()
                got = [tensor.clone() for tensor in kept]
                if text := differing(got, call()):
                    problems.append(f"replay {turn}: {text}")
            return verdict("; ".join(problems))

    cases = {f"M={m}": (lambda m=m: replayed(m)) for m in (1, 40, 128, 1024)}
    context.run("check", {**cases, "a seed that is drawn": drawn, "another index": mixed}.items())


def failed_allocation(context: Context) -> None:
    """A call that gets no memory says so, and the next one works."""

    def run() -> Record:
        torch.manual_seed(0)
        with on(context):
            call, _, _ = layer(1024, N, K)
            wanted = call()
            free()
            limit = torch.cuda.memory_reserved() + (1 << 20)
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
            try:
                call()
            except RuntimeError as error:
                told = describe(error)
            else:
                raise NotHereError("the memory could not be made short")
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            wrong = "" if "memory" in told else "the error does not say what is short"
            return verdict(differing(call(), wanted) or wrong, text=told)

    context.run("check", [("lora_linear", run)])


def large(context: Context) -> None:
    """More than 2^31 elements: the last rows are as those of a small call."""
    rows, d, tail = ROWS, WIDTH, TAIL_ROWS

    def room(gigabytes: float) -> None:
        free()
        if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
            raise NotHereError(f"it needs {gigabytes:g} GB of free memory")

    def of_rows(call: Callable[[Tensor], Tensor]) -> Record:
        room(14)
        with on(context), torch.no_grad():
            x = torch.empty(rows, d, dtype=torch.bfloat16).normal_()
            return verdict(differing([call(x)[-tail:]], [call(x[-tail:].clone())]))

    def norm() -> Record:
        from peft_kernels.ops import rms_norm

        weight = torch.ones(d, dtype=torch.bfloat16, device=context.tensors_on)
        return of_rows(lambda x: rms_norm(x, weight))

    def gated() -> Record:
        from peft_kernels.ops import glu

        return of_rows(lambda x: glu(x, x))

    def product() -> Record:
        from benchmarks.card.case import tolerances
        from benchmarks.card.linear_cases import weight4bit
        from benchmarks.functions import error_of
        from peft_kernels.ops import lora_linear

        room(14)
        with on(context), torch.no_grad():
            weight = weight4bit(64, d)
            x = torch.empty(rows, d, dtype=torch.bfloat16).normal_()
            error = error_of(lora_linear(x, weight)[-tail:], x[-tail:].double() @ weight.dequantize().double().T)
        bound = tolerances.product(x.dtype, x.dtype)
        return verdict("" if error <= bound else f"got an error of {error:.3g}, wanted {bound:.3g} at most")

    def weights() -> Record:
        from peft_kernels.ops import quantize_4bit

        room(24)
        with on(context):
            weight = torch.empty(rows, d, dtype=torch.bfloat16).normal_()
            last = weight[-tail:].clone()
            got = quantize_4bit(weight)
            wanted = quantize_4bit(last)
            del weight
            free()
            count = last.numel()
            same = [got.codes[-count // 2 :], got.absmax[-count // 64 :], got.dequantize()[-tail:]]
            return verdict(differing(same, [wanted.codes, wanted.absmax, wanted.dequantize()]))

    def masked() -> Record:
        from peft_kernels.ops import dropout

        room(14)
        with on(context), torch.no_grad():
            y = dropout(torch.ones(rows, d, dtype=torch.bfloat16), 0.5)[-8192:]
            kept, twos = float((y != 0).float().mean()), bool(((y == 0) | (y == 2)).all())
            return verdict("" if twos and abs(kept - 0.5) < 1e-3 else f"{kept:.4f} of the last rows are kept")

    cases = {"lora_linear": product, "rms_norm": norm, "glu": gated, "nf4": weights, "dropout": masked}
    context.run("check", cases.items())


def second_device(context: Context) -> None:
    """The kernels run where the tensors are, not on the current device."""
    if torch.cuda.device_count() < 2:
        raise NotHereError("there is one device")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        raise NotHereError("the second device is another card, which divides the work otherwise")

    def run(m: int) -> Record:
        results = []
        for index in (0, 1):
            torch.manual_seed(0)
            with torch.device("cpu"):
                numbers = torch.randn(m, K).bfloat16()
            with torch.device(context.tensors_on, index):  # the current device stays the first
                torch.manual_seed(1)
                call, x, _ = layer(m, N, K)
                x.copy_(numbers)
                results.append([tensor.cpu() for tensor in call()])
        return verdict(differing(*results))

    context.run("check", ((f"M={m}", lambda m=m: run(m)) for m in (1, 40, 1024)))
