"""`examples/parallel.py`: each launch command in two processes, on a tiny model, and a checkpoint in another number."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from comparison import error
from safetensors.torch import load_file
from tiny_models import SAME_STEP

from examples import parallel

ROOT = Path(__file__).parent.parent
SETTINGS = {"batch": 4, "length": 16, "rank": 4, "lr": 0.01, "seed": 0, "dtype": "fp32"}
STEPS = 3
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}  # fmt: skip
# Where it stops, and one process goes on.
CASES = {
    "ddp": ("torchrun", STEPS),
    "fsdp": ("torchrun", STEPS - 1),
    "trainer": ("accelerate", STEPS - 1),
    "accelerator": ("accelerate", STEPS),
}


def options_of(engine, model, output, steps, *more):
    named = SETTINGS | {"model": model, "output": output, "steps": steps}
    return [engine, *more, *(text for name, value in named.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def wanted(tiny_model):
    """The adapter that the stock model has after as many steps in one process."""
    options = SimpleNamespace(**SETTINGS, model=tiny_model, steps=STEPS)
    model = parallel.load(options)
    optimizer = parallel.make_optimizer(model, options)
    for batch in parallel.load_batches(options):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}


def go_on(engine, options, monkeypatch):
    """Resumes in this process, as the only one."""
    monkeypatch.setattr("benchmarks.finetune.quiet", lambda: None)
    if engine != "trainer":  # which asks for no group where it is not launched
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
    parallel.main([*options, "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", CASES)
def test_trains_as_stock_in_one_process(engine, tiny_model, tmp_path, wanted, monkeypatch):
    launcher, steps = CASES[engine]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "examples.parallel"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        [*command, *options_of(engine, tiny_model, tmp_path, steps)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if steps < STEPS:
        go_on(engine, options_of(engine, tiny_model, tmp_path, STEPS), monkeypatch)
    actual = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert error(actual[name], tensor) <= 10 * SAME_STEP, name  # AdamW divides small gradients by their size


def test_options_that_do_not_go_together(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for more, message in (
        (["--batch", "4"], "wanted a multiple of the 3 processes"),
        (["--batch", "3", "--resume"], "wanted ddp, fsdp or trainer"),
    ):
        with pytest.raises(SystemExit):
            parallel.main(["accelerator", *more])
        assert message in capsys.readouterr().err
