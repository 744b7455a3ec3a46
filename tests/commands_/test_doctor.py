"""`ckptconv doctor`: what it looks at, and what it finds wrong."""

from __future__ import annotations

import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inprocess import here


def found(*words: object, code: int = 0) -> dict[str, list[dict[str, str]]]:
    done = here("doctor", *words, "--json")
    assert done.returncode == code, done.stdout
    by: dict[str, list[dict[str, str]]] = {}
    for one in json.loads(done.stdout):
        by.setdefault(one["about"], []).append(one)
    return by


def test_a_machine_that_is_well(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("doctor", tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert "WRONG" not in done.stdout
    for about in ("python", "memory", "/dev/shm", "open files", "disk", "plugins"):
        assert f"\n{about} " in done.stdout


def test_a_file_where_checkpoints_are_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "choose" in found(place, code=1)["disk"][0]["wrong"].lower()


def test_plugins_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loader_doctor_lacking.py").write_text("import no_such_package\n")
    (tmp_path / "checkpoint_saver_doctor_half.py").write_text("def add_arguments(parser): pass\n")
    (tmp_path / "saver_doctor_whole.py").write_text("def add_arguments(p): pass\ndef save_checkpoint(q, a): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = {one["what"]: one["wrong"] for one in found(tmp_path, code=1)["plugins"]}
    assert "needs 'no_such_package', which is not installed" in wrong["loader doctor_lacking"]
    assert "has no function save_checkpoint(queue, args)" in wrong["saver doctor_half"]
    assert wrong["saver doctor_whole: module saver_doctor_whole"] == ""
    text = here("doctor", tmp_path).stdout
    assert "WRONG: loader module loader_doctor_lacking was found" in text


def test_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Said, not set: the process of the tests may have more open already.
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (200, 4096))
    assert "ulimit -n" in found(tmp_path, code=1)["open files"][0]["wrong"]


def test_a_full_disk_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr("ckptconv.measure.available", lambda: 10**8)
    by = found(tmp_path / "not" / "there", code=1)
    assert "Free space" in by["disk"][0]["wrong"]
    assert str(tmp_path) in by["disk"][0]["what"]
    assert "--max-memory" in by["memory"][0]["wrong"]
    assert by["/dev/shm"][0]["wrong"]
