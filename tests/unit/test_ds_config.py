"""The DeepSpeed JSON: "auto" filled in from the recipe, every contradiction refused with both values."""

import importlib.util
import json
from pathlib import Path

import pytest

from trainer.config.ds_config import PASSED_ON, REFUSED, read_ds_config, resolve, without_training
from trainer.config.phases import ScheduleConfig

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
ZERO1 = {"zero_optimization": {"stage": 1}}


def settings(values=None, *, world=1, local_world=None, num_experts=0, **schedule):
    schedule = {"global_batch": 64, **schedule}
    return resolve(
        {**ZERO1, **(values or {})}, ScheduleConfig(**schedule), world=world, local_world=local_world or world,
        num_experts=num_experts, phase="train",
    )  # fmt: skip


def read(tmp_path, values, *overrides):
    path = tmp_path / "x.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return read_ds_config(path, overrides)


MICRO, STEPS, TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


@pytest.mark.parametrize(
    "json_values, recipe, world, expected",  # expected: micro-batch, accumulation, global batch
    [
        ({}, 64, 1, (64, 1, 64)),
        ({}, 64, 2, (32, 1, 64)),
        ({MICRO: "auto", STEPS: "auto", TOTAL: "auto"}, 64, 4, (16, 1, 64)),
        ({STEPS: 4}, 64, 2, (8, 4, 64)),
        ({MICRO: 8}, 64, 2, (8, 4, 64)),
        ({MICRO: 8, STEPS: 4}, 64, 2, (8, 4, 64)),
        ({MICRO: 8, STEPS: 4}, None, 2, (8, 4, 64)),
        ({MICRO: 8}, None, 3, (8, 1, 24)),
        ({TOTAL: 96}, None, 3, (32, 1, 96)),
        ({TOTAL: 64}, 64, 2, (32, 1, 64)),
        ({TOTAL: 64, MICRO: 4}, None, 2, (4, 8, 64)),
    ],
)
def test_batch_arithmetic(json_values, recipe, world, expected):
    s = settings(json_values, world=world, global_batch=recipe)
    assert (s.micro_batch, s.accumulation, s.global_batch) == expected
    assert tuple(s.config[key] for key in (MICRO, STEPS, TOTAL)) == expected


@pytest.mark.parametrize(
    "json_values, recipe, world, message",
    [
        ({TOTAL: 128}, 64, 1, 'train.global_batch is 64 in the recipe and "train_batch_size" is 128'),
        ({}, None, 1, "the batch is open: set train.global_batch"),
        ({STEPS: 2}, None, 1, "the batch is open"),
        ({}, 64, 3, r"64 images does not divide into world 3 x micro-batch 21 x accumulation 1 = 63"),
        ({}, 2, 4, "world 4 x micro-batch 0 x accumulation 1 = 0"),
        ({MICRO: 24}, 64, 1, "world 1 x micro-batch 24 x accumulation 2 = 48"),
        ({MICRO: 128}, 64, 1, "world 1 x micro-batch 128 x accumulation 1 = 128"),
        ({MICRO: 8, STEPS: 3}, 64, 2, "world 2 x micro-batch 8 x accumulation 3 = 48"),
        ({MICRO: 0}, 64, 1, f'"{MICRO}" is 0 .*expected a whole number from 1 or "auto"'),
        ({STEPS: 0}, 64, 1, f'"{STEPS}" is 0 .*expected a whole number from 1'),
        ({MICRO: 8, STEPS: 0}, None, 1, f'"{STEPS}" is 0'),
        ({MICRO: 2.5}, None, 1, f'"{MICRO}" is 2.5'),
        ({TOTAL: "64"}, None, 1, f"\"{TOTAL}\" is '64'"),
        ({STEPS: True}, 64, 1, f'"{STEPS}" is True'),
        ({"gradient_clipping": -1}, 64, 1, '"gradient_clipping" is -1 .*expected a number from 0'),
        ({"gradient_clipping": float("nan")}, 64, 1, '"gradient_clipping" is nan .*expected a number from 0'),
        ({"gradient_clipping": float("inf")}, 64, 1, '"gradient_clipping" is inf .*expected a number from 0'),
    ],
)
def test_batches_that_do_not_work_out_are_refused(json_values, recipe, world, message):
    with pytest.raises(ValueError, match=message):
        settings(json_values, world=world, global_batch=recipe)


