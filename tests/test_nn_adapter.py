"""nn.BottleneckAdapter, nn.ParallelAdapter and nn.AdapterFusion: identity at the start, options, errors."""

import pytest
import torch

from peft_kernels.nn import AdapterFusion, BottleneckAdapter, ParallelAdapter
from peft_kernels.testing.reference.adapter import adapter as reference
from peft_kernels.testing.reference.adapter_fusion import fusion as fusion_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(
    "options", [{}, {"norm_before": True, "scale": "learned", "gated": True}], ids=["plain", "all"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_at_initialisation(dtype, options):
    x, output = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 24).to(dtype)
    for trained in (None, dtype):
        assert torch.equal(BottleneckAdapter(24, 6, dtype=trained, dropout=0.5, **options)(x), x)
        assert torch.equal(BottleneckAdapter(24, 6, dtype=trained, **options)(x, output), output)
        assert torch.equal(ParallelAdapter(24, 6, dtype=trained, **options)(x, output), output)


def test_against_reference():
    layer = randomize(BottleneckAdapter(24, 6, "swish", scale="learned", gated=True, norm_before=True, norm_after=True))
    x = torch.randn(2, 5, 24)
    wanted = reference(
        x, layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias, residual=x, activation="silu",
        scale=layer.scale, gate=torch.sigmoid(x @ layer.gate.weight.T + layer.gate.bias).mean(1, keepdim=True),
        layer_norm=(layer.norm_before.weight, layer.norm_before.bias, 1e-5),
        post_layer_norm=(layer.norm_after.weight, layer.norm_after.bias, 1e-5),
    )  # fmt: skip
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [True, False])
def test_fusion_against_reference(value):
    layer = randomize(AdapterFusion(24, value=value, temperature=2.0))
    x, outputs = torch.randn(2, 5, 24), [torch.randn(2, 5, 24) for _ in range(3)]
    matrices = [layer.query.weight, layer.query.bias, layer.key.weight, layer.key.bias]
    wanted = fusion_reference(x, outputs, *matrices, layer.value.weight if value else None, residual=x, temperature=2.0)
    torch.testing.assert_close(layer(x, outputs, x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_fusion_starts_as_a_mean():
    layer = AdapterFusion(24)
    a = torch.randn(4, 24)
    torch.testing.assert_close(layer(torch.randn(4, 24), [a, a, a]), a, rtol=0, atol=1e-3)


def test_temperature_decays_to_one():
    layer = AdapterFusion(8, temperature=2.0, temperature_decay=0.75)
    x = torch.randn(3, 8)
    seen = []
    for _ in range(4):
        seen.append(layer.temperature)
        layer(x, [x, x])
    assert seen == [2.0, 1.25, 1.0, 1.0]
    layer.eval()(x, [x, x])
    assert layer.temperature == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "mish"}, "activation: got 'mish', wanted one of relu, gelu"),
        ({"bottleneck": 0}, "bottleneck: got 0, wanted a positive integer"),
        ({"dropout": 1.0}, r"dropout: got 1.0, wanted a probability in \[0, 1\)"),
        ({"dropout": "x"}, r"dropout: got 'x', wanted a probability in \[0, 1\)"),
        ({"dropout": None}, r"dropout: got None, wanted a probability in \[0, 1\)"),
        ({"eps": "x"}, "eps: got 'x', wanted a finite number of at least 0"),
        ({"scale": "channel"}, "scale: got 'channel', wanted a finite number, or 'learned'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(**{"d": 8, "bottleneck": 2} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": "x"}, r"dropout: got 'x', wanted a probability in \[0, 1\)"),
        ({"temperature": "x"}, "temperature: got 'x', wanted a positive number"),
        ({"temperature": float("inf")}, "temperature: got inf, wanted a positive number"),
        ({"temperature_decay": "x"}, "temperature_decay: got 'x', wanted a number of at least 0"),
        ({"temperature_decay": float("nan")}, "temperature_decay: got nan, wanted a number of at least 0"),
    ],
)
def test_bad_arguments_of_a_fusion(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdapterFusion(8, **arguments)
