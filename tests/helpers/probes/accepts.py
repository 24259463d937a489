"""Say of each [model, engine arguments] of a JSON list on the standard input whether vLLM takes it.

Prints a JSON list: null, or the error. No engine starts.
"""

import json
import sys
from typing import Any

from vllm.engine.arg_utils import EngineArgs


def refusal(model: str, arguments: dict[str, Any]) -> str | None:
    """What vLLM says against these arguments; None if nothing."""
    try:
        EngineArgs(model, skip_tokenizer_init=True, **arguments).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    cases = json.load(sys.stdin)
    found = [refusal(*case) for case in cases]
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
