"""Which vision transformers can teach: small random checkpoints of every architecture, loaded as a user's would be.

Writes docs/teachers.md. Each row is tried with its own head, with a head of another number of classes (taken off: a
probe takes its place) and without a head, at its own image size and at another one.

    python benchmarks/teachers.py            # about a minute of one core
    python benchmarks/teachers.py --check    # only say whether docs/teachers.md is what would be written
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import timm
import torch
import transformers
from timm.models import save_for_hf
from torch import nn

from models.modules.stages import assemble, split
from models.teacher.classes import without_head
from models.teacher.convert import TOLERANCE, computes_positions, differences, has_classes, renamed
from models.teacher.layouts import LAYOUTS
from models.teacher.load import Teacher, load_teacher

FILE = Path(__file__).resolve().parents[1] / "docs" / "teachers.md"
SIZE = 32  # pixels
OTHER_SIZE = 48
PATCH = 8
DEPTH = 4
WIDTH = 24
CLASSES = 5
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TIMM_SIZES = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}


@dataclass(frozen=True)
class Row:
    """One architecture in one layout."""

    name: str
    layout: str  # transformers or timm
    ids: str  # of the hub, that it stands for
    headless: Callable[[], nn.Module] | None  # None: there are no such checkpoints
    classifier: Callable[[int], nn.Module] | None  # of so many classes; None: there are none
    processor: str = ""  # class of transformers


def _transformers(
    name: str,
    ids: str,
    encoder: str,
    classifier: str = "",
    processor: str = "ViTImageProcessor",
    **changes: Any,
) -> Row:
    """A row of transformers' classes.

    Args:
        changes: settings of the configuration, of its vision part where it has one.
    """

    def build(class_name: str, num_labels: int = 0) -> nn.Module:
        model_class = getattr(transformers, class_name)
        config_class = model_class.config_class
        settings = SIZES | changes
        if "dinov2" in config_class.model_type:  # says it by mlp_ratio
            del settings["intermediate_size"]
        if hasattr(config_class(), "vision_config"):
            settings = {"vision_config": settings, "text_config": TEXT}
        if num_labels:
            settings["num_labels"] = num_labels
        return model_class(config_class(**settings))

    def build_encoder() -> nn.Module:
        return build(encoder)

    def build_classifier(num_labels: int) -> nn.Module:
        return build(classifier, num_labels)

    return Row(name, "transformers", ids, build_encoder, build_classifier if classifier else None, processor)


def _timm(name: str, ids: str, architecture: str, *, has_head: bool = True, **changes: Any) -> Row:
    """A row of a timm architecture.

    Args:
        has_head: whether there are checkpoints with classes.
        changes: arguments of the model.
    """

    def build(num_classes: int) -> nn.Module:
        return timm.create_model(architecture, **TIMM_SIZES | {"num_classes": num_classes} | changes)

    def build_headless() -> nn.Module:
        return build(0)

    return Row(name, "timm", ids, build_headless, build if has_head else None)


CLIP_PROCESSOR = "CLIPImageProcessor"
BIT_PROCESSOR = "BitImageProcessor"
ROWS = (
    _transformers("ViT", "google/vit-base-patch16-224, google/vit-base-patch16-224-in21k, facebook/dino-vits16",
                  "ViTModel", "ViTForImageClassification"),
    _transformers("DeiT", "facebook/deit-base-patch16-224", "DeiTModel", "DeiTForImageClassification",
                  "DeiTImageProcessor"),
    _transformers("DeiT, distilled", "facebook/deit-base-distilled-patch16-224", "DeiTModel",
                  "DeiTForImageClassificationWithTeacher", "DeiTImageProcessor"),
    _transformers("MAE", "facebook/vit-mae-base", "ViTMAEModel"),
    _transformers("MSN", "facebook/vit-msn-base", "ViTMSNModel", "ViTMSNForImageClassification"),
    _transformers("I-JEPA", "facebook/ijepa_vith14_1k", "IJepaModel", "IJepaForImageClassification"),
    _transformers("DINOv2", "facebook/dinov2-base, facebook/dinov2-base-imagenet1k-1-layer", "Dinov2Model",
                  "Dinov2ForImageClassification", BIT_PROCESSOR),
    _transformers("DINOv2 giant (SwiGLU)", "facebook/dinov2-giant", "Dinov2Model", "Dinov2ForImageClassification",
                  BIT_PROCESSOR, use_swiglu_ffn=True),
    _transformers("DINOv2, registers", "facebook/dinov2-with-registers-base", "Dinov2WithRegistersModel",
                  "Dinov2WithRegistersForImageClassification", BIT_PROCESSOR),
    _transformers("DINOv3", "facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3ViTModel",
                  processor="DINOv3ViTImageProcessor", num_register_tokens=4),
    _transformers("DINOv3 plus (SwiGLU)", "facebook/dinov3-vits16plus-pretrain-lvd1689m", "DINOv3ViTModel",
                  processor="DINOv3ViTImageProcessor",
                  num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
    _transformers("CLIP", "openai/clip-vit-base-patch16, laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "CLIPModel",
                  "CLIPForImageClassification", CLIP_PROCESSOR),
    _transformers("CLIP, vision part with projection", "of any CLIP", "CLIPVisionModelWithProjection",
                  processor=CLIP_PROCESSOR),
    _transformers("MetaCLIP 2", "facebook/metaclip-2-worldwide-huge-quickgelu", "MetaClip2Model",
                  processor=CLIP_PROCESSOR),
    _transformers("SigLIP, SigLIP 2", "google/siglip-base-patch16-224, google/siglip2-base-patch16-224", "SiglipModel",
                  "SiglipForImageClassification", "SiglipImageProcessor"),
    _transformers("SigLIP, vision part", "of any SigLIP", "SiglipVisionModel", processor="SiglipImageProcessor"),
    _transformers("AIMv2", "apple/aimv2-large-patch14-224-lit", "Aimv2Model", processor=CLIP_PROCESSOR),
    _transformers("AIMv2, native resolution", "apple/aimv2-large-patch14-native", "Aimv2VisionModel",
                  processor=CLIP_PROCESSOR, is_native=True, use_head=False),
    _transformers("BEiT", "microsoft/beit-base-patch16-224, microsoft/beit-base-patch16-224-pt22k-ft22k", "BeitModel",
                  "BeitForImageClassification", "BeitImageProcessor", use_relative_position_bias=True),
    _transformers("BEiT, pretrained", "microsoft/beit-base-patch16-224-pt22k", "BeitForMaskedImageModeling",
                  processor="BeitImageProcessor", use_shared_relative_position_bias=True, use_mask_token=True,
                  vocab_size=20),
    _transformers("Data2Vec", "facebook/data2vec-vision-base, facebook/data2vec-vision-base-ft1k",
                  "Data2VecVisionModel", "Data2VecVisionForImageClassification", "BeitImageProcessor",
                  use_relative_position_bias=True),
    _timm("ViT (AugReg, MAE, DINO)", "timm/vit_base_patch16_224.augreg_in21k_ft_in1k, timm/vit_base_patch16_224.mae",
          "vit_base_patch16_224"),
    _timm("DeiT III", "timm/deit3_large_patch16_224.fb_in22k_ft_in1k", "deit3_large_patch16_224"),
    _timm("DeiT, distilled", "timm/deit_base_distilled_patch16_224.fb_in1k", "deit_base_distilled_patch16_224"),
    _timm("CLIP, DFN, MetaCLIP", "timm/vit_base_patch16_clip_224.openai, timm/vit_base_patch16_clip_224.dfn2b",
          "vit_base_patch16_clip_224"),
    _timm("DINOv2", "timm/vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_dinov2", has_head=False),
    _timm("DINOv2, registers", "timm/vit_base_patch14_reg4_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2",
          has_head=False),
    _timm("DINOv2 giant (SwiGLU)", "timm/vit_giant_patch14_dinov2.lvd142m", "vit_giant_patch14_dinov2",
          has_head=False),
    _timm("SigLIP, SigLIP 2", "timm/vit_base_patch16_siglip_224.webli, timm/vit_base_patch16_siglip_224.v2_webli",
          "vit_base_patch16_siglip_224"),
    _timm("SigLIP, mean pooling", "timm/vit_base_patch16_siglip_gap_224.v2_webli", "vit_base_patch16_siglip_gap_224"),
    _timm("AIMv2", "timm/aimv2_large_patch14_224.apple_pt", "aimv2_large_patch14_224", has_head=False),
    _timm("SBB, registers", "timm/vit_mediumd_patch16_reg4_gap_256.sbb2_e200_in12k_ft_in1k",
          "vit_mediumd_patch16_reg4_gap_256"),
    _timm("EVA", "timm/eva_giant_patch14_224.clip_ft_in1k", "eva_giant_patch14_224"),
    _timm("EVA-02", "timm/eva02_base_patch14_224.mim_in22k, timm/eva02_base_patch14_448.mim_in22k_ft_in1k",
          "eva02_base_patch14_224"),
    _timm("DINOv3", "timm/vit_base_patch16_dinov3.lvd1689m", "vit_base_patch16_dinov3", has_head=False),
    _timm("DINOv3 plus (SwiGLU)", "timm/vit_small_plus_patch16_dinov3.lvd1689m", "vit_small_plus_patch16_dinov3",
          has_head=False),
    _timm("Perception Encoder core", "timm/vit_pe_core_base_patch16_224.fb", "vit_pe_core_base_patch16_224",
          has_head=False),
    _timm("Perception Encoder spatial", "timm/vit_pe_spatial_base_patch16_512.fb", "vit_pe_spatial_base_patch16_512",
          has_head=False),
    _timm("ViT, rope (SBB)", "timm/vit_betwixt_patch16_rope_reg4_gap_256.sbb_in1k",
          "vit_betwixt_patch16_rope_reg4_gap_256"),
    _timm("ViT, rope learned per block", "timm/vit_base_patch16_rope_mixed_224.naver_in1k",
          "vit_base_patch16_rope_mixed_224"),
    _timm("ViT, rope and positions", "timm/vit_base_patch16_rope_ape_224.naver_in1k",
          "vit_base_patch16_rope_ape_224"),
    _timm("BEiT, BEiT v2", "timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k", "beitv2_base_patch16_224"),
    _timm("BEiT 3", "timm/beit3_base_patch16_224.in22k_ft_in1k", "beit3_base_patch16_224"),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One checkpoint loaded at one image size."""

    refused: str  # why it does not load; "" when it does
    error: float = 0.0  # largest difference of tokens, pooled features and logits, relative above 1
    splits: bool = False  # the modules in a row give what the whole model gives, to the bit

    def cell(self, layout: str) -> str:
        """For the table, the same on every machine: two libraries may agree to the bit on one and not on another."""
        if self.refused:
            return self.refused
        allowed = 0 if layout == "timm" else TOLERANCE
        if not self.error <= allowed:
            return f"differs by {self.error:.1g}"
        agrees = "exact" if layout == "timm" else f"< {TOLERANCE:g}"
        return f"{agrees}, equal" if self.splits else f"{agrees}, not equal"


