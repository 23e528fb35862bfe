"""Our students among timm's models: after `import models.registry`, whatever is written for timm can use it.

    import models.registry
    timm.create_model("vmoe_base_patch16_224", num_classes=10, moe={"num_experts": 16})
    timm.create_model("hf-hub:owner/name", pretrained=True, features_only=True)  # what save_pretrained wrote

"vmoe_*" are the sizes of the V-MoE paper with the routing of its ImageNet-1k recipe, "vmoe_m2mkd_*" the students of the
m2mKD paper (experts in every block), "nac_*" its Neural Attentive Circuits. There are no weights by these names:
weights come by hf-hub: or local-dir:.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, adapt_input_conv, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from .files.hub import CheckpointFiles
from .files.saved import read
from .moe.layer import official
from .nac import files as nac_files
from .nac.config import NACConfig, decode_preset
from .nac.model import NAC
from .vmoe.config import POOLS
from .vmoe.files import ARCHITECTURE, FORMAT, TIMM_NAMES
from .vmoe.model import VMoE, VMoEConfig, decode_variant

VARIANTS = {
    "vmoe_small_patch16_224": "S/16",
    "vmoe_base_patch16_224": "B/16",
    "vmoe_large_patch16_224": "L/16",
    "vmoe_huge_patch14_224": "H/14",
    "vmoe_m2mkd_small_patch16_224": "m2mkd-S/16",
    "vmoe_m2mkd_base_patch16_224": "m2mkd-B/16",
    "vmoe_m2mkd_large_patch16_224": "m2mkd-L/16",
    "vmoe_m2mkd_huge_patch14_224": "m2mkd-H/14",
    ARCHITECTURE: "B/16",  # what saved models are built by: their config.json has all the arguments
}
DEFAULT_CFG = {
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_INCEPTION_MEAN,
    "std": IMAGENET_INCEPTION_STD,
}
# NACs of the published configurations; what is left open (image size, classes) is theirs as well
NACS = {
    "nac_tiny_imagenet": ("tiny-imagenet", {"image_size": 64, "num_classes": 200}),
    "nac_imagenet": ("imagenet", {"image_size": 224, "num_classes": 1000}),
    nac_files.ARCHITECTURE: ("imagenet", {"image_size": 224, "num_classes": 1000}),  # what saved ones are built by
}
NAC_CFG = DEFAULT_CFG | {"first_conv": "tokenizer.stem.0", "fixed_input_size": False}
default_cfgs = generate_default_cfgs(
    {name: dict(DEFAULT_CFG) for name in VARIANTS}
    | {
        name: NAC_CFG | {"input_size": (3, open_values["image_size"], open_values["image_size"])}
        for name, (_, open_values) in NACS.items()
    }
)


def _register(name: str, variant: str) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, variant, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"V-MoE {variant}; options are timm's for a vision transformer and the fields of VMoEConfig."
    register_model(create)


def _create(
    name: str,
    variant: str,
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | Mapping[str, Any] | str | None = None,
    out_indices: int | list[int] = 3,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """The model, or with features_only=True timm's extractor around it.

    Raises:
        ValueError: options that make no model, or weights that do not fit.
    """
    files = _saved(pretrained_cfg, cache_dir, FORMAT.model_type) if pretrained else None
    return build_model_with_cfg(
        functools.partial(_model, variant, files),
        name,
        pretrained and files is None,  # timm reads what timm wrote
        pretrained_cfg=pretrained_cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        cache_dir=cache_dir,
        **options,
    )


def _register_nac(name: str, preset: str, open_values: Mapping[str, int]) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create_nac(name, {**decode_preset(preset), **open_values}, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"NAC with the sizes of preset {preset}; options are the fields of NACConfig, and timm's img_size."
    register_model(create)


def _create_nac(
    name: str,
    values: Mapping[str, Any],
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | Mapping[str, Any] | str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """The NAC.

    Raises:
        ValueError: options that make no model, feature maps, which a NAC has not, or weights that do not fit.
    """
    if options.pop("features_only", False):
        raise ValueError(f"{name} has no feature maps: forward_features gives the states of its output latents.")
    files = _saved(pretrained_cfg, cache_dir, nac_files.FORMAT.model_type) if pretrained else None

    def build(drop_rate: float = 0.0, **arguments: Any) -> NAC:
        our_names = {timm_name: name for name, timm_name in nac_files.TIMM_NAMES.items()}
        changes = {our_names.get(name, name): value for name, value in arguments.items()}
        image_size = changes.get("image_size")
        if isinstance(image_size, Sequence):
            changes["image_size"] = image_size[0]
        config = NACConfig.from_dict({**values, **changes})
        if files is None:
            return NAC(config)
        saved, *_ = read(nac_files.FORMAT, files)
        as_saved = {"num_classes": saved.num_classes, "image_size": saved.image_size}
        model = NAC.from_pretrained(files, config=replace(config, **as_saved))
        if config.num_classes != saved.num_classes:
            model.reset_classifier(config.num_classes)
        return model.train()

    return build_model_with_cfg(build, name, pretrained and files is None, pretrained_cfg=pretrained_cfg, **options)


def _saved(cfg: Any, cache_dir: str | Path | None, model_type: str) -> CheckpointFiles | None:
    """The files timm was pointed to, when save_pretrained wrote them."""
    if not isinstance(cfg, Mapping):
        return None
    # timm: "source" says where weights lie, another key which ones
    sources = {"hf-hub": cfg.get("hf_hub_id"), "local-dir": cfg.get("file")}
    source = sources.get(cfg.get("source"))
    if source is None:
        return None
    files = CheckpointFiles(source, cache_dir=cache_dir)
    path = files.find("config.json")
    if not path or json.loads(path.read_text()).get("model_type") != model_type:
        return None
    return files


def _model(variant: str, files: CheckpointFiles | None, drop_rate: float = 0.0, **options: Any) -> VMoE:
    """A new V-MoE, or the one of `files` changed to `options`."""
    config = _config(variant, options)
    model = VMoE(config) if files is None else _adapted(files, config)
    model.head_drop.p = drop_rate  # timm's word for the dropout in front of the head
    return model.train()


def _config(variant: str, options: Mapping[str, Any]) -> VMoEConfig:
    """The variant's configuration with timm's `options` in place of its fields.

    Raises:
        ValueError: an unknown option, or a value that makes no model.
    """
    known = {TIMM_NAMES.get(f.name, f.name) for f in fields(VMoEConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"options {unknown} are not known; known: {', '.join(sorted(known | {'drop_rate'}))}.")
    defaults = {"image_size": 224, "num_classes": 1000, "gelu": "tanh", "moe": official(), **decode_variant(variant)}
    our_names = {timm_name: name for name, timm_name in TIMM_NAMES.items()}
    changes = {our_names.get(name, name): value for name, value in options.items()}
    # single settings of the routing may be given: the others stay the variant's
    routing = asdict(defaults["moe"])
    routing.update(changes.get("moe", {}))
    changes["moe"] = routing
    if "image_size" in changes:
        height, width = to_2tuple(changes["image_size"])
        if height != width:
            raise ValueError(f"img_size must be square, got {height}x{width}; dynamic_img_size=True takes any image.")
        changes["image_size"] = height
    if "pool" in changes:
        pool = changes["pool"]
        our_pools = {timm_name: name for name, timm_name in POOLS.items()}
        if pool not in our_pools:
            raise ValueError(f"global_pool {pool!r} is not known; use one of {', '.join(map(repr, our_pools))}.")
        changes["pool"] = our_pools[pool]
    return VMoEConfig(**{**defaults, **changes})


def _adapted(files: CheckpointFiles, config: VMoEConfig) -> VMoE:
    """The saved model with the head, pooling, image size and channels of `config`, as timm adapts its own."""
    saved, *_ = read(FORMAT, files)
    # load as it was saved in what is adapted below, or the weights would not fit
    adapted = ("image_size", "patch_size", "in_chans", "num_classes", "pool")
    as_saved = {name: getattr(saved, name) for name in adapted}
    model = VMoE.from_pretrained(files, config=replace(config, **as_saved))
    if (config.num_classes, config.pool) != (saved.num_classes, saved.pool):
        head = model.head
        model.reset_classifier(config.num_classes, POOLS[config.pool])
        if config.num_classes == saved.num_classes:  # only the pooling changed: the head stays
            model.head = head
    if (config.image_size, config.patch_size) != (saved.image_size, saved.patch_size):
        model.set_input_size(config.image_size, config.patch_size)
    if config.in_chans != saved.in_chans:
        _set_in_chans(model, config.in_chans)
    return model


def _set_in_chans(model: VMoE, in_chans: int) -> None:
    """Images of another number of channels: the patch kernels are summed or repeated, as timm does."""
    saved = model.patch_embed.proj
    adapted = nn.Conv2d(in_chans, saved.out_channels, saved.kernel_size, saved.stride, bias=saved.bias is not None)
    with torch.no_grad():
        adapted.weight = nn.Parameter(adapt_input_conv(in_chans, saved.weight, base_chans=model.in_chans))
        adapted.bias = saved.bias
    model.patch_embed.proj = adapted
    model.in_chans = in_chans
    model.config = replace(model.config, in_chans=in_chans)
    model.preprocessing = None  # mean and std were those of the other channels


for _name, _variant in VARIANTS.items():
    _register(_name, _variant)
for _name, (_preset, _open_values) in NACS.items():
    _register_nac(_name, _preset, _open_values)
