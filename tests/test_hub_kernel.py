"""The package as Hugging Face's `kernels` loads it, from the folder that `make hub-kernel` has built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE = os.environ.get("PEFT_KERNELS_HUB_SITE")  # where `kernels` is installed

PROGRAM = """
import sys
from pathlib import Path
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub
from kernels import use_kernel_mapping
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

folder = Path(sys.argv[1])
kernel = get_local_kernel(folder, backend="cpu")
assert "peft_kernels" not in sys.modules and Path(kernel.__file__).is_relative_to(folder)

ops = kernel.ops
torch.manual_seed(0)
w = torch.randn(48, 64)
weight = ops.quantize_4bit(w)
x, a, b = torch.randn(5, 64), torch.randn(4, 64), torch.randn(48, 4)
y = ops.lora_linear(x, weight, None, [a], [b], [0.5])
torch.testing.assert_close(y, x @ weight.dequantize().T + 0.5 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)
assert (weight.dequantize() - w).abs().max() < 1

sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
ids = torch.arange(12).view(2, 6)
def loss_and_gradients():
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
wanted = loss_and_gradients()
# As transformers does itself with versions of kernels that it knows.
replace_kernel_forward_from_hub(LlamaRMSNorm, "RMSNorm")
ours = LocalLayerRepository(repo_path=folder, layer_name="RMSNorm")
with use_kernel_mapping({"RMSNorm": {"cpu": {Mode.TRAINING: ours}}}):
    kernelize(model, mode=Mode.TRAINING, device="cpu")
norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
assert len(norms) == 5 and all(kernel.__name__ in norm.forward.__func__.__module__ for norm in norms)
torch.testing.assert_close(loss_and_gradients(), wanted, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.skipif(not SITE, reason="PEFT_KERNELS_HUB_SITE names no folder with Hugging Face's kernels")
def test_loads_and_takes_the_place_of_a_models_norms():
    # Behind the environment's own packages, of which the folder has others.
    start = f"import sys; sys.path.append({SITE!r})\n"
    command = [sys.executable, "-c", start + PROGRAM, str(ROOT / "dist/hub/peft-kernels")]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
