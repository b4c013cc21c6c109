"""QLoRA of SmolLM2-135M in several processes: torchrun with DDP or FSDP2, accelerate with a Trainer or without.

    torchrun --standalone --nproc-per-node 2 -m examples.parallel ddp
    torchrun --standalone --nproc-per-node 2 -m examples.parallel fsdp
    accelerate launch --multi_gpu --num_processes 2 -m examples.parallel trainer
    accelerate launch --multi_gpu --num_processes 2 -m examples.parallel accelerator

Each trains the same adapter, on GPUs where there are any, and on the CPU otherwise. `--resume` goes on from the last
checkpoint in `--output`, with any number of processes.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import peft_kernels
from benchmarks import finetune
from benchmarks.options import COUNT, LENGTH, POSITIVE, SEED, model_path
from benchmarks.timing import DTYPES

Options = argparse.Namespace
ON_GPU = torch.cuda.is_available()


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if ON_GPU else torch.device("cpu")


# ---- What all of them train, and on what ----------------------------------------------------------------------------


def load(options: Options) -> PeftModel:
    """The 4-bit model with a fresh adapter, which is the same in each process."""
    dtype = DTYPES[options.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP2 gathers parameters that have one dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=dtype, device_map=device()
    )
    torch.manual_seed(options.seed)
    config = LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def load_batches(options: Options) -> Tensor:
    """[steps, batch, length] tokens, the same in each process."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(finetune.language_reference(), return_tensors="pt", verbose=False).input_ids[0]
    return finetune.make_batches(tokens, options.steps, options.batch, options.length, options.seed)


def make_optimizer(model: nn.Module, options: Options) -> Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)


def say(step: int, loss: Tensor) -> None:
    if is_first():
        print(f"step {step}: loss {loss.item():.4f}", flush=True)


# ---- torchrun -------------------------------------------------------------------------------------------------------


def wrap_ddp(model: PeftModel) -> nn.Module:
    return DistributedDataParallel(model)


def wrap_fsdp(model: PeftModel) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_with_torch(wrap: Callable[[PeftModel], nn.Module], options: Options) -> None:
    distributed.init_process_group(device_id=device() if ON_GPU else None)
    train_wrapped(wrap, options)
    # Frees DDP. As the group's last holder it would wait, with Python's lock, for a thread that waits for the lock.
    gc.collect()
    distributed.barrier()  # a process that ends while gloo's threads still release its tensors is aborted
    distributed.destroy_process_group()


def train_wrapped(wrap: Callable[[PeftModel], nn.Module], options: Options) -> None:
    model = load(options)
    report = peft_kernels.optimize(model)
    if is_first():
        print(report)
    parallel = wrap(model)
    optimizer, begin = make_optimizer(model, options), 0
    if options.resume and (folder := get_last_checkpoint(options.output)):
        begin = load_checkpoint(model, optimizer, folder)
    for step, batch in enumerate(load_batches(options)[begin:], begin + 1):
        rows = batch.chunk(processes())[distributed.get_rank()].to(device())
        loss = parallel(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say(step, loss)
    dcp.save(state_of(model, optimizer, options.steps), checkpoint_id=options.output / f"checkpoint-{options.steps}")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    adapter = get_model_state_dict(model, options=whole)
    if is_first():
        model.save_pretrained(options.output / "adapter", state_dict=adapter)


def state_of(model: nn.Module, optimizer: Optimizer, steps: int) -> dict[str, Any]:
    """What is trained, in parts that another number of processes can load."""
    trained = StateDictOptions(ignore_frozen_params=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=trained)
    return {"model": model_state, "optimizer": optimizer_state, "steps": steps}


def load_checkpoint(model: nn.Module, optimizer: Optimizer, folder: str) -> int:
    """How many steps it was saved after."""
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=folder)
    states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **states, options=StateDictOptions(strict=False))
    return int(state["steps"])


# ---- accelerate -----------------------------------------------------------------------------------------------------


def train_with_trainer(options: Options) -> None:
    arguments = TrainingArguments(
        output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=options.batch // processes(),
        learning_rate=options.lr, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0.0,
        train_sampling_strategy="sequential", save_steps=options.steps, logging_steps=1, report_to=[],
        use_cpu=not ON_GPU, dataloader_pin_memory=ON_GPU, seed=options.seed, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in load_batches(options).flatten(0, 1)]
    callbacks = [peft_kernels.PeftKernelsCallback()]  # calls `optimize` when training begins
    trainer = Trainer(load(options), arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.output / "adapter"))


def train_with_accelerator(options: Options) -> None:
    accelerator = Accelerator(cpu=not ON_GPU)
    train_prepared(accelerator, options)
    accelerator.free_memory()  # DDP before the group, as in train_with_torch
    accelerator.end_training()


def train_prepared(accelerator: Accelerator, options: Options) -> None:
    model = load(options)
    report = peft_kernels.optimize(model)
    accelerator.print(report)
    optimizer = make_optimizer(model, options)
    rows = DataLoader(load_batches(options).flatten(0, 1), options.batch // processes())
    parallel, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    for step, batch in enumerate(rows, 1):
        loss = parallel(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        say(step, loss)
    if accelerator.is_main_process:
        accelerator.unwrap_model(parallel).save_pretrained(options.output / "adapter")


ENGINES: dict[str, Callable[[Options], None]] = {
    "ddp": lambda options: train_with_torch(wrap_ddp, options),
    "fsdp": lambda options: train_with_torch(wrap_fsdp, options),
    "trainer": train_with_trainer,
    "accelerator": train_with_accelerator,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.parallel", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("engine", choices=ENGINES, help="how the processes share the work")
    add("--steps", type=COUNT, default=20, help="of training (%(default)s)")
    add("--batch", type=COUNT, default=8, help="rows of a step, of all processes together (%(default)s)")
    add("--length", type=LENGTH, default=128, help="tokens of a row (%(default)s)")
    add("--rank", type=COUNT, default=8, help="of the adapter (%(default)s)")
    add("--lr", type=POSITIVE, default=5e-4, help="learning rate of AdamW (%(default)s)")
    add("--dtype", choices=DTYPES, default="bf16" if ON_GPU else "fp32", help="of the model (%(default)s)")
    add("--model", type=model_path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    add("--output", type=Path, default=Path("demo-output/parallel"), help="folder for results (%(default)s)")
    add("--seed", type=SEED, default=0, help="of batches and initial values (%(default)s)")
    add("--resume", action="store_true", help="from the checkpoint in --output (not with accelerator)")
    options = parser.parse_args(arguments)
    if options.batch % processes():
        parser.error(f"argument --batch: got '{options.batch}', wanted a multiple of the {processes()} processes")
    if options.resume and options.engine == "accelerator":
        parser.error("argument --resume: got it with 'accelerator', wanted ddp, fsdp or trainer")
    finetune.quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    options.model = finetune.base_model(options.model, options.output / "base")
    ENGINES[options.engine](options)


if __name__ == "__main__":
    main()
