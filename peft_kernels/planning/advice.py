"""Which method and which rank suit a task and a goal, in sentences with their reasons."""

from __future__ import annotations

from collections.abc import Iterator

_HARD = "hard tasks gain from more directions; DoRA is nearer to full fine-tuning (Liu et al. 2024)"
# The ranks of LoRA that a task takes, and what else is known of it.
TASKS = {
    "classification": (4, 4, "few classes need few directions; BitFit is a cheap rival (Ben Zaken et al. 2022)"),
    "entities": (8, 8, "a label for each token needs a little more than one for each text"),
    "sentiment": (8, 16, "BitFit is a cheap rival here as well (Ben Zaken et al. 2022)"),
    "summarization": (8, 16, "a prefix does well from sequence to sequence (Li and Liang 2021)"),
    "translation": (8, 16, "a prefix does well from sequence to sequence (Li and Liang 2021)"),
    "instructions": (16, 32, "LoRA has the best quality for its cost (Hu et al. 2021)"),
    "reasoning": (32, 64, _HARD),
    "code": (32, 64, _HARD),
    "behaviour": (64, 128, "a full change of behaviour needs the most directions"),
}
GOALS = {
    "quality": "For quality: full fine-tuning is best, then DoRA, LoRA+ (B with a larger learning rate), LoRA, "
    "adapters, prefixes, prompts, BitFit and (IA)³; memory and compute are in about the same order.",
    "memory": "For memory: qlora keeps the weights in 4 bits (Dettmers et al. 2023), --checkpointing keeps one tensor "
    "for each layer and computes a forward more, and lora-fa keeps no layer's input for A (Zhang et al. 2023).",
    "parameters": "For few parameters: (IA)³ trains about 0.01 % of a model, and suits few examples (Liu et al. 2022).",
    "combining": "For several tasks that are to be combined: adapters with AdapterFusion, which combines what they "
    "learnt (Pfeiffer et al. 2021).",
    "serving": "For production: a merged LoRA has the base model's speed; many on one base share its weights unmerged.",
    "research": "For research: DoRA (Liu et al. 2024) and LoRA+ (Hayou et al. 2024) have the best quality.",
}
_CONSUMER = 24 << 30


def advise(method: str, rank: int, task: str | None, goal: str | None, memory: int | None) -> Iterator[str]:
    """What is known of the choice.

    Args:
        memory: bytes that there are, if that is known.
    """
    if task:
        least, most, reason = TASKS[task]
        span = f"{least}" if least == most else f"{least} to {most}"
        yield f"For {task}: a LoRA of rank {span}; {reason}."
        if method in ("lora", "qlora", "dora", "qdora", "lora-fa") and not least <= rank <= most:
            yield f"Rank {rank} is {'below' if rank < least else 'above'} that."
    if goal:
        yield GOALS[goal]
    elif memory is not None and memory < _CONSUMER and method not in ("qlora", "qdora"):
        yield GOALS["memory"]
    if method == "prompt":
        yield "A prompt competes with full fine-tuning from about 10 billion parameters on (Lester et al. 2021)."
    if method == "bitfit" and task not in (None, "classification", "entities", "sentiment"):
        yield "BitFit suits classification, not generation."
