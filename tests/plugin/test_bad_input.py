import socket

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scverse_plugin
from recipe.cello1.engines.protocol import EngineError
from scverse_plugin.adata._matrix import open_expression
from scverse_plugin.method import _engines
from tests.helpers.toy_adata import TYPES, FakeEngine, toy

annotate = scverse_plugin.tl.annotate


def refuse(match, adata=None, cell_types=TYPES, error=ValueError, **options):
    adata = toy() if adata is None else adata
    options = {"groupby": "leiden", "engine": FakeEngine()} | options
    before = parts(adata)
    with pytest.raises(error, match=match):
        annotate(adata, cell_types, progress=False, **options)
    assert parts(adata) == before
    assert not getattr(options["engine"], "asked", None)


def parts(adata):
    return [set(getattr(adata, name, ())) for name in ("obs", "uns", "obsm")]


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"groupby: adata.obs has no column 'louvain'; it has \['truth', 'leiden'", {"groupby": "louvain"}),
        (r"groups: .* has no \['9'\]; it has \['0', '1'", {"groups": ["0", "9"]}),
        (r"groups must be a list .* write \['0'\]", {"groups": "0"}),
        (r"groups=\['0'\] needs groupby", {"groups": ["0"], "groupby": None}),
        (r"sample_key: adata.obs has no column 'who'", {"sample_key": "who"}),
        (r"cell_types is empty; give", {"cell_types": []}),
        (r"cell_types holds both 'B cell' and 'b cell'", {"cell_types": ["B cell", "b cell"]}),
        (r"cell_types: the type 'a\|b' contains '\|'.*rename", {"cell_types": ["a|b"]}),
        (r"cell_types: adata.obs has no column 'B cell'; give a list", {"cell_types": "B cell"}),
        (r"cell_types must be a list .* got int", {"cell_types": 3}),
        (r"cell_types maps samples .* needs sample_key", {"cell_types": {"d0": TYPES}}),
        (r"cell_types has no list for the samples \['d1'\]", {"cell_types": {"d0": TYPES}, "sample_key": "donor"}),
        (r"reference is given, but cell_types is no column", {"reference": toy()}),
        (r"decoys: \['b cell'\] are candidates, too", {"decoys": ["B cell"]}),
        (r"unassigned='b cell' is one of the cell types", {"unassigned": "b cell"}),
        (r"Received `use_raw=True`, but `adata.raw` is empty.*Set use_raw=False", {"use_raw": True}),
        (r"Cannot specify `layer` and have `use_raw=True`", {"use_raw": True, "layer": "a"}),
        (r"adata has no layer 'a'", {"layer": "a"}),
        (r"gene_symbols: adata.var has no column 'name'; it has \['symbol'", {"gene_symbols": "name"}),
        (r"mask_var: adata.var has no column 'm'", {"mask_var": "m"}),
        (r"mask_var must be a boolean for each of the 45 genes", {"mask_var": np.ones(3, dtype=bool)}),
        (r"exclude_genes: '\(' is not a regular expression", {"exclude_genes": ["("]}),
        (r"exclude_genes must be a list .* write \['MT-'\]", {"exclude_genes": "MT-"}),
        (r"all of its genes are left out; check gene_symbols, mask_var and exclude_genes", {"exclude_genes": ["."]}),
        (r"context_keys: adata.obs has no column 'age'; it has", {"context_keys": ["age"]}),
        (r"context_keys: no sentence is known for the column 'donor'; give it", {"context_keys": ["donor"]}),
        (r"context and context_keys exclude each other", {"context": "x", "context_keys": ["tissue"]}),
        (r"context contains a line break", {"context": "a\nb"}),
        (r"context has no text for the samples \['d1'\]", {"context": {"d0": "x"}, "sample_key": "donor"}),
        (r"n_top_genes must be a positive integer, got 0", {"n_top_genes": 0}),
        (r"n_votes must be a positive integer, got 0", {"n_votes": 0}),
        (r"puzzle_size must be a positive integer, got 2.5", {"puzzle_size": 2.5}),
        (r"rank_by must be one of expression, specificity", {"rank_by": "x"}),
        (r"cell_choice must be one of random", {"cell_choice": "x"}),
        (r"on_error must be one of raise, skip", {"on_error": "x"}),
        (r"one_to_one must be True, False or 'auto'", {"one_to_one": "yes"}),
        (
            r"one_to_one=True, but there are 4 groups and only 2 cell_types",
            {"one_to_one": True, "cell_types": TYPES[:2]},
        ),
        (r"min_support must be a number between 0 and 1, got 2", {"min_support": 2}),
        (r"min_support must be a number between 0 and 1, got 'a'", {"min_support": "a"}),
        (r"groupby must be one name, a str, got \['leiden'\]", {"groupby": ["leiden"]}),
        (r"engine_options must be a dict .*got \[1\]", {"engine_options": [1]}),
        (r"temperature must be 0 \(greedy\) or more", {"temperature": -1}),
        (r"rng is None; pass a seed \(0 or more\) or a numpy Generator", {"rng": None}),
        (r"rng is -1; pass a seed", {"rng": -1}),
        (r"rng is 'a'; pass a seed", {"rng": "a"}),
        (r"key_added must be a name without '/'", {"key_added": "a/b"}),
        (r"cache: .* must end in .jsonl", {"cache": "a.json"}),
        (r"cache: /dev/null/a.jsonl cannot be written, /dev/null is a file", {"cache": "/dev/null/a.jsonl"}),
        (r"max_puzzles=3, but this run asks 10; raise it, or lower n_votes", {"max_puzzles": 3}),
        (r"max_puzzles must be a positive integer, got 0", {"max_puzzles": 0}),
        (
            r"price_per_million_tokens must be a number, or two .*, got \(1, 2, 3\)",
            {"price_per_million_tokens": (1, 2, 3)},
        ),
        (r"price_per_million_tokens must be a number, or two .*, got '1'", {"price_per_million_tokens": "1"}),
        (
            r"groupby: without it each of 80 cells is asked about, which takes 1040 puzzles; .*max_puzzles=1040",
            {"groupby": None, "n_votes": 13},
        ),
        (r"cell_types has no types, only \['unknown', nan\]", {"cell_types": ["unknown", np.nan]}),
        (r"cell_types: the type 'B\\x00' has a character that cannot be seen", {"cell_types": ["B\0", "T"]}),
        (r"prompt_layout: layout must be one of system, user", {"prompt_layout": "x"}),
        (r"engine must be one of vllm, openai, transformers or an engine object, got 'x'", {"engine": "x"}),
        (r"engine: object has no name", {"engine": object()}),
        (r"model, base_url and engine_options go with the name of an engine", {"model": "m"}),
        (r"model is missing; give the folder", {"engine": "vllm"}),
        (r"max_tokens must be a whole number, got 'many'", {"max_tokens": "many"}),
        (r"max_tokens must be a whole number, got 8.5", {"max_tokens": 8.5}),
        (r"temperature must be a number, got None", {"temperature": None}),
        (r"top_p must be a number, got True", {"top_p": True}),
        (r"reasoning_budget must be a whole number, got '9'", {"reasoning_budget": "9"}),
        (
            r"engine_options: base_url is a parameter of its own",
            {"engine": "openai", "model": "m", "engine_options": {"base_url": "http://a"}},
        ),
        (
            r"engine_options: the engine 'openai' has no retry; it has base_url, concurrency, timeout, retries",
            {"engine": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "engine_options": {"retry": 3}},
        ),
        (
            r"base_url must begin with http:// or https://, got 'localhost:11434/v1'",
            {"engine": "openai", "model": "m", "base_url": "localhost:11434/v1"},
        ),
        (r"base_url='http://a' goes with engine='openai'", {"engine": "vllm", "model": "m", "base_url": "http://a"}),
    ],
)
def test_parameters(match, options):
    refuse(match, **options)


