"""V-MoE against the official model (tests/fixtures/vmoe/model_token_k2.npz), published sizes, save and load."""

import copy
import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from models.modules.stages import assemble, split
from models.moe import layer as moe
from models.moe.layer import MoE, MoEConfig, official
from models.moe.out import auxiliary_loss, routing_metrics, routings
from models.preprocessing import Preprocessing
from models.vmoe.import_names import google_state
from models.vmoe.model import VARIANTS, VMoE, VMoEConfig, decode_variant, moe_numbers

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vmoe" / "model_token_k2.npz"
ROOT = Path(__file__).parents[2]
TINY = VMoEConfig(
    image_size=32,
    patch_size=8,
    width=32,
    depth=4,
    heads=4,
    mlp_dim=48,
    num_classes=10,
    moe_blocks="1,3",
    moe=MoEConfig(num_experts=4, k=2),
)


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(FIXTURE) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture
def model(reference, monkeypatch) -> VMoE:
    """The official model, fed with the official noise."""
    noise = [reference["noise/0"], reference["noise/1"]]
    monkeypatch.setattr(moe, "standard_normal", lambda like: noise.pop(0))
    routing = official(num_experts=4, k=2, images_per_group=2, capacity_factor=1.05, eval_capacity_factor=1.05)
    model = VMoE(replace(TINY, gelu="tanh", moe=routing))
    model.load_state_dict(google_state(reference, "params/"))
    return model


@pytest.mark.parametrize("mode", ["det", "train"])
def test_logits_losses_and_routing_are_the_official_ones(model, reference, mode):
    model.train(mode == "train")
    out = {}
    logits = model(reference["images"].permute(0, 3, 1, 2), out)
    assert_close(logits, reference[f"{mode}/logits"], rtol=0, atol=1e-5)
    main = -(reference["labels"] * logits.log_softmax(-1)).sum(-1).mean()
    assert_close(main, reference[f"{mode}/softmax_xent/main_loss"], rtol=0, atol=1e-5)
    assert_close(auxiliary_loss(out), reference[f"{mode}/softmax_xent/aux_loss"], rtol=0, atol=1e-6)
    assert list(routing_metrics(out)) == ["blocks.1.mlp", "blocks.3.mlp"]
    for i in (1, 3):
        for name, loss in out["blocks"][str(i)]["mlp"]["routing"].losses.items():
            if mode == "train" or name != "load":
                expected = reference[f"{mode}/metrics/encoderblock_{i}/{name}_loss"]
                assert_close(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_official_ones_with_and_without_checkpointing(model, reference, recompute):
    model.train().set_grad_checkpointing(recompute)
    out = {}
    logits = model(reference["images"].permute(0, 3, 1, 2), out)
    main = -(reference["labels"] * logits.log_softmax(-1)).sum(-1).mean()
    # recomputation goes through the blocks backwards; without it nobody asks for noise again
    noise = iter([reference["noise/1"], reference["noise/0"]])
    moe.standard_normal = lambda like: next(noise)
    (main + auxiliary_loss(out)).backward()
    for name, gradient in google_state(reference, "train/softmax_xent/grad/").items():
        assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_a_forward_stays_once_out_is_dropped(recompute):
    """Also the graph of a loss that no backward went through: under checkpointing it holds the block's frame."""
    model = VMoE(TINY).train()
    model.set_grad_checkpointing(recompute)
    out = {}
    logits = model(torch.randn(2, 3, 32, 32), out, states=(0, 3))
    assert [number for number, told in out["blocks"].items() if "state" in told] == ["0", "3"]
    (logits.sum() + auxiliary_loss(out)).backward()
    told = [weakref.ref(loss) for routing in routings(out).values() for loss in routing.losses.values()]
    assert len(told) == 6 and all(loss() is not None for loss in told)
    gc.disable()  # nothing goes round in circles either
    try:
        del out, logits
        assert all(loss() is None for loss in told)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("variant", "changes", "millions"),
    [
        ("S/32", {}, 296.9),
        ("B/16", {}, 979.0),
        ("L/16", {}, 3446.0),
        ("H/14", {}, 7160.8),
        ("H/14", {"moe_blocks": "last-5"}, 2688.6),
    ],
)
def test_parameter_counts_are_the_published_ones(variant, changes, millions):
    sizes = decode_variant(variant)
    routing = official(num_experts=32)
    with torch.device("meta"):
        config = VMoEConfig(image_size=224, num_classes=18291, representation_size=sizes["width"], moe=routing, **sizes)
        count = sum(p.numel() for p in VMoE(replace(config, **changes)).parameters())
    assert round(count / 1e6, 1) == millions


