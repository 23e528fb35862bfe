"""Who may send to whom: the kernel between signatures, and its sample in training.

U receivers, W senders, S signature width, B images. All of it in fp32 at least, whatever the training type: log weights
of bf16 signatures would move by whole percents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_TRUNCATION = -1.0


class Kernel(nn.Module):
    """P = exp(-d / bandwidth), d = 1 - cosine of two signatures; 0 where d is above `truncation`."""

    def __init__(self, truncation: float = NO_TRUNCATION, temperature: float = 0.5, stochastic: bool = False) -> None:
        super().__init__()
        self.bandwidth = nn.Parameter(torch.ones(1))  # DeepSpeed takes no parameter without dimensions
        self.truncation = truncation
        self.temperature = temperature  # of the relaxed Bernoulli sample
        self.stochastic = stochastic  # in training

    def forward(self, distance_UW: Tensor) -> Tensor:
        """log P (U, W), -inf where truncated; see `sampled` for training."""
        return log_kernel(distance_UW, self.bandwidth, self.truncation)

    def sampled(self, distance_UW: Tensor, uniform_BUW: Tensor) -> Tensor:
        """log of a relaxed Bernoulli sample of P, (B, U, W)."""
        link_UW = link_probability(distance_UW, self.bandwidth, self.truncation)
        return log_sample(link_UW, uniform_BUW, self.temperature)


def distance(receivers_US: Tensor, senders_WS: Tensor) -> Tensor:
    """1 - cosine similarity of every receiver and sender, (U, W); 0 to 2."""
    at_least = torch.promote_types(receivers_US.dtype, torch.float32)
    return 1 - F.normalize(receivers_US.to(at_least), dim=-1) @ F.normalize(senders_WS.to(at_least), dim=-1).T


def log_kernel(distance_UW: Tensor, bandwidth: Tensor, truncation: float = NO_TRUNCATION) -> Tensor:
    """log P = -d / bandwidth, -inf where d itself (not d / bandwidth) is above `truncation`."""
    log_UW = -distance_UW / bandwidth.to(distance_UW.dtype)
    if truncation == NO_TRUNCATION:
        return log_UW
    return log_UW.masked_fill(distance_UW > truncation, -torch.inf)


def link_probability(
    distance_UW: Tensor, bandwidth: Tensor, truncation: float = NO_TRUNCATION, straight_through: bool = False
) -> Tensor:
    """P (U, W); with `straight_through` truncated pairs pass the gradient on as if they were not."""
    full_UW = torch.exp(-distance_UW / bandwidth.to(distance_UW.dtype))
    if truncation == NO_TRUNCATION:
        return full_UW
    kept_UW = full_UW.masked_fill(distance_UW > truncation, 0.0)
    return full_UW + (kept_UW - full_UW).detach() if straight_through else kept_UW


def log_sample(link_UW: Tensor, uniform_BUW: Tensor, temperature: float) -> Tensor:
    """log y, y a RelaxedBernoulli(P, temperature) sample made of uniforms in [0, 1) (Maddison et al. 2017).

    z = (log u - log(1 - u) + log P - log(1 - P)) / temperature, y = sigmoid(z); u, P and y are kept off 0 and 1.
    """
    info = torch.finfo(link_UW.dtype)
    u = uniform_BUW.to(link_UW.dtype).clamp(info.eps, 1 - info.eps)
    p = link_UW.clamp(info.eps, 1 - info.eps)
    z = (u.log() - torch.log1p(-u) + p.log() - torch.log1p(-p)) / temperature
    return torch.sigmoid(z).clamp(info.tiny, 1 - info.eps).log()
