"""Comparison of two configurations: the one that a checkpoint was saved with, and the present one.

The saved one is the plain dict of `text.to_dict`, because the classes that it came from may have changed since. A key
that it lacks is younger than the checkpoint, which therefore had its default, or what `younger` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_distill.config.resume import BEFORE, LOGGED, REFUSED, on_resume
from titan_distill.config.text import default_of, fields_of, to_dict, toml_value


@dataclass(frozen=True)
class Change:
    """A key with two values, as text."""

    key: str
    before: str
    now: str
    resume: str
    """Effect on a resume: free, logged or refused."""

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def changes(saved: Mapping[str, Any], config: Any) -> list[Change]:
    """All keys whose value in `config` differs from the `saved` dict of an earlier one, in the order of the sections.

    A role that only one of the two has is one change. A key of [roles.<name>.optimizer] that changes as it does in
    [optimizer] is left out.
    """
    found = list(_compare(saved, to_dict(config, skip_origins=True), config, ""))
    return [change for change in found if _of_section(change) not in found]


def _of_section(change: Change) -> Change | None:
    """Returns the same change of the section that a role may override; None for a change elsewhere."""
    roles, _, rest = change.key.partition(".")
    return dataclasses.replace(change, key=rest.partition(".")[2]) if roles == "roles" else None


def _compare(saved: Mapping[str, Any], present: Mapping[str, Any], config: Any, prefix: str) -> Iterator[Change]:
    for field in fields_of(config):
        if field.name not in present:
            continue  # says where the configuration came from
        key, value, now = f"{prefix}{field.name}", getattr(config, field.name), present[field.name]
        if dataclasses.is_dataclass(value):
            yield from _compare(saved.get(field.name) or {}, now, value, f"{key}.")
        elif key == "roles":
            yield from _compare_roles(saved.get(key, {}), now, value)
        elif field.name in saved and saved[field.name] != now:
            yield Change(key, toml_value(saved[field.name]), toml_value(now), on_resume(field))
        elif field.name not in saved and value not in (default_of(field), field.metadata.get(BEFORE)):
            yield Change(key, "default", toml_value(now), on_resume(field))
    for name in sorted(saved.keys() - present.keys()):
        yield Change(f"{prefix}{name}", toml_value(saved[name]), "no longer a key", LOGGED)


def _compare_roles(saved: Mapping[str, Any], present: Mapping[str, Any], roles: Mapping[str, Any]) -> Iterator[Change]:
    for name in {**present, **saved}:
        if name in saved and name in present:
            yield from _compare(saved[name], present[name], roles[name], f"roles.{name}.")
            continue
        kind, resume = ("trained", REFUSED) if {**saved, **present}[name]["trainable"] else ("frozen", LOGGED)
        before, now = ("absent", kind) if name in present else (kind, "absent")
        yield Change(f"roles.{name}", before, now, resume)
