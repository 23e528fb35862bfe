"""What the reports read: the phases of one run folder, and the figures that follow from them. No torch, no pictures.

A run may be unfinished or damaged: what can be read is read, and `problems` of a phase says what cannot.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.config.phases import STARTS
from trainer.request.graph import TABLE, artifact_name
from trainer.tracking.measures import ACCURACY, RELATIVE_ERROR, Measure, measure_of
from trainer.tracking.metrics import relative_load

# end-to-end runs: folder -> name
RUNS = {
    "train": "m2mKD",
    "train_scratch": "scratch",
    "train_scratch_equal_cost": "scratch, equal total cost",
    "train_upcycled": "upcycled",
}
DETECTORS = tuple(artifact_name("detect", start=start) for start in STARTS)
FLOP_UNITS = {1e21: "ZFLOP", 1e18: "EFLOP", 1e15: "PFLOP", 1e12: "TFLOP", 1e9: "GFLOP", 1e6: "MFLOP", 1.0: "FLOP"}
CIRCUIT = ("prior", "links", "mass_before", "mass_after", "use")  # matrices of analysis.json
CLASS_COUNTS = ("images", "correct", "predicted", "taken_for", "taken_count")  # of analysis.json
PREPARING = tuple(row.name for row in TABLE if row.prepares)  # their cost comes before end-to-end training
END_SHARE = 0.1  # of the logged steps: what "at the end" of training averages over

Loads = Mapping[str, Sequence[tuple[int, Sequence[float]]]]  # layer -> (step, load per expert) of each logged step


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase left in its folder; result is None until the phase is complete."""

    folder: Path
    result: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # config.yaml: recipe, ds_config, command
    problems: list[str] = field(default_factory=list)  # files that cannot be read

    @property
    def status(self) -> str:
        """done, damaged, missing or unfinished, with the last step."""
        if self.result is not None:
            return "done"
        if not self.folder.exists():
            return "missing"
        if (self.folder / "result.json").exists():
            return "damaged"
        if not self.rows:
            return "unfinished (nothing logged)"
        return f"unfinished (step {self.rows[-1]['step']})"

    def value(self, key: str) -> float | None:
        """A number of result.json."""
        return number((self.result or {}).get(key))

    def metric(self, key: str) -> float | None:
        """A number of result.json's metrics."""
        return number((self.result or {}).get("metrics", {}).get(key))

    @property
    def measure(self) -> Measure:
        """What this phase is judged by."""
        evaluations = [row for row in self.rows if row["kind"] == "eval"]
        evaluations.append((self.result or {}).get("metrics", {}))
        return next((found for found in map(measure_of, evaluations) if found is not ACCURACY), ACCURACY)

    @property
    def reached(self) -> float | None:
        """Its measure in result.json."""
        return self.metric(self.measure.key)

    def series(self, key: str, kind: str = "train") -> list[tuple[int, float]]:
        """(step, value) of every row of a kind that has the key."""
        logged = ((row["step"], number(row.get(key))) for row in self.rows if row["kind"] == kind)
        return [(step, value) for step, value in logged if value is not None]

    def curve(self, key: str = "") -> dict[float, float]:
        """A figure (its measure) by epochs; the result stands in where the last epoch has no evaluation row."""
        key = key or self.measure.key
        curve = {row["epoch"]: number(row.get(key)) for row in self.rows if row["kind"] == "eval"}
        epochs = self.value("epochs")
        final = self.metric(key)
        if final is not None and epochs is not None:
            curve.setdefault(epochs, final)
        return {epoch: value for epoch, value in sorted(curve.items()) if value is not None}

    def loads(self) -> dict[str, list[tuple[int, list[float]]]]:
        """Per MoE layer, in network order: (step, load per expert as share of uniform) of each logged step."""
        layers: dict[str, list[tuple[int, list[float]]]] = {}
        for row in self.rows:
            for key, shares in row.items():
                if not key.startswith("load/") or not _are_numbers(shares):
                    continue
                steps = layers.setdefault(key.removeprefix("load/"), [])
                if not steps or len(steps[0][1]) == len(shares):
                    steps.append((row["step"], relative_load(shares)))
        return dict(sorted(layers.items(), key=lambda item: natural(item[0])))

    def recipe(self, *keys: str) -> Any:
        """A value of the recipe this phase was run with, None where it is not known."""
        value: Any = self.config.get("recipe")
        for key in keys:
            if not isinstance(value, dict):
                return None
            value = value.get(key)
        return value


