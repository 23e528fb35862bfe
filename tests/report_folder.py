"""Run folders for the tests of the reports: every number made up, and worked out by hand where it is checked."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

RECIPE = {"seed": 0, "modules": 2, "data": {"source": "digits", "path": ""}, "teacher": {"source": ""},
          "student": {"variant": "", "depth": 4, "moe": {"num_experts": 2, "k": 1}},
          "train": {"baselines": ["scratch", "scratch_equal_cost"]}}  # fmt: skip


def put(folder: Path, metrics=None, evaluations=None, flops=0.0, seconds=0.0, epochs=0, loads=(), **more) -> None:
    """Write one phase; metrics None = unfinished."""
    folder.mkdir(parents=True)
    rows = [{"kind": "train", "phase": "train", "epoch": 0, "step": step, "loss": 1.0, "lr": 0.1, "load/10": load,
             "load/9": [0.5, 0.5]} for step, load in enumerate(loads, start=1)]  # fmt: skip
    for epoch, accuracy in (evaluations or {}).items():
        rows.append({"kind": "eval", "phase": "train", "epoch": epoch, "step": 5 * epoch, "accuracy": accuracy})
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if metrics is not None:
        result = {"phase": "train", "module": None, "metrics": metrics, "seconds": seconds, "images_seen": 100,
                  "flops": flops, "epochs": epochs, "world_size": 2, "ep_size": 1, "git_commit": "abc1234",
                  "versions": {"torch": "2.13.0"}, **more}  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))


def put_detector(folder: Path, evaluations: dict[int, dict[str, float]], detect: dict[str, Any], done=True) -> None:
    """Write one detector: what was measured after which epoch, the last of it in its result; `detect` of its recipe."""
    folder.mkdir(parents=True)
    rows = [{"kind": "train", "phase": "detect", "epoch": 0, "step": 1, "loss": 9.0, "lr": 0.1,
             "load/backbone.vit.blocks.1.mlp": [0.25, 0.75]}]  # fmt: skip
    for epoch, measured in evaluations.items():
        rows.append({"kind": "eval", "phase": "detect", "epoch": epoch, "step": 5 * epoch, **measured})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE | {"detect": {"epochs": 2, "backbone": "", "freeze": False, "scratch": False} | detect}
    (folder / "config.yaml").write_text(json.dumps({"phase": "detect", "recipe": recipe, "ds_config": {}}))
    if done:
        last = max(evaluations)
        result = {"phase": "detect", "module": None, "metrics": evaluations[last], "epochs": last, "flops": 6e12}
        (folder / "result.json").write_text(json.dumps(result))


def complete_run(out: Path) -> Path:
    """A complete run of two modules."""
    put(out / "teacher", {"accuracy": 0.9616}, flops=9e15, seconds=900.0)
    meta = {"accuracy": 0.8, "teacher_accuracy": 0.5, "hybrid_accuracy/0": 0.91, "hybrid_accuracy/1": 0.925}
    put(out / "meta", meta, flops=2e12, seconds=20.0)
    put(out / "distill_0", {"hybrid_accuracy": 0.7, "teacher_hybrid_accuracy": 0.91}, flops=3e12, seconds=30.0)
    put(out / "distill_1", {"hybrid_accuracy": 0.625, "teacher_hybrid_accuracy": 0.92}, flops=4e12, seconds=40.0)
    evaluations = {0: 0.1, 1: 0.5, 2: 0.75, 3: 0.8, 4: 0.875}
    put(out / "train", {"accuracy": 0.875}, evaluations, flops=1e12, seconds=10.4, epochs=4,
        loads=[[0.5, 0.5], [0.75, 0.25]], command="python trainer/run.py --recipe recipes/demo.yaml")  # fmt: skip
    # 10 epochs: 25% is epoch 2.5, evaluated at 2; 50% is epoch 5, evaluated at 4; 100% only in the result
    put(out / "train_scratch", {"accuracy": 0.6}, {2: 0.2, 4: 0.4, 6: 0.5}, flops=2.5e12, seconds=25.0, epochs=10)
    put(out / "train_scratch_equal_cost", {"accuracy": 0.7}, {20: 0.65, 40: 0.7}, flops=1e13, seconds=99, epochs=40)
    put(out / "evaluate", {"accuracy": 0.8749})
    return out


def analysed_run(out: Path, **changes: Any) -> Path:
    """The same with its recipe and the analysis of its evaluation; changes: keys of analysis.json."""
    complete_run(out)
    (out / "train" / "config.yaml").write_text(json.dumps({"phase": "train", "recipe": RECIPE, "ds_config": {"x": 1}}))
    (out / "evaluate" / "analysis.json").write_text(json.dumps(analysis() | changes))
    return out


def analysis() -> dict[str, Any]:
    """Three classes, two MoE blocks of two experts, one picture of 2 x 2 patches."""
    with io.BytesIO() as file:
        Image.new("RGB", (4, 4), (255, 0, 0)).save(file, "PNG")
        png = base64.b64encode(file.getvalue()).decode()
    return {
        "images": 10,
        "skipped": 0,
        "labels": ["ant", "bee", "cat"],
        "classes": {"images": [4, 4, 2], "correct": [4, 1, 1], "predicted": [5, 3, 2], "taken_for": [-1, 2, 0],
                    "taken_count": [0, 2, 1]},
        "confusion": [[4, 0, 0], [1, 1, 2], [1, 0, 1]],
        "confusions": [[1, 2, 2], [2, 0, 1], [1, 0, 1]],
        "grid": [2, 2],
        "layers": {"blocks.1.mlp": {"load": [0.5, 0.5], "kept": 1.0}, "blocks.3.mlp": {"load": [0.25, 0.75],
                                                                                       "kept": 0.9}},
        "pictures": [{"index": 0, "label": 1, "predicted": 2, "confidence": 0.5, "png": png,
                      "experts": {"blocks.1.mlp": [0, 1, 1, -1], "blocks.3.mlp": [1, 1, 0, 0]}}],
    }  # fmt: skip
