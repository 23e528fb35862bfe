"""The tables of a study as text cells, for study.md and study.html alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.report.page import duration, flops
from trainer.study.figures import WAYS, Comparison, Results
from trainer.study.statistics import Summary
from trainer.study.tuning import Tuned


@dataclass(frozen=True)
class Table:
    """A title, one sentence below it, and cells; the first column is text."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results, grids: Sequence[Tuned] = ()) -> list[Table]:
    """Accuracy, assembly, routing, cost, comparisons and tuning; tables nothing is known for are left out."""
    every = [_accuracy(results), _assembly(results), _routing(results), _cost(results), _comparisons(results)]
    every.append(_tuning(results, grids))
    return [table for table in every if any(map(_has_numbers, table.rows))]


def _has_numbers(row: Sequence[str]) -> bool:
    """Whether anything is known beside the name and the number of seeds."""
    return any(row[2:])


def percent(value: Summary) -> str:
    """Mean +- standard deviation in %; blank when there is none."""
    if value.mean is None:
        return ""
    if value.std is None:
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ± {100 * value.std:.1f}"


def points(value: Summary) -> str:
    """A difference in percentage points +- its standard error."""
    if value.mean is None:
        return ""
    if value.error is None:
        return f"{100 * value.mean:+.1f}"
    return f"{100 * value.mean:+.1f} ± {100 * value.error:.1f}"


def verdict(comparison: Comparison) -> str:
    """Whether the variant is ahead over the second half of the cost axis."""
    race = comparison.race
    if race is None:
        return ""
    if race.ahead is None:
        return "one seed"
    return "yes" if race.ahead else "no"


def _accuracy(results: Results) -> Table:
    columns = {
        "teacher": "teacher",
        "meta": "meta model",
        "hybrid_teacher_min": "teacher hybrids, min",
        "hybrid_teacher_mean": "mean",
        "hybrid_student_min": "student hybrids, min",
        "hybrid_student_mean": "mean",
        "start": "assembled",
        "half": "50% of the epochs",
        "final": "100%",
    }
    caption = (
        "Accuracy on the validation images in %, mean ± standard deviation over the seeds. A hybrid is the meta model "
        "with one module of the teacher or of the student in its place (where modules are taught in the second round "
        "alone, the student's before it as well); assembled is the student before any end-to-end step."
    )
    if results.explained:
        caption += (
            " Of students without classes the numbers are the explained share, 1 - relative error of the final tokens "
            "beside the teacher's."
        )
    rows = []
    for variant in results.cells:
        accuracies = [percent(results.of(variant, key)) for key in columns]
        rows.append([*_name(results, variant), *accuracies])
    return Table("Accuracy", caption, ["variant", "seeds", *columns.values()], rows)


def _assembly(results: Results) -> Table:
    rows = []
    for variant in results.cells:
        ways = [percent(results.of(variant, f"start_{way}")) for way in WAYS]
        start = results.of(variant, "start").mean
        teacher = results.of(variant, "teacher").mean
        share = ""
        if any(ways) and start and teacher:
            share = f"{100 * start / teacher:.0f}"
        rows.append([*_name(results, variant), *ways, share])
    caption = (
        "Accuracy in % of the assembled student before any end-to-end step with its stitch layers dropped, kept or "
        "folded; the last column is the one that was trained, in % of the teacher's accuracy."
    )
    head = ["variant", "seeds", *WAYS, "share of the teacher"]
    return Table("Assembly", caption, head, list(filter(_has_numbers, rows)))


def _routing(results: Results) -> Table:
    rows = []
    for variant in results.cells:
        change = percent(results.of(variant, "routing_change"))
        similarity = results.of(variant, "expert_similarity")
        shown = ""
        if similarity.mean is not None:
            shown = f"{similarity.mean:.3f}"
        if similarity.std is not None:
            shown += f" ± {similarity.std:.3f}"
        rows.append([*_name(results, variant), change, shown])
    caption = (
        "Share of the validation tokens, in %, whose first expert changes between the last two evaluations of "
        "end-to-end training, and how alike the experts of a block are at its end (models/moe/similarity.py); mean "
        "± standard deviation."
    )
    head = ["variant", "seeds", "tokens that change their expert", "similarity of the experts"]
    return Table("Routing", caption, head, list(filter(_has_numbers, rows)))


