"""One workload, served by several arms in turns, each in a process of its own."""
