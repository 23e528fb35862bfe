"""What a published V-MoE's config.json says beside its fields, for timm and transformers; see models/files/saved.py."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..files.hub import Weights
from ..files.saved import Format, timm_pretrained_cfg
from ..files.wrappers import grouped
from ..moe.expert import LAYERS
from ..preprocessing import Preprocessing
from .config import MODEL_TYPE, POOLS, VMoEConfig, moe_numbers

ARCHITECTURE = "vmoe"  # timm's name of a V-MoE that is built from its arguments alone
TIMM_NAMES = {  # our name -> timm's
    "image_size": "img_size",
    "width": "embed_dim",
    "heads": "num_heads",
    "pool": "global_pool",
    "drop_rate": "proj_drop_rate",
    "swiglu": "swiglu_mlp",
    "layer_scale": "init_values",
}
# what timm's caller decides on, so that model_args leaves it out (num_classes stands in pretrained_cfg)
TIMM_DECIDES = ("num_classes", "drop_path_rate", "drop_rate", "seed")


def check_counts(config: VMoEConfig, weights: Weights) -> None:
    """Refuse a configuration with more blocks or experts than the weights hold, before they are built.

    Raises:
        ValueError: naming the tensor of the last block or expert.
    """
    last_tensors = [f"blocks.{config.depth - 1}.norm1.weight"]
    moe_blocks = moe_numbers(config.moe_blocks, config.depth)
    if moe_blocks:
        first_layer = LAYERS[config.activation][0]
        last_tensors.append(f"blocks.{moe_blocks[-1]}.mlp.experts.{config.moe.num_experts - 1}.{first_layer}.weight")
    for name in last_tensors:
        if name not in weights.names():
            raise ValueError(
                f"{weights.files} lacks {name}: the configuration asks for {config.depth} blocks and "
                f"{config.moe.num_experts} experts, its tensors are {grouped(weights.names())}. Take the config.json "
                f"that was saved with these weights; of a wrapped model, save the state dict of the model itself."
            )


def _content(config: VMoEConfig, preprocessing: Preprocessing | None, labels: Sequence[str] | None) -> dict[str, Any]:
    """config.json but for its model type, preprocessing and labels, without what is not known."""
    values = asdict(config)
    content = {
        "architectures": ["VMoEForImageClassification" if config.num_classes else "VMoEModel"],
        **values,
        "architecture": ARCHITECTURE,
        "num_features": config.width,
        "global_pool": POOLS[config.pool],
        "model_args": _timm_arguments(values),
        "pretrained_cfg": timm_pretrained_cfg(
            config, preprocessing, first_conv="patch_embed.proj", any_size=config.dynamic_img_size
        ),
    }
    # a field of VMoEConfig may be None; what others read is left out then
    return {name: value for name, value in content.items() if value is not None or name in values}


def _timm_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a VMoEConfig as arguments of timm's create_model."""
    arguments = {TIMM_NAMES.get(name, name): value for name, value in values.items() if name not in TIMM_DECIDES}
    arguments["global_pool"] = POOLS[values["pool"]]
    return arguments


FORMAT = Format("V-MoE", MODEL_TYPE, VMoEConfig.from_dict, _content, check_counts)
