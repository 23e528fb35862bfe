"""What a NAC is built from: presets by name, the configuration, and what a trained one may be changed into."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from torch import Tensor

from ..modules.tokens import TokenLayout
from .graphs import Fit, Graph, fitted
from .tokens import DEPTHS, STEM

MODEL_TYPE = "nac"  # in config.json
POOLING = "confidence"  # timm's global_pool: output states weighted by their confidence
# Sizes of the published configurations, and a small one for the embedded data sets
PRESETS = {
    "tiny-imagenet": {
        "state_dim": 384,
        "code_dim": 384,
        "heads": 6,
        "input_latents": 64,
        "mediator_latents": 256,
        "output_latents": 64,
        "ffn_factor": 2.0,
        "graph_degree": 2,
        "graph_clusters": 8,
    },
    "imagenet": {
        "state_dim": 512,
        "code_dim": 512,
        "heads": 8,
        "input_latents": 192,
        "mediator_latents": 768,
        "output_latents": 64,
        "ffn_factor": 1.0,
        "graph_degree": 6,
        "graph_clusters": 12,
        # 64 numbers do not hold this graph (recall .72, precision .15 after 1,000 steps; 256 hold it): as published
        "fit_recall": 0.0,
    },
    "small": {
        "state_dim": 64,
        "code_dim": 64,
        "signature_dim": 32,
        "heads": 4,
        "head_dim": 16,
        "input_latents": 16,
        "mediator_latents": 32,
        "output_latents": 8,
        "ffn_factor": 2.0,
        "graph_clusters": 4,
        "tokenizer": "nano",
        "grid_dim": 16,
    },
}
SIZES = (
    "image_size",
    "in_chans",
    "state_dim",
    "code_dim",
    "signature_dim",
    "heads",
    "head_dim",
    "input_latents",
    "mediator_latents",
    "output_latents",
    "propagators",
    "tokenizer_stages",
    "grid_dim",
)
# what may change on trained weights without making another function of them
FREE = (
    "drop_path_rate",
    "code_noise",
    "stochastic_kernel",
    "temperature",
    "noisy_evaluation",
    "hinge_weight",
    "hinge_radius",
    "block_model_weight",
    "seed",
    # the signatures are in the weights: how they were made is history
    "graph",
    "graph_degree",
    "graph_clusters",
    "graph_p",
    "graph_p_in",
    "graph_p_out",
    "graph_mediators",
    "kept",
    "fit_threshold",
    "fit_recall",
    "fit_steps",
)


@dataclass(frozen=True, kw_only=True)
class NACConfig:
    """Sizes, circuit and regularisation of one NAC; plain values, as config.json has them.

    Raises:
        ValueError: naming the field that makes no model, its value, and what is expected.
    """

    image_size: int  # pixels
    in_chans: int = 3
    num_classes: int
    state_dim: int
    code_dim: int
    signature_dim: int = 64
    heads: int
    head_dim: int = 64
    input_latents: int  # modules that read the image and send
    mediator_latents: int  # modules of the circuit
    output_latents: int  # modules that the classes are told from
    propagators: int = 8  # layers of the circuit
    ffn_factor: float  # hidden width of a feed-forward block over state_dim
    tokenizer: str = "mini"  # blocks per stage, a key of tokens.DEPTHS
    tokenizer_stages: int = 2  # a token is 4 x 2^(stages - 1) pixels
    grid_dim: int = 64  # channels of the learned positions
    layer_scale: float = 0.1  # initial value, but of the read-in attention's, 1
    graph: str = "scale-free"  # prior that the mediators' signatures are fitted to, a kind of graphs.KINDS
    graph_degree: int = 2  # see graphs.Graph for these five
    graph_clusters: int = 8
    graph_p: float = 0.1
    graph_p_in: float = 0.9
    graph_p_out: float = 0.2
    # of a pruned circuit: how many mediators its graph is of (0 = as many as it has), and which of those it has
    graph_mediators: int = 0
    kept: tuple[int, ...] = ()
    truncation: float = 0.9  # modules whose signatures are farther apart do not hear each other
    # of the fit; None = the kernel's. Published is a fit at 0.8 and a kernel at 0.9, which loses most of the graph
    fit_threshold: float | None = None
    fit_recall: float = 0.95  # least share of the graph's edges in the fitted kernel; 0 = 1000 steps, as published
    fit_steps: int = 20_000  # most steps of the fit
    drop_path_rate: float = 0.1  # of the propagators
    code_noise: float = 0.05  # training noise on codes, relative to each entry
    stochastic_kernel: bool = True  # links are sampled in training
    temperature: float = 0.5  # of those samples
    noisy_evaluation: bool = False  # keep the noise of seeds and pooling in evaluation, as published
    hinge_weight: float = 0.1  # repulsion of near signatures
    hinge_radius: float = 0.4
    block_model_weight: float = 0.0  # planted-partition: links are drawn to the partition; published 1
    seed: int = 0  # of the initial values

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 100_000:
                raise ValueError(f"{name} must be a whole number from 1 to 100,000, got {value!r}.")
        if type(self.num_classes) is not int or self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {self.num_classes!r}: a NAC has no form without.")
        if self.tokenizer not in DEPTHS:
            raise ValueError(f"tokenizer {self.tokenizer!r} is not known; use one of {', '.join(DEPTHS)}.")
        if self.tokenizer_stages > 3:
            raise ValueError(f"tokenizer_stages must lie between 1 and 3, got {self.tokenizer_stages}.")
        if self.state_dim % 4:
            raise ValueError(f"state_dim must be a multiple of 4 (the tokenizer takes quarters), got {self.state_dim}.")
        if self.image_size % self.token_pixels:
            raise ValueError(
                f"image_size {self.image_size} makes no grid of tokens of {self.token_pixels} pixels: take a multiple, "
                f"or another tokenizer_stages ({self.tokenizer_stages})."
            )
        for name, most in (("truncation", 2), ("layer_scale", 100), ("temperature", 100), ("ffn_factor", 100)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{name} must lie above 0 and at most {most}, got {value!r}.")
        if self.fit_threshold is not None and not 0 < self.fit_threshold <= self.truncation:
            raise ValueError(
                f"fit_threshold must lie above 0 and at most truncation ({self.truncation}), got "
                f"{self.fit_threshold!r}: edges are fitted to lie within it."
            )
        for name in ("fit_recall", "drop_path_rate", "code_noise"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value!r}.")
        if self.block_model_weight and self.graph != "planted-partition":
            raise ValueError(
                f"block_model_weight {self.block_model_weight} is for graph 'planted-partition', the graph is "
                f"{self.graph!r}: set it to 0."
            )
        self._check_pruning()
        self.graph_prior()

    def _check_pruning(self) -> None:
        """graph_mediators and kept; JSON has `kept` as a list."""
        count = self.graph_mediators
        if type(count) is not int or not 0 <= count <= 100_000:
            raise ValueError(f"graph_mediators must be a whole number from 0 to 100,000, got {count!r}.")
        kept = tuple(self.kept) if isinstance(self.kept, list | tuple) else (None,)
        known = {number for number in kept if type(number) is int and 0 <= number < count}
        if not len(kept) == len(known) == (self.mediator_latents if count else 0):
            raise ValueError(
                f"kept must name each of the {self.mediator_latents} mediators of a pruned circuit among the "
                f"graph_mediators ({count}) of its graph, and nothing of another one, got {self.kept!r:.100}."
            )
        object.__setattr__(self, "kept", kept)

    @property
    def token_pixels(self) -> int:
        """Pixels a token of the tokenizer is wide and high."""
        return STEM * 2 ** (self.tokenizer_stages - 1)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Tokens down and across."""
        side = self.image_size // self.token_pixels
        return side, side

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the tokenizer's stages."""
        return (self.state_dim // 4, self.state_dim // 2, self.state_dim)[: self.tokenizer_stages]

    @property
    def token_dim(self) -> int:
        """Width of a token: the tokenizer's last stage and the positions beside it."""
        return self.widths[-1] + self.grid_dim

    @property
    def tokens(self) -> TokenLayout:
        """Nothing comes before the tokens of the image, and nothing is rotated."""
        return TokenLayout(class_token=False, reg_tokens=0)

    @property
    def depth(self) -> int:
        """Blocks: read-in, propagators, read-out."""
        return self.propagators + 2

    def graph_prior(self) -> Graph:
        """The graph that the mediators' signatures start from."""
        return Graph(
            self.graph, self.graph_degree, self.graph_clusters, self.graph_p, self.graph_p_in, self.graph_p_out
        )

    def adjacency(self) -> Tensor:
        """The graph between the mediators, (M, M) of 0 and 1; of a pruned circuit what is left of it.

        Raises:
            ValueError: see graphs.Graph.adjacency.
        """
        places = self.places()
        return self.graph_prior().adjacency(self.graph_size, self.seed)[places][:, places]

    @property
    def graph_size(self) -> int:
        """Mediators that the graph is of."""
        return self.graph_mediators or self.mediator_latents

    def places(self) -> list[int]:
        """Which of the graph's mediators these are."""
        return list(self.kept or range(self.mediator_latents))

    def pruned(self, keep: Sequence[int]) -> "NACConfig":
        """The configuration of the circuit with these of its mediators only."""
        places = self.places()
        kept = tuple(places[number] for number in keep)
        return replace(self, mediator_latents=len(kept), graph_mediators=self.graph_size, kept=kept)

    def fit(self) -> Fit:
        """Signatures of the graph's mediators, fitted to it; made once and cached.

        Raises:
            ValueError: see graphs.fitted.
        """
        threshold = self.truncation if self.fit_threshold is None else self.fit_threshold
        return fitted(
            self.graph_prior(),
            self.graph_size,
            self.signature_dim,
            self.seed,
            threshold,
            self.truncation,
            self.fit_recall,
            self.fit_steps,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NACConfig":
        """The configuration of plain values, as JSON gives them.

        Raises:
            ValueError: unknown keys, missing ones, or values that make no model.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys {unknown} in a {cls.__name__}; was it saved by a newer version?")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"keys {missing} are missing in a {cls.__name__}.")
        return cls(**values)

    def on_weights_of(self, saved: "NACConfig", source: str) -> "NACConfig":
        """This configuration for the weights of a model saved with another one: a new run starts from them.

        Noise, regularisers and how signatures were fitted are this one's; what decides what the weights mean must be
        equal.

        Raises:
            ValueError: naming the first setting that differs, and both its values.
        """
        for f in fields(self):
            old, asked_for = getattr(saved, f.name), getattr(self, f.name)
            if f.name not in FREE and old != asked_for:
                raise ValueError(f"{source} has {f.name} {old!r}, but {asked_for!r} is asked for. Make them equal.")
        return replace(self)


def decode_preset(name: str) -> dict[str, Any]:
    """Fields of NACConfig for a preset.

    Raises:
        ValueError: an unknown one.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} of a NAC is not known: use one of {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
