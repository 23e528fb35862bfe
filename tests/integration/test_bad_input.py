"""Bad input: one clear line, an exit code that is not 0, before any training, and nothing of what is there changes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launch import TINY, TINY_RECIPE

LEARNED = ("teacher", "meta", "distill_0", "distill_1")


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def refused(warm, out: Path, arguments: list, *expected: str, code: int = 2, **options) -> str:
    """Run, and check what every refusal has in common; returns the line of the error."""
    # a folder with nothing but these is what an earlier refusal left
    left = {"config.yaml", "made_of.json"}
    before = {name: digest for name, digest in files(out).items()
              if {path.name for path in (out / name).parent.iterdir()} - left}  # fmt: skip
    finished = warm.run([*arguments, "--out", out], **options)
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert finished.code == code and len(errors) == 1 and "Traceback" not in finished.output, finished.output
    for text in expected:
        assert text in errors[0], errors[0]
    after = files(out)
    assert {name: after.get(name) for name in before} == before
    new = {Path(name).name for name in after.keys() - before.keys()}
    assert new <= left, f"trained before it was refused: {new}"
    return errors[0]


@pytest.fixture
def out(chain, tmp_path) -> Path:
    """A run whose modules are distilled and whose student is not trained yet."""
    for phase in LEARNED:
        shutil.copytree(chain[0] / phase, tmp_path / "out" / phase)
    return tmp_path / "out"


def unfinished(out: Path, phase: str) -> Path:
    """Take away the end of a phase, so that its checkpoints count again."""
    for name in ("result.json", "model.safetensors"):
        (out / phase / name).unlink()
    return out / phase


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--phase", "all", "train.epoch=3"], ["unknown key train.epoch", "train.epochs"]),
        (["--phase", "all", "student.moe.num_expert=3"], ["student.moe.num_expert", "student.moe.num_experts"]),
        (["--phase", "all", "ds.zero_optimisation.stage=2"], ["zero_optimisation", "Did you mean zero_optimization"]),
        (["--phase", "all", "--modul", "1"], ["unknown flag --modul", "--module"]),
        (["--phase", "distill", "--module", "2"], ["needs --module 0..1 or all, got 2"]),
        (["--phase", "distill", "--module", "-1"], ["--module"]),
        (["--phase", "train", "--module", "1"], ["--module 1 has no meaning for --phase train"]),
        (["--phase", "all", "teacher.depths=[4]"], ["teacher.depths", "modules is 2"]),
        (["--phase", "all", "teacher.depths=[1,2]"], ["teacher", "[1, 2]", "4"]),
        (["--phase", "all", "student.depths=[3,2]"], ["student", "[3, 2]", "4"]),
        (["--phase", "all", "modules=5"], ["4 blocks", "5 modules"]),
        (["--phase", "all", "ds.trainer.ep_size=2"], ["ep_size", "is 2", "does not divide 1 ranks"]),
        (["--phase", "all", "ds.train_batch_size=32"], ["teacher.global_batch is 16", '"train_batch_size" is 32']),
        (["--phase", "all", "train.global_batch=128"], ["100", "128"]),
        (["--phase", "all", "student.patch_size=16"], ["patch"]),
        (["--phase", "teacher", "teacher.source=somewhere"], ["there is no teacher to train"]),
        (["--phase", "all", "ds.zero_optimization.overlap_com=true"], ["overlap_com", "Did you mean overlap_comm"]),
        (["--phase", "all", "ds.zero_optimization.reduce_bucket_size=-1"], ["bucket_size", "is -1", "whole number"]),
        (["--phase", "push"], ["hub.repo"]),
    ],
)  # fmt: skip
def test_refused_before_anything_is_made(warm, tmp_path, arguments, expected):
    out = tmp_path / "out"
    refused(warm, out, [*TINY, *arguments], *expected)
    assert not files(out)


def test_experts_that_do_not_divide(warm, tmp_path):
    """On two ranks: both end by themselves and the error is said once."""
    arguments = [*TINY, "--phase", "all", "ds.trainer.ep_size=2", "student.moe.num_experts=3"]
    refused(warm, tmp_path / "out", arguments, "ep_size", "does not divide 3 experts", ranks=2)
    assert not files(tmp_path / "out")


def test_unknown_key_in_a_recipe_file(warm, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {TINY_RECIPE}\nteacher: {{widht: 3}}\n")
    arguments = [*TINY[:2], "--recipe", recipe, "--phase", "all"]
    refused(warm, tmp_path / "out", arguments, "unknown key teacher.widht", "teacher.width")


def test_artifact_of_an_earlier_phase(warm, out):
    """Missing, unfinished, of another recipe, truncated, altered."""
    distill, train = [*TINY, "--phase", "distill", "--module", "0"], [*TINY, "--phase", "train"]
    refused(
        warm, out, [*train, "distill.epochs=1"], str(out / "distill_0"), "another recipe", "distill.epochs: 2", "1 "
    )

    weights = out / "distill_1/model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        weights.write_bytes(damaged)
        refused(warm, out, train, str(weights), "truncated or altered", "--phase distill --module 1")
    weights.write_bytes(whole)

    (out / "distill_1/result.json").unlink()
    refused(warm, out, train, str(out / "distill_1"), "unfinished", "--phase distill --module 1")
    shutil.rmtree(out / "meta")
    shutil.rmtree(out / "distill_0")
    refused(warm, out, distill, str(out / "meta"), "does not exist", "--phase meta")
    shutil.rmtree(out / "teacher")
    refused(warm, out, [*TINY, "--phase", "meta"], str(out / "teacher"), "does not exist", "--phase teacher")


def test_output_folder_of_another_run(warm, out):
    """Of a finished phase, and of one in the middle of its training."""
    difference = "teacher.lr: 0.06 there, 0.1 here): use another --out"
    refused(warm, out, [*TINY, "--phase", "all", "teacher.lr=0.1"], str(out / "teacher"), difference)
    refused(warm, out, [*TINY, "--phase", "teacher", "teacher.lr=0.1"], str(out / "teacher"), difference)
    unfinished(out, "distill_0")
    distill = [*TINY, "--phase", "distill", "--module", "0"]
    refused(warm, out, [*distill, "distill.tau=2"], str(out / "distill_0"), "belongs to another run", "distill.tau")


def test_a_corrected_command_may_use_the_same_folder(warm, tmp_path):
    """What was refused before its first step has left nothing that refuses the corrected command."""
    teacher = [*TINY, "--phase", "teacher", "teacher.epochs=1"]
    wrong = ["data.source=folder", f"data.path={tmp_path / 'nowhere'}"]
    refused(warm, tmp_path / "out", [*teacher, *wrong], "nowhere", "is not a folder")
    finished = warm.run([*teacher, "--out", tmp_path / "out"])
    assert finished.code == 0, finished.output


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        data[:middle] if how == "truncated" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    )


@pytest.mark.parametrize(("name", "how"), [("rank_00001.safetensors", "altered"), ("manifest.json", "truncated")])
def test_damaged_checkpoint(warm, chain, out, name, how):
    """It is named in one loud line, and the one before it leads to the same weights."""
    root = unfinished(out, "distill_0") / "checkpoints"
    file = root / "step_00000012" / name
    damage(file, how)
    finished = warm.run([*TINY, "--phase", "distill", "--module", "0", "--out", out], ranks=2)
    assert finished.code == 0 and "resumed after step 9" in finished.output, finished.output
    (line,) = [line for line in finished.output.splitlines() if "DAMAGED" in line]
    assert str(file) in line and f"GOING ON FROM {root / 'step_00000009'}" in line
    assert files(out / "distill_0")["model.safetensors"] == files(chain[0] / "distill_0")["model.safetensors"]


def test_every_checkpoint_damaged(warm, out):
    """All are named with the way out, and nothing is deleted."""
    root = unfinished(out, "distill_0") / "checkpoints"
    damaged = [root / "step_00000012/rank_00000.safetensors", root / "step_00000009/rank_00001.json"]
    for file in damaged:
        damage(file, "altered")
    arguments = [*TINY, "--phase", "distill", "--module", "0"]
    refused(warm, out, arguments, *map(str, damaged), "missing, truncated or altered", f"delete {root}", ranks=2)


def test_going_back_to_the_checkpoint_before(warm, chain, out):
    """By hand, in latest.json: the same weights at the end."""
    root = unfinished(out, "distill_0") / "checkpoints"
    (root / "latest.json").write_text(json.dumps({"tag": "step_00000009"}))
    arguments = [*TINY, "--phase", "distill", "--module", "0", "--out", out, "run.keep=1"]
    finished = warm.run(arguments, ranks=2)
    assert finished.code == 0, finished.output
    assert "resumed after step 9" in finished.output
    expected = files(chain[0] / "distill_0")["model.safetensors"]
    assert files(out / "distill_0")["model.safetensors"] == expected
    assert [path.name for path in root.glob("step_*")] == ["step_00000012"]


@pytest.mark.parametrize("full", [{"free_bytes": 1000}, {"file_limit": 60_000}], ids=["seen before", "while writing"])
def test_disk_full_while_saving(warm, chain, out, full):
    """The checkpoint before stays in force, and with room again the run ends as if nothing had been."""
    folder = unfinished(out, "distill_0")
    root = folder / "checkpoints"
    shutil.rmtree(root / "step_00000012")
    (root / "latest.json").write_text(json.dumps({"tag": "step_00000009"}))
    arguments = [*TINY, "--phase", "distill", "--module", "0", "--out", out]
    before = files(root)
    finished = warm.run(arguments, ranks=2, **full)
    errors = [line for line in finished.output.splitlines() if "error: " in line]
    assert finished.code == 1 and str(root) in errors[0], finished.output
    assert "previous checkpoint is untouched" in errors[0] and "Traceback" not in finished.output, finished.output
    assert {name: digest for name, digest in files(root).items() if name in before} == before

    finished = warm.run(arguments, ranks=2)
    assert finished.code == 0 and "resumed after step 9" in finished.output, finished.output
    assert files(folder)["model.safetensors"] == files(chain[0] / "distill_0")["model.safetensors"]


def test_loss_that_is_not_finite(warm, out):
    """Both ranks stop by themselves and name the step; no checkpoint holds the damage."""
    wild = [
        "train.optimizer=sgd",
        "train.lr=1000",
        "train.warmup_epochs=0",
        "train.clip=0",
        "run.save_every=1000",
        "run.save_epochs=9",
    ]
    finished = warm.run([*TINY, "--phase", "train", "--out", out, *wild], ranks=2)
    errors = [line for line in finished.output.splitlines() if "error: " in line]
    assert finished.code == 1 and "Traceback" not in finished.output, finished.output
    assert len(errors) == 1 and "not finite at step " in errors[0]  # a few steps after the first throws them away
    assert not (out / "train/checkpoints").exists()
    assert not (out / "train/result.json").exists()


def save_teacher_of(out: Path, classes: int) -> Path:
    """The chain's own teacher under another number of labels."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = out.parent / "teacher_directory"
    shutil.copytree(
        out / "teacher", folder, ignore=shutil.ignore_patterns("checkpoints", "*.yaml", "*.jsonl", "result.json")
    )
    config = json.loads((folder / "config.json").read_text())
    names = {str(i): f"class {i}" for i in range(classes)}
    config |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    state = {n: torch.zeros(classes, *t.shape[1:]) if n.startswith("classifier.") else t for n, t in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_teacher_directory(warm, out):
    """A head with another number of classes, an unsupported family, no directory at all."""
    folder = save_teacher_of(out, 7)
    arguments = [*TINY, "--phase", "all", f"teacher.source={folder}", "teacher.head=own"]
    fresh = out.parent / "fresh"
    refused(warm, fresh, arguments, str(folder), "has 7 classes", "has 10")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "beit", "architectures": ["BeitModel"]}))
    refused(warm, fresh, arguments, str(folder), "beit")
    refused(warm, fresh, [*TINY, "--phase", "all", f"teacher.source={folder / 'none'}"], "none", "not a directory")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """32 + 16 pictures of two classes; the fourth training picture of class b cannot be read."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for name in ("a", "b"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (tmp_path / "pictures/train/b/03.png").write_bytes(b"not a picture")
    return tmp_path / "pictures"


def test_unreadable_picture(warm, pictures, tmp_path):
    """Named; skipped only when asked, and then counted in the metrics."""
    teacher = [*TINY, "--phase", "teacher", "data.source=folder", f"data.path={pictures}"]
    before = files(pictures)
    finished = warm.run([*teacher, "--out", tmp_path / "out"])
    errors = [line for line in finished.output.splitlines() if "error: " in line]
    assert finished.code == 2 and len(errors) == 1 and "Traceback" not in finished.output, finished.output
    assert str(pictures / "train/b/03.png") in errors[0] and "data.skip_unreadable=true" in errors[0]

    finished = warm.run([*teacher, "--out", tmp_path / "skipping", "data.skip_unreadable=true"], ranks=2)
    assert finished.code == 0, finished.output
    rows = [json.loads(line) for line in (tmp_path / "skipping/teacher/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_images"] for row in rows if row["kind"] == "train"][-1] == 1
    assert files(pictures) == before


def test_missing_column(warm, tmp_path):
    from datasets import Dataset

    pixels = [Image.new("L", (8, 8), value) for value in range(4)]
    Dataset.from_dict({"picture": pixels, "digit": [0, 1, 0, 1]}).save_to_disk(str(tmp_path / "data"))
    arguments = [*TINY, "--phase", "all", "data.source=hub", f"data.path={tmp_path / 'data'}", "data.val_split=train"]
    refused(warm, tmp_path / "out", arguments, "data.image_key 'image'", "digit, picture")
    refused(warm, tmp_path / "out", [*arguments, "data.image_key=picture"], "data.label_key 'label'", "digit, picture")
    arguments += ["data.image_key=picture", "data.label_key=digit", "data.val_split=test"]
    refused(warm, tmp_path / "out", arguments, "data.val_split 'test'", "train")
