import json

import numpy as np
import pytest

from recipe.cello1.cold_start import teacher_traces as teacher
from recipe.cello1.cold_start.sft_data import load_examples
from recipe.cello1.cold_start.teacher_traces import ask_teacher, judge, report_table
from recipe.cello1.engines.protocol import Completion, EngineBase, Failure, Sampling, sample_seed
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.items import item_to_puzzle, puzzle_to_item
from recipe.cello1.formats.journal import Journal
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer
from tests.helpers.cli import command
from tests.helpers.stub_server import Server, error
from tests.helpers.toy_model import toy_puzzles

main = command("traces teacher")

PUZZLES = [*toy_puzzles(4, 2), *toy_puzzles(6, 3)[4:]]


class Killed(BaseException):
    pass


class Teacher(EngineBase):
    """Answers from a script: for each puzzle what its tries give, the last one again and again."""

    name = "fake"
    model = "fake-teacher"
    fingerprint = "f1"
    constraint = ""

    def __init__(self, script, puzzles=PUZZLES, die_after=None, order=0):
        self.script = {key: list(steps) for key, steps in script.items()}
        self.puzzles, self.die_after, self.order = puzzles, die_after, order
        self.asked = []

    def generate(self, requests, sampling):
        requests = list(requests)
        for position in np.random.default_rng(self.order).permutation(len(requests)).tolist():
            if len(self.asked) == self.die_after:
                raise Killed
            request = requests[position]
            index = next(i for i, p in enumerate(self.puzzles) if messages(p) == list(request.messages))
            self.asked.append((index, request.seed))
            steps = self.script.get(index, ["right"])
            step = steps.pop(0) if len(steps) > 1 else steps[0]
            answer = self.puzzles[index].answer
            text = {
                "right": format_answer(answer, f"\nThe genes of {index} say so.\n"),
                "wrong": format_answer(answer[1:] + answer[:1], "It must be so."),
                "silent": format_answer(answer, " \n"),
                "bad": "I do not know.",
            }.get(step)
            yield position, Failure("no connection") if step == "down" else Completion(text, "stop", 10, 100)


def ask(engine, folder, puzzles=PUZZLES, **options):
    return ask_teacher(engine, puzzles, folder / "sft.tries.jsonl", progress=False, **options)


def test_only_right_answers_with_reasoning_are_kept(tmp_path):
    script = {0: ["wrong", "right"], 1: ["bad"], 2: ["silent"], 3: ["wrong", "bad", "right"]}
    kept, found = ask(Teacher(script), tmp_path, tries=3)
    assert [puzzle.answer for puzzle in kept] == [PUZZLES[i].answer for i in (0, 3, 4, 5)]
    assert kept[1].meta["reasoning"] == "\nThe genes of 3 say so.\n"
    assert kept[1].meta["teacher"] == "fake-teacher"
    assert kept[1].meta["tissue"] == "blood"
    assert found["complete"]
    assert found["total"]["accepted"] == 4
    two, three = found["by_n_cells"]["2"], found["by_n_cells"]["3"]
    assert (two["puzzles"], two["accepted"], two["rejected"], two["failed"], two["responses"]) == (4, 2, 2, 0, 11)
    assert two["reasons"] == {"missing_tag": 4, "no_reasoning": 3, "wrong": 2}
    assert (two["accepted_share"], two["response_share"]) == (0.5, 2 / 11)
    assert (three["puzzles"], three["accepted"], three["responses"], three["accepted_share"]) == (2, 2, 2, 1.0)


def test_the_output_is_what_sft_reads_and_scores_in_full(tmp_path):
    kept, _ = ask(Teacher({}), tmp_path)
    write_puzzles(tmp_path / "sft.json", kept)
    loaded = load_examples(tmp_path / "sft.json")
    assert loaded == [*PUZZLES]
    for item, puzzle in zip(read_items(tmp_path / "sft.json"), PUZZLES, strict=True):
        assert score_answer(item["assistant_msg"], puzzle.answer).score == 1.0
        assert item_to_puzzle(item).meta["reasoning"].strip()


def test_a_failure_of_the_machinery_is_no_rejection_and_is_asked_again(tmp_path):
    kept, found = ask(Teacher({0: ["down"], 1: ["wrong", "down"], 2: ["wrong"]}), tmp_path, tries=2)
    assert len(kept) == 3
    total = found["total"]
    assert (total["accepted"], total["rejected"], total["failed"], total["responses"]) == (3, 1, 2, 6)
    assert total["accepted_share"] == 3 / 4
    assert not found["complete"]
    assert found["errors"] == {"no connection": 2}

    engine = Teacher({1: ["right"]})
    kept, found = ask(engine, tmp_path, tries=2)
    # The try that failed was not used up: its seed is asked again.
    assert sorted(engine.asked) == [(0, sample_seed(0, 0, 0)), (1, sample_seed(0, 1, 1))]
    assert found["complete"]
    assert (found["total"]["accepted"], found["total"]["rejected"]) == (5, 1)


