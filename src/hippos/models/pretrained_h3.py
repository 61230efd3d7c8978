"""What all H3 models share in Transformers' conventions: initialisation, loading, compilation, a vocabulary's size."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hippos.layers import SSMModule
from hippos.models.attention import CachedSelfAttention
from hippos.models.block import H3Block
from hippos.models.configuration_h3 import H3Config


class H3PreTrainedModel(PreTrainedModel):
    """Base class of H3 models: initialisation, loading, compilation and resizing."""

    config_class = H3Config
    config: H3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["H3Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["shift", "diag", "dplr"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The state cannot be rolled back, so `generate` refuses assisted decoding.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SSMModule):
            _reset_unloaded(module)
            return
        super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise parameters that no checkpoint gave; products that end in the stream are scaled by the depth."""
        fresh = [linear for linear in self._last_products() if not getattr(linear, "_is_hf_initialized", False)]
        super().initialize_weights()
        for linear in fresh:
            if not getattr(linear.weight, "_is_hf_initialized", False):
                linear.weight.div_(math.sqrt(2 * self.config.num_hidden_layers))

    def _last_products(self) -> Iterator[nn.Linear]:
        for block in self.modules():
            if isinstance(block, H3Block):
                yield block.mlp.fc2
                if isinstance(block.mixer, CachedSelfAttention) or self.config.rescale_mixer_out_proj:
                    yield block.mixer.out_proj

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as Transformers does; the weights can be read by whoever can read the configuration.

        Args:
            save_directory: The folder; made if missing.
            *args: The other arguments of Transformers' method.
            **kwargs: Likewise.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        # safetensors lets only the owner read what it writes; other files follow the umask.
        folder = Path(save_directory)
        for config in folder.glob("config.json"):
            for weights in folder.glob("model*.safetensors"):
                weights.chmod(config.stat().st_mode)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the vocabulary; padding rows of the embedding beyond it are dropped.

        Args:
            new_num_tokens: Tokens of the new vocabulary; None changes nothing.
            pad_to_multiple_of: Round the stored rows up to a multiple; None stores exactly the vocabulary.
            mean_resizing: Draw new rows around the mean of the old ones.

        Returns:
            The embedding.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        vocab_size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if vocab_size > self.config.vocab_size < self.config.padded_vocab_size:
            # What was padding holds no trained rows to keep, nor to take the mean of.
            super().resize_token_embeddings(self.config.vocab_size, mean_resizing=False)
        embedding = super().resize_token_embeddings(vocab_size, pad_to_multiple_of, mean_resizing)
        self.config.vocab_size = vocab_size
        self.config.padded_vocab_size = embedding.num_embeddings
        return embedding


def _reset_unloaded(module: SSMModule[Any]) -> None:
    """Draw the parameters of an SSM that no checkpoint gave."""
    loaded = {
        name: parameter.clone()
        for name, parameter in module.named_parameters()
        if getattr(parameter, "_is_hf_initialized", False)
    }
    if len(loaded) == len(list(module.parameters())):
        return
    module.reset_parameters()
    for name, value in loaded.items():
        module.get_parameter(name).copy_(value)
