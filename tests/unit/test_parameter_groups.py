"""Which parameter learns at which rate and with which decay."""

from dataclasses import replace

from torch import nn
from vit_families import tiny

from models.modules.stitch import stitch
from models.modules.tokens import Rope
from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig
from trainer.distributed.engine import blocks_after, parameter_groups

CONFIG = VMoEConfig(image_size=16, patch_size=8, width=16, depth=3, heads=2, mlp_dim=24, num_classes=5,
                    moe_blocks="1", moe=MoEConfig(num_experts=2, k=1), reg_tokens=1)  # fmt: skip


def groups_of(module: nn.Module, layer_decay: float) -> dict[str, dict]:
    """Parameter name -> its group."""
    names = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, 0.1, layer_decay)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)  # nothing is in two groups
    return found


def test_without_layer_decay_there_are_two_groups():
    groups = parameter_groups(VMoE(CONFIG), 0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.1), ("no_decay", 0.0)]
    assert not any("lr_scale" in group for group in groups)


def test_layer_scale_has_no_weight_decay_and_rope_no_parameters():
    model = VMoE(replace(CONFIG, swiglu=True, layer_scale=0.1, rope=Rope()))
    found = groups_of(model, 1.0)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert not any("rope" in name for name in found)
    for scale in ("ls1", "ls2"):
        assert found[f"blocks.0.{scale}.gamma"]["weight_decay"] == 0
    assert found["blocks.0.mlp.fc1_g.weight"]["weight_decay"] == 0.1
    assert found["blocks.1.mlp.experts.0.fc1_x.weight"]["weight_decay"] == 0.1


def test_every_block_has_the_rate_of_the_block_after_it_times_the_decay():
    model = VMoE(CONFIG)
    model.blocks[2].stitch = stitch(16, 16)  # kept at a border: part of the block behind it
    found = groups_of(model, 0.5)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    wanted = {
        "cls_token": 1 / 8, "reg_token": 1 / 8, "pos_embed": 1 / 8, "patch_embed.proj.weight": 1 / 8,
        "blocks.0.attn.qkv.weight": 1 / 4, "blocks.1.norm1.bias": 1 / 2, "blocks.1.mlp.router.weight": 1 / 2,
        "blocks.1.mlp.experts.1.fc2.weight": 1 / 2, "blocks.2.mlp.fc1.weight": 1, "blocks.2.stitch.1.weight": 1,
        "norm.weight": 1, "head.weight": 1, "head.bias": 1,
    }  # fmt: skip
    assert {name: found[name]["lr_scale"] for name in wanted} == wanted
    decayed = {name for name, group in found.items() if group["weight_decay"]}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim > 1 and "token" not in n and "pos" not in n}
    names = [group["name"] for group in parameter_groups(model, 0.1, 0.5)]
    assert len(set(names)) == len(names) == 8  # DeepSpeed tells groups with experts apart by their names


def test_rates_and_decay_of_a_rotary_model():
    model = tiny("rope mixed", depth=3)
    found = groups_of(model, 0.5)
    scales = {f"blocks.{i}.attn.proj.weight": found[f"blocks.{i}.attn.proj.weight"]["lr_scale"] for i in range(3)}
    assert list(scales.values()) == [1 / 4, 1 / 2, 1]
    assert found["rope.freqs"]["weight_decay"] == 0
    assert found["patch_embed.proj.weight"]["lr_scale"] == 1 / 8


def test_a_student_inside_another_module_and_what_is_frozen():
    student = VMoE(CONFIG)
    student.pos_embed.requires_grad_(False)
    outer = nn.ModuleDict({"student": student, "guide": nn.Linear(16, 2)})
    found = groups_of(outer, 0.5)
    assert "student.pos_embed" not in found and found["student.cls_token"]["lr_scale"] == 1 / 8
    assert found["guide.weight"]["lr_scale"] == 1 and "guide.weight" not in blocks_after(outer)
