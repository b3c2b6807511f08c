"""Download the wheels that a GPU machine without a package registry lacks: `python -m benchmarks.fetch_wheels FOLDER`.

`wheels.txt` beside this file lists them. They are fetched for Python 3.12 on Linux x86-64, whatever runs this, and
installed there with `python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl`; `PYTHONPATH=SITE` then
makes them importable. The folder must hold nothing else, because pip refuses two releases of one package.

Exit codes: 0, 1 where pip fails, 2 where the folder is not empty or the wheels are larger than 24 MiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WHEELS = Path(__file__).with_name("wheels.txt")
PYTHON = "3.12"
GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 24, 17)
"""pip takes a wheel's platform tag literally, so each glibc that wheels are built for is named."""
MOST_MIB = 24
"""Limit on the total size of the wheels, so that they are quick to copy."""


def requirements() -> list[str]:
    """`NAME==VERSION` of each wheel to carry."""
    lines = (line.split("#")[0].strip() for line in WHEELS.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def fetch(folder: Path) -> list[Path]:
    """Download the wheels into `folder`, which must be empty or absent.

    Raises:
        ValueError: `folder` holds something.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder, so that no package is there twice")
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *platforms]
    platforms_of_old = ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, *platforms_of_old, "--dest", str(folder)]
    subprocess.run([*command, *requirements()], check=True)
    return sorted(folder.iterdir())


def main(argv: Sequence[str] | None = None) -> None:
    """Download, list with sizes, and exit with the code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    try:
        wheels = fetch(parser.parse_args(argv).folder)
        total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
        for wheel in wheels:
            print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
        print(f"{total:6.2f} MiB of at most {MOST_MIB}")
        if total > MOST_MIB:
            raise ValueError(f"the wheels take {total:.1f} MiB, limit {MOST_MIB} MiB; remove a line from {WHEELS.name}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError:
        sys.exit(1)


if __name__ == "__main__":
    main()
