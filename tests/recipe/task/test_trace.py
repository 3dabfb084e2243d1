from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.trace import DECISION, SECOND_LINE, first_decision, first_line, trace_line


def test_the_evidence_comes_before_the_decision():
    assert trace_line(2, ["LYZ", "CST3"], "B") == "Cell 2: LYZ, CST3 -> B"


def test_a_response_begins_as_the_read_out_begins_it():
    line = trace_line(1, ["LYZ"], "B")
    assert format_answer(["B", "NK"], f"\n{line}\n").startswith(first_line() + f" LYZ{DECISION} B")


def test_the_decision_on_the_first_cell_is_read_back():
    lines = [trace_line(1, ["LYZ"], "B"), trace_line(2, ["GNLY"], "NK")]
    response = format_answer(["B", "NK"], "\n" + "\n".join(lines) + "\n")
    assert first_decision(response) == first_decision(response.partition(SECOND_LINE)[0]) == "B"
    assert response.count(SECOND_LINE) == 1
    assert first_decision("<think>" + lines[0] + "</think>") == "B"
    assert first_decision("<think>\nCell 1: LYZ\nCell 2: GNLY -> NK") == ""
    assert first_decision("A -> B") == first_decision("") == ""
