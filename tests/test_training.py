"""AdapterTrainer: adapters that are trained in the same batches move as each does in a run of its own."""

import copy
import dataclasses

import pytest
import torch
from comparison import error
from optional import if_installed
from test_adapter_rows import ADAPTERS, KINDS, ia3_model, ids, lora_model
from tiny_models import SAME_STEP, VOCABULARY

import peft_kernels
from peft_kernels import AdapterSettings, AdapterTrainer

peft = if_installed("peft")

IGNORED = -100
# Each batch's rows; an adapter is missing from some of them, and some rows have none.
BATCHES = (["b", None, "a", "dora", "b", "elsewhere", "a"], ["a", "a", "dora", None, "dora", "a", "a"],
           ["elsewhere", "b", "b", "a", "b", "b", "elsewhere"])  # fmt: skip
SETTINGS = {
    "a": AdapterSettings(lr=1e-2, weight_decay=0.1, max_norm=0.5),
    "b": AdapterSettings(lr=3e-3, loss_scale=0.25, schedule=lambda step: 1 / (1 + step)),
    "elsewhere": AdapterSettings(lr=2e-2, options={"betas": (0.8, 0.9)}, max_norm=100),
    "dora": AdapterSettings(lr=1e-2),
}


# Steps that are long beside the rounding of what they move.
LONG = {name: dataclasses.replace(own, lr=100 * own.lr, options={}) for name, own in SETTINGS.items()}
sgd = torch.optim.SGD


def make_batches(rows=BATCHES):
    """Tokens, and labels with some that do not count."""
    batches = []
    for names in rows:
        tokens = ids(len(names))
        batches.append((names, tokens, tokens.masked_fill(torch.rand(tokens.shape) < 0.3, IGNORED)))
    return batches


def parameters(model, name):
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}." in key or key.endswith(name)}


def run_alone(model, name, own, batches, optimizer, before_step=lambda model: None):
    """A plain run of PEFT's on an adapter's own rows; the losses."""
    model.set_adapter(name)
    trained = [p for p in model.parameters() if p.requires_grad]
    group = {"params": trained, "lr": own.lr, "weight_decay": own.weight_decay, **own.options}
    optimizer = optimizer([group])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, own.schedule or (lambda step: 1.0))
    losses = []
    for names, tokens, labels in batches:
        chosen = [i for i, row in enumerate(names) if row == name]
        if not chosen:
            losses.append(None)
            continue
        loss = model(input_ids=tokens[chosen], labels=labels[chosen]).loss
        (own.loss_scale * loss).backward()
        if own.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, own.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def assert_as_alone(model, settings, batches, optimizer=torch.optim.AdamW, prepare=lambda model: None, limit=SAME_STEP):
    alone = {name: copy.deepcopy(model) for name in settings}
    before = {name: parameters(model, name) for name in settings}
    prepare(model)
    with AdapterTrainer(model, settings, optimizer) as trainer:
        found = []
        for names, tokens, labels in batches:
            found.append(trainer.backward(names, labels, input_ids=tokens))
            trainer.step()
    for name, own in settings.items():
        losses = run_alone(alone[name], name, own, batches, optimizer)
        for step, loss in enumerate(losses):
            assert found[step].get(name) == (None if loss is None else pytest.approx(loss, rel=1e-4))
        wanted, got = parameters(alone[name], name), parameters(model, name)
        assert got and got.keys() == wanted.keys()
        for key, value in wanted.items():
            moved = value - before[name][key]
            assert error(got[key] - before[name][key], moved) <= limit, key


@pytest.mark.parametrize("base", KINDS)
def test_gradients_are_those_of_separate_runs(base):
    """Steps of SGD are gradients; of different ranks, layers and kinds of adapters."""
    assert_as_alone(lora_model(base), LONG, make_batches(), sgd)


@pytest.mark.parametrize("base", KINDS)
def test_adamw_steps_are_those_of_separate_runs(base):
    # Adam divides a gradient by its own size, rounding included.
    assert_as_alone(lora_model(base), SETTINGS, make_batches(), limit=1e-2)


def test_ia3_steps_are_those_of_separate_runs():
    settings = {"a": AdapterSettings(lr=0.1), "b": AdapterSettings(lr=0.05, max_norm=0.1)}
    assert_as_alone(ia3_model(), settings, make_batches([["b", None, "a"], ["a", "a", "a"]]), sgd)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    def checkpoint(model):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    assert_as_alone(lora_model(), LONG, make_batches(), sgd, checkpoint)


def test_eight_adapters():
    """One of each rank, on every layer."""
    options = {f"n{r}": {"r": r, "target_modules": "all-linear"} for r in range(1, 9)}
    rows = [[*options], [*options][::-1]]
    assert_as_alone(lora_model("4bit", options), dict.fromkeys(options, AdapterSettings(lr=1)),
                    make_batches(rows), sgd)  # fmt: skip


