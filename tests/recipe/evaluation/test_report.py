import io
import re
from dataclasses import replace
from html.parser import HTMLParser

from rich.console import Console

from recipe.cello1.evaluation.evaluate import evaluate
from recipe.cello1.evaluation.html_page import _draw, to_html
from recipe.cello1.evaluation.report import ReportTable, markdown, render, to_markdown, ways_table
from recipe.cello1.evaluation.scores import compare
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.predictions import error_record, prediction_record
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.browser import layouts

GOLD = ("B cell", "NK cell", "T cell")
RIGHT = format_answer(GOLD)
EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&[red]|`*_[x](http://evil)\ud800\x00\u202e</pre></details>"
)


def puzzle(i=0, gold=GOLD, tissue="blood"):
    cells = tuple((f"G{i}", f"CELL{j}") for j in range(len(gold)))
    return Puzzle(cells, tuple(sorted(gold)), gold, "Context.", {"tissue": tissue})


def record(prediction, i=0, sample=0, of=None):
    item = puzzle_to_item(of or puzzle(i))
    run = {"engine": "fake", "sampling": {"temperature": 1.0}}
    return prediction_record(item, prediction, index=i, finish_reason="stop", tokens=10 + i, sample=sample, **run)


def whole_result():
    two = puzzle(9, ("a", "b"), tissue="[red]liver[/red]")
    records = [record(RIGHT, 0, s) for s in range(3)] + [record(EVIL, 1), record(format_answer(("b", "a")), 9, of=two)]
    records += [record(format_answer(("B cell", "NK cell", EVIL[:26])), 3)]
    failed = error_record(puzzle_to_item(puzzle(2)), EVIL, index=2, engine="fake", sampling={"temperature": 1.0})
    puzzles = [puzzle(i) for i in range(9)] + [two]
    result = evaluate([*records, failed], puzzles)
    comparison = compare(
        [record("?", 0), record("?", 1), record(format_answer(("b", "a")), 9, of=two)],
        records,
        puzzles,
        other=EVIL[:30],
    )
    return replace(result, comparison=comparison)


def printed(result):
    stream = io.StringIO()
    render(result, Console(file=stream, width=200))
    return stream.getvalue()


def test_terminal_shows_everything_as_it_is():
    text = printed(whole_result())
    shown = (
        "4 puzzles, 6 answers",
        "partial accuracy",
        "by n_cells",
        "[red]liver[/red]",
        "missing_tag 1",
        "machinery failed: 1",
        "no prediction: 5",
        "consensus",
        "change against <script>",
        "calibration error",
        "not among the candidates: 1",
    )
    assert [words for words in shown if words not in text] == []


def test_small_results_need_no_extras():
    text = printed(evaluate([record(RIGHT, 0)]))
    assert "by n_cells" not in text
    assert "machinery" not in text


def test_markdown_tables_keep_their_columns():
    text = to_markdown(whole_result())
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 6
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert re.search(r"\| \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] \|", text)


def test_brackets_that_would_make_a_link_are_escaped_and_no_others():
    table = ReportTable("", ["0.5 [0.4, 0.6]"], [["[x](http://evil) [y][z] [w]: u [v]"]])
    assert markdown(table).splitlines()[::2] == [
        "| 0.5 [0.4, 0.6] |",
        r"| [x\](http://evil) [y\][z] [w\]: u [v] |",
    ]


def test_table_of_the_ways_alone():
    result = whole_result()
    lines = markdown(ways_table("", result.rules, "consensus", result.length_unit)).splitlines()
    assert lines[0] == (
        "| way | partial accuracy | strict accuracy | exact match | legal answers | tokens a puzzle | ECE |"
        " consensus minus this (partial accuracy) |"
    )
    assert [line.split(" | ")[0] for line in lines[2:7]] == [
        "| one sample",
        "| majority",
        "| medoid",
        "| consensus",
        "| best of all (needs the gold)",
    ]


class Checker(HTMLParser):
    void = {"meta", "line", "circle", "rect"}

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name == "src"]
        for name, value in attrs:  # links lead to a place on the page itself
            assert name != "href" or (tag == "a" and value.startswith("#"))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_whole_and_nothing_in_it_is_obeyed():
    page = to_html(whole_result())
    page.encode()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not checker.tags & {"script", "img", "iframe", "link", "form"}
    text = "".join(checker.text)
    assert "<script>alert(1)</script>" in text  # shown as text
    assert "<think></think>" in text
    assert page.count("<svg") == 3
    assert "http" not in re.sub(r"http://evil|http-equiv", "", page)  # loads nothing


def test_the_page_begins_with_the_headlines_then_the_slices_and_fits_any_screen():
    page = to_html(whole_result())
    words = ('class="headlines"', "<nav", "By n_cells</h2>", "combined</h2>", "<svg", "answered, cells)</h2>")
    order = [page.index(each) for each in words]
    assert order == sorted(order)
    headlines = page[: page.index("</dl>")]
    assert "<dt>partial accuracy</dt>" in headlines and "<dt>chance</dt><dd>" in headlines
    links = re.findall(r'href="#([^"]+)"', page[page.index("<nav") : page.index("</nav>")])
    anchors = re.findall(r'<h2 id="([^"]+)"', page)
    assert links == anchors and len(anchors) > 6
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table") == page.count('<div class="wide">')  # wide tables scroll, the page does not
    assert "#000000" not in page[page.index("<svg") :]
    assert '<th scope="col">metric</th>' not in page and '<th scope="col" class="l">metric</th>' in page
    assert page.count("<th scope=") == len(re.findall("<th[ >]", page))
    seen = re.findall(r'<figure role="img" aria-label="([^"]+)"', page)
    assert len(seen) == 3 and "0.56 at 3 (chance 0.33)" in seen[0] and "at confidence" in seen[2]


def test_the_page_is_not_wider_than_the_window(tmp_path):
    gold = tuple(f"a cell type with a long name, alpha-beta, number-{i:02}" for i in range(60))
    item = puzzle(0, gold, tissue="a-tissue-without-any-blank-" * 6)
    result = evaluate([record(format_answer((*gold[1:], gold[0])), 0, of=item), record(EVIL, 1)], [item, puzzle(1)])
    (tmp_path / "a.html").write_text(to_html(result))
    for width in (400, 1280):
        [found] = layouts([tmp_path / "a.html"], width, tmp_path)
        assert found["over"] == 0 and found["tall"] < 400 and 0 < found["head"] < 0.4


def test_formulas_in_names_are_text():
    gold = ("$x^$", r"\frac", "a_b$")
    result = evaluate([record(format_answer(gold), 0, of=puzzle(0, gold, tissue="$x^$"))])
    page = to_html(result)
    assert page.count("$x^$") > 2
    assert "$x^$" in _draw("$x^$", "$x^$", lambda axes: axes.set_title("$x^$"))["svg"]


def test_html_without_optional_parts():
    page = to_html(evaluate([{"index": 0, "prediction": "?", "answer": "a | b"}]))
    assert page.count("<svg") == 2
    assert "Confusion" in page


def test_one_type_has_no_confusion_picture():
    item = puzzle(0, ("type",))
    assert "Confusion" not in to_html(evaluate([record(format_answer(("type",)), 0, of=item)], [item]))


def test_of_many_types_those_most_often_confused_are_shown():
    gold = tuple(f"type {i:02}" for i in range(60))
    answered = (*gold[:50], *gold[51:], gold[50])  # the last ten are mixed up
    item = puzzle(0, gold)
    page = to_html(evaluate([record(format_answer(answered), 0, of=item)], [item]))
    assert "the 40 of 60 types that are most often confused" in page
    table = page[page.index('<table class="confusion"') :]
    table = table[: table.index("</table>")]
    shown = re.findall(r'<tr><th scope="row">(type \d\d)</th>', table)
    assert len(shown) == 40
    assert set(gold[50:]) < set(shown)
    assert shown == sorted(shown)
