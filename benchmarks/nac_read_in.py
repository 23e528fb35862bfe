"""What a NAC saves at ImageNet sizes: the absorbed form of its read-in beside the direct one, and pruned mediators.

On batch 1, in turn in one run: forward and backward of the read-in block and of the whole model with either form, and
evaluation with a share of the mediators. Memory in a process of its own for each form: the peak of its resident size
above what it had before the first step, as Linux counts it.

    python benchmarks/nac_read_in.py
    python benchmarks/nac_read_in.py --preset tiny-imagenet --pairs 10
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch
from torch import Tensor

from benchmarks import timing
from models.nac import NAC, NACConfig, decode_preset
from models.nac.attention import ReadInAttention
from models.nac.model import ReadIn

SHARES = (1.0, 0.5, 0.25, 0.1)  # of the mediators
FORMS = ("absorbed", "direct")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of both forms, after one that is not counted")
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = decode_preset(options.preset)
    # signatures need no fit to be timed
    config = NACConfig(image_size=224, num_classes=1000, **sizes, graph="complete", fit_recall=0.0)
    if options.memory:
        part, form = options.memory.split(",")
        step = STEPS[part](config, form)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        step()
        print(resident("VmHWM") - before)
        return
    ratios = {}
    print(f"preset {options.preset}, batch 1, {options.pairs} pairs, forward and backward:")
    for part, make in STEPS.items():
        seconds = in_turn({form: make(config, form) for form in FORMS}, options.pairs)
        kilobytes = {form: peak_memory(part, form, options.preset) for form in FORMS}
        for form in FORMS:
            print(f"  {part}, {form:9} {seconds[form]:6.2f} s, peak {kilobytes[form] / 1024:6,.0f} MiB above the start")
        saved = 1 - kilobytes["absorbed"] / kilobytes["direct"]
        speed = seconds["direct"] / seconds["absorbed"]
        print(f"  {part}, absorbed: {speed:.1f} x as fast, {saved:.0%} less memory")
        ratios |= {f"{part}: speed, absorbed to direct": speed, f"{part}: memory saved": saved}
    print(f"evaluation of the whole NAC, batch 1, {options.pairs} rounds:")
    seconds = in_turn({str(share): evaluation(config, share) for share in SHARES}, options.pairs)
    for share in SHARES:
        ratio = seconds["1.0"] / seconds[str(share)]
        print(f"  {share:4.0%} of the mediators: {seconds[str(share)]:.3f} s, {ratio:.2f} x as fast")
        ratios[f"{share:.0%} of the mediators: speed of evaluation"] = ratio
    timing.write(options.json, ratios, machine=timing.machine())


def read_in_step(config: NACConfig, form: str) -> Callable[[], None]:
    """One forward and backward of the read-in block."""
    block = ReadIn(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    states = torch.randn(1, config.input_latents, config.state_dim, requires_grad=True)
    codes = torch.randn(config.input_latents, config.code_dim, requires_grad=True)
    rows, columns = config.grid_size
    tokens = torch.randn(1, rows * columns, config.token_dim, requires_grad=True)
    read = block.attn if form == "absorbed" else lambda *arguments: direct(block.attn, *arguments)

    def step() -> None:
        block.ffn(read(states, codes, tokens), codes).square().mean().backward()

    return step


def whole_step(config: NACConfig, form: str) -> Callable[[], None]:
    """One forward and backward of the whole NAC in training."""
    nac = NAC(config).train()
    if form == "direct":
        attn = nac.read_in.attn
        attn.forward = functools.partial(direct, attn)
    images = torch.randn(1, config.in_chans, config.image_size, config.image_size)

    def step() -> None:
        nac(images).square().mean().backward()

    return step


STEPS = {"read-in": read_in_step, "whole model": whole_step}


def direct(attn: ReadInAttention, states_BUC: Tensor, code_UK: Tensor, tokens_BVI: Tensor) -> Tensor:
    """The published form: every receiver's own key and value of every token, (B, V, U, H D) twice."""
    senders = attn.sender_norm(tokens_BVI).unsqueeze(2).expand(-1, -1, states_BUC.shape[1], -1)
    q = attn.query(attn.norm(states_BUC), code_UK).unflatten(-1, (attn.heads, -1))
    k = attn.key(senders, code_UK).unflatten(-1, (attn.heads, -1))
    v = attn.value(senders, code_UK).unflatten(-1, (attn.heads, -1))
    scores = torch.einsum("buhd,bvuhd->bhuv", q, k) / math.sqrt(q.shape[-1])
    message = torch.einsum("bhuv,bvuhd->buhd", scores.softmax(-1), v).flatten(2)
    return states_BUC + attn.gamma * attn.exit(message, code_UK)


def evaluation(config: NACConfig, share: float) -> Callable[[], None]:
    """The forward of a NAC with so many of its mediators."""
    kept = max(1, round(share * config.mediator_latents))
    nac = NAC(replace(config, mediator_latents=kept)).eval()
    images = torch.randn(1, config.in_chans, config.image_size, config.image_size)

    @torch.no_grad()
    def step() -> None:
        nac(images)

    return step


def in_turn(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_memory(part: str, form: str, preset: str) -> int:
    """KiB that the process of one form needs above its start."""
    command = [sys.executable, __file__, "--preset", preset, "--memory", f"{part},{form}"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(kind: str) -> int:
    """KiB of this process's resident memory (VmRSS), or its peak (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
