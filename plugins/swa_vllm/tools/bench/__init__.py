"""``swa bench``: a file for each benchmark, which parses, calls and prints."""
