"""Every recipe: it resolves, says how to run it, and all its models are built at full size on the meta device."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from models.flops import num_tokens
from models.nac import NAC
from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from models.vmoe.model import VMoE
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe, to_dict
from trainer.context import Opened, Run
from trainer.distributed.ranks import Dist
from trainer.objectives import Classify, Distill, MatchTeacher
from trainer.request.graph import phase_help
from trainer.teaching.meta import new_meta
from trainer.teaching.students import student_config, student_modules

ROOT = Path(__file__).resolve().parents[2]
STUDIES = {path.name for path in (ROOT / "recipes").glob("study_*.yaml")} - {"study_base.yaml"}  # test_study.py
RECIPES = sorted({path.name for path in (ROOT / "recipes").glob("*.yaml")} - STUDIES)
TUNING = ("finetune.yaml", "finetune_vit.yaml")  # tests/integration/test_finetune.py builds and trains their models
NAC_RECIPES = [name for name in RECIPES if name.startswith("nac_")]
every_recipe = pytest.mark.parametrize("name", RECIPES)
every_vmoe_recipe = pytest.mark.parametrize("name", [name for name in RECIPES if name not in (*NAC_RECIPES, *TUNING)])
every_nac_recipe = pytest.mark.parametrize("name", NAC_RECIPES)
PHASE_SECTIONS = ("teacher", "meta", "distill", "train")
# data.source or data.path -> classes; auto without a path is the digits
CLASSES = {
    "auto": 10,
    "digits": 10,
    "fractals": 100,
    "textures": 100,
    "pictures": 7,
    "ILSVRC/imagenet-1k": 1000,
    "imagenet": 1000,
    "zh-plus/tiny-imagenet": 200,
}
# parameters of teacher, meta model and student (without stitches), worked out from the sizes
IMAGENET = (
    24 * 12_598_272 + 2_016_232,  # DeiT-III-L: a block is 12 D^2 + 13 D and two LayerScales
    24 * 12_598_272 + 2_016_232,  # the teacher is its own meta model
    86_567_656 + 12 * (7 * 4_722_432 + 8 * 768),  # ViT-B/16 with 7 more MLPs and a router in every block
)
SMALL_GPU = (
    12 * (7_087_872 + 2 * 768) + 768 * 769 + 197 * 768 + 2 * 768 + 769 * 1000,  # DeiT-III-B
    12 * (7_087_872 + 2 * 768) + 768 * 769 + 197 * 768 + 2 * 768 + 769 * 1000,  # the teacher is its own meta model
    # 8 blocks of width 512 with 3 more MLPs and a router
    8 * (3_152_384 + 3 * 2_099_712 + 4 * 512) + 512 * 769 + 198 * 512 + 2 * 512 + 513 * 1000,
)
# a ViT-S/14 for 7 classes at 224 pixels without its blocks: patches, class token, positions, norm, head
AROUND_SMALL = (14 * 14 * 3 + 1) * 384 + 384 + 257 * 384 + 2 * 384 + 385 * 7
# blocks of DINOv2-S with two LayerScales; of a student with 3 more MLPs and a router, and without LayerScale
OWN_IMAGES = (
    12 * (1_774_464 + 2 * 384) + AROUND_SMALL,
    12 * (1_774_464 + 2 * 384) + AROUND_SMALL,  # the teacher is its own meta model
    6 * (1_774_464 + 3 * 1_181_568 + 4 * 384) + AROUND_SMALL,
)


def DEIT_HUGE(blocks, classes):
    """A DeiT-III-H/14 of so many blocks: patches, class token, positions of the patches, norm, head."""
    around = (14 * 14 * 3 + 1) * 1280 + 1280 + 256 * 1280 + 2 * 1280 + 1281 * classes
    return blocks * (12 * 1280**2 + 13 * 1280 + 2 * 1280) + around


# state and code 64 wide: tokenizer, read-in, 4 propagators, read-out, seeder, pooling and head, signatures and codes
NAC_DEMO = 16_208 + 66_406 + 4 * 70_407 + 70_535 + 8_448 + 715 + 56 * (64 + 32)
PARAMETERS = {
    "own_images.yaml": OWN_IMAGES,
    "coco_detection.yaml": IMAGENET,
    "demo.yaml": (8 * 49_984 + 14_282, 4 * 49_984 + 14_282, 4 * 84_480 + 10_714),
    "demo_projected.yaml": (8 * 49_984 + 14_282, 4 * 49_984 + 14_282, 4 * 84_480 + 10_714),
    "detect_demo.yaml": (8 * 49_984 + 14_282, 4 * 49_984 + 14_282, 4 * 84_480 + 10_714),
    "study_base.yaml": (8 * 49_984 + 56_996, 8 * 49_984 + 56_996, 4 * 149_504 + 56_996),
    "vmoe_base_imagenet.yaml": IMAGENET,
    "vmoe_base_imagefolder.yaml": IMAGENET,
    "vmoe_small_imagenet.yaml": SMALL_GPU,
    # the published count with a larger grid
    "nac_tiny_imagenet.yaml": (DEIT_HUGE(32, 200), DEIT_HUGE(10, 200), 26_703_342 + 64 * (28 * 28 - 8 * 8)),
    "nac_imagenet.yaml": (DEIT_HUGE(32, 1000), DEIT_HUGE(10, 1000), 37_589_294),
    "nac_demo.yaml": (8 * 49_984 + 14_282, 4 * 49_984 + 14_282, NAC_DEMO),
}


def command_of(name):
    """Arguments of the command in the recipe's header, from trainer/run.py on, and the number of ranks."""
    lines = [line.removeprefix("#").strip() for line in (ROOT / "recipes" / name).read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("deepspeed "))
    stop = next(i for i in range(start, len(lines)) if not lines[i].endswith("\\")) + 1
    words = " ".join(line.removesuffix("\\") for line in lines[start:stop]).split()
    script = words.index("trainer/run.py")
    arguments = words[script + 1 :]
    last = arguments.index("--out") + 2  # then overrides
    flags = dict(zip(arguments[:last:2], arguments[1:last:2]))
    return flags, arguments[last:], int(words[words.index("--num_gpus") + 1])