@pytest.mark.parametrize(
    "json_clip, recipe_clip, expected",
    [("auto", 1.5, 1.5), (None, 1.5, 1.5), (0.5, None, 0.5), (1, 1.0, 1.0), (0.0, 0.0, 0.0), ("auto", None, 0.0)],
)
def test_clipping_is_always_written_out(json_clip, recipe_clip, expected):
    s = settings({} if json_clip is None else {"gradient_clipping": json_clip}, clip=recipe_clip)
    assert s.clip == s.config["gradient_clipping"] == expected


@pytest.mark.parametrize("json_clip, recipe_clip", [(1.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_two_clipping_norms_are_refused(json_clip, recipe_clip):
    message = f'train.clip is {recipe_clip} in the recipe and "gradient_clipping" is {json_clip} in the DeepSpeed JSON'
    with pytest.raises(ValueError, match=message):
        settings({"gradient_clipping": json_clip}, clip=recipe_clip)


def test_what_deepspeed_gets():
    values = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
              "bf16": {"enabled": True}, "communication_data_type": "auto", "prescale_gradients": False,
              "fp16": {"enabled": False}, "optimizer": "auto",
              "trainer": {"ep_size": 2, "activation_checkpointing": True}}  # fmt: skip
    s = settings(values, world=2, num_experts=4, clip=1.0)
    assert s.config == {
        "zero_optimization": {"stage": 2, "overlap_comm": True},  # no "auto" is left for DeepSpeed
        "bf16": {"enabled": True},
        "prescale_gradients": False,
        MICRO: 32,
        STEPS: 1,
        TOTAL: 64,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }
    assert (s.ep_size, s.bf16, s.activation_checkpointing) == (2, True, True)
    plain = settings()
    assert (plain.ep_size, plain.bf16, plain.activation_checkpointing) == (1, False, False)
    assert values["zero_optimization"]["reduce_bucket_size"] == "auto"  # what was read stays as it was


@pytest.mark.parametrize(
    "zero, message",
    [
        ({}, "is 0, expected 1 or 2: without ZeRO DeepSpeed leaves experts out of the clipping norm"),
        ({"stage": 0}, "is 0, expected 1 or 2: without ZeRO"),
        ({"stage": 3}, "is 3, expected 1 or 2: ZeRO-3 refuses"),
        ({"stage": 4}, "is 4, expected 1 or 2: there is no such stage"),
        ({"stage": "auto"}, "is 'auto', expected 1 or 2"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param\" needs ZeRO-3"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients\" makes DeepSpeed misplace"),
        ({"stage": 2, "compute_grad_norm": False}, "compute_grad_norm\" off would let"),
    ],
)  # fmt: skip
def test_zero_stages_that_do_not_work_are_refused(zero, message):
    with pytest.raises(ValueError, match=message):
        settings({"zero_optimization": zero})


def test_offload_keeps_torchs_optimizer():
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert settings({"zero_optimization": offload}).config["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ValueError, match='zero_force_ds_cpu_optimizer" needs'):
        settings({"zero_optimization": offload, "zero_force_ds_cpu_optimizer": True})
    assert "zero_force_ds_cpu_optimizer" not in settings().config


@pytest.mark.parametrize(
    "wanted, world, local_world, experts, expected",
    [
        ("auto", 1, 1, 8, 1),
        ("auto", 2, 2, 4, 2),
        ("auto", 8, 8, 8, 8),
        ("auto", 16, 8, 32, 8),  # not across nodes
        ("auto", 6, 6, 8, 2),
        ("auto", 3, 3, 8, 1),
        ("auto", 8, 8, 0, 1),
        (8, 8, 8, 0, 1),  # nothing to spread in a phase without experts
        (4, 8, 8, 8, 4),
        (16, 16, 8, 16, 16),
    ],
)
def test_ep_size(wanted, world, local_world, experts, expected):
    s = settings({"trainer": {"ep_size": wanted}}, world=world, local_world=local_world, num_experts=experts,
                 global_batch=world)  # fmt: skip
    assert s.ep_size == expected
    assert "trainer" not in s.config


def test_ep_size_is_auto_when_left_out():
    assert settings(world=4, num_experts=6).ep_size == 2


@pytest.mark.parametrize(
    "wanted, world, experts, message",
    [
        (2, 3, 8, r'"trainer.ep_size" is 2, which does not divide 3 ranks: possible here are \[1\]'),
        (4, 8, 6, r"is 4, which does not divide 6 experts: possible here are \[1, 2\]"),
        (8, 1, 8, r"is 8, which does not divide 1 ranks: possible here are \[1\]"),
        (0, 2, 8, "is 0, expected a whole number from 1"),
        (True, 2, 8, "is True, expected a whole number from 1"),
        ("max", 2, 8, "is 'max', expected a whole number"),
    ],
)
def test_ep_sizes_that_do_not_divide_are_refused(wanted, world, experts, message):
    with pytest.raises(ValueError, match=message):
        settings({"trainer": {"ep_size": wanted}}, world=world, num_experts=experts, global_batch=24)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_monitor_that_is_not_installed_is_refused(name, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else real(package))
    with pytest.raises(ValueError, match=f'"{name}" is enabled .*not installed: pip install {name}'):
        settings({name: {"enabled": True}})
    assert settings({name: {"enabled": False}}).config[name] == {"enabled": False}
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    assert settings({name: {"enabled": True}}).config[name] == {"enabled": True}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_recipe_owns_or_does_not_work_is_refused(key, tmp_path):
    with pytest.raises(ValueError) as error:
        read(tmp_path, {key: {"enabled": True}})
    assert f'"{key}": {REFUSED[key]}' in str(error.value)
    for off in ("auto", {"enabled": False}):
        assert read(tmp_path, {key: off}) == {key: off}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train_micro_batch_size_per_gpus": 8}, f"unknown key .*Did you mean {MICRO}"),
        ({"qqq": 8}, f"unknown key \"qqq\". Known: {', '.join(PASSED_ON)}, trainer"),
        ({"trainer": {"ep": 8}}, 'unknown key "trainer.ep". Known: ep_size, activation_checkpointing'),
        ({"trainer": None}, '"trainer" is None, expected a section such as'),
        ({"trainer": {"activation_checkpointing": "yes"}}, "activation_checkpointing\" is 'yes', expected true or"),
        ({"bf16": True}, '"bf16" is True, expected a section such as {"enabled": true}'),
        ({"bf16": {"enabled": "auto"}}, "\"bf16.enabled\" is 'auto', expected true or false"),
        ({"zero_optimization": 2}, '"zero_optimization" is 2, expected a section'),
        ("{", "is not valid JSON: "),
        ("[1]", "must hold an object, got list"),
    ],
)  # fmt: skip
def test_bad_files(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, values)


def test_a_missing_file_lists_the_ones_there(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no DeepSpeed config at .*b\.json\. There are: a\.json"):
        read_ds_config(tmp_path / "b.json")


@pytest.mark.parametrize(
    "text, message",
    [('{"bf16": {"enabled": true, "enabled": false}}', '"enabled" is given twice'), ("[" * 100_000, "recursion depth")],
)
def test_hostile_json_gives_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"is not valid JSON: .*{message}"):
        read(tmp_path, text)


def test_values_from_python_are_checked_and_left_as_they_are():
    mine = {"bf16": {"enabled": True}}
    assert read_ds_config(mine, ["ds.bf16.enabled=false"]) == {"bf16": {"enabled": False}}
    assert mine == {"bf16": {"enabled": True}}
    with pytest.raises(ValueError, match='the DeepSpeed config: unknown key "zero"'):
        read_ds_config({"zero": 1})


def test_overrides(tmp_path):
    values = read(tmp_path, ZERO1, "ds.zero_optimization.stage=2", "ds.trainer.ep_size=auto", f"ds.{MICRO}=16")
    assert values == {"zero_optimization": {"stage": 2}, "trainer": {"ep_size": "auto"}, MICRO: 16}
    with pytest.raises(ValueError, match=r"override 'ds.train_batch_size.x=1': train_batch_size is a value"):
        read(tmp_path, {TOTAL: 64}, "ds.train_batch_size.x=1")
    with pytest.raises(ValueError, match='unknown key "zero"'):
        read(tmp_path, ZERO1, "ds.zero=1")


# file -> the (world, ranks per node, experts, global batches of the recipes) it is meant for, and its micro-batches
MEANT_FOR = {
    "cpu_debug.json": [(1, 1, 4, {64: (64, 1)}), (2, 2, 4, {64: (32, 1)})],
    "one_machine.json": [(1, 1, 4, {32: (32, 1)}), (2, 2, 4, {32: (16, 1)}), (4, 4, 4, {32: (8, 1)})],
    "single_gpu.json": [(1, 1, 8, {2048: (128, 16), 1024: (128, 8)})],
    "single_gpu_offload.json": [(1, 1, 8, {2048: (64, 32), 1024: (64, 16)})],
    "node8_zero1_ep8.json": [(8, 8, 8, {2048: (128, 2), 1024: (128, 1)})],
    "node8_zero1.json": [(8, 8, 0, {2048: (32, 8), 1024: (32, 4), 256: (32, 1)})],
    "multinode_zero2_ep8.json": [(16, 8, 8, {2048: (128, 1), 1024: (64, 1)}), (8, 8, 8, {1024: (128, 1)})],
}


@pytest.mark.parametrize("name", sorted(p.name for p in DS_CONFIGS.glob("*.json")))
def test_every_ds_config_resolves_where_it_is_meant_for(name):
    values = read_ds_config(DS_CONFIGS / name)
    for world, local_world, experts, batches in MEANT_FOR[name]:
        for batch, expected in batches.items():
            s = settings(values, world=world, local_world=local_world, num_experts=experts, global_batch=batch, clip=1)
            assert (s.micro_batch, s.accumulation, s.global_batch) == (*expected, batch)
            assert s.ep_size == max(1, min(local_world, experts))
            assert s.clip == 1.0
            assert set(s.config) <= set(PASSED_ON)
            assert "auto" not in json.dumps(s.config)


@pytest.mark.parametrize(
    "json_values, recipe, world, images",
    [
        ({}, 64, 3, 22),  # a third, rounded up
        ({}, 2, 5, 1),
        ({STEPS: 4}, 64, 2, 8),
        ({MICRO: 24, "trainer": {"ep_size": 4}}, 64, 3, 24),
        ({TOTAL: 128}, 64, 1, 64),  # two values for a batch that nobody trains
        ({}, None, 7, 32),
        ({MICRO: "auto", TOTAL: 96}, None, 7, 14),
    ],
)
def test_measuring_needs_no_batch_that_divides(json_values, recipe, world, images):
    measured = without_training(json_values, ScheduleConfig(global_batch=recipe), world)
    assert (measured.micro_batch, measured.ep_size, measured.global_batch) == (images, 1, 0)
    assert not measured.bf16
    assert without_training({"bf16": {"enabled": True}}, ScheduleConfig(), world).bf16


def test_measuring_still_wants_numbers():
    with pytest.raises(ValueError, match='"train_micro_batch_size_per_gpu" is 0 in the DeepSpeed JSON, expected'):
        without_training({MICRO: 0}, ScheduleConfig(global_batch=64), 1)
