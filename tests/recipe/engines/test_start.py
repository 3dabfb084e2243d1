import subprocess
import sys

import pytest

from recipe.cello1.engines.protocol import Sampling
from recipe.cello1.engines.start import ENGINES, start_engine


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_sampling_refuses_what_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        Sampling(**options)


def test_unknown_engine_is_named():
    with pytest.raises(ValueError, match="engine must be one of .*vllm.*got 'tgi'"):
        start_engine("tgi", "model")


def test_nothing_heavy_is_imported_before_an_engine_starts():
    code = (
        "import sys, recipe.cello1.engines.protocol, recipe.cello1.inference.predict\n"
        "bad = {'vllm', 'torch', 'transformers', 'openai', 'ray', 'verl'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_engine_can_be_found():
    from importlib.util import find_spec

    assert all(find_spec(module) for module, _ in ENGINES.values())
