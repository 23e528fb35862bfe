"""Experts as jobs of their own: what may be asked for, what an expert learns from, clusters that several jobs make."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.flops import forward_flops
from trainer import artifacts
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe, to_dict
from trainer.config.phases import DistillConfig
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.objectives.distill import DistillTokens
from trainer.plan import preflight
from trainer.request import graph
from trainer.request.job import Job
from trainer.teaching import clusters, experts
from trainer.teaching.clusters import Clusters
from trainer.teaching.students import student_modules
from trainer.teaching.teachers import planned_teacher

ROOT = Path(__file__).resolve().parents[2]


def recipe(*words):
    return load_recipe(ROOT / "tests/fixtures/tiny.yaml", ["distill.level=expert", "expert.global_batch=16", *words])


def job(phase, module=None, expert=None, *words):
    return Job.checked(recipe(*words), {}, phase, module, Path("x"), "a command", expert)


def run_in(out, *words):
    dist = Dist(0, 1, 0, 1, torch.device("cpu"))
    run = Run(recipe(*words), read_ds_config(ROOT / "ds_configs/cpu_debug.json"), out, dist, "a command")
    return run.with_teacher(planned_teacher(run.recipe.teacher, run.labels))


def test_the_experts_of_a_job():
    assert job("expert", 1, "3").artifacts == ["expert_1_3"] and not job("expert", 1, 3).several
    assert job("expert", 1).artifacts == ["expert_1_0", "expert_1_1", "expert_1_2", "expert_1_3"]
    assert len(job("expert").artifacts) == 8 and job("expert", None, 2).artifacts == ["expert_0_2", "expert_1_2"]
    assert job("expert", 1).several and job("expert", None, 2).several and not job("cluster", 0).several
    assert job("distill", 1, 3) == job("expert", 1, 3) and job("distill", 1, "all").phase == "distill"
    phases = job("all").phases
    assert phases.index("meta") < phases.index("cluster") < phases.index("expert") < phases.index("distill")
    assert not {"cluster", "expert"} & set(job("all", None, None, "distill.level=module").phases)
    assert not {"cluster", "expert"} & set(job("all", None, None, "distill.source=runs/x").phases)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("expert", 0, 4), "--phase expert needs --expert 0..3 or all, got 4"),
        (("distill", 0, "-1"), "--phase distill needs --expert 0..3 or all, got -1"),
        (("expert", 2, 0), "--phase expert needs --module 0..1 or all, got 2"),
        (("cluster", 0, 1), "only expert and distill take an expert"),
        (("expert", 0, 0, "distill.level=module"), "--phase expert needs distill.level=expert; here it is module"),
        (("distill", 0, 0, "distill.level=module"), "--phase expert needs distill.level=expert; here it is module"),
        (("cluster", 0, None, "distill.source=runs/x"), "no meaning with distill.source=runs/x"),
    ],
)
def test_what_a_job_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        job(*arguments)


def test_artifacts_by_expert(tmp_path):
    names = graph.preparation(recipe("student.moe.num_experts=2"))
    assert names == ["meta", "cluster_0", "expert_0_0", "expert_0_1", "cluster_1", "expert_1_0", "expert_1_1",
                     "distill_0", "distill_1"]  # fmt: skip
    assert graph.preparation(recipe("distill.level=module")) == ["meta", "distill_0", "distill_1"]
    with pytest.raises(ValueError, match="run --phase expert --module 1 --expert 3 --out"):
        artifacts.require(tmp_path, "expert_1_3", recipe(), "a test")
    # section expert decides what a module is only where experts are taught
    for level, same in (("module", True), ("expert", False)):
        pair = [graph.defining(to_dict(recipe(f"distill.level={level}", word)), "distill_0")
                for word in ("expert.lr=1", "expert.lr=2")]  # fmt: skip
        assert (pair[0] == pair[1]) == same
    # the result of another expert in its place is refused
    folder, _ = artifacts.open_folder(tmp_path, "expert_1_2", recipe(), {"phase": "expert"})
    artifacts.write_result(folder, {"phase": "expert", "module": 1, "expert": 0})
    with pytest.raises(ValueError, match="expert_1_2 holds the result of expert_1_0"):
        artifacts.require(tmp_path, "expert_1_2", recipe(), "a test")


@pytest.mark.parametrize(
    "words, message",
    [
        (["modules=1"], "but modules is 1, which has none: use two modules or more"),
        (["expert.assign=token"], "distill.border is none, so all experts would be the same"),
        (["student.moe_blocks=last-1"], r"student module 0 \(blocks 0..1\) has no experts with .*moe_blocks=last-1"),
    ],
)
def test_refused_before_anything_trains(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        preflight.check(run_in(tmp_path, *words), ["teacher", "meta", "cluster", "expert", "distill"])


def test_dense_modules_start_alike_and_as_the_student_does(tmp_path):
    run = run_in(tmp_path)
    dense, again = (experts.dense_modules(run)[0].state_dict() for _ in range(2))
    student = student_modules(run)[0].state_dict()
    assert not any(".experts." in name for name in dense)
    for name, value in dense.items():
        assert torch.equal(value, again[name])
        assert ".mlp." in name or torch.equal(value, student[name])


def test_the_share_of_an_expert(tmp_path, caplog):
    run = run_in(tmp_path, "data.limit=40")
    assigned = np.array([0] * 20 + [1] * 17 + [-1, 3, 3])
    found = Clusters(torch.zeros(4), torch.eye(4), assigned, np.where(assigned == 3, 0, assigned), [])
    first = experts.share_of(run, found, 0, 0, 16)
    assert list(first.train.rows) == list(run.data.train.rows[:20]) and len(first.val) == 22 and not caplog.text
    assert experts.share_of(run, found, 0, 2, 16) is None  # a cluster without images
    last = experts.share_of(run, found, 0, 3, 16)  # two images fill a batch of 16, and none is there to measure on
    assert list(last.train.rows) == list(run.data.train.rows[38:40]) * 8 and len(last.val) == 40
    assert "expert 3 of module 0 has 2 training images, fewer than one batch of 16" in caplog.text
    assert "no validation image of its own" in caplog.text
    assert experts.share_of(run, replace(found, train=None, val=None), 0, 3, 16) == run.data  # tokens: all images


def test_tokens_go_to_the_nearest_centroid():
    """By angle, around the mean (0, 5): (3, 6) lies at (3, 1), near the first centroid, and (1, 9) at (1, 4)."""
    found = Clusters(torch.tensor([0.0, 5.0]), torch.eye(2), None, None, [])
    assert found.of_tokens(torch.tensor([[[3.0, 6.0], [1.0, 9.0], [40.0, 6.0]]])).tolist() == [[0, 1, 0]]


class Meta(nn.Module):
    """Two stages that change nothing; what comes after module 0 is read off the first two numbers of a mean token."""

    num_modules = 2
    classifies = True

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Identity()])

    def front(self, x, i):
        return x

    def back(self, h, i):
        return h.mean(1)


@pytest.mark.parametrize("border, expected", [("mse", 1.0 / 4.0), ("cosine", 1.0)])
def test_the_border_target_counts_the_tokens_of_the_cluster(border, expected):
    """Teacher (2, 0), student (2, 1) on the expert's token: |(0, 1)|^2 / |(2, 0)|^2 = 1/4; a right angle for cosine."""
    teacher, student = nn.Identity(), nn.Identity()
    states = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]])
    given = torch.tensor([[[2.0, 1.0], [0.0, 7.0]]]) if border == "mse" else torch.tensor([[[0.0, 1.0], [0.0, 7.0]]])
    config = DistillConfig(border=border)

    def objective(own):
        return DistillTokens(lambda h: torch.tensor([own]), student, teacher, Meta(), 0, config, tokens=2)

    assert objective([True, False]).border_error(states, given, states).item() == pytest.approx(expected)
    nothing = objective([False, False]).border_error(states, given.requires_grad_(), states)
    assert nothing == 0 and nothing.requires_grad
    _, parts = objective([True, False])(lambda h, out: given, states, torch.tensor([0]))
    assert parts["border"].item() == pytest.approx(expected) and {"label", "distill"} <= parts.keys()
    stage = forward_flops(Meta().stages[0], 2)  # of module 0 the state behind the meta model's stage is clustered
    assert objective([True, True]).flops_per_image >= stage > 0


def test_of_jobs_that_make_the_clusters_at_once_the_first_wins(tmp_path):
    for number in (1, 2):
        folder = tmp_path / f".cluster_0.{number}" / "cluster_0"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(str(number))
        clusters._put_in_place(folder.parent, tmp_path, "cluster_0")
    assert [path.name for path in tmp_path.iterdir()] == ["cluster_0"]
    assert (tmp_path / "cluster_0/result.json").read_text() == "1"
    (tmp_path / "cluster_0/result.json").unlink()
    with pytest.raises(ValueError, match=r"cluster_0 has no result\.json, though it was put there as a whole"):
        clusters.ensure(run_in(tmp_path), 0, "a test")
