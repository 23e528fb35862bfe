"""What a reader of a run should know before trusting its numbers: one sentence each, the grave ones first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.report.data import PhaseRecord, at_end, hybrids, number, teacher_accuracy
from trainer.tracking.health import collapse

DEAD = 0.05  # share of an even load below which an expert counts as dead
FAR_BELOW = 0.9  # share of the teacher's accuracy below which a teacher module teaches little inside the meta model
KEPT = 0.95  # share of the choices that should find a slot
SHOWN = 6  # of a long list


def warnings(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> list[str]:
    """Sentences for people, the grave ones first; empty when nothing is amiss."""
    parts = (_damage(phases), _unfinished(phases), experts(phases, analysis), _teachers(phases), told(phases),
             _images(phases, analysis), _numbers(phases))  # fmt: skip
    return [sentence for part in parts for sentence in part]


def notes(phases: Mapping[str, PhaseRecord]) -> list[str]:
    """What happened on the way and does not spoil the result: resumes, mixed versions."""
    return [*_events(phases), *_origins(phases)]


def expected(phases: Mapping[str, PhaseRecord]) -> list[str]:
    """The phases this run is made of, as far as its recipe is known: baselines only where they are asked for."""
    records = list(phases.values())
    known = next((record for record in records if record.config.get("recipe")), None)
    if known is None:
        return [name for name, record in phases.items() if record.status != "missing"]
    asked = (record.recipe("train", "baselines") for record in records)
    baselines = {f"train_{start}" for starts in asked if isinstance(starts, list) for start in starts}
    own_teacher = not known.recipe("teacher", "source")
    return [
        name for name, record in phases.items()
        if record.status != "missing" or (name in baselines if name.startswith("train_") else own_teacher or
                                          name != "teacher")
    ]  # fmt: skip


def dead_experts(record: PhaseRecord) -> list[tuple[str, int, float]]:
    """(layer, expert, share of an even load) of the experts that get next to nothing at the end of training."""
    return [
        (layer, expert, load)
        for layer, steps in record.loads().items()
        for expert, load in enumerate(at_end(steps))
        if load < DEAD
    ]


def block(layer: str) -> str:
    """blocks.3.mlp -> block 3."""
    found = re.search(r"blocks\.(\d+)", layer)
    return f"block {found[1]}" if found else layer


def _damage(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    for record in phases.values():
        for problem in record.problems:
            yield f"Damaged: {problem}. What it held is left out here."


def _unfinished(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    wanted = expected(phases)
    for name in wanted:
        record = phases[name]
        if record.status.startswith("unfinished"):
            curve = record.curve()
            last = f", last accuracy {100 * curve[max(curve)]:.1f}% after epoch {max(curve)}" if curve else ""
            where = record.status.removeprefix("unfinished ")
            yield f"Not finished: {name} {where}{last}. The same command goes on from its last checkpoint."
    missing = [name for name in wanted if phases[name].status == "missing"]
    if missing:
        yield f"Not there yet: {', '.join(missing)}."


def experts(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> Iterator[str]:
    """Experts without work, routers that collapsed, choices that were dropped."""
    dead = ((f"{block(layer)} expert {expert}", name) for name, record in phases.items()
            for layer, expert, _ in dead_experts(record))  # fmt: skip
    found = [f"{which} in {', '.join(names)}" for which, names in _grouped(dead).items()]
    layers = (analysis or {"layers": {}})["layers"]
    found += [f"{block(layer)} expert {expert} on the validation images" for layer, values in layers.items()
              for expert, share in enumerate(values["load"]) if share * len(values["load"]) < DEAD]  # fmt: skip
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield (
            f"Dead experts, with less than {DEAD:.0%} of an even share at the end of training: "
            f"{'; '.join(found[:SHOWN])}{more}. Raise student.moe.importance_weight or noise_std."
        )
    collapsed = [f"{block(layer)}: {why}" for layer, values in layers.items()
                 if (why := collapse(values.get("first", ())))]  # fmt: skip
    if collapsed:
        more = f"; and {len(collapsed) - SHOWN} more" if len(collapsed) > SHOWN else ""
        yield (
            f"Collapsed routers on the validation images: {'; '.join(collapsed[:SHOWN])}{more}. Raise "
            "student.moe.importance_weight, or guide the routers by the teacher (distill.routing_weight)."
        )
    kept = {name: min((record.series(key)[-1][1] for key in _keys(record, "kept/")), default=1.0)
            for name, record in phases.items()}  # fmt: skip
    if min(kept.values()) < KEPT:
        shown = ", ".join(f"{name} {1 - value:.0%}" for name, value in kept.items() if value < KEPT)
        yield (
            f"Choices that found their expert full and were dropped, in the worst block at the end: {shown}. Raise "
            "student.moe.capacity_factor."
        )


def _keys(record: PhaseRecord, prefix: str) -> list[str]:
    """The keys with numbers that start like this."""
    found = {key for row in record.rows for key in row if key.startswith(prefix)}
    return [key for key in sorted(found) if record.series(key)]


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _teachers(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    teacher = teacher_accuracy(phases)
    for name, hybrid, _ in hybrids(phases):
        if teacher and hybrid is not None and hybrid < FAR_BELOW * teacher:
            yield (
                f"Teacher {name} reaches only {hybrid:.1%} inside the meta model (the whole teacher {teacher:.1%}): "
                "its student learns from a broken teacher. Use meta.objective=theseus, meta.init=teacher, more epochs."
            )


def told(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    """What the health watch said while training ran: spikes, steps that were skipped, weights that went back."""
    for name, record in phases.items():
        messages = [str(row.get("message")) for row in record.rows if row["kind"] == "warning"]
        more = f" There are {len(messages) - SHOWN} more in {name}/metrics.jsonl." if len(messages) > SHOWN else ""
        if messages:
            yield f"Said during {name}: {'; '.join(messages[:SHOWN])}.{more}"


def _images(phases: Mapping[str, PhaseRecord], analysis: Mapping[str, Any] | None) -> Iterator[str]:
    skipped = {name: max((count for _, count in record.series("skipped_images")), default=0)
               for name, record in phases.items()}  # fmt: skip
    if any(skipped.values()):
        shown = ", ".join(f"{name} {count}" for name, count in skipped.items() if count)
        yield f"Unreadable training images that were left out: {shown}."
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
            shown = ", ".join(steps[-SHOWN:])
            yield f"{name} was {kind} {len(steps)} time{'s' * (len(steps) > 1)} (after step {shown})."


def _origins(phases: Mapping[str, PhaseRecord]) -> Iterator[str]:
    done = {name: record.result for name, record in phases.items() if record.result}
    commits = {str(result.get("git_commit")) for result in done.values()}
    if len(commits) > 1:
        yield f"The phases were made by different code: commits {', '.join(sorted(c[:12] for c in commits))}."
    if any(commit.endswith("+changes") for commit in commits):
        yield "Some phases were made by code with changes that no commit holds."
    packages: dict[str, set[str]] = {}
    for result in done.values():
        for package, version in versions(result).items():
            packages.setdefault(package, set()).add(version)
    mixed = [f"{name} {' and '.join(sorted(found))}" for name, found in sorted(packages.items()) if len(found) > 1]
    if mixed:
        yield f"The phases were made with different versions: {', '.join(mixed)}."


def versions(result: Mapping[str, Any]) -> dict[str, str]:
    """Package versions as result.json names them."""
    found = result.get("versions")
    return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}
