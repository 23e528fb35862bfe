"""Which module should hear which: graph priors by networkx, and signatures fitted to a graph.

N modules, S signature width. A fit is made once and kept in a cache folder ($M2MKD_CACHE, else ~/.cache/m2mkd), since
one of 768 modules takes minutes.
"""

import functools
import hashlib
import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .kernel import distance

LEARNING_RATE = 1e-3  # of Adam, as published
PUBLISHED_STEPS = 1000
CHECK_EVERY = 50  # steps between two looks at the recall


@dataclass(frozen=True)
class Graph:
    """A graph prior: its kind, and of its settings those that the kind has.

    Raises:
        ValueError: a kind or settings that make no graph, naming them.
    """

    kind: str = "scale-free"
    degree: int = 2  # scale-free: edges of a new module; watts-strogatz: neighbours, 0 = a tenth of the modules
    clusters: int = 8  # planted-partition and ring-of-cliques; the modules are shared out evenly
    p: float = 0.1  # erdos-renyi: of an edge; watts-strogatz: of an edge to be laid anew
    p_in: float = 0.9  # planted-partition: of an edge inside a cluster
    p_out: float = 0.2  # and of one between clusters

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"graph {self.kind!r} is not known; use one of {', '.join(KINDS)}.")

    def adjacency(self, num_modules: int, seed: int) -> Tensor:
        """The graph as a symmetric matrix (N, N) of 0 and 1 with a zero diagonal, float32.

        Raises:
            ValueError: the kind has no graph of so many modules, or networkx is not installed.
        """
        nx = _networkx()
        graph = KINDS[self.kind](nx, self, num_modules, seed)
        graph = nx.convert_node_labels_to_integers(graph, ordering="default")
        assert len(graph) == num_modules
        adjacency = torch.zeros(num_modules, num_modules)
        for a, b in graph.edges:
            if a != b:
                adjacency[a, b] = adjacency[b, a] = 1
        return adjacency


@dataclass(frozen=True)
class Fit:
    """Signatures (N, S) beside the graph they were fitted to, and how well: shares of pairs on their side."""

    signatures_NS: Tensor
    recall: float  # of the edges, those that the kernel keeps
    precision: float  # of the pairs that the kernel keeps, those that are edges
    steps: int


def orthogonal_signatures(num_modules: int, width: int, seed: int) -> Tensor:
    """Where a fit starts, (N, S)."""
    signatures = torch.empty(num_modules, width)
    return nn.init.orthogonal_(signatures, generator=torch.Generator().manual_seed(seed))


def fit_steps(signatures_NS: Tensor, adjacency_NN: Tensor, threshold: float, steps: int) -> Tensor:
    """Signatures after so many steps of Adam on fit_loss, as published."""
    signatures = nn.Parameter(signatures_NS.clone())
    optimizer = torch.optim.Adam([signatures], lr=LEARNING_RATE)
    for _ in range(steps):
        _fit_step(signatures, optimizer, adjacency_NN, threshold)
    return signatures.detach()


def fit_loss(signatures_NS: Tensor, adjacency_NN: Tensor, threshold: float) -> Tensor:
    """Mean over all pairs: of an edge max(threshold, d), else max(-threshold, -d)."""
    d = distance(signatures_NS, signatures_NS)
    return torch.where(adjacency_NN > 0, d.clamp(min=threshold), (-d).clamp(min=-threshold)).mean()


def quality(signatures_NS: Tensor, adjacency_NN: Tensor, truncation: float) -> tuple[float, float]:
    """Recall and precision of the pairs that a kernel of this truncation keeps, against the graph's edges."""
    kept = distance(signatures_NS, signatures_NS) <= truncation
    kept.fill_diagonal_(False)
    edges = adjacency_NN > 0
    hits = (kept & edges).sum().item()
    return hits / max(edges.sum().item(), 1), hits / max(kept.sum().item(), 1)


@functools.cache
def fitted(
    graph: Graph,
    num_modules: int,
    width: int,
    seed: int,
    threshold: float,
    truncation: float,
    recall: float,
    max_steps: int,
) -> Fit:
    """Signatures whose kernel keeps the graph: at least PUBLISHED_STEPS steps, then until recall and precision are met.

    Args:
        threshold: of the fit; `truncation` is the kernel's, what recall is counted at.
        recall: least share of the edges that the kernel keeps; precision has to be as good where the two thresholds
            are one. 0 = the published steps, whatever comes of them.

    Raises:
        ValueError: the recall is not met within `max_steps`, or no signatures of this width can meet it.
    """
    asked = {"graph": asdict(graph), "threshold": threshold, "truncation": truncation, "recall": recall}
    asked |= {"modules": num_modules, "width": width, "seed": seed, "max_steps": max_steps}
    adjacency = graph.adjacency(num_modules, seed)
    check_width(adjacency, width, threshold)
    path = _cache_file(asked)
    if path.is_file():
        content = load_file(path)
        signatures, steps = content["signatures"], int(content["steps"])
        return Fit(signatures, *quality(signatures, adjacency, truncation), steps)
    fit = _fit(adjacency, asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"signatures": fit.signatures_NS, "steps": torch.tensor(fit.steps)}, temporary)
    temporary.replace(path)
    return fit


