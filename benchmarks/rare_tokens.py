"""How often the tokens of unseen texts stand in the training texts, for a tokenizer with fewer and fewer merges.

python benchmarks/rare_tokens.py RECORD --data FOLDER --source TOKENIZER [--merges 4000 2000 1000 300 0] [--column text]

For each number of merges (the first row is the tokenizer as it is): tokens of a text, ids in use, and per cent of the
test split's tokens that the training split has fewer than ten times, and never. The last line is the record, as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.record import begun, finish

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.jobs.failures import shares_seen_seldom


def row(codec: TextCodec, train: list[str], test: list[str]) -> dict[str, Any]:
    """Of one number of merges."""
    rows = codec.encode(train)
    seldom, never = shares_seen_seldom(codec.vocab_size, rows, codec.encode(test))
    return {
        "merges": codec.merges,
        "tokens_a_text": round(sum(map(len, rows)) / len(rows), 1),
        "ids": len({i for ids in rows for i in ids}),
        "seldom": round(100 * seldom, 1),
        "never": round(100 * never, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--merges", type=int, nargs="*", default=[4000, 2000, 1000, 300, 0])
    parser.add_argument("--column", default="text")
    given = parser.parse_args()
    train, test = ([each[given.column] for each in read_rows(given.data, split=name)] for name in ("train", "test"))
    record = begun(source=Path(given.source).name, texts=[len(train), len(test)])
    codecs = (TextCodec.from_pretrained(given.source, merges=merges) for merges in (None, *given.merges))
    record["rows"] = [row(codec, train, test) for codec in codecs]
    finish(record, given.record)


if __name__ == "__main__":
    main()
