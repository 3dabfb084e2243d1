import resource
import socket
from pathlib import Path

import pytest

from recipe.cello1.formats.machine import ON_THIS_MACHINE, free_memory, limited_memory

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says what is free")


@on_linux
def test_what_takes_too_much_ends_and_the_limit_goes():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(1 << 27):
        assert len(bytearray(1 << 24)) == 1 << 24
        with pytest.raises(MemoryError):
            bytearray(1 << 29)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(1 << 28)) == 1 << 28


@on_linux
def test_what_is_free_is_known():
    assert free_memory() > 1 << 20


def test_the_interface_is_one_of_this_machine():
    interfaces = {name for _, name in socket.if_nameindex()}
    assert {ON_THIS_MACHINE["GLOO_SOCKET_IFNAME"], ON_THIS_MACHINE["NCCL_SOCKET_IFNAME"]} <= interfaces
    assert ON_THIS_MACHINE["VLLM_HOST_IP"] == "127.0.0.1"
