"""Faults that tests plant into the code to see that they would find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

Mutant = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def planted(mutant: Mutant | None) -> Iterator[None]:
    """The fault for the duration of the block; none for None."""
    with pytest.MonkeyPatch.context() as patch:
        if mutant is not None:
            mutant(patch)
        yield
