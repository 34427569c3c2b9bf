"""What is proved is what is saved: every way of saving is read back from disk in a fresh process, digests and loss."""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import partialtune
from conftest import REPOSITORY, tiny_gpt2
from partialtune.cli import main
from partialtune.grammar.values import choices_of
from partialtune.model import saving
from partialtune.model.digests import buffer_digest, digests
from partialtune.model.loading import load_tokenizer
from partialtune.model.parameters import persistent_buffers, plain_name
from partialtune.model.sharded_files import ShardedFiles, is_sharded_checkpoint
from partialtune.proof.saved_files import saved_differences
from partialtune.recipe.arguments import TextArguments, argument_types
from partialtune.training.training_data import prepare_data

pytestmark = pytest.mark.usefixtures("undrawn")

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
BASE = "builtin:lilliput"
NEW_TOKENS = ["of times", "wisdom"]
PARTS = {"tied": ["blocks[-1]", "final_norm"], "untied": ["final_norm", "head"]}
ROWS = {"tied": ["embeddings.tokens[:400,-4:]"], "untied": ["head[:400,-4:]"]}


@dataclass(frozen=True)
class Way:
    """A way of saving: what the recipe says, what it is launched with, and whether the file comes in shards."""

    method: str = "partial"
    checkpoint_format: str = "full"
    head: str = "tied"
    launch: str = "one process"
    shards: bool = False
    lora: bool = False
    rows: bool = False
    new_tokens: bool = False

    @property
    def processes(self) -> int:
        return 1 if self.launch == "one process" else 2

    @property
    def first(self) -> list[str]:
        sharded = ["fsdp_on_cpu:let_accelerate_shard"] if self.launch == "FSDP2" else []
        in_shards = ["test_saved_files:save_in_shards"] if self.shards else []
        return ["test_saved_files:draw_no_figures", *sharded, *in_shards]


WAYS = {
    "whole": Way(),
    "untied head": Way(head="untied"),
    "everything": Way(method="full"),
    "delta": Way(checkpoint_format="delta"),
    "delta, untied head": Way(checkpoint_format="delta", head="untied"),
    "adapters": Way(method="lora"),
    "adapters beside parts": Way(lora=True),
    "adapters beside parts, untied head": Way(lora=True, head="untied"),
    "rows": Way(rows=True),
    "rows, untied head": Way(rows=True, head="untied"),
    "rows, delta": Way(rows=True, checkpoint_format="delta"),
    "rows, delta, untied head": Way(rows=True, checkpoint_format="delta", head="untied"),
    "new tokens": Way(new_tokens=True),
    "new tokens, delta": Way(new_tokens=True, checkpoint_format="delta"),
    "new tokens, delta, untied head": Way(new_tokens=True, checkpoint_format="delta", head="untied"),
    "shards": Way(shards=True),
    "DDP": Way(launch="DDP"),
    "DDP, delta": Way(launch="DDP", checkpoint_format="delta"),
    "DDP, adapters": Way(launch="DDP", method="lora"),
    "DDP, adapters beside parts": Way(launch="DDP", lora=True),
    "DDP, rows, delta": Way(launch="DDP", rows=True, checkpoint_format="delta"),
    "DDP, new tokens": Way(launch="DDP", new_tokens=True),
    "DDP, new tokens, delta": Way(launch="DDP", new_tokens=True, checkpoint_format="delta"),
    "FSDP2": Way(launch="FSDP2"),
    "FSDP2, untied head": Way(launch="FSDP2", head="untied"),
    "FSDP2, delta": Way(launch="FSDP2", checkpoint_format="delta"),
    "FSDP2, rows, untied head": Way(launch="FSDP2", rows=True, head="untied"),
    "FSDP2, rows, delta": Way(launch="FSDP2", rows=True, checkpoint_format="delta"),
    "FSDP2, new tokens": Way(launch="FSDP2", new_tokens=True),
    "FSDP2, adapters": Way(launch="FSDP2", method="lora"),
    "FSDP2, adapters beside parts": Way(launch="FSDP2", lora=True),
}
LAUNCHES = {
    **dict.fromkeys(("cpu_two_processes.yaml", "ddp.yaml", "multi_node.yaml", "pytorchjob.yaml"), "DDP"),
    "fsdp2.yaml": "FSDP2",
}
# Whatever in the package writes weights: where -> which ways of saving pass it.
WRITERS = {
    "recipe_run/write_results.py": "trainer.save_model",  # all but deltas; twice: a delta cannot hold changed buffers
    "delta_checkpoint.py": "save_file",  # deltas
    "rebuild.py": "save_pretrained",  # apply
    # in which all whole models end, Trainer's too; of a checkpoint in shards what is beside weights
    "model/saving.py": "type(model).save_pretrained, write_tensors",
    "engine/sharded_saves.py": "save_pretrained",  # by a process that takes part and writes nothing
    "freeze/lora.py": "save_file",  # adapters, alone or beside a delta
    "engine/trainer_overrides.py": "super(TunedTrainer, self).save_model",  # Trainer's own way, of checkpoints too
}


