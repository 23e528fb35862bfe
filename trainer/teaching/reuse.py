"""What somebody else trained: meta models and distilled modules for a teaching pair, a V-MoE to start training from.

A teaching pair lies in a run folder, or in a hub repo a run was pushed to, as a run lays it out: meta/ and distill_i/,
each with model.safetensors, result.json and config.yaml. Only what fits this recipe's teacher is taken.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.files.hub import CheckpointFiles, Weights
from models.labels import Match, match_classes, refuse_other_classes
from models.teacher.classes import put_in_order
from trainer import artifacts, disk
from trainer.config.load import build_recorded, module_depths, read_yaml
from trainer.config.recipe import Recipe
from trainer.context import Run
from trainer.teaching import bases
from trainer.teaching.families import family_of
from trainer.teaching.meta import new_meta
from trainer.teaching.sizes import like_saved
from trainer.teaching.students import config_for, student_config, student_depths, student_modules
from trainer.tracking.measures import measure_of

log = logging.getLogger(__name__)


def check_meta(run: Run) -> None:
    """Find out before anything trains whether the meta model of meta.source, if any, will fit.

    Raises:
        ValueError: it is not there, or does not fit; both sides are named.
    """
    if run.recipe.meta.source:
        _Artifact(run, run.recipe.meta.source, "meta")


def check_modules(run: Run) -> None:
    """The same of the modules of distill.source."""
    if run.recipe.distill.source:
        for module in range(run.recipe.modules):
            _Artifact(run, run.recipe.distill.source, f"distill_{module}")


def check_student(run: Run) -> None:
    """The same of the student of train.init."""
    if run.recipe.train.init:
        _initial_config(run)


def take_meta(run: Run, folder: Path) -> None:
    """Make OUT/meta of meta.source (collective).

    Raises:
        ValueError: it is not there, damaged, or of another teacher, modules, depths or blocks per module.
    """
    with run.dist.together():
        if run.dist.main:
            artifact = _Artifact(run, run.recipe.meta.source, "meta")
            with torch.device("meta"):
                artifact.take(folder, new_meta(run))


def take_module(run: Run, module: int, folder: Path) -> None:
    """Make OUT/distill_<module> of distill.source (collective).

    Raises:
        ValueError: it is not there, damaged, or of another teacher, modules, depths, student or meta model.
    """
    with run.dist.together():
        if run.dist.main:
            artifact = _Artifact(run, run.recipe.distill.source, f"distill_{module}")
            with torch.device("meta"):
                artifact.take(folder, student_modules(run)[module])


def initial_student(run: Run, ep_size: int) -> nn.Module:
    """The student of train.init with this rank's experts, under the recipe's dropout and capacities (collective).

    Its head gets the data's classes in the data's order, or is a new one.

    Raises:
        ValueError: not there, damaged, without preprocessing, or another model than the recipe's or on other classes;
            both sides are named.
    """
    with run.dist.together():
        config, match = _initial_config(run)  # first: it resolves the commit
        init = run.pinned(run.recipe.train.init)
        student = family_of(run.recipe).load(init, ep_size=ep_size, ep_rank=run.dist.rank % ep_size, config=config)
    student = student.float()
    if run.recipe.train.new_head:
        student.reset_classifier(len(run.labels))
        student.classes_note = "a new head of the data's classes"
        return student.train()
    if match is None:  # it gives features
        student.classes_note = ""
        return student.train()
    run.say(match)
    if match.rows != tuple(range(len(run.labels))):
        put_in_order(student.head, match.rows)
    student.classes_note = match.note
    return student.train()


def _initial_config(run: Run) -> tuple[Any, Match | None]:
    """The recipe's student on the images of train.init, checked against it, and where the data's classes are in it.

    Without classes, or under a new head, there is nothing to be found; a new head leaves the student as it was saved,
    but for drop path.
    """
    files = CheckpointFiles(run.pinned(run.recipe.train.init))
    saved, preprocessing, labels = family_of(run.recipe).read_config(files)
    run.resolved(run.recipe.train.init, str(files))
    if preprocessing is None:
        raise ValueError(f"{files} does not say what its images must look like: save it with its preprocessing")
    drop_path = run.recipe.train.drop_path
    if run.recipe.train.new_head:
        if not run.classifies:
            raise ValueError("train.new_head needs classes, but there are none: teacher.head is none, or no labels")
        return replace(saved, drop_path_rate=drop_path), None
    width = 0 if run.classifies else run.teacher.model.embed_dim
    recipe = run.recipe
    if family_of(recipe).ALIGNED:
        recipe = replace(recipe, student=like_saved(recipe.student, saved))
    wanted = config_for(recipe, len(run.classes), drop_path, saved.image_size, saved.in_chans, saved.tokens, width)
    config = wanted.on_weights_of(saved, f"train.init {files}")
    if not run.classifies:
        return config, None
    source = run.sources[0]
    match = match_classes(
        run.labels, labels, saved.num_classes, data_named=source.named, what=f"train.init {files}", where=source.name
    )
    return config, match


class _Artifact:
    """A finished meta/ or distill_i/ of another run, checked against this recipe and teacher.

    Raises:
        ValueError: it is not there, not finished, damaged, or does not fit.
    """

    def __init__(self, run: Run, source: str, name: str) -> None:
        self.run, self.name = run, name
        source_of_run = source
        source = run.pinned(source)
        self.files = CheckpointFiles(source, folder=name)
        self.recipe = self._recipe()
        self.result = self._result(source)
        if self.files.commit:
            run.resolved(source_of_run, f"{self.files.name}@{self.files.commit}")
        self._compare_classes()
        self._compare()

    def take(self, folder: Path, module: nn.Module) -> None:
        """Copy the weights into this run's folder and record where they came from.

        Args:
            module: what they are to be loaded into.
        """
        weights = Weights(self.files)
        weights.check(module.state_dict())
        for name in weights.names():
            weights.read(name)  # finite
        path = self.files.weights()[0]
        if disk.file_record(path) != self.result["files"].get(path.name):
            raise ValueError(f"{self.files}: {path.name} is truncated or altered (SHA-256 differs from result.json)")
        with disk.replacing(folder / path.name) as unfinished:
            shutil.copyfile(path, unfinished)
        basis = self.files.find(bases.FILE, optional=True)  # of a meta model
        if basis is not None:
            shutil.copyfile(basis, folder / bases.FILE)
        made_here = ("files", "git_commit", "versions", "made_of")
        result = {name: value for name, value in self.result.items() if name not in made_here}
        artifacts.write_result(folder, result | {"source": str(self.files), "command": self.run.command})
        log.info("%s was taken from %s", folder, self.files)

    def _result(self, source: str) -> dict[str, Any]:
        path = self.files.find("result.json")
        if path is None:
            raise ValueError(f"{self.files} has no result.json: expected a finished {self.name} of a run")
        grown = None
        if self.name == "meta" and self.recipe.teacher.grown:
            assembled = CheckpointFiles(source, folder="assemble")
            grown = assembled.find("result.json")
            if grown is None:
                raise ValueError(f"{assembled} has no result.json: the teacher of this meta model is not grown yet")
        try:
            result = dict(json.loads(path.read_text()))
            if grown is not None:
                result |= _with_grown_teacher(result, json.loads(grown.read_text()))
            whole = self._is_whole(result)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"result.json of {self.files} is truncated or altered ({error!r})") from None
        if not whole:
            raise ValueError(f"result.json of {self.files} is not that of {self.name}")
        return result

    def _is_whole(self, result: dict[str, Any]) -> bool:
        """Whether a result.json is that of this artifact, with the numbers that later phases read."""
        phase, _, module = self.name.partition("_")
        if result["phase"] != phase or result["module"] != (int(module) if module else None):
            return False
        measure = measure_of(result["metrics"]).key
        needed = [measure] if module else [f"hybrid_{measure}/{i}" for i in range(self.recipe.modules)]
        numbers = [result["flops"], result["seconds"], *(result["metrics"][key] for key in needed)]
        return all(math.isfinite(number) for number in numbers) and isinstance(result["files"], dict)

    def _recipe(self) -> Recipe:
        path = self.files.find("config.yaml")
        if path is None:
            raise ValueError(f"{self.files} has no config.yaml: expected a finished {self.name} of a run")
        try:
            return build_recorded(read_yaml(path.read_text(), "it")["recipe"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"config.yaml of {self.files} holds no recipe this version reads: {error}") from None

    def _compare(self) -> None:
        run = self.run
        theirs, ours = self.recipe, run.recipe
        self._same("modules", theirs.modules, ours.modules)
        if run.planned_teacher is not None:
            return  # a plan: the teacher is not trained yet
        self._same_teacher()
        blocks = len(run.teacher.model.blocks)
        depths = module_depths(theirs.teacher.depths, blocks, theirs.modules, "teacher")
        self._same("teacher.depths", list(depths), list(run.teacher_depths))
        if self.name == "meta":
            self._same("meta.blocks_per_module", theirs.meta.blocks_per_module, ours.meta.blocks_per_module)
            return
        config = student_config(run)
        config.on_weights_of(student_config(run, recipe=theirs), f"distill.source {self.files}")
        their_depths, our_depths = (list(student_depths(recipe, config.depth)) for recipe in (theirs, ours))
        self._same("student.depths", their_depths, our_depths)
        meta = run.out / "meta" / "model.safetensors"
        if (run.out / "meta" / "result.json").is_file() and meta.is_file():
            our_digest = disk.file_record(meta)["sha256"]
            their_digest = self.result.get("meta", {}).get("sha256")
            self._same(
                "the meta model (SHA-256; take it from the same place with meta.source)", their_digest, our_digest
            )

    def _compare_classes(self) -> None:
        """By name: what was taught gives its outputs in the order of its own data."""
        names = self.result.get("classes")
        if not self.run.classifies or names == []:
            self._same("taught on classes", names != [], self.run.classifies)
            return
        note = refuse_other_classes(
            self.run.labels,
            names if isinstance(names, list) else None,
            what=str(self.files),
            where=self.run.sources[0].name,
            step="Use the data it was made on, or train your own",
        )
        if note:
            log.warning(note)

    def _same_teacher(self) -> None:
        theirs, ours = self.result.get("teacher"), self.run.teacher_record
        if not isinstance(theirs, dict) or theirs.get("sha256") != ours["sha256"]:
            raise ValueError(
                f"{self.files} was taught by another teacher: {_described(theirs)} there, {_described(ours)} here"
            )

    def _same(self, key: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            raise ValueError(f"{self.files} does not fit this recipe: {key} is {theirs} there, {ours} here")


def _with_grown_teacher(meta: dict[str, Any], grown: dict[str, Any]) -> dict[str, Any]:
    """What the result of a meta model cannot hold when its teacher was grown after it: the teacher and its hybrids."""
    hybrids = {key: value for key, value in grown["metrics"].items() if key.startswith("hybrid_accuracy/")}
    measured = hybrids | {"teacher_accuracy": grown["metrics"]["teacher_accuracy"]}
    return {"teacher": grown["teacher"], "metrics": meta["metrics"] | measured}


def _described(teacher: Any) -> str:
    if not isinstance(teacher, dict):
        return "one that was not recorded"
    return (
        f"{teacher.get('source')} ({teacher.get('blocks')} blocks of width {teacher.get('width')}, "
        f"weights {str(teacher.get('sha256'))[:12]})"
    )
