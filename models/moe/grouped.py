"""The experts' MLPs on rows sorted by expert, in the form that is fastest on the device at hand.

    y_n = sum over the kept choices k of token n of weight_nk x expert_nk(x_n)

One seam, run_experts, and three forms that compute the same:
- a loop over the experts with a backward of its own (CPU): no padding, no stacked weights, and no tensor of all rows at
  hidden width. On a CPU the pages of a new tensor above 32 MiB can cost more than what is computed in them.
- grouped matrix products (CUDA, bfloat16).
- a batched product over blocks of rows that share an expert (other devices and types, and while a graph is traced).
The last two have shapes that depend on shapes alone, so nothing waits for the device.
N tokens, K choices of a token, R rows, E experts, D width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dispatch import Dispatch
from .dropout import ExpertDropout
from .expert import GELU, LAYERS, SWIGLU, activate

LOOP, GROUPED, BLOCKS = "loop", "grouped", "blocks"
CHUNK_BYTES = 2**24  # of hidden rows in the loop: well below the 32 MiB from which malloc maps every tensor anew
FEWEST_ROWS, MOST_ROWS = 4, 32  # multiples of rows in the loop, in bfloat16
ALIGNED = 16  # bytes
GROUPED_ROWS = 8  # where a grouped product adds up over rows, each group wants 16 bytes: 8 numbers of bfloat16


def form_of(x: Tensor) -> str:
    """The form run_experts takes for rows like `x`."""
    if torch.compiler.is_compiling():
        return BLOCKS
    if x.device.type == "cpu":
        return LOOP
    return GROUPED if working_type(x) == torch.bfloat16 else BLOCKS


def row_multiple(x: Tensor, form: str, choices: int, num_experts: int) -> int:
    """What `form` wants the rows of each expert to be filled up to a multiple of.

    Args:
        x: what the experts will be given.
        choices: rows there will be at most before any is filled up.
    """
    if form == LOOP:
        if working_type(x) != torch.bfloat16:
            return 1
        # oneDNN prepares a product in bfloat16 anew for every new shape, which can take as long as one of 300 rows of
        # width 192. With 1/32 to 1/16 of an expert's share few shapes occur, and about every 40th row fills up
        multiple = FEWEST_ROWS
        while multiple < MOST_ROWS and multiple * 32 * num_experts <= choices:
            multiple *= 2
        return multiple
    if form == GROUPED:
        return GROUPED_ROWS
    # 1/8 to 1/4 of an expert's share: about every tenth row fills up, and all weights are read 4 to 8 times
    multiple = 8
    while multiple * 8 * num_experts <= choices:
        multiple *= 2
    return multiple


def working_type(x: Tensor) -> torch.dtype:
    """The type that products are made in: that of torch.autocast where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Everything in its own type; torch.autocast itself refuses devices it does not know, such as "meta"."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def run_experts(
    experts: Sequence[nn.ModuleDict],
    x_ND: Tensor,
    rows: Dispatch,
    act: str,
    weight_NK: Tensor | None = None,
    dropout: ExpertDropout | None = None,
    form: str | None = None,
) -> Tensor:
    """Every expert's MLP on its own rows, added up over the kept choices of each token; (N, D) in and out.

    Args:
        experts: E of them, with the layers LAYERS[act].
        rows: which token stands where, filled up as row_multiple says.
        weight_NK: what every choice counts; None: 1.
        form: LOOP, GROUPED or BLOCKS; None: that of form_of.
    """
    layers = [[expert[name] for expert in experts] for name in LAYERS[act]]
    dtype = working_type(x_ND)
    weights = [[linear.weight.to(dtype) for linear in linears] for linears in layers]
    biases = [[linear.bias.to(dtype) for linear in linears] for linears in layers]
    x_ND = x_ND.to(dtype)
    form = form or form_of(x_ND)
    with without_autocast(x_ND.device.type):
        if form == LOOP:
            if weight_NK is None:
                weight_NK = torch.ones_like(rows.row_NK, dtype=dtype)
            parameters = [parameter for group in (*weights, *biases) for parameter in group]
            return _Loop.apply(
                x_ND, rows.of_rows(weight_NK), rows.token_R, rows.end_E.tolist(), act, dropout, *parameters
            )
        products = _GroupedProducts(rows) if form == GROUPED else _BlockProducts(rows)
        return _layer_by_layer(products, x_ND, rows, act, weights, biases, weight_NK, dropout)


