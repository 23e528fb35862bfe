"""Name maps of foreign checkpoints: from their parameters to ours, as pure functions of a state.

E experts, D width, H hidden width.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
FASTMOE = {"htoh4": "fc1", "h4toh": "fc2"}  # weights (H, D) and (D, H) of an expert; stacked with a leading E
GOOGLE_TOP = {
    "embedding/bias": "patch_embed.proj.bias",
    "Encoder/encoder_norm/scale": "norm.weight",
    "Encoder/encoder_norm/bias": "norm.bias",
    "pre_logits/kernel": "pre_logits.weight",
    "pre_logits/bias": "pre_logits.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
GOOGLE_NORMS = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_1/scale": "norm2.weight",
    "LayerNorm_1/bias": "norm2.bias",
}
GOOGLE_LEAVES = {"kernel": "weight", "bias": "bias"}
# of a stage's and a whole model's names, to those transformers has on disk
TO_TRANSFORMERS = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def google_state(arrays: Mapping[str, Tensor], prefix: str = "") -> State:
    """Our names and layouts for flax parameters (or gradients) whose names start with `prefix`.

    Linear kernels are (in, out), convolutions (h, w, in, out), attention (D, heads, D / heads) with query, key and
    value apart, and experts carry a leading E.

    Raises:
        ValueError: a name that has no counterpart, as those of attention pooling.
    """
    flax = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    state: State = {}
    for name, value in flax.items():
        block = re.fullmatch(r"Encoder/encoderblock_(\d+)/(.*)", name)
        if block:
            state |= _google_block(flax, name, f"blocks.{block[1]}", block[2])
        elif name == "cls":
            state["cls_token"] = value
        elif name == "Encoder/posembed_input/pos_embedding":
            state["pos_embed"] = value
        elif name == "embedding/kernel":
            state["patch_embed.proj.weight"] = value.permute(3, 2, 0, 1)
        elif name in GOOGLE_TOP:
            state[GOOGLE_TOP[name]] = _linear(value)
        else:
            raise ValueError(f"the V-MoE parameter {name!r} is not supported (attention pooling, ensembles).")
    return state


def m2mkd_state(saved: State) -> State:
    """Our names for the state of the paper's V-MoE, without its second copy under stages.*.

    FastMoE: moe.gate.gate.* is the router, moe.experts.htoh4 / h4toh hold all experts stacked, or, in its later form,
    moe.experts.{e}.htoh4 / h4toh one expert each with a leading 1.
    """
    state: State = {}
    for name, value in saved.items():
        one_expert = re.fullmatch(r"(blocks\.\d+)\.moe\.experts\.(\d+)\.(htoh4|h4toh)\.(weight|bias)", name)
        all_experts = re.search(r"\.moe\.experts\.(htoh4|h4toh)\.", name)
        if one_expert:
            block, number, linear, leaf = one_expert.groups()
            state[f"{block}.mlp.experts.{number}.{FASTMOE[linear]}.{leaf}"] = value[0]
        elif all_experts:
            block, leaf = name.split(all_experts[0])
            linear = FASTMOE[all_experts[1]]
            for e, expert in enumerate(value):
                state[f"{block}.mlp.experts.{e}.{linear}.{leaf}"] = expert
        else:
            router_name = name.replace(".moe.gate.gate.", ".mlp.router.")
            state[_stitch_name(router_name)] = value
    return state


def transformers_state(state: State) -> State:
    """The names transformers writes to disk for a ViT with timm's names; query, key and value apart."""
    result: State = {}
    for name, value in state.items():
        for pattern, replacement in TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, chunk in zip(("query", "key", "value"), value.chunk(3)):
                result[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = chunk.contiguous()
        else:
            result[name] = value.contiguous()
    return result


def _google_block(flax: Mapping[str, Tensor], name: str, block: str, rest: str) -> State:
    """What one flax parameter of an encoder block becomes; query carries key and value with it."""
    value = flax[name]
    layer, _, flax_leaf = rest.rpartition("/")
    leaf = GOOGLE_LEAVES.get(flax_leaf, "")
    mlp = re.fullmatch(r"(Moe/)?Mlp/Dense_([01])", layer)
    if rest in GOOGLE_NORMS:
        return {f"{block}.{GOOGLE_NORMS[rest]}": value}
    if layer == "SelfAttention/query":
        parts = [flax[name.replace("/query/", f"/{part}/")] for part in ("query", "key", "value")]
        # kernels (D, heads, D / heads) -> (D, D), biases (heads, D / heads) -> (D,); then one under the other
        if leaf == "weight":
            parts = [part.reshape(len(part), -1).T for part in parts]
        else:
            parts = [part.flatten() for part in parts]
        return {f"{block}.attn.qkv.{leaf}": torch.cat(parts)}
    if layer in ("SelfAttention/key", "SelfAttention/value"):
        return {}
    if layer == "SelfAttention/out":
        if leaf == "weight":  # (heads, D / heads, D) -> (D, D)
            value = value.reshape(-1, value.shape[-1])
        return {f"{block}.attn.proj.{leaf}": _linear(value)}
    if rest == "Moe/Router/dense/kernel":
        return {f"{block}.mlp.router.weight": value.T}
    if mlp:
        linear = f"fc{int(mlp[2]) + 1}.{leaf}"  # Dense_0 is fc1
        if mlp[1]:  # of all experts, stacked
            return {f"{block}.mlp.experts.{e}.{linear}": _linear(expert) for e, expert in enumerate(value)}
        return {f"{block}.mlp.{linear}": _linear(value)}
    raise ValueError(f"the V-MoE parameter {name!r} is not supported (QK-norm, Soft MoE, experts-choice).")


def _stitch_name(name: str) -> str:
    """post_stitch ends block b and pre_stitch begins b + 1 there; here both stand in front of block b + 1."""
    match = re.fullmatch(r"blocks\.(\d+)\.(pre|post)_stitch\.(ln|fc)\.(weight|bias)", name)
    if match is None:
        return name
    block, side, part, leaf = match.groups()
    number = int(block) + 1 if side == "post" else int(block)
    # stitch.0 ends the module before (post), stitch.1 begins this one (pre); each is LayerNorm 0, Linear 1
    place = {"post": 0, "pre": 1}[side]
    layer = {"ln": 0, "fc": 1}[part]
    return f"blocks.{number}.stitch.{place}.{layer}.{leaf}"


def _linear(value: Tensor) -> Tensor:
    """A flax kernel (in, out) as torch keeps it; a bias or a scale as it is."""
    return value.mT if value.ndim == 2 else value
