"""What objectives say they cost against torch's own counter, one step of each with its backward, to the last FLOP.

Every expert gets every token (k = num_experts), so that torch counts no empty rows. Where the formulas are known to
differ from what is computed (models/flops.py counts every part as if it stood in the middle of a network) the
difference is worked out below; a later change of the formulas has to change it.
"""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vit_families import WIDTH, images, tiny

from models.experts.guided_routing import Guide, TeacherRouters
from models.flops import forward_flops
from models.modules.basis import Project
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import assemble_student, build_student_modules
from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.phases import DistillConfig, MetaConfig, TrainConfig
from trainer.objectives import Borders, Classify, Distill, Incubate, LearnFromTeacher, MatchTeacher, Theseus, Together
from trainer.objectives.cost import expected_mixed_flops
from trainer.objectives.distill import DistillTokens

BATCH, TOKENS, STUDENT_WIDTH, EXPERTS = 2, 17, 16, 2
DEPTHS = [2, 2, 2]
X, LABELS = images(BATCH), torch.tensor([1, 4])
DISTILL = {
    "logits": DistillConfig(),
    "labels": DistillConfig(alpha=0.0),
    "border": DistillConfig(border="mse", logit_weight=0.0),
    "both": DistillConfig(border="cosine"),
}


def counted(objective, progress=0.0):
    """FLOPs of one image in a step by torch: products and convolutions, attention through the kernel of products."""
    for module in objective.frozen:
        module.eval().requires_grad_(False)
    objective.module.train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = objective(objective.module, X, LABELS, progress)
        loss.backward()
    return counter.get_total_flops() / BATCH


def too_much(passes):
    """What the formulas have more than what is computed, for these passes."""
    total = 0
    for each in passes:
        for part in each.part.modules():
            if isinstance(part, nn.Conv2d):
                # a patch embedding is counted on the prefix token as well, and images take no gradient
                token = 2 * part.weight.numel()
                computed = {1: TOKENS - 1, 3: 2 * (TOKENS - 1)}[each.forwards]
                total += token * (each.forwards * TOKENS - computed)
            if hasattr(part, "qkv") and each.forwards == 2:
                # both sides of a product of attention want a gradient, weights or not: three forwards, not two
                total -= 2 * 2 * TOKENS**2 * part.qkv.in_features
    return total


def check(objective, uncounted=0, progress=0.0):
    """The cost is what torch counts, but for too_much, and for what no formula counts."""
    expected = objective.flops_per_image - too_much(objective.passes()) + uncounted
    assert counted(objective, progress) == expected
    assert 0.9 < objective.flops_per_image / expected < 1.11  # how far the formulas are off on models as small as these


def models(meta_blocks=1, kind="linear"):
    """(teacher stages, meta model, student modules): three of each, with two, one and one block."""
    torch.manual_seed(0)
    teacher = tiny("vit", depth=6)
    meta = MetaModel.from_teacher(teacher, 3, meta_blocks, teacher_depths=DEPTHS)
    modules = build_student_modules(student(), [1, 1, 1], WIDTH, kind=kind)
    return split(teacher, DEPTHS), meta, modules


def student():
    values = {"image_size": 32, "patch_size": 8, "width": STUDENT_WIDTH, "depth": 3, "heads": 2, "mlp_dim": 20}
    moe = MoEConfig(num_experts=EXPERTS, k=EXPERTS)
    model = VMoE(VMoEConfig(**values, num_classes=5, moe_blocks="all", moe=moe, pool="mean"))
    nn.init.normal_(model.head.weight)
    return model


def guide(teacher, sources):
    number = len(sources)
    centroids = torch.randn(number, EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0))
    routers = TeacherRouters(sources, [torch.zeros(WIDTH)] * number, list(centroids), [1.0] * number)
    return Guide(routers, teacher, 1.0)


def test_labels():
    check(Classify(student(), TOKENS))
    check(Classify(tiny("vit", depth=3), TOKENS))
    check(Classify(models()[1], TOKENS))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("config", DISTILL.values(), ids=DISTILL)
def test_a_pair_of_modules(config, index):
    for behind_others in {False, index > 0}:
        stages, meta, modules = models()
        predecessors = modules[:index] if behind_others else ()
        check(Distill(modules[index], stages[index], meta, index, config, TOKENS, predecessors=predecessors))
    stages, meta, modules = models()
    sources = {index: 2 * index + 1}
    check(Distill(modules[index], stages[index], meta, index, config, TOKENS, guide=guide(stages[index], sources)))


def test_tied_stitches_are_not_counted():
    stages, meta, modules = models(kind="tied")
    # forward through both, and the gradient back through the one behind the module
    stitch = 2 * TOKENS * WIDTH * STUDENT_WIDTH
    check(Distill(modules[1], stages[1], meta, 1, DISTILL["logits"], TOKENS), uncounted=3 * stitch)


