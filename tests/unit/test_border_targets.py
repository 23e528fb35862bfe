"""Targets beyond the paper's: borders, weights and schedules of a pair, predecessors, and the teacher end to end."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vit_families import images, scramble, tiny

from models.flops import flops, forward_flops
from models.modules.basis import Project
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import assemble_student, build_student_modules
from models.moe.layer import MoEConfig
from models.moe.out import auxiliary_loss
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.phases import DistillConfig, TrainConfig
from trainer.objectives import Borders, Classify, Distill, LearnFromTeacher, relative_mse, soft_kl

TOKENS, WIDTH = 17, 16
X, LABELS = images(count=2), torch.tensor([1, 4])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vmoe() -> VMoE:
    values = {"image_size": 32, "patch_size": 8, "width": WIDTH, "depth": 3, "heads": 2, "mlp_dim": 20}
    model = VMoE(VMoEConfig(**values, num_classes=5, moe_blocks="all", moe=MoEConfig(num_experts=3, k=2), pool="mean"))
    nn.init.normal_(model.head.weight)
    return model


def parts(index: int, **config):
    """(objective, meta model, teacher stage, all student modules) of three modules of a six-block teacher."""
    teacher = tiny("vit", depth=6).eval()
    stages = split(teacher, [2, 2, 2])
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=[2, 2, 2]).eval()
    for part in meta.stages:
        scramble(part)  # else it is the teacher in part
    modules = build_student_modules(vmoe(), [1, 1, 1], teacher.embed_dim)
    predecessors = modules[:index] if config.pop("chained", False) else ()
    objective = Distill(modules[index], stages[index], meta, index, DistillConfig(**config), TOKENS,
                        predecessors=predecessors)  # fmt: skip
    return objective, meta, stages[index], modules


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_border_target_by_hand(kind):
    objective, meta, stage, modules = parts(1, border=kind, border_weight=3.0, logit_weight=0.0)
    h = meta.front(X, 1)
    out = {}
    mine, wanted = modules[1](h, out), stage(h)
    loss, shown = objective(modules[1], X, LABELS)
    if kind == "mse":
        expected = (mine - wanted).square().sum() / wanted.square().sum()
    else:
        expected = 1 - (mine * wanted).sum(-1).div(mine.norm(dim=-1) * wanted.norm(dim=-1)).mean()
    assert float(shown["border"]) == pytest.approx(float(expected), rel=1e-4) and float(expected) > 0.01
    assert float(loss) == pytest.approx(float(3 * expected + auxiliary_loss(out)), rel=1e-4)


@torch.no_grad()
def test_border_and_logits_add_up():
    objective, meta, stage, modules = parts(1, border="mse", border_weight=2.0, logit_weight=0.5, alpha=0.25, tau=2.0)
    h = meta.front(X, 1)
    out = {}
    mine, taught = modules[1](h, out), stage(h)
    y, wanted = meta.back(mine, 1), meta.back(taught, 1)
    expected = 0.5 * (0.75 * F.cross_entropy(y, LABELS) + 0.25 * soft_kl(wanted, y, 2.0))
    expected += 2 * relative_mse(mine, taught) + auxiliary_loss(out)
    assert float(objective(modules[1], X, LABELS)[0]) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_the_last_module_has_its_logits_in_full():
    border, _, _, modules = parts(2, border="mse", logit_weight=0.0)
    plain = Distill(modules[2], border.teacher_stage, border.meta, 2, DistillConfig(), TOKENS)
    assert torch.equal(border(modules[2], X, LABELS)[0], plain(modules[2], X, LABELS)[0])
    assert border.flops_per_image == plain.flops_per_image


def test_a_border_target_alone_runs_and_costs_no_suffix():
    objective, meta, stage, modules = parts(0, border="mse", logit_weight=0.0)
    calls = []
    for part in meta.stages:
        part.register_forward_hook(lambda part, *_: calls.append(part.start))
    objective(modules[0], X, LABELS)
    assert calls == []
    assert objective.flops_per_image == forward_flops(stage, TOKENS) + flops(modules[0], TOKENS).trained
    labels_only = Distill(modules[0], stage, meta, 0, DistillConfig(alpha=0.0), TOKENS)
    labels_only(modules[0], X, LABELS)
    assert calls == [1, 2]  # the suffix once, for the student; the teacher is not run
    suffix = sum(flops(part, TOKENS).relaying for part in meta.stages[1:])
    assert labels_only.flops_per_image == suffix + flops(modules[0], TOKENS).trained


@torch.no_grad()
def test_alpha_and_tau_change_linearly():
    objective, *_, modules = parts(1, alpha=0.0, alpha_end=1.0, tau=1.0, tau_end=3.0)
    for progress in (0.0, 0.25, 1.0):
        constant = DistillConfig(alpha=progress, tau=1 + 2 * progress)
        same = Distill(modules[1], objective.teacher_stage, objective.meta, 1, constant, TOKENS)
        loss, _ = objective(modules[1], X, LABELS, progress)
        assert torch.allclose(loss, same(modules[1], X, LABELS)[0], atol=1e-6)


@torch.no_grad()
def test_noise_on_the_input_has_the_asked_size_and_spares_images():
    objective, meta, _, modules = parts(1, border="mse", input_noise=0.3)
    given = []
    objective(lambda h, out: given.append(h) or modules[1](h), X, LABELS)
    h = meta.front(X, 1)
    assert float((given[0] - h).std() / h.std()) == pytest.approx(0.3, rel=0.1)
    first, *_, modules = parts(0, border="mse", input_noise=0.3)
    first(lambda h, out: given.append(h) or modules[0](h), X, LABELS)
    assert torch.equal(given[1], X)


@torch.no_grad()
def test_predecessors_feed_the_student_and_the_teacher_stays_clean():
    objective, meta, stage, modules = parts(2, chained=True)
    modules[:2] = [module.eval() for module in modules[:2]]
    sent = modules[1](modules[0](X))
    given = []
    objective(lambda h, out: given.append(h) or modules[2](h), X, LABELS)
    assert torch.equal(given[0], sent)
    assert torch.allclose(objective.predict(X), modules[2](sent))
    front, before = objective.flops_per_image, sum(forward_flops(module, TOKENS) for module in modules[:2])
    plain = Distill(modules[2], stage, meta, 2, DistillConfig(), TOKENS)
    assert front == plain.flops_per_image + before


def end_to_end(**config):
    """(objective, student, teacher as a chain of modules) with borders before blocks 1 and 2."""
    teacher = MetaModel(split(tiny("vit", depth=6).eval(), [2, 2, 2]))
    student = assemble_student(build_student_modules(vmoe(), [1, 1, 1], 24))
    width = teacher.stages[0].embed_dim
    projections = [Project(torch.randn(width), torch.linalg.qr(torch.randn(width, WIDTH))[0]) for _ in range(2)]
    config = TrainConfig(**config)
    objective = LearnFromTeacher(student, teacher, config, TOKENS, borders=Borders([1, 2], projections))
    return objective, student, teacher, projections


@torch.no_grad()
def test_end_to_end_with_the_teacher_by_hand():
    objective, student, teacher, projections = end_to_end(
        epochs=10, kd_weight=0.25, kd_tau=2.0, border_weight=3.0, border_epochs=4.0
    )
    *wanted, y_teacher = teacher.hidden_states(X)
    stages = split(student, [1, 1, 1])
    z0 = stages[0](X)
    z1 = stages[1](z0)
    out = {}
    y = student(X, out)
    plain = 0.75 * F.cross_entropy(y, LABELS) + 0.25 * soft_kl(y_teacher, y, 2.0)
    border = sum(relative_mse(z, project(h)) for z, project, h in zip((z0, z1), projections, wanted))
    for progress, fade in ((0.0, 1.0), (0.1, 0.75), (0.4, 0.0), (0.9, 0.0)):  # 0.1 of 10 epochs = 1 of 4
        loss, shown = objective(student, X, LABELS, progress)
        expected = plain + auxiliary_loss(out) + 3 * fade * border
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert ("border" in shown) == (fade > 0) and "kd" in shown
    classify = Classify(student, TOKENS)
    beside = sum(forward_flops(part, TOKENS) for part in (teacher, *projections))
    fading = sum(forward_flops(project, TOKENS) for project in projections)  # in 4 of 10 epochs
    assert objective.flops_per_image == pytest.approx(classify.flops_per_image + beside - 0.6 * fading)


def test_a_teacher_that_has_faded_out_is_not_run_and_not_counted():
    objective, student, teacher, projections = end_to_end(epochs=10, border_weight=1.0, border_epochs=2.5)
    calls = []
    teacher.stages[0].register_forward_hook(lambda *_: calls.append(1))
    for progress, runs in ((0.0, 1), (0.2, 2), (0.25, 2), (0.7, 2)):
        objective(student, X, LABELS, progress)
        assert len(calls) == runs
    extra = objective.flops_per_image - Classify(student, TOKENS).flops_per_image
    beside = sum(forward_flops(part, TOKENS) for part in (teacher, *projections))
    assert extra == pytest.approx(0.25 * beside)


def test_border_states_carry_gradient_also_under_activation_checkpointing():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        objective, student, *_ = end_to_end(epochs=1, border_weight=5.0)
        student.train().set_grad_checkpointing(recompute)
        loss, _ = objective(student, X, LABELS)
        gradients.append(torch.autograd.grad(loss, list(student.parameters()), allow_unused=True))
    assert all((a is None and b is None) or torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
