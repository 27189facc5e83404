"""``ullme doctor``: whether this machine, this installation and this configuration are in order."""
