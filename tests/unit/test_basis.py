"""The shared basis of a border, stitches started from it or tied to it, and what folding makes of stitches."""

import pytest
import torch
from torch import nn
from vit_families import images, scramble

from models.modules.basis import Basis, Embed, Project, from_tensors, projection, shared_bases, to_tensors
from models.modules.stitch import StudentModule, assemble_student, build_student_modules, fold
from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig
from trainer.teaching.bases import load

TEACHER_WIDTH, WIDTH = 24, 16


def student(**changes) -> VMoE:
    values = {"image_size": 32, "patch_size": 8, "width": WIDTH, "depth": 4, "heads": 2, "mlp_dim": 20}
    values |= {"num_classes": 5, "moe_blocks": "1,3", "moe": MoEConfig(num_experts=3, k=2), **changes}
    model = VMoE(VMoEConfig(**values)).eval()
    scramble(model)
    return model


def sums_of(vectors_ND):
    x = vectors_ND.double()
    return torch.tensor(float(len(x))), x.sum(0), x.T @ x


def measured(vectors_ND) -> Basis:
    return shared_bases([sums_of(vectors_ND)])[0]


def bases(count: int) -> list[Basis]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(3, 0.1, TEACHER_WIDTH)
    return shared_bases(
        [sums_of(torch.randn(500, TEACHER_WIDTH, generator=generator) * scale + b) for b in range(count)]
    )


def chain(modules, x):
    for module in modules:
        x = module(x)
    return x


def test_principal_components_by_hand():
    basis = measured(torch.tensor([[1.0, 0.0], [5.0, 3.0], [1.0, 3.0], [5.0, 0.0]]))  # spread 2 along x, 1.5 along y
    assert torch.allclose(basis.mean, torch.tensor([3.0, 1.5]))
    assert torch.allclose(basis.variance, torch.tensor([4.0, 2.25]))
    assert torch.allclose(basis.directions.abs(), torch.eye(2), atol=1e-6)
    assert basis.explained(1) == pytest.approx(4 / 6.25)


def test_components_agree_with_torchs_pca():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    basis, (_, scale, directions) = measured(x), torch.pca_lowrank(x, q=6)
    assert torch.allclose(basis.variance, scale.square() / 300, rtol=1e-4)
    assert torch.allclose((basis.directions * directions).sum(0).abs(), torch.ones(6), atol=1e-4)
    mean, leading = basis.leading(2)
    lost = (x - mean) - (x - mean) @ leading @ leading.T
    assert float(lost.square().sum() / (x - mean).square().sum()) == pytest.approx(1 - basis.explained(2), abs=1e-5)


def test_borders_share_their_directions_and_none_outweighs_the_others():
    """Large states that spread along y, small ones that spread far more along x: x comes first, in both."""
    large = torch.tensor([[100.0, 0.0], [100.0, 60.0], [140.0, 60.0], [140.0, 0.0]])
    small = torch.tensor([[0.0, 0.0], [0.8, 0.01], [0.0, 0.01], [0.8, 0.0]])
    first, second = shared_bases([sums_of(large), sums_of(small)])
    assert torch.equal(first.directions, second.directions)
    assert torch.allclose(first.directions, torch.eye(2), atol=1e-6)
    assert torch.allclose(first.variance, torch.tensor([400.0, 900.0]))
    assert torch.allclose(second.variance, torch.tensor([0.16, 2.5e-5]), rtol=1e-3)
    assert torch.allclose(first.mean, torch.tensor([120.0, 30.0]))


def test_file_and_refusals():
    saved = to_tensors(bases(2))
    loaded = from_tensors(saved, borders=2, width=TEACHER_WIDTH)
    assert all(torch.equal(a.directions, b.directions) for a, b in zip(loaded, bases(2)))
    with pytest.raises(ValueError, match=r"0\.mean is missing, not of shape"):
        from_tensors(saved, borders=2, width=TEACHER_WIDTH + 1)
    with pytest.raises(ValueError, match=r"2\.mean is missing"):
        from_tensors(saved, borders=3, width=TEACHER_WIDTH)
    with pytest.raises(ValueError, match=r"student\.width is 25, the teacher's 24"):
        bases(1)[0].leading(25)


def test_a_single_module_has_no_border(tmp_path):
    assert load(tmp_path, borders=0, width=TEACHER_WIDTH) == []
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path, borders=1, width=TEACHER_WIDTH)


@torch.no_grad()
def test_tied_stitches_cancel_out():
    model = student()
    modules = build_student_modules(model, [1, 2, 1], TEACHER_WIDTH, kind="tied", bases=bases(2))
    assert modules[0](images()).shape == (2, 17, TEACHER_WIDTH)
    z = torch.randn(2, 17, WIDTH)
    assert torch.allclose(modules[1].pre(modules[0].post(z)), z, atol=1e-5)
    assert torch.allclose(chain(modules, images()), model(images()), atol=1e-4)
    for way in ("drop", "keep", "fold"):
        assert torch.equal(assemble_student(modules, way)(images()), model(images()))
    assert not list(modules[0].post.parameters()) and not modules[0].post.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("of_buffers", [torch.float32, torch.bfloat16])
