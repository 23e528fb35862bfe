"""A NAC as student modules of m2mKD: read-in, mediators and read-out between stitches that speak the teacher's width.

The parts are those of the whole NAC, shared with it, so that assembly is the NAC itself, with its own signatures,
codes, seeder and kernels, and the stitches left behind. B images, T tokens of the meta model, C state width, K code
width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..flops import Flops
from ..moe.layer import draw
from ..moe.out import Out
from . import cost
from .model import NAC, Exchange, pool, reset_linear

FEWEST = 3  # modules: one that reads in, one that mediates, one that reads out


class NACModule(nn.Module):
    """What the modules share: a code and first state that are drawn once and never learned, and saved with the module.

    Args:
        index: of the module; its draws depend on this and the seed only.
        receivers: with states of their own; 0 = its receivers are what it is given.

    Attributes:
        whole: the NAC that it is a part of.
    """

    def __init__(self, nac: NAC, index: int, seed: int, receivers: int) -> None:
        super().__init__()
        self.index = index
        # in a tuple, which torch does not look into: the whole is no part of its part
        self._whole = (nac,)
        self.register_buffer("code", torch.empty(max(receivers, 1), nac.config.code_dim))
        draw(self.code, nn.init.normal_, seed, "student", index, "code")
        if receivers:
            self.register_buffer("state", torch.empty(1, receivers, nac.config.state_dim))
            draw(self.state, nn.init.normal_, seed, "student", index, "state")

    @property
    def whole(self) -> NAC:
        return self._whole[0]

    def hand_over(self) -> None:
        """Give what was learned to those parts of the whole that it stands for without holding them; most hold all."""

    def _fixed(self, name: str, value: Tensor | None) -> Tensor:
        """The draw of that name, in the type that weights work in, or what is handed in."""
        if value is not None:
            return value
        return getattr(self, name).to(next(self.parameters()).dtype)


class ReadInModule(NACModule):
    """Images (B, channels, H, W) -> (B, U, D_t): receivers read all tokens of the tokenizer.

    Published is one receiver, which squeezes the image through one token; with one per token of the teacher, the output
    is in the place of the teacher module's.
    """

    def __init__(self, nac: NAC, teacher_width: int, seed: int, receivers: int = 1) -> None:
        super().__init__(nac, 0, seed, receivers)
        self.tokenizer = nac.tokenizer
        self.read_in = nac.read_in
        self.post = _stitch(nac.config.state_dim, teacher_width, seed, 0, "post")

    def forward(
        self, images: Tensor, out: Out | None = None, code: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor:
        """Images -> (B, U, D_t); codes (U or 1, K) and states (B or 1, U, C) may be handed in."""
        code = self._fixed("code", code)
        state = self._fixed("state", state)
        states = self.read_in(state.expand(len(images), -1, -1), code, self.tokenizer(images))
        return self.post(states)

    @property
    def tokens_out(self) -> int:
        """Length of the token sequence that it gives."""
        return self.state.shape[1]

    def count_flops(self, tokens: int) -> Flops:
        """FLOPs of one image (models/flops.py)."""
        receivers, read_in = self.tokens_out, self.read_in
        found = cost.of_tokenizer(self.tokenizer)
        found += cost.of_read_in(read_in.attn, read_in.ffn, receivers, self.whole.num_tokens)
        return found + cost.linear(self.post, receivers)


class MediatorModule(NACModule):
    """Tokens (B, T, D_t) -> (B, T, D_t): every token hears every other; no kernel, one code for all.

    Args:
        propagators: that it stands for, in a row.
        one_layer: hold the first of them alone, as the published module does; `hand_over` gives the others its weights.
    """

    def __init__(
        self,
        nac: NAC,
        propagators: Sequence[Exchange],
        index: int,
        teacher_width: int,
        seed: int,
        one_layer: bool = False,
    ) -> None:
        super().__init__(nac, index, seed, receivers=0)
        self.pre = _stitch(teacher_width, nac.config.state_dim, seed, index, "pre")
        held = propagators[:1] if one_layer else propagators
        # a propagator's kernel stays behind: nothing here depends on it
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": propagator.attn, "ffn": propagator.ffn}) for propagator in held
        )
        # in a tuple, as the whole
        self._not_held = tuple(propagators[len(held) :])
        self.post = _stitch(nac.config.state_dim, teacher_width, seed, index, "post")

    def forward(self, tokens: Tensor, out: Out | None = None, code: Tensor | None = None) -> Tensor:
        """(B, T, D_t) -> (B, T, D_t); the code (1, K) may be handed in."""
        code = self._fixed("code", code)
        states = self.pre(tokens)
        for layer in self.layers:
            states = layer["ffn"](layer["attn"](states, code, states, code), code)
        return self.post(states)

    def hand_over(self) -> None:
        """The propagators that it does not hold start from its layer: weights alike, each its own from here on."""
        for propagator in self._not_held:
            for name, part in self.layers[0].items():
                getattr(propagator, name).load_state_dict(part.state_dict())

    def count_flops(self, tokens: int) -> Flops:
        """FLOPs of one image (models/flops.py) of so many tokens."""
        found = replace(cost.linear(self.pre, tokens), to_input=0) + cost.linear(self.post, tokens)
        for layer in self.layers:
            found += cost.of_exchange(layer["attn"], layer["ffn"], tokens, tokens)
        return found


class ReadOutModule(NACModule):
    """Tokens (B, T, D_t) -> logits (B, classes): one receiver hears all tokens; no kernel."""

    def __init__(self, nac: NAC, index: int, teacher_width: int, seed: int) -> None:
        super().__init__(nac, index, seed, receivers=1)
        self.pre = _stitch(teacher_width, nac.config.state_dim, seed, index, "pre")
        self.attn = nac.read_out.attn
        self.ffn = nac.read_out.ffn
        self.confidence = nac.confidence
        self.head = nac.head

    def forward(
        self, tokens: Tensor, out: Out | None = None, code: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor:
        """(B, T, D_t) -> logits (B, classes); code (1, K) and state (B or 1, 1, C) may be handed in."""
        code = self._fixed("code", code)
        state = self._fixed("state", state)
        receivers = state.expand(len(tokens), -1, -1)
        # the senders of this one are modulated by the receiver's code, as there is no other
        states = self.ffn(self.attn(receivers, code, self.pre(tokens), code), code)
        return self.head(pool(states, self.confidence))

    def count_flops(self, tokens: int) -> Flops:
        """FLOPs of one image (models/flops.py) of so many tokens."""
        found = replace(cost.linear(self.pre, tokens), to_input=0) + cost.of_exchange(self.attn, self.ffn, 1, tokens)
        return found + cost.linear(self.confidence, 1) + cost.linear(self.head, 1)


def student_modules(
    nac: NAC, depths: Sequence[int], teacher_width: int, seed: int, receivers: int = 1, one_layer: bool = False
) -> list[NACModule]:
    """The student modules of a NAC, sharing its parameters.

    Args:
        receivers: of the read-in, see ReadInModule.
        one_layer: of every mediator module, see MediatorModule.
        depths: blocks per module; the first is the read-in, the last the read-out, those between share the propagators.

    Raises:
        ValueError: fewer than 3 modules, or depths that do not fit.
    """
    propagators = list(nac.propagators)
    mediators = list(depths[1:-1])
    check_modules(len(depths), len(propagators))
    if depths[0] != 1 or depths[-1] != 1 or sum(mediators) != len(propagators) or min(mediators) < 1:
        raise ValueError(
            f"depths {list(depths)} do not fit a NAC of {len(propagators)} propagators: the first and the last module "
            f"are read-in and read-out, 1 each, and those between must be 1 or more and make {len(propagators)} "
            "together."
        )
    modules: list[NACModule] = [ReadInModule(nac, teacher_width, seed, receivers)]
    for index, depth in enumerate(mediators, start=1):
        start = sum(mediators[: index - 1])
        taken = propagators[start : start + depth]
        modules.append(MediatorModule(nac, taken, index, teacher_width, seed, one_layer))
    modules.append(ReadOutModule(nac, len(depths) - 1, teacher_width, seed))
    return modules


def check_modules(modules: int, propagators: int) -> None:
    """Refuse a number of modules that a NAC cannot be cut into.

    Raises:
        ValueError: naming both numbers and the way out.
    """
    if modules < FEWEST:
        raise ValueError(
            f"a NAC is taught in {FEWEST} modules at least (read-in, mediators, read-out), got modules {modules}."
        )
    if modules - 2 > propagators:
        raise ValueError(
            f"modules {modules} make {modules - 2} mediator modules, but this NAC has {propagators} propagators: lower "
            f"modules to {propagators + 2}, or raise student.propagators."
        )


def _stitch(width_in: int, width_out: int, seed: int, index: int, place: str) -> nn.Linear:
    """The published stitch: a linear layer alone."""
    layer = nn.Linear(width_in, width_out)
    reset_linear(layer, seed, f"student.{index}.{place}")
    return layer
