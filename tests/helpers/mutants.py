"""Mutants: faults planted into the code, to see that the tests find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

Mutant = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def planted(mutant: Mutant | None) -> Iterator[None]:
    """The fault for the duration of the block; none for None."""
    with pytest.MonkeyPatch.context() as patch:
        if mutant is not None:
            mutant(patch)
        yield


def is_caught(check: Callable[[], object], mutant: AbstractContextManager[Any] | None = None) -> bool:
    """True if an assertion of `check` fails while `mutant` is planted; without `mutant`, `check` judges its results.

    Any other exception passes through: a mutant that ends in an ImportError or a TypeError is broken, not caught.
    """
    with mutant or nullcontext():
        try:
            check()
        except AssertionError:
            return True
    return False
