"""DeepSpeed's form of models.moe.MoE: its MOELayer around our gate, our experts and our all-to-all.

The only file of models/ that imports DeepSpeed; models.moe.expert_parallel imports it when it is called. DeepSpeed
knows experts by isinstance(MoE), by `allreduce` and `group_name` on their parameters, and by the word "expert" in
state-dict keys under deepspeed_moe.experts.deepspeed_experts (so no other name here may contain it).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.utils.timer import SynchronizedWallClockTimer
from torch import Tensor, nn

from .dispatch import Dispatch, by_expert, dispatch, filled_up, kept_choices
from .dropout import ExpertDropout, draw_number
from .grouped import LOOP, form_of, row_multiple, run_experts
from .layer import MoE, Routed, mixture
from .out import Out, decided_in
from .routing import Routing, once


class ParallelMoE(DeepSpeedMoE):
    """Takes the router and this rank's experts (Parameter objects included) out of a plain MoE; (B, T, D) in and out.

    With ep_size ranks in a group, rank r of it keeps experts r * E / ep_size and following.
    """

    def __init__(self, moe: MoE, ep_size: int) -> None:
        nn.Module.__init__(self)  # DeepSpeed's own __init__ would build its gate and copies of one expert
        self.dim = moe.dim
        self.hidden = moe.hidden
        self.act = moe.act
        self.config = moe.config
        # read by DeepSpeed
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        self.ep_size = ep_size
        self.num_experts = moe.config.num_experts
        self.num_local_experts = self.num_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        experts = LocalExperts()
        self.deepspeed_moe = ExpertParallel(Gate(moe), experts, self.expert_group_name, ep_size, self.num_local_experts)
        self.deepspeed_moe.act = moe.act
        self.set_deepspeed_parallelism()
        start = dist.get_rank(self.deepspeed_moe.ep_group) * self.num_local_experts
        experts.deepspeed_experts = moe.experts[start : start + self.num_local_experts]
        for parameter in experts.parameters():
            parameter.allreduce = False
            parameter.group_name = self.expert_group_name
        self.train(moe.training)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Find the group; deepspeed.initialize calls this again, and MOELayer takes a group only once."""
        if use_data_before_expert_parallel_:
            raise ValueError(
                "use_data_before_expert_parallelism would hand this rank other experts than it holds; "
                "remove it from the DeepSpeed config."
            )
        if self.deepspeed_moe.ep_group is None:
            self._create_process_groups()

    def forward(self, x_BTD: Tensor, out: Out | None = None) -> Tensor:
        """(B, T, D) in and out; what the gate tells is left in `out`, as by a plain MoE."""
        return self.deepspeed_moe(x_BTD, out)

    def plain_names(self) -> dict[str, tuple[list[str], int]]:
        """For every own state-dict key: its names on a plain MoE, one per rank of the group, and which is ours."""
        names = {}
        for key in self.deepspeed_moe.gate.state_dict():
            names[f"deepspeed_moe.gate.{key}"] = ([key], 0)
        rank = dist.get_rank(self.deepspeed_moe.ep_group)
        for key in self.deepspeed_moe.experts.deepspeed_experts.state_dict():
            local, rest = key.split(".", 1)
            experts = [r * self.num_local_experts + int(local) for r in range(self.ep_size)]
            plain = [f"experts.{expert}.{rest}" for expert in experts]
            names[f"deepspeed_moe.experts.deepspeed_experts.{key}"] = (plain, rank)
        return names


class Gate(Routed, TopKGate):
    """Our router under the type by which DeepSpeed's engine finds a gate; ExpertParallel calls route_images."""

    whole_groups = True  # ranks whose groups differ would wait for each other forever

    def __init__(self, moe: MoE) -> None:
        nn.Module.__init__(self)  # without TopKGate's own linear layer
        self.router = moe.router
        self.config = moe.config
        self.ep_group = None
        # read by the engine when wall_clock_breakdown is on
        self.timers = SynchronizedWallClockTimer()
        self.wall_clock_breakdown = False
        self.gate_time = 0.0


