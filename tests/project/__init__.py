"""The distribution and this repository: packaging, pages, security."""
