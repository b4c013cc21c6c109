"""What the accelerated model of a pair is held to after each step."""

import copy
import warnings
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from comparison import error
from torch import nn

from model_sequences.forwards import gradients, outcome
from model_sequences.pairs import Pair

# In fp32 both models' outputs err by about 1e-6, and every step changes them by far more than SAME. Of gradients that
# nearly cancel, the stock model's have been seen to err by 1e-3 against fp64.
SAME = 1e-4
SAME_GRADIENTS = 1e-2
SAME_IN_16_BITS = 0.1


def in_16_bits(model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtypes |= {module.compute_dtype for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)}
    return bool(dtypes & {torch.bfloat16, torch.float16})


def in_fp32(model: nn.Module) -> nn.Module:
    """A copy that computes in fp32."""
    model = copy.deepcopy(model).float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
    return model


def check_sequence(template: str, steps: list[tuple[Callable, Callable, int]]) -> None:
    """Runs steps, and holds the accelerated model to the stock one after each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = Pair(template)
        for step, forward, seed in steps:
            pair.random.seed(seed)
            step(pair)
            if pair.was_merged_with_other_numbers():
                return
            wanted, got = (outcome(forward, model, seed) for model in (pair.stock, pair.fused))
            if isinstance(wanted, type):
                continue  # The kernels take mixtures of dtypes that torch refuses.
            where = f"{step.__name__}, {forward.__name__}"
            assert isinstance(got, torch.Tensor), f"{where}: {got.__name__}, and the stock model gives a result"
            if wanted.isfinite().all():
                check_result(pair, forward, seed, got, wanted, where)


def check_result(pair: Pair, forward: Callable, seed: int, got: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    measured = error(got, wanted)
    if not in_16_bits(pair.stock):
        assert measured <= (SAME_GRADIENTS if forward is gradients else SAME), f"{where}: {measured:.2g}"
    elif measured > SAME_IN_16_BITS:  # The stock model may be the one that errs.
        exact = outcome(forward, in_fp32(pair.stock), seed)
        ours, stock = error(got, exact), error(wanted, exact)
        # Stale results are looked for here. Of two roundings of one forward either may be twice as far off by chance.
        assert ours <= 2 * max(stock, SAME_IN_16_BITS), f"{where}: {ours:.2g} from fp32, and stock {stock:.2g}"
