"""`make demo-adapters`: its tasks, its measurements, and the whole of it on a tiny model."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_models import make_model, randomize
from rich.console import Console

import peft_kernels
from examples import demo_adapters, tasks
from examples.demo_adapters import ADAPTER, FROZEN, FUSED, FUSION, PLAIN, Batch, Classifier, TaskRun
from examples.plain_adapters import plain
from examples.tasks import Task

ROOT = Path(__file__).parent.parent


# ---- Options and tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--tasks", "subject,verse", "wanted some of subject,code,kind,chapter"),
        ("--tasks", "subject", "wanted two or more"),
        ("--train", "19", "at least 20"),
        ("--steps", "0", "at least 1"),
        ("--lr", "-1", "above 0"),
        ("--model", "no/such/folder", "a folder with a config.json"),
    ],
)
def test_bad_option(option, value, wanted, capsys):
    with pytest.raises(SystemExit) as error:
        demo_adapters.main([option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: got '" in message and wanted in message


@pytest.fixture
def small_library(monkeypatch, tmp_path):
    """A standard library of two modules, and a language reference that is the real one."""
    docstring = "One of the functions that do a thing with its arguments, number {}."
    function = 'def {name}_{i}(a):\n    """{docstring}"""\n    b = a + "{name}{i}"\n    c = b\n    return c\n'
    for name in ("http", "json"):
        functions = "".join(
            function.format(name=name, i=i, docstring=docstring.format(i) + f" {name}") for i in range(12)
        )
        text = f"class A{name}:\n    '''The class of all the things that there are in this module, {name}.'''\n"
        (tmp_path / f"{name}.py").write_text(functions + text)
    monkeypatch.setattr(tasks.sysconfig, "get_path", lambda name: str(tmp_path))
    tasks._definitions.cache_clear()
    yield
    tasks._definitions.cache_clear()


def test_tasks_of_a_small_library(small_library):
    subject, code = tasks.make_tasks(["subject", "code"], train=12, test=6, seed=0)
    assert subject.labels == code.labels == ("network", "text and data")
    assert (len(subject.train), len(subject.test)) == (12, 6)
    for task in (subject, code):
        assert not {text for text, _ in task.train} & {text for text, _ in task.test}
        for part in (task.train, task.test):
            assert sum(label for _, label in part) == len(part) / 2
    for text, label in subject.train + subject.test:
        assert text.startswith(("One of", "The class")) and ("json" in text) == (label == 1)
    for text, _ in code.train + code.test:
        assert '"""' not in text and len(ast.parse(text.replace("    ", "").replace("return c", "c")).body) == 3


def test_tasks_depend_on_the_seed_alone(small_library):
    def examples(seed):
        return tasks.make_tasks(["subject"], 12, 6, seed)[0].train

    assert examples(1) == examples(1) != examples(2)


def test_chapters_are_paragraphs_of_the_language_reference():
    (task,) = tasks.make_tasks(["chapter"], train=100, test=50, seed=0)
    assert len(task.labels) == 5 and len(task.train) == 100 and len(task.test) == 50
    assert all(len(text.split()) >= tasks.FEWEST_WORDS for text, _ in task.train)


def test_unknown_task():
    with pytest.raises(ValueError, match="tasks: got 'verse', wanted some of subject, code"):
        tasks.make_tasks(["verse"], 100, 50, 0)


# ---- Pieces ---------------------------------------------------------------------------------------------------------

TWO = [Task(name, "which?", ("a", "b"), (("x", 0),), (("y", 1),)) for name in ("first", "second")]


def make_classifier(fusion=False):
    model = Classifier(make_model("llama").model, TWO)
    for task in TWO:
        peft_kernels.insert_adapters(model.base, "pfeiffer", bottleneck=8, norm_before=True, name=task.name)
    if fusion:
        peft_kernels.fuse_adapters(model.base, ["first", "second"])
    randomize(model, "first", "second", "first,second", std=0.1)
    return model


def make_batch(rows=4):
    mask = torch.ones(rows, 6, dtype=torch.int64)
    mask[0, 3:] = 0
    return Batch(torch.randint(3, 40, (rows, 6)), mask, torch.arange(rows) % 2)


