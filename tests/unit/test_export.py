"""What is exported gives the logits of the model: torch.export and ONNX, capacities or none, any number of images."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from test_nac_files import new as new_nac
from test_vmoe_files import IMAGES, TINY, new

from models.export import DETAILS, export, exportable
from models.modules.tokens import Rope
from models.moe.layer import MoEConfig, routed_layers
from models.nac import NAC
from models.vmoe.model import VMoE
from tests.close import assert_close_by_size

DROPLESS = MoEConfig(num_experts=3, k=2, renormalize=True)
# places for a quarter of the choices
CAPACITY = MoEConfig(num_experts=3, k=2, eval_capacity_factor=0.25, capacity_multiple=1, batch_priority=True)
ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="onnx, onnxscript and onnxruntime are not installed here")
MODELS = {
    "dropless": {"moe": DROPLESS},
    "capacity": {"moe": CAPACITY},
    # batch 1 has 5 tokens for 4 experts of which each takes one: some experts get none
    "k = 1, rotary, SwiGLU": {"moe": MoEConfig(num_experts=4, k=1), "swiglu": True, "rope": Rope(), "width": 16},
}


def student(name: str) -> VMoE | NAC:
    model = new_nac() if name == "NAC" else new(**MODELS[name])
    model.preprocessing, model.labels = IMAGES, ["ant", "bee", "cat"]
    return model


def images(batch: int, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def assert_same(model: VMoE | NAC, run) -> None:
    """To 1e-5 of the largest logit, on other images than the export itself compared: 1 and 7, and 2 in between."""
    for batch in (1, 7, 2):
        pictures = images(batch, model.config.image_size)
        assert_close_by_size(run(pictures), model(pictures), 1e-5)


@pytest.mark.parametrize("name", [*MODELS, "NAC"])
def test_torch_export_gives_the_logits(name, tmp_path):
    model = student(name)
    path = export(model, tmp_path / "model.pt2")
    files = {DETAILS: ""}
    program = torch.export.load(path, extra_files=files).module()
    assert_same(model, program)
    assert json.loads(files[DETAILS])["labels"] == ["ant", "bee", "cat"]
    assert json.loads(files[DETAILS])["preprocessing"] == IMAGES.to_dict()


@needs_onnx
@pytest.mark.parametrize("name", ["capacity", "k = 1, rotary, SwiGLU", "NAC"])
def test_onnx_gives_the_logits(name, tmp_path):
    import onnxruntime

    model = student(name)
    session = onnxruntime.InferenceSession(export(model, tmp_path / "model.onnx"))
    assert_same(model, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))
    assert json.loads(session.get_modelmeta().custom_metadata_map[DETAILS])["labels"] == ["ant", "bee", "cat"]


def test_the_capacity_of_the_example_drops_choices():
    out = {}
    student("capacity")(images(2), out)
    assert out["blocks"]["1"]["mlp"]["routing"].kept < 0.5


def test_images_that_compete_for_places_need_a_fixed_batch(tmp_path):
    model = new(moe=replace(CAPACITY, images_per_group=4))
    with pytest.raises(ValueError, match=r"4 images compete .* which a batch of any size cannot express: give batch"):
        export(model, tmp_path / "model.pt2")
    path = export(model, tmp_path / "model.pt2", batch=6)
    with torch.no_grad():
        # groups of gcd(4, 6) = 2 images, as the model makes them
        assert_close_by_size(torch.export.load(path).module()(images(6)), model(images(6)), 1e-5)
    # where nothing is dropped it does not matter who is routed together
    dropless = new(moe=replace(DROPLESS, images_per_group=4))
    assert_same(dropless, exportable(dropless))


def test_a_model_stays_as_it_was(tmp_path):
    model = student("dropless").train()
    exportable(model)
    assert model.training and len(routed_layers(model)) == 1


@pytest.mark.parametrize(
    "path, batch, message",
    [
        ("model.pt", None, r"ends in '\.pt', expected one of \.pt2, \.onnx"),
        ("model.pt2", 0, "batch must be a whole number of at least 1, or None for any, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, path, batch, message):
    with pytest.raises(ValueError, match=message):
        export(new(), tmp_path / path, batch=batch)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_error(tmp_path, monkeypatch):
    model = new()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript: pip install onnx onnxscript, or write a \.pt2"):
        export(model, tmp_path / "model.onnx")
    monkeypatch.undo()
    with torch.device("meta"):
        one_ranks = VMoE(TINY)
    with pytest.raises(ValueError, match="holds one rank's experts: load it"):
        export(one_ranks, tmp_path / "model.pt2")
    noisy = NAC(replace(new_nac().config, noisy_evaluation=True))
    with pytest.raises(ValueError, match="draws noise in evaluation too"):
        export(noisy, tmp_path / "model.pt2")
    # a step that depends on values of the images, which no exporter can follow
    monkeypatch.setattr(VMoE, "forward", lambda self, x: self.head(x if x.mean() > 0 else -x))
    with pytest.raises(ValueError, match=r"this model cannot be written as \.pt2: .*Try \.onnx, or another torch"):
        export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
