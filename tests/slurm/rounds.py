"""Disturbances at random moments of chains on four nodes; each chain has to end with the weights of an undisturbed one.

    python -m tests.slurm.rounds --chains 10 --seed 0            # as root on Debian with Slurm's packages
    python -m tests.slurm.rounds --chains 30 --seed 0 --light    # stages that only pretend to train: much quicker

Each chain starts behind a finished teacher and meta model (a light one from the start) and is disturbed three times in
whatever runs, one with modules, the next with experts as well. Nothing is done by hand: no chain is submitted twice.
Prints what was survived.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.launch import started
from tests.slurm.chain import DS_CONFIG, EP2, LIGHT, RECIPE, ROOT, Chain, light_weights
from tests.slurm.cluster import Cluster, missing

KINDS = ("preempt", "node", "controller", "term", "usr1", "disk", "srun")
DISTURBANCES = 3  # of each chain
EXPERTS = ("student.moe.num_experts=2", "distill.level=expert", "distill.epochs=2", "train.epochs=8")
START = ("teacher", "meta")
ROOM = "96m"  # of the disk that is filled
# a srun that fails as a real one did, as often as the file says
SRUN = """#!/bin/bash
left=$(cat {count} 2>/dev/null || echo 0)
if ((left > 0)); then
    echo $((left - 1)) >{count}
    echo "srun: error: Unable to create step for job $SLURM_JOB_ID: Invalid generic resource (gres) specification" >&2
    exit 233
