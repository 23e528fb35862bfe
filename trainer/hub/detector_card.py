"""The model card of a detector (phase detect): what it finds, how well, how to load it, what made it. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trainer.config.recipe import Recipe
from trainer.hub.address import install_command
from trainer.hub.wording import CITED, hub_id, link_to, shown, table_of
from trainer.report.data import RUNS, PhaseRecord, read_phase
from trainer.report.detectors import measured
from trainer.tracking.measures import AP

MOST_NAMED = 20  # categories


def write_detector_card(run_dir: Path, recipe: Recipe, folder: Path, address: str | None = None) -> dict[str, bytes]:
    """README.md of a detector.

    Args:
        run_dir: the folder of the run.
        folder: the result of phase detect, complete.
        address: of the code, see trainer/hub/address.py; None = not known.
    """
    record = read_phase(folder, with_config=False)
    config = json.loads((folder / "config.json").read_text())
    name = recipe.hub.repo.split("/")[-1] or run_dir.resolve().name
    rows = [(figure, shown(value, ".4g")) for figure, (value,) in measured({name: record})]
    precision = f", in {record.result['dtype']}" if record.result.get("dtype") else ""
    images = f"{record.metric('images'):,.0f}"
    parts = [
        f"---\n{_metadata(recipe, name, config, record)}\n---",
        f"# {name}",
        _what(config),
        f"## Result\n\n{table_of(('figure (0 to 1)', 'value'), rows)}\n\nCOCO's figures by pycocotools on all {images} "
        f"validation images, at the end of training{precision}.",
        f"## How to use it\n\n{_usage(recipe, record, address)}",
        f"## Backbone\n\n{_backbone(recipe, record)}",
        f"## Data\n\n{_data(recipe, config)}",
        f"## Cost of training\n\n{_cost(record)}",
        f"## Limits\n\n{_limits(config)}",
        CITED,
    ]
    text = "\n\n".join(parts) + "\n"
    return {"README.md": text.encode()}


def _metadata(recipe: Recipe, name: str, config: Mapping[str, Any], record: PhaseRecord) -> str:
    """The YAML head, with model-index."""
    task = "image-segmentation" if config["detector"]["masks"] else "object-detection"
    results = []
    for prefix in ("", "mask_"):
        value = record.metric(f"{prefix}{AP.key}")
        if value is not None:
            result = EvalResult(
                task_type=task,
                dataset_type="coco" if recipe.detect.data.path else "shapes",
                dataset_name=_data_name(recipe),
                metric_type=f"{prefix}{AP.key}",
                metric_value=value,
            )
            results.append(result)
    base = {}
    source = hub_id(record.result["backbone"]["source"]) if recipe.detect.backbone else None
    if source is not None and not recipe.detect.scratch:
        base = {"base_model": source[0], "base_model_relation": "finetune"}
    return ModelCardData(
        license=recipe.hub.license or None,
        library_name="m2mkd",
        pipeline_tag=task,
        tags=["m2mkd", "rf-detr", config["backbone"]["kind"]],
        model_name=name,
        eval_results=results,
        **base,
    ).to_yaml()


def _what(config: Mapping[str, Any]) -> str:
    detector = config["detector"]
    names = detector["categories"]
    named = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    masks = " and a mask" if detector["masks"] else ""
    return (
        f"A detector of objects of {len(names)} categories ({named}): a box{masks} for each. Heads of RF-DETR (arXiv "
        f"2511.09554) look at {detector['maps']} feature maps of a vision transformer; images of any size are resized "
        f"to a shorter side of {detector['shorter_side']} pixels, or a longer one of {detector['longest_side']} where "
        "that is smaller."
    )


def _usage(recipe: Recipe, record: PhaseRecord, address: str | None) -> str:
    commit, changes, _ = str(record.result.get("git_commit") or "").partition("+changes")
    needs = "the package m2mkd with its extra `transformers`, and torchvision. No DeepSpeed, no trainer"
    if address is None:
        install = (
            f"It needs {needs}. The address of the package was not given when this detector was pushed "
            "(`hub.code_url`): in a clone of the project `make wheel` builds it."
        )
    else:
        command = install_command(address, commit or None, "transformers")
        install = f"```bash\n{command}\n```\n\nThis installs what it needs: {needs}."
    branch = f', revision="{recipe.hub.revision}"' if recipe.hub.revision != "main" else ""
    masks = (
        "\nprint(found.mask_NHW.shape)  # of the image's size, True where the object is" if recipe.detect.masks else ""
    )
    code = f"""from PIL import Image
