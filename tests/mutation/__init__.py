"""Mutation tests of the core: which mistakes, made one by one, the named fast tests notice."""
