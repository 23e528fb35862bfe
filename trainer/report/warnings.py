"""What a reader of a run should know before trusting its numbers: one sentence each, the grave ones first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.report.data import PhaseRecord, at_end, hybrids, number, only_detectors, run_measure, teacher_accuracy
from trainer.tracking.health import collapse
from trainer.tracking.measures import RELATIVE_ERROR

DEAD = 0.05  # share of an even load below which an expert counts as dead
FAR_BELOW = 0.9  # share of the teacher's accuracy below which a teacher module teaches little inside the meta model
NOTHING_LEFT = 1.0  # relative error of a hybrid that is no better than zeros
KEPT = 0.95  # share of the choices that should find a slot
SHOWN = 6  # of a long list


def warnings(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> list[str]:
    """Sentences for people, the grave ones first; empty when nothing is amiss."""
    return [
        *_damage(phases),
        *_unfinished(phases),
        *experts(phases, analysis),
        *_teachers(phases),
        *told(phases),
        *_images(phases, analysis),
        *_numbers(phases),
    ]


def notes(phases: Mapping[str, PhaseRecord]) -> list[str]:
    """What happened on the way and does not spoil the result: resumes, mixed versions."""
    return [*_events(phases), *_origins(phases)]


def expected(phases: Mapping[str, PhaseRecord]) -> list[str]:
    """The phases this run is made of, as far as its recipe is known: baselines only where they are asked for."""
    records = list(phases.values())
    if only_detectors(phases):
        return [name for name, record in phases.items() if record.status != "missing"]
    known = next((record for record in records if record.config.get("recipe")), None)
    if known is None:
        return [name for name, record in phases.items() if record.status != "missing"]
    asked = (record.recipe("train", "baselines") for record in records)
    baselines = {f"train_{start}" for starts in asked if isinstance(starts, list) for start in starts}
    names = []
    for name, record in phases.items():
        asked_for = True
        if name.startswith("train_"):
            asked_for = name in baselines
        elif name == "teacher":
            asked_for = not known.recipe("teacher", "source")  # one from the hub has no phase
        if asked_for or record.status != "missing":
            names.append(name)
    return names


def dead_experts(record: PhaseRecord) -> list[tuple[str, int, float]]:
    """(layer, expert, share of an even load) of the experts that get next to nothing at the end of training."""
    dead = []
    for layer, steps in record.loads().items():
        for expert, load in enumerate(at_end(steps)):
            if load < DEAD:
                dead.append((layer, expert, load))
    return dead


def block(layer: str) -> str:
    """blocks.3.mlp -> block 3."""
    match = re.search(r"blocks\.(\d+)", layer)
    return f"block {match[1]}" if match else layer


def _damage(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    for record in phases.values():
        for problem in record.problems:
            yield f"Damaged: {problem}. What it held is left out here."


def _unfinished(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    names = expected(phases)
    for name in names:
        record = phases[name]
        if record.status.startswith("unfinished"):
            where = record.status.removeprefix("unfinished ")
            curve = record.curve()
            last = ""
            if curve:
                epoch = max(curve)
                last = f", last {record.measure.name} {record.measure.shown(curve[epoch])} after epoch {epoch}"
            yield f"Not finished: {name} {where}{last}. The same command goes on from its last checkpoint."
    missing = [name for name in names if phases[name].status == "missing"]
    if missing:
        yield f"Not there yet: {', '.join(missing)}."


def experts(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> Iterator[str]:
    """Experts without work, routers that collapsed, choices that were dropped."""
    layers = analysis["layers"] if analysis else {}
    dead = _dead(phases, layers)
    if dead:
        yield (
            f"Dead experts, with less than {DEAD:.0%} of an even share at the end of training: {_first(dead)}. Raise "
            "student.moe.importance_weight or noise_std."
        )
    collapsed = []
    for layer, values in layers.items():
        reason = collapse(values.get("first", ()))
        if reason:
            collapsed.append(f"{block(layer)}: {reason}")
    if collapsed:
        yield (
            f"Collapsed routers on the validation images: {_first(collapsed)}. Raise student.moe.importance_weight, or "
            "guide the routers by the teacher (distill.routing_weight)."
        )
    kept = {name: _kept(record) for name, record in phases.items()}
    dropping = [f"{name} {1 - share:.0%}" for name, share in kept.items() if share < KEPT]
    if dropping:
        yield (
            "Choices that found their expert full and were dropped, in the worst block at the end: "
            f"{', '.join(dropping)}. Raise student.moe.capacity_factor."
        )


def _dead(phases: Mapping[str, PhaseRecord], layers: Mapping[str, Any]) -> list[str]:
    """Experts that get next to nothing, in training (by phase) and on the validation images."""
    phases_of: dict[str, list[str]] = {}
    for name, record in phases.items():
        for layer, expert, _ in dead_experts(record):
            phases_of.setdefault(f"{block(layer)} expert {expert}", []).append(name)
    dead = [f"{expert} in {', '.join(names)}" for expert, names in phases_of.items()]
    for layer, values in layers.items():
        for expert, share in enumerate(values["load"]):
            if share * len(values["load"]) < DEAD:
                dead.append(f"{block(layer)} expert {expert} on the validation images")
    return dead


def _first(items: Sequence[str]) -> str:
    """The first of a long list, and how many more there are."""
    text = "; ".join(items[:SHOWN])
    if len(items) > SHOWN:
        text += f"; and {len(items) - SHOWN} more"
    return text


def _kept(record: PhaseRecord) -> float:
    """Share of the choices that found a slot, in the worst block at the end."""
    return min((record.series(key)[-1][1] for key in _keys(record, "kept/")), default=1.0)


def _keys(record: PhaseRecord, prefix: str) -> list[str]:
    """The keys with numbers that start like this."""
    keys = {key for row in record.rows for key in row if key.startswith(prefix)}
    return [key for key in sorted(keys) if record.series(key)]


def _teachers(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    health = (phases["meta"].result or {}).get("health")
    doubt = health.get("teacher_at_chance") if isinstance(health, dict) else None
    if doubt:
        yield f"No better than chance: {doubt}."
    teacher = teacher_accuracy(phases)
    without_classes = run_measure(phases) is RELATIVE_ERROR
    for name, hybrid, _ in hybrids(phases):
        if without_classes and hybrid is not None and hybrid >= NOTHING_LEFT:
            yield (
                f"With teacher {name} in the meta model the final tokens have a relative error of {hybrid:.3g}, no "
                "better than zeros: its student is judged by a broken meta model. Use meta.objective=theseus, "
                "meta.init=teacher, more epochs."
            )
        if teacher and hybrid is not None and hybrid < FAR_BELOW * teacher:
            yield (
                f"Teacher {name} reaches only {hybrid:.1%} inside the meta model (the whole teacher {teacher:.1%}): "
                "its student learns from a broken teacher. Use meta.objective=theseus, meta.init=teacher, more epochs."
            )


def told(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    """What the health watch said while training ran: spikes, steps that were skipped, weights that went back."""
    for name, record in phases.items():
        messages = [str(row.get("message")) for row in record.rows if row["kind"] == "warning"]
        if not messages:
            continue
        text = f"Said during {name}: {'; '.join(messages[:SHOWN])}."
        if len(messages) > SHOWN:
            text += f" There are {len(messages) - SHOWN} more in {name}/metrics.jsonl."
        yield text


def _images(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> Iterator[str]:
    skipped = []
    for name, record in phases.items():
        count = max((count for _, count in record.series("skipped_images")), default=0)
        if count:
            skipped.append(f"{name} {count}")
    if skipped:
        yield f"Unreadable training images that were left out: {', '.join(skipped)}."
    if analysis and number(analysis.get("skipped")):
        yield f"{analysis['skipped']} unreadable validation images were left out of the evaluation."


def _numbers(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    for name, record in phases.items():
        rows = [row["step"] for row in record.rows if row.get("nonfinite")]
        if rows:
            yield f"{name} logged numbers that are not finite, first at step {rows[0]}."


def _events(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    for name, record in phases.items():
        kinds = dict.fromkeys(str(event["event"]) for event in record.events)
        for kind in kinds:
            steps = [str(event["step"]) for event in record.events if event["event"] == kind]
            times = "time" if len(steps) == 1 else "times"
            yield f"{name} was {kind} {len(steps)} {times} (after step {', '.join(steps[-SHOWN:])})."


def _origins(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    done = {name: record.result for name, record in phases.items() if record.result}
    commits = {str(result.get("git_commit")) for result in done.values()}
    if len(commits) > 1:
        short = sorted(commit[:12] for commit in commits)
        yield f"The phases were made by different code: commits {', '.join(short)}."
    if any(commit.endswith("+changes") for commit in commits):
        yield "Some phases were made by code with changes that no commit holds."
    packages: dict[str, set[str]] = {}
    for result in done.values():
        for package, version in versions(result).items():
            packages.setdefault(package, set()).add(version)
    mixed = []
    for package, several in sorted(packages.items()):
        if len(several) > 1:
            mixed.append(f"{package} {' and '.join(sorted(several))}")
    if mixed:
        yield f"The phases were made with different versions: {', '.join(mixed)}."


def versions(result: Mapping[str, Any]) -> dict[str, str]:
    """Package versions as result.json names them."""
    packages = result.get("versions")
    if not isinstance(packages, dict):
        return {}
    return {str(name): str(version) for name, version in packages.items()}
