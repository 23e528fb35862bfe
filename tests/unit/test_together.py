"""All modules taught in one step: the losses, gradients and costs of the pairs, each on its own."""

import copy

import pytest
import torch
from test_border_targets import LABELS, TOKENS, X, vmoe
from vit_families import scramble, tiny

from models.flops import flops, forward_flops
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import build_student_modules
from trainer.config.phases import DistillConfig
from trainer.objectives import Distill, Together

CONFIGS = {
    "border": DistillConfig(border="mse", logit_weight=0.0),
    "logits": DistillConfig(border="none", alpha=0.25, tau=2.0),
    "both": DistillConfig(border="cosine", alpha=0.5),
    "labels": DistillConfig(border="none", alpha=0.0),
}


def everything(config: DistillConfig, blocks: int):
    """(objective, pairs, meta, stages, students) of three modules of a six-block teacher."""
    torch.manual_seed(0)
    teacher = tiny("vit", depth=6).eval()
    stages = split(teacher, [2, 2, 2])
    meta = MetaModel.from_teacher(teacher, 3, blocks, teacher_depths=[2, 2, 2]).eval()
    for part in meta.stages if blocks else ():
        scramble(part)  # else it is the teacher in part
    students = build_student_modules(vmoe(), [1, 1, 1], teacher.embed_dim)
    pairs = [Distill(students[i], stages[i], meta, i, config, TOKENS, predecessors=students[:i]) for i in range(3)]
    objective = Together(students, stages, meta, config, TOKENS, meta_is_teacher=not blocks)
    return objective, pairs, meta, stages, students


@pytest.mark.parametrize("blocks", [0, 1], ids=["teacher as meta", "trained meta"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_module_gets_the_loss_and_the_gradient_of_its_own_job(config, blocks):
    objective, pairs, *_, students = everything(config, blocks)
    alone, wanted = copy.deepcopy((pairs, students)), {}
    expected = 0.0
    for i, pair in enumerate(alone[0]):
        loss, parts = pair(pair.module, X, LABELS)
        gradients = torch.autograd.grad(loss, list(pair.module.parameters()), allow_unused=True)
        wanted |= {f"{name}/{i}": float(value) for name, value in parts.items()} | {i: gradients}
        expected += float(loss.detach())
    loss, parts = objective(objective.module, X, LABELS)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(
        {name: value for name, value in wanted.items() if isinstance(name, str)}, rel=1e-4, abs=1e-7
    )
    loss.backward()
    for i, student in enumerate(students):
        for own, gradient in zip(student.parameters(), wanted[i]):
            found = torch.zeros(()) if own.grad is None else own.grad
            torch.testing.assert_close(found, torch.zeros_like(found) if gradient is None else gradient)
    assert all(p.grad is None for stage in objective.frozen[1:] for p in stage.parameters())


def test_the_cost_is_one_pass_of_the_teacher_and_a_training_step_of_the_student():
    objective, _, meta, stages, students = everything(CONFIGS["border"], 0)
    teacher = sum(forward_flops(stage, TOKENS) for stage in stages)
    student = sum(flops(module, TOKENS).trained for module in students)
    assert sum(objective.flops_by_module) == teacher + student
    backs = [sum(flops(stage, TOKENS).relaying for stage in stages[i + 1 :]) for i in range(3)]
    assert sum(everything(CONFIGS["both"], 0)[0].flops_by_module) == teacher + student + sum(backs)
    assert sum(everything(CONFIGS["labels"], 0)[0].flops_by_module) == student + sum(backs)
    objective, _, meta, *_ = everything(CONFIGS["border"], 1)
    front = sum(forward_flops(stage, TOKENS) for stage in meta.stages[:2])
    assert sum(objective.flops_by_module) == teacher + front + student


@torch.no_grad()
def test_the_teacher_runs_once_and_only_as_far_as_it_is_asked():
    for config, blocks, runs in (("both", 0, [1, 1, 1]), ("border", 1, [1, 1, 1]), ("labels", 0, [0, 0, 0])):
        objective, _, _, stages, _ = everything(CONFIGS[config], blocks)
        counts = [0, 0, 0]
        for i, stage in enumerate(stages):
            stage.register_forward_pre_hook(lambda *_, i=i, counts=counts: counts.__setitem__(i, counts[i] + 1))
        objective(objective.module, X, LABELS)
        assert counts == runs
    border_alone = DistillConfig(border="mse", logit_weight=0.0, alpha=0.0)  # the last module has labels only
    assert everything(border_alone, 0)[0].teacher_runs == 2


@torch.no_grad()
def test_what_is_evaluated_is_the_chain_of_students():
    objective, pairs, *_ = everything(CONFIGS["border"], 0)
    for part in objective.frozen:
        part.eval()
    objective.module.eval()
    torch.testing.assert_close(objective.predict(X), pairs[-1].predict(X))
