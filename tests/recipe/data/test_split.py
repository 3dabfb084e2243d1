import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.data.fingerprints import donor_id
from recipe.cello1.data.split import group_puzzles, quotas_of, split_puzzles
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.formats.rl_parquet import iter_parquet
from recipe.cello1.task.text import canonical_id
from tests.helpers.prepare_runs import FEW, build, manifest, run
from tests.helpers.toy_h5ad import toy_adata, write

SIZES = range(8, 16)


def keys_of(rows) -> list[np.ndarray]:
    return [np.array(row, dtype=np.uint64) for row in rows]


# ---------------------------------------------------------------------------------------------------------- quotas


def test_quotas_of_a_small_set_are_a_tenth():
    assert quotas_of({8: 100, 9: 25, 10: 3}) == {8: 10, 9: 2, 10: 1}


def test_quotas_of_a_small_set_with_a_least_number():
    assert quotas_of({8: 100, 9: 25, 10: 3}, min_per_stratum=5) == {8: 10, 9: 5, 10: 2}


def test_quotas_of_the_published_size():
    counts = {8: 1500, 9: 1400, 10: 1200, 11: 1100, 12: 1000, 13: 900, 14: 600, 15: 307}
    quotas = quotas_of(counts)
    assert 1090 <= sum(quotas.values()) <= 1100
    assert all(quota >= 5 for quota in quotas.values())
    assert max(abs(quotas[n] / counts[n] - 1100 / 8007) for n in counts) < 0.02


def test_a_large_set_has_at_least_five_of_each_size():
    quotas = quotas_of({8: 20_000, 15: 40})
    assert quotas[15] >= 5
    assert sum(quotas.values()) <= 1100


def test_a_rare_size_keeps_one_for_training():
    assert quotas_of({8: 20_000, 15: 4})[15] == 3
    assert quotas_of({8: 1, 9: 50}) == {8: 0, 9: 5}


def test_a_set_just_above_the_limit_is_not_eaten_up():
    assert sum(quotas_of({8: 1101}).values()) == 220


def test_more_sizes_than_the_limit_can_serve():
    quotas = quotas_of(dict.fromkeys(range(40), 100), max_test=100)
    assert sum(quotas.values()) <= 100
    assert min(quotas.values()) >= 1


@given(st.dictionaries(st.integers(1, 30), st.integers(1, 5000), min_size=1), st.integers(50, 2000))
def test_quotas_keep_their_limits(counts, max_test):
    quotas = quotas_of(counts, max_test)
    assert sum(quotas.values()) <= max(max_test, len(counts))
    assert all(0 <= quotas[n] < counts[n] or counts[n] == 1 for n in counts)
    assert all(quotas[n] == 0 for n in counts if counts[n] == 1)


# ---------------------------------------------------------------------------------------------------------- groups


def test_groups_are_joined_by_chains():
    assert group_puzzles(keys_of([[1], [2], [2, 3], [3, 1], [], [9]])).tolist() == [0, 0, 0, 0, 1, 2]
    assert group_puzzles([]).tolist() == []
    assert group_puzzles(keys_of([[], []])).tolist() == [0, 1]


@given(st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=25))
def test_groups_equal_those_of_a_naive_search(rows):
    groups = group_puzzles(keys_of(rows))
    merged = [{i} for i in range(len(rows))]
    for i, row in enumerate(rows):
        for j in range(i):
            if set(row) & set(rows[j]) and merged[i] is not merged[j]:
                merged[i] |= merged[j]
                for k in merged[i]:
                    merged[k] = merged[i]
    expected = [min(merged[i]) for i in range(len(rows))]
    assert [groups[i] == groups[j] for i in range(len(rows)) for j in range(i)] == [
        expected[i] == expected[j] for i in range(len(rows)) for j in range(i)
    ]


# ---------------------------------------------------------------------------------------------------------- splits


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(20, 200))
def test_nothing_is_on_both_sides_and_nothing_is_lost(seed, n_donors, n):
    rng = np.random.default_rng(seed)
    donors = rng.integers(n_donors, size=n)
    keys = keys_of([[donor, *rng.integers(1000, 10**9, 3)] for donor in donors])
    strata = rng.integers(8, 16, size=n)
    try:
        split = split_puzzles(strata, keys, rng=np.random.default_rng(seed))
    except ValueError as error:
        assert "small enough" in str(error)  # as when the largest donor has nearly everything
        return
    parts = (split.train, split.test, split.left_out)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert len(split.train) and len(split.test)
    train = set(donors[split.train].tolist())
    assert not train & set(donors[split.test].tolist())
    assert not train & set(donors[split.left_out].tolist())
    taken = Counter(strata[split.test].tolist())
    assert all(taken[size] <= split.quotas[size] for size in taken)


