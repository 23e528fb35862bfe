"""The page of one run: what report.html shows, section by section. Text of the run (labels, commands) is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

from trainer.report.classes import classes_section, routing_section
from trainer.report.data import (
    FLOP_UNITS,
    PhaseRecord,
    at_end,
    distills,
    hybrids,
    number,
    peak_memory,
    preparation,
    read_analysis,
    routing_measures,
    runs_of,
    speed,
    student_accuracy,
    teacher_accuracy,
    total,
)
from trainer.report.page import duration, figure, figures, flops, gigabytes, page, percent, percent_tick, table
from trainer.report.svg import Line, bar_chart, line_chart, load_map
from trainer.report.warnings import block, expected, notes, versions, warnings

CHAIN = (
    "m2mKD teaches a modular student, a vision transformer with mixtures of experts, in four steps: a teacher; a small "
    "meta model cut into modules like it; each student module distilled inside the meta model; then the assembled "
    "student trained end to end."
)


def run_page(name: str, phases: Mapping[str, PhaseRecord]) -> str:
    """The whole page of a run called `name`."""
    analysis = read_analysis(phases)
    sections = {
        "Phases": _phases(phases),
        "Learning curves": _curves(phases),
        "Modules": _modules(phases),
        "Training loss": _losses(phases),
        "Load of the experts": _loads(phases),
        "Routing": routing_section(analysis),
        "Classes": classes_section(analysis),
        "Environment": _environment(phases),
    }
    wanted = expected(phases)
    done = sum(phases[phase].status == "done" for phase in wanted)
    state = f'<p class="{"done" if done == len(wanted) else "open"}"><b>{done} of {len(wanted)} phases complete</b></p>'
    return page(f"Run {name}", [state, _summary(phases), _warnings(phases, analysis)], sections)


def _summary(phases: Mapping[str, PhaseRecord]) -> str:
    student, teacher = student_accuracy(phases), teacher_accuracy(phases)
    cards = [("Student", percent(student), "accuracy of the modular student"),
             ("Teacher", percent(teacher), "accuracy of the model it learns from")]  # fmt: skip
    for run, title, text in (("train_scratch", "From scratch", "the same student for as many epochs, without teacher"),
                             ("train_scratch_equal_cost", "Scratch, equal cost",
                              "the same student for the cost of the whole chain")):  # fmt: skip
        accuracy = phases[run].metric("accuracy")
        if accuracy is not None:
            cards.append((title, percent(accuracy), text))
    seconds, world = total(phases, "train", "seconds"), phases["train"].value("world_size")
    cards.append(("Cost", flops(total(phases, "train", "flops")), "to train meta model, modules and student"))
    if seconds is not None and world:
        kind = "GPU" if (phases["train"].result or {}).get("device") == "cuda" else "process"
        many = f"{world:g} {kind}{'' if world == 1 else 's' if kind == 'GPU' else 'es'}"
        cards.append(("Time", duration(seconds), f"for the same on {many}: {_hours(seconds * world)} {kind} hours"))
    shown = "".join(f'<div class="card"><span>{n}</span><b>{v}</b><span>{t}</span></div>' for n, v, t in cards)
    return f'<p class="verdict">{_verdict(phases)}</p><div class="cards">{shown}</div><p class="muted">{CHAIN}</p>'


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f}" if seconds > 360_000 else f"{seconds / 3600:.2g}"


def _verdict(phases: Mapping[str, PhaseRecord]) -> str:
    """One or two sentences: what was taught by what on which data, and how it came out."""
    record = next((r for r in (phases["train"], *phases.values()) if r.config.get("recipe")), phases["train"])
    source, path = record.recipe("data", "source"), record.recipe("data", "path")
    data = "the embedded digits" if source == "digits" else f"<b>{escape(str(path or 'unknown data'))}</b>"
    teacher_name = record.recipe("teacher", "source")
    taught = f"teacher <b>{escape(str(teacher_name))}</b>" if teacher_name else "a small teacher trained here"
    variant = record.recipe("student", "variant") or f"{record.recipe('student', 'depth') or '?'} blocks"
    experts, k = record.recipe("student", "moe", "num_experts"), record.recipe("student", "moe", "k")
    about = f"A V-MoE ({escape(str(variant))}, {experts} experts, {k} per token) taught on {data} by {taught}"
    student, teacher = student_accuracy(phases), teacher_accuracy(phases)
    if student is None:
        return f"{about}. The student is not trained to the end yet."
    text = f"{about} reaches <b>{percent(student)}</b> accuracy"
    text += f", {student / teacher:.0%} of its teacher's {percent(teacher)}." if teacher else "."
    rivals = []
    for run, name in (("train_scratch", "for as many epochs"), ("train_scratch_equal_cost", "at the same total cost")):
        rival = phases[run].metric("accuracy")
        if rival is not None:
            points = 100 * (student - rival)
            apart = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
            apart = "level with" if round(points, 1) == 0 else apart
            rivals.append(f"{apart} {'it' if rivals else 'the same student trained from scratch'} {name}")
    return f"{text} That is {', and '.join(rivals)}." if rivals else text


def _warnings(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> str:
    grave, light = warnings(phases, analysis), notes(phases)
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
    rows = []
    for name, record in phases.items():
        status = record.status
        if status == "missing" and name not in expected(phases):
            continue
        curve = record.curve()
        accuracy = record.metric("accuracy") if record.result else (curve[max(curve)] if curve else None)
        accuracy = record.metric("hybrid_accuracy") if accuracy is None else accuracy
        rate, epochs, ranks = speed(record), record.value("epochs"), record.value("world_size")
        rows.append([
            escape(name), f'<span class="{"done" if status == "done" else "open"}">{escape(status)}</span>',
            percent(accuracy), f"{epochs:g}" if epochs else "–", flops(record.value("flops") or None),
            duration(record.value("seconds")), f"{rate:.4g}" if rate else "–", gigabytes(peak_memory(record)),
            f"{ranks:g}" if ranks else "–",
        ])  # fmt: skip
    head = ["phase", "status", "accuracy", "epochs", "FLOPs", "time", "images/s", "peak memory", "ranks"]
    caption = (
        "Accuracy is measured on the validation images: of a distill phase, that of the meta model with this student "
        "module in its place. FLOPs count forward and backward of every image trained on. Images/s is the median over "
        "training, all ranks together; peak memory is that of the rank that held most."
    )
    return table(head, rows, text=(1,)) + f'<p class="muted">{caption}</p>'


def _curves(phases: Mapping[str, PhaseRecord]) -> str:
    teacher = teacher_accuracy(phases)
    levels = [] if teacher is None else [("teacher", teacher)]
    runs = [(place, run, name) for place, (run, name) in enumerate(runs_of(phases).items()) if phases[run].curve()]
    if not runs:
        return ""
    reference = [(name, "dash") for name, _ in levels]
    lines = [Line(name, list(phases[run].curve().items()), place, marks=True) for place, run, name in runs]
    pictures = [figure(
        "Accuracy by epochs of end-to-end training", line_chart(lines, "epochs", "accuracy", percent_tick, levels),
        "Higher and further left is better: the same student, started from distilled modules (m2mKD) or from scratch.",
        [(line.name, str(line.colour)) for line in lines] + reference,
    )]  # fmt: skip
    priced, band = [], None
    for place, run, name in runs:
        record, before = phases[run], preparation(phases, run, "flops")
        if before is None or not record.value("flops") or not record.value("epochs"):
            continue
        per_epoch = record.value("flops") / record.value("epochs")
        priced.append(Line(name, [(before + per_epoch * e, a) for e, a in record.curve().items()], place, marks=True))
        band = (before, place) if before else band
    if priced:
        most = max(x for line in priced for x, _ in line.points)
        unit = next((unit for unit in FLOP_UNITS if unit <= most), 1.0)
        priced = [Line(p.name, [(x / unit, y) for x, y in p.points], p.colour, p.marks) for p in priced]
        shaded = [("meta model and modules", f"pale {band[1]}")] if band else []
        pictures.append(figure(
            "Accuracy by total training cost",
            line_chart(priced, FLOP_UNITS[unit], "accuracy", percent_tick, levels,
                       band and (band[0] / unit, band[1])),
            "The honest comparison: the shaded part is what m2mKD spends on meta model and modules before its student "
            "starts. The teacher's own training is not counted.",
            [(line.name, str(line.colour)) for line in priced] + reference + shaded,
        ))  # fmt: skip
    return figures(pictures)


def _modules(phases: Mapping[str, PhaseRecord]) -> str:
    rows = hybrids(phases)
    if not any(value is not None for row in rows for value in row[1:]):
        return ""
    teacher, meta = teacher_accuracy(phases), phases["meta"].metric("accuracy")
    levels = [(name, value) for name, value in (("teacher", teacher), ("meta model", meta)) if value is not None]
    lines = [(f"{name} alone, {percent(value)}", kind) for (name, value), kind in zip(levels, ("dash", "dot"))]
    names = (("with the teacher's module", 6), ("with the student's module", 0))
    picture = bar_chart([(name.removeprefix("module "), row) for name, *row in rows], names, "module", "accuracy",
                        percent_tick, levels)  # fmt: skip
    cells = [[escape(name), percent(teacher), percent(student)] for name, teacher, student in rows]
    drawn = figure(
        "Meta model with one module replaced", picture,
        "How well each module works in the others' company (module 0 is next to the input). A student's bar close to "
        "its teacher's means that this module was taught well.",
        [*((name, str(colour)) for name, colour in names), *lines],
    )  # fmt: skip
    return figures([drawn, table(["module replaced", "teacher's", "student's"], cells)])


def _losses(phases: Mapping[str, PhaseRecord]) -> str:
    groups = {"Teacher": [("teacher", phases["teacher"])], "Meta model": [("meta", phases["meta"])],
              "Distillation": [(record.folder.name, record) for record in distills(phases)],
              "End-to-end training": [(name, phases[run]) for run, name in runs_of(phases).items()]}  # fmt: skip
    falling, rates = [], []
    for title, members in groups.items():
        lines = [(place, name, record) for place, (name, record) in enumerate(members) if record.series("loss")]
        if not lines:
            continue
        legend = [(name, str(place)) for place, name, _ in lines] if len(members) > 1 else []
        losses = [Line(name, record.series("loss"), place) for place, name, record in lines]
        falling.append(figure(
            f"{title}: training loss", line_chart(losses, "optimiser step", "loss", from_zero=False),
            "Should fall and level out; a jump upwards is worth a look.", legend,
        ))  # fmt: skip
        steps = [Line(name, record.series("lr"), place) for place, name, record in lines if record.series("lr")]
        if steps:
            rates.append(figure(
                f"{title}: learning rate", line_chart(steps, "optimiser step", "learning rate"),
                "As scaled to the global batch: warm-up, then a cosine.", legend,
            ))  # fmt: skip
    folded = f"<details><summary>Learning rates</summary>{figures(rates)}</details>" if rates else ""
    return figures(falling) + folded


def _loads(phases: Mapping[str, PhaseRecord]) -> str:
    text = ""
    ramp = '<p class="ramp"><span>no work</span><i></i><span>double the even share, or more</span></p>'
    for run, name in runs_of(phases).items():
        loads = phases[run].loads()
        if not loads:
            continue
        maps = figures([
            figure(block(layer), load_map(steps), f"At the end {min(at_end(steps)):.2f} to {max(at_end(steps)):.2f} of "
                   "an even share.")
            for layer, steps in loads.items()
        ])  # fmt: skip
        body = (
            f"<p>One picture per MoE block of <b>{escape(name)}</b>, one row per expert, training time to the right. "
            "No colour is an even share of the tokens; a row that stays blue is an expert that does nothing.</p>"
            f"{ramp}{maps}"
        )
        text += body if run == "train" else f"<details><summary>The same for {escape(name)}</summary>{body}</details>"
    rows = [[escape(name), percent(change), "–" if similarity is None else f"{similarity:.3f}"]
            for name, change, similarity in routing_measures(phases)]  # fmt: skip
    if rows:
        head = ["phase", "tokens whose first expert changed", "similarity of experts"]
        text += table(head, rows) + (
            '<p class="muted">Between the last two evaluations, on the validation images; mean cosine over the pairs '
            "of experts of a block, 1 for copies.</p>"
        )
    return text


def _commit(result: Mapping[str, Any]) -> str:
    commit, changes, _ = str(result.get("git_commit") or "not in git").partition("+changes")
    return commit[:12] + changes


def _environment(phases: Mapping[str, PhaseRecord]) -> str:
    done = {name: record.result for name, record in phases.items() if record.result}
    commands = dict.fromkeys(str(result["command"]) for result in done.values() if "command" in result)
    text = ""
    if commands:
        text += f"<h3>Command</h3><pre class='wrap'>{escape(chr(10).join(commands))}</pre>"
    rows = [[escape(name), escape(_commit(result)), escape(str(result.get("device"))),
             f"{number(result.get('ep_size')) or '–'}", f"{number(result.get('global_batch')) or '–'}"]
            for name, result in done.items()]  # fmt: skip
    if rows:
        head = ["phase", "commit", "device", "expert parallel", "global batch"]
        text += "<h3>Code and machines</h3>" + table(head, rows, text=(1, 2))
    packages: dict[str, list[str]] = {}
    for name, result in done.items():
        shown = ", ".join(f"{package} {version}" for package, version in versions(result).items())
        packages.setdefault(shown or "not recorded", []).append(name)
    for shown, names in packages.items():
        of = "Packages" if len(packages) == 1 else f"Packages of {', '.join(names)}"
        text += f"<p><b>{escape(of)}:</b> {escape(shown)}</p>"
    for name, record in reversed(phases.items()):
        if record.config:
            shown = yaml.safe_dump(record.config, sort_keys=False, width=100)
            text += f"<details><summary>Recipe and DeepSpeed JSON, as phase {escape(name)} used them</summary>"
            text += f"<pre>{escape(shown)}</pre></details>"
            break
    if text:
        text += (
            "<p><code>python trainer/run.py --config OUT/PHASE/config.yaml --out FOLDER</code> repeats a phase, given "
            "the ones before it in FOLDER.</p>"
        )
    return text
