"""The table of bad input: what is refused, and what is said of it."""
