"""DeepSpeed's form of the model on two gloo ranks against the plain one: outputs, losses, gradients, weights."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from models.experts.guided_routing import Guide, teacher_routers
from models.flops import forward_flops
from models.modules.stages import split
from models.modules.tokens import Rope
from models.moe.layer import MoEConfig
from models.moe.out import auxiliary_loss
from models.moe.out import routing_metrics as metrics_of
from models.moe.parallel import expert_parallel, full_state_dict, load_full_state_dict
from models.moe.similarity import expert_similarity
from models.vmoe.model import VMoE, VMoEConfig
from tests.close import assert_close_by_size

WORLD = 2
TINY = VMoEConfig(
    image_size=16,
    patch_size=8,
    width=16,
    depth=3,
    heads=2,
    mlp_dim=24,
    num_classes=5,
    moe_blocks="1,2",
    seed=4,
    drop_rate=0.1,
    drop_path_rate=0.2,
)
ROUTINGS = {
    "k1-dropless": MoEConfig(num_experts=4, k=1, noise_std=1.0, renormalize=False),
    "k2-dropless": MoEConfig(num_experts=4, k=2, noise_std=1.0, router_bias=True, dropout=0.2),
    "k1-capacity": MoEConfig(num_experts=4, k=1, capacity_factor=1.0, capacity_multiple=1, renormalize=False),
    "k2-capacity": MoEConfig(
        num_experts=4,
        k=2,
        capacity_factor=0.75,
        images_per_group=2,
        batch_priority=True,
        dropout=0.3,
        eval_capacity_factor=0.75,
    ),
    "k2-swiglu": MoEConfig(num_experts=4, k=2, noise_std=1.0, dropout=0.2),
}
OPTIONS = {
    "k2-swiglu": {
        "swiglu": True,
        "layer_scale": 0.5,
        "rope": Rope(),
        "class_token": False,
        "reg_tokens": 1,
        "pool": "mean",
    }
}


def build(routing: str) -> VMoE:
    model = VMoE(replace(TINY, moe=ROUTINGS[routing], **OPTIONS.get(routing, {})))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def step(model: VMoE, images: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits, loss and routing metrics of one training step; backward included."""
    torch.manual_seed(10 + rank)  # routing noise, drop path and the experts' dropout of this rank's images
    out = {}
    logits = model.train()(images, out)
    loss = logits.square().sum() + auxiliary_loss(out)
    loss.backward()
    return logits, loss, metrics_of(out)


