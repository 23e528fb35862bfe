"""Small models and folders for the tests of trainer/judge, and ranks that need no processes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.moe.layer import MoEConfig
from models.nac import NAC
from models.nac.config import NACConfig
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.data import DataConfig
from trainer.distributed.ranks import Dist
from trainer.judge.outputs import Bench
from trainer.judge.subjects import Subject

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
PREPROCESSING = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
DIGITS = [str(digit) for digit in range(10)]


def student(labels: list[str] | None = DIGITS, num_classes: int = 10, seed: int = 0, **moe: Any) -> VMoE:
    """Two blocks, the second with experts; its outputs depend on the seed."""
    moe = {"num_experts": 4, "k": 2, **moe}
    config = VMoEConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_dim=16, num_classes=num_classes,
                        moe_blocks="1", moe=MoEConfig(**moe), seed=seed)  # fmt: skip
    model = VMoE(config).eval()
    if num_classes:
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    model.preprocessing = PREPROCESSING
    model.labels = labels
    return model


def nac(seed: int = 0) -> NAC:
    """A circuit on the same images and classes."""
    config = NACConfig(image_size=16, num_classes=10, state_dim=16, code_dim=8, signature_dim=8, heads=2, head_dim=8,
                       input_latents=4, mediator_latents=8, output_latents=3, propagators=2, ffn_factor=2.0,
                       tokenizer="pico", grid_dim=4, graph="ring-of-cliques", graph_clusters=2, seed=seed)  # fmt: skip
    model = NAC(config).eval()
    model.preprocessing = PREPROCESSING
    model.labels = DIGITS
    return model


def subject(model: Any, name: str = "model") -> Subject:
    """What load_subject makes of a saved model."""
    return Subject(name, name, name, "V-MoE", model, model.preprocessing, model.labels)


def bench(dist: Dist = ALONE, **settings: Any) -> Bench:
    """On the embedded digits, 60 of each split."""
    return Bench(dist, **{"data": DataConfig(limit=60), "resamples": 100, **settings})


def folder_of(root: Path, images: dict[str, int], seed: int = 0, side: int = 20) -> Path:
    """ROOT/<class>/<number>.png of noise in the colour of its class's name, so many of each."""
    rng = np.random.RandomState(seed)
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        colour = np.random.RandomState(zlib.crc32(name.encode())).randint(0, 256, 3)
        for number in range(count):
            values = (rng.randint(0, 256, (side, side, 3)) + colour) // 2
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


class Said(Exception):
    """What a rank has to give the others; the test hands it on."""


class OneOfMany(Dist):
    """A rank whose part is taken by the test in place of the other ranks."""

    def gather(self, value: Any) -> list[Any]:
        raise Said(value)


class Told(Dist):
    """Rank 0 with the parts of all ranks at hand."""

    parts: list[Any]

    def gather(self, value: Any) -> list[Any]:
        return self.parts


def told(world: int, parts: list[Any]) -> Told:
    dist = Told(0, world, 0, world, torch.device("cpu"))
    object.__setattr__(dist, "parts", parts)
    return dist
