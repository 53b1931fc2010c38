import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import Bundle
from model.errors import UserError
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.vocabulary import BOS, PAD, Vocabulary

ROW = np.array([[BOS, 4, 5, 4, PAD, PAD, PAD, PAD]], np.uint16)


@pytest.fixture
def bundle():
    torch.manual_seed(2)
    vocabulary = Vocabulary(("a", "b"), {"a": "template of a"})
    return Bundle(Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16, tallied=1)).eval(), vocabulary, {"sessions": 3})


def test_a_bundle_comes_back_as_it_was(bundle, tmp_path):
    bundle.save(tmp_path / "deep" / "model")
    again = Bundle.load(tmp_path / "deep" / "model")
    assert again.fingerprint == bundle.fingerprint
    assert again.vocabulary == bundle.vocabulary
    assert again.training == {"sessions": 3}
    assert again.network.tally.kinds == 2
    assert Scorer(again).exact(ROW) == Scorer(bundle).exact(ROW)


def test_saving_again_replaces_it_and_leaves_nothing_beside(bundle, tmp_path):
    bundle.save(tmp_path / "model")
    other = Bundle(bundle.network, Vocabulary(("a", "c")))
    other.save(tmp_path / "model")
    assert Bundle.load(tmp_path / "model").fingerprint == other.fingerprint != bundle.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_bundle_stays_a_link(bundle, tmp_path):
    (tmp_path / "current").symlink_to("versions/one")
    for model in (bundle, Bundle(bundle.network, Vocabulary(("a", "c")))):
        model.save(tmp_path / "current")
        assert (tmp_path / "current").is_symlink()
        assert Bundle.load(tmp_path / "versions" / "one").fingerprint == model.fingerprint
    assert [path.name for path in (tmp_path / "versions").iterdir()] == ["one"]


def test_what_lies_beside_it_stays(bundle, tmp_path):
    for beside in ("model.old", "model.new"):
        (tmp_path / beside).mkdir()
        (tmp_path / beside / "backup").touch()
    for _ in range(2):
        bundle.save(tmp_path / "model")
    assert {path.name for path in tmp_path.rglob("backup*")} == {"backup"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new", "model.old"]


@pytest.mark.parametrize("fails", ["write_bytes", "write_text", "rename"])
def test_a_failure_leaves_the_bundle_of_before_and_nothing_beside(bundle, tmp_path, monkeypatch, fails):
    bundle.save(tmp_path / "model")
    works = getattr(Path, fails)

    def full(path, *arguments, **options):
        if path.name == "new" or path.parent.name == "new":
            raise OSError(28, "No space left on device")
        return works(path, *arguments, **options)

    monkeypatch.setattr(Path, fails, full)
    with pytest.raises(UserError, match="cannot write the model bundle"):
        Bundle(bundle.network, Vocabulary(("a", "c"))).save(tmp_path / "model")
    assert Bundle.load(tmp_path / "model").fingerprint == bundle.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_others_may_read_a_bundle_as_far_as_the_umask_says(bundle, tmp_path):
    bundle.save(tmp_path / "model")
    (tmp_path / "any").mkdir()
    (tmp_path / "file").touch()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert {path.stat().st_mode for path in Bundle.files(tmp_path / "model")} == {(tmp_path / "file").stat().st_mode}


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_bundle_that_may_not_be_read_is_not_said_to_be_missing(bundle, tmp_path, monkeypatch, name):
    bundle.save(tmp_path / "model")
    works = Path.open

    def denied(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return works(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=r"cannot read the model bundle \(Permission denied\)"):
        Bundle.load(tmp_path / "model")


def test_the_fingerprint_is_of_all_that_a_score_depends_on(bundle):
    with torch.no_grad():
        changed = Bundle(Autoencoder(bundle.network.shape), bundle.vocabulary)
        changed.network.load_state_dict(bundle.network.state_dict())
        assert changed.fingerprint == bundle.fingerprint
        del changed.__dict__["fingerprint"]
        changed.network.bias[4] += 1e-6
        assert changed.fingerprint != bundle.fingerprint
        changed.network.bias.copy_(bundle.network.bias)
        del changed.__dict__["fingerprint"]
        changed.network.tally.allowance.fill_(3)
        assert changed.fingerprint != bundle.fingerprint


def damage_weights(folder):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(bytes(content))


def change(**facts):
    def damage(folder):
        path = folder / "model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_weights, "fingerprint does not match"),
        (change(events=["b", "a"]), "fingerprint does not match"),
        (change(events=["a"]), "fingerprint does not match"),
        (change(format=99), "bundle format 99"),
        (change(format=1), "bundle format 1, but this version reads 2; train one"),
        (change(shape={"width": 3}), "damaged"),
        (lambda folder: (folder / "model.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"x"), "damaged"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "no model bundle there"),
        (lambda folder: (folder / "model.json").unlink(), "no model bundle there"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_sentence(bundle, tmp_path, damage, said):
    bundle.save(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=said) as caught:
        Bundle.load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert "python -m model" in str(caught.value)


def test_a_place_where_nothing_can_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/model: cannot write the model bundle"):
        Bundle.check_place(tmp_path / "file" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "model")
    with pytest.raises(UserError, match=r"file/model: cannot write the model bundle"):
        Bundle.check_place(tmp_path / "link")
    Bundle.check_place(tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_place_that_cannot_even_be_looked_at_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot write the model bundle \(File name too long\)"):
        Bundle.check_place(tmp_path / ("x" * 300))

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(UserError, match=r"cannot write the model bundle \(Permission denied\)"):
        Bundle.check_place(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_something_else_is_not_overwritten(bundle, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="is no model bundle"):
        bundle.save(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").exists()
