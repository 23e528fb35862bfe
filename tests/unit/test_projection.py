"""A student of other sizes that starts from a dense model: exact where nothing has to be lost, close elsewhere."""

import dataclasses
import logging
import os
import re
import socket
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_rotary_student import TEACHERS
from test_rotary_student import teacher as rotary_teacher
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch.utils.flop_counter import FlopCounterMode
from vit_families import images, tiny

from models.experts import projection
from models.experts.least_squares import RIDGE, LeastSquares, power
from models.experts.projection import Projected, StreamBasis, check_projection, project, projection_flops, stream_basis
from models.experts.upcycle import covered_layers, is_copy, upcycle
from models.modules.positions import embed
from models.modules.tokens import token_layout
from models.moe.layer import MoEConfig
from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from models.vmoe.model import VMoE, VMoEConfig
from trainer.teaching import upcycling

IMAGES = Preprocessing(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
EACH_ITS_OWN = [(0, 1), (1, 2), (2, 3), (3, 4)]
PAIRS = [(0, 2), (2, 4)]
# name -> arguments of tiny
FROM_FAMILIES = {
    "vit": {},
    "deit distilled": {"num_classes": 0},  # a second prefix token
    "deit3": {},  # LayerScale, no position on the class token
    "dinov2 reg4": {},  # no classes
    "gap reg4": {"fc_norm": False},  # mean pooling, no class token, no qkv bias
    "siglip": {"num_classes": 0, "global_pool": ""},
    "eva02": {"use_fc_norm": False, "global_pool": "token"},
    "dinov3": {},
}
KINDS = [("family", name) for name in FROM_FAMILIES] + [("rotary", name) for name in TEACHERS]
every_kind = pytest.mark.parametrize("kind, name", KINDS)


@pytest.fixture(autouse=True)
def same_models_every_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def dense(name="vit", kind="family", depth=4, preprocessing=IMAGES, **arguments) -> Teacher:
    if kind == "rotary":
        return rotary_teacher(name, **arguments)
    model = tiny(name, depth, **{**FROM_FAMILIES.get(name, {}), **arguments}).requires_grad_(False)
    return Teacher(model, preprocessing, f"a {name}", None, model.num_classes)


def student(teacher: Teacher, **changes) -> VMoE:
    """A student of the dense model's sizes and kinds of layers but for the changes."""
    model = teacher.model
    layout = token_layout(model)
    block = model.blocks[0]
    values = {
        "image_size": 32,
        "patch_size": 8,
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "mlp_dim": block.mlp.fc2.in_features,
        "num_classes": teacher.num_classes,
        "moe_blocks": "every-2",
        "moe": MoEConfig(num_experts=4, k=2),
        "class_token": layout.class_token,
        "reg_tokens": layout.reg_tokens,
        "pool": "token" if layout.class_token else "mean",
        "rope": layout.rope,
        "swiglu": hasattr(block.mlp, "fc1_g") or hasattr(block.mlp, "gate_last"),
        "feature_width": 0 if teacher.num_classes else model.embed_dim,
    }
    return VMoE(VMoEConfig(**(values | changes))).eval()


def start(model: VMoE, teacher: Teacher, covered, count=40, split=16, clusters=False) -> Projected:
    left_behind = check_projection(model, teacher, covered, images=count)
    x = images(count, seed=1)
    basis = stream_basis(teacher.model, x.split(split), model.embed_dim)
    with_head = not any(phrase.startswith("its head") for phrase in left_behind)
    batches = partial(x.split, split)
    return project(model, teacher, covered, basis, IMAGES, batches, with_head=with_head, clusters=clusters)


@torch.no_grad()
def error(model: VMoE, teacher: Teacher) -> float:
    """Of what the student gives on images it was not fitted on: squared, relative to how the wanted varies."""
    x = images(20, seed=99)
    wanted = teacher.model(x) if teacher.num_classes else teacher.model.forward_features(x)
    found = model(x) if teacher.num_classes else model.feature_head(model.forward_features(x))
    varies = wanted - wanted.mean(0)
    return float((found - wanted).square().sum() / varies.square().sum())


def zero_sum(width: int, count: int) -> torch.Tensor:
    """(width, count): orthonormal columns, each of sum 0."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(5))
    return torch.linalg.qr(drawn - drawn.mean(0)).Q


@torch.no_grad()
def keep_to(model, directions) -> None:
    """Let everything that writes into the stream write into these directions only."""
    onto = directions @ directions.T
    model.cls_token.copy_(model.cls_token @ onto)
    model.pos_embed.copy_(model.pos_embed @ onto)
    embedding = model.patch_embed.proj
    embedding.weight.copy_(torch.einsum("ed,dchw->echw", onto, embedding.weight))
    embedding.bias.copy_(onto @ embedding.bias)
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.copy_(onto @ layer.weight)
            layer.bias.copy_(onto @ layer.bias)


# what must not be lost


@every_kind
def test_a_teacher_of_the_same_sizes_is_kept(kind, name):
    teacher = dense(name, kind)
    model = student(teacher)
    assert max(start(model, teacher, EACH_ITS_OWN).errors) < 1e-8
    assert error(model, teacher) < 1e-6


@every_kind
def test_a_wider_student_loses_nothing(kind, name):
    """Rotated heads keep their channels, so there are more of them; others get more channels each."""
    teacher = dense(name, kind)
    heads = 6 if token_layout(teacher.model).rotary else 3
    model = student(teacher, width=48, heads=heads)
    assert max(start(model, teacher, EACH_ITS_OWN).errors) < 1e-8
    assert error(model, teacher) < 1e-6


@pytest.mark.parametrize("width, heads", [(16, 2), (12, 3)])
@torch.no_grad()
def test_a_narrower_student_of_states_in_a_subspace_loses_nothing(width, heads):
    """Of whole heads one does nothing; of heads with half the channels the other half does nothing."""
    teacher = dense()
    keep_to(teacher.model, zero_sum(24, width - 1))
    for block in teacher.model.blocks:
        queries, keys, values = block.attn.qkv.weight.view(3, 3, 8, 24)
        if heads == 2:
            block.attn.proj.weight.view(24, 3, 8)[:, 1] = 0
        else:
            block.attn.qkv.bias.zero_()
            for matrix in (queries, keys, values):
                matrix[:, 4:] = matrix[:, :4]
    model = student(teacher, width=width, heads=heads)
    assert max(start(model, teacher, EACH_ITS_OWN).errors) < 1e-6
    assert error(model, teacher) < 1e-5


@torch.no_grad()
def test_images_with_another_mean_and_std():
    theirs = Preprocessing(32, mean=(0.1, 0.6, 0.5), std=(0.5, 0.1, 0.3))
    teacher = dense(preprocessing=theirs)
    model = student(teacher, width=48)
    start(model, teacher, EACH_ITS_OWN)
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def seen(preprocessing):
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        return (pixels - mean) / std

    wanted = teacher.model(seen(theirs))
    torch.testing.assert_close(model(seen(IMAGES)), wanted, atol=2e-3 * wanted.abs().max().item(), rtol=0)


@torch.no_grad()
def test_blocks_with_and_without_experts_and_layer_scale_start_with_one_function():
    teacher = dense()
    x = images(8)
    found = []
    variants = [{"moe_blocks": blocks} for blocks in ("none", "every-2", "all")]
    for changes in (*variants, {"layer_scale": 1e-5}):
        model = student(teacher, width=16, heads=2, **changes)
        start(model, teacher, EACH_ITS_OWN)
        found.append(model(x))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(block.ls1.gamma, torch.ones(16)) for block in model.blocks)
    expert, other = model.blocks[1].mlp.experts[:2]
    assert torch.equal(expert["fc1"].weight, other["fc1"].weight) and torch.equal(
        expert["fc2"].weight, other["fc2"].weight
    )


# what is lost


@pytest.mark.parametrize("name", ["vit", "deit3", "gap reg4"])
def test_fewer_layers_fitted_lose_less_than_layers_left_out(name):
    teacher = dense(name)
    fitted, copied = student(teacher, depth=2), student(teacher, depth=2)
    upcycle(copied, teacher, [0, 2], IMAGES)
    start(fitted, teacher, PAIRS)
    assert error(fitted, teacher) < 0.5 * error(copied, teacher)


@pytest.mark.parametrize("changes", [
    {"width": 16, "heads": 1},  # more channels than the teacher's 8
    {"width": 16, "heads": 4},  # half of them
    {"width": 20, "heads": 4},  # 5, which do not divide 8
    {"width": 15, "heads": 5},  # more heads of fewer channels
    {"width": 24, "heads": 12},
    {"width": 36, "heads": 4},
    {"mlp_dim": 40},
    {"mlp_dim": 500},  # more hidden units than all layers have together
])  # fmt: skip
@torch.no_grad()
def test_other_heads_and_hidden_widths(changes):
    """Blocks that did nothing would leave an error of |P h_first - P h|^2 / |P h|^2."""
    teacher = dense()
    model = student(teacher, depth=2, **changes)
    result = start(model, teacher, PAIRS, count=60)
    x = images(60, seed=1)
    projection = stream_basis(teacher.model, [x], model.embed_dim).projection
    projected = [state @ projection.T for state in states(teacher.model, x)]
    first, last = projected[0], projected[-1]
    idle = (first - last).square().sum() / last.square().sum()
    assert result.errors[-1] < 0.3 * idle


def test_errors_fall_with_the_sizes():
    teacher = dense()
    sizes = [{"width": width, "heads": 3} for width in (6, 12, 18, 48)]
    by_width = [start(student(teacher, **changes), teacher, EACH_ITS_OWN).errors[-1] for changes in sizes]
    sizes = [{"mlp_dim": units} for units in (8, 32, 64, 96)]
    by_units = [start(student(teacher, **changes), teacher, EACH_ITS_OWN).errors[-1] for changes in sizes]
    assert by_width == sorted(by_width, reverse=True) and by_units == sorted(by_units, reverse=True)


NORMS_IN_PARTS = {"scale_mlp": True, "scale_attn_inner": True, "use_fc_norm": False, "global_pool": "token"}


@pytest.mark.parametrize("name, arguments", [("eva02", NORMS_IN_PARTS), ("vit", {"norm_layer": RmsNorm})])
@pytest.mark.parametrize("width", [24, 48])
def test_norms_that_a_student_lacks_are_fitted(name, arguments, width):
    """A LayerNorm inside attention and MLP, and norms that leave the mean over channels where it is."""
    teacher = dense(name, **arguments)
    model = student(teacher, width=width, heads=width // 8)
    with pytest.raises(ValueError, match=r"a norm inside block 0|RmsNorm in place of LayerNorm|width is 48"):
        upcycle(model, teacher, range(4), IMAGES)
    result = start(model, teacher, EACH_ITS_OWN)
    assert max(result.errors) < 0.06
    assert error(model, teacher) < 0.7


def test_means_and_errors_are_of_the_states_behind_each_block():
    teacher = dense()
    model = student(teacher, width=16, heads=2, depth=2)
    result = start(model, teacher, PAIRS)
    x = images(40, seed=1)
    basis = stream_basis(teacher.model, [x], 16)
    block_inputs_and_end = states(teacher.model, x)[::2]
    z = embed(model, x)
    for number, (_, stop) in enumerate(PAIRS):
        state = block_inputs_and_end[stop]
        z = model.blocks[number](z)
        torch.testing.assert_close(result.means[number], state.mean((0, 1)), atol=1e-4, rtol=1e-4)
        wanted = state @ basis.projection.T
        missing = (z - wanted).square().sum() / wanted.square().sum()
        assert abs(result.errors[number] / missing.item() - 1) < 1e-2


# experts by clusters


@torch.no_grad()
def test_experts_by_clusters_fit_better_than_copies(monkeypatch):
    teacher = dense()
    changes = {"mlp_dim": 24, "moe_blocks": "1,3", "moe": MoEConfig(num_experts=4, k=1)}
    copies, clustered, in_chunks = (student(teacher, **changes) for _ in range(3))
    of_copies = start(copies, teacher, EACH_ITS_OWN)
    of_clusters = start(clustered, teacher, EACH_ITS_OWN, clusters=True)
    assert of_clusters.errors[1] < 0.9 * of_copies.errors[1]
    assert of_clusters.errors[3] < 0.9 * of_copies.errors[3]
    z = embed(clustered, images(20, seed=99))
    for number, block in enumerate(clustered.blocks):
        out = {}
        if number in (1, 3):
            block(z, out)
            assert (out["mlp"]["routing"].count_GE.sum(0) > 7).all()  # of 340 tokens
        z = block(z)
    for number in (1, 3):
        experts = clustered.blocks[number].mlp.experts
        assert not any(torch.equal(experts[0]["fc2"].weight, other["fc2"].weight) for other in experts[1:])
    # never the hidden units of all tokens at once
    rows = []
    activate = projection.activate

    def watched(activation, outputs):
        rows.append(outputs[0][..., 0].numel())
        return activate(activation, outputs)

    monkeypatch.setattr(projection, "CHUNK", 50)
    monkeypatch.setattr(projection, "activate", watched)
    again = start(in_chunks, teacher, EACH_ITS_OWN, split=2, clusters=True)
    assert max(rows) == 50
    assert again.errors == pytest.approx(of_clusters.errors, rel=1e-2)


def test_fewer_different_tokens_than_experts():
    teacher = dense()
    model = student(teacher, width=12, moe=MoEConfig(num_experts=700, k=1), mlp_dim=24)
    with pytest.raises(ValueError, match=r"student block 1 \(from layer 1\): 680 points cannot make 700 clusters"):
        start(model, teacher, EACH_ITS_OWN, clusters=True)


def test_the_class_token_is_fitted_first_where_the_head_reads_it(monkeypatch):
    """In the last block, at the cost of the other tokens; the blocks before it stay as they are."""
    teacher = dense()
    favouring, equal = student(teacher, width=12), student(teacher, width=12)
    start(favouring, teacher, EACH_ITS_OWN)
    monkeypatch.setattr(projection, "class_token_half", lambda states: [None] * len(states))
    start(equal, teacher, EACH_ITS_OWN)
    x = images(40, seed=1)  # it was fitted on
    directions = stream_basis(teacher.model, x.split(16), 12).projection
    wanted = states(teacher.model, x)[-1] @ directions.T
    class_token, others = (
        [(states(model, x)[-1] - wanted)[:, part].square().sum() for model in (favouring, equal)]
        for part in (slice(0, 1), slice(1, None))
    )
    assert class_token[0] < 0.9 * class_token[1]
    assert others[0] > others[1]
    for ours, theirs in zip(favouring.blocks[:-1].parameters(), equal.blocks[:-1].parameters()):
        assert torch.equal(ours, theirs)


# the same for the same


@torch.no_grad()
def test_a_start_is_the_same_again_and_whatever_the_batches():
    teacher = dense()
    starts = []
    for split in (16, 16, 40):
        model = student(teacher, width=16, heads=2, depth=2)
        start(model, teacher, PAIRS, split=split)
        starts.append(model)
    first, again, one_batch = starts
    state = first.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    x = images()
    torch.testing.assert_close(one_batch(x), first(x), atol=1e-3, rtol=1e-3)


def test_routers_and_the_mode_stay_as_they_are():
    teacher = dense()
    model = student(teacher, width=16, heads=2).train()
    router = model.blocks[1].mlp.router.weight.clone()
    start(model, teacher, EACH_ITS_OWN)
    assert torch.equal(model.blocks[1].mlp.router.weight, router)
    assert model.training


# the basis


@torch.no_grad()
def states(model, x):
    """Block inputs, MLP inputs and the last output, by the formulas of a block."""
    h = embed(model, x)
    found = []
    for block in model.blocks:
        mid = h + block.attn(block.norm1(h))
        found += [h, mid]
        h = mid + block.mlp(block.norm2(mid))
    return [*found, h]


@pytest.mark.parametrize("width", [6, 16])
def test_the_basis_by_its_definition(width):
    model = dense().model
    x = images(40, seed=1)
    basis = stream_basis(model, x.split(16), width)
    moment = torch.zeros(24, 24, dtype=torch.float64)
    for state in states(model, x):
        centred = (state - state.mean(-1, keepdim=True)).flatten(0, 1).double()
        gram = centred.T @ centred
        moment += gram / gram.trace()
    values = torch.linalg.eigvalsh(moment).flip(0)
    carried = values[: width - 1].sum() / values.sum()
    assert 0.1 < carried < 0.999
    assert basis.carried == pytest.approx(carried.item(), rel=1e-5)
    directions = basis.directions.double()
    # the share of the variance that Q Q^T keeps, without an eigenvector
    assert (directions.T @ moment @ directions).trace() / moment.trace() == pytest.approx(carried.item(), rel=1e-5)
    orthonormal_but_the_mean = torch.eye(width) - 1 / width
    torch.testing.assert_close(directions.T @ directions, orthonormal_but_the_mean.double(), atol=1e-6, rtol=0)
    assert basis.projection.sum(0).abs().max() < 1e-5  # the student's LayerNorm takes nothing away
    assert basis.projection.sum(1).abs().max() < 1e-5  # and P takes what the teacher's takes away


def test_the_basis_of_states_in_few_dimensions_has_no_part_along_the_ones():
    model = dense().model
    keep_to(model, zero_sum(24, 6))
    basis = stream_basis(model, [images(40, seed=1)], 16)
    assert basis.directions.sum(0).abs().max() < 1e-5
    assert basis.carried == pytest.approx(1)


def test_the_basis_of_a_wider_student_is_whole():
    wider = stream_basis(dense().model, [images()], 40)
    assert wider.directions.shape == (24, 40) and wider.carried == pytest.approx(1)
    torch.testing.assert_close(wider.directions @ wider.directions.T, torch.eye(24) - 1 / 24, atol=1e-6, rtol=0)


@pytest.mark.parametrize("carried, level, said", [
    (0.5, "WARNING", "the 12 channels of the student carry 50.0% of the variance .* take a larger student.width"),
    (0.95, "INFO", "12 channels carry 95.00% of the variance"),
])  # fmt: skip
def test_what_is_said_of_a_basis(caplog, carried, level, said):
    caplog.set_level(logging.INFO)
    upcycling._say(StreamBasis(torch.eye(12), carried), Projected([(0, 1)], [0.25]), 12)
    caplog.records[0].getMessage().index("0.250")
    assert caplog.records[1].levelname == level
    assert re.search(said, caplog.records[1].getMessage())


def test_nothing_half_made_stays(tmp_path, monkeypatch):
    """Of a job that fails, or was killed under the same process number as containers give it again."""

    def fails(run, beside, *, needed):
        assert list(beside.iterdir()) == []
        (beside / "basis.safetensors").write_bytes(b"half")
        raise ValueError("what stops it")

    monkeypatch.setattr(upcycling, "_take", fails)
    killed = tmp_path / "upcycle.tmp" / f"{socket.gethostname()}.{os.getpid()}"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="what stops it"):
        upcycling._make(SimpleNamespace(out=tmp_path), None, SimpleNamespace(copied=False), tmp_path / "upcycle")
    assert list(tmp_path.iterdir()) == []


# least squares


def rows(count=400, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = torch.randn(count, 3, generator=generator) + x @ torch.randn(6, 3, generator=generator)
    return x, y, torch.rand(count, generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
def test_least_squares_against_torch(weighted):
    x, y, weight = rows()
    fit = LeastSquares()
    for part in range(0, 400, 150):
        chosen = slice(part, part + 150)
        fit.add(x[chosen], y[chosen], weight[chosen] if weighted else None)
    root = weight.sqrt()[:, None] if weighted else torch.ones(400, 1)
    with_one = torch.cat([x, torch.ones(400, 1)], 1)
    wanted = torch.linalg.lstsq(with_one * root, y * root).solution
    found_weight, found_bias = fit.solve()
    # the ridge draws weights of up to 3 to 0
    torch.testing.assert_close(found_weight, wanted[:-1].T, atol=5 * RIDGE, rtol=0)
    torch.testing.assert_close(found_bias, wanted[-1], atol=5 * RIDGE, rtol=0)


def test_least_squares_of_inputs_far_from_zero():
    x, y, _ = rows()
    near, far = LeastSquares(), LeastSquares()
    near.add(x, y)
    far.add(x + 1000, y - 500)
    weight, bias = near.solve()
    far_weight, far_bias = far.solve()
    torch.testing.assert_close(far_weight, weight, atol=2e-3, rtol=0)
    # W x + b = W' (x + 1000) + b' + 500
    torch.testing.assert_close(far_weight.sum(1) * 1000 + far_bias + 500, bias, atol=2e-3, rtol=0)


def test_least_squares_of_inputs_that_do_not_vary_or_always_agree():
    x, y, _ = rows()
    constant = LeastSquares()
    constant.add(torch.full((400, 6), 7.3), y)
    constant.add(torch.full((400, 6), 7.3), y)
    weight, bias = constant.solve()
    torch.testing.assert_close(weight.sum(1) * 7.3 + bias, y.mean(0), atol=1e-4, rtol=0)
    assert weight.abs().max() < 0.01
    one, twice = LeastSquares(), LeastSquares()
    one.add(x, y)
    twice.add(torch.cat([x, x, torch.zeros(400, 2)], 1), y)
    (weight, bias), (shared, same_bias) = one.solve(), twice.solve()
    torch.testing.assert_close(shared[:, :6], weight / 2, atol=1e-3, rtol=0)
    torch.testing.assert_close(shared[:, 6:12], weight / 2, atol=1e-3, rtol=0)
    assert (shared[:, 12:] == 0).all()
    torch.testing.assert_close(same_bias, bias, atol=1e-3, rtol=0)


def test_powers_of_matrices_by_hand():
    moments = torch.diag_embed(torch.tensor([[4, 1, 0], [9, 16, 25]]).double())
    # of the 0: 1e-6 of the largest, 4e-6
    roots = torch.diag_embed(torch.tensor([[2, 1, 0.002], [3, 4, 5]]).double())
    inverses = torch.diag_embed(torch.tensor([[1 / 2, 1, 500], [1 / 3, 1 / 4, 1 / 5]]).double())
    torch.testing.assert_close(power(moments, 0.5), roots)
    torch.testing.assert_close(power(moments, -0.5), inverses)
    x, _, _ = rows()
    moment = x.double().T @ x.double()
    torch.testing.assert_close(power(moment, 0.5) @ power(moment, 0.5), moment, atol=1e-9, rtol=0)
    whitened = power(moment, -0.5) @ moment @ power(moment, -0.5)
    torch.testing.assert_close(whitened, torch.eye(6).double(), atol=1e-9, rtol=0)
    assert torch.isfinite(power(torch.zeros(3, 3), -0.5)).all()


# what is refused


def refusal(model, teacher, covered=EACH_ITS_OWN, count=40) -> str:
    with pytest.raises(ValueError) as caught:
        check_projection(model, teacher, covered, images=count)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name, part", [
    ("clip", r"a norm before the blocks \(pre_norm\)"),
    ("aimv2", "a patch embedding PatchEmbed that is more than one convolution"),
    ("perception encoder", "a norm before the blocks"),
    ("beit", "blocks of type timm.models.beit.Block"),
    ("beit, one bias", "blocks of type timm.models.beit.Block"),
])  # fmt: skip
def test_parts_that_nothing_is_fitted_for(name, part):
    teacher = dense(name)
    message = refusal(student(teacher, width=12, num_classes=teacher.num_classes), teacher)
    assert re.match(rf"a V-MoE cannot start from a {name}, which has {part}", message)
    assert "'student.init=\"\"'" in message


def test_learned_rotations():
    teacher = dense("rope mixed")
    assert "learned or other frequencies" in refusal(student(teacher, rope=None), teacher)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ResPostBlock])
def test_blocks_of_another_order(block):
    teacher = dense()
    model = student(teacher, width=12)
    teacher.model.blocks[2] = block(24, 3)
    assert f"which has blocks of type timm.models.vision_transformer.{block.__name__} (block 2)" in refusal(
        model, teacher
    )


def test_rotated_heads_of_other_channels():
    teacher = dense("rope", "rotary")
    message = refusal(student(teacher, width=24, heads=6), teacher)
    assert "heads have 4 channels (width 24 / heads 6)" in message and "set student.heads=3" in message
    assert "set another width" in refusal(student(teacher, width=12, heads=3), teacher)


def test_too_few_images():
    teacher = dense()
    model = student(teacher, width=12)
    message = refusal(model, teacher, count=11)
    assert message.startswith("11 calibration images are 187 tokens") and "at least 192" in message
    assert "student.start_images (to at least 12)" in message
    assert check_projection(model, teacher, EACH_ITS_OWN, images=12) == []


@pytest.mark.parametrize("width", [12, 24, 48])
def test_broken_and_constant_teachers(width):
    teacher = dense()
    model = student(teacher, width=width)
    teacher.model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the hidden states of .* are not finite.*: its weights are broken; name an"):
        start(model, teacher, EACH_ITS_OWN)
    constant = dense()
    constant.model.patch_embed.proj.weight.zero_()
    with pytest.raises(ValueError, match=r"features of a vit are the same for all of 40 calibration images: .*name an"):
        start(model, constant, EACH_ITS_OWN)


# what is copied, and what it costs


@pytest.mark.parametrize("dense_depths, depths, expected", [
    ([2, 2], [1, 1], [(0, 2), (2, 4)]),
    ([3, 3], [2, 3], [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]),
    ([5], [3], [(0, 1), (1, 3), (3, 5)]),
])  # fmt: skip
def test_layers_that_blocks_stand_for(dense_depths, depths, expected):
    assert covered_layers(dense_depths, depths) == expected


def test_what_is_a_copy():
    teacher = dense()
    config = student(teacher).config
    assert is_copy(config, teacher.model, EACH_ITS_OWN)
    assert not is_copy(config, teacher.model, [(0, 1), (1, 2), (2, 4)])
    for changes in ({"width": 12}, {"heads": 4}, {"mlp_dim": 95}):
        assert not is_copy(dataclasses.replace(config, **changes), teacher.model, EACH_ITS_OWN)


@pytest.mark.parametrize("kind, name, covered, changes, clusters", [
    ("family", "vit", EACH_ITS_OWN, {"width": 36}, False),
    ("family", "vit", [(0, 3), (3, 4)], {"width": 36, "mlp_dim": 100}, False),
    ("family", "vit", PAIRS, {"width": 60}, False),
    ("family", "vit", PAIRS, {"width": 36, "mlp_dim": 100}, True),
    ("rotary", "dinov2 giant", PAIRS, {"width": 36}, False),
])  # fmt: skip
def test_flops_against_torch(kind, name, covered, changes, clusters):
    teacher = dense(name, kind, embed_dim=48)
    model = student(teacher, depth=len(covered), **changes)
    x = images(256)
    with FlopCounterMode(display=False) as counted:
        basis = stream_basis(teacher.model, [x[:64]], model.embed_dim)
        project(model, teacher, covered, basis, IMAGES, lambda: [x], clusters=clusters)
    planned = projection_flops(model, teacher, covered, 256, 64, clusters=clusters)
    assert planned == pytest.approx(counted.get_total_flops(), rel=0.05)