def check_width(adjacency_NN: Tensor, width: int, threshold: float) -> None:
    """Refuse signatures too narrow for the modules that must not hear each other.

    Modules without an edge between any two of them need vectors whose cosines are all at most s = 1 - threshold. On a
    sphere of dimension S there are at most S (1 - s) (2 + (S + 1) s) / (1 - S s^2) of those while s is at most
    (sqrt(S + 3) - 1) / (S + 2) (Levenshtein's third bound), and S + 1 where s is 0 or less than it.

    Raises:
        ValueError: naming the width and how many such modules the graph has.
    """
    if width < 2:
        raise ValueError(f"signature_dim must be at least 2, got {width}: two signatures of one number are +1 or -1.")
    s = 1 - threshold
    if s < 0 or s > (math.sqrt(width + 3) - 1) / (width + 2):
        return
    most = width * (1 - s) * (2 + (width + 1) * s) / (1 - width * s * s)
    independent = _independent(adjacency_NN)
    if independent > most:
        raise ValueError(
            f"signature_dim {width} is too narrow: the graph has {independent} modules of which no two may hear each "
            f"other at threshold {threshold}, and there is room for {int(most)}. Widen signature_dim, take fewer "
            f"mediators or a denser graph."
        )


def _fit(adjacency: Tensor, asked: dict) -> Fit:
    signatures = nn.Parameter(orthogonal_signatures(asked["modules"], asked["width"], asked["seed"]))
    optimizer = torch.optim.Adam([signatures], lr=LEARNING_RATE)
    wanted, truncation = asked["recall"], asked["truncation"]
    one_threshold = asked["threshold"] == truncation
    step = 0
    while True:
        _fit_step(signatures, optimizer, adjacency, asked["threshold"])
        step += 1
        if step < PUBLISHED_STEPS or step % CHECK_EVERY:
            continue
        recall, precision = quality(signatures.detach(), adjacency, truncation)
        if not wanted or (recall >= wanted and (precision >= wanted or not one_threshold)):
            logging.getLogger(__name__).info(
                "signatures of %s: recall %.3f, precision %.3f after %d steps", asked["graph"], recall, precision, step
            )
            return Fit(signatures.detach().clone(), recall, precision, step)
        if step >= asked["max_steps"]:
            raise ValueError(
                f"the graph {asked['graph']['kind']} of {asked['modules']} modules was not fitted within "
                f"fit_steps {asked['max_steps']}: recall {recall:.3f} and precision {precision:.3f}, asked for "
                f"{wanted}. Widen signature_dim ({asked['width']}), lower fit_recall, or allow more fit_steps."
            )


def _fit_step(signatures: nn.Parameter, optimizer: torch.optim.Optimizer, adjacency: Tensor, threshold: float) -> None:
    optimizer.zero_grad()
    with torch.enable_grad():
        fit_loss(signatures, adjacency, threshold).backward()
    optimizer.step()


def _independent(adjacency_NN: Tensor) -> int:
    """Size of a set of modules without an edge between them: greedy, those of fewest edges first."""
    free = torch.ones(len(adjacency_NN), dtype=torch.bool)
    count = 0
    for module in adjacency_NN.sum(1).argsort().tolist():
        if free[module]:
            count += 1
            free &= adjacency_NN[module] == 0
            free[module] = False
    return count


def _cache_file(asked: dict) -> Path:
    cache = Path(os.environ.get("M2MKD_CACHE") or "~/.cache/m2mkd").expanduser()
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"signatures-{asked['graph']['kind']}-{digest}.safetensors"


def _networkx() -> Any:
    """The package networkx, imported when a graph is made: a trained NAC has its signatures among its weights."""
    try:
        import networkx
    except ImportError as error:
        raise ValueError("the graph that a new NAC starts from needs networkx: pip install networkx.") from error
    return networkx


def _scale_free(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    _need(1 <= graph.degree < n, f"graph_degree {graph.degree} must lie between 1 and {n - 1} for {n} modules.")
    return nx.barabasi_albert_graph(n, graph.degree, seed=seed)


def _planted_partition(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    return nx.planted_partition_graph(graph.clusters, _share(graph, n), graph.p_in, graph.p_out, seed=seed)


def _ring_of_cliques(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    size = _share(graph, n)
    _need(graph.clusters >= 2 and size >= 2, f"a ring of {graph.clusters} cliques of {size} needs 2 of 2 at least.")
    return nx.ring_of_cliques(graph.clusters, size)


def _erdos_renyi(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    return nx.erdos_renyi_graph(n, graph.p, seed=seed)


def _watts_strogatz(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    neighbours = graph.degree or round(0.1 * n)
    _need(neighbours < n, f"graph_degree {neighbours} must be below {n} modules.")
    return nx.watts_strogatz_graph(n, neighbours, graph.p, seed=seed)


def _grid(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    rows = max(row for row in range(1, math.isqrt(n) + 1) if n % row == 0)  # as square as n allows
    return nx.grid_2d_graph(rows, n // rows)


def _tree(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    return nx.full_rary_tree(2, n)


def _barbell(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    clique = max(n // 3, 2)
    _need(n >= 4, f"a barbell needs 4 modules, got {n}.")
    return nx.barbell_graph(clique, n - 2 * clique)


def _hypercube(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    _need(n & (n - 1) == 0, f"a hypercube has a power of two of modules, got {n}.")
    return nx.hypercube_graph(n.bit_length() - 1)


def _complete(nx: Any, graph: Graph, n: int, seed: int) -> Any:
    return nx.complete_graph(n)


def _share(graph: Graph, n: int) -> int:
    divides = graph.clusters >= 1 and n % graph.clusters == 0
    _need(divides, f"graph_clusters {graph.clusters} does not divide {n} modules: make it a divisor.")
    return n // graph.clusters


def _need(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


KINDS = {
    "scale-free": _scale_free,
    "planted-partition": _planted_partition,
    "ring-of-cliques": _ring_of_cliques,
    "erdos-renyi": _erdos_renyi,
    "watts-strogatz": _watts_strogatz,
    "grid": _grid,
    "tree": _tree,
    "barbell": _barbell,
    "hypercube": _hypercube,
    "complete": _complete,
}
