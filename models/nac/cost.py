"""FLOPs of a NAC from its shapes, as models/flops.py counts: types of layers do not tell how often each is run.

The scales that codes make are computed once a batch, not once an image: they are left out.
U receivers, W senders, V tokens, H heads, I width of a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..flops import Flops, of_states, with_weights
from .attention import ModulatedAttention, ReadInAttention
from .layers import ModFC, ModFFN
from .tokens import Tokenizer


def of_whole(nac: Any) -> Flops:
    """Of one image through a NAC."""
    config = nac.config
    senders = config.input_latents + config.mediator_latents
    total = of_tokenizer(nac.tokenizer)
    total += of_read_in(nac.read_in.attn, nac.read_in.ffn, config.input_latents, nac.num_tokens)
    for propagator in nac.propagators:
        total += of_exchange(propagator.attn, propagator.ffn, config.mediator_latents, senders)
    total += of_exchange(nac.read_out.attn, nac.read_out.ffn, config.output_latents, senders)
    return total + linear(nac.confidence, config.output_latents) + linear(nac.head, 1)


def of_tokenizer(tokenizer: Tokenizer) -> Flops:
    """Of one image to tokens."""
    stages = len(tokenizer.stages)
    rows, columns = tokenizer.grid.shape[1:]
    # images take no gradient
    total = replace(linear(tokenizer.stem[0], rows * columns * 4 ** (stages - 1)), to_input=0)
    for number, stage in enumerate(tokenizer.stages):
        places = rows * columns * 4 ** (stages - 1 - number)
        for layer in stage.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                total += linear(layer, places)
    return total


def of_read_in(attn: ReadInAttention, ffn: ModFFN, receivers: int, tokens: int) -> Flops:
    """Of the read-in in its absorbed form."""
    total = linear(attn.query, receivers) + linear(attn.key, receivers) + linear(attn.value, receivers)
    total += linear(attn.exit, receivers)
    # U V H I twice: scores of q' and the tokens, and the tokens they mix
    total += of_states(2 * receivers * tokens * attn.heads * attn.key.weight.shape[1])
    return total + _feed_forward(ffn, receivers)


def of_exchange(attn: ModulatedAttention, ffn: ModFFN, receivers: int, senders: int) -> Flops:
    """Of a propagator or the read-out."""
    total = linear(attn.query, receivers) + linear(attn.key, senders) + linear(attn.value, senders)
    total += linear(attn.exit, receivers)
    # U W (H D) twice: scores, and the values they mix
    total += of_states(2 * receivers * senders * attn.query.weight.shape[0])
    return total + _feed_forward(ffn, receivers)


def linear(layer: nn.Linear | nn.Conv2d | ModFC, rows: int) -> Flops:
    """Of a product with weights, for so many rows or places."""
    return with_weights(rows * layer.weight.numel())


def _feed_forward(ffn: ModFFN, rows: int) -> Flops:
    return linear(ffn.fc1, rows) + linear(ffn.fc2, rows)
