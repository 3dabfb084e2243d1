import pytest

from recipe.cello1.evaluation.evaluate import evaluate
from recipe.cello1.formats.atomic import read_items, write_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.predictions import error_record, prediction_record
from recipe.cello1.inference.vote import vote_records
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.voting import logprob_weights
from tests.helpers.cli import command

main = command("vote")

ABC = ("a", "b", "c")


def puzzle(i=0):
    return Puzzle((("G1", f"X{i}"), ("G2",), ("G3",)), ABC, ("a", "b", "c"), "Context.", {"tissue": "blood"})


def records(texts, i=0, logprobs=None):
    common = {"index": i, "engine": "fake", "sampling": {"temperature": 1.0}}
    return [
        error_record(puzzle_to_item(puzzle(i)), "out of memory", sample=s, **common)
        if text is None
        else prediction_record(
            puzzle_to_item(puzzle(i)),
            text,
            finish_reason="stop",
            tokens=10,
            sample=s,
            **common,
            **({"logprob": logprobs[s]} if logprobs else {}),
        )
        for s, text in enumerate(texts)
    ]


TEXTS = [format_answer(("b", "a", "c")), format_answer(ABC, "because"), format_answer(ABC), "?", None]


def test_vote_records():
    (voted,) = vote_records(records(TEXTS))
    assert voted["prediction"] == format_answer(ABC, "because")
    assert voted["voted"] == [["b", "a", "c"], ["a", "b", "c"], ["a", "b", "c"], None]
    assert voted["cells"][2]["support"] == 1.0
    assert voted["tokens"] == 40  # of the four answers
    assert (voted["index"], voted["sample"], voted["tissue"], voted["rule"]) == (0, 0, "blood", "consensus")
    assert evaluate([voted], [puzzle()]).measured.metrics["exact_match"].mean == 1.0


def test_vote_records_by_other_rules():
    logprobs = [-1.0, -50.0, -60.0, -70.0, None]
    assert vote_records(records(TEXTS), rule="majority")[0]["prediction"] == format_answer(ABC, "because")
    assert vote_records(records(TEXTS), rule="medoid")[0]["prediction"] == format_answer(ABC, "because")
    chosen = vote_records(records(TEXTS, logprobs=logprobs), rule="likeliest")[0]
    assert chosen["prediction"] == format_answer(("b", "a", "c"))
    weighted = vote_records(records(TEXTS, logprobs=logprobs), weighted=True)[0]
    assert weighted["prediction"] == format_answer(("b", "a", "c"))


def test_votes_are_weighed_where_every_prediction_has_its_logprob():
    given = records(TEXTS, logprobs=[-1.0, -50.0, -60.0, -70.0, None])
    (voted,) = vote_records(given)
    assert voted["prediction"] == format_answer(("b", "a", "c"))
    assert voted["weights"] == pytest.approx(logprob_weights([-1.0, -50.0, -60.0, -70.0], [10] * 4))
    assert vote_records(given, weighted=False)[0]["prediction"] == format_answer(ABC, "because")
    (plain,) = vote_records([given[0], *records(TEXTS)[1:]])
    assert "weights" not in plain and plain["prediction"] == format_answer(ABC, "because")


def test_voted_matching_that_nobody_gave():
    texts = [format_answer(order) for order in (("a", "a", "c"), ("b", "b", "c"), ("a", "b", "b"))]
    assert vote_records(records(texts))[0]["prediction"] == format_answer(ABC)


def test_items_without_votes():
    failed, lost = vote_records([*records(["?", ""], 3), *records([None, None], 1)])
    assert (failed["index"], failed["error"]) == (1, "out of memory")
    assert lost["index"] == 3
    assert vote_records(records(["?"]), rule="medoid")[0]["prediction"] == ""


@pytest.mark.parametrize(
    ("options", "match"), [({"rule": "best"}, "rule must be one of"), ({"weighted": True}, "has no 'logprob'")]
)
def test_vote_records_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        vote_records(records(TEXTS), **options)


def test_command_weighs_unless_told_not_to(tmp_path):
    write_items(tmp_path / "p.jsonl", records(TEXTS, logprobs=[-1.0, -50.0, -60.0, -70.0, None]))
    for flags, types in (([], ("b", "a", "c")), (["--no-weighted"], ABC), (["--weighted"], ("b", "a", "c"))):
        assert main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "v.jsonl"), *flags]) == 0
        (voted,) = read_items(tmp_path / "v.jsonl")
        assert voted["prediction"].endswith(f"<answer>{' | '.join(types)}</answer>")


def test_command(tmp_path, capsys):
    write_items(tmp_path / "p.jsonl", records(TEXTS) + records(TEXTS, 1))
    assert main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "v.jsonl")]) == 0
    assert [record["index"] for record in read_items(tmp_path / "v.jsonl")] == [0, 1]
    assert "10 predictions combined into 2" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing.jsonl"), "--out", str(tmp_path / "v.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("cello1 vote: error: ")