@functools.cache
def full_size(name):
    """A Run of the recipe's own command whose teacher stands on the meta device: no memory, no download."""
    flags, overrides, world = command_of(name)
    recipe = load_recipe(ROOT / flags["--recipe"], overrides)
    dist = Dist(0, world, 0, world, torch.device("cpu"))
    ds_values = read_ds_config(ROOT / flags["--ds_config"])
    t, data = recipe.teacher, recipe.data
    labels = [str(i) for i in range(CLASSES.get(data.path) or CLASSES.get(data.source) or 1000)]
    with torch.device("meta"):
        if t.source:
            assert t.source.startswith("timm/"), "teach this test to build other teachers without downloading them"
            architecture = t.source.removeprefix("timm/").split("@")[0].split(".")[0]
            arguments = {"num_classes": len(labels)}  # of a headless one: as phase probe gives it a head
            if t.image_size:
                arguments["img_size"] = t.image_size
            model = timm.create_model(architecture, pretrained=False, **arguments)
        else:
            model = VisionTransformer(
                img_size=t.trained_size, patch_size=t.patch_size, embed_dim=t.width, depth=t.depth, num_heads=t.heads,
                mlp_ratio=t.mlp_dim / t.width, num_classes=len(labels),
            )  # fmt: skip
    preprocessing = Preprocessing(model.patch_embed.img_size[0], (0.5,) * 3, (0.5,) * 3, "bicubic")
    teacher = Teacher(model.eval().requires_grad_(False), preprocessing, t.source, labels, model.num_classes)
    source = Images(labels=labels, name=data.source)
    opened = Opened({"teacher": teacher, "dense start": teacher, "sources": (source, source)})
    return Run(recipe, ds_values, Path("unused"), dist, "unused", opened=opened)


class Images(SimpleNamespace):
    """Stands for images that nothing is read of."""

    def __len__(self):
        return 10_000


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@every_recipe
def test_the_header_names_its_command(name):
    text = (ROOT / "recipes" / name).read_text()
    assert text.startswith("# ")
    flags, overrides, world = command_of(name)
    assert flags["--recipe"] == f"recipes/{name}"
    assert (ROOT / flags["--ds_config"]).is_file()
    assert flags["--phase"] in phase_help()
    assert flags["--out"].startswith("runs/")
    assert world >= 1
    load_recipe(ROOT / flags["--recipe"], overrides)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in TUNING])
def test_it_resolves_for_the_command_it_names(name):
    run = full_size(name)
    for section in PHASE_SECTIONS:
        if section == "teacher" and run.recipe.teacher.source:
            continue
        schedule = getattr(run.recipe, section)
        s = run.settings(section)
        assert s.global_batch == schedule.global_batch == s.micro_batch * s.accumulation * run.dist.world
        assert s.clip == (schedule.clip or 0)
        assert s.ep_size in (1, run.dist.world)


