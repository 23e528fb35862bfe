"""The house rules that only reading the source can check: who imports whom, and no code from checkpoints."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("models", "trainer")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
SOURCES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
# Rooms (a package or a single file) from the ground up: each may use those above it in this list, none of its own row.
LAYERS = (
    "models._torchvision models.forms models.labels models.preprocessing models.version",
    "models.files models.moe models.pictures",
    "models.flops models.modules models.teacher",
    "models.memory models.nac models.vmoe",
    "models.students models.experts models.auto models.detection models.registry",
    "models.export models.predict",
    "models.cli",
    "trainer.config",
    "trainer.disk trainer.origin trainer.request trainer.writer_lock",
    "trainer.made_of trainer.pins",
    "trainer.artifacts trainer.data trainer.distributed trainer.tracking trainer.objectives",
    "trainer.checkpoint trainer.evaluation trainer.heads trainer.report",
    "trainer.hub trainer.loop",
    "trainer.context",
    "trainer.teaching",
    "trainer.judge",
    "trainer.phases",
    "trainer.plan",
    "trainer.api trainer.chain",
    "trainer.cli trainer.study",
    "trainer.run",
)
FLOOR = {room: number for number, row in enumerate(LAYERS) for room in row.split()}
# read before torch is imported, or on machines without it: packages whole, and single files
WITHOUT_TORCH = (
    "api",
    "artifacts",
    "chain",
    "cli",
    "config",
    "disk",
    "distributed.interrupt",
    "distributed.launchers",
    "hub.push",
    "made_of",
    "origin",
    "pins",
    "plan.cost",
    "config.gpus",
    "report",
    "request",
    "run",
    "study",
    "tracking.console",
    "tracking.metrics",
    "tracking.trackers",
    "writer_lock",
)
HEAVY = {"torch", "timm", "transformers", "datasets", "deepspeed", "safetensors", "models"}
LARGEST = 25  # files in one folder


def room_of(module: str) -> str:
    """models.vmoe.model -> models.vmoe."""
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST, top_level_only: bool = False, package: str = "") -> set[str]:
    """Modules of this project and top-level packages that a file imports, for running or for types.

    Args:
        package: of the file, which relative imports are counted from.
    """
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names & SOURCES.keys() or {module}
    return found


def imports_of(name: str, top_level_only: bool = False) -> set[str]:
    """The same of a module of this project."""
    package = name if name in PACKAGES else name.rpartition(".")[0]
    return imports(SOURCES[name], top_level_only, package)


def reached(name: str) -> set[str]:
    """Everything loaded by importing a module of this project: its top-level imports, theirs, and their packages."""
    seen, to_do = set(), [name]
    while to_do:
        module = to_do.pop()
        if module in seen:
            continue
        seen.add(module)
        to_do += [".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 1)]
        if module in SOURCES:
            to_do += imports_of(module, top_level_only=True)
    return seen


def calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    """Calls of a function written as one of `names`."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def test_the_sources_are_found():
    wanted = {"models", "models.moe.layer", "trainer", "trainer.run", "trainer.data.loader", "trainer.phases.meta"}
    assert wanted <= SOURCES.keys()
    assert "models.flops" in imports_of("trainer.objectives.cost")  # the rules below see imports
    assert "models.moe.layer" in imports_of("models.vmoe.model")  # relative ones too


def test_every_room_has_its_floor():
    rooms = {room_of(name) for name in SOURCES} - {"models", "trainer"}
    assert rooms == FLOOR.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name):
    ours = {module for module in imports_of(name) if module.split(".")[0] in ("models", "trainer", "tests")}
    assert not any(module.startswith("tests") for module in ours)
    if name in ("models", "trainer"):
        return  # the faces of the two houses
    floor = FLOOR[room_of(name)]
    above = {module for module in ours if FLOOR.get(room_of(module), -1) >= floor and room_of(module) != room_of(name)}
    assert not above, f"{name} stands on floor {floor} of LAYERS"


def test_no_circles():
    arrows = {name: imports_of(name) & SOURCES.keys() for name in SOURCES}
    graphlib.TopologicalSorter(arrows).prepare()  # CycleError names the circle


def test_inside_models_imports_are_relative():
    """So that the folder can be installed under another name."""
    for name in SOURCES:
        if room_of(name).startswith("models"):
            assert not any(module.startswith("models") for module in imports(SOURCES[name])), name


def test_a_phase_uses_no_other_phase():
    for name in SOURCES:
        if name.startswith("trainer.phases."):
            assert not {module for module in imports_of(name) if module.startswith("trainer.phases")}


def test_folders_stay_small():
    for folder in {path.parent for path in FILES.values()}:
        assert len(list(folder.glob("*.py"))) <= LARGEST, (
            f"{folder} holds more than {LARGEST} files: which idea is each?"
        )


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_answers_before_torch_is_light(name):
    whole = f"trainer.{name}"
    files = [module for module in SOURCES if module == whole or module.startswith(f"{whole}.")]
    assert files
    for module in files:
        loaded = {found.split(".")[0] for found in reached(module)}
        assert "trainer" in loaded
        assert not loaded & HEAVY, module


@pytest.mark.parametrize("name", SOURCES)
def test_deepspeed_is_imported_late_and_initialised_in_one_place(name):
    tree = SOURCES[name]
    if name != "models.moe.deepspeed_layer":
        assert not any(m.split(".")[0] == "deepspeed" for m in imports_of(name, top_level_only=True))
    assert "models.moe.deepspeed_layer" not in imports_of(name, top_level_only=True)
    assert len(calls(tree, "deepspeed.initialize", "initialize")) == (name == "trainer.distributed.engine")


def is_constant(value: ast.expr, wanted: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_of_a_checkpoint_ever_runs(name):
    tree = SOURCES[name]
    from_torch = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "torch"]
    assert not any(alias.name == "load" for node in from_torch for alias in node.names), "write torch.load"
    for call in calls(tree, "torch.load"):
        safe = [k for k in call.keywords if k.arg == "weights_only" and is_constant(k.value, True)]
        assert safe, f"line {call.lineno}: torch.load needs weights_only=True"
    assert not calls(tree, "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec")
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert is_constant(keyword.value, False), f"line {call.lineno}: trust_remote_code"


def test_the_rules_can_fail():
    bad = ast.parse(
        "import deepspeed\nfrom trainer import run\nengine = deepspeed.initialize(model=m)\n"
        "def late():\n    import torch\n    torch.load(path)\n"
    )
    assert imports(bad, top_level_only=True) == {"deepspeed", "trainer.run"}
    assert "torch" in imports(bad)
    assert len(calls(bad, "deepspeed.initialize")) == 1
    assert [call.lineno for call in calls(bad, "torch.load")] == [6]
    assert {
        "trainer.distributed.ranks",
        "torch",
        "trainer.distributed.engine",
        "models.moe.layer",
        "models",
    } <= reached("trainer.context")
