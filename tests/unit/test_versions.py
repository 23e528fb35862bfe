"""What a saved model says of versions, by all three ways of loading it, and what may be changed when it is loaded."""

import json

import pytest
import timm
import torch
from test_vmoe_files import IMAGES, new
from transformers import AutoModelForImageClassification

import models.auto
import models.registry  # noqa: F401
from models.moe.layer import routed_layers
from models.version import VERSION
from models.vmoe.model import VMoE


@pytest.fixture
def saved(tmp_path):
    new().save_pretrained(tmp_path, preprocessing=IMAGES)
    return tmp_path


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_versions_are_written_and_an_older_file_is_read(saved):
    content = json.loads((saved / "config.json").read_text())
    assert content["m2mkd_version"] == VERSION and content["m2mkd_needs"] <= VERSION
    for key in ("m2mkd_version", "m2mkd_needs"):
        del content[key]
    (saved / "config.json").write_text(json.dumps(content))
    VMoE.from_pretrained(saved)


@pytest.mark.parametrize(
    "load",
    [
        VMoE.from_pretrained,
        lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
        AutoModelForImageClassification.from_pretrained,
    ],
    ids=["VMoE", "timm", "transformers"],
)
def test_a_newer_version_that_is_needed_is_one_clear_error(saved, load):
    rewrite(saved, m2mkd_version="99.1.0", m2mkd_needs="0.0.1")  # newer, but readable
    load(saved)
    rewrite(saved, m2mkd_needs="99.0.0")
    with pytest.raises(ValueError, match=r"saved by m2mkd 99\.1\.0 and needs 99\.0\.0 or newer, this is \d"):
        load(saved)
    rewrite(saved, m2mkd_needs="new")
    with pytest.raises(ValueError, match="m2mkd_needs 'new', expected a version such as"):
        load(saved)


def test_k_can_be_changed_when_a_model_is_loaded(saved):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trained = VMoE.from_pretrained(saved)
    one = VMoE.from_pretrained(saved, k=1)
    assert {layer.config.k for layer in routed_layers(one).values()} == {1} and one.config.moe.k == 1
    assert not torch.equal(one(images), trained(images))
    one.set_k(2)
    assert torch.equal(one(images), trained(images))
    for k in (0, 5, 1.0):
        with pytest.raises(ValueError, match=f"k must be a whole number from 1 to the 4 experts of a layer, got {k}"):
            VMoE.from_pretrained(saved, k=k)
