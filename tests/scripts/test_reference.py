import re
from pathlib import Path

import pytest

from consumer.settings import OURS, Settings
from model.errors import UserError
from scripts import reference


def test_the_page_is_what_is_written():
    assert reference.PAGE.read_text() == reference.page(), "stale: run python -m scripts.reference"


def test_every_setting_is_there_with_its_default_and_what_it_is_for():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", reference.page(), re.MULTILINE))
    for name, field in Settings.model_fields.items():
        if name == "kafka":
            assert OURS.keys() <= rows.keys()
            continue
        keys = getattr(field.annotation, "model_fields", None)
        for key in [f"{name}.{key}" for key in keys] if keys else [name]:
            default, allowed, about = re.split(r"(?<!\\) \| ", rows[key])
            assert default != "``"
            assert allowed
            assert len(about) > 5
    assert "`0.95` | a number above 0 and below 1 |" in reference.page()
    assert "`24h` | a duration |" in reference.page()


def test_a_setting_that_config_yaml_does_not_explain_is_a_mistake(tmp_path, monkeypatch):
    text = (reference.ROOT / "config.yaml").read_text()
    Path(tmp_path / "config.yaml").write_text(re.sub(r"( every: 1) .*", r"\1", text))
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"says nothing about scoring\.every"):
        reference.page()
