"""The Python API: light to import, errors as ValueError, results by name. Real runs: test_api_runs.py."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trainer
from trainer import Interrupted, api, load_recipe, load_results, run_phase
from trainer.distributed import interrupt
from trainer.request.job import Job

ROOT = Path(__file__).resolve().parents[2]
RECIPE, DS_CONFIG = ROOT / "recipes/demo.yaml", ROOT / "ds_configs/cpu_debug.json"


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, trainer; from trainer import load_recipe, load_results, run_phase; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_what_it_offers():
    assert trainer.Interrupted is interrupt.Interrupted is Interrupted
    assert all(getattr(trainer, name).__doc__ for name in trainer.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'run_phases'; it offers Interrupted, load_recipe"):
        trainer.run_phases  # noqa: B018


def test_a_recipe_with_changes_from_python():
    recipe = load_recipe(RECIPE, ["train.lr=0.5", "seed=1"], seed=3, train={"epochs": 2}, student={"moe": {"k": 1}})
    assert (recipe.seed, recipe.train.lr, recipe.train.epochs, recipe.student.moe.k) == (3, 0.5, 2, 1)
    assert recipe.student.moe.num_experts == 4 and load_recipe(RECIPE).train.epochs == 14
    with pytest.raises(ValueError, match=r"unknown key train\.epoch\. Did you mean train\.epochs"):
        load_recipe(RECIPE, train={"epoch": 2})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"phase": "trian"}, "there is no phase trian. Did you mean train?"),
        ({"phase": "meta", "module": 1}, "only incubate, cluster, expert, distill and refine take a module"),
        ({"phase": "distill", "module": 4}, "needs --module 0..3 or all, got 4"),
        ({"phase": "distill", "module": True}, "needs --module 0..3 or all, got True"),
        ({"phase": "meta", "ds_config": {"zero": 1}}, 'unknown key "zero"'),
        ({"phase": "meta", "ds_config": "nowhere.json"}, "no DeepSpeed config at nowhere.json"),
        ({"phase": "meta", "recipe": "recipes/demo.yaml"}, "expected what load_recipe returns"),
    ],
)
def test_bad_input_is_a_value_error(tmp_path, arguments, message):
    arguments = {"recipe": load_recipe(RECIPE), "ds_config": DS_CONFIG, **arguments}
    recipe, phase = arguments.pop("recipe"), arguments.pop("phase")
    with pytest.raises(ValueError) as error:
        run_phase(recipe, phase, out=tmp_path / "out", **arguments)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """run_phase without training: `execute` notes the job and leaves results."""
    jobs = []

    def execute(job: Job) -> None:
        jobs.append(job)
        for name in ("teacher", "meta", "distill_0", "distill_1", "distill_2", "distill_3", "train_scratch"):
            (job.out / name).mkdir(parents=True, exist_ok=True)
            (job.out / name / "result.json").write_text(json.dumps({"name": name}))

    monkeypatch.setattr(api, "execute", execute)
    return lambda phase, recipe=None, **more: (
        run_phase(recipe or load_recipe(RECIPE), phase, out=tmp_path, ds_config={"bf16": {"enabled": True}}, **more),
        jobs[-1],
    )


def test_one_result_or_several_by_name(fake):
    result, job = fake("meta")
    assert result == {"name": "meta"} and job.ds_values == {"bf16": {"enabled": True}} and "run_phase" in job.command
    assert fake("distill", module=2)[0] == {"name": "distill_2"}
    assert list(fake("distill")[0]) == ["distill_0", "distill_1", "distill_2", "distill_3"]
    assert fake("train", load_recipe(RECIPE, train={"start": "scratch"}))[0] == {"name": "train_scratch"}
    assert fake("all")[0].keys() == {*fake("distill")[0], "teacher", "meta", "train_scratch"}


def test_results_by_name(tmp_path):
    assert load_results(tmp_path) == {}
    for name in ("teacher", "meta", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "teacher/result.json").write_text('{"steps": 1}')
    (tmp_path / "meta/result.json").write_text('{"steps": 2}')
    assert load_results(str(tmp_path)) == {"meta": {"steps": 2}, "teacher": {"steps": 1}}
    (tmp_path / "meta/result.json").write_text('{"steps"')
    with pytest.raises(ValueError, match=r"meta/result\.json is truncated or altered: delete .*meta and run"):
        load_results(tmp_path)


def test_signals_belong_to_the_script_again_afterwards(fake, monkeypatch):
    def mine(*_):
        return None

    before = signal.signal(signal.SIGTERM, mine)
    try:
        seen = []
        monkeypatch.setattr(interrupt, "listen", lambda: seen.append(signal.signal(signal.SIGTERM, signal.SIG_IGN)))
        fake("meta")
        assert seen == [mine] and signal.getsignal(signal.SIGTERM) is mine
        thread = threading.Thread(target=fake, args=("meta",))  # python lets only the main thread handle signals
        thread.start()
        thread.join()
        assert len(seen) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_watch_for_hung_ranks_ends_with_the_phase():
    """A script may think for longer than run.hang_seconds between two phases."""
    code = (
        "import time; from trainer.distributed.interrupt import HEARTBEAT as h; "
        "h.watch(0.3); h.rest(); time.sleep(1); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "ok\n", done.stderr
