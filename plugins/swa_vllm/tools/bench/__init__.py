"""``swa bench``: one file a benchmark, each beside what it is compared with."""
