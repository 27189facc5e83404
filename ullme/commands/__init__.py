"""The command lines; each is imported only when it is called."""
