"""Section detect: a detector on the student, or on another vision transformer (docs/detection.md)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.knobs import MANY, SEEDS, SHARE, Range, check_ranges, knob, require, section
from trainer.config.phases import OFF_OR_EPOCHS, ScheduleConfig

SHAPES = 6  # that trainer/data/drawing/shapes.py draws
SIDE = Range(16, 8192)  # of images a detector looks at, pixels
SIZE = Range(1, 100_000)


@dataclass(frozen=True)
class BoxDataConfig:
    """Images with boxes: COCO's layout below a folder, or, without one, pictures of shapes drawn here."""

    path: str = knob("", "folder that the four below lie in; empty = shapes drawn here, nothing to download")
    train_images: str = knob("train2017", "folder of the training images")
    train_annotations: str = knob("annotations/instances_train2017.json", "COCO annotation file of them")
    val_images: str = knob("val2017", "folder of the validation images")
    val_annotations: str = knob("annotations/instances_val2017.json", "COCO annotation file of them")
    shapes: int = knob(SHAPES, "drawn: categories", Range(1, SHAPES))
    size: int = knob(96, "drawn: longer side of a picture, pixels; a third each are square, wide and high", SIDE)
    objects: int = knob(4, "drawn: most objects of a picture", Range(1, 100))
    train_pictures: int = knob(1000, "drawn: training pictures", Range(1, MANY))
    val_pictures: int = knob(200, "drawn: validation pictures", Range(1, MANY))
    seed: int = knob(0, "of the drawn pictures; the recipe's own seed leaves them as they are", Range(0, SEEDS))

    def __post_init__(self):
        check_ranges(self, "detect.data.")


@dataclass(frozen=True)
class DetectConfig(ScheduleConfig):
    """A detector, RF-DETR on the maps of a backbone; off by default."""

    epochs: int = knob(0, "passes over the images with boxes; 0 = no detector", OFF_OR_EPOCHS)
    data: BoxDataConfig = section(BoxDataConfig)
    backbone: str = knob(
        "", "directory or hub id[@revision] of a V-MoE, or of any ViT a teacher can be; empty = the student of this run"
    )
    scratch: bool = knob(False, "the backbone's architecture with new weights in place of its own, to compare with")
    freeze: bool = knob(False, "leave the backbone as it is and train the detector's heads alone")
    masks: bool = knob(False, "tell a mask of every object as well (instance segmentation)")
    shorter_side: int = knob(560, "images are resized to this shorter side, pixels, keeping their shape", SIDE)
    longest_side: int = knob(896, "... or to this longer side where that is smaller", SIDE)
    hflip: float = knob(0.5, "probability of a mirrored training image", SHARE)
    jitter: tuple[float, float] = knob(
        (0.8, 1.2), "lowest and highest factor of shorter_side and longest_side in training", Range(0.1, 10)
    )
    width: int = knob(256, "of the detector's states", SIZE)
    queries: int = knob(300, "objects it can tell in an image, at most", Range(1, 10_000))
    groups: int = knob(13, "groups of queries in training, each matched by itself (Group DETR); 1 = off", Range(1, 100))
    layers: int = knob(3, "of the decoder", Range(1, 100))
    heads: int = knob(8, "of the decoder's attention", SIZE)
    mlp_dim: int = knob(2048, "hidden width of the decoder's MLPs", SIZE)
    dropout: float = knob(0.0, "in the decoder", Range(0, 1, open_most=True))
    maps: int = knob(4, "blocks of the backbone that are read, evenly spread, the last among them", Range(1, 100))
    window: int = knob(
        0,
        "side of the windows that the backbone's attention stays inside, patches, for large images; 0 = global",
        Range(0, 1024),
    )
    global_blocks: int = knob(4, "blocks whose attention stays global, evenly spread", Range(1, 1000))
    layer_decay: float = knob(
        1.0, "learning rate of a block of the backbone relative to the block after it", Range(0, 1, open_least=True)
    )
    ema: float = knob(
        0.0,
        "decay of an average of the weights, per step, which is evaluated and saved; 0 = off",
        Range(0, 1, open_most=True),
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.jitter[0] <= self.jitter[1], "detect.jitter", self.jitter, "the lower factor first")
        expected = f"detect.shorter_side={self.shorter_side} or more"
        require(self.longest_side >= self.shorter_side, "detect.longest_side", self.longest_side, expected)
        expected = f"a multiple of 4 and of detect.heads={self.heads}"
        require(self.width % self.heads == 0 and self.width % 4 == 0, "detect.width", self.width, expected)
