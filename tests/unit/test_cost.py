"""What every objective says it costs against torch's own counter, one step of each with its backward; and that no step
waits for a device.

Models are small but not degenerate: widths of 64 (teacher), 48 and 64 (students), 17 tokens or more. Every expert gets
every token (k = num_experts), so that torch counts no empty rows; what is computed where k is less has its own test.
Attention runs through the kernel made of products, which torch counts.
"""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vit_families import images, tiny

from models.experts.guided_routing import Guide, TeacherRouters
from models.flops import flops
from models.modules.basis import Basis, FittedBasis, projection
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import assemble_student, build_student_modules
from models.moe.layer import MoEConfig
from models.moe.out import by_layer
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.phases import DistillConfig, MetaConfig, TrainConfig
from trainer.objectives import (
    Borders,
    Classify,
    Distill,
    Incubate,
    LearnFeatures,
    LearnFromTeacher,
    MatchTeacher,
    Theseus,
    Together,
)
from trainer.objectives.base import Taught
from trainer.objectives.cost import flops_per_image
from trainer.objectives.distill import DistillTokens

TOLERANCE = 1e-6  # equal but for the rounding of shares of steps; the project promises 2%
BATCH, WIDTH, NARROW, EXPERTS = 2, 64, 48, 2
DEPTHS = [2, 2, 2]
X, LABELS = images(BATCH), torch.tensor([1, 4])
DISTILL = {
    "logits": DistillConfig(),
    "labels": DistillConfig(alpha=0.0),
    "mse": DistillConfig(border="mse", logit_weight=0.0),
    "cosine": DistillConfig(border="cosine", logit_weight=0.0),
    "mse and logits": DistillConfig(border="mse"),
    "noise": DistillConfig(border="mse", input_noise=0.1),
}
BORDERS = ["mse", "noise"]  # what there is to choose from without classes
KINDS = [
    ("linear", NARROW),
    ("pca", NARROW),
    ("tied", NARROW),
    ("tied", WIDTH),
    ("projected", NARROW),
    ("projected", WIDTH),
]


def counted(objective, progress=0.0, told=None):
    """FLOPs of one image in a step by torch, of a step that reads what was told without those of telling it."""
    for module in objective.frozen:
        module.eval().requires_grad_(False)
    objective.module.train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if told is None:
            loss, _ = objective(objective.module, X, LABELS, progress)
        else:
            loss, _ = objective.learn(objective.module, X, LABELS, told, progress, {})
        loss.backward()
    return counter.get_total_flops() / BATCH


def check(objective):
    assert objective.flops_per_image == pytest.approx(counted(objective), rel=TOLERANCE)
    if isinstance(objective, Taught):
        told = objective.tell(X)
        for each in (objective, *getattr(objective, "pairs", ())):
            each.told_share = 0.0
        assert flops_per_image(objective.passes(), objective.tokens) == pytest.approx(
            counted(objective, told=told), rel=TOLERANCE
        )
    step_without_values(objective)


def step_without_values(objective, dtype=torch.bfloat16):
    """A step on torch's device without values, which refuses what a GPU would have to be waited for.

    It also refuses an operation on tensors of two devices.
    """
    for module in (objective.module, *objective.frozen):
        module.to("meta", dtype)
    loss, _ = objective(objective.module, X.to("meta", dtype), LABELS.to("meta"), 0.5)
    loss.backward()
    assert loss.is_meta


class Models:
    """Teacher, its stages, a meta model, and a student with its modules: three of each, with two, one and one block."""

    def __init__(self, classes=True, meta_blocks=1, kind="linear", width=NARROW):
        torch.manual_seed(0)
        family = "vit" if classes else "dinov2 reg4"
        model = tiny(family, depth=6, embed_dim=WIDTH, num_heads=4)
        self.model = model
        self.stages = split(model, DEPTHS)
        self.teacher = MetaModel(self.stages)
        self.meta = MetaModel.from_teacher(model, 3, meta_blocks, teacher_depths=DEPTHS)
        self.tokens = 17 if classes else 21
        self.student = student(width, classes)
        directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
        basis = Basis(torch.zeros(WIDTH), directions, torch.ones(WIDTH))
        if kind == "projected":
            # tied to the basis of the student's start, which turns at equal width as well
            kind, basis = "tied", FittedBasis(basis.mean, directions[:, :width], torch.ones(width))
        self.bases = [basis] * 2
        self.modules = build_student_modules(self.student, [1, 1, 1], WIDTH, kind=kind, bases=self.bases)

    def borders(self):
        projections = [projection(basis, self.student.embed_dim) for basis in self.bases]
        return Borders([1, 2], projections)


