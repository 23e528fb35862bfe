"""The directory a V-MoE is published as: shards, interrupted saves, damaged and hostile files, one rank's experts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.files import hub, saved
from models.moe.layer import MoEConfig
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig, load_expert_parallel
from tests.hub_server import HubServer

TINY = VMoEConfig(
    image_size=16,
    patch_size=8,
    width=8,
    depth=2,
    heads=2,
    mlp_dim=12,
    num_classes=3,
    moe_blocks="1",
    moe=MoEConfig(num_experts=4, k=2),
)
IMAGES = Preprocessing(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=0.8)


def new(seed: int = 0, **changes) -> VMoE:
    model = VMoE(replace(TINY, seed=seed, **changes)).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model


def same(one: VMoE, other: VMoE) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_shards_and_one_file_replace_each_other(tmp_path):
    one, other = new(1), new(2)
    one.save_pretrained(tmp_path, max_shard_size=3000)
    shards = names(tmp_path) - {"config.json", "model.safetensors.index.json"}
    assert len(shards) > 2 and all((tmp_path / name).stat().st_size < 7000 for name in shards)
    assert same(VMoE.from_pretrained(tmp_path), one)
    (tmp_path / "README.md").write_text("stays")
    other.save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json", "model.safetensors", "README.md"}
    assert same(VMoE.from_pretrained(tmp_path), other)
    one.save_pretrained(tmp_path, max_shard_size="3KB")
    assert names(tmp_path) == shards | {"config.json", "model.safetensors.index.json", "README.md"}
    assert same(VMoE.from_pretrained(tmp_path), one)


def test_weights_of_one_storage_are_sharded_too(tmp_path):
    """Parameters under ZeRO are views of one flat buffer, loaded ones of one mapped file."""
    model = new()
    state = model.state_dict()
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    views = {name: part.view(value.shape) for (name, value), part in zip(state.items(), parts)}
    model.save_pretrained(tmp_path / "a", state=views, max_shard_size=3000)
    VMoE.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size=3000)
    assert names(tmp_path / "a") == names(tmp_path / "b") and len(names(tmp_path / "b")) > 4
    assert same(VMoE.from_pretrained(tmp_path / "b"), model)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("before", "after"), [("5GB", 6000), (6000, "5GB"), (6000, 4000)])
def test_a_killed_save_leaves_the_old_model_or_none(tmp_path, monkeypatch, before, after):
    """Killed in front of every operation on the disk in turn, until one save comes through."""
    old, young = new(1), new(2)
    counts = {"old": 0, "none": 0}
    for kill_at in range(100):
        folder = tmp_path / str(kill_at)
        old.save_pretrained(folder, max_shard_size=before)
        steps = iter(range(100))

        def counted(operation, at=kill_at, steps=steps):
            def call(*arguments, **options):
                if next(steps) == at:
                    raise Killed
                return operation(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(saved, "save_file", counted(save_file))
            for name in ("write_text", "replace", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                young.save_pretrained(folder, max_shard_size=after)
            except Killed:
                pass
            else:
                break
        try:
            assert same(VMoE.from_pretrained(folder), old), kill_at
            counts["old"] += 1
        except ValueError as error:
            assert "no config.json" in str(error)
            counts["none"] += 1
        young.save_pretrained(folder, max_shard_size=after)  # the next save cleans up
        assert same(VMoE.from_pretrained(folder), young) and not [n for n in names(folder) if n.endswith(".tmp")]
    assert same(VMoE.from_pretrained(folder), young)
    assert min(counts.values()) > 2


def test_training_a_loaded_model_leaves_its_files_alone(tmp_path):
    new().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = VMoE.from_pretrained(tmp_path).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not same(loaded, new())
    assert (tmp_path / "model.safetensors").read_bytes() == before


def rewrite(folder: Path, **changes) -> None:
    """Replace tensors of the one weights file; None removes one."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.bias": None}, r"lacks norm\.bias: the model expects it with shape \(8,\)"),
        ({"extra": torch.ones(2)}, r"has extra of shape \(2,\), which the model does not have"),
        ({"norm.bias": torch.ones(9)}, r"norm\.bias with shape \(9,\), but the model has it with \(8,\)"),
        ({"norm.bias": torch.ones(8, dtype=torch.int64)}, r"norm\.bias as I64; weights must be one of F64, F32"),
        ({"norm.bias": torch.full((8,), torch.nan)}, r"has 8 values in norm\.bias that are NaN or infinite"),
        ({"norm.bias": torch.tensor([torch.inf] + [0.0] * 7)}, r"has 1 values in norm\.bias that are NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_both_sides(tmp_path, changes, message):
    new().save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        VMoE.from_pretrained(tmp_path)


def test_damaged_shards_and_indexes_are_refused(tmp_path):
    new().save_pretrained(tmp_path, max_shard_size=3000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    tensor = next(name for name, shard in index["weight_map"].items() if shard == first)

    def refused(message: str, **weight_map) -> None:
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | weight_map}))
        with pytest.raises(ValueError, match=message):
            VMoE.from_pretrained(tmp_path)

    for outside in ("../model.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "x.bin", ""):
        refused(f"names {re.escape(repr(outside))}", **{tensor: outside})
    refused(rf"has {re.escape(tensor)} in {second}, which does not hold it", **{tensor: second})
    refused(r"gone\.safetensors of the . shards of .* is missing", **{tensor: "gone.safetensors"})
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": null}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            VMoE.from_pretrained(tmp_path)
    path.write_text(json.dumps(index))
    content = (tmp_path / first).read_bytes()
    for damaged in (content[:-1], content[:4], b"\xff" * 20 + content):
        (tmp_path / first).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{first} is truncated or no safetensors file"):
            VMoE.from_pretrained(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(ValueError, match=rf"{first} of the 4 shards of .* is missing"):
        VMoE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 90_000}, r"lacks blocks\.89999\.norm1\.weight: the configuration asks for 90000 blocks"),
        ({"depth": 200_000}, "depth must be a whole number from 1 to 100,000, got 200000"),
        ({"depth": 0}, "depth must be a whole number from 1 to 100,000, got 0"),
        ({"width": "8"}, "width must be a whole number"),
        ({"moe": {"num_experts": 10**9}}, r"lacks blocks\.1\.mlp\.experts\.999999999\.fc1\.weight"),
        ({"moe": 7}, r"config\.json of .*"),
        ({"depth": None}, "depth must be"),
        ({"preprocessing": {"image_size": 16}}, r"config\.json of .*"),
    ],
)
def test_configurations_that_lie_are_refused_at_once(tmp_path, changes, message):
    new().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        VMoE.from_pretrained(tmp_path)


