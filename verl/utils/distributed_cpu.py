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
"""Work around the one place where verl 0.9.1 cannot start a process group on the CPU.

``verl/utils/distributed.py``, ``initialize_global_process_group_ray``, line 88::

    backend = backend or f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"

gives ``cpu:gloo,cpu:gloo`` on a CPU platform, and torch refuses a device that is named twice. No argument or registry
reaches that line, so the function is wrapped with ``cpu:gloo`` as its default. Upstream the fix is to leave the
second entry out where the device is the CPU; a test fails as soon as that has happened.
"""

import functools

from verl.utils import distributed
from verl.utils.device import get_device_name


def apply() -> None:
    """Wrap ``verl.utils.distributed.initialize_global_process_group_ray``; a second call changes nothing."""
    original = distributed.initialize_global_process_group_ray
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        if backend is None and get_device_name() == "cpu":
            backend = "cpu:gloo"
        return original(timeout_second=timeout_second, backend=backend)

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray
