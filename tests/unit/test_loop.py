"""The evaluation and the edges of the train loop, on one process without DeepSpeed."""

import pytest
import torch

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig, DataConfig
from trainer.data.loader import Data
from trainer.data.sources import DigitsSource
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.loop.step import data_workers
from trainer.tracking.health import NonFiniteLoss

ALONE = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def digits(limit: int) -> Data:
    source = DigitsSource(DataConfig(limit=limit), "val")
    half = (0.5, 0.5, 0.5)
    return Data(source, source, Preprocessing(16, half, half), AugmentConfig(), 0, 10, False)


class Stub(torch.nn.Module):
    """Says class 0 with logit 1, and not-a-number for images whose place in the evaluation is in `broken`."""

    def __init__(self, broken: set[int]):
        super().__init__()
        self.broken, self.seen = broken, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 10)
        logits[:, 0] = 1
        for row in range(len(images)):
            if self.seen + row in self.broken:
                logits[row] = float("nan")
        self.seen += len(images)
        return logits


def run(broken: set[int]) -> dict[str, float]:
    model = Stub(broken)
    return evaluate(Predictor(model, model), digits(20), torch.float32, 8, ALONE)


def test_images_without_a_finite_output_count_as_wrong_and_stay_out_of_the_loss():
    data = digits(20)
    zeros = [i for i in range(20) if data.val.label(i) == 0]
    assert len(zeros) == 1 and data.val.label(19) != 0
    clean, spoiled = run(set()), run({zeros[0], 19})  # the largest of ten NaN is the first: class 0
    assert clean["accuracy"] == 1 / 20 and "nonfinite_images" not in clean
    assert spoiled["accuracy"] == 0 and spoiled["nonfinite_images"] == 2 and spoiled["images"] == 20
    right, wrong = (float(torch.log(torch.tensor(2.718281828 + 9)) - logit) for logit in (1, 0))  # of 10 classes
    assert clean["loss"] == pytest.approx((right + 19 * wrong) / 20)
    assert spoiled["loss"] == pytest.approx(wrong)


def test_a_model_without_any_finite_output_is_an_error():
    with pytest.raises(NonFiniteLoss, match="not finite on any of the 20 validation images"):
        run(set(range(100)))


def test_only_a_dead_data_worker_becomes_an_error_for_people():
    text = r"died: DataLoader worker \(pid 7\) is killed by signal: Killed\. Most often"
    with pytest.raises(OSError, match=text), data_workers():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match=r"^something else$"), data_workers():
        raise RuntimeError("something else")
