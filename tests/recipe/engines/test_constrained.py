import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.cello1.engines.constrained import Cursor, Matching, Vocabulary, mask_logits, matching_for, tokens_needed
from recipe.cello1.task.answer import parse_answer, type_fault
from recipe.cello1.task.scoring import score_answer
from tests.helpers.toy_model import ODD_TYPES, build_toy_tokenizer

ODD = (*ODD_TYPES, "NK 🧬")
EOS = 0
BYTES = [b"", *(bytes((byte,)) for byte in range(256))]  # id 0 ends the turn
# Tokens across every boundary there is.
SPANNING = [
    b"<think>", b"</think>", b"<answer>", b"</answer>", b"think", b"answer", b"</", b">\n", b">\n\n", b">\n<", b"></",
    b"</think>\n", b"</think>\n\n", b"</think>\n<answer>", b"</think>\n<answer>T", b"</think>\n<answer>Q", b"<think>a<",
    b" | ", b" |", b"| ", b" | T", b" | B", b"l | ", b"l |", b"cell", b" cell", b"cell |", b"T cell | B", b"B | T cell",
    b"T cell | T cell", b"B | B", b"B</", b"l</", b"cell</answer>", b"ll, ", b"l,", b"l, CD8", b"B <", b"</x>", b"> |",
    b"\xce", b"\xb3\xce", "γδ".encode(), b" <", b"<", b"<a", b"<t", b"x<", b"a</thi", b"answer>", b"think>", b"nswer>",
    b"\xe6\xb5", b"\x9f\xa7", b"</answer>\n", b" reasoning", b"a b c",
]  # fmt: skip


def spanning_vocabulary():
    return Vocabulary([*BYTES, *SPANNING], EOS)


@pytest.fixture(scope="module")
def trained():
    tokenizer = build_toy_tokenizer(extra=tuple(f"<answer>{' | '.join(order)}</answer>" for order in (ODD, ODD[::-1])))
    return tokenizer, Vocabulary.from_tokenizer(tokenizer)


def write(vocabulary, matching, limit, rng, budget=None, opened=False, bias=None, width=None):
    """One completion of a model that draws evenly among all tokens (plus ``bias``)."""
    cursor = Cursor(matching, limit, budget, opened)
    ids = []
    for _ in range(limit):
        logits = torch.from_numpy(rng.gumbel(size=(1, width or len(vocabulary.tokens))))
        for token, value in (bias or {}).items():
            logits[0, token] += value
        mask_logits(logits, {0: cursor})
        assert torch.isfinite(logits).any()
        token = int(logits.argmax())
        ids.append(token)
        if token == vocabulary.eos:
            return ids, cursor
        cursor.advance(token)
        assert not cursor.lost
    return ids, cursor


def check(vocabulary, ids, candidates, n, opened=False):
    assert ids[-1] == vocabulary.eos
    text = ("<think>" if opened else "") + vocabulary.text(ids)
    found = parse_answer(text)
    assert found.ok, (found.reason, text)
    assert len(found.items) == n
    assert set(found.items) <= set(candidates)
    assert len({item.lower() for item in found.items}) == n
    return found


def oracle(candidates, n):
    """All texts from the end of the reasoning on."""
    return [
        f"</think>\n<answer>{' | '.join(order)}</answer>".encode()
        for order in itertools.permutations(candidates, n)
        if len({name.lower() for name in order}) == n
    ]


@pytest.mark.parametrize(
    ("candidates", "n"),
    [
        (("T cell", "B", "T cell, CD8"), 3),
        (("T cell", "B", "T cell, CD8"), 2),
        (("B", "B <mature>", "</x>", "b"), 3),
        (("γδ", "γ", "浆"), 3),
        (("T cell",), 1),
    ],
)
def test_exactly_the_right_tokens_are_admitted_everywhere(candidates, n):
    vocabulary = spanning_vocabulary()
    matching = Matching(vocabulary, candidates, n)
    texts = oracle(candidates, n)
    rng = np.random.default_rng(0)
    for _ in range(30):
        cursor = Cursor(matching, 10_000, reasoning_budget=0, opened=True)
        written = b""
        while True:
            right = {
                i
                for i, token in enumerate(vocabulary.tokens)
                if token and any(text.startswith(written + token) for text in texts)
            }
            if written in texts:
                right.add(EOS)
            only = cursor.only()
            assert len(only) == len(set(only))
            assert set(only) == right, written
            token = int(rng.choice(sorted(right)))
            if token == EOS:
                break
            written += vocabulary.tokens[token]
            cursor.advance(token)
        assert cursor.done


