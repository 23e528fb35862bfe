"""Table and pictures of one run folder:  python -m trainer.report RUN_DIR

Reads only the result.json and metrics.jsonl of RUN_DIR's phases; needs neither torch nor DeepSpeed. Prints the table
and writes RUN_DIR/report.md with learning_curves.png, hybrid_accuracy.png, expert_load.png (trainer/report_plots.py).
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.tracking import read_metrics, relative_load

# end-to-end runs: folder -> name
RUNS = {"train": "m2mKD", "train_scratch": "scratch", "train_scratch_equal_cost": "scratch, equal total cost"}
FRACTIONS = (0.25, 0.5, 1.0)  # of a run's end-to-end epochs, at which the table gives its accuracy


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase left in its folder; result is None until the phase is complete."""

    folder: Path
    result: dict[str, Any] | None
    rows: list[dict[str, Any]]

    @property
    def status(self) -> str:
        if self.result is not None:
            return "done"
        if not self.folder.exists():
            return "missing"
        return f"unfinished (step {self.rows[-1]['step']})" if self.rows else "unfinished (nothing logged)"

    def value(self, key: str) -> Any:
        return None if self.result is None else self.result.get(key)

    def metric(self, key: str) -> float | None:
        return None if self.result is None else self.result["metrics"].get(key)

    def curve(self) -> dict[float, float]:
        """Accuracy by epochs done; the result stands in where the last epoch has no evaluation row."""
        curve = {row["epoch"]: row["accuracy"] for row in self.rows if row["kind"] == "eval"}
        if self.metric("accuracy") is not None and self.value("epochs") is not None:
            curve.setdefault(self.result["epochs"], self.metric("accuracy"))
        return {epoch: accuracy for epoch, accuracy in sorted(curve.items()) if accuracy is not None}

    def loads(self) -> dict[str, list[tuple[int, list[float]]]]:
        """Per MoE layer, in network order: (step, load per expert as share of uniform) of each logged step."""
        layers: dict[str, list[tuple[int, list[float]]]] = {}
        for row in self.rows:
            for key, shares in row.items():
                if key.startswith("load/") and None not in shares:
                    layers.setdefault(key.removeprefix("load/"), []).append((row["step"], relative_load(shares)))
        return dict(sorted(layers.items(), key=lambda item: _natural(item[0])))


def write_report(run_dir: Path) -> str:
    """Write report.md and its pictures into a run folder.

    Args:
        run_dir: the folder given as --out to trainer/run.py.

    Returns:
        The table as text (it is markdown too).

    Raises:
        ValueError: when the folder holds no phase, or a result.json or metrics.jsonl cannot be read.
    """
    run_dir = Path(run_dir)
    phases = _read_phases(run_dir)
    table = "\n\n".join([_summary(phases), _hybrid_table(phases), _run_table(phases), *_notes(phases)])
    pictures = _draw(run_dir, phases)
    if pictures is None:
        table += "\n\nNo pictures: matplotlib is not installed (`pip install matplotlib`, then run the report again)."
    gallery = [f"![{caption}]({name})" for name, caption in (pictures or {}).items()]
    text = "\n\n".join([f"# Report of {run_dir.resolve().name}", table, *gallery, _origin(phases)])
    (run_dir / "report.md").write_text(text + "\n")
    return table


def _read_phases(run_dir: Path) -> dict[str, PhaseRecord]:
    records = {path.name: _read_phase(path) for path in run_dir.glob("*") if path.is_dir()}
    numbers = [int(name.removeprefix("distill_")) for name in records if re.fullmatch(r"distill_\d+", name)]
    if "meta" in records and records["meta"].result:
        keys = records["meta"].result["metrics"]
        numbers += [int(key.removeprefix("hybrid_accuracy/")) for key in keys if key.startswith("hybrid_accuracy/")]
    distills = [f"distill_{module}" for module in range(max(numbers, default=-1) + 1)]
    order = ["teacher", "meta", *distills, *RUNS, "evaluate"]
    if not any(name in records for name in order):
        raise ValueError(
            f"{run_dir} holds no phase of a run: expected folders such as teacher, meta, distill_0, train. "
            "Give the folder that was --out of trainer/run.py."
        )
    return {name: records.get(name) or _read_phase(run_dir / name) for name in order}


