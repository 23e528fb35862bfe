"""A V-MoE with the options of newer teachers, against timm's own models of the same weights: rotary positions, SwiGLU,
LayerScale, registers, no class token."""

import copy
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from transformers import AutoModelForImageClassification
from vit_families import IMAGE_SIZE, images, scramble

import models.auto
import models.registry  # noqa: F401  both make V-MoE known
from models.experts.dense_block import read_block
from models.experts.upcycle import norm_eps, upcycle
from models.modules.meta import check_pair
from models.modules.stages import assemble, split
from models.modules.stitch import assemble_student, build_student_modules
from models.modules.tokens import Rope, TokenLayout, token_layout
from models.moe.expert import SWIGLU
from models.moe.layer import MoE, MoEConfig
from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from models.vmoe.model import VMoE, VMoEConfig
from tests.launch import TINY_RECIPE as RECIPE
from trainer.config.load import load_recipe
from trainer.teaching import upcycling
from trainer.teaching.students import config_for, student_config

IMAGES = Preprocessing(IMAGE_SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
TINY = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 4, "num_classes": 5}
# name -> (timm architecture, arguments that differ from TINY)
TEACHERS = {
    # SwiGLU in two layers, no bias of queries and keys, 5 prefix tokens, no learned positions
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", {"global_pool": "token"}),
    # SwiGLU in one layer, queries, keys and values in three, learned positions beside the rotary ones
    "eva02": ("eva02_tiny_patch14_224", {"global_pool": "token", "num_classes": 0, "use_fc_norm": False}),
    # GELU; rotation by column and row
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope and positions": ("vit_small_patch16_rope_ape_224", {}),
    # a register and no class token
    "rope gap": ("vit_mediumd_patch16_rope_reg1_gap_256", {"use_fc_norm": False}),
    "attention of timm's layers": ("vit_small_patch16_rope_224", {"attn_type": "rope"}),
    # not rotary: SwiGLU in one layer, LayerScale, 4 registers, no head
    "dinov2 giant": ("vit_giant_patch14_reg4_dinov2", {"num_classes": 0, "mlp_layer": SwiGLUPacked}),
}
# every option at once
ALL = VMoEConfig(
    image_size=IMAGE_SIZE,
    patch_size=8,
    width=24,
    depth=4,
    heads=3,
    mlp_dim=40,
    num_classes=5,
    moe_blocks="1,3",
    moe=MoEConfig(num_experts=4, k=2),
    class_token=False,
    reg_tokens=2,
    pool="mean",
    rope=Rope("cat", temperature=50.0, rotate_half=False, ref_feat_shape=(3, 3)),
    swiglu=True,
    layer_scale=0.1,
)
FOLDED = 5e-6  # of the largest value: weights that a LayerScale went into are rounded (at most 2e-6 over 40 seeds)
every_teacher = pytest.mark.parametrize("name", list(TEACHERS))


def teacher(name: str, **arguments) -> Teacher:
    architecture, differing = TEACHERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(architecture, **{**TINY, **differing, **arguments}).eval()
    scramble(model)
    return Teacher(model, IMAGES, f"a {name}", None, model.num_classes)


def student(dense: Teacher, **changes) -> VMoE:
    """A student of the same sizes and kinds of layers."""
    model = dense.model
    layout = token_layout(model)
    values = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "width": 24,
        "depth": 4,
        "heads": 3,
        "mlp_dim": model.blocks[0].mlp.fc2.in_features,
        "num_classes": dense.num_classes,
        "moe_blocks": "every-2",
        "moe": MoEConfig(num_experts=4, k=2),
        "norm_eps": norm_eps(model),
        "class_token": layout.class_token,
        "reg_tokens": layout.reg_tokens,
        "pool": "token" if layout.class_token else "mean",
        "rope": layout.rope,
        "swiglu": read_block(model.blocks[0], 0).activation == SWIGLU,
    }
    return VMoE(VMoEConfig(**(values | changes))).eval()


def model_of(config: VMoEConfig) -> VMoE:
    """Nothing is zero, and no LayerScale the same in every channel."""
    model = VMoE(config).eval()
    scramble(model)
    return model


@every_teacher
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize("routing", [{"k": 1}, {"k": 2}])
@torch.no_grad()
def test_copies_of_a_teacher_compute_its_features(name, layer_scale, routing):
    dense = teacher(name)
    model = student(dense, layer_scale=layer_scale, moe=MoEConfig(num_experts=4, **routing))
    assert upcycle(model, dense, range(4), IMAGES) == []
    x = images(4)
    wanted = dense.model.forward_features(x)
    assert wanted.std() > 0.1
    close = 1e-6 if layer_scale else FOLDED
    torch.testing.assert_close(model.forward_features(x), wanted, atol=close * wanted.abs().max().item(), rtol=0)
    if dense.num_classes:
        wanted = dense.model(x)
        torch.testing.assert_close(model(x), wanted, atol=close * wanted.abs().max().item(), rtol=0)


