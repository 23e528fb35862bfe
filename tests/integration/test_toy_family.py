"""A second family of students, dense and small, goes through the whole chain by one line in the table of families."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from models.modules.stages import assemble as put_together
from models.modules.stitch import build_student_modules
from models.preprocessing import Preprocessing
from tests.launch import TINY
from trainer.api import load_results
from trainer.config import student
from trainer.teaching import families


@dataclass(frozen=True)
class ToyConfig:
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    num_classes: int
    drop_path_rate: float
    seed: int


class Toy(VisionTransformer):
    """A plain ViT with what a family asks of its students."""

    def __init__(self, config):
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=config.num_classes,
            drop_path_rate=config.drop_path_rate,
        )
        self.config, self.preprocessing, self.labels, self.source = config, None, None, None

    def forward(self, x, out=None):
        return super().forward(x)  # has nothing to tell beside

    def save_pretrained(self, folder, *, preprocessing, labels, state=None):
        write_config(folder, self.config, preprocessing, labels)
        save_file(self.state_dict() if state is None else dict(state), Path(folder, "model.safetensors"))


def config(section, *, num_classes, drop_path, image_size, in_chans, tokens, seed):
    sizes = {name: section[name] for name in ("patch_size", "width", "depth", "heads")}
    return ToyConfig(image_size, **sizes, num_classes=num_classes, drop_path_rate=drop_path, seed=seed)


def build(config):
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return Toy(config)


ALIGNED, ENDS, STITCHES = True, 0, ("drop", "keep", "fold")


def modules(student, depths, teacher_width, seed, stitches, bases, **_):
    return build_student_modules(student, depths, teacher_width, seed, stitches, bases)


def assemble(modules, stitches, states):
    return put_together([module.stage for module in modules])  # has no place for stitches: drops them


def forms(student):
    return []


def rivals(student):
    return {}


def describe(student, images):
    return {}


def write_config(folder, config, preprocessing, labels):
    content = {"toy": asdict(config), "preprocessing": preprocessing.to_dict(), "labels": list(labels)}
    Path(folder, "config.json").write_text(json.dumps(content))


def load(source, *, config=None, ep_size=1, ep_rank=0):
    content = json.loads(Path(source, "config.json").read_text())
    student = build(replace(ToyConfig(**content["toy"]), drop_path_rate=0.0))
    student.load_state_dict(load_file(Path(source, "model.safetensors")))
    student.preprocessing = Preprocessing.from_dict(content["preprocessing"])
    return student.eval()


def run_with_toys(arguments):
    """trainer/run.py on a rank where students are toys: the one line, and the word of the recipe."""
    from trainer.run import main

    families.FAMILIES["toy"] = "tests.integration.test_toy_family"
    student.KINDS.append("toy")
    return main(arguments)


def test_a_second_family_goes_through_the_whole_chain(warm, tmp_path):
    words = [
        *TINY,
        "--phase",
        "all",
        "--out",
        tmp_path,
        "student.kind=toy",
        "student.moe_blocks=none",
        "refine.epochs=1",
        "refine.lr=0.06",
    ]
    words += ["refine.epochs=1", "refine.lr=0.06", "refine.global_batch=16"]
    finished = warm.call("tests.integration.test_toy_family:run_with_toys", list(map(str, words)), ranks=2)
    assert finished.code == 0, finished.output
    results = load_results(tmp_path)
    made = {"teacher", "meta", "distill_0", "distill_1", "refine_0", "refine_1", "train", "train_scratch", "evaluate"}
    assert results.keys() == made
    names = load_file(tmp_path / "train" / "model.safetensors").keys()
    assert "blocks.0.mlp.fc1.weight" in names and not any("expert" in name for name in names)
    assert results["evaluate"]["metrics"]["accuracy"] == results["train"]["metrics"]["accuracy"]
    assert (tmp_path / "report.html").is_file()