def student(width=NARROW, classes=True, **routing):
    values = {"image_size": 32, "patch_size": 8, "width": width, "depth": 3, "heads": 4, "mlp_dim": 80}
    if classes:
        values |= {"num_classes": 5, "pool": "mean"}
    else:
        values |= {"num_classes": 0, "reg_tokens": 4, "feature_width": WIDTH}
    moe = MoEConfig(**{"num_experts": EXPERTS, "k": EXPERTS, **routing})
    model = VMoE(VMoEConfig(**values, moe_blocks="all", moe=moe))
    if classes:
        nn.init.normal_(model.head.weight)
    return model


def guide(teacher, sources):
    number = len(sources)
    centroids = torch.randn(number, EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0))
    routers = TeacherRouters(sources, [torch.zeros(WIDTH)] * number, list(centroids), [1.0] * number)
    return Guide(routers, teacher, 1.0)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("kind, width", KINDS)
@pytest.mark.parametrize("index", range(3))
def test_a_module_behind_every_kind_of_stitch(index, kind, width, classes):
    m = Models(classes, kind=kind, width=width)
    config = DISTILL["mse"]
    teacher = None if classes else m.teacher
    check(Distill(m.modules[index], m.stages[index], m.meta, index, config, m.tokens, teacher=teacher))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", DISTILL)
def test_a_module_by_every_target(name, index):
    m = Models(kind="tied")
    check(Distill(m.modules[index], m.stages[index], m.meta, index, DISTILL[name], m.tokens))


@pytest.mark.parametrize("name", ["labels", "mse", "mse and logits"])
@pytest.mark.parametrize("index", [1, 2])
def test_a_second_round(index, name):
    """order=sequential: behind the student modules before it."""
    m = Models(kind="tied")
    pair = (m.modules[index], m.stages[index], m.meta, index, DISTILL[name], m.tokens)
    check(Distill(*pair, predecessors=m.modules[:index]))


@pytest.mark.parametrize("name", ["logits", "mse"])
@pytest.mark.parametrize("index", range(3))
def test_a_module_with_a_guide(index, name):
    m = Models(kind="tied")
    guided = guide(m.stages[index], {index: 2 * index + 1})
    check(Distill(m.modules[index], m.stages[index], m.meta, index, DISTILL[name], m.tokens, guide=guided))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("index", range(2))
def test_an_expert_taught_on_the_tokens_of_its_cluster(index, classes):
    m = Models(classes, kind="tied")

    def own(h):
        state = m.meta.stages[0](h) if index == 0 else h
        return state.sum(-1) > 0

    teacher = None if classes else m.teacher
    pair = (m.modules[index], m.stages[index], m.meta, index, DISTILL["mse"])
    check(DistillTokens(own, *pair, tokens=m.tokens, teacher=teacher))


@pytest.mark.parametrize("meta_blocks", [0, 1], ids=["teacher as meta", "trained meta"])
@pytest.mark.parametrize("classes, name", [*((True, name) for name in DISTILL), *((False, name) for name in BORDERS)])
def test_all_modules_at_once(classes, name, meta_blocks):
    m = Models(classes, meta_blocks, kind="tied")
    meta_is_teacher = meta_blocks == 0
    objective = Together(m.modules, m.stages, m.meta, DISTILL[name], m.tokens, meta_is_teacher)
    assert objective.flops_per_image == sum(objective.flops_by_module)
    check(objective)


def test_all_modules_at_once_with_guides_and_equal_widths():
    m = Models(kind="tied", width=WIDTH, meta_blocks=0)
    guides = [guide(stage, {i: 2 * i + 1}) for i, stage in enumerate(m.stages)]
    check(Together(m.modules, m.stages, m.meta, DISTILL["mse"], m.tokens, True, guides=guides))


