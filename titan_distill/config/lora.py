"""[roles.<name>.lora]: what of a role's network is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_distill.config.parsing import check_range


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 0
    """Train low-rank adapters of this rank and leave the role's weights as they are; 0 trains all weights."""
    alpha: float | None = None
    """Adapters count alpha / rank times; none takes the rank, so once."""
    target_modules: tuple[str, ...] = ()
    """Linear layers of the blocks that get an adapter, each named by the end of its name (to_q, ffn.net.2); empty takes
    all."""

    def __post_init__(self) -> None:
        check_range(self, "rank", least=0)
        check_range(self, "alpha", above=0, below=math.inf)
        for name in ("alpha", "target_modules"):
            if getattr(self, name) and not self.rank:
                raise ValueError(f"{name} has no effect with rank = 0; set rank, or remove it")

    @property
    def enabled(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        """By which the product of an adapter's two matrices is multiplied."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def check_role(self, *, trainable: bool, weights: str, attention: str) -> None:
        """Checks adapters against the rest of their role's table. Raises ValueError."""
        if not self.enabled:
            return
        if not trainable:
            raise ValueError(f"trainable = false leaves lora.rank = {self.rank} without effect; remove [lora]")
        if not weights:
            raise ValueError(
                f"lora.rank = {self.rank} adapts weights, but the role has none; set path or init_from, or rank to 0"
            )
        if attention == "sparse":
            raise ValueError(
                f"lora.rank = {self.rank} does not go with attention = 'sparse', whose gates a dense base lacks and "
                "adapters do not train; set attention to 'dense' or rank to 0"
            )
