"""Read one source, a local file or a split of a Hub dataset, into plain columns.

Local files are read with the standard library (Parquet with pyarrow), not with `datasets.load_dataset`: that
reports every use to a host on the internet, shifts the columns of a CSV whose rows are longer than its
header, and turns JSON columns of mixed types into quoted text. Here a value stays what the file says, and a
broken file is reported with the line that breaks it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtrio.errors import DataError, did_you_mean
from fedtrio.hub import hub_or_cache

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
MAX_HUB_ID = 200  # the Hub's own limit is 96 letters for the name alone
MAX_CSV_FIELD = 2**31 - 1  # the csv module's own limit of 128 KiB is less than a long document

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """Named columns of equal length; `where` names the source in messages."""

    where: str
    columns: Columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[Any]:
        """The values of one column, or a `DataError` that lists the columns there are."""
        if name not in self.columns:
            found = ", ".join(self.columns)
            near = did_you_mean(name, self.columns)
            raise DataError(f"{self.where}: no column {name!r}; found: {found}{near}")
        return self.columns[name]


def is_file(source: str, base: Path) -> bool:
    """Whether `source` means a local file: it exists, or is spelled like one (a known suffix, a path)."""
    spelled = Path(source).suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(source) or len(source) > MAX_HUB_ID
    return spelled or os.path.exists(base / source)  # which, unlike Path.exists, raises nothing


def read_file(path: Path) -> Table:
    """Read a CSV, TSV, JSON, JSONL, Parquet or text file of at least one row; else a `DataError`."""
    _check_exists(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        columns = _read_parquet(path)
    else:
        text = _decoded(path)
        if suffix == ".txt":
            columns = {"text": [line.rstrip("\r") for line in text.split("\n") if line.strip()]}
        elif suffix in (".json", ".jsonl"):
            columns = _read_json(path, text)
        else:
            columns = _read_csv(path, text, delimiter="\t" if suffix == ".tsv" else ",")
    table = Table(str(path), columns)
    if len(table) == 0:
        raise DataError(f"{path}: no rows" + (f", only a header ({', '.join(columns)})" if columns else ""))
    return table


def read_hub(source: str, split: str) -> Table:
    """Read one split of the Hub dataset `id` or `id:config`, from the cache where the Hub is out of reach.

    Class labels that the Hub stores as numbers come back as their names. Raises `DataError` within seconds
    when the dataset is neither reachable nor cached, and when the configuration or split does not exist.
    """
    import datasets.config  # late: it takes a second
    from datasets.exceptions import DatasetsError

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # ask the Hub for the data, and tell no other host
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    name, _, config = source.partition(":")
    where = f"Hub dataset {source!r}, split {split!r}"
    try:
        with hub_or_cache(name, "dataset"):
            loaded = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{where}: {_first_line(error)}\n"
            "Check the id and the network, or download the data and name a local CSV, JSONL or Parquet file."
        ) from error
    columns = {column: list(loaded[column]) for column in loaded.column_names}
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):  # -1 stands for "no label"
            columns[column] = [None if i is None or i < 0 else feature.names[i] for i in columns[column]]
    return Table(where, columns)


def _check_exists(path: Path) -> None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.isdir(path.parent):
            raise DataError(f"{path}: no such file; the folder {path.parent} does not exist either") from None
        near = did_you_mean(path.name, (p.name for p in path.parent.iterdir() if p.exists()))
        raise DataError(f"{path}: no such file{near}") from None
    except UnicodeEncodeError:
        said = (
            f"this terminal's encoding, {sys.getfilesystemencoding()}, lacks a letter of the name; set LC_ALL=C.UTF-8"
        )
        raise DataError(f"{path}: {said}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: is a folder; name a file in it ({', '.join(SUFFIXES)})")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: is a pipe or a device; name a file")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(SUFFIXES)}")


def _decoded(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: byte 0x{data[error.start]:02x} (offset {error.start}) is not UTF-8; "
            "save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def _read_csv(path: Path, text: str, delimiter: str) -> Columns:
    """All values as strings. A short row lacks its last values; a long one is an error."""
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: list[list[str | None]] = []
    try:
        for row in reader:
            if len(row) <= 1 and not "".join(row).strip():
                continue  # a blank line
            if not header:
                header = [name.strip() for name in row]
                _check_separator(path, header, delimiter)
            elif len(row) > len(header):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row)} values for {len(header)} columns; "
                    f"a text with {delimiter!r} in it must stand in double quotes"
                )
            else:
                rows.append([*row, *[None] * (len(header) - len(row))])
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV: {error}") from None
    if twice := [name for name, count in Counter(header).items() if count > 1 and name]:
        raise DataError(f"{path}: the header names {twice[0]!r} twice")
    return {name: [row[i] for row in rows] for i, name in enumerate(header) if name}


def _check_separator(path: Path, header: list[str], delimiter: str) -> None:
    """A single column with other separators in its name is several, as spreadsheets in half of Europe write them."""
    other = next((mark for mark in ",;\t" if mark != delimiter and len(header) == 1 and mark in header[0]), None)
    if other:
        raise DataError(
            f"{path}: the header has {other!r} between its columns; a {path.suffix.lower()} must have {delimiter!r}"
        )


def _read_json(path: Path, text: str) -> Columns:
    """One list of objects, or one object in each line. A key that an object lacks is None there."""
    rows: list[Any] = []
    for before, piece in enumerate([text] if text.lstrip().startswith("[") else text.split("\n")):
        value = _json_value(path, before, piece) if piece.strip() else []
        rows += value if isinstance(value, list) else [value]
    halves = re.search(r"\\u[dD][89a-fA-F]", text)  # halves of a character are text to JSON, and to nobody else
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is of type {type(row).__name__}, not an object {{...}}")
        if halves and (half := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))):
            raise DataError(f"{path}: row {number} holds half a character, \\u{ord(half[0]):04x}; write all of it")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _json_value(path: Path, before: int, piece: str) -> Any:
    """One JSON value that starts after `before` lines; a `DataError` names the line that breaks it."""
    try:
        return json.loads(piece)
    except json.JSONDecodeError as error:
        line, what = before + error.lineno, f"column {error.colno} is not JSON: {error.msg}"
    except ValueError:  # Python's guard against numbers that take forever to read
        limit = sys.get_int_max_str_digits()
        digits = re.search(rf"\d{{{limit + 1},}}", piece)
        line = before + 1 + piece.count("\n", 0, digits.start() if digits else 0)
        what = f"a number has more than {limit} digits; write it as text, in double quotes"
    except RecursionError:
        line = before + 1 + piece.count("\n", 0, _deepest(piece))
        what = "lists or objects stand within each other hundreds of times; a row is one flat object {...}"
    raise DataError(f"{path}: line {line}, {what}" if "column" in what else f"{path}: line {line}: {what}")


def _deepest(text: str) -> int:
    """Where brackets first stand 500 deep; strings with brackets in them may make it a little early."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth == 500:
            return bracket.start()
    return 0


def _read_parquet(path: Path) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