def test_tied_stitches_in_bfloat16(of_buffers):
    first, second = build_student_modules(student(), [2, 2], TEACHER_WIDTH, kind="tied", bases=bases(1))
    z = torch.randn(2, 17, WIDTH).bfloat16()
    sent = first.post.to(of_buffers)(z)
    assert sent.dtype == torch.bfloat16
    assert (second.pre.to(of_buffers)(sent) - z).abs().max() < 0.1


@torch.no_grad()
def test_tied_stitches_of_equal_width_are_not_run():
    """They would multiply by the identity; everything else is as with stitches that do."""
    model = student(width=TEACHER_WIDTH)
    modules = build_student_modules(model, [2, 2], TEACHER_WIDTH, kind="tied", bases=bases(1))
    assert type(modules[0].post) is type(modules[1].pre) is nn.Identity
    assert type(projection(bases(1)[0], TEACHER_WIDTH)) is nn.Identity
    mean, directions = bases(1)[0].leading(TEACHER_WIDTH)
    before = StudentModule(modules[0].stage, None, Embed(mean, directions))
    after = StudentModule(modules[1].stage, Project(mean, directions), None)
    assert [list(module.state_dict()) for module in modules] == [list(before.state_dict()), list(after.state_dict())]
    border = before(images())
    assert torch.equal(modules[0](images()), border)
    assert torch.equal(modules[1](border), after(border))
    for way in ("drop", "keep", "fold"):
        assembled = assemble_student(modules, way)
        assert torch.equal(assembled(images()), model(images()))
        assert assembled.config.stitch_blocks is None


@torch.no_grad()
def test_stitches_started_from_the_basis_are_the_tied_ones_and_learn():
    tied = build_student_modules(student(), [2, 2], TEACHER_WIDTH, kind="tied", bases=bases(1))
    started = build_student_modules(student(), [2, 2], TEACHER_WIDTH, kind="pca", bases=bases(1))
    assert torch.allclose(chain(tied, images()), chain(started, images()), atol=1e-4)
    assert [tuple(p.shape) for p in started[0].post.parameters()] == [(24, 16), (24,)]


@torch.no_grad()
def test_fold_of_linear_maps_is_exact(tmp_path):
    modules = build_student_modules(student(), [2, 2], TEACHER_WIDTH, kind="pca", bases=bases(1))
    scramble(modules[0].post)
    scramble(modules[1].pre)
    expected = chain(modules, images())
    assert not torch.allclose(assemble_student(modules, "drop")(images()), expected, atol=1e-2)
    for way in ("fold", "keep"):
        folded = assemble_student(modules, way)
        assert torch.allclose(folded(images()), expected, atol=1e-4)
    folded.save_pretrained(tmp_path)
    loaded = VMoE.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(loaded(images()), folded(images()))
    assert isinstance(loaded.blocks[2].stitch, nn.Linear)


@torch.no_grad()
def test_fold_of_stitches_with_layer_norm_is_the_least_squares_fit():
    modules = build_student_modules(student(), [2, 2], TEACHER_WIDTH)
    post, pre = modules[0].post, modules[1].pre
    scramble(post)
    scramble(pre)
    states = torch.randn(400, WIDTH) + 1
    wanted, folded = pre(post(states)), fold(post, pre, states)
    ones = torch.cat([states, torch.ones(400, 1)], 1)
    best = (ones @ torch.linalg.lstsq(ones, wanted).solution - wanted).square().sum()
    assert float((folded(states) - wanted).square().sum()) == pytest.approx(float(best), rel=1e-3)
    assert float(best) < 0.5 * float((wanted - wanted.mean(0)).square().sum())
    with pytest.raises(ValueError, match="needs states"):
        assemble_student(modules, "fold")


def test_plans_need_no_basis_but_widths_that_fit():
    with torch.device("meta"):
        modules = build_student_modules(student_on_meta(WIDTH), [2, 2], TEACHER_WIDTH, kind="tied")
        assert modules[0].post(torch.empty(2, 17, WIDTH)).shape == (2, 17, TEACHER_WIDTH)
        with pytest.raises(ValueError, match=r"student\.width is 32, the teacher's 24"):
            build_student_modules(student_on_meta(32), [2, 2], TEACHER_WIDTH, kind="pca")
        with pytest.raises(ValueError, match=r"'glue' are not one of linear, pca, tied"):
            build_student_modules(student_on_meta(WIDTH), [2, 2], TEACHER_WIDTH, kind="glue")


def student_on_meta(width: int) -> VMoE:
    sizes = {"image_size": 32, "patch_size": 8, "depth": 4, "heads": 2, "mlp_dim": 20, "num_classes": 5}
    return VMoE(VMoEConfig(width=width, **sizes))
