"""``ullme adapt``: from a folder of documents to an embedder of them and a search."""
