"""Servers and clusters, in processes of their own."""
