"""What a plan says, against figures worked by hand; what it proposes, refuses, and names as the way out."""

import json
import math
from dataclasses import replace

import pytest

from tests.launch import ROOT, TINY_RECIPE
from trainer.config.ds_config import read_ds_config
from trainer.config.gpus import GPUS, Gpu, parse, peak_flops
from trainer.config.load import load_recipe
from trainer.plan.estimate import estimate
from trainer.plan.footprint import footprint
from trainer.plan.planner import candidates, plan, propose, settings_of
from trainer.plan.stand_ins import planned_run
from trainer.plan.traffic import Collective, Layout, collectives, wire_bytes
from trainer.plan.work import Parameter, flat_groups, works
from trainer.run import main


@pytest.fixture(autouse=True)
def unchanged_logging(monkeypatch):
    """main() sets the whole process up, which is this one here."""
    monkeypatch.setattr("trainer.run.set_up_logging", lambda main: None)


IMAGENET = ["--recipe", str(ROOT / "recipes/vmoe_base_imagenet.yaml"), "--phase", "plan", "--images", "1281167"]
H200 = parse("h200")


@pytest.fixture(scope="module")
def imagenet():
    """Recipe and trainings of V-MoE-B from DeiT-III-L, on the meta device."""
    recipe = load_recipe(ROOT / "recipes/vmoe_base_imagenet.yaml")
    return recipe, works(planned_run(recipe, {}, ROOT / "unused", 1, 8, images=1_281_167, classes=1000))


def trained(imagenet, layout, **changes):
    """The estimate of end-to-end training, with some changes to a plain DeepSpeed JSON."""
    recipe, found = imagenet
    values = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**8},
        "trainer": {"ep_size": layout.ep_size},
    }
    work = found[-1]
    settings = settings_of(recipe, work, values | changes, layout)
    return estimate(work, settings, layout, H200, 1.0)


def test_memory_of_weights_and_moments_by_hand(imagenet):
    """V-MoE-B: 86.6 M dense parameters and in 12 blocks 8 experts; on 32 ranks, 8 of which share the experts."""
    layout = Layout(4, 8, ep_size=8)
    memory = trained(imagenet, layout).memory
    expert = 768 * 3072 * 2 + 3072 + 768
    experts = 12 * 8 * expert
    dense = 86_567_656 + 12 * (7 * 4_722_432 + 8 * 768) - experts  # as tests/unit/test_recipes.py has them
    assert memory.weights == 2 * (dense + experts / 8)
    # 4 bytes each: dense ones over 32 ranks, this rank's experts over the 4 that hold the same; ZeRO pads by a few
    assert memory.masters == pytest.approx(4 * (dense / 32 + experts / 8 / 4), abs=1000)
    assert memory.moments == 2 * memory.masters
    assert memory.gradients == memory.weights and memory.frozen == 0
    assert memory.buckets == 2 * 10**8 and memory.sent == min(2 * 10**8, memory.weights)
    assert memory.images == 2 * 32 * 3 * 224 * 224  # 1024 images on 32 ranks
    ends = memory.images + memory.gradients + memory.buckets + memory.sent
    assert memory.peak - memory.always >= ends


def test_zero_2_recomputation_and_the_host_take_less(imagenet):
    layout = Layout(1, 8, ep_size=1)
    plain = trained(imagenet, layout).memory
    small = {"stage": 2, "reduce_bucket_size": 10**7}
    partitioned = trained(imagenet, layout, zero_optimization=small).memory
    assert partitioned.gradients < plain.gradients / 4
    offloaded = trained(imagenet, layout, zero_optimization=small | {"offload_optimizer": {"device": "cpu"}}).memory
    assert offloaded.masters == offloaded.moments == offloaded.update == 0 < partitioned.masters
    recomputed = trained(imagenet, layout, trainer={"ep_size": 1, "activation_checkpointing": True})
    assert recomputed.memory.activations < plain.activations / 3
    assert recomputed.seconds.compute > trained(imagenet, layout).seconds.compute


