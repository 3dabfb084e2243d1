"""The logits processor by itself, without an engine."""

import logging
from types import SimpleNamespace

import pytest
import torch

from recipe.cello1.engines.protocol import CANDIDATES_ARG, N_ANSWERS_ARG, REASONING_BUDGET_ARG
from tests.helpers.toy_model import build_toy_tokenizer

TYPES = ["T cell", "B cell"]


@pytest.fixture(scope="module")
def processor_class():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from recipe.cello1.engines.constrained.vllm_processor import MatchingLogitsProcessor

    return MatchingLogitsProcessor


def params(candidates=TYPES, n_answers=2, **more):
    args = {CANDIDATES_ARG: candidates, N_ANSWERS_ARG: n_answers, **more}
    return SimpleNamespace(extra_args=args, max_tokens=400)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"candidates": "T cell"}, "must be a list of cell types"),
        ({"candidates": ["a", 1]}, "must be a list of cell types"),
        ({"candidates": ["a|b", "c"]}, r"'a\|b' .*; rename it"),
        ({"candidates": [" a", "c"]}, "' a' .*; rename it"),
        ({"candidates": ["a", "A"]}, "between 1 and the number of candidates"),
        ({"n_answers": 0}, "between 1 and"),
        ({"n_answers": True}, "must be an integer between .* got True"),
        ({"n_answers": "2"}, "must be an integer between"),
        ({REASONING_BUDGET_ARG: "x"}, "an integer of at least 0, got 'x'"),
        ({REASONING_BUDGET_ARG: -5}, "an integer of at least 0, got -5"),
        ({REASONING_BUDGET_ARG: True}, "an integer of at least 0, got True"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(processor_class, arguments, match):
    with pytest.raises(ValueError, match=match):
        processor_class.validate_params(params(**arguments))


def test_requests_that_can_be_met(processor_class):
    processor_class.validate_params(params())
    processor_class.validate_params(params(**{REASONING_BUDGET_ARG: 0}))
    processor_class.validate_params(SimpleNamespace(extra_args=None))


def test_what_only_the_vocabulary_can_tell_does_not_stop_the_engine(processor_class, tmp_path, caplog):
    build_toy_tokenizer().save_pretrained(tmp_path)
    model = SimpleNamespace(
        tokenizer=str(tmp_path), tokenizer_revision=None, trust_remote_code=False, max_model_len=500
    )
    processor = processor_class(SimpleNamespace(model_config=model), torch.device("cpu"), False)
    assert processor._new_row(params(), [1, 2], []) is not None
    vocabulary = processor._vocabulary
    del vocabulary.table[b"x"]  # a tokenizer without a token for this byte
    with caplog.at_level(logging.ERROR):
        assert processor._new_row(params(["xy", "b"]), [1, 2], []) is None
    assert "no token for the byte" in caplog.text and "without the constraint" in caplog.text
    broken = processor_class(SimpleNamespace(model_config=SimpleNamespace(**vars(model) | {"tokenizer": "/nowhere"})),
                             torch.device("cpu"), False)  # fmt: skip
    assert broken._new_row(params(), [1, 2], []) is None
