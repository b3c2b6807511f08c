"""Effect of a changed key on a resume, which each field of the configuration says beside its default.

    free      the present value holds and nothing is said: it steers the run, or where and how the run computes
    logged    the present value holds from the resumed step on; the log says the old value and the new one
    refused   the state of the run depends on it: another value ends the resume in one sentence

A field that says nothing is refused, so that no new key changes a resumed run by oversight. Refused are seed and batch
size, which key noise and data order; what gives the stored tensors their names, shapes, types and meaning; and the
cadence of updates, because a role's place in its learning-rate schedule is its number of updates.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")

RESUME, BEFORE = "resume", "before"
"""Keys in the metadata of a field."""
FREE, LOGGED, REFUSED = "free", "logged", "refused"
_NO_DEFAULT: Any = dataclasses.MISSING


def free(default: T = _NO_DEFAULT) -> T:
    """Declares a field that a resume may change, with its default (none: the key is required)."""
    return dataclasses.field(default=default, metadata={RESUME: FREE})


def logged(default: T = _NO_DEFAULT) -> T:
    """Declares a field that a resume may change, which the log then says, with its default (none: required)."""
    return dataclasses.field(default=default, metadata={RESUME: LOGGED})


def younger(default: T, before: Any) -> T:
    """Declares a field that a resume refuses to change, with its default, and its meaning in checkpoints from before
    the field if that is not the default."""
    return dataclasses.field(default=default, metadata={BEFORE: before})


def on_resume(field: dataclasses.Field[Any]) -> str:
    """Returns free, logged or refused. Fields that say where a configuration came from (`compare=False`) are free."""
    word: str = field.metadata.get(RESUME, REFUSED if field.compare else FREE)
    return word
