"""benchmarks/paper.py: the model explains the paper's rows, and no other file goes unnoticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import FILES, compare, main, read_measured

ROOT = Path(__file__).resolve().parents[1]
TABLE3, TABLE6 = FILES
MEDIAN = re.compile(r"^(.*\S) +median error ([\d.]+)%", re.MULTILINE)  # in what compare returns


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("paper.py: ")
    return err


@pytest.mark.parametrize(
    "path, n_rows, wrong, T_T, drafts, T_V, speedup",  # the bounds are what the project asks for
    [(TABLE3, 47, 4, 6, 8, 8, 6), (TABLE6, 4, 0, 6, 12, 6, 6)],
)
def test_the_papers_measurements_are_explained(path, n_rows, wrong, T_T, drafts, T_V, speedup):
    """One set of constants per GPU type for all of its rows; median errors in percent."""
    text = compare(read_measured(path))
    error = {name: float(percent) for name, percent in MEDIAN.findall(text)}
    assert error["T_T"] <= T_T and error["gamma T_D"] <= drafts
    assert error["T_V"] <= T_V and error["speedup"] <= speedup
    on_the_wrong_side = int(text.split("more than 0.05: ")[1].split()[0])
    assert on_the_wrong_side <= wrong and text.endswith(f"of {n_rows} rows")


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("gamma,", "gama,", "line 1: no column gamma"),
        (",8.27,8.7,0.95", ",fast,8.7,0.95", "line 2, column autoregressive_ms_per_token: 'fast'"),
        ("A100,8,1024,48", "V100,8,1024,48", "line 3, column gpu: 'V100'"),
        (",StreamingLLM,", ",H2O,", "line 2, column draft_method: 'H2O'"),
        ("9.55,2.19,", "9.55,-2,", "line 2, column tokens_per_round: '-2'"),
        ("A100,8,1024,32", "A100,8,1024,0", "line 2, column batch_size: '0'"),
        ("a,LLaMA-2-7B-32K,", "a,,", "line 2, column target: ''"),
    ],
)  # fmt: skip
def test_a_malformed_csv_is_refused_with_line_and_column(tmp_path, capsys, old, new, words):
    file = tmp_path / "m.csv"
    file.write_text(TABLE3.read_text().replace(old, new, 1))
    assert main([str(file)]) == 2
    assert words in one_line(capsys)


def test_plot_says_what_is_missing_or_writes(tmp_path, capsys):
    status = main(["--plot", str(tmp_path / "f.png")])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert status == 2 and "pip install matplotlib" in one_line(capsys)
    else:
        assert status == 0 and (tmp_path / "f.png").stat().st_size > 1000


def test_the_documents_have_the_errors_that_the_command_prints(capsys):
    document = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = document.split("\n## Does the cost model explain")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \w+ \| `(.*?)` \| (\d+) \| (.*) \|$", section, re.MULTILINE)
    assert "`python benchmarks/paper.py` " in section and main([]) == 0
    printed = capsys.readouterr().out.rstrip().split("\n\n")
    for path, table, (file, n_rows, errors) in zip(FILES, printed, rows, strict=True):
        assert (ROOT / file).samefile(path)
        assert table.startswith(path.name) and table.endswith(f"of {n_rows} rows")
        assert [percent for _, percent in MEDIAN.findall(table)] == re.findall(r"([\d.]+)%", errors)


def test_a_file_that_is_not_there_or_empty_gets_one_line(tmp_path, capsys):
    assert main(["/nowhere.csv"]) == 2 and "/nowhere.csv" in one_line(capsys)
    file = tmp_path / "m.csv"
    file.write_text(TABLE3.read_text().splitlines()[0])
    assert main([str(TABLE6), str(file)]) == 2 and "has no rows" in one_line(capsys)
    assert main(["--measured", str(file)]) == 2 and "--measured" in one_line(capsys)


def test_it_needs_no_torch():
    """Without site-packages, where torch would be."""
    command = [sys.executable, "-E", "-S", "benchmarks/paper.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0 of 4 rows" in done.stdout, done.stderr
