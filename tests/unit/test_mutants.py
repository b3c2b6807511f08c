"""The helper that says whether a test catches a mutant."""

from __future__ import annotations

import math

import pytest
from mutants import is_caught, planted


def check() -> None:
    assert math.floor(1.5) == 1


@pytest.mark.parametrize(("floor", "caught"), [(lambda x: 1, False), (lambda x: 2, True)])
def test_a_failed_assertion_catches(floor, caught):
    assert is_caught(check, planted(lambda patch: patch.setattr(math, "floor", floor))) is caught
    assert math.floor(1.5) == 1


def test_a_broken_mutant_is_not_caught():
    with pytest.raises(TypeError):
        is_caught(check, planted(lambda patch: patch.setattr(math, "floor", lambda: 1)))
    with pytest.raises(AttributeError):
        is_caught(check, planted(lambda patch: patch.setattr(math, "ground", None)))
