"""A synthetic retrieval dataset and a tiny language model, for demonstrations and tests without a network."""
