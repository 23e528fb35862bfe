"""Modules of a model: stages cut and put together, the meta model they stand in, and the stitches of a student's."""

from .meta import MetaModel, check_pair
from .stages import Stage, assemble, split
from .stitch import StudentModule, assemble_student, build_student_modules

__all__ = [
    "MetaModel",
    "Stage",
    "StudentModule",
    "assemble",
    "assemble_student",
    "build_student_modules",
    "check_pair",
    "split",
]
