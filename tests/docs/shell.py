"""Runs the commands of a document as its reader would type them, in a folder that looks like a fresh clone.

What is the reader's own stands ready: `images/` holds pictures in class folders, `runs/demo` is what `make demo`
leaves, and a small teacher lies on the stand-in of the hub under the name the documents use. Trainings go through
tests/warm_python.py and are made small: see QUICK and `_quick`. A command this module does not know fails the test.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import timm
import torch
from PIL import Image

from tests.hub_server import HubServer
from tests.launch import ROOT, Finished
from tests.unit.test_importers import FIXTURE, drawn, stages, whole
from tests.warm_python import WarmPython
from trainer.chain import settings as chain_settings
from trainer.chain.following import options as chain_options
from trainer.config.load import load_recipe
from trainer.study import jobs as study_jobs
from trainer.study.plan import cells, read_study

TEACHER, OWN_TEACHER = "timm/deit3_large_patch16_224.fb_in1k", "timm/vit_small_patch14_dinov2.lvd142m"
COPIED, LINKED = ("recipes", "ds_configs", "Makefile"), ("trainer", "models", "slurm", "tests", "benchmarks", "docs")
# nothing to run here: a program of its own, or the reader's shell
RECOGNISED = ("git clone ", "cd ", "hf auth login", "source .venv/bin/activate", "tensorboard ", "pip install ")
SHELL = ("cat", "mkdir", "ls", "cp", "rm", "head", "tail")  # run by bash as they stand
SIZES = {"width": 16, "heads": 2, "mlp_dim": 32, "depth": 4}
PHASES = ("teacher", "meta", "distill", "train")
# appended to every training of a document: a phase is a few steps of a model of a few thousand weights
QUICK = {
    "modules": 2, "data.limit": 32, "data.workers": 0, "run.log_every": 1, "run.eval_batch": 32,
    "teacher.image_size": 16, "teacher.depths": [], "student.variant": "", "student.patch_size": 8,
    "student.depths": [], "student.moe.images_per_group": 2, "train.baselines": [],
    **{f"{model}.{name}": size for model in ("teacher", "student") for name, size in SIZES.items()},
    **{f"{phase}.global_batch": 16 for phase in PHASES},
}  # fmt: skip
ALWAYS = {f"{phase}.{key}": value for phase in PHASES for key, value in (("epochs", 1), ("warmup_epochs", 0))}
# for a DeepSpeed JSON made for eight GPUs; DeepSpeed's own buckets are 2 GB, allocated at every step
QUICK_DS = {
    "ds.train_micro_batch_size_per_gpu": "auto", "ds.gradient_accumulation_steps": 1,
    "ds.zero_optimization.reduce_bucket_size": 2_000_000, "ds.zero_optimization.allgather_bucket_size": 2_000_000,
}  # fmt: skip


class Shell:
    """One reader: a folder, and what was typed in it so far."""

    def __init__(self, folder: Path, warm: WarmPython, hub: HubServer, demo: Path | None = None):
        self.folder, self.warm, self.hub, self.variables = folder / "clone", warm, hub, {}
        self.demo = demo  # what `make demo` leaves, if it was run before
        self.folder.mkdir(parents=True)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        for name in LINKED:
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "m2mkd").symlink_to(ROOT / "models")  # as if it were installed

    def type(self, command: str) -> None:
        """Run one command line. Raises AssertionError when it is unknown or does not end with exit code 0."""
        if command.startswith(RECOGNISED):
            return
        if nested := re.fullmatch(r"source <\((.*)\)", command):
            command = nested[1]
        if exported := re.fullmatch(r"export (\w+)=(\S+)", command):
            self.variables[exported[1]] = exported[2]
            return
        if command.split()[0] in SHELL:
            done = subprocess.run(["bash", "-euc", command], cwd=self.folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            return
        words = shlex.split(command)
        if f"teacher.source={OWN_TEACHER}" in words:  # DINOv2 has no head
            seed_teacher(self.hub, self.folder.parent / "own_teacher", OWN_TEACHER, classes=0)
        variables = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words[0] == "make":
            self._make(words[1:])
        elif words[0] == "sbatch" or words[:1] == ["bash"]:
            self._slurm(words[1:], variables)
        elif words[0] == "m2mkd":
            self._expect(self._work("module", ["models.cli", *words[1:]], variables), command)
        elif words[0] in ("python", "torchrun", "deepspeed"):
            self._python(words, variables)
        else:
            raise AssertionError(f"the test knows no command {words[0]!r}: {command}")

    def python(self, code: str, place: str) -> None:
        """Run a block of python."""
        self._expect(self._work("code", [code, place]), place)

    def _make(self, words: list[str]) -> None:
        """Targets must exist; `demo` is run by its own command line, the others are what CI and the lead run."""
        makefile = (self.folder / "Makefile").read_text()
        targets = [word for word in words if "=" not in word]
        for target in targets:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"
        if targets == ["demo"]:
            recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1].replace("\\\n", " ")
            if self.demo is None:
                self.type(recipe.replace("$(ENV)", "").replace("$(RUN)", "runs/demo").strip())
            else:
                shutil.copytree(self.demo, self.folder / "runs/demo", dirs_exist_ok=True)

    def _slurm(self, words: list[str], variables: dict[str, str]) -> None:
        """`plan` runs. What needs a cluster (tests/slurm runs it) must be understood: command, flags and recipe."""
        script, *words = words
        of_study = script == "slurm/study.sh"
        assert of_study or script == "slurm/m2mkd_vmoe.sh"
        if not of_study:
            words = [*words, *_quick(self._recipe(words, variables), words)]
        seen = self.folder.parent / "chain.json"
        dump = "import json, os, sys; json.dump([sys.argv[3:], dict(os.environ)], open(os.environ['SEEN'], 'w'))"
        stub = self.folder.parent / "python"  # stands for the interpreter the script starts
        stub.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(dump)} "$@"\n')
        stub.chmod(0o755)
        environ = {**os.environ, **variables, "PYTHON": str(stub), "SEEN": str(seen)}
        subprocess.run(["bash", script, *words], cwd=self.folder, env=environ, check=True)
        words, environ = json.loads(seen.read_text())
        _, rest = chain_options.take(words)
        if of_study:
            self._study(rest, environ)
            return
        command, settings = chain_settings.read(rest, environ)
        if command != "plan":
            changes = [word for word in settings.recipe_overrides if "=" in word]  # not the stage of `logs`
            load_recipe(self.folder / settings.recipe, changes)
            return
        names = [field.upper() for field in chain_settings.Settings.__dataclass_fields__]
        kept = {name: environ[name] for name in names if name in environ}
        self._expect(self._work("chain", words, kept | {"PYTHON": sys.executable}), "plan")

    def _study(self, words: list[str], environ: dict[str, str]) -> None:
        """Command, settings and study are understood, and `plan` runs."""
        command, settings = study_jobs.read([word for word in words if word != "--only"], environ)
        changes = [word for word in settings.recipe_overrides if "=" in word]
        assert cells(read_study(self.folder / settings.recipe, changes), self.folder / "runs/study")
        if command == "plan":
            names = [field.upper() for field in chain_settings.Settings.__dataclass_fields__]
            kept = {name: environ[name] for name in names if name in environ}
            self._expect(self._work("study", words, kept | {"PYTHON": sys.executable}), "plan")

    def _recipe(self, words: list[str], variables: dict[str, str]) -> str:
        found = dict(itertools.pairwise(words)).get("--recipe") or variables.get("RECIPE")
        return str(self.folder / (found or "recipes/vmoe_base_imagenet.yaml"))

    def _python(self, words: list[str], variables: dict[str, str]) -> None:
        """python, torchrun or deepspeed: trainer/run.py on one rank (launchers: test_launchers.py), or a module."""
        line = shlex.join(words)
        if "trainer/run.py" in words:
            place = words.index("trainer/run.py")
            before, words = words[:place], words[place + 1 :]
            assert before[0] == "python" or before[1] in ("--num_gpus", "--nproc_per_node"), line
            recipe = dict(itertools.pairwise(words)).get("--recipe")
            if recipe and not {"--print-recipe", "--help", "plan"} & set(words):  # a plan is quick at any size
                words = [*words, *_quick(str(self.folder / recipe), words)]
            self._expect(self._work("run", words, variables), line)
            return
        if words[1].startswith("benchmarks/"):  # minutes
            assert (self.folder / words[1]).exists(), line
            return
        assert words[0] == "python" and words[1] == "-m", f"the test knows no such command: {line}"
        if words[2] == "pytest" or words[2].startswith("tests."):  # tests do not run tests: what is named must be there
            named = [word.replace(".", "/") + ".py" if word.startswith("tests.") else word for word in words[2:]]
            assert all((self.folder / word).exists() for word in named if word.startswith("tests")), line
            return
        if words[2] == "trainer.study":  # hours: every cell must resolve; tests/integration/test_study_run.py runs one
            extra = [word for word in words[4:] if "=" in word]
            assert cells(read_study(self.folder / words[3], extra), self.folder / "runs/study"), line
            return
        self._expect(self._work("module", words[2:], variables), line)

    def _work(self, kind: str, words: list[str], variables: dict[str, str] | None = None) -> Finished:
        variables = self.variables | (variables or {})
        return self.warm.call("tests.docs.worker:main", str(self.folder), self.hub.url, kind, words, variables)

    def _expect(self, done: Finished, what: str) -> None:
        assert done.code == 0, f"{what}\n{done.output}"


def _quick(recipe: str, words: list[str]) -> list[str]:
    """The overrides that make a training small, behind those of the text: keys the text gives keep their value, except
    those of ALWAYS. Data of the hub becomes the embedded digits: the stand-in keeps models only.
    """
    given = {word.partition("=")[0] for word in words if "=" in word}
    overrides = {key: value for key, value in (QUICK | QUICK_DS).items() if key not in given} | ALWAYS
    resolved = load_recipe(recipe, [word for word in words if "=" in word and not word.startswith("ds.")])
    if resolved.data.source == "hub":
        overrides |= {"data.source": "digits", "data.path": ""}
    if resolved.student.variant == "teacher":  # which is small
        overrides = {key: value for key, value in overrides.items() if not key.startswith("student.")}
        overrides["teacher.image_size"] = 16
        overrides["data.limit"] = 288  # a probe needs two images of each class
    if resolved.detect.epochs:
        overrides |= {"detect.epochs": 1, "detect.warmup_epochs": 0}
        overrides |= {"detect.data.train_pictures": 16, "detect.data.val_pictures": 4}
    json_file = dict(itertools.pairwise(words)).get("--ds_config", "")
    if "8" in Path(json_file).stem:  # made for eight ranks
        overrides |= {"ds.trainer.ep_size": "auto"}
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def make_foreign_files(folder: Path) -> None:
    """Checkpoints of other code, as docs/howto.md imports them."""
    shutil.copy(FIXTURE, folder / "vmoe.npz")
    whole(drawn(moe_blocks=(1, 3)), folder / "m2mkd_vmoe.pth")
    (folder / "vit_stages").mkdir()
    for index, part in enumerate(stages(drawn(), (2, 2))):
        saved = {"block_index": index, "block_state_dict": part, "divided_depths": [2, 2]}
        torch.save(saved, folder / "vit_stages" / f"stage{index}.pth")


def make_images(folder: Path) -> None:
    """`images/` of the tutorial: three classes that differ in colour, 24 pictures each to train on and 8 to measure."""
    for split, count in (("train", 24), ("val", 8)):
        for shade, label in enumerate(("ant", "bee", "cat")):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (40, 30), (80 * shade, 60 + i, 10 * i % 256))
                picture.save(folder / split / label / f"{i:02d}.png")


def seed_teacher(hub: HubServer, folder: Path, name: str = TEACHER, classes: int = 10) -> None:
    """A hub teacher of the documents on the stand-in: of the family of TEACHER, small, with so many classes."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    model = timm.create_model("deit3_small_patch16_224", num_classes=classes, **sizes)
    timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
    hub.seed(name, folder)