def test_exactly_the_right_tokens_are_admitted_in_the_reasoning():
    vocabulary = spanning_vocabulary()
    candidates = ("T cell", "B", "T cell, CD8")
    matching = Matching(vocabulary, candidates, 3)
    texts = oracle(candidates, 3)
    tags = (b"<think>", b"</think>", b"<answer>", b"</answer>")

    def legal(reasoning):
        starts = [at for tag in tags if (at := reasoning.find(tag)) >= 0]
        return not starts or any(text.startswith(reasoning[min(starts) :]) for text in texts)

    beginnings = [tag[:end] for tag in tags for end in range(1, len(tag))]
    for start in [b"", b"a b", b"x\xce", b"<<", b"<think", b"</think<", *beginnings]:
        cursor = Cursor(matching, 10_000, opened=True)
        for byte in start:
            cursor.advance(1 + byte)
        assert cursor.only() is None
        wrong = {i for i, token in enumerate(vocabulary.tokens) if token and not legal(start + token)}
        assert set(cursor.bans()) == wrong, start


def test_exactly_the_right_tokens_open_the_reasoning():
    vocabulary = spanning_vocabulary()
    matching = Matching(vocabulary, ("T cell", "B"), 2)
    cursor = Cursor(matching, 10_000)
    written = b""
    while len(written) < 7:
        right = {
            i
            for i, token in enumerate(vocabulary.tokens)
            if token and (b"<think>".startswith(written + token) or (written + token).startswith(b"<think>"))
        }
        assert set(cursor.only()) == right
        cursor.advance(1 + b"<think>"[len(written)])
        written = b"<think>"[: len(written) + 1]
    assert cursor.only() is None


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.slow
def test_random_model_writes_legal_answers(trained, seed, opened):
    _, vocabulary = trained
    rng = np.random.default_rng(seed)
    for _ in range(20):
        n = int(rng.integers(1, len(ODD) + 1))
        candidates = tuple(ODD[i] for i in rng.permutation(len(ODD))[: int(rng.integers(n, len(ODD) + 1))])
        matching = matching_for(vocabulary, candidates, n)
        limit = tokens_needed(matching) + int(rng.integers(0, 300))
        ids, cursor = write(vocabulary, matching, limit, rng, opened=opened)
        assert cursor.done
        check(vocabulary, ids, candidates, n, opened)


def test_a_random_model_spells_labels_in_many_ways(trained):
    _, vocabulary = trained
    matching = matching_for(vocabulary, ODD[:3], 3)
    rng = np.random.default_rng(0)
    found = [
        check(vocabulary, write(vocabulary, matching, 500, rng, budget=3)[0], ODD[:3], 3).items for _ in range(200)
    ]
    assert len(set(found)) == 6  # no order is out of reach


@pytest.mark.slow
def test_the_least_room_is_enough_whatever_the_model_wants(trained):
    _, vocabulary = trained
    single = {i: 50.0 for i, token in enumerate(vocabulary.tokens) if token and len(token) == 1}  # spells by bytes
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, len(ODD)):
        matching = matching_for(vocabulary, ODD, n)
        for extra in (0, 1, 7, 40, 41, 100):
            ids, _ = write(vocabulary, matching, tokens_needed(matching) + extra, rng, bias=single)
            check(vocabulary, ids, ODD, n)


@settings(max_examples=150)
@given(st.data())
def test_any_labels(data):
    vocabulary = spanning_vocabulary()
    alphabet = st.sampled_from([*"TB cel,<>/ax+γδ|\n", "</", "T cell", " | ", "浆"])
    names = st.lists(alphabet, min_size=1, max_size=6).map("".join).filter(lambda name: not type_fault(name))
    candidates = tuple(data.draw(st.lists(names, min_size=1, max_size=6, unique_by=str.lower)))
    n = data.draw(st.integers(1, len(candidates)))
    matching = Matching(vocabulary, candidates, n)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    limit = tokens_needed(matching) + data.draw(st.integers(0, 200))
    ids, _ = write(vocabulary, matching, limit, rng, budget=data.draw(st.none() | st.integers(0, 30)))
    check(vocabulary, ids, candidates, n)