def test_teacher_and_meta_model_lie_beside_a_module(imagenet):
    _, found = imagenet
    pair = found[1]
    assert pair.name == "distill_1" and [work.name for work in found][-1] == "train"
    teacher = 24 * 12_598_272 + 2_016_232
    module = 6 * 12_598_272  # the teacher's module beside the meta model, which is a copy of the teacher
    assert pair.frozen_numbers == pytest.approx(teacher + module, rel=0.01)


@pytest.mark.parametrize(
    ("collective", "layout", "expected"),
    [
        # all-reduce in a node: 2 n (p-1)/p
        (Collective("g", "all_reduce", "world", 8, 1, 800), Layout(1, 8), (1400, 0)),
        # over 2 nodes of 4: in the node 2 n 3/4; between nodes each of the 4 sends a quarter: 2 n/4 x 1/2
        (Collective("g", "all_reduce", "world", 8, 1, 800), Layout(2, 4), (1200, 200)),
        # the replicas of an expert lie one to a node where the experts fill it: all of it goes between nodes
        (Collective("g", "all_reduce", "replicas", 2, 1, 800), Layout(2, 4, ep_size=4), (0, 800)),
        (Collective("w", "all_gather", "replicas", 2, 1, 800), Layout(2, 4, ep_size=4), (0, 400)),
        # experts in a node: nothing leaves it; over both: 3 of 8 parts stay inside, 4 leave
        (Collective("t", "all_to_all", "experts", 4, 1, 800), Layout(2, 4, ep_size=4), (600, 0)),
        (Collective("t", "all_to_all", "experts", 8, 1, 800), Layout(2, 4, ep_size=8), (300, 400)),
        (Collective("g", "all_reduce", "replicas", 1, 1, 800), Layout(1, 4, ep_size=4), (0, 0)),
    ],
)
def test_bytes_inside_and_between_nodes_by_hand(collective, layout, expected):
    assert wire_bytes(collective, layout) == pytest.approx(expected)


def test_flat_groups_are_those_of_deepspeed():
    """Dense parameters first, then the experts of each group; other ranks' experts are gone, large groups are cut."""
    groups = [
        [Parameter(10, None), Parameter(4, 0), Parameter(4, 1), Parameter(4, 2)],
        [Parameter(3, None), Parameter(2, 0)],
    ]
    assert flat_groups(groups, local_experts=2) == [(10, False), (3, False), (8, True), (2, True)]
    large = [[Parameter(100_000_000, expert) for expert in range(3)]]
    assert flat_groups(large, local_experts=3) == [(100_000_000, True)] * 3


