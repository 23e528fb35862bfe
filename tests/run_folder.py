"""A finished run without its hours: the folders that phases leave, with small models and numbers made up by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.moe.layer import MoEConfig
from models.nac import NAC, NACConfig, decode_preset
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from trainer import artifacts
from trainer.config.load import build
from trainer.config.recipe import Recipe
from trainer.request import graph

CONFIG = VMoEConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, mlp_dim=16, num_classes=3,
                    moe_blocks="1", moe=MoEConfig(num_experts=2, k=1))  # fmt: skip
LABELS = ["ant", "bee", "cat"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def new_recipe(**sections: Any) -> Recipe:
    """Two modules, pushed to alice/model."""
    return build(Recipe, {"modules": 2, **sections, "hub": {"repo": "alice/model", **sections.get("hub", {})}})


def new_student(seed: int = 0) -> VMoE:
    """A student whose outputs depend on the seed."""
    model = VMoE(replace(CONFIG, seed=seed))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def new_nac(num_classes: int = 3, image_size: int = 8) -> NAC:
    """A small NAC, of recipes whose section student is of kind nac."""
    sizes = decode_preset("small") | {"mediator_latents": 8, "propagators": 2, "fit_recall": 0.0}
    return NAC(NACConfig(image_size=image_size, num_classes=num_classes, **sizes)).eval()


def logits(model: VMoE) -> torch.Tensor:
    """What a model says about IMAGES."""
    with torch.no_grad():
        return model(IMAGES)


def finish_run(out: Path, recipe: Recipe, student: VMoE | NAC, accuracy: float = 0.8, **save: Any) -> None:
    """Leave teacher, meta, distill_0, distill_1, train and evaluate, complete. save: options of save_pretrained."""
    for name, metrics in (
        ("teacher", {"accuracy": 0.75}),
        ("meta", {"accuracy": 0.5, "teacher_accuracy": 0.75, "hybrid_accuracy/0": 0.625, "hybrid_accuracy/1": 0.65}),
        ("distill_0", {"hybrid_accuracy": 0.6, "teacher_hybrid_accuracy": 0.625}),
        ("distill_1", {"hybrid_accuracy": 0.55, "teacher_hybrid_accuracy": 0.65}),
    ):
        folder = _open(out, name, recipe)
        save_file({"weight": torch.full((4,), len(name) * 1.0)}, folder / "model.safetensors")
        _close(folder, metrics, flops=1e9, seconds=10.0, images_seen=100)
    name = graph.artifact_name("train", start=recipe.train.start)
    folder = _open(out, name, recipe)
    save = {"preprocessing": Preprocessing(8, (0.5,) * 3, (0.25,) * 3), "labels": LABELS} | save
    student.save_pretrained(folder, **save)
    row = {"kind": "train", "phase": "train", "epoch": 0, "step": 1, "loss": 1.0, "load/1": [0.75, 0.25]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    _close(folder, {"accuracy": 0.8125, "loss": 0.5}, flops=2e9, seconds=20.0, images_seen=200)
    name = graph.artifact_name("evaluate", start=recipe.train.start)
    _close(_open(out, name, recipe), {"accuracy": accuracy, "loss": 0.625, "images": 160.0}, flops=0.0, seconds=1.0)


def _open(out: Path, name: str, recipe: Recipe) -> Path:
    return artifacts.open_folder(out, name, recipe, _about(name) | {"ds_config": {"x": 1}})[0]


def _close(folder: Path, metrics: dict[str, float], **values: float) -> None:
    common = {"metrics": metrics, "epochs": 1, "world_size": 2, "ep_size": 2, "device": "cpu", "dtype": "bfloat16"}
    artifacts.write_result(folder, _about(folder.name) | common | values)


def _about(name: str) -> dict[str, Any]:
    phase, _, module = name.partition("_")
    return {"phase": phase, "module": int(module) if phase == "distill" else None, "command": "trainer/run.py ..."}