@pytest.mark.parametrize("index", range(2))
def test_the_tokens_of_a_cluster(index):
    stages, meta, modules = models()

    def own(h):
        state = meta.stages[0](h) if index == 0 else h
        return state.sum(-1) > 0

    check(DistillTokens(own, modules[index], stages[index], meta, index, DISTILL["both"], tokens=TOKENS))


@pytest.mark.parametrize("index", range(3))
def test_a_module_that_grows(index):
    stages, meta, _ = models()
    check(Incubate(stages[index], meta, index, TOKENS))


@pytest.mark.parametrize("weights", [{}, {"forced_weight": 0.0}, {"kl_weight": 0.0}], ids=str)
def test_a_meta_model_that_matches(weights):
    stages, meta, _ = models()
    check(MatchTeacher(meta, stages, MetaConfig(**weights), TOKENS))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_module_replacing(kl_weight, monkeypatch):
    """The mean over all draws, each as likely as it is; where every stage is drawn it is that of the meta model."""
    stages, meta, _ = models()
    objective = Theseus(meta, stages, MetaConfig(replace_rate=1.0, kl_weight=kl_weight), TOKENS)
    teacher = sum(forward_flops(stage, TOKENS) for stage in stages) if kl_weight else 0
    ours, theirs = ([forward_flops(stage, TOKENS) for stage in part] for part in (meta.stages, stages))
    assert objective.flops_per_image == 3 * sum(ours) + teacher
    # as above: the patch embedding's gradient for the images, and the scores of frozen blocks behind a trained one
    token = 2 * meta.stages[0].patch_embed.proj.weight.numel()
    scores = 2 * 2 * TOKENS**2 * WIDTH * DEPTHS[0]
    p, mean, more = 0.5, 0.0, 0.0
    for draw in itertools.product((True, False), repeat=3):
        if not any(draw):
            continue
        # none drawn: one of the three is picked
        chance = p**3 + (p**3 / 3 if sum(draw) == 1 else 0.0)
        monkeypatch.setattr(objective, "draw", lambda progress, draw=draw: list(draw))
        mean += chance * counted(objective)
        relayed = sum(not draw[i] and any(draw[:i]) for i in range(3))
        patches = token * (3 * TOKENS - 2 * (TOKENS - 1) if draw[0] else 1) + token * (kl_weight > 0)
        more += chance * (patches - relayed * scores)
    assert mean == pytest.approx(expected_mixed_flops(p, ours, theirs) + teacher - more)
    assert math.isclose(mean, expected_mixed_flops(p, ours, theirs) + teacher, rel_tol=0.05)


@pytest.mark.parametrize("meta_blocks", [0, 1], ids=["teacher as meta", "trained meta"])
@pytest.mark.parametrize("config", DISTILL.values(), ids=DISTILL)
def test_all_modules_at_once(config, meta_blocks):
    stages, meta, modules = models(meta_blocks)
    objective = Together(modules, stages, meta, config, TOKENS, meta_is_teacher=not meta_blocks)
    assert objective.flops_per_image == sum(objective.flops_by_module)
    check(objective)


def test_end_to_end_beside_the_teacher():
    for values in ({"kd_weight": 0.5}, {"border_weight": 1.0}, {"border_weight": 1.0, "kd_weight": 0.5}):
        stages, _, modules = models()
        borders, uncounted = None, 0
        if "border_weight" in values:
            borders = Borders([1, 2], [Project(torch.zeros(WIDTH), torch.eye(WIDTH, STUDENT_WIDTH)) for _ in range(2)])
            uncounted = 2 * 2 * TOKENS * WIDTH * STUDENT_WIDTH  # the teacher's states in the basis of two borders
        teacher = MetaModel(stages)
        config = TrainConfig(epochs=4, border_epochs=4.0, **values)
        guided = guide(teacher, {0: 1, 1: 3, 2: 5})
        for with_guide in (None, guided):
            whole = assemble_student(modules)
            check(LearnFromTeacher(whole, teacher, config, TOKENS, borders=borders, guide=with_guide), uncounted)


def test_a_teacher_that_fades_out_is_counted_for_its_share_of_the_steps():
    """The first quarter of the steps: the mean over a step in it and three behind it."""
    stages, _, modules = models()
    teacher, whole = MetaModel(stages), assemble_student(modules)
    config = TrainConfig(epochs=4, border_epochs=1.0, border_weight=1.0)
    objective = LearnFromTeacher(whole, teacher, config, TOKENS, guide=guide(teacher, {0: 1, 1: 3, 2: 5}))
    mean = (counted(objective) + 3 * counted(objective, progress=0.5)) / 4
    student_alone = Classify(whole, TOKENS)
    more = too_much(student_alone.passes()) + too_much(objective.passes()[1:]) / 4
    assert mean == objective.flops_per_image - more
