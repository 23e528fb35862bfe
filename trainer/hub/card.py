"""The model card of a run, written from its folder: metadata for the hub, and a text for people who never saw the run.

Reads config.json, result.json and metrics.jsonl of finished phases; needs no torch and contacts nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trainer.config.data import DataConfig
from trainer.config.recipe import Recipe
from trainer.report.data import RUNS, PhaseRecord
from trainer.request.graph import artifact_name, own_teacher, preparation, taught_in
from trainer.tracking.metrics import read_metrics

PICTURE = "expert_load.png"
CITATION = """@misc{m2mkd2024,
  title  = {m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers},
  author = {Lo, Ka Man and Liang, Yiming and Du, Wenyu and Fan, Yuantao and Wang, Zili and Huang, Wenhao and Ma, Lei
            and Fu, Jie},
  year   = {2024},
  eprint = {2402.16918},
  archivePrefix = {arXiv},
}"""


def write_card(run_dir: Path, recipe: Recipe, teacher_license: str | None, folders: Sequence[str]) -> dict[str, bytes]:
    """The card and its picture.

    Args:
        run_dir: the folder of a run whose student is trained.
        teacher_license: as its page on the hub names it, None = not known.
        folders: sub-folders of the repo that hold the stages pushed beside the student.

    Returns:
        README.md and, where the student has logged expert loads and matplotlib is installed, expert_load.png.
    """
    records = _records(run_dir, recipe)
    student = records[artifact_name("train", start=recipe.train.start)]
    config = json.loads((student.folder / "config.json").read_text())
    measured, where = _measured(records, recipe)
    name = recipe.hub.repo.split("/")[-1] or run_dir.resolve().name
    picture = _picture(student)
    parts = [
        f"---\n{_metadata(recipe, name, measured)}\n---",
        f"# {name}",
        _what(recipe, config, student),
        "## Result\n\n" + _table(("metric", "value"), [(k, f"{v:.4g}") for k, v in measured.items()])
        + f"\n\n{where}",
        "## Data\n\n" + _data(recipe.data, config),
        "## Teacher\n\n" + _teacher(recipe, records, teacher_license),
        *_hybrids(records, recipe),
        "## Cost of training\n\n" + _cost(records, recipe),
        *(["## Load of the experts\n\n" + f"![Load of each expert as share of uniform]({PICTURE})"] if picture else []),
        "## How to load it\n\n" + _loading(recipe, student, folders),
        f"## How to cite\n\nThe method is m2mKD ([arXiv 2402.16918](https://arxiv.org/abs/2402.16918)):\n\n"
        f"```bibtex\n{CITATION}\n```",
    ]  # fmt: skip
    files = {"README.md": ("\n\n".join(parts) + "\n").encode()}
    return files | ({PICTURE: picture} if picture else {})


def hub_id(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) of a source on the hub; None for a directory or nothing."""
    name, _, revision = source.removeprefix("hf-hub:").partition("@")
    if not name or name.startswith((".", "/", "~", "local-dir:")) or Path(name).exists():
        return None
    return name, revision or None


def trained_with(run_dir: Path, recipe: Recipe) -> str:
    """The teacher with the commit it was in training, as phase meta recorded it; else as the recipe names it."""
    result = _record(run_dir / "meta").result or {}
    return result["teacher"]["source"] if "teacher" in result else recipe.teacher.source


def taught(recipe: Recipe) -> bool:
    """Whether the student grew out of distilled modules."""
    return recipe.train.start == "distilled" and not recipe.train.init


def _records(run_dir: Path, recipe: Recipe) -> dict[str, PhaseRecord]:
    start = recipe.train.start
    incubated = [artifact_name("incubate", i) for i in range(recipe.modules) if recipe.teacher.grown]
    before = [*incubated, *own_teacher(recipe), *preparation(recipe)]
    names = [*(before if taught(recipe) else []), artifact_name("train", start=start)]
    return {name: _record(run_dir / name) for name in [*names, artifact_name("evaluate", start=start)]}


def _record(folder: Path) -> PhaseRecord:
    result, metrics = folder / "result.json", folder / "metrics.jsonl"
    return PhaseRecord(
        folder,
        json.loads(result.read_text()) if result.is_file() else None,
        read_metrics(metrics) if metrics.is_file() else [],
    )