def test_every_try_has_a_seed_of_its_own(tmp_path):
    engine = Teacher(dict.fromkeys(range(6), ["wrong"]))
    ask(engine, tmp_path, tries=3, seed=5)
    assert sorted(engine.asked) == sorted((i, sample_seed(5, i, t)) for i in range(6) for t in range(3))
    assert len({seed for _, seed in engine.asked}) == 18


def test_killed_and_started_again_gives_the_same(tmp_path):
    script = {0: ["wrong", "right"], 1: ["bad"], 3: ["wrong", "bad", "right"]}
    whole = ask(Teacher(script), tmp_path / "whole", tries=3)
    n_asked = 0
    for die_after in range(1, 11):
        used = {i: 0 for i in range(6)}
        journal = tmp_path / "parts" / "sft.tries.jsonl"
        for entry in read_items(journal, drop_partial_tail=True)[1:] if journal.exists() else []:
            used[entry["index"]] += 1
        rest = {i: (steps[used[i] :] or steps[-1:]) for i, steps in script.items()}
        engine = Teacher(rest, die_after=2, order=die_after)
        try:
            parts = ask(engine, tmp_path / "parts", tries=3)
            break
        except Killed:
            with open(journal, "ab") as file:
                file.write(b'{"index": 4, "tr')  # a line that was being written
        finally:
            n_asked += len(engine.asked)
    assert parts == whole
    assert n_asked == whole[1]["total"]["responses"]


def test_of_two_runs_with_one_journal_the_second_says_why_it_does_nothing(tmp_path):
    engine = Teacher({})
    with Journal.held(tmp_path / "sft.tries.jsonl"), pytest.raises(ValueError, match="another run is writing to"):
        ask(engine, tmp_path)
    assert not engine.asked
    assert ask(engine, tmp_path)[0]


def test_more_tries_go_on_with_what_was_rejected(tmp_path):
    ask(Teacher({1: ["wrong"]}), tmp_path, tries=1, sampling=Sampling(temperature=0.7))
    engine = Teacher({1: ["wrong", "right"]})
    kept, found = ask(engine, tmp_path, tries=3)
    assert [index for index, _ in engine.asked] == [1, 1]
    assert len(kept) == 6
    assert found["total"]["reasons"] == {"wrong": 2}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "made with sampling"),
        ({"sampling": Sampling(temperature=1.0)}, "made with sampling"),
        ({"layout": "user"}, "made with prompt_layout 'system', this run has 'user'"),
    ],
)
def test_responses_of_another_run_are_not_mixed_in(tmp_path, options, match):
    ask(Teacher({}), tmp_path)
    with pytest.raises(ValueError, match=match):
        ask(Teacher({}), tmp_path, **options)


