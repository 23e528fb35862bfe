"""A study as jobs of Slurm: the command behind slurm/study.sh.

python -m trainer.study.jobs [submit|plan|status|logs|wait|cancel] [--only VARIANT] [--flags] [section.key=value ...]

Settings, job body and all that follows jobs are the chain's (trainer/chain); OUT/jobs is their run folder. A job makes
one cell, cells are arrays, and a last small job gathers the tables. What tuning chooses is known only when its trials
are done: then that last job, called choose, submits the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from trainer.chain import arrays, cluster, commands, fits, frozen, slurm
from trainer.chain import plan as chain_plan
from trainer.chain import settings as chain_settings
from trainer.chain.settings import JOBS, Settings
from trainer.chain.submit import (
    NO_FLOCK,
    ROOT,
    STAGES_FILE,
    Order,
    hand_in,
    header,
    new_submission,
    render,
    rows,
    stages_of,
)
from trainer.chain.together import say
from trainer.config.ds_config import read_ds_config
from trainer.config.load import plain_values, read_yaml, to_dict
from trainer.config.recipe import Recipe
from trainer.disk import lock, write_json
from trainer.request.graph import section_of_batch
from trainer.request.stages import CELL, DOWNLOAD, GATHER, Stage, hub_names
from trainer.study.element import mark
from trainer.study.plan import Cell, Study, cells, only, other_recipe, read_study, trials
from trainer.study.report import report
from trainer.study.runner import makers, write_recipe
from trainer.study.tuning import chosen, tuned
from trainer.study.waves import Work, number_of_waves, waves, works

OWN_DS_CONFIG = "study"  # DS_CONFIG that means: the one that the study names
CELLS = "cells"  # the stage of all cells: an element is a cell, by its number in a list that submissions only add to
SHOWN = 12  # arrays that the listing names


@dataclass(frozen=True)
class Planned:
    """What there is to do of a study at one moment."""

    study: Study
    every: list[Cell]  # all that are known: trials, and what is not tuned or chosen
    wanted: list[Cell]  # those of --only
    todo: list[Work]
    later: list[str]  # tuned variants whose trials are among todo: what they choose comes after these

    @property
    def names(self) -> list[str]:
        """Every cell that may ever be a job, also those whose choice is not known yet."""
        final = [f"{variant.name}/seed{seed}" for seed in self.study.seeds for variant in self.study.variants]
        return list(dict.fromkeys([*(cell.name for cell in self.every), *final]))


def main() -> int:
    """Run one command; the exit code is that of trainer/chain/commands.py."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--only", action="append", default=[])
    options, others = own.parse_known_args(sys.argv[1:])
    return commands.carry_out(
        others, read, partial(submit, patterns=options.only), partial(show_plan, patterns=options.only)
    )


def read(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, Settings]:
    """The command, and the settings of the chain with OUT/jobs as run folder and the study as recipe.

    Raises:
        ValueError: a setting without a meaning, or with none for a study.
    """
    command, settings = chain_settings.read(
        arguments,
        environ,
        program="slurm/study.sh STUDY",
        more_help="\na study:\n  --only VARIANT    these alone (m2mkd, or 'm2mkd*'); may be repeated",
    )
    for stage, names in chain_settings.stages_named(settings).items():
        if stage not in (CELL, GATHER, DOWNLOAD):
            raise ValueError(
                f"{names[0]} names stage {stage}, and a job of a study makes all of a cell: give one value, or "
                f"exceptions for {CELL} and {GATHER}, as in 24:00:00,{GATHER}=00:10:00"
            )
    return command, replace(settings, out=str(Path(settings.out) / JOBS))


def submit(settings: Settings, patterns: Sequence[str] = ()) -> int:
    """Submit the cells that are missing, as arrays; what is complete is not made again.

    Raises:
        ValueError: the study, the DeepSpeed JSON and the ranks do not fit, or somebody is at work in its folder.
        SlurmError: a submission failed; what had been submitted before it is cancelled.
    """
    study_path, study, ds_values = _load(settings)
    planned = plan_of(study, settings.run.parent, patterns)
    slurm.require_sbatch()
    _refuse_local_runner(settings.run.parent)
    if not planned.todo:
        paths = report(study, planned.every, settings.run.parent)
        say(f"{settings.run.parent}: every cell is complete, nothing to submit; table: {paths[1]}")
        return 0
    with new_submission(settings.run) as folder:
        hand_in_cells(settings, planned, study_path, ds_values, folder, patterns)
    out = shlex.quote(str(settings.run.parent))
    say(f"\nstate and progress: bash slurm/study.sh {shlex.quote(settings.recipe)} status --out {out}")
    return 0


