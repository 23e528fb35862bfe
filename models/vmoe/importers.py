"""Checkpoints of other code, read once and written in this project's formats.

| layout          | what                                                        | becomes                          |
|-----------------|-------------------------------------------------------------|----------------------------------|
| google_vmoe     | npz of flax names, google-research/vmoe                     | a V-MoE (VMoE.from_pretrained)   |
| m2mkd_vmoe      | .pth of the paper's V-MoE (FastMoE), kamanphoebe/m2mKD      | a V-MoE                          |
| deep_incubation | .pth of a ViT, or the folder of its stages, one .pth each   | a teacher (load_teacher)         |

Pickled files are read with torch's weights_only loader, so nothing of them is ever executed. Sizes come from the shapes
of the weights; what weights do not show (heads, chosen experts) from the published variants or from the caller.
E experts, D width, H hidden width, T tokens.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..moe.layer import MoEConfig, official, paper
from ..preprocessing import Preprocessing, crop_pct_of
from ..teacher.images import to_processor
from .import_names import State, google_state, m2mkd_state, transformers_state
from .model import VARIANTS, VMoE, VMoEConfig

GOOGLE_PREFIXES = ("params/", "target/", "opt/target/")  # what training states put in front of the names
# of ImageNet, as both torch repositories normalise
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GOOGLE_MEAN = GOOGLE_STD = (0.5, 0.5, 0.5)  # values in -1..1


def import_checkpoint(
    source: str | Path, layout: str, out: str | Path, *, heads: int | None = None, k: int = 2
) -> list[Path]:
    """Convert a checkpoint.

    Args:
        source: file, or for deep_incubation also the folder with its stages.
        layout: one of LAYOUTS.
        out: directory to write; must not hold anything yet.
        heads: attention heads; by default those of the published variant of that width.
        k: experts per token (V-MoE only); weights do not show it.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown layout, a file that is not of that layout, or an `out` that is in use.
    """
    source = Path(source)
    out = Path(out)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known: use one of {', '.join(LAYOUTS)}.")
    if not source.exists():
        raise ValueError(f"{source} does not exist: give the checkpoint to import.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use: give a directory that is empty or does not exist.")
    LAYOUTS[layout](source, out, heads, k)
    return sorted(out.iterdir())


def google_vmoe(source: Path, out: Path, heads: int | None, k: int) -> None:
    """Google's V-MoE; routing as in its published recipe (models.moe.official).

    Raises:
        ValueError: not an npz of arrays, or a V-MoE without learned positions, without a head, or of other parts.
    """
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{source} is not an npz of arrays ({error}). Checkpoints in .index and .data files have to be saved as "
            f"npz with names joined by '/' first."
        ) from error
    prefixes = [p for p in GOOGLE_PREFIXES if f"{p}cls" in arrays or f"{p}embedding/kernel" in arrays]
    prefix = prefixes[0] if prefixes else ""
    state = google_state(arrays, prefix)
    if "pos_embed" not in state or "head.weight" not in state:
        raise ValueError(f"{source} has no learned position embedding or no head: only such V-MoEs are supported.")
    if heads is None:
        query = arrays.get(f"{prefix}Encoder/encoderblock_0/SelfAttention/query/kernel")
        heads = query.shape[1]  # (D, heads, D / heads)
    config = _vmoe_config(state, source, heads, "tanh", lambda experts: official(num_experts=experts, k=k))
    # TensorFlow's bilinear resize
    _write_vmoe(config, state, out, GOOGLE_MEAN, GOOGLE_STD, "bilinear")


def m2mkd_vmoe(source: Path, out: Path, heads: int | None, k: int) -> None:
    """The paper's V-MoE, whole: {"model": state}; stitch layers it kept come along.

    Raises:
        ValueError: not a file of tensors, no whole model, or a dense one.
    """
    state = m2mkd_state(_whole(source))
    config = _vmoe_config(state, source, heads, "erf", lambda experts: paper(num_experts=experts, k=k))
    _write_vmoe(config, state, out, MEAN, STD, "bicubic")


def deep_incubation(source: Path, out: Path, heads: int | None, _k: int) -> None:
    """A ViT of Deep Incubation, whole or as the stages that split_teacher.py writes, as a transformers directory.

    Raises:
        ValueError: not files of tensors, or not all parts of one model.
    """
    state = _joined_stages(source) if source.is_dir() else _whole(source)
    if "patch_embed.proj.weight" not in state or "head.weight" not in state:
        raise ValueError(f"{source} has no patch embedding or no head: a whole model or all its stages are needed.")
    from transformers import ViTConfig

    width, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    preprocessing = _preprocessing(state, patch, in_chans, MEAN, STD, "bicubic")
    qkv_bias = "blocks.0.attn.qkv.bias" in state
    config = ViTConfig(
        image_size=preprocessing.image_size,
        patch_size=patch,
        num_channels=in_chans,
        hidden_size=width,
        num_hidden_layers=_depth(state),
        num_attention_heads=_heads(width, heads),
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_labels=len(state["head.weight"]),
        qkv_bias=qkv_bias,
        # its ViT-H passes neither a bias nor a norm layer, and torch's LayerNorm has another eps than timm's
        layer_norm_eps=1e-6 if qkv_bias else 1e-5,
        architectures=["ViTForImageClassification"],
    )
    out.mkdir(parents=True, exist_ok=True)
    save_file(transformers_state(state), out / "model.safetensors", metadata={"format": "pt"})
    to_processor(preprocessing).save_pretrained(out)
    config.save_pretrained(out)


LAYOUTS: dict[str, Callable[[Path, Path, int | None, int], None]] = {
    "google_vmoe": google_vmoe,
    "m2mkd_vmoe": m2mkd_vmoe,
    "deep_incubation": deep_incubation,
}


def _load(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of tensors and plain values: {reason}") from error


def _whole(path: Path) -> State:
    """The state dict of a whole model, with the copy under stages.* taken out."""
    content = _load(path)
    state: State = {}
    if isinstance(content, dict):
        saved = content.get("model", content)
        state = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    if not any(name.startswith("blocks.") for name in state):
        raise ValueError(f"{path} holds no state dict with blocks.*: expected what the repository's main.py saves.")
    return {name: value for name, value in state.items() if not name.startswith("stages.")}


def _joined_stages(folder: Path) -> State:
    """One state with global block numbers from the files of split_teacher.py, in whatever order they are named."""
    stages: dict[int, dict] = {}  # by number
    for path in sorted(folder.glob("*.pth")):
        stage = _load(path)
        if isinstance(stage, dict) and {"block_index", "block_state_dict", "divided_depths"} <= stage.keys():
            stages[stage["block_index"]] = stage
    depths: list[int] = []  # blocks of each stage; every file has those of all
    if stages:
        depths = next(iter(stages.values()))["divided_depths"]
    if sorted(stages) != list(range(len(depths))) or not stages:
        raise ValueError(
            f"{folder} holds stages {sorted(stages)} of {len(depths)}: all stages of one model are needed."
        )
    state: State = {}
    for index, stage in stages.items():
        first_block = sum(depths[:index])
        for name, value in stage["block_state_dict"].items():
            block = re.match(r"blocks\.(\d+)", name)
            if block:
                name = f"blocks.{int(block[1]) + first_block}{name[block.end() :]}"
            state[name] = value
    return state


def _vmoe_config(
    state: State, source: Path, heads: int | None, gelu: str, routing: Callable[[int], MoEConfig]
) -> VMoEConfig:
    """The V-MoE whose weights these are; `routing` gives the MoEConfig for a number of experts."""
    width, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _depth(state)
    routers = {int(name.split(".")[1]): value for name, value in state.items() if name.endswith(".mlp.router.weight")}
    if not routers:
        raise ValueError(f"{source} has no MoE block: it is a dense ViT.")
    moe_block, router = next(iter(routers.items()))
    class_token = "cls_token" in state
    representation_size = 0
    if "pre_logits.weight" in state:
        representation_size = len(state["pre_logits.weight"])
    # kept stitches: the post-stitch's Linear (D_t, D_s) shows the teacher's width
    stitch_blocks = {}
    for block in range(depth):
        post_stitch = state.get(f"blocks.{block}.stitch.0.1.weight")
        if post_stitch is not None:
            stitch_blocks[str(block)] = len(post_stitch)
    return VMoEConfig(
        image_size=_grid(state, class_token) * patch,
        patch_size=patch,
        in_chans=in_chans,
        width=width,
        depth=depth,
        heads=_heads(width, heads),
        mlp_dim=len(state[f"blocks.{moe_block}.mlp.experts.0.fc1.weight"]),
        num_classes=len(state["head.weight"]),
        moe_blocks=",".join(map(str, sorted(routers))),
        moe=routing(len(router)),  # (E, D)
        gelu=gelu,
        pool="token" if class_token else "mean",
        class_token=class_token,
        representation_size=representation_size,
        stitch_blocks=stitch_blocks or None,
    )


def _write_vmoe(config: VMoEConfig, state: State, out: Path, mean: tuple, std: tuple, interpolation: str) -> None:
    model = VMoE(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of one V-MoE: {error}") from error
    preprocessing = _preprocessing(state, config.patch_size, config.in_chans, mean, std, interpolation)
    model.save_pretrained(out, preprocessing=preprocessing)


def _preprocessing(
    state: State, patch: int, in_chans: int, mean: tuple, std: tuple, interpolation: str
) -> Preprocessing:
    """Evaluation of all three repositories: shorter side to 256/224 of the image, then a centre crop."""
    size = _grid(state, "cls_token" in state) * patch
    crop_pct = crop_pct_of(size, size * 256 // 224)
    return Preprocessing(size, mean[:in_chans], std[:in_chans], interpolation, crop_pct, in_chans=in_chans)


def _grid(state: State, class_token: bool) -> int:
    """Patches along one side of the image."""
    patches = state["pos_embed"].shape[1] - class_token  # (1, T, D)
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(f"{patches} patch positions are no square: only square images are supported.")
    return side


def _depth(state: State) -> int:
    """Blocks of the model: 1 + the highest number there is."""
    names = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    return 1 + max(int(name[1]) for name in names if name)


def _heads(width: int, asked_for: int | None) -> int:
    """Heads are not in the weights: as asked for, as published for this width, or 64 wide."""
    published = {size["width"]: size["heads"] for size in VARIANTS.values()}
    heads = asked_for or published.get(width, width // 64)
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}: give heads.")
    return heads