def test_sixty_cells(trained):
    _, vocabulary = trained
    candidates = tuple(f"cell type {i // 3}{', subtype ' * (i % 3)}{i % 3}" for i in range(60))
    matching = matching_for(vocabulary, candidates, 60)
    rng = np.random.default_rng(0)
    ids, _ = write(vocabulary, matching, tokens_needed(matching) + 100, rng)
    assert set(check(vocabulary, ids, candidates, 60).items) == set(candidates)


def test_no_two_that_differ_only_in_case(trained):
    _, vocabulary = trained
    candidates = ("T cell", "t cell", "B")
    matching = matching_for(vocabulary, candidates, 2)
    rng = np.random.default_rng(0)
    found = [check(vocabulary, write(vocabulary, matching, 300, rng, budget=2)[0], candidates, 2) for _ in range(40)]
    assert {item for answer in found for item in answer.items} == set(candidates)
    with pytest.raises(ValueError, match="there are 2 different candidates"):
        Matching(vocabulary, candidates, 3)


def test_what_the_model_prefers_is_what_it_gets(trained):
    tokenizer, vocabulary = trained
    wanted = "<think>CD3E, so T.</think>\n<answer>T cell, CD8-positive | γδ T cell | B</answer>"
    candidates = ("B", "T cell, CD8-positive", "T cell", "γδ T cell")
    matching = matching_for(vocabulary, candidates, 3)
    ids = [*tokenizer(wanted)["input_ids"], tokenizer.eos_token_id]
    cursor = Cursor(matching, 500)
    rng = np.random.default_rng(0)
    for token in ids:
        logits = torch.from_numpy(rng.normal(size=(1, len(vocabulary.tokens))))
        logits[0, token] += 50
        mask_logits(logits, {0: cursor})
        assert int(logits.argmax()) == token  # the usual spelling of a legal answer is never in the way
        assert logits[0, token] > 40
        cursor.advance(token) if token != vocabulary.eos else None
    assert cursor.done
    assert score_answer(vocabulary.text(ids), ["T cell, CD8-positive", "γδ T cell", "B"]).exact_match


def test_budget_closes_the_reasoning(trained):
    _, vocabulary = trained
    matching = matching_for(vocabulary, ODD[:2], 2)
    rng = np.random.default_rng(0)
    chatty = {i: 60.0 for i, token in enumerate(vocabulary.tokens) if token in (b"a", b" reasoning", b"gene")}
    for budget in (0, 1, 25):
        ids, _ = write(vocabulary, matching, 400, rng, budget=budget, opened=True, bias=chatty)
        found = check(vocabulary, ids, ODD[:2], 2, opened=True)
        spelled = vocabulary.text(ids[:budget])
        assert found.reasoning == spelled
    ids, _ = write(vocabulary, matching, 400, rng, opened=True, bias=chatty)
    assert len(ids) > 300  # without a budget it goes on as long as there is room
    check(vocabulary, ids, ODD[:2], 2, opened=True)


def test_wanting_to_end_the_turn_ends_the_reasoning(trained):
    _, vocabulary = trained
    matching = matching_for(vocabulary, ODD[:2], 2)
    ids, _ = write(vocabulary, matching, 400, np.random.default_rng(0), opened=True, bias={vocabulary.eos: 60.0})
    assert check(vocabulary, ids, ODD[:2], 2, opened=True).reasoning == ""


def test_ids_beyond_the_tokenizer_are_never_taken(trained):
    _, vocabulary = trained
    matching = matching_for(vocabulary, ODD[:2], 2)
    width = len(vocabulary.tokens) + 50
    bias = {i: 60.0 for i in range(len(vocabulary.tokens), width)}
    ids, _ = write(vocabulary, matching, 300, np.random.default_rng(0), bias=bias, width=width)
    assert max(ids) < len(vocabulary.tokens)
    check(vocabulary, ids, ODD[:2], 2)


def test_only_constrained_rows_change():
    vocabulary = spanning_vocabulary()
    matching = Matching(vocabulary, ("T cell", "B"), 2)
    logits = torch.randn(4, len(vocabulary.tokens))
    before = logits.clone()
    lost = Cursor(matching, 100)
    lost.advance(1 + ord("x"))
    assert lost.lost
    mask_logits(logits, {1: Cursor(matching, 300, opened=True), 2: Cursor(matching, 300), 3: lost})
    assert torch.equal(logits[[0, 3]], before[[0, 3]])
    assert not torch.equal(logits[1], before[1])
    assert torch.isfinite(logits[2]).sum() == sum(
        b"<think>".startswith(t) or t.startswith(b"<think>") for t in vocabulary.tokens if t
    )


