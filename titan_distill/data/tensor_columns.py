"""Decoder of tensors from the columns of a row group.

Checking and copying small tensors one by one takes longer than reading them. So all tensors of a column are decoded
together (`TensorColumn`), if every row of the group has one and all are good and of one dtype. Otherwise each row is
decoded alone (`decode_row`), which says what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from titan_distill.config.dtypes import DTYPES
from titan_distill.data.rows import BadRowError, brief

TYPES = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
"""Types of the three columns of a tensor by the ends of their names."""

Columns = dict[str, pa.Array | pa.ChunkedArray]
"""Columns of a row group by name. One of 2 GiB or more comes in several chunks, because the offsets of an array have 32
bits."""


def columns_of(name: str) -> dict[str, pa.DataType]:
    """Returns the names and types of the three columns of a tensor."""
    return {f"{name}_{part}": kind for part, kind in TYPES.items()}


@dataclass(frozen=True)
class TensorColumn:
    """The tensors of one name in all rows of a group, one after the other."""

    values: Tensor  # [N, *shape] if all have one shape, else flat
    ends: npt.NDArray[np.int64] | None = None  # of each row in flat values
    shapes: npt.NDArray[np.int64] | None = None  # by row of flat values

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.values.nbytes + sum(part.nbytes for part in (self.ends, self.shapes) if part is not None)

    def row(self, index: int) -> Tensor:
        """Returns one row's tensor. It shares memory with `values`."""
        if self.ends is None or self.shapes is None:
            return self.values[index]
        start = self.ends[index - 1] if index else 0
        return self.values[start : self.ends[index]].view(self.shapes[index].tolist())


def decode_column(columns: Columns, name: str, num_dims: int | None) -> TensorColumn | None:
    """Decodes the tensors `name` of all rows; `num_dims` is their number of dims, None allows any. Returns None if the
    rows must be decoded alone: a tensor is missing or bad, dtypes or types of columns are unusual, or a column comes in
    several chunks."""
    data, shapes, dtypes = (columns.get(f"{name}_{part}") for part in TYPES)
    if any(isinstance(part, pa.ChunkedArray) for part in (data, shapes, dtypes)):
        return None
    if data is None or shapes is None or dtypes is None or data.null_count or shapes.null_count or dtypes.null_count:
        return None
    dtype = _only_dtype(dtypes)
    shapes_ND = _equal_lists(shapes)
    ends = _value_ends(data)
    if dtype is None or shapes_ND is None or ends is None or not shapes_ND.size or shapes_ND.min() < 1:
        return None
    sizes = np.prod(shapes_ND, axis=1, dtype=np.float64) * dtype.itemsize  # float64 does not overflow
    if num_dims not in (None, shapes_ND.shape[1]) or not np.array_equal(np.diff(ends), sizes):
        return None
    # bytearray: the copy is writable.
    values = torch.frombuffer(bytearray(memoryview(data.buffers()[2])[ends[0] : ends[-1]]), dtype=dtype)
    if not values.isfinite().all():
        return None
    if (shapes_ND == shapes_ND[0]).all():
        return TensorColumn(values.view(len(shapes_ND), *shapes_ND[0].tolist()))
    return TensorColumn(values, (ends[1:] - ends[0]) // dtype.itemsize, shapes_ND)


def _only_dtype(names: pa.Array) -> torch.dtype | None:
    try:
        (name,) = names.unique().to_pylist()
    except ValueError:  # several, or not valid UTF-8
        return None
    return DTYPES.get(name)


def _equal_lists(lists: pa.Array) -> npt.NDArray[np.int64] | None:
    """Returns an array of lists of integers as a matrix; None if they are not of one length."""
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        return None
    lengths, values = np.diff(lists.offsets), lists.flatten()
    if values.null_count or not len(lengths) or (lengths != lengths[0]).any():
        return None
    return values.to_numpy(zero_copy_only=False).astype(np.int64).reshape(len(lists), -1)


def _value_ends(data: pa.Array) -> npt.NDArray[np.int64] | None:
    """Returns where the values of an array of bytes begin, followed by the end of the last, in its buffer; None if its
    type has no such buffer, or it is empty."""
    kinds = {pa.binary(): np.int32, pa.large_binary(): np.int64}
    if data.type not in kinds or data.buffers()[2] is None:
        return None
    offsets = np.frombuffer(data.buffers()[1], kinds[data.type])
    return offsets[data.offset : data.offset + len(data) + 1].astype(np.int64)


def decode_row(record: Mapping[str, pa.Scalar], name: str, num_dims: int | None, where: object) -> Tensor | None:
    """Builds a tensor of one row from its three columns; None if they are absent or empty. Raises BadRowError for a bad
    one."""
    if f"{name}_bytes" not in record:
        return None
    data = record[f"{name}_bytes"].as_buffer() if record[f"{name}_bytes"].is_valid else pa.py_buffer(b"")
    shape, dtype_name = record[f"{name}_shape"].as_py() or [], plain(record, f"{name}_dtype", where) or ""
    if not data.size and not shape:
        return None
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise BadRowError(f"{where}: {name}_dtype is {dtype_name!r}: expected one of {', '.join(DTYPES)}")
    if len(shape) != (num_dims or max(1, len(shape))) or not all(size is not None and size >= 1 for size in shape):
        expected = "positive sizes" if num_dims is None else f"{num_dims} positive sizes"
        raise BadRowError(f"{where}: {name}_shape is {brief(shape)}: expected {expected}")
    if data.size != math.prod(shape) * dtype.itemsize:
        size = math.prod(shape) * dtype.itemsize
        raise BadRowError(f"{where}: {name}_bytes holds {data.size} bytes: {shape} in {dtype_name} takes {size}")
    # bytearray: the copy is writable and outlives the cached row group.
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    if not tensor.isfinite().all():
        raise BadRowError(f"{where}: {name} has non-finite values")
    return tensor


def plain(record: Mapping[str, pa.Scalar], name: str, where: object) -> Any:
    """Returns a value of a row as a Python object. Raises BadRowError for text that is not UTF-8."""
    try:
        return record[name].as_py()
    except UnicodeDecodeError as error:
        raise BadRowError(f"{where}: {name} is not valid UTF-8 ({brief(error)})") from error
