"""A pooling that timm's vision transformers do not have."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ClassAndMean(VisionTransformer):
    """A vision transformer whose head reads the class token and the mean of the patches side by side.

    Source: the classifiers of DINOv2 (arXiv 2304.07193), transformers' Dinov2ForImageClassification.
    """

    def __init__(self, *args, num_classes: int = 1000, **kwargs) -> None:
        super().__init__(*args, num_classes=0, **kwargs)
        self.num_features = self.head_hidden_size = 2 * self.embed_dim
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, T, D) -> (B, 2 D)."""
        patches_mean_BD = x[:, self.num_prefix_tokens :].mean(dim=1)
        return torch.cat((x[:, 0], patches_mean_BD), dim=1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head, of width 2 D; the pooling stays.

        Args:
            global_pool: not used, as in the models of timm that have one pooling.
        """
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            reference = self.patch_embed.proj.weight
            self.head = nn.Linear(2 * self.embed_dim, num_classes, device=reference.device, dtype=reference.dtype)
        self.head.train(self.training)
