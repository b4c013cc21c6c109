"""What the sequences of `test_optimize_sequences` are made of: models, steps that change them, and forwards."""

from model_sequences import adapter_steps, module_steps, parameter_steps
from model_sequences.checks import check_sequence
from model_sequences.forwards import FORWARDS
from model_sequences.pairs import TEMPLATES

__all__ = ["FORWARDS", "STEPS", "TEMPLATES", "check_sequence"]

# Every function of these modules whose first argument is a pair, as they stand there: hypothesis draws by their places.
STEPS = tuple(
    step
    for module in (adapter_steps, parameter_steps, module_steps)
    for step in vars(module).values()
    if callable(step) and getattr(step, "__code__", None) and step.__code__.co_varnames[:1] == ("pair",)
)