def test_many_donors_fill_the_quotas_and_leave_little_out():
    rng = np.random.default_rng(0)
    n = 8000
    donors = rng.integers(400, size=n)
    split = split_puzzles(rng.integers(8, 16, size=n), keys_of([[d] for d in donors]), rng=rng)
    assert len(split.test) > 0.97 * sum(split.quotas.values())
    assert len(split.left_out) < 0.2 * len(split.test)


def test_by_puzzle_is_exact():
    strata = np.repeat(SIZES, 1000)
    split = split_puzzles(strata, keys_of([[]] * len(strata)), rng=np.random.default_rng(0))
    assert Counter(strata[split.test].tolist()) == split.quotas
    assert sum(split.quotas.values()) <= 1100
    assert len(split.left_out) == 0


def test_of_two_large_groups_one_is_taken_and_its_rest_left_out():
    strata = np.repeat(8, 200)
    split = split_puzzles(strata, keys_of([[i % 2] for i in range(200)]), rng=np.random.default_rng(0))
    assert (len(split.train), len(split.test), len(split.left_out)) == (100, 20, 80)


def test_the_seed_decides():
    strata = np.repeat(SIZES, 50)
    keys = keys_of([[i % 40] for i in range(400)])
    splits = [split_puzzles(strata, keys, rng=np.random.default_rng(seed)).test.tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    ("strata", "keys", "match"),
    [
        ([8], [[]], "1 puzzles cannot be split"),
        ([], [], "0 puzzles cannot be split"),
        ([8, 8, 8], [[1], [1, 2], [2]], "all puzzles belong together"),
        ([8] * 11, [[1]] * 10 + [[2]], None),
        ([8, 9], [[], []], "small enough to be held out"),
    ],
)
def test_what_cannot_be_split(strata, keys, match):
    keys = keys_of(keys)
    if match is None:
        assert len(split_puzzles(strata, keys, rng=np.random.default_rng(0)).test) == 1
        return
    with pytest.raises(ValueError, match=match):
        split_puzzles(strata, keys, rng=np.random.default_rng(0))


def test_a_limit_of_nothing():
    with pytest.raises(ValueError, match="at least one puzzle"):
        split_puzzles([8, 8], keys_of([[], []]), rng=np.random.default_rng(0), max_test=0)


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("split", ["donor", "dataset", "tissue"])
def test_splits_by_group(folder, tmp_path, split):
    build(folder, tmp_path, "--split", split)
    key = {"donor": "donor_id", "dataset": "dataset", "tissue": "tissue"}[split]

    def values(name):
        path = tmp_path / name
        return {puzzle.meta[key] for puzzle in load_puzzles(path).puzzles} if path.exists() else set()

    sides = [values(f"{side}/{side}_data.json") for side in ("train", "test")]
    assert not sides[0] & sides[1]
    assert manifest(tmp_path)["leaks"]["train/test"]["leaks"] is False
    assert not values("left_out.json") & sides[0]
    if split != "donor":
        assert any("left_out.json" in note for note in manifest(tmp_path)["notes"])


def two_tissues(folder: Path, donors: dict[str, list[int]]) -> Path:
    """One file whose donors are in the tissues that are said."""
    adata = toy_adata(n_cells=900, n_donors=len({d for own in donors.values() for d in own}))
    where = {d: [tissue for tissue, own in donors.items() if d in own] for own in donors.values() for d in own}
    numbers = adata.obs["donor_id"].astype(str).str.removeprefix("donor").astype(int)
    adata.obs["tissue"] = [where[d][i % len(where[d])] for i, d in enumerate(numbers.tolist())]
    adata.obs["batch"] = adata.obs["tissue"]  # so that each puzzle is of one
    return write(adata, folder / "a.h5ad")


def test_by_tissue_no_donor_is_on_both_sides_either(tmp_path):
    path = two_tissues(tmp_path, {"lung": [0, 1, 2], "blood": [2, 3], "skin": [4], "liver": [5]})
    build(path, tmp_path / "out", "--split", "tissue", "--sizes", "3", "--fail-on-leak")
    for side, other in (("train", "test"), ("test", "train")):
        tissues = {p.meta["tissue"] for p in load_puzzles(tmp_path / "out" / side / f"{side}_data.json").puzzles}
        others = {p.meta["tissue"] for p in load_puzzles(tmp_path / "out" / other / f"{other}_data.json").puzzles}
        assert not {"lung", "blood"} & tissues or not {"lung", "blood"} & others