WRITE_WEIGHTS = ("save_pretrained", "save_file", "save_model", "write_tensors")


def save_in_shards() -> None:
    """Let files be cut at 40 KB, as they are at 5 GB."""
    saving.MAX_SHARD_SIZE = "40KB"


def draw_no_figures() -> None:
    """Most of such a run's seconds."""
    from partialtune.recipe_run import write_results as results

    results.draw_figures = results.write_report = lambda folder: None


def test_every_way_of_saving_is_in_the_list():
    """A new choice, launch file or writer of weights fails here until a way in the list goes through it."""
    types = argument_types()
    for key in ("method", "checkpoint_format", "head"):
        assert {getattr(way, key) for way in WAYS.values()} == set(choices_of(types[key])), key
    files = {file.name for file in (REPOSITORY / "recipes" / "launch").glob("*.yaml")}
    assert files == set(LAUNCHES)
    assert {way.launch for way in WAYS.values()} == {"one process", *LAUNCHES.values()}
    for launch in LAUNCHES.values():
        assert {way.checkpoint_format for way in WAYS.values() if way.launch == launch} == {"full", "delta"}
    written = {}
    package = Path(partialtune.__file__).parent
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} - {"save_model"}
        writers = {name for name in calls if name.rpartition(".")[2] in WRITE_WEIGHTS}
        writers -= {name for name in writers if "config" in name or "tokenizer" in name}
        if writers:
            written[file.relative_to(package).as_posix()] = ", ".join(sorted(writers))
    assert written.items() <= WRITERS.items()


