"""Decoding with a static cache in a CUDA graph, on the emulator: whole steps are captured, and replays follow what
changes in the model's tensors."""

import peft
import ptx_emulator
import pytest
import torch
from attention_cases import on_gpu_plan
from captured import captured
from comparison import error
from decoding_models import make, quantised, with_cache
from peft_models import randomize
from tiny_models import SAME_STEP, tiny
from transformers import StaticCache

import peft_kernels
import peft_kernels.integrations.transformers.attention as integration
from peft_kernels.inference import shared_input

PROMPT, STEPS = 5, 3
IDS = torch.tensor([[7, 3, 11, 25, 9, 30, 4, 51]])


class Decoder:
    """One-token steps after a prompt, on tensors that stay where they are, as a captured graph needs them."""

    def __init__(self, model):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=16)
        self.token, self.position = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        self.run(IDS[:, :PROMPT], torch.arange(PROMPT)[None])
        self.set(PROMPT)

    def run(self, ids, positions):
        return self.model(ids, position_ids=positions, **with_cache(self.cache)).logits[:, -1]

    def step(self):
        return self.run(self.token, self.position)

    def set(self, i):
        self.token.copy_(IDS[:, i : i + 1])
        self.position.fill_(i)

    def capture(self):
        """The graph of a step, and the logits that it leaves."""
        with captured() as graph:
            logits = self.step()
        assert sum(func.namespace == "peft_kernels" for func, *_ in graph.calls) > 10
        return graph, logits


@pytest.fixture
def launches(monkeypatch):
    """The CPU plays the GPU; gives the kernels that were launched since the last call."""
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    from ptx_emulator.ops import emulated

    monkeypatch.setattr(integration, "takes_over", lambda device: False)
    on_gpu_plan(monkeypatch)
    with emulated() as take:
        yield lambda: [launch["kernel"] for launch in take()]


@pytest.fixture
def model(launches):
    """A 4-bit model with LoRA, in fp32."""
    model = make("llama", "4bit")
    peft_kernels.optimize(model)
    return model


@torch.no_grad()
def test_replays_decode(model):
    decoder = Decoder(model)
    graph, logits = decoder.capture()
    for i in range(PROMPT, PROMPT + STEPS):
        if i > PROMPT:
            decoder.set(i)
            graph.replay()
        assert error(logits, model(IDS[:, : i + 1], use_cache=False).logits[:, -1]) < SAME_STEP


@torch.no_grad()
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "no-lora"])
def test_layers_of_one_x_share_launches(launches, monkeypatch, lora):
    """Each decoder layer's linear layers: q, k and v, then o, then gate and up, then down."""
    model = quantised(tiny("llama", hidden=64, intermediate=128).bfloat16(), torch.bfloat16)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        randomize(model)
    peft_kernels.optimize(model.eval())

    def count():
        of_linears = [name for name in launches() if "lora_shrink" in name or "few_rows" in name]
        return len(of_linears) / model.config.num_hidden_layers / (2 if lora else 1)

    decoder, one_by_one = Decoder(model), Decoder(model)
    count()
    graph, logits = decoder.capture()
    assert count() == 4
    monkeypatch.setattr(shared_input, "is_worthwhile", lambda x: False)
    assert torch.equal(logits, one_by_one.step())
    assert count() == 7
    for each in (decoder, one_by_one):
        each.set(PROMPT + 1)
    graph.replay()
    assert torch.equal(logits, one_by_one.step())


@torch.no_grad()
def test_replays_follow_an_adapter_that_changes(model):
    decoder, eager = Decoder(model), Decoder(model)
    graph, logits = decoder.capture()
    eager.step()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(-2)
    for one in (decoder, eager):
        one.set(PROMPT + 1)
    graph.replay()
    assert error(logits, eager.step()) < SAME_STEP


def test_replays_draw_new_dropout_masks(model):
    model.train()
    with captured() as graph:
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    before = loss.item()
    graph.replay()
    assert loss.item() != before
    torch.manual_seed(5)
    graph.replay()
    got = [loss.clone(), *(grad.clone() for grad in grads)]
    torch.manual_seed(5)
    model.zero_grad()
    wanted = model(IDS, labels=IDS).loss
    wanted.backward()
    for one, other in zip(got, [wanted, *(p.grad for p in model.parameters() if p.requires_grad)], strict=True):
        assert torch.equal(one, other)
