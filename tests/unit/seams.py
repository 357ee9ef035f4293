"""Every place that relies on the inside of another package: what, where and why. Data for tests/unit/test_seams.py.

Functions that are called as their package documents them are not listed. A source is `module:qualified.name`. The test
pins each by digests of its syntax tree (tests/unit/seam_digests.py), one for each form that it has in supported
versions, and fails where the installed source has another. A source that is "replaced" is only required to exist.

An upgrade: run the test with the new version, read each source that changed against what is said here, adapt the file
that relies on it, and once the functional tests pass, add the digests that `python -m tests.unit.test_seams` prints.
Digests of versions that are no longer supported go.
"""

# Read in megatron-core 0.19.0 and 0.19.2, and torch 2.11.0, 2.12.0, 2.13.0 and 2.14.1; other versions are accepted if
# their sources are the same.

_CORE = "megatron.core."
_CHECKPOINTS = "megatron.core.dist_checkpointing."
_LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module:LanguageModule."
_MTP = "megatron.core.transformer.multi_token_prediction:"
_BLOCK = "megatron.core.transformer.transformer_block:TransformerBlock."
_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer."
_TRAINING = "megatron.training.training:"
_GDN = "megatron.core.ssm.gated_delta_net."
_DCP = "torch.distributed.checkpoint."

