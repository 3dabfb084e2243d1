"""Plain transformers, for machines where vLLM cannot be installed: the same answers, slowly."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from recipe.cello1.engines.constrained import Cursor, mask_logits, matching_for
from recipe.cello1.engines.local import LocalEngine, cpu_dtype
from recipe.cello1.engines.protocol import Completion, EngineError, Failure, Request, Sampling
from recipe.cello1.engines.token_tree import Context
from recipe.cello1.task.answer import THINK_OPEN

if TYPE_CHECKING:
    import torch


class TransformersEngine(LocalEngine):
    """A transformers model, in batches."""

    name = "transformers"

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 16,
        lora: str | None = None,
        constrained: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(model, lora)
        self.batch_size = batch_size
        self._model: Any = None
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            msg = f"transformers cannot be imported ({error}); make an environment with launch/setup_env.sh"
            raise EngineError(msg) from error
        if device is None:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = accelerator.type if accelerator else "cpu"
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
            loaded = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=cpu_dtype(model) if dtype == "auto" and device == "cpu" else dtype,
                trust_remote_code=False,
                weights_only=True,
            )
            if lora is not None:
                from peft import PeftModel

                loaded = PeftModel.from_pretrained(loaded, lora)
            self._model = loaded.to(device).eval()
        except Exception as error:  # whatever loading raises: the caller can only report it
            reason = " ".join(str(error).split())
            raise EngineError(f"transformers cannot load {model}: {type(error).__name__}: {reason}") from error
        ends = self._model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id] if ends is None else ends
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        max_len = max_model_len or getattr(self._model.config, "max_position_embeddings", None) or 2**31
        self._set_tokenizer(tokenizer, max_len, constrained)
        self._pad = next(iter(self._ends)) if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer requests, as :meth:`recipe.cello1.engines.protocol.Engine.generate` says; not once it is closed."""
        if self._model is None:
            raise EngineError("the engine is closed; start another")
        waiting = enumerate(requests)
        while batch := list(islice(waiting, self.batch_size)):
            rows = []
            for position, request in batch:
                row = self._row(position, request, sampling)
                if isinstance(row, Failure):
                    yield position, row
                else:
                    rows.append(row)
            yield from self._answer(rows, sampling)

    def _row(self, position: int, request: Request, sampling: Sampling) -> _Row | Failure:
        prompt = self._prompt(request, sampling)
        if isinstance(prompt, Failure):
            return prompt
        cursor = None
        if self._vocabulary is not None and request.n_answers:
            matching = matching_for(self._vocabulary, request.candidates, request.n_answers)
            cursor = Cursor(matching, prompt.room, sampling.reasoning_budget, prompt.opened.startswith(THINK_OPEN))
        return _Row(position, *prompt, np.random.default_rng(request.seed), cursor)

    def _answer(self, rows: list[_Row], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer one batch; what does not fit into memory is tried in halves."""
        if not rows:
            return
        import torch

        try:
            self._run(rows, sampling)
        except (torch.OutOfMemoryError, MemoryError) as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        except RuntimeError as error:
            # On CPU running out of memory is a RuntimeError like any other.
            failure = f"RuntimeError: {' '.join(str(error).split())}"
        else:
            for row in rows:
                yield row.position, self._completion(row)
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            yield rows[0].position, Failure(failure)
            return
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            yield from self._answer([row.again() for row in part], sampling)

    def _run(self, rows: list[_Row], sampling: Sampling) -> None:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        ids, mask = self._padded([row.ids for row in rows])
        config = GenerationConfig(
            max_new_tokens=max(row.room for row in rows),
            do_sample=False,  # the processor below has drawn the token already
            eos_token_id=sorted(self._ends),
            pad_token_id=self._pad,
        )
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Sampler(rows, sampling, self._ends, self._read)]),
            )

    def _padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, padded on the left."""
        import torch

        width, device = max(map(len, rows)), self._model.device
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask

    def _next_logprobs(self, contexts: Sequence[Context]) -> Sequence[np.ndarray | Failure]:
        """Return the log-probabilities of the tokens behind each context."""
        if self._model is None:
            raise EngineError("the engine is closed; start another")
        import torch

        found: dict[int, np.ndarray | Failure] = {}
        # Contexts of like length together: less is padded.
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i][0]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            ids, mask = self._padded([contexts[i][0] for i in part])
            try:
                with torch.inference_mode():
                    logits = self._model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            except (RuntimeError, MemoryError) as error:
                found |= dict.fromkeys(part, Failure(f"{type(error).__name__}: {' '.join(str(error).split())}"))
                continue
            logprobs = logits.float().log_softmax(-1).cpu().numpy().astype(np.float64)
            found |= {i: row[contexts[i][1]] for i, row in zip(part, logprobs, strict=True)}
        return [found[i] for i in range(len(contexts))]

    def _completion(self, row: _Row) -> Completion:
        ended = bool(row.output) and row.output[-1] in self._ends
        ids = row.output[:-1] if ended else row.output
        return Completion(
            text=self._text(ids, row.opened, row.cursor is not None, row.stop),
            finish_reason="stop" if ended or row.stop else "length",
            tokens=len(row.output),
            prompt_tokens=len(row.ids),
            logprob=row.logprob,
        )

    def close(self) -> None:
        """Free the model's memory."""
        if self._model is None:
            return
        self._model = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(slots=True, eq=False)