def main() -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results = {row: measure(row) for row in ROWS}
    text = document(results)
    errors = [result.error for cells in results.values() for result in cells if result is not None]
    print(f"{len(ROWS)} architectures, {len(errors)} checkpoints and sizes; largest difference {max(errors):.1e}")
    if options.check:
        return 0 if FILE.read_text() == text else 1
    FILE.write_text(text)
    print(FILE)
    return 0


def measure(row: Row) -> list[Result | None]:
    """What becomes of a row: own head, other classes, headless, each at the own size and at another one.

    Returns:
        None where there are no such checkpoints.
    """
    results: list[Result | None] = []
    for num_classes, taken_off in ((CLASSES, False), (CLASSES + 2, True), (0, False)):
        if num_classes and row.classifier is None:
            results += [None, None]
            continue
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            original = row.classifier(num_classes) if num_classes else row.headless()
            # frozen, as teachers are: torch picks other kernels where gradients are wanted
            _scramble(original.eval().requires_grad_(False))
            _save(row, original, Path(folder))
            for size in (SIZE, OTHER_SIZE):
                results.append(_loaded(row, original, folder, size, taken_off))
    return results


def line(row: Row, results: list[Result | None]) -> str:
    """One line of the table."""
    cells = ["-" if result is None else result.cell(row.layout) for result in results]
    return " | ".join(["", row.name, row.layout, *cells, row.ids, ""]).strip()