def test_variants_and_placement():
    assert set(VARIANTS) == {"S", "B", "L", "H"}
    student = decode_variant("m2mkd-L/16")
    assert (student["depth"], student["moe_blocks"], student["moe"].num_experts, student["moe"].k) == (24, "all", 8, 2)
    assert moe_numbers("every-2", 8) == (1, 3, 5, 7) and moe_numbers("last-2", 8) == (5, 7)
    assert moe_numbers("all", 3) == (0, 1, 2) and moe_numbers("none", 3) == () and moe_numbers("2,0", 3) == (0, 2)
    kinds = [isinstance(block.mlp, MoE) for block in VMoE(replace(TINY, moe_blocks="last-1")).blocks]
    assert kinds == [False, False, False, True]
    for wrong in ("every-0", "4", "1,1", "", "-1", "some"):
        with pytest.raises(ValueError, match="moe_blocks"):
            moe_numbers(wrong, 4)
    with pytest.raises(ValueError, match="one of S, B, L, H"):
        decode_variant("XL/16")


def test_pre_logits_mean_pool_and_prefix_tokens():
    config = replace(TINY, representation_size=6, pool="mean", class_token=False, reg_tokens=2)
    model = VMoE(config).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens_BTD = model.forward_features(images)
    assert tokens_BTD.shape == (2, 2 + 16, 32)
    assert_close(tokens_BTD, F.layer_norm(tokens_BTD, (32,), eps=1e-6), rtol=0, atol=1e-5)  # norm comes before pooling
    features = torch.tanh(model.pre_logits(tokens_BTD[:, 2:].mean(1)))
    assert_close(model.forward_head(tokens_BTD, pre_logits=True), features)
    assert_close(model(images), model.head(features))
    stages = split(model, [1, 3])
    assert torch.equal(stages[1](stages[0](images)), model(images))


