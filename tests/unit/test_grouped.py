"""The forms of the experts' computation: equal to each other and to plain layers, and none waits for a device."""

import copy
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.moe import grouped
from models.moe.dispatch import by_expert, dispatch, most_rows
from models.moe.dropout import ExpertDropout
from models.moe.expert import LAYERS, activate, new_expert
from models.moe.grouped import BLOCKS, GROUPED, LOOP, form_of, row_multiple, run_experts
from models.moe.routing import RouterConfig, Routing, capacity, route
from tests.close import assert_close_by_size

E, K, D, H = 4, 2, 16, 24


def routing_of(slots: int | None, groups: int = 3, tokens: int = 14) -> Routing:
    """Expert 3 is hardly ever asked, expert 0 often."""
    logits = torch.randn(groups, tokens, E, generator=torch.Generator().manual_seed(0))
    logits += torch.tensor([2.0, 0.0, 0.0, -9.0])
    return route(logits, RouterConfig(E, K), slots)


def experts_of(act: str) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(new_expert(D, H, act) for _ in range(E))


def plainly(experts, x_ND, routing, act, multiply=None):
    """Choice by choice, through the layers as they are."""
    y_ND = torch.zeros_like(x_ND)
    expert_NK, slot_NK = routing.expert_GSK.flatten(0, 1), routing.slot_GSK.flatten(0, 1)
    weight_NK = routing.weight_GSK.flatten(0, 1)
    for n, k in itertools.product(range(len(x_ND)), range(K)):
        if slot_NK[n, k] >= 0:
            *first, last = (experts[expert_NK[n, k]][name] for name in LAYERS[act])
            y_ND[n] = y_ND[n] + weight_NK[n, k] * last(activate(act, [layer(x_ND[n]) for layer in first]))
    return y_ND


def results(form, experts, routing, slots, act, dtype=torch.float32, dropout=0.0):
    """Output and gradients: of the tokens, the combine weights and all parameters."""
    experts = copy.deepcopy(experts).to(dtype)
    tokens = routing.expert_GSK.shape[0] * routing.expert_GSK.shape[1]
    x_ND = torch.randn(tokens, D, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    weight_NK = routing.weight_GSK.flatten(0, 1).detach().requires_grad_()
    if form == "plain":
        y_ND = plainly(experts, x_ND, Routing(**{**vars(routing), "weight_GSK": weight_NK.unsqueeze(0)}), act)
    else:
        multiple = row_multiple(x_ND, form, tokens * K, E)
        rows = dispatch(routing, slots, multiple, None if form == LOOP else most_rows(routing, slots, multiple))
        masks = ExpertDropout(dropout, torch.tensor([5]), rows.expert_R, rows.place_R) if dropout else None
        y_ND = run_experts(experts, x_ND, rows, act, weight_NK, masks, form)
    y_ND.backward(torch.randn(tokens, D, generator=torch.Generator().manual_seed(3)).to(dtype))
    gradients = [parameter.grad for parameter in experts.parameters()]
    return {"output": y_ND, "tokens": x_ND.grad, "weights": weight_NK.grad, **dict(enumerate(gradients))}


@pytest.mark.parametrize("slots", [None, 4, 1])
@pytest.mark.parametrize("act", LAYERS)
@pytest.mark.parametrize("form", [LOOP, GROUPED, BLOCKS])
def test_every_form_computes_what_plain_layers_do(form, act, slots):
    experts, routing = experts_of(act), routing_of(slots)
    wanted = results("plain", experts, routing, slots, act)
    # an expert without a token has no gradient of plain layers, and zeros of ours
    for name, value in results(form, experts, routing, slots, act).items():
        assert_close_by_size(value, torch.zeros_like(value) if wanted[name] is None else wanted[name], what=str(name))


@pytest.mark.parametrize("act", LAYERS)
@pytest.mark.parametrize("form", [LOOP, GROUPED, BLOCKS])
def test_a_retained_graph_is_there_a_second_time(form, act):
    """Saliency of one class after another; the loop frees what it kept as it goes back, but not then."""
    experts, routing = experts_of(act), routing_of(4)
    x_ND = torch.randn(42, D, requires_grad=True)
    multiple = row_multiple(x_ND, form, 42 * K, E)
    rows = dispatch(routing, 4, multiple, None if form == LOOP else most_rows(routing, 4, multiple))
    y_ND = run_experts(experts, x_ND, rows, act, form=form)
    parameters = [x_ND, *experts.parameters()]
    first = torch.autograd.grad(y_ND.sum(), parameters, retain_graph=True)
    again = torch.autograd.grad(y_ND.sum(), parameters)
    assert_close(again, first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y_ND.sum(), parameters)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_the_loop_frees_what_it_kept_as_it_goes_back(retain_graph, monkeypatch):
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 1)  # 32 rows a piece
    kept, alive = [], []

    def keep(tensor):
        kept.append(weakref.ref(tensor))
        return tensor

    def count(*arguments):
        alive.append(sum(reference() is not None for reference in kept))
        return activate_backward(*arguments)

    activate_backward = grouped._activate_backward
    monkeypatch.setattr(grouped, "_activate_backward", count)
    experts = experts_of("erf")
    rows = by_expert(torch.arange(400) % E, E)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_ND = run_experts(experts, torch.randn(400, D), rows, "erf", form=LOOP)
    y_ND.sum().backward(retain_graph=retain_graph)
    assert len(alive) > 4
    if retain_graph:
        assert len(set(alive)) == 1
    else:
        assert alive == sorted(set(alive), reverse=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_forms_agree_in_bfloat16_and_under_dropout(dropout):
    experts, routing = experts_of("erf"), routing_of(4)
    # one product of H or D numbers rounded to 8 bits; several of them follow each other
    for dtype, relative in ((torch.float32, 1e-6), (torch.bfloat16, 4 * 2**-8)):
        first, *others = (results(form, experts, routing, 4, "erf", dtype, dropout) for form in (LOOP, GROUPED, BLOCKS))
        for other, name in itertools.product(others, first):
            assert_close_by_size(other[name].float(), first[name].float(), relative, what=f"{dtype} {name}")


def test_rows_beyond_a_piece_are_computed_in_several(monkeypatch):
    experts, routing = experts_of("erf"), routing_of(None, groups=20)
    whole = results(LOOP, experts, routing, None, "erf", dropout=0.3)
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 64 * H * 4)  # 64 rows
    pieces = grouped._pieces([450, 470, 500, 500], experts[0]["fc1"].weight)
    assert [(piece.start, piece.experts, piece.sizes) for piece in pieces] == [
        *[(start, [0], [64]) for start in range(0, 448, 64)],
        (448, [0, 1, 2], [2, 20, 30]),
    ]
    for name, value in results(LOOP, experts, routing, None, "erf", dropout=0.3).items():
        assert_close_by_size(value, whole[name], what=str(name))


