"""Names and layouts of the official V-MoE (flax) parameters, for tests that compare with it."""

import torch


def torch_state(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Our names and layouts for the official (flax) parameters or gradients under `prefix`.

    Linear kernels are (in, out), convolutions (h, w, in, out), attention (D, heads, D / heads) with query, key and
    value apart, and experts carry a leading E.
    """
    flax = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    def linear(source: str, target: str) -> dict[str, torch.Tensor]:
        return {f"{target}.weight": flax[f"{source}/kernel"].T, f"{target}.bias": flax[f"{source}/bias"]}

    def norm(source: str, target: str) -> dict[str, torch.Tensor]:
        return {f"{target}.weight": flax[f"{source}/scale"], f"{target}.bias": flax[f"{source}/bias"]}

    def attention(source: str, target: str) -> dict[str, torch.Tensor]:
        width = len(flax[f"{source}/query/kernel"])
        kernels = [flax[f"{source}/{name}/kernel"].reshape(width, -1).T for name in ("query", "key", "value")]
        biases = [flax[f"{source}/{name}/bias"].flatten() for name in ("query", "key", "value")]
        out = flax[f"{source}/out/kernel"].reshape(-1, width).T
        return {
            f"{target}.qkv.weight": torch.cat(kernels),
            f"{target}.qkv.bias": torch.cat(biases),
            f"{target}.proj.weight": out,
            f"{target}.proj.bias": flax[f"{source}/out/bias"],
        }

    def experts(source: str, target: str) -> dict[str, torch.Tensor]:
        state = {f"{target}.router.weight": flax[f"{source}/Router/dense/kernel"].T}
        for i in (0, 1):
            for e, kernel in enumerate(flax[f"{source}/Mlp/Dense_{i}/kernel"]):
                state[f"{target}.experts.{e}.fc{i + 1}.weight"] = kernel.T
                state[f"{target}.experts.{e}.fc{i + 1}.bias"] = flax[f"{source}/Mlp/Dense_{i}/bias"][e]
        return state

    state = {
        "cls_token": flax["cls"],
        "pos_embed": flax["Encoder/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": flax["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": flax["embedding/bias"],
        **norm("Encoder/encoder_norm", "norm"),
        **linear("head", "head"),
    }
    for i in range(4):
        source, target = f"Encoder/encoderblock_{i}", f"blocks.{i}"
        state |= norm(f"{source}/LayerNorm_0", f"{target}.norm1") | norm(f"{source}/LayerNorm_1", f"{target}.norm2")
        state |= attention(f"{source}/SelfAttention", f"{target}.attn")
        if f"{source}/Moe/Router/dense/kernel" in flax:
            state |= experts(f"{source}/Moe", f"{target}.mlp")
        else:
            state |= linear(f"{source}/Mlp/Dense_0", f"{target}.mlp.fc1")
            state |= linear(f"{source}/Mlp/Dense_1", f"{target}.mlp.fc2")
    return state
