"""The teacher: any supported ViT of the hub or of a directory as one timm model with its preprocessing."""

from .load import Teacher, TransformersTeacher, fingerprint, load_teacher, new_teacher, save_teacher

__all__ = ["Teacher", "TransformersTeacher", "fingerprint", "load_teacher", "new_teacher", "save_teacher"]
