r"""Decoding that can only end in a legal answer: the reasoning is free, the answer a one-to-one matching.

A completion under the constraint is ``<think>``, any text without a tag, ``</think>\n<answer>``, different candidates
with the separator between them, ``</answer>`` and the end of the turn. The constraint is one on *text*, not on tokens:
a token is admitted if what has been written, followed by that token's bytes, is still the beginning of such a text. So
it does not matter how the tokenizer cuts labels, whether a token spans a label and a separator (or ``</think`` and the
line break), whether one candidate begins like another, or whether a character takes several tokens. The model may write
a label in any spelling the vocabulary has, its usual one included.

- :class:`Vocabulary` knows the bytes of every token; made once for a tokenizer.
- :class:`Matching` knows the legal texts for one list of candidates; shared by all completions that have that list.
- :class:`Cursor` follows one completion and tells which tokens may come next.
- :func:`mask_logits` applies that to a batch of logits, for vLLM and transformers alike.

Room: reasoning that goes on too long is closed (``</think>``) in time for the answer, or earlier if a budget is given.
If the model wants to end its turn within the reasoning, it closes the reasoning instead.
"""

from recipe.cello1.engines.constrained.cursor import Cursor, mask_logits
from recipe.cello1.engines.constrained.matching import Matching, matching_for, tokens_needed
from recipe.cello1.engines.constrained.vocabulary import Vocabulary

__all__ = ["Cursor", "Matching", "Vocabulary", "mask_logits", "matching_for", "tokens_needed"]
