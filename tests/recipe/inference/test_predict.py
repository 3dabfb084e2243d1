import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.cello1.engines.protocol import Completion, EngineBase, Failure, Sampling, sample_seed
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.predictions import read_predictions
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.inference import predict as predict_module
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import LAYOUTS, messages
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.cli import command

main = command("predict")

TYPES = ("B cell", "NK cell", "T cell")


def puzzles(n=6):
    return [
        Puzzle(
            (("MS4A1", f"G{i}"), ("GNLY", "NKG7"), ("CD3D",)), TYPES, ("B cell", "NK cell", "T cell"), "From blood.", {}
        )
        for i in range(n)
    ]


class Killed(BaseException):
    pass


class FakeEngine(EngineBase):
    """Answers in shuffled order, text made of the prompt and the seed; may be killed, or fail on some calls."""

    name = "fake"
    model = "fake-model"
    fingerprint = ""
    constraint = "exact"

    def __init__(self, die_after=None, fail=(), order=0):
        self.die_after, self.fail, self.order = die_after, set(fail), order
        self.asked = []
        self.closed = False

    def generate(self, requests, sampling):
        requests = list(requests)
        self.asked += requests
        for done, position in enumerate(np.random.default_rng(self.order).permutation(len(requests)).tolist()):
            if done == self.die_after:
                raise Killed
            request = requests[position]
            if position in self.fail:
                yield position, Failure("out of memory")
            else:
                text = format_answer(TYPES, f"seed {request.seed}, {len(str(request.messages))} characters")
                yield position, Completion(text, "stop", 7, 100, -1.5 if sampling.logprobs else None)

    def close(self):
        self.closed = True


def run(engine, out, n=6, **options):
    return predict(engine, puzzles(n), out, progress=False, **options)


def test_records_hold_the_item_and_how_it_was_made(tmp_path):
    out = tmp_path / "p.jsonl"
    engine = FakeEngine()
    done = run(engine, out, layout="user", sampling=Sampling(max_tokens=99))
    assert (done.total, done.kept, done.answered, done.failed) == (6, 0, 6, 0)
    records = read_predictions(out)
    assert [record["index"] for record in records] == list(range(6))
    first = records[0]
    assert first["answer"] == first["assistant_msg"] == "B cell | NK cell | T cell"
    assert first["prediction"].endswith("<answer>B cell | NK cell | T cell</answer>")
    assert first["sampling"] == Sampling(max_tokens=99).as_dict() | {"constraint": "", "decode": "free", "seed": 0}
    assert first["prompt_layout"] == "user"
    assert (first["tokens"], first["prompt_tokens"], first["finish_reason"]) == (7, 100, "stop")
    assert (first["engine"], first["model"], first["sample"]) == ("fake", "fake-model", 0)
    assert list(engine.asked[0].messages) == messages(puzzles(1)[0], "user")
    assert all(request.seed is None for request in engine.asked)


