"""Trackers get the rows of metrics.jsonl once each, under the name of the run, and never stop a training."""

import json

import pytest
from accelerate import tracking

from trainer.config.load import load_recipe
from trainer.tracking import trackers
from trainer.tracking.metrics import MetricsLog


def train_row(step):
    return {"kind": "train", "phase": "train", "epoch": 0, "step": step, "loss": 1.0 / step, "lr": 0.1,
            "images_per_s": 10.0, "load/blocks.1.mlp": [0.25, 0.75], "time": 5.0}  # fmt: skip


def eval_row(step):
    return {"kind": "eval", "phase": "train", "epoch": 1, "step": step, "accuracy": 0.5, "loss": 1.0, "images": 8}


class Recorder:
    """Stands in for a tracker class of accelerate."""

    all: list["Recorder"]
    refuses = breaks_at = None

    def __init__(self, *names, **options):
        self.started_with, self.logged, self.settings, self.finished = (names, options), [], None, False
        self.all.append(self)

    def start(self):
        if self.refuses:
            raise RuntimeError(self.refuses)

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        if self.breaks_at == step:
            raise ConnectionError("server gone")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def recorded(monkeypatch):
    """wandb and trackio are installed and record what they are given."""

    wandb, trackio = (type(name, (Recorder,), {"all": []}) for name in ("Wandb", "Trackio"))
    monkeypatch.setattr(trackers, "_installed", lambda name: name in ("wandb", "trackio"))
    monkeypatch.setattr(tracking, "WandBTracker", wandb)
    monkeypatch.setattr(tracking, "TrackioTracker", trackio)
    return wandb, trackio


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my run" / "train"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("phase: train\nrecipe: {seed: 0, data: {source: digits}, modules: [1, 2]}\n")
    return folder


def test_rows_arrive_under_their_kind_with_the_recipe(recorded, folder):
    with MetricsLog(folder / "metrics.jsonl", trackers=["wandb"]) as log:
        log.write(train_row(2))
        log.write(eval_row(2))
    (wandb,) = recorded[0].all
    names, options = wandb.started_with
    assert names == ("my-run",) and options["name"] == "train" and options["dir"] == str(folder)
    assert wandb.settings == {"seed": 0, "data.source": "digits", "modules": "[1, 2]"}
    assert wandb.logged == [
        (2, {"train/epoch": 0, "train/loss": 0.5, "train/lr": 0.1, "train/images_per_s": 10.0,
             "train/load_min/blocks.1.mlp": 0.25, "train/load_max/blocks.1.mlp": 0.75}),
        (2, {"eval/epoch": 1, "eval/accuracy": 0.5, "eval/loss": 1.0, "eval/images": 8}),
    ]  # fmt: skip
    assert wandb.finished


def test_a_resumed_run_goes_on_in_the_same_run_without_rows_it_has(recorded, folder):
    with MetricsLog(folder / "metrics.jsonl", trackers=["wandb", "trackio"]) as log:
        for step in (1, 2, 3, 4):
            log.write(train_row(step))
        log.write(eval_row(2))
    with MetricsLog(folder / "metrics.jsonl", resume_step=2, trackers=["wandb", "trackio"]) as log:
        for step in (3, 4, 5):
            log.write(train_row(step))
        log.write(eval_row(4))
    for kind, key in zip(recorded, ("id", "name")):
        first, second = kind.all
        assert [step for step, _ in first.logged] == [1, 2, 3, 4, 2]
        assert [step for step, _ in second.logged] == [5, 4]  # the evaluation of step 4 had not been sent
        assert first.started_with[1][key] == second.started_with[1][key]
        assert second.settings is None
    MetricsLog(folder / "metrics.jsonl", trackers=["wandb"]).close()  # from the start: another run
    assert recorded[0].all[2].started_with[1]["id"] != recorded[0].all[0].started_with[1]["id"]


