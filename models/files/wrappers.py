"""Names of tensors that were saved from a wrapped model: what the wrappers put into them, and the names without it."""

from collections import Counter
from collections.abc import Iterable

# what torch.compile, FullyShardedDataParallel and activation checkpointing put between two parts of a name
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# torch.optim.swa_utils.AveragedModel counts in it; it is no weight
COUNTER = "n_averaged"
GROUPS_SHOWN = 8


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names without wrappers -> names as saved.

    A part that torch puts in goes wherever it stands (blocks.0._orig_mod.norm1.weight). A first part that all names
    have (module., model., backbone., also one in another) goes too: whole models never have one.

    Raises:
        ValueError: two tensors have one name without the wrappers, or some are of a wrapped model and others are not.
    """
    saved = list(names)
    if all(name == COUNTER or name.startswith("module.") for name in saved):
        saved = [name for name in saved if name != COUNTER]
    parts = [[part for part in name.split(".") if part not in WRAPPERS] for name in saved]
    # every name keeps at least its last part
    while len(parts) > 1 and all(len(each) > 1 and each[0] == parts[0][0] for each in parts):
        parts = [each[1:] for each in parts]
    plain: dict[str, str] = {}
    for name, each in zip(saved, parts, strict=True):
        short = ".".join(each)
        if short in plain:
            raise ValueError(f"{plain[short]} and {name} are both {short!r} without what wrappers added to the names.")
        plain[short] = name
    # timm would leave it out of single names, whatever else there is
    wrapped = [name for short, name in plain.items() if short.startswith("module.")]
    if wrapped:
        raise ValueError(f"{len(wrapped)} of its {len(plain)} tensors are those of a wrapped model, like {wrapped[0]}.")
    return plain


def grouped(names: Iterable[str]) -> str:
    """What names begin with, and how many: "blocks. (36), cls_token, norm. (2)"."""
    counts = Counter(name.split(".")[0] + "." * ("." in name) for name in names)
    shown = [f"{first} ({count})" if count > 1 else first for first, count in sorted(counts.items())]
    if len(shown) > GROUPS_SHOWN:
        shown = [*shown[:GROUPS_SHOWN], f"and {len(shown) - GROUPS_SHOWN} more"]
    return ", ".join(shown) or "none"
