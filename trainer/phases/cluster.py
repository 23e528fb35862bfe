"""Phase cluster: share a module's images (or tokens) out among its experts. Experimental (docs/studies.md)."""

from __future__ import annotations

import logging

from trainer.context import Run
from trainer.request.graph import artifact_name
from trainer.teaching import clusters, experts
from trainer.teaching.estimate import Cost, Known, Rehearsed
from trainer.teaching.meta import new_meta

log = logging.getLogger(__name__)


def run(run: Run, module: int) -> None:
    """Make OUT/cluster_<module>."""
    folder = run.out / artifact_name("cluster", module)
    complete = run.dist.gather(folder.is_dir())[0]  # moved there as a whole
    clusters.ensure(run, module, f"--phase cluster --module {module}")
    if complete and run.dist.main:
        log.info("%s is complete: nothing to do", folder)


def check(run: Run) -> None:
    """Whether experts can be taught one by one."""
    experts.check(run)


def rehearse(run: Run, module: int, known: Known) -> Rehearsed:
    """The images that are passed through the meta model."""
    images, flops = clusters.cost(run, new_meta(run), module)
    return Rehearsed(f"{images:,.0f} images", {artifact_name("cluster", module): Cost(images, flops)})
