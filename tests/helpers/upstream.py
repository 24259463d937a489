"""What we use of other packages that they may change without notice, by where they define it.

A place is a module, or a class or function in one. ``tests/plugin/test_contracts.py`` looks for
every name there; ``test_upstream_names.py`` finds names in our sources that are missing here.
"""

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"

# Names that a class or module defines, a method assigns to ``self``, or a function to a parameter.
MEMBERS: dict[str, set[str]] = {
    # Configuration.
    "vllm.config.attention:AttentionConfig": {"backend", "backend_per_kind"},
    "vllm.config.cache:CacheConfig": {
        *("cache_dtype", "enable_prefix_caching", "kv_offloading_size", "num_gpu_blocks"),
        "sliding_window",
    },
    "vllm.config.compilation:CompilationConfig": {
        *("max_cudagraph_capture_size", "static_forward_context"),
    },
    "vllm.config.kv_events:KVEventsConfig": {"enable_kv_cache_events"},
    "vllm.config.kv_transfer:KVTransferConfig": {
        *("get_from_extra_config", "is_kv_consumer", "kv_buffer_device", "kv_connector"),
        "kv_connector_module_path",
    },
    "vllm.config.load:LoadConfig": {"load_format"},
    "vllm.config.model:ModelConfig": {
        *("architecture", "architectures", "code_revision", "config_format", "dtype"),
        *(
            "get_head_size",
            "get_num_kv_heads",
            "hf_config",
            "hf_config_path",
            "hf_overrides",
            "hf_text_config",
            "max_model_len",
        ),
        *("model", "model_impl"),
        *(
            "is_hybrid",
            "model_arch_config",
            "revision",
            "rswa_window",
            "runner_type",
            "trust_remote_code",
        ),
    },
    "vllm.config.model_arch:ModelArchitectureConfig": {"rswa_window"},
    "vllm.config.observability:ObservabilityConfig": {"enable_mfu_metrics"},
    "vllm.config.parallel:ParallelConfig": {
        *("data_parallel_backend", "data_parallel_index", "data_parallel_rank"),
        *("data_parallel_rank_local", "data_parallel_size", "data_parallel_size_local"),
        *("decode_context_parallel_size", "distributed_executor_backend", "local_engines_only"),
        *("pipeline_parallel_size", "placement_group", "prefill_context_parallel_size"),
        *("ray_runtime_env", "use_ray", "use_ubatching"),
    },
    "vllm.config.scheduler:SchedulerConfig": {
        *("async_scheduling", "disable_hybrid_kv_cache_manager", "max_num_batched_tokens"),
        "max_num_seqs",
    },
    "vllm.config.speculative:SpeculativeConfig": {
        *("draft_model_config", "kv_cache_dtype", "method", "parallel_drafting"),
        *("target_model_config", "use_eagle", "use_heterogeneous_vocab", "uses_draft_model"),
    },
    "vllm.config.vllm:VllmConfig": {
        *("additional_config", "attention_config", "cache_config", "compilation_config"),
        "get_quantization_config",
        *("instance_id", "kv_events_config", "kv_transfer_config", "load_config"),
        "max_concurrent_batches",
        *("model_config", "num_lookahead_tokens", "num_speculative_tokens"),
        *("observability_config", "parallel_config", "quant_config", "scheduler_config"),
        *("speculative_config", "use_v2_model_runner"),
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker:NixlBaseConnectorWorker": {
        *("compat_hash", "xfer_handshake_metadata"),
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector": {
        *("connector_worker", "kv_cache_config", "on_new_request", "register_kv_caches"),
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata:NixlHandshakePayload": {
        "compatibility_hash",
    },
    "vllm.distributed.parallel_state:GroupCoordinator": {
        *("cpu_group", "is_first_rank", "world_size"),
    },
    "vllm.engine.arg_utils:EngineArgs": {"add_cli_args", "create_engine_config"},
    "vllm.envs": {"VLLM_BATCH_INVARIANT"},
    "vllm.logger:_VllmLogger": {"info_once", "warning_once"},
    "vllm.platforms.interface:DeviceCapability": {"to_int"},
    "vllm.platforms.interface:Platform": {
        *("device_type", "get_device_capability", "get_device_name", "is_cpu", "is_cuda"),
        *("is_cuda_alike", "is_fp8_fnuz", "is_rocm", "ray_device_key"),
    },
    # Models.
    "vllm.model_executor.models.interfaces:SupportsMultiModal": {"get_language_model"},
    "vllm.model_executor.models.qwen2:Qwen2Model": {"layers"},
    "vllm.model_executor.models.qwen3:Qwen3Attention": {
        *("attn", "hidden_size", "o_proj", "qkv_proj", "rotary_emb"),
    },
    "vllm.model_executor.models.qwen3:Qwen3DecoderLayer": {"mlp", "self_attn"},
    "vllm.model_executor.models.qwen3:Qwen3ForCausalLM": {"model"},
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeAttention": {"attn", "rotary_emb"},
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeDecoderLayer": {"self_attn"},
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeForCausalLM": {"model"},
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeModel": {"layers"},
    "vllm.model_executor.models.qwen3_omni_moe_thinker:Qwen3MoeLLMForCausalLM": {"model"},
    "vllm.model_executor.models.qwen3_vl:Qwen3LLMForCausalLM": {"model"},
    "vllm.model_executor.models.qwen3_vl_moe:Qwen3MoeLLMForCausalLM": {"model"},
    "vllm.model_executor.models.registry:_LazyRegisteredModel": {
        *("class_name", "load_model_cls", "module_name"),
    },
    "vllm.model_executor.models.registry:_ModelRegistry": {
        *("models", "register_model", "resolve_model_cls"),
    },
    "vllm.model_executor.models.registry:_RegisteredModel": {"load_model_cls", "model_cls"},
    # Attention.
    "vllm.model_executor.layers.attention.attention:Attention": {
        *("attn_backend", "attn_type", "get_kv_cache_spec", "head_size", "impl", "kv_cache"),
        *("kv_cache_dtype", "layer_name", "num_heads", "num_kv_heads", "sliding_window"),
    },
    "vllm.model_executor.layers.attention.attention:set_default_quant_scales": {
        *("_k_scale_float", "_v_scale_float"),
    },
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase": {
        *("cos_sin_cache", "is_neox_style", "rotary_dim"),
    },
    "vllm.v1.attention.backend:AttentionBackend": {
        *("forward_includes_kv_cache_update", "get_name", "supported_dtypes"),
        "supported_kv_cache_dtypes",
    },
    "vllm.v1.attention.backend:AttentionCGSupport": {"UNIFORM_BATCH"},
    "vllm.v1.attention.backend:AttentionMetadataBuilder": {
        *("_cudagraph_support", "_init_reorder_batch_threshold", "device", "kv_cache_spec"),
        *("layer_names", "reorder_batch_threshold", "vllm_config"),
    },
    "vllm.v1.attention.backend:AttentionType": {"DECODER"},
    "vllm.v1.attention.backend:CommonAttentionMetadata": {
        *("block_table_tensor", "max_query_len", "max_seq_len", "num_actual_tokens", "num_reqs"),
        *("query_start_loc", "query_start_loc_cpu", "rswa_prefix_lens", "seq_lens"),
        "slot_mapping",
    },
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": {"get_supported_head_sizes"},
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": {
        *("do_kv_cache_update", "head_size", "scale", "sliding_window"),
    },
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": {
        *("block_size", "head_dim", "window_size"),
    },
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": {
        *("CPU_ATTN", "CUSTOM", "get_path", "is_overridden"),
    },
    "vllm.v1.attention.ops.triton_unified_attention": {"_get_tile_size"},
    "vllm.v1.attention.selector:AttentionSelectorConfig": {"use_mla"},
    "vllm.v1.worker.workspace:WorkspaceManager": {"get_simultaneous"},
    # Pages.
    "vllm.v1.core.block_pool:BlockPool": {
        *("blocks", "free_blocks", "get_cached_block", "get_new_blocks", "get_num_free_blocks"),
        *("hash_block_size", "null_block", "num_gpu_blocks", "touch"),
    },
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": {"single_type_managers"},
    "vllm.v1.core.kv_cache_manager:KVCacheManager": {"block_pool", "coordinator"},
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": {"block_hash", "block_id", "is_null", "ref_cnt"},
    f"{_MANAGER}:SingleTypeKVCacheManager": {
        *("_get_num_evictable_blocks", "_null_block", "_remove_blocks_in_range", "block_pool"),
        *("block_size", "cache_hit_alignment_tokens", "enable_caching", "kv_cache_group_id"),
        "scheduler_block_size",
        *("kv_cache_spec", "max_admission_blocks_per_request", "req_to_blocks", "use_eagle"),
    },
    "vllm.v1.kv_cache_interface:AttentionSpec": {
        *("dtype", "head_size", "num_kv_heads", "page_size_bytes"),
    },
    "vllm.v1.kv_cache_interface:KVCacheConfig": {
        *("kv_cache_groups", "kv_cache_tensors", "num_blocks", "prefix_cache_retention_interval"),
    },
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": {"kv_cache_spec", "layer_names"},
    "vllm.v1.kv_cache_interface:KVCacheSpec": {"block_size", "max_memory_usage_bytes"},
    "vllm.v1.kv_cache_interface:KVCacheTensor": {"size"},
    "vllm.v1.kv_cache_interface:KVQuantMode": {"FP8_PER_TENSOR", "NONE"},
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": {"extra_retained_tokens", "sliding_window"},
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": {
        *("check_kv_cache_spec_registry", "get_manager_class", "register"),
    },
    # Engines.
    "vllm.entrypoints.llm:LLM": {"apply_model", "get_tokenizer", "llm_engine"},
    "vllm.logprobs:Logprob": {"logprob"},
    "vllm.outputs:CompletionOutput": {"logprobs", "token_ids"},
    "vllm.outputs:RequestOutput": {"outputs", "prompt_logprobs", "request_id"},
    "vllm.sampling_params:RequestOutputKind": {"DELTA", "FINAL_ONLY"},
    "vllm.sampling_params:SamplingParams": {"extra_args", "max_tokens"},
    "vllm.v1.core.sched.output:NewRequestData": {"num_computed_tokens", "prompt_len", "req_id"},
    "vllm.v1.core.sched.output:SchedulerOutput": {
        *("num_scheduled_tokens", "preempted_req_ids", "scheduled_new_reqs"),
        "total_num_scheduled_tokens",
    },
    "vllm.v1.core.sched.scheduler:Scheduler": {
        *("add_request", "kv_cache_config", "kv_cache_manager", "max_model_len"),
        *("max_num_scheduled_tokens", "requests", "schedule", "update_from_output"),
    },
    "vllm.v1.core.sched.interface:SchedulerInterface": {"has_requests", "has_unfinished_requests"},
    "vllm.v1.engine.core:EngineCore": {"scheduler"},
    "vllm.v1.engine.core_client:InprocClient": {"engine_core"},
    "vllm.v1.engine.llm_engine:LLMEngine": {
        *("add_request", "engine_core", "has_unfinished_requests", "model_config"),
        *("model_executor", "step", "vllm_config"),
    },
    "vllm.v1.executor.abstract:Executor": {"get_class", "parallel_config"},
    "vllm.v1.executor.ray_executor_v2:RayExecutorV2": {"_build_runtime_env"},
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": {"driver_worker"},
    "vllm.v1.outputs:ModelRunnerOutput": {"req_id_to_index", "req_ids", "sampled_token_ids"},
    "vllm.v1.request:Request": {
        *("block_hashes", "is_prefill_chunk", "kv_transfer_params", "max_tokens"),
        *("num_computed_tokens", "num_output_tokens"),
        *("num_prompt_tokens", "num_tokens", "request_id", "resumable"),
        *("shared_prefix_boundary", "skip_reading_prefix_cache"),
    },
    "vllm.v1.worker.cpu_worker:CPUWorker": {"model_runner"},
    "vllm.v1.worker.gpu.input_batch:InputBatch": {"idx_mapping", "prompt_lens"},
    "vllm.v1.worker.gpu.model_states.interface:ModelState": {"device", "max_num_reqs"},
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": {"attn_groups", "model"},
    "vllm.v1.worker.utils:AttentionGroup": {"get_metadata_builder"},
    "vllm.v1.worker.worker_base:WorkerWrapperBase": {"worker"},
    # Other packages.
    "vllm.v1.metrics.perf": {"ParsedArgs", "SlidingWindowAttentionParser"},
    "prometheus_client.metrics_core:Metric": {"samples"},
    "prometheus_client.mmap_dict": {"mmap_key"},
    "prometheus_client.mmap_dict:MmapedDict": {
        *("close", "read_all_values_from_file", "write_value"),
    },
    "prometheus_client.multiprocess:MultiProcessCollector": {"merge"},
    "prometheus_client.registry": {"REGISTRY"},
    "prometheus_client.registry:Collector": {"collect"},
    "prometheus_client.registry:CollectorRegistry": {"register"},
    "prometheus_client.samples:Sample": {"labels", "name", "value"},
    "ray": {"get", "nodes", "remote"},
    "ray.exceptions": {"RayError"},
    "ray.runtime_env": {"RuntimeEnv"},
    "ray.util": {"placement_group_table"},
    "ray.util.scheduling_strategies": {"NodeAffinitySchedulingStrategy"},
    "torch.cpu": {"_init_amx"},
    "triton.backends.compiler": {"GPUTarget"},
    "triton.compiler": {"ASTSource"},
    "triton.compiler.compiler:CompiledKernel": {"__getitem__", "asm", "metadata"},
    "triton.knobs:base_knobs": {"scope"},
    "triton.knobs:runtime_knobs": {"jit_cache_hook"},
    "triton.runtime.driver:DriverConfig": {"set_active"},
    "triton.runtime.interpreter": {"InterpretedFunction"},
    "triton.runtime.jit:JITCallable": {"fn"},
    "triton.runtime.jit:JITFunction": {"run"},
    "triton.runtime.jit:JitFunctionInfo": {"name"},
    "xformers.ops.fmha": {"attn_bias", "memory_efficient_attention_forward"},
    "xformers.ops.fmha.attn_bias:BlockDiagonalMask": {
        *("from_seqlens", "make_causal_from_bottomright", "make_local_attention_from_bottomright"),
    },
    "psutil:Process": {"cmdline", "create_time", "pid"},
}