# Of each file of megatron_vlbridge, the sources that it relies on, and what it relies on.
SEAMS: dict[str, dict[str, str]] = {
    "model/deepstack.py": {
        _LAYER + "__init__": "subclassed with one more keyword argument; layer_number counts from 1 over all stages",
        _LAYER + "forward": "returns (hidden_states, context); packed_seq_params is a keyword argument",
        _LAYER + "_forward_attention": "context is returned as it came where cross_attention is IdentityOp",
        _BLOCK + "forward": (
            "hands context from layer to layer; reads input_tensor on later stages; extract_layer_indices gives a tuple"
        ),
        _CORE + "recompute:checkpointed_forward": (
            "context goes through recomputation as a tensor argument, packed_seq_params in the closure"
        ),
    },
    "model/language.py": {
        _BLOCK + "has_final_layernorm_in_this_stage": (
            "with an MTP layer the decoder's final norm is on the stage of the last decoder layer"
        ),
        _LANGUAGE_MODULE + "__init__": (
            "subclassed; sets cp_group, tp_group, pp_group and embd_group from pg_collection"
        ),
        _LANGUAGE_MODULE + "_is_in_embd_group": "reads mtp_process, vp_stage and vp_size",
        _LANGUAGE_MODULE + "setup_embeddings_and_output_layer": (
            "reads pre_process, post_process, mtp_process and share_embeddings_and_output_weights; marks the parameters"
        ),
        _LANGUAGE_MODULE + "shared_embedding_or_output_weight": (
            "the embedding's weight on a stage that has one, else the head's"
        ),
        _LANGUAGE_MODULE + "sharded_state_dict": (
            "stores the copies of the embedding once; expects no head weight beside a tied embedding"
        ),
        _LANGUAGE_MODULE + "compute_language_model_loss": (
            "overridden and called: labels [b, s] and logits [s, b, V / tp] give losses [b, s]; counts padded columns"
        ),
    },
    "model/lora/adapter.py": {
        _CORE + "tensor_parallel.layers:set_tensor_model_parallel_attributes": (
            "marks what is split over tensor-parallel ranks, for the norm of the gradients"
        ),
        _CORE + "distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads": (
            "adds up the gradients of parameters marked sequence_parallel"
        ),
        _CORE + "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher": (
            "gathers the tokens of an expert over the ranks of its tensor parallelism, and adds up its outputs"
        ),
    },
    "model/lora/attach.py": {
        _CORE + "tensor_parallel.layers:ColumnParallelLinear.__init__": "marks the weight: partition_dim 0, allreduce",
        _CORE + "tensor_parallel.layers:RowParallelLinear.__init__": "marks the weight: partition_dim 1, allreduce",
        _CORE + "transformer.mlp:MLP.forward": "calls linear_fc1 and linear_fc2, so that their forward hooks run",
    },
    "model/lora/entries.py": {
        _CHECKPOINTS + "mapping:ShardedTensor": "axis_fragmentations None: parts of any length",
        _CHECKPOINTS + "mapping:apply_factory_merges": "merge_fn gets what build_fn gave, loaded",
        _CHECKPOINTS + "optimizer:get_param_id_to_sharded_param_map": (
            "finds a parameter's entry where it is the entry's data"
        ),
    },
    "model/mtp.py": {
        _MTP + "process_mtp_loss": "reimplemented: the weight of the MTP loss and what goes to the log",
        _MTP + "MultiTokenPredictionLayer._concat_embeddings": (
            "reimplemented: embedding before hidden state, gathered over the tensor-parallel ranks"
        ),
        _MTP + "MultiTokenPredictionLayer.sharded_state_dict": "reimplemented: the storage name transformer_layer",
        _MTP + "MultiTokenPredictionBlock.sharded_state_dict": "reimplemented: the storage name mtp.layers.0",
        _MTP + "MTPLossLoggingHelper": (
            "save_metrics_to_tracker sums per layer; the log divides by the micro-batches and averages over avg_group"
        ),
        _MTP + "MTPLossAutoScaler": (
            "backward gives the MTP loss a gradient of main_loss_backward_scale, which Megatron's schedules set"
        ),
    },
    "model/recompute.py": {
        _CORE + "tensor_parallel.random:CheckpointFunction": (
            "recomputed parameters get gradients only if a tensor argument requires one"
        ),
    },
    "model/rope.py": {
        _CORE + "transformer.attention:SelfAttention.get_query_key_value_tensors": (
            "overridden: the first two results are query and key after their norms"
        ),
        _CORE + "transformer.attention:Attention.forward": (
            "calls get_query_key_value_tensors once, and rotates nothing where rotary_pos_emb is None"
        ),
    },
    "model/router.py": {
        _CORE + "transformer.moe.router:TopKRouter._apply_aux_loss": (
            "private, overridden since it counts tokens after an all-reduce in place; drop the override when fixed"
        ),
        _CORE + "transformer.moe.router:TopKRouter._apply_seq_aux_loss": (
            "private, overridden since it takes a pack as one sequence"
        ),
        _CORE + "transformer.moe.router:TopKRouter._apply_global_aux_loss": (
            "private, overridden for the same count of tokens; adds to global_tokens_per_expert, a buffer that is cast"
        ),
        _CORE + "distributed.finalize_model_grads:reset_model_temporary_tensors": (
            "zeroes global_tokens_per_expert after each global batch"
        ),
        _CORE + "transformer.moe.router:TopKRouter.attach_and_log_load_balancing_loss": (
            "multiplies by valid_token_count and by the ranks"
        ),
        _CORE + "transformer.moe.moe_utils:switch_load_balancing_loss_func": (
            "the loss from summed probabilities, counts of choices and a number of tokens"
        ),
    },
    "model/specs.py": {
        _CORE + "transformer.moe.moe_layer:MoELayer.__init__": (
            "builds the router from submodules.router, and no shared experts where the config has none"
        ),
        _LAYER + "sharded_state_dict": "sharded_state_dict_keys_map renames a module's entries",
    },
    "model/vlm.py": {
        _CORE + "distributed.finalize_model_grads:_allreduce_word_embedding_grads": (
            "takes pre_process, share_embeddings_and_output_weights and shared_embedding_or_output_weight of the model"
        ),
        _CORE + "pipeline_parallel.schedules:forward_step": (
            "calls set_input_tensor of the model, with a list or a tensor"
        ),
        _CORE + "pipeline_parallel.schedules:forward_step_calc_loss": (
            "sets the scales of the MTP and router losses by config; takes vp_stage of the model"
        ),
    },
    "model/linear_attention.py": {
        _GDN + "gdn:GatedDeltaNet.forward": (
            "subclassed; packs by cu_seqlens_q_padded through _resolve_cu_seqlens, whose two results it compares"
        ),
        _GDN + "common:_GDNBase.__init__": "builds out_norm(config, hidden_size, eps); makes A_log in params_dtype",
        _GDN + "common:_GDNBase._resolve_cu_seqlens": "overridden: checks the lengths with host syncs",
        _GDN + "common:_GDNBase._apply_gated_norm": "multiplies what out_norm gives by the gate in fp32",
        _GDN + "common:_GDNBase._compute_g_and_beta": "takes the exponential of A_log in its own dtype",
        _GDN + "common:_GDNBase.sharded_state_dict": "stores the parts of in_proj and conv1d under their own names",
        "torch.nn.modules.module:Module._apply": "overridden: moves and casts all parameters of a module",
    },
    "backends/delta_rule.py": {
        _GDN + "common:HAVE_FLA": "replaced: True, as the kernels are there",
        _GDN + "common:l2norm": "replaced by the reference",
        _GDN + "gdn:causal_conv1d": "replaced by the reference",
        _GDN + "gdn:chunk_gated_delta_rule": "replaced by the reference",
    },
    "backends/packed.py": {
        _CORE + "packed_seq_params:PackedSeqParams": "subclassed with more fields; all of its own have defaults",
    },
    "backends/cpu_runtime.py": {
        _CORE + "tensor_parallel.random:_set_cuda_rng_state": (
            "private, replaced by torch's state of the CPU; called with (new_state, device, graph_safe)"
        ),
        _CORE + "tensor_parallel.random:_get_share_storage": (
            "private, replaced: compiles what gives a tensor the storage of another"
        ),
        _CORE + "tensor_parallel.random:CheckpointWithoutOutputFunction": (
            "uses FP8GlobalStateManager, undefined without Transformer Engine, although there is no FP8"
        ),
        _CORE + "tensor_parallel.random:CheckpointWithoutOutput": (
            "fp8 is always true; uses fp8_autocast and activation_recompute_forward, undefined like these"
        ),
        _CORE + "jit:enable_jit_fuser": "binds torch.compile when Megatron is imported; replaced before",
        _CORE + "optimizer.clip_grads:clip_grad_by_total_norm_fp32": (
            "compares Tensor.type() with the name of a CUDA tensor"
        ),
        "torch.overrides:TorchFunctionMode": "a mode sees every function with a device",
        "torch:compile": "replaced",
        "torch.cuda:current_device": "replaced, like its neighbours in _cuda_replacements",
        "torch.cuda.random:get_rng_state": "replaced",
        "torch.cuda.nvtx:range_push": "replaced",
        "torch.cuda.nvtx:range_pop": "replaced",
    },
    "backends/cpu_adam.py": {
        _CORE + "optimizer:Adam": "replaced by an Adam with the state of FusedAdam",
        _CORE + "optimizer:USING_PYTORCH_OPTIMIZER": "replaced: False, as for FusedAdam",
        _CORE + "optimizer.distrib_optimizer:Adam": "replaced by the same Adam",
        _CORE + "optimizer.distrib_optimizer:HAVE_APEX_OR_TE": "replaced: True, as for FusedAdam",
        _CORE + "optimizer.distrib_optimizer:USING_TE_OPTIMIZER": "replaced: True, as for FusedAdam",
        _CORE + "optimizer:_get_megatron_optimizer_based_on_param_groups": (
            "builds Adam(param_groups, lr, weight_decay, betas, eps, adam_w_mode) where USING_PYTORCH_OPTIMIZER is off"
        ),
        "torch.optim.adam:adam": "one step of Adam, decoupled_weight_decay for AdamW; adds one to each of state_steps",
    },
    "backends/cpu_saving.py": {
        "megatron.training.checkpointing:schedule_async_save": "replaced by itself and a wait",
        "megatron.training.async_utils:maybe_finalize_async_save": "waits until all scheduled checkpoints are written",
        _CHECKPOINTS + "strategies.filesystem_async:FileSystemWriterAsync.prepare_write_data": (
            "does not copy tensors of the CPU; drop the wait when it does"
        ),
        _CHECKPOINTS + "strategies.filesystem_async:_results_queue": "replaced by one of another manager",
        _CHECKPOINTS + "strategies.filesystem_async:get_write_results_queue": "gives _results_queue where it is set",
    },
    "backends/gloo.py": {
        _CORE + "tensor_parallel.mappings:_AllToAll": (
            "calls torch.distributed.all_to_all_single by its module, with split sizes that may be tensors"
        ),
        "torch.distributed.distributed_c10d:all_to_all_single": "replaced, called with its own",
        "torch.distributed.distributed_c10d:all_gather": "replaced, called with its own",
        "torch.distributed.distributed_c10d:reduce_scatter": "replaced, called with its own",
    },
    "checkpoint/live/shards.py": {
        _CHECKPOINTS + "mapping:is_main_replica": "a replica_id of zeros is the main one",
        _CHECKPOINTS + "mapping:ShardedTensorFactory": "build() gives the entries that are stored",
    },
    "checkpoint/torch_dist/writer.py": {
        _CHECKPOINTS + "mapping:ShardedObject": "its storage key is key/shard_offset_shape",
        _DCP + "filesystem:FileSystemWriter.__init__": "subclassed; sync_files and per_thread_copy_ahead",
        _DCP + "filesystem:_FileSystemWriter": (
            "one file per writer, named by prepare_global_plan; storage_meta is overridden; finish writes the metadata"
        ),
        _DCP + "filesystem:_write_item": "private: asks the planner's resolve_data for a tensor only when it writes it",
        _DCP + "default_planner:DefaultSavePlanner.__init__": (
            "subclassed without arguments; resolve_data is overridden"
        ),
    },
    "checkpoint/torch_dist/metadata.py": {
        _CHECKPOINTS + "strategies.torch:MCoreMetadata": "a class in the pickle of the metadata, read as DCP's",
        _CHECKPOINTS + "strategies.torch:MCoreSavePlan": "a class in the pickle of the metadata, read as DCP's",
        _DCP + "metadata:_MEM_FORMAT_ENCODING": "private: an enum in the pickle of TensorProperties",
        _DCP + "metadata:TensorProperties": "its pickled state is a tuple whose last but one item is the memory format",
        _DCP + "filesystem:_StorageInfo": "private: relative_path, offset and length of an entry",
    },
    "checkpoint/torch_dist/reader.py": {
        _DCP + "filesystem:FileSystemReader._slice_file": "private: a stream of one entry's bytes",
        _DCP + "filesystem:FileSystemReader.set_up_storage_reader": "sets storage_data; read_metadata is overridden",
        "torch.serialization:_load": (
            "a storage on the meta device has _checkpoint_offset, where its values begin in the file"
        ),
    },
    "checkpoint/live/weights.py": {
        _CORE + "distributed.distributed_data_parallel:DistributedDataParallel.start_param_sync": (
            "force_sync=True waits for parameters that overlap_param_gather has not gathered"
        ),
    },
    "training/pretrain.py": {
        _TRAINING + "pretrain": "calls initialize_megatron by its global name; builds the model before the datasets",
        "megatron.training.initialize:initialize_megatron": "replaced by itself with allow_no_cuda=True",
        _TRAINING + "get_megatron_optimizer_config": "replaced by itself with more groups of parameters",
        _CORE + "datasets.utils:compile_helpers": "replaced where the helpers are built",
        _CORE + "optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_dp_reshardable": (
            "copies into views of fp32 weights without no_grad, in which it is wrapped; drop the wrapper when fixed"
        ),
    },
    "training/step.py": {
        _TRAINING + "train_step": "the loss of the log is the sum of the sums divided by that of the counts",
        _TRAINING + "evaluate": "the same of the micro-batches of all evaluation iterations",
    },
    "training/metrics/meter.py": {
        _TRAINING + "print_rank_last": "replaced by itself with more fields in the line of an iteration",
        _TRAINING + "train": "keeps a finalize_model_grads_func that the config of the first chunk has",
        _CORE + "rerun_state_machine:RerunStateMachine.should_run_forward_backward": (
            "current_iteration counts from 1, and a step that is run again has the same"
        ),
    },
    "training/media_guard/guard.py": {
        _CORE + "pipeline_parallel.schedules:forward_backward_no_pipelining": (
            "reads finalize_model_grads_func of the config after the last backward, and gives it a list of the chunks"
        ),
        _CORE + "pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": "as without pipelining",
        _CORE + "pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving": (
            "as without pipelining; the config is that of the first chunk, which is also the first to run"
        ),
        _CORE + "pipeline_parallel.schedules:backward_step": (
            "gives None where the received tensor got no gradient; none is sent then, and the previous stage waits"
        ),
    },
    "training/media_guard/probe.py": {
        _CORE + "transformer.module:MegatronModule.set_is_first_microbatch": (
            "sets is_first_microbatch, which modules of Transformer Engine clear in their forward"
        ),
    },
    "training/manifest.py": {
        _TRAINING + "save_checkpoint_and_time": (
            "calls save_checkpoint, replaced, by the name in this module, with the iteration first"
        ),
        "megatron.training.checkpointing:save_checkpoint": (
            "has made the iteration's folder when it returns, also of an asynchronous save"
        ),
    },
    "training/datasets.py": {
        _TRAINING + "get_train_valid_test_num_samples": (
            "the counts with which Megatron later calls the dataset provider"
        ),
        _TRAINING + "update_train_iters": "writes train_iters into the global arguments",
        _TRAINING + "build_train_valid_test_data_loaders": (
            "which ranks call the provider, and that the first rank decides on evaluation"
        ),
    },
    "training/launch/lora.py": {
        "megatron.training.checkpointing:generate_state_dict": "stores what the model's sharded_state_dict has",
    },
    "training/launch/start.py": {
        _TRAINING + "get_optimizer_param_scheduler": (
            "takes an optimizer that only has param_groups; writes defaults into the arguments"
        ),
        "megatron.training.checkpointing:load_checkpoint": (
            "ends the process with SystemExit; recognised by this function's name in the traceback"
        ),
    },
    "training/console.py": {
        _TRAINING + "training_log": "the text of an iteration's line, read by training/log_lines.py",
        "megatron.training.utils.common_utils:print_rank_0": "recognised by its name in the frame that prints",
        "megatron.training.utils.common_utils:print_rank_last": "recognised by its name in the frame that prints",
    },
    "training/launch/preflight.py": {
        _CORE + "transformer.pipeline_parallel_layer_layout:PipelineParallelLayerLayout.validate_layer_layout": (
            "raises AssertionError with a text for the user"
        ),
    },
    "training/failure.py": {
        "torch.distributed.elastic.multiprocessing.errors:ChildFailedError": (
            "torchrun shows the message and py_callstack of the file that a rank writes"
        ),
    },
    "training/launch/parser.py": {
        "argparse:HelpFormatter._get_help_string": "private, overridden",
        "argparse:_ActionsContainer.__init__": "private: keeps the options of a parser in _option_string_actions",
    },
}
