"""Pushing through the real client to the stand-in of the hub: what arrives, what is refused, and faults on the way."""

import logging
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from models.vmoe.model import VMoE
from tests.hub_server import EXPIRED, FINE, READER, WRITER, HubServer
from tests.run_folder import finish_run, logits, new_recipe, new_student
from trainer import artifacts
from trainer.config.runtime import HubConfig
from trainer.hub import push

REPO = "alice/model"
RECIPE = new_recipe()
SENT = {"README.md", "config.json", "ds_config.json", "expert_load.png", "model.safetensors", "recipe.yaml"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No processes of git, and no real pauses."""
    monkeypatch.setattr(artifacts, "git_commit", lambda: "0123abc")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs: (folder, student) of an old and a new one."""
    made = []
    for seed in (1, 2):
        out, student = tmp_path_factory.mktemp("run") / "out", new_student(seed)
        finish_run(out, RECIPE, student, accuracy=seed / 4)
        made.append((out, student))
    return made


@pytest.fixture(scope="module")
def plans(runs):
    """The plans of the two runs."""
    return [push.plan(out, RECIPE) for out, _ in runs]


def contents(plan: push.Plan) -> dict[str, bytes]:
    return {f.path: f.content if isinstance(f.content, bytes) else f.content.read_bytes() for f in plan.files}


def pulled(home: Path, revision: str | None = None, repo: str = REPO) -> torch.Tensor:
    """Logits of the model a stranger with an empty cache gets."""
    before = constants.HF_HUB_CACHE
    constants.HF_HUB_CACHE = str(home)
    try:
        return logits(VMoE.from_pretrained(repo, revision=revision))
    finally:
        constants.HF_HUB_CACHE = before


def test_push_then_pull_gives_the_same_logits(server, runs, plans, tmp_path):
    commit = push.push(plans[0], RECIPE.hub)
    assert server.head(REPO) == commit and server.repos[REPO].private
    assert set(server.files(REPO)) == SENT | {".gitattributes"}
    assert torch.equal(pulled(tmp_path / "cache"), logits(runs[0][1]))
    assert torch.equal(pulled(tmp_path / "cache", revision=commit), logits(runs[0][1]))
    assert server.count("commit") == 1


def test_pushing_again_sends_nothing(server, plans):
    commit = push.push(plans[0], RECIPE.hub)
    before = {step: server.count(step) for step in ("preupload", "lfs-put", "commit")}
    assert push.push(plans[0], RECIPE.hub) == commit
    assert {step: server.count(step) for step in before} == before


@pytest.mark.parametrize("first, second", [("4KB", "5GB"), ("5GB", "4KB")], ids=["shards-then-one", "one-then-shards"])
def test_a_push_over_other_weights_leaves_no_stale_ones(server, tmp_path, first, second):
    students = new_student(1), new_student(2)
    for i, (student, size) in enumerate(zip(students, (first, second))):
        finish_run(tmp_path / str(i), RECIPE, student, max_shard_size=size)
        push.push(push.plan(tmp_path / str(i), RECIPE), RECIPE.hub)
        weights = [name for name in server.files(REPO) if name.endswith(".safetensors")]
        assert ("model.safetensors.index.json" in server.files(REPO)) == (len(weights) > 1) == (size == "4KB")
        assert torch.equal(pulled(tmp_path / f"cache{i}"), logits(student))
    assert server.count("commit") == 2


def test_what_others_put_into_the_repo_stays(server, plans):
    server.seed(REPO, {"notes.md": b"mine", "onnx/model.onnx": b"mine", "pytorch_model.bin": b"\0stale"})
    push.push(plans[0], RECIPE.hub)
    assert set(server.files(REPO)) == SENT | {"notes.md", "onnx/model.onnx"}


def test_all_stages_lie_beside_the_student_and_go_with_it(server, tmp_path):
    recipe = new_recipe(hub={"stages": "all"})
    finish_run(tmp_path, recipe, new_student())
    push.push(push.plan(tmp_path, recipe), recipe.hub)
    stages = {f"{stage}/{name}" for stage in ("teacher", "meta", "distill_0", "distill_1")
              for name in ("config.yaml", "model.safetensors", "result.json")}  # fmt: skip
    assert set(server.files(REPO)) == SENT | stages | {".gitattributes"}
    push.push(push.plan(tmp_path, RECIPE), RECIPE.hub)
    assert set(server.files(REPO)) == SENT | {".gitattributes"}
    from_hub = new_recipe(hub={"stages": "all"}, teacher={"source": "someone/vit"})
    assert push._stages(tmp_path, from_hub) == ["meta", "distill_0", "distill_1"]
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/result.json").write_text("{}")
    assert push._stages(tmp_path, from_hub) == ["probe", "meta", "distill_0", "distill_1"]
    assert push._stages(tmp_path, new_recipe(hub={"stages": "all"}, train={"start": "scratch"})) == []


def test_another_branch_is_made_and_main_stays(server, runs, plans, tmp_path):
    push.push(plans[0], RECIPE.hub)
    recipe = new_recipe(hub={"revision": "v2"})
    commit = push.push(push.plan(runs[1][0], recipe), recipe.hub)
    assert server.head(REPO, "v2") == commit != server.head(REPO)
    assert torch.equal(pulled(tmp_path / "cache"), logits(runs[0][1]))
    assert torch.equal(pulled(tmp_path / "cache", revision="v2"), logits(runs[1][1]))


def test_the_plan_contacts_nobody_and_shows_files_and_card(runs, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    plan = push.plan(runs[0][0], RECIPE)
    assert {file.path for file in plan.files} == SENT
    shown = str(plan)
    assert f"push to {REPO}@main: 6 files, {sum(file.size for file in plan.files):,} bytes" in shown
    assert all(file.path in shown for file in plan.files) and plan.card in shown


@pytest.mark.parametrize("name", ["model.safetensors", "result.json"])
def test_unfinished_and_damaged_artifacts_are_never_pushed(tmp_path, name):
    finish_run(tmp_path, RECIPE, new_student())
    path = tmp_path / "train" / name
    path.unlink() if name == "result.json" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"--phase push needs .*unfinished|truncated or altered"):
        push.plan(tmp_path, RECIPE)
    with pytest.raises(ValueError, match=r"hub\.repo is empty"):
        push.plan(tmp_path, new_recipe(hub={"repo": ""}))


# ---- what is refused, before training

REFUSED = [
    (None, {}, r"no token to push to alice/model: log in with `hf auth login`, or set HF_TOKEN"),
    (EXPIRED, {}, r"the token is not valid \(expired, revoked or mistyped\): log in"),
    ("hf_\x01abc", {}, r"the token \(HF_TOKEN or `hf auth login`\) has characters"),
    (READER, {}, r"the token of alice may only read, so it cannot push to alice/model: make one that may write"),
    (FINE, {"repo": "alice/other"}, r"the fine-grained token of alice has no write permission for alice/other"),
    (WRITER, {"repo": "bob/model"}, r"bob/model is not yours: alice can push to alice/\.\.\., acme/\.\.\."),
    (WRITER, {"repo": "readers/model"}, r"readers/model is not yours"),
    (WRITER, {"repo": "model"}, r"hub\.repo is 'model', expected OWNER/NAME"),
    (WRITER, {"repo": "alice/my model"}, r"hub\.repo is 'alice/my model', which is no legal name: .*alphanumeric"),
    (WRITER, {"repo": "alice/a--b"}, r"'alice/a--b', which is no legal name: Cannot have -- or \.\."),
    (WRITER, {"revision": "a b"}, r"hub\.revision is 'a b', expected the name of a branch"),
    (WRITER, {"revision": "refs/../main"}, r"hub\.revision is 'refs/\.\./main'"),
    (WRITER, {"license": "as you like"}, r"asking the hub about hub\.license=as you like: .*bad metadata"),
    (WRITER, {"revision": "0" * 40}, r"hub\.revision is the commit 0{40}: a push needs a branch"),
]


@pytest.mark.parametrize("token, changes, message", REFUSED)
def test_refused_in_one_line_before_training(server, monkeypatch, tmp_path, token, changes, message):
    server.connect(monkeypatch, tmp_path / "home", token)
    with pytest.raises(ValueError, match=message) as refused:
        push.check_hub(HubConfig(**{"repo": REPO, **changes}))
    assert "\n" not in str(refused.value) and not (token and token in str(refused.value))
    assert not server.repos


def test_offline_is_refused_with_what_to_do(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hub\.repo is alice/model but HF_HUB_OFFLINE=1: unset it, or train with"):
        push.check_hub(RECIPE.hub)
    assert not server.requests


def test_no_write_access_to_a_repo_that_exists(server, monkeypatch):
    """What whoami cannot tell: the hub is asked for this repo."""
    server.seed("acme/model", {})
    server.users[WRITER]["auth"]["accessToken"]["role"] = "custom"
    with pytest.raises(ValueError, match=r"asking for the right to write to acme/model: the hub refuses it .* 403"):
        push.check_hub(HubConfig(repo="acme/model"))


@pytest.mark.parametrize("token, repo", [(WRITER, REPO), (WRITER, "acme/model"), (FINE, REPO)])
def test_who_may_push_gets_the_repo_made(server, monkeypatch, tmp_path, token, repo):
    server.connect(monkeypatch, tmp_path / "home", token)
    config = HubConfig(repo=repo, private=False, revision="v2", license="mit")
    push.check_hub(config, make=False)
    assert not server.repos
    push.check_hub(config)
    push.check_hub(config)
    assert not server.repos[repo].private and set(server.repos[repo].branches) == {"main", "v2"}


# ---- faults: (step, kind, how often) -> whether the push comes through

STEPS = (
    "whoami",
    "info",
    "auth-check",
    "tree",
    "validate",
    "preupload",
    "lfs-batch",
    "lfs-put",
    "lfs-verify",
    "commit",
)
ONCE = [(step, kind, 1, True) for step in STEPS for kind in ("drop", "lost", "page", 503)]
MORE = [
    *((step, kind, 1, True) for step in ("commit", "lfs-put", "tree") for kind in (429, 500, "truncate")),
    ("commit", 412, 1, True), ("commit", 409, 1, True), ("commit", "lost", 3, True), ("commit", "drop", 8, True),
    *((step, kind, 99, False) for step in ("preupload", "lfs-put", "commit") for kind in (401, 403, 404)),
    *(("commit", kind, 99, False) for kind in (413, "drop", 503)),
]  # fmt: skip


@pytest.mark.parametrize("step, kind, times, comes_through", ONCE + MORE)
def test_a_fault_leaves_the_old_model_or_the_new_one(server, runs, plans, tmp_path, step, kind, times, comes_through):
    server.seed(REPO, contents(plans[0]))
    server.fail(step, kind, times)
    if comes_through:
        assert push.push(plans[1], RECIPE.hub) == server.head(REPO)
        assert len(server.repos[REPO].commits) == 2
    else:
        with pytest.raises((ValueError, OSError)) as failed:
            push.push(plans[1], RECIPE.hub)
        assert "\n" not in str(failed.value) and str(failed.value).startswith(f"pushing to {REPO}: ")
        assert len(server.repos[REPO].commits) == 1
    assert any(fault.times < times for fault in server.faults), "the fault was never met"
    assert torch.equal(pulled(tmp_path / "cache"), logits(runs[comes_through][1]))
    server.faults.clear()
    assert push.push(plans[1], RECIPE.hub) == server.head(REPO)  # starting again goes on
    assert set(server.files(REPO)) == SENT and len(server.repos[REPO].commits) == 2
    puts = [path for name, path in server.requests if name == "lfs-put"]
    assert len(puts) - len(set(puts)) <= (times if step == "lfs-put" else 0), "stored twice"


@pytest.mark.parametrize("step", ["create", "branch", "auth-check"])
@pytest.mark.parametrize("kind", ["drop", "lost", 503, 429])
def test_a_fault_while_the_repo_is_made(server, runs, tmp_path, step, kind):
    recipe = new_recipe(hub={"revision": "v2"})
    server.fail(step, kind)
    assert push.push(push.plan(runs[0][0], recipe), recipe.hub) == server.head(REPO, "v2")
    assert server.repos[REPO].private and len(server.repos[REPO].commits) == 2  # the hub's own first one, and ours
    assert torch.equal(pulled(tmp_path / "cache", revision="v2"), logits(runs[0][1]))


def test_somebody_else_commits_in_between(server, plans):
    server.seed(REPO, contents(plans[0]))
    server.before["commit"] = lambda: server.seed(REPO, {**contents(plans[0]), "model.safetensors.index.json": b"{}"})
    commit = push.push(plans[1], RECIPE.hub)
    assert [c.title for c in server.repos[REPO].commits.values()] == ["seed", "seed", "Push of a finished run by m2mkd"]
    assert server.files(REPO, commit) == contents(plans[1])


def test_a_hub_that_is_gone(server, plans):
    server.stop()
    with pytest.raises(OSError, match=r"asking the hub whose token this is: .*refused .*9 attempts"):
        push.push(plans[0], RECIPE.hub)


def test_the_token_is_never_told(server, plans, caplog):
    caplog.set_level(logging.DEBUG)
    server.fail("commit", 503, 1)
    push.push(plans[0], RECIPE.hub)
    server.fail("commit", 403, 99)
    with pytest.raises(ValueError, match="403") as refused:
        push.push(plans[1], RECIPE.hub)
    assert "503" in caplog.text and WRITER not in caplog.text + str(refused.value)
    assert not any(WRITER.encode() in data for data in server.files(REPO).values())


def test_licence_of_the_teacher_from_its_page(server, runs):
    server.seed("someone/vit", {"README.md": b"---\nlicense: apache-2.0\n---\n# A ViT\n"})
    server.seed("someone/plain", {"README.md": b"# A ViT\n"})
    out = runs[0][0]
    found = {name: push.find_teacher_license(out, new_recipe(teacher={"source": f"someone/{name}"}))
             for name in ("vit", "vit@main", "plain", "absent")}  # fmt: skip
    assert found == {"vit": "apache-2.0", "vit@main": "apache-2.0", "plain": None, "absent": None}
    assert push.find_teacher_license(out, RECIPE) is None
