"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer of the Hugging Face trainer.

Embeddings, the output layer, biases and norms are AdamW's, as Muon's authors advise. The update of a matrix is scaled
to the size that AdamW's would have (``match_rms_adamw``), so that the decay means the same in both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


class Muon(torch.optim.Muon):
    """Torch's Muon with ``match_rms_adamw``, fast on processors: matrices of one shape at once, and in float32."""

    # torch 2.13 takes bfloat16 everywhere (optim/_muon.py): with AVX2 alone that was half the time of a training step.

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Make one update."""
        for group in self.param_groups:
            momentum, rate, of_shape = group["momentum"], group["lr"], defaultdict(list)
            rows: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] = [], [], []
            self._init_group(group, *rows)
            for param, grad, buffer in zip(*rows, strict=True):
                buffer.lerp_(grad, 1 - momentum)
                of_shape[param.shape].append((param, grad.lerp(buffer, momentum)))
            for shape, found in of_shape.items():
                updates = torch.stack([update for _, update in found])
                directions = orthogonal(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (param, _), direction in zip(found, directions, strict=True):
                    param.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-rate * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: torch.Tensor, ns: tuple[float, float, float], n_steps: int, eps: float) -> torch.Tensor:
    """Bring the singular values of a stack of matrices near one, by Newton-Schulz steps."""
    a, b, c = ns
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers behind one face; the parameter groups are their own, so that a scheduler reaches both."""

    def __init__(
        self, model: nn.Module, *, lr: float, adam_lr: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        matrices, tables, vectors = split_parameters(model)
        if not matrices:
            raise ValueError("the model has no weight matrix for Muon; train it with optimizer=adamw")
        self.muon = Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        groups: list[dict[str, Any]] = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=adam_lr, betas=betas, weight_decay=weight_decay
        )
        # Optimizer.__init__ is for its hooks and defaults; the groups it makes give way to those of the two.
        super().__init__([*matrices, *tables, *vectors], {})
        self._join()

    def _join(self) -> None:
        """Take the groups and states of the two as own."""
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.state.clear()
        self.state.update({**self.muon.state, **self.adamw.state})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._join()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Sort what needs gradients: matrices of the layers; embeddings and output layer (tied ones once); the rest."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learnt if parameter.ndim == 2 and id(parameter) not in ends]
    tables = [parameter for parameter in learnt if parameter.ndim == 2 and id(parameter) in ends]
    vectors = [parameter for parameter in learnt if parameter.ndim != 2]
    return matrices, tables, vectors
