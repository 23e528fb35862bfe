"""What a run tells while it runs: metrics.jsonl (a JSON row per logged step), trackers, the progress bar or lines.

Rank 0 only; no torch here. A row is a flat dict with at least "kind" ("train" | "eval"), "phase", "epoch" and "step".
"step" counts the optimizer steps done, "epoch" of an evaluation the epochs done: after epoch 3 of 12 it is 3.
Training rows hold loss, lr, images_per_s, tokens_per_s, flops_per_s (of one rank, those of the model, see
trainer/objectives/cost.py), memory (peak so far, bytes), time (unix) and, where they apply, "loss/<part>", grad_norm,
mfu (flops_per_s by the peak of a known GPU, in bf16), accuracy and per MoE layer "load/<layer>" (share of the choices
per expert), "kept/<layer>" and "gate_sum/<layer>".
Evaluation rows hold accuracy (0..1), loss and images and, with MoE layers, routing_change and
expert_similarity, mean and "/<layer>" (trainer/evaluation/routing.py); without classes relative_error and cosine, also
with "/<border>", in place of accuracy and loss. events.jsonl beside it has a row for what happened to the run:
{"event": "resumed", "step": 8, "time": ...}.
"""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from trainer.disk import write_text
from trainer.tracking.trackers import Trackers


class MetricsLog:
    """Append-only metrics.jsonl of one phase; every row is flushed before write() returns, and then given to trackers.

    A resumed run continues the file of the run it resumes: rows after `resume_step` are cut off in one atomic
    replacement, so that the file equals that of an uninterrupted run apart from timing. For this the rows of a step
    (its evaluation too) must be written before the checkpoint of that step.

    Args:
        path: the file; its folder is created.
        resume_step: optimizer steps done at the checkpoint resumed from; 0 = from the start, which empties the file.
        trackers: where rows go as well, as in run.trackers.

    Raises:
        ValueError: when a line before the last one is not a JSON row; a tracker that cannot start (see Trackers).
    """

    def __init__(self, path: str | Path, resume_step: int = 0, trackers: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = []
        if resume_step > 0 and self.path.exists():
            before = _parsed_lines(self.path)
        kept = []
        sent = {}  # kind -> step of its last row: steps only grow
        for line, row in before:
            sent[row.get("kind")] = row["step"]
            if row["step"] <= resume_step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))
        self._file = self.path.open("a")
        self._trackers = Trackers(trackers, self.path.parent, resume_step, sent)
        if resume_step:
            self.event("resumed", resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; arrays and tensors become lists, non-finite floats null with their keys under "nonfinite"."""
        assert {"kind", "phase", "epoch", "step"} <= row.keys(), f"not a metrics row: {sorted(row)}"
        plain = {}
        nonfinite = []
        for key, value in row.items():
            if hasattr(value, "tolist"):
                value = value.tolist()
            plain[key] = _finite_or_none(value)
            if plain[key] != value:
                nonfinite.append(key)
        if nonfinite:
            plain["nonfinite"] = nonfinite
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        self._trackers.write(plain)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append to events.jsonl beside the file, which no resume cuts: "resumed", "rolled back", ..."""
        with self.path.with_name("events.jsonl").open("a") as file:
            row = {"event": name, "step": step, "time": time.time(), **details}
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file, and let every tracker write what it still holds."""
        self._file.close()
        self._trackers.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; a last line cut off in the middle of its write is left out.

    Raises:
        ValueError: when any other line is not a JSON row.
    """
    return [row for _, row in _parsed_lines(Path(path))]


def peak_memory() -> int:
    """Most memory this process has held so far, bytes: of its GPU where it trains on one, else of the machine."""
    torch = sys.modules.get("torch")  # a process that has no torch yet holds nothing on a GPU
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        kibibytes = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1]
        return int(kibibytes) * 1024
    except (OSError, TypeError):  # not Linux. There, ru_maxrss would count the launcher this process was forked from
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def relative_load(shares: Sequence[float]) -> list[float]:
    """Turn the load of one layer's experts (any unit) into shares of uniform load: 1.0 = that of the average expert."""
    loads = list(map(float, shares))
    total = sum(loads)
    if not total:
        return [0.0] * len(loads)
    # load / (total / experts)
    return [load * len(loads) / total for load in loads]


