"""Teachers: from the Hugging Face hub or a directory into one timm VisionTransformer with its preprocessing.

Two layouts are read, told apart by config.json: transformers (ViT, DeiT) and timm. Only safetensors weights are read
and no code of a checkpoint ever runs. `new_teacher` starts one from scratch for whoever has none.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..files.checks import DAMAGED, checked_weights, one_line, read_object
from ..files.hub import SAVE_PLAIN, WEIGHTS, CheckpointFiles, Weights
from ..files.places import expanded
from ..preprocessing import Preprocessing
from .convert import to_timm
from .images import from_processor, from_timm_config, to_processor
from .resize import with_image_size

NAMES_SHOWN = 3  # tensors in an error
SUPPORTED = (
    "Supported: ViT and DeiT (plain and distilled) from transformers; ViT, DeiT, DeiT III, DINOv2, CLIP and SigLIP "
    "vision transformers from timm."
)
TRANSFORMERS_TYPES = ("vit", "deit")
TIMM_MODULES = ("vision_transformer", "deit")
ROTARY = "rotary positions go into every block, so blocks do not run on tokens alone"
# our name of a size -> its key in config.json
TRANSFORMERS_SIZES = {
    "depth": "num_hidden_layers",
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "num_classes": "num_labels",
}
TIMM_SIZES = {
    "depth": "depth",
    "width": "embed_dim",
    "heads": "num_heads",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
}
RELATIVE = "it adds a relative position bias inside its blocks"
WINDOWS = "its blocks work on windows of a shrinking grid"
# why the likeliest wrong choices cannot be cut into modules, by transformers model_type or timm module
REFUSED = {
    "beit": f"BEiT: {RELATIVE}",
    "data2vec-vision": f"Data2Vec (a BEiT): {RELATIVE}",
    "eva": f"EVA or DINOv3: {ROTARY}",
    "dinov3_vit": f"DINOv3: {ROTARY}",
    "vision_transformer_relpos": f"relative-position ViT: {RELATIVE}",
    "swin": f"Swin: {WINDOWS}",
    "swinv2": f"Swin v2: {WINDOWS}",
    "swin_transformer": f"Swin: {WINDOWS}",
    "swin_transformer_v2": f"Swin v2: {WINDOWS}",
}


@dataclass
class Teacher:
    """A teacher as `load_teacher` gives it."""

    model: VisionTransformer  # evaluation mode, frozen
    preprocessing: Preprocessing
    source: str  # hub id with the commit it resolved to, or the directory
    labels: list[str] | None  # class names by index, when the checkpoint has them
    num_classes: int  # 0: no head, gives features only
    as_saved: dict[str, Tensor] = field(default_factory=dict)  # what the checkpoint has otherwise (classes.py)
    classes_note: str = ""  # how its classes were matched with the data's; empty = they are the same
    wrapped: bool = False  # its weights were saved from a wrapped model, under longer names


def load_teacher(source: str, *, revision: str | None = None, image_size: int | None = None) -> Teacher:
    """A frozen teacher with the preprocessing it was trained with.

    Args:
        source: hub id ("owner/name", "owner/name@revision", timm's "hf-hub:owner/name") or a directory.
        revision: branch, tag or commit of a hub id.
        image_size: side of its images in pixels; None = the checkpoint's own. See with_image_size.

    Raises:
        ValueError: nothing readable there, a family that cannot be split, no head, no preprocessing, pickled weights.
        RuntimeError: the conversion to timm changed the logits.
    """
    if Path(expanded(source)).is_file():
        raise ValueError(
            f"{source!r} is a file, expected a directory or a hub id. Pickle files (.bin, .pt, .pth) can run code and "
            f"are never read: convert it with transformers' save_pretrained or timm.models.save_for_hf."
        )
    files = CheckpointFiles(source, revision)
    config_path = files.find("config.json")
    if config_path is None:
        raise ValueError(f"{files} has no config.json: it is neither a transformers nor a timm checkpoint. {SUPPORTED}")
    config = read_object(config_path, files)
    if "architecture" in config:
        load = _load_timm
    elif "model_type" in config:
        load = _load_transformers
    else:
        raise ValueError(
            f"config.json of {files} names no transformers model_type and no timm architecture. {SUPPORTED}"
        )
    with torch.device("cpu"):  # also where the caller builds on the meta device: a teacher without weights is none
        model, preprocessing, labels, wrapped = load(files, config, config_path.parent)
    model.eval().requires_grad_(False)
    teacher = Teacher(model, preprocessing, str(files), labels, model.num_classes, wrapped=wrapped)
    return with_image_size(teacher, image_size) if image_size else teacher


def _load_transformers(
    files: CheckpointFiles, config: dict[str, Any], directory: Path
) -> tuple[VisionTransformer, Preprocessing, list[str] | None, bool]:
    model_type = config["model_type"]
    if model_type not in TRANSFORMERS_TYPES:
        raise ValueError(_refusal(files, f"transformers model type {model_type!r}", model_type))
    processor_path = files.find("preprocessor_config.json")
    if processor_path is None:
        raise ValueError(
            f"{files} has no preprocessor_config.json: mean, std and size of its images are unknown. Save the image "
            f"processor it was trained with beside it (ViTImageProcessor(...).save_pretrained(directory))."
        )
    _check_one_processor(files, read_object(processor_path, files))
    weights = checked_weights(files, config, TRANSFORMERS_SIZES)
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        with _loadable(weights, directory) as folder:
            original, report = AutoModelForImageClassification.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below by name
            )
        processor = AutoImageProcessor.from_pretrained(
            directory,
            backend="pil",  # pictures are resized by PIL in training and evaluation
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # whatever it raises (its own validators among them): the checkpoint cannot be used
        raise ValueError(f"transformers cannot load {files}: {one_line(error)}. {DAMAGED}") from error
    _check_loaded(files, config, report)
    try:
        model = to_timm(original)
        preprocessing = from_processor(processor, model)
        labels = [original.config.id2label[i] for i in range(original.config.num_labels)]
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{files} has odd settings in its JSON files: {error!r}. {DAMAGED}") from error
    _check_labels(files, labels)
    if labels == [f"LABEL_{i}" for i in range(len(labels))]:  # transformers' own words where nobody gave names
        labels = None
    return model, preprocessing, labels, weights.renamed


def _check_one_processor(files: CheckpointFiles, settings: dict[str, Any]) -> None:
    """transformers prefers an image processor inside processor_config.json: refuse one that is another."""
    path = files.find("processor_config.json", optional=True)
    nested = read_object(path, files).get("image_processor") if path else None
    if not isinstance(nested, dict):
        return
    different = sorted(key for key in settings.keys() & nested.keys() if settings[key] != nested[key])
    if different:
        key = different[0]
        raise ValueError(
            f"{files} has two image processors: {key} is {settings[key]!r} in preprocessor_config.json and "
            f"{nested[key]!r} in processor_config.json. Delete the one the model was not trained with."
        )


@contextmanager
def _loadable(weights: Weights, directory: Path) -> Iterator[Path]:
    """Where the libraries find the tensors by their plain names: `directory`, or a copy for the time of loading."""
    if not weights.renamed:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="teacher-") as name:
        folder = Path(name)
        shutil.copyfile(directory / "config.json", folder / "config.json")
        save_file({name: weights.read(name) for name in weights.names()}, folder / WEIGHTS, {"format": "pt"})
        yield folder


def _check_timm_names(weights: Weights, directory: Path) -> None:
    """Say which tensors there are and which are expected, when loading has failed and that is the reason."""
    try:
        with torch.device("meta"):
            expected = timm.create_model(f"local-dir:{directory}", pretrained=False).state_dict()
    except Exception:  # what failed is the model, not its weights
        return
    try:
        weights.check(expected)
    except ValueError as error:
        raise ValueError(f"{error} Or take the config.json that was saved with these weights.") from None


def _check_labels(files: CheckpointFiles, labels: Sequence[Any] | None) -> None:
    for label in labels or ():
        if not isinstance(label, str):
            raise ValueError(f"config.json of {files} names a class {label!r}, expected text.")


def _check_loaded(files: CheckpointFiles, config: dict[str, Any], report: dict[str, Any]) -> None:
    """transformers only warns about a part it starts at random (a distilled DeiT read as a plain one: its head)."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, saved_shape, model_shape = mismatched[0]
        raise ValueError(
            f"{files} has {name} with shape {tuple(saved_shape)}, but its config asks for {tuple(model_shape)}. "
            f"Take the config.json that was saved with these weights."
        )
    missing = sorted(report["missing_keys"])
    # classifiers read the class token; a pooler saved from pre-training is of no use to them
    unexpected = sorted(key for key in report["unexpected_keys"] if "pooler" not in key.split("."))
    if not missing and not unexpected:
        return
    saved_as = ", ".join(config.get("architectures") or ["unknown"])
    only_head_missing = all("classifier" in key for key in missing) and not unexpected
    if missing and only_head_missing:
        raise ValueError(
            f"{files} (saved as {saved_as}) has no classification head: {', '.join(missing)} are missing. "
            f"Take a checkpoint fine-tuned for classification."
        )
    step = SAVE_PLAIN
    if config["model_type"] == "deit":
        step = "Check `architectures` in config.json: a distilled DeiT is DeiTForImageClassificationWithTeacher."
    raise ValueError(
        f"the weights of {files} do not fit its config (saved as {saved_as}): missing {_first(missing)}, unexpected "
        f"{_first(unexpected)}. {step}"
    )


def _first(names: list[str]) -> str:
    """The first names of a list that may have hundreds."""
    more = len(names) - NAMES_SHOWN
    return f"{names[:NAMES_SHOWN]} and {more} more" if more > 0 else str(names)


def _load_timm(
    files: CheckpointFiles, config: dict[str, Any], directory: Path
) -> tuple[VisionTransformer, Preprocessing, list[str] | None, bool]:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{files}: timm {timm.__version__} knows no architecture {architecture!r}. {SUPPORTED}")
    module = timm.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    if module not in TIMM_MODULES:
        raise ValueError(_refusal(files, f"timm architecture {architecture!r}", module))
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"config.json of {files} has model_args={arguments!r}, expected an object of settings.")
    sizes = {"num_classes": config.get("num_classes"), **arguments}
    weights = checked_weights(files, sizes, TIMM_SIZES)
    try:
        # pretrained=True: local-dir without it builds a random model and says nothing
        with _loadable(weights, directory) as folder:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # whatever a strange setting leads to
        _check_timm_names(weights, directory)
        raise ValueError(f"timm cannot load {files}: {one_line(error)}. {DAMAGED}") from error
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):  # arguments in config.json can change it
        raise ValueError(_refusal(files, f"timm model {type(model).__name__}", module))
    _check_head(files, model, weights)
    try:
        preprocessing = from_timm_config(model)
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json of {files} has odd settings: {error!r}. {DAMAGED}") from error
    labels = _label_list(model.pretrained_cfg.get("label_names"), model.num_classes)
    _check_labels(files, labels)
    return model, preprocessing, labels, weights.renamed


