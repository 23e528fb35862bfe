"""The page of one run: what report.html shows, section by section. Text of the run (labels, commands) is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from trainer.config.student import LIKE_TEACHER
from trainer.report.charts import BarChart, Beginning, Line, LineChart, LoadMap, in_flop_units
from trainer.report.circuit import circuit_section
from trainer.report.classes import classes_section, routing_section
from trainer.report.data import (
    PhaseRecord,
    at_end,
    cost_curve,
    distills,
    hybrids,
    number,
    only_detectors,
    peak_memory,
    preparation,
    read_analysis,
    read_judged,
    routing_measures,
    run_measure,
    runs_of,
    speed,
    start_of_student,
    student_reached,
    teacher_accuracy,
    teacher_head,
    total,
)
from trainer.report.detectors import detector_cards, detector_section, detector_verdict, detectors_of
from trainer.report.judged import JUDGED, judged_sections
from trainer.report.page import duration, figure, figures, flops, gigabytes, page, percent, reading, table, tick
from trainer.report.warnings import block, expected, notes, versions, warnings
from trainer.tracking.measures import ACCURACY, AP, Measure

CHAIN = (
    "m2mKD teaches a modular student, a vision transformer with mixtures of experts, in four steps: a teacher; a small "
    "meta model cut into modules like it; each student module distilled inside the meta model; then the assembled "
    "student trained end to end."
)
STEP = "optimiser step"
# baseline -> title of its card, what it is, how it compares in the verdict
RIVALS = {
    "train_scratch": (
        "From scratch",
        "the same student for as many epochs, without teacher",
        "for as many epochs",
    ),
    "train_scratch_equal_cost": (
        "Scratch, equal cost",
        "the same student for the cost of the whole chain",
        "at the same total cost",
    ),
}


def run_page(name: str, phases: Mapping[str, PhaseRecord]) -> str:
    """The whole page of a run called `name`, as HTML."""
    analysis = read_analysis(phases)
    judged = _judged(phases)
    sections = {
        "Phases": _phases(phases),
        "Learning curves": _curves(phases),
        "Start of the student": _start(phases),
        "Modules": _modules(phases),
        "Training loss": _losses(phases),
        "Load of the experts": _loads(phases),
        "Routing": routing_section(analysis),
        "Circuit": circuit_section(analysis, phases["evaluate"].metric("accuracy")),
        "Classes": classes_section(analysis),
        "Detectors": detector_section(phases),
        **judged,
        "Environment": _environment(phases),
    }
    names = expected(phases)
    done = sum(phases[phase].status == "done" for phase in names)
    kind = "done" if done == len(names) else "open"
    state = f'<p class="{kind}"><b>{done} of {len(names)} phases complete</b></p>'
    return page(f"Run {name}", [state, _summary(phases), _warnings(phases, analysis)], sections)


def _judged(phases: Mapping[str, PhaseRecord]) -> dict[str, str]:
    """What evaluate.tasks left, a section each."""
    judged = read_judged(phases)
    if judged is None:
        return {}
    try:
        return judged_sections(judged)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        record = phases["evaluate"]
        record.problems.append(f"{record.folder.name}/{JUDGED} is not what an evaluation writes")
        return {}


def accuracy_charts(phases: Mapping[str, PhaseRecord]) -> list[LineChart]:
    """Accuracy (or relative error) of the end-to-end runs by epochs and, where the FLOPs are known, by total cost."""
    measure = run_measure(phases)
    what = measure.name.capitalize()
    teacher = teacher_accuracy(phases)
    levels = []
    if teacher is not None:
        levels.append(("teacher", teacher))
    by_epochs = []
    by_cost = []
    beginning = None
    for colour, (run, name) in enumerate(runs_of(phases).items()):
        curve = list(phases[run].curve().items())
        if not curve:
            continue
        by_epochs.append(Line(name, curve, colour, marks=True))
        priced = cost_curve(phases, run)
        if priced:
            by_cost.append(Line(name, priced, colour, marks=True))
            before = preparation(phases, run, "flops")
            if before:
                beginning = Beginning("meta model and modules", before, colour)
    if not by_epochs:
        return []
    title = f"{what} by epochs of end-to-end training"
    charts = [LineChart(title, by_epochs, "epochs", _axis(measure), tick(measure), levels)]
    if by_cost:
        lines, unit, unit_name = in_flop_units(by_cost)
        if beginning:
            beginning = Beginning(beginning.name, beginning.end / unit, beginning.colour)
        title = f"{what} by total training cost"
        charts.append(LineChart(title, lines, unit_name, _axis(measure), tick(measure), levels, beginning))
    return charts


def _axis(measure: Measure) -> str:
    return f"{measure.name} on the validation images"


def hybrid_chart(phases: Mapping[str, PhaseRecord]) -> BarChart | None:
    """Accuracy (or relative error) of the meta model with one module replaced; None where nothing is known."""
    measure = run_measure(phases)
    rows = hybrids(phases)
    if all(row[1:] == (None, None) for row in rows):
        return None
    levels = []
    for name, value in (("teacher", teacher_accuracy(phases)), ("meta model", phases["meta"].reached)):
        if value is not None:
            levels.append((f"{name} alone, {reading(measure, value)}", value))
    groups = [(name.removeprefix("module "), accuracies) for name, *accuracies in rows]
    names = (("with the teacher's module", 6), ("with the student's module", 0))
    title = "Meta model with one module replaced"
    return BarChart(title, groups, names, "module", _axis(measure), tick(measure), levels)


def _summary(phases: Mapping[str, PhaseRecord]) -> str:
    detectors = detectors_of(phases)
    if only_detectors(phases):
        return f'<p class="verdict">{detector_verdict(detectors)}</p>{_cards(detector_cards(detectors))}'
    measure = run_measure(phases)
    student = reading(measure, student_reached(phases))
    if measure is ACCURACY:
        cards = [
            ("Student", student, "accuracy of the modular student"),
            ("Teacher", percent(teacher_accuracy(phases)), "accuracy of the model it learns from"),
        ]
    else:
        cards = [("Student", student, "relative error of its final tokens beside the teacher's"), *_of_labels(phases)]
    for run, (title, text, _) in RIVALS.items():
        value = phases[run].reached
        if value is not None:
            cards.append((title, reading(measure, value), text))
    cards += detector_cards(detectors)
    cards.append(("Cost", flops(total(phases, "train", "flops")), "to train meta model, modules and student"))
    seconds = total(phases, "train", "seconds")
    ranks = phases["train"].value("world_size")
    if seconds is not None and ranks:
        on_gpus = (phases["train"].result or {}).get("device") == "cuda"
        unit, plural = ("GPU", "s") if on_gpus else ("process", "es")
        if ranks == 1:
            plural = ""
        hours = f"{_hours(seconds * ranks)} {unit} hours"
        cards.append(("Time", duration(seconds), f"for the same on {ranks:g} {unit}{plural}: {hours}"))
    told = f"{CHAIN} {escape(teacher_head(phases))}".strip()
    return f'<p class="verdict">{_verdict(phases)}</p>{_cards(cards)}<p class="muted">{told}</p>'


def _cards(cards: Sequence[tuple[str, str, str]]) -> str:
    """(title, figure, what it is) each."""
    shown = "".join(
        f'<div class="card"><span>{title}</span><b>{value}</b><span>{text}</span></div>' for title, value, text in cards
    )
    return f'<div class="cards">{shown}</div>'


def _of_labels(phases: Mapping[str, PhaseRecord]) -> list[tuple[str, str, str]]:
    """Cards of what the pooled features tell of labels, where the images have them."""
    cards = []
    for key, title in (("knn_accuracy", "k-NN"), ("probe_accuracy", "Linear probe")):
        student, teacher = (phases["evaluate"].metric(name) for name in (key, f"teacher_{key}"))
        if student is not None:
            text = f"accuracy on the student's features; {percent(teacher)} on the teacher's"
            cards.append((title, percent(student), text))
    return cards


def _hours(seconds: float) -> str:
    """Two digits, and whole hours above a hundred."""
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours > 100 else f"{hours:.2g}"


def _verdict(phases: Mapping[str, PhaseRecord]) -> str:
    """One or two sentences: what was taught by what on which data, and how it came out."""
    about = _about(phases)
    measure = run_measure(phases)
    student = student_reached(phases)
    teacher = teacher_accuracy(phases)
    if student is None:
        return f"{about}. The student is not trained to the end yet."
    if measure is ACCURACY:
        text = f"{about} reaches <b>{percent(student)}</b> accuracy"
    else:
        text = f"{about}, without classes, comes to a relative error of <b>{measure.shown(student)}</b>"
    if teacher:
        text += f", {student / teacher:.0%} of its teacher's {percent(teacher)}."
    else:
        text += "."
    comparisons = []
    for run, (_, _, at_what) in RIVALS.items():
        rival = phases[run].reached
        if rival is not None:
            named = "it" if comparisons else "the same student trained from scratch"
            comparisons.append(f"{_apart(measure, student - rival)} {named} {at_what}")
    if comparisons:
        text += f" That is {', and '.join(comparisons)}."
    return text


def _about(phases: Mapping[str, PhaseRecord]) -> str:
    """The student, the data and the teacher, as the first recipe that is known names them."""
    candidates = (phases["train"], *phases.values())
    record = next((record for record in candidates if record.config.get("recipe")), phases["train"])
    data = "the embedded digits"
    path = record.recipe("data", "path")
    if path or record.recipe("data", "source") not in ("digits", "auto"):
        path = path or "unknown data"
        data = f"<b>{escape(str(path))}</b>"
    teacher = "a small teacher trained here"
    source = record.recipe("teacher", "source")
    if source:
        teacher = f"teacher <b>{escape(str(source))}</b>"
    if record.recipe("student", "kind") == "nac":
        graph = record.recipe("student", "nac", "graph")
        return f"A NAC (circuit started from a {escape(str(graph))} graph) taught on {data} by {teacher}"
    variant = record.recipe("student", "variant")
    if variant == LIKE_TEACHER:
        variant = "half its teacher's blocks"
    elif not variant:
        variant = f"{record.recipe('student', 'depth') or '?'} blocks"
    experts = record.recipe("student", "moe", "num_experts")
    k = record.recipe("student", "moe", "k")
    return f"A V-MoE ({escape(str(variant))}, {experts} experts, {k} per token) taught on {data} by {teacher}"


def _apart(measure: Measure, difference: float) -> str:
    """A difference of accuracies or of relative errors in words."""
    if measure is not ACCURACY:
        return f"{measure.shown(abs(difference))} {'above' if difference > 0 else 'below'}"
    points = 100 * difference
    if round(points, 1) == 0:
        return "level with"
    if points > 0:
        return f"{points:.1f} points above"
    return f"{-points:.1f} points below"


def _warnings(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> str:
    grave = warnings(phases, analysis)
    light = notes(phases)
    text = ""
    if grave:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in grave)
        text += f'<div class="warnings"><b>Look at this first</b><ul>{items}</ul></div>'
    if light:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in light)
        text += f"<details><summary>{len(light)} notes on how this run went</summary>"
        text += f'<ul class="notes">{items}</ul></details>'
    return text


def _phases(phases: Mapping[str, PhaseRecord]) -> str:
    names = expected(phases)
    rows = []
    for name, record in phases.items():
        status = record.status
        if status == "missing" and name not in names:
            continue
        kind = "done" if status == "done" else "open"
        reached = reading(record.measure, _reached(record))
        if record.measure is AP:
            reached = f"AP {reached}"
        cells = [
            escape(name),
            f'<span class="{kind}">{escape(status)}</span>',
            reached,
            _shown(record.value("epochs")),
            flops(record.value("flops") or None),
            duration(record.value("seconds")),
            _shown(speed(record), ".4g"),
            gigabytes(peak_memory(record)),
            _shown(record.value("world_size")),
        ]
        rows.append(cells)
    measure = run_measure(phases)
    head = ["phase", "status", measure.name, "epochs", "FLOPs", "time", "images/s", "peak memory", "ranks"]
    caption = (
        f"{measure.name.capitalize()} is measured on the validation images: of a distill phase, that of the meta model "
        "with this student module in its place; of a detector it is COCO's AP. FLOPs count forward and backward of "
        "every image trained on. Images/s is the median over training, all ranks together; peak memory is that of the "
        "rank that held most."
    )
    return table(head, rows, text=(1,)) + f'<p class="muted">{caption}</p>'


def _start(phases: Mapping[str, PhaseRecord]) -> str:
    """What each block of a projected start stands for, and how far its states are off; empty for other starts."""
    blocks = start_of_student(phases)
    if not blocks:
        return ""
    rows = [[block, layers, f"{error:.3f}"] for block, layers, error in blocks]
    caption = (
        "Before any training: |z - P h|^2 / |P h|^2 behind each block on the images it was fitted on, with z the "
        "student's states and P h the dense model's in the student's width (docs/method.md)."
    )
    head = ["block", "stands for layers", "relative error behind it"]
    return table(head, rows) + f'<p class="muted">{caption}</p>'


def _reached(record: PhaseRecord) -> float | None:
    """The measure of a finished phase, else of its last evaluation; of a distill phase that of the hybrid."""
    value = record.reached
    curve = record.curve()
    if not record.result and curve:
        value = curve[max(curve)]
    if value is None:
        value = record.metric(f"hybrid_{record.measure.key}")
    return value


def _shown(value: float | None, form: str = "g") -> str:
    return format(value, form) if value else "–"


def _curves(phases: Mapping[str, PhaseRecord]) -> str:
    better = "Higher" if run_measure(phases).higher_is_better else "Lower"
    captions = (
        f"{better} and further left is better: the same student, started from distilled modules (m2mKD) or from "
        "scratch.",
        "The honest comparison: the shaded part is what m2mKD spends on meta model and modules before its student "
        "starts. The teacher's own training is not counted.",
    )
    return figures([figure(chart, caption) for chart, caption in zip(accuracy_charts(phases), captions)])


def _modules(phases: Mapping[str, PhaseRecord]) -> str:
    chart = hybrid_chart(phases)
    if chart is None:
        return ""
    caption = (
        "How well each module works in the others' company (module 0 is next to the input). A student's bar close to "
        "its teacher's means that this module was taught well."
    )
    measure = run_measure(phases)
    cells = []
    for name, teacher, student in hybrids(phases):
        cells.append([escape(name), reading(measure, teacher), reading(measure, student)])
    return figures([figure(chart, caption), table(["module replaced", "teacher's", "student's"], cells)])


def _losses(phases: Mapping[str, PhaseRecord]) -> str:
    groups = {
        "Teacher": {"teacher": phases["teacher"]},
        "Meta model": {"meta": phases["meta"]},
        "Distillation": {record.folder.name: record for record in distills(phases)},
        "End-to-end training": {name: phases[run] for run, name in runs_of(phases).items()},
        "Detectors": detectors_of(phases),
    }
    losses = []
    rates = []
    for title, members in groups.items():
        named = len(members) > 1  # whether a legend is needed
        lines = _lines(members, "loss")
        if not lines:
            continue
        chart = LineChart(f"{title}: training loss", lines, STEP, "loss", from_zero=False, with_legend=named)
        losses.append(figure(chart, "Should fall and level out; a jump upwards is worth a look."))
        lines = _lines(members, "lr")
        if lines:
            chart = LineChart(f"{title}: learning rate", lines, STEP, "learning rate", with_legend=named)
            rates.append(figure(chart, "As scaled to the global batch: warm-up, then a cosine."))
    text = figures(losses)
    if figures(rates):
        text += f"<details><summary>Learning rates</summary>{figures(rates)}</details>"
    return text


def _lines(members: Mapping[str, PhaseRecord], key: str) -> list[Line]:
    """A line for each phase that has logged the key; its colour is its place."""
    lines = []
    for colour, (name, record) in enumerate(members.items()):
        points = record.series(key)
        if points:
            lines.append(Line(name, points, colour))
    return lines


def _loads(phases: Mapping[str, PhaseRecord]) -> str:
    text = ""
    detectors = {name: name for name in detectors_of(phases)}
    for run, name in (runs_of(phases) | detectors).items():
        maps = _load_maps(phases[run], name)
        if run != "train" and maps:
            maps = f"<details><summary>The same for {escape(name)}</summary>{maps}</details>"
        text += maps
    rows = []
    for name, change, similarity in routing_measures(phases):
        alike = "–" if similarity is None else f"{similarity:.3f}"
        rows.append([escape(name), percent(change), alike])
    if rows:
        head = ["phase", "tokens whose first expert changed", "similarity of experts"]
        text += table(head, rows) + (
            '<p class="muted">Between the last two evaluations, on the validation images; mean cosine over the pairs '
            "of experts of a block, 1 for copies.</p>"
        )
    return text


def _load_maps(record: PhaseRecord, name: str) -> str:
    pictures = []
    for layer, steps in record.loads().items():
        end = at_end(steps)
        caption = f"At the end {min(end):.2f} to {max(end):.2f} of an even share."
        pictures.append(figure(LoadMap(block(layer), steps), caption))
    maps = figures(pictures)
    if not maps:
        return ""
    return (
        f"<p>One picture per MoE block of <b>{escape(name)}</b>, one row per expert, training time to the right. "
        "No colour is an even share of the tokens; a row that stays blue is an expert that does nothing.</p>"
        '<p class="ramp"><span>no work</span><i></i><span>double the even share, or more</span></p>'
        f"{maps}"
    )


def _environment(phases: Mapping[str, PhaseRecord]) -> str:
    done = {name: record.result for name, record in phases.items() if record.result}
    commands = dict.fromkeys(str(result["command"]) for result in done.values() if "command" in result)
    text = ""
    if commands:
        lines = "\n".join(commands)
        text += f"<h3>Command</h3><pre class='wrap'>{escape(lines)}</pre>"
    rows = []
    packages: dict[str, list[str]] = {}
    for name, result in done.items():
        sizes = [f"{number(result.get(key)) or '–'}" for key in ("ep_size", "global_batch")]
        rows.append([escape(name), escape(_commit(result)), escape(str(result.get("device"))), *sizes])
        named = ", ".join(f"{package} {version}" for package, version in versions(result).items())
        packages.setdefault(named or "not recorded", []).append(name)
    if rows:
        head = ["phase", "commit", "device", "expert parallel", "global batch"]
        text += "<h3>Code and machines</h3>" + table(head, rows, text=(1, 2))
    for named, names in packages.items():
        whose = "Packages" if len(packages) == 1 else f"Packages of {', '.join(names)}"
        text += f"<p><b>{escape(whose)}:</b> {escape(named)}</p>"
    configured = [name for name, record in phases.items() if record.config]
    if configured:
        last = configured[-1]
        shown = yaml.safe_dump(phases[last].config, sort_keys=False, width=100)
        text += f"<details><summary>Recipe and DeepSpeed JSON, as phase {escape(last)} used them</summary>"
        text += f"<pre>{escape(shown)}</pre></details>"
    if text:
        text += (
            "<p><code>python trainer/run.py --config OUT/PHASE/config.yaml --out FOLDER</code> repeats a phase, given "
            "the ones before it in FOLDER.</p>"
        )
    return text


def _commit(result: Mapping[str, Any]) -> str:
    commit, changes, _ = str(result.get("git_commit") or "not in git").partition("+changes")
    return commit[:12] + changes
