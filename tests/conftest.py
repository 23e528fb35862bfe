"""Runs before every test module: torchvision's cure must come before any of them imports timm or transformers."""

import models  # noqa: F401
