"""Stage download: what it leaves when all is there, and what it says when something cannot be had."""

import json
import sys
from pathlib import Path

from tests.hub_server import READER, HubServer
from trainer.chain import download

RECIPE = Path(__file__).resolve().parents[1] / "fixtures/slurm_tiny.yaml"


def run(monkeypatch, recipe, out):
    monkeypatch.setattr(sys, "argv", ["download", "--recipe", str(recipe), "--out", str(out)])
    return download.main()


def test_result_names_what_was_fetched(tmp_path, monkeypatch):
    assert run(monkeypatch, RECIPE, tmp_path) == 0
    result = json.loads((tmp_path / "download/result.json").read_text())
    assert result["names"] == [] and "torch" in result["versions"]


def test_a_token_that_may_not_push_is_found_before_training(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {RECIPE}\nhub: {{repo: alice/model}}\n")
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home", READER)
        assert run(monkeypatch, recipe, tmp_path) == 2
        assert "the token of alice may only read" in capsys.readouterr().err
        server.connect(monkeypatch, tmp_path / "home")
        assert run(monkeypatch, recipe, tmp_path) == 0
        assert server.repos["alice/model"].private


def test_teacher_that_is_not_there_is_bad_input(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {RECIPE}\nteacher: {{source: {tmp_path}}}\n")  # a folder without a model
    assert run(monkeypatch, recipe, tmp_path) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "download").exists()
