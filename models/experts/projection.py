"""Students that start as a dense model of other sizes: fewer layers, another width, other heads, other MLPs.

Not in the paper, and no published method as a whole: PCA of the residual stream as in SliceGPT (Ashkboos et al. 2024,
arXiv 2401.15024), heads and hidden units taken as in structured pruning, what writes into the stream refitted by least
squares. For the dense model's states h (width D_t) and the student's z (width D_s):

1. One basis for the whole stream: z stands for P h, with the same P at every block, so that skip connections keep their
   meaning. P is made of the leading principal components of all block inputs and MLP inputs, each of trace 1, after
   the mean over channels that LayerNorm takes away.
2. Block by block on the student's own states, for some hundred images: a block that stands for the dense layers first
   to stop - 1 takes the attention of the first and the hidden units of them all. What these layers read, norm(h), is
   fitted as A norm(z) + c and folded into their weights.
3. The products that write into the stream are fitted to what is still missing there: attention's to P h_mid - z with
   h_mid behind the first layer's attention, the MLP's to P h_stop - z. So a block makes up for the errors before it,
   as far as a linear layer can.

The student's norms start at 1 and 0. Heads or hidden units that the student has more of keep their initial queries,
keys, values and first layers, and start without effect or are fitted with the others.

B images, T tokens, D width, H heads, C channels of a head, U hidden units, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from ..flops import forward_flops, num_tokens
from ..modules.basis import largest_positive
from ..modules.positions import Positions, block_positions, embed
from ..modules.stages import run_blocks
from ..moe.expert import LAYERS, activate
from ..moe.layer import MoE
from ..preprocessing import Preprocessing
from ..teacher.load import Teacher
from ..vmoe.model import VMoE
from .dense_block import Affine, DenseBlock, final_norm
from .fitting import class_token_half, gates, hidden, set_layer
from .from_clusters import start_router
from .kmeans import spherical_kmeans
from .least_squares import LeastSquares, power
from .upcycle import check_parts, read_layers, start_embedding

Batches = Callable[[], Iterable[Tensor]]  # images (B, 3, H, W) as the dense model wants them, anew at every call
CHUNK = 4096  # tokens whose hidden units are held at once
ROWS = 2  # tokens of the calibration images for each input of the widest fit, at least
# Ridge that keeps what writes into the stream near the dense weights, see LeastSquares.solve. A small one fits better
# and trains far worse: hidden units are nearly linear in each other, and large weights of both signs come out of it
NEAR = 0.3
SAME_FEATURES = 1e-6  # by so much of the largest value features may differ and are the same but for rounding
LITTLE = 0.9  # of the variance: a basis that carries less is worth a warning


@dataclass(frozen=True)
class StreamBasis:
    """What of the dense model's residual stream the student's stands for.

    Attributes:
        directions: Q (D_t, D_s); z = Q^T (h - mean of h over channels), h ~ Q z. Where the widths agree it turns the
            states and loses nothing: the student trains better in this basis than in the dense model's (docs/log.md).
        carried: share of the states' variance in it, 0..1, every block input and MLP input counting alike.
    """

    directions: Tensor
    carried: float

    @property
    def projection(self) -> Tensor:
        """P (D_s, D_t), the centring included."""
        return self.directions.T - self.directions.mean(0)[:, None]


@dataclass(frozen=True)
class Projected:
    """What became of a start.

    Attributes:
        covered: the dense layers that each of the student's blocks stands for, (first, stop).
        errors: relative squared error of the student's states behind each block, |z - P h|^2 / |P h|^2.
        means: mean of the dense model's states behind each block, (D_t,) each.
    """

    covered: list[tuple[int, int]]
    errors: list[float] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def stream_basis(model: nn.Module, batches: Iterable[Tensor], width: int) -> StreamBasis:
    """The basis of a student's stream, from the states of the dense model on some images.

    M = sum over states of G / trace(G), G = sum of (C h)(C h)^T, C = I - 11^T / D_t. With U its leading D_s - 1
    eigenvectors and R (D_s, D_s - 1) orthonormal columns orthogonal to the ones vector, Q = U R^T: states of mean 0
    over the channels, from which the student's LayerNorm takes nothing away. A student that is wider gets all D_t - 1.

    Args:
        batches: images (B, 3, H, W) as the model wants them, on its device.

    Raises:
        ValueError: states that are not finite, or do not vary.
    """
    dense_width = model.embed_dim
    positions = _positions(model, next(model.parameters()).device)
    grams: list[Tensor] = []
    for images in batches:
        states = []
        h = embed(model, images)
        for number, block in enumerate(model.blocks):
            inside = _inside(block, h, positions.get(str(number), {}))
            states += [h, inside["mid"]]
            h = inside["out"]
        states.append(h)
        new = []
        for state in states:
            centred_ND = (state - state.mean(-1, keepdim=True)).flatten(0, 1)
            new.append((centred_ND.T @ centred_ND).double())
        grams = [total + gram for total, gram in zip(grams, new)] if grams else new
    traces = torch.stack([gram.trace() for gram in grams])
    if not torch.isfinite(traces).all() or (traces <= 0).any():
        raise ValueError(
            "the hidden states of the model in student.init are not finite, or the same for all channels of all "
            "calibration images: its weights are broken; name another one"
        )
    moment_DD = sum(gram / trace for gram, trace in zip(grams, traces))
    # no state has a part along the ones vector; made the last one, it is not among the leading ones of states that lie
    # in fewer dimensions either
    values, vectors = torch.linalg.eigh(moment_DD - 1 / dense_width)
    kept = min(width, dense_width) - 1
    leading_DK = largest_positive(vectors.flip(1)[:, :kept])
    directions = leading_DK @ _zero_sum_columns(width, kept).to(leading_DK).T
    carried = float(values.flip(0)[:kept].clamp_min(0).sum() / values.clamp_min(0).sum())
    return StreamBasis(directions.float().cpu(), carried)


def check_projection(
    student: VMoE, dense: Teacher, covered: Sequence[tuple[int, int]], *, images: int, own_classes: bool = True
) -> list[str]:
    """Refuse what cannot be projected, before anything is computed; also on the meta device.

    Args:
        covered: the dense layers that each of the student's blocks stands for, (first, stop).
        images: for calibration.
        own_classes: whether the dense model's classes are the student's; otherwise its head is left behind when there
            are not as many.

    Returns:
        What is left behind of the dense model, one phrase each.

    Raises:
        ValueError: parts that do not fit, heads that rotations cannot be cut to, or too few images.
    """
    config = student.config
    blocks = [layer for layers in _layers(student, dense, covered) for layer in layers]
    left_behind = check_parts(student, dense, blocks, own_classes=own_classes)
    channels = dense.model.embed_dim // dense.model.blocks[0].attn.num_heads
    if config.rope and config.width != config.heads * channels:
        fitting = f"student.heads={config.width // channels}" if config.width % channels == 0 else "another width"
        raise ValueError(
            f"the student's heads have {config.width // config.heads} channels (width {config.width} / heads "
            f"{config.heads}) and those of {dense.source}, which rotates them by position, have {channels}: rotations "
            f"cannot be cut, so they must be equal; set {fitting}, or 'student.init=\"\"'."
        )
    rows = images * num_tokens(dense.model)
    needed = ROWS * max(config.width, config.mlp_dim)
    if rows < needed:
        raise ValueError(
            f"{images:,} calibration images are {rows:,} tokens, and a student of width {config.width} with MLPs of "
            f"{config.mlp_dim} needs at least {needed:,} to be fitted: give more training images, or set "
            f"student.start_images (to at least {-(-needed // num_tokens(dense.model))})."
        )
    return left_behind


@torch.no_grad()
def project(
    student: VMoE,
    dense: Teacher,
    covered: Sequence[tuple[int, int]],
    basis: StreamBasis,
    images: Preprocessing,
    batches: Batches,
    *,
    with_head: bool = True,
    clusters: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Projected:
    """Start a student from a dense model of other sizes, in place: everything but the routers of copied experts.

    Args:
        covered: as in check_projection, which has passed.
        images: what the student's images look like, see start_embedding.
        batches: calibration images on the dense model's device.
        with_head: the dense model's head becomes the student's; a feature head is always fitted.
        clusters: experts are no copies: each gets the hidden units and the last layer that are best on its cluster of
            the tokens, and the router sends them there.
        beat: called now and then.

    Raises:
        ValueError: hidden states that are not finite, features that are the same for all images, or fewer different
            tokens than experts.
    """
    model = dense.model
    device = next(model.parameters()).device
    start_embedding(student, model, images, dense.preprocessing, basis.projection)
    projection = basis.projection.to(device)
    positions = _positions(model, device)
    student_positions = _positions(student, device)
    pairs = [_Pair(h, F.linear(h, projection)) for h in (embed(model, batch) for batch in batches())]
    everywhere = [None] * len(pairs)
    what_is_read = everywhere
    if student.num_classes and student.config.pool == "token":
        what_is_read = class_token_half([pair.z for pair in pairs])
    result = Projected(list(covered))
    training = student.training
    student.eval()
    for number, dense_blocks in enumerate(_layers(student, dense, covered)):
        first, stop = covered[number]
        block = student.blocks[number].to(device)
        weights = what_is_read if number == len(covered) - 1 else everywhere
        layers = []
        for layer, dense_block in zip(range(first, stop), dense_blocks):
            beat()
            arguments = positions.get(str(layer), {})
            observed = _observe(model.blocks[layer], dense_block, pairs, arguments, attends=layer == first)
            if not torch.isfinite(observed.variance).all():
                raise ValueError(
                    f"the hidden states of {dense.source} in block {layer} are not finite on the calibration images: "
                    "its weights are broken; name another model in student.init, or leave it empty"
                )
            layers.append(observed)
        arguments = student_positions.get(str(number), {})
        _start_attention(block, dense_blocks[0], layers[0], pairs, weights, projection, arguments)
        beat()
        try:
            _start_mlp(block, dense_blocks, layers, pairs, weights, projection, clusters, student.config.seed + number)
        except ValueError as error:  # of the clustering
            raise ValueError(f"student block {number} (from layer {first}): {error}") from None
        result.errors.append(_error(pairs, projection))
        result.means.append(_mean_state(pairs).cpu())
        block.cpu()
    _start_end(student, dense, pairs, what_is_read, projection, with_head=with_head)
    student.train(training)
    return result


def projection_flops(
    student: VMoE,
    dense: Teacher,
    covered: Sequence[tuple[int, int]],
    images: int,
    basis_images: int,
    *,
    clusters: bool = False,
) -> int:
    """FLOPs of a start: the forwards of both models and the sums of the least squares.

    Left out is what does not grow with the images (SVDs, solutions, products of weights), and k-means.

    Args:
        images, basis_images: that `project` and `stream_basis` are given.
        clusters: as `project` is given.
    """
    model = dense.model
    tokens = num_tokens(model)
    width, dense_width = student.embed_dim, model.embed_dim
    dense_forward = forward_flops(model, tokens)
    # of stream_basis: D_t^2 for each state
    states = 2 * len(model.blocks) + 1
    of_basis = basis_images * (dense_forward + 2 * tokens * states * dense_width**2)
    # a fit of I inputs to O outputs takes I (I + O) for each token, P h takes D_t D_s
    of_projection = dense_width * width
    of_norm = width * (width + dense_width)
    # at the two ends: what the first block reads, and the final norm
    each_token = of_projection + of_norm
    channels = dense_width // model.blocks[0].attn.num_heads
    for (first, stop), block in zip(covered, student.blocks):
        # a dense layer's queries, keys and values once more, and second moments of its heads
        each_token += 3 * dense_width**2 + 3 * dense_width * channels
        # the student's attention, its last product twice, and the fit of it
        each_token += 5 * width**2 + 2 * tokens * width + 2 * width**2
        each_token += (1 + stop - first) * of_norm + 3 * of_projection
        dense_units = sum(model.blocks[layer].mlp.fc2.in_features for layer in range(first, stop))
        each_token += _mlp_products(student, block.mlp, dense_units, clusters)
    return of_basis + images * (dense_forward + 2 * tokens * each_token)


def _mlp_products(student: VMoE, mlp: nn.Module, dense_units: int, clusters: bool) -> int:
    """Multiplications for each token with which an MLP of a student is started: its fit, and what it then computes.

    Args:
        dense_units: of the layers that it stands for, together.
    """
    config = student.config
    width, hidden = config.width, config.mlp_dim
    first_layers = len(LAYERS[config.activation]) - 1
    # the first layers for the fit and for the output, the fit, the last layer
    of_expert = 2 * first_layers * hidden * width + hidden * (hidden + width) + hidden * width
    if not clusters or not isinstance(mlp, MoE):
        return of_expert
    # every expert on its own tokens, with all units to choose from; the router twice
    of_choice = first_layers * dense_units * width
    return config.moe.k * (of_expert + of_choice) + 2 * config.moe.num_experts * width


def _layers(student: VMoE, dense: Teacher, covered: Sequence[tuple[int, int]]) -> list[list[DenseBlock]]:
    """The dense layers of each of the student's blocks."""
    return [read_layers(student, dense, range(first, stop), refitted=True) for first, stop in covered]


