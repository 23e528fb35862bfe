"""Parameter names of the public NAC code (kamanphoebe/m2mKD) and ours: the one map, for the model and its parts.

| there | here |
|---|---|
| *.native_weight, *.native_bias, *.scale.weight, *.scale_gain | *.weight, *.bias, *.scale.weight, *.gain (ModFC) |
| query_compiler, key_compiler, value_compiler, exit_layer | query, key, value, exit |
| receiver_layernorm, sender_layernorm; layernorm of an FFN | norm, sender_norm; norm |
| layer_scale.gamma | gamma |
| ffn.0, ffn.2 of an FFN | fc1, fc2 |
| read_in.read_in_attention | read_in.attn |
| propagators.i.latent_attention, read_out.latent_attention | propagators.i.attn, read_out.attn |
| *.latent_attention.kernel.bandwidth | *.kernel.bandwidth |
| {input,mediator,output}_latents.signatures_, .codes_ | latents.{input,mediator,output}.signatures, .codes |
| latent_seeder.layernorm, .code_to_state_mu, .code_to_state_logvar | seeder.norm, .mu, .logvar |
| read_out.head.0.module, head.1 | read_out.head_norm, read_out.head |
| *.confidence_scorer, *.to_logits | confidence, head |
| *.backbone.downsample_layers.0, .s of a later stage s | tokenizer.stem, tokenizer.stages.s.downsample |
| *.backbone.stages.s.b.{dwconv,norm,pwconv1,pwconv2,gamma} | tokenizer.stages.s.blocks.b.{conv_dw,..,mlp.fc1,..} |
| *.positional_grid.grid | tokenizer.grid |
| pre_stitch, post_stitch of a student module | pre, post |
| latent_attention, ffn of a mediator student | layers.0.attn, layers.0.ffn |

A bias of keys is left out: softmax does not see it. Single numbers are of shape (1,) here, of () there.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_RULES = (
    (r"native_weight$", "weight"),
    (r"native_bias$", "bias"),
    (r"scale_gain$", "gain"),
    (r"\b(query|key|value)_compiler\b", r"\1"),
    (r"\bexit_layer\b", "exit"),
    (r"\breceiver_layernorm\b", "norm"),
    (r"\bsender_layernorm\b", "sender_norm"),
    (r"\blayer_scale\.gamma$", "gamma"),
    (r"\b(\w+)_latents\.(signatures|codes)_$", r"latents.\1.\2"),
    (r"\blatent_seeder\.layernorm\b", "seeder.norm"),
    (r"\blatent_seeder\.code_to_state_(mu|logvar)\b", r"seeder.\1"),
    (r"\blayernorm\b", "norm"),
    (r"\bhead\.0\.module\b", "head_norm"),
    (r"\bhead\.1\b", "head"),
    (r"\bffn\.0\.", "fc1."),
    (r"\bffn\.2\.", "fc2."),
    (r"\bread_in_attention\b", "attn"),
    (r"\blatent_attention\.kernel\b", "kernel"),
    (r"\blatent_attention\b", "attn"),
    (r"^.*\bconfidence_scorer\b", "confidence"),
    (r"^.*\bto_logits\b", "head"),
    (r"^.*\bbackbone\.downsample_layers\.0\b", "tokenizer.stem"),
    (r"^.*\bbackbone\.downsample_layers\.(\d+)\b", r"tokenizer.stages.\1.downsample"),
    (r"^.*\bbackbone\.stages\.(\d+)\.(\d+)\.", r"tokenizer.stages.\1.blocks.\2."),
    (r"\bdwconv\b", "conv_dw"),
    (r"\bpwconv([12])\b", r"mlp.fc\1"),
    (r"^.*\bpositional_grid\.grid$", "tokenizer.grid"),
    (r"\b(pre|post)_stitch\b", r"\1"),
)


def from_reference(state: Mapping[str, Tensor], mediator: bool = False) -> dict[str, Tensor]:
    """A state dict of the public code under our names.

    Args:
        mediator: it is that of a mediator student, whose one layer is numbered here.
    """
    ours = {}
    for name, value in state.items():
        if name.endswith("key_compiler.native_bias"):
            continue
        new = our_name(name)
        if mediator and new.startswith(("attn.", "ffn.")):
            new = f"layers.0.{new}"
        ours[new] = value.reshape(1) if value.ndim == 0 else value
    return ours


def our_name(name: str) -> str:
    """Our name of a parameter of the public code."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
