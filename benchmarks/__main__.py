"""Runs a benchmark by its name: `python -m benchmarks demo --steps 10`.

With --emulated, the counters of the CUDA kernels in the tests' emulator are shown instead.
"""

import importlib
import sys

# A benchmark is a module of this package, or an example of the other, with a function main(arguments).
BENCHMARKS = {
    "demo": "fine-tune a small language model, stock and accelerated, and compare",
    "demo_adapters": "adapters for several tasks on one frozen model, and AdapterFusion over them",
    "demo_methods": "every method on one small language model: what each costs, and what it learns",
    "demo_serving": "many LoRA adapters served on one model while they come and go, and stock PEFT beside it",
    "lora_linear": "LoRA on a 4-bit linear layer: forward, backward and memory",
    "lora_linear_grouped": "LoRA adapters of each sample's own on a 4-bit linear layer: forward, backward, memory",
    "serving": "many adapters in a pool on a small language model: how long they take to come in, and decoding",
    "experts": "LoRA on the experts of a mixture, dense or 4-bit: forward, backward and memory",
    "adapter": "bottleneck adapters: forward, backward and memory",
    "adapter_fusion": "AdapterFusion: forward, backward and memory",
    "dora_linear": "DoRA on a linear layer, 4-bit or dense: forward, backward and memory",
    "ia3_linear": "(IA)3 on a linear layer, 4-bit or dense: forward, backward and memory",
    "attention": "(IA)3 in attention: forward, backward and memory",
    "prefix": "attention to a trainable prefix: forward, backward and memory",
    "rms_norm": "RMSNorm: forward, backward and memory",
    "glu": "gated linear units: forward, backward and memory",
    "dropout": "dropout: forward, backward and memory",
    "cross_entropy": "the loss of language models: forward, backward and memory",
    "linear_cross_entropy": "an output layer and its loss, with and without logits: forward, backward and memory",
    "rotary": "the rotary embedding of queries and keys: forward, backward and memory",
    "combine": "several LoRA adapters combined into one: TIES, DARE, pruning",
    "merge": "four LoRA adapters merged into a small 4-bit language model: the time, and the logits' error",
    "nf4": "quantise and dequantise",
    "roofline": "a model of the CUDA kernels' times on several cards, from counts; nothing is measured",
    "stock_or_fused": "layers after optimize has chosen between stock and fused: never slower",
    "architectures": "LoRA on models of several architectures, in fp32 and bf16: training step and memory",
    "card": "all that one wants to know of a CUDA card that was never met, in three calls of nine minutes",
    "plot": "draw what benchmarks and demos have measured, from their CSV and JSON files",
    "figures": "write the tables of docs/figures.md and of the README from these files",
    "train_many": "eight LoRAs on one small language model: a step of all at once against a step of each",
    "model": "a small language model, fine-tuned in four ways: training step, prefill, decoding, breakdown",
}
EXAMPLES = ("demo", "demo_adapters", "demo_methods", "demo_serving")
EMULATED = "--emulated"  # instead of a name or beside it


def main() -> None:
    if EMULATED in sys.argv[1:]:
        arguments = [argument for argument in sys.argv[1:] if argument != EMULATED]
        return importlib.import_module("benchmarks.emulated").main(arguments)
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    known = "".join(f"\n  {known:20} {purpose}" for known, purpose in BENCHMARKS.items())
    if name in ("-h", "--help"):
        return print(f"python -m benchmarks NAME [options], or {EMULATED}; NAME --help shows the options of{known}")
    if name not in BENCHMARKS:
        sys.exit(f"python -m benchmarks NAME [options]: got the name '{name}', wanted {EMULATED}, or one of{known}")
    importlib.import_module(f"{'examples' if name in EXAMPLES else 'benchmarks'}.{name}").main(arguments)


if __name__ == "__main__":
    main()
