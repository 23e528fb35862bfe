"""Do recipe, DeepSpeed JSON and the nodes of each stage fit? Asked without torch, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.chain.settings import ONLINE, Settings
from trainer.config import ds_config
from trainer.config.recipe import Recipe
from trainer.request.graph import experts_in, section_of_batch
from trainer.request.stages import DOWNLOAD, Stage, chain


def check(settings: Settings, recipe: Recipe, ds_values: dict[str, Any]) -> None:
    """Raise ValueError for a stage whose ranks do not fit; it names the numbers of nodes that would."""
    for stage in chain(recipe):
        section = "" if stage.phase == DOWNLOAD else section_of_batch(recipe, stage.phase)
        if section:
            check_stage(settings, recipe, ds_values, stage, section)


def with_fewer_workers(settings: Settings, recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with no more loading processes per rank than it has CPU cores, and a line that says so, or nothing."""
    stages = [stage.setting for stage in chain(recipe) if stage.phase not in ONLINE]
    return with_workers_for(min(settings.cpus_of(stage) for stage in stages), recipe)


def with_workers_for(cores: int, recipe: Recipe) -> tuple[Recipe, str]:
    """The same for ranks of so many cores."""
    wanted = recipe.data.workers
    if wanted is None or wanted <= cores:
        return recipe, ""
    said = f"data.workers is {wanted} and a rank has {cores} CPU cores (--cpus-per-task): {cores} are used"
    return replace(recipe, data=replace(recipe.data, workers=cores)), said


def check_stage(settings: Settings, recipe: Recipe, ds_values: dict[str, Any], stage: Stage, section: str) -> None:
    """The same of one stage.

    Args:
        section: of the recipe, whose batch is to fit the ranks.
    """
    local = settings.ranks_of(stage.setting)
    nodes = settings.nodes_of(stage.setting)
    try:
        resolved = _resolve(recipe, ds_values, section, nodes, local)
    except ValueError as error:
        near = _near(recipe, ds_values, section, nodes, local)
        if not near:
            raise
        raise ValueError(
            f"{error}. {stage.name} has {nodes} nodes of {local} ranks; numbers of nodes that fit: {near}"
        ) from None
    if nodes > 1 and local % resolved.ep_size and "across" not in settings.accepted:
        raise ValueError(
            f'{stage.name}: "trainer.ep_size" is {resolved.ep_size} on nodes of {local} ranks, so groups of ranks '
            "that share experts would straddle nodes, and every MoE layer would exchange tokens over the network: "
            "ds.trainer.ep_size=auto keeps them inside, --accept across goes on"
        )


def _resolve(recipe: Recipe, ds_values: dict[str, Any], section: str, nodes: int, local: int) -> ds_config.Settings:
    return ds_config.resolve(
        ds_values,
        getattr(recipe, section),
        world=nodes * local,
        local_world=local,
        num_experts=experts_in(recipe, section),
        phase=section,
    )


def _near(recipe: Recipe, ds_values: dict[str, Any], section: str, nodes: int, local: int) -> str:
    """The next smaller and the next larger number of nodes that fit; empty when there is none up to twice as many."""
    fitting = []
    for candidates in (range(nodes - 1, 0, -1), range(nodes + 1, 2 * nodes + 1)):
        for candidate in candidates:
            try:
                _resolve(recipe, ds_values, section, candidate, local)
            except ValueError:
                continue
            fitting.append(str(candidate))
            break
    return " and ".join(fitting)
