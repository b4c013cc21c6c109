"""What is run, in this order: the most important first, since what there is no time for is left out."""

from __future__ import annotations

from benchmarks.card.run import Step

PHASES = ("correctness", "timing", "profile")
# Families whose cases are checked together, the most used first; what one of them spoils, the next does not meet.
CHECKED = (
    ("lora_linear", 90.0), ("nf4", 40.0), ("rms_norm", 25.0), ("glu", 25.0), ("rotary", 25.0), ("cross_entropy", 25.0),
    ("dropout", 25.0), ("attention", 40.0), ("dora_linear", 30.0), ("ia3_linear", 30.0), ("lora_linear_grouped", 30.0),
    ("grouped_linear", 30.0), ("adapter", 30.0), ("adapter_fusion", 30.0), ("combine", 40.0),
)  # fmt: skip
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # N, K
TUNED = ((4096, 4096), (14336, 4096))

WGMMA = {"PEFT_KERNELS_WGMMA": "1"}  # which changes nothing unless the card is an H100

# Before every phase; what they record stands first in its file.
ENVIRONMENT = Step("", "environment", 60, "machine:environment")
BUILD = Step("", "build", 500, "machine:build")

STEPS = (
    Step("correctness", "ceilings", 40, "machine:ceilings"),
    *(
        Step("correctness", f"kernels of {family}", limit, "correctness:kernels", options={"family": family})
        for family, limit in CHECKED
    ),
    Step("correctness", "sanitizers", 110, "correctness:sanitizers", needs="cuda"),
    Step("correctness", "tests", 200, "correctness:tests"),
    Step("correctness", "bit-equal runs", 60, "hardware:repeated"),
    Step("correctness", "side stream", 20, "hardware:side_stream", needs="cuda"),
    Step("correctness", "graph capture", 30, "hardware:graphs", needs="cuda"),
    Step("correctness", "short memory", 20, "hardware:failed_allocation", needs="cuda"),
    Step("correctness", "large tensors", 60, "hardware:large", needs="cuda"),
    Step("correctness", "second device", 20, "hardware:second_device", needs="cuda"),
    Step("correctness", "kernels for sm_90a", 60, "correctness:kernels", "", {"family": "lora_linear"}, WGMMA),
    Step("timing", "ceilings", 40, "machine:ceilings"),
    *(
        # A rehearsal has one shape of its own.
        Step("timing", f"linear {n}x{k}", limit, "timing:linear", "" if n == k else "cuda", {"n": n, "k": k})
        for (n, k), limit in zip(SHAPES, (90.0, 65.0, 65.0, 90.0), strict=True)
    ),
    Step("timing", "eager", 30, "timing:eager"),
    Step("timing", "families", 60, "timing:families"),
    Step("timing", "compiled", 60, "timing:compiled"),
    *(Step("timing", f"tune {n}x{k}", 50, "timing:tune", "" if n == k else "cuda", {"n": n, "k": k}) for n, k in TUNED),
    Step("timing", "linear 4096x4096 by wgmma", 90, "timing:linear", "cuda", {"n": 4096, "k": 4096}, WGMMA),
    Step("profile", "ceilings", 40, "machine:ceilings"),
    Step("profile", "counters of ncu", 240, "profile:counters", needs="cuda"),
    Step("profile", "attention backends", 30, "profile:backends"),
    Step("profile", "model", 200, "model:measure"),
)
