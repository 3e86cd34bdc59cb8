"""Reading checkpoints, good, damaged and hostile: needs no laion_clap."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from bridgekit_clap.checkpoints import read_weights
from safetensors.torch import save_file

from bridgekit.errors import PluginError

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Attack:
    """Pickled, it is a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(
    "saved",
    [
        {"a.weight": WEIGHT},
        {"state_dict": {"module.a.weight": WEIGHT, "module.text_branch.embeddings.position_ids": torch.arange(3)}},
        {"state_dict": collections.OrderedDict({"a.weight": WEIGHT}), "epoch": np.int64(3), "loss": np.float32(0.5)},
        {"state_dict": {"a.weight": torch.nn.Parameter(WEIGHT)}, "optimizer": {"state": {0: {"step": 3}}}, "name": "best"},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_each_layout_and_nothing_else_is(saved: dict[str, object], zipped: bool, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path / "weights.pt")
    assert list(weights) == ["a.weight"]
    assert torch.equal(weights["a.weight"], WEIGHT)


def test_numpy_scalars_of_both_major_versions_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": WEIGHT, "loss": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    other = content.replace(old, new) if old in content else content.replace(new, old)
    assert other != content
    path.write_bytes(other)
    assert list(read_weights(path)) == ["a"]


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    save_file({"module.a.weight": WEIGHT}, tmp_path / "weights.safetensors")
    assert torch.equal(read_weights(tmp_path / "weights.safetensors")["a.weight"], WEIGHT)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["state_dict", "optimizer"])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(zipped: bool, place: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": WEIGHT}, place: {"a": Attack(mark)}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PluginError, match="bridgekit-clap rejected this checkpoint: it contains getattr,"):
        read_weights(path)
    assert not mark.exists()


def test_a_bare_pickle_is_refused_and_its_code_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Attack(mark), protocol=2))
    with pytest.raises(PluginError, match="bridgekit-clap"):
        read_weights(tmp_path / "weights.pt")
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["half", "text", "empty", "zip"])
def test_a_file_that_is_cut_short_or_something_else_is_refused(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save({"a": torch.zeros(1000)}, path) if suffix == ".pt" else save_file({"a": torch.zeros(1000)}, path)
    contents = {"half": path.read_bytes()[:2000], "text": b"<html>not found</html>", "empty": b"", "zip": b"PK\5\6" + bytes(18)}
    path.write_bytes(contents[damage])
    with pytest.raises(PluginError) as caught:
        read_weights(path)
    assert caught.value.what == "bridgekit-clap cannot read this file: it is truncated, damaged, or not a checkpoint"
    assert caught.value.where == str(path)


def test_a_checkpoint_with_fusion_is_refused_under_any_name(tmp_path: Path) -> None:
    torch.save({"module.audio_branch.patch_embed.fusion_model.local_att.0.weight": WEIGHT}, tmp_path / "renamed.pt")
    with pytest.raises(PluginError, match="does not support fusion checkpoints"):
        read_weights(tmp_path / "renamed.pt")


def test_torchs_safe_globals_are_left_unchanged(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": WEIGHT}, tmp_path / "weights.pt")
    read_weights(tmp_path / "weights.pt")
    assert set(torch.serialization.get_safe_globals()) == before
