import socket

from recipe.cello1.formats.loopback import ON_THIS_MACHINE


def test_the_interface_is_one_of_this_machine():
    interfaces = {name for _, name in socket.if_nameindex()}
    assert {ON_THIS_MACHINE["GLOO_SOCKET_IFNAME"], ON_THIS_MACHINE["NCCL_SOCKET_IFNAME"]} <= interfaces
    assert ON_THIS_MACHINE["VLLM_HOST_IP"] == "127.0.0.1"