def test_samples_have_seeds_of_their_own_that_depend_on_nothing_else(tmp_path):
    sampling = Sampling(temperature=0.7, logprobs=True)
    engine = FakeEngine()
    run(engine, tmp_path / "a.jsonl", sampling=sampling, samples=3, seed=5)
    seeds = [request.seed for request in engine.asked]
    assert len(set(seeds)) == 18
    assert seeds == [sample_seed(5, index, sample) for index in range(6) for sample in range(3)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    more = FakeEngine()
    run(more, tmp_path / "b.jsonl", n=2, sampling=sampling, samples=1, seed=5)
    assert [request.seed for request in more.asked] == [seeds[0], seeds[3]]
    assert all(record["logprob"] == -1.5 for record in read_items(tmp_path / "a.jsonl"))


def test_more_samples_are_added_to_those_there(tmp_path):
    sampling = Sampling(temperature=0.7)
    run(FakeEngine(), tmp_path / "a.jsonl", sampling=sampling, samples=4)
    run(FakeEngine(order=3), tmp_path / "b.jsonl", sampling=sampling, samples=2)
    engine = FakeEngine(order=4)
    done = run(engine, tmp_path / "b.jsonl", sampling=sampling, samples=4)
    assert (done.kept, len(engine.asked)) == (12, 12)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_fewer_samples_delete_no_answers(tmp_path):
    out, sampling = tmp_path / "p.jsonl", Sampling(temperature=0.7)
    run(FakeEngine(fail=[7]), out, n=5, sampling=sampling, samples=8)
    records = read_items(out)
    done = run(FakeEngine(), out, n=5, sampling=sampling, samples=1)
    assert (done.total, done.kept, done.answered) == (5, 5, 0)
    assert read_items(out) == [record for record in records if "error" not in record] != records
    assert run(FakeEngine(), out, n=5, sampling=sampling, samples=8).kept == 39


def test_two_runs_do_not_write_to_one_file(tmp_path):
    out = tmp_path / "p.jsonl"

    class Meddling(FakeEngine):
        def generate(self, requests, sampling):
            with pytest.raises(ValueError, match="another run is writing to .*give each shard a file of its own"):
                run(FakeEngine(), out, shard=(1, 2))
            yield from super().generate(requests, sampling)

    run(Meddling(), out, shard=(0, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]
    assert run(FakeEngine(), out, shard=(1, 2)).answered == 3
    assert [record["index"] for record in read_items(out)] == list(range(6))


def test_two_runs_do_not_answer_one_shard_in_a_folder(tmp_path):
    out = tmp_path / "folder"

    class Meddling(FakeEngine):
        def generate(self, requests, sampling):
            with pytest.raises(ValueError, match="another run is writing to .*shard 0 of 2; give each shard a number"):
                run(FakeEngine(), out, shard=(0, 2))
            assert run(FakeEngine(), out, shard=(1, 2)).answered == 3
            yield from super().generate(requests, sampling)

    assert run(Meddling(), out, shard=(0, 2)).answered == 3
    assert sorted(file.name for file in out.iterdir()) == [f"{index}.json" for index in range(6)]


@pytest.mark.parametrize("key", ["index", "model", "sample", "tokens", "prompt_tokens", "prediction"])
def test_items_with_keys_of_the_record_are_refused_before_anything_is_asked(tmp_path, key):
    one = Puzzle((("G1",),), ("B cell",), ("B cell",), meta={key: 9})
    engine = FakeEngine()
    with pytest.raises(ValueError, match=f"item 1 already has the keys .*'{key}'"):
        predict(engine, [*puzzles(1), one], tmp_path / "p.jsonl", progress=False)
    assert engine.asked == []


def test_interrupted_runs_lose_and_repeat_nothing(tmp_path):
    undisturbed, out = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    run(FakeEngine(), undisturbed, n=40)
    rng = np.random.default_rng(0)
    halves = answered = 0
    for attempt in range(100):
        engine = FakeEngine(die_after=int(rng.integers(0, 5)), order=attempt)
        try:
            run(engine, out, n=40)
        except Killed:
            before, answered = answered, len(read_items(out)) if out.exists() else 0
            assert len(engine.asked) == 40 - before
            if rng.random() < 0.5 and out.exists():  # killed in the middle of a line, or just before its end
                halves += 1
                with open(out, "a") as file:
                    file.write('{"index": 3, "predic' if halves % 2 else undisturbed.read_text().splitlines()[0])
        else:
            break
    assert attempt > 5 and halves > 2
    assert out.read_bytes() == undisturbed.read_bytes()


def test_failures_are_recorded_and_tried_again(tmp_path):
    out = tmp_path / "p.jsonl"
    done = run(FakeEngine(fail=[1, 4]), out)
    assert (done.answered, done.failed, done.errors) == (4, 2, {"out of memory": 2})
    records = read_predictions(out)
    assert [r["index"] for r in records if "error" in r] == [1, 4]
    assert all("prediction" not in r for r in records if "error" in r)
    again = FakeEngine()
    done = run(again, out)
    assert (done.kept, done.answered, done.failed, len(again.asked)) == (4, 2, 0, 2)
    assert not any("error" in r for r in read_predictions(out))


def test_half_a_line_after_the_last_record(tmp_path):
    out = tmp_path / "p.jsonl"
    run(FakeEngine(), out)
    whole = out.read_bytes()
    with open(out, "a") as file:
        file.write('{"index": 3, "predic')
    assert run(FakeEngine(), out).kept == 6
    assert out.read_bytes() == whole


def test_nothing_is_asked_when_all_is_there(tmp_path):
    out = tmp_path / "p.jsonl"
    run(FakeEngine(), out)
    before = out.read_bytes(), out.stat().st_mtime_ns
    engine = FakeEngine()
    done = run(engine, out)
    assert (done.kept, engine.asked) == (6, [])
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "sampling .* this run has"),
        ({"sampling": Sampling(max_tokens=3)}, "sampling .* this run has"),
        ({"layout": "user"}, "prompt_layout 'system', this run has 'user'"),
    ],
)
def test_predictions_of_another_run_are_not_mixed_in(tmp_path, change, match):
    out = tmp_path / "p.jsonl"
    run(FakeEngine(), out)
    with pytest.raises(ValueError, match=match):
        run(FakeEngine(), out, **change)


