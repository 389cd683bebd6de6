"""Which cases of a test run in every suite; the others are left to the slow tests."""

import pytest


def others_slow(cases, always):
    """All cases as parameters of a test, marked slow but those that `always` run."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in always else pytest.mark.slow,
        )
        for case in cases
    ]
