"""Soft prompts for transformers' models: trained embeddings before those of the tokens.

They are as further tokens to all layers, and to caches: masks, positions and labels grow by n. A model that gives its
hidden states to a head for classification, or to the caller, gives those of the tokens.

Prompt tuning: Lester et al. 2021 (arXiv:2104.08691). P-Tuning: Liu et al. 2021 (arXiv:2103.10385).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ...nn.soft_prompt import Encoder, SoftPrompt, prepend
from ...ops._arguments import refuse
from ..registry import check_module
from .attached import Attached, check_nothing_attached
from .prefix import cache_of, counts_padding, find_backbone, named_arguments, remove_hooks

_SUBMODULE = "soft_prompt"
_IS_IN = "soft_prompt_is_in"  # an argument of a call within a generation, whose first embeddings have the prompt
_OVERRIDDEN = ("generate", "prepare_inputs_for_generation")
_LENGTH = 20  # of a prompt for which nothing says it

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def attach_prompt(
    model: nn.Module,
    prompt: SoftPrompt | None = None,
    *,
    length: int | None = None,
    text: str | None = None,
    tokenizer: Any = None,
    token_ids: Sequence[int] | Tensor | None = None,
    encoder: Encoder | None = None,
    hidden_size: int | None = None,
) -> SoftPrompt:
    """Puts trainable embeddings before those of the tokens of every sequence.

    The prompt becomes the submodule `soft_prompt` of the model, and its only trainable part. The model may be
    accelerated, before or after. It is called and generates as before, with `input_ids` or `inputs_embeds`, which are
    of the tokens alone; so are masks, positions, labels and what `generate` returns. Logits of a language model have
    n further positions before the tokens', as with PEFT; the last of them predicts the first token.

    Args:
        model: a transformers model without an encoder of its own, or one inside another (PEFT's).
        prompt: by default a new one.
        length: n of that new one; by default 20, or the number of tokens in `text` or `token_ids`, which are cut or
            repeated to it.
        text: it begins with the embeddings of this text's tokens, for which it takes the model's `tokenizer`.
        token_ids: it begins with the embeddings of these.
        encoder, hidden_size: P-Tuning's, see `SoftPrompt`.

    Returns:
        The prompt.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has a prompt or a prefix already, takes no embeddings, or has an encoder and a decoder;
            the prompt has another width, or leaves no position to a token; `text` is empty, or has no tokenizer; more
            than one of `prompt`, `text`, `token_ids` and `encoder` is given. The model is then unchanged.
    """
    check_module(model)
    check_nothing_attached(model)
    host = _host(model)
    embedding: Any = host.get_input_embeddings()
    # Its logits at the prompt's last position predict the first token. Other heads are given the tokens' hidden states.
    is_language_model = host.get_output_embeddings() is not None
    begins = {"prompt": prompt, "text": text, "token_ids": token_ids, "encoder": encoder}
    given = [name for name, value in begins.items() if value is not None]
    if len(given) > 1:
        refuse(given[1], "it together with " + given[0], "one of prompt, text, token_ids and encoder")
    if hidden_size is not None and encoder is None:
        refuse("hidden_size", repr(hidden_size), "None, since there is no encoder to make")
    if (text is None) != (tokenizer is None):
        refuse("tokenizer", "None" if tokenizer is None else "one without a text", "the model's tokenizer with a text")
    if prompt is None:
        ids = token_ids if text is None else _tokens_of(text, tokenizer)
        prompt = _new_prompt(embedding, length, ids, encoder, hidden_size)
    elif not isinstance(prompt, SoftPrompt):
        refuse("prompt", f"a {type(prompt).__name__}", "a SoftPrompt")
    elif length is not None:
        refuse("length", repr(length), f"None, since prompt has {prompt.length} tokens")
    if prompt.d != _width_of(embedding):
        refuse("prompt", f"one of width {prompt.d}", f"one of width {_width_of(embedding)}, as the model's embeddings")
    most = _most_positions(host)
    if most is not None and prompt.length >= most:
        refuse("prompt", f"{prompt.length} virtual tokens", f"fewer than the model's {most} positions")
    model.add_module(_SUBMODULE, prompt)
    model.requires_grad_(False)
    prompt.requires_grad_()
    site = host if is_language_model else _backbone(host)
    site.register_forward_pre_hook(_Attached(prompt, most), with_kwargs=True)
    if not is_language_model:
        site.register_forward_hook(_drop_prompt, with_kwargs=True)
    elif host.can_generate():
        host.generate, host.prepare_inputs_for_generation = _Generate(host, prompt), _PrepareInputs(host)
    return prompt


def detach_prompt(model: nn.Module) -> None:
    """Undoes `attach_prompt`; the parameters stay frozen.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no soft prompt.
    """
    check_module(model)
    sites = [module for module in model.modules() if remove_hooks(module, lambda hook: isinstance(hook, _Attached))]
    if not sites:
        raise ValueError("model: got one without a soft prompt, wanted one that attach_prompt was called on")
    for site in sites:
        for key in [key for key, hook in site._forward_hooks.items() if hook is _drop_prompt]:
            del site._forward_hooks[key], site._forward_hooks_with_kwargs[key]
        for name in _OVERRIDDEN:
            vars(site).pop(name, None)
    delattr(model, _SUBMODULE)


class _Attached(Attached):
    """Forward pre-hook of a model with a head, or of one without: its tokens come after a soft prompt."""

    what, detach = "soft prompt", "detach_prompt"

    def __init__(self, prompt: SoftPrompt, most: int | None) -> None:
        self.prompt, self.most = prompt, most

    def __call__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        kwargs = named_arguments(model, args, kwargs)
        is_in = kwargs.pop(_IS_IN, False)
        if not is_in:
            kwargs = self._after_prompt(model, kwargs)
        self._check_positions(model, kwargs)
        return (), kwargs

    def _after_prompt(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        past = _past(kwargs)
        if not past:
            tokens, embedding = _tokens(kwargs, self.prompt.d), model.get_input_embeddings()
            kwargs["inputs_embeds"] = prepend(self.prompt(), tokens, embedding)
            kwargs["input_ids"] = None
        elif kwargs.get("attention_mask") is not None and not torch.compiler.is_compiling():
            wanted = past - self.prompt.length + _count(kwargs)
            if (got := kwargs["attention_mask"].shape[-1]) != wanted:
                raise ValueError(
                    f"attention_mask: got one of {got} tokens, wanted {wanted}: those in the cache, and those given"
                )
        return _extended(kwargs, self.prompt.length, begins=not past)

    def _check_positions(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        if self.most is None or torch.compiler.is_compiling():
            return
        count = _past(kwargs) + _count(kwargs)
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if count > self.most and positions is not None:
            count = int(positions.max()) + 1
        elif count > self.most and mask is not None and not counts_padding(model.config):
            count = int(mask.sum(-1).max())
        if count > self.most:
            raise ValueError(
                f"input_ids: got sequences that end at position {count} with a prompt of {self.prompt.length}, "
                f"wanted {self.most} at most, as the model has"
            )


def _drop_prompt(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook of a model without a head: its last hidden states are the tokens'."""
    (hook,) = (hook for hook in backbone._forward_pre_hooks.values() if isinstance(hook, _Attached))
    hidden, cache = outputs[0], cache_of(kwargs)
    if cache is not None and int(cache.get_seq_length()) > hidden.shape[1]:
        return outputs  # the prompt was in an earlier call
    hidden = hidden[:, hook.prompt.length :]
    if isinstance(outputs, tuple):
        return (hidden, *outputs[1:])
    outputs.last_hidden_state = hidden
    return outputs


class _Generate:
    """A model's `generate`, which begins with the embeddings of the prompt and the tokens: so caches have room for
    the prompt, and its key is known to all kinds of masks. No closure, so that a copied model has its copy."""

    def __init__(self, model: Any, prompt: SoftPrompt) -> None:
        self.model, self.prompt = model, prompt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = type(self.model).generate
        arguments = Generation(self.model, args, kwargs)
        if arguments.is_without_cache:
            return stock(self.model, *args, **kwargs)  # every step is as a forward
        with torch.no_grad():
            prompt = self.prompt()
        return stock(self.model, **arguments.after(prompt, self.model.get_input_embeddings()))


class _PrepareInputs:
    """A model's `prepare_inputs_for_generation`, which says of a generation's calls that the prompt is in them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:  # transformers looks for arguments in it
        return inspect.signature(self._stock)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = self._stock(*args, **kwargs)
        if kwargs.get("inputs_embeds") is not None:
            inputs[_IS_IN] = True
        return inputs

    @property
    def _stock(self) -> Any:
        return type(self.model).prepare_inputs_for_generation.__get__(self.model)


class Generation:
    """The arguments of `generate`, and what they are with a prompt before the tokens.

    Raises:
        ValueError: there are no tokens, or they ask for a way of generating that would leave the prompt out.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, *names = inspect.signature(GenerationMixin.generate).parameters
        self.kwargs = dict(zip(names, args, strict=False)) | kwargs
        config = self.kwargs.get("generation_config")
        self.config = model.generation_config if config is None else config
        ids, inputs = (self.kwargs.pop(name, None) for name in ("input_ids", "inputs"))
        self.ids = ids if inputs is None else inputs
        self.embeds = self.kwargs.pop("inputs_embeds", None)
        for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
            if self._option(name) is not None:
                refuse(name, repr(self._option(name)), "None, since the model has a soft prompt")
        if self._option("cache_implementation") == "paged":
            refuse("cache_implementation", "'paged'", "another, since the model has a soft prompt")
        if self.ids is None and self.embeds is None:
            refuse("inputs", "None", "token ids [B, S], since the model has a soft prompt")

    @property
    def batch(self) -> int:
        tokens: Any = self.ids if self.embeds is None else self.embeds
        return int(tokens.shape[0])

    @property
    def is_without_cache(self) -> bool:
        return self._option("use_cache") is False and self.embeds is None

    def after(self, prompt: Tensor, embedding: nn.Module) -> dict[str, Any]:
        """The arguments after a prompt [n, d] or [B, n, d]."""
        tokens: Any = self.ids if self.embeds is None else self.embeds
        kwargs = self.kwargs
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask(tokens)
        kwargs = _extended(kwargs, prompt.shape[-2], begins=True)
        with torch.no_grad():
            kwargs["inputs_embeds"] = embeds = prepend(prompt, tokens.to(prompt.device), embedding)
        # transformers takes it that lengths count the embeddings, and takes these off.
        extra = embeds.shape[1] if self.ids is not None else prompt.shape[-2]
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if (value := self._option(name)) and self._option(new) is None:
                kwargs[name] = value + extra
        return kwargs | {"inputs": self.ids}

    def _option(self, name: str) -> Any:
        value = self.kwargs.get(name)
        return getattr(self.config, name, None) if value is None else value

    def _mask(self, tokens: Tensor) -> Tensor:
        """The mask that transformers makes for tokens; beside embeddings it would make it for the ids alone."""
        pad, ends = self._option("pad_token_id"), self._option("eos_token_id")
        if self.embeds is None and pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
            return tokens.ne(pad).long()
        return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def _extended(kwargs: dict[str, Any], n: int, begins: bool) -> dict[str, Any]:
    """What comes with tokens, for a prompt of n before them.

    Args:
        begins: whether the prompt is in this call; if not, it is in the cache.
    """
    kwargs = dict(kwargs)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            refuse("attention_mask", type(mask).__name__ + f" of {getattr(mask, 'ndim', '?')} dimensions", "[B, S]")
        kwargs["attention_mask"] = F.pad(mask, (n, 0), value=1)
    if (positions := kwargs.get("position_ids")) is not None:
        first = torch.arange(n, device=positions.device).expand(*positions.shape[:-1], n)
        kwargs["position_ids"] = torch.cat((first, positions + n), -1) if begins else positions + n
    if not begins:
        return kwargs
    if (types := kwargs.get("token_type_ids")) is not None:
        kwargs["token_type_ids"] = F.pad(types, (n, 0))
    for name in ("labels", "shift_labels"):
        if (labels := kwargs.get(name)) is not None:
            kwargs[name] = F.pad(labels, (n, 0), value=-100)
    return kwargs


def _tokens(kwargs: dict[str, Any], d: int) -> Tensor:
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("input_ids: got " + ("neither" if ids is None else "both") + ", wanted it or inputs_embeds")
    if embeds is None:
        assert ids is not None
        if ids.dim() != 2:
            refuse("input_ids", f"a tensor {list(ids.shape)}", "one [B, S]")
        result: Tensor = ids
        return result
    if embeds.dim() != 3 or embeds.shape[-1] != d:
        refuse("inputs_embeds", f"a tensor {list(embeds.shape)}", f"one [B, S, {d}]")
    result = embeds
    return result


def _count(kwargs: dict[str, Any]) -> int:
    tokens: Any = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return 0 if tokens is None else int(tokens.shape[1])


def _past(kwargs: dict[str, Any]) -> int:
    cache = cache_of(kwargs)
    return 0 if cache is None else int(cache.get_seq_length())


def _new_prompt(embedding: Any, length: int | None, ids: Any, encoder: Any, hidden_size: int | None) -> SoftPrompt:
    if ids is not None:
        return SoftPrompt.from_tokens(embedding, ids, length)
    length = _LENGTH if length is None else length
    device = next(embedding.parameters()).device
    return SoftPrompt(length, _width_of(embedding), encoder, hidden_size, device=device)


def _tokens_of(text: Any, tokenizer: Any) -> list[int]:
    if not isinstance(text, str) or not text.strip():
        refuse("text", repr(text), "a text that is not empty")
    ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        refuse("text", repr(text), "one that the tokenizer has tokens for")
    return ids


def _host(model: nn.Module) -> Any:
    """The outermost of transformers' models: it has the head, if there is one.

    Raises:
        ValueError: there is none, or none that can have a prompt.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config: Any = module.config
            if getattr(config, "is_encoder_decoder", False):
                refuse("model", f"a {type(module).__name__}, which has an encoder and a decoder", "one without")
            if "inputs_embeds" not in inspect.signature(module.forward).parameters:
                refuse("model", f"a {type(module).__name__}", "one that takes inputs_embeds")
            return module
    raise ValueError(f"model: got a {type(model).__name__}, wanted a transformers.PreTrainedModel, or one inside it")


def _backbone(host: PreTrainedModel) -> nn.Module:
    backbone = find_backbone(host)
    assert backbone is not None
    return backbone


def _width_of(embedding: Any) -> int:
    width = getattr(embedding, "embedding_dim", None)
    return int(next(embedding.parameters()).shape[-1] if width is None else width)


def _most_positions(host: Any) -> int | None:
    """How many positions a model has a table for; None where it computes them."""
    stated = getattr(host.config, "max_position_embeddings", None)
    if stated is None:
        return None
    tokens = host.get_input_embeddings()
    for module in host.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            offset = getattr(module, "offset", 0)  # OPT's, whose first rows are for nothing
            if module.num_embeddings == stated + offset:
                # RoBERTa's positions begin after that of padding.
                return module.num_embeddings - offset - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
