"""Faults at random points of the whole chain; every run has to end with the weights of the undisturbed one.

    python -m tests.faults.rounds --faults 200 --seed 0

A chain (teacher, meta, distill 0 and 1, train, evaluate on two ranks) is started, harmed, started again with the same
command, harmed again, ... until it is complete; then its weights and metrics are compared bit for bit with a chain that
was left alone. No step by hand in between: the command never changes. Prints what was survived.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.test_resume import assert_same_run
from tests.launch import TINY, Finished
from tests.warm_python import WarmPython

RANKS = 2
HANG_SECONDS = 4
COMMAND = [*TINY, "--phase", "all", "train.baselines=[]", f"run.hang_seconds={HANG_SECONDS}"]
GRACE = 1.0  # seconds a stopped rank gets after the others have given up
# how often each kind is drawn; most are kills, around the moments of a save above all
KINDS = {"kill": 12, "term": 2, "stop": 1, "disk full": 3, "slow disk": 1, "read error": 2, "nan": 2, "dead worker": 1}
AROUND = {"step": 2, "backward": 1, "save": 5, "replace": 4, "fsync": 4, "phase": 2, "evaluate": 1}
# what a run that was harmed says, as a pattern
EXPECTED = {
    "term": "interrupted, saved after step",
    "stop": "nothing moved for",
    "disk full": "cannot write|File too large",
    "read error": "Input/output error",
    "nan": "not finite",
    "dead worker": "worker",
}


@dataclass
class Chain:
    """One chain that is being harmed."""

    out: Path
    starts: int = 0


def draw_fault(rng: random.Random) -> dict[str, Any]:
    """A kind, a rank and a point, all from the generator; see tests/faults/inject.py for the fields."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    fault: dict[str, Any] = {"kind": kind, "rank": rng.randrange(RANKS)}
    if kind == "disk full":
        return fault | {"bytes": rng.randrange(20_000, 150_000)}  # a file may grow to; the log of the rank has to fit
    if kind in ("nan", "dead worker"):
        return fault | {"call": rng.randint(1, 8)}
    if kind == "read error":
        return fault | {"call": rng.randint(1, 150)}
    at = rng.choices(list(AROUND), list(AROUND.values()))[0]
    fault |= {"at": at, "call": rng.randint(1, 10 if at in ("step", "backward", "fsync") else 4)}
    delay = rng.choice([0, 0, rng.uniform(0.001, 0.05)]) if kind == "kill" else 0  # kills also hit what runs behind
    return fault | {"when": rng.choice(["before", "after"]), "delay": delay}


def start(warm: WarmPython, chain: Chain, fault: dict[str, Any]) -> Finished:
    """Start the chain's command with a fault waiting for it."""
    chain.starts += 1
    workers = ["data.workers=1"] if fault["kind"] == "dead worker" else []
    arguments = list(map(str, [*COMMAND, *workers, "--out", chain.out]))
    if fault["kind"] == "disk full":
        return warm.run(arguments, ranks=RANKS, file_limit=fault["bytes"], grace=GRACE)
    return warm.call("tests.faults.inject:main", arguments, fault, ranks=RANKS, grace=GRACE)


def struck(fault: dict[str, Any], finished: Finished) -> bool:
    """Whether the fault did what it was meant to do. Raises AssertionError when the run ended in another way."""
    if finished.code == 0:
        return fault["kind"] == "slow disk"  # a point the rest of the chain never came to; a slow disk only takes time
    said = EXPECTED.get(fault["kind"], "")
    assert re.search(said, finished.output), f"{fault}: expected {said!r} in\n{finished.output}"
    return True


def undisturbed(warm: WarmPython, folder: Path) -> Path:
    """OUT of a chain nobody harms."""
    finished = warm.run([*COMMAND, "--out", folder], ranks=RANKS)
    assert finished.code == 0, finished.output
    return folder


def harm(warm: WarmPython, folder: Path, reference: Path, faults: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Harm chains with one fault after the other; yields those that struck and were survived.

    Raises AssertionError when a chain ends with other weights or metrics, or stops getting anywhere.
    """
    number = 0
    chain = Chain(folder / "chain0")
    pending: list[dict[str, Any]] = []
    for fault in faults:
        finished = start(warm, chain, fault)
        if struck(fault, finished):
            pending.append(fault)
        if finished.code == 0:
            assert_same_run(chain.out, reference)
            yield from pending
            number, pending = number + 1, []
            chain = Chain(folder / f"chain{number}")
        assert chain.starts < 200, f"{chain.out} gets nowhere: {finished.output}"
    if chain.starts:
        finished = warm.run([*COMMAND, "--out", chain.out], ranks=RANKS)
        assert finished.code == 0, finished.output
        assert_same_run(chain.out, reference)
        yield from pending


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="faults to strike")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    survived: Counter[tuple[str, str]] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        warm = WarmPython(folder)
        try:
            reference = undisturbed(warm, folder / "undisturbed")
            for fault in harm(warm, folder, reference, _until(survived, options)):
                survived[fault["kind"], fault.get("at", "")] += 1
                print(f"{survived.total():4d}  {fault}", flush=True)
        finally:
            warm.close()
    print(f"\n{survived.total()} faults struck (seed {options.seed}) and were survived, "
          f"weights and metrics equal bit for bit; {time.monotonic() - began:.0f} s")  # fmt: skip
    for kind in KINDS:
        where = ", ".join(f"{count} at {at}" if at else str(count) for (k, at), count in survived.items() if k == kind)
        print(f"  {kind:12s} {where or '-'}")
    return 0


def _until(survived: Counter, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rng = random.Random(options.seed)
    while survived.total() < options.faults:
        yield draw_fault(rng)


if __name__ == "__main__":
    sys.exit(main())
