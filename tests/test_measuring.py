"""How `optimize` times a model's layers, and what becomes of them."""

import copy
import logging
import os
import time

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft_models import OneLayer, randomize
from tiny_models import tiny
from torch import multiprocessing, nn
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import choices
from peft_kernels.integrations import measuring
from peft_kernels.integrations import model as model_module
from peft_kernels.integrations.measuring import ROWS
from peft_kernels.integrations.registry import Trial

WIDTH, FEW, MANY = 64, 8, 512


@pytest.fixture(autouse=True)
def tuning(tmp_path, monkeypatch):
    """Tunes models of any size, on a machine that knows nothing yet."""
    monkeypatch.delenv("PEFT_KERNELS_TUNE")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(choices, "_decided", {})
    monkeypatch.setattr(model_module, "LEAST_PARAMETERS", 0)
    monkeypatch.setattr(measuring, "_FLUSHED_BYTES", 1 << 10)


@pytest.fixture
def clock(monkeypatch):
    """Calls are not timed but take what the returned list has: seconds of stock and fused, by rows and training."""
    taken = {}
    stock_layers = []
    restore = measuring.restore

    def restored(layer):
        restore(layer)
        stock_layers.append(layer)

    def seconds(contender, x, trains, flush):
        is_stock = any(layer is contender.layer for layer in stock_layers)
        return taken.get((len(x), trains), (0.002, 0.001))[0 if is_stock else 1]

    monkeypatch.setattr(measuring, "restore", restored)
    monkeypatch.setattr(measuring, "_seconds", seconds)
    return taken


def linear4bit(**kwargs):
    return bnb.nn.Linear4bit(WIDTH, 96, compute_dtype=torch.float32, quant_type="nf4", **kwargs).to("cpu")