def show_plan(settings: Settings, patterns: Sequence[str] = ()) -> int:
    """Print what would be submitted, and what cluster and scheduler say to it; 1 when they would refuse."""
    _, study, ds_values = _load(settings)
    planned = plan_of(study, settings.run.parent, patterns)
    print(f"{study.title}, in {settings.run.parent}\n{_summary(planned)}")
    if not planned.todo:
        return 0
    _check(settings, planned, ds_values)
    try:
        array_size, silence = cluster.max_array_size(), ""
    except slurm.SlurmError as error:
        array_size, silence = None, str(error)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "scripts"
        orders = orders_of(settings, planned, folder, patterns, ROOT, array_size)
        print(_listing(settings, planned, orders))
        _write_scripts(settings, orders, folder, ROOT)
        return int(chain_plan.ask_scheduler(settings, orders, silence))


def plan_of(study: Study, out: Path, patterns: Sequence[str] = (), without: Sequence[str] = ()) -> Planned:
    """What is missing of a study.

    Args:
        patterns: of --only.
        without: names of cells that are not to be made.

    Raises:
        ValueError: a recipe that cannot be resolved, a pattern that matches no variant, or a cell whose folder holds
            artifacts of another recipe.
    """
    trial_cells = trials(study, out)
    choices = chosen(tuned(study, trial_cells))
    by_name = {cell.name: cell for cell in (*trial_cells, *cells(study, out, choices))}  # a shared teacher is in both
    every = list(by_name.values())
    wanted = only(every, study, patterns)
    problems = [why for why in map(other_recipe, wanted) if why]
    if problems:
        raise ValueError("; ".join(problems))
    complete = {}
    for key, folders in makers(wanted, out).items():
        ready = [folder for folder in folders if (folder / "result.json").is_file()]
        if ready:
            complete[key] = ready[0]
    todo = works([cell for cell in wanted if cell.name not in without], complete)
    tuning = {by_name[work.cell].tunes for work in todo}
    later = [variant.name for variant in study.variants if variant.name in tuning and variant.name not in choices]
    return Planned(study, every, wanted, todo, later)


