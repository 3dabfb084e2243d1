import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe.cello1.engines import options
from recipe.cello1.formats.atomic import write_items
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.launch import summary
from recipe.cello1.launch.summary import plot, training_gain
from recipe.cello1.task.answer import format_answer
from tests.helpers.cli import command
from tests.helpers.toy_model import toy_puzzles

main = command("summary")


def steps(rewards):
    return [
        {"step": k, "critic/score/mean": r, "training/reward/partial_accuracy": r / 2} for k, r in enumerate(rewards, 1)
    ]


def test_gain_compares_both_ends():
    assert training_gain(steps([0, 0, 0.5, 1, 1]), window=2) == {
        "steps": 5, "window": 2, "first": 0.0, "last": 1.0, "gain": 1.0
    }  # fmt: skip


def test_no_training_no_gain():
    assert training_gain([]) is None


def test_plot_is_a_picture(tmp_path):
    plot(steps([0.0, 0.2, 0.4]), tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["training.png"]


@pytest.fixture
def run(tmp_path):
    write_puzzles(tmp_path / "test.json", toy_puzzles(6))
    (tmp_path / "metrics").mkdir()
    lines = [json.dumps({"step": s.pop("step"), "data": s}) for s in steps([0.0] * 5 + [0.3] * 5)]
    (tmp_path / "metrics" / "attempt-000.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "out").mkdir()
    return tmp_path


class Engine:
    """Answers the first so many puzzles right, and notes which model was asked."""

    asked: list[str] = []

    def __init__(self, model, n_right, options):
        self.model, self.n_right, self.options = model, n_right, options

    def __enter__(self):
        Engine.asked.append(self.model)
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def engine(monkeypatch):
    """Stand in for vLLM: model ``b`` answers 5 puzzles right, any other 1."""

    def predict(engine, puzzles, path, *, decode="free", **_):
        assert engine.options.get("constrained") or decode != "constrained"
        n = engine.n_right + (decode == "constrained")
        answers = [puzzle.answer if i < n else puzzle.answer[::-1] for i, puzzle in enumerate(puzzles)]
        records = [{"index": i, "prediction": format_answer(a), "tokens": 20 + i} for i, a in enumerate(answers)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return SimpleNamespace(failed=0)

    monkeypatch.setattr(Engine, "asked", [])
    monkeypatch.setattr(
        summary, "start_engine", lambda kind, model, **o: Engine(model, 5 if Path(model).name == "b" else 1, o)
    )
    monkeypatch.setattr(summary, "predict", predict)
    return Engine


def test_what_was_evaluated_is_kept_for_that_model_and_those_puzzles(run, engine, monkeypatch):
    def accuracy(model, *options):
        command = ["--data", str(run / "test.json"), "--metrics", str(run / "metrics"), "--out", str(run / "out")]
        assert main([*command, *options, f"before={model}"]) == 0
        stages = json.loads((run / "out" / "summary.json").read_text())["stages"]
        return stages["before"]["metrics"]["exact_match"]["mean"]

    assert accuracy("a") == accuracy("a") == pytest.approx(1 / 6)
    assert engine.asked == ["a"]
    assert accuracy("b") == pytest.approx(5 / 6)
    assert accuracy("a", "--limit", "3") == pytest.approx(1 / 3)
    accuracy("a", "--max-tokens", "9")
    assert engine.asked == ["a", "b", "a", "a"]
    # The same path, another model in it.
    for weights in (b"1", b"2"):
        (run / "m").mkdir(exist_ok=True)
        (run / "m" / "model.safetensors").write_bytes(weights)
        accuracy(run / "m")
    assert engine.asked[4:] == [str(run / "m")] * 2
    # A read-out of as many samples as another version of this software takes.
    accuracy("a", "--decode", "matrix")
    accuracy("a", "--decode", "matrix")
    monkeypatch.setattr(options, "SAMPLES", options.SAMPLES + 1)
    accuracy("a", "--decode", "matrix")
    assert engine.asked[6:] == ["a"] * 2


def test_command_writes_all(run, engine, capsys):
    code = main(["--data", str(run / "test.json"), "--metrics", str(run / "metrics"), "--out", str(run / "out"),
                 "before=a", "after GRPO=b"])  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "Held-out puzzles" in out and "gain +0.300" in out and "model:    b" in out
    report = json.loads((run / "out" / "summary.json").read_text())
    assert report["training"]["gain"] == pytest.approx(0.3)
    assert set(report["stages"]) == {"before", "after GRPO"}
    assert report["chance"] == pytest.approx(report["n"] / sum(puzzle.n_cells for puzzle in toy_puzzles(6)))
    lines = (run / "out" / "summary.md").read_text().splitlines()
    assert lines[0] == "| metric | before | after GRPO | after GRPO minus before |"
    assert [line.split(" | ")[0] for line in lines[2:9]] == [
        "| partial accuracy", "| exact match", "| format validity", "| uniqueness", "| strict accuracy",
        "| legal answers", "| length (tokens)",
    ]  # fmt: skip
    change = report["differences"]["after GRPO minus before"]["metrics"]["exact_match"]
    assert change["mean"] == pytest.approx(4 / 6) and change["low"] < 4 / 6 < change["high"]
    assert (run / "out" / "training.png").exists()


def test_decodings_and_baseline_are_rows(run, engine, capsys):
    write_puzzles(run / "train.json", toy_puzzles(6))
    command = ["--data", str(run / "test.json"), "--metrics", str(run / "metrics"), "--out", str(run / "out")]
    more = ["--decode", "greedy,constrained", "--baseline", str(run / "train.json")]
    assert main([*command, *more, "SFT=a", "GRPO=b"]) == 0
    report = json.loads((run / "out" / "summary.json").read_text())
    stages = {name: stage["metrics"]["exact_match"]["mean"] for name, stage in report["stages"].items()}
    assert stages == {
        "SFT, greedy": pytest.approx(1 / 6), "SFT, constrained": pytest.approx(2 / 6),
        "GRPO, greedy": pytest.approx(5 / 6), "GRPO, constrained": 1,
    }  # fmt: skip
    assert set(report["baselines"]) == {"naive_bayes_matched", "naive_bayes"}
    assert list(report["differences"]) == ["GRPO minus SFT, greedy", "GRPO minus SFT, constrained"]
    rows = (run / "out" / "summary.md").read_text().splitlines()
    assert rows[0] == "| model | decoding | partial accuracy | exact match | legal answers | length (tokens) |"
    assert [row.split(" | ")[:2] for row in rows[2:10]] == [
        ["| SFT", "greedy"], ["| SFT", "constrained"], ["| GRPO", "greedy"], ["| GRPO", "constrained"],
        ["| naive Bayes, matched", ""], ["| naive Bayes, cell by cell", ""],
        ["| GRPO minus SFT", "greedy"], ["| GRPO minus SFT", "constrained"],
    ]  # fmt: skip
    assert main([*command, "SFT=a", "GRPO=b"]) == 0
    assert engine.asked == ["a", "b"]  # one start for both decodings, and what is there is kept
    assert main([*command, "--decode", "beam", "SFT=a"]) == 1
    assert "unknown decoding 'beam'; use greedy, constrained, matrix" in capsys.readouterr().err


def test_the_first_model_is_not_decoded_in_all_ways(run, engine, capsys):
    command = ["--data", str(run / "test.json"), "--metrics", str(run / "metrics"), "--out", str(run / "out")]
    more = ["--decode", "greedy,constrained", "--decode-first", "greedy"]
    assert main([*command, *more, "SFT=a", "GRPO=b"]) == 0
    report = json.loads((run / "out" / "summary.json").read_text())
    assert list(report["stages"]) == ["SFT, greedy", "GRPO, greedy", "GRPO, constrained"]
    assert list(report["differences"]) == ["GRPO minus SFT, greedy"]
    assert main([*command, "--decode-first", "greedy,beam", "SFT=a"]) == 1
    assert "--decode-first: unknown decoding 'beam'" in capsys.readouterr().err


CONFIG = """
data:
  max_response_length: 80
actor_rollout_ref:
  rollout:
    max_model_len: {length}
    response_length: ${{oc.select:data.max_response_length,512}}
"""


@pytest.mark.parametrize(
    ("config", "options", "limits"),
    [
        (None, [], {"max_tokens": 2048}),
        (None, ["--max-tokens", "9", "--max-model-len", "99"], {"max_tokens": 9, "max_model_len": 99}),
        (CONFIG.format(length=256), [], {"max_tokens": 80, "max_model_len": 256}),
        (CONFIG.format(length="null"), [], {"max_tokens": 80}),
        (CONFIG.format(length=256), ["--max-tokens", "9"], {"max_tokens": 9, "max_model_len": 256}),
    ],
)
def test_limits_are_those_of_the_training_unless_others_are_given(run, monkeypatch, config, options, limits):
    seen = []

    def noted(model, puzzles, stem, decodings, **options):
        seen.append(options)
        records = [
            {"index": i, "prediction": format_answer(puzzle.answer), "tokens": 9}
            for i, puzzle in enumerate(puzzles.puzzles)
        ]
        write_items(stem.with_name("p.jsonl"), records)
        return {"greedy": stem.with_name("p.jsonl")}

    monkeypatch.setattr(summary, "answer_puzzles", noted)
    if config:
        (run / "config.yaml").write_text(config)
        options = [*options, "--config", str(run / "config.yaml")]
    command = ["--data", str(run / "test.json"), "--metrics", str(run / "metrics"), "--out", str(run / "out"), "a=b"]
    assert main([*command, *options]) == 0
    assert seen == [limits]


@pytest.mark.parametrize(
    ("told", "of_train", "asked"),
    [("user", "system", "user"), (None, "user_current", "user_current"), (None, None, "system")],
)
def test_the_layout_is_that_of_the_training(run, monkeypatch, told, of_train, asked, capsys):
    seen = []

    def noted(model, data, stem, decodings, **options):
        seen.append(data.layout)
        records = [{"index": i, "prediction": format_answer(p.answer), "tokens": 9} for i, p in enumerate(data.puzzles)]
        write_items(stem.with_name("p.jsonl"), records)
        return {"greedy": stem.with_name("p.jsonl")}

    monkeypatch.setattr(summary, "answer_puzzles", noted)
    write_rl_parquet(run / "test.parquet", toy_puzzles(3), "test", "system", "batch")
    config = {"max_response_length": 80, "prompt_layout": told}
    if of_train:
        write_rl_parquet(run / "train.parquet", toy_puzzles(3), "train", of_train, "batch")
        config["train_files"] = [str(run / "train.parquet")]
    (run / "config.yaml").write_text(json.dumps({"data": config}))
    command = ["--data", str(run / "test.parquet"), "--metrics", str(run / "metrics"), "--out", str(run / "out"), "a=b"]
    assert main([*command, "--config", str(run / "config.yaml")]) == 0
    assert seen == [asked]
    assert ("next: " in capsys.readouterr().out) is (asked == "system")


def test_configuration_without_a_limit(run, capsys):
    (run / "config.yaml").write_text("data: {}")
    command = ["--data", str(run / "test.json"), "--metrics", str(run / "metrics"), "--out", str(run / "out"), "a=b"]
    assert main([*command, "--config", str(run / "config.yaml")]) == 1
    assert "has no data.max_response_length" in capsys.readouterr().err


def test_missing_data(run, capsys):
    code = main(["--data", str(run / "no.json"), "--metrics", str(run / "metrics"), "--out", str(run / "o"), "a=b"])
    assert code == 1
    assert "no.json does not exist" in capsys.readouterr().err
