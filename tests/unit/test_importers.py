"""Foreign checkpoints: synthetic files of each layout, against forwards written here from the original formulas."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from models.teacher.load import load_teacher
from models.vmoe.import_names import google_state, m2mkd_state
from models.vmoe.importers import import_checkpoint
from models.vmoe.model import VMoE

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vmoe" / "model_token_k2.npz"
WIDTH, HIDDEN, HEADS, CLASSES, DEPTH, EXPERTS, TEACHER_WIDTH = 24, 40, 3, 5, 4, 3, 32
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))  # 14-pixel patches: a grid of 2 x 2


class Draw:
    """Names and random weights of a checkpoint, large enough that every one of them shows in the logits."""

    def __init__(self):
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, name: str, *shape: int) -> None:
        self.state[name] = torch.randn(shape, generator=self.generator) * 0.3

    def linear(self, name: str, width_in: int, width_out: int) -> None:
        self.tensor(f"{name}.weight", width_out, width_in)
        self.tensor(f"{name}.bias", width_out)

    def norm(self, name: str, width: int) -> None:
        self.tensor(f"{name}.weight", width)
        self.tensor(f"{name}.bias", width)


def drawn(moe_blocks: tuple[int, ...] = (), stitched: tuple[int, ...] = (), qkv_bias: bool = True) -> dict[str, Tensor]:
    """The state dict of a model of kamanphoebe/m2mKD: its ViT, or its V-MoE with FastMoE's layers."""
    d = Draw()
    d.tensor("cls_token", 1, 1, WIDTH)
    d.tensor("pos_embed", 1, 5, WIDTH)
    d.tensor("patch_embed.proj.weight", WIDTH, 3, 14, 14)
    d.tensor("patch_embed.proj.bias", WIDTH)
    for i in range(DEPTH):
        b = f"blocks.{i}"
        if i in stitched:
            d.norm(f"{b}.pre_stitch.ln", TEACHER_WIDTH)
            d.linear(f"{b}.pre_stitch.fc", TEACHER_WIDTH, WIDTH)
        d.norm(f"{b}.norm1", WIDTH)
        d.linear(f"{b}.attn.qkv", WIDTH, 3 * WIDTH)
        if not qkv_bias:
            del d.state[f"{b}.attn.qkv.bias"]
        d.linear(f"{b}.attn.proj", WIDTH, WIDTH)
        d.norm(f"{b}.norm2", WIDTH)
        if i in moe_blocks:
            d.linear(f"{b}.moe.gate.gate", WIDTH, EXPERTS)
            d.tensor(f"{b}.moe.experts.htoh4.weight", EXPERTS, HIDDEN, WIDTH)
            d.tensor(f"{b}.moe.experts.htoh4.bias", EXPERTS, HIDDEN)
            d.tensor(f"{b}.moe.experts.h4toh.weight", EXPERTS, WIDTH, HIDDEN)
            d.tensor(f"{b}.moe.experts.h4toh.bias", EXPERTS, WIDTH)
        else:
            d.linear(f"{b}.mlp.fc1", WIDTH, HIDDEN)
            d.linear(f"{b}.mlp.fc2", HIDDEN, WIDTH)
        if i + 1 in stitched:
            d.norm(f"{b}.post_stitch.ln", WIDTH)
            d.linear(f"{b}.post_stitch.fc", WIDTH, TEACHER_WIDTH)
    d.norm("norm", WIDTH)
    d.linear("head", WIDTH, CLASSES)
    return d.state


