"""Results in JSON come back as they were, and no damaged number is read."""

import json
import math

import pytest
import torch

from modeconn.tools.json_files import from_json, numbers, to_json
from modeconn.tools.measurements import Records, read_records

RECORD = {
    "kind": "Thing",
    "values": {"a": torch.tensor([0.5, math.nan]), "b": [1, 2.0, math.inf]},
    "text": 'x "é"',
    "none": None,
    "keys": {10: True, 9: False},
}


def test_a_record_comes_back(tmp_path):
    text = to_json(RECORD, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == text
    found = from_json(text, "thing")
    assert found["text"] == RECORD["text"] and found["keys"] == {"10": True, "9": False} and "sha256" not in found
    assert numbers(found["values"]["b"]) == [1, 2.0, math.inf] and math.isnan(numbers(found["values"]["a"])[1])
    json.loads(text, parse_constant=pytest.fail)  # numbers that are not finite are no JSON


def test_every_changed_number_and_name_is_noticed():
    text = to_json(RECORD)
    for place, letter in enumerate(text):
        if not letter.isalnum():
            continue
        changed = f"{text[:place]}{'7' if letter != '7' else '8'}{text[place + 1 :]}"
        try:
            read = from_json(changed, "thing")
        except ValueError as error:
            assert "this thing is damaged" in str(error) or "this is no thing" in str(error)
        else:  # the name of the digest itself
            assert {name for name in read if name not in RECORD} and {**RECORD, "values": 0}.keys() <= read.keys()


def test_a_record_without_its_digest_is_taken_as_it_is():
    record = json.loads(to_json(RECORD))
    record["text"] = "by hand"
    with pytest.raises(ValueError, match='changed on purpose, remove its entry "sha256"'):
        from_json(json.dumps(record), "thing")
    del record["sha256"]
    assert from_json(json.dumps(record), "thing")["text"] == "by hand"


@pytest.mark.parametrize("text", ["", "[1]", "no", "[" * 100_000, '{"a": ' * 100_000, '{"a": 1' + "0" * 5000 + "}"])
def test_anything_else_is_one_sentence(text):
    with pytest.raises(ValueError, match="this is no thing"):
        from_json(text, "thing")


def test_measurements_know_which_of_them_are_damaged(tmp_path):
    path = tmp_path / "kept"
    with Records(path) as records:
        for number in range(3):
            records.add(f"{number:032x}", {"loss": number + 0.5})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1.5", b"9.5"))
    with pytest.warns(UserWarning, match="damaged in 1 of its 3 lines; what they held is measured again"):
        assert [record["loss"] for record in read_records(path).values()] == [0.5, 2.5]


def test_a_line_that_a_killed_process_wrote_in_part_is_measured_again_without_a_warning(tmp_path):
    path = tmp_path / "kept"
    with Records(path) as records:
        records.add("a", {"loss": 0.5})
        before = path.stat().st_size
        records.add("b", {"loss": 1.5, "own": {"loss": 2.5}})  # braces in it are no end of the line
    content = path.read_bytes()
    for end in range(before, len(content)):  # wherever it was killed
        path.write_bytes(content[:end])
        with Records(path) as records:
            assert "a" in records and "b" not in records
            records.add("b", {"loss": 3.5})
        assert [record["loss"] for record in read_records(path).values()] == [0.5, 3.5]


def test_measurements_of_an_older_version_are_read(tmp_path):
    (tmp_path / "kept").write_text('\n{"a": {"loss": 1.0}}\n{"b": {"loss": 2.0}}')
    assert read_records(tmp_path / "kept") == {"a": {"loss": 1.0}, "b": {"loss": 2.0}}
