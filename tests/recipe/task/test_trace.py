from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.trace import DECISION, FIXED, first_line, trace_line


def test_what_is_left_comes_before_the_evidence_and_the_decision_last():
    assert trace_line(2, ["B", "NK"], ["LYZ", "CST3"], "B") == "Cell 2: (B / NK) LYZ, CST3 -> B"


def test_a_response_begins_as_the_read_out_begins_it():
    line = trace_line(1, ["B", "NK"], ["LYZ"], "B")
    assert format_answer(["B", "NK"], f"\n{line}\n").startswith(first_line(["B", "NK"]) + f" LYZ{DECISION} B")
    assert all(text in f" {line}" for text in FIXED)
