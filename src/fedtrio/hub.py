"""The Hugging Face Hub, or its cache at once where nobody answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

HUB_TIMEOUT_SECONDS = 5.0


@contextmanager
def hub_or_cache(name: str, repo_type: Literal["model", "dataset"]) -> Iterator[None]:
    """Inside, Hugging Face's libraries use the Hub, or their cache alone where the Hub is out of reach.

    They would otherwise retry for half a minute before they look into the cache.
    """
    if _answers(name, repo_type):
        yield
        return
    import huggingface_hub

    places: list[Any] = [huggingface_hub.constants, sys.modules.get("datasets.config")]
    before = {place: place.HF_HUB_OFFLINE for place in places if place is not None}
    for place in before:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in before.items():
            place.HF_HUB_OFFLINE = value


def _answers(name: str, repo_type: str) -> bool:
    """Ask once, briefly."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=HUB_TIMEOUT_SECONDS)
    except HfHubHTTPError:
        return True  # the Hub is there and says no; the library explains
    except Exception:  # silence, in the words of whichever HTTP library the Hub client uses
        return False
    return True
