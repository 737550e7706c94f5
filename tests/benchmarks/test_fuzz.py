"""A small share of benchmarks/fuzz.py: no damaged file ends in anything but one sentence that names it."""

import os

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_files import TARGETS

EACH = 10


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_damaged_files_are_refused_in_one_sentence(target, tmp_path):
    target.make(tmp_path)
    good, expected = (tmp_path / target.file).read_bytes(), target.read(tmp_path / target.file)
    endings = [fuzz.one(target, tmp_path, good, expected, seed) for seed in range(EACH)]
    assert [ending for ending in endings if ending.is_bad] == []
    assert any(ending.how == "refused" for ending in endings)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="damaged files are read in processes that may die")
def test_the_count_sees_what_must_not_happen(tmp_path):
    def read(path):
        content = path.read_bytes()
        kind = content[:1]
        if kind == b"r":
            raise KeyError("raw")
        if kind == b"s":
            raise ValueError("something is wrong")  # of which file?
        if kind == b"k":
            os._exit(3)
        return content

    path = tmp_path / "file"
    for kind, how in {b"r": "raw", b"s": "raw", b"d": "different", b"k": "crash"}.items():
        target = fuzz.Target(how, "file", lambda folder: (folder / "file").write_bytes(b"good"), read)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzz, "damaged", lambda good, rng, kind=kind: kind * 9)
            patch.setattr(fuzz, "hostile", lambda good, rng, kind=kind: kind * 9)
            endings = list(fuzz.batch(target, range(4)))
        assert {ending.how for ending in endings} <= {how, "accepted"} and any(one.how == how for one in endings)
    assert not path.exists()
