"""Pure torch models: teacher, modules, meta model, V-MoE student. Never imports trainer/."""

from . import _torchvision  # noqa: F401  must run before timm or transformers import torchvision
