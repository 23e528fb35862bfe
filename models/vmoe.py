"""V-MoE: a vision transformer some of whose MLPs are mixtures of experts; the variants, the model, save and load.

Weights published by `save_pretrained` load with torch alone, whatever number of ranks they were trained on. B images,
T tokens, D width.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.hub_files import CheckpointFiles
from models.moe import GELU, MoE, MoEConfig, draw, lecun_normal_, paper
from models.preprocessing import Preprocessing
from models.stitch import stitch

# Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", appendix B
VARIANTS = {
    "S": {"depth": 8, "width": 512, "mlp_dim": 2048, "heads": 8},
    "B": {"depth": 12, "width": 768, "mlp_dim": 3072, "heads": 12},
    "L": {"depth": 24, "width": 1024, "mlp_dim": 4096, "heads": 16},
    "H": {"depth": 32, "width": 1280, "mlp_dim": 5120, "heads": 16},
}
POOLS = {"token": "token", "mean": "avg"}  # our name -> timm's
MODEL_TYPE = "vmoe"  # in config.json


@dataclass(frozen=True, kw_only=True)
class VMoEConfig:
    image_size: int  # pixels
    patch_size: int  # pixels
    in_chans: int = 3
    width: int
    depth: int  # blocks
    heads: int
    mlp_dim: int
    num_classes: int
    moe_blocks: str = "every-2"  # "all", "none", "every-n", "last-n" (of the odd ones) or block numbers as "1,3"
    moe: MoEConfig = field(default_factory=MoEConfig)
    gelu: str = "erf"  # or "tanh"
    pool: str = "token"  # head on the class token, or on the "mean" of the patch tokens
    class_token: bool = True
    reg_tokens: int = 0  # prefix tokens beside the class token, to match a teacher that has more than one
    representation_size: int = 0  # width of a tanh layer before the head, 0 = none
    drop_rate: float = 0.0  # dropout on positions, after attention and in dense MLPs; experts have moe.dropout
    drop_path_rate: float = 0.0
    stitch_blocks: Mapping[str, int] | None = None  # kept stitches: block number -> width of the teacher
    seed: int = 0  # of the initial values

    def __post_init__(self) -> None:
        if isinstance(self.moe, Mapping):  # from JSON
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}.")
        for name, known in (("gelu", GELU), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}.")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool 'token' needs class_token; use pool 'mean' without it.")
        if strange := [block for block in self.stitch_blocks or () if block not in map(str, range(1, self.depth))]:
            raise ValueError(f"stitch_blocks {strange} are not inner blocks '1'..'{self.depth - 1}'.")
        moe_numbers(self.moe_blocks, self.depth)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VMoEConfig":
        for kind, given in ((cls, values), (MoEConfig, values.get("moe", {}))):
            if unknown := sorted(set(given) - {f.name for f in fields(kind)}):
                raise ValueError(f"unknown keys {unknown} in a {kind.__name__}; was it saved by a newer version?")
        return cls(**values)


def moe_numbers(spec: str, depth: int) -> tuple[int, ...]:
    """Numbers of the blocks with experts; see VMoEConfig.moe_blocks.

    Raises:
        ValueError: a spec that is not understood, or blocks the model does not have.
    """
    kind, _, count = spec.partition("-")
    if spec in ("all", "none"):
        return tuple(range(depth)) if spec == "all" else ()
    if kind in ("every", "last") and count.isdigit() and 1 <= int(count) <= depth:
        n = int(count)
        return tuple(range(n - 1, depth, n) if kind == "every" else range(1, depth, 2)[-n:])
    numbers = [int(part) for part in spec.split(",") if part.strip().isdigit()]
    if len(numbers) != len(spec.split(",")) or len(set(numbers)) < len(numbers) or max(numbers) >= depth:
        raise ValueError(
            f"moe_blocks {spec!r} is not understood for {depth} blocks: use all, none, every-2, last-2 or different "
            f"block numbers below {depth} as 1,3."
        )
    return tuple(sorted(numbers))


def decode_variant(name: str) -> dict[str, Any]:
    """Fields of VMoEConfig for "B/16" (sizes) or "m2mkd-B/16" (also experts and routing of the m2mKD student).

    Raises:
        ValueError: an unknown size or patch size.
    """
    size, _, patch = name.removeprefix("m2mkd-").partition("/")
    if size not in VARIANTS or not patch.isdigit() or int(patch) < 1:
        raise ValueError(f"variant {name!r} is not known: use one of {', '.join(VARIANTS)} with a patch size, as B/16.")
    fields_ = {**VARIANTS[size], "patch_size": int(patch)}
    if name.startswith("m2mkd-"):
        fields_ |= {"moe_blocks": "all", "moe": paper(num_experts=8, k=2), "gelu": "erf"}
    return fields_


class VMoEBlock(Block):
    """timm's block, with the stitch layers kept in front of it at a module border, if any."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stitch = nn.Identity()

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return super().forward(self.stitch(x), **masks)


