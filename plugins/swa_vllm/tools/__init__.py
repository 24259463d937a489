"""The ``swa`` command: one room a verb; ``common`` and ``engines`` hold what verbs share."""
