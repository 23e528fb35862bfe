"""Weights saved from a wrapped model: DistributedDataParallel, torch.compile, an average of weights, another class."""

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vit_families import images, save_timm, save_transformers, tiny

from models.files.wrappers import grouped, plain_names
from models.moe.layer import MoEConfig
from models.teacher.load import load_teacher
from models.vmoe.model import VMoE, VMoEConfig

LAYOUTS = ("timm", "transformers", "vmoe")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Of each layout a folder and the logits of its model."""
    made = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(layout)
        save(folder, layout)
        made[layout] = (folder, logits(folder, layout))
    return made


@pytest.fixture
def copied(originals, tmp_path):
    """Copy a layout's folder to tmp_path; returns the logits it gave."""

    def copy(layout) -> torch.Tensor:
        folder, expected = originals[layout]
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return expected

    return copy


def save(folder, layout) -> None:
    if layout == "timm":
        save_timm(folder, tiny("vit", depth=2))
    elif layout == "transformers":
        save_transformers(folder, "ViTForImageClassification", num_hidden_layers=2)
    else:
        sizes = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 20}
        model = VMoE(VMoEConfig(**sizes, num_classes=5, moe_blocks="all", moe=MoEConfig(num_experts=2, k=1)))
        torch.nn.init.normal_(model.head.weight)
        model.save_pretrained(folder)


def logits(folder, layout) -> torch.Tensor:
    model = VMoE.from_pretrained(folder) if layout == "vmoe" else load_teacher(str(folder)).model
    with torch.inference_mode():
        return model(images())


def rename(folder, change) -> None:
    """Save the weights again under the names that `change` gives, None for left out."""
    renamed = {}
    for name, value in load_file(folder / "model.safetensors").items():
        new_name = change(name)
        if new_name is not None:
            renamed[new_name] = value
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def inside_blocks(part):
    """The name with `part` behind the number of its block."""
    return lambda name: re.sub(r"((?:blocks|layer)\.\d+\.)", rf"\1{part}.", name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"backbone.{name}",
        lambda name: f"encoder.{name}",
        lambda name: f"student.net.0.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        inside_blocks("_orig_mod"),
        inside_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    ],
    ids=["ddp", "compiled", "ddp of compiled", "compiled ddp", "model", "backbone", "encoder", "deep", "fsdp",
         "compiled blocks", "fsdp blocks"],
)  # fmt: skip
def test_wrapped_weights_are_those_of_the_model(tmp_path, caplog, copied, layout, change):
    caplog.set_level(logging.INFO, logger="models.files.hub")
    expected = copied(layout)
    rename(tmp_path, change)
    assert torch.equal(logits(tmp_path, layout), expected)
    said = [message for message in caplog.messages if "was saved from a wrapped model" in message]
    assert len(said) == 1
    assert str(tmp_path) in said[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_of_weights_counts_beside_them(tmp_path, copied, layout):
    """torch.optim.swa_utils.AveragedModel."""
    expected = copied(layout)
    averaged = {f"module.{name}": value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(averaged | {"n_averaged": torch.tensor(7)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(tmp_path, layout), expected)


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_wrapped_shards(tmp_path, copied, layout):
    expected = copied(layout)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[:9], sorted(tensors)[9:])):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({f"module.{name}": tensors[name] for name in names}, tmp_path / shard, {"format": "pt"})
        weight_map |= {f"module.{name}": shard for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    teacher = load_teacher(str(tmp_path))
    with torch.inference_mode():
        assert torch.equal(teacher.model(images()), expected)
    assert teacher.wrapped  # the dry run shows it


def first_part_only(name):
    return name if name.startswith(("head", "classifier")) else f"backbone.{name}"


def two_models(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    both = {f"model.{name}": value for name, value in tensors.items()}
    both |= {f"ema.{name}": value.clone() for name, value in tensors.items()}
    save_file(both, folder / "model.safetensors", {"format": "pt"})


def one_bias_less(name):
    return None if name.endswith(("0.norm1.bias", "0.layernorm_before.bias")) else f"module.{name}"


EDITS = {
    "all but the head": (lambda folder: rename(folder, first_part_only), r"backbone\."),
    "not the biases": (lambda folder: rename(folder, lambda n: n if "bias" in n else f"module.{n}"), r"module\."),
    "one block": (lambda folder: rename(folder, lambda n: f"module.{n}" if ".1." in n else n), r"module\."),
    "model and average": (two_models, r"ema\.|model\."),
    "one bias less": (lambda folder: rename(folder, one_bias_less), r"norm1\.bias|do not fit .*layernorm_before\.bias"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_names_that_are_of_no_whole_model_are_refused(tmp_path, copied, layout, edit, message):
    copied(layout)
    edit(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        logits(tmp_path, layout)
    assert "\n" not in str(refused.value)
    assert "convert" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_tensors_of_one_plain_name_are_refused(tmp_path, copied, layout):
    copied(layout)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "norm" in name)
    save_file(tensors | {f"_orig_mod.{name}": tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"are both '{name}' without what wrappers added"):
        logits(tmp_path, layout)


def test_plain_names_by_hand():
    assert plain_names(["a.weight", "b"]) == {"a.weight": "a.weight", "b": "b"}
    assert plain_names(["m.a.weight", "m.b"]) == {"a.weight": "m.a.weight", "b": "m.b"}
    assert plain_names(["m.n.a", "m.n.b"]) == {"a": "m.n.a", "b": "m.n.b"}
    assert plain_names(["only.weight"]) == {"only.weight": "only.weight"}
    assert plain_names(["n_averaged", "module.a", "module.b"]) == {"a": "module.a", "b": "module.b"}
    assert plain_names(["n_averaged", "a"]) == {"n_averaged": "n_averaged", "a": "a"}
    assert plain_names([]) == {}
    with pytest.raises(ValueError, match=r"2 of its 3 tensors are those of a wrapped model, like module\.a"):
        plain_names(["module.a", "module.b", "c"])


def test_groups_by_hand():
    assert grouped(["blocks.0.a", "blocks.1.a", "cls_token", "norm.bias"]) == "blocks. (2), cls_token, norm."
    assert grouped([]) == "none"
    assert grouped(f"p{number}" for number in range(10)).endswith("p7, and 2 more")
