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
"""Give the sockets that hand weights to the rollout a name that no other run on the machine has.

``verl/workers/rollout/vllm_rollout/vllm_rollout.py``, line 141, and ``utils.py``, line 431 (verl 0.9.1)::

    f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{replica_rank}-rank-{trainer_rank}.sock"

take the Ray job id, against collisions; in every local Ray cluster it is 01000000. All of verl's calls for a job id are
for this name, so that ``VERL_IPC_TAG`` (letters, digits and hyphens, one for each run) is put behind it. Where the
variable is not set nothing is replaced.
"""

import functools
import os


def apply() -> None:
    """Wrap ``ray.runtime_context.RuntimeContext.get_job_id`` under ``VERL_IPC_TAG``; a second call changes nothing."""
    tag = os.environ.get("VERL_IPC_TAG")
    if not tag:
        return
    from ray.runtime_context import RuntimeContext

    original = RuntimeContext.get_job_id
    if hasattr(original, "ipc_tag"):
        return

    @functools.wraps(original)
    def get_job_id(self):
        return f"{original(self)}-{tag}"

    get_job_id.ipc_tag = tag
    RuntimeContext.get_job_id = get_job_id
