"""The model card of a run, written from its folder: metadata for the hub, and a text for people who never saw the run.

Reads config.json, result.json and metrics.jsonl of finished phases; needs no torch and contacts nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trainer.config.data import BUILT_IN, PROCEDURAL, DataConfig
from trainer.config.recipe import Recipe
from trainer.hub.usage import published_as, usage
from trainer.hub.wording import CITED, hub_id, link_to, shown, table_of
from trainer.report.circuit import circuit_picture
from trainer.report.classes import expert_maps
from trainer.report.data import RUNS, PhaseRecord
from trainer.report.page import load_drawing
from trainer.request.graph import artifact_name, own_teacher, preparation, taught_in, teacher_results
from trainer.tracking.measures import RELATIVE_ERROR, measure_of
from trainer.tracking.metrics import read_metrics

PICTURE = "expert_load.png"
MAPS = "experts.png"
CIRCUIT = "circuit.png"
MAPS_TEXT = (
    "One validation image per row, then one column per MoE block from the input to the output: each square is a patch "
    "in the colour of the expert it went to first, black where it found no place. The same colour in two blocks means "
    "different experts."
)
# metrics of the card's table and model-index; those of features stand beside a teacher, or tell of labels
OF_CLASSES = ("accuracy", "loss")
OF_FEATURES = ("relative_error", "cosine", "knn_accuracy", "probe_accuracy")


def write_card(
    run_dir: Path,
    recipe: Recipe,
    teacher_license: str | None,
    folders: Sequence[str],
    address: str | None = None,
) -> dict[str, bytes]:
    """The card and its pictures.

    Args:
        run_dir: the folder of a run whose student is trained.
        teacher_license: as its page on the hub names it, None = not known.
        folders: sub-folders of the repo that hold the stages pushed beside the student.
        address: of the code, see trainer/hub/address.py; None = not known.

    Returns:
        README.md; experts.png or circuit.png where phase evaluate has looked at the routing or the circuit;
        expert_load.png where the student has logged expert loads and matplotlib is installed.
    """
    records = _records(run_dir, recipe)
    student = records[artifact_name("train", start=recipe.train.start)]
    config = json.loads((student.folder / "config.json").read_text())
    measured, where = _measured(records, recipe)
    name = recipe.hub.repo.split("/")[-1] or run_dir.resolve().name
    evaluated = records[artifact_name("evaluate", start=recipe.train.start)]
    kind = STUDENTS[recipe.student.kind]
    pictures = kind.pictures(_analysis(evaluated), student)
    results = [(metric, f"{value:.4g}") for metric, value in measured.items()]
    parts = [
        f"---\n{_metadata(recipe, name, measured, student, trained_with(run_dir, recipe))}\n---",
        f"# {name}",
        _what(recipe, config, student),
        f"## Result\n\n{table_of(('metric', 'value'), results)}\n\n{where}",
        *_speed(evaluated, kind),
        f"## How to use it\n\n{_loading(recipe, student, folders, config, address)}",
        f"## Data\n\n{_data(recipe.data, config, student)}",
        f"## Teacher\n\n{_teacher(recipe, records, teacher_license)}",
    ]
    if taught(recipe):
        parts.append(f"## Modules inside the meta model\n\n{_hybrids(records, recipe)}")
    parts.append(f"## Cost of training\n\n{_cost(records, recipe)}")
    parts += [f"## {picture.heading}\n\n{picture.markdown}" for picture in pictures]
    parts += [
        f"## Limits\n\n{_limits(recipe, config, student)}",
        CITED,
    ]
    text = "\n\n".join(parts) + "\n"
    return {"README.md": text.encode()} | {picture.file: picture.png for picture in pictures}


def trained_with(run_dir: Path, recipe: Recipe) -> str:
    """The teacher with the commit it was in training, as phase meta recorded it; else as the recipe names it."""
    result = _record(run_dir / "meta").result or {}
    if "teacher" in result:
        return result["teacher"]["source"]
    return recipe.teacher.source


def taught(recipe: Recipe) -> bool:
    """Whether the student grew out of distilled modules."""
    return recipe.train.start == "distilled" and not recipe.train.init


def _records(run_dir: Path, recipe: Recipe) -> dict[str, PhaseRecord]:
    """The phases that made the student, in order, and its evaluation."""
    names = []
    if taught(recipe):
        if recipe.teacher.grown:
            names += [artifact_name("incubate", module) for module in range(recipe.modules)]
        names += [*teacher_results(recipe), *preparation(recipe)]
    start = recipe.train.start
    names += [artifact_name("train", start=start), artifact_name("evaluate", start=start)]
    return {name: _record(run_dir / name) for name in names}


def _record(folder: Path) -> PhaseRecord:
    result = None
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
    rows = []
    if (folder / "metrics.jsonl").is_file():
        rows = read_metrics(folder / "metrics.jsonl")
    return PhaseRecord(folder, result, rows)


def _measured(records: Mapping[str, PhaseRecord], recipe: Recipe) -> tuple[dict[str, float], str]:
    """Metrics of phase evaluate, or of the end of training where it has not run since, and which of the two."""
    record = records[artifact_name("train", start=recipe.train.start)]
    how = "at the end of training"
    evaluated = records[artifact_name("evaluate", start=recipe.train.start)]
    if record.result and evaluated.result and _written(record) <= _written(evaluated):
        record = evaluated
        how = "by phase evaluate, on the published weights"
    metrics = {name: value for name, value in record.result["metrics"].items() if name in (*OF_CLASSES, *OF_FEATURES)}
    precision = ""
    if record.result.get("dtype"):
        precision = f", in {record.result['dtype']}"
    return metrics, f"Measured {how}{precision}, on every image of {_measured_on(recipe.data, record)}."


def _measured_on(data: DataConfig, record: PhaseRecord) -> str:
    """The validation split in words; `record` says whether it was held out of the training split."""
    held_out = (record.result or {}).get("held_out")
    if held_out:
        return f"the {held_out:.0%} of split `{data.train_split}` that were held out"
    return f"split `{data.val_split}`"


def _written(record: PhaseRecord) -> float:
    """When its result was written, unix time."""
    return (record.folder / "result.json").stat().st_mtime


def _metadata(recipe: Recipe, name: str, measured: Mapping[str, float], student: PhaseRecord, teacher: str) -> str:
    """The YAML head, with model-index.

    Args:
        teacher: its source, "" = made in this run.
    """
    task = _task(measured)
    is_held_out = bool((student.result or {}).get("held_out"))
    dataset = None
    revision = None
    source = _source(recipe.data)
    if source == "hub":
        dataset, revision = hub_id(recipe.data.path) or (None, None)
    kinds = {"folder": "imagefolder", "shards": "webdataset"} | {name: name for name in BUILT_IN}
    kind = kinds.get(source, dataset or "datasets")
    results = []
    for metric, value in measured.items():
        result = EvalResult(
            task_type=task,
            dataset_type=kind,
            dataset_name=_data_name(recipe.data),
            dataset_split=recipe.data.train_split if is_held_out else recipe.data.val_split,
            dataset_revision=revision,
            metric_type=metric,
            metric_value=value,
        )
        results.append(result)
    return ModelCardData(
        license=recipe.hub.license or None,
        library_name="m2mkd",
        pipeline_tag=task,
        tags=[*STUDENTS[recipe.student.kind].tags, "m2mkd", "knowledge-distillation"],
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=results,
        **_base_model(recipe, teacher),
    ).to_yaml()


def _base_model(recipe: Recipe, teacher: str) -> dict[str, str]:
    """The model of the hub that this one comes from: that whose weights it began with, else its teacher.

    The hub knows adapter, finetune, merge and quantized; of these a student is a finetune.
    """
    source = teacher if taught(recipe) else recipe.train.init
    model = hub_id(source) if source else None
    if model is None:
        return {}
    return {"base_model": model[0], "base_model_relation": "finetune"}


def _task(measured: Mapping[str, float]) -> str:
    """What the hub calls the student's task."""
    gives_features = measure_of(measured) is RELATIVE_ERROR
    return "image-feature-extraction" if gives_features else "image-classification"


def _what(recipe: Recipe, config: Mapping[str, Any], student: PhaseRecord) -> str:
    if taught(recipe):
        origin = (
            f"Its {recipe.modules} modules were taught one by one by the modules of a teacher inside a meta model, "
            "then trained together (m2mKD)."
        )
    elif recipe.train.start == "distilled":
        origin = f"Its training began from the weights of {link_to(student.result.get('init', recipe.train.init))}."
    else:
        origin = "It was trained from scratch, as the rival of a student taught by m2mKD."
    kind = STUDENTS[recipe.student.kind]
    does = f"sorts images into {config['num_classes']} classes"
    if not config["num_classes"]:
        does = (
            f"gives features of images: {config['width']} numbers each, or as many per token. It has no classes and "
            "saw no labels: it learned the features of its teacher"
        )
    return f"{kind.what}, that {does}. {origin}\n\n{kind.sizes(config)}"


def _sizes_of_vmoe(config: Mapping[str, Any]) -> str:
    moe = config["moe"]
    return (
        f"{config['depth']} blocks of width {config['width']}, patches of {config['patch_size']} pixels, images of "
        f"{config['image_size']} pixels; experts in blocks `{config['moe_blocks']}`: {moe['num_experts']} per block, "
        f"{moe['k']} used per token."
    )


