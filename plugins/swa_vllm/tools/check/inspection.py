"""A limit for vLLM's inspection of a model's class.

``vllm.model_executor.models.registry`` imports the class in a process of its own, so that this one
need not, and keeps what it finds in ``VLLM_CACHE_ROOT``. vLLM has no option that limits its time.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from swa_vllm.tools.common.progress import say

SILENT_S = 5.0
LIMIT_S = 300.0
_MODULE = "vllm.model_executor.models.registry"  # what the process runs
_POLL_S = 0.5


@contextmanager
def limit_inspection(silent_s: float = SILENT_S, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Within, say on stderr that vLLM inspects a class for long, and end it at last.

    Args:
        silent_s: seconds of the inspection before this is said.
        limit_s: seconds before the inspection is ended.

    Raises:
        RuntimeError: the inspection was ended.
    """
    is_over, said, ended = threading.Event(), set[int](), set[int]()

    def watch() -> None:
        while not is_over.wait(_POLL_S):
            for process in psutil.Process().children():
                with contextlib.suppress(psutil.Error):  # it has just ended
                    age = time.time() - process.create_time()
                    if age < silent_s or _MODULE not in process.cmdline():
                        continue
                    if process.pid not in said:
                        said.add(process.pid)
                        say(f"vLLM inspects the model's class in another process ({_MODULE})")
                    if age >= limit_s:
                        process.kill()
                        ended.add(process.pid)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        if not ended:
            raise
        raise RuntimeError(
            f"vLLM's inspection of the model's class ({_MODULE}) did not end within {limit_s:g} s. "
            "See what keeps Python from importing vLLM: a slow disk, a busy machine, or another "
            "plugin, which VLLM_PLUGINS=swa leaves out"
        ) from error
    finally:
        is_over.set()
        watcher.join()
