"""Splitting and assembling: equal to the whole model to the bit, shared parameters, the whole model's key names."""

import copy

import pytest
import torch
from vit_families import every_family, images, scramble, taught, tiny

from models.modules.stages import assemble, shallow_copy, split


def chain(stages, x):
    for stage in stages:
        x = stage(x)
    return x


@every_family
@pytest.mark.parametrize("depths", [[2, 2], [1, 1, 1, 1], [4, 3, 1], [5]])
@torch.no_grad()
def test_stages_in_turn_equal_the_model(family, depths):
    model = tiny(family, depth=sum(depths))
    x = images()
    expected = taught(model, x)
    assert expected.std() > 0.05
    stages = split(model, depths)
    assert torch.equal(chain(stages, x), expected)
    tokens = 16 + model.num_prefix_tokens  # 32 px in patches of 8
    if len(depths) > 1:
        assert stages[0](x).shape == (2, tokens, 24)
    assert [(stage.start, stage.stop) for stage in stages] == [
        (sum(depths[:i]), sum(depths[: i + 1])) for i in range(len(depths))
    ]
    assert [stage.first for stage in stages] == [i == 0 for i in range(len(depths))]
    assert [stage.last for stage in stages] == [i == len(depths) - 1 for i in range(len(depths))]

    assembled = assemble(stages)
    assert type(assembled) is type(model)
    assert torch.equal(taught(assembled, x), expected)
    assert list(assembled.state_dict()) == list(model.state_dict())
    assert "stop" not in vars(assembled)


@every_family
def test_every_parameter_has_one_stage_and_its_name(family):
    model = tiny(family)
    stages = split(model, [1, 2, 1])
    whole = dict(model.named_parameters())
    seen = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert name not in seen
            seen[name] = parameter
    assert seen.keys() == whole.keys()
    assert all(seen[name] is whole[name] for name in whole)
    assert "blocks.1.attn.proj.weight" in stages[1].state_dict()
    assert "blocks.2.attn.proj.weight" in stages[1].state_dict()
    assert not any("pos_embed" in name or "head" in name for name in stages[1].state_dict())
    # splitting leaves the model as it was
    assert type(model).__name__ in ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit")
    assert list(dict(model.named_parameters())) == list(whole)
    assert all(a is b for a, b in zip(assemble(stages).parameters(), model.parameters()))


@every_family
def test_checkpointing_gives_the_same_gradients(family):
    model = tiny(family).train()

    def gradients(outputs, module_parameters):
        return torch.autograd.grad(outputs.square().sum(), module_parameters, allow_unused=True)

    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = gradients(taught(model, images()), parameters)
    stages = split(model, [2, 2])
    calls = count_calls(stages[0].blocks["1"])
    for stage in stages:
        stage.set_grad_checkpointing()
    outputs = chain(stages, images())
    actual = gradients(outputs, parameters)
    assert calls == [2]  # once forward, once more in backward
    for name, a, b in zip(dict(model.named_parameters()), expected, actual):
        if name.startswith("rel_pos_bias"):  # one for all blocks: what the stages' blocks ask of it is summed up apart
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert (a is None and b is None) or torch.equal(a, b), name
    model.set_grad_checkpointing()
    whole = gradients(taught(model, images()), parameters)
    assert calls == [4]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(expected, whole))
    with torch.no_grad():
        chain(stages, images())
    assert calls == [5]


def count_calls(block: torch.nn.Module) -> list[int]:
    calls = [0]

    def forward(*arguments, **named):
        calls[0] += 1
        return type(block).forward(block, *arguments, **named)

    block.forward = forward
    return calls


@every_family
@torch.no_grad()
def test_deepcopy_meta_device_and_state_dict(family):
    stages = split(tiny(family), [1, 3])
    expected = chain(stages, images())
    clones = copy.deepcopy(stages)
    assert torch.equal(chain(clones, images()), expected)
    scramble(clones[0])
    assert not torch.equal(chain(clones, images()), expected)
    assert torch.equal(chain(stages, images()), expected)

    states = [stage.state_dict() for stage in stages]
    empty = [stage.to("meta").to_empty(device="cpu") for stage in copy.deepcopy(stages)]
    for stage, state in zip(empty, states):
        stage.load_state_dict(state)
        for part in [*stage.modules(), *stage.borrowed.values()]:
            if hasattr(part, "init_non_persistent_buffers"):  # tables that are no weights; timm fills them anew
                part.init_non_persistent_buffers()
    assert torch.equal(chain(empty, images()), expected)
    doubled = [stage.to(torch.float64) for stage in copy.deepcopy(stages)]
    assert chain(doubled, images().double()).dtype == torch.float64
    # a later stage on its own takes along what it borrows from the first
    alone = copy.deepcopy(stages[1]).to(torch.float64)
    assert torch.equal(alone(doubled[0](images().double())), chain(doubled, images().double()))

    # one stage's file loads into the whole model by name, and no other stage's
    assert split(tiny(family, seed=5), [1, 3])[1].load_state_dict(states[1])
    with pytest.raises(RuntimeError, match="Missing key"):
        stages[1].load_state_dict(states[0])


@every_family
@torch.no_grad()
def test_half_precision_of_the_stages_is_that_of_the_model(family):
    model = tiny(family)
    stages = [copy.deepcopy(stage).to(torch.bfloat16) for stage in split(model, [1, 3])]
    expected = taught(model.to(torch.bfloat16), images().bfloat16())
    assert torch.equal(chain(stages, images().bfloat16()), expected)


def test_a_new_head_on_the_last_stage_survives_assembly():
    stages = split(tiny("vit"), [2, 2])
    stages[-1].reset_classifier(9)
    assembled = assemble(stages)
    assert assembled.num_classes == 9
    assert assembled(images()).shape == (2, 9)


def test_stages_and_model_do_not_share_registries():
    model = tiny("vit")
    stages = split(model, [2, 2])
    stages[0].register_forward_hook(lambda module, arguments, output: output * 0)
    stages[0].extra = torch.nn.Linear(2, 2)
    assert not model._forward_hooks and not stages[1]._forward_hooks
    assert not hasattr(model, "extra") and not hasattr(stages[1], "extra")
    block = shallow_copy(model.blocks[0])
    block.norm1 = torch.nn.Identity()
    assert isinstance(model.blocks[0].norm1, torch.nn.LayerNorm)


@pytest.mark.parametrize("depths", [[2, 1], [3, 2], [4, 0], [], [5, -1]])
def test_depths_that_do_not_fit(depths):
    with pytest.raises(ValueError, match="do not split 4 blocks"):
        split(tiny("vit"), depths)


def test_stages_that_make_no_model():
    stages = split(tiny("vit"), [1, 2, 1])
    for wrong in ([], stages[:2], stages[1:], [stages[0], stages[2]], [stages[1], stages[0], stages[2]]):
        with pytest.raises(ValueError, match="do not make one model"):
            assemble(wrong)
    with pytest.raises(ValueError, match="different models"):
        assemble([*stages[:2], split(tiny("deit distilled"), [3, 1])[1]])
