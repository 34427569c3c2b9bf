"""Nodes that share nothing but the network: two agents of one process each, on disks of their own or in one folder."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from cluster import Node, WarmProcess, fingerprint, small_recipe
from conftest import some_windows, tiny_gpt2
from fork_server import ForkServer
from fsdp_on_cpu import let_accelerate_shard, save_whole
from partialtune import attach, plan_freeze
from partialtune.engine.checkpoint_files import damage_of
from partialtune.engine.checkpoint_transfer import on_each_node
from partialtune.errors import PartialtuneError
from partialtune.model.parameters import whole
from test_download import Server
from two_processes import free_port, on_two_processes

pytestmark = pytest.mark.slow

# The random numbers of each process count: the base has dropout. Its best model is not the last: the rate is too large.
RUN = {
    "model_name_or_path": "./base",
    "output_dir": "run",
    "schedule": [],
    "max_steps": 8,
    "learning_rate": 3.0,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "save_total_limit": 10,
}
GO_ON = ["--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with `recipe.yaml`, whose paths are relative, and the `base` and `text.txt` that it names."""
    folder = tmp_path_factory.mktemp("files")
    small_recipe(folder, text="text.txt", **RUN)
    return folder


def nodes_of(files: Path, *folders: Path) -> list[Node]:
    """Nodes of which each has its own copy of these files, and its own cache."""
    for folder in folders:
        shutil.copytree(files, folder)
    return [Node(folder, folder / "cache") for folder in folders]


def run_on(warm: WarmProcess, nodes: list[Node], *words: str) -> tuple[list[int], str]:
    """Exit codes of a run on two nodes, and what it said."""
    before = len(warm.log.read_text())
    warm.start_all(["train", "recipe.yaml", *words], 2, nodes=nodes, environment={"NO_PROXY": "127.0.0.1"})
    return warm.end_all(), warm.log.read_text()[before:]


def agents_on(agents: ForkServer, nodes: list[Node], logs: Path, *words: str) -> tuple[list[int], str]:
    """Exit codes of torch's agents, one on each of two nodes, and what they and the run said."""
    address = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    logs.mkdir()
    started = [
        agents.agent(
            [*address, "--node_rank", str(rank)],
            ["train", "recipe.yaml", *words],
            logs / str(rank),
            node.folder,
            {"PARTIALTUNE_CACHE": str(node.cache), "NO_PROXY": "127.0.0.1"},
        )
        for rank, node in enumerate(nodes)
    ]
    return [agent.end() for agent in started], "".join(agent.said() for agent in started)


@pytest.fixture(scope="module")
def runs(agents, files, tmp_path_factory):
    """Eight steps of a text on a server in a folder that both nodes see; four, and four more, on disks of their own.

    Each node has a real agent of torch.
    """
    folder, server, asked, said = tmp_path_factory.mktemp("nodes"), Server(), [], []
    url = server.serve("/text.txt", (files / "text.txt").read_bytes())
    shared, *apart = nodes_of(files, folder / "shared", folder / "a", folder / "b")
    for nodes, words in (([shared] * 2, []), (apart, ["--max_steps", "4"]), (apart, GO_ON)):
        codes, lines = agents_on(agents, nodes, folder / f"logs {len(said)}", "--text", url, *words)
        assert codes == [0, 0], lines
        said.append(lines)
        asked.append(len(server.requests) - sum(asked))
    server.http.shutdown()
    server.http.server_close()
    return SimpleNamespace(shared=shared, apart=apart, asked=asked, said=said)


def prepared(node: Node) -> dict[str, int]:
    """How many files of each kind the cache of a node holds."""
    return Counter(path.parent.name for path in (node.cache / "prepared").rglob("*.json"))


def test_the_text_is_fetched_and_prepared_once_a_node_and_once_in_all_where_they_share_a_folder(runs):
    assert runs.asked == [1, 2, 0]
    once = prepared(runs.shared)
    assert {"texts", "tokens", "windows"} <= once.keys()
    for node in runs.apart:
        kinds = prepared(node)
        assert {kind: kinds[kind] for kind in ("texts", "tokens", "windows")} == {
            kind: once[kind] for kind in ("texts", "tokens", "windows")
        }


