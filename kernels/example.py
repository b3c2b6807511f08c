"""Video sparse attention beside dense attention on one layer's tokens: `PYTHONPATH=kernels python kernels/example.py`.

On CUDA: the 32,760 tokens of 81 frames at 480p, in bfloat16, through the Triton kernels. On a CPU: a small grid and the
plain-torch twins, whose time says nothing about the kernels'.
"""

import torch
import torch.nn.functional as F
from titan_kernels import tile_layout, video_sparse_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
grid, dtype = ((21, 30, 52), torch.bfloat16) if device == "cuda" else ((5, 8, 12), torch.float32)
layout = tile_layout(grid, device=device)  # cut into 4x4x4 tiles; those at the far faces are shorter, nothing is padded

shape = (1, layout.num_tokens, 12, 128)  # batch, tokens, heads, head dim
q, k, v, gate = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
# A model permutes its tokens (and their rotary phases) once, right after embedding them.
q, k, v, gate = (x[:, layout.permutation].requires_grad_() for x in (q, k, v, gate))

for sparsity in (0.0, 0.5, 0.9):
    topk = max(1, round((1 - sparsity) * layout.num_tiles))  # a run-time number: no sparsity compiles anything
    out = video_sparse_attention(q, k, v, layout, topk, gate)
    out.square().mean().backward()  # gradients of q, k, v and gate, bitwise the same at every run
    print(f"sparsity {sparsity}: {topk} of {layout.num_tiles} tiles, output norm {out.norm().item():.2f}")

dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
every = video_sparse_attention(q, k, v, layout, layout.num_tiles)  # all tiles and no gate: dense attention
print(f"all tiles against dense attention: largest difference {(every - dense).abs().max().item():.1e}")
