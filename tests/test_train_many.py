"""`make train-many`: its batches, and the whole of it on a tiny model."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optional import if_installed
from test_adapter_rows import lora_model

from examples import train_many

peft = if_installed("peft")

ROOT = Path(__file__).parent.parent


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 1

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def test_answers_have_the_labels():
    names, tokens, mask, labels = train_many.make_batch([*train_many.TASKS], 2, Letters(), random.Random(0))
    assert names == [name for name in train_many.TASKS for _ in range(2)]
    for name, row, seen, targets in zip(names, tokens, mask, labels, strict=True):
        text = "".join(map(chr, row[seen.bool()]))
        question, answer = text.split(" ->")
        assert answer == f" {train_many.TASKS[name](question.split())}\x01"
        assert "".join(map(chr, targets[targets != train_many.IGNORED])) == answer
        assert torch.equal(row[targets != train_many.IGNORED], targets[targets != train_many.IGNORED])


def test_a_step_together_trains_every_adapter():
    adapters = {"default": {"r": 4, "target_modules": "all-linear"}}
    together = train_many.Together(lora_model("4bit", adapters), 3, 0.01)
    batch, found = torch.randint(3, 60, (3, 8)), []
    backward = together.trainer.backward
    together.trainer.backward = lambda *args, **kwargs: found.append(backward(*args, **kwargs)) or found[-1]
    together.step(batch)
    assert [*found[0]] == together.names and len(found[0]) == 3


@pytest.mark.slow
def test_from_start_to_end(tiny_model, tmp_path):
    command = [sys.executable, "-m", "examples.train_many", "--quick", "--steps", "2", "--rank", "2"]
    command += ["--model", str(tiny_model), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for name in train_many.TASKS:
        assert (tmp_path / "train-many" / name / "adapter_model.safetensors").is_file()
        assert name in result.stdout
    assert "all at once" in result.stdout and "stock, one by one" in result.stdout
