"""Meta models, distilled modules and V-MoEs that somebody else trained: what is taken, and what is refused and why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from models.preprocessing import Preprocessing
from models.teacher.load import new_teacher, save_teacher
from models.vmoe.model import VMoE
from tests.hub_server import HubServer
from trainer import artifacts, disk
from trainer.config.ds_config import Settings
from trainer.config.load import build
from trainer.config.recipe import Recipe
from trainer.context import Run, Trained, save_weights
from trainer.distributed.ranks import Dist
from trainer.loop.fit import Outcome
from trainer.teaching import reuse
from trainer.teaching.meta import new_meta, trained_meta
from trainer.teaching.students import student_config, student_modules

STUDENT = {"patch_size": 4, "width": 8, "depth": 3, "heads": 2, "mlp_dim": 12, "moe": {"num_experts": 2, "k": 1}}
SETTINGS = Settings(config={}, micro_batch=4, accumulation=1, global_batch=4, ep_size=1, bf16=False, clip=0.0,
                    activation_checkpointing=False)  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Directories of two teachers of the same sizes, for the ten digits."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        images = Preprocessing(8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
        model = new_teacher(image_size=8, patch_size=4, width=16, depth=5, heads=2, mlp_dim=24,
                            labels=[str(i) for i in range(10)], preprocessing=images)  # fmt: skip
        save_teacher(model, folder / name, images)
    return folder


def new_run(out: Path, source: Path, **sections) -> Run:
    values = {"modules": 2, "data": {"limit": 20}, "teacher": {"source": str(source)}, "student": STUDENT}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    dist = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
    return Run(build(Recipe, values), {}, out, dist, "a test")


def fill(weights: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that nobody gets by starting anew."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in weights.state_dict().items()}


@pytest.fixture(scope="module")
def donor(teachers, tmp_path_factory):
    """The folder of a run whose meta model and modules are finished, as the phases leave it."""
    out = tmp_path_factory.mktemp("donor") / "run"
    run = new_run(out, teachers / "one")
    outcome = Outcome({"accuracy": 0.5, "loss": 1.0}, seconds=7.0, steps=3, images_seen=12)
    made_with = {"teacher": run.teacher_record}
    for name, module in (("meta", new_meta(run)), *((i, module) for i, module in enumerate(student_modules(run)))):
        phase, number = ("meta", None) if name == "meta" else ("distill", name)
        folder, _ = run.open(phase, number)
        save_weights(folder / "model.safetensors", fill(module, len(str(folder)) + (number or 0)))
        metrics = {"accuracy": 0.5, "hybrid_accuracy/0": 0.25, "hybrid_accuracy/1": 0.75}
        trained = Trained(outcome, {}, epochs=1, flops_per_image=5)
        run.finish(folder, phase, number, trained, SETTINGS, metrics=metrics, made_with=made_with)
        if phase == "meta":
            made_with = made_with | {"meta": disk.file_record(folder / "model.safetensors")}
    return out


@pytest.fixture
def copy(donor, tmp_path):
    """A copy of the donor that a test may damage."""
    return shutil.copytree(donor, tmp_path / "copy")


def take(run: Run) -> None:
    """Phases meta and distill with their sources."""
    reuse.check_meta(run)
    reuse.check_modules(run)
    reuse.take_meta(run, run.open("meta")[0])
    for i in range(run.recipe.modules):
        reuse.take_module(run, i, run.open("distill", i)[0])


def test_a_pair_is_taken_and_becomes_this_runs_artifacts(donor, teachers, tmp_path):
    moved = shutil.copytree(teachers / "one", tmp_path / "moved")  # the same weights in another place
    source = {"source": str(donor)}
    run = new_run(tmp_path / "run", moved, meta=source | {"epochs": 3}, distill=source)
    take(run)
    for name in ("meta", "distill_0", "distill_1"):
        folder, result = artifacts.require(run.out, name, run.recipe, "a test")
        there = json.loads((donor / name / "result.json").read_text())
        assert result["source"] == str(donor / name) and result["files"]["model.safetensors"]
        assert {key: result[key] for key in ("metrics", "flops", "seconds", "teacher")} == {
            key: there[key] for key in ("metrics", "flops", "seconds", "teacher")
        }
        taken = load_file(folder / "model.safetensors")
        given = load_file(donor / name / "model.safetensors")
        assert taken.keys() == given.keys() and all(torch.equal(taken[key], given[key]) for key in given)
        assert yaml.safe_load((folder / "config.yaml").read_text())["recipe"]["meta"]["source"] == str(donor)
    meta, result = trained_meta(run, "a test")
    assert torch.equal(meta.stages[0].cls_token, load_file(donor / "meta" / "model.safetensors")["stages.0.cls_token"])
    assert result["metrics"]["hybrid_accuracy/1"] == 0.75


def test_another_student_takes_the_meta_model_only(donor, teachers, tmp_path):
    run = new_run(tmp_path / "run", teachers / "one", meta={"source": str(donor)}, student={"width": 12})
    reuse.take_meta(run, run.open("meta")[0])
    assert trained_meta(run, "a test")[1]["source"] == str(donor / "meta")


def test_a_pushed_pair_is_taken_from_the_hub(donor, teachers, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        commit = hub.seed("alice/pair", donor)
        source = {"source": "alice/pair@main"}
        run = new_run(tmp_path / "run", teachers / "one", meta=source, distill=source)
        take(run)
        _, result = artifacts.require(run.out, "distill_1", run.recipe, "a test")
        assert result["source"] == f"alice/pair@{commit}/distill_1"
        with pytest.raises(ValueError, match=r"meta/config\.yaml of 'alice/pair' at revision 'v9'"):
            reuse.check_meta(new_run(tmp_path / "x", teachers / "one", meta={"source": "alice/pair@v9"}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modules": 3}, r"/meta does not fit this recipe: modules is 2 there, 3 here"),
        ({"teacher": {"depths": [2, 3]}}, r"/meta .* teacher\.depths is \[3, 2\] there, \[2, 3\] here"),
        ({"meta": {"blocks_per_module": 2}}, r"/meta .* meta\.blocks_per_module is 1 there, 2 here"),
        ({"student": {"width": 12}}, r"distill\.source .*/distill_0 has width 8, but 12 is asked for"),
        ({"student": {"moe": {"num_experts": 2, "k": 2}}}, r"/distill_0 has moe\.k 1, but 2 is asked for"),
        ({"student": {"depths": [1, 2]}}, r"/distill_0 .* student\.depths is \[2, 1\] there, \[1, 2\] here"),
    ],
)
def test_what_does_not_fit_names_both_sides(donor, teachers, tmp_path, sections, message):
    sections = {name: {} for name in ("meta", "distill")} | sections
    for name in ("meta", "distill"):
        sections[name] = {"source": str(donor)} | sections[name]
    with pytest.raises(ValueError, match=message):
        run = new_run(tmp_path / "run", teachers / "one", **sections)
        reuse.check_meta(run)
        reuse.check_modules(run)


def test_another_teacher_is_named_with_its_weights(donor, teachers, tmp_path):
    run = new_run(tmp_path / "run", teachers / "other", meta={"source": str(donor)})
    message = r"another teacher: .*/one \(5 blocks of width 16, weights \w{12}\) there, .*/other \(5 blocks .*\) here"
    with pytest.raises(ValueError, match=message):
        reuse.take_meta(run, run.open("meta")[0])


def test_modules_of_another_meta_model_are_refused(donor, teachers, tmp_path):
    run = new_run(tmp_path / "run", teachers / "one", distill={"source": str(donor)})
    meta, _ = run.open("meta")
    save_weights(meta / "model.safetensors", fill(new_meta(run), 99))
    artifacts.write_result(meta, {"phase": "meta"})
    with pytest.raises(ValueError, match=r"the meta model .*meta\.source\) is \w{64} there, \w{64} here"):
        reuse.take_module(run, 0, run.open("distill", 0)[0])


def without(folder: Path, file: str) -> None:
    (folder / file).unlink()


def flipped(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)


def not_finite(folder: Path, file: str) -> None:
    state = load_file(folder / file)
    state["stages.0.cls_token"][..., 0] = torch.nan
    save_file(state, folder / file)


def other_phase(folder: Path, file: str) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | {"phase": "train"}))


def text(content: str):
    return lambda folder, file: (folder / file).write_text(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("result.json", without, "has no result.json: expected a finished meta of a run"),
        ("config.yaml", without, "has no config.yaml"),
        ("model.safetensors", without, "has no model.safetensors"),
        ("model.safetensors", flipped, r"model\.safetensors is truncated or altered \(SHA-256"),
        ("model.safetensors", text("short"), r"model\.safetensors is truncated"),
        ("model.safetensors", not_finite, r"1 values in stages\.0\.cls_token that are NaN"),
        ("result.json", text("{"), "result.json of .* is truncated or altered"),
        ("result.json", text('{"phase": "meta", "module": null, "metrics": {}}'), "truncated or altered"),
        ("result.json", other_phase, "is not that of meta"),
        ("config.yaml", text("recipe: {modules: [}"), "holds no recipe this version reads"),
        ("config.yaml", text("recipe: {modulez: 2}"), "holds no recipe this version reads: unknown key modulez"),
        ("config.yaml", text("recipe: !!python/object/apply:os.abort []"), "holds no recipe this version reads"),
    ],
)
def test_damaged_sources_are_refused_and_leave_nothing(copy, teachers, tmp_path, file, damage, message):
    damage(copy / "meta", file)
    run = new_run(tmp_path / "run", teachers / "one", meta={"source": str(copy)})
    folder, _ = run.open("meta")
    with pytest.raises(ValueError, match=message):
        reuse.take_meta(run, folder)
    assert {path.name for path in folder.iterdir()} <= {"config.yaml", "made_of.json", "writer.json"}


def test_training_starts_from_a_saved_model(teachers, tmp_path):
    run = new_run(tmp_path / "run", teachers / "one", train={"init": str(tmp_path / "model"), "drop_path": 0.1})
    saved = VMoE(student_config(run))
    saved.load_state_dict(fill(saved, 3))
    images = Preprocessing(8, mean=(0.1,) * 3, std=(0.9,) * 3)
    saved.bfloat16().save_pretrained(tmp_path / "model", preprocessing=images)
    student = reuse.initial_student(run, ep_size=1)
    assert student.training and student.preprocessing == images and student.source == str(tmp_path / "model")
    assert student.config.drop_path_rate == 0.1
    for name, value in saved.state_dict().items():
        assert torch.equal(student.state_dict()[name], value.float())
    wrong = new_run(tmp_path / "run", teachers / "one", train={"init": str(tmp_path / "model")}, student={"heads": 4})
    with pytest.raises(ValueError, match=r"train\.init .*/model has heads 2, but 4 is asked for"):
        reuse.check_student(wrong)
    saved.preprocessing = None
    VMoE(saved.config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="does not say what its images must look like"):
        reuse.check_student(run)
