"""What a trained circuit looks like, as plain numbers: its graph, who listens to whom, which mediators an image uses.

B images, M mediators, W senders (input latents, then mediators), O output latents, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .graphs import quality
from .model import NAC

SIDE = 64  # rows and columns of a matrix at most; of more modules neighbours are averaged


@torch.no_grad()
def circuit(nac: NAC, images: Tensor) -> dict[str, Any]:
    """A NAC beside the one that its configuration starts as.

    Returns:
        graph (its kind), edges (of the prior), fit and trained (recall and precision of the prior in the kernel, before
        and after training), prior and links (M x M, links as mean over the propagators), mass_before and mass_after
        (who listens to whom in the propagators, M x W, mean over images, heads and layers), use (per image, share of
        each mediator in what the read-out hears of mediators, B x M), evaluation ("deterministic" or "noisy"). Matrices
        are at most SIDE x SIDE.
    """
    config = nac.config
    start = NAC(config).to(images).eval()
    adjacency = config.adjacency().to(images.device)
    mediators = slice(config.input_latents, None)
    distance_MW = nac.distances("mediator")
    links = torch.stack([propagator.kernel(distance_MW).exp() for propagator in nac.propagators]).mean(0)
    after, use = _listened(nac, images)
    before, _ = _listened(start, images)
    quality_of = {}
    for name, model in (("fit", start), ("trained", nac)):
        recall, precision = quality(model.latents["mediator"].signatures.float(), adjacency, config.truncation)
        quality_of[name] = {"recall": recall, "precision": precision}
    return {
        "graph": config.graph,
        "edges": int(adjacency.sum()) // 2,
        **quality_of,
        "prior": _small(adjacency),
        "links": _small(links[:, mediators]),
        "mass_before": _small(before),
        "mass_after": _small(after),
        "use": _small(use),
        "evaluation": "noisy" if config.noisy_evaluation else "deterministic",
    }


def _listened(nac: NAC, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mass in the propagators (M, W), and of every image in the read-out on the mediators (B, M)."""
    tokens = nac.tokenizer(images)
    codes = {group: latents.codes for group, latents in nac.latents.items()}
    states = {group: nac.seeder(code, None).expand(len(images), -1, -1) for group, code in codes.items()}
    inputs = nac.read_in(states["input"], codes["input"], tokens)
    mediators = states["mediator"]
    pair = (codes["mediator"], torch.cat([codes["input"], codes["mediator"]]))
    distance_MW = nac.distances("mediator")
    mass = []
    for propagator in nac.propagators:
        senders = torch.cat([inputs, mediators], dim=1)
        log_kernel = propagator.kernel(distance_MW)
        mass.append(propagator.attn.weights(mediators, pair[0], senders, pair[1], log_kernel).mean((0, 1)))
        mediators = propagator(mediators, senders, pair, distance_MW)
    senders = torch.cat([inputs, mediators], dim=1)
    log_kernel = nac.read_out.kernel(nac.distances("output"))
    heard = nac.read_out.attn.weights(states["output"], codes["output"], senders, pair[1], log_kernel)
    # mean over heads and output latents, of the mediators alone
    heard_BM = heard.mean((1, 2))[:, nac.config.input_latents :]
    return torch.stack(mass).mean(0), heard_BM / heard_BM.sum(-1, keepdim=True)


def _small(matrix: Tensor) -> list[list[float]]:
    rows, columns = (min(size, SIDE) for size in matrix.shape)
    pooled = F.adaptive_avg_pool2d(matrix.float()[None], (rows, columns))[0]
    return [[round(value, 5) for value in row] for row in pooled.tolist()]