def _limits_of_vmoe(config: Mapping[str, Any]) -> list[str]:
    moe = config["moe"]
    lines = []
    size = config["image_size"]
    if not config.get("dynamic_img_size"):
        lines.append(f"It takes square images of {size} pixels; a larger picture is made smaller, and details go.")
    lines.append(
        f"Only {moe['k']} of {moe['num_experts']} experts work on a token, but all of them lie in memory; small "
        "batches gain less from it than the FLOPs say."
    )
    if moe.get("eval_capacity_factor") is not None and moe.get("images_per_group", 1) > 1:
        lines.append(
            f"Experts have a limited number of places for {moe['images_per_group']} images together: what the model "
            "says of an image depends a little on those beside it."
        )
    return lines


def _sizes_of_nac(config: Mapping[str, Any]) -> str:
    noise = "with the noise of training (published)" if config["noisy_evaluation"] else "deterministic"
    return (
        f"{config['input_latents']} modules read the image, {config['mediator_latents']} make up the circuit (started "
        f"from a {config['graph']} graph), {config['output_latents']} tell the classes; states of width "
        f"{config['state_dim']}, {config['propagators']} propagators, images of {config['image_size']} pixels. "
        f"Evaluation is {noise}."
    )


def _limits_of_nac(config: Mapping[str, Any]) -> list[str]:
    lines = [
        f"It learned on images of {config['image_size']} pixels; for others its grid of positions is resampled: that "
        "was not measured."
    ]
    if config["noisy_evaluation"]:
        lines.append("Its evaluation draws noise: the same image can be told otherwise the next time.")
    return lines


@dataclass(frozen=True)
class CardPicture:
    """A picture beside the card, and the section it is shown in."""

    file: str
    heading: str
    title: str  # in its place where it is not shown
    png: bytes
    text: str = ""  # below it

    @property
    def markdown(self) -> str:
        """The section without its heading."""
        return f"![{self.title}]({self.file})\n\n{self.text}".rstrip()


def _pictures_of_vmoe(analysis: Mapping[str, Any] | None, student: PhaseRecord) -> list[CardPicture]:
    found = []
    maps = expert_maps(analysis)
    if maps:
        title = "Which expert took which patch of an image"
        found.append(CardPicture(MAPS, "What the experts see", title, maps, MAPS_TEXT))
    loads = student.loads()
    drawing = load_drawing()
    if loads and drawing is not None:
        png = drawing.expert_load_png({RUNS[student.folder.name]: loads})
        found.append(CardPicture(PICTURE, "Load of the experts", "Load of each expert as share of uniform", png))
    return found


def _pictures_of_nac(analysis: Mapping[str, Any] | None, student: PhaseRecord) -> list[CardPicture]:
    found = circuit_picture(analysis)
    if found is None:
        return []
    png, text = found
    return [CardPicture(CIRCUIT, "What the circuit looks like", "The circuit as matrices", png, text)]


@dataclass(frozen=True)
class StudentCard:
    """What a card says of one kind of student.

    Attributes:
        pictures: from analysis.json of its evaluation, None where there is none, and the record of its training.
        speed: what is to be known of the table of its speeds.
    """

    tags: tuple[str, ...]
    what: str
    sizes: Callable[[Mapping[str, Any]], str]
    limits: Callable[[Mapping[str, Any]], list[str]]
    pictures: Callable[[Mapping[str, Any] | None, PhaseRecord], list[CardPicture]]
    speed: str


STUDENTS = {
    "vmoe": StudentCard(
        ("vmoe", "mixture-of-experts", "vision-transformer"),
        "A V-MoE, a vision transformer whose MLPs are mixtures of experts",
        _sizes_of_vmoe,
        _limits_of_vmoe,
        _pictures_of_vmoe,
        "With another k than in training the accuracy is that of the same weights. The dense ViT of equal FLOPs has "
        "new weights: it was timed, not trained.",
    ),
    "nac": StudentCard(
        ("nac", "neural-attentive-circuits"),
        "A NAC (Neural Attentive Circuits), modules that hear each other as far as their signatures are close",
        _sizes_of_nac,
        _limits_of_nac,
        _pictures_of_nac,
        "With fewer mediators, the best connected ones, the accuracy is that of the same weights, without any training "
        "after the others were cut off.",
    ),
}