from m2mkd.detection import load_detector

detector = load_detector("{recipe.hub.repo}"{branch})  # in evaluation mode
picture = Image.open("picture.png").convert("RGB")
(found,) = detector.detect([picture])  # best first; boxes are left, top, right, bottom in pixels
for score, category, box in zip(found.score_N, found.category_N, found.box_N4):
    print(f"{{score:.2f}}", detector.config.categories[category], box.tolist()){masks}"""
    text = f"{install}\n\n```python\n{code}\n```"
    if commit:
        own = ", with changes that this commit does not have" if changes else ""
        text += f"\n\nTrained with commit `{commit}`{own}. `recipe.yaml` and `ds_config.json` are what was run."
    return text


def _backbone(recipe: Recipe, record: PhaseRecord) -> str:
    found = record.result["backbone"]
    source = f"the student of its run ({RUNS.get(record.folder.name.replace('detect', 'train', 1), 'a V-MoE')})"
    if recipe.detect.backbone:
        source = link_to(found["source"])
    text = f"{found['blocks']} blocks of width {found['width']}, from {source}"
    if recipe.detect.scratch:
        text += ": its architecture alone, with new weights"
    trained = (
        "left as it was: the heads alone were trained" if recipe.detect.freeze else "trained together with the heads"
    )
    return f"{text}; {trained}."


def _data_name(recipe: Recipe) -> str:
    """What the images are called, without the path of the machine they lie on."""
    data = recipe.detect.data
    return Path(data.path).name if data.path else f"drawn shapes ({data.shapes} categories, {data.size} px)"


def _data(recipe: Recipe, config: Mapping[str, Any]) -> str:
    data = recipe.detect.data
    pre = config["detector"]["preprocessing"]
    text = f"{_data_name(recipe)}: "
    if data.path:
        text += f"trained on `{data.train_annotations}`, measured on `{data.val_annotations}`."
    else:
        text += f"trained on {data.train_pictures:,} pictures, measured on {data.val_pictures:,} others."
    return f"{text} Images are normalised with mean {list(pre['mean'])} and std {list(pre['std'])}."


def _cost(record: PhaseRecord) -> str:
    result = record.result
    device = {"cuda": "GPU", "cpu": "CPU"}.get(result["device"], result["device"])
    row = [
        shown(record.value(key), form) for key, form in (("flops", ".3g"), ("seconds", ",.0f"), ("images_seen", ",.0f"))
    ]
    table = table_of(("phase", "FLOPs", "seconds", "images seen"), [(record.folder.name, *row)])
    return (
        f"{table}\n\nForward and backward, matching and losses left out, what made the backbone too; "
        f"{result['world_size']} x {device} (expert parallel {result['ep_size']})."
    )


def _limits(config: Mapping[str, Any]) -> str:
    lines = [
        "Measured on the images named above alone: nothing is known of other ones, and what those of training are "
        "biased to the detector is biased to.",
        f"It knows its {len(config['detector']['categories'])} categories only. It always tells as many objects as it "
        "can (100 at most): only their scores say which of them are there, and no score was checked to be a "
        "probability. Choose the threshold on images of your own.",
        "One training with one seed: another one would give somewhat other figures.",
    ]
    return "\n".join(f"- {line}" for line in lines)