def test_an_adapter_without_rows_does_not_move():
    model = lora_model()
    (names, tokens, labels), batch = make_batches()[:2]
    with AdapterTrainer(model, {name: AdapterSettings(weight_decay=0.1) for name in ADAPTERS}) as trainer:
        trainer.backward(names, labels, input_ids=tokens)
        trainer.step()
        missing = [name for name in ADAPTERS if name not in batch[0]]
        before = {name: parameters(model, name) for name in ADAPTERS}
        states = copy.deepcopy({id(p): state for p, state in trainer.optimizer.state.items()})
        trainer.backward(*batch[::2], input_ids=batch[1])
        trainer.step()
        groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert missing == ["b", "elsewhere"]
    for name in ADAPTERS:
        now = parameters(model, name)
        assert all(torch.equal(now[key], value) for key, value in before[name].items()) == (name in missing)
        assert groups[name]["steps"] == 2 - (name in missing)
    for name in missing:
        for parameter in groups[name]["params"]:
            old, new = states[id(parameter)], trainer.optimizer.state[parameter]
            assert all(torch.equal(new[key], value) for key, value in old.items())


def test_accumulated_batches_are_one_batch():
    model, (names, tokens, labels) = lora_model(), make_batches()[0]
    together, apart = copy.deepcopy(model), model
    with AdapterTrainer(together, LONG, sgd) as trainer:
        trainer.backward(names, labels, input_ids=tokens)
        trainer.step()
    with AdapterTrainer(apart, LONG, sgd) as trainer:
        for part in (slice(0, 2), slice(2, 6), slice(6, 7)):
            trainer.backward(names[part], labels[part], input_ids=tokens[part])
        trainer.step()
    for name in LONG:
        for (key, got), want in zip(parameters(apart, name).items(), parameters(together, name).values(), strict=True):
            assert error(got, want) <= 1e-5, key


def test_packed_rows():
    """A token whose next one is another adapter's has no loss, as at the end of a run's own row."""
    settings = {"a": AdapterSettings(lr=1e-2), "b": AdapterSettings(lr=1e-2)}
    model = lora_model()
    apart, parts, names = copy.deepcopy(model), [ids(1, 4), ids(1, 5)], ["a", "b"]
    with AdapterTrainer(apart, settings, sgd) as trainer:
        for part, name in zip(parts, names, strict=True):
            wanted = trainer.backward([name], part, input_ids=part)
        trainer.step()
    owner = torch.tensor([0] * 4 + [1] * 5)
    inputs = {"attention_mask": (owner[:, None] == owner).tril()[None, None],
              "position_ids": torch.tensor([[*range(4), *range(5)]])}  # fmt: skip
    tokens = torch.cat(parts, 1)
    with AdapterTrainer(model, settings, sgd) as trainer:
        got = trainer.backward([[names[i] for i in owner]], tokens, input_ids=tokens, **inputs)
        trainer.step()
    assert got["b"] == pytest.approx(wanted["b"], rel=1e-4)
    for name in settings:
        for (key, value), want in zip(parameters(model, name).items(), parameters(apart, name).values(), strict=True):
            assert error(value, want) <= SAME_STEP, key


def test_autocast():
    model, (names, tokens, labels) = lora_model("4bit"), make_batches()[0]
    alone = {name: copy.deepcopy(model) for name in ("a", "b")}
    with AdapterTrainer(model, LONG, sgd) as trainer, torch.autocast("cpu", torch.bfloat16):
        found = trainer.backward(names, labels, input_ids=tokens)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for name, other in alone.items():
        chosen = [i for i, row in enumerate(names) if row == name]
        other.set_adapter(name)
        with torch.autocast("cpu", torch.bfloat16):
            loss = other(input_ids=tokens[chosen], labels=labels[chosen]).loss
        loss.backward()
        assert found[name] == pytest.approx(loss.item(), rel=0.02)
        count = (labels[chosen, 1:] != IGNORED).sum()
        for key, parameter in other.named_parameters():
            if parameter.grad is not None:
                assert error(gradients[key] / count, parameter.grad) <= 0.05, key


