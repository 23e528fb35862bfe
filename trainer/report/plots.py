"""The pictures of the written report: learning curves, hybrid accuracies, expert load. Numbers in, PNG files out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from trainer.report.data import END_SHARE, FLOP_UNITS, Loads, at_end

# Okabe and Ito's colour-blind safe set; markers tell the runs apart in grey too
STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"))
GREY = "#555555"


@dataclass(frozen=True)
class Curve:
    """Accuracy (0..1) by end-to-end epochs done; FLOPs of the whole run and of what came before it, None = unknown."""

    name: str
    accuracy: Mapping[float, float]
    epochs: int | None
    flops: float | None
    preparation_flops: float | None

    @property
    def has_cost(self) -> bool:
        return bool(self.epochs) and None not in (self.flops, self.preparation_flops)


def draw_learning_curves(path: Path, curves: Sequence[Curve], teacher_accuracy: float | None) -> None:
    """Accuracy against end-to-end epochs and, where the FLOPs are known, against the total cost."""
    costs = [curve.preparation_flops + curve.flops for curve in curves if curve.accuracy and curve.has_cost]
    columns = 2 if costs else 1
    figure = Figure(figsize=(6 * columns, 4.8), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    axes[0].set(
        xlabel="end-to-end epochs", ylabel="accuracy on the validation images, %", title="Accuracy by end-to-end epochs"
    )
    unit = next(unit for unit in FLOP_UNITS if unit <= max(costs, default=1.0) or unit == 1.0)
    for curve, (colour, marker) in zip(curves, STYLES):
        if not curve.accuracy:
            continue
        style = {"color": colour, "marker": marker, "markersize": 5, "label": curve.name}
        accuracy = [100 * value for value in curve.accuracy.values()]
        axes[0].plot(list(curve.accuracy), accuracy, **style)
        if curve.has_cost:
            begin = curve.preparation_flops
            flops = [(begin + curve.flops * epoch / curve.epochs) / unit for epoch in curve.accuracy]
            axes[1].plot(flops, accuracy, **style)
            if begin:
                label = f"preparation of {curve.name} (meta + distill)"
                axes[1].axvspan(0, begin / unit, color=colour, alpha=0.15, linewidth=0, label=label)
    if costs:
        axes[1].set(title="Accuracy by total training cost", xlim=(0, None))
        axes[1].set_xlabel(f"training cost so far, {FLOP_UNITS[unit]} (forward + backward, teacher not counted)")
    for axis in axes:
        if teacher_accuracy is not None:
            axis.axhline(100 * teacher_accuracy, color=GREY, linestyle="--", label="teacher")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    handles, labels = axes[-1].get_legend_handles_labels()
    for handle, label in zip(*axes[0].get_legend_handles_labels()):
        if label not in labels:
            handles.append(handle)
            labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def draw_hybrids(
    path: Path,
    hybrids: Sequence[tuple[str, float | None, float | None]],
    teacher_accuracy: float | None,
    meta_accuracy: float | None,
) -> None:
    """Accuracy of the meta model with one of its modules replaced by the teacher's or the student's.

    Args:
        hybrids: per module its name, the accuracy with the teacher's and with the student's module; None = unknown.
    """
    figure = Figure(figsize=(max(6.0, 2.0 + 1.6 * len(hybrids)), 4.6), layout="constrained")
    axis = figure.subplots()
    width = 0.38
    kinds = (("teacher module in the meta model", "#E69F00"), ("student module in the meta model", "#0072B2"))
    for kind, (label, colour) in enumerate(kinds):
        points = [(place, 100 * row[1 + kind]) for place, row in enumerate(hybrids) if row[1 + kind] is not None]
        places = [place + (kind - 0.5) * (width + 0.02) for place, _ in points]
        hatch = "//" if kind == 0 else None
        bars = axis.bar(places, [value for _, value in points], width, color=colour, label=label, hatch=hatch,
                        edgecolor="white")  # fmt: skip
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axis.bar_label(bars, fmt="%.1f", fontsize=9, label_type="center", bbox=box)
    if teacher_accuracy is not None:
        axis.axhline(100 * teacher_accuracy, color=GREY, linestyle="--", label="teacher alone")
    if meta_accuracy is not None:
        axis.axhline(100 * meta_accuracy, color="black", linestyle=":", label="meta model alone")
    axis.set_xticks(range(len(hybrids)), [name for name, _, _ in hybrids])
    axis.set(ylabel="accuracy on the validation images, %", xlabel="module replaced, from the input to the output")
    axis.set_title("Meta model with one module replaced")
    axis.margins(y=0.08)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def draw_expert_load(path: Path, runs: Mapping[str, Loads]) -> None:
    """Per run: load of each expert at the end of training, and the extremes over training; both as share of uniform."""
    most = max(len(loads) for loads in runs.values())
    figure = Figure(figsize=(4.6 * len(runs) + 1.4, 0.32 * most + 6.2), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, height_ratios=[0.32 * most + 1.6, 3.2], sharey="row")
    figure.suptitle("Load of the experts")
    ends = {name: {layer: at_end(steps) for layer, steps in loads.items()} for name, loads in runs.items()}
    high = max(2.0, *(value for layers in ends.values() for row in layers.values() for value in row))
    for column, (name, loads) in enumerate(runs.items()):
        image = _draw_heatmap(axes[0, column], ends[name], TwoSlopeNorm(1.0, vmin=0.0, vmax=high))
        axes[0, column].set_title(f"{name}\nmean of the last {END_SHARE:.0%} of the logged steps", fontsize=10)
        _draw_extremes(axes[1, column], loads)
    axes[0, 0].set_ylabel("MoE layer")
    axes[1, 0].set_ylabel("load, share of uniform")
    figure.colorbar(image, ax=list(axes[0]), label="load, share of uniform\n(1 = average expert of the layer)")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def _draw_heatmap(axis: Axes, layers: Mapping[str, Sequence[float]], norm: TwoSlopeNorm):
    rows = list(layers.values())
    image = axis.imshow(rows, cmap="PuOr_r", norm=norm, aspect="auto")
    axis.set_yticks(range(len(layers)), list(layers))
    axis.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 16)))
    axis.set_xlabel("expert")
    if len(rows[0]) <= 16:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                pale = abs(norm(value) - 0.5) < 0.3
                axis.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if pale else "white"
                )
    return image


def _draw_extremes(axis: Axes, loads: Loads) -> None:
    low: dict[int, float] = {}
    high: dict[int, float] = {}
    for steps in loads.values():
        for step, load in steps:
            low[step], high[step] = min(low.get(step, load[0]), *load), max(high.get(step, load[0]), *load)
    steps = sorted(low)
    axis.plot(steps, [high[step] for step in steps], color="#D55E00", label="busiest expert")
    axis.axhline(1.0, color=GREY, linestyle="--", label="uniform")
    axis.plot(steps, [low[step] for step in steps], color="#56B4E9", linestyle="-.", label="idlest expert")
    axis.set_title("extremes over all layers, each logged step", fontsize=10)
    axis.set(xlabel="optimizer step", ylim=(0, None))
    axis.grid(alpha=0.3)
