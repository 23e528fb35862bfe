"""Runs the cells of a study side by side, makes what several of them need only once, and picks up where it stopped.

Each process (trainer/study/worker.py) makes some artifacts of one cell. An artifact that another cell needs as well
(same name, and equal in all that defines it) is made by the first one and hard-linked into the others: files of a
complete artifact are only ever replaced, never rewritten in place.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import yaml

from trainer.config.load import build, read_yaml, to_dict
from trainer.config.recipe import Recipe
from trainer.disk import lock, replacing, write_text
from trainer.request.graph import phase_help, phase_of
from trainer.request.job import EXIT_FAILED, EXIT_INTERRUPTED
from trainer.study.plan import TEACHERS, Cell, Step, key_of, other_recipe

ROOT = Path(__file__).resolve().parents[2]
WORKER = [sys.executable, "-m", "trainer.study.worker"]
POLL = 0.2  # seconds
TWICE = 3.0  # seconds after which another signal is a second one, and not the same one passed on
LAST_LINES = 12  # of the log of a cell that failed
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Work:
    """A running process and what it makes."""

    process: subprocess.Popen
    cell: Cell
    steps: tuple[Step, ...]
    log: Path
    began: int  # where its part of the log starts, bytes
    started: float = field(default_factory=time.monotonic)


class Runner:
    """The state of one start of a study.

    Args:
        cells: from plan.cells; earlier ones go first.
        out: folder of the study. One runner at a time: a lock that its processes hold as well.
        jobs: processes at once.
        after: called whenever a process has made what it was asked for.

    Raises:
        ValueError: another runner, or a process one left behind, is at work in `out`.
    """

    def __init__(self, cells: Sequence[Cell], ds_config: Path, out: Path, jobs: int, after: Callable[[], object]):
        self.cells = list(cells)
        self.ds_config = ds_config
        self.out = out
        self.jobs = jobs
        self.after = after
        self.running: list[Work] = []
        self.failed: dict[str, str] = {}  # cell -> why
        self.broken: dict[str, str] = {}  # key of an artifact that could not be made -> the cell that tried
        self.stopping = 0.0  # when the first signal came; 0 = none yet
        out.mkdir(parents=True, exist_ok=True)
        self.lock = lock(
            out / ".lock",
            f"another start of a study, or a process it left behind, works in {out}: wait for its end or end it",
        )
        self.makers = makers(self.cells, out)

    def run(self) -> int:
        """Everything that is missing; 0 when all is complete, 1 when a cell failed, 75 after a signal."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for cell in self.cells:
                self._prepare(cell)
            while True:
                self._collect()
                if not self.stopping:
                    self._start()
                if not self.running:
                    break
                time.sleep(POLL)
        finally:
            for work in self.running:
                _signal(work, signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopping:
            self._say("stopped and saved: the same command goes on")
            return EXIT_INTERRUPTED
        for name, why in self.failed.items():
            self._say(f"{name} failed: {why}", sys.stderr)
        return EXIT_FAILED if self.failed else 0

    def _prepare(self, cell: Cell) -> None:
        """Write CELL/recipe.yaml, unless artifacts there were made with another recipe."""
        why = other_recipe(cell)
        if why:
            self.failed[cell.name] = why
        else:
            write_recipe(cell)

    def _start(self) -> None:
        """Fill the free places."""
        for cell in self.cells:
            if len(self.running) >= self.jobs:
                return
            if cell.name in self.failed or any(work.cell is cell for work in self.running):
                continue
            todo = self._todo(cell)
            if todo and self._teacher_is_there(cell):
                self._launch(cell, todo)

    def _todo(self, cell: Cell) -> tuple[Step, ...]:
        """What a process can make now: up to the first artifact that another process is making. Links what is there."""
        todo: list[Step] = []
        claimed = {work.cell.keys[step.name] for work in self.running for step in work.steps}
        for step in cell.steps:
            if cell.done(step):
                continue
            key = cell.keys[step.name]
            ready = [folder for folder in self.makers[key] if (folder / "result.json").is_file()]
            if ready:
                link_artifact(ready[0], cell.folder / step.name)
            elif key in self.broken:
                self.failed[cell.name] = f"it needs {step.name}, which failed in {self.broken[key]}"
                return ()
            elif key in claimed:
                break
            else:
                todo.append(step)
        return tuple(todo)

    def _teacher_is_there(self, cell: Cell) -> bool:
        teacher = cell.teacher
        if teacher is None or teacher.parent == cell.folder or (teacher / "result.json").is_file():
            return True
        maker = f"{TEACHERS}/{teacher.parent.parent.name}/{teacher.parent.name}"
        if maker in self.failed:
            self.failed[cell.name] = f"it needs the teacher, which failed in {maker}"
        return False

    def _launch(self, cell: Cell, todo: tuple[Step, ...]) -> None:
        names = [step.name for step in todo]
        log = cell.folder / "log.txt"
        environment = {"OMP_NUM_THREADS": "1"}
        environment |= {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        paths = [str(ROOT), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*WORKER, str(cell.folder), str(self.ds_config), *names],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on as SIGTERM
                pass_fds=(self.lock.fileno(),),
            )
            self.running.append(Work(process, cell, todo, log, file.tell()))
        self._say(f"{cell.name}: {', '.join(names)}")

    def _collect(self) -> None:
        """Take note of the processes that have ended."""
        ended = [work for work in self.running if work.process.poll() is not None]
        for work in ended:
            self.running.remove(work)
            code = work.process.returncode
            minutes = (time.monotonic() - work.started) / 60
            missing = [step for step in work.steps if not work.cell.done(step)]
            if not missing and code == 0:
                self._say(f"{work.cell.name}: done in {minutes:.1f} min")
                self.after()
            elif not self.stopping:
                broken = missing[0] if missing else work.steps[-1]
                self.broken[work.cell.keys[broken.name]] = work.cell.name
                self.failed[work.cell.name] = f"{broken.name} ended with code {code}, see {work.log}"
                self._say(f"{work.cell.name}: {broken.name} ended with code {code}\n{_tail(work)}", sys.stderr)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """A first signal lets the processes save; a second one ends them."""
        now = time.monotonic()
        if not self.stopping:
            self.stopping = now
            sent = signal.SIGTERM
            self._say("stopping after a save; once more to stop at once")
        elif now - self.stopping > TWICE:
            sent = signal.SIGKILL
        else:
            return
        for work in self.running:
            _signal(work, sent)

    def _say(self, text: str, stream=None) -> None:
        done = sum(cell.complete for cell in self.cells)
        print(f"[{done}/{len(self.cells)}] {text}", file=stream or sys.stdout, flush=True)


def makers(cells: Sequence[Cell], out: Path) -> dict[str, list[Path]]:
    """Key -> folders where the artifact is or will be, in these cells and in those of other studies in the same OUT."""
    folders: dict[str, list[Path]] = {}
    for cell in cells:
        for step in cell.steps:
            folders.setdefault(cell.keys[step.name], []).append(cell.folder / step.name)
    planned = {cell.folder for cell in cells}
    for path in sorted(out.glob("*/seed*/recipe.yaml")):
        if path.parent in planned:
            continue
        recipe = build(Recipe, read_yaml(path.read_text(), str(path)))
        for folder in path.parent.iterdir():
            # others, such as upcycle, are made with those that need them
            if phase_of(folder.name) in phase_help() and (folder / "result.json").is_file():
                folders.setdefault(key_of(recipe, folder.name), []).append(folder)
    return folders


def write_recipe(cell: Cell) -> None:
    """Write CELL/recipe.yaml, which its process reads."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / "recipe.yaml", yaml.safe_dump(to_dict(cell.recipe), sort_keys=False))


def link_artifact(source: Path, target: Path) -> None:
    """Give a complete artifact a second name, file by file and result.json last; without its checkpoints."""
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(source.iterdir()) if path.is_file() and path.suffix != ".tmp"]
    for path in sorted(files, key=lambda path: path.name == "result.json"):
        (target / path.name).unlink(missing_ok=True)
        try:
            os.link(path, target / path.name)
        except OSError:  # another disk, or one without hard links
            with replacing(target / path.name) as unfinished:
                shutil.copy2(path, unfinished)


def _signal(work: Work, number: int) -> None:
    if work.process.poll() is None:
        work.process.send_signal(number)


def _tail(work: Work) -> str:
    with work.log.open("rb") as file:
        file.seek(work.began)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
