"""Phase push by the trainer's entry on real ranks: what arrives, what a kill or a full disk leaves, what is said."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from models.vmoe.model import VMoE
from tests.hub_server import READER, WRITER, HubServer, connect
from tests.launch import TINY

REPO = "alice/model"
PUSH = [*TINY, "--phase", "push", f"hub.repo={REPO}", "--out"]


def main_with_hub(url: str, home: str, token: str, arguments: list[str]) -> int:
    """trainer/run.py in a fork whose client talks to the stand-in."""
    connect(pytest.MonkeyPatch(), url, Path(home), token)
    from trainer import run

    return run.main(arguments)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def push(warm, server, tmp_path):
    """Run the trainer on some ranks against the stand-in: push(arguments, ranks) -> Finished."""

    def call(arguments: list, ranks: int = 1, token: str = WRITER, **options):
        texts = [str(argument) for argument in arguments]
        return warm.call("tests.integration.test_push:main_with_hub", server.url, str(tmp_path / "home"), token, texts,
                         ranks=ranks, **options)  # fmt: skip

    return call


@pytest.fixture
def out(chain, tmp_path) -> Path:
    """The finished two-rank run, to write to."""
    return shutil.copytree(chain[0], tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))


def logits(model: VMoE) -> torch.Tensor:
    images = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
    with torch.no_grad():
        return model(images)


def pushed(out: Path) -> dict:
    return json.loads((out / "push/result.json").read_text())


def test_trained_at_ep_2_and_at_ep_1_pushed_and_pulled(push, server, warm, out, tmp_path):
    """Two ranks push what two ranks trained; one rank pushes over it what one rank trained."""
    done = push([*PUSH, out, "hub.stages=all"], ranks=2)
    assert done.code == 0, done.output
    result = pushed(out)
    assert (result["repo"], result["revision"], result["commit"]) == (REPO, "main", server.head(REPO))
    assert json.loads((out / "train/result.json").read_text())["ep_size"] == 2
    assert torch.equal(logits(VMoE.from_pretrained(REPO)), logits(VMoE.from_pretrained(out / "train")))
    assert {"teacher/config.json", "meta/model.safetensors", "distill_1/result.json"} <= set(server.files(REPO))

    again, sent = push([*PUSH, out, "hub.stages=all"], ranks=2), len(server.requests)
    assert again.code == 0 and "push is complete: nothing to do" in again.output
    assert len(server.requests) == sent

    shutil.rmtree(out / "train")
    shutil.rmtree(out / "evaluate")
    trained = warm.run([*TINY, "--phase", "train", "--out", out])
    assert trained.code == 0, trained.output
    assert json.loads((out / "train/result.json").read_text())["ep_size"] == 1
    done = push([*PUSH, out])
    assert done.code == 0, done.output
    assert pushed(out)["commit"] == server.head(REPO) != result["commit"]
    assert torch.equal(logits(VMoE.from_pretrained(REPO)), logits(VMoE.from_pretrained(out / "train")))
    assert not any("/" in name for name in server.files(REPO))  # the stages of the other student went with it


@pytest.mark.parametrize("step", ["lfs-put", "commit"])
def test_killed_in_the_middle_it_goes_on(push, server, out, step):
    """A commit is taken by the hub while the rank that sent it dies."""
    server.before[step] = lambda: time.sleep(1)
    push([*PUSH, out], kill_when=lambda: server.count(step) > 0)
    assert not (out / "push/result.json").exists()
    done = push([*PUSH, out])
    assert done.code == 0, done.output
    assert pushed(out)["commit"] == server.head(REPO)
    assert server.count("commit") == 1 and len(server.repos[REPO].commits) == 2  # the hub's own first one, and ours
    assert torch.equal(logits(VMoE.from_pretrained(REPO)), logits(VMoE.from_pretrained(out / "train")))


def test_no_disk_for_the_result(push, server, out):
    done = push([*PUSH, out], file_limit=300)
    assert done.code == 1 and [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.output and not (out / "push/result.json").exists()
    assert push([*PUSH, out]).code == 0 and pushed(out)["commit"] == server.head(REPO)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "token, repo, message",
    [
        (READER, REPO, "the token of alice may only read, so it cannot push to alice/model"),
        (WRITER, "bob/model", "bob/model is not yours"),
    ],
)
def test_refused_in_one_line(push, server, out, ranks, token, repo, message):
    done = push([*TINY, "--phase", "push", f"hub.repo={repo}", "--out", out], ranks=ranks, token=token)
    errors = [line for line in done.output.splitlines() if "error: " in line]
    assert done.code == 2 and len(errors) == 1 and message in errors[0], done.output
    assert token not in done.output and not server.repos


def test_another_goal_makes_the_push_anew(push, server, out):
    assert push([*PUSH, out]).code == 0
    assert push([*TINY, "--phase", "push", "hub.repo=acme/model", "--out", out]).code == 0
    assert pushed(out)["repo"] == "acme/model" and set(server.repos) == {REPO, "acme/model"}
    assert "repo: acme/model" in (out / "push/config.yaml").read_text()  # what --config repeats
