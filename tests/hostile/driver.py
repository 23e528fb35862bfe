"""Runs trainer.run on one hostile input and checks what every refusal has in common.

A refusal is: exit code 2 within SECONDS, one line `error: ...` that names the bad thing and a next step, no traceback,
every file that was there unchanged, nothing new outside OUT, no token anywhere, and no more memory than MEMORY.
"""

import hashlib
import resource
import time
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.launch import TINY
from tests.warm_python import WarmPython

SECONDS = 10
MEMORY = 12 * 2**30  # address space, bytes: torch and its libraries map about 5 GiB
TOKEN = "hf_" + "HostileSuiteFakeToken" + "0123456789AbC"  # in the environment of every case; nothing may show it
# one epoch without checkpoints: refusals come before training or in its first epoch
QUICK = ["run.save_every=1000", "run.save_epochs=1000", "train.baselines=[]"]
# a refusal tells what to do, what would have been right, or where in a file the mistake is
STEPS = ("run ", "use ", "set ", "give ", "delete ", "expected ", "repair ", "convert ", "check ", "correct ", "take ",
         "save ", "raise ", "lower ", "change ", "download ", "replace ", "export ", "remove ", "write ", "choose ",
         "supported", "did you mean", "known", "there are", "possible", " there:", " line ", "must ", "not valid",
         "not text", "extends itself", "not a section")  # fmt: skip


@dataclass
class Hostile:
    """The driver of one test session; `seconds` by kind and case, for the table at the end."""

    warm: WarmPython
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def refuse(self, case: str, folder: Path, arguments: list, *expected: str, ranks: int = 1,
               plain: bool = False) -> str:  # fmt: skip
        """Run in `folder` (OUT is folder/out) and return the line of the error.

        Args:
            case: "kind: name", for the line of counts.
            expected: what the error must contain.
            plain: without the tiny recipe and its overrides.
        """
        before = hashes(folder)
        started = time.monotonic()
        common = [] if plain else [*TINY, *QUICK]
        line = [*map(str, [*common, *arguments, "--out", folder / "out"])]
        finished = self.warm.call("tests.hostile.driver:limited", line, ranks=ranks, timeout=3 * SECONDS)
        seconds = time.monotonic() - started
        kind, _, name = case.partition(": ")
        self.seconds.setdefault(kind, {})[name] = seconds

        lines = [line for line in finished.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert finished.code == 2, f"exit code {finished.code}\n{finished.output}"
        assert len(errors) == 1 and errors == lines[-1:], f"one line, the last one\n{finished.output}"
        assert "Traceback" not in finished.output, finished.output
        for text in expected:
            assert text in errors[0], f"{text!r} is not in: {errors[0]}"
        assert any(step in errors[0].lower() for step in STEPS), f"no next step in: {errors[0]}"
        assert len(errors[0]) < 1200, f"too long for a line: {len(errors[0])} characters"
        assert seconds < SECONDS, f"took {seconds:.1f} s"

        after = hashes(folder)
        assert {name: after.get(name) for name in before} == before, "a file that was there has changed"
        assert not [name for name in after.keys() - before.keys() if not name.startswith("out/")], "a file was made"
        assert TOKEN not in finished.output
        assert not [name for name in after if holds_token(folder / name)], "a file holds the token"
        return errors[0]


def limited(arguments: list[str]) -> int:
    """trainer.run.main with bounded memory: a bomb that goes off ends in a MemoryError, not in a machine that swaps."""
    from trainer.run import main

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    return main(arguments)


def cases(table: Iterable[Hashable], slow: Collection[Hashable] = ()) -> list[Any]:
    """The keys of a table of cases as parameters; those of `slow` belong to the long form."""
    unknown = set(slow) - set(table)
    assert not unknown, unknown
    return [pytest.param(key, marks=[pytest.mark.slow] * (key in slow), id=_id(key)) for key in table]


def _id(key: Hashable) -> str:
    return ", ".join(key) if isinstance(key, tuple) else str(key)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every regular file below, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def holds_token(path: Path) -> bool:
    return TOKEN.encode() in path.read_bytes()