def test_donors_that_link_all_tissues_are_on_both_sides_and_that_is_said(tmp_path, capsys):
    path = two_tissues(tmp_path, {"lung": [0, 1, 2], "blood": [0, 1, 2]})
    build(path, tmp_path / "out", "--split", "tissue", "--sizes", "3")
    assert "every tissue is linked to every other by donors" in manifest(tmp_path / "out")["notes"][0]
    leaks = manifest(tmp_path / "out")["leaks"]["train/test"]
    assert leaks["donors"]["shared"] > 0
    assert leaks["cells"]["shared"] == 0
    assert "note  every tissue" in capsys.readouterr().out
    assert run(path, "--out", tmp_path / "out", *FEW, "--sizes", "3", "--split", "tissue", "--fail-on-leak") == 1


def test_a_puzzle_that_is_there_several_times_stays_on_one_side(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for name, own in (("train", items), ("more", items[5:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    assert run(tmp_path / "train.json", tmp_path / "more.json", "--out", tmp_path / "out", "--split", "puzzle") == 0
    leaks = manifest(tmp_path / "out")["leaks"]["train/test"]
    assert (leaks["puzzles"]["shared"], leaks["reordered"]["shared"]) == (0, 0)
    (tmp_path / "more.json").rename(tmp_path / "train2.json")
    (tmp_path / "test.json").write_text(json.dumps(items[:5]))
    files = [tmp_path / f"{name}.json" for name in ("train", "train2", "test")]
    assert run(*files, "--out", tmp_path / "out", "--val-size", "10") == 0
    assert manifest(tmp_path / "out")["leaks"]["train/val"]["puzzles"]["shared"] == 0


def test_split_by_puzzle_leaks_and_says_so(folder, tmp_path, capsys):
    build(folder, tmp_path, "--split", "puzzle")
    leaks = manifest(tmp_path)["leaks"]["train/test"]
    assert leaks["cells"]["shared"] > 0
    assert leaks["donors"]["shared"] > 0
    assert "leak audit train/test" in capsys.readouterr().out
    assert run(folder, "--out", tmp_path, *FEW, "--split", "puzzle", "--fail-on-leak") == 1
    assert "--fail-on-leak" in capsys.readouterr().err
    assert run(folder, "--out", tmp_path, *FEW, "--split", "donor", "--fail-on-leak") == 0


def test_the_same_donor_in_two_files_is_one_donor(tmp_path):
    for i in range(4):
        write(toy_adata(i, n_cells=200), tmp_path / "in" / f"{i}.h5ad")
    build(tmp_path / "in", tmp_path / "out")
    assert manifest(tmp_path / "out")["leaks"]["train/test"]["leaks"] is False


def test_the_same_cells_in_two_files_under_other_donors_stay_together(tmp_path):
    for name in ("a", "b"):
        write(toy_adata(0, n_cells=200, donor_prefix=name), tmp_path / "in" / f"{name}.h5ad")
    build(tmp_path / "in", tmp_path / "out")
    assert manifest(tmp_path / "out")["leaks"]["train/test"]["leaks"] is False


def test_test_size_and_validation(folder, tmp_path):
    build(folder, tmp_path, "--max-test", "8", "--min-test-per-size", "4", "--val-size", "5")
    counts = {side: part["puzzles"] for side, part in manifest(tmp_path)["splits"].items()}
    assert counts["test"] <= 8
    assert 1 <= counts["val"] <= 10
    assert set(manifest(tmp_path)["leaks"]) == {"train/test", "train/val", "val/test"}
    assert not any(found["leaks"] for found in manifest(tmp_path)["leaks"].values())
    assert len(list(iter_parquet(tmp_path / "rl" / "val.parquet"))) == counts["val"]
    assert sum(counts.values()) == 60
    held_out = [note for note in manifest(tmp_path)["notes"] if "left_out.json" in note]
    assert sum(int(note.split()[0]) for note in held_out) == counts.get("left_out", 0)
    build(folder, tmp_path, "--min-test-per-size", "9")
    assert manifest(tmp_path)["splits"]["test"]["by_n_cells"] == {"3": 9, "4": 9}


def test_drop_overlap(folder, tmp_path):
    big = ("--sizes", "8", "--per-size", "60")
    build(folder, tmp_path, "--split", "puzzle", "--drop-overlap", "--max-cells", "0", "--sizes", "3")
    leaks = manifest(tmp_path)["leaks"]["train/test"]
    assert leaks["cells"]["shared"] == 0
    one = folder / "lung" / "file0.h5ad"
    assert run(one, "--out", tmp_path / "b", *FEW, *big, "--split", "puzzle", "--drop-overlap") == 1


def test_one_donor_cannot_be_split(tmp_path, capsys):
    path = write(toy_adata(n_cells=200, n_donors=1), tmp_path / "a.h5ad")
    assert run(path, "--out", tmp_path / "out", *FEW) == 1
    assert "--split puzzle" in capsys.readouterr().err
    assert run(path, "--out", tmp_path / "out", *FEW, "--split", "puzzle") == 0


# ----------------------------------------------------------------------------------------------------- one form of ids


def test_a_limit_that_is_given_is_the_only_one():
    counts = dict.fromkeys(range(8, 16), 480)  # the published call: 3,840 puzzles, --max-test 1100
    assert sum(quotas_of(counts).values()) == 768
    assert 1090 <= sum(quotas_of(counts, 1100).values()) <= 1100
    assert sum(quotas_of({8: 1101}, 1100).values()) == 1100


def test_max_test_on_the_command(folder, tmp_path):
    build(folder, tmp_path, "--split", "puzzle", "--max-test", "30")
    assert manifest(tmp_path)["splits"]["test"]["puzzles"] == 30


def test_named_donors_are_the_test_side(folder, tmp_path, capsys):
    build(folder, tmp_path / "a", "--test-donors", "d0_1", "d2_3")
    donors = manifest(tmp_path / "a")["splits"]
    assert set(donors["test"]["by_donor"]) == {"d0_1", "d2_3"}
    assert not set(donors["test"]["by_donor"]) & set(donors["train"]["by_donor"])
    assert sum(donors["train"]["by_donor"].values()) + sum(donors["test"]["by_donor"].values()) == 60  # all are tested
    build(folder, tmp_path / "b", "--test-donors", "d0_1", "--max-test", "2")
    assert manifest(tmp_path / "b")["splits"]["test"]["puzzles"] == 2
    capsys.readouterr()
    for options, message in (
        (["--test-donors", "Ann", "d0_1"], "--test-donors names ['Ann'], of whom there are no puzzles"),
        (["--test-donors", *donors["train"]["by_donor"], *donors["test"]["by_donor"]], "leaves no puzzle to train on"),
        (["--test-donors", "d0_1", "--split", "tissue"], "--test-donors needs the split 'donor'"),
    ):
        assert run(folder, "--out", tmp_path / "c", *FEW, *options) == 1
        assert message in capsys.readouterr().err


def test_none_is_held_out_on_request(folder, made, tmp_path):
    puzzles = build(folder, tmp_path / "a", "--split", "none")
    assert len(puzzles) == 60
    assert set(manifest(tmp_path / "a")["splits"]) == {"train"}
    assert not (tmp_path / "a" / "rl" / "test.parquet").exists()
    files = [made / "train" / "train_data.json", made / "test" / "test_data.json"]
    assert run(*files, "--out", tmp_path / "b", "--split", "none") == 0
    assert manifest(tmp_path / "b")["splits"]["train"]["puzzles"] == 58
    build(folder, tmp_path / "c", "--split", "none", "--val-size", "4")
    assert set(manifest(tmp_path / "c")["splits"]) >= {"train", "val"}
    assert manifest(tmp_path / "c")["leaks"]["train/val"]["leaks"] is False


def floats(numbers):
    found = numbers.astype(float)
    found.iloc[:3] = np.nan
    return found


@pytest.mark.parametrize(
    "form",
    [
        floats,
        lambda numbers: numbers.astype(str),
        lambda numbers: numbers.map(" {}\u200b ".format),
        lambda numbers: numbers.map("{}.0".format).astype("category"),
        lambda numbers: numbers.astype("float32").astype("category"),
        lambda numbers: numbers.astype("Int8"),
        lambda numbers: numbers.astype("category"),
        lambda numbers: numbers.map("{}\u00a0 ".format).astype("string"),
        lambda numbers: numbers.map(lambda number: chr(0xFF10 + number)),  # full width
    ],
)
def test_one_donor_written_in_two_ways_is_one_donor(tmp_path, form):
    for i, change in enumerate((lambda numbers: numbers, form)):
        adata = toy_adata(i, n_cells=300, n_donors=4, donor_prefix="")
        adata.obs["donor_id"] = change(adata.obs["donor_id"].astype(int))
        adata.obs_names = [f"{i}-{name}" for name in adata.obs_names]
        write(adata, tmp_path / "in" / f"{i}.h5ad")
    build(tmp_path / "in", tmp_path / "out", "--fail-on-leak")
    donors = {side: set(part["by_donor"]) for side, part in manifest(tmp_path / "out")["splits"].items()}
    assert set().union(*donors.values()) == {"0", "1", "2", "3"}
    assert not donors["train"] & donors["test"]


def test_the_audit_compares_donors_in_one_form(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for name, donor, part in (("a", 2, items[:4]), ("b", " 2.0", items[20:24])):
        own = [{**item, "donor_id": donor} for item in part]
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    assert run("audit", *files, "--out", tmp_path / "audit.json", "--fail-on-leak") == 1
    assert json.loads((tmp_path / "audit.json").read_bytes())["donors"]["shared"] == 1


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        (2, "2"),
        (2.0, "2"),
        ("2.00", "2"),
        ("-1.0", "-1"),
        (" P 1\n", "P 1"),
        ("cafe\u0301", "caf\u00e9"),
        ("2.5", "2.5"),
        ("02", "02"),
        ("v2.0", "v2.0"),
        (np.float32(3), "3"),
        (np.int8(2), "2"),
        ("2.", "2"),
        (1e16, "10000000000000000"),
        ("1.2e+20", "120000000000000000000"),
        ("1E5", "1E5"),
        ("\uff12", "2"),
        ("\uff24\uff11", "D1"),
        ("D\u20111", "D-1"),
        ("D\u00a01 ", "D 1"),
        (True, "True"),
        (float("nan"), ""),
        ("unknown", ""),
        (None, ""),
    ],
)
def test_the_form_of_an_id(value, canonical):
    assert canonical_id(value) == canonical


@pytest.mark.parametrize(
    "name",
    [
        "pooled",
        "Pool",
        "pooled donors",
        "pool_3",
        "mixed samples",
        "multiplexed",
        "unassigned",
        "doublet",
        "na",
        "pooled (D1, D2)",
        "pool: D1;D2",
        "D1 || D2",
        "pool of 4 mice",
        "pool-of-3",
        "pooled (n=3)",
        "mixture of two donors",
        "multi-donor",
        "N/A",
        "n.a.",
        "NaT",
        "Not available",
        "unknown donor",
        "donors pooled",
        "mouse pool",
        "D1_D2_pool",
        "healthy-pool 2",
        "Pooled_healthy",
        "D1|D2",
        "multi",
        "2 donors",
        "three mice",
    ],
)
def test_names_of_several_people_are_no_donor(name):
    assert donor_id(name) == ""


@pytest.mark.parametrize(
    "name",
    [
        "Poole",
        "d1",
        "pool cleaner",
        "multiple myeloma 3",
        "mixer",
        "HIV negative 1",
        "Pool1_donor3",
        "Nat 2",
        "NA12878",
        "Liverpool",
        "whirlpool 2",
        "2 donor",
        "multi3",
        "D1|left",
    ],
)
def test_names_of_donors(name):
    assert donor_id(name) == name


def test_pooled_cells_are_left_out_with_a_note(tmp_path):
    adata = toy_adata(n_cells=300)
    donors = adata.obs["donor_id"].astype(str)
    donors.iloc[:40] = "pooled"
    adata.obs["donor_id"] = donors
    build(write(adata, tmp_path / "a.h5ad"), tmp_path / "out")
    found = manifest(tmp_path / "out")
    assert found["inputs"][0]["notes"] == ["40 of 300 cells left out: donor_id is pooled, which is no donor"]
    assert not any("pooled" in part["by_donor"] for part in found["splits"].values())


def test_puzzles_that_may_be_of_any_donor_are_left_out(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    context = items[0]["user_msg"].split("\n")[0]
    for number, item in enumerate(items):
        item["user_msg"] = context + item["user_msg"][item["user_msg"].index("\n") :]
        if number % 3 == 0:
            item["donor_id"] = float("nan") if number % 2 else "unknown"
    (tmp_path / "a.json").write_text(json.dumps(items))
    assert run(tmp_path / "a.json", "--out", tmp_path / "out", "--fail-on-leak") == 0
    found = manifest(tmp_path / "out")
    assert found["notes"][0].startswith("18 puzzles name no donor and may come from any of them")
    assert found["splits"]["left_out"]["by_donor"]["not given"] == 18
    assert found["splits"]["train"]["puzzles"] >= 20


@pytest.mark.parametrize(
    "name", ["D1+D2", "P1, P2", "donor 3 & donor 4", "h1/h2;h3", "Donors 1-3", "patients 4 and 5", "pools"]
)
def test_several_donors_at_once_are_no_donor(name):
    assert donor_id(name) == ""


@pytest.mark.parametrize("name", ["A1/B2", "donor 1, left", "12/34", "D1-D2", "Patients_7", "2019+3"])
def test_a_name_that_only_looks_like_several_donors_is_one(name):
    assert donor_id(name) == name
