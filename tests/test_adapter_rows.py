"""`adapter_rows` with models of PEFT's: each row, or token, has its own adapter, and gets what that alone makes."""

import threading

import decoding_models
import pytest
import torch
from comparison import error
from concurrency import THREADS, differences
from optional import if_installed
from peft_models import randomize
from tiny_models import SAME_STEP, VOCABULARY

import peft_kernels
from peft_kernels import adapter_rows
from peft_kernels.integrations import registry

peft = if_installed("peft")

KINDS = ("dense", "4bit")
ROWS = ["b", None, "a", "dora", "b", "elsewhere", "a"]
ADAPTERS = {
    "a": {"r": 4, "target_modules": "all-linear"},
    "b": {"r": 7, "lora_alpha": 20, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"],
          "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "elsewhere": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "dora": {"r": 3, "target_modules": ["k_proj", "up_proj"], "use_dora": True},
}  # fmt: skip


def lora_model(base="dense", adapters=ADAPTERS, **config):
    """A model with several adapters of PEFT's, accelerated; all of them are trained."""
    model = decoding_models.make(base=base, lora=False)
    (first, options), *others = ((name, peft.LoraConfig(**options, **config)) for name, options in adapters.items())
    model = peft.get_peft_model(model, options, adapter_name=first)
    for name, options in others:
        model.add_adapter(name, options)
    randomize(model)
    peft_kernels.optimize(model)
    return train_all(model).eval()


def ia3_model(base="dense"):
    model = decoding_models.make(base=base, lora=False)
    options = [
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": []},
    ]
    model = peft.get_peft_model(model, peft.IA3Config(**options[0]), adapter_name="a")
    model.add_adapter("b", peft.IA3Config(**options[1] | {"feedforward_modules": ["down_proj"]}))
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    peft_kernels.optimize(model)
    return train_all(model).eval()


def train_all(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "ia3_" in name)
    return model


def ids(rows=7, length=9):
    return torch.randint(3, VOCABULARY, (rows, length))


def run(model, tokens, name, **kwargs):
    """A call of the model with one adapter, or none."""
    if name is None:
        with model.disable_adapter():
            return model(input_ids=tokens, **kwargs)
    model.set_adapter(name)
    train_all(model)
    return model(input_ids=tokens, **kwargs)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(actual, wanted, tolerance=SAME_STEP):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert error(actual[name], value) <= tolerance, name


@pytest.fixture
def logged(caplog):
    registry._logged.clear()
    return caplog.messages


MODELS = {"lora": (lora_model, ROWS), "ia3": (ia3_model, ["b", None, "a", "a", "b"])}


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_row_is_what_its_adapter_alone_makes(kind, base, logged):
    make, rows = MODELS[kind]
    model, tokens = make(base), ids(len(rows))
    with torch.no_grad():
        for length in (9, 1, 1):  # few rows take what the layers keep, decoder layers a plan of theirs
            some = tokens[:, :length]
            wanted = torch.cat([run(model, row[None], name).logits for row, name in zip(some, rows, strict=True)])
            with adapter_rows(model, rows):
                assert error(model(input_ids=some).logits, wanted) <= SAME_STEP
            assert error(model(input_ids=some).logits, wanted) > 10 * SAME_STEP  # of the active adapter again
    assert logged == []


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpoint", "reentrant"])
@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_each_adapter_alone(kind, base, checkpointing, logged):
    make, rows = MODELS[kind]
    model, tokens = make(base), ids(len(rows))
    weights = torch.randn(len(rows), tokens.shape[1], VOCABULARY)
    wanted = {}
    for name in dict.fromkeys(rows):
        own = [i for i, row in enumerate(rows) if row == name]
        if name is not None:
            (run(model, tokens[own], name).logits * weights[own]).sum().backward()
            wanted |= gradients(model)
    model.train()  # in which PEFT's argument is refused
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    with adapter_rows(model, rows):
        logits = model(input_ids=tokens).logits
    with adapter_rows(model, rows[::-1]):  # another call before the backward
        model(input_ids=tokens)
    (logits * weights).sum().backward()
    assert_same(gradients(model), wanted)
    assert logged == []


def test_checkpoints_recompute_in_another_thread():
    """As on a GPU, where autograd's own threads have no context of the caller's."""
    model, tokens = lora_model().train(), ids()
    with adapter_rows(model, ROWS):
        model(input_ids=tokens).logits.square().sum().backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with adapter_rows(model, ROWS):
        loss = model(input_ids=tokens).logits.square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same(gradients(model), wanted, 1e-6)


@pytest.mark.parametrize("base", KINDS)
def test_tokens_of_a_packed_row(base, logged):
    """Sequences that are packed into one row, with positions that begin anew and a mask that keeps them apart."""
    model, lengths, names = lora_model(base).train(), (4, 3, 5, 2), ("b", None, "dora", "a")
    parts = [ids(1, length) for length in lengths]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (owner[:, None] == owner).tril()[None, None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    wanted, grads = [], {}
    for part, name in zip(parts, names, strict=True):
        logits = run(model, part, name).logits
        wanted.append(logits.detach())
        if name is not None:
            logits.square().sum().backward()
            grads |= gradients(model)
    rows = [[names[i] for i in owner]]
    with adapter_rows(model, rows):
        logits = model(input_ids=torch.cat(parts, 1), position_ids=positions, attention_mask=seen).logits
    logits.square().sum().backward()
    assert error(logits, torch.cat(wanted, 1)) <= SAME_STEP
    assert_same(gradients(model), grads)
    assert logged == []


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("base", KINDS)
def test_generation(base, beams):
    model, rows = lora_model(base), ["b", None, "dora", "a"]
    tokens = ids(len(rows))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    wanted = []
    for row, name in zip(tokens, rows, strict=True):
        run(model, row[None], name)
        if name is None:
            with model.disable_adapter():
                wanted.append(model.generate(input_ids=row[None], **options))
        else:
            wanted.append(model.generate(input_ids=row[None], **options))
    with adapter_rows(model, [name for name in rows for _ in range(beams)]):
        assert torch.equal(model.generate(input_ids=tokens, **options), torch.cat(wanted))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_threads(count):
    model, tokens = lora_model(), ids(3)
    rows = [["a", None, "b"], ["b", "dora", "a"], ["elsewhere"] * 3, None]
    assert len(rows) == THREADS

    def call(number):
        if rows[number] is None:
            return model(input_ids=tokens).logits
        with adapter_rows(model, rows[number]):
            return model(input_ids=tokens).logits

    assert differences(call, count) == 0


def test_models_have_their_own_rows():
    first, second = lora_model(), lora_model()
    tokens = ids(2)
    with torch.no_grad():
        wanted = [run(second, tokens, "a").logits, run(first, tokens, "b").logits]
        second.set_adapter("a")
        with adapter_rows(first, ["b", "b"]):
            assert torch.equal(second(input_ids=tokens).logits, wanted[0])
            with adapter_rows(second, ["elsewhere", None]), adapter_rows(first, ["a", "a"]):
                pass
            assert error(first(input_ids=tokens).logits, wanted[1]) <= SAME_STEP
    assert not first._forward_hooks


def test_dropout_is_each_adapters_own():
    model = lora_model(adapters={"a": ADAPTERS["a"]}, lora_dropout=0.5)
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    peft_kernels.optimize(model)
    model.train()
    tokens = ids(2)
    with torch.no_grad(), adapter_rows(model, ["a", "b"]):
        first, second = (model(input_ids=tokens).logits for _ in range(2))
    assert torch.equal(first[1], second[1]) and error(first[0], second[0]) > 0.01


def test_compiles():
    torch.compiler.reset()
    model = lora_model()
    layer = decoding_models.lora_of(model)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(4, 5, layer.in_features)
    for rows in (["a", None, "b", "a"], ["b", "b", None, "elsewhere"]):
        with torch.no_grad(), adapter_rows(model, rows):
            assert error(compiled(x), layer(x)) <= 1e-6
            assert error(layer(x), model.base_model.disable_adapter_layers() or layer(x)) > 0.01
            model.base_model.enable_adapter_layers()


REMARKS = [
    (lambda: lora_model(lora_dropout=0.1), "in a mixed batch each DoRA that drops takes an operation of its own"),
    (ia3_model, "in a mixed batch torch multiplies with the vectors"),
]


@pytest.mark.parametrize(("make", "remark"), REMARKS, ids=["lora", "ia3"])
def test_the_report_says_what_is_not_one_operation(make, remark):
    remarks = {layer.name.split(".")[-1] for layer in peft_kernels.optimize(make()) if layer.reason == remark}
    assert remarks == ({"down_proj"} if make is ia3_model else {"k_proj", "up_proj"})
    assert not any("DoRA" in layer.reason for layer in peft_kernels.optimize(lora_model()))


def embedding(model):
    model.add_adapter("tokens", peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    peft_kernels.optimize(model)


def head(model):
    model.add_adapter("tokens", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    peft_kernels.optimize(model)


ERRORS = {
    "unknown": (None, ["a", "c"], "adapter_names: got 'c', wanted one of 'a', 'b', 'dora', 'elsewhere', '__base__'"),
    "text": (None, "ab", "adapter_names: got 'ab', wanted a list with a name for each row"),
    "ragged": (None, [["a"], ["a", "b"]], "wanted a list with a name for each row of the batch, or lists of equal"),
    "stock": (peft_kernels.restore, ["a", "b"], "model: got a peft.Linear that is not fused"),
    "embedding": (embedding, ["a", "tokens"], "model: got a peft.Embedding that is not fused"),
    "modules": (head, ["a", "tokens"], "model: got a peft.ModulesToSaveWrapper that is not fused"),
    "merged": (lambda model: model.merge_adapter(["b"]), ["a", "b"], r"model: got merged adapters \['b'\]"),
    "few": (None, ["a"], r"adapter_names: got names \[1\], wanted one for each row of the batch; x is \[2, 9, 64\]"),
    "tokens": (None, [["a"], ["b"]], r"adapter_names: got names \[2, 1\], wanted one for each row"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what):
    change, rows, message = ERRORS[what]
    model = lora_model()
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=message), adapter_rows(model, rows):
        model(input_ids=ids(2))
    assert not model._forward_hooks


def test_adapters_that_cannot_take_rows_are_no_one_elses_concern():
    model = lora_model()
    embedding(model)
    with adapter_rows(model, ["a", None]):
        model(input_ids=ids(2))