def _data_name(data: DataConfig) -> str:
    """What the images are called, without the path of the machine they lie on."""
    source = _source(data)
    if source == "digits":
        return "handwritten digits of scikit-learn (8x8)"
    if source in PROCEDURAL:
        images = getattr(data, source)
        return f"procedural {source} ({images.classes} classes, {images.size} px)"
    dataset = hub_id(data.path)
    if source == "hub" and dataset:
        return dataset[0]
    return Path(data.path).name


def _source(data: DataConfig) -> str:
    """data.source, and what auto was: the digits, a hub id, or a folder, perhaps of tar files."""
    from trainer.data.tars import is_shard_folder  # late: it loads what decodes pictures

    root = Path(os.path.expandvars(data.path)).expanduser()
    if data.path and data.source not in BUILT_IN and root.is_dir() and is_shard_folder(root):
        return "shards"
    if data.source != "auto":
        return data.source
    if not data.path:
        return "digits"
    return "hub" if hub_id(data.path) else "folder"


def _data(data: DataConfig, config: Mapping[str, Any], student: PhaseRecord) -> str:
    name = _data_name(data)
    where = ""
    dataset = hub_id(data.path)
    if _source(data) == "hub" and dataset:
        name, revision = dataset
        where = f" at revision `{revision}`" if revision else ""
        name = f"[{name}](https://huggingface.co/datasets/{name})"
    part = f", {data.limit} images of each" if data.limit else ""
    measured_on = _measured_on(data, student)
    text = f"{name}{where}: trained on split `{data.train_split}`, measured on {measured_on}{part}."
    preprocessing = config.get("preprocessing")
    if not preprocessing:
        return text
    return (
        f"{text}\n\nImages are resized ({preprocessing['interpolation']}), cut to {preprocessing['image_size']} pixels "
        f"(crop_pct {preprocessing['crop_pct']:.4g}, {preprocessing['crop_mode']}) and normalised with mean "
        f"{preprocessing['mean']} and std {preprocessing['std']}; `model.preprocessing` holds these values"
        f"{', `model.labels` the names of the classes' if config['num_classes'] else ''}."
    )


def _teacher(recipe: Recipe, records: Mapping[str, PhaseRecord], teacher_license: str | None) -> str:
    if not taught(recipe):
        return "None in this run."
    phases = own_teacher(recipe)
    grown = "assemble" in phases
    accuracy = records["assemble" if grown else "meta"].metric("teacher_accuracy")
    measured = _of_labels(records, recipe)
    if accuracy is not None:
        measured = f" Its accuracy on the same images: {accuracy:.4g}."
    if phases:
        return f"A small vision transformer trained in the same run (phase {phases[0]} of `recipe.yaml`).{measured}"
    measured = _probe(records) + measured
    source = trained_with(records["meta"].folder.parent, recipe)
    if not hub_id(source):
        return f"{link_to(source)}.{measured}"
    terms = f"licence {teacher_license}" if teacher_license else "its licence is on its page"
    return f"{link_to(source)}; {terms}.{measured}"


def _probe(records: Mapping[str, PhaseRecord]) -> str:
    """That the teacher's classes come from a probe; empty where they come from its checkpoint."""
    result = records["probe"].result if "probe" in records else None
    if not result or result["head"]["kind"] != "probe":
        return ""
    tuned = f", and it was fine-tuned with it for {result['epochs']} epochs" if result["epochs"] else ""
    return f" Its head is a linear classifier fitted to its features of the training images (phase probe){tuned}."


def _of_labels(records: Mapping[str, PhaseRecord], recipe: Recipe) -> str:
    """What the features of a teacher without classes tell of the data's labels, where phase evaluate measured it."""
    evaluated = records[artifact_name("evaluate", start=recipe.train.start)]
    found = []
    for key, name in (("teacher_knn_accuracy", "k-NN"), ("teacher_probe_accuracy", "linear probe")):
        accuracy = evaluated.metric(key)
        if accuracy is not None:
            found.append(f"{name} {accuracy:.4g}")
    return f" Accuracy on its features: {', '.join(found)}." if found else ""


