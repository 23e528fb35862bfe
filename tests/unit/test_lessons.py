"""What the teacher told is kept and read: to the bit what it would tell anew, and never that of something else."""

import errno
import json
from pathlib import Path

import pytest
import torch
from test_border_targets import LABELS, TOKENS, X
from test_together import CONFIGS, everything

from models.flops import forward_flops
from trainer.config.load import load_recipe
from trainer.config.phases import DistillConfig, RefineConfig
from trainer.data.sampler import train_requests
from trainer.distributed.ranks import Dist
from trainer.loop.lessons import Lessons
from trainer.objectives import Distill

ALONE = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def opened(folder: Path, steps: int = 4, done: int = 0, dtype: torch.dtype = torch.float32) -> Lessons:
    return Lessons(folder, steps, done, dtype, ALONE)


def counted(objective) -> list[int]:
    """Grows by one with every time the objective's frozen side is run."""
    calls = []
    tell = objective.tell
    objective.tell = lambda images: (calls.append(1), tell(images))[1]
    return calls


def learned(objective, told) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients."""
    loss, _ = objective.learn(objective.module, X, LABELS, told, 0.0, {})
    gradients = torch.autograd.grad(loss, list(objective.module.parameters()), allow_unused=True)
    return loss.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("blocks", [0, 1], ids=["teacher as meta", "trained meta"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_read_teaches_as_what_is_told(config, blocks, tmp_path):
    together, pairs, meta, stages, students = everything(config, blocks)
    alone = [Distill(students[i], stages[i], meta, i, config, TOKENS) for i in range(3)]  # without predecessors
    for number, objective in enumerate([together, *pairs, *alone]):
        for part in objective.frozen:
            part.eval()
        calls = counted(objective)
        lessons = opened(tmp_path / str(number))
        expected = learned(objective, lessons.told(objective, X, shown=2, place=0))
        loss, gradients = learned(objective, lessons.told(objective, X, shown=2, place=0))
        assert len(calls) == 1
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(*both) for both in zip(gradients, expected[1], strict=True))
        plain, _ = objective(objective.module, X, LABELS)
        assert torch.equal(plain.detach(), loss)


def test_only_what_the_student_needs_is_kept(tmp_path):
    together, *_ = everything(CONFIGS["border"], 0)
    assert set(together.tell(X)) == {"0/state", "1/state", "2/logits"}
    together, *_ = everything(CONFIGS["logits"], 0)
    lessons = opened(tmp_path)
    told = lessons.told(together, X, shown=0, place=0)
    assert set(told) == {"0/logits", "1/logits", "2/logits"}
    (file,) = lessons.folder.iterdir()
    logits = told["0/logits"]
    assert file.stat().st_size < 2 * logits.numel() * logits.itemsize + 400  # three names of one tensor


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    objective, *_ = everything(CONFIGS["border"], 0)
    calls = counted(objective)
    lessons = opened(tmp_path)
    told = lessons.told(objective, X, shown=0, place=0)
    (file,) = lessons.folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], b"\0" * len(whole), b"x" * len(whole)):
        file.write_bytes(damaged)
        calls.clear()
        again = lessons.told(objective, X, shown=0, place=0)
        assert calls and "is damaged" in caplog.text
        assert all(torch.equal(told[name], again[name]) for name in told)
        assert file.read_bytes() == whole


def test_places_and_sizes_of_micro_batches_are_told_apart(tmp_path):
    objective, *_ = everything(CONFIGS["border"], 0)
    calls = counted(objective)
    lessons = opened(tmp_path)
    for images, shown, place in ((X, 0, 0), (X, 0, 1), (X, 1, 0), (X[:1], 0, 0)):
        lessons.told(objective, images, shown, place)
    assert len(calls) == 4
    assert [lessons.shown(step) for step in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_what_another_beginning_has_left_is_not_read(tmp_path):
    objective, *_ = everything(CONFIGS["border"], 0)
    calls = counted(objective)

    def asked(**where) -> bool:
        calls.clear()
        opened(tmp_path, **where).told(objective, X, shown=0, place=0)
        return bool(calls)

    assert asked() and not asked(done=1)
    assert asked(done=0)  # a training that begins anew may have another recipe
    assert asked(done=1, dtype=torch.bfloat16)
    (tmp_path / "made_of.json").write_text(json.dumps({"teacher": {"sha256": "a"}, "accepted": []}))
    assert asked(done=1)
    (tmp_path / "made_of.json").write_text(json.dumps({"teacher": {"sha256": "a"}, "accepted": ["a line"]}))
    assert not asked(done=1)
    (tmp_path / "made_of.json").write_text(json.dumps({"teacher": {"sha256": "b"}, "accepted": ["a line"]}))
    assert asked(done=1)
    assert len(list((tmp_path / "told").iterdir())) == 1  # what is of no use takes no disk
    opened(tmp_path, done=1).close()
    assert not (tmp_path / "told").exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    objective, *_ = everything(CONFIGS["border"], 0)
    lessons = opened(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot be kept in .*told: No space left on device\. Make room and start"):
        lessons.told(objective, X, shown=0, place=0)


def test_later_epochs_show_the_pictures_of_the_first_ones():
    where = {"seed": 3, "start_step": 0, "micro_batch": 2, "accumulation": 1, "world": 1, "rank": 0, "repeats": 1}

    def shown(cycle: int) -> list[tuple]:
        requests = list(train_requests(5, epoch=0, epochs=5, cycle=cycle, **where))
        return [tuple(map(tuple, request)) for request in requests]

    without, with_two = shown(0), shown(2)
    assert len(set(without)) == 10
    assert with_two == [*without[:4], *without[:4], *without[:2]]
    resumed = list(train_requests(5, epoch=3, epochs=2, cycle=2, **where | {"start_step": 1}))
    assert [tuple(map(tuple, request)) for request in resumed] == with_two[7:]


@pytest.mark.parametrize("section", [DistillConfig, RefineConfig])
def test_the_share_of_the_epochs_in_which_the_teacher_runs(section):
    for stored, epochs, kept, share in ((0, 5, 0, 1.0), (1, 5, 1, 0.2), (4, 5, 4, 0.8), (5, 5, 0, 1.0), (9, 5, 0, 1.0)):
        config = section(epochs=epochs, stored_epochs=stored)
        assert (config.kept_epochs, config.told_share) == (kept, share)
    assert section(epochs=0, stored_epochs=1).kept_epochs == 0


def test_a_number_of_epochs_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"distill\.stored_epochs"):
        load_recipe("recipes/demo.yaml", ["distill.stored_epochs=-1"])


def test_costs_count_the_teacher_in_the_first_epochs_alone():
    objective, _, meta, stages, _ = everything(CONFIGS["both"], 1)
    always = sum(objective.flops_by_module)
    objective, *_ = everything(CONFIGS["both"], 1)
    for each in (objective, *objective.pairs):
        each.told_share = 0.25
    runs = (*stages, *meta.stages[:2], *meta.stages[1:], *meta.stages[2:])  # the teacher, to borders, and suffixes
    frozen = sum(forward_flops(stage, TOKENS) for stage in runs)
    assert sum(objective.flops_by_module) == always - frozen + round(0.25 * frozen)
