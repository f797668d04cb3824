"""One file of the user's to rows: CSV, TSV, JSONL, a JSON list, parquet; each row knows its line.

Everything that can be wrong with a file as a file is refused here, with file and line.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.errors import DataError

MAX_LINE_BYTES = 1_000_000
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# Only what spreadsheets write; the header decides which one it is.
_DELIMITERS = (",", ";", "\t")


@dataclass(kw_only=True, slots=True, frozen=True)
class RawRow:
    """One row as read. where: `tickets.csv:17` or `pairs.json[3]`; values: column -> cell."""

    where: str
    values: Mapping[str, object]


def text_of(value: object) -> str:
    """A cell as text: JSON for numbers, booleans, lists and objects; "" for null and nan."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (bool, int, float, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value).strip()


def read_rows(path: Path, *, name: str | None = None) -> tuple[RawRow, ...]:
    """All rows of a file; `name` is how messages call it (default: the path as given).

    Raises:
        DataError: missing, empty, not UTF-8, malformed, a huge line, an unknown suffix.
    """
    name = name or str(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            name,
            found=f"a file ending in {suffix or 'nothing'}",
            expected=f"one of {' '.join(SUFFIXES)}",
            remedy="save it as CSV (UTF-8, with a header line), or rename it if it is one of these",
        )
    readers: dict[str, Callable[[Path, str], Iterator[RawRow]]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    rows = tuple(readers[suffix](path, name))
    if not rows:
        raise DataError(
            name,
            found="a header and no row" if suffix in (".csv", ".tsv") else "no row",
            expected="at least one row a split, and some twenty for a file that is to be split",
            remedy="put one example a line into it",
        )
    return rows


def read_text(path: Path, *, name: str) -> str:
    """The file's text: UTF-8 (a byte-order mark is dropped), not empty, no huge line."""
    data = _read_bytes(path, name)
    if not data.strip():
        raise DataError(
            name, found="an empty file", expected="rows", remedy="put one example a line into it"
        )
    if path.suffix.lower() != ".json":  # a JSON list may stand on one line
        _refuse_huge_line(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}",
            found=f"byte 0x{data[error.start]:02x} at offset {error.start}, which is not UTF-8",
            expected="UTF-8 text",
            remedy=f"convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8 {name} > converted"
            f"{path.suffix} (UTF-16 if a spreadsheet wrote 'Unicode text')",
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{name}:{line}",
            found="a NUL character",
            expected="text",
            remedy=f"save it as UTF-8 text, e.g. iconv -f UTF-16 -t UTF-8 {name} > converted"
            f"{path.suffix}",
        )
    return text


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        found, remedy = "no such file", "check the path; it is taken from the current directory"
    except IsADirectoryError:
        found, remedy = "a directory", "give the file itself, or a directory as task.path"
    except PermissionError:
        found, remedy = "a file that may not be read", f"chmod +r {name}"
    raise DataError(name, found=found, expected="a file that can be read", remedy=remedy)


def _refuse_huge_line(data: bytes, name: str) -> None:
    if len(data) <= MAX_LINE_BYTES:
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{name}:{number}",
                found=f"a line of {len(line):,} bytes",
                expected=f"at most {MAX_LINE_BYTES:,} bytes a line",
                remedy="check for missing line breaks, or shorten it: no model reads that much",
            )


def _read_csv(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a CSV with a header line; a quoted cell may hold line breaks."""
    text = read_text(path, name=name)
    header_line = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header_line.count)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}:{line}",
                found=f"a malformed CSV row: {error}",
                expected='cells that hold a quote or the delimiter in quotes, "like ""this"""',
                remedy="look for an opening quote that is never closed, or save as JSONL",
            ) from None
        if cells is None:
            return
        if not cells or cells == [""]:
            continue
        if header is None:
            header = _checked_header([cell.strip() for cell in cells], f"{name}:{line}")
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{name}:{line}",
                found=f"{len(cells)} cells",
                expected=f"{len(header)} cells, as the header has: {', '.join(header)}",
                remedy=f"put cells that hold {delimiter!r} in double quotes",
            )
        yield RawRow(where=f"{name}:{line}", values=dict(zip(header, cells, strict=True)))


def _checked_header(header: list[str], where: str) -> list[str]:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice or "" in header:
        raise DataError(
            where,
            found=f"a header with {f'two columns {twice[0]!r}' if twice else 'a nameless column'}: "
            f"{', '.join(header)}",
            expected="one name for each column, all different",
            remedy="rename the columns in the first line",
        )
    return header


def _read_jsonl(path: Path, name: str) -> Iterator[RawRow]:
    for number, line in enumerate(read_text(path, name=name).split("\n"), start=1):
        if line.strip():
            where = f"{name}:{number}"
            yield RawRow(where=where, values=_object(_parsed(line, where=where, name=name), where))


def _read_json(path: Path, name: str) -> Iterator[RawRow]:
    rows = _parsed(read_text(path, name=name), where=None, name=name)
    if not isinstance(rows, list):
        raise DataError(
            name,
            found=f"a JSON {_json_type(rows)}",
            expected='a JSON list of objects: [{"prompt": "..", "completion": ".."}, ..]',
            remedy="put the rows into one list, or one object a line into a .jsonl file",
        )
    for i, row in enumerate(rows):
        yield RawRow(where=f"{name}[{i}]", values=_object(row, f"{name}[{i}]"))


def _parsed(text: str, *, where: str | None, name: str) -> object:
    """One JSON value; a syntax error names the line (given, or counted in the text)."""
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        found, line, column = "brackets nested too deeply", 1, 1
    except json.JSONDecodeError as error:
        found, line, column = error.msg, error.lineno, error.colno
    except ValueError as error:
        found, line, column = str(error), 1, 1
    else:
        return value
    is_lines = where is None and found == "Extra data"
    raise DataError(
        where or f"{name}:{line}",
        found=f"malformed JSON: {found} at column {column}",
        expected="one JSON object a line" if where else "one JSON list of objects",
        remedy="rename the file to .jsonl"
        if is_lines
        else "check quotes, commas and brackets there",
    )


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name}, which is no JSON value")


def _object(value: object, where: str) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    raise DataError(
        where,
        found=f"a JSON {_json_type(value)}",
        expected='an object: {"input": "..", "label": ".."}',
        remedy="write every row as one object with named fields",
    )


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    _read_bytes(path, name)  # the same refusals as for text
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            name,
            found="a parquet file, and no pyarrow to read it",
            expected="pyarrow",
            remedy="pip install pyarrow, or save the rows as CSV",
        ) from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            name,
            found=f"a parquet file that cannot be read: {str(error).splitlines()[0]}",
            expected="a whole parquet file",
            remedy="copy it again, or save the rows as CSV",
        ) from None
    for i, row in enumerate(rows):
        yield RawRow(where=f"{name} row {i + 1}", values=row)
