"""A pushed model in the hands of people who have no clone: the card's blocks, as they stand, in fresh environments.

(a, b) torch and timm with the wheel, (c) transformers with the wheel, (d) transformers and timm alone with hub.code.
"""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from models.nac import NAC
from models.preprocessing import Preprocessing
from models.vmoe import VMoE
from tests.hub_server import HubServer, connect, environment
from tests.launch import ROOT, TINY
from tests.package.environments import FRESH, build_wheel, mend_torchvision, new_environment, run
from tests.run_folder import finish_run, new_nac, new_recipe
from trainer.config.data import DataConfig
from trainer.data.sources import open_source
from trainer.data.transforms import eval_transform
from trainer.hub.push import plan, push

REPO = "alice/digits"
IMAGES = 100  # data.limit of the tiny recipe
# what this process must not reach: the clone, and what a reader of the card need not have
GUARD = """import importlib.util, json, sys
for name in ("models", "trainer", "tests", "deepspeed", "datasets"{others}):
    assert importlib.util.find_spec(name) is None, name
assert not any(path == {root!r} or path.startswith({root!r} + "/") for path in sys.path), sys.path
"""
ACCURACY = """
truth = json.load(open("truth.json"))
found = logits.argmax(-1).tolist()
print("accuracy", "{route}", sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth))
json.dump(found, open("{route}.json", "w"))
before = logits
"""
# the model that was saved and loaded again: one that learned, and no other
AFTER = """
model.eval()
with torch.no_grad():
    again = model(images)
again = getattr(again, "logits", again)
print("learned", "{route}", (again - before).abs().max().item())
"""


def main_with_hub(url: str, home: str, arguments: list[str]) -> int:
    """trainer/run.py in a fork whose client talks to the stand-in."""
    connect(pytest.MonkeyPatch(), url, Path(home))
    from trainer import run

    return run.main(arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pushed(warm, chain, wheel, tmp_path_factory):
    """(the stand-in with the tiny run's student and its code, the card, a folder with the validation images)."""
    home = tmp_path_factory.mktemp("pushed")
    _answers(VMoE.from_pretrained(chain[0] / "train"), home)
    knobs = [f"hub.repo={REPO}", "hub.private=false", "hub.code=true", f"hub.code_url={wheel.as_uri()}"]
    with HubServer() as hub:
        words = [*TINY, "--phase", "push", *knobs, "--out", str(chain[0])]
        done = warm.call("tests.package.test_strangers:main_with_hub", hub.url, str(home / "hub"), words)
        assert done.code == 0, done.output
        yield hub, ModelCard(hub.files(REPO)["README.md"].decode()), home


@pytest.fixture(scope="module")
def pushed_nac(wheel, tmp_path_factory):
    """The same of a NAC whose run was made up: its weights are those it starts with."""
    home = tmp_path_factory.mktemp("pushed_nac")
    student = new_nac(num_classes=10, image_size=16)
    student.preprocessing = Preprocessing(16, (0.5,) * 3, (0.25,) * 3)
    student.labels = [f"digit {number}" for number in range(10)]
    accuracy = _answers(student, home)
    hub_section = {"repo": REPO, "private": False, "code": True, "code_url": wheel.as_uri()}
    recipe = new_recipe(modules=3, student={"kind": "nac", "nac": {"preset": "small"}}, hub=hub_section)
    named = {"preprocessing": student.preprocessing, "labels": student.labels}
    finish_run(home / "run", recipe, student, accuracy, **named)
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, home / "hub")
        push(plan(home / "run", recipe), recipe.hub)
        yield hub, ModelCard(hub.files(REPO)["README.md"].decode()), home


def _answers(student: VMoE | NAC, home: Path) -> float:
    """Leave the validation images, their classes and the student's answers in `home`; returns its accuracy."""
    source = open_source(DataConfig(limit=IMAGES), "val")
    (home / "images").mkdir()
    images = []
    for index in range(len(source)):
        picture = source.image(index)
        picture.save(home / "images" / f"{index:03}.png")
        images.append(eval_transform(student.preprocessing)(picture))
    truth = [source.label(index) for index in range(len(source))]
    with torch.no_grad():
        answers = student(torch.stack(images)).argmax(-1).tolist()
    (home / "truth.json").write_text(json.dumps(truth))
    (home / "expected.json").write_text(json.dumps(answers))
    return sum(one == other for one, other in zip(answers, truth)) / len(truth)