def _measured(records: Mapping[str, PhaseRecord], recipe: Recipe) -> tuple[dict[str, float], str]:
    """Metrics of phase evaluate, or of the end of training where it has not run since, and which of the two."""
    split = f"every image of split `{recipe.data.val_split}`"
    trained, evaluated = (records[artifact_name(phase, start=recipe.train.start)] for phase in ("train", "evaluate"))
    made = [(r.folder / "result.json").stat().st_mtime for r in (trained, evaluated) if r.result]
    current = len(made) == 2 and made == sorted(made)
    result = (evaluated if current else trained).result
    metrics = {name: value for name, value in result["metrics"].items() if name in ("accuracy", "loss")}
    how = "by phase evaluate, on the published weights" if current else "at the end of training"
    return metrics, f"Measured {how}, on {split}."


def _metadata(recipe: Recipe, name: str, measured: Mapping[str, float]) -> str:
    """The YAML head, with model-index."""
    dataset = hub_id(recipe.data.path) if recipe.data.source == "hub" else None
    kind = {"digits": "digits", "fractals": "fractals", "folder": "imagefolder"}.get(
        recipe.data.source, dataset[0] if dataset else "datasets"
    )
    results = [
        EvalResult(
            task_type="image-classification", dataset_type=kind, dataset_name=_data_name(recipe.data),
            dataset_split=recipe.data.val_split, dataset_revision=dataset[1] if dataset else None,
            metric_type=metric, metric_value=value,
        )
        for metric, value in measured.items()
    ]  # fmt: skip
    return ModelCardData(
        license=recipe.hub.license or None, library_name="m2mkd", pipeline_tag="image-classification",
        tags=["vmoe", "mixture-of-experts", "vision-transformer", "m2mkd", "knowledge-distillation"],
        datasets=[dataset[0]] if dataset else None, model_name=name, eval_results=results,
    ).to_yaml()  # fmt: skip


def _what(recipe: Recipe, config: Mapping[str, Any], student: PhaseRecord) -> str:
    moe = config["moe"]
    if taught(recipe):
        made = (
            f"Its {recipe.modules} modules were taught one by one by the modules of a teacher inside a meta model, "
            "then trained together (m2mKD)."
        )
    elif recipe.train.start == "distilled":
        made = f"Its training began from the weights of {_link(student.result.get('init', recipe.train.init))}."
    else:
        made = "It was trained from scratch, as the rival of a student taught by m2mKD."
    return (
        f"A V-MoE, a vision transformer whose MLPs are mixtures of experts, that sorts images into "
        f"{config['num_classes']} classes. {made}\n\n"
        f"{config['depth']} blocks of width {config['width']}, patches of {config['patch_size']} pixels, images of "
        f"{config['image_size']} pixels; experts in blocks `{config['moe_blocks']}`: {moe['num_experts']} per block, "
        f"{moe['k']} used per token."
    )


def _data_name(data: DataConfig) -> str:
    """What the images are called, without the path of the machine they lie on."""
    if data.source == "digits":
        return "handwritten digits of scikit-learn (8x8)"
    if data.source == "fractals":
        return f"procedural fractals ({data.fractals.classes} classes, {data.fractals.size} px)"
    found = hub_id(data.path)
    return found[0] if data.source == "hub" and found else Path(data.path).name


def _data(data: DataConfig, config: Mapping[str, Any]) -> str:
    found = hub_id(data.path) if data.source == "hub" else None
    name = _data_name(data)
    at = f" at revision `{found[1]}`" if found and found[1] else ""
    part = f", {data.limit} images of each" if data.limit else ""
    lines = [
        f"{f'[{name}](https://huggingface.co/datasets/{name})' if found else name}{at}: trained on split "
        f"`{data.train_split}`, measured on `{data.val_split}`{part}."
    ]
    if pre := config.get("preprocessing"):
        lines.append(
            f"Images are resized ({pre['interpolation']}), cut to {pre['image_size']} pixels (crop_pct "
            f"{pre['crop_pct']:.4g}, {pre['crop_mode']}) and normalised with mean {pre['mean']} and std {pre['std']}; "
            "`model.preprocessing` holds these values, `model.labels` the names of the classes."
        )
    return "\n\n".join(lines)


