"""The MoE layer alone, forward and backward, against DeepSpeed's own MoE layer and a dense MLP of as many FLOPs.

    python benchmarks/moe_block.py                                    # every cell: an hour on one core
    python benchmarks/moe_block.py --experts 8 32 --tokens 6304 --width 192 --type float32

Images of 197 tokens, k = 2, capacity factor 1.05; hidden width 4 x width. Every cell runs in turn in one process: ours,
DeepSpeed's stock layer (its top-2 gate, one capacity over all tokens, a loop over its experts), and the dense MLP with
2 x the hidden width, which multiplies as much as two experts. Printed per cell: time of ours; its speed against stock
(above 1: ours is faster) and against dense; the share of this machine's own matmul rate that ours reaches on the FLOPs
of the choices it keeps; FLOPs per second are no measure of an implementation that computes empty rows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch
from torch import Tensor, nn

from benchmarks import timing
from models.moe.grouped import form_of
from models.moe.layer import MoE, MoEConfig

IMAGE_TOKENS = 197
CAPACITY = 1.05
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1576, 6304, 25216])
    parser.add_argument("--width", type=int, nargs="+", default=[192, 768])
    parser.add_argument("--type", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    _start_process_group()
    facts = timing.machine(options.device)
    print(timing.describe(facts))
    print("| experts | tokens | width | type | ours, ms | x stock | x dense | of the matmul rate | form |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---|")
    results = []
    for experts, tokens, width, name in itertools.product(options.experts, options.tokens, options.width, options.type):
        cell = _measure(experts, tokens, width, TYPES[name], options.rounds, options.device)
        of_rate = cell["flops"] / cell["seconds"] / facts[f"matmul_{name}"]
        results.append({"experts": experts, "tokens": tokens, "width": width, "type": name, **cell})
        print(
            f"| {experts} | {tokens} | {width} | {name} | {1e3 * cell['seconds']:.1f} | {cell['to_stock']:.2f} | "
            f"{cell['to_dense']:.2f} | {of_rate:.2f} | {cell['form']} |",
            flush=True,
        )
    ratios = {}
    for cell in results:
        name = f"{cell['experts']} experts, {cell['tokens']} tokens, width {cell['width']}, {cell['type']}"
        ratios[f"{name}: speed to DeepSpeed's layer"] = cell["to_stock"]
        ratios[f"{name}: speed to a dense MLP of its FLOPs"] = cell["to_dense"]
    timing.write(options.json, ratios, machine=facts, cells=results)
    torch.distributed.destroy_process_group()


def _start_process_group() -> None:
    """DeepSpeed's layer needs one; of one rank."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed
    import deepspeed.ops

    # an operator for inference that would be compiled first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1, verbose=False)


def _measure(
    experts: int, tokens: int, width: int, dtype: torch.dtype, rounds: int, device: str
) -> dict[str, float | str]:
    """Seconds and ratios of one cell."""
    torch.manual_seed(0)
    hidden = 4 * width
    config = MoEConfig(
        num_experts=experts, k=2, renormalize=False, noise_std=0.0, capacity_factor=CAPACITY, importance_weight=0.0
    )
    ours = MoE(width, hidden, config).to(device, dtype).train()
    stock = _stock(width, hidden, experts).to(device, dtype).train()
    stock.deepspeed_moe.gate.wg.float()  # where DeepSpeed keeps it
    dense = _mlp(width, 2 * hidden).to(device, dtype)
    x = torch.randn(tokens // IMAGE_TOKENS, IMAGE_TOKENS, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    told: dict = {}
    ours(x, told)
    kept = float(told["routing"].kept)

    def run(layer: nn.Module) -> None:
        output = layer(x)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        y.backward(grad)
        layer.zero_grad()
        x.grad = None

    kinds = {"ours": lambda: run(ours), "stock": lambda: run(stock), "dense": lambda: run(dense)}
    seconds = timing.in_turn(kinds, rounds, device)
    return {
        "seconds": statistics.median(seconds["ours"]),
        "to_stock": timing.ratio(seconds, "stock", "ours"),
        "to_dense": timing.ratio(seconds, "dense", "ours"),
        "kept": kept,
        # forward and backward of the kept choices: 3 x 2 x 2 layers x D H each
        "flops": 12 * kept * 2 * x.shape[0] * x.shape[1] * width * hidden,
        "form": form_of(x),
    }


def _mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _stock(width: int, hidden: int, experts: int) -> nn.Module:
    """DeepSpeed's MoE layer as its tutorial builds it."""
    from deepspeed.moe.layer import MoE as StockMoE

    layer = StockMoE(
        width, _mlp(width, hidden), num_experts=experts, k=2, capacity_factor=CAPACITY, min_capacity=4, use_rts=False
    )
    layer.set_deepspeed_parallelism()
    return layer


if __name__ == "__main__":
    main()
