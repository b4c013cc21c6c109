"""`make demo-serving`: many LoRA adapters on one SmolLM2-135M in 4 bits, served while they come and go.

Clients ask for adapters whose popularity is Zipf's, each waiting for its answer before it asks again. They are
answered by an `AdapterPool`, by stock PEFT with all adapters loaded (`adapter_names`, and `set_adapter` for each
request), and by a process that has one adapter, of which as many would be needed as there are adapters. Each runs in a
process of its own, with the same requests.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import peft_kernels
from benchmarks import finetune
from benchmarks.options import COUNT, LENGTH, POSITIVE, SEED, model_path
from benchmarks.progress import make_console, working
from benchmarks.records import describe_machine
from benchmarks.timing import Budget
from examples.demo_results import COLORS, megabytes, readable, save
from peft_kernels.integrations.base_layer import is_linear
from peft_kernels.ops import NF4Weight
from peft_kernels.serving import AdapterPool

DESCRIPTION = "Serves many LoRA adapters on one small language model, and compares with stock PEFT."
POOL, NAMES, SET, ALONE = "AdapterPool", "PEFT, adapter_names", "PEFT, set_adapter", "one process an adapter"
CONTENDERS = (POOL, NAMES, SET, ALONE)
SHARES = dict(zip(CONTENDERS, (0.25, 0.2, 0.2, 0.1), strict=True))  # of the time; every answer is checked after it
RANKS = (4, 8, 16)
STRENGTH = 0.03  # of an adapter: the norm of its change as a share of the weight's
PROMPTS = 4  # for each adapter
HOST_BYTES = 200_000_000  # of the pool; half of 64 adapters are read again from their folders
CHANGES_EVERY = 0.5  # seconds between two changes of the pool's adapters
NEAR = 1e-3  # of two logits: in fp32, a sum in another order may put either of these first


Requests = Sequence[tuple[int, Tensor]]  # the number of an adapter, and a prompt [length]


@dataclass(frozen=True)
class Settings:
    """What all contenders have in common."""

    model: Path
    folder: str  # of the adapters
    adapters: int
    slots: int
    requests: int
    clients: int
    threads: int
    batch: int
    length: int
    tokens: int
    seed: int
    dtype: str = "fp32"
    device: str = "cpu"

    def name(self, number: int) -> str:
        return f"adapter{number:03}"


@dataclass
class Result:
    """What a contender has done.

    Attributes:
        answers: the new tokens by the number of the request.
        latencies: seconds of each request.
        seconds: from the first request to the last answer.
        ready: seconds until the model and all adapters that it needs were loaded.
        memory: bytes by which the process had grown at most, from before it loaded anything.
        adapters: bytes of the adapters' numbers in memory.
        note: what else there is to say.
    """

    answers: dict[int, list[int]]
    latencies: list[float]
    seconds: float
    ready: float
    memory: int
    adapters: int
    note: str = ""

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


# ---- Adapters and requests ------------------------------------------------------------------------------------------


@torch.no_grad()
def make_adapters(model: Any, settings: Settings) -> None:
    """Writes random adapters of several ranks in PEFT's form: no training, but changes of a trained adapter's size."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in linears.items() if layer is not head}
    norms = {name: dense(layer).float().norm().item() for name, layer in layers.items()}
    for number in range(settings.adapters):
        folder, rank = Path(settings.folder, settings.name(number)), RANKS[number % len(RANKS)]
        generator = torch.Generator().manual_seed(settings.seed + number)
        tensors = {}
        for name, layer in layers.items():
            n, k = layer.out_features, layer.in_features
            a = torch.randn(rank, k, generator=generator) / k**0.5
            b = torch.randn(n, rank, generator=generator) * (STRENGTH * norms[name] / (n * rank) ** 0.5)
            key = f"base_model.model.{name}.lora"
            tensors |= {f"{key}_A.weight": a.bfloat16(), f"{key}_B.weight": b.bfloat16()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        targets = sorted({name.rpartition(".")[2] for name in layers})
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)


