"""The DeepSpeed JSON: read, `"auto"` resolved from the recipe, contradictions refused. Standard library only.

The JSON owns ZeRO, precision, micro-batch, accumulation and clipping; where it says "auto" the recipe's phase fills in.
Its section "trainer" is ours and never reaches DeepSpeed: {"ep_size": n | "auto", "activation_checkpointing": bool}.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ds_keys
from trainer.config.ds_keys import PASSED_ON
from trainer.config.knobs import close
from trainer.config.load import COMMAND_LINE, first_repeated, parse_override
from trainer.config.phases import ScheduleConfig

REFUSED = {
    "optimizer": 'the recipe owns the optimizer (train.optimizer, train.lr, ...): delete the section "optimizer"',
    "scheduler": 'the recipe owns the schedule (train.lr, train.warmup_epochs, ...): delete the section "scheduler"',
    "fp16": "fp16 is not supported: routing and clipping are proven in fp32 and bf16 only; use bf16",
    "expert_parallel": "DeepSpeed's AutoEP drops the biases of V-MoE experts: use trainer.ep_size instead",
    "activation_checkpointing": 'use "trainer": {"activation_checkpointing": true} instead',
    "elasticity": "elasticity is gone from DeepSpeed 0.19: delete the section",
    "progressive_layer_drop": "progressive_layer_drop is gone from DeepSpeed 0.19: use drop_path in the recipe",
}
EVALUATED_TOGETHER = 32  # images per rank and forward where neither recipe nor JSON has a batch
TRAINER_KEYS = {
    "ep_size": "ranks an MoE layer's experts are spread over; auto = the most that divide ranks of a node and experts",
    "activation_checkpointing": "true = keep only each block's input and compute the rest again in the backward pass",
}
# keys that hold a section, each with an example of one
SECTIONS = {
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": true}',
    "trainer": '{"ep_size": "auto"}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
    "flops_profiler": '{"enabled": true}',
    "comms_logger": '{"enabled": true}',
    "tensorboard": '{"enabled": true}',
    "csv_monitor": '{"enabled": true}',
    "wandb": '{"enabled": true}',
}


@dataclass(frozen=True)
class Settings:
    """What a phase needs to know of its DeepSpeed JSON once it is resolved for this world."""

    config: dict[str, Any]  # handed to deepspeed.initialize
    micro_batch: int  # images per rank and forward
    accumulation: int  # forwards per optimiser step
    global_batch: int  # micro_batch x accumulation x world
    clip: float  # gradient norm limit, 0 = off
    ep_size: int  # ranks an MoE layer's experts are spread over
    activation_checkpointing: bool
    bf16: bool


def read_ds_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a DeepSpeed JSON and apply "ds.section.key=value" overrides.

    Args:
        source: the file, or its values.

    Raises:
        ValueError: no such file, invalid JSON, or a key this trainer does not pass on.
    """
    if isinstance(source, Mapping):
        name = "the DeepSpeed config"
        values = copy.deepcopy(dict(source))
    else:
        name = str(source)
        values = _read_json(Path(source))
    for text in overrides:
        keys, value = parse_override(text)
        section = values
        for key in keys[1:-1]:  # the first one is "ds"
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ValueError(f"override {text!r}: {key} is a value in {name}, not a section")
        section[keys[-1]] = value
    _check_keys(values, name)
    return values


