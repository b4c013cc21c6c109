"""AdapterHub's configurations of bottleneck adapters and of AdapterFusion, to and from this library's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import ATTENTION, CROSS_ATTENTION, FFN, AdapterConfig, FusionConfig

_FLAGS = {ATTENTION: "mh_adapter", CROSS_ATTENTION: "cross_adapter", FFN: "output_adapter"}
_ACTIVATIONS = {"gelu_tanh": "gelu_new", "silu": "swish", "leaky_relu": "leakyrelu", "none": "linear"}
# Files without a version are of a time when "gelu" was the tanh form.
_OLD_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_orig": "gelu"}
_MOST_FEATURES = 2**31  # of a bottleneck


def adapter_to_hub(config: AdapterConfig, features: int) -> dict[str, Any]:
    """AdapterHub's configuration of an adapter; `adapter_from_hub` shows whether it says all."""
    factor = features / config.bottleneck
    if features // factor < config.bottleneck:
        factor = math.nextafter(factor, 0)  # the quotient was rounded up
    locations = config.locations or ()
    return {
        "mh_adapter": ATTENTION in locations,
        "cross_adapter": CROSS_ATTENTION in locations,
        "output_adapter": FFN in locations,
        "reduction_factor": factor,
        "non_linearity": _ACTIVATIONS.get(config.activation, config.activation),
        "is_parallel": config.kind == "parallel",
        "original_ln_before": config.kind == "pfeiffer",
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": config.norm_after,
        "ln_before": config.norm_before,
        "ln_after": config.norm_after,
        "scaling": config.scale,
        "use_gating": config.gated,
        "dropout": config.dropout,
        "leave_out": list(config.leave_out),
    }


def adapter_from_hub(described: Mapping[str, Any]) -> AdapterConfig:
    """The adapter that a file of AdapterHub's describes.

    Args:
        described: the whole file.

    Raises:
        ValueError: it is none that this library has; it names the entry, what it got and what it wanted.
    """
    hub = _config(described)
    _want(hub, "architecture", None, None)
    parallel, after_norm = bool(hub.get("is_parallel")), bool(hub.get("original_ln_before"))
    for entry, wanted in (("phm_layer", False), ("inv_adapter", None), ("original_ln_after", True)):
        _want(hub, entry, wanted, wanted)
    if hub.get("stochastic_depth"):
        _want(hub, "stochastic_depth", 0.0, 0.0)
    if after_norm and not parallel:
        _want(hub, "residual_before_ln", True, True)
    if hub.get("ln_after"):
        # With other options AdapterHub applies that LayerNorm to a sum that is not made here.
        for entry, wanted in (
            ("is_parallel", False),
            ("original_ln_before", False),
            ("adapter_residual_before_ln", True),
        ):
            _want(hub, entry, wanted, False)
    factor, features = _needed(hub, "reduction_factor"), described.get("hidden_size")
    if not isinstance(features, int):
        raise ValueError(f"hidden_size: got {features!r}, wanted the features of the model that it was made for")
    if not isinstance(factor, (int, float)) or not factor > features / _MOST_FEATURES:
        raise ValueError(f"reduction_factor: got {factor!r}, wanted a positive number, the same for all layers")
    scale = hub.get("scaling", 1.0)
    if not isinstance(scale, (int, float)) and scale != "learned":
        raise ValueError(f"scaling: got {scale!r}, wanted a number or 'learned'")
    activation = _needed(hub, "non_linearity")
    if "version" not in described and isinstance(activation, str):
        activation = _OLD_ACTIVATIONS.get(activation, activation)
    return AdapterConfig(
        "parallel" if parallel else "pfeiffer" if after_norm else "houlsby",
        max(int(features // factor), 1),
        activation,
        scale,
        bool(hub.get("use_gating")),
        bool(hub.get("ln_before")),
        bool(hub.get("ln_after")),
        hub.get("dropout") or 0.0,
        tuple(location for location, flag in _FLAGS.items() if hub.get(flag)),
        leave_out=hub.get("leave_out") or (),
    )


def fusion_to_hub(config: FusionConfig) -> dict[str, Any]:
    """AdapterHub's configuration of a fusion; `fusion_from_hub` shows whether it says all."""
    return {
        "key": True,
        "query": True,
        "value": config.value,
        "query_before_ln": False,
        "residual_before": False,
        "regularization": False,
        "temperature": config.temperature != 1.0,
        "value_before_softmax": True,
        "value_initialized": config.value,
        "dropout_prob": config.dropout,
    }


def fusion_from_hub(described: Mapping[str, Any], attention_dropout: float) -> FusionConfig:
    """The fusion that a file of AdapterHub's describes.

    If it has a temperature, that is no part of the file. It falls to 1 in the first thousand steps of training, and so
    it is taken for 1.

    Args:
        described: the whole file.
        attention_dropout: the model's, which a fusion has that names none.

    Raises:
        ValueError: it is none that this library has; it names the entry, what it got and what it wanted.
    """
    hub = _config(described)
    for entry, wanted in (("key", True), ("query", True), ("query_before_ln", False), ("residual_before", False)):
        _want(hub, entry, wanted, wanted)
    names = described.get("adapter_names") or str(described.get("name", "")).split(",")
    names = tuple(names.split(",")) if isinstance(names, str) else names
    return FusionConfig(names, value=bool(_needed(hub, "value")), dropout=hub.get("dropout_prob") or attention_dropout)


def _config(described: Mapping[str, Any]) -> Mapping[str, Any]:
    hub = described.get("config")
    if not isinstance(hub, Mapping):
        raise ValueError(f"config: got {hub!r}, wanted AdapterHub's configuration")
    return hub


def _needed(hub: Mapping[str, Any], entry: str) -> Any:
    if entry not in hub:
        raise ValueError(f"{entry}: got nothing, wanted an entry of the configuration")
    return hub[entry]


def _want(hub: Mapping[str, Any], entry: str, wanted: Any, default: Any) -> None:
    got = hub.get(entry, default)
    if got != wanted:
        raise ValueError(f"{entry}: got {got!r}, wanted {wanted!r}: other adapters are not supported")