def test_predictions_of_another_model_or_data_set_are_not_mixed_in(tmp_path):
    out = tmp_path / "p.jsonl"
    run(FakeEngine(), out)
    trained = FakeEngine()
    trained.fingerprint = "abc"
    with pytest.raises(ValueError, match="fingerprint '', this run has 'abc'"):
        run(trained, out)
    with pytest.raises(ValueError, match="not the one of this data set"):
        predict(FakeEngine(), puzzles()[::-1], out, progress=False)
    with pytest.raises(ValueError, match="not the one of this data set"):
        run(FakeEngine(), out, n=3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 2}, "at temperature 0 all samples are the same"),
        ({"layout": "both"}, "layout must be one of"),
        ({"n": 0}, "puzzles is empty"),
    ],
)
def test_bad_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        run(FakeEngine(), tmp_path / "p.jsonl", **options)


def test_constrained_requests_carry_the_candidates(tmp_path):
    engine = FakeEngine()
    run(engine, tmp_path / "p.jsonl", decode="constrained")
    assert {(request.candidates, request.n_answers) for request in engine.asked} == {(TYPES, 3)}
    assert read_items(tmp_path / "p.jsonl")[0]["sampling"]["constraint"] == "exact"
    assert read_items(tmp_path / "p.jsonl")[0]["sampling"]["decode"] == "constrained"
    engine.constraint = ""
    with pytest.raises(ValueError, match="not started for constrained answers"):
        run(engine, tmp_path / "q.jsonl", decode="constrained")
    with pytest.raises(ValueError, match="puzzle 0 has fewer; use decode='free'"):
        predict(engine, [Puzzle((("G",),), ())], tmp_path / "q.jsonl", variant="single_open", decode="constrained")


def test_out_must_be_jsonl_or_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        run(FakeEngine(), tmp_path / "p.json")
    (tmp_path / "p").write_text("a file")
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        run(FakeEngine(), tmp_path / "p")
    with pytest.raises(ValueError, match="a folder holds one prediction for each item"):
        run(FakeEngine(), tmp_path / "folder", samples=2, sampling=Sampling(temperature=1.0))


def test_folder_is_the_published_layout(tmp_path):
    out = tmp_path / "Qwen2.5-7B"
    done = run(FakeEngine(fail=[1]), out)
    assert (done.answered, done.failed) == (5, 1)
    assert sorted(file.name for file in out.iterdir()) == [f"{i}.json" for i in range(6)]
    item = json.loads((out / "3.json").read_text())
    assert item["answer"] == "B cell | NK cell | T cell"
    assert item["prediction"].startswith("<think>")
    assert "prediction" not in json.loads((out / "1.json").read_text())
    again = FakeEngine()
    done = run(again, out)
    assert (done.kept, done.answered, len(again.asked)) == (5, 1, 1)
    run(FakeEngine(order=7), tmp_path / "p.jsonl")
    assert read_predictions(out) == read_predictions(tmp_path / "p.jsonl")