def document(results: dict[Row, list[Result | None]]) -> str:
    """The text of docs/teachers.md."""
    return TEXT_ABOVE + "\n".join(line(row, cells) for row, cells in results.items()) + "\n"


TEXT_ABOVE = f"""# Which teachers

Made by `python benchmarks/teachers.py`, which builds a small checkpoint of every architecture with random weights, saves
it as its library does, and loads it as `teacher.source` is loaded. A cell says two things. How far tokens, pooled features
and logits are from those of the original: *exact*, or less than {TOLERANCE:g} (relative above 1) where two libraries compute
it. And whether the modules in a row give what the whole model gives: *equal*, to the bit.

*own head*: the checkpoint's classes are the data's. *other classes*: they are not, so the head is taken off. *headless*:
the checkpoint has none. Each at the checkpoint's own image size ({SIZE} pixels here) and at another one
(`teacher.image_size`, {OTHER_SIZE} here). A dash: there are no such checkpoints. The ids of the hub are what a row stands for; they
are not downloaded here, and a teacher of transformers is compared with its original again whenever it is loaded.

At another size learned positions are resampled as timm does it. transformers' own ViT, DeiT, MAE, MSN, I-JEPA, DINOv2
without registers, CLIP, SigLIP and BEiT interpolate them otherwise (without antialiasing, tables bilinearly), so there the
original is given timm's; the others are compared as they are. Image-text models give their vision part, without the
projection into the space of the texts. AIMv2 for image and text pools by attention; its teacher pools by the mean.

What is refused, and which family to take instead: [troubleshooting](troubleshooting.md#teacher-meta-model-student).

| architecture | layout | own head | own head, other size | other classes | other classes, other size | headless | headless, other size | stands for |
|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501  the row of headings


@torch.no_grad()
def _scramble(model: nn.Module) -> None:
    """No weight keeps a value that would hide it: tokens of zeros, a LayerScale of one constant."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def _save(row: Row, original: nn.Module, folder: Path) -> None:
    if row.layout == "timm":
        save_for_hf(original, folder, safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
        return
    original.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    processor = getattr(transformers, row.processor)
    processor(size=square, crop_size=square, do_center_crop=True).save_pretrained(folder)


@torch.no_grad()
def _loaded(row: Row, original: nn.Module, folder: str, size: int, taken_off: bool) -> Result:
    try:
        teacher = load_teacher(folder, image_size=size)
    except (ValueError, RuntimeError) as error:
        return Result(str(error).partition(". ")[0])
    if taken_off:
        without_head(teacher)
    if row.layout == "timm":
        error = _difference_of_timm(original, teacher, size)
    else:
        error = max(differences(_at_size(original, teacher, size), teacher.model).values())
    return Result("", error, _splits(teacher, size))


def _difference_of_timm(original: nn.Module, teacher: Teacher, size: int) -> float:
    """Largest difference from the model that was saved, at this size, relative above 1."""
    same_size = copy.deepcopy(original)
    same_size.set_input_size(img_size=(size, size))
    images = _images(size)
    tokens = same_size.forward_features(images)
    given = teacher.model.forward_features(images)
    pairs = [(tokens, given)]
    if teacher.num_classes:
        pairs.append((same_size.forward_head(tokens), teacher.model.forward_head(given)))
    found = [(b - a).abs().max().item() / max(1.0, a.abs().max().item()) for a, b in pairs]
    return max(found)


def _at_size(original: nn.Module, teacher: Teacher, size: int) -> nn.Module:
    """The original, or one of another image size that has the teacher's positions and all other weights of its own."""
    if not has_classes(original) and hasattr(original, "vision_model"):
        original = original.vision_model
    layout = LAYOUTS[original.config.model_type]
    if size == SIZE or layout.same_at_other_sizes or computes_positions(original):
        return original
    config = copy.deepcopy(original.config)
    getattr(config, "vision_config", config).image_size = size
    other = type(original)(config).eval()
    state = original.state_dict()
    positions = teacher.model.state_dict()
    for name, value in other.state_dict().items():
        if value.shape != state[name].shape:
            state[name] = positions[renamed(name, layout.names)].reshape(value.shape)
    other.load_state_dict(state)
    return other


def _splits(teacher: Teacher, size: int) -> bool:
    """Whether the modules in a row, and the model assembled of them, give what the model gives, to the bit."""
    model = teacher.model
    images = _images(size)
    expected = model(images) if model.num_classes else model.forward_features(images)
    stages = split(model, [1, 2, 1])
    in_turn = images
    for stage in stages:
        in_turn = stage(in_turn)
    assembled = assemble(stages)
    whole = assembled(images) if model.num_classes else assembled.forward_features(images)
    return torch.equal(in_turn, expected) and torch.equal(whole, expected)


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    sys.exit(main())
