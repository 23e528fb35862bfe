"""The table of DeepSpeed keys: which are passed on, with which values, and which change the numbers. No torch here.

DeepSpeed 0.19.8 takes many keys that do nothing, or something wrong, with experts spread over ranks under ZeRO-1 or 2.
A row is allowed when tests/integration/test_ds_keys.py found its values to train like a plain torch loop; the others
are refused by name. A key that a later DeepSpeed brings is refused until it has a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.knobs import close
from trainer.config.load import shown


@dataclass(frozen=True)
class Key:
    """One key of the DeepSpeed JSON.

    Attributes:
        good: whether a value is one that was tested, or of a kind that was.
        expected: those values in words.
        why: what is wrong with the others, as the end of a sentence that begins with the key.
        changes_numbers: whether another value trains other weights, so that a result begun with one cannot go on with
            another.
    """

    good: Callable[[Any], bool]
    expected: str
    why: str = ""
    changes_numbers: bool = False


def _is_whole(value: Any, least: int, most: int) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value == int(value) and least <= value <= most


def switch() -> Key:
    """true or false."""
    return Key(lambda value: isinstance(value, bool), "true or false")


def whole(least: int, most: int) -> Key:
    """A whole number of a range; 5e8 is one too."""
    return Key(lambda value: _is_whole(value, least, most), f"a whole number from {least:,} to {most:,}")


def only(*values: Any, why: str, changes_numbers: bool = False) -> Key:
    """A key of which one value, or a few, is right: its default, mostly."""
    words = " or ".join('"' + value + '"' if isinstance(value, str) else str(value).lower() for value in values)

    def good(value: Any) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)

    return Key(good, words, why, changes_numbers)


def refused(why: str) -> Key:
    """A key that has no right value here."""
    return Key(lambda value: False, "nothing: delete it", why)


def text() -> Key:
    """A string."""
    return Key(lambda value: isinstance(value, str), "a text")


NEEDS_ZERO_3 = "needs ZeRO-3, which DeepSpeed's MoE layer does not support"
NOT_FINITE = "would let a gradient that is not finite into the weights"
OWN_CHECKPOINTS = "has no meaning here: checkpoints are this trainer's own"
LARGEST_BUCKET = 10**10  # elements; the buffer of it is allocated at the start
IN_ZERO_3 = whole(0, 2**63 - 1)  # a size that only ZeRO-3 reads: templates carry them, and they do nothing here

ZERO = {
    "stage": Key(lambda value: True, "1 or 2"),  # ds_config.py says why the others do not work
    "contiguous_gradients": switch(),  # false not with experts: see with_experts
    "reduce_scatter": switch(),  # likewise
    "reduce_bucket_size": whole(1, LARGEST_BUCKET),
    "allgather_bucket_size": Key(
        lambda value: _is_whole(value, 0, LARGEST_BUCKET) and value % 2 == 0,
        f"an even whole number from 0 to {LARGEST_BUCKET:,}",
        "is aligned to two elements by DeepSpeed",
    ),
    "use_multi_rank_bucket_allreduce": switch(),
    "allgather_partitions": switch(),
    "overlap_comm": switch(),
    "load_from_fp32_weights": switch(),
    "ignore_unused_parameters": switch(),
    "enable_sanity_checks": switch(),
    "sub_group_size": IN_ZERO_3,
    "stage3_prefetch_bucket_size": IN_ZERO_3,
    "stage3_param_persistence_threshold": IN_ZERO_3,
    "stage3_model_persistence_threshold": IN_ZERO_3,
    "stage3_max_live_parameters": IN_ZERO_3,
    "stage3_max_reuse_distance": IN_ZERO_3,
    "stage3_gather_16bit_weights_on_model_save": switch(),
    "memory_efficient_linear": switch(),
    "leaf_module": refused(NEEDS_ZERO_3),
    "round_robin_gradients": only(
        False, why="makes DeepSpeed misplace the fp32 weights it reports, so checkpoints would be wrong"
    ),
    "compute_grad_norm": only(True, why=f"off {NOT_FINITE}"),
    "offload_optimizer": Key(
        lambda value: isinstance(value, dict),
        '{"device": "cpu"} with pin_memory true or false, or {"device": "none"}',
    ),
    "offload_param": refused(NEEDS_ZERO_3),
    "zenflow": refused("makes optimiser steps that are not those of the schedule"),
    "elastic_checkpoint": only(False, why=OWN_CHECKPOINTS),
    "legacy_stage1": only(False, why="was given up by DeepSpeed"),
    "cpu_offload": refused('is the old form of "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": refused(NEEDS_ZERO_3),
    "cpu_offload_use_pin_memory": refused(
        'is the old form of "offload_optimizer": {"device": "cpu", "pin_memory": true}'
    ),
    "stage3_gather_fp16_weights_on_model_save": refused(NEEDS_ZERO_3),
    "parameter_alignment": switch(),
    "zero_hpz_partition_size": only(1, why=NEEDS_ZERO_3),
    "zero_quantized_weights": only(False, why=NEEDS_ZERO_3),
    "zero_quantized_nontrainable_weights": only(False, why=NEEDS_ZERO_3),
    "zero_quantized_gradients": only(False, why=NEEDS_ZERO_3),
    "stage3_module_granularity_threshold": only(0, why=NEEDS_ZERO_3),
    "stage3_use_all_reduce_for_fetch_params": only(False, why=NEEDS_ZERO_3),
    "stage3_allgather_sequential": only(False, why=NEEDS_ZERO_3),
    "pipeline_loading_checkpoint": only(False, why=OWN_CHECKPOINTS),
    "override_module_apply": only(True, why=NEEDS_ZERO_3),
    "log_trace_cache_warnings": only(False, why=NEEDS_ZERO_3),
    "save_muon_momentum_buffer_in_memory": only(False, why="is for an optimiser that is not used here"),
}
BF16 = {
    "enabled": Key(lambda value: isinstance(value, bool), "true or false", changes_numbers=True),
    "immediate_grad_update": switch(),
    "check_grad_overflow": only(True, why=f"off {NOT_FINITE}"),
    "bf16_master_weights_and_grads": only(False, why="would publish weights rounded to bf16"),
    "bf16_optimizer_states": only(False, why="would lose Adam's small steps"),
}
MONITOR = {"enabled": switch(), "output_path": text(), "job_name": text()}
# sections of the JSON -> their keys
SECTIONS = {
    "zero_optimization": ZERO,
    "bf16": BF16,
    "data_types": {
        "grad_accum_dtype": Key(
            lambda value: value in (None, "fp32", "bf16"), '"fp32", or "bf16" with bf16 on', changes_numbers=True
        ),
    },
    "flops_profiler": {
        "enabled": switch(),
        "recompute_fwd_factor": Key(lambda value: _is_whole(value, 0, 10), "a number from 0 to 10"),
        "profile_step": whole(1, 10**9),
        "module_depth": whole(-1, 1000),
        "top_modules": whole(1, 1000),
        "detailed": switch(),
        "output_file": Key(lambda value: value is None or isinstance(value, str), "a text"),
    },
    "comms_logger": {
        "enabled": switch(),
        "verbose": switch(),
        "prof_all": switch(),
        "debug": switch(),
        "prof_ops": Key(lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts"),
    },
    "tensorboard": MONITOR,
    "csv_monitor": MONITOR,
    "wandb": {"enabled": switch(), "group": text(), "team": text(), "project": text()},
}
# keys outside of any section; the batch and the clipping are read and checked by ds_config.py
TOP = {
    "train_batch_size": Key(lambda value: True, "a whole number"),
    "train_micro_batch_size_per_gpu": Key(lambda value: True, "a whole number"),
    "gradient_accumulation_steps": Key(lambda value: True, "a whole number"),
    "gradient_clipping": Key(lambda value: True, "a number", changes_numbers=True),
    "communication_data_type": Key(
        lambda value: value in (None, "fp32", "bf16"),
        '"fp32", or "bf16" with bf16 on',
        "would let gradients overflow in fp16",
        changes_numbers=True,
    ),
    "prescale_gradients": only(False, why="is refused by DeepSpeed under ZeRO-2, and left out under ZeRO-1"),
    "gradient_predivide_factor": only(1, 1.0, why="is refused by DeepSpeed under ZeRO-2, and left out under ZeRO-1"),
    "steps_per_print": whole(1, 10**18),
    "wall_clock_breakdown": switch(),
    "memory_breakdown": switch(),
    "dump_state": switch(),
    "zero_allow_untested_optimizer": only(True, why="makes DeepSpeed refuse torch's optimisers, which are used here"),
    "zero_force_ds_cpu_optimizer": only(False, why="needs DeepSpeed's CPU Adam, which has to be compiled"),
    "aio": refused("tunes NVMe offload, which needs ZeRO-3"),
    "checkpoint": refused(OWN_CHECKPOINTS),
    "seq_parallel_communication_data_type": refused("has no meaning here: there is no sequence parallelism"),
}
PASSED_ON = (*TOP, *SECTIONS)


def check(values: Mapping[str, Any], name: str) -> None:
    """Refuse what no training may have.

    Args:
        values: the JSON as read; "auto" is left to the recipe and to DeepSpeed.
        name: of the file, for messages.

    Raises:
        ValueError: a key of a section that is not known, or a value outside of the table; the key is named.
    """
    for key, value in values.items():
        if key in SECTIONS and isinstance(value, Mapping):
            for inner, inner_value in value.items():
                _check(SECTIONS[key].get(inner), f"{key}.{inner}", inner_value, name, SECTIONS[key])
        elif key in TOP:
            _check(TOP[key], key, value, name, TOP)
    offload = values.get("zero_optimization", {}).get("offload_optimizer")
    if isinstance(offload, Mapping):
        _check_offload(offload, name)
    bf16 = values.get("bf16", {}).get("enabled") is True
    for key, value in (
        ("communication_data_type", values.get("communication_data_type")),
        ("data_types.grad_accum_dtype", values.get("data_types", {}).get("grad_accum_dtype")),
    ):
        if value == "bf16" and not bf16:
            raise ValueError(
                f'{name}: "{key}" is "bf16" without bf16, which would round the gradients of fp32 weights: delete it, '
                'or set "bf16": {"enabled": true}'
            )


def with_experts(config: Mapping[str, Any], ep_size: int) -> None:
    """Refuse what goes wrong where MoE blocks are trained.

    Args:
        config: resolved, without "auto".
        ep_size: ranks the experts are spread over.

    Raises:
        ValueError: DeepSpeed would stop, or train experts with wrong gradients; the key is named.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("reduce_scatter") is False:
        raise ValueError(
            '"zero_optimization.reduce_scatter" is false, which DeepSpeed refuses for models with MoE layers: delete it'
        )
    if zero.get("contiguous_gradients") is False and (ep_size > 1 or zero.get("stage") == 2):
        raise ValueError(
            '"zero_optimization.contiguous_gradients" is false, which DeepSpeed refuses for MoE layers under ZeRO-2, '
            "and under ZeRO-1 gives experts that are spread over ranks gradients of a wrong length: delete it"
        )


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that change what is trained, by dotted key; what is "auto" or not given is left out.

    Not the batch: a checkpoint knows its own.
    """
    found = {key: values[key] for key, row in TOP.items() if row.changes_numbers and key in values}
    for section, rows in SECTIONS.items():
        for key, row in rows.items():
            if row.changes_numbers and key in values.get(section, {}):
                found[f"{section}.{key}"] = values[section][key]
    return {key: value for key, value in found.items() if value not in ("auto", None)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check(row: Key | None, key: str, value: Any, name: str, known: Mapping[str, Key]) -> None:
    if row is None:
        inner = key.rpartition(".")[2]
        raise ValueError(f'{name}: unknown key "{key}", or none that was tested. {close(inner, list(known))}')
    if value == "auto" and known in (TOP, ZERO):
        return
    if not row.good(value):
        why = f"{row.why}; it " if row.why else ""
        raise ValueError(f'{name}: "{key}" {why}is {shown(value)}, expected {row.expected}')


def _check_offload(offload: Mapping[str, Any], name: str) -> None:
    known = ("device", "pin_memory")
    for key in offload:
        if key not in known:
            raise ValueError(
                f'{name}: unknown key "zero_optimization.offload_optimizer.{key}", or none that was tested: expected '
                f"{' and '.join(known)}. NVMe and a ratio need ZeRO-3"
            )
    device = offload.get("device", "cpu")
    if device not in ("cpu", "none"):
        raise ValueError(
            f'{name}: "zero_optimization.offload_optimizer.device" is {device!r}, expected "cpu" or "none": NVMe needs '
            "ZeRO-3, which does not support DeepSpeed's MoE layer"
        )
    if not isinstance(offload.get("pin_memory", False), bool):
        raise ValueError(
            f'{name}: "zero_optimization.offload_optimizer.pin_memory" is {offload["pin_memory"]!r}, expected true or '
            "false"
        )
