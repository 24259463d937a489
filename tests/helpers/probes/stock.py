"""Describe what vLLM serves for each [model, engine arguments] of a JSON object.

Run without the plugin: the yardstick of what must not change.
"""

import json
import sys

from tests.helpers.engines import describe, start_engine, stop_engine


def main() -> None:
    results = {}
    for name, (model, kwargs) in json.loads(sys.argv[1]).items():
        try:
            llm = start_engine(model, **kwargs)
            results[name] = describe(llm)
            del llm
        except Exception as error:
            results[name] = {"error": str(error)}
        stop_engine()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
