"""The layers a NAC is built of: linear layers and feed-forward blocks that a code modulates, path drop, noise on codes.

B images, U modules (rows), N codes, K code width, C state width. Formulas: docs/method.md, "Neural Attentive Circuits".
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.layer import draw

NORM_EPS = 1e-5
# what makes a scale of the projected code
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "layernorm": lambda s: F.layer_norm(s, s.shape[-1:], eps=NORM_EPS),
    "l2": lambda s: F.normalize(s, dim=-1),
    "none": lambda s: s,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# Random draws that are handed in, by their name, in place of new ones: "seed.input", "gumbel", ...
Draws = Mapping[str, Tensor]


class ModFC(nn.Module):
    """A linear layer whose input channels a code scales: W (x * s(c)) + b, s(c) = [1 +] gain * norm(A c).

    Args:
        gain: of the scale; learned from there on, unless `learn_gain` is off.
        norm: a key of SCALES.
        add_one: whether the scale is a deviation from 1.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        code_dim: int,
        bias: bool = True,
        *,
        gain: float = 0.1,
        learn_gain: bool = True,
        norm: str = "layernorm",
        add_one: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.scale = nn.Linear(code_dim, width_in, bias=False)
        # (1,): DeepSpeed takes no parameter without dimensions
        self.gain = nn.Parameter(torch.full((1,), gain)) if learn_gain else gain
        self.start_gain = gain
        self.norm = norm
        self.add_one = add_one

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x (..., U, width_in) and codes (U, K) or (1, K) -> (..., U, width_out)."""
        return F.linear(x * self.scale_of(code), self.weight, self.bias)

    def scale_of(self, code: Tensor) -> Tensor:
        """s(c): codes (U, K) -> (U, width_in)."""
        scale = self.gain * SCALES[self.norm](self.scale(code))
        return 1 + scale if self.add_one else scale

    @torch.no_grad()
    def initialise(self, seed: int, name: str) -> None:
        """Initial values drawn from `seed` and the layer's name."""
        for key, weight in (("weight", self.weight), ("scale.weight", self.scale.weight)):
            draw(weight, nn.init.kaiming_uniform_, seed, name, key, a=math.sqrt(5))
        if self.bias is not None:
            self.bias.zero_()
        if isinstance(self.gain, nn.Parameter):
            self.gain.fill_(self.start_gain)


class ModFFN(nn.Module):
    """x + gamma * ModFC(act(ModFC(LN(x), c)), c); GEGLU(h) = a * gelu(g) of the halves h = [a | g]."""

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        factor: float,
        gamma: float = 0.1,
        path_drop: float = 0.0,
        *,
        geglu: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        hidden = round(factor * state_dim)
        self.norm = nn.LayerNorm(state_dim, eps=NORM_EPS)
        self.fc1 = ModFC(state_dim, 2 * hidden if geglu else hidden, code_dim)
        self.fc2 = ModFC(hidden, state_dim, code_dim)
        self.gamma = nn.Parameter(torch.full((state_dim,), gamma))
        self.path_drop = path_drop
        self.geglu = geglu
        self.residual = residual

    def forward(self, x: Tensor, code: Tensor, draws: Draws | None = None, name: str = "") -> Tensor:
        """States (B, U, C) and codes (U, K) or (1, K) -> (B, U, C).

        Args:
            draws, name: uniforms of the path drop may be handed in as f"{name}.path".
        """
        hidden = self.fc1(self.norm(x), code)
        if self.geglu:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * F.gelu(gate)
        else:
            hidden = F.gelu(hidden)
        change = self.gamma * self.fc2(hidden, code)
        if not self.residual:
            return change
        return x + drop_path(change, self.path_drop if self.training else 0.0, draws, f"{name}.path")


def drop_path(change: Tensor, rate: float, draws: Draws | None = None, name: str = "") -> Tensor:
    """Leave a residual (B, ...) out, image by image, with probability `rate` (Huang et al. 2016).

    Kept where floor(1 - rate + u) is 1, u uniform in [0, 1), and then divided by 1 - rate.
    """
    if not rate:
        return change
    shape = (change.shape[0],) + (1,) * (change.ndim - 1)
    uniform = drawn(draws, name, lambda: torch.rand(shape, device=change.device))
    keep = torch.floor(1 - rate + uniform.reshape(shape)).to(change.dtype)
    return change / (1 - rate) * keep


def noisy_codes(code: Tensor, strength: float, draws: Draws | None = None, name: str = "") -> Tensor:
    """Codes (N, K) with uniform noise of up to `strength` times each entry's size; no gradient through that size."""
    if not strength:
        return code
    uniform = drawn(draws, name, lambda: torch.rand(code.shape, device=code.device))
    return code + ((2 * uniform - 1) * strength * code.detach().abs()).to(code.dtype)


def drawn(draws: Draws | None, name: str, make: Callable[[], Tensor]) -> Tensor:
    """The draw of that name that was handed in, or a new one."""
    if draws is not None and name in draws:
        return draws[name]
    return make()
