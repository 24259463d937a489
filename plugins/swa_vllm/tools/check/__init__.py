"""``swa check``: whether windows would be served correctly on this machine."""
