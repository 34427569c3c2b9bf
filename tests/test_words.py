"""Sizes of memory and of files are written in one unit, by one formatter."""

import re
from pathlib import Path

import partialtune
from partialtune.words import gigabytes, megabytes

REPOSITORY = Path(__file__).parent.parent
# A size in bytes that is made into a larger unit, or a unit of which there is to be one.
BY_ITSELF = re.compile(r"/ ?(2 ?\*\* ?[23]0|1024|1e6|1e9)\b|\b[MG]iB\b")
ALLOWED = {
    "words.py": "size /",  # the formatters
    "machine.py": "/ 2**20",  # the number of MB that performance.json has
    "bench/bench_figure.py": '["peak_memory_mb"] / 1024',  # an axis in GB
    "training/settings.py": "rates[torch.",  # GFLOP/s
    "pages/insight_figures.py": "start / 1024",  # token ids
}


def test_a_size_is_written_in_mb_of_2_to_the_20_bytes_or_in_gb_of_2_to_the_30():
    assert (megabytes(823 * 2**20), megabytes(1_572_864, 1), megabytes(2**40)) == ("823 MB", "1.5 MB", "1,048,576 MB")
    assert (gigabytes(9.4 * 2**30), gigabytes(42_949_673, 2)) == ("9.4 GB", "0.04 GB")


def test_nothing_writes_a_size_by_itself():
    source, found = Path(partialtune.__file__).parent, []
    for path in sorted(source.rglob("*.*")):
        name = path.relative_to(source).as_posix()
        if path.suffix in (".py", ".j2"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if BY_ITSELF.search(line) and not (name in ALLOWED and ALLOWED[name] in line):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert found == []
    pages = [*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md")]
    assert [page.name for page in pages if re.search(r"\b[MG]iB\b", page.read_text(encoding="utf-8"))] == []