@pytest.mark.parametrize("index", range(3))
def test_a_teacher_module_that_grows(index):
    m = Models()
    check(Incubate(m.stages[index], m.meta, index, m.tokens))


def test_labels_alone():
    models = [
        lambda m: m.model.requires_grad_(True),
        lambda m: m.meta,
        lambda m: m.student,
        lambda m: assemble_student(m.modules, "keep"),
    ]
    for model in models:
        m = Models()
        check(Classify(model(m), m.tokens))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("weights", [{}, {"forced_weight": 0.0}, {"free_weight": 0.0}], ids=str)
def test_a_meta_model_that_matches(weights, classes):
    m = Models(classes)
    check(MatchTeacher(m.meta, m.stages, MetaConfig(**weights), m.tokens))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_module_replacing(kl_weight, monkeypatch):
    """The mean over the schedule of the mean over all draws, each as likely as it is."""
    m = Models()
    objective = Theseus(m.meta, m.stages, MetaConfig(replace_rate=0.4, kl_weight=kl_weight), m.tokens)
    of_draw = {}
    for draw in itertools.product((True, False), repeat=3):
        if any(draw):
            monkeypatch.setattr(objective, "draw", lambda progress, draw=draw: list(draw))
            of_draw[draw] = counted(objective)
    mean = 0.0
    points = 500
    for point in range(points):
        p = objective.replace_rate((point + 0.5) / points)
        for draw, cost in of_draw.items():
            chance = math.prod(p if replaced else 1 - p for replaced in draw)
            if sum(draw) == 1:
                chance += (1 - p) ** 3 / 3  # none drawn: one of the three is picked
            mean += chance * cost / points
    assert objective.flops_per_image == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("width", [NARROW, WIDTH])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("borders, kd_weight", [(False, 0.5), (True, 0.0), (True, 0.5)])
def test_end_to_end_beside_the_teacher(borders, kd_weight, guided, width, classes):
    m = Models(classes, kind="tied", width=width)
    config = TrainConfig(epochs=4, border_epochs=1.0, border_weight=float(borders), kd_weight=kd_weight)
    guided_by = guide(m.teacher, {0: 1, 1: 3, 2: 5}) if guided else None
    compared = m.borders() if borders else None
    kind = LearnFromTeacher if classes else LearnFeatures
    whole = assemble_student(m.modules)
    objective = kind(whole, m.teacher, config, m.tokens, borders=compared, guide=guided_by)
    # borders and guide fade out in the first quarter of the steps: one step in it and three behind it
    mean = (counted(objective) + 3 * counted(objective, progress=0.5)) / 4
    assert objective.flops_per_image == pytest.approx(mean, rel=TOLERANCE)


def test_stitches_of_equal_width_cost_nothing():
    m = Models(kind="tied", width=WIDTH)
    plain = [flops(stage, m.tokens) for stage in split(m.student, [1, 1, 1])]
    assert [flops(module, m.tokens) for module in m.modules] == plain


def test_an_expert_computes_its_own_rows_and_no_empty_ones():
    """k = 1 of 3 experts, which are not asked equally: what torch counts is a row per token all the same."""
    model = student(num_experts=3, k=1)
    objective = Classify(model, tokens=17)
    out = {}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(model.train(), X, LABELS, out=out)[0].backward()
    counts = [routing.count_GE.sum(0) for routing in by_layer(out, "routing").values()]
    assert any(count_E.max() > count_E.min() for count_E in counts)
    assert counter.get_total_flops() == pytest.approx(BATCH * objective.flops_per_image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity_factor", [None, 1.05])
def test_no_form_of_a_student_waits_for_a_device(capacity_factor, dtype):
    model = student(
        num_experts=4,
        k=2,
        capacity_factor=capacity_factor,
        noise_std=1.0,
        dropout=0.1,
        batch_priority=True,
        gshard_weight=0.1,
    )
    step_without_values(Classify(model.train(), tokens=17), dtype)