def test_the_results_are_on_the_disk_of_the_main_process_and_the_other_node_says_where(runs):
    here, there = (node.folder / "run" for node in runs.apart)
    assert not there.exists()
    shared = runs.shared.folder / "run"
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (here, shared)]
    assert names[0] == names[1]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= json.loads((here / "checkpoint-4/complete.json").read_text())[
        "files"
    ].keys()
    assert all(damage_of(checkpoint) == [] for checkpoint in here.glob("checkpoint-*"))
    assert f"The run's results are in {here} on " in runs.said[1]


def test_a_run_that_goes_on_on_nodes_of_their_own_disks_has_the_bits_of_one_that_never_stopped(runs):
    here, shared = runs.apart[0].folder / "run", runs.shared.folder / "run"
    assert yaml.safe_load((here / "recipe.yaml").read_text())["run"]["processes"] == 2
    assert fingerprint(here) == fingerprint(shared)
    assert json.loads((here / "audit.json").read_text())["passed"] is True
    assert runs.said[2].count("is sent to 1 nodes") == 2  # to go on from, and as the best model at the end
    for run in (here, shared):  # what is saved is the best model, which the other node had to be sent
        state = json.loads((run / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).name == "checkpoint-4"
        best, saved = load_file(run / "checkpoint-4" / "model.safetensors"), load_file(run / "model.safetensors")
        assert all(torch.equal(best[name], saved[name]) for name in saved)
    scores = [json.loads((run / "evaluation.json").read_text())["validation"] for run in (here, shared)]
    assert scores[0] == scores[1]


def test_a_node_that_became_the_first_does_not_begin_anew_what_another_has(runs, warm):
    codes, said = run_on(warm, runs.apart[::-1], *GO_ON)
    assert codes == [2, 2]
    assert "holds a run that has reached step 8" in said
    assert "--node_rank" in said
    assert not (runs.apart[1].folder / "run").exists()


@pytest.fixture
def apart(files, tmp_path):
    return nodes_of(files, tmp_path / "a", tmp_path / "b")


def test_a_node_of_another_base_tokenizer_or_text_is_named_before_anything_is_written(warm, apart):
    other = apart[1].folder
    weights = load_file(other / "base" / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] += 1e-3
    save_file(weights, other / "base" / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((other / "base" / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "text.txt").write_text((other / "text.txt").read_text().replace("belief", "relief", 1))
    codes, said = run_on(warm, apart)
    assert codes == [2, 2]
    assert "They differ from process 0 (" in said
    assert re.search(
        r"Process 1 \(.*, node 1\): base: transformer.h.0.mlp.c_fc.weight; tokenizer; text: source 1; ", said
    )
    assert "Traceback" not in said
    assert not any((node.folder / "run").exists() for node in apart)


def test_a_node_of_another_text_is_named_by_real_agents_too(agents, apart, tmp_path):
    other = apart[1].folder / "text.txt"
    other.write_text(other.read_text().replace("belief", "relief", 1))
    codes, said = agents_on(agents, apart, tmp_path / "logs")
    assert codes == [1, 1]  # an agent turns every failure into 1
    assert re.search(r"Process 1 \(.*, node 1\): text: source 1; ", said)
    assert "Nothing was written." in said
    assert not any((node.folder / "run").exists() for node in apart)


def test_a_node_of_other_settings_is_named_with_both_values_before_anything_is_loaded(warm, apart):
    recipe = apart[1].folder / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "learning_rate": 0.2, "output_dir": "elsewhere"}))
    codes, said = run_on(warm, apart, "--push_to_hub", "--hub_model_id", "me/x")
    assert codes == [2, 2]
    assert re.search(r"Process 1 \(.*, node 1\): learning_rate: 0.2 here, 3.0 there\nStart every node", said)


def test_a_node_without_the_base_ends_all_of_them_in_its_words(warm, apart):
    shutil.rmtree(apart[1].folder / "base")
    codes, said = run_on(warm, apart)
    assert codes == [2, 2]
    assert re.search(r"there is no folder ./base, .* \(On .*, node 1.\)", said)


# ---- what a node is sent ---------------------------------------------------------------------------------------------


