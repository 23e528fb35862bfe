"""Real launches from what somebody else trained: one rank's experts, train.init at ep 1 and 2, a teaching pair.

What is refused: tests/unit/test_reuse.py. The function without test_ in its name runs on the ranks.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from safetensors.torch import load_file

from models.files import hub
from models.moe.layer import MoEConfig
from models.moe.parallel import expert_parallel
from models.vmoe.model import VMoE, VMoEConfig, load_expert_parallel
from tests.close import assert_close_by_size
from tests.launch import TINY
from trainer.distributed.ranks import start

SHORT = [*TINY, "teacher.epochs=1", "teacher.warmup_epochs=0", "meta.epochs=1", "distill.epochs=1", "train.epochs=1",
         "train.baselines=[]"]  # fmt: skip
# experts are most of it, and far larger than what the kernel reads ahead
LARGE = VMoEConfig(image_size=16, patch_size=8, width=128, depth=2, heads=2, mlp_dim=1024, num_classes=5,
                   moe_blocks="all", moe=MoEConfig(num_experts=8, k=2, eval_capacity_factor=None))  # fmt: skip


def resident(folder: str) -> int:
    """Bytes of a folder's files that this process has touched, by the kernel's account."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(1024 * int(re.search(r"^Rss: +(\d+)", text, re.M)[1]) for text in mappings if f"{folder}/" in text)


def half_of_the_experts(folder: str) -> None:
    """A rank reads its own experts only, and both together compute what the plain model computes."""
    dist, asked = start(), []
    read = hub.Weights.read
    hub.Weights.read = lambda self, name: asked.append((name, tensor := read(self, name))) or tensor
    model = load_expert_parallel(folder, ep_size=2, ep_rank=dist.rank)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    experts = {name: p.nbytes for name, p in model.named_parameters() if ".experts." in name}
    shared = sum(p.nbytes for name, p in model.named_parameters() if name not in experts)
    assert sum(tensor.nbytes for _, tensor in asked) == shared + sum(experts.values()) // 2
    mine = {name for name, _ in asked if name in experts}
    first = range(4 * dist.rank, 4 * dist.rank + 4)
    assert mine == {name for name in experts if int(name.split(".")[4]) in first}
    assert 0.4 * size < resident(folder) < 0.6 * size
    asked.clear()
    images = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))[dist.rank]
    with torch.inference_mode():
        logits = expert_parallel(model, 2).eval()(images)
        assert not any(p.is_meta for p in model.parameters())
        assert_close_by_size(logits, VMoE.from_pretrained(folder)(images))
    torch_dist.barrier()


@pytest.mark.parametrize("max_shard_size", ["5GB", "3MB"])
def test_two_ranks_read_half_of_the_experts_each(warm, tmp_path, max_shard_size):
    model = VMoE(LARGE)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    function = f"tests.integration.test_reuse_launches:{half_of_the_experts.__name__}"
    finished = warm.call(function, str(tmp_path), ranks=2)
    assert finished.code == 0, finished.output


@pytest.fixture(scope="module")
def donor(warm, tmp_path_factory):
    """A finished run of two ranks."""
    out = tmp_path_factory.mktemp("donor") / "run"
    finished = warm.run([*SHORT, "--phase", "all", "--out", out], ranks=2)
    assert finished.code == 0, finished.output
    return out


def weights(out: Path, name: str = "train") -> dict[str, torch.Tensor]:
    return load_file(out / name / "model.safetensors")


def test_training_starts_from_a_saved_model_at_any_ep_size(warm, donor, tmp_path):
    ends = []  # by plain SGD: Adam makes a step of a gradient that is only rounding
    for ep_size in (1, 2):
        out = tmp_path / f"ep{ep_size}"
        arguments = [*SHORT, f"teacher.source={donor / 'teacher'}", f"train.init={donor / 'train'}",
                     f"ds.trainer.ep_size={ep_size}", "train.optimizer=sgd", "--phase", "train",
                     "--out", out]  # fmt: skip
        finished = warm.run(arguments, ranks=2)
        assert finished.code == 0, finished.output
        result = json.loads((out / "train/result.json").read_text())
        assert (result["init"], result["ep_size"]) == (str(donor / "train"), ep_size)
        ends.append(weights(out))
    for name in ends[0]:
        assert_close_by_size(ends[1][name], ends[0][name], what=name)
    assert not torch.equal(ends[0]["head.weight"], weights(donor)["head.weight"])
    arguments[arguments.index(out)] = tmp_path / "other"
    finished = warm.run([*arguments, "student.moe.k=1"], ranks=2)
    assert finished.code == 2 and "has moe.k 2, but 1 is asked for" in finished.output


def test_a_pair_that_is_reused_gives_the_same_student(warm, donor, tmp_path):
    out = tmp_path / "run"
    sources = [f"{name}.source={donor}" for name in ("meta", "distill")]
    finished = warm.run([*SHORT, f"teacher.source={donor / 'teacher'}", *sources, "--phase", "all", "--out", out],
                        ranks=2)  # fmt: skip
    assert finished.code == 0, finished.output
    assert f"{out / 'distill_1'} was taken from {donor / 'distill_1'}" in finished.output
    assert not (out / "meta/metrics.jsonl").exists()
    for name in ("meta", "distill_0", "distill_1", "train"):
        taken, given = weights(out, name), weights(donor, name)
        assert all(torch.equal(taken[key], given[key]) for key in given), name
    finished = warm.run([*SHORT, "modules=3", f"teacher.source={donor / 'teacher'}", f"meta.source={donor}",
                         "--phase", "meta", "--out", tmp_path / "other"], ranks=2)  # fmt: skip
    assert finished.code == 2 and "modules is 2 there, 3 here" in finished.output