# Reads folders back and knows nothing of the package: prints digests and losses as JSON.
READER = """\
import hashlib, json, sys
import torch
from transformers import AutoModelForCausalLM

def digest(values):
    return hashlib.sha256(values.detach().float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()

def name_of(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")

def loss_of(model, windows):
    nats = count = 0
    with torch.no_grad():
        for ids in torch.tensor(windows).split(16):
            logits, targets = model(ids).logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten()
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += ids[:, 1:].numel()
    return nats / count

job, found = json.load(sys.stdin), {}
for way, (kind, folder, base, tokenizer) in job["folders"].items():
    if kind == "delta":
        import partialtune
        model = partialtune.load(folder)
    elif kind == "adapters":
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    model = model.eval()
    found[way] = {
        "digests": {name_of(name): digest(values) for name, values in model.named_parameters()},
        "losses": {name: loss_of(model, windows) for name, windows in job["windows"][tokenizer].items()},
    }
print(json.dumps(found))
"""


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{number} {TEXT}" for number in range(60)))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model of random weights and 0.2 million parameters, a twelfth of the builtin one whose tokenizer
    it has."""
    folder, tokenizer = tmp_path_factory.mktemp("base") / "base", load_tokenizer(BASE)
    tiny_gpt2(vocab_size=len(tokenizer)).half().save_pretrained(folder)  # 16 bits a value, as in the builtin one's file
    config = read(folder, "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))  # what its config says too
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text, base, warm):
    """A folder with one run for each way of saving, and the exit codes of its processes."""
    folder, codes = tmp_path_factory.mktemp("ways"), {}
    recipe = {
        "model_name_or_path": str(base),
        "text": str(text),
        "block_size": 32,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "prompts": [],
        "prefix_cache": "off",
    }
    for name, way in WAYS.items():
        keys = {"method": way.method, "checkpoint_format": way.checkpoint_format, "head": way.head}
        parts = {} if way.method == "full" else {"trainable": (ROWS if way.rows else PARTS)[way.head]}
        parts = {"trainable": ["blocks[-1].attention"]} if way.method == "lora" else parts
        parts = {**parts, "lora": {"target": ["attention"]}} if way.lora else parts
        parts = {"new_tokens": NEW_TOKENS} if way.new_tokens else parts  # their rows, and nothing else
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**recipe, **keys, **parts, "output_dir": str(folder / name)}))
        warm.start_all(["train", str(file)], way.processes, way.first)
        codes[name] = warm.end_all()
    return folder, codes


@pytest.fixture(scope="module")
def read_back(runs, text, base):
    """Way -> what a fresh process found in its folder; those of deltas made whole by `apply` too."""
    runs, codes = runs
    folders = {}
    for name, way in WAYS.items():
        if any(codes[name]):
            continue
        kind = "adapters" if way.method == "lora" else "delta" if way.lora else way.checkpoint_format
        tokenizer = str(runs / name) if way.new_tokens else str(base)
        folders[name] = (kind, str(runs / name), str(base), tokenizer)
        if kind == "delta":
            out = partialtune.apply_delta(runs / name, runs / f"{name}, applied")
            folders[f"{name}, applied"] = ("full", str(out), "", str(out) if way.new_tokens else str(base))
    windows = {}
    for tokenizer in {entry[-1] for entry in folders.values()}:
        data = prepare_data(TextArguments(text=[str(text)], block_size=32), {}, load_tokenizer(tokenizer), seed=0)
        windows[tokenizer] = {
            name: [row["input_ids"] for row in scored.windows] for name, scored in data.scored.items()
        }
    job = json.dumps({"folders": folders, "windows": windows})
    result = subprocess.run([sys.executable, "-c", READER], input=job, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_the_files_hold_what_the_audit_states_and_the_model_that_was_scored(runs, read_back, name, warm):
    runs, codes = runs
    assert codes[name] == [0] * WAYS[name].processes, warm.log.read_text()[-3000:]
    run, applied = runs / name, f"{name}, applied"
    stated = {entry["name"]: entry["sha256_after"] for entry in read(run, "freeze_plan.json")["parameters"]}
    audit = read(run, "audit.json")
    assert audit["passed"] is True
    assert audit["saved_files"] == {"read_back": True, "different": []}
    assert read(run, "performance.json")["saved_files_check_seconds"] > 0
    for found in (read_back[name], *([read_back[applied]] if applied in read_back else [])):
        if WAYS[name].lora and found is not read_back[name]:  # merged: of the matrices that were adapted others
            plan = read(runs / applied, "freeze_plan.json")
            stated = {entry["name"]: entry["sha256_after"] for entry in plan["parameters"]}
        assert found["digests"] == stated
        for text_name, loss in found["losses"].items():
            scores = read(run, "evaluation.json")[text_name]
            assert loss == pytest.approx(scores["after"]["loss"], abs=1e-6), text_name
            assert abs(scores["after"]["loss"] - scores["before"]["loss"]) > 1e-4  # it is another model than the base
    assert set(found["losses"]) == {"validation", "training"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.launch != "one process"])
def test_several_processes_really_ran_and_save_the_files_of_one(runs, base, name):
    runs, way = runs[0], WAYS[name]
    alone = next(n for n, w in WAYS.items() if w == replace(way, launch="one process"))
    assert yaml.safe_load((runs / name / "recipe.yaml").read_text())["run"]["processes"] == 2
    # what accelerate writes of a model that it has sharded, and in no other case
    in_shards = way.launch == "FSDP2"
    assert is_sharded_checkpoint(runs / name / "checkpoint-1") == in_shards
    if in_shards:
        shards = ShardedFiles(runs / name / "checkpoint-1")
        model = AutoModelForCausalLM.from_pretrained(runs / name if way.new_tokens else base)
        expected = {name: tuple(values.shape) for name, values in model.state_dict().items()}
        assert {plain_name(n): shards.shape(n) for n in shards.names if ".lora_" not in n} == expected
    for place in (".", "checkpoint-1"):
        # but the base's scores, .before.safetensors, which a run may have from the cache
        ours, theirs = (
            {f.name: contents(f) for f in (runs / n / place).glob("[!.]*.safetensors")} for n in (name, alone)
        )
        whole = {"model.safetensors"} if in_shards and place == "checkpoint-1" else set()  # in shards, see above
        assert ours == {file: content for file, content in theirs.items() if file not in whole}
        assert ours or whole


def contents(file):
    """Size in bytes, and shapes by name: all that is equal between runs whose sums are of another order."""
    with safe_open(file, framework="pt") as opened:
        return file.stat().st_size, {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_shards_are_several_files_with_an_index(runs):
    run = runs[0] / "shards"
    assert not (run / "model.safetensors").exists()
    assert len(set(read(run, "model.safetensors.index.json")["weight_map"].values())) > 3


# ---- what is caught -------------------------------------------------------------------------------------------------


class Halving(GPT2LMHeadModel):
    """A model like RWKV, which rescales its weights in place in eval mode: what it gives to be saved is not what was
    audited."""

    def state_dict(self, *args, **kwargs):
        tensors = super().state_dict(*args, **kwargs)
        return {name: values / 2 if HALVED in name else values for name, values in tensors.items()}


HALVED = "h.1.attn.c_proj.weight"
RECIPE = {"block_size": 32, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "prompts": []}


class Rescaling(GPT2LMHeadModel):
    """A model that divides weights in place when it is evaluated, as RWKV does, but on a whole batch only."""

    def forward(self, input_ids=None, **kwargs):
        if not self.training and input_ids.shape == (8, 32):  # not yet in the look that is taken at loading
            with torch.no_grad():
                self.get_parameter(f"transformer.{HALVED}").div_(2)
        return super().forward(input_ids, **kwargs)


def train_halving(tmp_path, text, monkeypatch, kind=Halving, **changes):
    def loaded(*args, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(Path(partialtune.__file__).parent / "builtin" / "lilliput")
        model.__class__ = kind
        if kind is Counting:
            model.register_buffer("passes", torch.zeros(1))
        model.config.name_or_path = BASE
        return model

    monkeypatch.setattr("partialtune.training.load_base.load_model", loaded)
    values = {"model_name_or_path": BASE, "text": str(text), "output_dir": str(tmp_path / "run"), **RECIPE, **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return main(["train", str(tmp_path / "recipe.yaml")]), tmp_path / "run"


@pytest.mark.slow
def test_a_model_that_saves_other_weights_than_it_has_fails_the_run(tmp_path, text, monkeypatch, capfd):
    changes = {"trainable": ["blocks[-1]"], "save_strategy": "no"}
    code, run = train_halving(tmp_path, text, monkeypatch, **changes)
    assert code == 3
    audit = read(run, "audit.json")
    assert audit["passed"] is False
    assert audit["frozen"]["changed"] == []  # in memory every bit was kept
    what = "has other values in the saved files than it had when it was audited"
    assert audit["saved_files"] == {
        "read_back": True,
        "different": [{"name": "transformer.h.1.attn.c_proj.weight", "what": what}],
    }
    said = capfd.readouterr()
    assert "Verdict: freeze audit FAILED" in said.out
    assert f"transformer.h.1.attn.c_proj.weight {what}" in said.err
    assert "passed" not in said.out.split("Verdict")[1]
    assert read(run, "exit.json")["code"] == 3
    for page in ("report.html", "README.md"):
        assert what in (run / page).read_text(encoding="utf-8")
    assert main(["verify", BASE, str(run)]) == 3


@pytest.mark.slow
def test_such_a_model_is_caught_at_its_first_checkpoint_and_no_checkpoint_is_left(tmp_path, text, monkeypatch):
    code, run = train_halving(tmp_path, text, monkeypatch, trainable=["blocks[-1]"], save_steps=2)
    assert code == 3
    assert not list(run.glob("checkpoint-*"))
    assert read(run, "trainer_state.json")["global_step"] == 2
    assert [one["name"] for one in read(run, "audit.json")["saved_files"]["different"]] == [
        "transformer.h.1.attn.c_proj.weight"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_format", ["full", "delta"])
def test_a_violation_at_the_checkpoint_of_the_last_step_is_no_pass(tmp_path, text, monkeypatch, checkpoint_format):
    changes = {"trainable": ["blocks[-1]"], "save_steps": 4, "checkpoint_format": checkpoint_format}
    code, run = train_halving(tmp_path, text, monkeypatch, **changes)
    audit = read(run, "audit.json")
    assert (code, audit["passed"], read(run, "exit.json")["code"]) == (3, False, 3)
    assert [one["name"] for one in audit["saved_files"]["different"]] == ["transformer.h.1.attn.c_proj.weight"]
    assert not (run / "model.safetensors").exists()


class Counting(GPT2LMHeadModel):
    """A model that counts its forward passes in train mode, in a buffer that is saved."""

    def forward(self, input_ids=None, **kwargs):
        if self.training:
            self.passes += 1
        return super().forward(input_ids, **kwargs)


@pytest.mark.slow
def test_what_changed_in_memory_and_is_saved_so_is_no_difference_of_the_files(tmp_path, text, monkeypatch):
    changes = {"trainable": ["blocks[-1]"], "save_steps": 2, "allow_failed_audit": True}
    code, run = train_halving(tmp_path, text, monkeypatch, kind=Counting, **changes)
    audit = read(run, "audit.json")
    assert (code, audit["passed"], audit["buffers"]["changed"]) == (0, False, ["passes"])
    assert audit["saved_files"] == {"read_back": True, "different": []}


@pytest.mark.slow
def test_a_trained_weight_that_is_saved_otherwise_is_caught_at_the_end(tmp_path, text, monkeypatch):
    code, run = train_halving(tmp_path, text, monkeypatch, trainable=["blocks[1]"], save_steps=2)
    assert code == 3
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_a_model_that_changes_its_weights_when_it_is_scored_is_stopped_before_the_first_step(
    tmp_path, text, monkeypatch, capfd
):
    changes = {"trainable": ["blocks[-1]"], "allow_failed_audit": True}
    code, run = train_halving(tmp_path, text, monkeypatch, kind=Rescaling, **changes)
    assert code == 3
    said = capfd.readouterr().err
    assert "1 of 52 parameters changed between loading and the first step, transformer.h.1.attn.c_proj.weight" in said
    assert "Traceback" not in said
    assert not (run / "model.safetensors").exists()


@pytest.mark.slow
def test_a_recipe_may_allow_it(tmp_path, text, monkeypatch):
    changes = {"trainable": ["blocks[-1]"], "allow_failed_audit": True, "save_steps": 2}
    code, run = train_halving(tmp_path, text, monkeypatch, **changes)
    assert code == 0
    assert read(run, "audit.json")["passed"] is False


@pytest.fixture
def saved(tmp_path):
    """A model with a buffer and its folder."""
    from test_verify import tiny_mixtral

    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def differences(model, folder, plan=None):
    buffers = {name: buffer_digest(buffer) for name, buffer in persistent_buffers(model)}
    return [str(one) for one in saved_differences(folder, model, digests(model), buffers, plan)]


def change_file(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_fused_experts_are_read_back_without_a_second_model(saved, monkeypatch):
    monkeypatch.setattr("partialtune.model.weight_files.load_model", lambda *a, **k: pytest.fail("a second model"))
    model, folder = saved
    assert differences(model, folder) == []

    def flip(tensors):
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"].view(torch.int32)[0, 0] ^= 1
        return tensors

    change_file(folder, flip)
    [difference] = differences(model, folder)
    assert difference.startswith("model.layers.1.mlp.experts.gate_up_proj has other values")


def test_a_parameter_that_is_not_saved_and_a_file_that_cannot_be_read_are_differences(tmp_path):
    model, folder = tiny_gpt2(), tmp_path / "saved"
    model.save_pretrained(folder)
    assert differences(model, folder) == []
    change_file(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "transformer.ln_f.bias"})
    [difference] = differences(model, folder)
    assert "transformer.ln_f.bias" in difference
    (folder / "model.safetensors").write_bytes(b"no tensor in sight")
    [difference] = differences(model, folder)
    assert difference.startswith("saved cannot be read back")


def test_a_head_that_comes_apart_in_the_file_is_a_difference(tmp_path):
    model, folder = tiny_gpt2(), tmp_path / "saved"
    model.save_pretrained(folder)
    change_file(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    assert any(difference.startswith("lm_head.weight") for difference in differences(model, folder))


def test_a_config_that_is_saved_otherwise_is_a_difference(tmp_path):
    model, folder = tiny_gpt2(), tmp_path / "saved"
    model.save_pretrained(folder)
    config = read(folder, "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "n_head": 4, "resid_pdrop": 0.5}))
    assert differences(model, folder) == ["config.json is of another model: n_head (2 -> 4)"]
