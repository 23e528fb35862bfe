"""Whether a student has to rotate where its teacher does: modules with and without rope at the borders of a rotary
teacher.

    python benchmarks/rotary_teacher.py
    python benchmarks/rotary_teacher.py --seeds 1 student.depth=3

A small rotary ViT (timm's Eva as DINOv3 has it: no learned positions, one class token) is trained on the procedural
set, then a meta model from it. For every seed the modules of a dense student are then taught twice, with student.rope
true and false and everything else equal: the data in the same order, epochs, initial values. The only target is a
module's own border. Printed of every module that has one, on the validation images: |s - t|^2 / |t|^2 there, and the
accuracy of the hybrid, the meta model with the module in its place. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch
from timm.models.eva import Eva
from torch import Tensor

from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.data.base import ImageSource
from trainer.data.loader import eval_batches
from trainer.distributed.engine import parameter_groups
from trainer.distributed.ranks import Dist
from trainer.objectives import Classify, Distill, Objective
from trainer.objectives.base import relative_mse
from trainer.objectives.meta import meta_objective
from trainer.phases import distill
from trainer.teaching.meta import new_meta
from trainer.teaching.students import student_modules

PIXELS = 32
BATCH = 50
RECIPE = [
    "data.source=fractals",
    "data.fractals.size=32",
    "data.fractals.classes=10",
    "data.fractals.train_images=2000",
    "data.fractals.val_images=1000",
    "data.fractals.difficulty=0.1",
    "modules=3",
    "meta.blocks_per_module=1",
    "distill.border=mse",
    "distill.logit_weight=0",
    "student.patch_size=4",
    "student.width=48",
    "student.heads=4",
    "student.mlp_dim=96",
    "student.depth=6",
    "student.moe_blocks=none",
]
LR = 2e-3  # of the teacher and the meta model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--meta-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of every module")
    parser.add_argument("--lr", type=float, default=1e-2, help="of the modules: their stitches have a long way to go")
    parser.add_argument("--weights", type=Path, help="file to keep teacher and meta model in, or to take them from")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    logging.getLogger("trainer").setLevel(logging.WARNING)
    recipe = load_recipe(Path("recipes/demo.yaml"), [*RECIPE, *options.overrides])
    run = Run(recipe, {}, Path(), Dist(0, 1, 0, 1, torch.device("cpu")), "benchmark")
    images = Preprocessing(PIXELS, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)
    train, val = [_tensors(source, images) for source in run.sources]
    torch.manual_seed(0)
    model = rotary_teacher(len(run.labels))
    run = run.with_teacher(Teacher(model, images, "a rotary ViT", list(run.labels), len(run.labels)))
    if options.weights and options.weights.exists():
        weights = torch.load(options.weights)
        model.load_state_dict(weights["teacher"])
        meta = new_meta(run)
        meta.load_state_dict(weights["meta"])
    else:
        fit(Classify(model, 0), train, options.teacher_epochs, 0, LR)
        meta = new_meta(run)
        matching = meta_objective(meta, run.teacher_stages(), recipe.meta, run.tokens, 0.0, 0)
        fit(matching, train, options.meta_epochs, 0, LR)
        if options.weights:
            torch.save({"teacher": model.state_dict(), "meta": meta.state_dict()}, options.weights)
    _say(f"teacher {accuracy(model.eval(), val):.1%}, meta model {accuracy(meta.eval(), val):.1%}")
    # (module, rope) -> of every seed the error at the border and the accuracy of the hybrid
    results: dict[tuple[int, bool], list[tuple[float, float]]] = defaultdict(list)
    for seed in range(options.seeds):
        for rope in (True, False):
            seeded = replace(run, recipe=replace(recipe, seed=seed)).with_student(rope=rope)
            for i, module in enumerate(student_modules(seeded)[:-1]):  # the last one has no border
                objective, _ = distill.objective(seeded, i, module, meta)
                fit(objective, train, options.epochs, seed, options.lr)
                error = border_error(objective, val)
                hybrid = accuracy(objective.predict, val)
                results[i, rope].append((error, hybrid))
                _say(f"seed {seed}, rope {rope}, module {i}: border {error:.3f}, hybrid {hybrid:.1%}")
    print("\n| module | rope | relative error at the border | accuracy of the hybrid |\n|---:|---|---:|---:|")
    for (module, rope), values in sorted(results.items()):
        errors, accuracies = zip(*values)
        print(f"| {module} | {rope} | {_spread(errors, '.3f')} | {_spread(accuracies, '.1%')} |")


def rotary_teacher(classes: int) -> Eva:
    """A small ViT with DINOv3's rotary positions and no other ones."""
    return Eva(
        img_size=PIXELS,
        patch_size=4,
        embed_dim=64,
        depth=6,
        num_heads=4,
        num_classes=classes,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
    )


def fit(objective: Objective, train: tuple[Tensor, Tensor], epochs: int, seed: int, lr: float) -> None:
    """Train an objective's module by AdamW with a cosine, on images shifted by up to two pixels."""
    for part in objective.frozen:
        part.requires_grad_(False).eval()
    objective.module.requires_grad_(True).train()
    groups = parameter_groups(objective.module, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=lr)
    images, labels = train
    steps = len(images) // BATCH * epochs
    warm_up = steps // 10
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            done = (step - warm_up) / (steps - warm_up)
            rate = lr * min(step / warm_up, 0.5 * (1 + math.cos(math.pi * max(done, 0))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            loss, _ = objective(objective.module, images[rows].roll(shift, (2, 3)), labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    objective.module.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Share of the images that are classified rightly."""
    right = 0
    for x, y in zip(*(part.split(BATCH) for part in val)):
        right += int((model(x).argmax(1) == y).sum())
    return right / len(val[0])


@torch.no_grad()
def border_error(objective: Distill, val: tuple[Tensor, Tensor]) -> float:
    """|s - t|^2 / |t|^2 of the module's output, mean over batches."""
    errors = []
    for x in val[0].split(BATCH):
        h = objective.meta.front(x, objective.index)
        errors.append(relative_mse(objective.module(h), objective.teacher_stage(h)).item())
    return statistics.mean(errors)


def _tensors(source: ImageSource, images: Preprocessing) -> tuple[Tensor, Tensor]:
    """All images (N, 3, H, W) and labels (N,) of a split."""
    batches = [batch.without_padding() for batch in eval_batches(source, images, batch=BATCH, workers=0)]
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    main()