@dataclass
class _Pair:
    """The states of one batch: the dense model's h (B, T, D_t) and the student's z (B, T, D_s)."""

    h: Tensor
    z: Tensor


@dataclass
class _Layer:
    """What is known of a dense layer on the calibration images.

    Attributes:
        normed1, normed2: what attention and MLP read, (B, T, D_t) for every batch.
        mid: the stream between them, likewise.
        queries, keys, heads: second moments per head, (H, C, C), the keys' without their mean; heads are what the last
            product of the attention reads.
        variance: of the hidden units, (U,).
    """

    normed1: list[Tensor]
    normed2: list[Tensor]
    mid: list[Tensor]
    queries: Tensor
    keys: Tensor
    heads: Tensor
    variance: Tensor


def _positions(model: nn.Module, device: torch.device) -> Positions:
    """What each block takes beside its tokens."""
    numbers = [str(number) for number in range(len(model.blocks))]
    bias = getattr(model, "rel_pos_bias", None)
    found = block_positions(getattr(model, "rope", None), bias, model.patch_embed.grid_size, numbers)
    return {
        number: {name: value.to(device) for name, value in arguments.items()} for number, arguments in found.items()
    }


def _inside(block: nn.Module, h: Tensor, positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A dense block's output, and what its parts read: normed1, heads, mid, normed2, hidden."""
    seen: dict[str, Tensor] = {}

    def keep_input(name: str) -> Callable[..., None]:
        return lambda _module, given: seen.update({name: given[0]})

    def keep_output(name: str) -> Callable[..., None]:
        return lambda _module, _given, output: seen.update({name: output})

    hooks = [
        block.norm1.register_forward_hook(keep_output("normed1")),
        block.attn.proj.register_forward_pre_hook(keep_input("heads")),
        block.norm2.register_forward_pre_hook(keep_input("mid")),
        block.norm2.register_forward_hook(keep_output("normed2")),
        block.mlp.fc2.register_forward_pre_hook(keep_input("hidden")),
    ]
    try:
        seen["out"] = run_blocks({"0": block}, h, False, positions={"0": positions})
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _observe(
    block: nn.Module, dense: DenseBlock, pairs: Sequence[_Pair], positions: Mapping[str, Tensor], attends: bool
) -> _Layer:
    """Run a dense layer on all batches, in place of their h; attention is looked at where it will be taken."""
    layer = _Layer([], [], [], *(torch.zeros(()) for _ in range(4)))
    heads = block.attn.num_heads
    count = 0
    queries = keys = key_sum = mixed = hidden_sum = hidden_squares = 0
    for pair in pairs:
        seen = _inside(block, pair.h, positions)
        pair.h = seen["out"]
        layer.normed2.append(seen["normed2"])
        hidden_NU = seen["hidden"].flatten(0, 1)
        count += len(hidden_NU)
        hidden_sum = hidden_sum + hidden_NU.sum(0).double()
        hidden_squares = hidden_squares + hidden_NU.square().sum(0).double()
        if not attends:
            continue
        layer.normed1.append(seen["normed1"])
        layer.mid.append(seen["mid"])
        qkv = F.linear(seen["normed1"], dense.qkv.weight, dense.qkv.bias).flatten(0, 1)
        query_NHC, key_NHC, _ = qkv.unflatten(1, (3, heads, -1)).unbind(1)
        queries = queries + _moment(query_NHC)
        keys = keys + _moment(key_NHC)
        key_sum = key_sum + key_NHC.sum(0).double()
        mixed = mixed + _moment(seen["heads"].flatten(0, 1).unflatten(1, (heads, -1)))
    layer.variance = hidden_squares / count - (hidden_sum / count).square()
    if attends:
        # the same key for all tokens changes no softmax, so keys count without their mean
        key_mean = key_sum / count
        layer.queries = queries / count
        layer.keys = keys / count - torch.einsum("hc,hd->hcd", key_mean, key_mean)
        layer.heads = mixed / count
    return layer


def _moment(x_NHC: Tensor) -> Tensor:
    """Sum over tokens of x x^T, by head, (H, C, C)."""
    return torch.einsum("nhc,nhd->hcd", x_NHC, x_NHC).double()


def _start_attention(
    block: nn.Module,
    dense: DenseBlock,
    layer: _Layer,
    pairs: Sequence[_Pair],
    weights: Sequence[Tensor | None],
    projection: Tensor,
    positions: Mapping[str, Tensor],
) -> None:
    """Queries, keys and values from the dense heads; the product behind them fitted to the stream. z moves on."""
    read = _start_norm(block.norm1, [pair.z for pair in pairs], layer.normed1)
    block.ls1 = _ones(block.ls1)
    written = projection @ _scaled(dense.proj, dense.scale1).weight
    prior = _start_heads(block.attn, dense, layer, read, written)
    fit = LeastSquares()
    heads = []
    hook = block.attn.proj.register_forward_pre_hook(lambda _module, given: heads.append(given[0]))
    for pair, mid, weight in zip(pairs, layer.mid, weights):
        block.attn(block.norm1(pair.z), **positions)
        fit.add(heads[-1], F.linear(mid, projection) - pair.z, weight)
    hook.remove()
    set_layer(block.attn.proj, *fit.solve(prior, NEAR))
    for pair, mixed in zip(pairs, heads):
        pair.z = pair.z + block.attn.proj(mixed)


def _start_heads(attn: nn.Module, dense: DenseBlock, layer: _Layer, read: Affine, written: Tensor) -> Tensor:
    """Queries, keys and values of the student's heads, each from one dense head or a part of it.

    Scores q^T k are cut to the student's C_s channels by the SVD of S_q^1/2 S_k^1/2 (second moments), times
    sqrt(C_s / C_t) for the softmax's scale. Values are cut by the SVD of W_o S^1/2, with W_o the dense head's columns
    of the last product in the student's stream and S the moment of what the head gives. The heads, or parts of C_s
    channels of them, with the largest singular values are taken.

    Returns:
        What the dense model's last product becomes for these heads, (D_s, D_s).
    """
    dense_heads, dense_channels = layer.heads.shape[:2]
    heads = attn.num_heads
    width = attn.qkv.in_features
    channels = width // heads
    qkv = dense.qkv.weight @ read.weight
    bias = dense.qkv.weight @ read.bias
    if dense.qkv.bias is not None:
        bias = bias + dense.qkv.bias
    dense_weight = qkv.view(3, dense_heads, dense_channels, width)
    dense_bias = bias.view(3, dense_heads, dense_channels)
    root = power(layer.heads, 0.5)
    written_HDC = written.view(-1, dense_heads, dense_channels).transpose(0, 1).double()
    _, sizes_HC, right_HCC = torch.linalg.svd(written_HDC @ root, full_matrices=False)
    parts = []
    for head in range(dense_heads):
        for start in range(0, dense_channels, channels):
            energy = float(sizes_HC[head, start : start + channels].square().sum())
            parts.append((energy, head, start))
    parts.sort(key=lambda part: -part[0])
    taken = sorted(parts[:heads], key=lambda part: (part[2], part[1]))
    weight = attn.qkv.weight.clone().view(3, heads, channels, width)
    new_bias = torch.zeros(3, heads, channels, device=weight.device)
    columns = torch.zeros(width, heads, channels, device=weight.device)  # of the last product
    weight[0] = 0  # a query that is not there: its scores start at 0, and its keys can still learn
    shrunk = min(channels, dense_channels)
    for number, (_, head, start) in enumerate(taken):
        if channels == dense_channels:  # whole heads, as rotations need them
            weight[:, number] = dense_weight[:, head]
            new_bias[:, number] = dense_bias[:, head]
            columns[:, number] = written_HDC[head].float()
            continue
        left, sizes, right = torch.linalg.svd(power(layer.queries[head], 0.5) @ power(layer.keys[head], 0.5))
        scale = sizes[:shrunk].sqrt()
        query = (power(layer.queries[head], -0.5) @ left[:, :shrunk] * scale).T * (channels / dense_channels) ** 0.5
        key = (power(layer.keys[head], -0.5) @ right[:shrunk].T * scale).T
        kept = right_HCC[head, start : start + channels]
        value = kept @ power(layer.heads[head], -0.5)
        columns[:, number, : len(kept)] = (written_HDC[head] @ root[head] @ kept.T).float()
        for kind, cut in enumerate((query, key, value)):
            cut = cut.float()
            weight[kind, number, : len(cut)] = cut @ dense_weight[kind, head]
            new_bias[kind, number, : len(cut)] = cut @ dense_bias[kind, head]
    set_layer(attn.qkv, weight.view(-1, width), new_bias.flatten())
    return columns.flatten(1)


def _start_mlp(
    block: nn.Module,
    dense: Sequence[DenseBlock],
    layers: Sequence[_Layer],
    pairs: Sequence[_Pair],
    weights: Sequence[Tensor | None],
    projection: Tensor,
    clusters: bool,
    seed: int,
) -> None:
    """Hidden units of all the layers a block stands for; the last product fitted to the stream. z moves on."""
    block.ls2 = _ones(block.ls2)
    units = _hidden_units(block.norm2, dense, layers, [pair.z for pair in pairs], projection)
    inputs = [block.norm2(pair.z) for pair in pairs]
    missing = [F.linear(pair.h, projection) - pair.z for pair in pairs]
    if clusters and isinstance(block.mlp, MoE):
        _start_clustered(block.mlp, units, inputs, missing, weights, seed)
        mlp: Callable[[Tensor], Tensor] = block.mlp
    else:
        mlp = _start_copies(block.mlp, units, inputs, missing, weights)
    for pair, x in zip(pairs, inputs):
        pair.z = pair.z + mlp(x)


@dataclass(frozen=True)
class _Units:
    """Hidden units of dense MLPs, fed what a block of the student reads.

    Attributes:
        layers: by the names of LAYERS[activation] but the last, (U, D_s) each.
        written: the columns that the units write with into the student's stream, (D_s, U).
        variance: of each unit, (U,).
    """

    activation: str
    layers: dict[str, Affine]
    written: Tensor
    variance: Tensor

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Of inputs (..., D_s), what the chosen units give, (..., len(chosen))."""
        outputs = [F.linear(x, layer.weight[chosen], layer.bias[chosen]) for layer in self.layers.values()]
        return activate(self.activation, outputs)

    def best(self, variance: Tensor, count: int) -> Tensor:
        """The numbers of the units whose variance x written is largest, in order; all where there are not as many."""
        return (variance * self.written.square().sum(0)).argsort(descending=True)[:count].sort().values

    def prior(self, chosen: Tensor, count: int) -> Tensor:
        """The last product as the dense layers have it for these units, (D_s, count); 0 for those beyond them."""
        return F.pad(self.written[:, chosen], (0, count - len(chosen)))


def _hidden_units(
    norm: nn.LayerNorm,
    dense: Sequence[DenseBlock],
    layers: Sequence[_Layer],
    states: Sequence[Tensor],
    projection: Tensor,
) -> _Units:
    """The hidden units of these dense layers, as many as they have together; starts the norm before them."""
    activation = dense[0].activation
    *names, last = LAYERS[activation]
    parts: dict[str, list[Affine]] = {name: [] for name in names}
    written = []
    for number, (each, layer) in enumerate(zip(dense, layers)):
        if number == 0:
            read = _start_norm(norm, states, layer.normed2)
        else:
            read = _fitted([norm(z) for z in states], layer.normed2)
        for name in names:
            parts[name].append(_behind(each.mlp[name], read))
        written.append(projection @ _scaled(each.mlp[last], each.scale2).weight)
    stacked = {}
    for name, affines in parts.items():
        weights = torch.cat([affine.weight for affine in affines])
        stacked[name] = Affine(weights, torch.cat([affine.bias for affine in affines]))
    variance = torch.cat([layer.variance for layer in layers]).float()
    return _Units(activation, stacked, torch.cat(written, 1), variance)


def _start_copies(
    mlp: nn.Module,
    units: _Units,
    inputs: Sequence[Tensor],
    missing: Sequence[Tensor],
    weights: Sequence[Tensor | None],
) -> Callable[[Tensor], Tensor]:
    """A dense MLP, or experts that are copies of one; what they compute, once, whatever the routing."""
    experts = list(mlp.experts) if isinstance(mlp, MoE) else [dict(mlp.named_children())]
    *names, last = LAYERS[units.activation]
    one = experts[0]
    chosen = units.best(units.variance, one[last].in_features)
    _set_units(one, units, chosen)
    fit = LeastSquares()
    for x, wanted, weight in zip(inputs, missing, weights):
        fit.add(hidden(one, units.activation, x), wanted, weight)
    set_layer(one[last], *fit.solve(units.prior(chosen, one[last].in_features), NEAR))
    for expert in experts[1:]:
        for name in (*names, last):
            set_layer(expert[name], one[name].weight, one[name].bias)
    return lambda x: one[last](hidden(one, units.activation, x))


def _start_clustered(
    mlp: MoE,
    units: _Units,
    inputs: Sequence[Tensor],
    missing: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    seed: int,
) -> None:
    """Experts for parts of the tokens: a router by clusters of what it reads, and for each expert the units with the
    largest share in what its tokens get, and a last layer fitted on these tokens with their gates as weights."""
    x_ND = torch.cat([x.flatten(0, 1) for x in inputs])
    wanted_ND = torch.cat([wanted.flatten(0, 1) for wanted in missing])
    weight_N = x_ND.new_ones(len(x_ND))
    if weights[0] is not None:
        weight_N = torch.cat([weight.flatten() for weight in weights])
    centroid_ED, _ = spherical_kmeans(x_ND, len(mlp.experts), seed=seed)
    start_router(mlp, centroid_ED, x_ND)
    gates_NE = torch.cat([gates(mlp, x) for x in inputs])
    *_names, last = LAYERS[units.activation]
    for number, expert in enumerate(mlp.experts):
        rows = gates_NE[:, number] > 0
        if int(rows.sum()) < 2:  # nobody to learn from: the units that are best for all
            rows = torch.ones_like(rows)
        chunks = x_ND[rows].split(CHUNK)
        chosen = units.best(_variance(units, chunks), expert[last].in_features)
        _set_units(expert, units, chosen)
        fit = LeastSquares()
        weighted_N = weight_N[rows] * gates_NE[rows, number].clamp_min(1e-6)
        for x, wanted, weight in zip(chunks, wanted_ND[rows].split(CHUNK), weighted_N.split(CHUNK)):
            fit.add(hidden(expert, units.activation, x), wanted, weight)
        set_layer(expert[last], *fit.solve(units.prior(chosen, expert[last].in_features), NEAR))


def _variance(units: _Units, chunks: Sequence[Tensor]) -> Tensor:
    """Of every unit over the inputs (n, D_s) of all chunks, (U,)."""
    everything = torch.arange(len(units.variance), device=units.variance.device)
    count = 0
    total = squares = 0
    for x in chunks:
        hidden_NU = units(x, everything)
        count += len(hidden_NU)
        total = total + hidden_NU.sum(0).double()
        squares = squares + hidden_NU.square().sum(0).double()
    return (squares / count - (total / count).square()).float()


def _start_end(
    student: VMoE,
    dense: Teacher,
    pairs: Sequence[_Pair],
    weights: Sequence[Tensor | None],
    projection: Tensor,
    *,
    with_head: bool,
) -> None:
    """The final norm, and what reads it: the head, or without classes the feature head."""
    model = dense.model
    norm = final_norm(model)
    student.norm.to(projection.device)
    wanted = [norm(pair.h) for pair in pairs]
    _refuse_constant(dense, wanted)
    read = _start_norm(student.norm, [pair.z for pair in pairs], wanted, weights)
    student.norm.cpu()
    if isinstance(student.feature_head, nn.Linear):
        set_layer(student.feature_head, read.weight, read.bias)
    elif student.num_classes and with_head:
        head = _behind(Affine(model.head.weight, model.head.bias), read)
        set_layer(student.head, head.weight, head.bias)


def _refuse_constant(dense: Teacher, features: Sequence[Tensor]) -> None:
    """Refuse a model whose features (B, T, D_t) say nothing of the image."""
    images = sum(len(batch) for batch in features)
    first = features[0][:1]
    differing = max(float((batch - first).abs().max()) for batch in features)
    largest = max(float(batch.abs().max()) for batch in features)
    if images > 1 and differing <= SAME_FEATURES * largest:
        raise ValueError(
            f"the features of {dense.source} are the same for all of {images} calibration images: no student can be "
            "fitted to them; name another model in student.init, or leave it empty"
        )


def _start_norm(
    norm: nn.LayerNorm,
    states: Sequence[Tensor],
    normed: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
) -> Affine:
    """Start a norm of the student, and say how the dense model's normed states follow from it: A norm(z) + c."""
    norm.weight.fill_(1)
    norm.bias.zero_()
    return _fitted([norm(z) for z in states], normed, weights)


def _fitted(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None
) -> Affine:
    fit = LeastSquares()
    for x, y, weight in zip(inputs, outputs, weights or [None] * len(inputs)):
        fit.add(x, y, weight)
    return Affine(*fit.solve())


def _behind(layer: Affine, read: Affine) -> Affine:
    """layer(read(x)) as one."""
    bias = layer.weight @ read.bias
    return Affine(layer.weight @ read.weight, bias if layer.bias is None else bias + layer.bias)


def _scaled(layer: Affine, gamma: Tensor | None) -> Affine:
    """A layer with the LayerScale behind it."""
    if gamma is None:
        return layer
    return Affine(layer.weight * gamma[:, None], None if layer.bias is None else layer.bias * gamma)


def _ones(scale: nn.Module) -> nn.Module:
    """A LayerScale of the student at 1: what the dense one has is in the weights."""
    if isinstance(scale, LayerScale):
        scale.gamma.fill_(1)
    return scale


def _set_units(expert: Mapping[str, nn.Linear] | nn.ModuleDict, units: _Units, chosen: Tensor) -> None:
    """The first layers of an MLP from these units; a unit beyond them keeps its initial weights."""
    for name, layer in units.layers.items():
        weight = expert[name].weight.clone()
        bias = expert[name].bias.clone()
        weight[: len(chosen)] = layer.weight[chosen]
        bias[: len(chosen)] = layer.bias[chosen]
        set_layer(expert[name], weight, bias)


def _error(pairs: Sequence[_Pair], projection: Tensor) -> float:
    """|z - P h|^2 / |P h|^2."""
    missing = squares = 0.0
    for pair in pairs:
        wanted = F.linear(pair.h, projection)
        missing += float((pair.z - wanted).square().sum())
        squares += float(wanted.square().sum())
    return missing / squares


def _mean_state(pairs: Sequence[_Pair]) -> Tensor:
    tokens = sum(pair.h[..., 0].numel() for pair in pairs)
    return sum(pair.h.sum((0, 1)) for pair in pairs) / tokens


def _zero_sum_columns(width: int, count: int) -> Tensor:
    """R (width, count) float64: orthonormal columns, orthogonal to the ones vector (Helmert's)."""
    columns = torch.zeros(width, count, dtype=torch.float64)
    for number in range(1, count + 1):
        columns[:number, number - 1] = 1
        columns[number, number - 1] = -number
    return columns / columns.norm(dim=0)
