"""Teacher-guided routing: the loss worked by hand, routers from features of known clusters, who gets a gradient."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.experts.guided_routing import (
    Guide,
    TeacherRouters,
    _numbers,
    guided_routing_loss,
    matching_blocks,
    teacher_routers,
    teacher_routers_flops,
)
from models.flops import forward_flops
from models.modules.stages import run_blocks, split
from models.modules.stitch import build_student_modules
from models.moe.layer import MoE, MoEConfig
from models.moe.out import auxiliary_loss, inside
from models.vmoe.model import VMoE, VMoEConfig

STUDENT = VMoEConfig(image_size=16, patch_size=8, width=16, depth=4, heads=2, mlp_dim=24, num_classes=5,
                     moe_blocks="1,2,3", moe=MoEConfig(num_experts=3, k=1, noise_std=1.0), seed=4)  # fmt: skip
TEACHER = VMoEConfig(image_size=16, patch_size=8, width=32, depth=8, heads=2, mlp_dim=48, num_classes=5,
                     moe_blocks="none", seed=1)  # fmt: skip
SOURCES = {1: 3, 2: 5, 3: 7}  # two modules of two student blocks and four teacher blocks each


def images(count=6, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batches(count=4):
    return [images(seed=n) for n in range(count)]


def whole(teacher):
    """A teacher as one stage of all its blocks, as teacher_routers takes it."""
    return split(teacher, [len(teacher.blocks)])[0]


def routers_of(teacher, student=None):
    return teacher_routers(whole(teacher), student or VMoE(STUDENT), batches(), SOURCES, 3, seed=0)


def targets_of(guide, teacher, x):
    """The guide's targets beside a forward of the teacher."""
    beside = {}
    with torch.no_grad():
        teacher(x, beside, guide.sources)
    return guide.targets(beside)


class Blocks(torch.nn.Module):
    """A teacher whose block b adds b to what it is given."""

    def __init__(self, count):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(Add(b) for b in range(count)))

    def forward(self, x, out, states):
        return run_blocks(dict(self.blocks.named_children()), x, False, out, states)


class Add(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


class Chosen(torch.nn.Module):
    """A student whose block b sends direction d of the four to expert experts[b][d]."""

    def __init__(self, experts):
        super().__init__()
        self.blocks = torch.nn.ModuleList([MoE(4, 3, MoEConfig(num_experts=3, k=1)) for _ in experts])
        for block, numbers in zip(self.blocks, experts):
            block.router.weight.data.zero_()
            block.router.weight.data[numbers, range(3)] = 1.0

    def forward(self, x, out):
        return [block(x, inside(out, "blocks", str(number))) for number, block in enumerate(self.blocks)]


def test_the_loss_by_hand():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([MoE(2, 3, MoEConfig(num_experts=2, k=1)) for _ in range(2)])
    x_BTD = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one image of two tokens
    out = {}
    weights = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    for number, (block, weight) in enumerate(zip(model.blocks, weights)):
        block.router.weight.data.copy_(weight)
        block(x_BTD, inside(out, "blocks", str(number)))
    # shares of the routers: block 0 (3/4, 1/4) and (1/2, 1/2); block 1 (1/2, 1/2) twice
    targets = {0: torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), 1: torch.tensor([[[0.25, 0.75], [0.0, 1.0]]])}
    # KL: ln 4/3 and 0; .25 ln .5 + .75 ln 1.5 and ln 2
    first = (math.log(4 / 3) + 0) / 2
    second = (0.25 * math.log(0.5) + 0.75 * math.log(1.5) + math.log(2)) / 2
    assert guided_routing_loss(out, targets).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_targets_are_cosines_with_the_centroids_over_the_temperature():
    mean = torch.tensor([1.0, 1.0])
    routers = TeacherRouters({2: 5}, [mean], [torch.eye(2)], [0.5])
    feature = torch.tensor([[[4.0, 5.0]]])  # minus the mean (3, 4): cosines .6 and .8
    wanted = torch.tensor([[[0.6 / 0.5, 0.8 / 0.5]]]).softmax(-1)
    assert_close(routers({5: feature, 1: feature})[2], wanted)
    assert routers({1: feature}) == {}
    assert routers.flops_per_image(7) == 2 * 7 * 2 * 2


