"""Where the raw result of a benchmark goes, and what a table of it looks like."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from files import write_json


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. ValueError for a row that has not a cell for each column."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells in a table of {len(head)} columns: {row}")
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def result_path(result: dict, name: str, out: Path | None = None) -> Path:
    """The file of a result, by default in results/; its folder is made.

    The name is that of the benchmark, its part and device; the result's own date is appended.
    """
    out = out or Path(__file__).parent / "results" / f"{name}_{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def save(result: dict, name: str, out: Path | None = None, table: str | None = None) -> None:
    """Write a result into its file, and its Markdown table beside it; say where."""
    out = result_path(result, name, out)
    write_json(result, out)
    if table is not None:
        out.with_suffix(".md").write_text(table)
    print(f"wrote {out}")
