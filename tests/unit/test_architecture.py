"""The house rules that only reading the source can check: who imports whom, and no code from checkpoints."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for folder in ("models", "trainer")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PHASES = [name for name in SOURCES if name.startswith("trainer.phases.")]
# what a phase may use of trainer/; context.py carries what all of them share
FOR_PHASES = {
    f"trainer.{name}"
    for name in (
        "engine",
        "objectives",
        "loop",
        "artifacts",
        "bases",
        "context",
        "ds_config",
        "growing",
        "hybrids",
        "preflight",
        "schema",
        "dist",
        "hub",
        "interrupt",
        "analysis",
        "reuse",
        "guidance",
        "upcycling",
        "clusters",
        "experts",
        "sizes",
    )
}
# read before torch is imported, or on machines without it
WITHOUT_TORCH = ("run", "api", "cli", "manual", "completion", "job", "replay", "reference", "interrupt", "config",
                 "schema", "ds_config", "artifacts", "tracking", "trackers", "report", "report_plots", "hub",
                 "chain.settings", "chain.stages", "chain.slurm", "chain.submit", "chain.status",
                 "console", "study.__main__", "study.worker", "study.picture")  # fmt: skip
HEAVY = {"torch", "timm", "transformers", "datasets", "deepspeed", "safetensors", "models"}


def imports(tree: ast.AST, top_level_only: bool = False) -> set[str]:
    """Modules of this project and top-level packages that a file imports, for running or for types."""
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in SOURCES}
    return found


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
            to_do += imports(SOURCES[module], top_level_only=True)
    return seen


def calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    """Calls of a function written as one of `names`."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def test_the_sources_are_found():
    assert {"models", "models.moe", "trainer", "trainer.run", "trainer.data.loader", "trainer.phases.meta"} <= set(
        SOURCES
    )
    assert len(PHASES) >= 5
    assert "models.flops" in imports(SOURCES["trainer.objectives.distill"])  # the rules below see imports


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name):
    ours = {module for module in imports(SOURCES[name]) if module.split(".")[0] in ("models", "trainer", "tests")}
    assert not any(module.startswith("tests") for module in ours)
    assert "trainer.run" not in ours, "nothing imports the entry"
    if name.startswith("models"):
        assert not any(module.startswith("trainer") for module in ours), "models never import the trainer"
    if name != "trainer.api":
        wrong = {module for module in ours if module.startswith("trainer.phases")}
        assert not wrong, "only trainer/api.py imports phases, and no phase another"
    if name in PHASES:
        trainer = {module for module in ours if module.startswith("trainer.")}
        assert not {m for m in trainer if m not in FOR_PHASES and not m.startswith("trainer.data.")}
    elif name.startswith("trainer.data"):
        allowed = {"trainer", "trainer.schema"}
        assert not {
            m for m in ours if m.startswith("trainer") and m not in allowed and not m.startswith("trainer.data")
        }
    elif name in ("trainer.loop", "trainer.train_step", "trainer.health", "trainer.engine", "trainer.objectives"):
        assert "trainer.context" not in ours


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_answers_before_torch_is_light(name):
    loaded = {module.split(".")[0] for module in reached(f"trainer.{name}")}
    assert "trainer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", SOURCES)
def test_deepspeed_is_imported_late_and_initialised_in_one_place(name):
    tree = SOURCES[name]
    if name != "models.deepspeed_moe":
        assert not any(m.split(".")[0] == "deepspeed" for m in imports(tree, top_level_only=True))
    assert "models.deepspeed_moe" not in imports(tree, top_level_only=True)
    assert len(calls(tree, "deepspeed.initialize", "initialize")) == (name == "trainer.engine")


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
    assert imports(bad, top_level_only=True) == {"deepspeed", "trainer", "trainer.run"}
    assert "torch" in imports(bad)
    assert len(calls(bad, "deepspeed.initialize")) == 1
    assert [call.lineno for call in calls(bad, "torch.load")] == [6]
    assert {"trainer.dist", "torch", "trainer.engine", "models.moe", "models"} <= reached("trainer.context")
