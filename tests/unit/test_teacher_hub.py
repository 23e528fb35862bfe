"""Teachers from a hub: the real client against the stand-in on this machine."""

import shutil

import pytest
import torch
import transformers
from huggingface_hub import constants
from vit_families import images, save_timm, save_transformers, tiny

from models.teacher.load import load_teacher
from tests.hub_server import HubServer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", token=None)
        yield hub


def asked(hub) -> set[tuple[str, str]]:
    """(revision, file) of every file asked for."""
    return {tuple(path.split("/resolve/")[1].split("/", 1)) for step, path in hub.requests if step == "resolve"}


def test_hub_revision_is_pinned_and_recorded(hub, monkeypatch, tmp_path):
    old = save_transformers(tmp_path / "old", "ViTForImageClassification", num_labels=3)
    save_transformers(tmp_path / "new", "ViTForImageClassification", num_labels=6)
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"never read")
    v1, main = hub.seed("someone/vit", tmp_path / "old", "v1"), hub.seed("someone/vit", tmp_path / "new")

    teacher = load_teacher("someone/vit@v1")
    assert teacher.num_classes == 3
    assert teacher.source == f"someone/vit@{v1}"
    with torch.no_grad():
        assert torch.allclose(teacher.model(images()), old(images()).logits, rtol=0, atol=1e-5)
    # the branch is asked for once; every other file comes from the commit it was then
    assert {(revision, name) for revision, name in asked(hub) if revision != v1} == {("v1", "config.json")}
    assert load_teacher("someone/vit", revision="v1").source == teacher.source
    assert load_teacher("someone/vit").source == f"someone/vit@{main}"
    assert not any(name.endswith(".bin") for _, name in asked(hub))

    with pytest.raises(ValueError, match="two revisions"):
        load_teacher("someone/vit@v1", revision="main")
    # everything cached: works without a hub, and says which commit it was
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_teacher("someone/vit@v1").source == teacher.source


def test_hub_timm_layout(hub, tmp_path):
    model = tiny("deit3").requires_grad_(False)
    save_timm(tmp_path / "deit3", model)
    commit = hub.seed("timm/deit3", tmp_path / "deit3", "v1")
    for source in ("timm/deit3@v1", "hf-hub:timm/deit3@v1"):
        teacher = load_teacher(source)
        assert teacher.source == f"timm/deit3@{commit}"
        assert torch.equal(teacher.model(images()), model(images()))


def test_hub_family_is_refused_before_the_weights_are_downloaded(hub, tmp_path):
    transformers.SwinConfig().save_pretrained(tmp_path / "swin")
    (tmp_path / "swin" / "model.safetensors").write_bytes(b"large")
    hub.seed("someone/swin", tmp_path / "swin")
    with pytest.raises(ValueError, match=r"someone/swin.*Swin"):
        load_teacher("someone/swin")
    assert {name for _, name in asked(hub)} == {"config.json"}


def test_hub_pickled_weights_are_refused(hub, tmp_path):
    save_transformers(tmp_path / "old", "ViTForImageClassification")
    shutil.move(tmp_path / "old" / "model.safetensors", tmp_path / "old" / "pytorch_model.bin")
    hub.seed("someone/old", tmp_path / "old")
    with pytest.raises(ValueError, match=r"someone/old.*Only safetensors"):
        load_teacher("someone/old")


def test_sharded_weights_from_the_hub(hub, tmp_path):
    directory = tmp_path / "big"
    model = save_transformers(directory, "ViTForImageClassification")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    hub.seed("someone/big", directory)
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
def test_hub_errors_name_the_id_and_the_next_step(hub, tmp_path, source, message):
    save_timm(tmp_path / "there", tiny("vit"))
    hub.seed("someone/there", tmp_path / "there")
    hub.seed("someone/gated", tmp_path / "there", gated=True)
    with pytest.raises(ValueError, match=message):
        load_teacher(source)


def test_hub_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"someone/vit.*HF_HUB_OFFLINE=1"):
        load_teacher("someone/vit")


@pytest.mark.parametrize("kind, times", [("truncate", 1), ("truncate", 3), ("drop", 1), (503, 1)])
def test_a_download_that_breaks_off_gives_the_teacher_or_an_error(hub, tmp_path, monkeypatch, kind, times):
    model = tiny("vit").requires_grad_(False)
    save_timm(tmp_path / "vit", model)
    hub.seed("someone/vit", tmp_path / "vit")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("resolve", kind, times)
    try:
        teacher = load_teacher("someone/vit")
    except ValueError as error:
        assert "someone/vit" in str(error) and "\n" not in str(error)
        teacher = load_teacher("someone/vit")  # once more, and nothing half-written is in the way
    assert torch.equal(teacher.model(images()), model(images()))


def test_a_hub_that_is_gone_never_gives_another_commit_than_the_pinned_one(hub, tmp_path):
    """With the server away the client falls back to what a branch was when it was last seen; a commit is what it is."""
    save_timm(tmp_path / "vit", tiny("vit"))
    old = hub.seed("someone/vit", tmp_path / "vit")
    assert load_teacher("someone/vit").source == f"someone/vit@{old}"
    (tmp_path / "vit" / "README.md").write_text("newer")
    new = hub.seed("someone/vit", tmp_path / "vit")
    hub.stop()
    with pytest.raises(ValueError, match=rf"someone/vit.*{new}"):
        load_teacher(f"someone/vit@{new}")
    assert load_teacher(f"someone/vit@{old}").source == f"someone/vit@{old}"
    assert load_teacher("someone/vit").source == f"someone/vit@{old}"  # and says so
