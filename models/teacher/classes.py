"""A teacher whose head has the classes of the data, in the data's order; or a new one; or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..labels import Match
from .load import Teacher

HEADS = ("head", "head_dist")  # a distilled DeiT has two


def with_classes(teacher: Teacher, labels: Sequence[str], match: Match) -> Teacher:
    """The same teacher, changed in place so that row i of its head is class i of the data.

    What the checkpoint has otherwise is kept in `as_saved`, so that its fingerprint stays that of its weights.

    Args:
        labels: class names of the data.
        match: from models.labels.match_classes.
    """
    model = teacher.model
    if match.rows != tuple(range(teacher.num_classes)):
        for name in HEADS:
            head = getattr(model, name, None)
            if isinstance(head, nn.Linear):
                teacher.as_saved |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
                setattr(model, name, _rows_of(head, match.rows))
        model.num_classes = len(match.rows)
    teacher.num_classes = len(match.rows)
    teacher.labels = list(labels)
    teacher.classes_note = match.note
    return teacher


def without_head(dense: Teacher) -> Teacher:
    """The same dense model, changed in place so that it gives features only: its classes are not those of the data."""
    model = dense.model
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            dense.as_saved |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
            setattr(model, name, nn.Identity())
    model.num_classes = 0
    dense.num_classes = 0
    dense.labels = None
    return dense


@torch.no_grad()
def feature_width(dense: Teacher) -> int:
    """Numbers that a classifier of its images reads: F of forward_head(tokens, pre_logits=True) (B, F)."""
    model = dense.model
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    parameter = next(model.parameters())
    # a view of one number, (1, T, D)
    blank_BTD = parameter.new_zeros(1).expand(1, tokens, model.embed_dim)
    return model.forward_head(blank_BTD, pre_logits=True).shape[1]


@torch.no_grad()
def with_probe(dense: Teacher, weight: Tensor, bias: Tensor, labels: Sequence[str]) -> Teacher:
    """The same dense model, changed in place so that a linear classifier of the data's classes is its head.

    A distilled DeiT, which averages two heads, has it twice. Unlike the order of a head's rows it is not what the
    checkpoint is, so the fingerprint of the model is another one with every probe.

    Args:
        weight, bias: (C, F) and (C,), on the features that forward_head(tokens, pre_logits=True) gives.
        labels: names of the C classes.
    """
    model = dense.model
    like = next(model.parameters())
    for name in HEADS:
        if hasattr(model, name):
            head = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), dtype=like.dtype, device=like.device)
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            setattr(model, name, head.train(model.training).requires_grad_(like.requires_grad))
    model.num_classes = len(weight)
    dense.num_classes = len(weight)
    dense.labels = list(labels)
    dense.as_saved = {}
    dense.classes_note = f"its head is a probe of the data's {len(weight)} classes"
    return dense


@torch.no_grad()
def put_in_order(head: nn.Linear, rows: Sequence[int]) -> None:
    """Put the rows of a head into another order, in place."""
    order = torch.tensor(rows, device=head.weight.device)
    head.weight.copy_(head.weight[order])
    if head.bias is not None:
        head.bias.copy_(head.bias[order])


@torch.no_grad()
def _rows_of(head: nn.Linear, rows: Sequence[int]) -> nn.Linear:
    """A head of these rows of another, frozen like it."""
    device = head.weight.device  # not the default one: a caller may build on the meta device
    order = torch.tensor(rows, device=device)
    has_bias = head.bias is not None
    # without initial values: those would take draws from torch's generator
    new = nn.utils.skip_init(
        nn.Linear, head.in_features, len(rows), bias=has_bias, dtype=head.weight.dtype, device=device
    )
    new.weight.copy_(head.weight[order])
    if has_bias:
        new.bias.copy_(head.bias[order])
    return new.train(head.training).requires_grad_(head.weight.requires_grad)
