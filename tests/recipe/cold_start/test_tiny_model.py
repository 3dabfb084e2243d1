import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

from recipe.cello1.cold_start.tiny_model import CHAT_TEMPLATE, build_model, build_tokenizer  # noqa: E402
from recipe.cello1.formats.model_folder import save_folder, save_model  # noqa: E402
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.task.answer import format_answer  # noqa: E402
from recipe.cello1.task.prompt import LAYOUTS, messages  # noqa: E402
from recipe.cello1.task.puzzle import Puzzle  # noqa: E402

PUZZLES = [
    Puzzle(
        (("HLA-DRA", "CD74", "RARE1"), ("GNLY", "NKG7", "CD74")),
        ("CD19+ B", "CD56+ NK"),
        ("CD19+ B", "CD56+ NK"),
        "The cell is from blood.",
        {"reasoning": "\nCell 1: CD74, HLA-DRA -> CD19+ B\nCell 2: GNLY, NKG7 -> CD56+ NK\n"},
    ),
    Puzzle(
        (("GNLY", "CD74", "NKG7"), ("CD74", "HLA-DRA", "GNLY")),
        ("CD19+ B", "CD56+ NK"),
        ("CD56+ NK", "CD19+ B"),
        "The cell is from blood.",
        {"reasoning": "\nCell 1: GNLY, NKG7 -> CD56+ NK\nCell 2: CD74, HLA-DRA -> CD19+ B\n"},
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(PUZZLES, min_count=2, n_merges=32)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(
        folder, build_model(tokenizer, seed=3, hidden_size=64, intermediate_size=64, n_layers=1, n_heads=2), tokenizer
    )
    return folder


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_genes_types_and_the_format_are_one_token_each(tokenizer):
    text = format_answer(PUZZLES[0].answer, PUZZLES[0].meta["reasoning"])
    assert pieces(tokenizer, text) == [
        *["<think>", "\nCell 1:", " CD74,", " HLA-DRA", " -> ", "CD19+ B"],
        *["\nCell 2:", " GNLY,", " NKG7", " -> ", "CD56+ NK"],
        *["\n</think>\n<answer>", "CD19+ B", " | ", "CD56+ NK", "</answer>"],
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_instruction_is_one_token_in_its_layout(layout):
    tokenizer = build_tokenizer(PUZZLES, layout=layout, min_count=2, n_merges=32)
    prompt = tokenizer.apply_chat_template(messages(PUZZLES[1], layout), tokenize=False, add_generation_prompt=True)
    assert len(pieces(tokenizer, prompt)) <= 28
    assert "".join(pieces(tokenizer, prompt)) == prompt


def test_a_rare_gene_is_spelled_and_no_name_is_taken_for_a_part_of_another(tokenizer):
    assert len(pieces(tokenizer, " RARE1")) > 1
    assert " GNLY" not in pieces(tokenizer, "Cell 1: GNLY2, XGNLY, GNLY-AS1x")[0]
    assert not {" GNLY,", " GNLY"} & set(pieces(tokenizer, " XGNLY, GNLY2"))


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    import unicodedata

    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@given(
    st.lists(
        st.sampled_from(["GNLY", ",", " ", "\n", "Cell 1:", "->", "|", "<think>", "</answer>", "CD19+ B", "é", "😀"])
    )
)
def test_any_mixture_of_the_own_tokens_comes_back(tokenizer, parts):
    text = "".join(parts)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_saved_tokenizer_loads_as_the_same_one(tokenizer, saved):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(saved)
    turns = [*messages(PUZZLES[1]), {"role": "assistant", "content": format_answer(PUZZLES[1].answer, "x → é")}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.apply_chat_template(turns, tokenize=False) == text
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "chat_template" in (saved / "tokenizer_config.json").read_text()


def test_template_has_the_turns_of_qwen(tokenizer):
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    prompt = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == prompt


def test_model_is_decided_by_its_seed_and_leaves_the_random_state_alone(tokenizer):
    import torch

    sizes = {"hidden_size": 64, "intermediate_size": 64, "n_layers": 1, "n_heads": 2}
    before = torch.get_rng_state()
    first, again, other = (build_model(tokenizer, seed=seed, **sizes) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_default_model_has_about_a_million_parameters_and_heads_that_vllm_takes(tokenizer):
    model = build_model(tokenizer, seed=1)
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert model.config.head_dim in (32, 64, 128)
    assert type(model).__name__ == "Qwen3ForCausalLM"


def test_loaded_model_ends_with_the_end_of_turn(saved, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.vocab_size == len(tokenizer)


def test_unusable_input():
    with pytest.raises(ValueError, match="puzzles is empty"):
        build_tokenizer([])


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    save_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fail(folder):
        (folder / "a").write_text("2")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_folder(target, fail)
    assert (target / "a").read_text() == "1"
    # What a killed writer left is cleared away by the next.
    (tmp_path / ".model.dead-new.part").mkdir()
    save_folder(target, lambda folder: (folder / "b").write_text("3"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["b"]


def test_command_makes_the_model_of_its_seed(tmp_path, capsys):
    from tests.helpers.cli import command
    from tests.helpers.toy_model import toy_puzzles

    write_puzzles(tmp_path / "sft.json", toy_puzzles(12))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command("tiny-model")(["--data", tmp_path / "sft.json", "--out", tmp_path / name, "--seed", seed]) == 0
    assert "parameters" in capsys.readouterr().err
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
