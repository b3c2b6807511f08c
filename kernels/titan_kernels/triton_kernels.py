"""The Triton launchers in one place, under the names and signatures of their twins in `reference`."""

from titan_kernels.block_topk import block_topk
from titan_kernels.gated_add import gated_add, gated_add_backward
from titan_kernels.jvp import attention_jvp
from titan_kernels.normal import philox_normal
from titan_kernels.tile_pool import tile_pool, tile_pool_backward
from titan_kernels.transpose_lists import transpose_lists
from titan_kernels.vsa_backward import vsa_backward
from titan_kernels.vsa_forward import vsa_forward

__all__ = [
    "attention_jvp",
    "block_topk",
    "gated_add",
    "gated_add_backward",
    "philox_normal",
    "tile_pool",
    "tile_pool_backward",
    "transpose_lists",
    "vsa_backward",
    "vsa_forward",
]
