import json
import os
import runpy
import shutil
import subprocess
import sys

import anndata as ad
import h5py
import pytest

from recipe.cello1.__main__ import main
from recipe.cello1.formats.atomic import held
from recipe.cello1.formats.stores import open_store
from scverse_plugin import _files
from scverse_plugin._commands import demo, serve
from tests.helpers.readme import ROOT
from tests.helpers.stub_server import Server
from tests.helpers.toy_adata import TYPES, toy


@pytest.fixture
def file(tmp_path):
    toy().write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def solved(body, n):
    from recipe.cello1.task.prompt import parse_user
    from tests.helpers.toy_adata import by_marker

    return by_marker(parse_user(body["messages"][-1]["content"]))


def test_annotate_through_a_server(file, tmp_path, capsys):
    out, html = tmp_path / "out.h5ad", tmp_path / "out.html"
    with Server(solved) as server:
        argv = ["annotate", str(file), "-o", str(out), "--groupby", "leiden", "--cell-types", "|".join(TYPES)]
        argv += ["--engine", "openai", "--model", "m", "--base-url", server.url, "--no-constrained", "--n-votes", "2"]
        assert main([*argv, "--report", str(html), "--key-added", "mine"]) == 0
    found = ad.read_h5ad(out)
    assert found.obs["mine"].astype(str).tolist() == found.obs["truth"].astype(str).tolist()
    assert html.is_file() and "T/NK cell" in capsys.readouterr().out
    assert main(["report", str(out), "-o", str(tmp_path / "again.html"), "--key", "mine"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.html", "in.h5ad", "out.h5ad", "out.html"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["in.h5ad", "in.zarr"])
def test_the_input_is_opened_once(tmp_path, capsys, monkeypatch, name):
    adata, opened = toy(), []
    getattr(adata, f"write_{name.split('.')[1]}")(tmp_path / name)
    monkeypatch.setattr(_files, "open_store", lambda path: (opened.append(path), open_store(path))[1])
    argv = ["annotate", str(tmp_path / name), "-o", str(tmp_path / "out.h5ad"), "--groupby", "leiden"]
    assert main([*argv, "--cell-types", "truth", "--dry-run"]) == 0
    assert opened == [tmp_path / name]


def test_of_two_runs_with_one_output_the_second_says_why_it_does_nothing(file, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    with Server(solved) as server:
        with held(out, "output"):
            assert asking(server, file, "-o", out) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"output: another run is writing to {out}; " in line and not server.bodies
        assert asking(server, file, "-o", out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_types_from_a_file_and_a_dry_run(file, tmp_path, capsys):
    (tmp_path / "types.txt").write_text("\n".join(TYPES) + "\n\n")
    base = ["annotate", str(file), "-o", "x", "--groupby", "leiden", "--dry-run", "--n-votes", "1", "--cell-types"]
    assert main([*base, f"@{tmp_path / 'types.txt'}"]) == 0
    first = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first[0][1]["content"].endswith("\n".join(sorted(TYPES)))
    assert main([*base, "truth"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["annotate", "nowhere.h5ad", "-o", "x", "--cell-types", "a|b"],
            "error: input: nowhere.h5ad does not exist; correct the path",
        ),
        (["serve", "nowhere"], "error: model: nowhere holds no config.json; give the folder"),
        (["report", "nowhere.h5ad", "-o", "x.html"], "error: "),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    assert main(argv) == 1
    found = capsys.readouterr().err.strip().splitlines()
    assert found[-1].startswith(f"cello1 {argv[0]}: {message}")


def test_no_output_when_it_fails(file, tmp_path, capsys):
    argv = ["annotate", str(file), "-o", str(tmp_path / "out.h5ad"), "--groupby", "x", "--cell-types", "a|b"]
    assert main([*argv, "--model", "m"]) == 1
    assert "groupby: adata.obs has no column 'x'" in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


def test_a_misspelt_column_is_no_type(file, tmp_path, capsys):
    argv = ["annotate", str(file), "-o", str(tmp_path / "out.h5ad"), "--groupby", "leiden", "--cell-types", "trut"]
    assert main([*argv, "--model", "m", "--dry-run"]) == 1
    assert "--cell-types: obs has no column 'trut'; it has ['truth'" in capsys.readouterr().err


def test_a_report_of_another_kind_is_refused_first(file, tmp_path, capsys):
    with Server(solved) as server:
        argv = ["annotate", str(file), "-o", str(tmp_path / "out.h5ad"), "--groupby", "leiden", "--no-constrained"]
        argv += ["--cell-types", "truth", "--engine", "openai", "--model", "m", "--base-url", server.url]
        assert main([*argv, "--report", str(tmp_path / "x.txt")]) == 1
    assert "x.txt must end in .html" in capsys.readouterr().err
    assert not server.bodies and not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(
    ("version", "flags"), [("0.27.1+cpu", ["--no-enable-chunked-prefill"]), (serve.NOT_INSTALLED, [])]
)
def test_serve_line_is_on_loopback_and_constrains(version, flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(serve, "package_versions", lambda names: dict.fromkeys(names, version))
    assert main(["serve", str(tmp_path), "--port", "8123", "--print-only", "--", "--max-model-len", "512"]) == 0
    assert capsys.readouterr().out.split() == [
        *(
            "VLLM_NO_USAGE_STATS=1",
            "CELLO1_LIMIT_TEMPLATES=1",
            "vllm",
            "serve",
            str(tmp_path),
            "--host",
            "127.0.0.1",
            "--port",
            "8123",
        ),
        *("--served-model-name", str(tmp_path)),
        *("--logits-processors", "recipe.cello1.engines.constrained.vllm_processor:MatchingLogitsProcessor"),
        *flags,
        *("--max-model-len", "512"),
    ]


def test_serve_runs_vllm_and_names_the_extra_without_it(tmp_path, monkeypatch, capfd):
    (tmp_path / "config.json").write_text("{}")
    stub = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
    stub.mkdir(parents=True)
    told = "import os, sys\nprint('stub', sys.argv[1:], os.environ['CELLO1_LIMIT_TEMPLATES'])\nsys.exit(7)\n"
    (stub / "main.py").write_text(told)
    for folder in (stub, stub.parent, stub.parents[1]):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve, "entry_points", lambda **wanted: [wanted])
    assert main(["serve", str(tmp_path)]) == 7
    assert f"stub ['serve', '{tmp_path}', '--host', '127.0.0.1'" in capfd.readouterr().out
    monkeypatch.setattr(serve, "entry_points", lambda **wanted: [])
    assert main(["serve", str(tmp_path)]) == 1
    assert "the installation lacks the vLLM plugin cello1_templates" in capfd.readouterr().err
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(tmp_path)]) == 1
    assert (
        "vLLM is not installed; use an environment made by recipe/cello1/launch/setup_env.sh" in capfd.readouterr().err
    )


NO_SYSTEM = "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'ab' * 10**9 }}", "it makes or moves more than"),
        (
            "{% if messages[0].role == 'system' %}{{ 7 ** (10**8) }}{% endif %}{{ messages[-1].content }}",
            "moves more than",
        ),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "moves more than"),
        ("{{ messages[0].content|urlize }}", "it uses urlize, which may take any time"),
        ("a" * 300_000, "it has 300,000 characters"),
        ("{{ messages[0].role }}", "it leaves out what the user says"),
        ("{{ messages[0].content.x.y }}", "cannot be applied to user"),
        (NO_SYSTEM, ""),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
    ],
)
def test_a_template_is_tried_before_it_is_served(tmp_path, template, said, capsys):
    pytest.importorskip("transformers")
    from tests.helpers.toy_model import build_toy_tokenizer

    tokenizer = build_toy_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert main(["serve", str(tmp_path), "--print-only"]) == bool(said)
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == bool(said) and bool(out) != bool(said)
    assert "prompt_layout" not in err, "which serve does not have"
    for others in ("--chat-template=a", "--chat_template", "--tokenizer", "--tokenizer-mode", "--config"):
        assert main(["serve", str(tmp_path), "--print-only", "--", others, "a"]) == 0
        assert capsys.readouterr().err == ""