def test_frozen_experts_pass_the_gradient_on():
    experts, routing = experts_of("swiglu").requires_grad_(False), routing_of(4)
    wanted = results(LOOP, copy.deepcopy(experts).requires_grad_(True), routing, 4, "swiglu")
    found = results(LOOP, experts, routing, 4, "swiglu")
    assert_close(found["tokens"], wanted["tokens"], rtol=0, atol=0)
    assert found[0] is None


def test_rows_by_hand():
    # two groups of three tokens, k = 1, two slots a group: expert 1 keeps tokens 0, 1 | 4, 5, expert 0 keeps 3
    logits = torch.full((2, 3, 2), 0.0)
    logits[0, :, 1] = 1
    logits[1, :, 1] = torch.tensor([-1.0, 1.0, 1.0])
    routing = route(logits, RouterConfig(2, 1), 2)
    assert routing.slot_GSK.flatten().tolist() == [0, 1, -1, 0, 0, 1]
    rows = dispatch(routing, 2)
    assert rows.token_R.tolist() == [3, 0, 1, 4, 5] and rows.end_E.tolist() == [1, 5]
    assert rows.row_NK.flatten().tolist() == [1, 2, 5, 0, 3, 4]  # 5: nowhere
    assert rows.expert_R.tolist() == [0, 1, 1, 1, 1] and rows.place_R.tolist() == [0, 0, 1, 2, 3]
    filled = dispatch(routing, 2, multiple=4)
    assert filled.end_E.tolist() == [4, 8] and filled.expert_B.tolist() == [0, 1]
    assert filled.token_R.tolist() == [3, 5, 5, 5, 0, 1, 4, 5]  # rows that only fill up read the last token
    assert filled.of_rows(routing.weight_GSK.flatten(0, 1)).tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
    most = most_rows(routing, 2, 4)
    assert most == (6 + 2 * 3) // 4 * 4
    assert dispatch(routing, 2, 4, most).end_E.tolist() == [4, 12]
    assert most_rows(routing, 1, 1) == 4  # two groups, two experts, one slot
    alone = by_expert(torch.tensor([1, 0, 1, 2]), 3)
    assert alone.token_R.tolist() == [1, 0, 2, 3] and alone.end_E.tolist() == [1, 3, 4]
    assert alone.row_NK.flatten().tolist() == [1, 0, 2, 3]


def test_which_form_runs_where():
    assert form_of(torch.zeros(1)) == LOOP
    assert form_of(torch.zeros(1, device="meta")) == BLOCKS
    assert form_of(torch.zeros(1, device="meta", dtype=torch.bfloat16)) == GROUPED
    # blocks of 1/8 to 1/4 of an even share
    assert [row_multiple(torch.zeros(1), BLOCKS, choices, 8) for choices in (10, 4096, 12608)] == [8, 128, 256]
    slots = capacity(14, E, K, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        # 1/32 to 1/16 of an even share, 4 to 32
        assert [row_multiple(torch.zeros(1), LOOP, choices, 8) for choices in (10, 1024, 2048, 10**6)] == [4, 8, 16, 32]
        y = run_experts(experts_of("erf"), torch.randn(42, D), dispatch(routing_of(slots), slots, 32), "erf")
    assert y.dtype == torch.bfloat16


def test_one_row_gives_the_same_bits_wherever_its_weights_lie():
    """As those mapped from a file do: 8 bytes beside a multiple of 16."""
    experts = experts_of("erf")
    moved = copy.deepcopy(experts)
    for parameter in moved.parameters():
        buffer = torch.empty(parameter.numel() + 2)
        parameter.data = buffer[2:].view_as(parameter).copy_(parameter.data)
    x_ND = torch.randn(3, D)
    rows = by_expert(torch.tensor([0, 1, 2]), E)
    for plain, other in zip(run_experts(experts, x_ND, rows, "erf"), run_experts(moved, x_ND, rows, "erf")):
        assert torch.equal(plain, other)


def test_experts_that_nobody_asked_for_have_gradients_of_zero():
    experts = experts_of("swiglu")
    x_ND = torch.zeros(0, D, requires_grad=True)
    y_ND = run_experts(experts, x_ND, by_expert(torch.zeros(0, dtype=torch.int64), E), "swiglu", form=LOOP)
    y_ND.sum().backward()
    assert y_ND.shape == x_ND.grad.shape == (0, D)
    assert all(not parameter.grad.any() for parameter in experts.parameters())
