"""The analysis of an evaluation against its own images: classes by hand, routing against the router itself."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.moe.layer import MoE, MoEConfig
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.data import AugmentConfig, DataConfig
from trainer.data.loader import Data
from trainer.data.sources import open_source
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.analysis import Analysis, _classes

ALONE = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
PREPROCESSING = Preprocessing(8, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear")


def student(**moe):
    config = VMoEConfig(image_size=8, patch_size=2, width=16, depth=4, heads=2, mlp_dim=8, num_classes=10,
                        moe_blocks="1,3", reg_tokens=1, moe=MoEConfig(num_experts=4, k=2, **moe))  # fmt: skip
    model = VMoE(config).eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, MoE):
            torch.nn.init.normal_(module.router.weight)
    torch.nn.init.normal_(model.head.weight)
    return model


def analysed(model, limit=21, batch=8):
    source = open_source(DataConfig(limit=limit), "val")
    data = Data(source, source, PREPROCESSING, AugmentConfig(), 0, 10, False)
    analysis = Analysis(model, source, PREPROCESSING, ALONE)
    metrics = evaluate(Predictor(model, model), data, torch.float32, batch, ALONE, observe=analysis.observe)
    return analysis.summary(), metrics, source


def test_counts_per_class_by_hand():
    truth, predicted = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 1, 0, 2])
    found = _classes(truth, predicted, ["a", "b", "c", "d"])
    assert found["classes"] == {"images": [4, 2, 1, 0], "correct": [1, 1, 1, 0], "predicted": [2, 3, 2, 0],
                                "taken_for": [1, 0, -1, -1], "taken_count": [2, 1, 0, 0]}  # fmt: skip
    assert found["confusion"] == [[1, 2, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found["confusions"] == [[0, 1, 2], [1, 0, 1], [0, 2, 1]]


def test_a_thousand_classes_stay_small():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 1000, (2, 50_000))
    found = _classes(truth, predicted, [f"class {i}" for i in range(1000)])
    assert found["confusion"] is None and len(found["confusions"]) == 50
    counts = [count for *_, count in found["confusions"]]
    assert counts == sorted(counts, reverse=True)
    assert len(json.dumps(found)) < 60_000


def test_every_image_counts_once_and_agrees_with_the_accuracy():
    summary, metrics, source = analysed(student())  # 21 images in batches of 8: the last one is padded
    assert summary["images"] == metrics["images"] == 21 and summary["skipped"] == 0
    assert sum(summary["classes"]["correct"]) / 21 == pytest.approx(metrics["accuracy"])
    assert summary["classes"]["images"] == np.bincount(source.targets, minlength=10).tolist()
    assert np.array(summary["confusion"]).sum() == 21
    assert json.loads(json.dumps(summary)) == summary


def test_routing_is_that_of_the_router_on_every_patch():
    model = student()
    tokens = {}
    for name in ("blocks.1.mlp", "blocks.3.mlp"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: tokens.setdefault(name, []).append(inputs[0])
        )
    summary, _, source = analysed(model)
    assert summary["grid"] == [4, 4]
    assert [picture["index"] for picture in summary["pictures"]] == [0, 2, 5, 7, 10, 13, 15, 18]  # i * 21 // 8
    for name, (first, *more) in tokens.items():
        x_NTD = torch.cat([first, *more])[:21]
        ranked_NTE = model.get_submodule(name).router(x_NTD).argsort(-1, descending=True)
        for picture in summary["pictures"]:
            # two prefix tokens: the class token and one register
            assert picture["experts"][name] == ranked_NTE[picture["index"], 2:, 0].tolist()
            assert picture["label"] == source.label(picture["index"])
        share = torch.bincount(ranked_NTE[..., :2].flatten(), minlength=4) / (21 * 18 * 2)
        first = torch.bincount(ranked_NTE[..., 0].flatten(), minlength=4) / (21 * 18)
        assert summary["layers"][name] == {"load": pytest.approx(share.tolist(), abs=1e-6),
                                           "first": pytest.approx(first.tolist(), abs=1e-6), "kept": 1.0}  # fmt: skip


def test_a_dropped_choice_gives_way_to_the_next_and_none_is_minus_one():
    model = student(eval_capacity_factor=0.5, capacity_multiple=1, images_per_group=1)
    seen = []
    model.get_submodule("blocks.3.mlp").register_forward_hook(lambda _, given, __: seen.append(given[1]["routing"]))
    summary, _, _ = analysed(model, limit=8)
    routing = seen[-1]
    dropped = 0  # patches without any expert
    gave_way = 0  # patches whose first choice was dropped
    for number, picture in enumerate(summary["pictures"]):
        wanted = []
        for chosen, slots in zip(routing.expert_GSK[number, 2:].tolist(), routing.slot_GSK[number, 2:].tolist()):
            wanted.append(next((expert for expert, slot in zip(chosen, slots) if slot >= 0), -1))
            dropped += wanted[-1] == -1
            gave_way += wanted[-1] not in (-1, chosen[0])
        assert picture["experts"]["blocks.3.mlp"] == wanted
    assert dropped
    assert gave_way
    assert summary["layers"]["blocks.3.mlp"]["kept"] < 0.6


def test_pictures_are_the_images_themselves():
    summary, _, source = analysed(student())
    picture = summary["pictures"][2]
    shown = Image.open(io.BytesIO(base64.b64decode(picture["png"])))
    assert np.array_equal(np.asarray(shown), np.asarray(source.image(picture["index"])))  # 8 x 8 digits, no resize


def test_a_student_without_experts_has_an_analysis():
    config = VMoEConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp_dim=8, num_classes=10,
                        moe_blocks="none")  # fmt: skip
    summary, _, _ = analysed(VMoE(config).eval())
    assert summary["layers"] == {} and summary["pictures"][0]["experts"] == {}
