"""What a GPU can do, by data sheets, and what of it the planner counts on. No torch here.

parse("h200"); parse("a100,memory_gb=40"); parse("h100,share=0.3,network_gb_s=25"); parse("measured.json")
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config.knobs import close

ASSUMED_SHARE = 0.1  # of a GPU's peak bf16 rate: what small-batch ViT training gets; not measured here on a GPU yet
# Nobody has measured these here on a GPU: each is an assumption, and a field of Gpu that `--gpu NAME,key=value` sets.
OVERLAP = 0.8  # of the backward pass that gradients can be reduced beside, where "overlap_comm" is on
LATENCY_US = 20.0  # per collective and doubling of the ranks; NCCL's own tests show 10 to 30 for small tensors
UPDATED_BYTES = 28.0  # float32 weight, gradient and two moments of AdamW in, weight and moments out
FULL = 0.9  # of the memory that is planned with: CUDA, NCCL and the gaps between tensors take the rest


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in a node of its kind; GB are 1e9 bytes, and bandwidths those of one GPU in one direction."""

    name: str
    tflops: float  # peak of dense bf16 products, without sparsity, 1e12 FLOP/s
    memory_gb: float
    memory_gb_s: float  # of its own memory
    node_gb_s: float  # to the other GPUs of its node: NVLink, Infinity Fabric, PCIe
    network_gb_s: float  # to other nodes: its share of the node's network cards
    source: str
    share: float = ASSUMED_SHARE  # of the peak that training reaches
    overlap: float = OVERLAP
    latency_us: float = LATENCY_US
    full: float = FULL
    touched: float = 0.0  # times that a byte kept for the backward pass crosses memory, apart from what `share` covers
    updated_bytes: float = UPDATED_BYTES  # that the optimiser's step reads and writes per weight
    form: str = "grouped"  # of the experts' products (models/moe/grouped.py)

    @property
    def flops_per_second(self) -> float:
        """What the planner counts on."""
        return self.tflops * 1e12 * self.share

    @property
    def usable_bytes(self) -> float:
        """What a plan may fill."""
        return self.memory_gb * 1e9 * self.full

    def __str__(self) -> str:
        """Every figure, for people."""
        return (
            f"{self.name}: {self.tflops:g} TFLOP/s bf16, {self.share:.0%} of them counted on; {self.memory_gb:g} GB at "
            f"{self.memory_gb_s:g} GB/s, {self.full:.0%} of them filled; {self.node_gb_s:g} GB/s in the node, "
            f"{self.network_gb_s:g} GB/s between nodes; {self.latency_us:g} us per collective and doubling of ranks "
            f"({self.source})"
        )


# Data sheets give both directions of NVLink together, and bf16 with sparsity in some rows: both are halved here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312, 80, 2039, 300, 25, "data sheets NVIDIA A100 80GB SXM; DGX A100, 8 x 200 Gb/s"),
        Gpu("h100", 989, 80, 3350, 450, 50, "data sheets NVIDIA H100 SXM; DGX H100, 8 x 400 Gb/s"),
        Gpu("h200", 989, 141, 4800, 450, 50, "data sheets NVIDIA H200 SXM; DGX H200, 8 x 400 Gb/s"),
        Gpu("b200", 2250, 180, 8000, 900, 50, "data sheets NVIDIA HGX B200; DGX B200, 8 x 400 Gb/s"),
        Gpu("l40s", 362, 48, 864, 32, 12.5, "data sheet NVIDIA L40S, PCIe 4 x16; 100 Gb/s per GPU assumed"),
        Gpu("rtx4090", 165, 24, 1008, 32, 3.1, "white paper NVIDIA Ada, PCIe 4 x16; 25 Gb/s per GPU assumed"),
        Gpu("mi300x", 1307, 192, 5300, 448, 50, "data sheet AMD Instinct MI300X; 400 Gb/s per GPU assumed"),
    )
}
CHANGEABLE = tuple(field.name for field in dataclasses.fields(Gpu) if field.name not in ("name", "source", "form"))


def peak_flops(device: str) -> float | None:
    """FLOP/s of dense bf16 products by the table, of what a driver calls e.g. "NVIDIA H200"; None of what is not in it.

    An H100 PCIe or NVL and a slice of a GPU (MIG) have other peaks than the table's H100: None for them, too.
    """
    words = device.lower().replace("-", " ").split()
    if {"pcie", "mig", "nvl"} & set(words):
        return None
    joined = "".join(words)
    found = [gpu.tflops * 1e12 for name, gpu in GPUS.items() if name in joined]
    return found[0] if len(found) == 1 else None


def parse(text: str) -> Gpu:
    """A GPU of the table by name, or of a file that benchmarks/planner.py wrote, with what follows a comma changed.

    Raises:
        ValueError: a name, a key or a number that has no meaning.
    """
    name, *changes = text.split(",")
    gpu = _read(Path(name)) if name.endswith(".json") else GPUS.get(name)
    if gpu is None:
        raise ValueError(
            f"--gpu {name} is not in the table. {close(name, list(GPUS))} Figures may follow: h100,memory_gb=94"
        )
    values = {}
    for change in changes:
        key, equals, number = change.partition("=")
        if not equals or key not in CHANGEABLE:
            raise ValueError(f"--gpu {text}: {change!r} sets nothing, expected key=number with one of {CHANGEABLE}")
        values[key] = _number(text, key, number)
    gpu = replace(gpu, **values)
    if values:
        gpu = replace(gpu, source=f"{gpu.source}; given: {', '.join(changes)}")
    return gpu


def _read(path: Path) -> Gpu:
    if not path.is_file():
        raise ValueError(f"--gpu {path}: no such file; write one with: python benchmarks/planner.py time --out {path}")
    try:
        return Gpu(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--gpu {path} does not hold the figures of a GPU: {error}") from None


def _number(text: str, key: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    share = key in ("share", "overlap", "full")
    least = 0 if key in ("overlap", "latency_us", "touched") else 1e-6
    most = 1.0 if share else 1e9
    if not least <= value <= most:
        raise ValueError(f"--gpu {text}: {key} is {number}, expected a number from {least:g} to {most:g}")
    return value