def _cost(results: Results) -> Table:
    rows = []
    for variant in results.cells:
        cells = _name(results, variant)
        for key in ("preparation_flops", "train_flops", "total_flops"):
            cells.append(_blank_or(results.of(variant, key).mean, _cost_text))
        cells.append(_blank_or(results.of(variant, "ratio").mean, "{:.2f}".format))
        cells.append(_blank_or(results.of(variant, "images").mean, "{:,.0f}".format))
        cells.append(_blank_or(results.of(variant, "seconds").mean, duration))
        rows.append(cells)
    caption = (
        "Mean over the seeds, counted by the phases themselves. Preparation is all between the teacher and end-to-end "
        "training: meta model, distillation, second round, experts; the teacher is not counted. Images are those "
        "passed in training, time is that of one process."
    )
    head = ["variant", "seeds", "preparation", "end to end", "together"]
    head += ["preparation / end to end", "images seen", "time"]
    return Table("Cost", caption, head, rows)


def _comparisons(results: Results) -> Table:
    labels = {variant.name: variant.label for variant in results.study.variants}
    rows = []
    for comparison in results.comparisons:
        at_end = ""
        end = ""
        crossings = ""
        race = comparison.race
        if race:
            end = flops(race.end)
            crossings = ", ".join(flops(cost) for cost in race.crossings)
        if race and race.points:
            _, last = race.points[-1]
            at_end = points(last)
        cells = [
            f"{labels[comparison.variant]} against {labels[comparison.reference]}",
            _count(results, comparison.final.n),
            points(comparison.half),
            points(comparison.final),
            at_end,
            end,
            verdict(comparison),
            crossings,
        ]
        rows.append(cells)
    caption = (
        "Difference of accuracy in points ± standard error, seed by seed: at half and all of each run's own end-to-end "
        "epochs, and at equal total cost (preparation included), where both curves end. Ahead: by more than two "
        "standard errors at every point of the second half of that cost axis. Crossings: where the mean difference "
        "changes its sign."
    )
    head = ["comparison", "seeds", "at 50% of the epochs", "at 100%", "at equal total cost", "which is"]
    head += ["ahead over its second half", "crossings"]
    return Table("Comparisons", caption, head, rows)


def _tuning(results: Results, grids: Sequence[Tuned]) -> Table:
    labels = {variant.name: variant.label for variant in results.study.variants}
    rows = []
    for grid in grids:
        for place, trial in enumerate(grid.trials):
            remark = ""
            cost = ""
            if place == grid.best:
                remark = "chosen"
                cost = _blank_or(grid.flops, _cost_text)
            if place == grid.best and grid.edges:
                remark += f", at the edge of the grid: {', '.join(grid.edges)}"
            rows.append([labels[grid.variant], ", ".join(trial.overrides), percent(trial.accuracy), remark, cost])
    seeds = ", ".join(map(str, results.study.tune_seeds))
    caption = (
        f"Accuracy in % on {results.study.tune_share:g} of the training images, which were held out meanwhile; seeds "
        f"{seeds}. The validation images of the other tables had no part in the choice. The cost is that of all trials "
        "of a variant, what they share counted once; it is in no other table."
    )
    if results.study.tune_overrides:
        caption += f" Trials ran with {', '.join(results.study.tune_overrides)}."
    head = ["variant", "choice", "held-out images", "", "cost of tuning"]
    return Table("Tuning", caption, head, rows)


def _name(results: Results, variant: str) -> list[str]:
    """The first two cells of a variant's row: its label and its seeds."""
    labels = {one.name: one.label for one in results.study.variants}
    return [labels[variant], _count(results, results.of(variant, "final").n)]


def _count(results: Results, n: int) -> str:
    planned = len(results.study.seeds)
    return str(n) if n == planned else f"{n} of {planned}"


def _blank_or(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _cost_text(value: float) -> str:
    return flops(value) if value else "0"
