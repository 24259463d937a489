"""What several verbs share and what needs no engine: options, arithmetic, tables, pictures."""
