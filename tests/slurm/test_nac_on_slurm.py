"""A NAC by slurm/m2mkd_nac.sh on a real cluster: planned, submitted, and as --phase all makes it without Slurm."""

import json
import subprocess

import pytest

from tests.slurm.chain import DS_CONFIG, ROOT, Chain, same_weights

pytestmark = pytest.mark.slow

RECIPE = "tests/fixtures/tiny_nac.yaml"
SHORT = ["teacher.epochs=1", "teacher.warmup_epochs=0", "meta.epochs=1", "distill.epochs=1", "train.epochs=1"]


class NACChain(Chain):
    def command(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """bash slurm/m2mkd_nac.sh ARGUMENTS on the login node."""
        return self.cluster.run("bash", "slurm/m2mkd_nac.sh", *arguments, cwd=self.root, **self.settings | settings)


def test_a_nac_is_planned_and_taught_as_without_slurm(cluster, warm, warm_ranks, tmp_path):
    reference = tmp_path / "reference"
    arguments = ["--recipe", ROOT / RECIPE, "--ds_config", ROOT / DS_CONFIG, "--phase", "all", "--out", reference]
    done = warm.run([*arguments, *SHORT], ranks=2, timeout=300)
    assert done.code == 0, done.output

    chain = NACChain(cluster, tmp_path / "run", RECIPE=RECIPE, OVERRIDES=" ".join(SHORT), **warm_ranks)
    planned = chain.command("plan")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "distill" in planned.stdout and not chain.rows()
    jobs = chain.submit()
    try:
        assert list(jobs) == ["teacher", "meta", "distill", "train", "evaluate"]
        assert chain.until_ended(jobs["evaluate"], timeout=600) == "COMPLETED"
    finally:
        chain.command("cancel")
    same_weights(chain.out, reference)
    metrics = []
    for out in (chain.out, reference):
        result = json.loads((out / "evaluate/result.json").read_text())
        assert result["world_size"] == 2 and [row["name"] for row in result["inference"]["rows"]][-1] == "dense teacher"
        metrics.append(result["metrics"])
    assert metrics[0] == metrics[1]