def test_clusters_of_the_teacher_become_the_targets():
    """Tokens of three directions: each is a cluster, found in the output of the right block, and told apart."""
    directions = torch.eye(4)[:3] * 10
    label = torch.randint(3, (8, 5), generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(1))
    tokens = directions[label] + noise
    student = Chosen([[0, 1, 2], [2, 0, 1]])
    routers = teacher_routers(Blocks(4), student, tokens.split(3), {0: 1, 1: 3}, 3, seed=0)
    assert_close(routers.mean_LD[1] - routers.mean_LD[0], torch.full((4,), 5.0))  # blocks 2 and 3 add 5
    targets = routers({1: tokens + 1, 3: tokens + 6})
    # clusters carry the numbers of the experts the student chooses: those above
    assert torch.equal(targets[0].argmax(-1), label)
    assert torch.equal(targets[1].argmax(-1), torch.tensor([2, 0, 1])[label])
    for target in targets.values():
        entropy = torch.special.entr(target).sum(-1).mean() / math.log(3)
        assert float(entropy) == pytest.approx(0.5, abs=0.05)
    again = teacher_routers(Blocks(4), student, tokens.split(3), {0: 1, 1: 3}, 3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(routers.buffers(), again.buffers()))


def test_one_module_is_guided_by_the_routers_the_whole_has():
    teacher = VMoE(TEACHER).eval()
    student = VMoE(STUDENT)
    module = build_student_modules(student, [2, 2], 32)[1].train()
    part = teacher_routers(whole(teacher), module, batches(), {2: 5, 3: 7}, 3, seed=0, entry=3)
    assert_close(part.mean_LD, routers_of(teacher, student).mean_LD[1:], rtol=0, atol=0)
    assert module.training
    with torch.device("meta"):  # a student whose experts lie on other ranks is not run
        elsewhere = VMoE(STUDENT)
    unaligned = teacher_routers(whole(teacher), elsewhere, batches(), SOURCES, 3, seed=0)
    wanted = [{tuple(row) for row in part.centroid_LED[place].tolist()} for place in range(2)]
    assert wanted == [{tuple(row) for row in unaligned.centroid_LED[place].tolist()} for place in (1, 2)]


def test_every_expert_gets_one_cluster_the_surest_pair_first():
    # cluster 1 meets expert 0 most; then cluster 0, which would have liked expert 0 too, gets expert 2
    assert _numbers(torch.tensor([[5.0, 1.0, 4.0], [9.0, 8.0, 0.0], [0.0, 2.0, 3.0]])) == [1, 2, 0]


def test_matching_blocks_end_at_the_same_share_of_their_module():
    student = VMoE(STUDENT)
    assert matching_blocks(student, [2, 2], [4, 4]) == SOURCES
    assert matching_blocks(student, [3, 1], [2, 6]) == {1: 1, 2: 1, 3: 7}
    modules = build_student_modules(student, [2, 2], 32)
    assert matching_blocks(modules[1], [2, 2], [4, 4]) == {2: 5, 3: 7}
    with pytest.raises(ValueError, match=r"block 3 .* beyond its depths \[1, 2\]"):
        matching_blocks(student, [1, 2], [4, 4])
    with pytest.raises(ValueError, match="no MoE block here"):
        matching_blocks(VMoE(TEACHER), [8], [8])


@pytest.mark.parametrize("recompute", [False, True])
def test_every_row_of_every_router_gets_a_gradient(recompute):
    teacher, student = VMoE(TEACHER).eval(), VMoE(STUDENT).train()
    student.set_grad_checkpointing(recompute)
    guide = Guide(routers_of(teacher), teacher, weight=2.0)
    # one token of one image: without guidance the other experts' scores hear nothing of it
    targets = targets_of(guide, teacher, images(2))
    out = {}
    torch.manual_seed(0)
    student(images(2), out)
    guide.loss(out, targets).backward()
    rows = torch.stack([student.blocks[b].mlp.router.weight.grad.norm(dim=1) for b in SOURCES])
    assert rows.shape == (3, 3) and rows.min() > 1e-5
    if recompute:
        return
    # clean logits: noise on the choice changes nothing of the loss where it changes no token's way before
    with torch.no_grad():
        hidden = student.norm_pre(student._pos_embed(student.patch_embed(images(2))))
        block = student.blocks[1]
        hidden = student.blocks[0](hidden)
        given = block.norm2(hidden + block.attn(block.norm1(hidden)))
        logits = F.linear(given, block.mlp.router.weight)
        wanted = F.kl_div(logits.log_softmax(-1), targets[1], reduction="none").sum(-1).mean()
        out = {}
        student(images(2), out)
        assert_close(guided_routing_loss(out, {1: targets[1]}), wanted)


