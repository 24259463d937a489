"""``swa tune``: the window that an operator's own traffic asks for; the search, and its command."""