def test_a_tracker_that_fails_is_left_behind(recorded, folder, caplog):
    recorded[0].breaks_at = 2
    with MetricsLog(folder / "metrics.jsonl", trackers=["wandb", "trackio"]) as log:
        for step in (1, 2, 3):
            log.write(train_row(step))
    assert [step for step, _ in recorded[0].all[0].logged] == [1]
    assert [step for step, _ in recorded[1].all[0].logged] == [1, 2, 3]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert [record.message for record in caplog.records] == [
        "tracker wandb failed and is left out from here: server gone"
    ]


def test_one_that_does_not_start_is_an_error_without_secrets(recorded, folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcd1234efgh")
    recorded[0].refuses = "401 for abcd1234efgh at https://me:pass@tracking.example\nlog in"
    with pytest.raises(ValueError, match="tracker wandb does not start: 401 for") as stop:
        MetricsLog(folder / "metrics.jsonl", trackers=["wandb"])
    assert "401 for *** at https://***@tracking.example log in. See" in str(stop.value)


def test_no_secret_is_written(recorded, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_veryprivate")
    with MetricsLog(folder / "metrics.jsonl", trackers=["wandb"]) as log:
        log.write(train_row(1))
    assert not any("hf_veryprivate" in path.read_text() for path in folder.rglob("*") if path.is_file())
    assert "hf_veryprivate" not in str(recorded[0].all[0].__dict__)


def test_what_is_not_installed_is_an_error_with_its_command(monkeypatch):
    monkeypatch.setattr(trackers, "_installed", lambda name: name == "tensorboard")
    with pytest.raises(ValueError, match=r"pip install wandb mlflow, or leave it out of run.trackers"):
        trackers.chosen(["tensorboard", "wandb", "mlflow"])
    assert trackers.chosen(["auto", "tensorboard"]) == ("tensorboard",)
    monkeypatch.setattr(trackers, "_installed", lambda name: False)
    assert trackers.chosen(["auto"]) == ()
    with pytest.raises(ValueError, match="pip install tensorboard"):
        trackers.chosen(["tensorboard"])


def test_a_folder_of_that_name_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not trackers._installed("trackio")


def test_the_recipe_knows_the_names():
    recipe = "recipes/demo.yaml"
    assert load_recipe(recipe).run.trackers == ("auto",)
    assert load_recipe(recipe, ["run.trackers=[wandb, auto]"]).run.trackers == ("wandb", "auto")
    with pytest.raises(
        ValueError, match=r"run\.trackers is 'wand', expected auto, tensorboard, wandb, mlflow, trackio"
    ):
        load_recipe(recipe, ["run.trackers=[wand]"])


def test_tensorboard_shows_no_step_twice(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(folder / "metrics.jsonl", trackers=["auto"]) as log:
        for step in (1, 2, 3, 4):
            log.write(train_row(step))
    with MetricsLog(folder / "metrics.jsonl", resume_step=2, trackers=["auto"]) as log:
        for step in (3, 4, 5):
            log.write(train_row(step))
        log.write(eval_row(5))
    shown = reader.EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in shown.Scalars("eval/accuracy")] == [0.5]
    MetricsLog(folder / "metrics.jsonl", trackers=["auto"]).close()  # from the start: the old curve is gone
    fresh = reader.EventAccumulator(str(folder / "tensorboard"))
    fresh.Reload()
    assert fresh.Tags()["scalars"] == []


def test_damaged_ids_start_a_new_run(recorded, folder):
    with MetricsLog(folder / "metrics.jsonl", trackers=["wandb"]) as log:
        log.write(train_row(1))
    (folder / "trackers.json").write_text('["wandb"]')
    MetricsLog(folder / "metrics.jsonl", resume_step=1, trackers=["wandb"]).close()
    first, second = recorded[0].all
    assert first.started_with[1]["id"] != second.started_with[1]["id"]
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": second.started_with[1]["id"]}
