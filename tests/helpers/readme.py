"""The README's commands in order, and the rule that makes each of them short enough for a test."""

from __future__ import annotations

import re

from runs import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line.strip()]
INSTALLATION = "pip install"
SMALL = {
    "run_train.sh": "--training.steps 2 --checkpoint.interval 1 --validation.num_prompts 2 --validation.num_videos 1",
    "rcm.toml": "--method_config.tangent_warmup 1",
    "data ode-pairs": "--num-pairs 8",
}
"""Options that are appended to every command with these words. A later option wins over the same one before it."""
STEPS_PER_SMALL_STEP = 300
"""The default job saves at steps 300 and 600, its small form at steps 1 and 2."""
PLACEHOLDERS = ("FOLDER", "PIPELINE")
"""Words for what readers bring, as the README says. Tests put folders of these names in place."""


def small(command: str) -> str:
    """The same command at small size."""
    appended = "".join(f" {options}" for words, options in SMALL.items() if words in command)
    return re.sub(r"step-(\d{8})", lambda m: f"step-{int(m[1]) // STEPS_PER_SMALL_STEP:08d}", command) + appended