def test_flat_groups_of_a_model_are_deepspeeds_own(imagenet):
    """The real function, on the same parameters marked as an expert-parallel layer marks them."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from trainer.distributed.engine import parameter_groups

    _, found = imagenet
    module = found[-1].objective.module
    for layer in found[-1].moe_layers:
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name = False, "ep_size_1"
    real = split_params_into_different_moe_groups_for_optimizer(parameter_groups(module, 0.05))
    sizes = [(sum(p.numel() for p in group["params"]), bool(group.get("moe"))) for group in real if group["params"]]
    assert flat_groups(found[-1].groups, local_experts=8) == sizes
    assert len(sizes) > 4  # the experts of V-MoE-B are more than one group holds


def test_the_time_of_a_step_by_hand(imagenet):
    """Dense products at the share, the all-to-all exposed, gradients beside the backward pass where there is room."""
    gpu = Gpu(
        "round",
        tflops=1000,
        memory_gb=100,
        memory_gb_s=1000,
        node_gb_s=100,
        network_gb_s=10,
        source="a test",
        share=0.5,
        overlap=0.0,
        latency_us=0.0,
    )
    recipe, found = imagenet
    work, layout = found[-1], Layout(2, 8, ep_size=8)
    values = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "trainer": {"ep_size": 8}}
    settings = settings_of(recipe, work, values, layout)
    seconds = estimate(work, settings, layout, gpu, 1.0).seconds
    assert seconds.compute == pytest.approx(64 * work.objective.flops_per_image / 5e14)
    # 64 images x 197 tokens x 2 choices x 768 x 2 bytes, 4 times in 12 blocks, 7/8 of it to others by NVLink
    assert seconds.exchange == pytest.approx(4 * 12 * 64 * 197 * 2 * 768 * 2 * 7 / 8 / 1e11)
    moved = {each.what: wire_bytes(each, layout) for each in collectives(work, settings, layout)}
    apart = moved["gradients"], moved["gradients of experts"]
    assert seconds.gradients == pytest.approx(sum(inside / 1e11 + between / 1e10 for inside, between in apart))
    overlapping = values | {"zero_optimization": {"stage": 1, "overlap_comm": True}}
    settings = settings_of(recipe, work, overlapping, layout)
    assert estimate(work, settings, layout, replace(gpu, overlap=1.0), 1.0).seconds.gradients == 0


def test_hours_follow_from_steps(imagenet):
    found = trained(imagenet, Layout(1, 8))
    assert found.steps == 30 * (1_281_167 // 1024)
    assert found.gpu_hours == pytest.approx(8 * found.steps * found.seconds.total / 3600)


def test_a_proposal_fits_and_resolves(imagenet):
    recipe, found = imagenet
    layouts = dict.fromkeys(("distill", "train"), Layout(1, 8))
    tight = replace(H200, memory_gb=14)
    for gpu in (H200, tight):
        proposed = propose(recipe, found, layouts, gpu)
        assert proposed.peak <= gpu.usable_bytes
        assert plan(recipe, found, read_ds_config(proposed.ds_values), layouts, gpu).hours == proposed.hours
    # less memory costs time, and the way to less memory is taken
    assert proposed.hours >= propose(recipe, found, layouts, H200).hours
    assert proposed.ds_values["train_micro_batch_size_per_gpu"] < 128 or proposed.ds_values["trainer"]["ep_size"] > 1


def test_micro_batches_keep_groups_and_pairs_of_images_together():
    recipe = load_recipe(TINY_RECIPE)  # mixup pairs images, four are routed together, 16 a step
    found = works(planned_run(recipe, {}, ROOT / "unused", 1, 2, images=100, classes=10))
    layouts = dict.fromkeys((work.phase for work in found), Layout(1, 2))
    sizes = {values["train_micro_batch_size_per_gpu"] for values in candidates(recipe, found, layouts)}
    assert sizes == {8, 4}


def test_what_cannot_fit_is_refused_with_what_would(imagenet):
    recipe, found = imagenet
    layouts = dict.fromkeys(("distill", "train"), Layout(1, 8))
    with pytest.raises(ValueError, match=r"nothing fits: .* needs .* GB per GPU at least") as refusal:
        propose(recipe, found, layouts, replace(H200, memory_gb=1))
    assert "What would: --gpu rtx4090 (24 GB)" in str(refusal.value)


def test_more_gpus_than_images_of_a_step_are_refused(imagenet):
    recipe, found = imagenet
    with pytest.raises(ValueError, match="does not divide among 1536 GPUs: take 1024 GPUs"):
        propose(recipe, found[-1:], {"train": Layout(192, 8)}, H200)


def test_the_command_prints_a_plan_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*IMAGENET, "--nodes", "2", "--gpu", "h100,share=0.3"]) == 0
    shown = capsys.readouterr().out
    assert "16 GPUs, 8 of them on a node" in shown and "30% of them counted on" in shown
    for name in ("distill_0", "distill_3", "train"):
        assert shown.count(f"\n{name} ") == 3  # memory, traffic, time
    proposed = json.loads(shown[shown.index("{") :])
    read_ds_config(proposed)
    assert not list(tmp_path.iterdir())


def test_a_json_that_does_not_fit_is_a_problem_with_a_proposal_beside_it(capsys):
    words = ["--gpu", "h100,memory_gb=16", "--ds_config", str(ROOT / "ds_configs/node8_zero1_ep8.json")]
    assert main([*IMAGENET, *words]) == 2
    shown = capsys.readouterr().out
    assert "PROBLEM  train needs" in shown and "GPU-hours in place of" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h300"], "--gpu h300 is not in the table. Did you mean h"),
        (["--gpu", "h200,speed=3"], "'speed=3' sets nothing, expected key=number"),
        (["--gpu", "h200,share=2"], "share is 2, expected a number from 1e-06 to 1"),
        (["--gpu", "gone.json"], "no such file; write one with: python benchmarks/planner.py time"),
        (["--nodes", "0"], "--nodes is 0, expected a whole number from 1"),
        (["--busiest", "0.5"], "--busiest is 0.5, expected a number from 1"),
        (["--nodes", "192"], "does not divide among 1536 GPUs: take 1024 GPUs"),
        (["--module", "1"], "--module has no meaning for --phase plan"),
        (
            ["train.global_batch=2000000"],
            "train has no step: 1,281,167 images are fewer than its global batch of 2000000",
        ),
    ],
)
def test_what_a_plan_refuses(capsys, words, said):
    assert main([*IMAGENET, *words]) == 2
    streams = capsys.readouterr()
    assert said in streams.err + streams.out


def test_flags_of_a_plan_beside_another_phase_and_data_that_only_a_download_could_count(capsys):
    recipe = str(ROOT / "recipes/vmoe_base_imagenet.yaml")
    assert main(["--recipe", recipe, "--phase", "train", "--out", "x", "--nodes", "2"]) == 2
    assert "--nodes has a meaning with --phase plan alone" in capsys.readouterr().err
    assert main(["--recipe", recipe, "--phase", "plan"]) == 2
    assert "a plan does not download data.path=ILSVRC/imagenet-1k" in capsys.readouterr().err
    assert main(["--phase", "plan"]) == 2
    assert "--recipe is missing" in capsys.readouterr().err


def test_the_table_of_gpus_is_whole():
    for gpu in GPUS.values():
        assert gpu.source and gpu.network_gb_s < gpu.memory_gb_s and 0 < gpu.share <= 0.5
        assert math.isclose(gpu.usable_bytes, 0.9e9 * gpu.memory_gb)


def test_a_calibrated_machine_is_read_back(tmp_path):
    file = tmp_path / "measured.json"
    figures = {
        "name": "mine",
        "tflops": 0.1,
        "memory_gb": 16,
        "memory_gb_s": 10,
        "node_gb_s": 1,
        "network_gb_s": 1,
        "source": "measured",
        "share": 1.6,
    }
    file.write_text(json.dumps(figures))
    assert parse(f"{file},memory_gb=8").memory_gb == 8
    assert parse(str(file)).flops_per_second == pytest.approx(1.6e11)
    file.write_text("{}")
    with pytest.raises(ValueError, match="does not hold the figures of a GPU"):
        parse(str(file))


def test_footprint_of_a_module_taught_alone_is_smaller_than_the_whole(imagenet):
    recipe, found = imagenet
    layout = Layout(1, 8)
    values = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**8},
        "train_micro_batch_size_per_gpu": 128,
    }
    sizes = {work.name: footprint(work, settings_of(recipe, work, values, layout), layout).peak for work in found}
    assert sizes["distill_1"] < sizes["train"]


def test_the_peak_of_a_gpu_by_its_drivers_name():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla T4", ""):
        assert peak_flops(other) is None


def test_what_the_teacher_tells_takes_disk(capsys):
    """Three borders and the logits in bf16, of every image once; of a pair, what it is fed and what it puts out."""
    stored = ["refine.stored_epochs=1", "distill.epochs=0", "refine.epochs=5", "refine.order=together"]
    assert main([*IMAGENET, "--gpu", "h200", "--gpus", "8", *stored, "refine.global_batch=2048"]) == 0
    together = (3 * 197 * 1024 + 1000) * 2 * 1_281_167 / 1e9
    printed = capsys.readouterr().out
    assert f"refine: what the teacher tells in the first 1 of 5 epochs takes {together:,.1f} GB of disk" in printed
    assert main([*IMAGENET, "--gpu", "h200", "--gpus", "8", "distill.stored_epochs=2"]) == 0
    printed = capsys.readouterr().out
    for module, numbers in enumerate([197 * 1024, 2 * 197 * 1024, 2 * 197 * 1024, 197 * 1024 + 1000]):
        size = 2 * numbers * 2 * 1_281_167 / 1e9
        assert f"distill_{module}: what the teacher tells in the first 2 of 5 epochs takes {size:,.1f} GB" in printed
    assert main([*IMAGENET, "--gpu", "h200", "--gpus", "8"]) == 0
    assert "teacher tells" not in capsys.readouterr().out
