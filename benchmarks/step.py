"""A whole step of training (forward, backward, AdamW) of a V-MoE beside a dense ViT of its size, and of a pair.

    python benchmarks/step.py                                   # V-MoE Ti/16 at 224 pixels, float32 and bfloat16
    python benchmarks/step.py --size B --batch 64 --device cuda

In turn in one process: the V-MoE (every second block, 8 experts, k 2, capacity 1.05, the paper's routing), timm's ViT
of the same size, and the pair of the second of four modules, the ViT as teacher and meta model. Printed: seconds,
images per second, FLOPs of the model per second and their share of this device's own matmul rate, and on a GPU the most
memory; then the V-MoE's time per time of the dense model beside the same ratio of FLOPs, which is the floor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import timm
import torch

from benchmarks import timing
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import build_student_modules
from models.moe.layer import official
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.phases import DistillConfig
from trainer.objectives import Classify, Distill, Objective

CLASSES = 1000
TOKENS = 197
# size -> timm's name; width, heads, MLP
SIZES = {
    "Ti": ("vit_tiny_patch16_224", 192, 3, 768),
    "S": ("vit_small_patch16_224", 384, 6, 1536),
    "B": ("vit_base_patch16_224", 768, 12, 3072),
}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="Ti", choices=SIZES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--type", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    facts = timing.machine(options.device)
    print(timing.describe(facts))
    print("| type | step | s | images/s | GFLOP/s | of the matmul rate | GB at most |")
    print("|---|---|---:|---:|---:|---:|---:|")
    results = []
    for name in options.type:
        results += _measure(name, options, facts[f"matmul_{name}"])
    ratios = {}
    for row in results:
        if "ratio" in row:
            ratios[f"{row['type']}: V-MoE / dense ViT, time"] = row["ratio"]
            ratios[f"{row['type']}: V-MoE / dense ViT, FLOPs (the floor)"] = row["floor"]
    timing.write(options.json, ratios, machine=facts, steps=results)


def _measure(name: str, options: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Rows of one type of numbers."""
    torch.manual_seed(0)
    objectives = objectives_of(options.size)
    steps = {
        kind: training_step(objective, options.batch, TYPES[name], options.device)
        for kind, objective in objectives.items()
    }
    seconds = timing.in_turn(steps, options.rounds, options.device)
    rows = []
    for kind, objective in objectives.items():
        median = statistics.median(seconds[kind])
        flops = options.batch * objective.flops_per_image
        memory = _peak(steps[kind], options.device)
        rows.append({"type": name, "step": kind, "seconds": median, "flops": flops, "memory": memory})
        print(
            f"| {name} | {kind} | {median:.3f} | {options.batch / median:.1f} | {flops / median / 1e9:.1f} | "
            f"{flops / median / rate:.2f} | {'' if memory is None else f'{memory / 1e9:.2f}'} |",
            flush=True,
        )
    floor = objectives["V-MoE"].flops_per_image / objectives["dense ViT"].flops_per_image
    ratio = timing.ratio(seconds, "V-MoE", "dense ViT")
    print(f"\n{name}: V-MoE / dense ViT {ratio:.3f} in time, {floor:.3f} in FLOPs\n", flush=True)
    return [*rows, {"type": name, "ratio": ratio, "floor": floor}]


def objectives_of(size: str) -> dict[str, Objective]:
    """What is trained, by name."""
    timm_name, width, heads, mlp_dim = SIZES[size]
    sizes = {"width": width, "depth": 12, "heads": heads, "mlp_dim": mlp_dim, "image_size": 224, "patch_size": 16}
    moe = official(num_experts=8, k=2)
    students = [VMoE(VMoEConfig(**sizes, num_classes=CLASSES, moe_blocks="every-2", moe=moe)) for _ in range(2)]
    teacher = timm.create_model(timm_name, num_classes=CLASSES)
    stages = split(teacher, [3, 3, 3, 3])
    module = build_student_modules(students[1], [3, 3, 3, 3], width, kind="linear", bases=None)[1]
    pair = Distill(module, stages[1], MetaModel(stages), 1, DistillConfig(border="mse"), TOKENS)
    return {
        "V-MoE": Classify(students[0], TOKENS),
        "dense ViT": Classify(timm.create_model(timm_name, num_classes=CLASSES), TOKENS),
        "pair of modules": pair,
    }


def training_step(objective: Objective, batch: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Forward, backward and AdamW on one batch of noise, at every call."""
    for module in objective.frozen:
        module.to(device, dtype).eval().requires_grad_(False)
    objective.module.to(device, dtype).train()
    optimizer = torch.optim.AdamW([p for p in objective.module.parameters() if p.requires_grad], lr=1e-5, fused=True)
    images = torch.randn(batch, 3, 224, 224, device=device).to(dtype)
    labels = torch.randint(CLASSES, (batch,), device=device)

    def step() -> None:
        loss, _ = objective(objective.module, images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak(step: Callable[[], None], device: str) -> int | None:
    """Most memory of one more step on a GPU, all three models in it; None elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    timing.wait(device)
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
