"""How long a projected start takes, and in how much memory: of ViT-L/16 to V-MoE-B on images of noise.

    python benchmarks/projection.py --images 32      # two minutes on two cores
    python benchmarks/projection.py                  # as the recipe does it where it says nothing

As recipes/vmoe_base_imagenet.yaml has it (12 blocks of width 768 for 24 of width 1,024, 8 experts, no classifier), with
weights that were never trained: no time depends on their values. Printed: seconds of the basis and of the fits, FLOPs
as the plan counts them and their share of this device's rate of products, and the most resident memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import timm
import torch
from torch import Tensor

from benchmarks import timing
from models.experts.projection import check_projection, project, projection_flops, stream_basis
from models.experts.upcycle import covered_layers
from models.moe.layer import paper
from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from models.vmoe.model import VMoE, VMoEConfig
from trainer.teaching.calibration import BATCH, IMAGES
from trainer.teaching.upcycling import basis_images

SIZE = 224


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help="that the fits are made on (student.start_images)")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    facts = timing.machine(options.device)
    print(timing.describe(facts))
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)
    model = timm.create_model("vit_large_patch16_224", num_classes=0).eval().requires_grad_(False)
    dense = Teacher(model, preprocessing, "a ViT-L/16 of noise", None, 0)
    config = VMoEConfig(
        width=768, depth=12, heads=12, mlp_dim=3072, image_size=SIZE, patch_size=16, num_classes=0, moe=paper()
    )
    student = VMoE(config)
    covered = covered_layers([6] * 4, [3] * 4)
    check_projection(student, dense, covered, images=options.images)
    for_basis = basis_images(model, options.images)
    model.to(options.device)

    start = time.perf_counter()
    basis = stream_basis(model, _noise(for_basis, options.device), student.embed_dim)
    timing.wait(options.device)
    of_basis = time.perf_counter() - start
    project(student, dense, covered, basis, preprocessing, lambda: _noise(options.images, options.device))
    timing.wait(options.device)
    seconds = time.perf_counter() - start

    flops = projection_flops(student, dense, covered, options.images, for_basis)
    of_rate = flops / seconds / facts["matmul_float32"]
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{options.images} images: {seconds:.0f} s, {of_basis:.0f} of them the basis on {for_basis}; "
        f"{flops / 1e12:.1f} TFLOP, {of_rate:.2f} of the rate of products; {memory / 1e9:.1f} GB resident at most"
    )
    ratios = {f"projected start of V-MoE-B from ViT-L, {options.images} images: share of the matmul rate": of_rate}
    timing.write(options.json, ratios, machine=facts, seconds=seconds, flops=flops, memory=memory)


def _noise(images: int, device: str) -> Iterator[Tensor]:
    """The same images at every call."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, images, BATCH):
        yield torch.randn(min(BATCH, images - first), 3, SIZE, SIZE, generator=generator).to(device)


if __name__ == "__main__":
    main()
