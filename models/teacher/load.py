"""Teachers: from the Hugging Face hub or a directory into one timm model with its preprocessing.

Two layouts are read, told apart by config.json: transformers (layouts.py) and timm. Only safetensors weights are read
and no code of a checkpoint ever runs. `new_teacher` starts one from scratch for whoever has none.
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..files.checks import DAMAGED, checked_weights, one_line, read_object
from ..files.hub import SAVE_PLAIN, WEIGHTS, CheckpointFiles, Weights
from ..files.places import expanded
from ..preprocessing import Preprocessing
from .convert import check_same, computed_positions, computes_positions, to_timm
from .images import from_processor, from_timm_config, size_of, to_processor
from .layouts import LAYOUTS, Layout
from .refusals import SUPPORTED, refusal
from .resize import set_image_size

log = logging.getLogger(__name__)

NAMES_SHOWN = 3  # tensors in an error
TIMM_MODULES = ("vision_transformer", "deit", "eva", "beit")  # files of timm whose models can be cut into modules
TIMM_CLASSES = (VisionTransformer, VisionTransformerDistilled, Eva, Beit)
# timm's image-text models: their "head" is the projection into the space of the texts
IMAGE_TEXT = ("_clip_", "_pe_core_")
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


@dataclass
class Teacher:
    """A teacher as `load_teacher` gives it."""

    model: nn.Module  # timm's VisionTransformer, Eva or Beit; evaluation mode, frozen
    preprocessing: Preprocessing
    source: str  # hub id with the commit it resolved to, or the directory
    labels: list[str] | None  # class names by index, when the checkpoint has them
    num_classes: int  # 0: no head, gives features only
    as_saved: dict[str, Tensor] = field(default_factory=dict)  # what the checkpoint has otherwise: head, positions
    classes_note: str = ""  # how its classes were matched with the data's; empty = they are the same
    wrapped: bool = False  # its weights were saved from a wrapped model, under longer names


def load_teacher(source: str, *, revision: str | None = None, image_size: int | None = None) -> Teacher:
    """A frozen teacher with the preprocessing it was trained with.

    `num_classes` 0 means that the checkpoint has no classes: the teacher gives features only. An image-text model's
    projection is not classes; it is taken off, with a line in the log.

    Args:
        source: hub id ("owner/name", "owner/name@revision", timm's "hf-hub:owner/name") or a directory.
        revision: branch, tag or commit of a hub id.
        image_size: side of its images in pixels; None = the checkpoint's own, for models that take every size that of
            its image processor. Learned positions are resampled as timm does it, rotary ones computed anew, the crop
            keeps its share of the image.

    Raises:
        ValueError: nothing readable there, a family that cannot be split, no preprocessing, pickled weights, an image
            size that does not fit the patches.
        RuntimeError: the conversion to timm changed what the model gives.
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
        teacher = load(files, config, config_path.parent, image_size)
    teacher.model.eval().requires_grad_(False)
    return teacher


def _load_transformers(
    files: CheckpointFiles, config: dict[str, Any], directory: Path, image_size: int | None
) -> Teacher:
    model_type = config["model_type"]
    layout = LAYOUTS.get(model_type) if isinstance(model_type, str) else None
    if layout is None:
        raise ValueError(refusal(files, f"transformers model type {model_type!r}", str(model_type)))
    _check_processor_files(files)
    weights = checked_weights(files, _of_vision(files, config), TRANSFORMERS_SIZES, layout.left_out)
    original, report, processor = _originals(files, directory, layout, weights)
    _check_loaded(files, config, report, layout)
    try:
        model = to_timm(original)
        own_size = model.patch_embed.img_size[0]
        size = size_of(processor) if layout.any_size else own_size
        preprocessing = from_processor(processor, model, image_size=size)
        labels = _transformers_labels(files, original) if model.num_classes else None
        teacher = Teacher(model, preprocessing, str(files), labels, model.num_classes, wrapped=weights.renamed)
        if size != own_size and image_size is None:
            log.info("%s: images of %d pixels, as its image processor makes them (not %d)", files, size, own_size)
        size = size if image_size is None else image_size
        if size != own_size:
            teacher.as_saved = set_image_size(model, size)
            teacher.preprocessing = replace(preprocessing, image_size=size)
            _check_at_new_size(original, model, layout)
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{files} has odd settings in its JSON files: {error!r}. {DAMAGED}") from error
    return teacher


def _of_vision(files: CheckpointFiles, config: dict[str, Any]) -> dict[str, Any]:
    """The settings, of an image-text model those of its vision part."""
    settings = config.get("vision_config", config)
    if not isinstance(settings, dict):
        raise ValueError(f"config.json of {files} has vision_config={settings!r}, expected an object of settings.")
    return {**settings, "num_labels": config.get("num_labels")}


def _originals(
    files: CheckpointFiles, directory: Path, layout: Layout, weights: Weights
) -> tuple[nn.Module, dict[str, Any], Any]:
    """The model as transformers has it, what it reports of its weights, and the image processor."""
    import transformers

    names = weights.names()
    if any("classifier." in name for name in names):
        model_class = transformers.AutoModelForImageClassification
    elif layout.family == "BEiT" and "lm_head.weight" in names:
        model_class = transformers.BeitForMaskedImageModeling
    else:
        model_class = getattr(transformers, layout.whole or layout.encoder)
    try:
        with _loadable(weights, directory) as folder, _without_load_report():
            original, report = model_class.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below by name
            )
        processor = transformers.AutoImageProcessor.from_pretrained(
            directory,
            backend="pil",  # pictures are resized by PIL in training and evaluation
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # whatever it raises (its own validators among them): the checkpoint cannot be used
        raise ValueError(f"transformers cannot load {files}: {one_line(error)}. {DAMAGED}") from error
    if model_class.__name__ == layout.whole:
        original = original.vision_model
    return original, report, processor


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers prints a table of every tensor it does not use: the text part of an image-text model, a pooler.

    What is missing or left over is judged in _check_loaded.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_at_new_size(original: nn.Module, model: nn.Module, layout: Layout) -> None:
    """Positions are computed where the original computes them; both are compared where they make them alike."""
    computed = computes_positions(original)
    if computed:
        with torch.no_grad():
            model.pos_embed.copy_(computed_positions(model))
    if computed or layout.same_at_other_sizes:
        check_same(original, model)


def _transformers_labels(files: CheckpointFiles, original: nn.Module) -> list[str] | None:
    config = original.config
    labels = [config.id2label[i] for i in range(config.num_labels)]
    _check_labels(files, labels)
    if labels == [f"LABEL_{i}" for i in range(len(labels))]:  # transformers' own words where nobody gave names
        return None
    return labels


def _check_processor_files(files: CheckpointFiles) -> None:
    """Refuse a checkpoint without an image processor, or with two that differ.

    New releases of transformers save it inside processor_config.json, and read it there first.
    """
    path = files.find("preprocessor_config.json")
    settings = read_object(path, files) if path else None
    path = files.find("processor_config.json", optional=True)
    nested = read_object(path, files).get("image_processor") if path else None
    if not isinstance(nested, dict):
        nested = None
    if settings is None and nested is None:
        raise ValueError(
            f"{files} has no preprocessor_config.json: mean, std and size of its images are unknown. Save the image "
            f"processor it was trained with beside it (ViTImageProcessor(...).save_pretrained(directory))."
        )
    if settings is None or nested is None:
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


def _check_loaded(files: CheckpointFiles, config: dict[str, Any], report: dict[str, Any], layout: Layout) -> None:
    """transformers only warns about a part it starts at random (a distilled DeiT read as a plain one: its head)."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, saved_shape, model_shape = mismatched[0]
        raise ValueError(
            f"{files} has {name} with shape {tuple(saved_shape)}, but its config asks for {tuple(model_shape)}. "
            f"Take the config.json that was saved with these weights."
        )
    missing = sorted(key for key in report["missing_keys"] if not re.search(layout.left_out, key))
    unexpected = sorted(key for key in report["unexpected_keys"] if not re.search(layout.left_out, key))
    if not missing and not unexpected:
        return
    saved_as = ", ".join(config.get("architectures") or ["unknown"])
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


def _load_timm(files: CheckpointFiles, config: dict[str, Any], directory: Path, image_size: int | None) -> Teacher:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{files}: timm {timm.__version__} knows no architecture {architecture!r}. {SUPPORTED}")
    module = timm.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    if module not in TIMM_MODULES:
        raise ValueError(refusal(files, f"timm architecture {architecture!r}", module))
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
    if type(model) not in TIMM_CLASSES:  # arguments in config.json can change it
        raise ValueError(refusal(files, f"timm model {type(model).__name__}", type(model).__name__))
    _check_head(files, model, weights)
    if isinstance(model, Eva):
        # only of training, and drawn anew wherever they are used: stages in a row would draw different ones
        model.patch_drop = None
        if model.rope is not None:
            model.rope.aug_active = False
    try:
        as_saved = {} if image_size is None else set_image_size(model, image_size)
        preprocessing = from_timm_config(model)
        labels = _label_list(model.pretrained_cfg.get("label_names"), model.num_classes)
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json of {files} has odd settings: {error!r}. {DAMAGED}") from error
    _check_labels(files, labels)
    teacher = Teacher(model, preprocessing, str(files), labels, model.num_classes, as_saved, wrapped=weights.renamed)
    if labels is None and _is_projection(architecture, model):
        _take_off_projection(files, teacher)
    return teacher


def _check_head(files: CheckpointFiles, model: nn.Module, weights: Weights) -> None:
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


def _is_projection(architecture: str, model: nn.Module) -> bool:
    """Whether the head of an image-text architecture is as wide as that of a checkpoint nobody fine-tuned."""
    if model.num_classes == 0 or not any(word in f"{architecture}_" for word in IMAGE_TEXT):
        return False
    widths = set()
    for name in timm.list_pretrained(f"{architecture}.*"):
        if "_ft_" not in name:
            widths.add(timm.get_pretrained_cfg(name).num_classes)
    return model.num_classes in widths


def _take_off_projection(files: CheckpointFiles, teacher: Teacher) -> None:
    model = teacher.model
    log.info(
        "%s: its head of %d outputs is the projection of an image-text model, not classes, and is taken off. If they "
        "are classes, name them in config.json (label_names).",
        files,
        model.num_classes,
    )
    teacher.as_saved |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    model.reset_classifier(0)
    teacher.num_classes = 0


def _label_list(names: Any, num_classes: int) -> list[str] | None:
    """timm stores names as a list, or as a dict from class index to name."""
    if isinstance(names, dict):
        names = [names.get(i, names.get(str(i))) for i in range(num_classes)]
    if not names or len(names) != num_classes or None in names:
        return None
    return list(names)


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

    The weights are those of the checkpoint, also where the rows of its head were put into the order of other data, or
    its positions were resampled for another image size.

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
