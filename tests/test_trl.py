"""`PeftKernelsCallback` with TRL's trainers, which put the adapter on the model: what they log is what stock logs."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_kernels import PeftKernelsCallback
from peft_kernels.integrations.registry import FusedLayer

TEXTS = ["the cat sat on the mat.", "a dog.", "what is it? a bird!", "hello there, you.", "no", "yes it is."]


def tokenizer():
    """One of single letters, with the special tokens of the tiny models."""
    letters = {
        letter: number for number, letter in enumerate(["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz .,?!"])
    }
    inner = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def sft(**options):
    return SFTTrainer, SFTConfig(**{"max_length": 32} | options), {"text": TEXTS}


def dpo(**options):
    count = len(TEXTS)
    data = {"prompt": TEXTS, "chosen": [" yes."] * count, "rejected": [" no no."] * count}
    return DPOTrainer, DPOConfig(**options), data


def reward(completions, **kwargs):
    """Prefers completions with early letters, so that hardly any two are as good."""
    return [sum(map(ord, text)) / 1000 for text in completions]


def grpo(**options):
    generation = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    return GRPOTrainer, GRPOConfig(**generation, **options), {"prompt": TEXTS}


CASES = {
    "sft": (sft, {}),
    "sft packing": (sft, {"packing": True}),
    "sft padding-free": (sft, {"padding_free": True, "max_length": None}),
    "dpo": (dpo, {}),
    "grpo": (grpo, {}),
}


def train(name, folder, *callbacks):
    """The trainer of a case, after two steps."""
    make, options = CASES[name]
    cls, arguments, data = make(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd", use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = cls(
        tiny("llama", hidden=64, intermediate=128),
        **({"reward_funcs": reward} if cls is GRPOTrainer else {}),
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def logged(trainer):
    """What it logged of each step, without what is about time."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if "time" not in key} for entry in steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_trains_as_stock_does(name, tmp_path):
    callback = PeftKernelsCallback()
    stock, fused = logged(train(name, tmp_path / "stock")), logged(trainer := train(name, tmp_path / "fused", callback))
    assert len(fused) == len(stock) == 2
    for actual, wanted in zip(fused, stock, strict=True):
        assert actual == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert not callback.report.left_alone
    assert sum(isinstance(layer, FusedLayer) for layer in trainer.model.modules()) > 20
