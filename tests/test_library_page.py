"""The library page: every door's snippet does what stands there, on the bundled model in the place of GPT-2."""

import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from conftest import REPOSITORY
from partialtune.cli import main
from partialtune.engine.forward_stack import Patched
from partialtune.model.loading import model_location

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGE = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
# (the heading above a snippet, the snippet): two snippets of one section have the same heading
SNIPPETS = [
    (re.findall(r"^##? (.+)$", PAGE[: found.start()], re.MULTILINE)[-1], found[1])
    for found in re.finditer(r"```python\n(.*?)```", PAGE, re.DOTALL)
]


@pytest.fixture
def surroundings(tmp_path, monkeypatch) -> dict:
    """What a reader has already: data, a loader, a tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sentences = [f"The {number}th voyage was longer than the one before it, and colder. " * 8 for number in range(16)]
    tokenizer = AutoTokenizer.from_pretrained(model_location("builtin:lilliput"))
    ids = [tokenizer(sentence)["input_ids"][:16] for sentence in sentences]
    windows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return {
        "texts": Dataset.from_dict({"text": sentences}),
        "tokenizer": tokenizer,
        "windows": windows,
        "loader": torch.utils.data.DataLoader(windows.with_format("torch"), batch_size=4),
    }


@pytest.mark.parametrize(
    ("section", "snippet"),
    [
        pytest.param(section, snippet, id=f"{number}-{section}", marks=[pytest.mark.slow] * (section == "A recipe"))
        for number, (section, snippet) in enumerate(SNIPPETS)
    ],
)
def test_a_snippet_of_the_page_runs_as_it_stands(section, snippet, surroundings, tmp_path):
    code = snippet.replace("openai-community/gpt2", model_location("builtin:lilliput"))
    code = code.replace("recipes/quickstart.yaml", str(REPOSITORY / "recipes" / "quickstart.yaml"))
    exec(compile(code, f"docs/library.md, {section}", "exec"), surroundings)
    tuning = surroundings.get("tuning")
    if tuning is not None:
        assert tuning.audit.passed
        moved = {name for name, delta in tuning.deltas.items() if delta.l2_delta}
        assert moved == set(tuning.plan.trainable)
        assert not [one for one in tuning.model.modules() if isinstance(vars(one).get("forward"), Patched)]
    if section == "The callbacks alone":
        assert (tmp_path / "outputs" / "callbacks" / "audit.json").is_file()


def test_each_door_stands_on_the_page():
    code = "".join(snippet for _, snippet in SNIPPETS)
    for door in ("pt.attach(", "pt.audited(", "pt.train(", "callbacks=callbacks"):
        assert door in code
    for library in ("SFTTrainer", "Accelerator(", "lightning.Trainer("):
        assert library in code


@pytest.mark.slow
def test_what_the_readme_writes_in_python_runs_as_it_stands(surroundings, tmp_path, capsys):
    whole_way, engine = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "notes.txt").write_text("On Monday it rained. On Tuesday the boat came in, and we went to sea. " * 60)
    assert main(["init", "notes.txt"]) == 0
    recipe = (tmp_path / "notes.yaml").read_text()
    (tmp_path / "notes.yaml").write_text(re.sub(r"max_steps: \d+", "max_steps: 2", recipe))
    exec(compile(whole_way, "README.md", "exec"), surroundings)
    printed = capsys.readouterr().out
    assert "freeze audit passed" in printed
    assert len(printed[printed.index("On Monday") :].split()) > 10

    args = TrainingArguments(tmp_path / "engine", max_steps=2, disable_tqdm=True, report_to="none")
    model = AutoModelForCausalLM.from_pretrained(model_location("builtin:lilliput"))
    data = {"train_dataset": surroundings["windows"], "data_collator": default_data_collator}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    surroundings |= {"model": model, "trainer": Trainer(model, args, **data), "optimizer": optimizer}
    exec(compile(engine, "README.md", "exec"), surroundings)
    assert surroundings["tuning"].audit.passed
