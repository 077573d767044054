"""A file of a run that reads as JSON and is not what the run wrote is named, whatever a report stumbles over."""

import json

import pytest

from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import write_json
from libmtl_fair.report.run_folder import damage_named


class Run:
    def __init__(self, path):
        self.path = path


@damage_named
def shown(run):
    return f"{json.loads((run.path / 'card.json').read_text())['rows']:,}"


def test_the_damaged_file_is_named_and_errors_of_our_own_are_not_hidden(tmp_path):
    run = Run(tmp_path)
    write_json(tmp_path / "other.json", {"a": 1})
    write_json(tmp_path / "card.json", {"rows": 1200}, sealed="beside")
    assert shown(run) == "1,200"
    sealed = (tmp_path / "card.json").read_text()
    (tmp_path / "card.json").write_text(sealed.replace("1200", '"x"'))
    with pytest.raises(CheckpointError, match=r"card.json is damaged or was changed.*ValueError.*--resume"):
        shown(run)
    write_json(
        tmp_path / "card.json", {"rows": "x"}, sealed="beside"
    )  # as written: a bug, which must not be called damage
    with pytest.raises(ValueError, match="Cannot specify"):
        shown(run)