def _hybrids(records: Mapping[str, PhaseRecord], recipe: Recipe) -> str:
    """Accuracies (or relative errors) inside the meta model of a student that was taught, module by module."""
    measure = records["meta"].measure
    last_round = taught_in(recipe)
    rows = []
    for module in range(recipe.modules):
        teacher = records[artifact_name("distill", module)].metric(f"teacher_hybrid_{measure.key}")
        student = records[artifact_name(last_round, module)].metric(f"hybrid_{measure.key}")
        rows.append((str(module), shown(teacher, ".4g"), shown(student, ".4g")))
    text = f"{measure.name.capitalize()} of the meta model with one of its modules replaced"
    if last_round != "distill":
        text += "; the student's with the modules before it replaced as well"
    table = table_of(("module", "the teacher's", "the student's"), rows)
    return f"{text}.\n\n{table}"


def _cost(records: Mapping[str, PhaseRecord], recipe: Recipe) -> str:
    spent = {name: record for name, record in records.items() if record.result and not name.startswith("evaluate")}
    keys = {"flops": ".3g", "seconds": ",.0f", "images_seen": ",.0f"}
    rows = []
    for name, record in spent.items():
        if "source" in record.result:
            name = f"{name}, from {link_to(record.result['source'])}"
        rows.append((name, *(shown(record.value(key), form) for key, form in keys.items())))
    total = ["total"]
    for key, form in keys.items():
        total.append(shown(sum(record.value(key) or 0 for record in spent.values()), form))
    rows.append(total)
    student = records[artifact_name("train", start=recipe.train.start)]
    device = {"cuda": "GPU", "cpu": "CPU"}.get(student.result["device"], student.result["device"])
    table = table_of(("phase", "FLOPs", "seconds", "images seen"), rows)
    return (
        f"{table}\n\nForward and backward of everything trained; {student.result['world_size']} x {device} "
        f"(expert parallel {student.result['ep_size']}) for `{student.folder.name}`. `recipe.yaml` and "
        "`ds_config.json` are what was run."
    )


def _speed(evaluated: PhaseRecord, kind: StudentCard) -> list[str]:
    """The section of what phase evaluate measured of images per second, where it has."""
    measured = (evaluated.result or {}).get("inference")
    if not measured:
        return []
    rows = []
    for row in measured["rows"]:
        numbers = (
            shown(row["images_per_second"], ",.1f"),
            shown(row["accuracy"], ".4g"),
            shown(row["flops"], ".3g"),
            f"{row['parameters']:,}",
        )
        rows.append((row["name"], *numbers))
    table = table_of(("model", "images/s", "accuracy", "FLOPs per image", "parameters"), rows)
    return [
        f"## Inference\n\n{table}\n\nMeasured in one run by phase evaluate: {measured['where']}, batches of "
        f"{measured['batch']}, {measured['dtype']}, the median of {measured['repeats']} forwards. {kind.speed}"
    ]


def _loading(
    recipe: Recipe, student: PhaseRecord, folders: Sequence[str], config: Mapping[str, Any], address: str | None
) -> str:
    commit, changes, _ = (student.result["git_commit"] or "").partition("+changes")
    text = usage(published_as(recipe.hub, address, commit or None, config))
    if commit:
        where = f"[{address}]({address})" if address and address.startswith("http") else "m2mkd"
        own = ", with changes that this commit does not have" if changes else ""
        text += f"\n\nTrained with commit `{commit}` of {where}{own}."
    if folders:
        source = recipe.hub.repo
        if recipe.hub.revision != "main":
            source += f"@{recipe.hub.revision}"
        named = ", ".join(f"`{name}/`" for name in folders)
        text += (
            f"\n\nThe stages that taught it lie beside it ({named}): recipes can start from them with "
            f"`meta.source={source}` and `distill.source={source}`."
        )
    return text


def _limits(recipe: Recipe, config: Mapping[str, Any], student: PhaseRecord) -> str:
    """What the figures above do not say."""
    name = _data_name(recipe.data)
    lines = [
        f"Measured on {_measured_on(recipe.data, student)} of {name} alone: nothing is known of other images, and what "
        "those of training are biased to the model is biased to.",
    ]
    if config["num_classes"]:
        lines.append(f"It always answers with one of its {config['num_classes']} classes, also where none is right.")
    lines += STUDENTS[recipe.student.kind].limits(config)
    lines.append("One training with one seed: another one would give somewhat other figures.")
    return "\n".join(f"- {line}" for line in lines)


def _analysis(evaluated: PhaseRecord) -> Mapping[str, Any] | None:
    path = evaluated.folder / "analysis.json"
    return json.loads(path.read_text()) if evaluated.result and path.is_file() else None
