"""A sample of the model types of transformers' causal mapping: what the table of all of them says still holds.

The table is tests/benchmarks/architectures.csv, and the script beside it makes it.
"""

import csv

import pytest
import transformers

from conftest import REPOSITORY
from tiny_models import MODEL_TYPES
from trials import judge

TABLE = REPOSITORY / "tests" / "benchmarks" / "architectures.csv"
MADE_WITH = "5.24."  # the version of transformers whose types are in the table
SAMPLE = (
    *("gpt2", "llama", "qwen3", "gemma3_text", "mixtral", "opt", "falcon", "rwkv", "mamba2", "jamba"),
    *("bart", "marian", "whisper", "bert", "roberta", "xlnet", "cpmant", "reformer", "musicgen", "pegasus"),
    *("deepseek_v4", "qwen3_5", "inkling2_text", "lfm3", "kolibri1"),  # the newest
)


@pytest.fixture(scope="module")
def table():
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["model_type"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_tiny_model_of_the_type_gets_the_verdict_of_the_table(model_type, table):
    found, row = judge(model_type), table[model_type]
    assert (found.verdict.partition(":")[0], found.prefix.partition(":")[0]) == (
        row["verdict"].partition(":")[0],
        row["prefix"].partition(":")[0],
    ), found


def test_the_table_holds_every_type_and_each_is_right_or_refused_in_words(table):
    known = {name.partition(",")[0] for name in table}
    strange = set(MODEL_TYPES) - known
    if transformers.__version__.startswith(MADE_WITH):
        assert not strange
    assert len(strange) < 0.2 * len(MODEL_TYPES)  # of versions that came later
    verdicts = {name: row["verdict"].partition(":")[0] for name, row in table.items()}
    assert set(verdicts.values()) <= {"right", "right with our loss", "refused"}
