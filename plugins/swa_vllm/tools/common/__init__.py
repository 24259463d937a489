"""What several verbs need and no engine: arguments, arithmetic, tables, pictures, times."""
