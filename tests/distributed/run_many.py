"""Runs several jobs one after another in the same ranks: a launch costs more than eight steps of the tiny Wan.

Started by torchrun with the path of a JSON file that holds a list of command lines.
"""

import json
import sys
from pathlib import Path

from titan_distill.train import main

if __name__ == "__main__":
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(argv):
            sys.exit(code)
