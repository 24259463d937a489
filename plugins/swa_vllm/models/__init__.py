"""Windowed model classes."""
