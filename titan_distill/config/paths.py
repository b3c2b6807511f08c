"""Messages about the path of a key or an option.

A relative path starts at the working directory, which is not always where the user thinks it is. A message about a
path's target therefore begins with the key and, for a relative path, that directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_url(text: str) -> bool:
    """Returns whether a path of data is a URL such as `s3://bucket/folder`, which fsspec opens."""
    return re.match(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", text) is not None


def seen_from(path: object) -> str:
    """Returns where a relative path is seen from, in brackets with a space before; empty for an absolute path and for a
    URL."""
    return "" if is_url(str(path)) or Path(str(path)).is_absolute() else f" (seen from {Path.cwd()})"


def is_reference(text: str) -> bool:
    """Returns whether the value of an `init_from` names a role of a checkpoint, as PATH#ROLE. Otherwise it names a
    folder of weights, whose name may have a `#`, too."""
    return "#" in text and not os.path.isdir(text)


@contextmanager
def of_key(key: str, path: object) -> Iterator[None]:
    """Puts `key = 'path'` and, for a relative path, the working directory before the messages of ValueErrors. `key` is
    a configuration key or an option."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{key} = {str(path)!r}{seen_from(path)}: {error}",)
        raise
