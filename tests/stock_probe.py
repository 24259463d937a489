"""Describe what vLLM serves for each model of a JSON object; run without the plugin."""

import json
import sys

from engine_tools import describe, start_engine, stop_engine


def main() -> None:
    results = {}
    for name, model in json.loads(sys.argv[1]).items():
        try:
            llm = start_engine(model)
            results[name] = describe(llm)
            del llm
        except Exception as error:
            results[name] = {"error": str(error)}
        stop_engine()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
