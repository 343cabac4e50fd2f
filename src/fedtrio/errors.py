"""Errors meant for people: what is wrong, where, and what would be right, in one or two lines.

Each class carries the exit code with which the command line ends; `docs/errors.md` lists them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedtrioError(Exception):
    """Base of every error that the user can mend."""

    exit_code = 70


class ConfigError(FedtrioError):
    """The command line or the configuration file asks for something that does not exist or cannot be."""

    exit_code = 2


class DataError(FedtrioError):
    """The data cannot be read, or cannot be used as configured."""

    exit_code = 3


class ModelError(FedtrioError):
    """The model or tokenizer cannot be loaded, adapted or cut as configured."""

    exit_code = 4


class MessageError(FedtrioError):
    """A frame that crossed the wire is not what the protocol allows."""

    exit_code = 5


class WireError(FedtrioError):
    """The other side can't be reached, or refuses."""

    exit_code = 6


class QuorumError(FedtrioError):
    """Too few sites were left to end a round."""

    exit_code = 7


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` where a known word is near, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
