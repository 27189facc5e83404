"""Queries that an LLM writes for documents."""
