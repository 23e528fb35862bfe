"""transformers' Auto classes on what save_pretrained writes, in one file and in shards, and back."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_vmoe_files import IMAGES, new, rewrite, same
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

import models.auto
from models.moe.out import auxiliary_loss
from models.teacher.images import from_processor
from models.vmoe.model import VMoE
from tests.hub_server import HubServer
from trainer.data.transforms import eval_transform

LABELS = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(params=["5GB", 3000], ids=["one file", "shards"])
def saved(request, tmp_path):
    """(directory, model)."""
    model = new()
    model.save_pretrained(tmp_path / "model", preprocessing=IMAGES, labels=LABELS, max_shard_size=request.param)
    return tmp_path / "model", model


def test_the_same_directory_gives_the_same_logits(saved):
    folder, model = saved
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == dict(enumerate(LABELS)) and config.label2id["eel"] == 2 and config.num_labels == 3
    assert (config.hidden_size, config.num_hidden_layers, config.image_size) == (8, 2, 16)
    auto, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert type(auto) is models.auto.VMoEForImageClassification and not auto.training
    assert not any(info.values())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(auto(pixel_values=images).logits, model(images))
    target = torch.tensor([0, 2])
    out, told = auto.train()(images, labels=target), {}
    assert torch.equal(auto.vmoe(images, told), out.logits)
    expected = torch.nn.functional.cross_entropy(out.logits, target) + auxiliary_loss(told)
    assert torch.equal(out.loss, expected) and auxiliary_loss(told) > 0
    logits, *_ = auto(images, return_dict=False)
    assert torch.equal(logits, out.logits)


def test_images_are_prepared_as_in_evaluation(saved):
    folder, model = saved
    processor = AutoImageProcessor.from_pretrained(folder)
    assert from_processor(processor, model) == IMAGES
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
    pil = AutoImageProcessor.from_pretrained(folder, backend="pil")
    ours = eval_transform(IMAGES)(picture)
    assert torch.allclose(pil(picture, return_tensors="pt")["pixel_values"][0], ours, atol=1e-5)
    answer = transformers.pipeline("image-classification", model=str(folder))(picture, top_k=1)
    probability, best = model(processor(picture, return_tensors="pt")["pixel_values"]).softmax(-1).max(-1)
    assert answer == [{"label": LABELS[best], "score": pytest.approx(probability.item(), abs=1e-5)}]


def test_saved_by_transformers_it_is_a_vmoe_again(saved, tmp_path):
    folder, model = saved
    auto = AutoModelForImageClassification.from_pretrained(folder)
    auto.save_pretrained(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", "model.safetensors"}
    auto.config.save_pretrained(tmp_path / "a")  # transformers' own spelling of config.json
    loaded = VMoE.from_pretrained(tmp_path / "a")
    assert same(loaded, model) and loaded.config == model.config
    assert loaded.labels == LABELS and loaded.preprocessing == IMAGES
    changed = {name: value + 1 for name, value in auto.state_dict().items()}
    auto.save_pretrained(tmp_path / "b", state_dict=changed, max_shard_size=3000)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "b")
    assert torch.equal(again.vmoe.pos_embed, model.pos_embed + 1)


def test_another_number_of_classes_gets_a_new_head(saved, tmp_path):
    folder, model = saved
    auto = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert torch.equal(auto.vmoe.blocks[1].mlp.router.weight, model.blocks[1].mlp.router.weight)
    assert torch.allclose(auto(torch.randn(2, 3, 16, 16)).logits, torch.full((2, 5), -np.log(5), dtype=torch.float32))
    auto.save_pretrained(tmp_path / "five")
    loaded = VMoE.from_pretrained(tmp_path / "five")
    assert loaded.num_classes == 5 and loaded.labels is None


def test_a_new_model_starts_as_a_vmoe_does(saved):
    config = AutoConfig.from_pretrained(saved[0])
    auto = AutoModelForImageClassification.from_config(config)
    assert same(auto.vmoe, VMoE(saved[1].config))


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    new().save_pretrained(tmp_path)
    rewrite(tmp_path, **{"norm.bias": None})
    with pytest.raises(ValueError, match=r"do not fit its config.json: \['vmoe\.norm\.bias'\]"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_hub_models_come_through_auto_classes(saved, tmp_path, monkeypatch):
    folder, model = saved
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        name = f"alice/of-{len(list(folder.iterdir()))}-files"  # transformers remembers the commits of a name
        hub.seed(name, folder)
        assert same(AutoModelForImageClassification.from_pretrained(name).vmoe, model)
        assert from_processor(AutoImageProcessor.from_pretrained(name), model) == IMAGES
