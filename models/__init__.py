"""Pure torch models: teacher, modules, meta model, V-MoE student. Never imports trainer/. Installed as `m2mkd`."""

from . import _torchvision  # noqa: F401  must be there before timm or transformers import torchvision
from .version import VERSION as __version__  # noqa: F401
