"""DeepSpeed's form of models.moe.MoE: its MOELayer (all-to-all, sparse dispatch) around our gate and our experts.

The only file of models/ that imports DeepSpeed; models.moe.expert_parallel imports it when it is called. DeepSpeed
knows experts by isinstance(MoE), by `allreduce` and `group_name` on their parameters, and by the word "expert" in
state-dict keys under deepspeed_moe.experts.deepspeed_experts (so no other name here may contain it).
"""

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.utils.timer import SynchronizedWallClockTimer
from torch import Tensor, nn

from .dropout import ExpertDropout, draw_number
from .layer import MoE, Routed, run_experts
from .out import Out


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
        gate = Gate(moe)
        experts = LocalExperts(moe)
        self.deepspeed_moe = MOELayer(gate, experts, self.expert_group_name, ep_size, self.num_local_experts)
        self.set_deepspeed_parallelism()
        start = dist.get_rank(self.deepspeed_moe.ep_group) * self.num_local_experts
        experts.deepspeed_experts = moe.experts[start : start + self.num_local_experts]
        experts.first = start
        experts.ep_group = self.deepspeed_moe.ep_group
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
        # MOELayer flattens the tokens and hands its second argument on to the gate as it is
        return self.deepspeed_moe(x_BTD, (x_BTD.shape[1], out))

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
    """Our routing behind the interface MOELayer expects of a gate."""

    def __init__(self, moe: MoE) -> None:
        nn.Module.__init__(self)  # without TopKGate's own linear layer
        self.router = moe.router
        self.config = moe.config
        self.ep_group = None
        # read by the engine when wall_clock_breakdown is on
        self.timers = SynchronizedWallClockTimer()
        self.wall_clock_breakdown = False
        self.gate_time = 0.0

    def forward(
        self, x_ND: Tensor, length_and_out: tuple[int, Out | None], sparse_routes: bool, use_tutel: bool
    ) -> tuple:
        """(auxiliary loss, rows, E, expert_KN with -1 = dropped, row_KN, weight_KN, choices per expert).

        The loss slot stays empty: models.moe.auxiliary_loss reads it from `out`.

        Args:
            length_and_out: tokens of an image, and what route_images tells goes in here.
        """
        tokens_per_image, out = length_and_out
        x_BTD = x_ND.view(-1, tokens_per_image, x_ND.shape[-1])
        routing, row_NK, rows = self.route_images(x_BTD, out)
        if not self.training:
            rows = torch.as_tensor(rows, device=x_ND.device)  # in evaluation ranks may have other numbers of images
        if isinstance(rows, Tensor):
            # where nothing is dropped, too: the all-to-all needs equal batches on all ranks of the group
            dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.ep_group)
        expert_NK = torch.where(row_NK >= 0, routing.expert_GSK.reshape(row_NK.shape), -1)
        weight_NK = routing.weight_GSK.reshape(row_NK.shape)
        counts_E = routing.count_GE.sum(0)
        return None, rows, self.config.num_experts, expert_NK.T, row_NK.T, weight_NK.T, counts_E


class LocalExperts(nn.Module):
    """This rank's experts, all at once."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.act = moe.act
        self.dropout = moe.config.dropout
        self.deepspeed_experts = nn.ModuleList()
        self.first = 0  # number of the first own expert among all
        self.ep_group: dist.ProcessGroup | None = None

    def forward(self, x_PERD: Tensor) -> Tensor:
        """(ranks of the group, own experts, rows of a rank, D) in and out."""
        P, E, R, D = x_PERD.shape
        x_ERD = x_PERD.transpose(0, 1).reshape(E, P * R, D)
        dropout = None
        if self.training and self.dropout:
            dropout = ExpertDropout(self.dropout, self._numbers(x_PERD), self.first)
        y_ERD = run_experts(self.deepspeed_experts, x_ERD, self.act, dropout)
        return y_ERD.view(E, P, R, D).transpose(0, 1)

    def _numbers(self, x_PERD: Tensor) -> Tensor:
        """What every rank of the group has drawn for the dropout of its own rows, (P,) (collective)."""
        own_number = draw_number(x_PERD)
        numbers = [torch.empty_like(own_number) for _ in range(len(x_PERD))]
        dist.all_gather(numbers, own_number, group=self.ep_group)
        return torch.cat(numbers)
