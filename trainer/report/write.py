"""The report of a run, or the comparison of several:  python -m trainer.report RUN_DIR [RUN_DIR2 ...]

Reads what the phases left in RUN_DIR (result.json, metrics.jsonl, events.jsonl, config.yaml, evaluate/analysis.json),
also of a run that is unfinished or damaged; needs neither torch nor DeepSpeed. Prints the table and writes
RUN_DIR/report.html (one file, everything in it) and RUN_DIR/report.md with learning_curves.png, hybrid_accuracy.png and
expert_load.png. Of several folders it also writes comparison.html into the first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.compare import comparison_page
from trainer.report.data import (
    PhaseRecord,
    hybrids,
    preparation,
    read_analysis,
    read_phases,
    routing_measures,
    runs_of,
    teacher_accuracy,
    total,
)
from trainer.report.run_page import run_page
from trainer.report.warnings import expected, experts, told, versions

FRACTIONS = (0.25, 0.5, 1.0)  # of a run's end-to-end epochs, at which the table gives its accuracy


def write_report(run_dir: Path) -> str:
    """Write report.html, report.md and its pictures into a run folder.

    Args:
        run_dir: the folder given as --out to trainer/run.py.

    Returns:
        The table as text (it is markdown too).

    Raises:
        ValueError: when the folder holds no phase.
    """
    run_dir = Path(run_dir)
    phases = read_phases(run_dir)
    tables = [_summary(phases), _hybrid_table(phases), _run_table(phases), *_routing_table(phases)]
    table = "\n\n".join([*tables, *_notes(phases)])
    pictures = _draw(run_dir, phases)
    if pictures is None:
        table += "\n\nNo pictures: matplotlib is not installed (`pip install matplotlib`, then run the report again)."
    gallery = [f"![{caption}]({name})" for name, caption in (pictures or {}).items()]
    text = "\n\n".join([f"# Report of {run_dir.resolve().name}", table, *gallery, _origin(phases)])
    (run_dir / "report.md").write_text(text + "\n")
    (run_dir / "report.html").write_text(run_page(run_dir.resolve().name, phases))
    return table


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Write comparison.html into the first of several run folders and return its path.

    Raises:
        ValueError: when one of the folders holds no phase.
    """
    path = Path(run_dirs[0]) / "comparison.html"
    path.write_text(comparison_page([Path(folder) for folder in run_dirs]))
    return path


def _at_fraction(record: PhaseRecord, fraction: float) -> tuple[float, float] | None:
    """(epoch, accuracy) nearest at or before a fraction of the run's epochs."""
    epochs = record.value("epochs")
    if epochs is None:
        return None
    return max(((e, a) for e, a in record.curve().items() if e <= fraction * epochs), default=None)


def _summary(phases: dict[str, PhaseRecord]) -> str:
    rows = [
        ["teacher", _percent(teacher_accuracy(phases))],
        ["meta model", _percent(phases["meta"].metric("accuracy"))],
    ]
    if phases["evaluate"].metric("accuracy") is not None:
        rows.append(["student (phase evaluate)", _percent(phases["evaluate"].metric("accuracy"))])
    return _table(["accuracy in %", ""], rows)


def _hybrid_table(phases: dict[str, PhaseRecord]) -> str:
    found = hybrids(phases) or [("module 0", None, None)]
    teachers = ["teacher module in the meta model", *(_percent(teacher) for _, teacher, _ in found)]
    students = ["student module in the meta model", *(_percent(student) for _, _, student in found)]
    return _table(["hybrid accuracy in %", *(name for name, _, _ in found)], [teachers, students])


def _run_table(phases: dict[str, PhaseRecord]) -> str:
    head = ["accuracy in % after", *(f"{fraction:.0%}" for fraction in FRACTIONS), "epochs"]
    head += ["FLOPs end to end", "FLOPs total", "seconds end to end", "seconds total"]
    rows = []
    for run, name in runs_of(phases).items():
        record = phases[run]
        points = [_at_fraction(record, fraction) for fraction in FRACTIONS]
        cells = [name, *(_percent(point and point[1]) for point in points), _number(record.value("epochs"), "g")]
        for key, form in (("flops", ".2e"), ("seconds", ".0f")):
            cells += [_number(record.value(key), form), _number(total(phases, run, key), form)]
        rows.append(cells)
    return _table(head, rows)


def _routing_table(phases: dict[str, PhaseRecord]) -> list[str]:
    """One table, or none without experts."""
    rows = [
        [name, _percent(change), _number(similarity, ".3f")] for name, change, similarity in routing_measures(phases)
    ]
    return [_table(["tokens whose expert changed, in %", "last", "similarity of experts"], rows)] if rows else []


