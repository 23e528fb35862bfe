"""The two attentions of a NAC: modules reading tokens, and modules reading each other under a kernel.

B images, V tokens, U receivers, W senders, C state width, I token width, K code width, H heads, D channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import NORM_EPS, Draws, ModFC, drop_path


class ReadInAttention(nn.Module):
    """Every receiver reads all tokens through keys and values of its own, k[v, u] = ModFC(LN(x_v), c_u).

    Computed without them: with q' = s_k(c_u) * (Wk_h^T q_uh), q.k is q'.LN(x_v), and the mean of the values is
    Wv_h (s_v(c_u) * sum_v a LN(x_v)). No tensor has tokens, receivers and a width. A bias of the keys would shift all
    scores of a receiver alike, which softmax does not see: there is none, with `qkv_bias` either.
    """

    def __init__(
        self,
        token_dim: int,
        state_dim: int,
        code_dim: int,
        heads: int,
        head_dim: int,
        gamma: float = 1.0,
        *,
        residual: bool = True,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.residual = residual
        self.sender_norm = nn.LayerNorm(token_dim, eps=NORM_EPS)
        self.norm = nn.LayerNorm(state_dim, eps=NORM_EPS)
        self.query = ModFC(state_dim, inner, code_dim, bias=qkv_bias)
        self.key = ModFC(token_dim, inner, code_dim, bias=False)
        self.value = ModFC(token_dim, inner, code_dim, bias=qkv_bias)
        self.exit = ModFC(inner, state_dim, code_dim)
        self.gamma = nn.Parameter(torch.full((state_dim,), gamma))

    def forward(self, states_BUC: Tensor, code_UK: Tensor, tokens_BVI: Tensor) -> Tensor:
        """New states (B, U, C)."""
        tokens = self.sender_norm(tokens_BVI).unsqueeze(1)
        q_BUHD = self.query(self.norm(states_BUC), code_UK).unflatten(-1, (self.heads, -1))
        head_dim = q_BUHD.shape[-1]
        key_HDI = self.key.weight.unflatten(0, (self.heads, head_dim))
        value_HDI = self.value.weight.unflatten(0, (self.heads, head_dim))
        # q' = s_k(c) * (Wk_h^T q)
        absorbed_BHUI = torch.einsum("buhd,hdi->bhui", q_BUHD, key_HDI) * self.key.scale_of(code_UK)
        senders = tokens.expand(-1, self.heads, -1, -1)
        # sum_v softmax_v(q'.LN(x_v) / sqrt(D)) LN(x_v)
        mean_BHUI = F.scaled_dot_product_attention(absorbed_BHUI, senders, senders, scale=1 / math.sqrt(head_dim))
        # Wv_h (s_v(c) * mean) + b
        message = torch.einsum("bhui,hdi->buhd", mean_BHUI * self.value.scale_of(code_UK), value_HDI).flatten(2)
        if self.value.bias is not None:
            message = message + self.value.bias
        change = self.gamma * self.exit(message, code_UK)
        return states_BUC + change if self.residual else change


class ModulatedAttention(nn.Module):
    """Multi-head attention between modules; queries, keys, values and exit are modulated by their modules' codes.

    Args:
        share_norm: senders go through the receivers' LayerNorm; else they have their own.
        qkv_bias: of queries and values; for keys see ReadInAttention.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        heads: int,
        head_dim: int,
        gamma: float = 0.1,
        path_drop: float = 0.0,
        *,
        share_norm: bool,
        residual: bool,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.residual = residual
        self.path_drop = path_drop
        self.norm = nn.LayerNorm(state_dim, eps=NORM_EPS)
        self.sender_norm = None if share_norm else nn.LayerNorm(state_dim, eps=NORM_EPS)
        self.query = ModFC(state_dim, inner, code_dim, bias=qkv_bias)
        self.key = ModFC(state_dim, inner, code_dim, bias=False)
        self.value = ModFC(state_dim, inner, code_dim, bias=qkv_bias)
        self.exit = ModFC(inner, state_dim, code_dim)
        self.gamma = nn.Parameter(torch.full((state_dim,), gamma))

    def forward(
        self,
        states_BUC: Tensor,
        code_UK: Tensor,
        senders_BWC: Tensor,
        sender_code_WK: Tensor,
        log_kernel: Tensor | None = None,
        draws: Draws | None = None,
        name: str = "",
    ) -> Tensor:
        """New states of the receivers (B, U, C).

        Args:
            log_kernel: (U, W) or (B, U, W), added to the scores. A receiver all of whose senders are at -inf gets the
                empty sum, a zero message: only the bias of the exit layer reaches it.
            draws, name: uniforms of the path drop may be handed in as f"{name}.path".
        """
        sender_norm = self.norm if self.sender_norm is None else self.sender_norm
        senders = sender_norm(senders_BWC)
        q_BHUD = self._by_head(self.query(self.norm(states_BUC), code_UK))
        k_BHWD = self._by_head(self.key(senders, sender_code_WK))
        v_BHWD = self._by_head(self.value(senders, sender_code_WK))
        reached = None
        if log_kernel is not None:
            reached = (log_kernel > -torch.inf).any(-1, keepdim=True)
            # softmax over nothing is NaN, also in the gradient of what is masked afterwards
            log_kernel = torch.where(reached, log_kernel, 0.0).to(q_BHUD.dtype)
            if log_kernel.ndim == 3:
                log_kernel = log_kernel.unsqueeze(1)
        message = F.scaled_dot_product_attention(q_BHUD, k_BHWD, v_BHWD, attn_mask=log_kernel)
        message = message.transpose(1, 2).flatten(2)
        if reached is not None:
            message = message * reached
        change = self.gamma * self.exit(message, code_UK)
        if not self.residual:
            return change
        return states_BUC + drop_path(change, self.path_drop if self.training else 0.0, draws, f"{name}.path")

    def weights(
        self,
        states_BUC: Tensor,
        code_UK: Tensor,
        senders_BWC: Tensor,
        sender_code_WK: Tensor,
        log_kernel: Tensor,
    ) -> Tensor:
        """How much of each sender a receiver takes, (B, H, U, W), to look at; 0 for a receiver that hears nobody."""
        sender_norm = self.norm if self.sender_norm is None else self.sender_norm
        q_BHUD = self._by_head(self.query(self.norm(states_BUC), code_UK))
        k_BHWD = self._by_head(self.key(sender_norm(senders_BWC), sender_code_WK))
        scores = q_BHUD @ k_BHWD.mT / math.sqrt(q_BHUD.shape[-1]) + log_kernel
        return scores.softmax(-1).nan_to_num(0.0)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
