"""The report of a run, or the comparison of several:  python -m trainer.report RUN_DIR [RUN_DIR2 ...]

Reads what the phases left in RUN_DIR (result.json, metrics.jsonl, events.jsonl, config.yaml, evaluate/analysis.json),
also of a run that is unfinished or damaged; needs neither torch nor DeepSpeed. Prints the table and writes
RUN_DIR/report.html (one file, everything in it) and RUN_DIR/report.md with learning_curves.png, hybrid_accuracy.png,
expert_load.png and detector_ap.png, as far as there is something to show. Of several folders it also writes
comparison.html into the first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.compare import comparison_page
from trainer.report.data import (
    PhaseRecord,
    hybrids,
    only_detectors,
    read_analysis,
    read_phases,
    routing_measures,
    run_measure,
    runs_of,
    start_of_student,
    teacher_accuracy,
    teacher_head,
    total,
)
from trainer.report.detectors import detector_charts, detector_rows, detectors_of
from trainer.report.page import NO_PICTURES, load_drawing
from trainer.report.run_page import accuracy_charts, hybrid_chart, run_page
from trainer.report.warnings import expected, experts, told, versions
from trainer.tracking.measures import ACCURACY, Measure

# what features tell of labels, in percent
LABELS_TELL = {
    "knn_accuracy": "student, k-NN accuracy in %",
    "teacher_knn_accuracy": "teacher, k-NN accuracy in %",
    "probe_accuracy": "student, linear-probe accuracy in %",
    "teacher_probe_accuracy": "teacher, linear-probe accuracy in %",
}
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
    tables = [
        _summary(phases),
        _hybrid_table(phases),
        _run_table(phases),
        *_routing_table(phases),
        *_start_table(phases),
        *_detector_table(phases),
    ]
    if only_detectors(phases):
        tables = _detector_table(phases)
    table = "\n\n".join([*tables, *_notes(phases)])
    gallery = []
    if load_drawing():
        gallery = [f"![{caption}]({name})" for name, caption in _draw(run_dir, phases).items()]
    else:
        table += f"\n\n{NO_PICTURES}"
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
    reached = [(epoch, accuracy) for epoch, accuracy in record.curve().items() if epoch <= fraction * epochs]
    return max(reached, default=None)


def _summary(phases: dict[str, PhaseRecord]) -> str:
    measure = run_measure(phases)
    rows = [["meta model", _reading(measure, phases["meta"].reached)]]
    if measure is ACCURACY:
        rows.insert(0, ["teacher", _percent(teacher_accuracy(phases))])
    if phases["evaluate"].reached is not None:
        rows.append(["student (phase evaluate)", _reading(measure, phases["evaluate"].reached)])
    for key, name in LABELS_TELL.items():
        value = phases["evaluate"].metric(key)
        if value is not None:
            rows.append([name, _percent(value)])
    return _table([_of(measure), ""], rows)


def _hybrid_table(phases: dict[str, PhaseRecord]) -> str:
    measure = run_measure(phases)
    modules = hybrids(phases) or [("module 0", None, None)]
    head = [f"hybrid {_of(measure)}"]
    teachers = ["teacher module in the meta model"]
    students = ["student module in the meta model"]
    for name, teacher, student in modules:
        head.append(name)
        teachers.append(_reading(measure, teacher))
        students.append(_reading(measure, student))
    return _table(head, [teachers, students])


def _run_table(phases: dict[str, PhaseRecord]) -> str:
    measure = run_measure(phases)
    head = [f"{_of(measure)} after", *(f"{fraction:.0%}" for fraction in FRACTIONS), "epochs"]
    head += ["FLOPs end to end", "FLOPs total", "seconds end to end", "seconds total"]
    rows = []
    for run, name in runs_of(phases).items():
        record = phases[run]
        cells = [name]
        for fraction in FRACTIONS:
            point = _at_fraction(record, fraction)
            cells.append(_reading(measure, point[1]) if point else "-")
        cells.append(_number(record.value("epochs"), "g"))
        for key, form in (("flops", ".2e"), ("seconds", ".0f")):
            cells += [_number(record.value(key), form), _number(total(phases, run, key), form)]
        rows.append(cells)
    return _table(head, rows)


def _start_table(phases: dict[str, PhaseRecord]) -> list[str]:
    """One table, or none where the start was not projected."""
    blocks = start_of_student(phases)
    if not blocks:
        return []
    head = ["start of the student, block", *(block for block, _, _ in blocks)]
    layers = ["stands for layers", *(layers for _, layers, _ in blocks)]
    errors = ["relative error behind it", *(f"{error:.3f}" for _, _, error in blocks)]
    return [_table(head, [layers, errors])]


def _routing_table(phases: dict[str, PhaseRecord]) -> list[str]:
    """One table, or none without experts."""
    rows = []
    for name, change, similarity in routing_measures(phases):
        rows.append([name, _percent(change), _number(similarity, ".3f")])
    if not rows:
        return []
    return [_table(["tokens whose expert changed, in %", "last", "similarity of experts"], rows)]


def _detector_table(phases: dict[str, PhaseRecord]) -> list[str]:
    """One table, or none without a detector that was evaluated."""
    head, rows = detector_rows(detectors_of(phases))
    return [_table(head, rows)] if rows else []


def _notes(phases: dict[str, PhaseRecord]) -> list[str]:
    of_chain = [
        "Percentages are of each run's own end-to-end epochs. Total = with the preparation (meta, distill and what "
        "goes with them: clusters, experts, second round; summed as if run one after the other); the "
        "teacher is not counted."
    ]
    notes = [] if only_detectors(phases) else of_chain
    head = teacher_head(phases)
    if head:
        notes.append(head)
    for run, name in runs_of(phases).items():
        epochs = phases[run].value("epochs")
        for fraction in FRACTIONS:
            epoch, _ = _at_fraction(phases[run], fraction) or (None, None)
            if epoch is not None and epoch != fraction * epochs:
                what = phases[run].measure.name
                notes.append(f"{name}: at {fraction:.0%} of {epochs} epochs stands the {what} after epoch {epoch}.")
    known = any(record.config.get("recipe") for record in phases.values())
    names = expected(phases) if known else list(phases)
    absent = [name for name in names if phases[name].status == "missing"]
    if "teacher" in absent and teacher_accuracy(phases) is not None:
        absent.remove("teacher")  # a teacher from the hub has no phase of its own
    if absent:
        notes.append(f"Missing phases: {', '.join(absent)}.")
    for name, record in phases.items():
        if record.status.startswith("unfinished"):
            curve = record.curve()
            last = ""
            if curve:
                epoch = max(curve)
                last = f", last {record.measure.name} {record.measure.shown(curve[epoch])} after epoch {epoch}"
            notes.append(f"Not finished: {name}, {record.status}{last}.")
    notes += [*experts(phases, read_analysis(phases)), *told(phases)]
    notes += [f"Damaged: {problem}." for record in phases.values() for problem in record.problems]
    return notes


def _draw(run_dir: Path, phases: dict[str, PhaseRecord]) -> dict[str, str]:
    """Draw what there are numbers for: file name -> caption. Needs matplotlib."""
    from trainer.report import drawing

    captions = {}
    charts = accuracy_charts(phases)
    if charts:
        (run_dir / "learning_curves.png").write_bytes(drawing.png(charts))
        what = run_measure(phases).name.capitalize()
        captions["learning_curves.png"] = f"{what} against end-to-end epochs and total training cost"
    chart = hybrid_chart(phases)
    if chart:
        (run_dir / "hybrid_accuracy.png").write_bytes(drawing.png([chart]))
        what = run_measure(phases).name.capitalize()
        captions["hybrid_accuracy.png"] = f"{what} of the meta model with one module replaced"
    loads = {name: phases[run].loads() for run, name in runs_of(phases).items()}
    loads = {name: layers for name, layers in loads.items() if layers}
    if loads:
        (run_dir / "expert_load.png").write_bytes(drawing.expert_load_png(loads))
        captions["expert_load.png"] = "Load of the experts as share of uniform"
    charts = detector_charts(detectors_of(phases))
    if charts:
        (run_dir / "detector_ap.png").write_bytes(drawing.png(charts))
        captions["detector_ap.png"] = "COCO's AP of the detectors by epochs of their training"
    return captions


def _origin(phases: dict[str, PhaseRecord]) -> str:
    """Where the numbers come from: commands, one line per phase, versions."""
    results = [record.result for record in phases.values() if record.result is not None]
    commands = dict.fromkeys(str(result["command"]) for result in results if "command" in result)
    lines = ["## How it was made", *(f"    {command}" for command in commands)]
    keys = {"seconds": ".1f", "images_seen": ".0f", "flops": ".2e", "world_size": ".0f", "ep_size": ".0f"}
    rows = []
    for name, record in phases.items():
        config = f"{name}/config.yaml" if (record.folder / "config.yaml").exists() else "-"
        numbers = (_number(record.value(key), form) for key, form in keys.items())
        commit = (record.result or {}).get("git_commit")
        rows.append([name, record.status, *numbers, str(commit or "-"), config])
    head = ["phase", "status", "seconds", "images", "FLOPs", "ranks", "expert parallel", "commit", "settings"]
    packages: dict[str, list[str]] = {}
    for result in results:
        for package, version in versions(result).items():
            packages.setdefault(package, []).append(version)
    named = []
    for package, several in sorted(packages.items()):
        named.append(f"{package} {' and '.join(dict.fromkeys(several))}")
    repeat = (
        "`python trainer/run.py --config SETTINGS --out FOLDER` repeats a phase, given the ones before it in FOLDER."
    )
    recorded = ", ".join(named) or "not recorded"
    return "\n\n".join([*lines, _table(head, rows), repeat, f"Versions: {recorded}."])


def _of(measure: Measure) -> str:
    """A measure as the head of a table: accuracies stand there in percent."""
    return "accuracy in %" if measure is ACCURACY else measure.name


def _reading(measure: Measure, value: float | None) -> str:
    """A value below such a head."""
    if measure is ACCURACY:
        return _percent(value)
    return "-" if value is None else measure.shown(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a markdown table padded to read as text; numbers to the right."""
    first, *others = zip(head, *rows)  # columns
    first_width = max(map(len, first))
    widths = [max(map(len, column)) for column in others]

    def line(first_cell: str, *cells: str) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        return f"| {' | '.join([first_cell.ljust(first_width), *padded])} |"

    rule = line("-" * first_width, *("-" * (width - 1) + ":" for width in widths))
    return "\n".join([line(*head), rule, *(line(*row) for row in rows)])
