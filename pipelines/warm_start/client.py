"""Stand in for `python3` in a local run: `client.py SOCKET PYTHON [-u] -m MODULE ...`.

It asks the server behind SOCKET for a fork that runs the module, gives it its own streams, passes
signals on, and ends as the fork ends. What the server does not take, PYTHON runs. Only modules that
start in no time are imported.
"""

import json
import os
import signal
import socket
import struct
import sys

# Sent to this process by a terminal, by torchrun or by `canvastune run`.
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main() -> None:
    address, python, *arguments = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX)
    process = 0
    if "-m" in arguments[:2]:
        process = _ask(connection, address, arguments)
    if not process:
        connection.close()
        os.execv(python, [python, *arguments])

    def forward(number: int, _: object) -> None:
        os.kill(process, number)

    for number in _FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    connection.sendall(b"\0")  # from here on a signal reaches the fork, which may start
    (status,) = struct.unpack("i", _receive(connection, 4) or struct.pack("i", signal.SIGKILL))
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        if ended_by not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    os._exit(os.waitstatus_to_exitcode(status) % 256)


def _ask(connection: socket.socket, address: str, arguments: list[str]) -> int:
    """Return the id of the fork; 0: the server takes no such job, or has ended."""
    job = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "leads_session": os.getsid(0) == os.getpid(),
        "ignored": [each for each in _FORWARDED if signal.getsignal(each) == signal.SIG_IGN],
    }
    text = json.dumps(job).encode()
    try:
        connection.connect(address)
        socket.send_fds(connection, [struct.pack("I", len(text))], [0, 1, 2])
        connection.sendall(text)
        (process,) = struct.unpack("i", _receive(connection, 4) or bytes(4))
    except OSError:
        return 0
    return int(process)


def _receive(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes; b"" if the other end closed."""
    found = b""
    while len(found) < size:
        try:
            part = connection.recv(size - len(found))
        except ConnectionError:
            return b""
        if not part:
            return b""
        found += part
    return found


if __name__ == "__main__":
    main()