@every_teacher
def test_what_the_student_lacks_is_refused_with_the_setting(name):
    dense = teacher(name)
    model = student(dense, swiglu=not student(dense).config.swiglu)
    with pytest.raises(ValueError, match=r"MLPs have (SwiGLU|GELU) and those of a .*: set student.swiglu=(true|false)"):
        upcycle(model, dense, range(4), IMAGES)
    rotary = token_layout(dense.model).rotary
    model = student(dense, rope=None if rotary else Rope())
    value = str(rotary).lower()
    with pytest.raises(ValueError, match=f"rotate queries and keys .* the student's do.*: set student.rope={value}"):
        upcycle(model, dense, range(4), IMAGES)


@every_teacher
def test_a_plan_checks_the_start_on_the_meta_device(name):
    dense = teacher(name)
    with torch.device("meta"):
        model = student(dense)
        assert upcycle(model, dense, range(4), IMAGES) == []
        assert model.config.tokens == token_layout(dense.model)
        wrong = student(dense, rope=None if model.config.rope else Rope())
        with pytest.raises(ValueError, match=r"set student.rope=(true|false)"):
            upcycle(wrong, dense, range(4), IMAGES)


def test_rotations_of_other_kinds_are_refused():
    dense = teacher("rope")
    with pytest.raises(ValueError, match=r"the student's rope is Rope.*dinov3.* and that of a rope is Rope.*cat"):
        upcycle(student(dense, rope=Rope()), dense, range(4), IMAGES)
    mixed = Teacher(timm.create_model("vit_small_patch16_rope_mixed_224", **TINY), IMAGES, "a mix", None, 5)
    assert token_layout(mixed.model).rotary and token_layout(mixed.model).rope is None
    with pytest.raises(ValueError, match=r"cannot start from a mix, whose rotary positions \(RotaryEmbeddingMixed\)"):
        upcycle(student(mixed), mixed, range(4), IMAGES)


def test_relative_positions_are_refused():
    beit = timm.create_model("beit_base_patch16_224", **TINY)
    assert token_layout(beit) == TokenLayout(class_token=True, reg_tokens=0)
    with pytest.raises(ValueError, match="cannot start from a Beit with blocks of type Block"):
        norm_eps(beit)


@pytest.mark.parametrize("change, message", [
    ({"scale_mlp": True}, r"a norm inside block 0 \(mlp\)"),
    ({"scale_attn_inner": True}, r"a norm inside block 0 \(norm\)"),
    ({"gated_attn": True}, "a gate behind the attention of block 0"),
    ({"num_kv_heads": 1, "attn_type": "rope", "qkv_fused": False}, "1 heads of keys for 3 of queries in block 0"),
    ({"use_pre_transformer_norm": True}, "a norm before the blocks"),
    ({"use_post_norm": True}, "blocks of type EvaBlockPostNorm"),
])  # fmt: skip
def test_parts_of_eva_that_a_v_moe_lacks_are_refused(change, message):
    if "gated_attn" in change:
        dense = teacher("rope")
        dense.model.blocks[0].attn.gate = torch.nn.Linear(24, 24)
    else:
        dense = teacher("rope", **change)
    with pytest.raises(ValueError, match=message):
        upcycle(student(teacher("rope")), dense, range(4), IMAGES)