# Functions that we call, with the parameters that we pass by name.
CALLED: dict[str, set[str]] = {
    "vllm.model_executor.layers.attention.attention:Attention.__init__": {
        *("num_kv_heads", "per_layer_sliding_window", "prefix", "attn_type", "attn_backend"),
        *("cache_config", "quant_config"),
    },
    "vllm.model_executor.layers.rotary_embedding.common:ApplyRotaryEmb.forward_static": {
        *("x", "cos", "sin", "is_neox_style", "enable_fp32_compute"),
    },
    "vllm.model_executor.models.qwen3:Qwen3ForCausalLM.__init__": {"vllm_config", "prefix"},
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeForCausalLM.__init__": {"vllm_config", "prefix"},
    "vllm.v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold": {
        *("reorder_batch_threshold", "supports_spec_as_decode"),
    },
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": {
        *("layer", "key", "value", "kv_cache", "slot_mapping"),
    },
    "vllm.v1.attention.backends.registry:register_backend": {"backend", "class_path"},
    "vllm.v1.attention.backends.utils:split_decodes_and_prefills": {
        *("common_attn_metadata", "decode_threshold"),
    },
    "vllm.v1.attention.ops.triton_unified_attention:_get_tile_size": {
        *("head_size", "sliding_window", "element_size", "is_prefill"),
    },
    "vllm.v1.core.block_pool:BlockPool.free_blocks": {"ordered_blocks"},
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": {"block_hash", "kv_cache_group_ids"},
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": {"num_blocks"},
    "vllm.v1.core.block_pool:BlockPool.touch": {"blocks"},
    "vllm.v1.metrics.perf:SlidingWindowAttentionParser.parse": {"args", "vllm_config"},
    f"{_MANAGER}:SingleTypeKVCacheManager._get_num_evictable_blocks": {
        "blocks",
    },
    f"{_MANAGER}:SlidingWindowManager.reachable_block_mask": {
        *("start_block", "end_block", "alignment_tokens", "kv_cache_spec", "use_eagle"),
        *("retention_interval", "reachable_boundaries"),
    },
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.check_kv_cache_spec_registry": {
        "kv_cache_spec",
    },
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": {"uniform_type_base_spec"},
    "prometheus_client.mmap_dict:MmapedDict.write_value": {"key", "value", "timestamp"},
    "prometheus_client.mmap_dict:mmap_key": {
        *("metric_name", "name", "labelnames", "labelvalues", "help_text"),
    },
    "prometheus_client.multiprocess:MultiProcessCollector.merge": {"files"},
    "triton.compiler.compiler:CompiledKernel.__getitem__": {"grid"},
    "triton.runtime.interpreter:InterpretedFunction.run": {"grid", "warmup"},
    "triton.runtime.jit:JITFunction.run": {"grid", "warmup"},
}
