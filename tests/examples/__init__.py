"""What is in ``examples/``, run as a user runs it."""
