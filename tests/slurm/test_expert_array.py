"""Per-expert distillation and the second round on a real cluster: every job makes its part, as without Slurm."""

import shutil

import pytest

from tests.slurm.chain import DS_CONFIG, RECIPE, ROOT, Chain

COMMAND = ["--recipe", ROOT / RECIPE, "--ds_config", ROOT / DS_CONFIG]
EXPERTS = ["student.moe.num_experts=2", "distill.level=expert"]


def test_elements_of_the_expert_array_are_modules_and_experts(cluster, warm, warm_ranks, tmp_path):
    """Two of six experts are missing: just those are made, each on a node of its own, and they are the right ones."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    short = ["teacher.epochs=1", "meta.epochs=1", "expert.epochs=1", *EXPERTS]
    for phase in ("teacher", "meta", "cluster", "expert"):
        finished = warm.run([*COMMAND, "--phase", phase, "--out", whole, *short])
        assert finished.code == 0, finished.output
    missing = ["expert_0_1", "expert_2_0"]
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns(*missing))
    chain = Chain(cluster, out, NODES="1", OVERRIDES=" ".join(short), ARRAY_THROTTLE="0", **warm_ranks)
    jobs = chain.submit()
    try:
        assert chain.rows()[0][1:3] == ["expert", "1,4"]
        assert list(jobs) == ["expert", "distill", "train", "evaluate"]
        for element in (1, 4):
            assert chain.until_ended(f"{jobs['expert']}_{element}") == "COMPLETED", chain.logs()
        for name in missing:
            weights = f"{name}/model.safetensors"
            assert (out / weights).read_bytes() == (whole / weights).read_bytes(), f"{weights} differs"
            assert chain.events(name)[-1] == "done exit 0"
    finally:
        chain.command("cancel")


@pytest.mark.slow
def test_modules_taught_together_are_one_job(cluster, warm, warm_ranks, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    words = ["teacher.epochs=1", "meta.epochs=1", "distill.epochs=0", "refine.epochs=1",
             "refine.order=together"]  # fmt: skip
    for phase in ("teacher", "meta", "distill", "refine"):
        finished = warm.run([*COMMAND, "--phase", phase, "--out", whole, *words])
        assert finished.code == 0, finished.output
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("refine_*"))
    chain = Chain(cluster, out, NODES="1", OVERRIDES=" ".join(words), **warm_ranks)
    jobs = chain.submit()
    try:
        assert list(jobs) == ["refine", "train", "evaluate"] and chain.rows()[0][2] == "-"
        assert chain.until_ended(jobs["refine"]) == "COMPLETED", chain.logs()
        for i in range(3):
            weights = f"refine_{i}/model.safetensors"
            assert (out / weights).read_bytes() == (whole / weights).read_bytes(), f"{weights} differs"
        assert chain.events("refine_2")[-1] == "done exit 0"
    finally:
        chain.command("cancel")


@pytest.mark.slow
def test_a_chain_with_experts_and_a_second_round_in_order(cluster, warm, warm_ranks, tmp_path):
    """Every stage of it in its place: the weights of every artifact are those of --phase all without Slurm."""
    words = [
        *EXPERTS,
        "refine.epochs=1",
        "refine.order=sequential",
        "distill.epochs=1",
        "meta.epochs=1",
        "train.epochs=1",
    ]
    whole = tmp_path / "whole"
    finished = warm.run([*COMMAND, "--phase", "all", "--out", whole, *words], timeout=600)
    assert finished.code == 0, finished.output
    chain = Chain(cluster, tmp_path / "run", NODES="1", OVERRIDES=" ".join(words), ARRAY_THROTTLE="0", **warm_ranks)
    jobs = chain.submit()
    stages = [
        "teacher",
        "meta",
        "cluster",
        "expert",
        "distill",
        "refine_0",
        "refine_1",
        "refine_2",
        "train",
        "evaluate",
    ]
    assert list(jobs) == stages
    assert chain.until_ended(jobs["evaluate"], timeout=1800) == "COMPLETED"
    made = sorted(path.relative_to(whole) for path in whole.glob("*/*.safetensors"))
    assert len(made) == 19  # teacher, meta and its bases, 3 clusters, 6 experts, 3 + 3 modules, train
    for path in made:
        assert (chain.out / path).read_bytes() == (whole / path).read_bytes(), f"{path} differs"
