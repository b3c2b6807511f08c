"""Silences messages of libraries at import about features that this project does not use."""

import logging
import os
import warnings

_TALKATIVE = ("torchao", "torch.utils._pytree", "diffusers", "transformers", "httpx", "torch.distributed")


def quiet_libraries() -> None:
    """Lets the libraries of this project report errors only; call it before they are used."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # both set their loggers' level at import
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
