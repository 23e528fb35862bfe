"""Losses worked by hand, and gradients that reach the student and nothing else."""

import copy
import math

import pytest
import torch
from torch import nn
from vit_families import WIDTH, images, tiny

from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import build_student_modules
from models.moe.layer import MoEConfig
from models.moe.out import auxiliary_loss
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.phases import DistillConfig, MetaConfig
from trainer.objectives import Classify, Distill, MatchTeacher, relative_mse, soft_kl

CLASSES, TOKENS = 5, 17  # of the tiny models
X = images(count=2)
LABELS = torch.tensor([1, 4])
# KL((.8, .2) || (.5, .5)) = .8 ln 1.6 + .2 ln .4
KL_HALF = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Fixed(nn.Module):
    """Gives the same value whatever it is fed."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, out=None):
        return self.value


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return self.factor * x


def logits(*rows):
    """Logits whose softmax is the given rows."""
    return torch.tensor(rows).log()


def student(k=2):
    values = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "mlp_dim": 20}
    moe = MoEConfig(num_experts=3, k=k, importance_weight=0.5)
    # on the mean of the patches, because behind a class token the last experts serve that one token only
    model = VMoE(VMoEConfig(**values, num_classes=CLASSES, moe_blocks="all", moe=moe, pool="mean"))
    nn.init.normal_(model.head.weight)  # zero at the start, which would hide the loss from everything before it
    return model


def frozen_as_the_loop_does(objective):
    for module in objective.frozen:
        module.eval().requires_grad_(False)
    return objective


def pair(index, config, teacher=None, student_module=None):
    """Module pair `index` of a tiny teacher in 4 modules of 2, 1, 2, 1 blocks."""
    teacher = teacher or tiny("vit", depth=6)
    depths = [2, 1, 2, 1]
    meta = MetaModel.from_teacher(teacher, 4, teacher_depths=depths)
    stage = split(teacher, depths)[index]
    module = student_module or build_student_modules(student(), [1, 1, 1, 1], WIDTH)[index]
    return frozen_as_the_loop_does(Distill(module, stage, meta, index, config, TOKENS))


def by_hand(wanted, student_logits, labels, label_smoothing=0.0, **config):
    """Loss and parts of the last of two module pairs, in which teacher and student give these logits."""
    meta = MetaModel([Fixed(torch.zeros(1)), Fixed(None)])
    objective = Distill(Fixed(student_logits), Fixed(wanted), meta, 1, DistillConfig(**config), TOKENS, label_smoothing)
    return objective(objective.module, X, labels)


def test_soft_kl_is_averaged_over_the_batch():
    wanted = logits([0.8, 0.2], [0.3, 0.7])
    q = logits([0.5, 0.5], [0.3, 0.7])  # the second sample is right already
    assert soft_kl(wanted, q).item() == pytest.approx(KL_HALF / 2)
    assert soft_kl(wanted[:1] + 3, q[:1] - 1).item() == pytest.approx(KL_HALF)  # shifts change no distribution


def test_soft_kl_has_the_teacher_first():
    # KL((.5, .5) || (.8, .2)) = .5 ln .625 + .5 ln 2.5, another number than KL_HALF
    other = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert soft_kl(logits([0.5, 0.5]), logits([0.8, 0.2])).item() == pytest.approx(other)
    assert abs(other - KL_HALF) > 0.01


def test_soft_kl_with_a_temperature():
    # logits (2 ln 4, 0) / 2 = (ln 4, 0), softmax (.8, .2); times tau^2 = 4
    wanted = torch.tensor([[2 * math.log(4), 0.0]])
    assert soft_kl(wanted, torch.zeros(1, 2), tau=2.0).item() == pytest.approx(4 * KL_HALF)


def test_soft_kl_in_bfloat16_is_computed_in_float32():
    result = soft_kl(torch.zeros(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16))
    assert result.dtype == torch.float32


def test_relative_mse():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    # |a - b|^2 = 9 + 1 + 0, |b|^2 = 25 + 1: over the batch, not sample by sample
    assert relative_mse(a, b).item() == pytest.approx(10 / 26)
    assert relative_mse(b, b).item() == 0
    assert relative_mse(torch.zeros(2, 2), b).item() == 1


Q = logits([0.6, 0.4])
P = logits([0.8, 0.2])
CLASS_1, LN_4, LN_6 = torch.tensor([1]), -math.log(0.4), -math.log(0.6)
KL_PQ = 0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.4)


@pytest.mark.parametrize(
    "config, distill",
    [
        ({}, KL_PQ),
        ({"kl_reduction": "reference"}, KL_PQ / 2),  # C = 2 times weaker
        ({"target": "hard"}, LN_6),  # CE with the teacher's arg-max, class 0
        ({"target": "hard", "kl_reduction": "reference"}, LN_6),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_distill_loss(config, distill, alpha):
    loss, parts = by_hand(P, Q, CLASS_1, alpha=alpha, **config)
    assert parts["label"].item() == pytest.approx(LN_4)
    if alpha:
        assert parts["distill"].item() == pytest.approx(distill)
    else:
        assert "distill" not in parts  # the teacher is not even run
    assert parts["balance"].item() == 0
    assert loss.item() == pytest.approx((1 - alpha) * LN_4 + alpha * distill)


def test_reference_kl_is_torchs_mean_over_batch_and_classes():
    g = torch.Generator().manual_seed(0)
    wanted, given = torch.randn(3, CLASSES, generator=g), torch.randn(3, CLASSES, generator=g)
    _, parts = by_hand(wanted, given, torch.tensor([0, 1, 2]), kl_reduction="reference")
    p, q = wanted.softmax(-1), given.log_softmax(-1)
    published = nn.functional.kl_div(q, p, reduction="sum") / (3 * CLASSES)  # as in the public code
    assert parts["distill"].item() == pytest.approx(published.item())
    _, ours = by_hand(wanted, given, torch.tensor([0, 1, 2]))
    assert ours["distill"].item() == pytest.approx(CLASSES * published.item())


def test_temperature_of_the_pair():
    loss, _ = by_hand(2 * P, 2 * Q, CLASS_1, alpha=1.0, tau=2.0)
    assert loss.item() == pytest.approx(4 * KL_PQ)


def test_mixup_targets_carry_their_own_smoothing():
    mixed = torch.tensor([[0.3, 0.7]])
    expected = 0.3 * LN_6 + 0.7 * LN_4
    assert by_hand(P, Q, mixed, 0.1)[1]["label"].item() == pytest.approx(expected)
    smoothed = 0.05 * LN_6 + 0.95 * LN_4  # class 1, a tenth of it spread over both classes
    assert by_hand(P, Q, CLASS_1, 0.1)[1]["label"].item() == pytest.approx(smoothed)

    def label_part(objective, target):
        return objective(objective.module, X, target)[1]["label"].item()

    assert label_part(Classify(Fixed(Q), TOKENS, 0.1), mixed) == pytest.approx(expected)
    assert label_part(Classify(Fixed(Q), TOKENS, 0.1), CLASS_1) == pytest.approx(smoothed)
    meta, teacher = MetaModel([Fixed(Q)]), [Fixed(P)]
    match = MatchTeacher(meta, teacher, MetaConfig(), TOKENS, 0.1)
    assert label_part(match, mixed) == pytest.approx(expected)
    assert label_part(match, CLASS_1) == pytest.approx(smoothed)


@pytest.mark.parametrize("index", range(4))
def test_gradients_pass_the_frozen_back_into_the_student_only(index):
    # every token to every expert: with fewer, one may get no token, and so no gradient, by the draws of its start
    module = build_student_modules(student(k=3), [1, 1, 1, 1], WIDTH)[index]
    objective = pair(index, DistillConfig(alpha=1.0), student_module=module)
    out = {}
    loss, parts = objective(objective.module, X, LABELS, out=out)
    assert parts["distill"] > 0
    (loss - auxiliary_loss(out)).backward()
    assert [name for name, p in objective.module.named_parameters() if p.grad is None or not p.grad.any()] == []
    outside = {id(p) for m in (objective.meta, objective.teacher_stage) for p in m.parameters()}
    assert outside == {id(p) for m in objective.frozen for p in m.parameters()}
    assert all(p.grad is None for m in objective.frozen for p in m.parameters())


@pytest.mark.parametrize("index", range(4))
def test_a_student_that_is_the_teacher_has_nothing_to_learn(index):
    teacher = tiny("vit", depth=6)
    stage = split(teacher, [2, 1, 2, 1])[index]
    objective = pair(index, DistillConfig(alpha=1.0), teacher, copy.deepcopy(stage))
    loss, _ = objective(objective.module, X, LABELS)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    expected = objective.meta.back(objective.teacher_stage(objective.meta.front(X, index)), index)
    assert torch.equal(objective.predict(X), expected)


def test_balance_losses_are_added_once():
    objective = pair(1, DistillConfig(alpha=0.5))
    out, out_whole = {}, {}
    loss, parts = objective(objective.module, X, LABELS, out=out)
    expected = auxiliary_loss(out)
    assert expected > 0 and parts["balance"] == expected
    assert loss.item() == pytest.approx((0.5 * parts["label"] + 0.5 * parts["distill"] + expected).item())
    whole = Classify(student(), TOKENS)
    loss, parts = whole(whole.module, X, LABELS, out=out_whole)
    assert parts["balance"] == auxiliary_loss(out_whole) > 0
    assert loss.item() == pytest.approx((parts["label"] + parts["balance"]).item())
    assert not any(part.requires_grad for part in parts.values())


def test_the_forward_given_is_the_one_that_runs():
    """In a run it is the engine, whose hooks must see the forward."""
    calls = []
    for objective in (pair(2, DistillConfig()), Classify(student(), TOKENS)):

        def engine(*arguments, module=objective.module):
            calls.append(module)
            return module(*arguments)

        objective(engine, X, LABELS)
        assert calls == [objective.module]
        calls.clear()


def test_match_loss_by_hand():
    """Three stages that only scale: the teacher doubles, the meta model changes nothing."""
    x = torch.tensor([[math.log(2), 0.0]])
    meta, stages = MetaModel([Scale(1) for _ in range(3)]), [Scale(2) for _ in range(3)]
    objective = frozen_as_the_loop_does(MatchTeacher(meta, stages, MetaConfig(label_weight=0.5), TOKENS))
    loss, parts = objective(objective.module, x, torch.tensor([1]))
    # free: x against 2x is (1/2)^2, x against 4x is (3/4)^2; forced: S1(2x) = 2x against 4x is (1/2)^2
    assert parts["match"].item() == pytest.approx(1 / 4 + 9 / 16 + 1 / 4)
    # logits: teacher 8x, p = (256, 1) / 257; free x, q = (2, 1) / 3; forced 4x, q = (16, 1) / 17
    kl = [256 / 257 * math.log(256 / 257 / a) + 1 / 257 * math.log(1 / 257 / (1 - a)) for a in (2 / 3, 16 / 17)]
    assert parts["kl"].item() == pytest.approx(sum(kl), rel=1e-5)
    assert parts["label"].item() == pytest.approx(math.log(3))
    assert loss.item() == pytest.approx(13 / 16 + 1 / 4 + sum(kl) + 0.5 * math.log(3), rel=1e-5)
    loss.backward()
    assert all(s.factor.grad is not None for s in meta.stages)
    assert all(s.factor.grad is None for s in stages)


def test_a_meta_model_that_is_the_teacher_matches_it():
    teacher, depths = tiny("vit", depth=6), [2, 2, 2]
    config = MetaConfig(blocks_per_module=2, init="teacher", label_weight=0.5)
    meta = MetaModel.from_teacher(teacher, 3, 2, "teacher", teacher_depths=depths)
    objective = frozen_as_the_loop_does(MatchTeacher(meta, split(teacher, depths), config, TOKENS))
    loss, parts = objective(objective.module, X, LABELS)
    assert parts["match"].item() == 0
    assert parts["kl"].item() == pytest.approx(0, abs=1e-6)
    label = nn.functional.cross_entropy(teacher(X), LABELS)
    assert loss.item() == pytest.approx(0.5 * label.item(), rel=1e-5)
    assert torch.equal(objective.predict(X), teacher(X))
    with torch.no_grad():
        meta.stages[1].blocks["2"].mlp.fc2.bias += 1.0
    assert objective(objective.module, X, LABELS)[1]["match"] > 0.01


def test_matching_trains_every_stage_of_the_meta_model():
    teacher, depths = tiny("vit", depth=6), [2, 1, 3]
    meta = MetaModel.from_teacher(teacher, 3, init="scratch", teacher_depths=depths)
    objective = frozen_as_the_loop_does(MatchTeacher(meta, split(teacher, depths), MetaConfig(), TOKENS))
    loss, _ = objective(objective.module, X, LABELS)
    loss.backward()
    assert [name for name, p in meta.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_a_single_module_has_no_border_to_match():
    meta, stages = MetaModel([Scale(1)]), [Scale(2)]
    objective = MatchTeacher(meta, stages, MetaConfig(), TOKENS)
    _, parts = objective(objective.module, torch.tensor([[math.log(2), 0.0]]), torch.tensor([1]))
    assert parts["match"].item() == 0 and parts["kl"] > 0
