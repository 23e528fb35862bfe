"""A detector: feature maps of one of our backbones, and transformers' RF-DETR on them (box and mask heads, its losses).

Why RF-DETR: it is pure torch, has boxes and instance masks, reads one map of patches, which is what a ViT has, and
normalises by LayerNorm. LW-DETR, which it comes from, has batch norm, whose statistics would be those of a rank.
B images, Q queries, C categories, D channels; h, w patches down and across.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from ..flops import Flops
from ..moe.out import Out, inside
from .backbone import Made
from .config import DetectorConfig
from .features import FeatureMaps
from .images import as_tensor, in_pixels

MASK_STRIDE = 4  # pixels of an image per pixel of a mask, as published
MOST_TOLD = 100  # objects told of an image, as COCO counts them


@dataclass(frozen=True)
class Target:
    """The objects of a picture as the detector sees it.

    Attributes:
        category_N: int64, index among the detector's categories.
        box_N4: centre x, centre y, width, height as shares of the picture (unpadded).
        mask_NHW: uint8, of the picture's size; None where no masks are taught.
    """

    category_N: Tensor
    box_N4: Tensor
    mask_NHW: Tensor | None = None

    def to(self, device: torch.device | str) -> "Target":
        """The same on a device."""
        masks = None if self.mask_NHW is None else self.mask_NHW.to(device, non_blocking=True)
        return Target(self.category_N.to(device, non_blocking=True), self.box_N4.to(device, non_blocking=True), masks)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first, on the CPU.

    Attributes:
        score_N: 0 to 1.
        category_N: int64, index among the detector's categories.
        box_N4: left, top, right, bottom in pixels of the original image.
        mask_NHW: bool, of the original image's size; None where the detector tells no masks.
    """

    score_N: Tensor
    category_N: Tensor
    box_N4: Tensor
    mask_NHW: Tensor | None = None