def test_groups_that_count_as_none_are_named():
    adata = toy()
    adata.obs["other"] = adata.obs["leiden"].cat.rename_categories({"0": "Unassigned"})
    with pytest.raises(ValueError, match=r"groups: \['Unassigned'\] in .*'other'\] counts as no group; rename it"):
        annotate(adata, TYPES, groupby="other", groups=["Unassigned", "1"], engine=FakeEngine())
    with pytest.raises(ValueError, match=r"groups: .*'other'\] has no \['unknown'\]; it has \['1'"):
        annotate(adata, TYPES, groupby="other", groups=["unknown"], engine=FakeEngine())


def test_groups_must_be_categorical():
    adata = toy()
    adata.obs["number"] = adata.obs["leiden"].astype(int)
    refuse(
        r"groupby: adata.obs\['number'\] must be categorical, got int.*astype\('category'\)", adata, groupby="number"
    )


def test_what_is_no_anndata():
    class MuData:
        mod = {"rna": toy(), "adt": toy()}

    refuse(r"adata must be an AnnData object, got MuData; pass mdata\['rna'\] \(it has \['rna', 'adt'\]\)", MuData())
    with pytest.raises(ValueError, match="adata must be an AnnData object, got DataFrame$"):
        scverse_plugin.get.cello1_df(pd.DataFrame())