def test_folder_of_the_published_script_is_not_mixed_with_ours(tmp_path):
    out = tmp_path / "folder"
    out.mkdir()
    (out / "0.json").write_text(json.dumps({**puzzle_to_item(puzzles()[0]), "prediction": "x"}))
    with pytest.raises(ValueError, match=r"0\.json: made with engine None"):
        run(FakeEngine(), out)


@pytest.mark.parametrize("name", ["folder", "{i}.jsonl"])
def test_shards_make_the_whole(tmp_path, name):
    run(FakeEngine(), tmp_path / "whole.jsonl", n=7)
    for i in range(3):
        done = run(FakeEngine(order=i), tmp_path / name.format(i=i), n=7, shard=(i, 3))
        assert done.total == len(range(i, 7, 3))
    parts = [tmp_path / "folder"] if name == "folder" else [tmp_path / f"{i}.jsonl" for i in range(3)]
    found = [record for part in parts for record in read_predictions(part)]
    assert sorted(found, key=lambda r: r["index"]) == read_predictions(tmp_path / "whole.jsonl")
    for shard in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="shard must be"):
            run(FakeEngine(), tmp_path / "x.jsonl", shard=shard)


def rl_command(monkeypatch, tmp_path, engine, *more, data="d.parquet"):
    monkeypatch.setattr(predict_module, "start_engines", lambda name, model, number, **options: engine)
    return main(["--model", "m", "--data", str(tmp_path / data), "--out", str(tmp_path / "p.jsonl"), *more])


def test_rl_data_says_how_it_is_asked(monkeypatch, tmp_path, capsys):
    own = [Puzzle(puzzle.cells, (), puzzle.answer, puzzle.context) for puzzle in puzzles(2)]
    write_rl_parquet(tmp_path / "d.parquet", own, "test", "user", "batch_open")
    engine = FakeEngine()
    assert rl_command(monkeypatch, tmp_path, engine) == 0
    assert list(engine.asked[0].messages) == messages(own[0], "user", "batch_open")
    assert {record["prompt_layout"] for record in read_items(tmp_path / "p.jsonl")} == {"user"}
    assert rl_command(monkeypatch, tmp_path, engine, "--variant", "batch_open", "--prompt-layout", "user") == 0
    for flags, said in ((["--variant", "batch"], "variant 'batch_open'"), (["--prompt-layout", "system"], "'user'")):
        assert rl_command(monkeypatch, tmp_path, engine, *flags) == 1
        error = capsys.readouterr().err
        assert said in error and f"and {flags[1]!r} is asked for" in error