def _read_phase(folder: Path) -> PhaseRecord:
    result, metrics = folder / "result.json", folder / "metrics.jsonl"
    try:
        result = json.loads(result.read_text()) if result.exists() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{result} is not JSON ({error}). Delete it and run that phase again.") from error
    return PhaseRecord(folder, result, read_metrics(metrics) if metrics.exists() else [])


def _teacher_accuracy(phases: dict[str, PhaseRecord]) -> float | None:
    own = phases["teacher"].metric("accuracy")
    return phases["meta"].metric("teacher_accuracy") if own is None else own


def _hybrids(phases: dict[str, PhaseRecord]) -> list[tuple[str, float | None, float | None]]:
    """Per module: its name, accuracy of teacher module i and of student module i, each in place of meta module i."""
    rows = []
    for module, distill in enumerate(_distills(phases)):
        teacher = phases["meta"].metric(f"hybrid_accuracy/{module}")
        teacher = distill.metric("teacher_hybrid_accuracy") if teacher is None else teacher
        rows.append((f"module {module}", teacher, distill.metric("hybrid_accuracy")))
    return rows


def _distills(phases: dict[str, PhaseRecord]) -> list[PhaseRecord]:
    return [record for name, record in phases.items() if name.startswith("distill_")]


def _preparation(phases: dict[str, PhaseRecord], run: str, key: str) -> float | None:
    """Sum of flops or seconds spent before a run's end-to-end training; None when a part is not known."""
    if run != "train":
        return 0.0
    parts = [record.value(key) for record in (phases["meta"], *_distills(phases))]
    return None if None in parts or len(parts) < 2 else sum(parts)


def _at_fraction(record: PhaseRecord, fraction: float) -> tuple[float, float] | None:
    """(epoch, accuracy) nearest at or before a fraction of the run's epochs."""
    if record.value("epochs") is None:
        return None
    return max(((e, a) for e, a in record.curve().items() if e <= fraction * record.result["epochs"]), default=None)


def _summary(phases: dict[str, PhaseRecord]) -> str:
    rows = [
        ["teacher", _percent(_teacher_accuracy(phases))],
        ["meta model", _percent(phases["meta"].metric("accuracy"))],
    ]
    if phases["evaluate"].metric("accuracy") is not None:
        rows.append(["student (phase evaluate)", _percent(phases["evaluate"].metric("accuracy"))])
    return _table(["accuracy in %", ""], rows)


def _hybrid_table(phases: dict[str, PhaseRecord]) -> str:
    hybrids = _hybrids(phases) or [("module 0", None, None)]
    teachers = ["teacher module in the meta model", *(_percent(teacher) for _, teacher, _ in hybrids)]
    students = ["student module in the meta model", *(_percent(student) for _, _, student in hybrids)]
    return _table(["hybrid accuracy in %", *(name for name, _, _ in hybrids)], [teachers, students])


def _run_table(phases: dict[str, PhaseRecord]) -> str:
    head = ["accuracy in % after", *(f"{fraction:.0%}" for fraction in FRACTIONS), "epochs"]
    head += ["FLOPs end to end", "FLOPs total", "seconds end to end", "seconds total"]
    rows = []
    for run, name in RUNS.items():
        record = phases[run]
        points = [_at_fraction(record, fraction) for fraction in FRACTIONS]
        cells = [name, *(_percent(point and point[1]) for point in points), _number(record.value("epochs"), "g")]
        for key, form in (("flops", ".2e"), ("seconds", ".0f")):
            own, before = record.value(key), _preparation(phases, run, key)
            total = None if own is None or before is None else own + before
            cells += [_number(own, form), _number(total, form)]
        rows.append(cells)
    return _table(head, rows)


