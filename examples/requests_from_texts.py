"""Write requests for ``swa tune``: of each piece of a text the start is the prompt.

    python examples/requests_from_texts.py MODEL OUT.jsonl TEXT... [--prompt 256] [--answer 512]

For a first look where no traffic is at hand, and to repeat the figures of ``examples/README.md``,
which are of ``tests/data/acts-1-7.txt`` and ``openings.txt``. Pieces do not overlap, and each text
is cut by itself; what does not fill a piece is left out. Requests that were really served say more.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

FEWEST = 4  # conversations that swa tune takes


def requests_of(text: str, tokenizer: Any, prompt: int, answer: int) -> Iterator[dict[str, str]]:
    """Cut a text into requests of ``prompt`` tokens with answers of ``answer`` tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # Where each token begins in the text, which so stays as it is.
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    ends = [*begins[1:], len(text)]
    for first in range(0, len(begins) - prompt - answer + 1, prompt + answer):
        cut, last = first + prompt, first + prompt + answer - 1
        yield {
            "prompt": text[begins[first] : begins[cut]],
            "answer": text[begins[cut] : ends[last]],
        }


def main() -> None:
    """Write the file and say how many requests it has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint whose tokenizer counts")
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="texts in UTF-8")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (256)")
    parser.add_argument("--answer", type=int, default=512, help="tokens of an answer (512)")
    args = parser.parse_args()
    if args.prompt < 1 or args.answer < 1:
        parser.error(
            f"--prompt and --answer must be at least 1 token, got {args.prompt} and {args.answer}"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    records = [
        record
        for path in args.texts
        for record in requests_of(
            path.read_text(encoding="utf-8"), tokenizer, args.prompt, args.answer
        )
    ]
    if len(records) < FEWEST:
        parser.error(
            f"the texts make {len(records)} requests of {args.prompt} + {args.answer} tokens, and "
            f"swa tune takes {FEWEST} at least; give more text, or a smaller --prompt or --answer"
        )
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{args.out}: {len(records)} requests of {args.prompt} + {args.answer} tokens")


if __name__ == "__main__":
    main()