def read_phases(run_dir: Path) -> dict[str, PhaseRecord]:
    """The phases of a run folder in the order of the chain; those it lacks have the status "missing".

    Raises:
        ValueError: when the folder holds no phase.
    """
    records = {path.name: read_phase(path) for path in run_dir.glob("*") if path.is_dir()}
    if "assemble" in records:  # a teacher that was grown
        records["teacher"] = records["assemble"]
    elif "probe" in records:  # a teacher that was given, and what its head is
        records.setdefault("teacher", records["probe"])
    modules = [int(name.removeprefix("distill_")) for name in records if re.fullmatch(r"distill_\d{1,4}", name)]
    if "meta" in records and records["meta"].result:
        names = records["meta"].result["metrics"]
        measured = (re.fullmatch(r"hybrid_(?:accuracy|relative_error)/(\d{1,4})", name) for name in names)
        modules += [int(match[1]) for match in measured if match]
    distilled = [f"distill_{module}" for module in range(max(modules, default=-1) + 1)]
    before, after = PREPARING[1 : PREPARING.index("distill")], PREPARING[PREPARING.index("distill") + 1 :]
    order = [
        "teacher",
        "meta",
        *_results_of(before, records),
        *distilled,
        *_results_of(after, records),
        *RUNS,
        "evaluate",
        *_detectors(records),
    ]
    if not any(name in records for name in order):
        raise ValueError(
            f"{run_dir} holds no phase of a run: expected folders such as teacher, meta, distill_0, train. "
            "Give the folder that was --out of trainer/run.py."
        )
    if "train_upcycled" not in records:  # a baseline of those who ask for it; the others show what is missing
        order.remove("train_upcycled")
    return {name: records.get(name) or PhaseRecord(run_dir / name) for name in order}


def _results_of(phases: Sequence[str], records: Mapping[str, PhaseRecord]) -> list[str]:
    """Those of phases that go by module or expert, module 9 before module 10."""
    pattern = re.compile(rf"({'|'.join(phases)})_\d{{1,4}}(_\d{{1,6}})?")
    return sorted(filter(pattern.fullmatch, records), key=natural)


def _detectors(records: Mapping[str, PhaseRecord]) -> list[str]:
    """Those that are there, else the one that the recipe asks for."""
    found = [name for name in DETECTORS if name in records]
    for record in records.values():
        student_has_maps = record.recipe("student", "kind") != "nac"
        asked_for = record.recipe("detect", "epochs") and (student_has_maps or record.recipe("detect", "backbone"))
        if asked_for and not found:
            return [DETECTORS[0]]
    return found


def only_detectors(phases: Mapping[str, PhaseRecord]) -> bool:
    """Whether a run trained detectors and nothing else, on backbones that were given."""
    return all(name in DETECTORS for name, record in phases.items() if record.status != "missing")


def start_of_student(phases: Mapping[str, PhaseRecord]) -> list[tuple[str, str, float]]:
    """Of a start that was projected, per block of the student: its number, the dense layers it stands for, and the
    relative squared error of the states behind it before any training; empty for other starts."""
    folder = phases["meta"].folder.parent / "upcycle"
    record = read_phase(folder, with_config=False)
    covered = (record.result or {}).get("covered", [])
    rows = []
    for number, layers in enumerate(covered if isinstance(covered, list) else []):
        error = record.metric(f"relative_error/{number}")
        if not (isinstance(layers, list) and len(layers) == 2 and _are_numbers(layers)) or error is None:
            return []
        first, stop = layers
        name = f"{first}" if stop - first == 1 else f"{first} to {stop - 1}"
        rows.append((str(number), name, error))
    return rows


def runs_of(phases: Mapping[str, PhaseRecord]) -> dict[str, str]:
    """The end-to-end runs a report of these phases shows: folder -> name."""
    return {run: name for run, name in RUNS.items() if run in phases}


def read_analysis(phases: Mapping[str, PhaseRecord]) -> dict[str, Any] | None:
    """analysis.json of phase evaluate (see trainer/evaluation/analysis.py), None where none can be read."""
    record = phases["evaluate"]
    analysis = _json(record.folder / "analysis.json", record.problems)
    if analysis is None:
        return None
    try:
        whole = _is_analysis(analysis)
    except (TypeError, KeyError, ValueError, AttributeError):
        whole = False
    if not whole:
        record.problems.append(f"{record.folder.name}/analysis.json is not what an evaluation writes")
        return None
    return analysis


def read_judged(phases: Mapping[str, PhaseRecord]) -> dict[str, Any] | None:
    """judged.json of phase evaluate (see trainer/judge/table.py), None where none can be read."""
    record = phases["evaluate"]
    return _json(record.folder / "judged.json", record.problems)


