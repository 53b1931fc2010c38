"""The pictures of the documentation come out of a real run, here of a smaller one."""

import sys

from PIL import Image

from scripts import screenshots


def test_pictures_are_taken_of_a_run(tmp_path, monkeypatch):
    for name, value in {
        "_BLOCKS": 400, "_EPOCHS": 3, "_FAILING": 0.3, "_SECONDS": 12, "_LOOK_AFTER_SECONDS": 9, "_LEVELS": {},
    }.items():  # fmt: skip
        assert hasattr(screenshots, name)
        monkeypatch.setattr(screenshots, name, value)
    pictures = tmp_path / "docs"
    pictures.mkdir()
    monkeypatch.setattr(sys, "argv", ["screenshots", "--folder", str(tmp_path / "run"), "--out", str(pictures)])
    screenshots.main()
    taken = {path.stem: Image.open(path).convert("RGB") for path in pictures.glob("*.png")}
    assert taken.keys() == {"status", "calibration_report"}
    assert taken["status"].width == 1160
    assert taken["calibration_report"].width == 1000
    for picture in taken.values():
        assert picture.height > 600
        assert len(picture.getcolors(picture.width * picture.height)) > 20  # something is drawn
