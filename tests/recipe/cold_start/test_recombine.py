import numpy as np
import pytest

from recipe.cello1.cold_start.recombine import Recombiner, recombine
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.cli import command
from tests.helpers.toy_h5ad import toy_adata, write

main = command("recombine")
GENES = [f"G{i:03}" for i in range(40)]


def test_genes_keep_the_places_that_they_have_in_some_cell():
    rng = np.random.default_rng(0)
    cells = [rng.permutation(GENES).tolist() for _ in range(30)]
    maker = Recombiner(cells)
    made = [maker.make(40, (0, 0), rng) for _ in range(400)]
    assert len(set(made)) == 400 and all(set(cell) == set(GENES) for cell in made)
    place = {gene: np.mean([cell.index(gene) for cell in cells]) for gene in GENES}
    found = {gene: np.mean([cell.index(gene) for cell in made]) for gene in GENES}
    assert np.corrcoef([place[gene] for gene in GENES], [found[gene] for gene in GENES])[0, 1] > 0.9


def test_a_gene_that_a_share_of_the_cells_has_is_in_that_share():
    cells = [("A", "B", "C")] * 30 + [("A", "B", "D")] * 10
    made = [Recombiner(cells).make(9, (0, 0), np.random.default_rng(i)) for i in range(400)]
    assert all(cell[:2] == ("A", "B") for cell in made)
    assert 0.7 < np.mean(["C" in cell for cell in made]) < 0.8 and 0.2 < np.mean(["D" in cell for cell in made]) < 0.3


def test_lost_genes_leave_the_order_and_the_length():
    maker = Recombiner([GENES])
    made = [maker.make(12, (0.1, 0.7), np.random.default_rng(i)) for i in range(50)]
    assert all(list(found) == sorted(found) and len(found) == 12 for found in made)
    assert len(set(made)) > 40
    assert maker.make(12, (0, 0), np.random.default_rng(1)) == tuple(GENES[:12])
    assert len(maker.make(12, (0.99, 0.99), np.random.default_rng(1))) == 12
    assert Recombiner([GENES[:5]]).make(12, (0.5, 0.5), np.random.default_rng(1)) == tuple(GENES[:5])


def test_types_and_donors_are_those_of_the_puzzles_and_sizes_are_mixed():
    names = [f"t{i}" for i in range(4)]
    of_type = {name: [(name.upper(), "X"), (name.upper(), "Y")] for name in names}
    old = []
    for k in (2, 3, 4):
        meta = {"donor_id": f"d{k}", "cell_ids": [0] * k}
        old.append(Puzzle(tuple((n.upper(),) for n in names[:k]), tuple(names[:k]), tuple(names[:k]), "", meta))
    made = recombine(old, of_type, 30, 2, (0, 0), np.random.default_rng(0))
    assert [sorted(puzzle.n_cells for puzzle in made[i : i + 3]) for i in range(0, 30, 3)] == [[2, 3, 4]] * 10
    assert all(puzzle.meta == {"donor_id": f"d{puzzle.n_cells}"} for puzzle in made)
    assert all(
        cell[0] == name.upper() for puzzle in made for cell, name in zip(puzzle.cells, puzzle.answer, strict=True)
    )
    assert len({puzzle.answer for puzzle in made}) > 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Cells whose first genes give type and donor away; donor 4 is held out."""
    root = tmp_path_factory.mktemp("recombine")
    for i in range(2):
        adata = toy_adata(i, n_cells=200, donor_prefix=f"f{i}_")
        adata.X = adata.X.toarray()
        for donor in range(5):
            adata.X[adata.obs["donor_id"] == f"f{i}_{donor}", donor] += 50
        write(adata, root / "in" / "lung" / f"file{i}.h5ad")
    options = ["--sizes", "3-4", "--per-size", "0", "--top-genes", "12", "--exclude-genes", "GENE9[0-9]"]
    words = [
        root / "in",
        "--out",
        root / "data",
        *options,
        "--test-donors",
        "f0_4",
        "f1_4",
        "--workers",
        "1",
        "--quiet",
    ]
    assert command("prepare")(words) == 0
    return root


def test_no_gene_of_a_held_out_donor_and_none_that_is_left_out_comes_back(prepared, tmp_path, capsys):
    words = ["--prepared", prepared / "data", "--cells", prepared / "in", "--n", "200", "--lose-genes", "0-0.5"]
    for name in ("a.json", "b.json"):
        assert main([*words, "--out", tmp_path / name]) == 0
    assert "200 puzzles recombined from" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    made = load_puzzles(tmp_path / "a.json").puzzles
    first = [cell[0] for puzzle in made for cell in puzzle.cells]
    assert "GENE4" not in first and {f"GENE{i}" for i in range(4)} <= set(first)
    listed = {gene for puzzle in made for cell in puzzle.cells for gene in cell}
    assert not {f"GENE{i}" for i in range(90, 100)} & listed
    assert {len(cell) for puzzle in made for cell in puzzle.cells} == {12}
    assert {puzzle.meta["donor_id"] for puzzle in made} == {f"f{i}_{k}" for i in range(2) for k in range(4)}


def test_what_cannot_be_used_is_said_in_one_line(prepared, tmp_path, capsys):
    words = ["--prepared", prepared / "data", "--out", tmp_path / "x.json"]
    for more, message in (
        (["--n", "0", "--cells", prepared / "in"], "--n must be at least 1"),
        (["--n", "1", "--cells", tmp_path], "inputs has no file of the data set 'lung/file0'"),
        (["--n", "1", "--cells", prepared / "in", "--lose-genes", "0.5-0.1"], "'0.5-0.1' is no range of shares"),
    ):
        try:
            assert main([*words, *more]) == 1
        except SystemExit as error:
            assert error.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ValueError, match="puzzle 0 has no cell_ids"):
        from recipe.cello1.cold_start.recombine import read_again
        from recipe.cello1.data.expression.reader import GeneLists

        read_again([Puzzle((("A",),), ("x",), ("x",))], [], GeneLists(), np.random.default_rng(0))
