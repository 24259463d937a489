"""Describe what vLLM serves for a model and engine arguments, one after the other.

Run without the plugin: the yardstick of what must not change.
"""

from typing import Any

from tests.helpers.engines import describe, start_engine, stop_engine
from tests.helpers.processes import answer_questions


def _served(model: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        return describe(start_engine(model, **kwargs))
    except Exception as error:
        return {"error": str(error)}
    finally:
        stop_engine()


if __name__ == "__main__":
    answer_questions(_served)
