"""YAML that means harm is refused in one line, at once."""

import pytest

from recipe.cello1.formats.yaml_file import read_config, read_yaml

pytest.importorskip("yaml")


def bomb(levels: int = 9, width: int = 9) -> str:
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


MERGED = (
    "a: &a {" + ", ".join(f"k{i}: 1" for i in range(30)) + "}\n" + "\n".join(f"b{i}: {{<<: *a}}" for i in range(30))
)


@pytest.mark.parametrize("read", [read_yaml, read_config])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(), "has 72 aliases, and 20 may be; write the values out"),
        (MERGED, "has 30 aliases, and 20 may be"),
        ("a: " + "[" * 200_000, "is nested more than 50 deep"),
        ("a: " + "{b: " * 500 + "1" + "}" * 500, "is nested more than 50 deep"),
        ("a: &a [*a", "is not YAML"),
        ("a: !!python/object/apply:os.system ['touch ran']", "is not YAML"),
        ("a: \0", "is not YAML"),
        (b"a: \xff", "is not YAML"),
        ("a: 0000-99-99", "is not YAML"),
        ("a: " + "x" * (1 << 20), "is longer than 262,144 bytes"),
    ],
)
def test_yaml_that_means_harm(tmp_path, read, text, said):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"table: .*x.yaml {said}") as error:
        read(path, "table")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_what_is_in_order_is_read(tmp_path):
    pytest.importorskip("omegaconf")
    (tmp_path / "x.yaml").write_text("a: 1e-4\nb: &b {c: [é]}\nd: *b\n")
    assert read_yaml(tmp_path / "x.yaml", "x") == {"a": "1e-4", "b": {"c": ["é"]}, "d": {"c": ["é"]}}
    assert read_config(tmp_path / "x.yaml", "x").a == 1e-4, "as Hydra reads numbers"
    (tmp_path / "x.yaml").write_text("- a")
    with pytest.raises(ValueError, match="x: .*x.yaml must give settings their values, got list"):
        read_config(tmp_path / "x.yaml", "x")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("fields:\n  drug: a\n  dose: b\n  drug: c\n")
    with pytest.raises(ValueError, match="table: .*x.yaml is not YAML: the key 'drug' stands twice in one mapping"):
        read_yaml(tmp_path / "x.yaml", "table")
    (tmp_path / "x.yaml").write_text("a: &a {k: 1}\nb: {<<: *a, k: 2}\n")  # an exception to what is merged in
    assert read_yaml(tmp_path / "x.yaml", "table") == {"a": {"k": 1}, "b": {"k": 2}}