@torch.no_grad()
def test_experts_compute_timms_swiglu():
    layer = MoE(24, 40, MoEConfig(num_experts=3, k=2), act=SWIGLU)
    scramble(layer)
    experts = []
    for expert in layer.experts:
        dense = SwiGLU(24, 40)
        dense.load_state_dict(expert.state_dict())
        experts.append(dense)
    x_BTD = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    out = {}
    found = layer(x_BTD, out)
    routing = out["routing"]
    expert_BTK = routing.expert_GSK.view(2, 7, 2)
    weight_BTK = routing.weight_GSK.view(2, 7, 2)
    for b in range(2):
        for t in range(7):
            chosen = zip(weight_BTK[b, t], expert_BTK[b, t])
            wanted = sum(weight * experts[int(e)](x_BTD[b, t]) for weight, e in chosen)
            torch.testing.assert_close(found[b, t], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_modules_rotate_on_their_own(recompute):
    """Outputs and gradients of stages, run from their own copies, are those of the whole model to the bit."""
    model = model_of(ALL).train()
    stages = copy.deepcopy(split(model, [1, 2, 1]))
    for part in (model, *stages):
        part.set_grad_checkpointing(recompute)
    x = images()
    whole = model(x)
    whole.square().sum().backward()
    tokens = x
    for stage in stages:
        tokens = stage(tokens)
    tokens.square().sum().backward()
    assert torch.equal(tokens, whole)
    found = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(found[name], p.grad), name
    assert found["blocks.2.ls1.gamma"].abs().sum() > 0
    again = assemble(stages)
    assert type(again) is VMoE and torch.equal(again(x), whole)


@torch.no_grad()
def test_student_modules_learn_at_a_rotary_teachers_borders():
    """Stitched modules, put together with their stitches, compute what they compute one after another."""
    dense = teacher("dinov3 plus")
    layout = token_layout(dense.model)
    config = replace(ALL, class_token=layout.class_token, reg_tokens=layout.reg_tokens, rope=layout.rope)
    modules = build_student_modules(model_of(config), [2, 2], dense.model.embed_dim)
    check_pair(dense.model, model_of(config))
    x = images()
    state = modules[0](x)
    assert state.shape == split(dense.model, [2, 2])[0](x).shape
    whole = assemble_student(modules, "keep")
    torch.testing.assert_close(whole(x), modules[1](state), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_without_classes_the_last_module_gives_normalised_tokens():
    model = model_of(replace(ALL, num_classes=0))
    first, last = split(model, [2, 2])
    x = images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 2 + 16, 24) and torch.equal(last(first(x)), tokens)
    assert model(x).shape == (2, 24)


def test_the_layout_of_a_student_is_that_of_its_config():
    for config in (ALL, replace(ALL, class_token=True, rope=Rope(grid_indexing="xy")), replace(ALL, rope=None)):
        assert token_layout(VMoE(config)) == config.tokens


@torch.no_grad()
def test_rotation_tells_places_apart():
    """Without learned positions, what the class token sees changes with the patches' places only where it rotates."""
    x = images()
    # the patches of 8 x 8 pixels of each row, in the opposite order
    swapped = x.unflatten(3, (4, 8)).flip(3).flatten(3, 4)
    for rope, differs in ((None, False), (Rope(), True)):
        model = model_of(replace(ALL, class_token=True, pool="token", rope=rope))
        model.pos_embed.zero_()
        change = (model(swapped) - model(x)).abs().max()
        assert (change > 1e-2) == differs, (rope, change)


@torch.no_grad()
def test_saved_with_every_option_it_loads_to_the_bit(tmp_path):
    model = model_of(ALL)
    model.save_pretrained(tmp_path, preprocessing=IMAGES)
    x = images()
    wanted = model(x)
    loaded = VMoE.from_pretrained(tmp_path)
    assert loaded.config == ALL and torch.equal(loaded(x), wanted)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(by_timm(x), wanted)
    by_transformers = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(by_transformers(x).logits, wanted)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=[3]).eval()
    tokens = model.blocks[3](split(model, [3, 1])[0](x), rope=model.rope.get_embed(shape=(4, 4)))
    assert torch.equal(features(x)[0], tokens[:, 2:].transpose(1, 2).unflatten(2, (4, 4)))


def test_a_config_of_before_these_options_still_loads(tmp_path):
    plain = replace(ALL, swiglu=False, layer_scale=0.0, rope=None)
    model = model_of(plain)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for part in (content, content["model_args"]):
        for name in ("swiglu", "layer_scale", "rope", "swiglu_mlp", "init_values"):
            part.pop(name, None)
    path.write_text(json.dumps(content))
    assert VMoE.from_pretrained(tmp_path).config == plain
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images()), model(images()))


@torch.no_grad()
def test_the_rotation_follows_the_size_of_the_images():
    """Against timm's Eva at that size, built anew; and of any size a dynamic one takes."""
    dense = teacher("dinov3 plus")
    model = student(dense)
    upcycle(model, dense, range(4), IMAGES)
    model.pos_embed.zero_()
    larger = teacher("dinov3 plus", img_size=48)
    larger.model.load_state_dict(dense.model.state_dict())
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    wanted = larger.model.forward_features(x)
    model.set_input_size(48)
    torch.testing.assert_close(model.forward_features(x), wanted, atol=FOLDED * wanted.abs().max().item(), rtol=0)
    oblong = teacher("dinov3 plus", img_size=(48, 24))
    oblong.model.load_state_dict(dense.model.state_dict())
    dynamic = VMoE(replace(model.config, dynamic_img_size=True)).eval()
    dynamic.load_state_dict(model.state_dict())
    wanted = oblong.model.forward_features(x[..., :24])
    found = dynamic.forward_features(x[..., :24])
    torch.testing.assert_close(found, wanted, atol=FOLDED * wanted.abs().max().item(), rtol=0)