def test_initial_values_are_the_official_ones():
    model = VMoE(replace(TINY, width=128, mlp_dim=256, representation_size=128))
    values = dict(model.named_parameters())
    assert values["cls_token"].abs().sum() == values["head.weight"].abs().sum() == 0
    assert_close(values["head.bias"], torch.full((10,), -math.log(10)))
    assert_close(values["pos_embed"].std().item(), 0.02, rtol=0.1, atol=0)
    assert_close(values["patch_embed.proj.weight"].std().item(), (3 * 8 * 8) ** -0.5, rtol=0.05, atol=0)
    for name, shape in {"attn.qkv": (128, 128), "attn.proj": (128, 128), "mlp.fc1": (128, 256)}.items():
        assert_close(values[f"blocks.0.{name}.weight"].std().item(), (2 / sum(shape)) ** 0.5, rtol=0.05, atol=0)
        assert values[f"blocks.0.{name}.bias"].abs().max() < 1e-5
    assert 0 < values["blocks.0.mlp.fc1.bias"].std() < 2e-6
    again, other = VMoE(replace(TINY, seed=0)).state_dict(), VMoE(replace(TINY, seed=1)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in VMoE(TINY).state_dict().items())
    assert not torch.equal(again["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


LOAD_WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = sys.modules["transformers"] = None  # importing them raises ImportError
import torch
from models.vmoe import VMoE
model = VMoE.from_pretrained(sys.argv[1])
torch.save({"state": model.state_dict(), "logits": model(torch.load(sys.argv[2])), "labels": model.labels,
            "preprocessing": model.preprocessing.to_dict(), "training": model.training}, sys.argv[3])
"""


def test_saved_model_loads_to_the_bit_where_deepspeed_and_transformers_are_missing(tmp_path):
    model = VMoE(replace(TINY, drop_rate=0.1, moe=MoEConfig(num_experts=4, eval_capacity_factor=1.0, dropout=0.1)))
    torch.nn.init.normal_(model.head.weight)
    preprocessing = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    labels = [f"digit {i}" for i in range(10)]
    model.save_pretrained(tmp_path / "model", preprocessing=preprocessing, labels=labels)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    arguments = [str(tmp_path / name) for name in ("model", "images.pt", "loaded.pt")]
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_DEEPSPEED, *arguments], check=True, cwd=ROOT, timeout=120)
    loaded = torch.load(tmp_path / "loaded.pt")
    assert loaded["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded["state"][name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded["logits"], model.eval()(images)) and not loaded["training"]
    assert loaded["labels"] == labels and Preprocessing.from_dict(loaded["preprocessing"]) == preprocessing


def test_every_setting_survives_saving(tmp_path):
    config = replace(TINY, stitch_blocks={"2": 48}, representation_size=6, moe_blocks="last-1", seed=3)
    VMoE(config).bfloat16().save_pretrained(tmp_path)
    loaded = VMoE.from_pretrained(tmp_path)
    assert loaded.config == config and loaded.preprocessing is None and loaded.labels is None
    assert loaded.head.weight.dtype == torch.bfloat16
    assert loaded.blocks[2].stitch[0][1].weight.shape == (48, 32)


def test_stitched_block_runs_the_stitch_first():
    model = VMoE(replace(TINY, stitch_blocks={"2": 48})).eval()
    plain = VMoE(TINY).eval()
    x_BTD = torch.randn(2, 17, 32)
    assert_close(model.blocks[2](x_BTD), plain.blocks[2](model.blocks[2].stitch(x_BTD)))
    stages = split(model, [2, 2])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(assemble(stages)(images), model(images))


def test_loading_is_strict_and_explains(tmp_path):
    VMoE(TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"depth": 3, "moe_blocks": "1"}))
    with pytest.raises(ValueError, match=r"blocks\.3\.attn\.proj\.bias \(and 24 more\) of shape \(32,\)"):
        VMoE.from_pretrained(tmp_path)
    path.write_text(json.dumps(content | {"moe": content["moe"] | {"tutel": True}}))
    with pytest.raises(ValueError, match=r"\['tutel'\] in a MoEConfig"):
        VMoE.from_pretrained(tmp_path)
    path.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="load_teacher"):
        VMoE.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        VMoE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels were given for 10 classes"):
        VMoE(TINY).save_pretrained(tmp_path, labels=["a", "b", "c"])


def test_saved_state_can_be_given(tmp_path):
    state = {name: value + 1 for name, value in VMoE(TINY).state_dict().items()}
    VMoE(TINY).save_pretrained(tmp_path, state=state)
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    class Api:
        uploaded = None

        def __init__(self, **_options):
            pass

        def create_repo(self, repo_id, **_options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_options):
            Api.uploaded = (repo_id, sorted(path.name for path in Path(folder_path).iterdir()))

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    VMoE(TINY).push_to_hub("someone/vmoe")
    assert Api.uploaded == ("someone/vmoe", ["config.json", "model.safetensors"])


def test_a_model_that_ran_can_be_copied():
    model = VMoE(TINY)
    model(images := torch.randn(2, 3, 32, 32))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_configs_that_make_no_model_are_refused():
    for changes, message in (
        ({"image_size": 30}, "image_size 30"),
        ({"heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"gelu": "relu"}, "erf, tanh"),
        ({"class_token": False}, "needs class_token"),
        ({"stitch_blocks": {"0": 8}}, r"\['0'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)