def test_a_model_without_a_template_is_served_with_a_note(tmp_path, capsys):
    """vLLM has templates of its own for some."""
    pytest.importorskip("transformers")
    from tests.helpers.toy_model import build_toy_tokenizer

    tokenizer = build_toy_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert main(["serve", str(tmp_path), "--print-only"]) == 0
    assert f"note: {tmp_path} has no chat template; if vLLM has none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ImportError, AttributeError, TypeError, OSError, KeyError, Exception])
def test_a_tokenizer_that_cannot_be_read_is_noted(tmp_path, capsys, monkeypatch, kind):
    transformers = pytest.importorskip("transformers")

    def fail(*args, **options):
        raise kind("no\nsentencepiece")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    (tmp_path / "config.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--print-only"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: the template could not be tried: ") and "sentencepiece" in err
    assert err.count("\n") == 1


def test_a_model_that_names_files_elsewhere_is_not_served(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    assert main(["serve", str(tmp_path), "--print-only"]) == 1
    assert "names '../../secret', outside of its folder" in capsys.readouterr().err


@pytest.mark.slow
def test_reachable_through_scanpy(tmp_path):
    script = tmp_path / "scanpy-cello1"
    script.write_text(f"#!{sys.executable}\nfrom recipe.cello1.__main__ import main\nraise SystemExit(main())\n")
    script.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert shutil.which("scanpy-cello1", path=path)
    command = [sys.executable, "-m", "scanpy", "cello1", "serve", "nowhere"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode != 0 and "holds no config.json" in found.stderr


# -------------------------------------------------------------------- what cannot be kept is refused before it is asked


def asking(server, *argv):
    options = ["--groupby", "leiden", "--cell-types", "|".join(TYPES), "--engine", "openai", "--model", "m"]
    return main(["annotate", *map(str, argv), *options, "--base-url", server.url, "--no-constrained", "--n-votes", "1"])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder.h5ad", "output: {}/folder.h5ad is a folder; name a file in it"),
        ("in.h5ad/out.h5ad", "output: {}/in.h5ad/out.h5ad cannot be written, {}/in.h5ad is a file"),
        ("out.txt", "output: {}/out.txt must end in .h5ad or .zarr"),
        ("file.zarr", "output: {}/file.zarr is a file, a zarr store is a folder"),
        ("other.zarr", "output: {}/other.zarr is a folder of other files, not a zarr store"),
        ("/proc/out.h5ad", "output: /proc/out.h5ad cannot be written ("),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(output, message, file, tmp_path, capsys):
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "file.zarr").touch()
    (tmp_path / "other.zarr").mkdir()
    (tmp_path / "other.zarr" / "thesis.txt").touch()
    with Server(solved) as server:
        assert asking(server, file, "-o", tmp_path / output) == 1
        assert not server.bodies
    (line,) = capsys.readouterr().err.splitlines()
    assert message.replace("{}", str(tmp_path)) in line


def reserved(adata):
    adata.raw = adata.copy()
    adata.raw.var["_index"] = "x"


def mixed(adata):
    adata.obs["what"] = [1, "a"] * 40


def foreign(adata):
    adata.uns["deep"] = {"what": object()}


@pytest.mark.parametrize(
    ("spoil", "part", "ending"),
    [
        (reserved, "raw.var", ".h5ad"),
        (mixed, "obs", ".h5ad"),  # zarr takes it
        (foreign, "uns", ".h5ad"),
        (reserved, "raw.var", ".zarr"),
        (foreign, "uns", ".zarr"),
    ],
)
def test_what_cannot_be_stored_again_is_refused_first(spoil, part, ending, file, tmp_path, capsys, monkeypatch):
    adata = toy()
    spoil(adata)
    monkeypatch.setattr(ad, "read_h5ad", lambda path: adata)
    with Server(solved) as server:
        assert asking(server, file, "-o", tmp_path / f"out{ending}") == 1
        assert not server.bodies
    (line,) = capsys.readouterr().err.splitlines()
    assert f"input: what it holds cannot be written again ({part}: " in line


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.slow
def test_zarr_in_and_out(ending, tmp_path, capsys):
    toy().write_zarr(tmp_path / "in.zarr")
    out = tmp_path / f"out{ending}"
    with Server(solved) as server:
        for _ in range(2):  # a second time over the first
            assert asking(server, tmp_path / "in.zarr", "-o", out) == 0
    found = ad.read_zarr(out) if ending == ".zarr" else ad.read_h5ad(out)
    assert found.obs["cello1"].astype(str).tolist() == found.obs["truth"].astype(str).tolist()
    assert out.is_dir() is (ending == ".zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.zarr", out.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.h5ad", b"x", "bad.h5ad: it is no HDF5 file; give an h5ad file"),
        ("cut.h5ad", b"\x89HDF\r\n\x1a\n", "cut.h5ad: the HDF5 file cannot be read ("),
        ("plain", None, "plain: it is a folder, but not a zarr store; give an h5ad file"),
    ],
)
@pytest.mark.parametrize("command", ["annotate", "report"])
def test_reading_errors_are_one_line_and_name_the_file(command, name, content, message, tmp_path, capsys):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    if command == "annotate":
        assert main([command, str(path), "-o", str(tmp_path / "o.h5ad"), "--cell-types", "a|b", "--model", "m"]) == 1
    else:
        assert main([command, str(path), "-o", str(tmp_path / "o.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/{message}" in line


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    adata = toy()
    adata.obs["leiden"] = adata.obs["leiden"].cat.rename_categories({"0": "\x1b[31mred\x9b0m"})
    adata.write_h5ad(tmp_path / "in.h5ad")
    with Server(lambda body, n: "nonsense") as server:
        assert asking(server, tmp_path / "in.h5ad", "-o", tmp_path / "out.h5ad") == 0
    found = capsys.readouterr().out
    assert "[31mred" in found and not {"\x1b", "\x9b"} & set(found)


def test_a_dry_run_counts(file, capsys):
    argv = ["annotate", str(file), "-o", "x", "--groupby", "leiden", "--cell-types", "truth", "--dry-run"]
    assert main([*argv, "--n-votes", "2", "--max-tokens", "100", "--price-per-million-tokens", "1", "10000"]) == 0
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 2
    assert found.err.startswith("2 puzzles, about ") and found.err.endswith("200 of answers, price at most 2.00\n")


# --------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def browser(monkeypatch):
    opened = []
    monkeypatch.setattr(demo.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    return opened


def run_demo(*argv):
    demo.run(demo.build_parser().parse_args(list(map(str, argv))))


def test_demo_with_recorded_answers(browser, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no model of the main job here
    run_demo()
    found = capsys.readouterr()
    assert "no model in outputs/embedded/model: the answers are recorded ones" in found.err
    assert "CD14+ Monocyte" in found.out and "published" in found.out
    page = tmp_path / "cello1_demo" / "report.html"
    assert browser == [page.as_uri()] and "CD19+ B" in page.read_text()
    adata = ad.read_h5ad(tmp_path / "cello1_demo" / "annotated.h5ad")
    assert adata.uns["cello1"]["checks"]["n_errors"] == 0 and adata.uns["cello1"]["checks"]["n_puzzles"] == 48


def test_demo_with_the_model_of_the_main_job(browser, tmp_path, monkeypatch):
    started = []

    def start(name, model, **options):
        started.append((str(model), options))
        return demo.Recorded(demo.ANSWERS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "start_engine", start)
    (tmp_path / "outputs" / "embedded" / "model").mkdir(parents=True)
    (tmp_path / "outputs" / "embedded" / "model" / "config.json").touch()
    run_demo("--no-open", "--out", "here")
    assert started == [("outputs/embedded/model", {"constrained": True})]
    assert (tmp_path / "here" / "report.html").is_file() and not browser


def test_demo_checks_its_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "annotate_demo", lambda engine: pytest.fail("asked"))
    with pytest.raises(ValueError, match="out: file/annotated.h5ad cannot be written, .*/file is a file"):
        run_demo("--out", "file")


def test_recorded_answers_are_made_by_the_example(tmp_path):
    module = runpy.run_path(str(ROOT / "examples" / "record_demo.py"))
    assert module["main"](["--out", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.json").read_text() == demo.ANSWERS.read_text()


# ------------------------------------------------------------------------------------------------ files of strangers


def external_link(path, secret):
    with h5py.File(path, "r+") as file:
        del file["obs/truth"]
        file["obs/truth"] = h5py.ExternalLink(str(secret), "/x")
    return "obs/truth"


def external_storage(path, secret):
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (80, 45), "u1", external=[(str(secret), 0, 3600)])
    return "X"


def virtual(path, secret):
    with h5py.File(path, "r+") as file:
        del file["X"]
        layout = h5py.VirtualLayout((80, 45), "u1")
        layout[:] = h5py.VirtualSource(str(secret), "x", (80, 45))
        file.create_virtual_dataset("X", layout)
    return "X"


@pytest.mark.parametrize("spoil", [external_link, external_storage, virtual])
def test_a_file_that_takes_its_values_from_others_is_refused(spoil, file, tmp_path, capsys):
    (tmp_path / "id_rsa").write_bytes(b"secret" * 1000)
    name = spoil(file, tmp_path / "id_rsa")
    with Server(solved) as server:
        assert asking(server, file, "-o", tmp_path / "out.h5ad") == 1
        assert not server.bodies
    (line,) = capsys.readouterr().err.splitlines()
    assert f"input: {file}: its {name} " in line


def test_a_store_with_links_that_leave_it_is_refused(tmp_path, capsys):
    toy().write_zarr(tmp_path / "in.zarr")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in.zarr" / "obs" / "more").symlink_to(tmp_path / "elsewhere")
    with Server(solved) as server:
        assert asking(server, tmp_path / "in.zarr", "-o", tmp_path / "out.h5ad") == 1
        assert not server.bodies
    (line,) = capsys.readouterr().err.splitlines()
    assert f"input: {tmp_path}/in.zarr: its " in line and "more" in line


def test_calibrated_support_from_a_labelled_file(tmp_path, capsys):
    adata = toy(n_per_group=5)
    adata.obs["chunk"] = [f"c{i}" for i in range(adata.n_obs)]
    adata.obs["known"] = ["B cell" if i % 4 == 0 else str(name) for i, name in enumerate(adata.obs["truth"])]
    adata.write_h5ad(tmp_path / "in.h5ad")
    out, again = tmp_path / "known.h5ad", tmp_path / "new.h5ad"
    with Server(solved) as server:
        base = ["annotate", str(tmp_path / "in.h5ad"), "--cell-types", "|".join(TYPES), "--n-votes", "1"]
        base += ["--engine", "openai", "--base-url", server.url, "--no-constrained", "--puzzle-size", "1", "--groupby"]
        assert main([*base, "chunk", "-o", str(out), "--model", "m", "--truth", "known"]) == 0
        assert "calibrated on 20 groups, 17 right: expected calibration error 0.150 before" in capsys.readouterr().err
        assert main([*base, "leiden", "-o", str(again), "--model", "m", "--calibration", str(out)]) == 0
        found = ad.read_h5ad(again)
        assert found.obs["cello1_support"].tolist() == pytest.approx([0.85] * 20)
        capsys.readouterr()
        assert main([*base, "leiden", "-o", "x.h5ad", "--model", "m", "--model", "n"]) == 1
        assert "has no 'n'; it has m (no model has been asked yet)" in capsys.readouterr().err
        assert main([*base, "leiden", "-o", "x.h5ad", "--model", "m", "--calibration", str(tmp_path / "in.h5ad")]) == 1
        assert "has no calibrated run 'cello1'; annotate it with --truth COLUMN first" in capsys.readouterr().err
        assert main([*base, "leiden", "-o", "x.h5ad", "--model", "m", "--truth", "typo"]) == 1
        assert "--truth: obs has no column 'typo'; it has" in capsys.readouterr().err
        assert main([*base, "leiden", "-o", "x.h5ad", "--model", "m", "--max-false", "0.05"]) == 1
        assert "--max-false 0.05 needs decoys" in capsys.readouterr().err
