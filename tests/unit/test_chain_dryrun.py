"""The dry run of the stages beyond the usual ones: every artifact has a cost, and the costs are what they should be."""

import dataclasses

import pytest

from models.flops import flops, forward_flops
from models.vmoe.model import VMoE
from tests.unit.test_slurm_stages import RECIPE, ROOT
from trainer.chain.settings import STAGES
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.plan.rehearsal import DryRun, carry_out
from trainer.request.stages import chain
from trainer.teaching.students import student_config, student_modules

GROWN = ("teacher.grown=true", "meta.init=scratch", "meta.objective=labels")
TRAINING = ("teacher", "meta", "incubate", "assemble", "cluster", "expert", "distill", "refine", "train")


def dry_run(tmp_path, *overrides):
    """After all checks of the chain; 320 images of 32 px, 3 modules, 4 experts, batches of 16, on two ranks."""
    recipe = load_recipe(RECIPE, list(overrides))
    ranks = dict.fromkeys(STAGES, (2, 1))
    dry = DryRun(
        recipe, read_ds_config(str(ROOT / "ds_configs/cpu_debug.json")), tmp_path / "out", ranks, str(tmp_path)
    )
    found, problems = carry_out(dry.checks({stage.phase for stage in chain(recipe)}))
    assert problems == []
    return dry, found


@pytest.mark.parametrize(
    "overrides",
    [("distill.level=expert", "refine.epochs=2", "train.baselines=[scratch_equal_cost]"),
     (*GROWN, "refine.epochs=1", "refine.order=sequential"), ("train.start=scratch",),
     ("distill.epochs=0", "refine.epochs=1", "refine.order=together")],
)  # fmt: skip
def test_every_artifact_of_the_chain_has_a_cost(tmp_path, overrides):
    dry, _ = dry_run(tmp_path, *overrides)
    made = {name for stage in chain(dry.recipe) if stage.phase in TRAINING for name in stage.artifacts}
    assert made <= dry.costs.keys()


def test_experts_share_the_images_and_a_second_round_costs_its_predecessors(tmp_path):
    dry, found = dry_run(tmp_path, "distill.level=expert", "refine.epochs=5", "expert.epochs=3")
    assert dry.costs["cluster_1"].images == 80 + 320  # expert.cluster_images, then all are assigned
    assert {dry.costs[f"expert_2_{j}"].images for j in range(4)} == {3 * 320 / 4}
    assert any(line.startswith("expert_0: 4 experts, each about 15 steps of 16 images") for line in found)
    assert dry.costs["refine_0"].flops == 0 and dry.costs["refine_1"].images == dry.costs["distill_1"].images == 5 * 320
    # the student's own first module comes in front of what distill_1 costs: one forward, a third of a training step
    before = dry.costs["refine_1"].flops - dry.costs["distill_1"].flops
    assert 0 < before < dry.costs["distill_0"].flops / 3
    tokens, _ = dry_run(
        tmp_path, "distill.level=expert", "expert.epochs=3", "expert.assign=token", "distill.border=mse"
    )
    assert tokens.costs["expert_0_0"].images == 3 * 320  # all images, each with its own tokens
    assert tokens.apart == dry.apart > 4 * 3 * 1000


def test_taught_together_modules_share_the_passes_of_teacher_and_student(tmp_path):
    words = ("meta.blocks_per_module=0", "distill.border=mse", "distill.logit_weight=0", "distill.epochs=0",
             "refine.epochs=8")  # fmt: skip
    together, found = dry_run(tmp_path, *words, "refine.order=together")
    assert any(line.startswith("refine: 160 steps of 16 images") and line.endswith("at once") for line in found)
    names = [f"refine_{i}" for i in range(3)]
    assert {together.costs[name].images for name in names} == {8 * 320}
    spent = sum(together.costs[name].flops for name in names) / (8 * 320)
    run = together.run  # student modules count with their stitches
    student = sum(flops(module, run.tokens).trained for module in student_modules(run))
    assert spent == forward_flops(run.teacher.model, run.tokens) + student
    in_order, _ = dry_run(tmp_path, *words, "refine.order=sequential")
    assert spent < sum(in_order.costs[name].flops for name in names) / (8 * 320)


def test_the_average_and_more_rounds_need_more_room(tmp_path):
    def room(*overrides):
        line = next(line for line in dry_run(tmp_path, *overrides)[1] if line.startswith("disk: at most "))
        return float(line.split()[3])

    plain, average, second = room(), room("train.ema=0.9"), room("refine.epochs=1")
    # per parameter: 12 bytes x 3 checkpoints x 2 rounds + 4 x (3 + 4); 16 bytes; three rounds
    assert average / plain == pytest.approx((16 * 3 * 2 + 28) / (12 * 3 * 2 + 28), rel=0.01)
    assert second / plain == pytest.approx((12 * 3 * 3 + 28) / (12 * 3 * 2 + 28), rel=0.01)


def test_a_given_student_needs_no_teacher(tmp_path):
    made, _ = dry_run(tmp_path, "train.start=scratch")
    config = dataclasses.replace(student_config(made.run), seed=5)
    VMoE(config).save_pretrained(
        tmp_path / "given", preprocessing=made.run.teacher.preprocessing, labels=list("0123456789")
    )
    dry, found = dry_run(tmp_path, f"train.init={tmp_path / 'given'}")
    assert dry.costs["train"].flops == made.costs["train"].flops and "teacher" not in dry.costs
    assert not any(line.startswith(("teacher", "meta", "distill")) for line in found)
    watched, _ = dry_run(tmp_path, f"train.init={tmp_path / 'given'}", "train.kd_weight=0.5")
    assert watched.costs["train"].flops > dry.costs["train"].flops and "teacher" in watched.costs


def test_a_model_that_does_not_fit_into_memory_is_one_line_with_a_next_step():
    def too_large() -> str:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes")

    good, (problem,) = carry_out([("data", lambda: "fine"), ("teacher", too_large)])
    assert good == ["data: fine"]
    assert problem.startswith("teacher: not enough memory") and "40000000000" in problem
    assert "lower the sizes" in problem
