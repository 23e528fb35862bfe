"""`--phase plan`, as it is printed; see planner.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.config.gpus import GPUS, Gpu, parse
from trainer.config.recipe import Recipe
from trainer.plan.estimate import EXCHANGED, GRADIENTS, WEIGHTS, Estimate
from trainer.plan.planner import Plan, plan, problems, propose
from trainer.plan.stand_ins import BoxedImages, planned_run
from trainer.plan.traffic import Layout
from trainer.plan.work import Work, works
from trainer.request.job import EXIT_BAD_INPUT
from trainer.request.plan import PlanRequest
from trainer.tracking.console import table


def show(request: PlanRequest) -> int:
    """Print a plan; 0, or EXIT_BAD_INPUT where what was asked for cannot be.

    Raises:
        ValueError: nothing fits, or something given has no meaning.
    """
    gpu = parse(request.gpu)
    with tempfile.TemporaryDirectory() as scratch:
        out = request.out or Path(scratch)
        run = planned_run(
            request.recipe,
            request.ds_values or {},
            out,
            request.nodes,
            request.gpus,
            request.images,
            request.classes,
            boxed=BoxedImages(request.box_images, request.categories) if request.box_images else None,
        )
        found = works(run)
    layout = Layout(request.nodes, request.gpus)
    layouts = dict.fromkeys((work.phase for work in found), layout)
    text, wrong = page(request.recipe, found, request.ds_values, layouts, gpu, request.busiest)
    print(f"{request.command}\n{layout.world} GPUs, {request.gpus} of them on a node\n\n{text}")
    return EXIT_BAD_INPUT if wrong else 0


def page(
    recipe: Recipe,
    found: Sequence[Work],
    ds_values: dict | None,
    layouts: Mapping[str, Layout],
    gpu: Gpu,
    busiest: float,
) -> tuple[str, list[str]]:
    """The plan under a DeepSpeed JSON, or under the one it proposes; and what of it cannot be.

    A phase of images of its own is planned by itself: its batches are others, and so is the JSON that suits it.

    Args:
        ds_values: None = take the proposal.

    Raises:
        ValueError: there is nothing to train, or no settings fit.
    """
    if not found:
        return "nothing is trained: every phase of this recipe is given or turned off", []
    texts, wrong = [], []
    together = [work for work in found if not work.by_itself]
    for group in (together, *([work] for work in found if work.by_itself)):
        if not group:
            continue
        text, problems_of_group = _page_of(recipe, group, ds_values, layouts, gpu, busiest)
        if together and group is not together:
            text = f"phase {group[0].phase}, planned by itself\n\n{text}"
        texts.append(text)
        wrong += problems_of_group
    return "\n\n".join([f"{gpu}", *texts]), wrong


def _page_of(
    recipe: Recipe,
    found: Sequence[Work],
    ds_values: dict | None,
    layouts: Mapping[str, Layout],
    gpu: Gpu,
    busiest: float,
) -> tuple[str, list[str]]:
    """See page; of what one DeepSpeed JSON is for."""
    wrong: list[str] = []
    proposed, refused = None, ""
    try:
        proposed = propose(recipe, found, layouts, gpu, busiest)
    except ValueError as error:
        if ds_values is None:
            raise
        refused = str(error)
    chosen = proposed if ds_values is None else plan(recipe, found, ds_values, layouts, gpu, busiest)
    wrong = problems(chosen, gpu)
    parts = [tables(chosen, busiest, gpu)]
    parts += [f"PROBLEM  {line}" for line in wrong]
    if refused and wrong:
        parts.append(refused)
    if proposed is not None:
        saved = "" if ds_values is None else f", {proposed.hours:.3g} GPU-hours in place of {chosen.hours:.3g}"
        parts.append(f"proposed DeepSpeed JSON{saved}\n{json.dumps(proposed.ds_values, indent=2)}")
    return "\n\n".join(parts), wrong


def tables(chosen: Plan, busiest: float, gpu: Gpu) -> str:
    """Memory, traffic, time."""
    memory = table(MEMORY, [_memory(each) for each in chosen.estimates])
    traffic = table(TRAFFIC, [_traffic(each) for each in chosen.estimates])
    total = ("total", *[""] * 9, f"{chosen.hours:.3g}")
    time = table(TIME, [*(_time(each) for each in chosen.estimates), total])
    shared = any(each.layout.ep_size > 1 and each.work.moe_layers for each in chosen.estimates)
    notes = []
    if shared:
        notes.append(f"the busiest rank's experts are taken to get {busiest:g} times the mean of rows (--busiest)")
    if gpu.name in GPUS and not all(each.settings.bf16 for each in chosen.estimates):
        notes.append("the DeepSpeed JSON trains in float32, and the rate is that of bf16: compute takes longer")
    notes.append(
        f"gradients are reduced beside {gpu.overlap:.0%} of the backward pass where overlap_comm is on, all else one "
        "after another; input, evaluation, saves and start-up come on top"
    )
    notes += [_of_told(each) for each in chosen.estimates if each.work.told]
    notes += [text for each in chosen.estimates for text in _of_sizes(each.work)]
    parts = (
        f"memory per GPU, GB\n{memory}",
        f"sent by each GPU in a step, MB: inside the node + between nodes\n{traffic}",
        f"time, ms of a step\n{time}",
    )
    return "\n\n".join(parts) + "\n" + "\n".join(notes)


def _of_told(each: Estimate) -> str:
    """What the teacher's outputs ask of the disk: room, and to be read as fast as the step computes."""
    work, settings = each.work, each.settings
    of_image = work.told * (2 if settings.bf16 else 4)
    size = work.schedule.kept_epochs * work.images * of_image
    rate = settings.global_batch * of_image / each.seconds.total
    return (
        f"{work.name}: what the teacher tells in the first {work.schedule.kept_epochs} of {work.epochs} epochs takes "
        f"{size / 1e9:,.1f} GB of disk, and the others read it at {rate / 1e9:.3g} GB/s or take longer than planned"
    )


