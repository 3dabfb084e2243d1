"""vLLM in this process, on GPU or CPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from recipe.cello1.engines.local import LocalEngine, cpu_dtype, lora_rank
from recipe.cello1.engines.protocol import (
    LOGITS_PROCESSOR,
    Completion,
    EngineError,
    Failure,
    Request,
    Sampling,
    constraint_args,
)
from recipe.cello1.engines.token_tree import Context
from recipe.cello1.formats.machine import ON_THIS_MACHINE
from recipe.cello1.formats.template_limits import limit_templates

# For the start only, and only where the user has not set them.
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", **ON_THIS_MACHINE}
_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # vLLM binds threads to cores, which it must share with nobody; on a shared machine that costs half a minute.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Without a process of its own the engine starts in a second or two instead of the time of another import.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
# What vLLM on CPU sets for workers of its own: preloaded libraries, and what others take for a distributed run.
_LEAKS = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")

# By vLLM's id: position of the request, what the template put before the completion, whether it is constrained, where
# it stops.
_InWork = tuple[int, str, bool, str]


class VllmEngine(LocalEngine):
    """vLLM in this process."""

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        lora: str | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float | None = None,
        constrained: bool = False,
        enforce_eager: bool | None = None,
        **options: Any,
    ) -> None:
        self._llm: Any = None
        self._broken = ""
        self._set_num_threads = None
        super().__init__(model, lora)
        if lora is not None:
            options |= {"enable_lora": True, "max_lora_rank": _rank_limit(lora_rank(lora))}
        if max_num_seqs is not None:
            options["max_num_seqs"] = max_num_seqs
        if gpu_memory_utilization is not None:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        if constrained:
            options["logits_processors"] = [*options.get("logits_processors", ()), LOGITS_PROCESSOR]

        with _environment(_QUIET):
            try:
                from vllm import LLM
                from vllm.platforms import current_platform
            except ImportError as error:
                raise EngineError(
                    f"vLLM cannot be imported ({error}); use an environment made by recipe/cello1/launch/setup_env.sh, "
                    "or a server (Ollama, llama.cpp, a cloud provider): engine 'openai' with its base_url"
                ) from error
            limit_templates(in_jinja=True)  # vLLM renders a prompt of its own when it starts
            on_cpu = current_platform.is_cpu()
            if on_cpu:
                # A prompt cut in two makes vLLM turn the request's random generator back, which CPU generators refuse.
                options.setdefault("enable_chunked_prefill", False)
            self._set_num_threads = _torch().set_num_threads
            with _environment(_ON_CPU if on_cpu else {}):
                try:
                    self._llm = LLM(
                        model,
                        trust_remote_code=False,
                        dtype=cpu_dtype(model) if dtype == "auto" and on_cpu else dtype,
                        # -1: as long as the model allows and the memory holds.
                        max_model_len=-1 if max_model_len is None else max_model_len,
                        tensor_parallel_size=tensor_parallel_size,
                        enforce_eager=on_cpu if enforce_eager is None else enforce_eager,
                        enable_prefix_caching=True,
                        use_tqdm_on_load=False,
                        **options,
                    )
                except Exception as error:  # whatever vLLM raises at its start: the caller can only report it
                    self.close()
                    reason = " ".join(str(error).split())  # one line
                    raise EngineError(f"vLLM cannot start with {model}: {type(error).__name__}: {reason}") from error
        engine = self._llm.llm_engine
        self._set_tokenizer(self._llm.get_tokenizer(), engine.model_config.max_model_len, constrained)
        self._window = 2 * engine.vllm_config.scheduler_config.max_num_seqs
        self._lora = None
        if lora is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, lora)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer requests, as :meth:`recipe.cello1.engines.protocol.Engine.generate` says; not once it is closed."""
        if self._llm is None:
            raise EngineError("the engine is closed; start another")
        engine = self._llm.llm_engine
        waiting = enumerate(requests)
        in_work: dict[str, _InWork] = {}
        more = True
        try:
            while more or in_work:
                while more and len(in_work) < self._window:
                    position, request = next(waiting, (-1, None))
                    if request is None:
                        more = False
                    elif failure := self._add(position, request, sampling, in_work):
                        yield position, failure
                if not in_work:
                    continue
                try:
                    outputs = engine.step()
                except Exception as error:  # out of memory, a dead worker...: nothing more will come from this engine
                    self._broken = f"vLLM stopped: {type(error).__name__}: {error}"
                    outputs = []
                if self._broken:
                    for position, *_ in in_work.values():
                        yield position, Failure(self._broken)
                    in_work.clear()
                for output in outputs:
                    if output.finished:
                        position, opened, constrained, stop = in_work.pop(output.request_id)
                        yield position, self._completion(output, opened, constrained, stop)
        finally:
            if in_work:  # the caller has had enough
                engine.abort_request(list(in_work))

    def _add(self, position: int, request: Request, sampling: Sampling, in_work: dict[str, _InWork]) -> Failure | None:
        """Hand one request to vLLM, or say why not."""
        if self._broken:
            return Failure(self._broken)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = self._prompt(request, sampling)
        if isinstance(prompt, Failure):
            return prompt
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            logprobs=0 if sampling.logprobs else None,
            stop=[sampling.stop] if sampling.stop else None,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=constraint_args(request, sampling) or None,
        )
        name = str(position)
        try:
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": prompt.ids}, params, lora_request=self._lora)
        except ValueError as error:  # a request vLLM refuses
            return Failure(f"{type(error).__name__}: {error}")
        in_work[name] = (position, prompt.opened, request.n_answers > 0, sampling.stop)
        return None

    def _completion(self, output: Any, opened: str, constrained: bool, stop: str) -> Completion:
        best = output.outputs[0]
        return Completion(
            # Not vLLM's own text: it decodes while it goes and drops bytes that make no character.
            text=self._text(best.token_ids, opened, constrained, stop),
            finish_reason=best.finish_reason or "stop",
            tokens=len(best.token_ids),
            prompt_tokens=len(output.prompt_token_ids),
            logprob=best.cumulative_logprob,
        )

    def _next_logprobs(self, contexts: Sequence[Context]) -> Sequence[np.ndarray | Failure]:
        """Return the log-probabilities of the tokens behind each context: those of a completion of one token."""
        if self._llm is None:
            raise EngineError("the engine is closed; start another")
        from vllm import SamplingParams
        from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, RequestOutputKind

        engine = self._llm.llm_engine
        found: list[np.ndarray | Failure] = [Failure("vLLM gave no probabilities")] * len(contexts)
        in_work: dict[str, int] = {}
        for i, (ids, tokens) in enumerate(contexts):
            if self._broken or len(tokens) > MAX_LOGPROB_TOKEN_IDS:
                found[i] = Failure(self._broken or f"vLLM compares {MAX_LOGPROB_TOKEN_IDS} tokens at most")
                continue
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprob_token_ids=tokens,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            try:
                engine.add_request(f"score-{i}", {"prompt_token_ids": ids}, params, lora_request=self._lora)
            except ValueError as error:  # a request vLLM refuses
                found[i] = Failure(f"{type(error).__name__}: {error}")
                continue
            in_work[f"score-{i}"] = i
        while in_work:
            try:
                outputs = engine.step()
            except Exception as error:  # as in generate
                self._broken = f"vLLM stopped: {type(error).__name__}: {error}"
                return [Failure(self._broken)] * len(contexts)
            for output in outputs:
                if output.finished:
                    i = in_work.pop(output.request_id)
                    logprobs = output.outputs[0].logprobs[0]
                    found[i] = np.array([logprobs[token].logprob for token in contexts[i][1]], dtype=np.float64)
        return found

    def close(self) -> None:
        """Stop vLLM and free its memory, so that another model can be started."""
        if self._set_num_threads is not None:
            _torch().set_num_threads = self._set_num_threads  # vLLM puts a warning in its place
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, and undo this and what vLLM sets that later child processes should not have."""
    names = (*defaults, *_LEAKS)
    before = {name: os.environ[name] for name in names if name in os.environ}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _torch() -> Any:
    import torch

    return torch


def _rank_limit(rank: int) -> int:
    """Return the largest rank to declare: vLLM takes only some numbers."""
    return next((limit for limit in (8, 16, 32, 64, 128, 256, 320) if limit >= rank), 512)