def _is_analysis(analysis: Any) -> bool:
    """Whether it holds what the pages use, in the sizes they rely on; other errors mean that it does not."""
    rows, columns = analysis["grid"]
    good = _is_of_classes(analysis) if "classes" in analysis else True
    good &= _are_numbers([analysis["images"], analysis["skipped"]])
    good &= _is_circuit(analysis) if "circuit" in analysis else True
    for layer in analysis["layers"].values():
        first = layer.get("first", layer["load"])  # runs of an older version lack it
        good &= _are_numbers(layer["load"]) and _are_numbers(first) and number(layer["kept"]) is not None
    for picture in analysis["pictures"]:
        good &= _are_numbers([picture["index"]]) and isinstance(picture["png"], str)
        good &= all(_are_numbers(experts, rows * columns) for experts in picture["experts"].values())
    return good


def _is_circuit(analysis: Any) -> bool:
    """The same of what it says of a circuit (models/nac/circuit.py), which only a NAC has."""
    found = analysis["circuit"]
    good = all(_are_numbers(row) for name in CIRCUIT for row in found[name]) and _are_numbers([found["edges"]])
    good &= all(_are_numbers([found[name]["recall"], found[name]["precision"]]) for name in ("fit", "trained"))
    return good and _are_numbers(list(analysis.get("smaller", {}).values()))


def _is_of_classes(analysis: Any) -> bool:
    """The same of what it says of classes, which an evaluation without any leaves out."""
    classes = len(analysis["labels"])
    counts = analysis["classes"]
    good = all(_are_numbers(counts[key], classes) for key in CLASS_COUNTS)
    good &= all(isinstance(value, int) and value < classes for value in counts["taken_for"])  # -1: for nothing
    good &= all(_are_numbers(row, classes) for row in analysis["confusion"] or ())
    good &= all(_are_numbers(pair, 3) and _are_places(pair[:2], classes) for pair in analysis["confusions"])
    for picture in analysis["pictures"]:
        good &= _are_numbers([picture["confidence"]])
        good &= _are_places([picture["label"], picture["predicted"]], classes)
    return good


def run_measure(phases: Mapping[str, PhaseRecord]) -> Measure:
    """What the models of a run are judged by, but for a teacher that was trained on labels."""
    measures = [record.measure for name, record in phases.items() if name != "teacher"]
    return RELATIVE_ERROR if RELATIVE_ERROR in measures else ACCURACY


def teacher_accuracy(phases: Mapping[str, PhaseRecord]) -> float | None:
    """Of the teacher's own phase, else as measured by meta; None where the run is not judged by accuracy."""
    if run_measure(phases) is not ACCURACY:
        return None
    accuracy = phases["teacher"].metric("accuracy")
    if accuracy is None:
        accuracy = phases["meta"].metric("teacher_accuracy")
    return accuracy


def teacher_head(phases: Mapping[str, PhaseRecord]) -> str:
    """Which head a given teacher has and why, as phase probe found it, in one line; empty without that phase."""
    record = phases["teacher"]
    head = (record.result or {}).get("head")
    if not isinstance(head, dict):
        return ""
    kind, why = head.get("kind"), head.get("why")
    if kind != "probe":
        return f"Head of the teacher: {kind} ({why})."
    accuracy, held_out = record.metric("accuracy"), record.metric("held_out_accuracy")
    epochs = record.value("epochs")
    text = f"Head of the teacher: a probe of its features ({why})"
    if held_out is not None:
        text += f", {100 * held_out:.1f}% on held-out training images"
    if epochs:
        fitted = record.metric("probe_accuracy")
        text += f", {100 * fitted:.1f}% on validation images" if fitted is not None else ""
        text += f"; after {epochs:g} epochs of fine-tuning"
    if accuracy is not None:
        text += f", {100 * accuracy:.1f}% on validation images"
    return f"{text}."


def hybrids(phases: Mapping[str, PhaseRecord]) -> list[tuple[str, float | None, float | None]]:
    """Per module: its name, accuracy (or relative error) of teacher module i and of student module i, each in place of
    meta module i.

    Where the first round of teaching was left out (distill.epochs=0), the student's is that of the second round, in
    which the student modules before it stand in place as well.
    """
    rows = []
    key = run_measure(phases).key
    for module, distill in enumerate(distills(phases)):
        teacher = phases["meta"].metric(f"hybrid_{key}/{module}")
        if teacher is None:
            teacher = distill.metric(f"teacher_hybrid_{key}")
        last_round = distill
        if distill.value("epochs") == 0:
            last_round = phases.get(f"refine_{module}", distill)
        rows.append((f"module {module}", teacher, last_round.metric(f"hybrid_{key}")))
    return rows


def routing_measures(phases: Mapping[str, PhaseRecord]) -> list[tuple[str, float | None, float | None]]:
    """Per phase with experts: name, share of tokens whose expert changed over the last two evaluations, similarity."""
    rows = []
    for name, record in phases.items():
        change = record.metric("routing_change")
        similarity = record.metric("expert_similarity")
        if change is not None or similarity is not None:
            rows.append((name, change, similarity))
    return rows


