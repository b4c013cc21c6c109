"""The one table of numerical tolerances: relative rms errors against the fp64 oracle.

The error of a tensor is rms(actual - expected) / rms(expected). A rounding to b significant bits (hidden one included)
errs by at most 2^-b of a value and by 0.4 · 2^-b in the rms; the tolerances are about twice the sum of the roundings
that the computation cannot do without, so that one rounding too many fails.
"""

import torch

ROUNDING = {torch.float32: 0.4 * 2**-24, torch.float16: 0.4 * 2**-11, torch.bfloat16: 0.4 * 2**-8}

# fp32 sums of products: each addition rounds, and the error grows with the root of their number: measured 3e-7 at 256,
# 1.3e-6 at 5000. Bounds every fp32 result; low halves lost from 16-bit splits would show as 1e-5, bf16 as 2e-3.
FP32_SUM = 2e-6

# How much worse than stock (PEFT with bitsandbytes, or PEFT with torch.nn.Linear) a result may be; both round the same
# operands, in different orders.
VERSUS_STOCK = 1.05

# The same, where stock adds B A to fp32 experts before autocast rounds them once: torch's product of these is rounded
# here before the branch is added to it. Measured: 1.072.
VERSUS_MERGED = 1.1

# dA and dB with fp32 adapters outside autocast, where stock computes the branch in fp32: the promise to users.
# FP32_SUM is what the tests ask for.
BRANCH_FP32 = 2e-5


def product(compute_dtype: torch.dtype, out_dtype: torch.dtype) -> float:
    """For y and grad_x: both operands are rounded to compute_dtype, the sum to out_dtype."""
    return FP32_SUM + 2 * ((2 * ROUNDING[compute_dtype] ** 2 + ROUNDING[out_dtype] ** 2) ** 0.5)


def adapter_gradient(adapter_dtype: torch.dtype) -> float:
    """For grad_A and grad_B: made of fp32 products, whatever x is, and rounded once to the parameter's dtype."""
    return FP32_SUM + 2 * ROUNDING[adapter_dtype]


def attention(dtype: torch.dtype) -> float:
    """For ia3_attention's results: queries, weights, gradients of weights and of scores, and the result are rounded."""
    return FP32_SUM + 6 * ROUNDING[dtype]


def experts(dtype: torch.dtype, result_dtype: torch.dtype) -> float:
    """For the results of experts: three products follow each other, and an activation; all but sums are in dtype."""
    return 2 * FP32_SUM + 6 * ROUNDING[dtype] + 2 * ROUNDING[result_dtype]


def merged_logits(dtype: torch.dtype) -> float:
    """For the logits of a tiny model whose weights are all rounded once, and otherwise exact: measured 6 roundings."""
    return 12 * ROUNDING[dtype]
