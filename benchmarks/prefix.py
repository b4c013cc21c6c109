"""Attention to a trainable prefix: checked against fp64, then timed against concatenated keys and torch's attention.

Stock expands the prefix over the batch and puts it in front of keys and values, as PEFT's caches do.
"""

from benchmarks.attention import BASELINES, run
from benchmarks.attention import PREFIX_CASES as CASES
from benchmarks.report import command

main = command("prefix", __doc__, CASES, BASELINES, run)
