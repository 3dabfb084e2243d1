import hashlib
import json
import os
import stat
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.formats import atomic as files
from recipe.cello1.formats.atomic import (
    JsonListWriter,
    append_jsonl,
    atomic_write,
    dumps,
    read_items,
    remove_unfinished,
    sha256,
    write_items,
)


def test_dumps_takes_numpy_and_any_text():
    assert dumps({"a": np.float32(0.5), "b": np.arange(2), "c": "é"}) == '{"a": 0.5, "b": [0, 1], "c": "é"}'
    assert json.loads(dumps("\ud800é")) == "\ud800é"
    with pytest.raises(ValueError, match="cannot be written as JSON: set is not JSON"):
        dumps({"a": {1}})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        dumps(float("nan"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("items", [[], [1], [{"a": "x\u2028y\x85z\r"}, None, ["é"]]])
def test_items_round_trip(tmp_path, suffix, items):
    path = tmp_path / f"new folder/f{suffix}"
    write_items(path, iter(items))
    assert read_items(path) == items
    assert path.read_bytes().endswith(b"\n") or not items


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="f.json must hold a list of items, got dict"):
        read_items(path)
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="f.json is not valid JSON"):
        read_items(path)
    lines = tmp_path / "f.jsonl"
    lines.write_text('1\n\n{"a": \n3\n')
    with pytest.raises(ValueError, match="f.jsonl, line 3 is not valid JSON"):
        read_items(lines)
    with pytest.raises(ValueError, match="f.csv: the name must end in .json or .jsonl"):
        read_items(tmp_path / "f.csv")
    with pytest.raises(ValueError, match="f.json: item 1 cannot be written as JSON"):
        write_items(path, [1, {2}])
    with pytest.raises(ValueError, match="only .jsonl files can be appended to"):
        append_jsonl(path, 1)


