"""The meta model: N shallow stages of the teacher's width that stand in for the other modules while one is taught.

B images, T tokens, D teacher width, C classes.
"""

import copy
from collections.abc import Collection, Sequence

import torch
from timm.layers import RotaryEmbeddingMixed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..moe.out import Out
from .positions import learned_per_block
from .stages import Stage, split, with_blocks

INITS = ("teacher", "scratch")


class MetaModel(nn.Module):
    """Stages of the teacher's width in a row; each may be replaced by a module that is taught."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    @classmethod
    def from_teacher(
        cls,
        teacher_model: VisionTransformer,
        num_modules: int,
        blocks_per_module: int = 1,
        init: str = "teacher",
        *,
        teacher_depths: Sequence[int],
        seed: int = 0,
    ) -> "MetaModel":
        """A trainable meta model with the teacher's embedding, width and head.

        Args:
            blocks_per_module: of each stage; 0 = all of the teacher module's, so that the meta model is the teacher.
            init: "teacher" copies the embedding, norm, head and the first blocks of each teacher stage;
                "scratch" starts the same architecture anew with timm's initialisation of its family, drawn from `seed`.
            teacher_depths: blocks per teacher module, `num_modules` of them.

        Raises:
            ValueError: an unknown init or one that does not fit 0 blocks, or depths that do not fit the teacher,
                `num_modules` or `blocks_per_module`.
        """
        if init not in INITS:
            raise ValueError(f"meta init {init!r} is not one of {', '.join(INITS)}.")
        if len(teacher_depths) != num_modules:
            raise ValueError(
                f"the meta model needs one teacher depth per module: got {list(teacher_depths)} "
                f"for {num_modules} modules."
            )
        if blocks_per_module == 0 and init != "teacher":
            raise ValueError("blocks_per_module 0 makes the teacher its own meta model: init must be teacher.")
        if not 0 <= blocks_per_module <= min(teacher_depths):
            raise ValueError(
                f"blocks_per_module {blocks_per_module} must lie between 1 and the smallest teacher module "
                f"({min(teacher_depths)} blocks of {list(teacher_depths)}), or be 0."
            )
        depths = [blocks_per_module or depth for depth in teacher_depths]
        # the first blocks of each teacher module
        numbers = []
        for stage, depth in zip(split(teacher_model, teacher_depths), depths):
            numbers += range(stage.start, stage.start + depth)
        model = copy.deepcopy(with_blocks(teacher_model, numbers))
        model.requires_grad_(True).train()
        if init == "scratch":
            _initialise(model, seed)
        return cls(split(model, depths))

    @property
    def num_modules(self) -> int:
        """N, the number of stages."""
        return len(self.stages)

    @property
    def classifies(self) -> bool:
        """Whether the last stage gives logits (B, C); else what is called so below is normalised tokens (B, T, D)."""
        last = self.stages[-1]
        return not isinstance(last, Stage) or last.num_classes > 0

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, C); of a teacher without classes, normalised tokens (B, T, D)."""
        for stage in self.stages:
            x = stage(x)
        return x

    def front(self, x: Tensor, i: int) -> Tensor:
        """What module i is fed, (B, T, D): the stages before i applied to images; the images themselves when i is 0.

        Raises:
            ValueError: a module that does not exist.
        """
        for stage in self.stages[: self._checked(i)]:
            x = stage(x)
        return x

    def back(self, h: Tensor, i: int) -> Tensor:
        """What `forward` gives, from the output of module i (B, T, D): the stages after i; h itself after the last one.

        Raises:
            ValueError: a module that does not exist.
        """
        for stage in self.stages[self._checked(i) + 1 :]:
            h = stage(h)
        return h

    def hidden_states(
        self, x: Tensor, stages: int | None = None, out: Out | None = None, states: Collection[int] = ()
    ) -> list[Tensor]:
        """The output of every stage in turn, or of the first ones: N-1 border states (B, T, D), then the model's.

        Args:
            out, states: see run_blocks; the stages of one model write into one `out`.
        """
        outputs = []
        for stage in self.stages[:stages]:
            x = stage(x) if out is None else stage(x, out, states)
            outputs.append(x)
        return outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them, or keep them again."""
        for stage in self.stages:
            stage.set_grad_checkpointing(enable)

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.num_modules:
            raise ValueError(f"module {i} does not exist: the meta model has modules 0..{self.num_modules - 1}.")
        return i


def check_pair(teacher_model: VisionTransformer, student_model: VisionTransformer) -> None:
    """Refuse a student whose tokens do not line up one to one with the teacher's.

    Raises:
        ValueError: naming both token counts and the settings that change the student's.
    """
    teacher = _token_counts(teacher_model)
    student = _token_counts(student_model)
    if teacher == student:
        return
    raise ValueError(
        f"teacher and student must have the same tokens: the teacher has {_describe(*teacher)}, the student "
        f"{_describe(*student)}. Set student.patch_size for the patch grid, "
        f"student.reg_tokens for the prefix tokens, or take another teacher."
    )


def _initialise(model: VisionTransformer, seed: int) -> None:
    """timm's initial values anew, in place; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        # a model built with weight_init="skip" remembers "reset", which is torch's initialisation and not the ViT's
        model.weight_init_mode = ""
        model.init_weights()
        # what timm's Eva draws when it is built and never again
        if isinstance(model, Eva) and model.attn_pool is not None:
            model.attn_pool.init_weights()
        rope = getattr(model, "rope", None)
        if learned_per_block(rope):
            drawn = RotaryEmbeddingMixed(rope.dim, rope.depth, rope.num_heads, rope.temperature)
            with torch.no_grad():
                rope.freqs.copy_(drawn.freqs)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def _token_counts(model: VisionTransformer) -> tuple[tuple[int, int], int]:
    """(patches down, patches across), prefix tokens."""
    return tuple(model.patch_embed.grid_size), model.num_prefix_tokens


def _describe(grid: tuple[int, int], num_prefix: int) -> str:
    total = grid[0] * grid[1] + num_prefix
    return f"{total} tokens ({grid[0]}x{grid[1]} patches + {num_prefix} prefix tokens)"
