"""What the page managers count, and how a server and its operator come to read it."""
