"""Adapters in DistributedDataParallel: two processes train what one does with all of the batch."""

import pytest
import torch
from adapter_models import make_model, randomize
from processes import found_by

import peft_kernels

STEPS, ROWS = 3, 4


def fused(model):
    peft_kernels.fuse_adapters(model, ["a", "b"])


def chosen(model):
    peft_kernels.set_adapter(model, "a")


def fused_and_chosen(model):
    peft_kernels.fuse_adapters(model, ["a", "b"])
    peft_kernels.set_adapter(model, "b")


def chosen_and_fused(model):
    peft_kernels.fuse_adapters(model, ["a", "b"])
    peft_kernels.set_adapter(model, None)
    peft_kernels.set_adapter(model, "a,b")


def base_with_its_head(model):
    peft_kernels.set_adapter(model, None)
    model.classifier.requires_grad_(True)


def named(model):
    peft_kernels.unfreeze_adapters(model, "a", "b")
    return ["a", "b", "a", "b"]


CASES = {case.__name__: case for case in (fused, chosen, fused_and_chosen, chosen_and_fused, base_with_its_head, named)}


def train(case, own_rows, wrapped=lambda model: model):
    """The gradients of each step, by name."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make_model("bert")  # in evaluation mode, without its dropouts
    for name in ("a", "b", "c"):
        peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8, name=name)
    peft_kernels.remove_adapters(model, "c")
    names = CASES[case](model)
    randomize(model, "a", "b", "a,b")
    inputs, labels = torch.randint(3, 40, (STEPS, ROWS, 6)), torch.randint(2, (STEPS, ROWS))
    rows = {} if names is None else {"adapter_names": names[own_rows]}
    parallel = wrapped(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for x, y in zip(inputs, labels, strict=True):
        optimizer.zero_grad()
        parallel(input_ids=x[own_rows], labels=y[own_rows], **rows).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return found


def train_in_parallel(rank, folder):
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = {}
    for case in CASES:
        try:
            found[case] = train(case, half, torch.nn.parallel.DistributedDataParallel)
        except RuntimeError as error:
            found[case] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found for every case."""
    return found_by(train_in_parallel, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, ranks):
    for found in ranks:
        assert not isinstance(found[case], str), found[case]
    for first, second, whole in zip(ranks[0][case], ranks[1][case], train(case, slice(None)), strict=True):
        assert whole and set(first) == set(second) == set(whole)
        for name, gradient in whole.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)
