from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.trace import DECISION, FIXED, SECOND_LINE, first_decision, first_line, trace_line


def test_what_is_left_comes_before_the_evidence_and_the_decision_last():
    assert trace_line(2, ["B", "NK"], ["LYZ", "CST3"], "B") == "Cell 2: (B / NK) LYZ, CST3 -> B"


def test_a_response_begins_as_the_read_out_begins_it():
    line = trace_line(1, ["B", "NK"], ["LYZ"], "B")
    assert format_answer(["B", "NK"], f"\n{line}\n").startswith(first_line(["B", "NK"]) + f" LYZ{DECISION} B")
    assert all(text in f" {line}" for text in FIXED)


def test_the_decision_on_the_first_cell_is_read_back():
    lines = [trace_line(1, ["B", "NK"], ["LYZ"], "B"), trace_line(2, ["NK"], ["GNLY"], "NK")]
    response = format_answer(["B", "NK"], "\n" + "\n".join(lines) + "\n")
    assert first_decision(response) == first_decision(response.partition(SECOND_LINE)[0]) == "B"
    assert response.count(SECOND_LINE) == 1
    assert first_decision("<think>" + lines[0] + "</think>") == "B"
    assert first_decision("<think>\nCell 1: (B / NK) LYZ\nCell 2: (NK) GNLY -> NK") == ""
    assert first_decision("A -> B") == first_decision("") == ""