def forward(s: dict[str, Tensor], images: Tensor, eps: float = 1e-6) -> Tensor:
    """The model those weights are of, one operation after the other."""

    def linear(x, name):
        return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))

    def norm(x, name, eps=eps):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def moe(x, name):
        values, chosen = linear(x, f"{name}.gate.gate").topk(2, -1)  # FastMoE's NaiveGate: softmax over the chosen
        y = torch.zeros_like(x)
        for e in range(EXPERTS):
            up, down = (s[f"{name}.experts.{part}.weight"][e] for part in ("htoh4", "h4toh"))
            h = F.gelu(F.linear(x, up, s[f"{name}.experts.htoh4.bias"][e]))
            weight = (values.softmax(-1) * (chosen == e)).sum(-1, keepdim=True)
            y = y + weight * F.linear(h, down, s[f"{name}.experts.h4toh.bias"][e])
        return y

    patches = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14)
    x = torch.cat([s["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1) + s["pos_embed"]
    for i in range(DEPTH):
        b = f"blocks.{i}"
        if f"{b}.pre_stitch.ln.weight" in s:
            x = linear(norm(x, f"{b}.pre_stitch.ln", 1e-5), f"{b}.pre_stitch.fc")
        q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        y = norm(x, f"{b}.norm2")
        if f"{b}.moe.gate.gate.weight" in s:
            x = x + moe(y, f"{b}.moe")
        else:
            x = x + linear(F.gelu(linear(y, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        if f"{b}.post_stitch.ln.weight" in s:
            x = linear(norm(x, f"{b}.post_stitch.ln", 1e-5), f"{b}.post_stitch.fc")
    return linear(norm(x, "norm")[:, 0], "head")


def stages(state: dict[str, Tensor], depths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """The state dicts of the repository's `stages`: local block numbers, first and last with their extras."""
    parts = []
    for index, depth in enumerate(depths):
        start = sum(depths[:index])
        part = {}
        for name, value in state.items():
            if name.startswith("blocks."):
                _, number, rest = name.split(".", 2)
                if start <= int(number) < start + depth:
                    part[f"blocks.{int(number) - start}.{rest}"] = value
            elif (index == 0 and name.startswith(("cls", "pos", "patch"))) or (
                index == len(depths) - 1 and name.startswith(("norm", "head"))
            ):
                part[name] = value
        parts.append(part)
    return parts


def whole(state: dict[str, Tensor], path: Path) -> Path:
    """What main.py saves: every tensor twice, and training state beside the model."""
    parts = stages(state, (2, 2))
    copies = {f"stages.{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}
    torch.save({"model": state | copies, "model_stages": parts, "optimizer": {"lr": 1e-3}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("stitched", [(), (2,)])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_papers_vmoe(tmp_path, stitched, one_by_one):
    state = drawn(moe_blocks=(1, 3), stitched=stitched)
    expected = forward(state, IMAGES)
    saved = state
    if one_by_one:  # later FastMoE: one module per expert
        saved = {}
        for name, value in state.items():
            if ".moe.experts." in name:
                head, leaf = name.split(".moe.experts.")
                saved |= {f"{head}.moe.experts.{e}.{leaf}": v[None] for e, v in enumerate(value)}
            else:
                saved[name] = value
    written = import_checkpoint(whole(saved, tmp_path / "a.pth"), "m2mkd_vmoe", tmp_path / "out", heads=HEADS)
    assert {path.name for path in written} >= {"config.json", "model.safetensors"}
    model = VMoE.from_pretrained(tmp_path / "out")
    assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert model.config.moe_blocks == "1,3" and model.config.moe.router_bias and model.config.image_size == 28
    assert model.preprocessing.mean == (0.485, 0.456, 0.406) and model.preprocessing.resize_size == 32


@pytest.mark.parametrize("qkv_bias, eps", [(True, 1e-6), (False, 1e-5)])
def test_deep_incubation_whole_and_in_stages(tmp_path, qkv_bias, eps):
    state = drawn(qkv_bias=qkv_bias)
    expected = forward(state, IMAGES, eps)
    import_checkpoint(whole(state, tmp_path / "a.pth"), "deep_incubation", tmp_path / "whole", heads=HEADS)
    teacher = load_teacher(str(tmp_path / "whole"))
    assert_close(teacher.model(IMAGES), expected, rtol=1e-5, atol=1e-5)

    folder = tmp_path / "stages"
    folder.mkdir()
    for index, part in enumerate(stages(state, (1, 3))):
        saved = {"model_name": "vit", "block_index": index, "block_state_dict": part, "divided_depths": [1, 3]}
        torch.save(saved, folder / f"vit_{1 - index}.pth")  # the number inside counts, not the name
    import_checkpoint(folder, "deep_incubation", tmp_path / "joined", heads=HEADS)
    joined = load_teacher(str(tmp_path / "joined"))
    assert_close(joined.model(IMAGES), expected, rtol=1e-5, atol=1e-5)

    (folder / "vit_0.pth").unlink()
    with pytest.raises(ValueError, match=r"holds stages \[0\] of 2"):
        import_checkpoint(folder, "deep_incubation", tmp_path / "partial")


@pytest.mark.parametrize("prefix", ["params/", "opt/target/", ""])
def test_googles_vmoe_against_the_official_logits(tmp_path, prefix):
    with np.load(FIXTURE) as file:
        arrays = {name: file[name] for name in file.files}
    params = {prefix + name.removeprefix("params/"): v for name, v in arrays.items() if name.startswith("params/")}
    np.savez(tmp_path / "a.npz", **params)
    import_checkpoint(tmp_path / "a.npz", "google_vmoe", tmp_path / "out")
    model = VMoE.from_pretrained(tmp_path / "out")
    assert model.config.heads == 4 and model.config.moe_blocks == "1,3" and model.config.moe.num_experts == 4
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    # the fixture routes two images together with room for 1.05 of an even load; the import takes the published 4.0
    for block in (1, 3):
        moe = model.blocks[block].mlp
        moe.config = type(moe.config)(**{**vars(moe.config), "images_per_group": 2, "eval_capacity_factor": 1.05})
    assert_close(model(images), torch.from_numpy(arrays["det/logits"]), rtol=1e-5, atol=1e-5)


def test_what_is_not_supported_is_named(tmp_path):
    with pytest.raises(ValueError, match="MAPHead_0/probe"):
        google_state({"MAPHead_0/probe": torch.zeros(1)})
    with pytest.raises(ValueError, match="layout 'jax' is not known"):
        import_checkpoint(tmp_path, "jax", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        import_checkpoint(tmp_path / "none", "m2mkd_vmoe", tmp_path / "out")
    dense = whole(drawn(), tmp_path / "dense.pth")
    with pytest.raises(ValueError, match="no MoE block"):
        import_checkpoint(dense, "m2mkd_vmoe", tmp_path / "out", heads=HEADS)
    with pytest.raises(ValueError, match="is in use"):
        import_checkpoint(dense, "deep_incubation", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["m2mkd_vmoe", "deep_incubation", "google_vmoe"])
def test_nothing_of_a_pickle_runs(tmp_path, layout):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad"):
        import_checkpoint(tmp_path / "bad.pth", layout, tmp_path / "out")
    np.savez(tmp_path / "bad.npz", x=np.array([Payload()], dtype=object))
    with pytest.raises(ValueError, match="bad"):
        import_checkpoint(tmp_path / "bad.npz", layout, tmp_path / "out")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:60])
    with pytest.raises(ValueError, match="cut"):
        import_checkpoint(tmp_path / "cut.pth", layout, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)


def test_fastmoe_names():
    state = drawn(moe_blocks=(0,))
    ours = m2mkd_state(state)
    assert torch.equal(ours["blocks.0.mlp.experts.2.fc1.weight"], state["blocks.0.moe.experts.htoh4.weight"][2])
    assert torch.equal(ours["blocks.0.mlp.router.bias"], state["blocks.0.moe.gate.gate.bias"])
