"""Several models of one configuration as one: all seeds take their steps together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state

from hippos.data.synthetic import IGNORED
from hippos.layers import SSMModule
from hippos.models import H3Config, H3ForCausalLM

__all__ = ["ModelStack"]

_EMBEDDING = "model.embed_tokens.weight"


class ModelStack:
    """S models whose parameters are stacked, each drawn with its own seed.

    A model this small spends its time on starting operations rather than in them; a stack starts each of them once.
    Models never meet: each computes what it would compute alone, up to rounding.

    Args:
        config: The configuration of each.
        seeds: The seed of each.
        device: Where they live.

    Attributes:
        parameters: Name -> parameter, shape (S, ...).
        n_parameters: Parameters of one model.
        n_models: How many models, S.
        config: The configuration of each.
    """

    def __init__(self, config: H3Config, seeds: Sequence[int], device: torch.device) -> None:
        models = []
        self.config, self.n_models = config, len(seeds)
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                models.append(H3ForCausalLM(config).to(device))
        self.parameters, self._buffers = stack_module_state(models)
        self.n_parameters = sum(parameter.numel() for parameter in models[0].parameters())
        self._model = models[0]  # only its code is used, through functional_call
        self._masks: dict[int, Tensor] = {}

    def dynamics(self) -> set[str]:
        """Names of the parameters that shape the SSMs' recurrences."""
        return {
            f"{name}.{parameter}"
            for name, module in self._model.named_modules()
            if isinstance(module, SSMModule)
            for parameter in module.dynamics
            if f"{name}.{parameter}" in self.parameters
        }

    def train(self, is_training: bool) -> None:
        """Turn dropout on or off."""
        self._model.train(is_training)

    @property
    def is_training(self) -> bool:
        """Whether dropout is on."""
        return self._model.training

    def losses(
        self,
        input_ids: Tensor,
        targets: Tensor,
        weights: Tensor,
        *,
        parameters: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Mean cross entropy of each model's own batch.

        Args:
            input_ids: Shape (S, B, L).
            targets: Shape (S, B, L), -100 where a prediction does not count; as many count in every sequence.
            weights: Share of each sequence in the mean, shape (B,), with sum 1.
            parameters: What stands in for the stack's own; None for those.

        Returns:
            Nats per counted token, shape (S,).
        """
        mask = self._mask(input_ids.shape[-1])

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], ids: Tensor, wanted: Tensor) -> Tensor:
            logits = self._logits(parameters, buffers, ids, mask)
            nll = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
            counted = (wanted != IGNORED).sum(1)
            return (nll.view(wanted.shape).sum(1) / counted * weights).sum()

        stacked = torch.vmap(loss, randomness="different")
        return stacked(self.parameters if parameters is None else parameters, self._buffers, input_ids, targets)

    @torch.no_grad()
    def accuracies(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Share of right predictions among those that count, of every model on the same sequences.

        Args:
            input_ids: Shape (n, L).
            targets: Shape (n, L), -100 where a prediction does not count.

        Returns:
            Shape (S,), from 0 to 1.
        """
        mask = self._mask(input_ids.shape[-1])

        def accuracy(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            is_right = self._logits(parameters, buffers, input_ids, mask).argmax(-1) == targets
            return is_right.sum() / (targets != IGNORED).sum()

        self.train(False)
        return torch.vmap(accuracy)(self.parameters, self._buffers)

    def one(self, index: int) -> H3ForCausalLM:
        """A model of its own with the parameters of one of the stack."""
        model = H3ForCausalLM(self.config).to(self.parameters[_EMBEDDING].device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.parameters[name][index])
        return model.eval()

    def _mask(self, seqlen: int) -> Tensor:
        """What is added to the scores of attention, shape (1, 1, L, L), made once for each length."""
        if seqlen not in self._masks:
            forbidden = torch.full((seqlen, seqlen), -torch.inf, device=self.parameters[_EMBEDDING].device)
            self._masks[seqlen] = forbidden.triu(1).expand(1, 1, -1, -1)
        return self._masks[seqlen]

    def _logits(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        # Not the ids: the model looks at them, which a stack does not allow. And a product with one-hot rows has a
        # gradient that adds up in a fixed order.
        embedding = parameters[_EMBEDDING]
        tokens = torch.arange(embedding.shape[0], device=ids.device)
        embeddings = (ids.unsqueeze(-1) == tokens).to(embedding.dtype) @ embedding
        inputs = {"inputs_embeds": embeddings, "attention_mask": {"full_attention": mask}}
        return functional_call(self._model, (parameters, buffers), kwargs=inputs).logits
