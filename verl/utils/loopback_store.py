# Copyright 2025 Individual Contributor: the cello1 authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Let the stores through which the processes of one machine find each other listen on this machine alone.

``torch/distributed/rendezvous.py``, ``_create_c10d_store``, line 199 (torch 2.13)::

    return TCPStore(host_name=hostname, port=port, ...)

listens on all interfaces, also where the host is 127.0.0.1. Both verl's training processes (``env://``) and vLLM's
engine (``tcp://``) come here, and no setting does. But a store takes a socket that listens already, so that under
``VERL_LOOPBACK_STORE`` it is given one, if its host is 127.0.0.1. Where the variable is not set nothing is replaced.
"""

import functools
import importlib
import os
import socket

_LOOPBACK = "127.0.0.1"


def apply() -> None:
    """Wrap ``torch.distributed.rendezvous.TCPStore`` under ``VERL_LOOPBACK_STORE``; a second call changes nothing."""
    if not os.environ.get("VERL_LOOPBACK_STORE"):
        return
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # torch has a function of that name, too
    original = rendezvous.TCPStore
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original, updated=())
    def store(host_name, port, *arguments, is_master=False, **options):
        if is_master and host_name == _LOOPBACK:
            try:
                listening = socket.create_server((_LOOPBACK, port))
            except OSError:  # shared by this process, or taken, which torch says
                pass
            else:
                port = listening.getsockname()[1]
                options["master_listen_fd"] = listening.detach()
        return original(host_name, port, *arguments, is_master=is_master, **options)

    rendezvous.TCPStore = store
