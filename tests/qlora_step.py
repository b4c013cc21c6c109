"""Training steps of QLoRA with an installed wheel, where PEFT is missing; run by the tests of the wheel.

Prints the module's folder and what it was built with.
"""

import json
from importlib.util import find_spec

import torch

import peft_kernels
from peft_kernels._extension import build_info

assert [name for name in ("bitsandbytes", "peft", "transformers") if find_spec(name)] == []
torch.manual_seed(0)
layer = peft_kernels.nn.LoRALinear(128, 64, 8, 16, dropout=0.1, quantize="nf4", double_quant=True, dtype=torch.bfloat16)
trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
x, target = torch.randn(32, 128, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
losses = []
for _ in range(5):
    loss = torch.nn.functional.mse_loss(layer(x).float(), target.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert len(trained) == 2 and losses[-1] < losses[0], losses
print(json.dumps({"file": peft_kernels.__file__, "version": peft_kernels.__version__, **build_info}))
