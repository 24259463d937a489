"""A real engine in this process."""
