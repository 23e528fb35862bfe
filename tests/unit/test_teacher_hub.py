"""Teachers from a hub: the real client against a stand-in on this machine."""

import http.server
import shutil
import threading
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from vit_families import images, save_timm, save_transformers, tiny

from models import hub_files
from models.teacher import load_teacher


class Hub(http.server.BaseHTTPRequestHandler):
    """The two calls of the hub that a download makes: HEAD and GET of owner/name/resolve/revision/file."""

    root: Path  # holds owner/name/commit/file
    branches = {"main": "b" * 40, "v1": "a" * 40}  # noqa: RUF012
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        owner, name, _, revision, filename = self.path.lstrip("/").split("/", 4)
        self.asked.append(f"{revision}/{filename}")
        if name == "gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if not (self.root / owner / name).is_dir():
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        commit = self.branches.get(revision, revision)
        if not (self.root / owner / name / commit).is_dir():
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        path = self.root / owner / name / commit / filename
        if not path.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        body = path.read_bytes()
        return self.answer(200, {"X-Repo-Commit": commit, "ETag": f'"{hash(body)}"'}, body)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b""):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    handler = type("TestHub", (Hub,), {"root": tmp_path / "hub", "asked": []})
    (tmp_path / "hub").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    download = partial(
        huggingface_hub.hf_hub_download,
        endpoint=f"http://127.0.0.1:{server.server_port}",
        cache_dir=tmp_path / "cache",
        token=False,
    )
    monkeypatch.setattr(hub_files, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler
    server.shutdown()
    server.server_close()


def test_hub_revision_is_pinned_and_recorded(hub, monkeypatch):
    repo = hub.root / "someone" / "vit"
    old = save_transformers(repo / ("a" * 40), "ViTForImageClassification", num_labels=3)
    save_transformers(repo / ("b" * 40), "ViTForImageClassification", num_labels=6)
    (repo / ("a" * 40) / "pytorch_model.bin").write_bytes(b"never read")

    teacher = load_teacher("someone/vit@v1")
    assert teacher.num_classes == 3
    assert teacher.source == f"someone/vit@{'a' * 40}"
    with torch.no_grad():
        assert torch.allclose(teacher.model(images()), old(images()).logits, rtol=0, atol=1e-5)
    # the branch is asked for once; every other file comes from the commit it was then
    assert {name for name in hub.asked if not name.startswith("a" * 40)} == {"v1/config.json"}
    assert load_teacher("someone/vit", revision="v1").source == teacher.source
    assert load_teacher("someone/vit").source == f"someone/vit@{'b' * 40}"
    assert not any(name.endswith(".bin") for name in hub.asked)

    with pytest.raises(ValueError, match="two revisions"):
        load_teacher("someone/vit@v1", revision="main")
    # everything cached: works without a hub, and says which commit it was
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_teacher("someone/vit@v1").source == teacher.source


def test_hub_timm_layout(hub):
    model = tiny("deit3").requires_grad_(False)
    save_timm(hub.root / "timm" / "deit3" / ("a" * 40), model)
    for source in ("timm/deit3@v1", "hf-hub:timm/deit3@v1"):
        teacher = load_teacher(source)
        assert teacher.source == f"timm/deit3@{'a' * 40}"
        assert torch.equal(teacher.model(images()), model(images()))


def test_hub_family_is_refused_before_the_weights_are_downloaded(hub):
    directory = hub.root / "someone" / "swin" / ("b" * 40)
    transformers.SwinConfig().save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"large")
    with pytest.raises(ValueError, match=r"someone/swin.*Swin"):
        load_teacher("someone/swin")
    assert {name.split("/")[-1] for name in hub.asked} == {"config.json"}


def test_hub_pickled_weights_are_refused(hub):
    directory = hub.root / "someone" / "old" / ("b" * 40)
    save_transformers(directory, "ViTForImageClassification")
    shutil.move(directory / "model.safetensors", directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"someone/old.*Only safetensors"):
        load_teacher("someone/old")


def test_sharded_weights_from_the_hub(hub):
    directory = hub.root / "someone" / "big" / ("b" * 40)
    model = save_transformers(directory, "ViTForImageClassification")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        expected = model(images()).logits
    assert torch.allclose(load_teacher("someone/big").model(images()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "source, message",
    [
        ("someone/absent", r"someone/absent.*RepositoryNotFoundError, HTTP 401.*spelling.*HF_TOKEN"),
        ("someone/gated", r"someone/gated.*GatedRepoError, HTTP 403.*huggingface-cli login.*HF_TOKEN"),
        ("someone/there@v9", r"someone/there.*'v9'.*RevisionNotFoundError, HTTP 404.*branch, tag or commit"),
        ("not a/hub id", r"not a/hub id.*spelling"),
    ],
)
def test_hub_errors_name_the_id_and_the_next_step(hub, source, message):
    save_timm(hub.root / "someone" / "there" / ("b" * 40), tiny("vit"))
    with pytest.raises(ValueError, match=message):
        load_teacher(source)


def test_hub_offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"someone/vit.*HF_HUB_OFFLINE=1"):
        load_teacher("someone/vit")
