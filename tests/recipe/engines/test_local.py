"""What an engine on this machine reads before it loads a model."""

import json

import pytest

from recipe.cello1.engines.local import lora_rank


@pytest.mark.parametrize("rank", [None, 0, -4, 10**30, "8", [], 1.5])
def test_adapters_of_no_rank(tmp_path, rank):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    with pytest.raises(ValueError, match=r"lora: .* has the rank r=.*; it must be from 1 to"):
        lora_rank(str(tmp_path))
