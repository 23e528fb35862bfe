"""models/ from outside: what its packages publish, what `import models` loads, and the folder under another name."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.vmoe import VMoE

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {
    "models.vmoe": ("VMoE", "VMoEConfig", "decode_variant", "load_expert_parallel"),
    "models.teacher": ("load_teacher", "new_teacher", "save_teacher"),
    "models.modules": ("MetaModel", "split", "assemble", "build_student_modules", "assemble_student"),
    "models.moe": ("MoEConfig", "expert_parallel", "full_state_dict", "official", "paper"),
    "models.moe.routing": ("RouterConfig", "Routing", "capacity", "route"),
}
# the sizes are small and the seed is fixed, so that the parent process can tell the weights
BUILD_SAVE_LOAD = """
import importlib, pkgutil, sys

sys.modules["models"] = None  # from here on `import models` fails, wherever it might be installed
import m2mkd_models
import torch
from m2mkd_models.moe import MoEConfig
from m2mkd_models.vmoe import VMoE, VMoEConfig

for module in pkgutil.walk_packages(m2mkd_models.__path__, "m2mkd_models."):
    if module.name != "m2mkd_models.moe.deepspeed_layer":  # DeepSpeed takes seconds; the rules of imports cover it
        importlib.import_module(module.name)
config = VMoEConfig(
    image_size=16, patch_size=8, width=8, depth=2, heads=2, mlp_dim=12, num_classes=3, moe=MoEConfig(num_experts=2, k=1)
)
model = VMoE(config).eval()
model.save_pretrained("saved")
loaded = VMoE.from_pretrained("saved")
images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
assert loaded.config == config
assert torch.equal(loaded(images), model(images))
print(type(loaded).__module__)
"""


def fresh_python(folder: Path, code: str) -> str:
    """What a process started in `folder` prints, with nothing else of ours on its path."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PUBLISHED)
def test_published_names(package):
    face = importlib.import_module(package)
    for name in PUBLISHED[package]:
        assert getattr(face, name).__name__ == name
    # what a face says it has, it has
    assert all(hasattr(face, name) for name in getattr(face, "__all__", ()))


def test_import_models_is_light():
    code = "import sys, models; print(*sorted(sys.modules))"
    loaded = fresh_python(ROOT, code).split()
    light = ["models", "models._torchvision", "models.version"]
    assert [name for name in loaded if name.split(".")[0] == "models"] == light
    assert not {"torch", "timm", "transformers", "deepspeed", "safetensors", "huggingface_hub"} & set(loaded)


def test_torchvision_is_cured_when_it_is_imported():
    """Whoever imports it: timm here. On a healthy install nothing is declared."""
    code = "import models, timm, torchvision; print(torchvision.ops.nms.__name__, len(models._torchvision._LIBRARIES))"
    name, declared = fresh_python(ROOT, code).split()
    assert name == "nms" and declared in ("0", "1")


def test_the_folder_works_under_another_name(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "m2mkd_models", ignore=shutil.ignore_patterns("__pycache__"))
    assert fresh_python(tmp_path, BUILD_SAVE_LOAD).split()[-1] == "m2mkd_models.vmoe.model"
    # what it wrote is a V-MoE under our name too: the same seed gives the same weights
    ours = VMoE.from_pretrained(tmp_path / "saved")
    new = VMoE(ours.config).state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, new[name]), name