def _of_sizes(work: Work) -> list[str]:
    """What a plan of images of different sizes rests on."""
    if not work.by_itself:
        return []
    prefix = work.tokens - work.objective.patches
    text = (
        f"{work.name}: time is that of the mean image, {work.objective.patches:,} patches; memory that of "
        f"micro-batches of the largest, {work.objective.most_tokens - prefix:,} patches"
    )
    if work.assumed:
        text += f"; {work.assumed}"
    return [
        text,
        f"{work.name}: not derived, and on top: matching objects to queries (on the CPU, while the GPU waits), the "
        "losses of matched objects in time and memory, that the heads compute in float32 and on padding to the largest "
        "image of a micro-batch, and waiting for the rank with the largest images",
    ]


MEMORY = (
    "result",
    "batch",
    "ep",
    "weights",
    "masters+moments",
    "frozen",
    "gradients",
    "buckets",
    "activations",
    "peak",
)
TRAFFIC = ("result", "tokens to experts", "gradients", "weights")
TIME = (
    "result",
    "ms/step",
    "compute",
    "experts",
    "gradients",
    "weights",
    "update",
    "small",
    "steps",
    "hours",
    "GPU-hours",
)


def _memory(each: Estimate) -> tuple[str, ...]:
    memory, settings = each.memory, each.settings
    figures = (
        memory.weights,
        memory.masters + memory.moments + memory.average,
        memory.frozen,
        memory.gradients,
        memory.buckets,
        memory.activations + memory.workspace,
        memory.peak,
    )
    batch = f"{settings.micro_batch}x{settings.accumulation}"
    return (each.work.name, batch, str(settings.ep_size), *(f"{figure / 1e9:.3g}" for figure in figures))


def _traffic(each: Estimate) -> tuple[str, ...]:
    cells = []
    for kinds in (EXCHANGED, GRADIENTS, WEIGHTS):
        inside, between = each.wire(*kinds)
        cells.append(f"{inside / 1e6:.3g} + {between / 1e6:.3g}")
    return (each.work.name, *cells)


def _time(each: Estimate) -> tuple[str, ...]:
    seconds = each.seconds
    figures = (
        seconds.total,
        seconds.compute,
        seconds.exchange,
        seconds.gradients,
        seconds.weights,
        seconds.update,
        seconds.small,
    )
    milliseconds = (f"{1e3 * figure:.3g}" for figure in figures)
    jobs = f" x {each.work.jobs}" if each.work.jobs > 1 else ""
    return (each.work.name, *milliseconds, f"{each.steps:,}{jobs}", f"{each.hours:.3g}", f"{each.gpu_hours:.3g}")
