"""Hand a question to the site's worker on this machine, and its answer back, both as they are."""

import json
from multiprocessing.connection import Client


def relay(path: str, head: str, body: bytes) -> tuple[str, bytes]:
    """A head (JSON) and a body over the Unix socket `path`, and those that come back; an error stands in the head."""
    if not path:
        return _absent("""it names no worker; start it with --node-config 'fedtrio="/path/to/site.sock"'""")
    try:
        with Client(path, "AF_UNIX") as line:
            line.send_bytes(head.encode())
            line.send_bytes(body)
            return line.recv_bytes().decode(), line.recv_bytes()
    except EOFError:
        return _absent(f"the site's worker at {path} ended before it answered")
    except OSError as error:
        why = error.strerror or type(error).__name__
        return _absent(f"no site's worker at {path} ({why}); start `fedtrio site --local {path}` there")


def _absent(reason: str) -> tuple[str, bytes]:
    return json.dumps({"error": "absent", "reason": reason}), b""