class LocalExperts(nn.Module):
    """This rank's experts, where DeepSpeed looks for their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList()


class ExpertParallel(MOELayer):
    """Routing, rows to the ranks that hold their experts, the experts, and the way back.

    Every rank sends each other one exactly the rows it has for it: nothing is padded to the busiest expert or rank. The
    sizes must be known on the host, so with more than one rank in the group a GPU is waited for once in a forward.
    """

    act: str

    def forward(self, x_BTD: Tensor, out: Out | None = None) -> Tensor:
        """(B, T, D) in and out."""
        config = self.gate.config
        routing, slots = self.gate.route_images(x_BTD, out)
        number_1 = draw_number(x_BTD) if self.training and config.dropout else None
        if self.ep_size == 1:
            experts = self.experts.deepspeed_experts
            return mixture(experts, x_BTD, routing, slots, self.act, config.dropout, number_1, decided_in(out))
        received_PE, sizes, rows = once(decided_in(out), "rows", lambda: self._exchange_sizes(routing, slots))
        x_SD = x_BTD.flatten(0, 1).index_select(0, rows.token_R)
        x_SD = _AllToAll.apply(x_SD, sizes.to_ranks, sizes.from_ranks, self.ep_group)
        y_SD = self._held_here(x_SD, received_PE, sizes, number_1)
        y_RD = _AllToAll.apply(y_SD, sizes.from_ranks, sizes.to_ranks, self.ep_group)
        # y_n = sum over k of weight_nk y_row(n, k), in the weights' float32; a dropped choice reads a row of zeros
        y_NKD = nn.functional.pad(y_RD, (0, 0, 0, 1)).index_select(0, rows.row_NK.flatten())
        y_NKD = y_NKD.view(*rows.row_NK.shape, -1)
        y_ND = (y_NKD * routing.weight_GSK.reshape(*rows.row_NK.shape, 1)).sum(1)
        return y_ND.to(x_BTD.dtype).view_as(x_BTD)

    def _exchange_sizes(self, routing: Routing, slots: int | None) -> tuple[Tensor, _Sizes, Dispatch]:
        """Rows that each rank has for each expert held here, the sizes of both ways, and the rows sent from here."""
        sent_PE = kept_choices(routing, slots).sum(0).view(self.ep_size, self.num_local_experts)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=self.ep_group)
        sizes = _Sizes(*torch.stack([sent_PE, received_PE]).tolist())  # waits for the device
        return received_PE, sizes, dispatch(routing, slots, rows=sum(sizes.to_ranks))

    def _held_here(self, x_SD: Tensor, received_PE: Tensor, sizes: _Sizes, number_1: Tensor | None) -> Tensor:
        """Rows of all ranks, sorted by rank and then by expert, through the experts held here; (S, D) in and out."""
        P, E = received_PE.shape
        # part = rank * E + expert of each row
        part_S = torch.repeat_interleave(received_PE.flatten(), output_size=len(x_SD))
        expert_S = part_S % E
        # nobody may have asked for the experts of this rank; the loop then gives zeros for gradients, on any device
        form = form_of(x_SD) if len(x_SD) else LOOP
        multiple = row_multiple(x_SD, form, len(x_SD), E)
        rows = by_expert(expert_S, E, multiple, sum(filled_up(n, multiple) for n in sizes.for_experts))
        masks = None
        if number_1 is not None:
            numbers = [torch.empty_like(number_1) for _ in range(P)]
            dist.all_gather(numbers, number_1, group=self.ep_group)
            number_P = torch.cat(numbers)
            token_R = rows.token_R
            before_PE = received_PE.flatten().cumsum(0) - received_PE.flatten()
            place_S = torch.arange(len(x_SD), device=x_SD.device) - before_PE[part_S]
            expert_R = dist.get_rank(self.ep_group) * E + expert_S[token_R]
            rank_R = part_S[token_R] // E
            masks = ExpertDropout(self.gate.config.dropout, number_P, expert_R, place_S[token_R], rank_R)
        return run_experts(self.experts.deepspeed_experts, x_SD, rows, self.act, None, masks, form)


class _Sizes:
    """Numbers of rows on the host, for the all-to-all.

    Attributes:
        to_ranks, from_ranks: rows sent to, and received from, each rank of the group.
        for_experts: rows received for each expert held here.
    """

    def __init__(self, sent_PE: list[list[int]], received_PE: list[list[int]]) -> None:
        self.to_ranks = [sum(sent_E) for sent_E in sent_PE]
        self.from_ranks = [sum(received_E) for received_E in received_PE]
        self.for_experts = [sum(received_P) for received_P in zip(*received_PE)]


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, `sent[p]` of them to rank p, and theirs back; in backward the other way round."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.route = (received, sent, group)
        y_SD = x_RD.new_empty(sum(received), x_RD.shape[1])
        dist.all_to_all_single(y_SD, x_RD.contiguous(), received, sent, group=group)
        return y_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grad_SD, *ctx.route), None, None, None
