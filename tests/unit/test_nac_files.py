"""A saved NAC by all its routes: our own, timm's, transformers', and the hub."""

import json
import sys
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

import models.auto
import models.registry
from models.nac import NAC, NACConfig
from models.nac.regularisers import matched_rows
from models.preprocessing import Preprocessing
from models.vmoe import VMoE
from tests.hub_server import HubServer

IMAGES = Preprocessing(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.8)
LABELS = ["cat", "dog", "eel"]
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def new():
    config = NACConfig(
        image_size=32,
        num_classes=3,
        state_dim=16,
        code_dim=8,
        signature_dim=8,
        heads=2,
        head_dim=4,
        input_latents=4,
        mediator_latents=8,
        output_latents=3,
        propagators=2,
        ffn_factor=2.0,
        tokenizer="nano",
        grid_dim=4,
        fit_recall=0.0,
    )
    return NAC(config).eval()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """(directory, model)."""
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path / "cache"))
    model = new()
    model.save_pretrained(tmp_path / "model", preprocessing=IMAGES, labels=LABELS)
    return tmp_path / "model", model


def test_our_own_route(saved):
    folder, model = saved
    loaded = NAC.from_pretrained(folder)
    assert loaded.config == model.config and loaded.preprocessing == IMAGES and loaded.labels == LABELS
    assert torch.equal(loaded(PICTURES), model(PICTURES)) and not loaded.training
    pruned = loaded.pruned(4)
    pruned.save_pretrained(folder.parent / "pruned")
    again = NAC.from_pretrained(folder.parent / "pruned")
    assert again.config.mediator_latents == 4 and torch.equal(again(PICTURES), pruned(PICTURES))


def test_what_does_not_fit_is_refused(saved, tmp_path):
    folder, model = saved
    with pytest.raises(ValueError, match="is a 'nac', not a 'vmoe'"):
        VMoE.from_pretrained(folder)
    with pytest.raises(ValueError, match="2 labels were given for 3 classes"):
        model.save_pretrained(tmp_path / "wrong", labels=LABELS[:2])
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"propagators": 3}))
    with pytest.raises(ValueError, match=r"lacks propagators\.2\.kernel\.bandwidth"):
        NAC.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"head.weight": weights["head.weight"] * torch.nan}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight"):
        NAC.from_pretrained(folder)


def test_timms_route(saved):
    folder, model = saved
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(loaded) is NAC and torch.equal(loaded(PICTURES), model(PICTURES))
    assert tuple(loaded.pretrained_cfg["mean"]) == IMAGES.mean and loaded.pretrained_cfg["classifier"] == "head"
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert other(PICTURES).shape == (2, 7) and other.labels is None
    assert torch.equal(other.forward_features(PICTURES), model.forward_features(PICTURES))
    assert other.get_classifier() is other.head
    with pytest.raises(ValueError, match="no feature maps"):
        timm.create_model("nac_imagenet", features_only=True)
    fresh = timm.create_model("nac", img_size=64, num_classes=4, **_small(model.config))
    assert fresh.grid_size == (8, 8) and fresh.training
    assert {"nac", "nac_imagenet", "nac_tiny_imagenet"} == set(timm.list_models("nac*"))


def _small(config):
    names = ("state_dim", "code_dim", "signature_dim", "heads", "head_dim", "input_latents", "mediator_latents")
    names += ("output_latents", "propagators", "ffn_factor", "tokenizer", "grid_dim", "fit_recall", "graph_degree")
    return {name: getattr(config, name) for name in names}


def test_transformers_route(saved, tmp_path):
    folder, model = saved
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == dict(enumerate(LABELS)) and config.hidden_size == 16
    auto, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert type(auto) is models.auto.NACForImageClassification and not any(info.values())
    assert torch.equal(auto(pixel_values=PICTURES).logits, model(PICTURES))
    assert auto.nac.preprocessing == IMAGES and auto.nac.labels == LABELS
    loss = auto.train()(PICTURES, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert auto.nac.latents["input"].signatures.grad.abs().sum() > 0
    features = AutoModel.from_pretrained(folder).eval()(PICTURES)
    assert torch.equal(features.last_hidden_state, model.forward_features(PICTURES))
    assert features.pooler_output.shape == (2, 16)
    other = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert other.nac.head.weight.shape == (5, 16) and torch.isfinite(other.eval()(PICTURES).logits).all()
    auto.eval().save_pretrained(tmp_path / "again")
    assert torch.equal(NAC.from_pretrained(tmp_path / "again")(PICTURES), model(PICTURES))
    assert tuple(AutoImageProcessor.from_pretrained(folder).image_mean) == IMAGES.mean


def test_pushed_and_pulled(saved, tmp_path, monkeypatch):
    _, model = saved
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        model.push_to_hub("alice/nac")
        assert torch.equal(NAC.from_pretrained("alice/nac")(PICTURES), model(PICTURES))


def test_a_trained_one_needs_neither_networkx_nor_scipy(saved, monkeypatch):
    """They make graphs and match the block model; the signatures of a trained one are among its weights."""
    folder, model = saved
    for name in ("networkx", "scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    of_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    of_transformers = AutoModelForImageClassification.from_pretrained(folder).student
    for loaded in (NAC.from_pretrained(folder), of_timm, of_transformers):
        assert torch.equal(loaded(PICTURES), model(PICTURES))
    with pytest.raises(ValueError, match="a new NAC starts from needs networkx: pip install networkx"):
        NAC(replace(model.config, seed=5))
    with pytest.raises(ValueError, match="block_model_weight needs scipy: pip install scipy"):
        matched_rows(torch.eye(2), torch.eye(2))
