"""A submission keeps the code it was submitted with, as it was, and refuses results of other code."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.unit.slurm_stand_in import stand_in  # noqa: F401
from tests.unit.test_slurm_chain import ROOT, finish, settings_for
from trainer import made_of, origin
from trainer.chain import frozen, submit


@pytest.fixture
def checkout(tmp_path):
    """A repository with a file of each kind: committed, changed, deleted, new, ignored, of no use to a job."""
    root = tmp_path / "checkout"
    files = {"models/a.py": "a = 1\n", "trainer/loop/b.py": "b = 1\n", "trainer/gone.py": "", "tests/c.py": "",
             "slurm/d.sh": "#!/bin/bash\n", ".gitignore": "*.log\n"}  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "slurm/d.sh").chmod(0o755)
    for command in (["init", "-q"], ["remote", "add", "origin", "https://git.example.org/a/b.git"], ["add", "-A"],
                    ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"]):  # fmt: skip
        subprocess.run(["git", "-C", root, *command], check=True)
    (root / "models/a.py").write_text("a = 2\n")
    (root / "trainer/gone.py").unlink()
    (root / "trainer/new.py").write_text("new = 1\n")
    (root / "trainer/x.log").write_text("")
    return root


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_copy_is_the_work_tree_and_knows_where_it_is_from(checkout, tmp_path):
    about = frozen.freeze(checkout, tmp_path / "1")
    code = tmp_path / "1/code"
    assert names_in(code) == ["frozen.json", "models/a.py", "slurm/d.sh", "trainer/loop/b.py", "trainer/new.py"]
    assert (code / "models/a.py").read_text() == "a = 2\n" and (code / "slurm/d.sh").stat().st_mode & 0o100
    assert about == {
        "git_commit": origin.commit(checkout), "code_sha256": made_of.code_digest(checkout), "changes": "changes.diff",
    }  # fmt: skip
    assert about["git_commit"].endswith("+changes")
    assert "-a = 1\n+a = 2\n" in (tmp_path / "1/changes.diff").read_text()
    assert origin.commit(code) == about["git_commit"] and origin.remote(code) == "https://git.example.org/a/b.git"


def test_without_git_the_known_folders_are_copied(checkout, tmp_path):
    shutil.rmtree(checkout / ".git")
    (checkout / "models/__pycache__").mkdir()
    (checkout / "models/__pycache__/a.pyc").write_text("")
    about = frozen.freeze(checkout, tmp_path / "1")
    assert "trainer/new.py" in names_in(tmp_path / "1/code") and "tests/c.py" not in names_in(tmp_path / "1/code")
    assert not any("pyc" in name for name in names_in(tmp_path / "1/code"))
    assert about["git_commit"] is None and about["changes"] is None


def test_a_copy_of_this_repository_runs_by_itself(tmp_path):
    frozen.freeze(ROOT, tmp_path / "1")
    code = tmp_path / "1/code"
    command = "import trainer.run, trainer.chain.download, models; print(trainer.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", command], env={"PYTHONPATH": str(code)}, cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.startswith(str(code))
    assert made_of.code_digest(code) == made_of.code_digest(ROOT) and origin.commit(code) == origin.commit(ROOT)


def test_the_job_scripts_run_the_copy_with_relative_paths_as_before(tmp_path, stand_in):  # noqa: F811
    settings = settings_for(tmp_path)
    submit.submit(settings)
    script = (settings.run / "slurm/1/train.sbatch").read_text().splitlines()
    assert f"ROOT={settings.run}/slurm/1/code" in script and f"WORK={ROOT}" in script
    about = json.loads((settings.run / "slurm/1/submission.json").read_text())
    assert about["git_commit"] == origin.commit() and about["settings"]["nodes"] == "1"


def test_results_of_other_code_are_refused_before_anything_is_submitted(tmp_path, stand_in):  # noqa: F811
    settings = settings_for(tmp_path)
    finish(settings, "teacher", "meta", "distill_0")
    record = {"code": {"sha256": "f" * 64, "commit": "0123abc"}}
    path = settings.run / "meta/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_of": record}))
    with pytest.raises(ValueError, match=r"meta was made with another version of the code: commit 0123abc .*"
                       r"run\.accept=\[code\]"):  # fmt: skip
        submit.submit(settings)
    assert stand_in.queue() == {} and not (settings.run / "slurm/1").exists()
    assert submit.submit(settings_for(tmp_path, overrides=("run.accept=[code]",))) == 0
    assert len(stand_in.queue()) == 3
