"""scripts/gpu_versions, which tests with the versions of GPU machines: what needs no environment made."""

from __future__ import annotations

import os
import re
import subprocess

from runs import REPOSITORY


def test_without_python_312_it_says_so_and_fails() -> None:
    command = [REPOSITORY / "scripts" / "gpu_versions", "--quick"]
    environment = {**os.environ, "PYTHON312": "/usr/bin/false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 77
    assert re.fullmatch(r"NOT TESTED .*: /usr/bin/false is no Python 3.12; name one in PYTHON312\n", done.stderr)


def test_each_of_its_constraints_replaces_one() -> None:
    """Two constraints of one package would contradict each other."""
    names = {
        file: re.findall(r"^([\w.-]+)==", (REPOSITORY / file).read_text(), re.M)
        for file in ("constraints.txt", "constraints-gpu.txt")
    }
    assert len(names["constraints-gpu.txt"]) == 4 and set(names["constraints-gpu.txt"]) <= set(names["constraints.txt"])
