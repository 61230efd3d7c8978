"""H3 language models in Transformers' conventions: blocks of mixer and MLP on a residual stream, with a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hippos.errors import UnsupportedError
from hippos.layers.projections import project_tokens
from hippos.models.block import H3Block
from hippos.models.cache import adopt, check_batch
from hippos.models.configuration_h3 import H3Config
from hippos.models.context import ContextPart
from hippos.models.fused_trunk import embed_tokens, run_fused_trunk, takes_fused_trunk
from hippos.models.layout import find_first_tokens, lay_out, read_documents, read_padding
from hippos.models.loss import chunked_next_token_loss, next_token_loss
from hippos.models.pretrained_h3 import H3PreTrainedModel
from hippos.models.tokens import check_positions, check_tokens, check_vocabulary


class H3Model(H3PreTrainedModel):
    """The stack of blocks, from token ids to normalised hidden states.

    Args:
        config: The configuration.
    """

    def __init__(self, config: H3Config) -> None:
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.learned_positions, config.hidden_size) if config.learned_positions else None
        )
        self.layers = nn.ModuleList(H3Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        context_group: Any = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Compute the hidden states.

        Args:
            input_ids: Token ids below ``vocab_size``, shape (B, L), L >= 1. Checked on a CPU; a GPU is not
                synchronised, there `generate` checks the prompt.
            attention_mask: 1 at real tokens, shape (B, past tokens + L); the real tokens of a sequence are contiguous.
                Padding on the left changes nothing for the tokens after it. With padding on the right the outputs
                before it are right, but the states cannot be continued from: no cache is returned, and asking for one
                is an error. Or the masks that `generate` prepares for compiled steps, by layer type.
            position_ids: Positions, shape (B, L) or (1, L). Without padding and cache, a position that does not follow
                the previous one begins a new document; otherwise only rotary attention and learned positions use them.
            past_key_values: Keys, values and states of the tokens before, updated in place: a `DynamicCache` or
                `StaticCache` of Transformers. No gradient flows through the SSM layers' states.
            inputs_embeds: Embeddings in place of ``input_ids``, shape (B, L, D).
            use_cache: Whether to return a cache. None: if ``config.use_cache``, outside training, and where it makes
                sense (not for padding on the right or packed documents).
            output_hidden_states: Return the residual stream before each block and the normalised last one.
            output_attentions: Return the attention layers' weights; needs ``attn_implementation="eager"``.
            return_dict: False for a tuple.
            seq_idx: Number of each token's document in a packed batch, shape (B, L).
            cu_seq_lens_q: Bounds of the documents packed into one row, shape (n_docs + 1,), from 0 to L.
            cu_seq_lens_k: The same again, as data collators give it; not read.
            max_length_q: Length of the longest document; not read.
            max_length_k: The same again; not read.
            context_group: Processes of torch.distributed that share each sequence; this one has the part that its rank
                in the group says, all of one length (`hippos.models.context`).

        Returns:
            Hidden states, shape (B, L, D), and what was asked for.

        Raises:
            ValueError: If arguments are missing, wrong or contradict each other; each message says which.
            TypeError: If a dtype or the cache's type is wrong.
        """
        tokens = check_tokens(input_ids, inputs_embeds, self.config.vocab_size)
        if past_key_values is not None:
            adopt(past_key_values, self.config)
            check_batch(past_key_values, tokens.shape[0])
        padding = read_padding(attention_mask, tokens, past_key_values)
        context = None
        if context_group is not None:
            context = ContextPart.of(context_group)
            others = (attention_mask, position_ids, past_key_values, seq_idx, cu_seq_lens_q)
            if use_cache or output_attentions or any(other is not None for other in others):
                raise ValueError("context_group goes with no mask, positions, packed documents, weights or cache")
            use_cache = False
            start = context.rank * tokens.shape[1]
            position_ids = torch.arange(start, start + tokens.shape[1], device=tokens.device).unsqueeze(0)
        packing = (None if context is not None else position_ids, seq_idx, cu_seq_lens_q)
        if padding.real is not None or past_key_values is not None:
            if seq_idx is not None or cu_seq_lens_q is not None:
                raise ValueError(
                    "packed documents (seq_idx, cu_seq_lens_q) go with neither padding nor past_key_values"
                )
            packing = (None, None, None)
        cu_seqlens = read_documents(tokens, *packing)
        past_key_values = self._choose_cache(use_cache, past_key_values, padding.is_right, cu_seqlens is not None)

        hidden_states = embed_tokens(self.embed_tokens, tokens) if inputs_embeds is None else inputs_embeds
        layout = lay_out(
            self.config, hidden_states, attention_mask, position_ids, past_key_values, padding.real, cu_seqlens
        )
        layout = layout._replace(context=context)
        if self.embed_positions is not None:
            positions = cast(Tensor, layout.position_ids)
            check_positions(positions, self.config.learned_positions)
            hidden_states = hidden_states + self.embed_positions(positions)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_weights = self.config.output_attentions if output_attentions is None else output_attentions
        if wants_weights and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs a model loaded with attn_implementation="eager"')
        states: list[Tensor] = []
        all_weights: list[Tensor] = []
        if self.training:
            hidden_states = F.dropout(hidden_states, self.config.embedding_dropout)
        is_plain = self.training and past_key_values is None and not (wants_states or wants_weights)
        if is_plain and takes_fused_trunk(self.layers, self.norm, hidden_states):
            hidden_states = run_fused_trunk(self.layers, self.norm, hidden_states, layout)
        else:
            for block in self.layers:
                if wants_states:
                    states.append(hidden_states)
                hidden_states, weights = block(hidden_states, layout=layout, past_key_values=past_key_values)
                if weights is not None:
                    all_weights.append(weights)
            hidden_states = self.norm(hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache is not False else None,
            hidden_states=(*states, hidden_states) if wants_states else None,
            attentions=tuple(all_weights) if wants_weights else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _choose_cache(
        self, use_cache: bool | None, past: Cache | None, is_right: bool, is_packed: bool
    ) -> Cache | None:
        """Give the cache to fill, a new one if one is wanted, or None."""
        if past is not None or use_cache:
            if is_right:
                raise ValueError("padding on the right corrupts the states behind it; pad on the left to use a cache")
            if is_packed:
                raise ValueError("packed documents leave no one state to go on from; pass use_cache=False")
            if self.gradient_checkpointing and self.training:
                raise ValueError("a cache cannot be kept with gradient checkpointing; pass use_cache=False")
        elif use_cache is None and self.config.use_cache and not (self.training or is_right or is_packed):
            use_cache = True
        if past is None and use_cache:
            past = DynamicCache(config=self.config)
            adopt(past, self.config)
        return past


class H3ForCausalLM(H3PreTrainedModel, GenerationMixin):
    """An H3 language model: `H3Model` and the output product over the vocabulary.

    Args:
        config: The configuration.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: H3Config) -> None:
        super().__init__(config)
        self.model = H3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.loss_function = next_token_loss
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_chunk_tokens: int | None = None,
        context_group: Any = None,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict next tokens; arguments not explained here are those of `H3Model.forward`.

        Args:
            input_ids: Token ids, shape (B, L).
            attention_mask: 1 at real tokens.
            position_ids: Positions; without mask and cache they separate packed documents.
            past_key_values: The cache, updated in place.
            inputs_embeds: Embeddings in place of ids.
            labels: Ids to predict, shape (B, L), aligned with ``input_ids`` (the shift by one happens here); -100 for
                tokens that do not count. The first token of a packed document never counts: nothing before it
                predicts it.
            use_cache: Whether to return a cache.
            output_hidden_states: Return the residual stream before each block and the normalised last one.
            output_attentions: Return the attention layers' weights.
            return_dict: False for a tuple.
            logits_to_keep: How many logits from the end to compute, 0 for all, or which, a tensor of indices.
            seq_idx: Number of each token's document in a packed batch.
            cu_seq_lens_q: Bounds of packed documents.
            cu_seq_lens_k: Not read.
            max_length_q: Not read.
            max_length_k: Not read.
            num_items_in_batch: The loss is the sum over tokens divided by this, instead of the mean.
            loss_chunk_tokens: Compute the loss for so many tokens at a time, so that all logits never exist at once
                (and are None in the output); 0 for all at once. None: ``config.loss_chunk_tokens``.
            context_group: Processes that share each sequence. Pass ``shift_labels`` too: the target of a part's last
                token is in the next part (`hippos.models.context.split_context` makes the arguments).
            **loss_kwargs: For the model's ``loss_function``.

        Returns:
            Loss (nats per token, if there are labels), logits, shape (B, L, vocab_size), and what was asked for.

        Raises:
            ValueError: As `H3Model.forward`.
            TypeError: As `H3Model.forward`; also for an unknown argument.
            UnsupportedError: If the loss is asked for in chunks and ``lm_head`` or ``loss_function`` was replaced.
        """
        if loss_kwargs and labels is None:
            raise TypeError(f"H3ForCausalLM.forward got unexpected arguments {', '.join(loss_kwargs)}")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            context_group=context_group,
        )
        hidden_states = output.last_hidden_state
        if isinstance(logits_to_keep, int):
            kept = hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
        else:
            kept = hidden_states[:, logits_to_keep]
        loss, logits = None, None
        if labels is not None:
            is_packable = past_key_values is None and read_padding(attention_mask, labels, None).real is None
            if is_packable and labels.shape == hidden_states.shape[:2]:
                is_first = find_first_tokens(labels, position_ids, seq_idx, cu_seq_lens_q)
                labels = labels if is_first is None else labels.masked_fill(is_first, -100)
            loss_kwargs["num_items_in_batch"] = num_items_in_batch
            chunk_tokens = self.config.loss_chunk_tokens if loss_chunk_tokens is None else loss_chunk_tokens
            if chunk_tokens:
                loss = self._chunked_loss(kept, labels, chunk_tokens, loss_kwargs)
        if loss is None:
            logits = project_tokens(self.lm_head, kept)[..., : self.config.vocab_size]
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _chunked_loss(self, kept: Tensor, labels: Tensor, chunk_tokens: int, loss_kwargs: dict[str, Any]) -> Tensor:
        """The loss without whole logits; asks for the plain product and the plain loss that it takes apart."""
        if type(self.lm_head) is not nn.Linear or self.loss_function is not next_token_loss:
            raise UnsupportedError(
                "loss_chunk_tokens needs the model's own loss_function and a plain nn.Linear as lm_head, got "
                f"{type(self.lm_head).__name__}; pass loss_chunk_tokens=0"
            )
        return chunked_next_token_loss(
            kept, self.lm_head.weight, labels, self.config.vocab_size, chunk_tokens=chunk_tokens, **loss_kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one call of `generate`: Transformers' own way, and a look at the prompt's ids on any device."""
        if is_first_iteration and inputs_embeds is None and input_ids.numel():
            check_vocabulary(input_ids, self.config.vocab_size)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        # `generate` asks the cache for its length before the model sees it.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if model_kwargs.get("past_key_values") is not None:
            adopt(model_kwargs["past_key_values"], self.config)

    def _get_static_cache_init_shape(self) -> tuple[int, int] | None:
        # Transformers takes config.head_dim for that of the attention layers; here it is the H3 layers'.
        shape = super()._get_static_cache_init_shape()
        return None if shape is None else (shape[0], self.config.attention_head_dim)