def test_features_that_are_no_genes():
    adata = toy()
    adata.var["feature_types"] = "Antibody Capture"
    refuse(r"var\['feature_types'\] has no 'Gene Expression', only \['Antibody Capture'\]", adata)


def test_missing_samples():
    adata = toy()
    adata.obs.loc["cell0", "donor"] = np.nan
    refuse(r"sample_key: 1 cells have no sample \(NaN\), or 'unknown', in", adata, sample_key="donor")


@pytest.mark.parametrize("column", ["feature_name", "other"])
def test_ensembl_ids(column):
    adata = toy()
    adata.var.index = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    adata.var[column] = adata.var["symbol"]
    remedy = f"pass gene_symbols={'feature_name' if column == 'feature_name' else 'symbol'!r}"
    refuse(rf"gene_symbols: .*45 of 45 gene names are Ensembl ids \(ENSG0+\), not symbols \(TP53\); {remedy}", adata)


def test_ids_that_lead_the_lists_are_refused_without_an_organism():
    """Fewer than half of all names, but most of what is listed."""
    adata = toy()
    adata.var_names = [f"ENSG{i:011d}" if i < 20 else name for i, name in enumerate(adata.var_names)]
    adata.X = adata.X.toarray() * (np.arange(adata.n_vars) < 20)
    refuse("gene_symbols: of the genes that lead the lists, 1. of 1. gene names are Ensembl ids.*exclude_genes", adata)


def test_row_numbers_of_raw_give_way_to_the_names_of_adata():
    adata = toy()
    raw = adata.copy()
    raw.var_names = [str(i) for i in range(adata.n_vars)]
    adata.raw = raw
    assert open_expression(adata).genes.names == tuple(adata.var_names)
    refuse(
        "gene names are numbers.*add a column of symbols to adata.raw.var|pass gene_symbols='symbol'", with_more(adata)
    )


def with_more(adata):
    """The same with more genes in raw than in adata."""
    return adata[:, :20].copy()


def with_value(value, matrix=np.asarray):
    adata = toy(matrix=np.asarray)
    adata.X[3, 4] = value
    adata.X = matrix(adata.X)
    return adata


@pytest.mark.parametrize("matrix", [np.asarray, "csr", "csc"])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-1.5, r"adata.X holds negative values \(-1.5\), as scaled data do; choose .*layer= or use_raw="),
        (np.nan, r"adata.X holds NaN or infinite values; filter"),
        (np.inf, r"adata.X holds NaN or infinite values; filter"),
    ],
)
def test_values(value, match, matrix):
    kinds = {"csr": sp.csr_matrix, "csc": sp.csc_matrix}
    refuse(match, with_value(value, kinds.get(matrix, np.asarray)))


