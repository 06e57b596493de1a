"""Be ``trace-ds WORDS`` for the program that starts this, in a fork of the server at SOCKET (see :mod:`forked`).

python -SE tests/warm.py SOCKET WORDS…
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(sys.argv[1])
    request = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()  # noqa: PTH109 (pathlib takes longer)
    socket.send_fds(server, [request], [0, 1, 2])
    status = int(server.recv(16) or b"1")
os._exit(status if status >= 0 else 128 - status)
