"""What a grown teacher needs around its training: recipe, phases, what defines it, the way back into a folder."""

from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from vit_families import images, tiny

from models.modules.stages import set_drop_path
from models.teacher.convert import back_to_transformers, to_timm
from models.teacher.load import load_teacher, new_teacher, save_teacher
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe, to_dict
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.plan.preflight import check
from trainer.request.graph import defining, own_teacher
from trainer.request.job import Job
from trainer.teaching.teachers import trained_preprocessing, with_seedling

ROOT = Path(__file__).resolve().parents[2]


def recipe(*words):
    return load_recipe(ROOT / "tests/fixtures/tiny_grown.yaml", words)


def run(out, *words):
    dist = Dist(0, 1, 0, 1, torch.device("cpu"))
    return Run(recipe(*words), read_ds_config(ROOT / "ds_configs/cpu_debug.json"), out, dist, "a command")


def test_the_phases_of_a_grown_teacher():
    def phases(recipe):
        return Job.checked(recipe, {}, "all", None, Path("out"), "").phases

    assert phases(recipe()) == ["meta", "incubate", "assemble", "distill", "train", "evaluate"]
    plain = load_recipe(ROOT / "tests/fixtures/tiny.yaml")
    assert phases(plain) == ["teacher", "meta", "distill", "train", "evaluate"]
    for phase, wrong in (("teacher", recipe()), ("incubate", plain), ("assemble", plain)):
        with pytest.raises(ValueError, match=f"--phase {phase} has no meaning with teacher.grown"):
            Job.checked(wrong, {}, phase, None, Path("out"), "")
    job = Job.checked(recipe(), {}, "incubate", "1", Path("out"), "")
    assert job.artifacts == ["incubate_1"] and not job.several
    assert (own_teacher(recipe()), own_teacher(plain)) == (("assemble",), ("teacher",))


def test_the_published_schedule_is_the_default():
    r = load_recipe(ROOT / "tests/fixtures/tiny.yaml")
    assert (r.incubate.epochs, r.incubate.warmup_epochs, r.incubate.drop_path, r.incubate.clip) == (100, 20, 0.1, None)
    assert (r.assemble.epochs, r.assemble.warmup_epochs, r.assemble.drop_path, r.assemble.clip) == (100, 0, 0.1, 1.0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["meta.init=teacher"], "meta.init is 'teacher', expected 'scratch' with teacher.grown=true"),
        (["meta.objective=matching"], "meta.objective is 'matching', expected 'labels'"),
        (["teacher.source=a/b"], "teacher.source is 'a/b', expected ''"),
        (["meta.source=a/b"], "meta.source is 'a/b', expected ''"),
    ],
)
def test_what_cannot_be_before_there_is_a_teacher(words, message):
    with pytest.raises(ValueError, match=message):
        recipe(*words)


def test_what_comes_after_the_teacher_is_defined_by_how_it_grew():
    def same(name, *words):
        return defining(to_dict(recipe()), name) == defining(to_dict(recipe(*words)), name)

    assert same("meta", "incubate.lr=1", "assemble.lr=1")
    assert same("incubate_0", "assemble.lr=1") and not same("incubate_0", "incubate.lr=1")
    for name in ("assemble", "distill_1", "train", "train_scratch", "push"):
        assert not same(name, "incubate.lr=1") and not same(name, "assemble.lr=1")
    assert same("assemble", "distill.lr=1")
    plain = load_recipe(ROOT / "tests/fixtures/tiny.yaml")
    assert "assemble" not in defining(to_dict(plain), "distill_0")


def test_every_job_starts_the_same_teacher(tmp_path):
    first = with_seedling(run(tmp_path)).teacher
    torch.manual_seed(5)
    again, other = with_seedling(run(tmp_path)).teacher, with_seedling(run(tmp_path, "seed=1")).teacher
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))
    assert not torch.equal(first.model.pos_embed, other.model.pos_embed)
    assert not any(p.requires_grad for p in first.model.parameters())


def test_preflight_plans_the_teacher_until_it_is_grown(tmp_path):
    check(run(tmp_path), ["meta", "incubate", "assemble", "distill", "train"])
    with pytest.raises(ValueError, match=r"needs .*assemble, which does not exist: run --phase assemble"):
        check(run(tmp_path), ["distill"])
    with pytest.raises(ValueError, match="blocks_per_module 3 must lie"):
        check(run(tmp_path, "meta.blocks_per_module=3"), ["incubate"])


@torch.no_grad()
def test_weights_go_back_into_the_transformers_model(tmp_path):
    t = recipe().teacher
    pre = trained_preprocessing(t)

    def fresh():
        sizes = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 4, "heads": 2, "mlp_dim": 64}
        return new_teacher(**sizes, labels=["a", "b"], preprocessing=pre)

    model, target = to_timm(fresh().classifier), fresh()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    back_to_transformers(model, target.classifier)
    save_teacher(target, tmp_path, pre)
    loaded = load_teacher(str(tmp_path)).model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_drop_path_rises_over_the_blocks():
    model = tiny("vit", depth=5)
    names = list(model.state_dict())
    set_drop_path(model, 0.2)
    rates = []
    for block in model.blocks:
        parts = (block.drop_path1, block.drop_path2)
        rates.append([part.drop_prob for part in parts if isinstance(part, DropPath)])
    assert rates == [[], *([pytest.approx(r)] * 2 for r in (0.05, 0.1, 0.15, 0.2))]
    assert list(model.state_dict()) == names
    set_drop_path(model, 0.0)
    assert not any(isinstance(part, DropPath) for part in model.modules())
    assert isinstance(model.blocks[1].drop_path2, nn.Identity) and model(images(1)).isfinite().all()
