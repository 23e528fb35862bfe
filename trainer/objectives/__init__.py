"""One object per kind of training step: what is trained, what is frozen, and how the losses are computed."""

from trainer.objectives.base import Objective, Pairs, relative_mse, soft_kl
from trainer.objectives.distill import Distill
from trainer.objectives.end_to_end import Borders, Classify, LearnFeatures, LearnFromTeacher
from trainer.objectives.incubate import Incubate
from trainer.objectives.meta import MatchTeacher, Theseus, meta_objective
from trainer.objectives.together import Together

__all__ = [
    "Borders",
    "Classify",
    "Distill",
    "Incubate",
    "LearnFeatures",
    "LearnFromTeacher",
    "MatchTeacher",
    "Objective",
    "Pairs",
    "Theseus",
    "Together",
    "meta_objective",
    "relative_mse",
    "soft_kl",
]
