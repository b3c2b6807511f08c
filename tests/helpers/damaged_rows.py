"""Single rows of parquet data that are damaged, as the writer never writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def damage(file: Path, row: int, **values: Any) -> None:
    """Replaces columns of one row."""
    table = pq.ParquetFile(file).read()
    records = table.to_pylist()
    records[row] |= values
    pq.write_table(pa.Table.from_pylist(records, table.schema), file)
