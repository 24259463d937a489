"""The ``swa`` command: a room for each verb; ``common`` and ``engines`` hold what verbs share."""
