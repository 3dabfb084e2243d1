"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer of the Hugging Face trainer.

Embeddings, the output layer, biases and norms are AdamW's, as Muon's authors advise. Both are torch's own. The update
of a matrix is scaled to the size that AdamW's would have (``match_rms_adamw``), so that the decay means the same in
both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers behind one face; the parameter groups are their own, so that a scheduler reaches both."""

    def __init__(
        self, model: nn.Module, *, lr: float, adam_lr: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        matrices, tables, vectors = split_parameters(model)
        if not matrices:
            raise ValueError("the model has no weight matrix for Muon; train it with optimizer=adamw")
        self.muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = vectors if parameter.ndim != 2 else tables if id(parameter) in ends else matrices
            kind.append(parameter)
    return matrices, tables, vectors
