"""What a call of a model with adapters runs is its own: in several threads, and when its layers are recomputed."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from adapter_models import make_inputs, make_model, randomize
from concurrency import COUNTS, THREADS, differences, in_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels.adapters import KINDS
from peft_kernels.nn import AdapterFusion

ROWS = (["a", None, "b"], ["b", "a", "a"], [None, None, None], ["b", "b", "b"])


def adapted_model(name, kind, **options):
    """A model with the adapters 'a' and 'b', perhaps fused, and no dropout of its own."""
    model = make_model(name)
    for module in model.modules():
        for attribute in ("p", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, "pfeiffer" if kind == "fusion" else kind, bottleneck=8, name=adapter)
    if kind == "fusion":
        peft_kernels.fuse_adapters(model, ["a", "b"], **options)
    randomize(model, "a", "b", "a,b")
    return model


# ---- Threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 20), ("bert", 20), pytest.param("bert", 200, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("rows", ["one", "argument", "entered"])
@pytest.mark.parametrize("kind", [*KINDS, "fusion"])
def test_threads(name, kind, rows, count):
    model = adapted_model(name, kind)
    inputs = [make_inputs(name) for _ in range(THREADS)]

    def call(number):
        if rows == "one":
            return model(**inputs[number]).logits
        if rows == "argument":
            return model(**inputs[number], adapter_names=ROWS[number]).logits
        with peft_kernels.adapter_rows(model, ROWS[number]):
            return model(**inputs[number]).logits

    assert differences(call, count) == 0


@pytest.mark.parametrize("count", COUNTS)
def test_threads_that_differ_in_kind(count):
    """Calls with and without rows at once, of the model and of a part of it."""
    model = adapted_model("bert", "parallel")
    inputs = [make_inputs("bert") for _ in range(THREADS)]

    def call(number):
        if number == 0:
            return model(**inputs[0]).logits
        if number == 1:
            return model.bert(**inputs[1]).last_hidden_state
        return model(**inputs[number], adapter_names=ROWS[number - 2]).logits

    assert differences(call, count) == 0


def test_adapter_that_another_thread_chooses():
    """A call runs the adapter that was active when it began."""
    model, inputs = adapted_model("llama", "houlsby"), make_inputs("llama")
    wanted = {}
    for adapter in ("a", "b", None):
        peft_kernels.set_adapter(model, adapter)
        wanted[adapter] = model(**inputs).logits.detach()

    def work(number):
        for _ in range(30):
            if number == 0:
                for adapter in wanted:
                    peft_kernels.set_adapter(model, adapter)
            else:
                logits = model(**inputs).logits
                assert any(torch.equal(logits, each) for each in wanted.values())

    in_threads(work)


def test_replicas_have_their_own_layers():
    """torch.nn.DataParallel runs shallow copies of modules, with the same hooks, on copies of the parameters."""
    model, inputs = adapted_model("bert", "parallel"), make_inputs("bert")
    peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8, name="c")
    randomize(model, "c")
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            # As the broadcast has it, with other values in the adapters.
            copied = None if parameter is None else parameter.detach() * (1.5 if parameter.requires_grad else 1.0)
            setattr(replica, name, copied)
    with torch.no_grad():
        got = {rows: replicas[model](**inputs, adapter_names=[rows] * 3).logits for rows in ("a", "c")}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        for rows, logits in got.items():
            assert torch.equal(logits, model(**inputs, adapter_names=[rows] * 3).logits)


# ---- Contexts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_coroutines_have_their_own_rows():
    model, inputs = adapted_model("bert", "houlsby"), make_inputs("bert")
    wanted = [model(**inputs, adapter_names=rows).logits for rows in ROWS]

    async def call(rows):
        with peft_kernels.adapter_rows(model, rows):
            await asyncio.sleep(0)
            here = model(**inputs).logits
            await asyncio.sleep(0)
            return here, await asyncio.to_thread(torch.no_grad()(lambda: model(**inputs).logits))

    async def run():
        return await asyncio.gather(*map(call, ROWS))

    for results, each in zip(asyncio.run(run()), wanted, strict=True):
        assert all(torch.equal(result, each) for result in results)


@torch.no_grad()
def test_generators_may_end_in_any_order():
    model, inputs = adapted_model("bert", "houlsby"), make_inputs("bert")
    wanted = [model(**inputs, adapter_names=rows).logits for rows in ROWS]
    bare = model(**inputs).logits

    def calls(rows):
        with peft_kernels.adapter_rows(model, rows):
            while True:
                yield model(**inputs).logits

    first, second = calls(ROWS[0]), calls(ROWS[1])
    assert torch.equal(next(first), wanted[0]) and torch.equal(next(second), wanted[1])
    first.close()
    assert torch.equal(next(second), wanted[1])
    second.close()
    assert torch.equal(model(**inputs).logits, bare)


@torch.no_grad()
def test_call_that_is_interrupted():
    """No hook of torch's follows a KeyboardInterrupt."""
    model, inputs = adapted_model("bert", "parallel"), make_inputs("bert")
    wanted, part = model(**inputs).logits, model.bert(**inputs).last_hidden_state

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.bert.encoder.layer[1].output.dense.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, adapter_names=ROWS[1])
    handle.remove()
    assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model.bert(**inputs).last_hidden_state, part)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiled_with_rows_that_were_entered(part):
    """Compiles the whole model, or only a layer of it."""
    model, inputs = adapted_model("bert", "parallel"), make_inputs("bert")
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = [model(**inputs, adapter_names=rows).logits for rows in ROWS[:2]]
        compiled = model if part == "model" else model.bert.encoder.layer[1]
        compiled.compile(fullgraph=True, backend="aot_eager")
        for again in (False, True):
            with torch._dynamo.config.patch(error_on_recompile=again):
                for rows, each in zip(ROWS, wanted, strict=False):
                    torch.testing.assert_close(model(**inputs, adapter_names=rows).logits, each)
                    with peft_kernels.adapter_rows(model, rows):
                        torch.testing.assert_close(model(**inputs).logits, each)


