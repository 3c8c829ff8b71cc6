"""Names that transformers, Megatron-LM, torchtitan and nanoGPT have for the keys and sections of a recipe."""

_NAMES = {
    "name": "run_name experiment_name job_name",
    "model.arch": "model_type architecture architectures flavor",
    "model.dim": "hidden_size d_model n_embd embed_dim embedding_dim model_dim",
    "model.layers": "num_hidden_layers num_layers n_layers n_layer",
    "model.heads": "num_attention_heads num_heads n_heads n_head",
    "model.kv_heads": "num_key_value_heads num_kv_heads n_kv_heads num_query_groups",
    "model.key_dim": "head_dim kv_channels d_head head_k_dim",
    "model.value_dim": "head_v_dim v_head_dim",
    "model.mlp": "intermediate_size ffn_hidden_size ffn_dim hidden_dim mlp_dim d_ff n_inner",
    "model.vocab": "vocab_size padded_vocab_size",
    "model.tie": "tie_word_embeddings weight_tying enable_weight_tying untie_embeddings_and_output_weights",
    "model.rotary": "rope_theta rotary_base rope_base rotary_emb_base",
    "model.rotary_fraction": "partial_rotary_factor rotary_percent rotary_pct",
    "model.sliding_window": "window_size attention_window",
    "model.conv": "conv_size conv_kernel d_conv conv_kernel_size",
    "data.source": "dataset dataset_path dataset_name data_path train_data_path train_file data_dir",
    "data.field": "text_column text_field text_key dataset_text_field json_keys",
    "data.tokenizer": "tokenizer_path tokenizer_model tokenizer_name tokenizer_name_or_path vocab_file",
    "data.window": "seq_len seq_length sequence_length max_seq_len max_seq_length max_sequence_length max_length "
    "max_position_embeddings model_max_length context_length block_size ctx_len n_ctx",
    "data.validation": "validation_split validation_fraction",
    "data.cache": "cache_dir data_cache_path",
    "data.packing": "pack pack_sequences",
    "data.reset_at_documents": "reset_attention_mask document_mask",
    "mesh.dp": "data_parallel_size data_parallel_degree data_parallel_replicate_degree data_parallel_shard_degree "
    "dp_size dp_degree",
    "mesh.sp": "context_parallel_size context_parallel_degree context_parallel cp cp_size cp_degree "
    "sequence_parallel sequence_parallel_size sp_size sp_degree",
    "parallel.data_parallel": "zero_stage sharding_strategy fsdp use_distributed_optimizer",
    "parallel.recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint "
    "recompute_granularity recompute_method recompute_activations",
    "optim.kind": "optimizer_type optimizer_name optim_type",
    "optim.momentum": "muon_momentum",
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.min_lr": "min_lr_ratio min_lr_factor lr_min lr_min_ratio",
    "optim.schedule": "lr_scheduler lr_scheduler_type lr_schedule lr_decay_style decay_type scheduler",
    "optim.warmup": "warmup_steps warmup_iters num_warmup_steps lr_warmup_iters lr_warmup_steps warmup_ratio "
    "lr_warmup_fraction",
    "optim.decay": "decay_steps decay_ratio lr_decay_iters lr_wsd_decay_iters",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.weight_decay": "wd adam_weight_decay",
    "optim.clip": "max_grad_norm max_norm clip_grad grad_clip gradient_clip gradient_clipping gradient_clip_val",
    "train.steps": "max_steps train_iters train_steps num_train_steps num_steps total_steps max_iters iters",
    "train.batch": "global_batch_size train_batch_size batch_size gradient_accumulation_steps",
    "train.micro_batch": "micro_batch_size local_batch_size per_device_train_batch_size device_batch_size",
    "train.precision": "dtype torch_dtype bf16 fp16 mixed_precision mixed_precision_param params_dtype",
    "train.z_loss": "z_loss_weight z_loss_coef z_loss_multiplier lm_z_loss",
    "train.compile": "torch_compile",
    "train.profile": "enable_profiling profile_freq",
    "checkpoint.every": "save_interval save_steps save_every checkpoint_interval interval",
    "checkpoint.keep": "save_total_limit keep_latest_k",
    "eval.every": "eval_interval eval_steps val_interval eval_every freq",
    "eval.windows": "eval_iters",
    "track.trackers": "report_to loggers enable_tensorboard enable_wandb wandb_log",
    "track.project": "wandb_project project_name",
    "launch.timeout": "distributed_timeout_minutes ddp_timeout train_timeout_seconds init_timeout_seconds",
    "data": "datasets",
    "mesh": "distributed parallelism",
    "optim": "optimizer",
    "train": "training trainer",
    "checkpoint": "checkpointing ckpt",
    "eval": "evaluation evaluator",
    "track": "logging logger metrics",
}
OURS = {name: key for key, names in _NAMES.items() for name in names.split()}  # theirs: ours


def ours(name: str) -> str | None:
    """Return the key or the section that is called `name` elsewhere; None for a name that nobody has."""
    return OURS.get(name.strip("-").lower().replace("-", "_"))
