"""The tables of a study as text cells, for study.md and study.html alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.page import duration, flops
from trainer.study.figures import WAYS, Comparison, Results
from trainer.study.statistics import Summary


@dataclass(frozen=True)
class Table:
    """A title, one sentence below it, and cells; the first column is text."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results) -> list[Table]:
    """Accuracy, assembly, routing, cost and comparisons; tables nothing is known for are left out."""
    found = [_accuracy(results), _assembly(results), _routing(results), _cost(results), _comparisons(results)]
    return [table for table in found if any(any(row[2:]) for row in table.rows)]


def percent(value: Summary) -> str:
    """Mean +- standard deviation in %; blank when there is none."""
    if value.mean is None:
        return ""
    return f"{100 * value.mean:.1f}" + ("" if value.std is None else f" ± {100 * value.std:.1f}")


def points(value: Summary) -> str:
    """A difference in percentage points +- its standard error."""
    if value.mean is None:
        return ""
    return f"{100 * value.mean:+.1f}" + ("" if value.error is None else f" ± {100 * value.error:.1f}")


def verdict(comparison: Comparison) -> str:
    """Whether the variant is ahead over the second half of the cost axis."""
    race = comparison.race
    if race is None:
        return ""
    if race.ahead is None:
        return "one seed"
    return "yes" if race.ahead else "no"


def _accuracy(results: Results) -> Table:
    keys = ("teacher", "meta", "hybrid_teacher_min", "hybrid_teacher_mean", "hybrid_student_min",
            "hybrid_student_mean", "start", "half", "final")  # fmt: skip
    head = ["variant", "seeds", "teacher", "meta model", "teacher hybrids, min", "mean", "student hybrids, min",
            "mean", "assembled", "50% of the epochs", "100%"]  # fmt: skip
    caption = (
        "Accuracy on the validation images in %, mean ± standard deviation over the seeds. A hybrid is the meta model "
        "with one module of the teacher or of the student in its place (where modules are taught in the second round "
        "alone, the student's before it as well); assembled is the student before any end-to-end step."
    )
    rows = [[*_name(results, v), *(percent(results.of(v, key)) for key in keys)] for v in results.cells]
    return Table("Accuracy", caption, head, rows)


def _assembly(results: Results) -> Table:
    rows = []
    for variant, cells in results.cells.items():
        ways = [percent(results.of(variant, f"start_{way}")) for way in WAYS]
        start, teacher = results.of(variant, "start"), results.of(variant, "teacher")
        share = f"{100 * start.mean / teacher.mean:.0f}" if cells and start.mean and teacher.mean else ""
        rows.append([*_name(results, variant), *ways, share if any(ways) else ""])
    caption = (
        "Accuracy in % of the assembled student before any end-to-end step with its stitch layers dropped, kept or "
        "folded; the last column is the one that was trained, in % of the teacher's accuracy."
    )
    head = ["variant", "seeds", *WAYS, "share of the teacher"]
    return Table("Assembly", caption, head, [row for row in rows if any(row[2:])])


def _routing(results: Results) -> Table:
    rows = []
    for variant in results.cells:
        change, alike = results.of(variant, "routing_change"), results.of(variant, "expert_similarity")
        shown = "" if alike.mean is None else f"{alike.mean:.3f}" + ("" if alike.std is None else f" ± {alike.std:.3f}")
        rows.append([*_name(results, variant), percent(change), shown])
    caption = (
        "Share of the validation tokens, in %, whose first expert changes between the last two evaluations of "
        "end-to-end training, and how alike the experts of a block are at its end (models/moe/similarity.py); mean "
        "± standard deviation."
    )
    head = ["variant", "seeds", "tokens that change their expert", "similarity of the experts"]
    return Table("Routing", caption, head, [row for row in rows if any(row[2:])])


def _cost(results: Results) -> Table:
    rows = []
    for variant in results.cells:
        mean = {key: results.of(variant, key).mean for key in
                ("preparation_flops", "train_flops", "total_flops", "ratio", "images", "seconds")}  # fmt: skip
        rows.append([
            *_name(results, variant),
            *("" if mean[key] is None else "0" if not mean[key] else flops(mean[key])
              for key in ("preparation_flops", "train_flops", "total_flops")),
            "" if mean["ratio"] is None else f"{mean['ratio']:.2f}",
            "" if mean["images"] is None else f"{mean['images']:,.0f}",
            "" if mean["seconds"] is None else duration(mean["seconds"]),
        ])  # fmt: skip
    caption = (
        "Mean over the seeds, counted by the phases themselves. Preparation is all between the teacher and end-to-end "
        "training: meta model, distillation, second round, experts; the teacher is not counted. Images are those "
        "passed in training, time is that of one process."
    )
    head = ["variant", "seeds", "preparation", "end to end", "together", "preparation / end to end", "images seen",
            "time"]  # fmt: skip
    return Table("Cost", caption, head, rows)


def _comparisons(results: Results) -> Table:
    labels = {variant.name: variant.label for variant in results.study.variants}
    rows = []
    for c in results.comparisons:
        race = c.race
        last = race.points[-1][1] if race and race.points else Summary(0, None, None)
        rows.append([
            f"{labels[c.variant]} against {labels[c.reference]}", _count(results, c.final.n), points(c.half),
            points(c.final), points(last), flops(race.end) if race else "", verdict(c),
            ", ".join(flops(x) for x in race.crossings) if race else "",
        ])  # fmt: skip
    caption = (
        "Difference of accuracy in points ± standard error, seed by seed: at half and all of each run's own end-to-end "
        "epochs, and at equal total cost (preparation included), where both curves end. Ahead: by more than two "
        "standard errors at every point of the second half of that cost axis. Crossings: where the mean difference "
        "changes its sign."
    )
    head = ["comparison", "seeds", "at 50% of the epochs", "at 100%", "at equal total cost", "which is",
            "ahead over its second half", "crossings"]  # fmt: skip
    return Table("Comparisons", caption, head, rows)


def _name(results: Results, variant: str) -> list[str]:
    label = next(v.label for v in results.study.variants if v.name == variant)
    return [label, _count(results, results.of(variant, "final").n)]


def _count(results: Results, n: int) -> str:
    wanted = len(results.study.seeds)
    return str(n) if n == wanted else f"{n} of {wanted}"