def test_slow_machines_have_fewer_examples(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(demo_adapters, "time", clock)

    def slow_features(model, examples, tokenizer, length):
        clock.now += len(examples)

    monkeypatch.setattr(demo_adapters, "all_features", slow_features)
    many = [Task(name, "which?", ("a",), (("x", 0),) * 100, (("y", 0),) * 100) for name in ("first", "second")]
    found = demo_adapters.fewer_examples(None, many, None, 32, seconds=400.0)
    assert [(len(task.train), len(task.test)) for task in found] == [(50, 50)] * 2
    found = demo_adapters.fewer_examples(None, many, None, 32, seconds=4.0)
    assert [(len(task.train), len(task.test)) for task in found] == [(20, 20)] * 2
    assert demo_adapters.fewer_examples(None, many, None, 32, seconds=4000.0) == many


@pytest.mark.parametrize("fusion", [False, True], ids=["adapter", "fusion"])
def test_plain_layers_compute_the_same(fusion):
    model, batch = make_classifier(fusion).float().eval(), make_batch()
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    fused = model.base(**inputs).last_hidden_state
    before = [type(module) for module in model.modules()]
    with plain(model):
        assert before != [type(module) for module in model.modules()]
        torch.testing.assert_close(model.base(**inputs).last_hidden_state, fused, rtol=1e-4, atol=1e-5)
    assert before == [type(module) for module in model.modules()]


def test_features_do_not_see_the_padding():
    model, batch = make_classifier().eval(), make_batch()
    features = model.features(batch.tokens, batch.mask)
    alone = model.features(batch.tokens[:1, :3], batch.mask[:1, :3])
    torch.testing.assert_close(features[:1], alone, rtol=0.05, atol=0.05)
    mixed = model.features(batch.tokens, batch.mask, ["first", "second", "first", "second"])
    for row, name in enumerate(["first", "second", "first", "second"]):
        peft_kernels.set_adapter(model, name)
        torch.testing.assert_close(mixed[row], model.features(batch.tokens, batch.mask)[row], rtol=0.05, atol=0.05)


def test_run_trains_its_task():
    model, batch = make_classifier(), make_batch()
    peft_kernels.set_adapter(model, "first")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = TaskRun(model, "first", lr=0.01, head_lr=0.01)
    for _ in range(8):
        run.step(batch)
    assert run.losses[-1] < run.losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(name.startswith("heads.first.") or ".adapters.first." in name for name in changed)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def test_encoding_pads_and_cuts():
    batch = demo_adapters.encode([("abc", 0), ("abcdef", 1), ("", 2)], Letters(), 4)
    assert batch.tokens.tolist() == [[97, 98, 99, 0], [97, 98, 99, 100], [0, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [0, 1, 2]


def test_batches_deal_out_every_example_once_an_epoch():
    task = Task("t", "", ("a",), tuple((chr(97 + i), i) for i in range(8)), ())
    settings = type("Settings", (), {"seed": 0, "batch": 4, "length": 4})
    batches = list(demo_adapters.training_batches(task, Letters(), settings, 4))
    assert sorted(torch.cat([batch.labels for batch in batches[:2]]).tolist()) == list(range(8))
    assert sorted(torch.cat([batch.labels for batch in batches[2:]]).tolist()) == list(range(8))


def test_head_on_separable_features():
    features = torch.randn(60, 8) * torch.logspace(-2, 2, 8)
    labels = (features[:, 0] > 0).long()
    head = demo_adapters.Head(8, 2)
    demo_adapters.fit_head(head, features, labels)
    assert (head(features).argmax(1) == labels).float().mean() > 0.95


def test_results(tmp_path):
    accuracies = {
        name: {"first": 0.5, "second": share} for name, share in ((FROZEN, 0.5), (ADAPTER, 0.7), (FUSION, 0.75))
    }
    console = Console(width=140)
    with console.capture() as capture:
        console.print(demo_adapters.accuracy_table(TWO, accuracies))
    text = capture.get()
    assert "first: which?" in text and "70.0%" in text and "62.5%" in text and "1 + 1" in text
    results = {"machine": "a machine", "versions": "", "accuracy": accuracies, "chance": {"first": 0.5}}
    costs = [
        {"name": "adapter: forward and backward", "unit": "s", PLAIN: 2.0, FUSED: 1.0},
        {"name": "adapter: saved for backward", "unit": "MB", PLAIN: 4.0, FUSED: 1.0},
    ]
    demo_adapters.draw_saved(results | {"costs": costs}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- The whole ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_from_start_to_end(tiny_model, tmp_path):
    options = {"model": tiny_model, "output": tmp_path, "tasks": "chapter,kind", "train": 40, "test": 20, "steps": 3}
    options |= {"fusion-steps": 2, "batch": 4, "length": 16, "bottleneck": 8}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks", "demo_adapters", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^kind +\d/3  loss \d", result.stdout, re.MULTILINE)  # though it is no terminal
    assert "adapter 'kind': 2 layers" in result.stdout and "Accuracy on the test examples" in result.stdout

    written = json.loads((tmp_path / "demo_adapters.json").read_text())
    assert set(written["accuracy"]) == {FROZEN, ADAPTER, FUSION}
    assert all(0 <= share <= 1 for by_task in written["accuracy"].values() for share in by_task.values())
    assert all(math.isfinite(row[PLAIN]) and math.isfinite(row[FUSED]) for row in written["costs"])
    assert written["parameters"]["an adapter"] < written["parameters"]["the fusion"] < written["parameters"]["base"]
    assert (tmp_path / "demo_adapters.png").stat().st_size > 10_000
    for name in ("kind", "chapter"):
        assert (tmp_path / "adapters" / name / "adapter.safetensors").is_file()
    assert (tmp_path / "adapters/fusion/model_adapter_fusion.safetensors").is_file()
