"""Stage `text_encoder`: bytes in, meaning out: ByT5's tokenizer (no vocabulary file) and a tiny UMT5 encoder.

The encoder is trained, for a minute, to let linear heads name the four attributes of a caption from the mean of its
outputs, so that its embeddings carry what the caption says; the heads are then thrown away. Held-out combinations stay
held out here too. UMT5's last layer norm keeps the embeddings near unit scale, as Wan's text encoder does.

Legend: B captions, L bytes, D width.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.shapes import WORDS, ShapesClip, captioned, held_out_attributes, train_attributes
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

WIDTH = 64
MAX_TOKENS = 64
NUM_STEPS = 600
BATCH_SIZE = 32


def train_text_encoder(folder: Path, *, seed: int) -> None:
    """Train the encoder and save it to `folder`/text_encoder, its tokenizer to `folder`/tokenizer."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = ByT5Tokenizer(model_max_length=MAX_TOKENS)
    encoder = _build_encoder(len(tokenizer))
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in WORDS.items()})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    captions = captioned(train_attributes())
    for step in range(1, NUM_STEPS + 1):
        batch = [captions[i] for i in rng.integers(len(captions), size=BATCH_SIZE)]
        logits, labels = _predict(encoder, heads, tokenizer, batch)
        loss = sum((F.cross_entropy(logits[name], labels[name]) for name in WORDS), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"text encoder step {step}: loss {loss.item():.4f}", flush=True)
    accuracy = _accuracy(encoder, heads, tokenizer, captioned(held_out_attributes()))
    print(f"text encoder: {accuracy:.1%} of attributes read from held-out captions", flush=True)
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def _build_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def _predict(
    encoder: UMT5EncoderModel, heads: nn.ModuleDict, tokenizer: ByT5Tokenizer, batch: list[tuple[str, ShapesClip]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and labels of each attribute, [B, values] and [B]."""
    tokens = tokenizer([caption for caption, _ in batch], padding=True, return_tensors="pt")
    hidden_BLD = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    mask_BL1 = tokens.attention_mask[..., None]
    mean_BD = (hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
    logits = {name: heads[name](mean_BD) for name in WORDS}
    labels = {
        name: torch.tensor([values.index(getattr(clip, name)) for _, clip in batch]) for name, values in WORDS.items()
    }
    return logits, labels


@torch.no_grad()
def _accuracy(
    encoder: UMT5EncoderModel, heads: nn.ModuleDict, tokenizer: ByT5Tokenizer, batch: list[tuple[str, ShapesClip]]
) -> float:
    logits, labels = _predict(encoder, heads, tokenizer, batch)
    return float(torch.stack([(logits[name].argmax(dim=-1) == labels[name]).float() for name in WORDS]).mean())