def test_rl_data_of_two_variants_is_refused(monkeypatch, tmp_path, capsys):
    rows = [rl_row(puzzle, "test", i, LAYOUTS[i]) for i, puzzle in enumerate(puzzles(2))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert rl_command(monkeypatch, tmp_path, FakeEngine()) == 1
    assert "its rows have prompt_layout 'system' (row 0) and 'user' (row 1); split them" in capsys.readouterr().err


def test_data_without_gold_can_be_predicted(tmp_path):
    blind = [Puzzle(p.cells, p.candidates, None, p.context) for p in puzzles(2)]
    write_puzzles(tmp_path / "d.json", blind)
    predict(FakeEngine(), blind, tmp_path / "p.jsonl", progress=False)
    assert "answer" not in read_items(tmp_path / "p.jsonl")[0]


def command(monkeypatch, tmp_path, engine, *more):
    monkeypatch.setattr(predict_module, "start_engines", lambda name, model, number, **options: engine)
    write_puzzles(tmp_path / "d.json", puzzles())
    return main(["--model", "m", "--data", str(tmp_path / "d.json"), "--out", str(tmp_path / "o" / "p.jsonl"), *more])


def test_command(monkeypatch, tmp_path, capsys):
    engine = FakeEngine()
    assert command(monkeypatch, tmp_path, engine, "--limit", "4", "--prompt-layout", "user") == 0
    assert engine.closed
    assert "4 of 4 answers" in capsys.readouterr().out
    assert [json.loads(line)["index"] for line in open(tmp_path / "o" / "p.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "constraint", "expected"),
    [
        ([], "exact", "constrained"),
        ([], "", "free"),  # the engine cannot
        (["--free"], "exact", "free"),
        (["--constrain"], "exact", "constrained"),
        (["--decode", "free"], "exact", "free"),
    ],
)
def test_answers_are_legal_by_default_where_the_engine_can(monkeypatch, tmp_path, flags, constraint, expected):
    engine = FakeEngine()
    engine.constraint = constraint
    assert command(monkeypatch, tmp_path, engine, *flags) == 0
    assert {request.n_answers for request in engine.asked} == {3 if expected == "constrained" else 0}
    assert {r["sampling"]["decode"] for r in read_predictions(tmp_path / "o" / "p.jsonl")} == {expected}


class Markers(FakeEngine):
    """Cites the first gene of the first cell, and knows what it speaks for."""

    can_score = True
    known = {"MS4A1": "B cell", "GNLY": "NK cell", "CD3D": "T cell"}

    def generate(self, requests, sampling):
        for i, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            gene = request.messages[-1]["content"].partition("Cell 1: ")[2].split("\n")[0].split(", ")[0]
            yield i, Failure("out of memory") if gene in self.fail else Completion(f" {gene}", "stop", 2, 50)

    def score(self, choices):
        for i, choice in enumerate(choices):
            gene = choice.prefix.removesuffix(" ->").rpartition(" ")[2]
            yield i, np.log([0.8 if option == f" {self.known[gene]}" else 0.1 for option in choice.options]) - 5


def test_matrix_records_hold_the_probabilities_of_each_cell(tmp_path):
    done = run(Markers(), tmp_path / "p.jsonl", decode="matrix")
    assert (done.answered, done.failed) == (6, 0)
    record = read_predictions(tmp_path / "p.jsonl")[5]
    assert (record["index"], record["sample"]) == (5, 0)
    assert record["prediction"] == format_answer(TYPES)
    assert record["probabilities"] == [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    assert (record["margin"], record["entropy"]) == ([0.7] * 3, [0.921928] * 3)
    # Of the matchings weighed 0.512, 3 x 0.008 and 2 x 0.001, the first two kinds that keep the cell: 0.52 of 0.538.
    assert record["support"] == pytest.approx([0.52 / 0.538] * 3, abs=3e-4)
    assert (record["tokens"], record["prompt_tokens"], record["scored"]) == (12, 300, 6)
    assert record["probabilities_from"] == "model"
    sampling = {"decode": "matrix", "pieces": 3, "seed": 0, "constraint": ""}
    assert record["sampling"] == Sampling(max_tokens=64, stop=" ->").as_dict() | sampling


@pytest.mark.parametrize(
    ("decode", "options", "pieces", "temperature"),
    [
        ("matrix", {}, 3, 0.0),
        ("matrix", {"samples": 2}, 2, 0.0),
        ("matrix", {"sampling": Sampling()}, 3, 0.0),
        ("soft", {}, 3, 1.0),
        ("soft", {"samples": 1}, 1, 0.0),
        ("soft", {"samples": 2}, 2, 1.0),
        ("soft", {"sampling": Sampling()}, 1, 0.0),
        *[(decode, {"sampling": Sampling(0.5)}, 3, 0.5) for decode in ("matrix", "soft")],
        *[(decode, {"sampling": Sampling(0.5), "samples": 4}, 4, 0.5) for decode in ("matrix", "soft")],
    ],
)
def test_a_read_out_averages_samples_of_which_soft_ones_need_chance(tmp_path, decode, options, pieces, temperature):
    run(Markers(), tmp_path / "p.jsonl", n=1, decode=decode, **options)
    found = read_items(tmp_path / "p.jsonl")[0]["sampling"]
    assert (found["decode"], found["pieces"], found["temperature"]) == (decode, pieces, temperature)


def test_keys_of_a_read_out_are_refused_before_anything_is_asked(tmp_path):
    engine = Markers()
    one = Puzzle((("CD3D",),), ("T cell",), meta={"support": "good"})
    with pytest.raises(ValueError, match="item 0 already has the keys .*'support'"):
        predict(engine, [one], tmp_path / "p.jsonl", decode="matrix", progress=False)
    assert engine.asked == []


def test_matrix_goes_on_where_it_was_and_failures_stop_no_other(tmp_path):
    others = [*puzzles(2), Puzzle((("GNLY",), ("CD3D",)), TYPES)]
    hot = {"decode": "matrix", "samples": 2, "sampling": Sampling(temperature=1.0), "progress": False}
    engine = Markers(fail=["MS4A1"])
    done = predict(engine, others, tmp_path / "p.jsonl", **hot)
    assert (done.answered, dict(done.errors)) == (1, {"out of memory": 2})
    assert len({request.seed for request in engine.asked}) == len(engine.asked) == 16
    engine = Markers()
    assert predict(engine, others, tmp_path / "p.jsonl", **hot).kept == 1
    assert len(engine.asked) == 12
    whole = predict(Markers(), others, tmp_path / "whole.jsonl", **hot)
    assert whole.answered == 3
    assert read_items(tmp_path / "p.jsonl") == read_items(tmp_path / "whole.jsonl")


def test_without_probabilities_samples_vote_and_the_record_says_so(monkeypatch, tmp_path, capsys):
    engine = FakeEngine()
    assert command(monkeypatch, tmp_path, engine, "--decode", "soft", "--samples", "3") == 0
    assert "gives no probabilities; each sample is a vote" in capsys.readouterr().err
    record = read_items(tmp_path / "o" / "p.jsonl")[0]
    assert (record["probabilities_from"], record["scored"], record["tokens"]) == ("votes", 0, 21)
    assert record["support"] == [1.0] * 3
    assert record["sampling"]["constraint"] == "exact"
    assert {request.n_answers for request in engine.asked} == {3}


def test_matrix_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="logprobs"):
        run(Markers(), tmp_path / "p.jsonl", decode="matrix", sampling=Sampling(logprobs=True))
    with pytest.raises(ValueError, match="needs a candidate for each cell"):
        predict(Markers(), [Puzzle((("CD3D",), ("GNLY",)), ("T cell",))], tmp_path / "p.jsonl", decode="matrix")


def test_command_takes_the_published_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(predict_module, "start_engines", lambda name, model, number, **options: FakeEngine())
    write_puzzles(tmp_path / "d.json", puzzles())
    flags = ["--llm_name", "org/model", "--dataset", str(tmp_path / "d.json"), "--folder", str(tmp_path / "out")]
    assert main([*flags, "--n", "2", "--i", "1"]) == 0
    assert sorted(file.name for file in (tmp_path / "out" / "org_model").iterdir()) == ["1.json", "3.json", "5.json"]


def test_command_says_what_failed(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, tmp_path, FakeEngine(fail=[0])) == 1
    assert "1 requests failed, 1 of them with: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--model", "/nowhere", "--data", "DATA"], "/nowhere does not exist"),
        (["--model", "/nowhere", "--data", "/nowhere.json"], "/nowhere.json does not exist"),
        (["--model", "/nowhere", "--data", "/nowhere.parquet"], "/nowhere.parquet does not exist"),
        (["--model", "/nowhere", "--data", "/nowhere.csv"], r"must end in .json, .jsonl or .parquet"),
        (["--model", "/nowhere", "--data", "DATA", "--temperature", "-1"], "temperature must be 0"),
        (["--model", "m", "--data", "DATA", "--free", "--reasoning-budget", "9"], "--reasoning-budget needs --decode"),
        (["--model", "m", "--data", "DATA", "--base-url", "x"], "--base-url does not apply to the engine vllm"),
        (["--model", "m", "--data", "DATA", "--engine", "openai", "--lora", "x"], "--lora does not apply"),
        (["--model", "m", "--data", "DATA", "--limit", "-1"], "--limit must be at least 1, got -1"),
        (["--model", "m", "--data", "DATA", "--limit", "0"], "--limit must be at least 1, got 0"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, arguments, match):
    write_puzzles(tmp_path / "d.json", puzzles())
    arguments = [str(tmp_path / "d.json") if a == "DATA" else a for a in arguments]
    assert main([*arguments, "--out", str(tmp_path / "p.jsonl")]) == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.jsonl").exists()
