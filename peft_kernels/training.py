"""Training many adapters of PEFT's at once on one frozen base: each row of a batch trains the adapter that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import adapter_rows
from .adapters.hooks import one_of
from .cuda import why_not
from .integrations.rows import adapter_parameters
from .ops._arguments import is_number, refuse
from .ops.cross_entropy import cross_entropy
from .rows import BASE

IGNORED = -100  # the label of what has no loss, as in transformers

Names = Sequence[str | Sequence[str | None] | None]
TokenLosses = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AdapterSettings:
    """How one adapter is trained.

    Attributes:
        lr, weight_decay: of its group in the optimiser.
        loss_scale: a factor of its loss.
        max_norm: to which its gradient's norm is clipped; None for no limit.
        schedule: a factor of lr, given the number of steps that the adapter has taken.
        options: further ones of its group, such as AdamW's betas.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    loss_scale: float = 1.0
    max_norm: float | None = None
    schedule: Callable[[int], float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def causal_lm_losses(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each position's logits with the label that follows, fp32 [B, S], and which of them count."""
    logits: Tensor = outputs.logits
    targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].to(logits.device)
    if why_not(logits.device):
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    else:
        losses = cross_entropy(logits, targets)
    return losses, targets != IGNORED


def _check_types(settings: Any, optimizer: Any, token_losses: Any) -> None:
    """Refuses what would fail without naming the argument, in part only after a backward."""
    if not (isinstance(settings, Mapping) and all(isinstance(own, AdapterSettings) for own in settings.values())):
        refuse("settings", repr(settings), "AdapterSettings by the names of adapters")
    for name, value in (("optimizer", optimizer), ("token_losses", token_losses)):
        if not callable(value):
            refuse(name, repr(value), "a callable")


def _check_numbers(name: str, own: AdapterSettings) -> None:
    if not (is_number(own.loss_scale) and (own.max_norm is None or is_number(own.max_norm))):
        refuse("settings", f"{own} for {name!r}", "numbers for loss_scale and max_norm")
    if own.max_norm is not None and own.max_norm < 0:  # which would turn the gradient round
        refuse("settings", f"{own} for {name!r}", "a max_norm of at least 0")
    if not all(isinstance(value, Tensor) or is_number(value) for value in (own.lr, own.weight_decay)):
        refuse("settings", f"{own} for {name!r}", "numbers for lr and weight_decay")
    if own.schedule is not None and not callable(own.schedule):
        refuse("settings", f"{own} for {name!r}", "a callable, or None, for schedule")


class AdapterTrainer:
    """Trains several adapters of an accelerated PEFT model in the same batches, each as if it were trained alone.

    An adapter's loss is the mean over the tokens of its own rows, so that its gradient, its optimiser's state and its
    steps are those of a run on these rows only. One that no row has named since the last step does not move. (Dropout
    draws other masks than such a run would.) It is a context: on leaving it, what PEFT had frozen is frozen again.

        with AdapterTrainer(model, {"news": AdapterSettings(lr=1e-4), "code": AdapterSettings(lr=3e-4)}) as trainer:
            for names, batch in batches:
                losses = trainer.backward(names, **batch)  # {"news": 2.31, "code": 1.87}
                trainer.step()
            trainer.save("adapters")

    Args:
        model: PEFT's, with LoRA, DoRA or (IA)³ adapters, that `optimize` was called on. Its mode stays: call
            `model.train()` for dropout.
        settings: of each adapter that is trained, by name. All other parameters are frozen meanwhile.
        optimizer: a class of torch.optim, or what makes one of a list of groups.
        token_losses: makes of the outputs and the labels [B, S] or [B] a loss for each token or row, and which count.

    Attributes:
        optimizer: with a group for each adapter, in the order of `settings`; its `name` is the adapter's, and its
            `steps` are those that the adapter has taken.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no adapter has one of the names; a number does not fit; an argument is of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, AdapterSettings],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.AdamW,
        token_losses: TokenLosses = causal_lm_losses,
    ) -> None:
        found = adapter_parameters(model)
        _check_types(settings, optimizer, token_losses)
        if not settings:
            refuse("settings", "none", "those of one adapter or more")
        for name, own in settings.items():
            if name not in found:
                refuse("settings", repr(name), one_of(sorted(found)))
            _check_numbers(name, own)
        self.model, self.settings, self.token_losses = model, dict(settings), token_losses
        groups = [
            {"params": found[name], "lr": own.lr, "weight_decay": own.weight_decay, **own.options, "name": name,
             "steps": 0}
            for name, own in settings.items()
        ]  # fmt: skip
        self.optimizer = optimizer(groups)
        self._tokens = dict.fromkeys(settings, 0)  # of each adapter, since the last step
        self._trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)

    def backward(self, names: Names, labels: Tensor, **inputs: Any) -> dict[str, float]:
        """A forward and a backward. Several before a step accumulate: an adapter's mean is then over all its tokens.

        Under autocast the forward runs with it, and the backward without.

        Args:
            names: as `adapter_rows` takes them; what has no adapter is not trained on.
            labels: int64 [B, S], -100 where there is no loss. Where tokens have names, neither has a token whose next
                one names another adapter.
            inputs: the model's.

        Returns:
            The mean loss of each adapter that has tokens.

        Raises:
            ValueError: names that are not in the settings; or, from the model, a batch that does not have as many rows.
        """
        sums, counts = self._sums(names, labels, inputs)
        total = sums.sum()
        if total.requires_grad:
            with torch.autocast(total.device.type, enabled=False):
                total.backward()
        for name, count in zip(self.settings, counts, strict=True):
            self._tokens[name] += count
        return self._means(sums, counts)

    @torch.no_grad()
    def evaluate(self, names: Names, labels: Tensor, **inputs: Any) -> dict[str, float]:
        """The losses that `backward` returns, without gradients; the model's mode stays."""
        return self._means(*self._sums(names, labels, inputs))

    @torch.no_grad()
    def step(self) -> None:
        """Steps every adapter that has had tokens since the last step, with the gradient of its mean loss."""
        for group, (name, own) in zip(self.optimizer.param_groups, self.settings.items(), strict=True):
            count, self._tokens[name] = self._tokens[name], 0
            if not count:
                for parameter in group["params"]:
                    parameter.grad = None
                continue
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, own.loss_scale / count)
            if own.max_norm is not None:
                nn.utils.clip_grad_norm_(group["params"], own.max_norm)
            if own.schedule is not None:
                group["lr"] = own.lr * own.schedule(group["steps"])
            group["steps"] += 1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: str | Path) -> None:
        """Writes each adapter as PEFT does: to a folder of its name, and one of the name 'default' to `folder` itself.

        The optimiser's state is `optimizer.state_dict()`.
        """
        model: Any = self.model
        model.save_pretrained(folder, selected_adapters=[*self.settings])

    def close(self) -> None:
        """Freezes again what was frozen before, and has what was trained be trained."""
        self.model.requires_grad_(False)
        for parameter in self._trained_before:
            parameter.requires_grad_(True)

    def __enter__(self) -> AdapterTrainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _sums(self, names: Names, labels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """Each adapter's sum of losses, fp32 [adapters], and how many there are."""
        index = self._index(names)
        with adapter_rows(self.model, names):
            losses, counted = self.token_losses(self.model(**inputs), labels)
        index = index.to(losses.device)
        if index.dim() < losses.dim():
            index = index.unsqueeze(1).expand_as(losses)
        elif index.dim() == 2:
            counted = counted & F.pad(index[:, 1:] == index[:, :-1], (0, 1), value=True)
        chosen = counted & (index >= 0)
        adapters, size = index[chosen], len(self.settings)
        sums = losses.new_zeros(size, dtype=torch.float32).index_add(0, adapters, losses[chosen].float())
        return sums, adapters.bincount(minlength=size).tolist()

    def _index(self, names: Names) -> Tensor:
        """int64 [B] or [B, S]: the position of each adapter in the settings; -1 for none."""
        position = {name: number for number, name in enumerate(self.settings)} | {BASE: -1, None: -1}

        def of(name: Any) -> Any:
            if isinstance(name, (list, tuple)):
                return [of(each) for each in name]
            if name not in [*position]:  # a list, since a name may be unhashable
                refuse("names", repr(name), f"{one_of(self.settings)}, or None")
            return position[name]

        return torch.tensor([of(name) for name in names], dtype=torch.int64, device="cpu")

    def _means(self, sums: Tensor, counts: list[int]) -> dict[str, float]:
        found = zip(self.settings, sums.tolist(), counts, strict=True)
        return {name: value / count for name, value, count in found if count}