def test_partial_tail(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        read_items(path)
    assert read_items(path, drop_partial_tail=True) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_items(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a": 1}')  # whole, only the line break lacks
    append_jsonl(path, {"a": 2})
    assert read_items(path) == [{"a": 1}, {"a": 2}]
    path.write_text("x" * 200_000)  # a tail longer than one block
    append_jsonl(path, {"a": 4})
    assert read_items(path) == [{"a": 4}]


@given(cut=st.integers(0, 120), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_appending_after_any_cut_loses_no_whole_record(cut, sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "f.jsonl"
    for size in sizes:
        append_jsonl(path, {"text": "é" * size})
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    kept = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    append_jsonl(path, "last")
    found = read_items(path)
    assert found[: len(kept)] == kept
    assert found[-1] == "last"
    assert len(found) - len(kept) <= 2  # the cut may fall just before a line break


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "deep" / "f.txt"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    path.chmod(0o640)
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["f.txt"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.txt"
    atomic_write(path, "old")

    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_hash_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1_000_000)
    assert sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


@pytest.mark.parametrize("items", [[], [{"a": 1}], [{"a": "é"}, [1, 2], None]])
def test_a_list_written_item_by_item_has_the_bytes_of_one_written_at_once(items, tmp_path):
    write_items(tmp_path / "at_once.json", items)
    with JsonListWriter(tmp_path / "new" / "one_by_one.json") as writer:
        for item in items:
            writer.write(item)
    assert (tmp_path / "new" / "one_by_one.json").read_bytes() == (tmp_path / "at_once.json").read_bytes()
    with JsonListWriter(tmp_path / "lines.json", indent=None) as writer:
        for item in items:
            writer.write(item)
    assert read_items(tmp_path / "lines.json") == items


def test_a_list_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="item 1"), JsonListWriter(tmp_path / "x.json") as writer:
        writer.write(1)
        writer.write(float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / f".x.json.{'0a' * 16}.tmp"
    for path in (left, tmp_path / ".x.tmp", tmp_path / "x.json"):
        path.touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.tmp", "x.json"]


def test_a_file_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        append_jsonl(tmp_path / "x.jsonl", 1)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match="link.jsonl is a symbolic link; give the file itself"):
        append_jsonl(tmp_path / "link.jsonl", 1)
    assert not (tmp_path / "elsewhere.jsonl").exists()


def test_where_there_are_no_locks_lines_are_appended_all_the_same(tmp_path, monkeypatch):
    def without(file, kind):
        raise OSError("no locks here")

    monkeypatch.setattr(files.fcntl, "flock", without)
    assert append_jsonl(tmp_path / "x.jsonl", {"a": 1}) == 0
    assert append_jsonl(tmp_path / "x.jsonl", {"a": 2}) == 9
    assert read_items(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (".", "html: .* is a folder; name a file in it"),
        ("file/a.html", "html: .*a.html cannot be written, .*file is a file; choose another place"),
        ("pipe/new/a.html", "html: .*a.html cannot be written, .*pipe is a file; choose another place"),
        ("new/deeper/a.html", ""),
        ("gone.html", ""),
    ],
)
def test_a_place_is_looked_at_before_the_work(tmp_path, place, said):
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.html").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        files.check_place(str(tmp_path / place), "html")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_was_replaced_is_followed(tmp_path, monkeypatch):
    """Another process has put a new file in the place of the one that was opened, and then removed it for a moment."""
    path = tmp_path / "x.jsonl"
    append_jsonl(path, "old")
    opened = files.open_no_link
    done = []

    def replaced(name, flags):
        file = opened(name, flags)
        if len(done) < 2:
            done.append(path.unlink())
            if len(done) == 1:
                write_items(path, ["new"])
        return file

    monkeypatch.setattr(files, "open_no_link", replaced)
    append_jsonl(path, "mine")
    assert read_items(path) == ["mine"]


ITEMS = [{"a": 1}, {"b": [{"c": 2}]}, {"d": 3}]
TWICE = '{"b": [{"c": 2, "e": 0, "c": 3}]}'


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("x.json", f'[{{"a": 1}}, {TWICE}, {{"d": 3}}]', "item 1"),
        ("x.jsonl", f'{{"a": 1}}\n{TWICE}\n{{"d": 3}}\n', "line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_by_name(tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    said = f"{name}, {where} is not valid JSON: the key 'c' stands twice in one object; remove the wrong one"
    with pytest.raises(ValueError, match=said):
        read_items(tmp_path / name)
    found = list(files.iter_items(tmp_path / name, keep_going=True))
    assert found[::2] == ITEMS[::2] and isinstance(found[1], ValueError) and said in str(found[1])
    (tmp_path / "one.json").write_text(TWICE)
    with pytest.raises(ValueError, match="one.json is not valid JSON: the key 'c' stands twice"):
        files.read_json(tmp_path / "one.json")


def test_an_item_longer_than_what_is_read_at_once_has_its_keys_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 7)
    content = f'[{{"a": 1, "b": {{"a": 2}}, "c": "{"x" * 50}"}}, {TWICE}]'
    (tmp_path / "x.json").write_text(content)
    first, second = files.iter_items(tmp_path / "x.json", keep_going=True)
    assert first == {"a": 1, "b": {"a": 2}, "c": "x" * 50} and "the key 'c' stands twice" in str(second)


def test_what_stands_in_the_way_of_a_lock_is_named(tmp_path):
    lock = tmp_path / ".x.lock"
    lock.mkdir()
    with pytest.raises(ValueError, match=r"out: .*\.x\.lock cannot be written \(Is a directory\); remove it"):
        with files.held(tmp_path / "x"):
            pass
    lock.rmdir()
    os.mkfifo(lock)
    with pytest.raises(ValueError, match=r"\.x\.lock is no plain file; remove it"):
        with files.held(tmp_path / "x"):
            pass


@pytest.mark.parametrize("length", [230, 400])
def test_a_name_that_leaves_no_room_for_the_one_it_is_written_under(tmp_path, length):
    with pytest.raises(ValueError, match=r"out: .* cannot be written \(File name too long\); choose another place"):
        files.check_place(tmp_path / ("x" * length))
    files.check_place(tmp_path / ("x" * 200))
    assert not list(tmp_path.iterdir())
