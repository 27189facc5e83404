"""A small synthetic world and a tiny language model, for demonstrations and tests without a network."""