def compare(routing: str, ep_size: int, recompute: bool) -> None:
    rank = dist.get_rank()
    batches = torch.randn(WORLD, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain, parallel = build(routing), build(routing)
    experts = dict(parallel.blocks[1].mlp.experts.named_parameters())
    assert expert_parallel(parallel, ep_size) is parallel
    held = dict(parallel.blocks[1].mlp.deepspeed_moe.experts.deepspeed_experts.named_parameters())
    assert len(held) == len(experts) // ep_size
    assert all(any(p is mine for p in experts.values()) for mine in held.values())
    assert all(p.allreduce is False and p.group_name == f"ep_size_{ep_size}" for p in held.values())

    parallel.set_grad_checkpointing(recompute)
    logits, loss, metrics = step(parallel, batches[rank], rank)
    assert list(metrics) == ["blocks.1.mlp", "blocks.2.mlp"]
    expected = {}
    for source in range(WORLD):
        expected[source] = build(routing)
        wanted, wanted_loss, wanted_metrics = step(expected[source], batches[source], source)
        if source == rank:
            assert_close_by_size(logits, wanted)
            assert_close(loss, wanted_loss, rtol=1e-6, atol=1e-6)
            for name, values in wanted_metrics.items():
                assert_close(metrics[name], values, rtol=0, atol=1e-6)
    dropped = any(values["kept"] < 1 for values in metrics.values())
    assert dropped == (ROUTINGS[routing].capacity_factor is not None)

    first = rank * 4 // ep_size if ep_size > 1 else 0
    for name, parameter in parallel.named_parameters():
        if ".deepspeed_experts." in name:  # with ep 2 an expert saw the tokens of both ranks
            before, after = name.split(".deepspeed_moe.experts.deepspeed_experts.")
            local, rest = after.split(".", 1)
            plain_name = f"{before}.experts.{first + int(local)}.{rest}"
            sources = range(WORLD) if ep_size > 1 else [rank]
        else:
            plain_name, sources = name.replace(".deepspeed_moe.gate", ""), [rank]
        gradient = sum(expected[source].get_parameter(plain_name).grad for source in sources)
        assert_close_by_size(parameter.grad, gradient, what=name)

    state = full_state_dict(parallel)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    changed = {name: value + torch.randn_like(value) for name, value in state.items()} if rank == 0 else state
    changed = broadcast(changed)
    load_full_state_dict(parallel, changed)
    assert all(torch.equal(value, changed[name]) for name, value in full_state_dict(parallel).items())
    load_full_state_dict(plain, changed)
    with torch.no_grad():
        assert_close_by_size(parallel.eval()(batches[rank]), plain.eval()(batches[rank]))
        uneven = batches[rank][: 4 - 3 * rank]  # in evaluation the last images leave ranks with less than others
        assert_close_by_size(parallel(uneven), plain(uneven))
    with pytest.raises(ValueError, match=r"experts\.3\.fc2\.bias"):
        load_full_state_dict(parallel, {k: v for k, v in changed.items() if k != "blocks.1.mlp.experts.3.fc2.bias"})


def broadcast(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    holder = [state]
    dist.broadcast_object_list(holder)
    return holder[0]


def train_in_deepspeed(folder: Path, routing: str) -> None:
    """Two ZeRO-1 steps at ep 2 are two plain steps on the mean loss of both ranks; the result loads as plain."""
    import deepspeed

    rank, lr = dist.get_rank(), 0.05
    batches = torch.randn(2, WORLD, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    plain, parallel = build(routing), expert_parallel(build(routing), 2)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": lr}},
    }
    engine, *_ = deepspeed.initialize(model=parallel, model_parameters=list(parallel.parameters()), config=config)
    sgd = torch.optim.SGD(plain.parameters(), lr=lr)
    for number, images in enumerate(batches):
        torch.manual_seed(10 * number + rank)
        out = {}
        engine.backward(engine(images[rank], out).square().mean() + auxiliary_loss(out))
        engine.step()
        for source in range(WORLD):
            torch.manual_seed(10 * number + source)
            out = {}
            ((plain.train()(images[source], out).square().mean() + auxiliary_loss(out)) / WORLD).backward()
        sgd.step()
        sgd.zero_grad()
    state = full_state_dict(parallel)
    for name, value in plain.state_dict().items():
        assert_close_by_size(state[name], value, what=name)
    assert not torch.equal(
        state["blocks.1.mlp.experts.3.fc2.weight"], build(routing).state_dict()["blocks.1.mlp.experts.3.fc2.weight"]
    )
    with pytest.raises(ValueError, match="full_state_dict"):
        parallel.save_pretrained(folder)
    if rank == 0:
        parallel.save_pretrained(folder, state=state)
        loaded = VMoE.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in state.items())
    engine.destroy()


def guide_and_measure(routing: str, ep_size: int, recompute: bool) -> None:
    """Teacher-guided routing and the similarity of the experts are those of the plain model."""
    rank = dist.get_rank()
    images = torch.randn(WORLD, 4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    (teacher,) = split(VMoE(replace(TINY, moe_blocks="none", seed=9)).eval(), [TINY.depth])
    plain, parallel = build(routing), build(routing)
    routers = teacher_routers(teacher, plain, images, {1: 0, 2: 2}, 4, seed=0)
    guide = Guide(routers, teacher, weight=2.0)
    flops = forward_flops(plain, 5)
    assert forward_flops(parallel, 5) == flops
    expert_parallel(parallel, ep_size).set_grad_checkpointing(recompute)
    assert forward_flops(parallel, 5) == flops  # also of the experts that lie on other ranks
    beside = {}
    with torch.no_grad():
        teacher(images[rank], beside, guide.sources)
    targets = guide.targets(beside)
    losses = []
    for model in (plain, parallel):
        out = {}
        torch.manual_seed(rank)
        logits = model.train()(images[rank], out)
        loss = guide.loss(out, targets)
        (logits.sum() + loss).backward()
        losses.append(loss.detach())
    assert_close(losses[1], losses[0])
    for block in (1, 2):
        wanted = plain.blocks[block].mlp.router.weight.grad
        assert wanted.norm(dim=1).min() > 0
        assert_close(parallel.blocks[block].mlp.deepspeed_moe.gate.router.weight.grad, wanted, rtol=1e-5, atol=1e-6)
    similarity = expert_similarity(plain)
    assert similarity.keys() == {"blocks.1.mlp", "blocks.2.mlp"} and max(map(abs, similarity.values())) < 0.5
    assert expert_similarity(parallel) == pytest.approx(similarity, abs=1e-6)


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.ops

    # this operator only serves an inference all-reduce, and compiling it takes most of a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for routing in ROUTINGS:
        for ep_size in (1, 2):
            compare(routing, ep_size, recompute=False)
    for routing in ("k2-dropless", "k2-swiglu"):
        compare(routing, 2, recompute=True)
    for routing, ep_size in (("k2-dropless", 1), ("k2-dropless", 2), ("k2-swiglu", 2)):
        guide_and_measure(routing, ep_size, recompute=ep_size == 2)
    with pytest.raises(ValueError, match="does not divide the world size 2"):
        expert_parallel(build("k1-dropless"), 3)
    for routing in ("k2-dropless", "k2-swiglu"):
        train_in_deepspeed(Path(folder, routing), routing)
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_plain_model_computes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=WORLD)