def _layer_by_layer(
    products: _GroupedProducts | _BlockProducts,
    x_ND: Tensor,
    rows: Dispatch,
    act: str,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    weight_NK: Tensor | None,
    dropout: ExpertDropout | None,
) -> Tensor:
    """All rows through each layer of the experts in turn."""
    x_RD = x_ND.index_select(0, rows.token_R)
    outputs = [products(x_RD, weight_E, bias_E) for weight_E, bias_E in zip(weights[:-1], biases[:-1])]
    h_RH = activate(act, outputs)
    if dropout is not None:
        h_RH = dropout(h_RH, site=0)
    y_RD = products(h_RH, weights[-1], biases[-1])
    if dropout is not None:
        y_RD = dropout(y_RD, site=1)
    # a dropped choice reads a row of zeros
    y_NKD = F.pad(y_RD, (0, 0, 0, 1)).index_select(0, rows.row_NK.flatten()).view(*rows.row_NK.shape, -1)
    if weight_NK is not None:
        y_NKD = y_NKD * weight_NK.unsqueeze(-1)  # float32 where the weights are, and so is the sum
    return y_NKD.sum(1).to(x_ND.dtype)


class _GroupedProducts:
    """x W_e^T + b_e for the rows of every expert e, as one grouped product; (R, in) -> (R, out)."""

    def __init__(self, rows: Dispatch) -> None:
        self.end_E = rows.end_E.int()
        experts = torch.arange(len(self.end_E), device=self.end_E.device)
        self.is_expert_RE = rows.expert_R.unsqueeze(1) == experts

    def __call__(self, x_R: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        weight_E = torch.stack(list(weights)).transpose(1, 2)
        y_R = F.grouped_mm(x_R, weight_E, offs=self.end_E)
        # the biases as a product, too: in backward it adds up their gradients over rows without atomics
        return torch.addmm(y_R, self.is_expert_RE.to(y_R.dtype), torch.stack(list(biases)))


class _BlockProducts:
    """The same as a batched product over blocks of rows, each with the weights of its expert."""

    def __init__(self, rows: Dispatch) -> None:
        self.rows = rows.multiple
        self.expert_B = rows.expert_B

    def __call__(self, x_R: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        weight_B = torch.stack(list(weights)).index_select(0, self.expert_B)
        bias_B = torch.stack(list(biases)).index_select(0, self.expert_B)
        x_B = x_R.view(len(self.expert_B), self.rows, x_R.shape[1])
        return torch.baddbmm(bias_B.unsqueeze(1), x_B, weight_B.transpose(1, 2)).flatten(0, 1)


class _Loop(torch.autograd.Function):
    """Piece by piece of the rows: gather, MLP, weigh, add to the tokens' outputs.

    Inside a piece every expert multiplies its own rows; all else is done to the whole piece. Kept for the backward pass
    are the inputs of each nonlinear step. A piece has at most CHUNK_BYTES of hidden rows, so nothing of all rows at
    hidden width is ever allocated at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_R: Tensor,
        token_R: Tensor,
        ends: Sequence[int],
        act: str,
        dropout: ExpertDropout | None,
        *parameters: Tensor,
    ) -> Tensor:
        weights, biases = _by_layer(parameters, act)
        passes_on = any(ctx.needs_input_grad)
        needs_weight = ctx.needs_input_grad[1]
        needs_parameters = any(ctx.needs_input_grad[-len(parameters) :])
        # sums over the choices of a token in the weights' type, float32, or better
        y_ND = x_ND.new_zeros(x_ND.shape, dtype=torch.promote_types(x_ND.dtype, weight_R.dtype))
        kept = []
        for piece in _pieces(ends, weights[0][0]):
            token_C = token_R[piece.start : piece.stop]
            x_CD = x_ND.index_select(0, token_C)
            before_CH = [piece.linear(x_CD, weight_E, bias_E) for weight_E, bias_E in zip(weights[:-1], biases[:-1])]
            h_CH = activate(act, before_CH)
            if dropout is not None:
                dropout.drop_(h_CH, piece.start, piece.stop, site=0)
            y_CD = piece.linear(h_CH, weights[-1], biases[-1])
            if dropout is not None:
                dropout.drop_(y_CD, piece.start, piece.stop, site=1)
            weighted_CD = y_CD * weight_R[piece.start : piece.stop].unsqueeze(1)
            y_ND.index_add_(0, token_C, weighted_CD)
            if passes_on:
                kept += before_CH
            if needs_parameters:
                kept.append(h_CH)
            if needs_weight:
                kept.append(y_CD)
        ctx.save_for_backward(x_ND, weight_R, token_R, *parameters, *kept)
        ctx.ends = ends
        ctx.act = act
        ctx.dropout = dropout
        return y_ND.to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        act, dropout = ctx.act, ctx.dropout
        num_parameters = 2 * len(LAYERS[act]) * len(ctx.ends)
        x_ND, weight_R, token_R, *rest = ctx.saved_tensors
        weights, biases = _by_layer(rest[:num_parameters], act)
        # Unless the graph is retained, a piece's rows are freed once they are popped, and the gradients of the weights
        # take their pages: 175 MB at 6,304 tokens of width 768. Undocumented; torch's own compiled backward calls it
        kept = rest[: num_parameters - 1 : -1]
        del rest
        ctx.maybe_clear_saved_tensors()
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        needs_parameters = any(ctx.needs_input_grad[-num_parameters:])
        sum_type = torch.promote_types(x_ND.dtype, weight_R.dtype)
        grad_x_ND = torch.zeros_like(x_ND, dtype=sum_type) if needs_x else None
        grad_weight_R = torch.empty_like(weight_R) if needs_weight else None
        gradients = _Gradients(weights, biases) if needs_parameters else None
        first = range(len(weights) - 1)
        for piece in _pieces(ctx.ends, weights[0][0]):
            # kept is reversed: these come in the order of forward
            before_CH = [kept.pop() for _ in first]
            h_CH = kept.pop() if needs_parameters else None
            y_CD = kept.pop() if needs_weight else None
            token_C = token_R[piece.start : piece.stop]
            grad_CD = grad_ND.index_select(0, token_C)
            if needs_weight:
                # d/d weight_r = y_r . g_n
                grad_weight_C = grad_weight_R[piece.start : piece.stop]
                torch.sum(grad_CD * y_CD, 1, dtype=weight_R.dtype, out=grad_weight_C)
            # d/d y_r = weight_r g_n
            grad_CD *= weight_R[piece.start : piece.stop].unsqueeze(1)
            if dropout is not None:
                dropout.drop_(grad_CD, piece.start, piece.stop, site=1)
            grad_CH = piece.product(grad_CD, weights[-1])
            if dropout is not None:
                dropout.drop_(grad_CH, piece.start, piece.stop, site=0)
            grads_before_CH = _activate_backward(act, grad_CH, before_CH)
            if gradients is not None:
                x_CD = x_ND.index_select(0, token_C)
                gradients.add(len(first), piece, grad_CD, h_CH)
                for i in first:
                    gradients.add(i, piece, grads_before_CH[i], x_CD)
            if needs_x:
                for i in first:
                    grad_x_CD = piece.product(grads_before_CH[i], weights[i])
                    grad_x_ND.index_add_(0, token_C, grad_x_CD.to(sum_type))
        if needs_x:
            grad_x_ND = grad_x_ND.to(x_ND.dtype)
        of_parameters = [None] * num_parameters if gradients is None else gradients.all()
        return grad_x_ND, grad_weight_R, None, None, None, None, *of_parameters


class _Piece:
    """Consecutive rows, of one expert or of several.

    Attributes:
        start, stop: first row, and one past the last.
        experts: whose rows they are.
        sizes: how many each of those has here.
    """

    def __init__(self, start: int) -> None:
        self.start = self.stop = start
        self.experts: list[int] = []
        self.sizes: list[int] = []

    def append(self, expert: int, rows: int) -> None:
        """The next rows are this expert's."""
        self.experts.append(expert)
        self.sizes.append(rows)
        self.stop += rows

    def linear(self, x_C: Tensor, weight_E: Sequence[Tensor], bias_E: Sequence[Tensor]) -> Tensor:
        """x W_e^T + b_e for the rows of every expert e, (C, out)."""
        y_C = x_C.new_empty(len(x_C), len(weight_E[0]))
        for e, x, y in zip(self.experts, x_C.split(self.sizes), y_C.split(self.sizes)):
            weight = weight_E[e]
            if len(x) == 1 and weight.data_ptr() % ALIGNED:
                # the last digits of a product with one row depend on where the weight lies, mapped from a file or not
                weight = weight.clone()
            torch.addmm(bias_E[e], x, weight.t(), out=y)
        return y_C

    def product(self, grad_C: Tensor, weight_E: Sequence[Tensor]) -> Tensor:
        """g W_e for the rows of every expert e, (C, in): the gradient of what linear was given."""
        y_C = grad_C.new_empty(len(grad_C), weight_E[0].shape[1])
        for e, grad, y in zip(self.experts, grad_C.split(self.sizes), y_C.split(self.sizes)):
            torch.mm(grad, weight_E[e], out=y)
        return y_C


class _Gradients:
    """Gradients of every expert's weights and biases; an expert without rows has zeros."""

    def __init__(self, weights: Sequence[Sequence[Tensor]], biases: Sequence[Sequence[Tensor]]) -> None:
        self.parameters = (weights, biases)
        self.weights: list[list[Tensor | None]] = [[None] * len(layer) for layer in weights]
        self.biases: list[list[Tensor | None]] = [[None] * len(layer) for layer in biases]

    def add(self, layer: int, piece: _Piece, grad_C: Tensor, input_C: Tensor) -> None:
        """y = x W^T + b: dW_e = grad^T x, db_e = sum of grad, over the rows of expert e."""
        weights, biases = self.weights[layer], self.biases[layer]
        for e, grad, x in zip(piece.experts, grad_C.split(piece.sizes), input_C.split(piece.sizes)):
            if weights[e] is None:
                weights[e] = grad.t() @ x
                biases[e] = grad.sum(0)
            else:
                weights[e].addmm_(grad.t(), x)
                biases[e].add_(grad.sum(0))

    def all(self) -> list[Tensor]:
        """In the order of the parameters."""
        gradients = []
        for parameters, layers in zip(self.parameters, (self.weights, self.biases)):
            for of_layer, layer in zip(parameters, layers):
                for parameter, gradient in zip(of_layer, layer):
                    gradients.append(torch.zeros_like(parameter) if gradient is None else gradient)
        return gradients


def _by_layer(parameters: Sequence[Tensor], act: str) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
    """Weights and biases of all experts, layer by layer, of one flat sequence."""
    num_layers = len(LAYERS[act])
    E = len(parameters) // (2 * num_layers)
    groups = [parameters[i : i + E] for i in range(0, len(parameters), E)]
    return groups[:num_layers], groups[num_layers:]


def _pieces(ends: Sequence[int], weight_HD: Tensor) -> list[_Piece]:
    """All rows, in pieces whose hidden rows fill no more than CHUNK_BYTES."""
    row_bytes = len(weight_HD) * weight_HD.element_size()
    most = max(CHUNK_BYTES // row_bytes // MOST_ROWS, 1) * MOST_ROWS
    pieces = [_Piece(0)]
    start = 0
    for e, end in enumerate(ends):
        while start < end:
            room = most - (pieces[-1].stop - pieces[-1].start)
            # an expert is cut only where it fills more than a piece
            if room < min(end - start, most):
                pieces.append(_Piece(start))
                room = most
            rows = min(end - start, room)
            pieces[-1].append(e, rows)
            start += rows
    return [piece for piece in pieces if piece.sizes]


def _activate_backward(act: str, grad_CH: Tensor, before_CH: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of what was given to expert.activate; `grad_CH` may be written over."""
    if act == SWIGLU:
        gate, value = before_CH
        return [torch.ops.aten.silu_backward(grad_CH * value, gate), grad_CH * F.silu(gate)]
    (h_CH,) = before_CH
    torch.ops.aten.gelu_backward.grad_input(grad_CH, h_CH, approximate=GELU[act], grad_input=grad_CH)
    return [grad_CH]