class _Row:
    """One completion in the making."""

    position: int
    ids: list[int]
    opened: str
    room: int
    rng: np.random.Generator
    cursor: Cursor | None
    output: list[int] = field(default_factory=list)
    logprob: float | None = None
    state: Any = None
    # The text that has ended it
    stop: str = ""

    def __post_init__(self) -> None:
        self.state = self.rng.bit_generator.state

    def again(self) -> _Row:
        """Return the row as it was at the start."""
        self.rng.bit_generator.state = self.state
        cursor = None if self.cursor is None else self.cursor.restarted()
        return _Row(self.position, self.ids, self.opened, self.room, self.rng, cursor)


class _Sampler:
    """Chooses each row's next token: constraint, temperature, top-p, and a draw from the row's own generator."""

    def __init__(
        self, rows: Sequence[_Row], sampling: Sampling, ends: frozenset[int], read: Callable[[list[int]], str]
    ) -> None:
        self.rows = rows
        self.sampling = sampling
        self.ends = ends
        self.read = read
        self.open = dict(enumerate(rows))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        scores = scores.float()
        raw = scores.log_softmax(-1) if self.sampling.logprobs else None
        mask_logits(scores, {i: row.cursor for i, row in self.open.items() if row.cursor is not None})
        if self.sampling.temperature > 0:
            scores = scores / self.sampling.temperature
            if self.sampling.top_p < 1:
                scores = _keep_nucleus(scores, self.sampling.top_p)
            for i, drawing in self.open.items():
                noise = drawing.rng.gumbel(size=scores.shape[1])
                scores[i] += torch.from_numpy(noise).to(scores)
        chosen = scores.argmax(-1)
        for i, token in enumerate(chosen.tolist()):
            row = self.open.get(i)
            if row is None:
                continue
            row.output.append(token)
            if raw is not None:
                row.logprob = (row.logprob or 0.0) + float(raw[i, token])
            if row.cursor is not None:
                row.cursor.advance(token)
            if (stop := self.sampling.stop) and stop in self.read(row.output[-len(stop.encode()) :]):
                row.stop = stop  # a token is a byte at least, so that its end shows whether it is there
            if token in self.ends or row.stop or len(row.output) >= row.room:
                del self.open[i]
        result = torch.full_like(scores, float("-inf"))
        result[torch.arange(len(chosen)), chosen] = 0
        done = [i for i in range(len(self.rows)) if i not in self.open]
        # A row that is full ends here; generate goes on until the last row has ended.
        full = [i for i in done if self.rows[i].output[-1] not in self.ends]
        if full:
            result[full] = float("-inf")
            result[full, min(self.ends)] = 0
        return result


def _keep_nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of tokens that has ``top_p`` of the probability (at least one)."""
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    ordered[before >= top_p] = float("-inf")
    return ordered.scatter(-1, order, ordered)
