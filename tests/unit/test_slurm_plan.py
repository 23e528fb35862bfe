"""`plan` is not silent: what it is at, whether the hub answers, and no size of what could not be read."""

import socket
import sys
import time

import pytest

from tests.unit.test_slurm_chain import ROOT, settings_for
from trainer.chain import internet, plan
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.plan.rehearsal import DryRun, carry_out


def test_a_hub_that_cannot_be_reached_is_not_asked_again():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        environ = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        given, said = internet.hub_environ(environ)
    assert given["HF_HUB_OFFLINE"] == given["TRANSFORMERS_OFFLINE"] == "1"
    assert said.startswith(
        "127.0.0.1 cannot be reached from here (Connection refused): what lies in the caches is used"
    )


def test_a_name_that_is_never_answered_takes_seconds(monkeypatch):
    monkeypatch.setattr(internet, "SECONDS", 0.2)

    def silent(address, timeout):
        time.sleep(3)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    started = time.monotonic()
    given, said = internet.hub_environ({})
    assert time.monotonic() - started < 2 and "no answer within" in said and given["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("environ", [{"HF_HUB_OFFLINE": "1"}, {"HTTPS_PROXY": "http://proxy:80"}])
def test_what_the_user_has_decided_is_not_tried(environ, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    assert internet.hub_environ(environ | {"HF_HUB_ETAG_TIMEOUT": "60"}) == ({"HF_HUB_DOWNLOAD_TIMEOUT": "10"}, "")


def test_a_hub_that_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        given, said = internet.hub_environ({"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"})
    assert said == "" and "HF_HUB_OFFLINE" not in given


def test_a_dry_run_that_takes_long_says_what_it_is_at(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "PATIENCE", 1)
    now = tmp_path / "now"
    program = (
        f"import pathlib, sys, time; pathlib.Path({str(now)!r}).write_text('teacher'); time.sleep(2.5); sys.exit('bad')"
    )
    assert plan._watched([sys.executable, "-c", program], {}, now) == (1, "bad\n")
    assert "1 s  teacher\n" in capsys.readouterr().out


def test_a_dry_run_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PATIENCE", 1)
    monkeypatch.setattr(plan, "DRY_RUN_LIMIT", 1)
    assert plan._watched([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "now") == (None, "")


def test_no_size_of_a_teacher_that_cannot_be_read(tmp_path):
    settings = settings_for(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    recipe = load_recipe(settings.recipe, [f"teacher.source={tmp_path / 'teacher'}"])
    ranks = dict.fromkeys(plan.STAGES, (1, 1))
    dry = DryRun(recipe, read_ds_config(str(ROOT / "ds_configs/cpu_debug.json")), tmp_path, ranks, str(tmp_path))
    good, problems = carry_out(dry.checks({"meta", "distill", "train"}))
    assert not any(line.startswith("disk") for line in good)
    assert any(line.startswith("disk: how much is needed is not known") for line in problems)
