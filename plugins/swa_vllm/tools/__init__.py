"""Command line tools that need the engine."""