def ds_origins(values: Mapping[str, Any], file: str, overrides: Sequence[str], where: str = "") -> dict[str, str]:
    """Where each dotted key of a DeepSpeed JSON as read gets its value: `file`, or "command line"."""
    overridden = set()
    for text in overrides:
        keys, _ = parse_override(text)
        overridden.add(".".join(keys[1:]))  # without "ds"
    origin = {}
    for key, value in values.items():
        name = where + key
        if name in overridden:
            origin[name] = COMMAND_LINE
        elif isinstance(value, dict):
            origin |= ds_origins(value, file, overrides, f"{name}.")
        else:
            origin[name] = file
    return origin


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        configs = sorted(file.name for file in path.parent.glob("*.json"))
        raise ValueError(f"no DeepSpeed config at {path}. There are: {', '.join(configs) or 'none'}")
    try:
        values = json.loads(path.read_text(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"DeepSpeed config {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"DeepSpeed config {path} must hold an object, got {type(values).__name__}")
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = first_repeated([key for key, _ in pairs])
    if repeated is not None:
        raise ValueError(f'"{repeated}" is given twice')
    return dict(pairs)


def resolve(
    values: dict[str, Any],
    schedule: ScheduleConfig,
    *,
    world: int,
    local_world: int,
    num_experts: int,
    phase: str,
) -> Settings:
    """Fill in every "auto", check the result, and return what DeepSpeed gets and what the phase needs.

    Args:
        values: the JSON as read.
        schedule: the recipe's section of this phase; its global_batch and clip fill "auto".
        world, local_world: ranks in all and on this node.
        num_experts: experts of an MoE layer in what is trained; 0 when there is none.
        phase: name of the recipe's section, for messages.

    Raises:
        ValueError: one fact given two values (both are named), or a way of scaling that does not work.
    """
    ds_keys.check(values, "the DeepSpeed JSON")
    config = {key: value for key, value in values.items() if key in PASSED_ON and value != "auto"}
    ours = values.get("trainer", {})
    micro_batch, accumulation, global_batch = _batches(config, schedule, world, phase)
    clip = _one_value(config, "gradient_clipping", schedule.clip, f"{phase}.clip", otherwise=0.0)
    bf16 = config.get("bf16", {})
    zero = _zero(config)
    config |= {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(clip),  # DeepSpeed's default is 1.0, so it is always written
        "zero_optimization": zero,
    }
    config.setdefault("steps_per_print", 10**9)
    config.setdefault("zero_allow_untested_optimizer", True)
    if "offload_optimizer" in zero:
        config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW on the CPU: nothing to compile
    _check_monitors(config)
    ep = _ep_size(ours.get("ep_size", "auto"), world, local_world, num_experts)
    if num_experts:
        ds_keys.with_experts(config, ep)
    return Settings(
        config=config,
        micro_batch=micro_batch,
        accumulation=accumulation,
        global_batch=global_batch,
        clip=float(clip),
        ep_size=ep,
        activation_checkpointing=bool(ours.get("activation_checkpointing", False)),
        bf16=bool(bf16.get("enabled", False)),
    )


def without_training(values: dict[str, Any], schedule: ScheduleConfig, world: int) -> Settings:
    """What a phase needs to know that only measures: any number of ranks will do, whatever batch was trained.

    Args:
        values: the JSON as read.
        schedule: the section of the recipe that what is measured was trained by; its batch tells what fits into memory.

    Raises:
        ValueError: a batch in the JSON that is no number.
    """
    config = {key: value for key, value in values.items() if value != "auto"}
    micro_batch = _number(config, "train_micro_batch_size_per_gpu", whole=True)
    if micro_batch is None:
        total = schedule.global_batch or _number(config, "train_batch_size", whole=True) or EVALUATED_TOGETHER * world
        accumulation = _number(config, "gradient_accumulation_steps", whole=True) or 1
        micro_batch = math.ceil(total / (world * accumulation))
    return Settings(
        config={},
        micro_batch=micro_batch,
        accumulation=1,
        global_batch=0,
        clip=0.0,
        ep_size=1,
        activation_checkpointing=False,
        bf16=bool(config.get("bf16", {}).get("enabled", False)),
    )


def _batches(config: dict, schedule: ScheduleConfig, world: int, phase: str) -> tuple[int, int, int]:
    """(micro-batch, accumulation, global batch): whatever is given fixes the rest; a contradiction names all three."""
    recipe_batch = schedule.global_batch
    total = _one_value(config, "train_batch_size", recipe_batch, f"{phase}.global_batch", otherwise=None)
    micro = _number(config, "train_micro_batch_size_per_gpu", whole=True)
    accumulation = _number(config, "gradient_accumulation_steps", whole=True)
    if total is None and micro is None:
        raise ValueError(
            f'the batch is open: set {phase}.global_batch in the recipe, or a number for "train_batch_size" or '
            '"train_micro_batch_size_per_gpu" in the DeepSpeed JSON'
        )
    # global batch = micro-batch x accumulation x world, solved for what is open; one accumulation where two are
    if micro is None:
        accumulation = accumulation or 1
        micro = total // (world * accumulation)
    elif accumulation is None and total is not None:
        accumulation = max(1, total // (world * micro))
    elif accumulation is None:
        accumulation = 1
    product = micro * accumulation * world
    if micro < 1 or (total is not None and product != total):
        raise ValueError(
            f"a global batch of {total} images does not divide into world {world} x micro-batch {micro} x accumulation "
            f"{accumulation} = {product}: change {phase}.global_batch, the DeepSpeed JSON or the number of ranks"
        )
    return micro, accumulation, product


def _one_value(config: dict, key: str, recipe: Any, recipe_name: str, otherwise: Any) -> Any:
    """The JSON's number, or the recipe's where it says "auto"; both given and different is an error."""
    value = _number(config, key, whole=key == "train_batch_size")
    if value is not None and recipe is not None and value != recipe:
        raise ValueError(
            f'two values for one thing: {recipe_name} is {recipe} in the recipe and "{key}" is {value} in the '
            'DeepSpeed JSON. Write "auto" in the JSON or delete it from the recipe'
        )
    if value is not None:
        return value
    return otherwise if recipe is None else recipe


def _number(config: dict, key: str, whole: bool = False) -> Any:
    """The JSON's number, a whole one from 1 or any from 0; None where it says "auto" or nothing."""
    value = config.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if whole:
        fits = is_number and isinstance(value, int) and value >= 1
        expected = "a whole number from 1"
    else:
        fits = is_number and 0 <= value < math.inf  # nan is not
        expected = "a number from 0"
    if not fits:
        raise ValueError(f'"{key}" is {value!r} in the DeepSpeed JSON, expected {expected} or "auto"')
    return value


def _zero(config: dict) -> dict[str, Any]:
    """The section zero_optimization without its "auto", refused where it does not work with MoE or loses an error."""
    zero = dict(config.get("zero_optimization", {}))
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (1, 2):
        why = "there is no such stage"
        if isinstance(stage, int) and stage == 0:
            why = "without ZeRO DeepSpeed leaves experts out of the clipping norm"
        elif isinstance(stage, int) and stage == 3:
            why = "ZeRO-3 refuses DeepSpeed's MoE layer"
        raise ValueError(f'"zero_optimization.stage" is {stage!r}, expected 1 or 2: {why}')
    return {key: value for key, value in zero.items() if value != "auto"}


def _ep_size(ep_size: Any, world: int, local_world: int, num_experts: int) -> int:
    """Check the expert-parallel size; "auto" = the largest that divides the ranks of a node and the experts."""
    if num_experts == 0:
        return 1
    if ep_size == "auto":
        return math.gcd(world, local_world, num_experts)
    if isinstance(ep_size, bool) or not isinstance(ep_size, int) or ep_size < 1:
        raise ValueError(f'"trainer.ep_size" is {ep_size!r}, expected a whole number from 1 or "auto"')
    for count, name in ((world, "ranks"), (num_experts, "experts")):
        if count % ep_size:
            possible = [size for size in range(1, world + 1) if world % size == 0 and num_experts % size == 0]
            raise ValueError(
                f'"trainer.ep_size" is {ep_size}, which does not divide {count} {name}: possible here are {possible}'
            )
    return ep_size


def _check_keys(values: dict[str, Any], name: str) -> None:
    for key in values:
        if key in REFUSED and not _disabled(values[key]):
            raise ValueError(f'{name}: "{key}": {REFUSED[key]}')
        if key not in (*PASSED_ON, *REFUSED, "trainer"):
            raise ValueError(f'{name}: unknown key "{key}". {close(key, (*PASSED_ON, "trainer"))}')
        if key in SECTIONS and not isinstance(values[key], dict):
            raise ValueError(f'{name}: "{key}" is {values[key]!r}, expected a section such as {SECTIONS[key]}')
    for key in values.get("trainer", {}):
        if key not in TRAINER_KEYS:
            raise ValueError(f'{name}: unknown key "trainer.{key}". Known: {", ".join(TRAINER_KEYS)}')
    recompute = values.get("trainer", {}).get("activation_checkpointing", False)
    if not isinstance(recompute, bool):
        raise ValueError(f'{name}: "trainer.activation_checkpointing" is {recompute!r}, expected true or false')
    ds_keys.check(values, name)


def _disabled(value: Any) -> bool:
    return value == "auto" or (isinstance(value, dict) and value.get("enabled") is False)


def _check_monitors(config: dict[str, Any]) -> None:
    """A monitor that is not installed makes rank 0 raise while the others hang, so it is refused here."""
    for monitor in ("tensorboard", "wandb"):  # a section and a package of that name
        is_enabled = config.get(monitor, {}).get("enabled")
        if is_enabled and importlib.util.find_spec(monitor) is None:
            raise ValueError(f'"{monitor}" is enabled in the DeepSpeed JSON but not installed: pip install {monitor}')