class Detector(nn.Module):
    """Pictures of any sizes -> objects.

    Args:
        vit: the backbone; taken over and changed (FeatureMaps).
        made: what it was built as, which is saved with the detector.
        seed: of the heads' initial values.
    """

    def __init__(self, config: DetectorConfig, vit: nn.Module, made: Made, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.made = made
        self.backbone = FeatureMaps(vit, config.maps, config.window, config.global_blocks)
        self.heads = Heads(config, self.backbone, seed)
        self.source: str | None = None  # that it was loaded from

    def forward(
        self, pictures: Sequence[Tensor], targets: Sequence[Target] | None = None, out: Out | None = None
    ) -> Any:
        """Loss and its parts, or without targets what the heads tell; see Heads.

        Args:
            pictures: (C, H, W) each, normalised, on the device and in the type of the backbone.
            targets: of each picture.
            out: takes what the MoE layers tell of their routing.
        """
        maps = self.backbone(pictures, inside(out, "backbone"))
        return self.heads(maps, sizes_of(pictures), targets)

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """The objects of RGB images, each looked at alone, so that nothing depends on what else is asked for."""
        found = []
        for image in images:
            picture = as_tensor(image, self.config)
            found.append(self.detect_picture(picture, (image.height, image.width)))
        return found

    @torch.no_grad()
    def detect_picture(self, picture: Tensor, original: tuple[int, int], out: Out | None = None) -> Detections:
        """The objects of one resized and normalised picture (C, H, W).

        Args:
            original: height and width of the image it was, pixels, which boxes and masks are told in.
            out: as in forward.
        """
        weight = self.backbone.vit.patch_embed.proj.weight
        outputs = self([picture.to(weight.device, weight.dtype)], out=out)
        # a query that found no patch of the picture left has a box without extent (_grid_of_all)
        told_Q = (outputs.pred_boxes[0][:, 2:] > 0).all(1)
        score_QC = outputs.logits[0][told_Q].sigmoid()
        categories = score_QC.shape[1]
        score_N, place_N = score_QC.flatten().topk(min(MOST_TOLD, score_QC.numel()))
        query_N = place_N // categories
        size = (picture.shape[-2], picture.shape[-1])
        share = _padded_share(size, self.backbone.patch_size)
        box_N4 = in_pixels(outputs.pred_boxes[0][told_Q][query_N] / share.to(score_N.device), original)
        masks = None
        if self.config.masks:
            masks = self._masks(outputs.pred_masks[0][told_Q][query_N], size, original).cpu()
        return Detections(score_N.cpu(), (place_N % categories).cpu(), box_N4.cpu(), masks)

    def _masks(self, logit_NHW: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
        """Masks of a picture's patches, as of the original image."""
        side = self.backbone.patch_size
        grid = (-(-size[0] // side), -(-size[1] // side))
        canvas = tuple(length * side for length in _grid_of_all([grid], self.config.queries))
        logits = F.interpolate(logit_NHW[None], size=canvas, mode="bilinear", align_corners=False)
        logits = logits[..., : size[0], : size[1]]
        return F.interpolate(logits, size=original, mode="bilinear", align_corners=False)[0] > 0


class Heads(nn.Module):
    """Feature maps -> objects, or their loss: all of a detector but its backbone.

    They always compute in float32: as shares of an image, numbers of bfloat16 would be wrong by several pixels.

    Args:
        backbone: that the maps come from.
        seed: of the initial values.
    """

    def __init__(self, config: DetectorConfig, backbone: FeatureMaps, seed: int) -> None:
        super().__init__()
        self.masks = config.masks
        self.patch_size = backbone.patch_size
        self.queries = config.queries
        self.map_channels = [backbone.width] * len(backbone.read)
        self.rf_detr = _rf_detr(config, backbone, seed)
        self._counted: dict[tuple[int, int], tuple[int, ...]] = {}  # by count_kept, which takes a second

    def forward(
        self,
        maps: Sequence[Sequence[Tensor]],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> Any:
        """See Detector.forward.

        Args:
            maps: of each picture, as FeatureMaps gives them.
            sizes: height and width of each picture.

        Returns:
            (loss (), parts by name); without targets logits (B, Q, C), pred_boxes (B, Q, 4) as shares of whole patches,
            and pred_masks (B, Q, h', w').
        """
        canvas = _Canvas(maps, self.patch_size, self.queries)
        labels = None
        if targets is not None:
            labels = [self._label(*pair, canvas) for pair in zip(sizes, targets, strict=True)]
        outputs = self._run({"pixel_values": canvas, "pixel_mask": canvas.mask_Bhw, "labels": labels})
        if targets is None:
            return outputs
        return _loss(outputs.loss_dict, self.rf_detr.config)

    def count_flops(self, patches: int) -> Flops:
        """FLOPs of one square image of so many patches as torch counts them, all groups of queries included.

        Matching and losses are left out.
        """
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self._shapes_alone(1, patches, torch.float32)
        forward = counter.get_total_flops()
        return Flops(forward, forward, forward)

    def count_kept(self, images: int, patches: int, bytes_per_number: int) -> int:
        """Bytes that a forward of so many square images keeps for the backward pass, as torch's autograd tells.

        With masks, the logits of every query's mask are among them, or in backward their gradients: of each decoder
        layer and of the proposals. What the losses keep of matched objects is left out.

        Args:
            bytes_per_number: of the weights; the heads compute in float32 anyway.
        """
        key = (patches, bytes_per_number)
        if key not in self._counted:
            self._counted[key] = tuple(self._count_kept(count, *key) for count in (1, 2))
        of_one, of_two = self._counted[key]
        return of_one + (images - 1) * (of_two - of_one)  # what is kept of weights is kept once

    def _count_kept(self, images: int, patches: int, bytes_per_number: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter):
                kept[storage._cdata] = storage.nbytes()
            return tensor

        dtype = torch.float32 if bytes_per_number == torch.float32.itemsize else torch.bfloat16
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self._shapes_alone(images, patches, dtype)
        logits = 0
        if self.masks:
            masks = outputs.pred_masks
            logits = (self.rf_detr.config.decoder_layers + 1) * masks.numel() * masks.itemsize
        return sum(kept.values()) + logits

    def _shapes_alone(self, images: int, patches: int, dtype: torch.dtype) -> Any:
        """What the heads tell in training of square images, on the meta device: nothing is computed."""
        side = max(1, round(patches**0.5))
        heads = copy.deepcopy(self).to("meta", dtype).train()
        maps = []
        for _ in range(images):
            maps.append(
                [torch.zeros(channels, side, side, device="meta", dtype=dtype) for channels in self.map_channels]
            )
        with torch.enable_grad():
            return heads(maps, images * [(side * self.patch_size, side * self.patch_size)])

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        if next(self.parameters()).dtype == torch.float32:
            return self.rf_detr(**arguments)
        # the weights of a bfloat16 run are rounded, what is computed of them is not
        weights = {name: tensor.float() for name, tensor in self.rf_detr.named_parameters()}
        return functional_call(self.rf_detr, weights, kwargs=dict(arguments))

    def _label(self, size: tuple[int, int], target: Target, canvas: "_Canvas") -> dict[str, Tensor]:
        """What transformers' loss wants of a picture."""
        share = _padded_share(size, self.patch_size).to(target.box_N4.device)
        label = {"class_labels": target.category_N, "boxes": target.box_N4 * share}
        if self.masks:
            masks = target.mask_NHW
            right, below = canvas.shape[-1] - masks.shape[-1], canvas.shape[-2] - masks.shape[-2]
            label["masks"] = F.pad(masks, (0, right, 0, below)).float()
        return label


def sizes_of(pictures: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each picture (C, H, W)."""
    return [(picture.shape[-2], picture.shape[-1]) for picture in pictures]


class _Canvas:
    """The maps of a batch, zeros behind the smaller ones, in the place where transformers' model takes its images.

    Our backbone has run already: of the images the model asks nothing but their size.
    """

    def __init__(self, maps: Sequence[Sequence[Tensor]], patch_size: int, queries: int) -> None:
        grids = [of_picture[0].shape[-2:] for of_picture in maps]
        height, width = _grid_of_all(grids, queries)
        self.device = maps[0][0].device
        self.shape = torch.Size((len(maps), 3, height * patch_size, width * patch_size))
        self.mask_Bhw = torch.zeros(len(maps), height, width, dtype=torch.long, device=self.device)
        by_block = []
        for number in range(len(maps[0])):
            padded = []
            for of_picture, grid in zip(maps, grids):
                padded.append(F.pad(of_picture[number].float(), (0, width - grid[1], 0, height - grid[0])))
            by_block.append(torch.stack(padded))
        for row, grid in enumerate(grids):
            self.mask_Bhw[row, : grid[0], : grid[1]] = 1
        self.maps = tuple(by_block)


def _grid_of_all(grids: Sequence[tuple[int, int]], queries: int) -> tuple[int, int]:
    """Rows and columns of a map that holds maps of these; the model picks a place of it for each query."""
    height = max(grid[0] for grid in grids)
    width = max(grid[1] for grid in grids)
    return max(height, -(-queries // width)), width


class _Projector(nn.Module):
    """The part of RF-DETR's encoder that is behind the backbone: the maps of several blocks into one."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, canvas: _Canvas, mask_Bhw: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, h, w), and where it shows a picture."""
        return self.projector(canvas.maps), mask_Bhw.bool()


def _rf_detr(config: DetectorConfig, backbone: FeatureMaps, seed: int) -> nn.Module:
    """transformers' RF-DETR without its backbone, new."""
    from transformers import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    count = len(backbone.read)
    stand_in = RfDetrDinov2Config(  # is built, and dropped below
        hidden_size=backbone.width,
        num_hidden_layers=count,
        num_attention_heads=1,
        mlp_ratio=1,
        image_size=backbone.patch_size,
        patch_size=backbone.patch_size,
        out_features=[f"stage{number + 1}" for number in range(count)],
    )
    values = RfDetrConfig(
        backbone_config=stand_in,
        num_labels=len(config.categories),
        d_model=config.width,
        num_queries=config.queries,
        group_detr=config.groups,
        decoder_layers=config.layers,
        decoder_self_attention_heads=config.heads,
        decoder_cross_attention_heads=config.heads,
        decoder_ffn_dim=config.mlp_dim,
        dropout=config.dropout,
        mask_downsample_ratio=MASK_STRIDE,
    )
    kind = RfDetrForInstanceSegmentation if config.masks else RfDetrForObjectDetection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = kind(values)
    inner = head.model.model if config.masks else head.model
    inner.backbone = _Projector(inner.backbone.projector)
    return head


def _loss(terms: Mapping[str, Tensor], config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms, and those of the last layer by name.

    Summed here, as the sum of transformers is of no size where a batch has no object and masks are taught.
    """
    weights = {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask_ce": config.mask_class_loss_coefficient,
        "loss_mask_dice": config.mask_dice_loss_coefficient,
    }
    names = {"loss_ce": "class", "loss_bbox": "box", "loss_giou": "giou"}
    names |= {"loss_mask_ce": "mask", "loss_mask_dice": "dice"}
    total = torch.zeros((), device=terms["loss_ce"].device)
    parts = {}
    for name, value in terms.items():
        term = next((term for term in weights if name == term or name.startswith(f"{term}_")), None)
        if term is None:  # a count for the log
            continue
        total = total + weights[term] * value.sum()
        if name == term:
            parts[names[term]] = value.sum().detach()
    return total, parts


def _padded_share(size: tuple[int, int], patch_size: int) -> Tensor:
    """(4,) how much of its whole patches a picture of this height and width fills: width, height, width, height."""
    height, width = size
    shares = [side / (-(-side // patch_size) * patch_size) for side in (width, height)]
    return torch.tensor(shares * 2)
