"""`optimize` through transformers' Trainer."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import randomize
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import Trainer, TrainingArguments

from peft_kernels import PeftKernelsCallback
from peft_kernels.integrations.registry import FusedLayer

STEPS = 3


@pytest.fixture
def train(tmp_path):
    """Trains the same model on the same data with some callbacks, and returns the trainer."""

    def run(*callbacks, folder="run", resume=None, steps=STEPS):
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear"))
        randomize(model)
        data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 10))]
        arguments = TrainingArguments(
            output_dir=tmp_path / folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
            lr_scheduler_type="constant", use_cpu=True, report_to=[], save_steps=2, logging_steps=1,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def is_fused(model):
    return any(isinstance(module, FusedLayer) for module in model.modules())


def test_trains_as_stock_does(train, tmp_path, caplog):
    stock = train(folder="stock")
    callback = PeftKernelsCallback()
    with caplog.at_level(logging.INFO, "peft_kernels"):
        fused = train(callback)
    assert is_fused(fused.model) and not is_fused(stock.model)
    assert losses(fused) == pytest.approx(losses(stock), rel=1e-4)
    assert callback.report.fused and str(callback.report.fused[0].kind) in caplog.text
    saved = [load_file(tmp_path / folder / "checkpoint-2/adapter_model.safetensors") for folder in ("stock", "run")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_goes_on_from_a_checkpoint(train, tmp_path):
    whole = train(PeftKernelsCallback(), folder="whole", steps=4)
    train(PeftKernelsCallback(), folder="half", steps=2)
    rest = train(PeftKernelsCallback(), folder="half", steps=4, resume=str(tmp_path / "half/checkpoint-2"))
    assert losses(rest) == pytest.approx(losses(whole), rel=1e-4)


def test_arguments_are_those_of_accelerate(train):
    callback = PeftKernelsCallback(tune=False, only="lora", exclude="*.mlp", restore=True)
    trainer = train(callback)
    names = [layer.name for layer in callback.report.fused if layer.kind == "peft.Linear"]
    assert len(names) == 8 and all(".self_attn." in name for name in names)
    assert not is_fused(trainer.model)
    with pytest.raises(ValueError, match="only: got 'lorra'"):
        train(PeftKernelsCallback(only="lorra"))


def test_a_trainer_without_a_model():
    callback = PeftKernelsCallback()
    assert callback.on_train_begin(None, None, None) is None and callback.report is None
