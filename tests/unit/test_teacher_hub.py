"""Teachers from a hub: the real client against the stand-in on this machine."""

import shutil

import pytest
import torch
import transformers
from huggingface_hub import constants, hf_hub_download, snapshot_download
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


@torch.no_grad()
def test_an_image_text_model_of_the_hub_in_shards_and_half_precision(hub, tmp_path):
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 36}
    text |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.SiglipConfig(vision_config=vision | {"image_size": 32, "patch_size": 8}, text_config=text)
    model = transformers.SiglipModel(config).eval().bfloat16()
    model.save_pretrained(tmp_path / "siglip", max_shard_size="20KB")
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "siglip")
    commit = hub.seed("google/siglip", tmp_path / "siglip", "v1")
    teacher = load_teacher("google/siglip@v1")
    assert (teacher.source, teacher.num_classes) == (f"google/siglip@{commit}", 0)
    assert sum("safetensors" in name for _, name in asked(hub)) > 2
    expected = model.vision_model.float()(pixel_values=images())
    tokens = teacher.model.forward_features(images())
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    pooled = teacher.model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)


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


def test_a_hub_that_is_gone_never_gives_another_commit_than_the_pinned_one(hub, tmp_path, monkeypatch):
    """With the server away the client falls back to what a branch was when it was last seen; a commit is what it is."""
    save_timm(tmp_path / "vit", tiny("vit"))
    old = hub.seed("someone/vit", tmp_path / "vit")
    assert load_teacher("someone/vit").source == f"someone/vit@{old}"
    (tmp_path / "vit" / "README.md").write_text("newer")
    new = hub.seed("someone/vit", tmp_path / "vit")
    hub.stop()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client asks again a few times
    with pytest.raises(ValueError, match=rf"someone/vit.*{new}"):
        load_teacher(f"someone/vit@{new}")
    assert load_teacher(f"someone/vit@{old}").source == f"someone/vit@{old}"
    assert load_teacher("someone/vit").source == f"someone/vit@{old}"  # and says so


# not in the cache is not absent

COMMANDS = r"hf download someone/vit.*share HF_HOME"


def cached(hub, tmp_path, *names: str, **arguments) -> str:
    """A teacher of the hub of which only these files are in the cache; returns its commit."""
    directory = tmp_path / "vit"
    model = save_transformers(directory, "ViTForImageClassification")
    if arguments:
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, **arguments)
    commit = hub.seed("someone/vit", directory)
    for name in names:
        hf_hub_download("someone/vit", name)
    return commit


@pytest.fixture(params=["offline", "hub gone"])
def cut_off(request, hub, monkeypatch):
    """Cut the client off from the hub when called."""

    def cut() -> str:
        if request.param == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            return "HF_HUB_OFFLINE=1"
        hub.stop()
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        return "the hub cannot be reached"

    return cut


JSON_FILES = ("config.json", "preprocessor_config.json")


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ((), "config.json"),
        (("config.json",), "preprocessor_config.json"),
        (JSON_FILES, "model.safetensors"),
        (("model.safetensors",), "config.json"),
    ],
)
def test_a_partly_filled_cache_names_the_file_and_how_to_get_it(hub, tmp_path, cut_off, there, missing):
    cached(hub, tmp_path, *there)
    reason = cut_off()
    with pytest.raises(
        ValueError, match=rf"^cannot read {missing} of 'someone/vit.*not in the cache.*{COMMANDS}"
    ) as no:
        load_teacher("someone/vit")
    assert reason in str(no.value)
    assert "onvert it" not in str(no.value)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("shards", [(), (1,)])
def test_shards_that_are_not_all_cached(hub, tmp_path, cut_off, shards):
    names = [f"model-0000{number}-of-00002.safetensors" for number in shards]
    cached(hub, tmp_path, *JSON_FILES, "model.safetensors.index.json", *names, max_shard_size="40KB")
    cut_off()
    with pytest.raises(ValueError, match=rf"cannot read model-0000{len(shards) + 1}-of-00002.*{COMMANDS}"):
        load_teacher("someone/vit")


def test_a_whole_snapshot_of_shards_loads_without_the_hub(hub, tmp_path, cut_off):
    """`hf download` leaves no note that there is no model.safetensors; the index says where the weights are."""
    cached(hub, tmp_path, max_shard_size="40KB")
    snapshot_download("someone/vit")
    cut_off()
    assert load_teacher("someone/vit").num_classes == 4


def test_pickled_weights_are_still_that_without_the_hub(hub, tmp_path, cut_off):
    """What the hub once said does not exist is absent, not unknown."""
    cached(hub, tmp_path)
    shutil.move(tmp_path / "vit" / "model.safetensors", tmp_path / "vit" / "pytorch_model.bin")
    hub.seed("someone/vit", tmp_path / "vit")
    with pytest.raises(ValueError, match="Only safetensors"):
        load_teacher("someone/vit")
    cut_off()
    with pytest.raises(ValueError, match="Only safetensors"):
        load_teacher("someone/vit")


def test_another_revision_in_the_cache_is_named(hub, tmp_path, cut_off):
    commit = cached(hub, tmp_path, *JSON_FILES, "model.safetensors")
    hub.seed("someone/vit", tmp_path / "vit", "v2")
    cut_off()
    assert load_teacher("someone/vit").source == f"someone/vit@{commit}"
    with pytest.raises(ValueError, match=rf"'someone/vit@v2'.*there: main \({commit[:12]}\).* --revision v2"):
        load_teacher("someone/vit@v2")
    with pytest.raises(ValueError, match=rf"there: main \({commit[:12]}\).* --revision {'0' * 40}"):
        load_teacher(f"someone/vit@{'0' * 40}")


def test_a_cache_whose_blobs_were_cleaned_away(hub, tmp_path, cut_off):
    cached(hub, tmp_path, *JSON_FILES, "model.safetensors")
    for blob in (tmp_path / "home" / "hub").glob("models--someone--vit/blobs/*"):
        if blob.stat().st_size > 20_000:
            blob.unlink()
    cut_off()
    with pytest.raises(ValueError, match=rf"cannot read model.safetensors .*not in the cache.*{COMMANDS}"):
        load_teacher("someone/vit")


def test_the_cache_folder_of_a_repository_is_no_teacher(hub, tmp_path):
    commit = cached(hub, tmp_path, *JSON_FILES, "model.safetensors")
    folder = tmp_path / "home" / "hub" / "models--someone--vit"
    with pytest.raises(ValueError, match=rf"folder of the hub's cache.*snapshots/COMMIT \({commit}\)"):
        load_teacher(str(folder))
    assert load_teacher(str(folder / "snapshots" / commit)).num_classes == 4


def test_a_git_clone_without_its_large_files(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer: git lfs pull"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_safetensors_of_another_name_are_not_called_pickled(tmp_path, name):
    save_transformers(tmp_path, "ViTForImageClassification")
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"no model.safetensors and no model.safetensors.index.json, only {name}"):
        load_teacher(str(tmp_path))
