"""Neural Attentive Circuits (Rahaman et al. 2022): modules read an image, think in a circuit, and tell its class.

Input latents read the tokens of an image; mediators hear input latents and each other, in every propagator, as far as
the kernel between their signatures lets them; output latents read both, and their pooled states give the logits.
B images, V tokens, U receivers, W senders, C state width, K code width, S signature width, M mediators.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..files.saved import Published
from ..flops import Flops
from ..moe.layer import draw
from ..moe.out import Out, inside
from ..preprocessing import Preprocessing
from .attention import ModulatedAttention, ReadInAttention
from .config import POOLING, NACConfig
from .cost import of_whole
from .files import FORMAT
from .kernel import Kernel, distance
from .layers import NORM_EPS, Draws, ModFC, ModFFN, drawn, noisy_codes
from .regularisers import block_model_loss, graphon, hinge_repulsion
from .tokens import DEPTHS, Tokenizer

GROUPS = ("input", "mediator", "output")


class Latents(nn.Module):
    """Signatures (N, S), which decide who hears whom, and codes (N, K), which decide what each computes."""

    def __init__(self, count: int, signature_dim: int, code_dim: int) -> None:
        super().__init__()
        self.signatures = nn.Parameter(torch.empty(count, signature_dim))
        self.codes = nn.Parameter(torch.empty(count, code_dim))


class Seeder(nn.Module):
    """First states from codes: mu(h) + eps exp(logvar(h) / 2), h = LN(code)."""

    def __init__(self, code_dim: int, state_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(code_dim, eps=NORM_EPS)
        self.mu = nn.Linear(code_dim, state_dim)
        self.logvar = nn.Linear(code_dim, state_dim)

    def forward(self, code_NK: Tensor, noise_BNC: Tensor | None) -> Tensor:
        """States (B, N, C), or (1, N, C) without noise."""
        h = self.norm(code_NK)
        mean = self.mu(h)
        if noise_BNC is None:
            return mean.unsqueeze(0)
        return mean + noise_BNC.to(mean.dtype) * torch.exp(0.5 * self.logvar(h))


class ReadIn(nn.Module):
    """Modules read tokens, each through keys and values of its own."""

    def __init__(self, config: NACConfig) -> None:
        super().__init__()
        self.attn = ReadInAttention(config.token_dim, config.state_dim, config.code_dim, config.heads, config.head_dim)
        self.ffn = ModFFN(config.state_dim, config.code_dim, config.ffn_factor, config.layer_scale)

    def forward(self, states_BUC: Tensor, code_UK: Tensor, tokens_BVI: Tensor) -> Tensor:
        """(B, U, C) -> (B, U, C)."""
        return self.ffn(self.attn(states_BUC, code_UK, tokens_BVI), code_UK)


class Exchange(nn.Module):
    """Modules hear modules as far as `kernel` lets them: a propagator, or the read-out.

    Args:
        head: width of a LayerNorm and a modulated layer behind it; 0 = none, as in every published NAC of m2mKD.
    """

    def __init__(
        self,
        config: NACConfig,
        kernel: Kernel,
        path_drop: float,
        *,
        share_norm: bool,
        residual: bool,
        head: int = 0,
    ) -> None:
        super().__init__()
        sizes = (config.state_dim, config.code_dim)
        heads = (config.heads, config.head_dim)
        self.attn = ModulatedAttention(
            *sizes, *heads, config.layer_scale, path_drop, share_norm=share_norm, residual=residual
        )
        self.ffn = ModFFN(*sizes, config.ffn_factor, config.layer_scale, path_drop)
        self.kernel = kernel
        self.head_norm = nn.LayerNorm(config.state_dim, eps=NORM_EPS) if head else None
        self.head = ModFC(config.state_dim, head, config.code_dim) if head else None

    def forward(
        self,
        states_BUC: Tensor,
        senders_BWC: Tensor,
        codes: tuple[Tensor, Tensor],
        distance_UW: Tensor,
        draws: Draws | None = None,
        name: str = "",
    ) -> Tensor:
        """New states of the receivers (B, U, C).

        Args:
            codes: of receivers (U, K) and senders (W, K).
            draws, name: uniforms handed in as f"{name}.uniform" (B, U, W), f"{name}.attn.path", f"{name}.ffn.path".
        """
        if self.training and self.kernel.stochastic:
            shape = (len(states_BUC), *distance_UW.shape)
            uniform = drawn(draws, f"{name}.uniform", lambda: torch.rand(shape, device=distance_UW.device))
            log_kernel = self.kernel.sampled(distance_UW, uniform)
        else:
            log_kernel = self.kernel(distance_UW)
        code, sender_code = codes
        states = self.attn(states_BUC, code, senders_BWC, sender_code, log_kernel, draws, f"{name}.attn")
        states = self.ffn(states, code, draws, f"{name}.ffn")
        return states if self.head is None else self.head(self.head_norm(states), code)


class NAC(nn.Module, Published):
    """Images (B, channels, H, W) -> logits (B, classes).

    Evaluation is deterministic unless config.noisy_evaluation says otherwise (published): states start at their means
    and pooling has no Gumbel noise. Draws that are handed in are used in either.

    Attributes:
        config: what it is.
        preprocessing, labels: what its images must look like and what its classes are called; None when not known.
        source: the directory, or the hub id with its commit, that it was loaded from; None for a new one.
    """

    FORMAT = FORMAT

    def __init__(self, config: NACConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = config.state_dim
        self.preprocessing: Preprocessing | None = None
        self.labels: list[str] | None = None
        self.source: str | None = None
        self.grad_checkpointing = False
        depths = DEPTHS[config.tokenizer][: config.tokenizer_stages]
        self.tokenizer = Tokenizer(config.in_chans, config.widths, depths, config.grid_dim, config.grid_size)
        counts = (config.input_latents, config.mediator_latents, config.output_latents)
        latents = {group: Latents(count, config.signature_dim, config.code_dim) for group, count in zip(GROUPS, counts)}
        self.latents = nn.ModuleDict(latents)
        self.seeder = Seeder(config.code_dim, config.state_dim)
        self.read_in = ReadIn(config)
        propagators = []
        for _ in range(config.propagators):
            kernel = Kernel(config.truncation, config.temperature, config.stochastic_kernel)
            propagators.append(Exchange(config, kernel, config.drop_path_rate, share_norm=True, residual=True))
        self.propagators = nn.ModuleList(propagators)
        # the published read-out leaves its kernel at its defaults: no truncation, no sample
        self.read_out = Exchange(config, Kernel(), 0.0, share_norm=False, residual=False)
        self.confidence = nn.Linear(config.state_dim, 1)
        self.head = nn.Linear(config.state_dim, config.num_classes)
        initialise(self)

    def forward(self, images: Tensor, out: Out | None = None, draws: Draws | None = None) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, classes).

        Args:
            out: takes the regularisers in training, weighted, as "regularisers" (models.moe.auxiliary_loss adds them
                up), and the states of the groups as "states".
            draws: random draws by name in place of new ones: "seed.GROUP" normal (B, N, C) and "gumbel" (B, outputs);
                in training also "propagators.I.uniform" (B, M, W), uniform noise of codes and path drops.
        """
        return self.forward_head(self.forward_features(images, out, draws), draws=draws)

    def forward_features(self, images: Tensor, out: Out | None = None, draws: Draws | None = None) -> Tensor:
        """Images -> states of the output latents (B, outputs, C); arguments as in forward."""
        tokens = self.tokenizer(images)
        inputs, mediators, outputs = (self._seeds(group, images.shape[0], tokens, draws) for group in GROUPS)
        inputs = self.read_in(inputs, self._codes("input", "read_in.code", draws), tokens)
        mediators = self._propagated(inputs, mediators, draws)
        senders = torch.cat([inputs, mediators], dim=1)
        codes = (
            self._codes("output", "read_out.code", draws),
            self._codes(("input", "mediator"), "read_out.sender_code", draws),
        )
        outputs = self.read_out(outputs, senders, codes, self.distances("output"), draws, "read_out")
        if out is not None:
            out["states"] = {"input": inputs, "mediator": mediators, "output": outputs}
            if self.training:
                inside(out, "regularisers").update(self.regularisers())
        return outputs

    def forward_head(self, states: Tensor, pre_logits: bool = False, draws: Draws | None = None) -> Tensor:
        """Output states (B, outputs, C) -> logits (B, classes), or with `pre_logits` what the head reads (B, C)."""
        pooled = pool(states, self.confidence, self._gumbel(states, draws))
        return pooled if pre_logits else self.head(pooled)

    def distances(self, receivers: str) -> Tensor:
        """1 - cosine of the signatures of a group and of all who send to it, input latents first (U, W)."""
        senders = torch.cat([self.latents["input"].signatures, self.latents["mediator"].signatures])
        return distance(self.latents[receivers].signatures, senders)

    def regularisers(self) -> dict[str, Tensor]:
        """Weighted losses on the signatures by name; computed in forward, where ZeRO has all of them at hand."""
        config = self.config
        losses = {}
        if config.hinge_weight:
            signatures = torch.cat([self.latents[group].signatures for group in GROUPS])
            losses["hinge"] = config.hinge_weight * hinge_repulsion(signatures, config.hinge_radius)
        if config.block_model_weight:
            signatures = self.latents["mediator"].signatures
            whole = graphon(config.graph_size, config.graph_clusters, config.graph_p_in, config.graph_p_out)
            target = whole[config.places()][:, config.places()]
            kernels = [propagator.kernel for propagator in self.propagators]
            loss = block_model_loss(signatures, kernels, target.to(signatures.device))
            losses["block_model"] = config.block_model_weight * loss
        return losses

    def get_classifier(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes`.

        Raises:
            ValueError: no classes, or another pooling.
        """
        if global_pool not in (None, POOLING):
            raise ValueError(f"global_pool {global_pool!r} is not known: a NAC pools by confidence, {POOLING!r}.")
        like = self.head.weight
        self.config = replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.labels = None
        self.head = nn.Linear(self.config.state_dim, num_classes, device=like.device, dtype=like.dtype)
        reset_linear(self.head, self.config.seed, "head")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Tokens of an image down and across."""
        return tuple(self.tokenizer.grid.shape[1:])

    @property
    def num_tokens(self) -> int:
        """Tokens that its input latents read."""
        rows, columns = self.grid_size
        return rows * columns

    def count_flops(self, tokens: int) -> Flops:
        """FLOPs of one image (models/flops.py); `tokens` says nothing of a NAC, which makes its own."""
        return of_whole(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each propagator's activations in backward instead of keeping them, or keep them again."""
        self.grad_checkpointing = enable

    @torch.no_grad()
    def connectivity(self) -> Tensor:
        """How well each mediator is connected, (M,): links to and from all others, mean over the propagators."""
        heard = self.distances("mediator")
        told = self.distances("output")[:, self.config.input_latents :]
        links = torch.zeros(self.config.mediator_latents, device=heard.device)
        for propagator in self.propagators:
            link = propagator.kernel(heard).exp()
            links += (link.sum(1) + link[:, self.config.input_latents :].sum(0)) / len(self.propagators)
        return links + self.read_out.kernel(told).exp().sum(0)

    @torch.no_grad()
    def pruned(self, keep: int | Sequence[int]) -> "NAC":
        """The same circuit with some of its mediators only; every weight but theirs is shared.

        Args:
            keep: how many of the best connected, or which ones.

        Raises:
            ValueError: none, too many, or mediators it does not have.
        """
        count = self.config.mediator_latents
        if isinstance(keep, int):
            if not 1 <= keep <= count:
                raise ValueError(f"{keep} mediators cannot be kept of {count}: give a number from 1 to {count}.")
            keep = self.connectivity().topk(keep).indices.sort().values.tolist()
        if not keep or len(set(keep)) < len(keep) or min(keep) < 0 or max(keep) >= count:
            raise ValueError(f"mediators {list(keep)} are not different numbers from 0 to {count - 1}.")
        with torch.device("meta"):
            result = NAC(self.config.pruned(keep))
        state = self.state_dict()
        rows = torch.tensor(list(keep), device=self.latents["mediator"].codes.device)
        for name in ("latents.mediator.signatures", "latents.mediator.codes"):
            state[name] = state[name][rows]
        result.load_state_dict(state, assign=True)
        for name in ("preprocessing", "labels", "source"):
            setattr(result, name, getattr(self, name))
        return result.train(self.training)

    def _propagated(self, inputs: Tensor, mediators: Tensor, draws: Draws | None) -> Tensor:
        distance_MW = self.distances("mediator")
        for number, propagator in enumerate(self.propagators):
            name = f"propagators.{number}"
            codes = (
                self._codes("mediator", f"{name}.code", draws),
                self._codes(("input", "mediator"), f"{name}.sender_code", draws),
            )
            senders = torch.cat([inputs, mediators], dim=1)
            arguments = (mediators, senders, codes, distance_MW, draws, name)
            if self.grad_checkpointing and torch.is_grad_enabled():
                mediators = checkpoint(propagator, *arguments, use_reentrant=False)
            else:
                mediators = propagator(*arguments)
        return mediators

    def _codes(self, groups: str | tuple[str, ...], name: str, draws: Draws | None) -> Tensor:
        """Codes of a group, or of several after each other, with training noise drawn anew."""
        groups = (groups,) if isinstance(groups, str) else groups
        codes = torch.cat([self.latents[group].codes for group in groups])
        return noisy_codes(codes, self.config.code_noise if self.training else 0.0, draws, name)

    def _seeds(self, group: str, images: int, like: Tensor, draws: Draws | None) -> Tensor:
        """First states of a group (B, N, C)."""
        name = f"seed.{group}"
        codes = self._codes(group, f"{name}.code", draws)
        shape = (images, len(codes), self.config.state_dim)
        noise = self._noise(draws, name, lambda: torch.randn(shape, device=like.device))
        return self.seeder(codes, noise).expand(images, -1, -1)

    def _gumbel(self, states: Tensor, draws: Draws | None) -> Tensor | None:
        def gumbel() -> Tensor:
            # as torch's gumbel_softmax: -log of an exponential
            return -torch.empty(states.shape[:2], device=states.device).exponential_().log()

        return self._noise(draws, "gumbel", gumbel)

    def _noise(self, draws: Draws | None, name: str, make: Callable[[], Tensor]) -> Tensor | None:
        """What is drawn in training and in a noisy evaluation; in a deterministic one only what is handed in."""
        if self.training or self.config.noisy_evaluation:
            return drawn(draws, name, make)
        return (draws or {}).get(name)


def pool(
    states: Tensor, confidence: nn.Linear, gumbel: Tensor | None = None, temperature: float = 1.0, hard: bool = False
) -> Tensor:
    """Mean of the output states (B, N, C) -> (B, C), weighted by softmax((confidence + gumbel) / temperature).

    Args:
        hard: take the state of the largest weight, with the gradient of the soft ones.
    """
    scores = confidence(states).squeeze(-1)
    if gumbel is not None:
        scores = scores + gumbel.to(scores.dtype)
    weights = torch.softmax(scores / temperature, dim=-1)
    if hard:
        one = torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)
        weights = one - weights.detach() + weights
    return (weights.unsqueeze(-1) * states).sum(1)


@torch.no_grad()
def initialise(model: NAC) -> None:
    """Initial values: each drawn from config.seed and its name, mediator signatures fitted to the graph."""
    seed = model.config.seed
    if model.head.weight.is_meta:
        return
    for name, module in model.named_modules():
        if isinstance(module, ModFC | Tokenizer):
            module.initialise(seed, name)
    for group, latents in model.latents.items():
        draw(latents.codes, nn.init.normal_, seed, group, "codes")
        if group != "mediator":
            draw(latents.signatures, nn.init.normal_, seed, group, "signatures")
    model.latents["mediator"].signatures.copy_(model.config.fit().signatures_NS[model.config.places()])
    for name in ("seeder.mu", "seeder.logvar", "confidence", "head"):
        reset_linear(model.get_submodule(name), seed, name)
    model.seeder.logvar.bias.fill_(-5.0)  # states start near their means


@torch.no_grad()
def reset_linear(layer: nn.Linear, seed: int, name: str) -> None:
    """torch's own start of a linear layer, drawn from `seed` and its name."""
    bound = 1 / math.sqrt(layer.in_features)
    draw(layer.weight, nn.init.uniform_, seed, name, "weight", a=-bound, b=bound)
    draw(layer.bias, nn.init.uniform_, seed, name, "bias", a=-bound, b=bound)
