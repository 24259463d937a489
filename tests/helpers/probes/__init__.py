"""Scripts that tests run in a process of their own; each prints one line of JSON."""