def _notes(phases: dict[str, PhaseRecord]) -> list[str]:
    notes = [
        "Percentages are of each run's own end-to-end epochs. Total = with the preparation (meta and all distill "
        "phases of m2mKD, summed as if run one after the other); the teacher is not counted."
    ]
    for run, name in RUNS.items():
        for fraction in FRACTIONS:
            point, epochs = _at_fraction(phases[run], fraction), phases[run].value("epochs")
            if point and point[0] != fraction * epochs:
                notes.append(
                    f"{name}: at {fraction:.0%} of {epochs} epochs stands the accuracy after epoch {point[0]}."
                )
    absent = [name for name, record in phases.items() if record.status == "missing"]
    if "teacher" in absent and _teacher_accuracy(phases) is not None:
        absent.remove("teacher")  # a teacher from the hub has no phase of its own
    if absent:
        notes.append(f"Missing phases: {', '.join(absent)}.")
    for name, record in phases.items():
        if record.status.startswith("unfinished"):
            curve = record.curve()
            last = f", last accuracy {_percent(curve[max(curve)])}% after epoch {max(curve)}" if curve else ""
            notes.append(f"Not finished: {name}, {record.status}{last}.")
    return notes


def _draw(run_dir: Path, phases: dict[str, PhaseRecord]) -> dict[str, str] | None:
    """Draw what there are numbers for: file name -> caption; None without matplotlib."""
    try:
        from trainer import report_plots
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    pictures = {}
    curves = [
        report_plots.Curve(name, phases[run].curve(), phases[run].value("epochs"), phases[run].value("flops"),
                           _preparation(phases, run, "flops"))
        for run, name in RUNS.items()
    ]  # fmt: skip
    teacher, meta = _teacher_accuracy(phases), phases["meta"].metric("accuracy")
    if any(curve.accuracy for curve in curves):
        report_plots.draw_learning_curves(run_dir / "learning_curves.png", curves, teacher)
        pictures["learning_curves.png"] = "Accuracy against end-to-end epochs and total training cost"
    hybrids = _hybrids(phases)
    if any(value is not None for row in hybrids for value in row[1:]):
        report_plots.draw_hybrids(run_dir / "hybrid_accuracy.png", hybrids, teacher, meta)
        pictures["hybrid_accuracy.png"] = "Accuracy of the meta model with one module replaced"
    loads = {name: phases[run].loads() for run, name in RUNS.items() if phases[run].loads()}
    if loads:
        report_plots.draw_expert_load(run_dir / "expert_load.png", loads)
        pictures["expert_load.png"] = "Load of the experts as share of uniform"
    return pictures


def _origin(phases: dict[str, PhaseRecord]) -> str:
    """Where the numbers come from: commands, one line per phase, versions."""
    done = {name: record for name, record in phases.items() if record.result is not None}
    commands = list(dict.fromkeys(record.result["command"] for record in done.values() if "command" in record.result))
    lines = ["## How it was made", *(f"    {command}" for command in commands)]
    keys = ("seconds", "images_seen", "flops", "world_size", "ep_size", "git_commit")
    forms = (".1f", ".0f", ".2e", "d", "d", "")
    rows = []
    for name, record in phases.items():
        config = f"{name}/config.yaml" if (record.folder / "config.yaml").exists() else "-"
        rows.append(
            [name, record.status, *(_number(record.value(key), form) for key, form in zip(keys, forms)), config]
        )
    head = ["phase", "status", "seconds", "images", "FLOPs", "ranks", "expert parallel", "commit", "settings"]
    versions: dict[str, list[str]] = {}
    for record in done.values():
        for package, version in record.result.get("versions", {}).items():
            versions.setdefault(package, []).append(str(version))
    named = [f"{package} {' and '.join(dict.fromkeys(found))}" for package, found in sorted(versions.items())]
    repeat = (
        "`python trainer/run.py --config SETTINGS --out FOLDER` repeats a phase, given the ones before it in FOLDER."
    )
    return "\n\n".join([*lines, _table(head, rows), repeat, "Versions: " + (", ".join(named) or "not recorded") + "."])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a markdown table padded to read as text; numbers to the right."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__.split("\n\n")[1])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run (--out of trainer/run.py)")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
