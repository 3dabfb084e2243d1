"""One journal: several writers lose nothing, and in memory are keys only."""

import json
import multiprocessing
import os
import tracemalloc

import pytest

from recipe.cello1.formats.atomic import append_jsonl, held, iter_items, read_items, write_items
from recipe.cello1.formats.journal import Journal

WRITERS, RECORDS, LONGEST = 8, 25, 200_000


def key(record, where):
    if "key" not in record:
        raise ValueError(f"{where} is foreign")
    return record["key"] if "text" in record else None


def _write(path, writer):
    journal = Journal(path, key)
    for number in range(RECORDS):
        name = f"{writer}-{number}"
        journal.add(name, {"key": name, "text": name[-1] * (LONGEST * (number + 1) // RECORDS)})


def test_several_writers_lose_nothing_and_cut_nothing(tmp_path):
    path = tmp_path / "j.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, number)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    records = read_items(path)
    assert sorted(record["key"] for record in records) == sorted(
        f"{writer}-{number}" for writer in range(WRITERS) for number in range(RECORDS)
    )
    for record in records:
        number = int(record["key"].split("-")[1])
        assert record["text"] == record["key"][-1] * (LONGEST * (number + 1) // RECORDS)
    journal = Journal(path, key)
    assert all(record["key"] in journal and journal[record["key"]] == record for record in records)


def test_a_writer_waits_for_the_lock_and_follows_a_file_that_was_replaced(tmp_path):
    import fcntl
    import threading

    path = tmp_path / "j.jsonl"
    append_jsonl(path, 1)
    with open(path, "rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=append_jsonl, args=(path, 2))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and read_items(path) == [1]
        write_items(path, [1, "put in its place"])
        fcntl.flock(other, fcntl.LOCK_UN)
        waiting.join()
    assert read_items(path) == [1, "put in its place", 2]


def test_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim.jsonl"
    victim.write_text("mine\n")
    (tmp_path / "j.jsonl").symlink_to(victim)
    with pytest.raises(ValueError, match=r"j\.jsonl is a symbolic link"):
        append_jsonl(tmp_path / "j.jsonl", 1)
    (tmp_path / ".out.lock").symlink_to(victim)
    with pytest.raises(ValueError, match="is a symbolic link"), held(tmp_path / "out"):
        pass
    assert victim.read_text() == "mine\n"


def test_a_place_is_held_by_one_run(tmp_path):
    with held(tmp_path / "out", "output"):
        with pytest.raises(ValueError, match="output: another run is writing to .*out; .* or wait"):
            with held(tmp_path / "out", "output"):
                pass
    with held(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_found_and_tidied(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = [{"key": 2, "text": "b"}, {"key": 1}, {"key": 0, "text": "a\u2028"}, {"key": 2, "text": "later"}]
    write_items(path, lines)
    with open(path, "ab") as file:
        file.write(b'{"key": 3, "te')
    journal = Journal(path, key)
    assert [k in journal for k in range(4)] == [True, False, True, False]
    assert journal[2] == lines[3]
    journal.tidy()
    assert read_items(path) == [lines[3], lines[2]]
    journal.add(1, {"key": 1, "text": "c"})
    assert (journal[0], journal[1], journal[2]) == (lines[2], {"key": 1, "text": "c"}, lines[3])
    journal.tidy(order=True)
    assert [record["key"] for record in read_items(path)] == [0, 1, 2]
    assert journal[2] == lines[3]
    before = path.stat().st_mtime_ns, path.stat().st_ino
    journal.tidy(order=True)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    append_jsonl(path, {"other": 1})
    with pytest.raises(ValueError, match=r"j\.jsonl, line 4 is foreign"):
        Journal(path, key)


def test_memory_does_not_grow_with_the_length_of_the_records(tmp_path):
    path = tmp_path / "j.jsonl"
    write_items(path, ({"key": number, "text": "x" * 20_000} for number in range(500)))  # 10 MB
    tracemalloc.start()
    journal = Journal(path, key)
    journal.tidy(order=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 499 in journal
    assert peak < 1_000_000


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_list_is_read_item_by_item_however_it_is_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("recipe.cello1.formats.atomic._CHUNK", chunk)
    path = tmp_path / "x.json"
    for value in ([], [1], [12, -3.5e2, True, None, "é\ud800]", {"a": [1, {"b": "]"}]}, [[]]], ["x" * 300, 123456]):
        for indent in (None, 2):
            path.write_text(json.dumps(value, indent=indent) + "\n")
            assert list(iter_items(path)) == value
    path.write_bytes(json.dumps(["é", 1]).encode("utf-16"))
    assert list(iter_items(path)) == ["é", 1]
    for bad in ("", "[", "[1", "[1,", "[1 2]", "[1,]", "[1] 2", "[1]]", "{}{", '["\\x"]', "[1,, 2]"):
        path.write_text(bad)
        with pytest.raises(ValueError, match="x.json is not valid JSON"):
            list(iter_items(path))
    path.write_text('"text"')
    with pytest.raises(ValueError, match="must hold a list of items, got str"):
        list(iter_items(path))
