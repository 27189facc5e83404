"""Files beside the training rows that hold a column of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ullme.data.bad_row import BadRow
from ullme.data.checked_lines import CheckedLines
from ullme.data.jsonl import iter_lines, parse_line
from ullme.data.row_index import VERSION, Writer, cached_index, file_identity


class SideFile:
    """Numbers of training rows in a JSONL file of their own; line n belongs to row n.

    A line is a number of the query, a list with one number for each positive and then each negative, or
    ``{"pos": [...], "neg": [...]}``; null where there is none. Where the lines begin is kept in
    the cache, as for the rows.

    Args:
        path: the file.
        column: its name, for messages.
        cache_dir: of the index, see :func:`ullme.data.row_index.cached_index`.

    Raises:
        ValueError: no such file.
    """

    def __init__(self, path: str, column: str, cache_dir: str | None = None) -> None:
        self.path, self.column = Path(path), column
        if not self.path.is_file():
            raise ValueError(
                f"data.columns.{column}={path!r}: no such file; check the path (it is read relative to {Path.cwd()})"
            )
        known: list[Any] = []

        def identity() -> dict[str, Any]:
            known[:] = file_identity(self.path)
            return {"version": VERSION, "files": [list(known)], "side": [], "what": "lines"}

        def build(writer: Writer) -> dict[str, Any]:
            for _, offset, _ in iter_lines(self.path):
                writer.positions.append(offset)
            return {}

        self._offsets = cached_index(identity, build, cache_dir).positions
        self._lines = CheckedLines([self.path], [known])

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> Any:
        """The value of a training row.

        Raises:
            BadRow: no line, or no JSON.
            ValueError: the file has changed.
        """
        if row >= len(self):
            raise BadRow(
                f"data.columns.{self.column}: {self.path} has {len(self)} lines, fewer than there are training rows; "
                "give one line for each row, in the order of the rows"
            )
        try:
            return parse_line(self._lines.read(0, self._offsets[row]))
        except BadRow as reason:
            self._lines.check(0)
            raise BadRow(f"data.columns.{self.column}: {self.path}, row {row + 1}: {reason}") from None

    def check(self) -> None:
        """Raises: ValueError: the file has changed."""
        self._lines.check(0)
