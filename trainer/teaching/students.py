"""The student of a run: its configuration, the whole of it and its modules, before any training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.modules.meta import check_pair
from models.modules.tokens import TokenLayout, token_layout
from trainer.config.load import module_depths, to_dict
from trainer.config.recipe import Recipe
from trainer.context import Run
from trainer.teaching import sizes, upcycling
from trainer.teaching.families import family_of
from trainer.teaching.meta import border_bases


def student_config(run: Run, drop_path: float = 0.0, recipe: Recipe | None = None) -> Any:
    """The configuration of the student that fits this run's teacher and data, of another recipe if given.

    Raises:
        ValueError: sizes that are open or do not fit.
    """
    images, tokens = run.teacher.preprocessing, token_layout(run.teacher.model)
    if run.recipe.student.init not in ("", "teacher"):  # what its blocks start from says whether they rotate
        start = token_layout(upcycling.dense_start(run).model)
        tokens = replace(tokens, rope=start.rope, rotary=start.rotary)
    return config_for(
        following_teacher(recipe or run.recipe, run),
        len(run.classes),
        drop_path,
        images.image_size,
        images.in_chans,
        tokens,
        run.teacher.model.embed_dim,
    )


def following_teacher(recipe: Recipe, run: Run) -> Recipe:
    """A recipe whose student has the sizes that it left to this run's teacher.

    Raises:
        ValueError: sizes that do not fit together, or patches that do not divide the images.
    """
    if not family_of(recipe).ALIGNED:
        return recipe
    teacher, image_size = run.teacher, run.teacher.preprocessing.image_size
    student = sizes.like_teacher(recipe.student, teacher.model, recipe.modules)
    if image_size % (sizes.patch_size(student) or 1):
        sizes.check_patches(student, teacher.model, teacher.source, image_size)
    return replace(recipe, student=student)


def config_for(
    recipe: Recipe,
    num_classes: int,
    drop_path: float,
    image_size: int,
    in_chans: int,
    tokens: TokenLayout,
    teacher_width: int,
) -> Any:
    """The configuration of a recipe's student for images and tokens like the teacher's, or another model's.

    Args:
        num_classes: 0 = it gives features, and learns the final tokens of a teacher of `teacher_width`.

    Raises:
        ValueError: an unknown variant, or sizes that do not fit together.
    """
    without_classes = {} if num_classes else {"teacher_width": teacher_width}
    return family_of(recipe).config(
        to_dict(recipe.student),
        num_classes=num_classes,
        drop_path=drop_path,
        image_size=image_size,
        in_chans=in_chans,
        tokens=tokens,
        seed=recipe.seed,
        **without_classes,
    )


def scratch_student(run: Run, drop_path: float = 0.0) -> nn.Module:
    """A student of new weights, whatever student.init says."""
    return family_of(run.recipe).build(student_config(run, drop_path))


def new_student(run: Run, drop_path: float = 0.0) -> nn.Module:
    """The student before any training: initialised from the recipe's seed, or started from student.init."""
    if not run.recipe.student.init:
        return scratch_student(run, drop_path)
    config = student_config(run, drop_path)
    return upcycling.started(run, config, student_depths(run.recipe, config.depth))


def start_flops(run: Run) -> int:
    """FLOPs that it takes to compute what the student starts from; 0 where nothing has to be computed."""
    if not run.recipe.student.init:
        return 0
    with torch.device("meta"):
        student = new_student(run)
    return upcycling.planned_flops(run, student, student_depths(run.recipe, student.config.depth))


def student_depths(recipe: Recipe, blocks: int) -> tuple[int, ...]:
    """Blocks per student module, of a student of so many blocks.

    Raises:
        ValueError: depths that do not make up the blocks, or fewer blocks than modules.
    """
    asked, ends = recipe.student.depths, family_of(recipe).ENDS
    if asked or not ends:
        return module_depths(asked, blocks, recipe.modules, "student")
    between = module_depths((), blocks - 2 * ends, recipe.modules - 2, "student between its first and last module")
    return (ends, *between, ends)


def student_modules(run: Run, drop_path: float = 0.0) -> list[nn.Module]:
    """The student's modules before any training, with their stitch layers."""
    recipe, teacher = run.recipe, run.teacher.model
    family = family_of(recipe)
    if family.ALIGNED:
        asked = following_teacher(recipe, run).student
        sizes.check_patches(asked, teacher, run.teacher.source, run.teacher.preprocessing.image_size)
    student = new_student(run, drop_path)
    if family.ALIGNED:
        check_pair(teacher, student)
    depths = student_depths(recipe, student.config.depth)
    stitches = recipe.distill.stitches
    bases = None
    if stitches != "linear":
        bases = border_bases(run) or upcycling.planned_bases(run, student, depths)
    arguments = (student, depths, teacher.embed_dim, recipe.seed, stitches, bases)
    return family.modules(*arguments, section=to_dict(recipe.student), tokens=run.tokens)