class VMoE(VisionTransformer, ModelHubMixin):
    """timm's VisionTransformer with MoE blocks; images (B, C, H, W) -> logits (B, classes).

    Attributes:
        config: what it was built from.
        preprocessing, labels: what its images must look like and what its classes are called; None when not known.
    """

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=0,  # the head is made below, behind pre_logits
            global_pool=POOLS[config.pool],
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            class_token=config.class_token,
            reg_tokens=config.reg_tokens,
            fc_norm=False,  # the official model normalises before it pools
            pos_drop_rate=config.drop_rate,
            proj_drop_rate=config.drop_rate,
            drop_path_rate=config.drop_path_rate,
            weight_init="skip",
            act_layer=functools.partial(nn.GELU, approximate=GELU[config.gelu]),
            block_fn=functools.partial(_block, config),
        )
        self.config = config
        self.preprocessing: Preprocessing | None = None
        self.labels: list[str] | None = None
        features, self.pre_logits = config.width, nn.Identity()
        if config.representation_size:
            features, self.pre_logits = config.representation_size, nn.Linear(features, config.representation_size)
        self.num_classes, self.head_hidden_size = config.num_classes, features
        if config.num_classes:
            self.head = nn.Linear(features, config.num_classes)
        _initialise(self, config)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, T, D); logits (B, classes), or with `pre_logits` what the head reads."""
        x = self.fc_norm(self.pool(x))
        if self.config.representation_size:
            x = self.pre_logits(x).tanh()
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        state: Mapping[str, Tensor] | None = None,
        config: None = None,  # these two only because ModelHubMixin.push_to_hub passes them along
        model_card_kwargs: None = None,
    ) -> None:
        """Write config.json and model.safetensors.

        Args:
            preprocessing, labels: travel with the model; by default its own.
            state: weights to write in place of the model's own, by plain names: full_state_dict of the model in
                training, which is collective, while one rank writes.

        Raises:
            ValueError: an expert parallel model without `state`, or labels of another number than the classes.
        """
        if state is None and any(hasattr(module, "deepspeed_moe") for module in self.modules()):
            raise ValueError("this model holds one rank's experts: pass state=models.moe.full_state_dict(model).")
        state = self.state_dict() if state is None else state
        preprocessing, labels = preprocessing or self.preprocessing, labels or self.labels
        if labels is not None and len(labels) != self.num_classes:
            raise ValueError(f"{len(labels)} labels were given for {self.num_classes} classes.")
        content = {"model_type": MODEL_TYPE, **asdict(self.config)}
        if preprocessing is not None:
            content["preprocessing"] = preprocessing.to_dict()
        if labels is not None:
            content["labels"] = list(labels)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "VMoE":
        """Load from a directory or from the hub ("owner/name" or "owner/name@revision"); strict, safetensors only.

        Returns the model in evaluation mode, in the precision it was saved in.

        Raises:
            ValueError: not found, not a V-MoE of ours, or without safetensors weights.
            RuntimeError: weights that do not fit the config (torch's strict loading).
        """
        files = CheckpointFiles(str(source), revision)
        if (path := files.find("config.json")) is None:
            raise ValueError(f"{files} has no config.json, so it is not a saved V-MoE.")
        content = json.loads(path.read_text())
        if (model_type := content.pop("model_type", None)) != MODEL_TYPE:
            raise ValueError(f"{files} is a {model_type!r}, not a {MODEL_TYPE!r}; load teachers with load_teacher.")
        preprocessing, labels = content.pop("preprocessing", None), content.pop("labels", None)
        with torch.device("meta"):
            model = cls(VMoEConfig.from_dict(content))
        *_, weights = files.weights()
        model.load_state_dict(load_file(weights), assign=True)
        model.preprocessing = None if preprocessing is None else Preprocessing.from_dict(preprocessing)
        model.labels = labels
        return model.eval()


def _block(config: VMoEConfig, dim: int, depth: int, **options: Any) -> VMoEBlock:
    """Block number `depth` (timm's word) of a V-MoE."""
    moe = depth in moe_numbers(config.moe_blocks, config.depth)

    def mlp(act_layer: type[nn.Module], drop: float, **_timm: Any) -> nn.Module:
        if moe:
            return MoE(dim, config.mlp_dim, config.moe, config.gelu, layer=depth, seed=config.seed)
        return Mlp(dim, config.mlp_dim, act_layer=act_layer, drop=drop)

    block = VMoEBlock(dim=dim, depth=depth, **{**options, "mlp_layer": mlp})
    if teacher_width := (config.stitch_blocks or {}).get(str(depth)):
        block.stitch = nn.Sequential(stitch(dim, teacher_width), stitch(teacher_width, dim))
    return block


@torch.no_grad()
def _initialise(model: VMoE, config: VMoEConfig) -> None:
    """The official initial values (facts of google-research/vmoe); MoE layers have their own already."""
    for name, parameter in model.named_parameters():
        where, _, kind = name.rpartition(".")
        if ".mlp.experts." in name or ".mlp.router." in name or ".stitch." in name or ".norm" in f".{where}":
            continue  # norms are 1 and 0 from torch
        if name == "pos_embed":
            draw(parameter, nn.init.normal_, config.seed, name, std=0.02)
        elif where.endswith((".fc1", ".fc2")) and kind == "bias":
            draw(parameter, nn.init.normal_, config.seed, name, std=1e-6)
        elif name == "head.bias":
            parameter.fill_(-math.log(config.num_classes))
        elif kind == "bias" or where == "head" or name in ("cls_token", "reg_token"):
            parameter.zero_()
        elif where.endswith(".qkv"):  # query, key and value are layers of their own in the official code
            for part, chunk in zip("qkv", parameter.chunk(3)):
                draw(chunk, nn.init.xavier_uniform_, config.seed, name, part)
        elif where in ("patch_embed.proj", "pre_logits"):
            draw(parameter, lecun_normal_, config.seed, name)
        else:
            draw(parameter, nn.init.xavier_uniform_, config.seed, name)
