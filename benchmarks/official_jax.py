"""A whole step of training of the official V-MoE in JAX beside ours: Ti/16, 224 pixels, float32, AdamW.

    git clone https://github.com/google-research/vmoe
    git clone https://github.com/google-research/vision_transformer
    pip install jax flax optax
    python benchmarks/official_jax.py --vmoe vmoe --vision-transformer vision_transformer

Every second block has 8 experts, k 2, capacity 1.05, routing noise and both auxiliary losses, as in the paper. In turn
in one process, which is held to as many cores as there are --threads: XLA takes every core it sees, whatever its flags
say of threads. Written for commit 942a78b of vmoe and jax 0.10.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch

from benchmarks import step, timing

WIDTH, HEADS, MLP_DIM, DEPTH = 192, 3, 768, 12


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmoe", type=Path, required=True, help="a clone of google-research/vmoe")
    parser.add_argument("--vision-transformer", type=Path, required=True, help="of google-research/vision_transformer")
    parser.add_argument("--dispatcher", default="indices", choices=["indices", "einsum"], help="theirs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    for clone, file in ((options.vmoe, "vmoe/moe.py"), (options.vision_transformer, "vit_jax/models_vit.py")):
        if not (clone / file).is_file():
            parser.error(f"{clone} has no {file}: give a clone of the repository that the help of this option names")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    # last, so that nothing of theirs hides what is installed
    sys.path += [str(options.vmoe.resolve()), str(options.vision_transformer.resolve())]
    facts = timing.machine("cpu")
    print(timing.describe(facts))
    steps = {
        "ours": step.training_step(step.objectives_of("Ti")["V-MoE"], options.batch, torch.float32, "cpu"),
        "official": _official(options.batch, options.dispatcher),
    }
    seconds = timing.in_turn(steps, options.rounds)
    ratio = timing.ratio(seconds, "official", "ours")
    print(f"ours {statistics.median(seconds['ours']):.2f} s, official {statistics.median(seconds['official']):.2f} s")
    print(f"official / ours {ratio:.2f} in time, {options.threads} threads")
    name = f"official JAX V-MoE by {options.dispatcher} / ours, {options.threads} threads, time"
    timing.write(options.json, {name: ratio}, machine=facts)


def _official(batch: int, dispatcher: str) -> Callable[[], None]:
    """A step of the official model, compiled."""
    import jax
    import optax
    from vmoe.nn.vit_moe import VisionTransformerMoe

    router = {
        "num_selected_experts": 2,
        "noise_std": 1.0,
        "importance_loss_weight": 0.005,
        "load_loss_weight": 0.005,
        "dispatcher": {"name": dispatcher, "capacity_factor": 1.05, "batch_priority": False},
    }
    moe = {
        "num_experts": 8,
        "layers": tuple(range(1, DEPTH, 2)),
        "group_size": step.TOKENS,
        "split_rngs": True,
        "router": router,
    }
    encoder = {"num_layers": DEPTH, "mlp_dim": MLP_DIM, "num_heads": HEADS, "moe": moe}
    model = VisionTransformerMoe(step.CLASSES, (16, 16), WIDTH, encoder, deterministic=False)
    images = jax.random.normal(jax.random.PRNGKey(0), (batch, 224, 224, 3))
    labels = jax.random.randint(jax.random.PRNGKey(1), (batch,), 0, step.CLASSES)
    keys = {name: jax.random.PRNGKey(2) for name in ("params", "gating", "dropout")}
    parameters = jax.jit(model.init)(keys, images)["params"]
    optimizer = optax.adamw(1e-5)
    state = optimizer.init(parameters)

    @jax.jit
    def train(parameters, state, key):
        def loss(parameters):
            logits, metrics = model.apply({"params": parameters}, images, rngs={"gating": key, "dropout": key})
            label = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return label + metrics["auxiliary_loss"].mean()

        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    def run() -> None:
        nonlocal parameters, state, key
        key, _ = jax.random.split(key)
        parameters, state = jax.block_until_ready(train(parameters, state, key))

    key = jax.random.PRNGKey(3)
    return run


if __name__ == "__main__":
    main()
