"""What two runs of one configuration share."""

from typing import Any

CLOCKED = {"client_seconds", "server_seconds", "round_seconds", "process_peak_bytes"}


def timeless(tree: Any) -> Any:
    """Results without what no two runs share: what a clock has said, and a process's memory."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key not in CLOCKED}
    return [timeless(value) for value in tree] if isinstance(tree, list) else tree
