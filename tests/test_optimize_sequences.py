"""Random sequences of what a user can do to an accelerated model, each step followed by a forward that has to be the
stock model's.

Accelerated layers keep what they found out about themselves for the next call: packed weights, plans of decoder layers,
row squares. Whatever changes the model has to be seen by them, in any order. So two copies of a model, one of them
accelerated, go through the same steps, and have to compute the same after each.

2,000 sequences run by default; `pytest --hypothesis-profile long tests/test_optimize_sequences.py` runs ten times as
many.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_sequences import FORWARDS, STEPS, TEMPLATES, check_sequence

# How many of the sequences start from each model. hypothesis' profiles say how many examples a test has.
SHARES = {"4bit": 9, "dense": 9, "ia3": 4, "prefix": 4}

# A step has a seed of its own, so that what it draws stays the same when hypothesis leaves others out.
STEP = st.tuples(st.sampled_from(STEPS), st.sampled_from(FORWARDS), st.integers(0, 1 << 16))


def test_every_template_has_a_share():
    assert SHARES.keys() == TEMPLATES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_any_sequence_of_changes(template):
    # The same ones each time, so that a run does not fail for what it drew; the long profile draws others.
    profile = settings.default
    examples = SHARES[template] * profile.max_examples
    derandomize = profile.max_examples <= settings.get_profile("default").max_examples

    @settings(max_examples=examples, derandomize=derandomize, suppress_health_check=list(HealthCheck))
    @given(steps=st.lists(STEP, min_size=10, max_size=14))
    def run(steps):
        check_sequence(template, steps)

    run()