def blocks(card: ModelCard, heading: str, language: str = "python") -> list[str]:
    """The code under a heading of the card."""
    section = re.split(r"^#+ ", card.text.split(f"\n### {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def follow(card: ModelCard, headings: dict[str, str], *, others: tuple[str, ...] = ()) -> str:
    """A script of the card's blocks word for word, with what checks them between."""
    hidden = "".join(f", {name!r}" for name in others)
    script = GUARD.format(others=hidden, root=str(ROOT))
    for heading, route in headings.items():
        first, further = blocks(card, heading)
        script += first + ACCURACY.format(route=route) + further + AFTER.format(route=route)
    return script


def told(output: str, word: str) -> dict[str, float]:
    lines = [line.split(" ") for line in output.splitlines() if line.startswith(f"{word} ")]
    return {route: float(value) for _, route, value in lines}


def check(done, pushed, routes: set[str], images_off: int = 0) -> None:
    """That a script ended well, with the card's accuracy by the same answers as the run's own student gives, and that
    what it saved and loaded had learned.

    Args:
        images_off: of which the answer may differ, where other software resizes them.
    """
    _, card, home = pushed
    assert done.returncode == 0, done.stderr[-3000:]
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results}["accuracy"]
    accuracies = told(done.stdout, "accuracy")
    assert accuracies.keys() == routes
    for accuracy in accuracies.values():
        assert abs(accuracy - stated) * IMAGES <= images_off + 1e-6, (accuracy, stated)
    expected = json.loads((home / "expected.json").read_text())
    for route in routes:
        found = json.loads((home / f"{route}.json").read_text())
        assert sum(one != other for one, other in zip(found, expected, strict=True)) <= images_off, route
    learned = told(done.stdout, "learned")
    assert learned.keys() == routes
    assert all(1e-6 < change < 1 for change in learned.values()), learned


def test_torch_and_timm_with_the_wheel(pushed, wheel, tmp_path):
    hub, card, home = pushed
    # by pip it starts with nothing: the card's command brings what it needs
    packages = [] if FRESH else ["torch", "timm", "huggingface_hub", "safetensors", "numpy", "pillow"]
    bin_folder = new_environment(tmp_path / "env", packages)
    installing = re.search(r"```bash\n(pip install .*?)\n```", card.text)[1]
    assert installing == f'pip install "m2mkd @ {wheel.as_uri()}"'
    done = run(bin_folder, installing, home)
    assert done.returncode == 0, done.stderr
    routes = {"With torch": "torch", "With timm": "timm"}
    _follow_and_check(pushed, bin_folder, routes, images_off=0, others=("transformers",))
    network = environment(hub.url, tmp_path / "cache", None)

    info, predict, export = blocks(card, "On the command line", "bash")[0].strip().splitlines()
    done = run(bin_folder, f"{info} --json && {predict} --json", home, **network)
    assert done.returncode == 0, done.stderr
    facts, said = map(json.loads, done.stdout.splitlines())
    truth = json.loads((home / "truth.json").read_text())
    assert len(said["predictions"]) == len(truth) and {len(row["classes"]) for row in said["predictions"]} == {3}
    assert said["images_per_second"] > said["images_per_second_with_reading"] > 0
    assert facts["classes"] == 10 and facts["active_parameters"] < facts["parameters"]
    assert export == f"m2mkd export {REPO} --out model.pt2"  # run by tests/unit/test_export.py
    # processor time: what the machine does besides is not the command's
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(bin_folder, ["m2mkd", "--help"], home).stdout.startswith("usage: m2mkd")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_transformers_with_the_wheel(pushed, pushed_nac, wheel, tmp_path):
    bin_folder = new_environment(tmp_path / "env", ["torch", "timm", "transformers", "safetensors"])
    done = run(bin_folder, f"pip install {wheel}", tmp_path)
    assert done.returncode == 0, done.stderr
    _follow_and_check(pushed, bin_folder, {"With transformers": "transformers"}, images_off=1)
    routes = {"With torch": "torch", "With timm": "timm", "With transformers": "transformers"}
    _follow_and_check(pushed_nac, bin_folder, routes, images_off=1)


def test_transformers_alone(pushed, pushed_nac, tmp_path):
    bin_folder = new_environment(tmp_path / "env", ["torch", "timm", "transformers"])
    mend_torchvision(bin_folder)
    routes = {"With transformers, without m2mkd": "alone"}
    for model, file in ((pushed, "modeling_vmoe.py"), (pushed_nac, "modeling_nac.py")):
        _follow_and_check(model, bin_folder, routes, images_off=1, others=("m2mkd", "scipy"))
        saved = {path.name for path in (model[2] / "tuned_alone").iterdir()}
        assert saved == {"config.json", file, "model.safetensors"}


def _follow_and_check(
    pushed, bin_folder: Path, routes: dict[str, str], images_off: int, others: tuple[str, ...] = ()
) -> None:
    """Run the blocks of a card in one process of the environment, and check what came out; see follow and check."""
    hub, card, home = pushed
    network = environment(hub.url, home / f"cache of {'_'.join(routes.values())}", None)
    done = run(bin_folder, ["python", "-c", follow(card, routes, others=others)], home, **network)
    check(done, pushed, set(routes.values()), images_off)


def test_the_card_is_valid_and_true(pushed, wheel, monkeypatch, tmp_path):
    hub, card, _ = pushed
    hub.connect(monkeypatch, tmp_path)
    card.validate()
    assert f"m2mkd @ {wheel.as_uri()}" in card.text
    for heading in ("Inference", "Limits", "What the experts see", "Cost of training", "How to use it"):
        assert f"\n## {heading}\n" in card.text
    assert hub.files(REPO)["experts.png"].startswith(b"\x89PNG")
    rows = re.findall(r"^\| ((?:student, k|dense)[^|]*) \| ([\d.,]+) \| (\S+) \|", card.text, flags=re.MULTILINE)
    names = [name for name, *_ in rows]
    assert names == [
        "student, k = 1",
        "student, k = 2 (trained)",
        "student, k = 4",
        "dense teacher",
        "dense ViT of equal FLOPs",
    ]
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results}["accuracy"]
    assert float(rows[1][2]) == pytest.approx(stated, abs=5e-5) and rows[-1][2] == "-"