def _check_head(files: CheckpointFiles, model: VisionTransformer, weights: Weights) -> None:
    """timm drops a head, without an error, when the config's numbers of classes contradict each other."""
    if model.num_classes == 0:
        return
    in_weights = "none"
    if "head.weight" in weights.names():
        saved = weights.read("head.weight")
        if torch.equal(saved.to(model.head.weight.dtype), model.head.weight):
            return
        in_weights = f"{len(saved)} classes"
    raise ValueError(
        f"{files}: the head of {model.num_classes} classes that config.json asks for is not the one in the weights "
        f"({in_weights}). Correct num_classes in config.json."
    )


def _label_list(names: Any, num_classes: int) -> list[str] | None:
    """timm stores names as a list, or as a dict from class index to name."""
    if isinstance(names, dict):
        names = [names.get(i, names.get(str(i))) for i in range(num_classes)]
    if not names or len(names) != num_classes or None in names:
        return None
    return list(names)


def _refusal(files: CheckpointFiles, what: str, family: str) -> str:
    reason = REFUSED.get(family, "not a plain vision transformer")
    return f"{files} ({what}) cannot be split into modules. {reason[0].upper()}{reason[1:]}. {SUPPORTED}"


class TransformersTeacher(nn.Module):
    """A transformers classifier behind the one call of this project: images (B, C, H, W) -> logits (B, C)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pixel_values=images).logits


def new_teacher(
    *,
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    mlp_dim: int,
    labels: Sequence[str],
    preprocessing: Preprocessing,
) -> TransformersTeacher:
    """A transformers ViTForImageClassification with random weights, to be trained and saved by `save_teacher`.

    Args:
        image_size, patch_size: pixels.
        depth: blocks.
        labels: names of the classes, one per output.

    Raises:
        ValueError: sizes that do not divide, or an image size other than the preprocessing's.
    """
    if image_size % patch_size or width % heads:
        raise ValueError(
            f"teacher image_size {image_size} must be a multiple of patch_size {patch_size}, "
            f"and width {width} of heads {heads}."
        )
    if image_size != preprocessing.image_size:
        raise ValueError(f"teacher image_size {image_size} is not the preprocessing's {preprocessing.image_size}.")
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=preprocessing.in_chans,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp_dim,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return TransformersTeacher(ViTForImageClassification(config))


def save_teacher(model: TransformersTeacher, directory: str | Path, preprocessing: Preprocessing) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json; `load_teacher` and transformers read them."""
    model.classifier.save_pretrained(directory)
    to_processor(preprocessing).save_pretrained(directory)


def fingerprint(dense: Teacher) -> dict[str, Any]:
    """What tells a dense model from others, wherever it lies: its sizes and the SHA-256 of its weights (on the CPU).

    The weights are those of the checkpoint, also where the rows of its head were put into the order of other data.

    Returns:
        source, width, blocks and sha256, as plain values; "classes" where its head was changed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((dense.model.state_dict() | dense.as_saved).items()):
        digest.update(name.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    record = {
        "source": dense.source,
        "width": dense.model.embed_dim,
        "blocks": len(dense.model.blocks),
        "sha256": digest.hexdigest(),
    }
    if dense.classes_note:
        record["classes"] = dense.classes_note
    return record
