"""The forwards that follow the steps."""

from collections.abc import Callable

import torch
from decoding_models import with_cache
from torch import nn
from transformers import DynamicCache

from model_sequences.pairs import ERRORS, SMALL


def one_token(model: nn.Module, seed: int) -> torch.Tensor:
    return model(ids(seed, 1)).logits


def one_pass(model: nn.Module, seed: int) -> torch.Tensor:
    return model(ids(seed, 7)).logits


def padded(model: nn.Module, seed: int) -> torch.Tensor:
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[0, :2] = 0
    return model(ids(seed, 6), attention_mask=padding).logits[padding.bool()]


def decode(model: nn.Module, seed: int) -> torch.Tensor:
    """A prompt, then a token."""
    tokens, kept = ids(seed, 4), DynamicCache()
    parts = [tokens[:, :3], tokens[:, 3:]]
    return torch.cat([model(part, **with_cache(kept), use_cache=True).logits for part in parts], 1)


def in_inference_mode(model: nn.Module, seed: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids(seed, 1)).logits.clone()


def without_adapters(model: nn.Module, seed: int) -> torch.Tensor:
    with model.disable_adapter():
        return model(ids(seed, 1)).logits


def with_other_parameters(model: nn.Module, seed: int) -> torch.Tensor:
    """Calls the model as torch.func does, with tensors in its parameters' place."""
    others = {
        name: 0.5 * parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and any(word in name for word in SMALL)
    }
    return torch.func.functional_call(model, others, (ids(seed, 1),)).logits


def hidden_states(model: nn.Module, seed: int) -> torch.Tensor:
    return torch.stack(model(ids(seed, 2), output_hidden_states=True).hidden_states)


def mixed(model: nn.Module, seed: int) -> torch.Tensor:
    """Each sample with an adapter of its own."""
    names = [sorted(model.peft_config)[0], "__base__"]
    return model(ids(seed, 3), adapter_names=names).logits


def ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, seed: int) -> torch.Tensor:
    """The loss, and the gradients of whatever is trained."""
    tokens = ids(seed, 7)
    with torch.enable_grad():
        loss = model(tokens, labels=tokens).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained or not loss.requires_grad:
            return loss.detach()[None]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([loss.detach()[None].float(), *(grad.flatten().float() for grad in found if grad is not None)])


# Forwards that run from what layers keep find the most, so they come more than once.
FORWARDS = (
    one_token, one_token, one_token, decode, decode, one_pass, padded, in_inference_mode, without_adapters,
    with_other_parameters, hidden_states, mixed, gradients,
)  # fmt: skip


def outcome(forward: Callable, model: nn.Module, seed: int) -> torch.Tensor | type:
    """What a forward computes, or the class of its error."""
    try:
        with torch.no_grad():
            return forward(model, seed).detach().float()
    except ERRORS as error:
        return type(error)
