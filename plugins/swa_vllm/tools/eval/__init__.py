"""``swa eval``: one file an evaluation of what a window does to a model's answers."""
