"""Episodes: no image in two of their parts, the same by seed, and heads that learn what there is to learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.judging import OneOfMany, Said, bench, student, subject, told
from trainer.config.data import DataConfig
from trainer.config.evaluate import FewShotConfig
from trainer.config.tasks import parse_task
from trainer.data.sources import DigitsSource
from trainer.judge import fewshot
from trainer.judge.fewshot import draw_episodes

DIGITS = DigitsSource(DataConfig(), "val")  # 36 of each class or so


@pytest.mark.parametrize("ways", [2, 8])
def test_no_image_is_trained_on_and_validated_or_told(ways):
    shots = 3
    episodes = draw_episodes(DIGITS, FewShotConfig(ways=ways, shots=shots, queries=10, episodes=200), seed=0)
    assert episodes.train_EWS.shape == (200, ways, shots)
    assert episodes.val_EWV.shape == (200, ways, 3 * shots)  # three per shot
    assert episodes.query_EWQ.shape == (200, ways, 10)
    for train, val, query in zip(episodes.train_EWS, episodes.val_EWV, episodes.query_EWQ):
        places = np.concatenate([train.ravel(), val.ravel(), query.ravel()])
        assert len(np.unique(places)) == ways * (4 * shots + 10)
        classes = [set(DIGITS.targets[part].tolist()) for part in np.concatenate([train, val, query], axis=1)]
        assert all(len(labels) == 1 for labels in classes)  # a way is one class
        assert len(set.union(*classes)) == ways


def test_episodes_depend_on_the_seed_alone():
    settings = FewShotConfig(queries=5, episodes=20)
    first = draw_episodes(DIGITS, settings, seed=1).train_EWS
    assert (draw_episodes(DIGITS, settings, seed=1).train_EWS == first).all()
    assert (draw_episodes(DIGITS, settings, seed=2).train_EWS != first).any()
    # more of them go on where fewer ended
    assert (draw_episodes(DIGITS, replace(settings, episodes=30), seed=1).train_EWS[:20] == first).all()


def test_more_classes_or_images_than_there_are():
    with pytest.raises(ValueError, match=r"digits val has 10 classes of 35 images or more .* takes 11: lower ways"):
        draw_episodes(DIGITS, FewShotConfig(ways=11), seed=0)
    message = (
        r"has 0 classes of 415 images or more \(100 to train, 300 to validate, 15 to tell\).*too few have 0 36, 1 3"
    )
    with pytest.raises(ValueError, match=message):
        draw_episodes(DIGITS, FewShotConfig(shots=100), seed=0)


class Clusters:
    """Features of four classes far apart, 40 images of each, behind what an episode needs of a source."""

    labels = ("a", "b", "c", "d")
    targets = np.repeat(np.arange(4), 40)
    name = "clusters"

    def __len__(self):
        return len(self.targets)


def features(spread):
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 8)[torch.from_numpy(Clusters.targets)]
    noisy = centres + spread * torch.randn(160, 8, generator=generator)
    return torch.nn.functional.normalize(noisy, dim=1)


@pytest.mark.parametrize("score", [fewshot._by_mean, fewshot._by_linear_head])
def test_heads_learn_what_there_is(score):
    settings = FewShotConfig(ways=4, shots=2, episodes=20)
    episodes = draw_episodes(Clusters(), settings, seed=0)
    assert score(features(0.05), episodes, settings).min() == 1.0
    hidden = score(features(100.0), episodes, settings)
    assert 0.15 < hidden.mean() < 0.4  # noise: a quarter is chance
    assert (score(features(100.0), episodes, settings) == hidden).all()


def test_the_mean_is_that_of_the_training_images():
    """Worked by hand: one shot each at 0 and 1 on a line; queries at 0.4 and 0.6."""
    places = np.array([[[0], [1]]])
    episodes = fewshot.Episodes(places, places, np.array([[[2], [3]]]))
    line = torch.tensor([[0.0], [1.0], [0.4], [0.6]])
    assert fewshot._by_mean(line, episodes, FewShotConfig()).tolist() == [1.0]
    line = torch.tensor([[0.0], [1.0], [0.4], [0.45]])
    assert fewshot._by_mean(line, episodes, FewShotConfig()).tolist() == [0.5]


def test_validation_chooses_the_head(monkeypatch):
    """Of a head that learns nothing and one that learns; validation images of exchanged classes choose the first."""
    monkeypatch.setattr(fewshot, "RATES", (0.0, 0.02))
    settings = FewShotConfig(ways=2, shots=5, episodes=3)
    episodes = draw_episodes(Clusters(), settings, seed=0)
    assert fewshot._by_linear_head(features(0.05), episodes, settings).tolist() == [1.0, 1.0, 1.0]
    misled = replace(episodes, val_EWV=np.flip(episodes.val_EWV, axis=1).copy())
    assert fewshot._by_linear_head(features(0.05), misled, settings).tolist() == [0.5, 0.5, 0.5]


def test_fine_tuning_learns_on_any_number_of_ranks():
    text = "fewshot:head=finetune,ways=2,shots=4,queries=5,episodes=4,epochs=8,lr=1e-3"
    spec = parse_task(text)
    model = student()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    whole = fewshot.prepare(subject(model), spec, bench(data=DataConfig()))()
    figure = whole.figures["2-way 4-shot, finetune"]
    assert figure.value > 0.7  # two digits from four of each; chance is a half
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    cpu = torch.device("cpu")
    parts = []
    for rank in range(3):
        dist = OneOfMany(rank, 3, rank, 3, cpu)
        with pytest.raises(Said) as said:
            fewshot.prepare(subject(model), spec, bench(dist, data=DataConfig()))()
        parts.append(said.value.args[0])
    assert [sorted(part) for part in parts] == [[0, 3], [1], [2]]
    episodes = draw_episodes(DIGITS, spec.settings, 0)
    shared = fewshot._finetuned(
        subject(model), DIGITS, episodes, replace(spec.settings, episodes=4, epochs=1), bench(told(3, parts))
    )
    assert shared.mean() == figure.value


def test_five_way_five_shot_is_known_to_a_point():
    measured = fewshot.prepare(subject(student()), parse_task("fewshot:queries=15"), bench(data=DataConfig()))()
    figure = measured.figures["5-way 5-shot, mean"]
    assert measured.images == 600
    assert (figure.high - figure.low) / 2 < 0.01
    assert figure.value > 0.25  # a new student's features: better than 20% by chance
