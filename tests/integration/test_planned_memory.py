"""The peak of memory that a plan says is within a tenth of what a real step has alive at one time.

The real steps are those of benchmarks/planner.py, which looks at more of them and at what the allocator says.
"""

import json
from pathlib import Path

import pytest

from benchmarks.planner import DETECT

ZERO_2 = ["ds.bf16.enabled=true", "ds.zero_optimization.stage=2", "ds.trainer.activation_checkpointing=true"]
# ranks, result, words, images of a rank
CASES = {
    "2 ranks, ZeRO-2 in bf16, blocks recomputed": (2, "train", ZERO_2, 16),
    "a module between the teacher's, in the meta model": (1, "distill_1", [], 16),
    "a detector with masks": (1, "detect", [*DETECT, "detect.masks=true"], 8),
}


def measure(file: str, name: str, words: list[str], images: int) -> None:
    """On the ranks: planned and measured bytes of the first one, into a file."""
    from benchmarks.planner import live_peak, sized, with_batch
    from trainer.distributed.ranks import start, stop

    dist = start()
    live, expected = live_peak(with_batch(name, [*sized(128), *words], images, dist), name, dist)
    if dist.main:
        Path(file).write_text(json.dumps([expected.peak, live]))
    stop()


@pytest.mark.parametrize("case", CASES)
def test_peak_of_a_real_step(warm, tmp_path, case):
    ranks, *arguments = CASES[case]
    file = tmp_path / "peak.json"
    done = warm.call("tests.integration.test_planned_memory:measure", str(file), *arguments, ranks=ranks)
    assert done.code == 0, done.output
    planned, measured = json.loads(file.read_text())
    assert planned == pytest.approx(measured, rel=0.1)