@pytest.mark.parametrize(
    ("candidates", "n", "match"),
    [
        ((), 1, "there are 0 different candidates"),
        (("a",), 0, "n_answers is 0"),
        (("a", "b"), 3, "n_answers is 3"),
        (("a|b",), 1, r"contains '\|'"),
        (("a", "<answer>"), 1, "contains the tag"),
        (("a", " b"), 1, "white space around"),
    ],
)
def test_bad_candidates(candidates, n, match):
    with pytest.raises(ValueError, match=match):
        Matching(spanning_vocabulary(), candidates, n)


def test_a_vocabulary_that_cannot_spell_is_refused():
    vocabulary = Vocabulary([token for token in BYTES if token != b"\xce"], EOS)
    Matching(vocabulary, ("T cell",), 1)
    with pytest.raises(ValueError, match="no token for the byte 206 of 'γ'"):
        Matching(vocabulary, ("T cell", "γ"), 1)


def test_vocabulary_is_made_once_and_decodes_like_the_tokenizer(trained):
    tokenizer, vocabulary = trained
    assert Vocabulary.from_tokenizer(tokenizer) is vocabulary
    for text in ("<think>γδ T</think>\n<answer>NK 🧬 | naïve B cell</answer>", "  two  blanks\t\n\n", "浆细胞"):
        assert vocabulary.text(tokenizer(text)["input_ids"]) == text
    assert vocabulary.text([tokenizer.eos_token_id]) == ""


def sentence_piece_tokenizer():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "T",
        "c",
        "e",
        "l",
        "▁T",
        "ce",
        "ll",
        "|",
    ]
    words += ["cell", "▁cell", "▁|", "<", ">", "/", "think", "answer", "γ"]
    merges = [("▁", "T"), ("c", "e"), ("l", "l"), ("ce", "ll"), ("▁", "cell"), ("▁", "|")]
    bpe = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


def test_sentence_piece_vocabulary():
    tokenizer = sentence_piece_tokenizer()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    matching = Matching(vocabulary, ODD, 5)
    rng = np.random.default_rng(0)
    for _ in range(10):
        ids, _ = write(vocabulary, matching, tokens_needed(matching) + 60, rng)
        check(vocabulary, ids, ODD, 5)


def test_tags_that_are_special_tokens_are_text():
    tokenizer = build_toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    tokenizer.add_tokens(["<tool>"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    text = "<think>a <tool></think>\n<answer>B</answer>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) < len(build_toy_tokenizer()(text)["input_ids"])
    assert vocabulary.text(ids) == text
    matching = Matching(vocabulary, ODD, 3)
    single = {tokenizer.convert_tokens_to_ids(tag): 50.0 for tag in ("<think>", "</think>", "<answer>", "</answer>")}
    ids, _ = write(vocabulary, matching, 400, np.random.default_rng(0), bias=single)
    check(vocabulary, ids, ODD, 3)
    assert set(single) <= set(ids)


@pytest.mark.parametrize(
    ("decoder", "match"), [(None, "not a fast tokenizer with a decoder"), ("WordPiece", "decode by WordPiece")]
)
def test_other_tokenizers_are_refused(decoder, match):
    from tokenizers import decoders

    tokenizer = build_toy_tokenizer()
    tokenizer.backend_tokenizer.decoder = getattr(decoders, decoder)() if decoder else None
    with pytest.raises(ValueError, match=match):
        Vocabulary.from_tokenizer(tokenizer)


def test_no_end_of_turn():
    tokenizer = build_toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        Vocabulary.from_tokenizer(tokenizer)


def test_no_spelling_is_sought_while_the_model_writes(monkeypatch):
    vocabulary = spanning_vocabulary()
    candidates = tuple(f"T cell, CD8 {a}{b}" for a in "abcdef" for b in "0123456789")
    matching = Matching(vocabulary, candidates, 60)
    sought, spell = [], vocabulary._spell
    monkeypatch.setattr(vocabulary, "_spell", lambda text: sought.append(text) or spell(text))
    ids, _ = write(vocabulary, matching, matching.reserve + 5, np.random.default_rng(0), opened=True)
    check(vocabulary, ids, candidates, 60, opened=True)
    assert sought == [b"</think>"]  # once for a vocabulary, to close the reasoning
