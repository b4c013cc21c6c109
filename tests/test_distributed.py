"""Accelerated models in two processes: their gradients are those of stock models in one, with all of the batch."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from comparison import error
from decoding_models import quantised
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import randomize
from processes import found_by
from tiny_models import SAME_STEP, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import peft_kernels

PROCESSES, ROWS, LENGTH = 2, 4, 8


@dataclass(frozen=True)
class Case:
    """How a model is made, wrapped and called.

    Attributes:
        storage: the dtype of the 4-bit codes' storage; None for dense weights.
        order: whether `optimize` comes before the wrapping, or after it.
        accumulates: whether each row of the batch is a step of its own, without communication but for the last one.
        reasons: why layers keep their stock forward, as the report of a wrapped model says.
    """

    engine: str = "ddp"
    storage: torch.dtype | None = None
    config: dict = field(default_factory=dict)
    order: str = "before"
    options: dict = field(default_factory=dict)
    checkpoints: bool = False
    accumulates: bool = False
    unused: bool = False
    compiled: bool = False
    reasons: frozenset[str] = frozenset()


IS_DTENSOR = frozenset({"its base weight is a DTensor"})
CASES = {
    "ddp": Case(),
    "ddp after": Case(order="after"),
    "ddp 4bit": Case(storage=torch.uint8),
    "ddp 4bit bf16": Case(storage=torch.bfloat16),
    "ddp views": Case(storage=torch.uint8, options={"gradient_as_bucket_view": True}),
    "ddp static": Case(storage=torch.uint8, options={"static_graph": True}, checkpoints=True),
    "ddp unused": Case(options={"find_unused_parameters": True}, unused=True),
    "ddp no_sync": Case(storage=torch.uint8, accumulates=True),
    "ddp checkpoints": Case(checkpoints=True),
    "ddp dora": Case(storage=torch.uint8, config={"use_dora": True}),
    "ddp compiled": Case(storage=torch.uint8, compiled=True),
    "fsdp": Case("fsdp"),
    "fsdp after": Case("fsdp", order="after"),
    "fsdp 4bit": Case("fsdp", torch.float32),
    "fsdp 4bit after": Case("fsdp", torch.float32, order="after"),
    "fsdp checkpoints": Case("fsdp", torch.float32, checkpoints=True),
    "fsdp kept": Case("fsdp", options={"reshard_after_forward": False}),
    "fsdp offload": Case("fsdp", options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "fsdp 4bit offload": Case(
        "fsdp", torch.float32, options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}, checkpoints=True
    ),
    "fsdp compiled": Case("fsdp", torch.float32, compiled=True),
    "tensor parallel": Case("tp", reasons=IS_DTENSOR),
    "tensor parallel after": Case("tp", order="after", reasons=IS_DTENSOR),
    "tensor parallel checkpoints": Case("tp", order="after", checkpoints=True, reasons=IS_DTENSOR),
    "fsdp of tensor parallel": Case("tp+fsdp", order="after", reasons=IS_DTENSOR),
}


def make_model(case):
    torch.manual_seed(0)
    model = tiny("llama", hidden=64, intermediate=128)
    if case.storage is not None:
        quantised(model, storage=case.storage)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **case.config)
    model = get_peft_model(model, config)
    if case.unused:
        model.add_adapter("unused", config)
        model.base_model.model.model.layers[0].mlp.down_proj.set_adapter("unused")
    randomize(model)
    if case.checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def wrap(case, model):
    if case.engine == "ddp":
        return DistributedDataParallel(model, **case.options)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if "tp" in case.engine:
        both = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("fsdp", "tp"))
        mesh = both["fsdp"]
        parallelize_module(model, both["tp"], tensor_parallel_plan(model))
    if "fsdp" in case.engine:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh, **case.options)
        fully_shard(model, mesh=mesh, **case.options)
    return model


def tensor_parallel_plan(model):
    """Megatron's: a shard of the rows of what a block reads with and of its B, or of the columns of what it writes with
    and of its A."""
    plan = {}
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            plan |= {f"{name}.base_layer": RowwiseParallel(), f"{name}.lora_A.default": RowwiseParallel()}
        elif isinstance(module, BaseTunerLayer):
            plan |= {f"{name}.base_layer": ColwiseParallel(), f"{name}.lora_B.default": ColwiseParallel()}
    return plan


def batch():
    torch.manual_seed(1)
    return torch.randint(3, 60, (ROWS, LENGTH))


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(grad, "full_tensor", grad.clone)() for name, grad in found.items()}


def train_in_parallel(rank, folder):
    found = {}
    for name, case in CASES.items():
        rows = batch() if "tp" in case.engine else batch().chunk(PROCESSES)[rank]
        model = make_model(case)
        if case.order == "before":
            peft_kernels.optimize(model, tune=False)
        parallel = wrap(case, model)
        if case.order == "after":
            peft_kernels.optimize(model, tune=False)
        if case.compiled:
            model.get_base_model().model.layers[0].compile(backend="aot_eager")
        steps = rows.split(1) if case.accumulates else [rows]
        for number, step in enumerate(steps, 1):
            with parallel.no_sync() if number < len(steps) else nullcontext():
                (parallel(input_ids=step, labels=step).loss / len(steps)).backward()
        report = peft_kernels.optimize(model, tune=False)
        found[name] = gradients(model), len(report.fused), {layer.reason for layer in report.left_alone}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found for every case."""
    return found_by(train_in_parallel, tmp_path_factory.mktemp("ranks"), PROCESSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, ranks):
    model = make_model(CASES[name])
    for rows in batch().chunk(PROCESSES):
        (model(input_ids=rows, labels=rows).loss / PROCESSES).backward()
    wanted = gradients(model)
    for actual, fused, reasons in (rank[name] for rank in ranks):
        assert fused > (10 if CASES[name].reasons else 20) and reasons == CASES[name].reasons
        assert actual.keys() == wanted.keys() and actual
        for parameter, grad in wanted.items():
            assert error(actual[parameter], grad) <= SAME_STEP, parameter
