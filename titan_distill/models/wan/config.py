"""The configuration of a Wan transformer: diffusers' `config.json` as a frozen dataclass, and the published sizes.

Keys, defaults and meaning are those of diffusers' `WanTransformer3DModel`, so that a folder written by either library
configures the other. Unlike diffusers, a key that nothing would read or a combination that can't run is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from titan_distill.config.sections import FIRST_TILE, Tile

DIFFUSERS_CLASS_NAME = "WanTransformer3DModel"


@dataclass(frozen=True)
class WanConfig:
    """Shape of one Wan transformer; sizes are counts of channels unless they say otherwise."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent voxels per token along (frames, height, width)."""
    num_attention_heads: int = 40
    """Heads of self- and cross-attention; the model's width is this times `attention_head_dim`."""
    attention_head_dim: int = 128
    """Channels per head; even, because rotary phases turn pairs of them."""
    in_channels: int = 16
    """Latent channels in: 16 for T2V, 48 for TI2V-5B, 36 for I2V (noise, mask and first-frame latent)."""
    out_channels: int = 16
    """Velocity channels out."""
    text_dim: int = 4096
    """Width of the text encoder's embeddings."""
    freq_dim: int = 256
    """Sinusoidal features of the timestep; even."""
    ffn_dim: int = 13824
    """Hidden width of each block's feed-forward."""
    num_layers: int = 40
    """Transformer blocks."""
    cross_attn_norm: bool = True
    """LayerNorm with weight and bias before cross-attention."""
    qk_norm: str = "rms_norm_across_heads"
    """Normalisation of queries and keys; Wan knows only this one, over the full width."""
    eps: float = 1e-6
    """Epsilon of all norms but the image embedder's."""
    image_dim: int | None = None
    """Width of CLIP image embeddings; None for models without them."""
    added_kv_proj_dim: int | None = None
    """Input width of the image keys and values in cross-attention; set together with `image_dim`."""
    rope_max_seq_len: int = 1024
    """Largest grid size, in tokens along one dimension, that rotary phases are defined for."""
    pos_embed_seq_len: int | None = None
    """Image tokens that get a learned position (first-last-frame models); None for none."""
    sparse_attention: bool = False
    """Blocks have a gate, `to_gate_compress`, for the coarse branch of video sparse attention. Not diffusers' key: it
    is written only where it is true, and diffusers then says that it ignores it."""
    vsa_tile: Tile = FIRST_TILE
    """Tokens of a tile of sparse attention along (frames, height, width). Not diffusers' key either; it is written for
    sparse models only. Files without it have the published tile."""
    causal_attention: bool = False
    """Trained with block-causal attention. Not diffusers' key either; the weights fit its model, which would attend
    both ways."""

    @property
    def inner_dim(self) -> int:
        """The model's width."""
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check_kind(name, getattr(self, name), kind)
            _check_positive(name, getattr(self, name))
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size {self.patch_size} must have three entries (frames, height, width)")
        if len(self.vsa_tile) != 3:
            raise ValueError(f"vsa_tile {self.vsa_tile} must have three entries (frames, height, width)")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(f"attention_head_dim {self.attention_head_dim} must be even and at least 6 for 3-d RoPE")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half sines, half cosines")
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm {self.qk_norm!r} is unknown; Wan uses 'rms_norm_across_heads'")
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise ValueError(
                f"image_dim {self.image_dim} and added_kv_proj_dim {self.added_kv_proj_dim} must be set together"
            )
        if self.added_kv_proj_dim not in (None, self.inner_dim):
            raise ValueError(
                f"added_kv_proj_dim {self.added_kv_proj_dim} must equal the model's width {self.inner_dim}, "
                "to which the image embedder projects"
            )
        if self.causal_attention and self.sparse_attention:
            raise ValueError("causal_attention and sparse_attention are both true; set one of them to false")
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError(f"pos_embed_seq_len {self.pos_embed_seq_len} needs image_dim; set it, or remove the key")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> WanConfig:
        """Read a diffusers `config.json`; keys that start with `_` are the library's own and only checked for class.

        Raises:
            ValueError: another class, an unknown key, or values that can't work.
        """
        class_name = config.get("_class_name", DIFFUSERS_CLASS_NAME)
        if class_name != DIFFUSERS_CLASS_NAME:
            raise ValueError(
                f"the network's configuration is of class {class_name!r}, not {DIFFUSERS_CLASS_NAME!r}; name the "
                "folder of a Wan transformer"
            )
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"config has keys that no Wan transformer reads: {', '.join(unknown)}")
        for key in values.keys() & {"patch_size", "vsa_tile"}:
            sizes = values[key]
            values[key] = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
        if values.get("out_channels", 0) is None:  # diffusers' way to say "as many as come in"
            values["out_channels"] = values.get("in_channels", cls.in_channels)
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """Return the dict that diffusers' `config.json` holds."""
        values = asdict(self)
        for name in ("sparse_attention", "causal_attention"):
            if not values[name]:
                del values[name]
        values |= {"patch_size": list(self.patch_size), "vsa_tile": list(self.vsa_tile)}
        if not self.sparse_attention:
            del values["vsa_tile"]
        return {"_class_name": DIFFUSERS_CLASS_NAME, **values}


def _check_kind(name: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) or (kind,)
    for item in value if isinstance(value, tuple) else (value,):
        if type(item) not in kinds and not (kind is float and type(item) is int):
            wanted = " or ".join("null" if other is NoneType else other.__name__ for other in dict.fromkeys(kinds))
            raise ValueError(f"{name} {value!r} must be {wanted}; copy config.json again")


def _check_positive(name: str, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool) and number <= 0:
            raise ValueError(f"{name} {value} must be positive")


_TINY = WanConfig(num_layers=6, num_attention_heads=4, attention_head_dim=32, ffn_dim=512, text_dim=64, freq_dim=64)

FLAVORS: dict[str, WanConfig] = {
    "tiny": _TINY,
    "1.3B": WanConfig(num_layers=30, num_attention_heads=12, ffn_dim=8960),
    "5B": WanConfig(num_layers=30, num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48),
    "14B": WanConfig(),
    "A14B": WanConfig(),
    "tiny-A14B": _TINY,
    "A14B-I2V": WanConfig(in_channels=36),
    "14B-I2V": WanConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
}
"""Published sizes by name, of one network. "5B" is Wan2.2 TI2V, "A14B" is Wan2.2 T2V, of which a role has two (so has
"tiny-A14B"), "A14B-I2V" its image-to-video model, "14B-I2V" is Wan2.1 image-to-video with CLIP image embeddings."""
