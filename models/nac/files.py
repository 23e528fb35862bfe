"""What a published NAC's config.json says beside its fields, for timm and transformers; see models/files/saved.py."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..files.hub import Weights
from ..files.saved import Format, timm_pretrained_cfg
from ..preprocessing import Preprocessing
from .config import MODEL_TYPE, POOLING, NACConfig

ARCHITECTURE = "nac"  # timm's name of a NAC that is built from its arguments alone
TIMM_NAMES = {"image_size": "img_size"}  # our name -> timm's
# what timm's caller decides on, so that model_args leaves it out (num_classes stands in pretrained_cfg)
TIMM_DECIDES = ("num_classes", "drop_path_rate", "seed")


def check_counts(config: NACConfig, weights: Weights) -> None:
    """Refuse a configuration with more propagators than the weights hold, before they are built.

    Raises:
        ValueError: naming the tensor of the last one.
    """
    last = f"propagators.{config.propagators - 1}.kernel.bandwidth"
    if last not in weights.names():
        raise ValueError(
            f"{weights.files} lacks {last}: the configuration asks for {config.propagators} propagators. Take the "
            "config.json that was saved with these weights."
        )


def _content(config: NACConfig, preprocessing: Preprocessing | None, labels: Sequence[str] | None) -> dict[str, Any]:
    values = asdict(config)
    arguments = {TIMM_NAMES.get(name, name): value for name, value in values.items() if name not in TIMM_DECIDES}
    return {
        "architectures": ["NACForImageClassification"],
        **values,
        "architecture": ARCHITECTURE,
        "num_features": config.state_dim,
        "global_pool": POOLING,
        "model_args": arguments,
        "pretrained_cfg": timm_pretrained_cfg(config, preprocessing, first_conv="tokenizer.stem.0", any_size=True),
    }


FORMAT = Format("NAC", MODEL_TYPE, NACConfig.from_dict, _content, check_counts)
