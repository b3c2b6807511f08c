"""Comparison of two checkpoints, value by value.

Both checkpoints are verified first. One tensor of each is in memory at a time. Tensors are compared in slices, so that
double precision needs little memory. Two NaNs count as equal, because the tool compares stored values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_distill.checkpoint.tools.contents import Contents, open_checkpoint
from titan_distill.config.paths import of_key

_SLICE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class TensorDifference:
    """Element-wise difference of two tensors of one shape."""

    num_elements: int
    num_equal: int
    max_absolute: float
    """Largest `|a - b|`; infinite if only one of the two elements is NaN."""
    max_relative: float
    """Largest `|a - b| / max(|a|, |b|)`."""

    def __str__(self) -> str:
        return (
            f"max |a - b| {self.max_absolute:.3g}, relative {self.max_relative:.3g}, "
            f"{self.num_equal} of {self.num_elements} equal"
        )


def diff(a: Path, b: Path) -> Iterator[str]:
    """Yields one line of text per name whose values differ, sorted by name.

    Raises ValueError for a missing or damaged checkpoint, before the first line.
    """
    with of_key("A", a):
        first = open_checkpoint(a)
    with of_key("B", b):
        return _differences(first, open_checkpoint(b))


def _differences(a: Contents, b: Contents) -> Iterator[str]:
    for name in sorted({*a.names, *b.names}):
        if name not in a.names:
            what = f"only in {b.path}"
        elif name not in b.names:
            what = f"only in {a.path}"
        else:
            what = _compare(name, a, b)
        if what:
            yield f"{name}: {what}"


def _compare(name: str, a: Contents, b: Contents) -> str:
    """Returns a description of the difference; empty if there is none."""
    kind_a, kind_b = a.tensor(name), b.tensor(name)
    if kind_a is None or kind_b is None:
        return _compare_values(*(each.read(name) if each.tensor(name) is None else "a tensor" for each in (a, b)))
    kinds = "" if _kind(kind_a) == _kind(kind_b) else f"{_kind(kind_a)} against {_kind(kind_b)}"
    if kind_a.size != kind_b.size:
        return kinds
    values = compare_tensors(a.read(name), b.read(name))
    equal = values.num_equal == values.num_elements
    return kinds if equal else "; ".join(filter(None, (kinds, str(values))))


def compare_tensors(a: Tensor, b: Tensor) -> TensorDifference:
    """Compares tensors of one shape and any dtypes."""
    num_equal, max_absolute, max_relative = 0, 0.0, 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.numel(), _SLICE_ELEMENTS):
        x, y = (_widened(flat[start : start + _SLICE_ELEMENTS]) for flat in (flat_a, flat_b))
        equal = (x == y) | (x.isnan() & y.isnan())
        x, y = x.double(), y.double()
        num_equal += int(equal.sum())
        distance = (x - y).abs().nan_to_num(nan=torch.inf).masked_fill(equal, 0)
        relative = (distance / torch.maximum(x.abs(), y.abs())).nan_to_num(nan=torch.inf).masked_fill(equal, 0)
        max_absolute, max_relative = max(max_absolute, float(distance.max())), max(max_relative, float(relative.max()))
    return TensorDifference(a.numel(), num_equal, max_absolute, max_relative)


def _kind(entry: TensorStorageMetadata) -> str:
    return f"{str(entry.properties.dtype).removeprefix('torch.')} {list(entry.size)}"


def _widened(values: Tensor) -> Tensor:
    """Converts 8-bit floats without loss to a dtype that can be compared with any other."""
    return values.double() if values.is_floating_point() else values.long()


def _compare_values(a: Any, b: Any) -> str:
    """Returns the first part that differs. Showing whole values would be too long, because an optimizer's settings list
    every parameter."""
    leaves_a, leaves_b = dict(_leaves(a, "")), dict(_leaves(b, ""))
    differing = [path for path in leaves_a | leaves_b if leaves_a.get(path) != leaves_b.get(path)]
    if not differing:
        return ""
    path, more = differing[0], f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    where = f"{path} is " if path else ""
    return f"{where}{leaves_a.get(path, 'nothing')} against {leaves_b.get(path, 'nothing')}{more}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields path and representation of every leaf in nested dicts, lists and tuples."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if not inner:
        yield path, repr(value)
        return
    for key, item in inner:
        yield from _leaves(item, f"{path}[{key!r}]")
