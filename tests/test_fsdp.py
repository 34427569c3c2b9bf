"""FSDP2 on two processes is one process: weights, scores, audit, files, for each thing that a recipe or launcher says.

The runs are launched with what `accelerate config` writes; how accelerate shards on CPUs is in tests/fsdp_on_cpu.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from cluster import WarmProcess
from conftest import tiny_gpt2
from fsdp_on_cpu import launcher_environment
from partialtune.builtin import builtin_folder
from partialtune.engine.shard_model import check_sharding, plugin_of, put_back, shards_in
from partialtune.errors import ModelError, RecipeError
from partialtune.training.load_base import check_can_be_sent
from tiny_models import tiny_config

STEPS = 20
WORDS = ("times", "wisdom", "belief", "light", "hope", "despair", "winter", "spring")
WEIGHTS = ("model.safetensors", "delta.safetensors", "adapter_model.safetensors")
# Of a checkpoint alone: how accelerate and Trainer call what they keep of an optimizer and of random numbers there.
RENAMED = {"optimizer.pt": "optimizer.bin", "rng_state.pth": "rng_state_0.pth"}
OF_SHARDS = {"pytorch_model_fsdp.bin", "rng_state_1.pth"}


@dataclass(frozen=True)
class Case:
    """What a run is: its base, what its recipe says, and the answers to the questions of `accelerate config`."""

    base: str
    recipe: dict[str, Any]
    answers: dict[str, Any] = field(default_factory=dict)


# Several settings share a run where none of them hides another: 2 to 5 s of processor time each.
CASES = {
    "embeddings, final norm and a tied head": Case("gpt2", {"trainable": ["embeddings", "final_norm", "head"]}),
    "the last block and an untied head, accumulated": Case(
        "llama",
        {
            "trainable": ["blocks[-1:]", "final_norm", "head"],
            "checkpoint_format": "delta",
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "load_best_model_at_end": True,
        },
        {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
    ),
    "everything of a tied Llama, recomputed by FSDP": Case(
        "tied llama", {"method": "full"}, {"fsdp_activation_checkpointing": True}
    ),
    "biases and norms beside a head that is untied": Case(
        "gpt2",
        {"trainable": ["biases", "norms", "final_norm"], "head": "untied"},
        {"fsdp_auto_wrap_policy": "NO_WRAP", "fsdp_cpu_ram_efficient_loading": False},
    ),
    "rows of new tokens beside the final norm": Case(
        "gpt2", {"new_tokens": ["season of", "age of"], "trainable": ["final_norm"]}
    ),
    "in bf16": Case("llama", {"trainable": ["blocks[-1]", "head"], "bf16": True}),
    "adapters beside norms, as a delta": Case(
        "gpt2",
        {"trainable": ["norms"], "lora": {"target": ["attention"]}, "checkpoint_format": "delta"},
        {"fsdp_reshard_after_forward": False},
    ),
}


EXACT = [name for name, case in CASES.items() if "bf16" not in case.recipe]


def accelerate_config(file: Path, **answers: Any) -> Path:
    """Write what `accelerate config` writes after these answers, its own defaults else.

    But whole checkpoints in the place of sharded ones, which have tests of their own.
    """
    fsdp = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": False,
        **answers,
    }
    machine = {"compute_environment": "LOCAL_MACHINE", "use_cpu": False, "debug": False, "num_processes": 2}
    ClusterConfig(distributed_type="FSDP", mixed_precision="no", fsdp_config=fsdp, **machine).to_yaml_file(file)
    return file


def tiny_llama(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.vocab_size, config.tie_word_embeddings = vocabulary, tied
    return LlamaForCausalLM(config)


class Runs:
    """Runs each case when it is first asked for, on one process and on two."""

    def __init__(self, folder: Path, warm: WarmProcess) -> None:
        self.folder, self.warm, self.codes = folder, warm, {}
        tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
        bases = {
            "gpt2": tiny_gpt2(vocab_size=len(tokenizer), attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
            "llama": tiny_llama(len(tokenizer), tied=False),
            "tied llama": tiny_llama(len(tokenizer), tied=True),
        }
        for name, model in bases.items():
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # else 1 and 0, which any dtype holds
                        parameter.add_(torch.randn_like(parameter), alpha=0.01)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        sentences = (
            f"It was the age of {WORDS[n % 8]} {n}, it was the season of {WORDS[n * 5 % 7]}." for n in range(300)
        )
        (folder / "text.txt").write_text(" ".join(sentences))

    def of(self, name: str) -> tuple[Path, Path]:
        """The folders of a case's runs on one process and on two, which have ended well."""
        if (name, 1) not in self.codes:
            for processes in (1, 2):
                self.codes[name, processes] = self._train(name, CASES[name], processes)
        assert (self.codes[name, 1], self.codes[name, 2]) == ([0], [0, 0]), self.warm.log.read_text()[-3000:]
        return self.folder / f"{name}, 1", self.folder / f"{name}, 2"

    def _train(self, name: str, case: Case, processes: int) -> list[int]:
        values = {
            "model_name_or_path": str(self.folder / case.base),
            "text": str(self.folder / "text.txt"),
            "block_size": 32,
            "max_steps": STEPS,
            "per_device_train_batch_size": 8 // processes,
            "dataloader_drop_last": True,
            "learning_rate": 5e-5,
            "save_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": 10,
            "delta_steps": 10,
            "prompts": [],
            "prefix_cache": "off",
            "output_dir": str(self.folder / f"{name}, {processes}"),
            **case.recipe,
        }
        file = self.folder / f"{name}, {processes}.yaml"
        file.write_text(yaml.safe_dump(values))
        return self.start(name, ["train", str(file)], processes)

    def start(self, name: str, words: list[str], processes: int) -> list[int]:
        """Run a command as the processes of a case; their exit codes."""
        notes = self.folder / f"{name}, notes"
        notes.mkdir(exist_ok=True)
        launch = launcher_environment(accelerate_config(self.folder / "launch.yaml", **CASES[name].answers))
        pages, shards = "fsdp_on_cpu:write_no_pages", ["fsdp_on_cpu:let_accelerate_shard", "fsdp_on_cpu:note_weights"]
        how = ([pages, *shards], {**launch, "NOTES": str(notes)}) if processes > 1 else ([pages], {})
        self.warm.start_all(words, processes, *how)
        return self.warm.end_all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, warm):
    return Runs(tmp_path_factory.mktemp("fsdp"), warm)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of all its weight files, and of them what has a gradient: that of keys' biases is zero, but for rounding,
    of which AdamW makes steps of full size."""
    tensors = {
        f"{file}: {name}": v for file in WEIGHTS if (run / file).exists() for name, v in load_file(run / file).items()
    }
    for name in tensors:
        if name.endswith("attn.c_attn.bias"):
            queries, _, values = tensors[name].chunk(3)
            tensors[name] = torch.cat([queries, values])
    return tensors


def kinds(run: Path) -> dict[str, Any]:
    """Of each weight file its size in bytes, and shape and dtype of each of its tensors."""
    found = {}
    for file in (path for path in run.rglob("*.safetensors") if not path.name.startswith(".")):
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}
        found[file.relative_to(run).as_posix()] = file.stat().st_size, shapes
    return found


def names(run: Path) -> set[str]:
    files = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    return {
        (path.parent / RENAMED.get(path.name, path.name)).as_posix() for path in files if path.name not in OF_SHARDS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_give_the_run_of_one(runs, name):
    one, two = runs.of(name)
    records = [yaml.safe_load((run / "recipe.yaml").read_text())["run"] for run in (one, two)]
    assert [(record["processes"], record["distributed"]) for record in records] == [(1, "NO"), (2, "FSDP")]
    notes = [read(one.parent / f"{name}, notes", str(rank)) for rank in (0, 1)]
    sent = CASES[name].answers.get("fsdp_cpu_ram_efficient_loading", True)  # rank 1 has loaded nothing
    assert notes == [["cpu", "DTensor on cpu"], ["meta" if sent else "cpu", "DTensor on cpu"]]
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        assert (ours[tensor] - theirs[tensor]).abs().max() < 1e-5, tensor
    plans = [read(run, "freeze_plan.json") for run in (one, two)]
    moved = [{p["name"] for p in plan["parameters"] if p["sha256_before"] != p["sha256_after"]} for plan in plans]
    assert moved[0] == moved[1] == {p["name"] for p in plans[0]["parameters"] if p["trainable"]}
    before = [{p["name"]: p["sha256_before"] for p in plan["parameters"]} for plan in plans]
    assert before[0] == before[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_audit_losses_and_scores_are_those_of_one_process(runs, name):
    one, two = runs.of(name)
    audits = [read(run, "audit.json") for run in (one, two)]
    assert audits[1]["passed"] is True
    assert audits[1]["saved_files"] == {"read_back": True, "different": []}
    distances = [audit["trainable"].pop("l2_delta") for audit in audits]
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)
    assert audits[0] == audits[1]
    histories = [read(run, "trainer_state.json")["log_history"] for run in (one, two)]
    for key in ("loss", "eval_loss"):
        losses = [[entry[key] for entry in history if key in entry] for history in histories]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5), key
        assert losses[0], key
    lines = [(run / "weight_deltas.jsonl").read_text().splitlines() for run in (one, two)]
    deltas = [{(d["step"], d["name"]): d["l2_delta"] for d in map(json.loads, of_run)} for of_run in lines]
    assert deltas[1] == pytest.approx(deltas[0], rel=1e-2, abs=1e-6)
    scores = [read(run, "evaluation.json") for run in (one, two)]
    for text in ("validation", "training"):
        for moment in ("before", "after"):
            assert scores[1][text][moment] == pytest.approx(scores[0][text][moment], rel=1e-5), (text, moment)
    assert scores[0]["validation"]["after"]["loss"] < scores[0]["validation"]["before"]["loss"] - 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_same_files_are_written_and_a_tied_head_once(runs, name):
    one, two = runs.of(name)
    assert names(one) == names(two)
    assert kinds(one) == kinds(two)
    assert any(name.startswith("checkpoint-20/") for name in kinds(two))


@pytest.mark.slow
def test_a_run_of_sent_weights_goes_on_from_a_checkpoint_bit_for_bit(runs):
    name = "embeddings, final norm and a tied head"
    _, two = runs.of(name)
    again = runs.folder / "again"
    words = ["--output_dir", str(again), "--resume_from_checkpoint", str(two / "checkpoint-10")]
    codes = runs.start(name, ["train", str(runs.folder / f"{name}, 2.yaml"), *words], 2)
    assert codes == [0, 0], runs.warm.log.read_text()[-3000:]
    whole, resumed = (load_file(run / "model.safetensors") for run in (two, again))
    assert all(torch.equal(whole[tensor], resumed[tensor]) for tensor in whole)
    assert read(again, "audit.json") == read(two, "audit.json")


@pytest.mark.slow
def test_in_bf16_frozen_weights_keep_every_bit_and_the_rest_ends_where_one_process_does_but_for_rounding(runs):
    """FSDP computes with weights in bf16, one process with matrices alone: norms and residuals are rounded too."""
    one, two = runs.of("in bf16")
    assert read(two, "audit.json")["passed"] is True
    assert kinds(one) == kinds(two)
    base, ours, theirs = (load_file(folder / "model.safetensors") for folder in (runs.folder / "llama", one, two))
    trained = {p["name"] for p in read(two, "freeze_plan.json")["parameters"] if p["trainable"]}
    for name, start in base.items():
        if name in trained:
            assert (theirs[name] - ours[name]).norm() < 0.1 * (ours[name] - start).norm(), name
        else:
            assert torch.equal(theirs[name], start), name
    histories = [read(run, "trainer_state.json")["log_history"] for run in (one, two)]
    for key in ("loss", "eval_loss"):
        alone, losses = ([entry[key] for entry in history if key in entry] for history in histories)
        assert losses == pytest.approx(alone, abs=5e-3), key
        assert all(abs(loss - torch.tensor(loss).bfloat16().item()) > 1e-5 for loss in losses), "the losses are rounded"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 10}, "Set TRANSFORMER_BASED_WRAP"),
        (
            {"fsdp_transformer_layer_cls_to_wrap": "BertLayer"},
            "names BertLayer, and GPT2LMHeadModel has",
        ),
        ({"fsdp_activation_checkpointing": True}, "or say dropout: 0"),
        ({"fsdp_transformer_layer_cls_to_wrap": "GPT2Block"}, ""),
    ],
)
def test_what_accelerate_config_may_say_and_a_model_cannot_be_sharded_by_is_refused(
    tmp_path, monkeypatch, answers, words
):
    for key, value in launcher_environment(accelerate_config(tmp_path / "launch.yaml", **answers)).items():
        monkeypatch.setenv(key, value)
    plugin = plugin_of(SimpleNamespace(fsdp_plugin_args=None))
    assert plugin.fsdp_version == 2
    if not words:
        check_sharding(tiny_gpt2(), plugin)
        return
    with pytest.raises(RecipeError, match=words):
        check_sharding(tiny_gpt2(), plugin)
    if "fsdp_activation_checkpointing" in answers:
        check_sharding(tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, summary_first_dropout=0.0), plugin)


def test_saved_buffers_are_refused_where_the_main_process_sends_the_weights():
    model = tiny_gpt2()
    check_can_be_sent("tiny", model)
    model.register_buffer("table", torch.zeros(2))
    with pytest.raises(ModelError, match="tiny holds 1 buffers that are saved, table first"):
        check_can_be_sent("tiny", model)


def test_an_optimizer_gets_its_own_shards_back_whatever_their_addresses_are():
    parameters = [torch.nn.Parameter(torch.zeros(0)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    assert shards_in(optimizer) == []  # no DTensor
    for group in optimizer.param_groups:  # what accelerate does with shards that have no values, all at address 0
        group["params"] = [parameters[2]] * len(group["params"])
    put_back(optimizer, [parameters[:2], parameters[2:]])
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert all(one is other for one, other in zip(held, parameters, strict=True))
