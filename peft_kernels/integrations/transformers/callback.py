"""`optimize` for models that transformers' Trainer, or one of TRL's, makes or wraps by itself."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model import Report, optimize
from ..registry import restore as restore_layers
from ..switches import Names

_logger = logging.getLogger("peft_kernels")


class PeftKernelsCallback(TrainerCallback):
    """Gives the model its fused layers when training begins, after all that a trainer does to it before.

    ```
    trainer = SFTTrainer(model, args, peft_config=LoraConfig(...), callbacks=[PeftKernelsCallback()])
    ```

    What was fused, and how many times as fast it was measured to be, is logged once, by the main process, under the
    logger "peft_kernels". Checkpoints hold what they held before: layers keep their parameters' names.

    Args:
        tune, only, exclude, logits: those of `optimize`.
        restore: whether the model gets its stock layers back when training ends, as for pickling it whole.

    Attributes:
        report: the `Report` of the last training's beginning; None before it.
    """

    def __init__(
        self,
        *,
        tune: bool | float = True,
        only: Names = None,
        exclude: Names = None,
        logits: bool = True,
        restore: bool = False,
    ) -> None:
        self.tune, self.only, self.exclude, self.logits, self.restore = tune, only, exclude, logits, restore
        self.report: Report | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if model is None:
            return
        self.report = optimize(model, tune=self.tune, only=self.only, exclude=self.exclude, logits=self.logits)
        if state.is_world_process_zero:
            _logger.info("%s", self.report)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self.restore and model is not None:
            restore_layers(model)
