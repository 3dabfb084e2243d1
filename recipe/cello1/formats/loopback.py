"""Variables that keep the sockets of a training or an engine on this machine."""

import sys

_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_INTERFACES = {"GLOO_SOCKET_IFNAME": _INTERFACE, "NCCL_SOCKET_IFNAME": _INTERFACE}
ON_THIS_MACHINE = {"VLLM_HOST_IP": "127.0.0.1", "VERL_LOOPBACK_STORE": "1", **_INTERFACES}
# Read when Ray is imported. Ray then binds loopback, and TransferQueue and vLLM after it.
RAY_ON_THIS_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
