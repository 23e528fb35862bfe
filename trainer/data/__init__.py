"""Images in, batches out: sources by name, timm transforms, a stateless sampler and the loader of both loops."""

import models  # noqa: F401  its torchvision cure must run before timm imports torchvision
