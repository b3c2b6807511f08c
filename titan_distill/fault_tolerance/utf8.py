"""UTF-8 in any locale.

Every file of text here names its encoding, but names of files, the terminal and the files of libraries follow the
locale. In a locale such as C or ISO-8859-1 a path or a log line with other letters then ends a run. Python decides at
its start, so the process is replaced by one in Python's UTF-8 mode.
"""

from __future__ import annotations

import locale
import os
import sys

_VARIABLE = "PYTHONUTF8"


def restart_in_utf8() -> None:
    """Starts this program again, in the same process, with UTF-8 for everything; returns if that is so already."""
    encodings = {locale.getpreferredencoding(False), sys.getfilesystemencoding(), sys.stdout.encoding or "utf-8"}
    if {name.lower().replace("-", "") for name in encodings} == {"utf8"} or os.environ.get(_VARIABLE) == "1":
        return
    os.environ[_VARIABLE] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
