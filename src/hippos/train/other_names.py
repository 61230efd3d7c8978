"""What others call our settings: Transformers' Trainer, papers and public training code. Only messages read it."""

from __future__ import annotations

__all__ = ["called_here"]

_OTHER_NAMES = {
    "optim.learning_rate": "lr max_lr peak_lr base_lr step_size",
    "optim.steps": "max_steps num_steps train_steps training_steps max_iters iterations epochs num_train_epochs",
    "optim.batch_size": "batch bs batchsize global_batch_size train_batch_size total_batch_size",
    "optim.micro_batch_size": (
        "micro_batch mbs device_batch_size per_device_batch_size per_device_train_batch_size batch "
        "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches"
    ),
    "optim.warmup": "warmup_steps warmup_ratio warmup_iters lr_warmup",
    "optim.decay_end": "decay_steps lr_decay_iters decay",
    "optim.final": "min_lr final_lr lr_min min_lr_ratio decay",
    "optim.weight_decay": "wd decay",
    "optim.beta1": "betas adam_beta1 momentum",
    "optim.beta2": "betas adam_beta2",
    "optim.clip_norm": "clip grad_clip gradient_clip gradient_clipping clip_grad_norm max_grad_norm",
    "optim.dtype": "bf16 bfloat16 fp16 fp32 amp precision mixed_precision torch_dtype",
    "optim.seed": "random_seed data_seed",
    "optim.loss_chunk_tokens": "loss_chunk chunk_size",
    "data.corpus": "text dataset datasets data train_data train_file",
    "data.validation": "val valid eval_data validation_data validation_file val_data",
    "data.seqlen": (
        "seq_len seq_length sequence_length context context_length block_size max_length max_seq_len l_max"
    ),
    "data.column": "text_column field",
    "run.save_steps": "save_every save_interval checkpoint_every checkpoint_steps save",
    "run.eval_steps": "eval_every eval_interval val_interval eval",
    "run.log_steps": "log_every log_interval logging_steps",
    "run.keep_checkpoints": "save_total_limit keep max_checkpoints",
    "run.activation_checkpointing": "gradient_checkpointing checkpointing recompute",
    "run.compile": "torch_compile",
    "run.cuda_graph": "cuda_graphs graph graphs",
    "run.parallel": "fsdp fsdp2 ddp strategy",
    "run.context_parallel": "cp context_parallel_size sequence_parallel",
    "run.wandb": "report_to wandb_project",
    "model.hidden_size": "d_model width dim n_embd hidden embed_dim",
    "model.num_hidden_layers": "n_layers n_layer layers num_layers depth",
    "model.num_attention_heads": "n_heads n_head heads num_heads",
    "model.intermediate_size": "d_ff d_inner ffn_dim mlp_dim",
    "model.state_size": "d_state state_dim ssm_size",
    "model.attn_layers": "attention attention_layers attn attn_layer_idx",
    "model.mixer": "layer ssm ssm_layer",
    "model.embedding_dropout": "dropout embd_pdrop",
    "model.residual_dropout": "dropout resid_pdrop",
    "model.attention_dropout": "dropout attn_pdrop attn_dropout",
}


def called_here(name: str) -> list[str]:
    """The settings, with their sections, that go by another name elsewhere; none if it is not known.

    Args:
        name: Without a section; case and hyphens do not count.
    """
    plain = name.lower().replace("-", "_")
    return [ours for ours, theirs in _OTHER_NAMES.items() if plain in theirs.split()]
