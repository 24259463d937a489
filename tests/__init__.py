"""Tests and their helpers, a room for each kind; ``README.md`` says what is proved how."""