def hand_in_cells(
    settings: Settings,
    planned: Planned,
    study_path: Path,
    ds_values: dict[str, Any],
    folder: Path,
    patterns: Sequence[str],
    work: Path = ROOT,
) -> None:
    """Check, write and submit what is planned: all of it or nothing.

    Args:
        study_path: what `planned` was read from.
        folder: RUN/slurm/<n>, not there yet.
        patterns: of --only.
        work: the checkout, where relative paths begin.

    Raises:
        ValueError, SlurmError: as `submit`.
    """
    _check(settings, planned, ds_values)
    orders = orders_of(settings, planned, folder, patterns, work, cluster.max_array_size())
    by_name = {cell.name: cell for cell in planned.every}
    used = []
    for each in planned.todo:
        recipe = by_name[each.cell].recipe
        used += [(Path(each.folder) / part.name, recipe) for part in each.parts]
        used += [(Path(part.source), recipe) for part in each.parts if part.source]
    frozen.refuse_folders_of_other_code(ROOT, used)

    def write() -> None:
        _write_scripts(settings, orders, folder, work)
        write_json(folder / "cells.json", [asdict(each) for each in planned.todo])
        (folder / "ds_config.json").write_text(json.dumps(ds_values, indent=1) + "\n")
        _write_study(planned.study, study_path, folder)
        for place, recipe in enumerate(_to_download(settings, planned)):
            (folder / f"download-{place}.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
        _mark_complete(settings.run, planned)
        for each in planned.todo:
            write_recipe(_with_workers(settings, by_name[each.cell]))

    say(_summary(planned))
    hand_in(settings, folder, orders, write)


def orders_of(
    settings: Settings,
    planned: Planned,
    folder: Path,
    patterns: Sequence[str],
    work: Path,
    max_array_size: int | None,
) -> list[Order]:
    """The sbatch calls: arrays of cells, each behind the cells that it waits for, and the job that gathers."""
    numbered = _numbered(settings.run, planned)
    number = {name: place for place, name in enumerate(numbered)}
    arguments = ("--cells", str(folder / "cells.json"), "--ds_config", str(folder / "ds_config.json"))
    stage = Stage(CELLS, CELL, (), (), tuple(numbered), arguments, array=True)
    throttle = f"%{settings.array_throttle}" if settings.array_throttle else ""
    per_job = settings.elements_of(CELL)
    orders: list[Order] = []
    downloads = _to_download(settings, planned)
    if downloads:
        recipes = [str(folder / f"download-{place}.yaml") for place, _ in enumerate(downloads)]
        fill = Stage(DOWNLOAD, DOWNLOAD, (), (), (DOWNLOAD,), ("--recipe", *recipes, "--out", str(settings.run)))
        orders.append(Order(fill, [0], folder / f"{DOWNLOAD}.sbatch", [], 0, []))
    for group in waves(planned.todo):
        elements = sorted(number[each.cell] for each in group)
        after = tuple(number[name] for name in group[0].waits_for)
        first = [DOWNLOAD] if downloads and not after else []  # must end well
        for array in arrays.split(elements, max_array_size, per_job):
            script = folder / f"{CELLS}-{len(orders) + 1}.sbatch"
            flags = [f"--array={array.text}{throttle}"]
            orders.append(
                Order(stage, list(array.elements), script, flags, array.offset, first, after, not first, per_job)
            )
    name = "choose" if planned.later else "gather"
    arguments = ("--submission", str(folder), "--work", str(work), "--name", name)
    arguments += tuple(f"--only={pattern}" for pattern in patterns)
    last = Stage(name, GATHER, (CELLS,), (), (name,), arguments)
    return [*orders, Order(last, [0], folder / f"{name}.sbatch", [], 0, [CELLS], even_if_failed=True)]


def _load(settings: Settings) -> tuple[Path, Study, dict[str, Any]]:
    """Path of the study, the study with the overrides, and the DeepSpeed JSON."""
    path = Path(settings.recipe)
    study = read_study(path, settings.recipe_overrides)
    ds_config = study.ds_config if settings.ds_config == OWN_DS_CONFIG else Path(settings.ds_config)
    return path, study, read_ds_config(ds_config, settings.ds_overrides)


def _check(settings: Settings, planned: Planned, ds_values: dict[str, Any]) -> None:
    """Raises ValueError where the ranks of a job do not fit a phase that it runs."""
    by_name = {cell.name: cell for cell in planned.every}
    for each in planned.todo:
        recipe = by_name[each.cell].recipe
        for part in each.parts:
            phase = part.name.partition("_")[0]
            section = section_of_batch(recipe, phase)
            if section and not part.source:
                stage = Stage(f"{each.cell}, {part.name}", CELL, (), (), ())
                fits.check_stage(settings, recipe, ds_values, stage, section)


def _refuse_local_runner(out: Path) -> None:
    """Raises ValueError while `python -m trainer.study` works in the folder of the study."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock(out / ".lock", f"python -m trainer.study is at work in {out}: wait for its end or end it").close()
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise


def _numbered(run: Path, planned: Planned) -> list[str]:
    """The cells by their element: what earlier submissions numbered keeps its number, "" = a cell that is no more."""
    earlier: list[str] = []
    submitted = rows(run)
    if submitted:
        for stage in stages_of(Path(submitted[-1].script).parent):
            if stage.name == CELLS:
                earlier = list(stage.artifacts)
    known = set(planned.names)
    kept = [name if name in known else "" for name in earlier]
    more = [cell.name for cell in planned.wanted]
    more += [f"{name}/seed{seed}" for seed in planned.study.seeds for name in planned.later]
    return kept + [name for name in dict.fromkeys(more) if name not in kept]


def _write_scripts(settings: Settings, orders: Sequence[Order], folder: Path, work: Path) -> None:
    folder.mkdir(parents=True)
    stages = {order.stage.name: order.stage for order in orders}
    write_json(folder / STAGES_FILE, [asdict(stage) for stage in stages.values()])
    for order in orders:
        order.script.write_text(render(settings, order, folder, work))


def _write_study(study: Study, path: Path, folder: Path) -> None:
    """The study as a file that depends on no other: what tuning chooses is submitted by the study of now."""
    values = read_yaml(path.read_text(), f"study {path}")
    values |= {"title": study.title, "base": "base.yaml", "ds_config": "ds_config.json"}
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "base.yaml").write_text(yaml.safe_dump(plain_values(study.base), sort_keys=False))


def _mark_complete(run: Path, planned: Planned) -> None:
    """Let RUN/<cell>/result.json be there for the cells that are complete, also by other ways, and for no others."""
    for cell in planned.wanted:
        mark_of_cell = run / cell.name / "result.json"
        if not cell.complete:
            mark_of_cell.unlink(missing_ok=True)
        elif not mark_of_cell.is_file():
            mark(mark_of_cell.parent, cell.folder / cell.steps[-1].name)
    for name in ("choose", "gather"):
        (run / name / "result.json").unlink(missing_ok=True)


def _with_workers(settings: Settings, cell: Cell) -> Cell:
    recipe, _ = fits.with_workers_for(settings.cpus_of(CELL), cell.recipe)
    return replace(cell, recipe=recipe)


def _to_download(settings: Settings, planned: Planned) -> list[Recipe]:
    """Recipes that name all that the hub must give before, since the jobs work offline; none where that was done."""
    by_names: dict[tuple[str, ...], Recipe] = {}
    for cell in planned.wanted:
        recipe = cell.recipe
        if cell.teacher and not cell.complete:  # a shared one is a folder that may not be there yet
            recipe = replace(recipe, teacher=replace(recipe.teacher, source=""))
        names = tuple(hub_names(recipe))
        if names and not cell.complete:
            by_names.setdefault(names, recipe)
    done = settings.run / DOWNLOAD / "result.json"
    downloaded = set(json.loads(done.read_text())["names"]) if done.is_file() else set()
    return [recipe for names, recipe in by_names.items() if not downloaded.issuperset(names)]


def _summary(planned: Planned) -> str:
    """How much there is to do, in words."""
    done = len([cell for cell in planned.wanted if cell.complete])
    lines = [f"{_count(len(planned.wanted), 'cell')}, {done} complete; to make: {len(planned.todo)}"]
    if planned.todo:
        made = sum(not part.source for each in planned.todo for part in each.parts)
        linked = sum(bool(part.source) for each in planned.todo for part in each.parts)
        in_turn = _count(number_of_waves(planned.todo), "wave")
        lines[0] += f" in {in_turn} ({_count(made, 'result')} made, {linked} shared)"
    if planned.later:
        count = len(planned.later) * len(planned.study.seeds)
        lines.append(f"then, submitted by the job choose: {_count(count, 'cell')} of {_some(planned.later)}")
    return "\n".join(lines)


def _listing(settings: Settings, planned: Planned, orders: Sequence[Order]) -> str:
    """The sbatch calls and what they cost at most."""
    of_cells = [order for order in orders if order.stage.name == CELLS]
    stage = of_cells[0].stage
    lines = [f"\nevery array: sbatch {shlex.join(header(settings, stage))}"]
    if len(orders) > len(of_cells) + 1:
        lines.append("  1 job, download, before all of them: fills the caches of the hub")
    for order in of_cells[:SHOWN]:
        names = _some([stage.artifacts[element] for element in order.elements])
        after = _some([stage.artifacts[element] for element in order.after_elements])
        waits = f", after {after}" if after else ""
        lines.append(f"  {_count(order.jobs, 'job')}, {order.flags[0]}: {names}{waits}")
    if len(of_cells) > SHOWN:
        lines.append(f"  ... and {len(of_cells) - SHOWN} more arrays")
    lines.append(f"  1 job, {orders[-1].stage.name}, after all of them")
    ranks = settings.nodes_of(CELL) * settings.ranks_of(CELL)
    jobs = sum(order.jobs for order in of_cells)
    limit = jobs * ranks * settings.hours_of(CELL)
    lines.append(
        f"{_count(len(of_cells), 'array')}, {_count(jobs, 'job')} of {_count(ranks, settings.unit)} and "
        f"{settings.time_of(CELL)}: at most "
        f"{limit:.3g} {settings.unit}-hours"
    )
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(names: Sequence[str], at_most: int = 3) -> str:
    more = f", ... ({len(names)})" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


if __name__ == "__main__":
    sys.exit(main())