def test_dropout_is_drawn_for_each_adapter():
    """Masks differ from those of separate runs, but not in what they do on average."""
    adapters = {"a": {"r": 4, "target_modules": ["down_proj"]}, "b": {"r": 4, "target_modules": ["down_proj"]}}
    model, rounds = lora_model(adapters=adapters, lora_dropout=0.5), 60
    tokens = ids(2)
    settings = dict.fromkeys(adapters, AdapterSettings())
    with AdapterTrainer(model, settings) as trainer:
        without = trainer.evaluate(["a", "b"], tokens, input_ids=tokens)
        model.train()
        found = [trainer.evaluate(["a", "b"], tokens, input_ids=tokens) for _ in range(rounds)]
        again = []
        for _ in range(2):
            torch.manual_seed(5)
            again.append(trainer.evaluate(["a", "b"], tokens, input_ids=tokens))
    assert again[0] == again[1]
    for name in adapters:
        values = torch.tensor([losses[name] for losses in found])
        assert values.std() > 0
        model.set_adapter(name)
        row = tokens[[*adapters].index(name)][None]
        with torch.no_grad():
            alone = torch.stack([model(input_ids=row, labels=row).loss for _ in range(rounds)])
        spread = (values.var() / rounds + alone.var() / rounds).sqrt()
        assert (values.mean() - alone.mean()).abs() < 5 * spread
        assert values.mean() != without[name]


def test_losses_of_ones_own():
    """A loss for each row, as a classifier has."""

    def of_rows(outputs, labels):
        return torch.nn.functional.cross_entropy(outputs.logits[:, -1], labels, reduction="none"), labels >= 0

    model, tokens = lora_model(), ids(4)
    labels = torch.tensor([1, 2, -1, 3])
    with AdapterTrainer(model, SETTINGS, token_losses=of_rows) as trainer:
        found = trainer.backward(["a", "b", "a", "b"], labels.clamp(min=0), input_ids=tokens)
        logits = peft_logits(model, ["a", "b", "a", "b"], tokens)[:, -1]
    each = torch.nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    assert found == {"a": pytest.approx(each[::2].mean().item(), rel=1e-4),
                     "b": pytest.approx(each[1::2].mean().item(), rel=1e-4)}  # fmt: skip


def peft_logits(model, names, tokens):
    with torch.no_grad(), peft_kernels.adapter_rows(model, names):
        return model(input_ids=tokens).logits


def test_saves_what_peft_loads(tmp_path):
    model, (names, tokens, labels) = lora_model(), make_batches()[0]
    fresh = copy.deepcopy(model)
    with AdapterTrainer(model, SETTINGS) as trainer:
        trainer.backward(names, labels, input_ids=tokens)
        trainer.step()
        trainer.save(tmp_path)
    base = fresh.unload()
    model.set_adapter("b")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "b")
        assert error(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits) <= SAME_STEP
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {*SETTINGS}


def test_freezes_what_is_not_trained_and_puts_it_back():
    model = lora_model()
    model.set_adapter("b")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with AdapterTrainer(model, {"a": AdapterSettings(), "dora": AdapterSettings()}):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name in before if ".a." in name or ".dora." in name}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


ERRORS = {
    "nothing": (lambda model: AdapterTrainer(model, {}), ValueError, "settings: got none"),
    "unknown": (lambda model: AdapterTrainer(model, {"c": AdapterSettings()}), ValueError,
                "settings: got 'c', wanted one of 'a', 'b', 'dora', 'elsewhere'"),
    "scale": (lambda model: AdapterTrainer(model, {"a": AdapterSettings(loss_scale="x")}), ValueError,
              "wanted numbers for loss_scale and max_norm"),
    "max_norm": (lambda model: AdapterTrainer(model, {"a": AdapterSettings(max_norm=-1.0)}), ValueError,
                 "settings: got .*, wanted a max_norm of at least 0"),
    "lr": (lambda model: AdapterTrainer(model, {"a": AdapterSettings(lr="1e-4")}), ValueError,
           "settings: got .*, wanted numbers for lr and weight_decay"),
    "schedule": (lambda model: AdapterTrainer(model, {"a": AdapterSettings(schedule=3)}), ValueError,
                 "settings: got .*, wanted a callable, or None, for schedule"),
    "settings": (lambda model: AdapterTrainer(model, ["a"]), ValueError, r"settings: got \['a'\], wanted"),
    "token_losses": (lambda model: AdapterTrainer(model, SETTINGS, token_losses=3), ValueError,
                     "token_losses: got 3, wanted a callable"),
    "module": (lambda model: AdapterTrainer(3, SETTINGS), TypeError, "model: got int, wanted a torch.nn.Module"),
    "names": (lambda model: AdapterTrainer(model, SETTINGS).backward(["c"], ids(1), input_ids=ids(1)), ValueError,
              "names: got 'c', wanted one of 'a', 'b', 'elsewhere', 'dora', or None"),
    "rows": (lambda model: AdapterTrainer(model, SETTINGS).backward(["a"], ids(2), input_ids=ids(2)), ValueError,
             "adapter_names: got names"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what):
    call, kind, message = ERRORS[what]
    with pytest.raises(kind, match=message):
        call(lora_model())


def test_vocabulary_is_what_the_labels_are_of():
    model, tokens = lora_model(), ids(1)
    with AdapterTrainer(model, SETTINGS) as trainer, pytest.raises(IndexError):
        trainer.backward(["a"], tokens + VOCABULARY, input_ids=tokens)