def dense(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight if is_linear(layer) else NF4Weight.from_params4bit(weight).dequantize()


def make_requests(text: Tensor, settings: Settings) -> Requests:
    """An adapter and a prompt for each request; the i-th most popular adapter is wanted 1 / i times as often."""
    generator = torch.Generator().manual_seed(settings.seed)
    popularity = 1 / torch.arange(1, settings.adapters + 1)
    chosen = torch.multinomial(popularity, settings.requests, replacement=True, generator=generator)
    begins = torch.randint(len(text) - settings.length, (PROMPTS,), generator=generator)
    which = torch.randint(PROMPTS, (settings.requests,), generator=generator)
    return [(adapter, text[begins[i] :][: settings.length]) for adapter, i in zip(chosen.tolist(), which, strict=True)]


def run_model(model: Any, prompts: Tensor, settings: Settings, **options: Any) -> Tensor:
    """The new tokens, [rows, tokens], of greedy decoding."""
    count, mask = settings.tokens, torch.ones_like(prompts)
    with torch.no_grad():
        output: Tensor = model.generate(
            input_ids=prompts, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count,
            pad_token_id=0, **options,
        )  # fmt: skip
    return output[:, prompts.shape[1] :]


# ---- Clients and batches --------------------------------------------------------------------------------------------

Answer = Callable[[list[int], Tensor], Tensor]  # adapters and prompts [rows, length] → new tokens [rows, tokens]


def serve(
    answer: Answer, requests: Requests, clients: int, workers: int, batch: int, seconds: float
) -> tuple[dict[int, list[int]], list[float], float]:
    """Has clients ask until there are no more requests, or time is up; once at least. Workers take what is waiting, up
    to a batch."""
    waiting: queue.Queue[tuple[int, Future[list[int]]] | None] = queue.Queue()
    numbers, answers, latencies = itertools.count(), {}, []
    begin = time.perf_counter()

    def client() -> None:
        while (number := next(numbers)) < len(requests):
            if number >= clients and time.perf_counter() - begin > seconds:
                return
            future: Future[list[int]] = Future()
            asked = time.perf_counter()
            waiting.put((number, future))
            answers[number] = future.result()
            latencies.append(time.perf_counter() - asked)

    def work() -> None:
        while (first := waiting.get()) is not None:
            taken = [first]
            while len(taken) < batch and not waiting.empty():
                try:
                    another = waiting.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    waiting.put(None)
                    break
                taken.append(another)
            try:
                chosen = [requests[number] for number, _ in taken]
                rows = answer([adapter for adapter, _ in chosen], torch.stack([prompt for _, prompt in chosen]))
                for (_, future), row in zip(taken, rows.tolist(), strict=True):
                    future.set_result(row)
            except BaseException as error:
                for _, future in taken:
                    future.set_exception(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    others = [threading.Thread(target=work) for _ in range(workers)]
    for thread in (*threads, *others):
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - begin
    for _ in others:
        waiting.put(None)
    for thread in others:
        thread.join()
    return answers, latencies, taken


# ---- Contenders, each in a process of its own -----------------------------------------------------------------------


def measure(contender: str, settings: Settings, requests: Requests, seconds: float) -> Result:
    """Loads a contender and has it serve."""
    finetune.quiet()
    with finetune.sampled_memory(0.02) as samples, ExitStack() as stack:
        begin = time.perf_counter()
        model = finetune.load_4bit(settings).eval()
        workers, batch, note = 1, settings.batch, ""
        if contender == POOL:
            workers = settings.threads
            torch.set_num_threads(max(1, torch.get_num_threads() // workers))
            peft_kernels.optimize(model, tune=False)
            pool = stack.enter_context(make_pool(model, settings, settings.slots))
            for number in range(settings.adapters):
                pool.load(settings.name(number))
            answer = pool_answer(pool, settings)
        else:
            loaded = 1 if contender == ALONE else settings.adapters
            for number in range(loaded):
                name = settings.name(number)
                if number:
                    model.load_adapter(Path(settings.folder, name), name)
                else:
                    model = PeftModel.from_pretrained(model, Path(settings.folder, name), name).eval()
            answer = peft_answer(model, settings, contender == NAMES)
            batch = settings.batch if contender == NAMES else 1
        if contender == ALONE:
            requests = [(0, prompt) for _, prompt in requests]
        ready = time.perf_counter() - begin
        answer([requests[0][0]], requests[0][1][None])  # warms up
        if contender == POOL:
            changer = stack.enter_context(Changing(pool, settings))
        answers, latencies, taken = serve(answer, requests, settings.clients, workers, batch, seconds)
        if contender == POOL:
            slab, host, *_ = pool.memory
            adapters, note = slab + host, f"{changer.changes} evictions and swaps meanwhile"
        else:
            adapters = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" in name)
    return Result(answers, latencies, taken, ready, max(samples) - samples[0], adapters, note)


def make_pool(model: Any, settings: Settings, slots: int) -> AdapterPool:
    """In bf16, as the adapters' files are, so that nothing is rounded."""
    return AdapterPool(
        model, slots=slots, max_rank=max(RANKS), dtype=torch.bfloat16, host_bytes=HOST_BYTES, root=settings.folder
    )


def pool_answer(pool: AdapterPool, settings: Settings) -> Answer:
    def answer(adapters: list[int], prompts: Tensor) -> Tensor:
        with pool.batch([settings.name(number) for number in adapters]):
            return run_model(pool.model, prompts, settings)

    return answer


def peft_answer(model: Any, settings: Settings, mixes: bool) -> Answer:
    def answer(adapters: list[int], prompts: Tensor) -> Tensor:
        names = [settings.name(number) for number in adapters]
        if mixes:
            return run_model(model, prompts, settings, adapter_names=names)
        model.set_adapter(names[0])
        return run_model(model, prompts, settings)

    return answer


class Changing:
    """Within it, a thread evicts adapters and swaps in what is in their folders, while requests run."""

    def __init__(self, pool: AdapterPool, settings: Settings) -> None:
        self.pool, self.settings, self.changes = pool, settings, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._change)

    def _change(self) -> None:
        for number in itertools.cycle(range(self.settings.adapters)):
            if self._done.wait(CHANGES_EVERY):
                return
            (self.pool.swap if self.changes % 2 else self.pool.evict)(self.settings.name(number))
            self.changes += 1

    def __enter__(self) -> Changing:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


# ---- Are the answers right? -----------------------------------------------------------------------------------------


def check(settings: Settings, requests: Requests, results: dict[str, Result]) -> str:
    """Compares every answer of the pool with that of a batch of its adapter alone, and with stock PEFT's, so far as
    `set_adapter` has served it.

    Raises:
        ArithmeticError: an answer that is another one, where the logits leave no doubt.
    """
    finetune.quiet()
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.threads))
    model = finetune.load_4bit(settings).eval()
    peft_kernels.optimize(model, tune=False)
    answers, stock, near = results[POOL].answers, results[SET].answers, 0
    by_adapter: dict[int, list[int]] = {}
    for number in answers:
        by_adapter.setdefault(requests[number][0], []).append(number)
    with make_pool(model, settings, slots=1) as pool:
        for adapter, numbers in by_adapter.items():
            name = settings.name(adapter)
            pool.load(name)
            prompts = dict.fromkeys(tuple(requests[number][1].tolist()) for number in numbers)
            with pool.batch([name] * len(prompts)):
                rows = run_model(model, torch.tensor(list(prompts)), settings).tolist()
            alone = dict(zip(prompts, rows, strict=True))
            for number in numbers:
                prompt, got = requests[number][1], answers[number]
                wanted = alone[tuple(prompt.tolist())]
                for other in (wanted, stock.get(number, wanted)):
                    near += got != other and is_near(pool, name, prompt, got, other)
    text = (
        f"{len(answers)} answers of the pool compared with their adapter's alone, {len(answers.keys() & stock.keys())} "
    )
    text += "of them with stock PEFT's as well: "
    return text + ("all are the same tokens" if not near else f"{near} differ, where two logits are within {NEAR:g}")


def is_near(pool: AdapterPool, name: str, prompt: Tensor, got: list[int], wanted: list[int]) -> bool:
    """Whether two tokens were as likely where two answers part."""
    place = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    with pool.batch([name]), torch.no_grad():
        logits = pool.model(torch.cat([prompt, torch.tensor(wanted[:place], dtype=torch.int64)])[None]).logits[0, -1]
    difference = abs(logits[got[place]] - logits[wanted[place]]).item()
    if difference > NEAR * logits.abs().max().item():
        raise ArithmeticError(f"{name}: got {got}, wanted {wanted}; their logits differ by {difference:.3g}")
    return True


# ---- Results --------------------------------------------------------------------------------------------------------


def result_table(results: dict[str, Result], settings: Settings) -> Table:
    table = Table(title=f"{settings.adapters} adapters, {settings.clients} clients, {settings.tokens} tokens an answer")
    columns = "", "requests", "requests/s", "tokens/s", "p50", "p99", "ready in", "memory", "of it adapters"
    for heading in columns:
        table.add_column(heading, justify="right" if heading else "left")
    for name, result in results.items():
        times = 1 if name != ALONE else settings.adapters
        rate = readable(result.rate), readable(result.rate * settings.tokens)
        seconds = [f"{readable(value)} s" for value in (result.percentile(0.5), result.percentile(0.99), result.ready)]
        sizes = [f"{readable(megabytes(value * times))} MB" for value in (result.memory, result.adapters)]
        label = name if times == 1 else f"{name}: time of one, memory × {times}"
        table.add_row(label, str(len(result.latencies)), *rate, *seconds, *sizes)
    return table


def draw_saved(results: dict[str, Any], path: Path) -> None:
    """Bars of throughput, latency and memory, from what is in demo_serving.json."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["served"]
    panels = {"requests/s": ["rate"], "p50 and p99 [s]": ["p99", "p50"], "memory [MB]": ["memory_mb"]}
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, all_axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained", sharey=True)
        for axes, (title, keys) in zip(all_axes, panels.items(), strict=True):
            bars = [
                axes.barh([row["name"] for row in rows], [row[key] for row in rows], color=color)
                for key, color in zip(keys, COLORS[-len(keys) :], strict=True)
            ]
            labels = [", ".join(readable(row[key]) for key in reversed(keys)) for row in rows]
            axes.bar_label(bars[0], labels, padding=3, fontsize=8)
            axes.set(title=title, xlim=(0, 1.35 * max(row[keys[0]] for row in rows)))
        all_axes[0].invert_yaxis()
        figure.suptitle(f"{results['machine']}; {results['versions']}", x=0.01, ha="left", fontsize=8, color="#57606a")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


# ---- The whole ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        arguments: the command line after the benchmark's name; by default the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo_serving", description=DESCRIPTION)
    add = parser.add_argument
    add("--adapters", type=COUNT, default=64, help="how many there are (%(default)s)")
    add("--slots", type=COUNT, default=16, help="how many the pool serves at a time (%(default)s)")
    add("--requests", type=COUNT, default=400, help="of all clients (%(default)s)")
    add("--clients", type=COUNT, default=16, help="that wait for an answer at a time (%(default)s)")
    add("--threads", type=COUNT, default=2, help="of the pool's server (%(default)s)")
    add("--batch", type=COUNT, default=8, help="most requests in a batch (%(default)s)")
    add("--length", type=LENGTH, default=16, help="tokens of a prompt (%(default)s)")
    add("--tokens", type=LENGTH, default=16, help="new tokens of an answer (%(default)s)")
    add("--model", type=model_path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    add("--minutes", type=POSITIVE, default=10.0, help="fewer requests keep the demo to it (%(default)g)")
    add("--output", type=Path, default=Path("demo-output"), help="folder for results (%(default)s)")
    add("--seed", type=SEED, default=0, help="of adapters, popularity and prompts (%(default)s)")
    add("--quick", action="store_true", help="few adapters and requests: to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.adapters, options.slots, options.requests = min(options.adapters, 6), min(options.slots, 4), 24
        options.clients, options.tokens, options.minutes = 4, 4, min(options.minutes, 1.0)
    if options.slots < options.threads * options.batch:
        options.batch = max(1, options.slots // options.threads)  # so that every batch finds its pages
    finetune.quiet()
    console, budget = make_console(), Budget(60 * options.minutes, SHARES)
    options.output.mkdir(parents=True, exist_ok=True)
    path = finetune.base_model(options.model, options.output / "base")
    given = {name: value for name, value in vars(options).items() if name not in ("minutes", "output", "quick")}
    settings = Settings(**given | {"model": path, "folder": str(options.output / "serving")})
    machine = describe_machine("cpu")
    console.print(f"{path.name} in 4 bits, computing in {settings.dtype}; {machine}", highlight=False)
    with working(console, f"Making {settings.adapters} random adapters of the ranks {', '.join(map(str, RANKS))}"):
        make_adapters(finetune.load_4bit(settings), settings)
    text = AutoTokenizer.from_pretrained(path)(finetune.language_reference(), return_tensors="pt").input_ids[0]
    requests = make_requests(text, settings)
    results: dict[str, Result] = {}
    for contender in CONTENDERS:
        with working(console, contender), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            future = process.submit(measure, contender, settings, requests, budget.stage(contender))
            results[contender] = future.result()
        if note := results[contender].note:
            console.print(f"  {note}", highlight=False)
    with working(console, "Comparing the answers"):
        verdict = check(settings, requests, results)
    console.print(result_table(results, settings))
    console.print(verdict, highlight=False)
    rows = [
        {
            "name": name, "rate": result.rate, "p50": result.percentile(0.5), "p99": result.percentile(0.99),
            "requests": len(result.latencies), "ready": result.ready, "note": result.note,
            "memory_mb": megabytes(result.memory * (settings.adapters if name == ALONE else 1)),
            "adapters_mb": megabytes(result.adapters * (settings.adapters if name == ALONE else 1)),
        }
        for name, result in results.items()
    ]  # fmt: skip
    written = save({"served": rows, "verdict": verdict}, settings, machine, options.output / "demo_serving.json")
    draw_saved(written, options.output / "demo_serving.png")
    console.print(f"Saved: {options.output / 'demo_serving.png'}, {options.output / 'demo_serving.json'}")
