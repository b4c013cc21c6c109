"""Accelerated models under DeepSpeed's ZeRO in two processes: their losses are those of stock models under it.

ZeRO-3 keeps a part of each parameter in each process, and gathers a module's parameters in hooks while it is called.
"""

import faulthandler
import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch
import transformers
from decoding_models import quantised
from peft import LoraConfig, get_peft_model
from peft_models import randomize
from processes import found_by
from tiny_models import tiny

import peft_kernels
from peft_kernels.integrations.registry import FusedLayer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

PROCESSES, ROWS, LENGTH, STEPS = 2, 4, 8, 3
HOOKED = "its base layer has hooks"


@dataclass(frozen=True)
class Case:
    """How a model is made, and when it is accelerated.

    Attributes:
        stage: of ZeRO.
        is_parted: whether the base model's weights are, before it has adapters.
        order: whether `optimize` comes before DeepSpeed takes the model, or after it.
    """

    stage: int = 3
    is_4bit: bool = False
    is_parted: bool = False
    order: str = "after"
    checkpoints: bool = False
    logits: bool = True


CASES = {
    "zero-2": Case(2, order="before"),
    "zero-3": Case(),
    "zero-3 before": Case(order="before"),
    "zero-3 4bit": Case(is_4bit=True),
    "zero-3 4bit before": Case(is_4bit=True, order="before"),
    "zero-3 parted before": Case(is_parted=True, order="before"),
    "zero-3 checkpoints": Case(checkpoints=True),
    "zero-3 without logits": Case(logits=False),
}


def config_of(stage):
    """With small parameters in parts too, and with the optimiser of the caller."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"train_micro_batch_size_per_gpu": ROWS // PROCESSES, "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}  # fmt: skip


def make_model(case, config):
    import deepspeed

    torch.manual_seed(0)
    model = tiny("llama", hidden=64, intermediate=128)
    if case.is_4bit:
        quantised(model, storage=torch.float32)
    if case.is_parted:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(model)
    if case.checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def losses(case, rank, accelerated):
    """This process's of each step, and of a token without gradients; and what the report of `optimize` says."""
    import deepspeed

    config = config_of(case.stage)
    model, report = make_model(case, config), None
    if accelerated and case.order == "before":
        peft_kernels.optimize(model, tune=False, logits=case.logits)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, 1e-2), config=config)
    if accelerated and case.order == "after":
        peft_kernels.optimize(model, tune=False, logits=case.logits)
    found = []
    torch.manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randint(3, 60, (ROWS, LENGTH)).chunk(PROCESSES)[rank]
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.detach())
    engine.eval()
    with torch.no_grad():
        found.append(engine(input_ids=torch.tensor([[3]])).logits.square().mean())
    if accelerated:
        report = peft_kernels.optimize(model, tune=False, logits=case.logits)
    engine.destroy()
    is_fused = {layer.name.rpartition(".")[2]: layer.fused for layer in report or ()}
    return torch.stack(found), is_fused, {layer.reason for layer in report.left_alone} if report else set()


def logged_by_trainer(folder, *callbacks):
    """The loss and the gradient's norm of each step, and how many layers are fused."""
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 35).reshape(-1, LENGTH)]
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, deepspeed=config_of(3), per_device_train_batch_size=ROWS // PROCESSES, max_steps=STEPS,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    model = make_model(Case(), None)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    logged = [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row]
    return torch.tensor(logged), sum(isinstance(module, FusedLayer) for module in model.modules())


def train_in_parallel(rank, folder):
    faulthandler.dump_traceback_later(300, exit=True)  # a process waits forever for one that has failed
    # accelerate asks for a master even where the processes have met.
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(PROCESSES))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    found = {name: [losses(case, rank, accelerated) for accelerated in (False, True)] for name, case in CASES.items()}
    found["trainer"] = logged_by_trainer(folder), logged_by_trainer(folder, peft_kernels.PeftKernelsCallback())
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found for every case."""
    return found_by(train_in_parallel, tmp_path_factory.mktemp("ranks"), PROCESSES)


@pytest.mark.parametrize("name", CASES)
def test_losses(name, ranks):
    for rank in ranks:
        (wanted, _, _), (got, is_fused, reasons) = rank[name]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert is_fused["self_attn"] and is_fused["norm"]
        assert is_fused["q_proj"] == (CASES[name].stage == 2) and (HOOKED in reasons) != is_fused["q_proj"]


def test_trainer(ranks):
    for rank in ranks:
        (wanted, _), (got, fused) = rank["trainer"]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert len(got) == STEPS and fused > 5
