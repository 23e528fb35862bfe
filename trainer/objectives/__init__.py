"""One object per kind of training step: what is trained, what is frozen, and how the losses are computed."""

from trainer.objectives.base import relative_mse, soft_kl
from trainer.objectives.distill import Distill
from trainer.objectives.end_to_end import Classify
from trainer.objectives.meta import MatchTeacher

__all__ = ["Classify", "Distill", "MatchTeacher", "relative_mse", "soft_kl"]
