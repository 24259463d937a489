"""The ``swa`` command."""
