"""Asks the server to run the tests of the module that is mutated now: Cosmic Ray's test command."""

import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    answer = b"".join(iter(lambda: server.recv(1 << 16), b"")).decode()
status, _, printed = answer.partition("\n")
print(printed)
sys.exit(int(status))
