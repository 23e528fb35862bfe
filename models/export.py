"""A saved student as a program that runs without this package: torch.export (.pt2) or ONNX (.onnx), for any batch.

    export(load("owner/name"), "model.onnx")  # models.students

What a forward of a V-MoE computes depends on the data: an expert gets as many rows as tokens ask for it. In the
exported form every expert picks its tokens, computes them and adds them up where they came from, so that only the K
chosen experts of a token are paid for, as in the model itself. A NAC is exported as it is.
B images, T tokens of an image, N = B x T, D width, E experts, K chosen.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .moe.expert import LAYERS, activate
from .moe.layer import MoE
from .moe.out import Out
from .moe.routing import route
from .students import NAC, VMoE

FORMATS = (".pt2", ".onnx")
FOR_ONNX = ("onnx", "onnxscript")  # packages
CHECKED_BATCHES = (1, 7)
# between eager and exported logits, as a share of the largest: the order of float32 additions differs
TOLERANCE = 1e-5
DETAILS = "m2mkd.json"  # what a .pt2 holds of preprocessing and labels; in an .onnx it is metadata of that name


def export(model: VMoE | NAC, path: str | Path, *, batch: int | None = None) -> Path:
    """Write the model, in evaluation mode and fp32 on the CPU, and compare it with the model itself.

    Args:
        model: on plain torch; it stays as it is.
        path: ends in .pt2 (torch.export.load) or .onnx.
        batch: images of every call; None = any number.

    Returns:
        The path.

    Raises:
        ValueError: another ending, a package that is missing, a model that the exporter does not express, and whatever
            exportable raises.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}.")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch must be a whole number of at least 1, or None for any, got {batch!r}.")
    missing = [name for name in FOR_ONNX if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(f"{path} needs {' and '.join(missing)}: pip install {' '.join(FOR_ONNX)}, or write a .pt2.")
    program_form = exportable(model, batch)
    example = _images(model, batch or max(CHECKED_BATCHES))
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations
            program = torch.export.export(program_form, (example,), dynamic_shapes=dynamic)
            run = _save(program, example, path, _details(model))
    except Exception as error:  # whatever an exporter raises
        path.unlink(missing_ok=True)
        raise ValueError(
            f"this model cannot be written as {path.suffix}: {type(error).__name__}, {_first_line(error)}. "
            f"Try {' or '.join(other for other in FORMATS if other != path.suffix)}, or another torch."
        ) from error
    if run is not None:
        _compare(model, run, path, (batch,) if batch else CHECKED_BATCHES)
    return path


def exportable(model: VMoE | NAC, batch: int | None = None) -> nn.Module:
    """A copy in evaluation mode that an exporter understands; logits are those of the model.

    Args:
        batch: as for export.

    Raises:
        ValueError: a model of one rank's experts, groups of images in a batch of any size, or an evaluation that draws.
    """
    if isinstance(model, NAC):
        if model.config.noisy_evaluation:
            raise ValueError(
                "this NAC draws noise in evaluation too (noisy_evaluation), so that no program gives its logits twice: "
                "load it with config=replace(config, noisy_evaluation=False) to export it."
            )
        return copy.deepcopy(model).float().cpu().eval()
    parallel = any(hasattr(module, "deepspeed_moe") for module in model.modules())
    if parallel or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("this model holds one rank's experts: load it with VMoE.from_pretrained to export it.")
    copied = copy.deepcopy(model).float().cpu().eval()
    for block in copied.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp = ExportedMoE(block.mlp, batch)
    return copied


class ExportedMoE(nn.Module):
    """An MoE in evaluation, written so that no shape is asked for as a number."""

    def __init__(self, moe: MoE, batch: int | None) -> None:
        super().__init__()
        self.moe = moe
        self.images = 1  # routed together; without a capacity it does not matter how many
        config = moe.config
        if config.eval_capacity_factor is not None and config.images_per_group > 1:
            if batch is None:
                raise ValueError(
                    f"{config.images_per_group} images compete for the places of an expert (images_per_group, "
                    f"eval_capacity_factor {config.eval_capacity_factor}), which a batch of any size cannot express: "
                    f"give batch (--batch), or load the model with eval_capacity_factor None."
                )
            self.images = math.gcd(config.images_per_group, batch)  # as Routed.route_images

    def forward(self, x_BTD: Tensor, out: Out | None = None) -> Tensor:
        """(B, T, D) in and out."""
        moe = self.moe
        E = moe.config.num_experts
        K = moe.config.k
        logits_GSE = moe._logits(x_BTD).reshape(-1, x_BTD.shape[1] * self.images, E)
        routing = route(logits_GSE, moe.config, moe._slots(tokens=logits_GSE.shape[1]))
        x_ND = x_BTD.reshape(-1, moe.dim)
        # what every expert counts for every token: 0 where it was not chosen, or dropped the token
        weight_NK = routing.weight_GSK.reshape(-1, K)
        expert_NK = routing.expert_GSK.reshape(-1, K)
        weight_NE = x_ND.new_zeros(x_ND.shape[0], E).scatter(1, expert_NK, weight_NK)
        y_ND = torch.zeros_like(x_ND)
        *first, last = LAYERS[moe.act]
        for e, expert in enumerate(moe.experts):
            tokens = weight_NE[:, e].nonzero().squeeze(1)
            x_RD = x_ND.index_select(0, tokens)
            h_RH = activate(moe.act, [expert[name](x_RD) for name in first])
            weight_R1 = weight_NE[:, e].index_select(0, tokens).unsqueeze(1)
            y_ND = y_ND.index_add(0, tokens, expert[last](h_RH) * weight_R1)
        return y_ND.view_as(x_BTD)


def _save(
    program: torch.export.ExportedProgram, example: Tensor, path: Path, details: str
) -> Callable[[Tensor], Tensor] | None:
    """Write the file; returns how to run what was written, None where nothing here can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt2":
        torch.export.save(program, path, extra_files={DETAILS: details})
        return torch.export.load(path).module()
    written = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        verbose=False,
        custom_translation_table=_translations(),
        input_names=["images"],
        output_names=["logits"],
    )
    written.model.metadata_props[DETAILS] = details
    written.save(path)
    if importlib.util.find_spec("onnxruntime") is None:
        logging.getLogger(__name__).warning("%s was not compared with the model: onnxruntime is not installed", path)
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter has no ONNX operator for."""
    from onnxscript import opset18 as op

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # ONNX promises that of equal values the lower index comes first, whichever way TopK sorts
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}


def _compare(model: VMoE | NAC, run: Callable[[Tensor], Tensor], path: Path, batches: tuple[int, ...]) -> None:
    """Refuse, and remove, a file that gives other logits than the model."""
    reference = copy.deepcopy(model).float().cpu().eval()
    for batch in batches:
        images = _images(model, batch)
        with torch.no_grad():
            expected = reference(images)
            found = run(images)
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{path} gave other logits than the model, by {difference:.2g} for {batch} images, expected at most "
                f"{TOLERANCE:g} of the largest: it was removed. Try another format or another torch."
            )


def _images(model: VMoE | NAC, batch: int) -> Tensor:
    """Noise in the shape of normalised images, (B, C, H, W)."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, config.in_chans, config.image_size, config.image_size, generator=generator)


def _details(model: VMoE | NAC) -> str:
    """Preprocessing and class names as JSON."""
    preprocessing = model.preprocessing and model.preprocessing.to_dict()
    return json.dumps({"source": model.source, "preprocessing": preprocessing, "labels": model.labels})


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "without a reason"
