"""``swa eval``: a file for each evaluation of what a window does to a model's answers."""
