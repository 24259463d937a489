"""Several machines: Ray's nodes, checked before workers start, and servers that exchange pages."""
