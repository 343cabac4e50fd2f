"""What survives a crash: files written whole or not at all, a run's committed rounds, and a site's memory of two.

A checkpoint is one safetensors file: tensors by path (`group/name`), and a JSON object in its metadata. Each commit is
a temporary file, fsync, rename, and a line in a journal with the file's SHA-256; a reader takes the last line whose
file is there and has that hash, and so falls back to the round before where a file was damaged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import ConfigError

Tree = Mapping[str, Any]  # groups of tensors, nested at will
KEPT = 2  # rounds


def unwritable(path: Path, error: OSError, option: str = "--out") -> ConfigError:
    """What to say of a file that can't be written: on a full disk another folder would lose what there is."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = "make room, then give the same command again" if full else f"choose another {option}"
    return ConfigError(f"{path} can't be written: {error.strerror}; {mend}")


def make_folder(folder: Path, option: str) -> None:
    """Raises ConfigError where there can be no such folder, or nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unwritable(folder, error, option) from error


def write_whole(path: Path, data: bytes, durable: bool = False) -> None:
    """Write to a temporary file and rename; `durable` waits until the disk has it. Raises ConfigError (see text)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise unwritable(path, error) from error


def append_line(path: Path, line: str) -> None:
    """Add one line to a journal, and wait until the disk has it. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
        with path.open("ab") as file:
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # a rename is durable when its folder is
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def pack_tree(tree: Tree, facts: Mapping[str, Any]) -> bytes:
    """A file of nested groups of tensors, and of facts that JSON can say."""
    alone = torch.contiguous_format  # copies: safetensors refuses tensors that share memory
    flat = {name: tensor.detach().cpu().clone(memory_format=alone) for name, tensor in _flat(tree)}
    return safetensors.torch.save(flat, metadata={"fedtrio": json.dumps(facts)})


def unpack_tree(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Groups of tensors and facts, as `pack_tree` was given them. Raises ValueError where it is no such file."""
    try:
        size = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedtrio"])
        tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors names its own exception
        raise ValueError(f"no checkpoint: {error}") from error
    tree: dict[str, Any] = {}
    for path in sorted(tensors):
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = tensors[path]
    return tree, facts


def _flat(tree: Tree, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in tree.items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        else:
            found += _flat(value, f"{prefix}{name}/")
    return found


class Journal:
    """Committed versions of something, the last two of which are kept: `commit`, `latest`, `rewind`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damaged: list[str] = []  # versions that could not be read, for a warning

    def commit(self, round: int, tree: Tree, facts: Mapping[str, Any]) -> None:
        """Make a version the latest one. Raises ConfigError where the folder can't be written."""
        data = pack_tree(tree, facts)
        name = f"round-{round:05d}.safetensors"
        write_whole(self._folder / name, data, durable=True)
        line = {"round": round, "file": name, "sha256": hashlib.sha256(data).hexdigest()}
        append_line(self._path, json.dumps(line))
        kept = {entry["file"] for entry in self._entries()[-KEPT:]}
        for path in self._folder.glob("round-*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def latest(self, before: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Round, groups and facts of the last version that can be read (of a round below `before`)."""
        for entry in reversed(self._entries()):
            if before is not None and entry["round"] >= before:
                continue
            path = self._folder / entry["file"]
            try:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                    raise ValueError("its hash is another")
                return entry["round"], *unpack_tree(data)
            except FileNotFoundError:
                continue  # older than the two that are kept
            except (OSError, ValueError) as error:
                self.damaged.append(f"{path}: {error}")
        return None

    @property
    def _path(self) -> Path:
        return self._folder / "journal.jsonl"

    def _entries(self) -> list[dict[str, Any]]:
        """The journal, each round once and as it was written last; torn lines are passed over."""
        found: dict[int, dict[str, Any]] = {}
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                entry = json.loads(line)
                round, name = int(entry["round"]), str(entry["file"])
            except (ValueError, KeyError, TypeError):
                continue
            if name == f"round-{round:05d}.safetensors":
                # a round that is run again makes those after it void
                found = {r: e for r, e in found.items() if r < round} | {round: entry}
        return list(found.values())


class Memory:
    """A site's memory, in versions by round: the last two, so that a server that is one round behind can go on.

    Without a folder it lives in this process alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._journal = Journal(folder) if folder else None
        self._versions: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def commit(self, round: int, memory: Tree, facts: Mapping[str, Any]) -> None:
        """Keep what the site knows at the end of a round."""
        if self._journal:
            self._journal.commit(round, memory, facts)
        else:
            earlier = [r for r in self._versions if r < round]
            self._versions = {r: self._versions[r] for r in sorted(earlier)[-(KEPT - 1) :]}
            self._versions[round] = (dict(memory), dict(facts))

    def before(self, round: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the site knew when that round began: its groups of tensors, and facts."""
        if self._journal:
            found = self._journal.latest(before=round)
            return ({}, {}) if found is None else found[1:]
        earlier = [r for r in self._versions if r < round]
        groups, facts = self._versions[max(earlier)] if earlier else ({}, {})
        return dict(groups), dict(facts)

    def saved(self) -> dict[int, bytes]:
        """The versions, packed, by round: for another process, whose memory takes them by `add`."""
        if self._journal is None:
            return {round: pack_tree(*version) for round, version in self._versions.items()}
        found: dict[int, bytes] = {}
        while (version := self._journal.latest(min(found, default=None))) is not None:
            found[version[0]] = pack_tree(*version[1:])
        return dict(sorted(found.items()))

    def add(self, round: int, version: bytes) -> None:
        """Keep a version that another process has packed. Raises ValueError where it is none."""
        self.commit(round, *unpack_tree(version))
