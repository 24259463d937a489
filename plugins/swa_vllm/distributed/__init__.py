"""Several machines: Ray's nodes, logical devices for CPUs, and servers that exchange pages."""
