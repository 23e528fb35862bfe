"""The format of a checkpoint: what is written is what safetensors reads, and any range comes back from any cut."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoint import files
from trainer.disk import file_record

VALUES = torch.arange(12.0)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    layout = files.plan([(key, value.dtype, value.shape) for key, value in tensors.items()])
    parts = sorted(zip(layout.places, tensors.values()), key=lambda pair: pair[0])
    return files.write_tensors(path, layout, (value.reshape(-1).view(torch.uint8) for _, value in parts))


def checkpoint(folder: Path, *shards: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict:
    """A checkpoint of one rank per shard; returns its manifest."""
    folder.mkdir(parents=True)
    records = {f"rank_{rank:05d}.safetensors": write(folder / f"rank_{rank:05d}.safetensors", shard)
               for rank, shard in enumerate(shards)}  # fmt: skip
    manifest = {"format": files.FORMAT, "score": None, "parameters": shapes, "files": records}
    (folder / "manifest.json").write_text(files.text_of(files.sign(manifest)))
    return manifest


def test_safetensors_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 7)  # cuts every tensor
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "fp32/a@0": torch.tensor([1.5, -2.0]),
        "state/n@0": torch.tensor([2**40, 7]),
        "half": torch.tensor([[0.5], [3.0]], dtype=torch.bfloat16),
        "none": torch.empty(0),
        "one": torch.tensor(3.0),
    }
    record = write(tmp_path / "x.safetensors", tensors)
    assert record == file_record(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_any_range_comes_back_from_any_cut(tmp_path):
    """Twelve elements in pieces of 5, 3 and 4 over two shards."""
    shards = {"fp32/a.b@0": VALUES[:5], "fp32/a.b@8": VALUES[8:]}, {"fp32/a.b@5": VALUES[5:8]}
    reader = files.Reader(tmp_path / "c", checkpoint(tmp_path / "c", *shards, shapes={"a.b": (3, 4)}))
    for start in range(13):
        for stop in range(start, 13):
            assert torch.equal(reader.read("fp32", "a.b", start, stop), VALUES[start:stop])
    assert torch.equal(reader.whole("a.b"), VALUES.view(3, 4))
    assert reader.gaps() == []
    with pytest.raises(ValueError, match=r"lacks fp32 of a[.]b, elements 12 to 13"):
        reader.read("fp32", "a.b", 2, 13)
    with pytest.raises(ValueError, match=r"lacks exp_avg of a[.]b"):
        reader.read("exp_avg", "a.b", 0, 1)


@pytest.mark.parametrize(
    ("shards", "wrong"),
    [
        ([{"fp32/a@0": VALUES[:5]}, {"fp32/a@6": VALUES[6:]}], "fp32 of a"),  # element 5 is nowhere
        ([{"fp32/a@0": VALUES[:5]}, {"fp32/a@4": VALUES[4:]}], "fp32 of a"),  # element 4 is there twice
        ([{"fp32/a@0": VALUES[:11]}], "fp32 of a"),
        ([{"fp32/a@0": VALUES, "exp_avg/a@1": VALUES[1:]}], "exp_avg of a"),
        ([{"fp32/a@0": VALUES, "fp32/b@0": VALUES}], "fp32 of b"),
        ([{}], "state of a"),
    ],
)
def test_gaps(tmp_path, shards, wrong):
    reader = files.Reader(tmp_path / "c", checkpoint(tmp_path / "c", *shards, shapes={"a": (12,)}))
    assert reader.gaps() == [f"{wrong} is not complete"]


def test_a_shard_that_is_not_one(tmp_path):
    manifest = checkpoint(tmp_path / "c", {"fp32/a@0": VALUES}, shapes={"a": (12,)})
    path = tmp_path / "c/rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"rank_00000.safetensors is not a shard"):
        files.Reader(tmp_path / "c", manifest)


@pytest.mark.parametrize("change", [{"step": 8}, {"files": {}}, {"sha256": "0"}, None, {"format": 3}, {"format": 1}])
def test_an_altered_manifest_is_named(tmp_path, change):
    manifest = {"format": files.FORMAT, "step": 7, "files": {"rank_00000.json": {"bytes": 1, "sha256": "a"}}}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(files.sign(manifest)))
    assert files.read_manifest(tmp_path) == manifest
    if change and "format" in change:  # made by another version, and whole
        path.write_text(json.dumps(files.sign(manifest | change)))
        with pytest.raises(ValueError, match=f"of format {change['format']}, expected {files.FORMAT}"):
            files.read_manifest(tmp_path)
        return
    path.write_text(json.dumps(files.sign(manifest) | change) if change else path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"manifest.json is missing, truncated or altered"):
        files.read_manifest(tmp_path)


def test_a_manifest_is_whole_whatever_its_keys_were(tmp_path):
    """JSON makes texts of numbers, and sorts 10 before 9 then."""
    manifest = {"format": files.FORMAT, "files": {}, "state": {9: (1, 2), 10: float("inf")}}
    (tmp_path / "manifest.json").write_text(files.text_of(files.sign(manifest)))
    assert files.read_manifest(tmp_path)["state"] == {"9": [1, 2], "10": float("inf")}


@pytest.mark.parametrize("name", ["../../secret.json", "/etc/passwd", "rank_00000.pt"])
def test_a_manifest_names_files_of_its_folder_only(tmp_path, name):
    manifest = {"format": files.FORMAT, "files": {name: {"bytes": 1, "sha256": "a"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(files.sign(manifest)))
    with pytest.raises(ValueError, match="altered"):
        files.read_manifest(tmp_path)


def test_which_checkpoints_are_tried(tmp_path):
    for step in (3, 6, 9):
        checkpoint(tmp_path / f"step_{step:08d}", shapes={})
    (tmp_path / "step_00000012").mkdir()  # a save that was not finished
    latest = tmp_path / "latest.json"
    three, six, nine = (f"step_{step:08d}" for step in (3, 6, 9))
    assert files.candidates(tmp_path) == ([nine, six, three], None)
    latest.write_text(json.dumps({"tag": six}))  # nine is what somebody went back from
    assert files.candidates(tmp_path) == ([six, three], None)
    latest.write_text(json.dumps({"tag": "step_00000007"}))  # gone
    assert files.candidates(tmp_path) == (["step_00000007", six, three], None)
    for damage in ("", "[]", '{"tag": "../../x"}', '{"tag": 6}', '{"tag": "step_"}'):
        latest.write_text(damage)
        assert files.candidates(tmp_path) == ([nine, six, three], f"{latest} is truncated or altered"), damage


SCORES = {3: 0.5, 6: 0.9, 9: None, 12: 0.9, 15: 0.2, 18: float("nan")}


@pytest.mark.parametrize(
    ("keep", "best", "every", "kept"),
    [(1, False, 0, {18}), (3, False, 0, {12, 15, 18}), (1, True, 0, {6, 18}), (1, False, 6, {6, 12, 18}),
     (2, True, 9, {6, 9, 15, 18}), (9, False, 0, set(SCORES))],
)  # fmt: skip
def test_what_is_kept(keep, best, every, kept):
    """6 and 12 have one score: the first was measured, the other was saved before the next evaluation."""
    assert set(SCORES) - files.surplus(SCORES, keep=keep, keep_best=best, keep_every=every) == kept


def test_a_deletion_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint(tmp_path / "step_00000003", {"fp32/a@0": VALUES}, shapes={"a": (12,)})

    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.remove(tmp_path / "step_00000003")
    assert files.complete(tmp_path) == [] and any(tmp_path.glob("step_*"))