def lora_model(base=None, **config):
    model = OneLayer(linear4bit() if base is None else base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lin"], **config))
    randomize(model)
    return model


def by_name(report):
    return {layer.name.removeprefix("base_model.model."): layer for layer in report}


def takes_stock(layer, x, monkeypatch):
    """Whether a call takes the stock forward, and the same result either way."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(
            type(layer), "stock_result", lambda self, *args: calls.append(self) or self.stock.forward(self, *args)
        )
        y = layer(x)
    vars(other := copy.deepcopy(layer)).pop("_choice", None)
    torch.testing.assert_close(y, other(x), rtol=1e-4, atol=1e-4)
    return calls[:1] == [layer]


def test_layers_take_what_was_faster(clock, monkeypatch):
    clock |= {(rows, True): (0.001, 0.002) for rows in (1, FEW, FEW + 1)}
    model = lora_model()
    report = by_name(peft_kernels.optimize(model))
    assert (
        report["lin"].fused
        and report["lin"].verdict == "fused, 2.0×; stock for 1–12 rows in training, 2.0× faster there"
    )
    layer = model.base_model.model.lin
    for training in (False, True):
        model.train(training)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for rows in (1, 12, 13, MANY):
                    stock = takes_stock(layer, torch.randn(rows, WIDTH), monkeypatch)
                    assert stock == ((training or grad) and rows <= 12), (training, grad, rows)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(clock, dynamic):
    clock |= {(rows, trains): (0.001, 0.002) for rows in (1, FEW, FEW + 1) for trains in (False, True)}
    model = lora_model().eval()
    peft_kernels.optimize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (4, 40):
        x = torch.randn(rows, WIDTH)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_reentrant_checkpoint_draws_one_mask(clock):
    clock |= {(rows, True): (0.001, 0.002) for rows in (1, FEW, FEW + 1)}  # but not without gradients
    layer = lora_model(lora_dropout=0.5).train().base_model.model.lin
    peft_kernels.optimize(layer, tune=10)
    x = torch.randn(4, WIDTH, requires_grad=True)
    torch.manual_seed(0)
    y = checkpoint(layer, x, use_reentrant=True)
    y.sum().backward()
    got, x.grad = x.grad, None
    torch.manual_seed(0)
    layer(x).sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_goes_by_its_queries(name, clock, monkeypatch):
    clock |= {(rows, trains): (0.001, 0.002) for rows in (1, FEW, FEW + 1) for trains in (False, True)}
    model = tiny(name).eval()
    peft_kernels.optimize(model)
    queries = []
    by_torch = F.scaled_dot_product_attention

    def attention(query, *args, **kwargs):
        queries.append(query.shape[2])
        return by_torch(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    tokens = torch.arange(40).view(2, 20) % 11
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[0, 0] = 0
    layers = model.config.num_hidden_layers
    for few, mask, stock in ((12, None, True), (13, None, False), (12, padded, False)):
        queries.clear()
        expected = copy.deepcopy(model)
        got = model(tokens[:, :few], attention_mask=mask).logits
        assert queries == [few] * layers * stock
        peft_kernels.restore(expected)
        wanted = expected(tokens[:, :few], attention_mask=mask).logits
        if mask is not None:
            got, wanted = got[:, 1:], wanted[:, 1:]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    queries.clear()
    everything = torch.ones_like(padded)
    generated = model.generate(tokens[:, :12], attention_mask=everything, max_new_tokens=4, do_sample=False)
    assert queries == [12] * layers  # and not those that have a cache before them
    assert generated.shape == (2, 16)


def test_layers_that_are_never_faster_are_stock(clock):
    clock |= {(rows, trains): (0.001, 0.0012) for rows in ROWS for trains in (False, True)}
    report = peft_kernels.optimize(lora_model())
    assert not report.fused and {layer.verdict for layer in report} == {"stock, 1.2× faster here"}
    assert "layers: 0 fused, 2 left alone" in str(report) and "stock, 1.2× faster here" in str(report)


def test_every_kind_of_layer(clock):
    clock |= {(rows, trains): (0.001, 0.002) for rows in ROWS for trains in (False, True)}
    model = tiny("llama", hidden=96, intermediate=WIDTH)
    model.model.layers[0].mlp.down_proj = linear4bit(bias=False)
    model.dropout = nn.Dropout(0.1)
    report = peft_kernels.optimize(model)
    stock = {layer.kind for layer in report if layer.verdict == "stock, 2.0× faster here"}
    assert stock == {
        "bitsandbytes.Linear4bit", "torch.Dropout", "torch.Linear", "transformers.LlamaAttention",
        "transformers.LlamaMLP", "transformers.LlamaRMSNorm",
    }  # fmt: skip
    tokens = torch.arange(12).view(1, 12)
    expected = copy.deepcopy(model)
    peft_kernels.restore(expected)
    assert not any("_choice" in vars(module) for module in expected.modules())
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)


def test_what_was_measured_is_kept(clock, monkeypatch):
    measured = []
    measure = measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda trials, seconds: measured.append(set(trials)) or measure(trials, seconds)
    )
    first = peft_kernels.optimize(lora_model())
    (names,) = measured
    assert len(names) == 2  # the layer with its adapter, and what it is on
    clock |= {(rows, trains): (0.001, 0.002) for rows in ROWS for trains in (False, True)}  # from now on
    assert peft_kernels.optimize(lora_model()) == first  # in this process
    monkeypatch.setattr(choices, "_decided", {})
    assert peft_kernels.optimize(lora_model()) == first  # in the next one
    assert len(measured) == 1
    other = peft_kernels.optimize(lora_model(lora_dropout=0.5))
    assert len(measured) == 2 and len(measured[1]) == 2 and not measured[1] & names  # and the dropout, which is a layer
    assert by_name(other)["lin"].speed == "2.0× faster here"


@pytest.mark.parametrize("way", [False, 0, 0.0, "environment"])
def test_left_out(clock, monkeypatch, way):
    peft_kernels.optimize(lora_model())
    monkeypatch.setattr(choices, "load", None)
    if way == "environment":
        monkeypatch.setenv("PEFT_KERNELS_TUNE", "0")
        report = peft_kernels.optimize(lora_model())
    else:
        report = peft_kernels.optimize(lora_model(), tune=way)
    assert {layer.verdict for layer in report} == {"fused"}


@pytest.mark.parametrize("tune", [None, "yes", -1, float("nan"), float("inf")])
def test_bad_option(tune):
    with pytest.raises(ValueError, match=r"tune: got .*, wanted True, False or a number of seconds"):
        peft_kernels.optimize(lora_model(), tune=tune)


def test_small_models_are_not_timed(clock, monkeypatch):
    monkeypatch.setattr(model_module, "LEAST_PARAMETERS", 1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "measure", None)
        peft_kernels.optimize(lora_model())
    report = peft_kernels.optimize(lora_model(), tune=10)  # unless told for how long
    assert by_name(report)["lin"].speed == "2.0×"


def test_timing_changes_nothing(monkeypatch):
    monkeypatch.setattr(measuring, "ROWS", (1, 4))
    model = lora_model(lora_dropout=0.5)
    model.eval()
    seen = []
    layer = model.base_model.model.lin
    for module in layer.modules():
        module.register_forward_hook(lambda *arguments: seen.append(arguments))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        report = peft_kernels.optimize(model)
        assert not torch.is_grad_enabled()
    assert by_name(report)["lin"].reason  # hooks on parts that would not be called
    assert torch.equal(torch.get_rng_state(), random)
    assert not seen and not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if torch.is_tensor(value))


def test_timing_inside_inference_mode_and_autocast(monkeypatch, caplog):
    monkeypatch.setattr(measuring, "ROWS", (1,))
    monkeypatch.setattr(measuring, "_SLICE", 0)
    with torch.inference_mode(), torch.autocast("cpu"):
        report = peft_kernels.optimize(lora_model())
    assert all(layer.speed for layer in report if "dropout" not in layer.name) and not caplog.messages


def test_busy_machine(monkeypatch):
    monkeypatch.setattr(measuring, "ROWS", (1,))
    monkeypatch.setattr(measuring, "_SLICE", float("inf"))
    counts = iter(range(10**6))
    monkeypatch.setattr(measuring, "_preemptions", lambda: next(counts))
    report = peft_kernels.optimize(lora_model())
    assert {layer.verdict for layer in report} == {"fused"} and choices.load() in (
        {},
        {choices.machine_of(torch.device("cpu")): {}},
    )


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_clock_that_jumps(monkeypatch, jump):
    monkeypatch.setattr(measuring, "ROWS", (1,))
    monkeypatch.setattr(measuring, "_SLICE", 0)
    calls, clock = [], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append(0) or clock() + jump * (len(calls) > 20))
    report = peft_kernels.optimize(lora_model())
    for entries in choices.load().values():
        for entry in entries.values():
            assert all(max(entry[mode][name]) < 10 for mode in entry.keys() - {"weight"} for name in ("stock", "fused"))
    assert report.fused or report.left_alone


def test_budget_is_kept(clock):
    clock |= {(rows, trains): (rows * 1.0, rows * 0.5) for rows in ROWS for trains in (False, True)}
    report = peft_kernels.optimize(lora_model(), tune=30)
    (entries,) = choices.load().values()
    assert len(report) == 2 and {tuple(entry["training"]["rows"]) for entry in entries.values()} == {
        (1,)
    }  # 8 rows would take 84 s


def test_layer_that_can_not_be_timed(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("of the layer")

    monkeypatch.setattr(measuring, "_paired", fail)
    with caplog.at_level(logging.INFO, "peft_kernels"):
        report = peft_kernels.optimize(lora_model())
    assert {layer.verdict for layer in report} == {"fused"}
    assert len(caplog.messages) == 2 * 2 * len(ROWS) and caplog.messages[0].endswith(
        "was not timed: RuntimeError: of the layer"
    )


def test_file_that_can_not_be_written(clock, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "file" / "tuned.json"))
    with caplog.at_level(logging.WARNING, "peft_kernels"), pytest.warns(UserWarning, match="nothing of it is used"):
        report = peft_kernels.optimize(lora_model())
    assert by_name(report)["lin"].speed == "2.0×" and "what was measured is not kept" in caplog.text


def test_processes_that_do_not_know_of_each_other_measure_nothing(clock, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    report = peft_kernels.optimize(lora_model())
    assert {layer.verdict for layer in report} == {"fused"} and choices.load() == {}


def accelerate_as_rank(rank, folder, queue):
    os.environ.update(PEFT_KERNELS_CACHE=f"{folder}/{rank}.json", PEFT_KERNELS_TUNE="1")
    torch.set_num_threads(1)
    model_module.LEAST_PARAMETERS = 0
    measuring._FLUSHED_BYTES = 1 << 10
    measuring._seconds = lambda contender, *arguments: 1.0 + rank * hasattr(contender.layer, "stock")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    reports = [peft_kernels.optimize(lora_model()) for _ in range(2)]
    queue.put((rank, [layer.verdict for report in reports for layer in report]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_of_a_run_take_the_first_ones_choices(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=accelerate_as_rank, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    verdicts = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert verdicts[0] == verdicts[1] == ["fused, 1.0×"] * 4
    assert not (tmp_path / "1.json").exists()  # by itself it would have found stock to be twice as fast


def test_a_dropout_is_timed_where_the_model_is_and_devices_in_one_order(monkeypatch):
    model = lora_model(lora_dropout=0.5)
    model.other = lora_model()
    peft_kernels.optimize(model, tune=False)
    asked = []
    monkeypatch.setattr(choices, "machine_of", str)
    monkeypatch.setattr(measuring, "_learn", lambda trials, machine, seconds: asked.append((machine, len(trials))))
    layer = type(model.other.base_model.model.lin)
    monkeypatch.setattr(layer, "trial", lambda self: Trial(self, WIDTH, torch.float32, torch.device("cuda", 1)))
    measuring.choose(model, 10)
    assert asked == [("cpu", 2), ("cuda:1", 2)]  # the base and the dropout; the layers with adapters


class Card:
    """Stands for a device that the tensors of the CPU are on."""

    type = "cuda"

    def __eq__(self, other):
        return True

    __hash__ = None


def test_the_librarys_product_is_timed_on_a_card(monkeypatch):
    told = []
    monkeypatch.setattr(choices, "set_crossover", lambda *arguments: told.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card A")
    layer = lora_model().base_model.model.lin
    peft_kernels.optimize(layer, tune=False)
    contenders = measuring._contenders(layer.trial()._replace(device=Card()))
    assert (
        list(contenders) == ["stock", "fused", "library"] and contenders["fused"].layer is contenders["library"].layer
    )
    for contender in contenders.values():
        contender.prepare()
    assert told == [("Card A", 96, WIDTH, choices.UNBOUNDED, choices.UNBOUNDED), ("Card A", 96, WIDTH, 0, 0)]
    dense = lora_model(nn.Linear(WIDTH, 96)).base_model.model.lin
    peft_kernels.optimize(dense, tune=False)
    assert list(measuring._contenders(dense.trial()._replace(device=Card()))) == ["stock", "fused"]