@torch.no_grad()
def test_the_angles_stay_exact_in_bfloat16():
    model = model_of(ALL).bfloat16()
    angles = model.rope.get_embed(shape=(4, 4))
    assert angles.dtype == torch.float32 and torch.equal(angles, model_of(ALL).rope.get_embed(shape=(4, 4)))
    assert model(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("change, message", [
    ({"rope": {"rope_type": "mixed"}}, "rope.rope_type 'mixed' is not known; use one of cat, dinov3"),
    ({"rope": {"temperature": 0}}, "rope.temperature must be above 0, got 0"),
    ({"rope": {"ref_feat_shape": [4, 4]}}, "rope.ref_feat_shape is of rope_type cat"),
    ({"rope": {"grid_indexing": "yx"}}, "rope.grid_indexing 'yx' is not known"),
    ({"rope": {"speed": 1}}, r"unknown keys \['speed'\] in a Rope"),
    ({"rope": {}, "heads": 4}, r"rope needs heads of a multiple of 4 channels, got 6 \(width 24 / heads 4\)"),
    ({"layer_scale": -1}, "layer_scale must lie between 0"),
])  # fmt: skip
def test_configurations_that_make_no_model(change, message):
    values = {**asdict(ALL), **change}
    with pytest.raises(ValueError, match=message):
        VMoEConfig.from_dict(json.loads(json.dumps(values)))


def test_what_may_change_on_trained_weights():
    replace(ALL, layer_scale=0.5).on_weights_of(ALL, "it")  # only where it starts
    for change in ({"layer_scale": 0.0}, {"swiglu": False}, {"rope": None}, {"rope": Rope()}):
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"it has {name} "):
            replace(ALL, **change).on_weights_of(ALL, "it")


@pytest.mark.parametrize("name, overrides, expected", [
    ("rope", [], ("cat", True, 0, "token")),
    ("dinov3 plus", [], ("dinov3", True, 4, "token")),
    ("rope gap", [], ("cat", False, 1, "mean")),
    ("rope gap", ["student.class_token=true"], ("cat", True, 0, "token")),  # as many prefix tokens
    ("dinov3 plus", ["student.class_token=false", "student.rope=false"], (None, False, 5, "mean")),
    ("dinov2 giant", [], (None, True, 4, "token")),
    ("dinov2 giant", ["student.rope=true", "student.reg_tokens=0"], ("dinov3", True, 0, "token")),
])  # fmt: skip
def test_what_a_recipe_leaves_open_is_the_teachers(name, overrides, expected):
    layout = token_layout(teacher(name, depth=1).model)
    config = config_for(load_recipe(RECIPE, overrides), 5, 0.0, IMAGE_SIZE, 3, layout, 0)
    rope_type = config.rope and config.rope.rope_type
    assert (rope_type, config.class_token, config.reg_tokens, config.pool) == expected
    if config.rope and layout.rope:
        assert config.rope == layout.rope
    # the saved student's own, where training starts from it
    again = config_for(load_recipe(RECIPE, overrides), 5, 0.0, IMAGE_SIZE, 3, config.tokens, 0)
    assert again == config


def test_a_student_of_a_teacher_with_learned_frequencies_rotates_by_fixed_ones():
    mixed = timm.create_model("vit_small_patch16_rope_mixed_224", **TINY)
    config = config_for(load_recipe(RECIPE), 5, 0.0, IMAGE_SIZE, 3, token_layout(mixed), 0)
    assert config.rope == Rope()


def test_a_start_from_another_rotary_model_rotates_like_it(monkeypatch):
    """Whatever the teacher does: its blocks are copies of that model's."""
    start = teacher("rope")
    plain = timm.create_model("vit_tiny_patch16_224", **TINY)
    run = SimpleNamespace(
        recipe=load_recipe(RECIPE, ["student.init=somewhere"]),
        teacher=Teacher(plain, IMAGES, "a vit", None, 5),
        labels=list("abcde"),
        classes=list("abcde"),
    )
    monkeypatch.setattr(upcycling, "dense_start", lambda run: start)
    assert student_config(run).rope == token_layout(start.model).rope


def test_swiglu_takes_the_place_of_gelu():
    with pytest.raises(ValueError, match=r"student.gelu is 'tanh', expected erf where student.swiglu is true"):
        load_recipe(RECIPE, ["student.swiglu=true", "student.gelu=tanh"])