def distills(phases: Mapping[str, PhaseRecord]) -> list[PhaseRecord]:
    """The distill phases, by module."""
    return [record for name, record in phases.items() if name.startswith("distill_")]


def preparation(phases: Mapping[str, PhaseRecord], run: str, key: str) -> float | None:
    """Sum of flops or seconds spent before a run's end-to-end training; None when a part is not known."""
    if run != "train":
        return 0.0
    parts = [record.value(key) for name, record in phases.items() if name.partition("_")[0] in PREPARING]
    if None in parts or len(parts) < 2:
        return None
    return sum(parts)


def total(phases: Mapping[str, PhaseRecord], run: str, key: str) -> float | None:
    """Flops or seconds of an end-to-end run with its preparation; None when a part is not known."""
    training = phases[run].value(key)
    before = preparation(phases, run, key)
    if training is None or before is None:
        return None
    return training + before


def cost_curve(phases: Mapping[str, PhaseRecord], run: str) -> list[tuple[float, float]]:
    """(FLOPs spent so far, its measure) of an end-to-end run, preparation included; empty when a cost is not known."""
    record = phases[run]
    before = preparation(phases, run, "flops")
    flops = record.value("flops")
    epochs = record.value("epochs")
    if before is None or not flops or not epochs:
        return []
    # cost after e epochs = preparation + e * (cost of the training / its epochs)
    per_epoch = flops / epochs
    return [(before + per_epoch * epoch, accuracy) for epoch, accuracy in record.curve().items()]


def peak_memory(record: PhaseRecord) -> float | None:
    """Most memory of any rank, bytes."""
    return max((value for _, value in record.series("memory")), default=None)


def speed(record: PhaseRecord) -> float | None:
    """Images per second in training, the middle one of the logged values: the first steps are slow."""
    values = sorted(value for _, value in record.series("images_per_s"))
    return values[len(values) // 2] if values else None


def student_reached(phases: Mapping[str, PhaseRecord]) -> float | None:
    """The measure of the published student where it was evaluated, else at the end of its training."""
    value = phases["evaluate"].reached
    if value is None:
        value = phases["train"].reached
    return value


def at_end(steps: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Load per expert, mean over the last tenth of the logged steps."""
    count = max(1, round(END_SHARE * len(steps)))
    loads = [load for _, load in steps[-count:]]
    return [sum(of_expert) / count for of_expert in zip(*loads)]


def number(value: Any) -> float | None:
    """The value when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def natural(name: str) -> list[Any]:
    """Sort key that puts block 9 before block 10."""
    parts: list[Any] = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])  # every second part is a number
    return parts


def _are_numbers(values: Any, length: int | None = None) -> bool:
    good = isinstance(values, list) and len(values) > 0 and all(number(value) is not None for value in values)
    return good and length in (None, len(values))


def _are_places(values: Any, length: int) -> bool:
    return all(isinstance(value, int) and 0 <= value < length for value in values)


def read_phase(folder: Path, *, with_config: bool = True) -> PhaseRecord:
    """What a phase left in its folder, which may be missing; config.yaml is what takes long to read."""
    problems: list[str] = []
    result = _json(folder / "result.json", problems)
    if result is not None and not (isinstance(result, dict) and isinstance(result.get("metrics"), dict)):
        problems.append(f"{folder.name}/result.json is not what a phase writes")
        result = None
    rows = _rows(folder / "metrics.jsonl", ("kind", "epoch", "step"), problems)
    rows = [row for row in rows if isinstance(row["step"], int) and number(row["epoch"]) is not None]
    events = _rows(folder / "events.jsonl", ("event", "step"), problems)
    config = _yaml(folder / "config.yaml", problems) if with_config else {}
    return PhaseRecord(folder, result, rows, events, config, problems)


def _json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
        return None


def _yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        values = " ".join(str(error).split())[:200]
    if not isinstance(values, dict):
        problems.append(f"{path.parent.name}/{path.name} cannot be read: {values}")
        return {}
    return values


def _rows(path: Path, keys: Sequence[str], problems: list[str]) -> list[dict[str, Any]]:
    """The JSON objects with these keys; the last line may be half written, any other is counted as a problem."""
    try:
        lines = path.read_text(errors="replace").removesuffix("\n").split("\n")
    except OSError:
        return []
    rows = []
    broken = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(key in row for key in keys):
            rows.append(row)
        else:
            broken.append(place)
    if broken and broken != [len(lines)]:
        problems.append(f"{path.parent.name}/{path.name}: {len(broken)} lines cannot be read, the first is {broken[0]}")
    return rows
