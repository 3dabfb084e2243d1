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
"""Compute token log-probabilities of a CPU run in one piece.

``verl/utils/torch_functional.py``, ``logprobs_from_logits_v2``, line 197 (verl 0.9.1)::

    logsumexp_values = torch.stack([torch.logsumexp(logit, dim=-1) for logit in logits])

takes one row at a time to save memory. Packed logits have a row for every token, so that without flash-attention's
kernel an update spends nearly all its time in some ten thousand tiny operations and their gradients. verl has the same
in one piece (``logprobs_from_logits_naive``), but nothing that chooses it.
"""

from verl.utils import torch_functional


def apply() -> None:
    """Let ``logprobs_from_logits_naive`` serve as ``logprobs_from_logits_v2``; a second call changes nothing."""
    torch_functional.logprobs_from_logits_v2 = torch_functional.logprobs_from_logits_naive
