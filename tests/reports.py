"""Which layers of a report have to be fused, for the tests."""

from peft_kernels.integrations import LayerReport, Report

# Classes without a fused form, in whose models all others have one; and linear layers, where torch is mostly as fast.
PLAIN = {"torch.Linear", "torch.LayerNorm"} | {
    f"transformers.{name}" for name in ("Conv1D", "GPT2MLP", "BertIntermediate", "RobertaIntermediate")
}


def missed(report: Report) -> list[LayerReport]:
    """The layers that should have been fused and were not."""
    return [layer for layer in report.left_alone if layer.kind not in PLAIN]