fi
exec {srun} "$@"
"""


class Rounds:
    """Chains of one cluster, on a disk of their own that can be filled."""

    def __init__(self, cluster: Cluster, base: Path, references: dict[str, Path] | None):
        self.cluster, self.base, self.references = cluster, base, references  # None: light
        self.programs = base / "bin"
        self.programs.mkdir()
        self.count = self.programs / "fails"
        (self.programs / "srun").write_text(SRUN.format(count=self.count, srun=shutil.which("srun")))
        (self.programs / "srun").chmod(0o755)
        self.survived = Counter()

    def chain(self, number: int, draw: random.Random) -> None:
        """One chain from its submission to its end, disturbed on the way."""
        level = "expert" if number % 2 else "module"
        out = self.base / f"run{number}"
        if self.references is not None:
            for name in START:
                shutil.copytree(self.references[level] / name, out / name)
        words = (EP2, *EXPERTS) if level == "expert" else (EP2,)
        chain = Chain(self.cluster, out, OVERRIDES=" ".join(words), ARRAY_THROTTLE="2", MAX_IDLE_REQUEUES="5")
        chain.settings["PATH"] = f"{self.programs}:{chain.settings['PATH']}"
        if self.references is None:
            chain.settings |= LIGHT
        jobs = chain.submit()
        done = []
        while len(done) < DISTURBANCES and not self._ended(chain, jobs):
            kind = draw.choice(KINDS)
            if self._disturb(chain, kind, draw):
                done.append(kind)
        state = chain.until_ended(jobs["evaluate"], timeout=900)
        assert state == "COMPLETED", f"{state}\n{chain.command('status').stdout}\n{chain.logs()}"
        made = sorted(path.parent.name for path in out.glob("*/model.safetensors"))
        for name in made:
            assert (out / name / "model.safetensors").read_bytes() == self._undisturbed(level, name), f"{name} differs"
        trained = [path.stem for path in (out / "slurm/events").glob("*.tsv")]
        for name in trained:
            assert_went_on_at_the_last_save(chain, name)
        self.survived.update(done)
        print(f"chain {number}, {level}: {', '.join(done)}; {len(made)} weights files identical", flush=True)
        shutil.rmtree(out)

    def _undisturbed(self, level: str, name: str) -> bytes:
        if self.references is None:
            return light_weights(name).encode()
        return (self.references[level] / name / "model.safetensors").read_bytes()

    def _ended(self, chain: Chain, jobs: dict[str, str]) -> bool:
        chain.hurry()
        return chain.state(jobs["evaluate"]) not in ("PENDING", "RUNNING", "COMPLETING")

    def _disturb(self, chain: Chain, kind: str, draw: random.Random) -> bool:
        """One disturbance of a job that runs, after a random time; whether there was one."""
        time.sleep(draw.uniform(2, 12))
        chain.hurry()
        lines = self.cluster.out("squeue", "-h", "--array", "-t", "R", "-p", "batch", "-o", "%i|%N").splitlines()
        if not lines:
            return False
        job, nodes = draw.choice(lines).split("|")
        if kind == "preempt":
            urgent = [
                "sbatch",
                "--parsable",
                "-p",
                "urgent",
                "-N4",
                "--gres=gpu:2",
                "-o",
                "/dev/null",
                "--wrap",
                "sleep 1",
            ]
            chain.until_ended(self.cluster.out(*urgent).strip())
        elif kind == "node":
            name = draw.choice(self.cluster.out("scontrol", "show", "hostnames", nodes).split())
            number = int(name.removeprefix("node"))
            self.cluster.kill_node(number)
            time.sleep(draw.uniform(1, 45))  # before or after Slurm has missed it
            self.cluster.start_node(number)
        elif kind == "controller":
            self.cluster.stop_controller()
            time.sleep(draw.uniform(1, 20))
            self.cluster.start_controller()
        elif kind == "term":
            ranks = chain.ranks("")
            if not ranks:
                return False
            self.cluster.run("kill", "-TERM", draw.choice(ranks))
        elif kind == "usr1":
            self.cluster.run("scancel", "--batch", "--signal=USR1", job)
        elif kind == "disk":
            self._fill_disk(draw.uniform(2, 6))
        else:
            self.count.write_text(str(draw.randint(1, 3)))
            self.cluster.run("scancel", "--batch", "--signal=USR1", job)  # so that a srun comes soon
        return True

    def _fill_disk(self, seconds: float) -> None:
        filler = self.base / "filler"
        with filler.open("wb", buffering=0) as f:
            try:
                while f.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass
        time.sleep(seconds)
        filler.unlink()


def assert_went_on_at_the_last_save(chain: Chain, artifact: str) -> None:
    """No start of a stage trained again what the start before had saved."""
    starts = [event for event in chain.events(artifact) if event.startswith("started")]
    saved = [int(event.split()[-1]) for event in starts if event.split()[-1].isdigit()]
    assert saved == sorted(saved), f"{artifact} went back: {starts}"


def references(folder: Path) -> dict[str, Path]:
    """The undisturbed runs, by --phase all without Slurm."""
    made = {}
    for level, words in (("module", ()), ("expert", EXPERTS)):
        out = made[level] = folder / level
        if (out / "evaluate/result.json").is_file():
            continue
        arguments = [
            "--recipe",
            ROOT / RECIPE,
            "--ds_config",
            ROOT / DS_CONFIG,
            "--phase",
            "all",
            "--out",
            out,
            EP2,
            *words,
        ]
        with started("deepspeed", 2, arguments) as job:
            done = job.wait(timeout=1800)
        assert done.code == 0, done.output
    return made


def main() -> None:
    """Run as many chains as are asked for; ends with an exception at the first that differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=10, help=f"chains, {DISTURBANCES} disturbances each")
    parser.add_argument("--seed", type=int, default=0, help="of the first chain; the next ones count on")
    parser.add_argument("--reference", type=Path, help="folder that keeps the undisturbed runs for the next time")
    parser.add_argument("--light", action="store_true", help="stages that only pretend to train")
    options = parser.parse_args()
    if problem := missing():
        sys.exit(problem)
    base = Path(tempfile.mkdtemp(prefix="m2mkd-rounds-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", base], check=True)
    begun = time.monotonic()
    try:
        made = None
        if not options.light:
            made = references(options.reference or Path(tempfile.mkdtemp(prefix="m2mkd-reference-")))
        cluster = Cluster(nodes=4).start()  # it sees the disk that was mounted before
        try:
            rounds = Rounds(cluster, base, made)
            for seed in range(options.seed, options.seed + options.chains):
                rounds.chain(seed, random.Random(seed))
        finally:
            cluster.stop()
        minutes = (time.monotonic() - begun) / 60
        survived = ", ".join(f"{kind} {count}" for kind, count in rounds.survived.most_common())
        print(f"{options.chains} chains, {rounds.survived.total()} disturbances in {minutes:.0f} min: {survived}")
    finally:
        subprocess.run(["umount", "--lazy", base], check=True)
        os.rmdir(base)


if __name__ == "__main__":
    main()
