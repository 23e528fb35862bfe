"""run.compile: what is compiled, that names and results stay, and what is said without a compiler."""

from dataclasses import replace

import pytest
import torch

from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig
from tests.close import assert_close_by_size
from trainer.distributed.engine import compile_blocks
from trainer.plan import preflight

TINY = VMoEConfig(
    image_size=16,
    patch_size=8,
    width=16,
    depth=2,
    heads=2,
    mlp_dim=24,
    num_classes=5,
    moe_blocks="1",
    moe=MoEConfig(num_experts=4, k=2),
)


def test_attention_and_dense_mlps_are_compiled_and_compute_the_same():
    plain, compiled = VMoE(TINY), VMoE(replace(TINY))
    torch.nn.init.normal_(plain.head.weight)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled, backend="eager")
    done = [name for name, module in compiled.named_modules() if module._compiled_call_impl is not None]
    assert done == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"]
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 16, 16)
    for model in (plain, compiled):
        model(images).square().sum().backward()
    assert_close_by_size(compiled(images), plain(images))
    for name, parameter in plain.named_parameters():
        assert_close_by_size(compiled.get_parameter(name).grad, parameter.grad, what=name)


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler was found \(looked for no-such-compiler\)"):
        preflight._check_compiler()
    monkeypatch.setenv("CXX", "true")  # any program will do
    preflight._check_compiler()
