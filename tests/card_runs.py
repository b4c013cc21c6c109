"""What tests of `python -m benchmarks card` share."""

import time

from benchmarks.card import run


def context_of(device="cpu"):
    sent = []
    return run.Context(device, [], time.monotonic() + 99, sent.append), sent


def ends(records):
    return {record["step"]: record for record in records if record["kind"] == "step"}
