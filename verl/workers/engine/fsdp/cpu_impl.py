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
"""FSDP2 engines for the CPU platform.

verl registers its FSDP engines for ``cuda`` and ``npu``. Two things in them need a device: the reference model always
gets ``CPUOffloadPolicy(pin_memory=True)``, and the value model is always loaded with flash-attention.
"""

import dataclasses
import warnings

from transformers import AutoModelForTokenClassification

from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from ....utils import torch_functional_cpu


class _HostMemoryMixin:
    """Build FSDP modules whose parameters stay where they are: in host memory."""

    def _build_fsdp_module(self, module):
        # Offloading to the host is the identity here, and pinning needs an accelerator. The parent decides both from
        # these two flags and reads them for nothing else while it builds.
        config = self.engine_config
        self.engine_config = dataclasses.replace(config, forward_only=False, offload_policy=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config


class FSDPCPUEngineWithLMHead(_HostMemoryMixin, FSDPEngineWithLMHead):
    """Policy and reference model on the CPU."""


class FSDPCPUEngineWithValueHead(_HostMemoryMixin, FSDPEngineWithValueHead):
    """Value model on the CPU: a token classifier with one label, in the attention the model config asks for."""

    def _build_module(self):
        hf_config = self.model_config.hf_config
        hf_config.num_labels = 1
        hf_config.classifier_dropout = 0.0
        hf_config.hidden_dropout = 0.0
        hf_config.summary_dropout_prob = 0.0
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype or "fp32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = AutoModelForTokenClassification.from_pretrained(
                self.model_config.local_path,
                config=hf_config,
                dtype=dtype,
                attn_implementation=self.model_config.override_config.get("attn_implementation", "sdpa"),
                trust_remote_code=self.model_config.trust_remote_code,
            )
        module.to(dtype)
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module


def register_engines() -> None:
    """Enter the CPU engines into verl's registry for the ``fsdp2`` backend; a second call changes nothing.

    FSDP1 stays unregistered: torch's ``FullyShardedDataParallel`` refuses to run without an accelerator.
    """
    torch_functional_cpu.apply()
    for model_type, engine in (
        ("language_model", FSDPCPUEngineWithLMHead),
        ("value_model", FSDPCPUEngineWithValueHead),
    ):
        if "cpu" not in EngineRegistry._engines.get(model_type, {}).get("fsdp2", {}):
            EngineRegistry.register(model_type=model_type, backend="fsdp2", device="cpu")(engine)
