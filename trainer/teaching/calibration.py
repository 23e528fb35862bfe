"""The images that least squares are made on: a projected start, and modules fitted to each other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from models.flops import num_tokens
from models.preprocessing import Preprocessing
from trainer.context import Run
from trainer.data.base import ImageSource
from trainer.data.loader import eval_batches
from trainer.distributed.interrupt import HEARTBEAT

BATCH = 64  # images per forward
TOKENS = 49_152  # that a fit is made on, where the recipe says nothing else
IMAGES = 256  # and at least as many images: a head reads one token of each


def image_count(run: Run, model: nn.Module, asked: int | None) -> int:
    """Training images that a fit is made on.

    Args:
        model: a ViT that reads them.
        asked: by the recipe; None = enough for TOKENS, and at least IMAGES.
    """
    return min(asked or max(IMAGES, TOKENS // num_tokens(model)), len(run.sources[0]))


def batches(run: Run, images: ImageSource, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Images (B, 3, H, W) without augmentation, on the device."""
    for batch in eval_batches(images, preprocessing, batch=BATCH, workers=run.workers):
        HEARTBEAT.beat()
        yield batch.images[batch.mask].to(run.dist.device)
