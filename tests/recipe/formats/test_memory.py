import resource
from pathlib import Path

import pytest

from recipe.cello1.formats.memory import free_memory, limited_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says what is free")


def test_what_takes_too_much_ends_and_the_limit_goes():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(1 << 27):
        assert len(bytearray(1 << 24)) == 1 << 24
        with pytest.raises(MemoryError):
            bytearray(1 << 29)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(1 << 28)) == 1 << 28


def test_what_is_free_is_known():
    assert free_memory() > 1 << 20
