"""Metrics of a run: what a killed run was writing is left out, and what is none is named."""

import pytest

from recipe.cello1.rl.run_metrics import REWARD, first_and_last, read_metrics


def test_attempts_are_joined_and_the_line_of_a_killed_run_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1, "data": {"x": 1}}\n{"step": 2, "data": {"x": 2}}\n{"step": 3, "da')
    (tmp_path / "b.jsonl").write_bytes(b'{"step": 2, "data": {"y": 5}}\n\xff\n' + b"[" * 100_000)
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2, "y": 5}]


@pytest.mark.parametrize(
    "line", ["5", "[]", "null", "{}", '{"step": 1}', '{"step": "1", "data": {}}', '{"step": 1, "data": 7}']
)
def test_lines_that_are_no_metrics(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"step": 1, "data": {}}\n' + line)
    with pytest.raises(ValueError, match=r"metrics: .*a.jsonl, line 2: no step with its data"):
        read_metrics(tmp_path)


def test_only_numbers_are_averaged():
    assert first_and_last([{REWARD: 1.0}, {REWARD: "x"}, {REWARD: [2]}, {REWARD: None}, {REWARD: 3}]) == (1.0, 3.0, 1)
