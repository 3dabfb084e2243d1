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
"""Keep vLLM's weights replaceable on the CPU, so that every training step can sync them into the rollout.

``vllm/model_executor/layers/utils.py``, ``dispatch_cpu_unquantized_gemm``, line 318 (vLLM 0.27.1)::

    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

packs each linear layer for oneDNN and drops the original parameter together with its ``weight_loader``, so a later
``load_weights`` finds nothing to load into. (Where the CPU cannot multiply in the model's dtype, packing fails and the
plain path is taken, which is why bf16 on older CPUs happens to work.) vLLM calls ``register`` in each of its processes
through its ``vllm.general_plugins`` entry point; this acts only under ``VERL_PLATFORM=cpu``, so serving keeps oneDNN.
"""

import os

from ....utils import loopback_store


def register() -> None:
    """Make vLLM multiply with ``torch.nn.functional.linear`` in the processes of a CPU training run."""
    loopback_store.apply()  # of any run that asks for it
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