# ---- Recomputation --------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A model that checkpoints its blocks by itself, or the whole of them."""

    def __init__(self, options=None, whole=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)) for _ in range(3))
        self.options, self.whole = options, whole

    def forward(self, x):
        if self.options is None:
            return self.run(x)
        if self.whole:
            return checkpoint(self.run, x, **self.options)
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: x + block(x), x, **self.options)
        return x

    def run(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def blocks_with(kind, **options):
    model = Blocks()
    series = "houlsby" if kind == "fusion" else kind
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, series, 4, targets=r"blocks\.\d", name=adapter)
    if kind == "fusion":
        peft_kernels.fuse_adapters(model, ["a", "b"], **options)
    randomize(model, "a", "b", "a,b")
    return model.train()


def gradients_of(model):
    found = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for path, gradient in wanted.items():
        torch.testing.assert_close(got[path], gradient, rtol=1e-5, atol=1e-6)


def preferences(run, model, x):
    """Two forwards with different adapters, one of a reference, and then the backward of all of them."""
    chosen = run(model, x[0], adapter_names=ROWS[0])
    rejected = run(model, x[1], adapter_names=ROWS[1])
    with torch.no_grad():
        reference = run(model, x[0], adapter_names=[None] * 3)
    ((chosen - reference).square().mean() - 0.5 * rejected.square().mean()).backward()
    run(model, x[0])
    return gradients_of(model)


FORMS = [{"use_reentrant": False}, {"use_reentrant": True}]
form = pytest.mark.parametrize("options", FORMS, ids=["saved", "reentrant"])


@form
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_recomputed(kind, whole, options):
    model, x = blocks_with(kind), torch.randn(2, 3, 5, 12, requires_grad=True)

    def run(model, x, **kwargs):
        return model(x, **kwargs)

    wanted = preferences(run, model, x)
    model.options, model.whole = options, whole
    assert_same(preferences(run, model, x), wanted)
    assert wanted and all(gradient.abs().sum() > 0 for gradient in wanted.values())


@form
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_rows_are_recomputed_in_transformers(name, kind, options):
    model, x = adapted_model(name, kind).train(), [make_inputs(name) for _ in range(2)]
    model.enable_input_require_grads()

    def run(model, x, **kwargs):
        return model(**x, **kwargs).logits

    wanted = preferences(run, model, x)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)
    assert_same(preferences(run, model, x), wanted)


@form
def test_rows_of_a_model_within_a_checkpoint(options):
    model, x = blocks_with("parallel"), torch.randn(2, 3, 5, 12, requires_grad=True)

    def run(model, x, **kwargs):
        return model(x, **kwargs).tanh()

    def run_again(model, x, **kwargs):
        return checkpoint(lambda x: run(model, x, **kwargs), x, **options)

    assert_same(preferences(run_again, model, x), preferences(run, model, x))


@form
def test_rows_that_were_entered_are_recomputed(options):
    model, x = blocks_with("parallel"), torch.randn(3, 5, 12, requires_grad=True)

    def gradients():
        with peft_kernels.adapter_rows(model, ROWS[0]):
            loss = model(x).square().mean()
        model(x, adapter_names=ROWS[1])
        loss.backward()
        return gradients_of(model)

    wanted = gradients()
    model.options = options
    assert_same(gradients(), wanted)


@form
def test_the_active_adapter_is_recomputed(options):
    model, x = blocks_with("houlsby"), torch.randn(3, 5, 12, requires_grad=True)

    def gradients():
        peft_kernels.set_adapter(model, "a")
        loss = model(x).square().mean()
        peft_kernels.set_adapter(model, "b")
        peft_kernels.unfreeze_adapters(model)
        loss.backward()
        return gradients_of(model)

    wanted = gradients()
    assert wanted and all(".adapters.a." in path for path in wanted)
    model.options = options
    assert_same(gradients(), wanted)


@form
def test_backward_in_another_thread(options):
    """As a GPU's is, in a thread of autograd's."""
    model, x = blocks_with("parallel"), torch.randn(2, 3, 5, 12, requires_grad=True)

    def gradients():
        losses = [model(part, adapter_names=rows).square().mean() for part, rows in zip(x, ROWS, strict=False)]
        thread = threading.Thread(target=sum(losses).backward)
        thread.start()
        thread.join()
        return gradients_of(model)

    wanted = gradients()
    model.options = options
    assert_same(gradients(), wanted)


@form
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_temperature_decays_once_for_a_forward(whole, options):
    model, x = blocks_with("fusion", temperature=8.0, temperature_decay=1.5), torch.randn(2, 3, 5, 12)
    x.requires_grad_()
    fusions = [module for module in model.modules() if isinstance(module, AdapterFusion)]

    def gradients():
        for fusion in fusions:
            fusion.temperature = 8.0
        losses = [model(part).square().mean() for part in x]
        with torch.no_grad():
            model.eval()(x[0])
        model.train()
        for loss in losses:
            loss.backward()
        assert {fusion.temperature for fusion in fusions} == {5.0}
        return gradients_of(model)

    wanted = gradients()
    model.options, model.whole = options, whole
    assert_same(gradients(), wanted)


@form
def test_temperature_of_a_fusion_by_itself(options):
    layer = AdapterFusion(6, temperature=4.0, temperature_decay=1.0).train()
    x, outputs = torch.randn(2, 6, requires_grad=True), [torch.randn(2, 6) for _ in range(2)]
    layer(x, outputs).square().sum().backward()
    wanted = gradients_of(layer)
    layer.temperature = 4.0
    checkpoint(layer, x, outputs, **options).square().sum().backward()
    assert layer.temperature == 3.0
    assert_same(gradients_of(layer), wanted)


def test_call_is_freed_with_its_graph():
    model, x = blocks_with("parallel"), torch.randn(3, 5, 12, requires_grad=True)
    model.options = FORMS[0]
    gc.collect()
    gc.disable()
    try:
        y = model(x, adapter_names=ROWS[0])
        call = weakref.ref(y.grad_fn.metadata["peft_kernels.adapters.call"])
        assert call().rows == ("a", "__base__", "b")
        del y
        assert call() is None
    finally:
        gc.enable()
