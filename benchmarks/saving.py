"""Where the raw result of a benchmark goes."""

from pathlib import Path

from files import write_json


def save(result: dict, name: str, out: Path | None = None, table: str | None = None) -> None:
    """Write a result, by default into results/, and its Markdown table beside it; say where.

    The name is that of the benchmark, its part and device; the result's own date is appended.
    """
    out = out or Path(__file__).parent / "results" / f"{name}_{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, out)
    if table is not None:
        out.with_suffix(".md").write_text(table)
    print(f"wrote {out}")