MATRICES = [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("value", [np.nan, -1])
def test_values_of_cells_outside_the_groups_do_not_matter(value, matrix):
    adata = with_value(value, matrix)  # in cell3, of group 0
    options = {"groupby": "leiden", "engine": FakeEngine(), "progress": False}
    annotate(adata, TYPES, groups=["1", "2"], **options)
    with pytest.raises(ValueError, match=r"adata.X holds (NaN|negative)"):
        annotate(adata, TYPES, groups=["0"], **options, key_added="other")


@pytest.mark.parametrize("stored_zeros", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_empty_cells(matrix, stored_zeros):
    adata = toy(matrix=np.asarray)
    values = adata.X.copy()
    values[5] = 0
    adata.X = matrix(values)
    if stored_zeros and sp.issparse(adata.X):
        values[5] = 1
        adata.X = matrix(values)
        adata.X.data[adata.X.tocoo().row == 5] = 0  # in the order of the entries
    refuse(r"adata.X: 1 of the cells to annotate express no gene \(cell5\); .*filter_cells", adata, cells_per_group=1)


@pytest.mark.parametrize("taken", ["obs", "support", "ontology", "obsm", "uns"])
def test_columns_of_others_are_not_overwritten(taken):
    adata = toy()
    if taken == "obs":
        adata.obs["mine"] = 1
    elif taken == "support":
        adata.obs["mine_support"] = 1
    elif taken == "ontology":
        adata.obs["mine_ontology_term_id"] = 1
    elif taken == "obsm":
        adata.obsm["mine_votes"] = np.ones((adata.n_obs, 1))
    else:
        adata.uns["mine"] = {"params": {}}
    refuse(
        r"key_added='mine' would overwrite adata\..*which cello1 has not written; choose another",
        adata,
        key_added="mine",
    )


def test_repeated_names_of_cells():
    adata = toy()
    adata.obs_names = ["same"] * adata.n_obs
    refuse("obs_names_make_unique", adata, groupby=None)


def test_unreachable_server():
    options = {"engine": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    refuse(r"cannot reach http://127.0.0.1:9/v1 .*is the server running", error=EngineError, **options)


def test_unknown_model_on_a_server():
    from tests.helpers.stub_server import Server

    with Server() as server:
        options = {"engine": "openai", "model": "other", "base_url": server.url}
        refuse(r"model: .* has no 'other'; it has m", error=EngineError, **options)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("./nowhere", r"model: there is no folder ./nowhere; give the folder"),
        ("owner/name", r"model: there is no folder owner/name; download it first: hf download owner/name"),
    ],
)
def test_unknown_model_on_disk(engine, model, match):
    refuse(match, error=FileNotFoundError, engine=engine, model=model)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("downloaded", [False, True])
def test_a_model_in_this_process_opens_no_socket(engine, downloaded, monkeypatch, tmp_path):
    def refused(*args, **_):
        raise AssertionError(f"a socket is opened: {args}")

    given = []

    def started(name, model, **_):
        given.append((name, model))
        return FakeEngine()

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # what is enforced does not hang on it
    monkeypatch.setattr(_engines, "start_engine", started)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    options = {"groupby": "leiden", "engine": engine, "progress": False, "n_votes": 1}
    if downloaded:  # the engine is given a folder, never a name that a hub could be asked for
        adata = toy()
        annotate(adata, TYPES, model=str(tmp_path), **options)
        assert given == [(engine, str(tmp_path))] and "cello1" in adata.obs
    else:
        with pytest.raises(FileNotFoundError, match="download it first: hf download owner/name"):
            annotate(toy(), TYPES, model="owner/name", **options)
        assert not given


def test_vllm_that_is_not_installed_names_the_set_up(monkeypatch, tmp_path):
    import sys

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "vllm", None)
    refuse(
        r"vLLM cannot be imported.*environment made by recipe/cello1/launch/setup_env.sh",
        error=EngineError,
        engine="vllm",
        model=str(tmp_path),
    )


def test_damaged_cache(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n')
    refuse(r"cache: line 1 of .* is not a response", cache=tmp_path / "a.jsonl")


def test_reading_a_run_that_is_not_there():
    adata = toy()
    for read in (scverse_plugin.get.cello1_df, scverse_plugin.pl.votes, scverse_plugin.tl.ontology_ids):
        with pytest.raises(ValueError, match=r"key: adata.uns has no cello1 run 'cello1'; there is none; call"):
            read(adata)
    adata.uns["x"] = {"params": {"tool": "cello1"}, "groups": pd.DataFrame()}
    with pytest.raises(ValueError, match=r"no cello1 run 'cello1'; there are \['x'\]"):
        scverse_plugin.get.cello1_df(adata)