def test_checkpointing_gives_the_same_gradients_beside_the_other_losses():
    teacher = VMoE(TEACHER).eval()
    routers, gradients = routers_of(teacher), []
    for recompute in (False, True):
        student = VMoE(STUDENT).train()
        student.set_grad_checkpointing(recompute)
        guide = Guide(routers, teacher, weight=1.0)
        for seed in (0, 1):  # two micro-batches of different images
            targets = targets_of(guide, teacher, images(seed=seed))
            torch.manual_seed(seed)
            out = {}
            logits = student(images(seed=seed), out)
            (logits.square().mean() + auxiliary_loss(out) + guide.loss(out, targets)).backward()
        gradients.append([p.grad for p in student.parameters()])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_module_is_guided_by_the_stage_that_runs_beside_it():
    teacher, student = VMoE(TEACHER).eval(), VMoE(STUDENT)
    routers = routers_of(teacher)
    stages, modules = split(teacher, [4, 4]), build_student_modules(student, [2, 2], 32)
    part = teacher_routers(
        whole(teacher), student, batches(), {2: 5, 3: 7}, 3, seed=0
    )  # numbered like the whole student's
    guide = Guide(part, stages[1], weight=1.0)
    with torch.no_grad():
        border = stages[0](images())
    targets = targets_of(guide, stages[1], border)
    assert targets.keys() == {2, 3}
    assert_close(targets[3], targets_of(Guide(routers, teacher, weight=1.0), teacher, images())[3])
    out = {}
    modules[1](border, out)
    assert float(guide.loss(out, targets).detach()) > 0


def test_what_does_not_fit_is_named():
    teacher, student = VMoE(TEACHER).eval(), VMoE(STUDENT)
    routers = routers_of(teacher)
    guide = Guide(routers, teacher, 1.0)
    targets = targets_of(guide, teacher, images(2))
    out = {}
    student(images(3), out)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(3, 5, 3\)"):
        guide.loss(out, targets)
    first = split(teacher, [7, 1])[0]
    with pytest.raises(ValueError, match=r"not \[7\]"):
        Guide(routers, first, 1.0)
    with pytest.raises(ValueError, match=r"not \[7\]"):
        teacher_routers(first, student, batches(), SOURCES, 3, seed=0)
    with pytest.raises(ValueError, match="2 points"):
        teacher_routers(Blocks(1), Chosen([[0, 1, 2]]), [torch.randn(1, 2, 4)], {0: 0}, 3, seed=0)


def test_logits_go_to_who_asks_and_a_guided_model_can_be_copied():
    layer = MoE(2, 3, MoEConfig(num_experts=2, k=1))
    out = {}
    layer(torch.randn(1, 2, 2), out)
    assert out["logits"].requires_grad and out["logits"].shape == (1, 2, 2)
    copy.deepcopy(layer)  # tensors with a graph cannot be copied
    del out["logits"], out["routing"]
    with pytest.raises(AssertionError, match="no guided block"):
        guided_routing_loss(out, {})


def test_flops_count_the_forwards_and_the_clusters():
    teacher, student = VMoE(TEACHER).eval(), VMoE(STUDENT)
    routers = routers_of(teacher, student)
    one = teacher_routers_flops(teacher, student, routers, 1, 5)
    assert teacher_routers_flops(teacher, student, routers, 10, 5) == 10 * one
    # 28 passes over 5 tokens in 3 blocks: 3 experts x 32 wide
    assert one - forward_flops(teacher, 5) - forward_flops(student, 5) == 28 * 2 * 5 * 3 * 3 * 32
