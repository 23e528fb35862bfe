"""What a V-MoE is built from: sizes by name, the configuration, and what a trained one may be changed into."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from ..modules.tokens import Rope, TokenLayout
from ..moe.expert import GELU, SWIGLU
from ..moe.layer import MoEConfig, paper

# Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", appendix B
VARIANTS = {
    "S": {"depth": 8, "width": 512, "mlp_dim": 2048, "heads": 8},
    "B": {"depth": 12, "width": 768, "mlp_dim": 3072, "heads": 12},
    "L": {"depth": 24, "width": 1024, "mlp_dim": 4096, "heads": 16},
    "H": {"depth": 32, "width": 1280, "mlp_dim": 5120, "heads": 16},
}
POOLS = {"token": "token", "mean": "avg", "none": ""}  # our name -> timm's
MODEL_TYPE = "vmoe"  # in config.json
SIZES = ("image_size", "patch_size", "in_chans", "width", "depth", "heads", "mlp_dim")
# what may change on trained weights without making another function of them
FREE = ("drop_rate", "drop_path_rate", "dynamic_img_size", "seed")
MOE_FIXED = ("num_experts", "k", "renormalize", "router_bias")  # the other routing settings are free
KEPT = (
    "stitch_blocks",
    "representation_size",
    "norm_eps",
    "feature_width",
)  # as they were saved, where nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class VMoEConfig:
    """Sizes, routing, and regularisation of one V-MoE; plain values, as config.json has them.

    Raises:
        ValueError: naming the field that makes no model, its value, and what is expected.
    """

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
    gelu: str = "erf"  # or "tanh"; without effect where swiglu is set
    swiglu: bool = False  # MLPs and experts fc2(silu(fc1_g(x)) * fc1_x(x)), mlp_dim wide, in place of GELU
    layer_scale: float = 0.0  # initial value of a learned factor per channel behind attention and MLP; 0 = none
    rope: Rope | None = None  # queries and keys are rotated by their place in the patch grid; None = they are not
    pool: str = "token"  # head on the class token, on the "mean" of the patch tokens, or "none": on every token
    class_token: bool = True
    reg_tokens: int = 0  # prefix tokens beside the class token, to match a teacher that has more than one
    representation_size: int = 0  # width of a tanh layer before the head, 0 = none
    feature_width: int = 0  # without classes: width of the teacher whose final tokens it learned, 0 = its own width
    drop_rate: float = 0.0  # dropout on positions, after attention and in dense MLPs; experts have moe.dropout
    drop_path_rate: float = 0.0
    dynamic_img_size: bool = False  # takes images of any size; position embeddings are resampled to it
    norm_eps: float | None = None  # of every LayerNorm, where it is not timm's 1e-6: a dense model it started from
    stitch_blocks: Mapping[str, int] | None = None  # kept stitches: block number -> width of the teacher, 0 = folded
    seed: int = 0  # of the initial values

    def __post_init__(self) -> None:
        if isinstance(self.moe, Mapping):  # from JSON
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        if isinstance(self.rope, Mapping):
            object.__setattr__(self, "rope", Rope(**self.rope))
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 100_000:
                raise ValueError(f"{name} must be a whole number from 1 to 100,000, got {value!r}.")
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise ValueError(f"num_classes must be a whole number (0 = no head), got {self.num_classes!r}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if type(self.feature_width) is not int or not 0 <= self.feature_width <= 100_000:
            raise ValueError(
                f"feature_width must be a whole number up to 100,000 (0 = width), got {self.feature_width!r}."
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}.")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(
                f"rope needs heads of a multiple of 4 channels, got {self.width // self.heads} (width {self.width} / "
                f"heads {self.heads}): take another number of heads, or no rope."
            )
        if type(self.layer_scale) not in (int, float) or not 0 <= self.layer_scale <= 100:
            raise ValueError(f"layer_scale must lie between 0 (none) and 100, got {self.layer_scale!r}.")
        if self.norm_eps is not None and not (isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1):
            raise ValueError(f"norm_eps must lie between 0 and 1, got {self.norm_eps!r}; None means timm's 1e-6.")
        for name, known in (("gelu", GELU), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}.")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool 'token' needs class_token; use pool 'mean' without it.")
        inner_blocks = {str(number) for number in range(1, self.depth)}
        unknown_blocks = [block for block in self.stitch_blocks or () if block not in inner_blocks]
        if unknown_blocks:
            raise ValueError(f"stitch_blocks {unknown_blocks} are not inner blocks '1'..'{self.depth - 1}'.")
        moe_numbers(self.moe_blocks, self.depth)

    @property
    def tokens(self) -> TokenLayout:
        """What comes before the patches, and how positions are turned."""
        return TokenLayout(
            class_token=self.class_token,
            reg_tokens=self.reg_tokens,
            rope=self.rope,
            rotary=self.rope is not None,
        )

    @property
    def activation(self) -> str:
        """What its MLPs and experts compute between their layers, a key of models.moe.expert.LAYERS."""
        return SWIGLU if self.swiglu else self.gelu

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VMoEConfig":
        """The configuration of plain values, as JSON gives them.

        Raises:
            ValueError: unknown keys, missing ones, or values that make no model.
        """
        _check_keys(cls, values)
        _check_keys(MoEConfig, values.get("moe", {}))
        _check_keys(Rope, values.get("rope") or {})
        required = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"keys {missing} are missing in a {cls.__name__}.")
        return cls(**values)

    def on_weights_of(self, saved: "VMoEConfig", source: str) -> "VMoEConfig":
        """This configuration for the weights of a model saved with another one: a new run starts from them.

        Dropout, noise, capacities and loss weights are this one's; what decides what the weights mean must be equal.

        Raises:
            ValueError: naming the first setting that differs, and both its values.
        """
        for f in fields(self):
            if f.name not in (*FREE, *KEPT, "moe", "moe_blocks", "layer_scale"):
                _check_equal(source, f.name, getattr(saved, f.name), getattr(self, f.name))
        if bool(saved.layer_scale) != bool(self.layer_scale):  # its initial value is as free as the seed
            _check_equal(source, "layer_scale", saved.layer_scale, self.layer_scale)
        for name in KEPT:
            if getattr(self, name):  # else it stays as saved
                _check_equal(source, name, getattr(saved, name), getattr(self, name))
        # block numbers, not their spelling: "every-2" of 4 blocks is "1,3"
        blocks = moe_numbers(self.moe_blocks, self.depth)
        _check_equal(source, "moe_blocks", moe_numbers(saved.moe_blocks, saved.depth), blocks)
        if blocks:
            for name in MOE_FIXED:
                _check_equal(source, f"moe.{name}", getattr(saved.moe, name), getattr(self.moe, name))
        return replace(self, **{name: getattr(saved, name) for name in KEPT})


def moe_numbers(spec: str, depth: int) -> tuple[int, ...]:
    """Numbers of the blocks with experts; see VMoEConfig.moe_blocks.

    Raises:
        ValueError: a spec that is not understood, or blocks the model does not have.
    """
    if spec == "all":
        return tuple(range(depth))
    if spec == "none":
        return ()
    kind, _, count = spec.partition("-")
    if kind in ("every", "last") and count.isdigit() and 1 <= int(count) <= depth:
        n = int(count)
        if kind == "every":  # blocks n-1, 2n-1, ...
            return tuple(range(n - 1, depth, n))
        return tuple(range(1, depth, 2)[-n:])  # the last n of blocks 1, 3, 5, ...
    parts = spec.split(",")
    numbers = [int(part) for part in parts if part.strip().isdigit()]
    if len(numbers) != len(parts) or len(set(numbers)) < len(numbers) or max(numbers) >= depth:
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
    values = {**VARIANTS[size], "patch_size": int(patch)}
    if name.startswith("m2mkd-"):
        values |= {"moe_blocks": "all", "moe": paper(num_experts=8, k=2), "gelu": "erf"}
    return values


def _check_equal(source: str, name: str, saved: Any, asked_for: Any) -> None:
    if saved != asked_for:
        raise ValueError(f"{source} has {name} {saved!r}, but {asked_for!r} is asked for. Make them equal.")


def _check_keys(kind: type, values: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"unknown keys {unknown} in a {kind.__name__}; was it saved by a newer version?")
