"""Small helpers without a subject of their own: files, errors, names, progress."""