class Progress:
    """A bar on a terminal; in a log, a plain line at most every `interval` seconds (first and last step always).

    Args:
        total_steps: optimizer steps of the whole phase.
        steps_per_epoch: optimizer steps of one epoch.
        description: what runs, e.g. "distill 2/4".
        stream: where to write, standard error when None.
        interval: seconds between two lines of a log.
        start_step: steps done before this process started (resume); they do not count in the ETA.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        description: str,
        stream: TextIO | None = None,
        interval: float = 10.0,
        start_step: int = 0,
    ) -> None:
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.description = description
        self.interval = interval
        self._stream = sys.stderr if stream is None else stream
        # from where the speed for the ETA is measured: first the start, then the end of the first step
        self._anchor_step = start_step
        self._anchor_time = time.monotonic()
        self._anchored = False
        self._last_line = -math.inf
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                desc=f"[{description}]",
                bar_format="{desc} {percentage:3.0f}%|{bar:8}| {postfix[0]}",
                postfix=["starting"],
                dynamic_ncols=True,
            )

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Show the training row of optimizer step `step` (1 = the first one is done)."""
        now = time.monotonic()
        position = self._position(step)
        numbers = _row_text(row)
        eta = f"eta {self._eta(step, now)}"
        if self._bar is not None:
            self._bar.postfix[0] = f"{eta} {position} {numbers}"  # a narrow terminal cuts off the end
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        elif now - self._last_line >= self.interval or step >= self.total_steps:
            self._last_line = now
            print(f"[{self.description}] {position} {numbers} {eta}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Write a line of its own (an evaluation, a checkpoint) without tearing the bar."""
        if self._bar is not None:
            self._bar.write(f"[{self.description}] {text}", file=self._stream)
        else:
            print(f"[{self.description}] {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is; a log needs nothing."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _position(self, step: int) -> str:
        epoch, step_in_epoch = divmod(max(step - 1, 0), self.steps_per_epoch)
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        return f"epoch {epoch + 1}/{epochs} step {min(step, step_in_epoch + 1)}/{self.steps_per_epoch}"

    def _eta(self, step: int, now: float) -> timedelta | str:
        done = step - self._anchor_step
        seconds = now - self._anchor_time
        if not self._anchored:  # the first steps compile and fill caches: measure from here on
            self._anchor_step = step
            self._anchor_time = now
            self._anchored = True
        if done <= 0:
            return "?"
        return timedelta(seconds=round((self.total_steps - step) * seconds / done))


def _row_text(row: Mapping[str, Any]) -> str:
    """Render a training row, e.g. "loss 1.234 lr 1.2e-3 2310 img/s load 0.71-1.32 kept 100% gates 0.56"."""
    learning_rate = re.sub(r"e([+-])0", r"e\1", f"{row['lr']:.1e}")
    rate = row["images_per_s"]
    digits = ".0f" if rate >= 100 else ".3g"
    parts = [f"loss {row['loss']:.3f}", f"lr {learning_rate}", f"{rate:{digits}} img/s"]
    if "flops_per_s" in row:
        parts.append(_flops_text(row["flops_per_s"]))
    if "mfu" in row:
        parts.append(f"({row['mfu']:.0%} of peak)")
    if "accuracy" in row:
        parts.append(f"acc {row['accuracy']:.1%}")
    loads = []
    for shares in _by_layer(row, "load/"):
        loads += relative_load(shares)
    if loads:
        parts.append(f"load {min(loads):.2f}-{max(loads):.2f}")
    kept = list(map(float, _by_layer(row, "kept/")))
    if kept:
        # of the worst layer, in tenths of a percent rounded down: 100% means that nothing was dropped
        thousandths = math.floor(round(min(kept) * 1000, 6))
        parts.append(f"kept {thousandths / 10:g}%")
    gates = list(map(float, _by_layer(row, "gate_sum/")))
    if gates:
        parts.append(f"gates {sum(gates) / len(gates):.2f}")
    return " ".join(parts)


def _flops_text(flops_per_s: float) -> str:
    """FLOP/s of one rank, e.g. "312 TFLOP/s" or "19.2 GFLOP/s"."""
    unit, size = ("TFLOP/s", 1e12) if flops_per_s >= 1e12 else ("GFLOP/s", 1e9)
    return f"{flops_per_s / size:.3g} {unit}"


def _by_layer(row: Mapping[str, Any], prefix: str) -> list[Any]:
    return [value for key, value in row.items() if key.startswith(prefix)]


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_finite_or_none, value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parsed_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, row) of every line, without a last one that is cut off. Raises ValueError as read_metrics."""
    # errors="replace" and only "\n" ends a line: a killed node can leave any bytes at the end of the file
    lines = path.read_text(errors="replace").removesuffix("\n").split("\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not a row")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: expected one JSON object per line, got {line[:60]!r}. Only the last line may "
                "be cut off; if the file was edited or written by two runs at once, remove that line."
            ) from error
        parsed.append((line, row))
    return parsed