def test_responses_to_other_data_are_not_mixed_in(tmp_path):
    ask(Teacher({}), tmp_path)
    others = PUZZLES[::-1]
    with pytest.raises(ValueError, match="line 2: item 0 is not the one of these data|is not the one of these data"):
        ask(Teacher({}, others), tmp_path, others)
    assert len(ask(Teacher({}), tmp_path, PUZZLES[:2])[0]) == 2  # fewer of the same are fine
    (tmp_path / "sft.tries.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match="is not a journal of a teacher"):
        ask(Teacher({}), tmp_path)


@pytest.mark.parametrize(
    ("puzzles", "options", "match"),
    [
        ([], {}, "puzzles is empty"),
        ([PUZZLES[0], Puzzle((("A",),), ("x",))], {}, "puzzle 1 has no answer"),
        (PUZZLES, {"tries": 0}, "tries must be at least 1, got 0"),
        (PUZZLES, {"tries": 2, "sampling": Sampling()}, "at temperature 0 all responses are the same"),
    ],
)
def test_what_cannot_be_asked(tmp_path, puzzles, options, match):
    with pytest.raises(ValueError, match=match):
        ask(Teacher({}), tmp_path, puzzles, **options)


def test_one_greedy_try_has_no_seed(tmp_path):
    engine = Teacher({})
    ask(engine, tmp_path, tries=1, sampling=Sampling())
    assert {seed for _, seed in engine.asked} == {None}


def test_judge():
    answer = PUZZLES[0].answer
    assert judge(format_answer(answer, "x"), PUZZLES[0]) == (True, "", 1.0)
    assert judge(format_answer(answer[::-1], "x"), PUZZLES[0]) == (False, "wrong", 0.0)
    assert judge(format_answer(answer, " "), PUZZLES[0]) == (False, "no_reasoning", 1.0)
    assert judge(format_answer(answer[:1], "x"), PUZZLES[0])[1] == "no_separator"
    assert judge("", PUZZLES[0]) == (False, "empty", -1.0)


def test_traces_that_are_there_are_neither_shown_nor_kept(tmp_path):
    traced = [Puzzle(p.cells, p.candidates, p.answer, p.context, {**p.meta, "reasoning": "old"}) for p in PUZZLES]
    kept, _ = ask(Teacher({0: ["wrong"]}), tmp_path, traced, tries=2)
    assert len(kept) == 5
    assert all("old" not in puzzle.meta["reasoning"] for puzzle in kept)


# --------------------------------------------------------------------------------------------------------- command


def gold_of(body) -> str:
    user = body["messages"][-1]["content"]
    return format_answer(next(p.answer for p in PUZZLES if messages(p)[-1]["content"] == user), "Markers.")


def command(server, folder, *more):
    data = folder / "puzzles.json"
    write_puzzles(data, PUZZLES)
    flags = ["--data", str(data), "--out", str(folder / "sft.json"), "--base-url", server.url, "--model", "m", *more]
    return main(flags)


def test_command_against_a_server(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def reply(body, n):
        # The first seed of puzzle 0 is wrong, however the requests are ordered.
        return "<think>x</think>\n<answer>a | b</answer>" if body["seed"] == sample_seed(3, 0, 0) else gold_of(body)

    with Server(reply) as server:
        assert command(server, tmp_path, "--tries", "2", "--seed", "3", "--temperature", "0.9") == 0
        assert {body["temperature"] for body in server.bodies} == {0.9}
        assert {body["max_tokens"] for body in server.bodies} == {8192}
        assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
        asked = len(server.bodies)
        assert command(server, tmp_path, "--tries", "2", "--seed", "3", "--temperature", "0.9") == 0
        assert len(server.bodies) == asked == 7
    assert load_examples(tmp_path / "sft.json") == PUZZLES
    found = json.loads((tmp_path / "sft.report.json").read_text())
    assert found["total"]["responses"] == 7
    assert found["by_n_cells"]["2"]["reasons"] == {"wrong": 1}
    out = capsys.readouterr().out
    assert "| 2 | 4 | 4 | 0 | 0 | 100.0% | 5 | 80.0% |" in out
    assert report_table(found) in out
    assert not any("secret" in path.read_text() for path in tmp_path.iterdir())


def test_command_with_failures(tmp_path, capsys):
    down = True
    with Server(lambda body, n: error(400, "out of order") if down and n == 0 else gold_of(body)) as server:
        assert command(server, tmp_path, "--concurrency", "1") == 1
        assert "1 puzzles failed, most often with: BadRequestError" in capsys.readouterr().err
        assert len(load_puzzles(tmp_path / "sft.json").puzzles) == 5
        down = False
        assert command(server, tmp_path, "--concurrency", "1") == 0
    assert len(load_puzzles(tmp_path / "sft.json").puzzles) == 6


def test_nothing_accepted_writes_no_data(tmp_path, capsys):
    with Server(lambda body, n: "no") as server:
        assert command(server, tmp_path, "--tries", "1") == 1
    assert "no trace was accepted (most often: missing_tag)" in capsys.readouterr().err
    assert not (tmp_path / "sft.json").exists()
    assert json.loads((tmp_path / "sft.report.json").read_text())["total"]["rejected"] == 6


def test_command_refuses_what_cannot_work(tmp_path, capsys, monkeypatch):
    write_puzzles(tmp_path / "p.json", PUZZLES)
    items = [{key: value for key, value in puzzle_to_item(PUZZLES[0]).items() if key != "assistant_msg"}]
    (tmp_path / "open.json").write_text(json.dumps(items))
    monkeypatch.setattr(teacher, "start_engine", lambda *_, **__: Teacher({}))

    def says(data, out, *more):
        assert main(["--data", str(tmp_path / data), "--out", str(tmp_path / out), "--model", "m", *more]) == 1
        return capsys.readouterr().err

    assert "must end in .json or .jsonl" in says("p.json", "sft.parquet")
    assert "--out is the file of the data" in says("p.json", "p.json")
    assert "--limit must be at least 1, got 0" in says("p.json", "o.json", "--limit", "0")
    assert "does not exist" in says("q.json", "o.json")
    assert "puzzle 0 has no answer" in says("open.json", "o.json")
    assert "temperature must be" in says("p.json", "o.json", "--temperature", "-1")


def test_there_is_no_flag_for_the_key_nor_for_constraints():
    flags = [flag for action in teacher.build_parser()._actions for flag in action.option_strings]
    assert not {"--constrain", "--server"} & set(flags)
    assert not [flag for flag in flags if "key" in flag or "token" in flag.replace("max-tokens", "")]
