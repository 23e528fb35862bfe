"""--dry-run: the cost that the run then has, every problem at once, and nothing written."""

import shutil

from tests.hub_server import READER, WRITER, HubServer
from tests.integration.test_bad_input import files
from tests.launch import TINY
from trainer import load_results


def test_dry_run_tells_the_cost_and_writes_nothing(warm, chain, tmp_path):
    """The planned FLOPs are those the real run counted."""
    out = tmp_path / "out"
    finished = warm.run([*TINY, "--phase", "all", "--out", out, "--dry-run"], ranks=2)
    assert finished.code == 0 and "PROBLEM" not in finished.output, finished.output
    assert not out.exists()
    rows = [line.split() for line in finished.output.splitlines() if " to do " in line]
    planned = {row[0]: row[4] for row in rows if row[4] != "-"}
    counted = {name: result for name, result in load_results(chain[0]).items() if result["flops"]}
    assert planned == {name: f"{result['flops']:.3g}" for name, result in counted.items()}
    assert {row[0]: row[3] for row in rows}["teacher"] == f"{counted['teacher']['images_seen']:,}"


def test_dry_run_of_a_finished_run(warm, chain):
    before = files(chain[0])
    finished = warm.run([*TINY, "--phase", "distill", "--module", "1", "--out", chain[0], "--dry-run"], ranks=2)
    assert finished.code == 0, finished.output
    row = next(line.split() for line in finished.output.splitlines() if line.startswith("distill_1"))
    assert row[1] == "complete" and float(row[4]) > 0  # hours, at the measured speed
    assert files(chain[0]) == before


def test_dry_run_lists_every_problem_once(warm, tmp_path):
    """Exit code 2, nothing written, and the costs that can be known are there."""
    out = tmp_path / "out"
    arguments = [*TINY, "--phase", "all", "--out", out, "--dry-run", "train.global_batch=128", "student.depths=[3,2]"]
    finished = warm.run(arguments, ranks=2)
    problems = [line for line in finished.output.splitlines() if line.startswith("  PROBLEM")]
    assert finished.code == 2 and "Traceback" not in finished.output, finished.output
    assert len(problems) == 2 and not out.exists()
    assert "100" in problems[0] and "128" in problems[0] and "[3, 2]" in problems[1]
    assert "  ok       meta: 12 steps of 16 images on 2 ranks" in finished.output


def test_dry_run_of_a_phase_whose_input_is_missing(warm, chain, tmp_path):
    """The same words as the phase itself would use."""
    out = tmp_path / "out"
    shutil.copytree(chain[0] / "teacher", out / "teacher")
    before = files(out)
    finished = warm.run([*TINY, "--phase", "distill", "--module", "0", "--out", out, "--dry-run"])
    assert finished.code == 2 and f"needs {out / 'meta'}, which does not exist: run --phase meta" in finished.output
    assert files(out) == before


def test_dry_run_of_a_push_shows_files_and_card_and_touches_no_repo(warm, chain, tmp_path):
    with HubServer() as server:
        start = ["tests.integration.test_push:main_with_hub", server.url, str(tmp_path / "home"), WRITER]
        arguments = [*TINY, "--out", str(chain[0]), "--dry-run", "hub.repo=alice/model"]
        before = files(chain[0])
        finished = warm.call(*start, [*arguments, "--phase", "push"])
        assert finished.code == 0, finished.output
        assert "push to alice/model@main: " in finished.output and "README.md:" in finished.output
        finished = warm.call(*start, [*arguments, "--phase", "all"])
        assert finished.code == 0 and "push " in finished.output, finished.output
        assert server.count("whoami") == 2 and not server.repos and files(chain[0]) == before
        finished = warm.call(*start[:3], READER, [*arguments, "--phase", "all"])
        assert finished.code == 2 and "may only read" in finished.output, finished.output


def test_all_phases_end_with_the_push(warm, chain, tmp_path):
    out = shutil.copytree(chain[0], tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    with HubServer() as server:
        arguments = [*TINY, "--out", str(out), "--phase", "all", "hub.repo=alice/model"]
        home = str(tmp_path / "home")
        finished = warm.call("tests.integration.test_push:main_with_hub", server.url, home, WRITER, arguments, ranks=2)
        assert finished.code == 0, finished.output
        assert "model.safetensors" in server.files("alice/model") and "push" in load_results(out)
