"""The configuration of a run. A user's own module needs no more than these names."""

from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError

__all__ = ["Config", "ConfigError", "load_config"]