def _teacher(recipe: Recipe, records: Mapping[str, PhaseRecord], teacher_license: str | None) -> str:
    if not taught(recipe):
        return "None in this run."
    made = own_teacher(recipe)
    accuracy = records["assemble" if "assemble" in made else "meta"].metric("teacher_accuracy")
    measured = "" if accuracy is None else f" Its accuracy on the same images: {accuracy:.4g}."
    if made:
        return f"A small vision transformer trained in the same run (phase {made[0]} of `recipe.yaml`).{measured}"
    source = trained_with(records["meta"].folder.parent, recipe)
    terms = f"licence {teacher_license}" if teacher_license else "its licence is on its page"
    return _link(source) + (f"; {terms}." if hub_id(source) else ".") + measured


def _link(source: str) -> str:
    """A model as a link with its revision; of a directory only the name."""
    if (found := hub_id(source)) is None:
        return f"a local directory `{Path(source).name}`"
    name, revision = found
    return f"[{name}](https://huggingface.co/{name})" + (f", revision `{revision}`" if revision else "")


def _hybrids(records: Mapping[str, PhaseRecord], recipe: Recipe) -> list[str]:
    """The section on accuracies inside the meta model; nothing for a student from scratch."""
    if not taught(recipe):
        return []
    rows = []
    for i in range(recipe.modules):
        distilled = records[artifact_name("distill", i)]
        own = records[artifact_name(taught_in(recipe), i)]
        teacher, student = distilled.metric("teacher_hybrid_accuracy"), own.metric("hybrid_accuracy")
        rows.append((str(i), _number(teacher, ".4g"), _number(student, ".4g")))
    return [
        "## Modules inside the meta model\n\nAccuracy of the meta model with one of its modules replaced"
        + ("" if taught_in(recipe) == "distill" else "; the student's with the modules before it replaced as well")
        + ".\n\n"
        + _table(("module", "the teacher's", "the student's"), rows)
    ]


def _cost(records: Mapping[str, PhaseRecord], recipe: Recipe) -> str:
    spent = {name: r for name, r in records.items() if r.result and not name.startswith("evaluate")}
    keys = (("flops", ".3g"), ("seconds", ",.0f"), ("images_seen", ",.0f"))
    taken = {name: f", from {_link(r.result['source'])}" for name, r in spent.items() if "source" in r.result}
    rows = [(name + taken.get(name, ""), *(_number(r.value(key), form) for key, form in keys))
            for name, r in spent.items()]  # fmt: skip
    totals = (sum(r.value(key) or 0 for r in spent.values()) for key, _ in keys)
    rows.append(("total", *(_number(value, form) for value, (_, form) in zip(totals, keys))))
    student = records[artifact_name("train", start=recipe.train.start)]
    device = {"cuda": "GPU", "cpu": "CPU"}.get(student.result["device"], student.result["device"])
    return (
        _table(("phase", "FLOPs", "seconds", "images seen"), rows)
        + f"\n\nForward and backward of everything trained; {student.result['world_size']} x {device} "
        f"(expert parallel {student.result['ep_size']}) for `{student.folder.name}`. `recipe.yaml` and "
        "`ds_config.json` are what was run."
    )


def _loading(recipe: Recipe, student: PhaseRecord, folders: Sequence[str]) -> str:
    repo, revision = recipe.hub.repo, recipe.hub.revision
    branch, source = ("", repo) if revision == "main" else (f', revision="{revision}"', f"{repo}@{revision}")
    commit = (student.result["git_commit"] or "").removesuffix("+changes")
    text = (
        "```python\nfrom models.vmoe import VMoE  # package m2mkd\n\n"
        f'model = VMoE.from_pretrained("{repo}"{branch})  # in evaluation mode\n'
        "logits = model(images)  # (B, C, H, W), preprocessed as model.preprocessing says\n```\n\n"
        "torch, timm, safetensors and huggingface_hub are all it needs."
        + (f" Trained with commit `{commit}` of m2mkd." if commit else "")
    )
    if folders:
        text += (
            "\n\nThe stages that taught it lie beside it ("
            + ", ".join(f"`{name}/`" for name in folders)
            + f"): recipes can start from them with `meta.source={source}` and `distill.source={source}`."
        )
    return text


def _picture(student: PhaseRecord) -> bytes | None:
    loads = student.loads()
    if not loads:
        return None
    try:
        from trainer.report import plots
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    with tempfile.TemporaryDirectory() as folder:
        plots.draw_expert_load(Path(folder) / PICTURE, {RUNS[student.folder.name]: loads})
        return (Path(folder) / PICTURE).read_bytes()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