def on_a_node_of_its_own() -> int:
    """This process alone on its node; its rank."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": os.environ["RANK"]}
    return PartialState(cpu=True).process_index


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def received(folders: list[Path]) -> dict[str, tuple]:
    """What each way to lack a checkpoint comes to: whether the own folder is read, whether it holds the main one's
    files, and what is left beside it; or an exit code and its words."""
    rank, found = on_a_node_of_its_own(), {}
    whole = contents(folders[0] / "checkpoint-1")
    cases = {
        "nothing": shutil.rmtree,
        "a part": lambda own: (own / "model").unlink(),
        "another content": lambda own: (own / "model").write_bytes(bytes(len(whole["model"]))),
        "a file too many": lambda own: (own / "extra").touch(),
        "a copy": lambda own: None,
        "no room": lambda own: (shutil.rmtree(own.parent), own.parent.touch()),
    }
    for name, spoil in cases.items():
        own = folders[rank] / name / "checkpoint-1"
        shutil.copytree(folders[0] / "checkpoint-1", own)
        if rank == 1:
            spoil(own)
        try:
            with on_each_node(own, own.parent) as folder:
                is_own, is_whole = folder == own, contents(folder) == whole
            found[name] = (is_own, is_whole, [path.name for path in own.parent.iterdir()])
        except PartialtuneError as error:
            found[name] = (error.exit_code, str(error))
    return found


def test_a_node_reads_the_checkpoint_of_the_main_process_whatever_its_own_disk_holds(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    (folders[0] / "checkpoint-1" / "sub").mkdir(parents=True)
    (folders[0] / "checkpoint-1" / "model").write_bytes(os.urandom(20_000_000))  # more than is sent at once
    (folders[0] / "checkpoint-1" / "sub" / "empty").touch()
    main_one, other = on_two_processes(received, folders)
    failed = [one.pop("no room") for one in (main_one, other)]
    assert main_one == dict.fromkeys(main_one, (True, True, ["checkpoint-1"]))
    assert other == {
        "nothing": (False, True, []),
        "a part": (False, True, ["checkpoint-1"]),
        "another content": (False, True, ["checkpoint-1"]),
        "a file too many": (False, True, ["checkpoint-1"]),
        "a copy": (True, True, ["checkpoint-1"]),
    }
    assert [code for code, _ in failed] == [2, 2]
    assert re.search(r"checkpoint-1 could not be received in .*: .*node 1", failed[0][1])


# ---- any Trainer -----------------------------------------------------------------------------------------------------


def trained_by_hand(folders: list[Path], steps: list[int], seeds: list[int], sharded: bool) -> list:
    """A Trainer of one's own on two nodes, trained to these steps, each time from the last checkpoint."""
    if sharded:
        let_accelerate_shard()
        save_whole()
    rank, weights, reached = on_a_node_of_its_own(), {}, []
    for max_steps in steps:
        model = tiny_gpt2(seeds[rank])
        args = TrainingArguments(
            output_dir=str(folders[rank]),
            max_steps=max_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, args, train_dataset=labelled_windows())
        try:
            attach(trainer, plan_freeze(model, ["blocks[-1]"]))
            trainer.train(resume_from_checkpoint=max_steps > steps[0])
        except PartialtuneError as error:
            return [str(error)]
        reached.append(trainer.state.global_step)
        values = {name: whole(parameter) for name, parameter in model.named_parameters()}
        weights = {name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in values.items()}
    return [reached, weights, type(trainer.model_wrapped).__name__]


def labelled_windows():
    windows = some_windows()
    return windows.add_column("labels", windows["input_ids"])


@pytest.mark.parametrize(("sharded", "wrapped"), [(False, "DistributedDataParallel"), (True, "FSDPGPT2LMHeadModel")])
def test_attach_goes_on_from_the_main_processs_checkpoint_on_nodes_of_their_own_disks(tmp_path, sharded, wrapped):
    a, b, shared = tmp_path / "a", tmp_path / "b", tmp_path / "shared"
    main_one, other = on_two_processes(trained_by_hand, [a, b], [2, 4], [0, 0], sharded)
    never_stopped = on_two_processes(trained_by_hand, [shared, shared], [4], [0, 0], sharded)
    assert main_one[0] == other[0] == [2, 4]
    assert main_one[2] == other[2] == wrapped
    assert main_one[1] == other[1] == never_stopped[0][1] == never_stopped[1][1]
    assert (a / "checkpoint-4" / "rng_state_1.pth").is_file()
    assert not b.exists()


def test_attach_names_a_node_that_has_another_model(tmp_path):
    main_one, other = on_two_processes(trained_by_hand, [tmp_path, tmp_path], [2], [0, 1], False)
    assert re.search(r"Process 1 \(.*, node 1\): model: transformer.wte.weight and \d+ more", main_one[0])
    assert other == [""]
