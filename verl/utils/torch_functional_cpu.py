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
