"""``ullme support``: which decoder families of transformers work, tried on tiny models."""