def test_text_that_is_no_configuration_is_refused(tmp_path):
    for text in ("", "{", "[1]", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="truncated or not JSON"):
            VMoE.from_pretrained(tmp_path)


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path):
    model = new()
    model.blocks = model.blocks[:1]  # what timm's feature extraction does
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.bias is missing in the weights to save and \(8,\)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_configuration_may_change_training_but_not_the_function(tmp_path):
    new(stitch_blocks={"1": 6}).save_pretrained(tmp_path)
    wanted = replace(
        TINY, drop_path_rate=0.3, seed=5, moe_blocks="every-2", moe=MoEConfig(num_experts=4, noise_std=1.0, dropout=0.1)
    )
    model = VMoE.from_pretrained(tmp_path, config=wanted)
    assert model.config == replace(wanted, stitch_blocks={"1": 6})
    for changes, message in (
        ({"gelu": "tanh"}, r"has gelu 'erf', but 'tanh' is asked for"),
        ({"num_classes": 4}, "has num_classes 3, but 4 is asked for"),
        ({"moe_blocks": "all"}, r"has moe_blocks \(1,\), but \(0, 1\) is asked for"),
        ({"moe": MoEConfig(num_experts=4, k=1)}, r"has moe\.k 2, but 1 is asked for"),
        ({"representation_size": 4}, "has representation_size 0, but 4 is asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            VMoE.from_pretrained(tmp_path, config=replace(wanted, **changes))


@pytest.mark.parametrize("max_shard_size", ["5GB", 2000])
def test_one_ranks_experts_are_read_and_the_others_are_not(tmp_path, monkeypatch, max_shard_size):
    plain = new()
    plain.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    read = []
    get = hub.Weights.read
    monkeypatch.setattr(hub.Weights, "read", lambda self, name: read.append(name) or get(self, name))
    for rank in (0, 1):
        read.clear()
        model = load_expert_parallel(tmp_path, ep_size=2, ep_rank=rank)
        for name, value in plain.state_dict().items():
            expert = re.search(r"experts\.(\d)", name)
            here = expert is None or int(expert[1]) in (2 * rank, 2 * rank + 1)
            loaded = model.get_parameter(name)
            assert loaded.is_meta != here and (name in read) == here
            assert not here or torch.equal(loaded, value)
    with pytest.raises(ValueError, match=r"ep_size 3 cannot share 4 experts"):
        load_expert_parallel(tmp_path, ep_size=3, ep_rank=0)
    with pytest.raises(ValueError, match="rank 2 of ep_size 2"):
        load_expert_parallel(tmp_path, ep_size=2, ep_rank=2)
    with pytest.raises(ValueError, match="full_state_dict"):
        model.save_pretrained(tmp_path)


def test_hub_models_know_the_commit_they_came_from(tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        commits = []
        for seed, size in ((1, "5GB"), (2, 3000)):
            new(seed).save_pretrained(tmp_path / str(seed), max_shard_size=size)
            commits.append(hub.seed(f"alice/model{seed}", tmp_path / str(seed)))
            model = VMoE.from_pretrained(f"alice/model{seed}")
            assert same(model, new(seed)) and model.source == f"alice/model{seed}@{commits[-1]}"
        again = VMoE.from_pretrained("alice/model2", revision=commits[1])
        assert again.source == model.source
    # the server is gone: what is cached says which commit it is, and another one is not made up
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client asks again a few times
    assert VMoE.from_pretrained("alice/model2").source == model.source
    with pytest.raises(ValueError, match=r"alice/model2.*Hugging Face hub"):
        VMoE.from_pretrained("alice/model2", revision="0" * 40)


def test_head_pooling_and_image_size_change_what_is_saved(tmp_path):
    model = new(representation_size=5)
    model.labels, model.preprocessing = ["a", "b", "c"], IMAGES
    model.reset_classifier(7, "avg")
    model.set_input_size(32)
    assert model.labels is None and model.preprocessing.image_size == 32
    assert model.pos_embed.shape == (1, 17, 8) and model.head.weight.shape == (7, 5)
    model.save_pretrained(tmp_path)
    loaded = VMoE.from_pretrained(tmp_path)
    assert (loaded.config.num_classes, loaded.config.pool, loaded.config.image_size) == (7, "mean", 32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 17, 5)
    with pytest.raises(ValueError, match="square images, got 16x32"):
        model.set_input_size((16, 32))
    with pytest.raises(ValueError, match="global_pool 'max'"):
        model.reset_classifier(3, "max")


def test_dynamic_image_size(tmp_path):
    new(dynamic_img_size=True).save_pretrained(tmp_path)
    loaded, fixed = VMoE.from_pretrained(tmp_path), new()
    assert loaded(torch.randn(2, 3, 24, 40)).shape == (2, 3)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), fixed(images))
    with pytest.raises(AssertionError, match="height"):
        fixed(torch.randn(2, 3, 24, 40))
