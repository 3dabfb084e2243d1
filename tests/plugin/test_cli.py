import json
import os
import shutil
import subprocess
import sys

import anndata as ad
import pytest

from recipe.cello1.__main__ import main
from scverse_plugin._commands import serve
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
        (["annotate", "nowhere.h5ad", "-o", "x", "--cell-types", "a|b"], "error: input: there is no file nowhere.h5ad"),
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
        *("VLLM_NO_USAGE_STATS=1", "vllm", "serve", str(tmp_path), "--host", "127.0.0.1", "--port", "8123"),
        *("--served-model-name", str(tmp_path)),
        *("--logits-processors", "recipe.cello1.engines.constrained.vllm_processor:MatchingLogitsProcessor"),
        *flags,
        *("--max-model-len", "512"),
    ]


def test_serve_runs_vllm_and_names_the_extra_without_it(tmp_path, monkeypatch, capfd):
    (tmp_path / "config.json").write_text("{}")
    stub = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
    stub.mkdir(parents=True)
    told = "import os, sys\nprint('stub', sys.argv[1:], os.environ['VLLM_NO_USAGE_STATS'])\nsys.exit(7)\n"
    (stub / "main.py").write_text(told)
    for folder in (stub, stub.parent, stub.parents[1]):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    assert main(["serve", str(tmp_path)]) == 7
    assert f"stub ['serve', '{tmp_path}', '--host', '127.0.0.1'" in capfd.readouterr().out
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(tmp_path)]) == 1
    assert (
        "vLLM is not installed; use an environment made by recipe/cello1/launch/setup_env.sh" in capfd.readouterr().err
    )


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
