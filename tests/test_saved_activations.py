"""What an accelerated model keeps for its backward: an x that several layers read is kept once."""

import pytest
import torch
from comparison import saved_for_backward, short
from decoding_models import layers_of, quantised
from optional import if_installed
from peft_models import randomize
from tiny_models import tiny

import peft_kernels

peft = if_installed("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BATCH, LENGTH, HIDDEN, FFN, RANK = 2, 48, 64, 128, 4
ROWS = BATCH * LENGTH
GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
OPTIONS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.1},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.1},
}
MIXED = ("lora", "dropout", "lora_bias", "dora")  # the samples of a DoRA that drops are an operation of their own


def decoder_layer(base, dtype, accelerated=True, **options):
    model = tiny("llama", hidden=HIDDEN, intermediate=FFN).to(dtype)
    if base == "4bit":
        model = quantised(model, dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", **options)).train()
    randomize(model)
    if accelerated:
        peft_kernels.optimize(model)
    return model, layers_of(model)[0]


def known_to(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("what", [*OPTIONS, *(f"{name}-mixed" for name in MIXED)])
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_layers_keep_the_x_that_they_share_once(base, what):
    what, mixed = what.removesuffix("-mixed"), what.endswith("-mixed")
    dtype = torch.bfloat16
    model, layer = decoder_layer(base, dtype, **OPTIONS[what])
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)
    rows = ["default"] * BATCH if mixed else None
    for block, names in GROUPS.items():
        layers = [getattr(getattr(layer, block), name) for name in names]
        kept = {"adapter_names": rows} if mixed else {}
        _, saved = saved_for_backward(lambda: sum(each(x, **kept).sum() for each in layers), known_to(model))  # noqa: B023
        assert saved.pop(x.untyped_storage().data_ptr()) == ROWS * HIDDEN * dtype.itemsize
        if "use_dora" not in OPTIONS[what]:
            # The rest is x Aᵀ in fp32, and what has no rows: seeds, an index, biases.
            assert sum(saved.values()) <= len(names) * (4 * ROWS * RANK + 64 + 8 * BATCH + 4 * 2 * FFN)
        # Of a DoRA also x Wᵀ, for its magnitude.
        wide = [size for size in saved.values() if size >= ROWS * min(each.out_features for each in layers) * 2]
        assert len(wide) == ("use_dora" in OPTIONS[what]) * len(names)


def saved_by_layer(*args, **options):
    model, layer = decoder_layer(*args, **options)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=args[1], requires_grad=True)
    positions = torch.arange(LENGTH)[None]
    angles = model.get_base_model().model.rotary_emb(x, positions)
    call = {"position_embeddings": angles, "position_ids": positions, "attention_mask": None}
    return sum(saved_for_backward(lambda: layer(x, **call), [*known_to(model), *angles])[1].values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_bytes_of_a_decoder_layer(base, dtype, dropout):
    """Two norms' inputs and outputs, q, k, v and what is attended to; of the MLP gate, up and their product."""
    kept = saved_by_layer(base, dtype, lora_dropout=dropout)
    wide = dtype.itemsize * ROWS * (4 * HIDDEN + 2 * HIDDEN + 2 * HIDDEN // 2 + 3 * FFN)
    narrow = 4 * ROWS * (7 * RANK + 2 + 4) + 1024  # x Aᵀ, the norms, the softmax of 4 heads; and seeds
    angles = 2 * dtype.itemsize * LENGTH * HIDDEN // 4
    assert wide < kept <= wide + narrow + angles
    stock = saved_by_layer(base, dtype, accelerated=False, lora_dropout=dropout)
    assert kept < (0.62 if dropout else 0.95) * stock if dtype is torch.float32 else kept < 0.62 * stock
