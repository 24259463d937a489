"""The modules that are mutated, part by part, and for each the fast tests that shall notice."""

KV_CACHE = "plugins/swa_vllm/kv_cache/"
CPU = "plugins/swa_vllm/attention/cpu/"
TRITON = "plugins/swa_vllm/attention/triton/"

_WINDOW = ("tests/backend/test_window.py",)
_PAGES = ("tests/backend/test_pages.py",)
_MACHINE = (
    "tests/plugin/test_page_machine.py::test_grants_leave_half_of_the_pool_free",
    "tests/plugin/test_page_machine.py::test_a_session_goes_on_in_a_pool_for_one_request",
    "tests/plugin/test_page_machine.py::test_mistakes_are_caught",
)
_MANAGER = ("tests/plugin/test_manager.py",)
_UPSTREAM = tuple(
    f"tests/plugin/upstream/test_{name}.py"
    for name in ("one_manager", "prefix_cache", "specs", "admission")
)
_KV_CACHE = (*_MANAGER, *_UPSTREAM, *_MACHINE)
_BAD_INPUT = "tests/bad_input/test_bad_input.py::test_"
_LAYERS = ("tests/backend/test_options.py", f"{_BAD_INPUT}configs", f"{_BAD_INPUT}engines")
_REFUSALS = (
    "tests/plugin/test_refusals.py",
    f"{_BAD_INPUT}engines",
    f"{_BAD_INPUT}surroundings",
    f"{_BAD_INPUT}checkpoints",
    f"{_BAD_INPUT}what_the_rows_start_from_is_served",
    "tests/plugin/test_triton_builder.py::test_refused_on_old_gpus_and_with_foreign_caches",
    "tests/plugin/test_triton_builder.py::test_foreign_caches_that_the_checkpoint_asks_for_are_refused",
    "tests/engine/test_sinks.py::test_refused_where_vllms_own_backend_serves",
    "tests/engine/test_prefill_pages.py::test_other_systems_are_refused",
    "tests/engine/test_prefill_pages.py::test_no_gpu_backend_stores_every_page",
)
_CPU = ("tests/plugin/test_cpu_builder.py", "tests/plugin/test_metadata.py")
_TRITON = ("tests/plugin/test_triton_builder.py",)

# Of one part all mutants are run, of the others a seeded sample.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "pages": {
        "swa_backend/window.py": (*_WINDOW, *_PAGES),
        "swa_backend/pages.py": (*_PAGES, *_KV_CACHE),
        KV_CACHE + "ledger.py": _KV_CACHE,
    },
    "manager": {
        "swa_backend/request_pages.py": ("tests/backend/test_request_pages.py",),
        "swa_backend/lost_prefix.py": ("tests/backend/test_lost_prefix.py", *_MANAGER),
        KV_CACHE + "spec.py": ("tests/plugin/test_spec.py", *_KV_CACHE),
        KV_CACHE + "manager.py": _KV_CACHE,
        KV_CACHE + "prefix_hits.py": _KV_CACHE,
    },
    "config": {
        "swa_backend/layers.py": _LAYERS,
        "plugins/swa_vllm/refusals.py": _REFUSALS,
    },
    "attention": {
        TRITON + "builder.py": _TRITON,
        TRITON + "scratch.py": _TRITON,
        **{
            f"{CPU}{name}.py": _CPU
            for name in (
                *("builder", "scratch", "ghost_tail", "position_shift", "batches"),
                "page_layout",
            )
        },
    },
}
WHOLE = "pages"
SAMPLE_SIZE = 220  # of each other part
SEED = 20


def module_name(path: str) -> str:
    """The name by which the file at ``path`` is imported."""
    return path.removeprefix("plugins/").removesuffix(".py").replace("/", ".")