def _notes(phases: dict[str, PhaseRecord]) -> list[str]:
    notes = [
        "Percentages are of each run's own end-to-end epochs. Total = with the preparation (meta, distill and what "
        "goes with them: clusters, experts, second round; summed as if run one after the other); the "
        "teacher is not counted."
    ]
    for run, name in runs_of(phases).items():
        for fraction in FRACTIONS:
            point, epochs = _at_fraction(phases[run], fraction), phases[run].value("epochs")
            if point and point[0] != fraction * epochs:
                notes.append(
                    f"{name}: at {fraction:.0%} of {epochs} epochs stands the accuracy after epoch {point[0]}."
                )
    known = any(record.config.get("recipe") for record in phases.values())
    wanted = expected(phases) if known else list(phases)
    absent = [name for name in wanted if phases[name].status == "missing"]
    if "teacher" in absent and teacher_accuracy(phases) is not None:
        absent.remove("teacher")  # a teacher from the hub has no phase of its own
    if absent:
        notes.append(f"Missing phases: {', '.join(absent)}.")
    for name, record in phases.items():
        if record.status.startswith("unfinished"):
            curve = record.curve()
            last = f", last accuracy {_percent(curve[max(curve)])}% after epoch {max(curve)}" if curve else ""
            notes.append(f"Not finished: {name}, {record.status}{last}.")
    notes += [*experts(phases, read_analysis(phases)), *told(phases)]
    notes += [f"Damaged: {problem}." for record in phases.values() for problem in record.problems]
    return notes


def _draw(run_dir: Path, phases: dict[str, PhaseRecord]) -> dict[str, str] | None:
    """Draw what there are numbers for: file name -> caption; None without matplotlib."""
    try:
        from trainer.report import plots
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    pictures = {}
    curves = [
        plots.Curve(name, phases[run].curve(), phases[run].value("epochs"), phases[run].value("flops"),
                           preparation(phases, run, "flops"))
        for run, name in runs_of(phases).items()
    ]  # fmt: skip
    teacher, meta = teacher_accuracy(phases), phases["meta"].metric("accuracy")
    if any(curve.accuracy for curve in curves):
        plots.draw_learning_curves(run_dir / "learning_curves.png", curves, teacher)
        pictures["learning_curves.png"] = "Accuracy against end-to-end epochs and total training cost"
    modules = hybrids(phases)
    if any(value is not None for row in modules for value in row[1:]):
        plots.draw_hybrids(run_dir / "hybrid_accuracy.png", modules, teacher, meta)
        pictures["hybrid_accuracy.png"] = "Accuracy of the meta model with one module replaced"
    loads = {name: phases[run].loads() for run, name in runs_of(phases).items() if phases[run].loads()}
    if loads:
        plots.draw_expert_load(run_dir / "expert_load.png", loads)
        pictures["expert_load.png"] = "Load of the experts as share of uniform"
    return pictures


def _origin(phases: dict[str, PhaseRecord]) -> str:
    """Where the numbers come from: commands, one line per phase, versions."""
    done = {name: record for name, record in phases.items() if record.result is not None}
    commands = list(dict.fromkeys(str(r.result["command"]) for r in done.values() if "command" in r.result))
    lines = ["## How it was made", *(f"    {command}" for command in commands)]
    keys = (("seconds", ".1f"), ("images_seen", ".0f"), ("flops", ".2e"), ("world_size", ".0f"), ("ep_size", ".0f"))
    rows = []
    for name, record in phases.items():
        config = f"{name}/config.yaml" if (record.folder / "config.yaml").exists() else "-"
        numbers = (_number(record.value(key), form) for key, form in keys)
        commit = (record.result or {}).get("git_commit")
        rows.append([name, record.status, *numbers, str(commit or "-"), config])
    head = ["phase", "status", "seconds", "images", "FLOPs", "ranks", "expert parallel", "commit", "settings"]
    found: dict[str, list[str]] = {}
    for record in done.values():
        for package, version in versions(record.result).items():
            found.setdefault(package, []).append(version)
    named = [f"{package} {' and '.join(dict.fromkeys(several))}" for package, several in sorted(found.items())]
    repeat = (
        "`python trainer/run.py --config SETTINGS --out FOLDER` repeats a phase, given the ones before it in FOLDER."
    )
    return "\n\n".join([*lines, _table(head, rows), repeat, "Versions: " + (", ".join(named) or "not recorded") + "."])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a markdown table padded to read as text; numbers to the right."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])