@every_vmoe_recipe
def test_models_at_full_size(name, capsys):
    run = full_size(name)
    recipe, teacher = run.recipe, run.teacher.model
    with torch.device("meta"):
        student = VMoE(student_config(run, recipe.train.drop_path))
        modules = student_modules(run, recipe.distill.drop_path)
        meta = new_meta(run)
    stages = run.teacher_stages()
    assert all(p.is_meta for model in (teacher, student, meta, *modules) for p in model.parameters())
    N = recipe.modules
    assert len(stages) == len(modules) == meta.num_modules == N
    assert tuple(stage.stop - stage.start for stage in stages) == run.teacher_depths
    assert [module.stage.stop - module.stage.start for module in modules] == list(
        recipe.student.depths or [len(student.blocks) // N] * N
    )
    assert size(*stages) == size(teacher)
    # a stitch is a LayerNorm and a Linear, one each way at every border; a tied one has no parameters
    D_t, D_s = teacher.embed_dim, student.embed_dim
    stitches = (N - 1) * ((2 * D_t + D_t * D_s + D_s) + (2 * D_s + D_s * D_t + D_t))
    assert size(*modules) == size(student) + (0 if recipe.distill.stitches == "tied" else stitches)
    assert num_tokens(student) == num_tokens(teacher) == run.tokens
    sizes = (size(teacher), size(meta), size(student))
    with capsys.disabled():
        print("\n{}: teacher {:,}, meta model {:,}, student {:,} parameters".format(name, *sizes))
    assert sizes == PARAMETERS[name]


@every_vmoe_recipe
def test_every_objective_is_built_and_one_image_goes_through(name):
    run = full_size(name)
    recipe, teacher, smoothing = run.recipe, run.teacher.model, run.recipe.augment.label_smoothing
    with torch.device("meta"):
        student, meta = VMoE(student_config(run)), new_meta(run)
        modules, stages = student_modules(run), run.teacher_stages()
        pre = run.teacher.preprocessing
        x = torch.empty(1, pre.in_chans, pre.image_size, pre.image_size)
        border = torch.empty(1, run.tokens, teacher.embed_dim)
    matching = MatchTeacher(meta, stages, recipe.meta, run.tokens, smoothing)
    assert matching.flops_per_image > 0
    classes = len(run.labels)
    with torch.no_grad():
        assert teacher(x).shape == meta(x).shape == (1, classes)
    whole = Classify(student, run.tokens, smoothing).flops_per_image
    for i, (module, stage) in enumerate(zip(modules, stages)):
        pair = Distill(module, stage, meta, i, recipe.distill, run.tokens, smoothing)
        assert whole / recipe.modules < pair.flops_per_image < 2 * whole
        h = meta.front(x, i)
        assert h.shape == (x if i == 0 else border).shape
        last = i == recipe.modules - 1
        assert stage(h).shape == ((1, classes) if last else border.shape)
        # routing looks at values, so a student module cannot run here; what comes in and out of it must fit
        if i:
            assert module.pre(border).shape == (1, run.tokens, student.embed_dim)
        assert (module.post is None) == last
        if not last:
            leaving = torch.empty(1, run.tokens, student.embed_dim, device="meta")
            assert module.post(leaving).shape == border.shape


@every_nac_recipe
def test_nac_at_full_size(name, capsys):
    run = full_size(name)
    recipe, teacher = run.recipe, run.teacher.model
    with torch.device("meta"):
        student = NAC(student_config(run, recipe.train.drop_path))
        modules = student_modules(run, recipe.distill.drop_path)
        meta, stages = new_meta(run), run.teacher_stages()
        pre = run.teacher.preprocessing
        x = torch.empty(1, pre.in_chans, pre.image_size, pre.image_size)
    sizes = (size(teacher), size(meta), size(student))
    with capsys.disabled():
        print("\n{}: teacher {:,}, meta model {:,}, student {:,} parameters".format(name, *sizes))
    assert sizes == PARAMETERS[name]
    classes, border = len(run.labels), (1, run.tokens, teacher.embed_dim)
    assert student(x).shape == (1, classes)
    for i, (module, stage) in enumerate(zip(modules, stages, strict=True)):
        pair = Distill(module, stage, meta, i, recipe.distill, run.tokens)
        assert pair.flops_per_image > 0
        h = meta.front(x, i)
        leaving = {0: (1, 1, teacher.embed_dim), recipe.modules - 1: (1, classes)}.get(i, border)
        assert module(h).shape == leaving
        assert meta.back(module(h), i).shape == (1, classes)


def test_the_published_nac_schedule():
    """Facts of the public code's configurations (docs/method.md)."""
    tiny, large = (load_recipe(ROOT / f"recipes/nac_{name}.yaml") for name in ("tiny_imagenet", "imagenet"))
    keys = ("epochs", "warmup_epochs", "lr", "weight_decay", "global_batch", "drop_path", "warmup_lr", "clip")
    rows = [[getattr(recipe.train, key) for key in keys] for recipe in (tiny, large)]
    assert rows == [
        [400, 25, 1.2e-3, 0.075, 8 * 128, 0.1, 1e-6, None],
        [110, 25, 1.2e-3, 0.05, 8 * 32, 0.1, 1e-6, None],
    ]
    for recipe in (tiny, large):
        assert recipe.train.min_lr == 4e-5 * recipe.train.global_batch / 512
        assert recipe.modules == 10 and recipe.teacher.depths == (4, 3, 3, 3, 3, 3, 3, 3, 3, 4)
        a = recipe.augment
        assert (a.repeats, a.mixup, a.cutmix, a.label_smoothing, a.random_erasing) == (3, 0.8, 1.0, 0.1, 0.25)


def test_the_published_schedule():
    """Facts of the published code: batches, rates, epochs, warm-up, drop path, clipping, augmentation."""
    recipe = load_recipe(ROOT / "recipes/baselines/published.yaml")
    keys = ("global_batch", "epochs", "warmup_epochs", "drop_path", "clip", "lr", "weight_decay", "eps")
    rows = {section: [getattr(getattr(recipe, section), key) for key in keys] for section in ("distill", "train")}
    assert rows == {
        "distill": [2048, 100, 20, 0.1, None, 5e-4, 0.05, 1e-8],  # lr x batch / 512 = 2e-3
        "train": [1024, 100, 0, 0.1, 1.0, 5e-4, 0.05, 1e-8],  # 1e-3
    }
    assert (recipe.train.min_lr, recipe.distill.warmup_lr) == (1e-5, 1e-6)
    assert (recipe.distill.alpha, recipe.distill.tau, recipe.distill.target) == (0.5, 1.0, "soft")
    a = recipe.augment
    assert (a.rand_augment, a.random_erasing, a.mixup, a.cutmix) == ("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0)
    assert (a.switch_prob, a.label_smoothing, a.repeats, a.color_jitter) == (0.5, 0.1, 3, 0.4)
    assert (recipe.teacher.depths, recipe.student.depths) == ((6, 6, 6, 6), (3, 3, 3, 3))


@pytest.mark.parametrize("name", ["vmoe_base_imagenet.yaml", "study_base.yaml"])
def test_preparation_costs_at_most_half_of_end_to_end_training(name):
    run = full_size(name)
    recipe = run.recipe
    with torch.device("meta"):
        student, modules, meta = VMoE(student_config(run)), student_modules(run), new_meta(run)
        first, second = (
            sum(
                Distill(module, stage, meta, i, recipe.distill, run.tokens, predecessors=before(i)).flops_per_image
                for i, (module, stage) in enumerate(zip(modules, run.teacher_stages()))
            )
            for before in (lambda i: (), lambda i: modules[:i])
        )
        end_to_end = Classify(student, run.tokens).flops_per_image
    assert recipe.meta.blocks_per_module == 0  # it costs nothing
    spent = first * recipe.distill.epochs + second * recipe.refine.epochs
    assert 0.3 < spent / (end_to_end * recipe.train.epochs) <= 0.5


def test_the_imagefolder_recipe_differs_in_its_data_only():
    hub, folder = (
        to_dict(load_recipe(ROOT / f"recipes/vmoe_base_{name}.yaml")) for name in ("imagenet", "imagefolder")
    )
    assert folder["data"]["source"] == "folder" and hub["data"]["source"] == "hub"
    assert {k: v for k, v in hub.items() if k != "data"} == {k: v for k, v in folder.items() if k != "data"}


def test_a_micro_batch_that_makes_no_whole_routing_groups_is_refused():
    run = full_size("demo.yaml")
    recipe = load_recipe(ROOT / "recipes/demo.yaml", ["train.global_batch=40"])
    changed = Run(recipe, run.ds_values, run.out, run.dist, run.command)
    group, micro = recipe.student.moe.images_per_group, 40 // run.dist.world
    assert micro % group
    message = f"images_per_group is {group}, which does not divide the micro-batch of {micro} images"
    with pytest.raises(ValueError, match=message):
        changed.settings("train")
    assert changed.settings("teacher").micro_batch  # has no experts
