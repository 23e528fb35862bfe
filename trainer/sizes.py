"""Sizes of the student and of the modules, from the recipe and from what the teacher sees."""

from __future__ import annotations

from models.moe import MoEConfig
from models.vmoe import VMoEConfig, decode_variant
from trainer.config import split_evenly, to_dict
from trainer.schema import Recipe


def student_config(
    recipe: Recipe, num_classes: int, drop_path: float, *, image_size: int, in_chans: int, prefix_tokens: int
) -> VMoEConfig:
    """The V-MoE a recipe asks for, for images and prefix tokens like the teacher's (or like another model's).

    Raises:
        ValueError: an unknown variant, or sizes that do not fit together.
    """
    s = recipe.student
    sizes = {n: getattr(s, n) for n in ("patch_size", "width", "depth", "heads", "mlp_dim")}
    values = (decode_variant(s.variant) if s.variant else {}) | {k: v for k, v in sizes.items() if v is not None}
    class_token = prefix_tokens > 0
    return VMoEConfig(
        **values
        | {
            "image_size": image_size,
            "in_chans": in_chans,
            "num_classes": num_classes,
            "moe_blocks": s.moe_blocks,
            "moe": MoEConfig(**to_dict(s.moe)),
            "gelu": s.gelu,
            "pool": s.pool if class_token else "mean",
            "class_token": class_token,
            "reg_tokens": max(prefix_tokens - 1, 0) if s.reg_tokens is None else s.reg_tokens,
            "drop_rate": s.drop_rate,
            "drop_path_rate": drop_path,
            "seed": recipe.seed,
        }
    )


def module_depths(given: tuple[int, ...], blocks: int, modules: int, name: str) -> tuple[int, ...]:
    """Blocks per module as the recipe gives them, checked, or as equal as possible."""
    if given and (min(given) < 1 or sum(given) != blocks):
        raise ValueError(
            f"{name}.depths {list(given)} make {sum(given)} blocks, but the {name} has {blocks}: give {modules} "
            f"numbers of at least 1 that add up to {blocks}, or leave it empty"
        )
    return given or split_evenly(blocks, modules, f"the {name}")
