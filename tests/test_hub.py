"""Pushing a run with the real client, in child processes, to an imitation of the Hub that goes wrong on demand."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.hf_api import RepoFile
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import WarmProcess
from conftest import tiny_gpt2
from faulty_http import Fault
from hub_server import Account, Blob, HubServer
from partialtune.builtin import builtin_folder
from partialtune.errors import InputError
from partialtune.hub.published_files import check_finished, files_to_send, gap_between
from partialtune.pages.card import UNNAMED
from run_folder import write_run_folder

TOKEN, READ_TOKEN, OTHER_TOKEN, BAD_TOKEN = (
    "hf_plantedWriteToken",
    "hf_plantedReadToken",
    "hf_plantedOtherToken",
    "hf_bad",
)
ACCOUNTS = {TOKEN: Account("me", orgs=("guild",)), READ_TOKEN: Account("me", role="read"), OTHER_TOKEN: Account("you")}
NEVER_SENT = {
    "training_args.bin": f"a pickle with {TOKEN}",
    "optimizer.pt": "moments",
    "trainer_state.json": "{}",
    "exit.json": '{"code": 0, "reason": "done"}',
    ".lock": "",
    ".evaluation.json.part": "{",
    "checkpoint-10/model.safetensors": "weights of step 10",
    "checkpoint-10/optimizer.pt": "moments",
    "prefix_cache/block_00.npy": "activations",
}
CHILD = """
import json, logging, os, sys
from pathlib import Path
from partialtune.hub import push as hub
from partialtune.errors import PartialtuneError

logging.basicConfig(format="%(message)s", level=logging.INFO)
for call in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = call.pop("token", os.environ.get("HF_TOKEN", ""))
    function = getattr(hub, call.pop("function", "push_run"))
    seconds = call.pop("answer_seconds", 20)
    patience = hub.Patience(4, first_wait_seconds=0.05, longest_wait_seconds=5, answer_seconds=seconds)
    target = hub.Target(*(call.pop(name, None) for name in ("repo_id", "revision", "private")))
    run = [Path(call.pop("run"))] if "run" in call else []
    try:
        report = function(*run, target, **call, patience=patience)
        outcome = {"error": None, **(vars(report) if report else {})}
    except PartialtuneError as error:
        outcome = {"error": type(error).__name__, "code": error.exit_code, "message": str(error)}
    print("outcome " + json.dumps(outcome), flush=True)
"""


class Desk:
    """The imitation, a home folder, and child processes that work from there; keeps all that they print."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub, self.home, self.output = hub, home, ""
        self.warm: WarmProcess | None = None

    def environment(self, **changes: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            **changes,
        }

    def start(self, code: str, *arguments: str, **changes: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment(**changes), cwd=self.home, **pipes)

    def run(self, code: str, *arguments: str, **changes: str) -> str:
        child = self.start(code, *arguments, **changes)
        try:
            printed, _ = child.communicate(timeout=300)
        finally:
            child.kill()
        self.output += printed
        assert child.returncode == 0, printed
        return printed

    def partialtune(self, *words: str, file_bytes: int | None = None, **changes: str) -> tuple[int, str]:
        """Run the command line in a process forked from a warm one of this desk; exit code and what it printed.

        No file of it may have more than `file_bytes`; `changes` are environment variables that are read when it runs.
        """
        if self.warm is None:
            self.warm = WarmProcess(self.home.parent / "log", self.environment()).__enter__()
            self.warm.log.touch()
        first = [] if file_bytes is None else ["cluster:limit_file_sizes"]
        said = len(self.warm.log.read_text())
        self.warm.start_all(words, 1, first, {**changes, "FILE_BYTES": str(file_bytes)})
        code, printed = self.warm.end(), self.warm.log.read_text()[said:]
        self.output += printed
        return code, printed

    def call(self, *calls: dict, **changes: str) -> list[dict]:
        """Run functions of `partialtune.hub.push`, `push_run` unless said otherwise, in one child."""
        lines = self.run(CHILD, json.dumps(calls), **changes).splitlines()
        return [json.loads(line.removeprefix("outcome ")) for line in lines if line.startswith("outcome ")]

    def push(self, run: Path, **arguments) -> dict:
        return self.call({"run": str(run), "repo_id": "me/gulliver", **arguments})[0]


@contextmanager
def desk_in(folder: Path) -> Iterator[Desk]:
    """At the end: no token in any output, file or repository, and none sent to the storage."""
    home = folder / "home"
    home.mkdir()
    with HubServer(ACCOUNTS) as hub:
        desk = Desk(hub, home)
        try:
            yield desk
        finally:
            if desk.warm:
                desk.warm.__exit__(None, None, None)
    for token in (*ACCOUNTS, BAD_TOKEN):
        assert token not in desk.output
        assert not [path for path in home.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        for repo_id, repository in hub.repositories.items():
            for branch in repository.branches:
                assert token.encode() not in b"".join(hub.files(repo_id, branch).values())
    assert not [seen for seen in hub.seen if seen.origin == "storage" and seen.authorized]


@pytest.fixture
def desk(tmp_path):
    with desk_in(tmp_path) as desk:
        yield desk


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with an untied head, in three shards, with a tokenizer, and with everything that is not to be sent."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = write_run_folder(
        tmp_path_factory.mktemp("runs") / "gulliver's run", blocks=3, width=32, steps=20, untied=True
    )
    model = tiny_gpt2(tie_word_embeddings=False)
    model.save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 3
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Gulliver\n", encoding="utf-8")
    (folder / "report.html").write_text("<!doctype html><title>Gulliver</title>", encoding="utf-8")
    (folder / "train_results.json").write_text('{"train_loss": 4.8}', encoding="utf-8")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    for name, content in NEVER_SENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def on_disk(run):
    """Content of every file that is to be sent."""
    kept = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return {name: content for name, content in kept.items() if name not in NEVER_SENT}


def on_hub(desk, repo_id="me/gulliver", revision="main"):
    return {name: body for name, body in desk.hub.files(repo_id, revision).items() if name != ".gitattributes"}


def digest_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.mark.contract
def test_a_push_brings_the_run_and_nothing_else_in_one_commit_and_a_second_push_makes_none(desk, run):
    first, second = desk.call(*[{"run": str(run), "repo_id": "me/gulliver", "private": True}] * 2)
    assert first["error"] is None
    assert on_hub(desk) == on_disk(run)
    assert sorted(first["sent"]) == sorted(on_disk(run))
    assert first["files"] == len(on_disk(run))
    assert first["bytes"] == sum(map(len, on_disk(run).values()))
    assert first["commit"] == desk.hub.repositories["me/gulliver"].branches["main"]
    assert first["url"] == f"{desk.hub.endpoint}/me/gulliver"
    assert desk.hub.repositories["me/gulliver"].private
    assert second == {**first, "sent": []}
    assert len(desk.hub.messages("me/gulliver")) == 2  # the Hub's own and ours
    assert desk.hub.count("POST", "/commit/") == 1
    assert "model-00001-of-" in desk.output  # a progress bar
    assert "100%" in desk.output


def test_only_what_changed_is_sent_again(desk, run):
    desk.push(run)
    shard = sorted(run.glob("model-*.safetensors"))[-1]
    for path in (shard, run / "report.html"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")  # of the same size
    assert desk.push(run)["sent"] == [shard.name, "report.html"]
    assert on_hub(desk) == on_disk(run)
    assert len(desk.hub.messages("me/gulliver")) == 3


PASSING_FAULTS = {
    "500 to whoami": Fault("GET", "whoami", "status"),
    "429 to whoami, with the Hub's rate limit header": Fault(
        "GET", "whoami", "status", status=429, headers={"ratelimit": '"api";r=0;t=1'}
    ),
    "dropped connection at create_repo": Fault("POST", "repos/create", "drop"),
    "answer of create_repo lost after the repository was made": Fault("POST", "repos/create", "lost"),
    "502 to auth-check": Fault("GET", "auth-check", "status", status=502),
    "stalled server at model_info": Fault("GET", "/revision/main", "stall"),
    "stalled server at the listing": Fault("GET", "/tree/", "stall"),
    "a web page instead of JSON from validate-yaml": Fault("POST", "validate-yaml", "html"),
    "503 with Retry-After to preupload": Fault("POST", "preupload", "status", status=503, headers={"Retry-After": "1"}),
    "429 to the LFS batch": Fault("POST", "objects/batch", "status", status=429),
    "500 to a transfer": Fault("PUT", "/objects/", "status"),
    "dropped connection in a transfer": Fault("PUT", "/objects/", "drop"),
    "stalled storage in a transfer": Fault("PUT", "/objects/", "stall"),
    "answer of a transfer lost": Fault("PUT", "/objects/", "lost"),
    "500 to the commit, twice": Fault("POST", "/commit/", "status", times=2),
    "503 with Retry-After to the commit": Fault("POST", "/commit/", "status", status=503, headers={"Retry-After": "1"}),
    "412 to the commit": Fault("POST", "/commit/", "status", status=412),
    "dropped connection at the commit": Fault("POST", "/commit/", "drop"),
    "stalled server at the commit": Fault("POST", "/commit/", "stall"),
    "answer lost after the commit landed": Fault("POST", "/commit/", "lost"),
    "a commit that lands when the client has given it up": Fault("POST", "/commit/", "late", seconds=3),
    "500 to the listing after the commit": Fault("GET", "/tree/", "status", skip=1),
}
TRIES = 4  # of the children; a fault that lasts so long ends the first push, and the second one finds it gone
LASTING_FAULTS = {
    "500 to the commit": Fault("POST", "/commit/", "status", times=TRIES),
    "503 with Retry-After of an hour to the commit": Fault(
        "POST", "/commit/", "status", status=503, headers={"Retry-After": "3600"}
    ),
    "403 to the commit": Fault("POST", "/commit/", "status", status=403),
    "stalled server at every commit": Fault("POST", "/commit/", "stall", times=TRIES),
    "no answer from whoami": Fault("GET", "whoami", "drop", times=TRIES),
}
XET_FAULTS = {  # of the route by which the client asks for the way to Xet's storage
    "a Hub that knows no Xet": Fault("GET", "xet-write-token", "status", status=404, times=99),
    "500 from Xet": Fault("GET", "xet-write-token", "status", times=99),
    "stalled Xet": Fault("GET", "xet-write-token", "stall", times=99),
}
XET = {  # the client as it is without a setting, but for its patience
    "HF_HUB_DISABLE_XET": "0",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
}


@dataclass(frozen=True)
class Suffered:
    """What two pushes of one run came to, the first of which met a fault."""

    desk: Desk
    run: Path
    unchanged: bool
    outcomes: list[dict]
    left: int


def push_twice(finished_run: Path, folder: Path, fault: Fault, **changes: str) -> Suffered:
    run = Path(shutil.copytree(finished_run, folder / finished_run.name))
    before = digest_of(run)
    with desk_in(folder) as desk:
        desk.hub.faults = [replace(fault)]
        call = {"run": str(run), "repo_id": "me/gulliver", "private": True}
        outcomes = desk.call({**call, "answer_seconds": 2 if fault.kind in ("stall", "late") else 20}, call, **changes)
        if fault.kind == "late":
            desk.hub.over.wait(2)  # by then it has landed, or was refused
    return Suffered(desk, run, digest_of(run) == before, outcomes, desk.hub.faults[0].times)


@pytest.fixture(scope="module")
def suffered(finished_run, tmp_path_factory):
    """Name of a fault -> future of what came of it. Each has its own Hub and child; several run at once."""
    with ThreadPoolExecutor(max_workers=6) as pool:
        cases = [(PASSING_FAULTS, {}), (LASTING_FAULTS, {}), (XET_FAULTS, XET)]
        yield {
            name: pool.submit(push_twice, finished_run, tmp_path_factory.mktemp("fault"), fault, **changes)
            for faults, changes in cases
            for name, fault in faults.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_a_fault_that_passes_is_overcome_without_a_second_commit(suffered, fault):
    seen = suffered[fault].result()
    first, second = seen.outcomes
    assert seen.left == 0, "the fault did not happen"
    assert first["error"] is None, first
    assert second["sent"] == []
    assert on_hub(seen.desk) == on_disk(seen.run)
    assert len(seen.desk.hub.messages("me/gulliver")) == 2  # the Hub's own and ours
    assert seen.unchanged


@pytest.mark.parametrize("fault", LASTING_FAULTS)
def test_a_fault_that_lasts_ends_with_the_run_safe_and_the_command_that_goes_on(suffered, fault):
    seen = suffered[fault].result()
    first, second = seen.outcomes
    assert seen.left == 0, "the fault did not happen often enough"
    assert (first["error"], first["code"]) == ("UploadIncomplete", 5)
    assert f"safe and whole in {seen.run}" in first["message"]
    command = ["partialtune", "push", str(seen.run), "--repo_id", "me/gulliver", "--private", "true"]
    assert shlex.split(first["message"].splitlines()[-1]) == command
    assert "Traceback" not in seen.desk.output
    assert second["error"] is None, second
    assert on_hub(seen.desk) == on_disk(seen.run)
    assert len(seen.desk.hub.messages("me/gulliver")) == 2
    sent = [request.path for request in seen.desk.hub.seen if request.method == "PUT"]
    assert len(sent) == len(set(sent)), "what had arrived was sent again"
    assert seen.unchanged


@pytest.mark.parametrize("fault", XET_FAULTS)
def test_where_xet_fails_the_next_try_goes_over_plain_http(suffered, fault):
    pytest.importorskip("hf_xet")
    seen = suffered[fault].result()
    first, second = seen.outcomes
    assert first["error"] is None, first
    assert second["sent"] == []
    assert seen.left < XET_FAULTS[fault].times, "Xet was not tried"
    assert seen.desk.output.count("The transfer over Xet failed, the next one is plain HTTP") == 1
    assert on_hub(seen.desk) == on_disk(seen.run)
    assert len(seen.desk.hub.messages("me/gulliver")) == 2
    assert seen.unchanged


def test_a_hub_that_refuses_every_parent_is_pushed_to_without_one(desk, run):
    desk.hub.refuses_parents = True
    assert desk.push(run)["error"] is None
    assert on_hub(desk) == on_disk(run)
    assert len(desk.hub.messages("me/gulliver")) == 2


def test_a_push_that_was_killed_in_the_middle_goes_on_where_it_was(desk, run):
    shards = sorted(run.glob("model-*.safetensors"))
    last = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
    desk.hub.faults = [Fault("PUT", last, "stall")]
    child = desk.start(CHILD, json.dumps([{"run": str(run), "repo_id": "me/gulliver", "answer_seconds": 60}]))
    others = {hashlib.sha256(path.read_bytes()).hexdigest() for path in [*shards[:-1], run / "figures" / "loss.png"]}
    assert desk.hub.stalled.wait(60)
    for _ in range(600):
        if others <= set(desk.hub.objects):
            break
        desk.hub.over.wait(0.05)
    child.send_signal(signal.SIGKILL)
    desk.output += child.communicate()[0]
    assert child.returncode == -signal.SIGKILL
    assert on_hub(desk) == {}
    assert set(desk.hub.objects) == others

    seen = len(desk.hub.seen)
    assert desk.push(run)["error"] is None
    again = [request.path for request in desk.hub.seen[seen:] if request.method == "PUT"]
    assert again == [f"/objects/{last}"]
    assert on_hub(desk) == on_disk(run)
    assert len(desk.hub.messages("me/gulliver")) == 2


def test_files_that_did_not_arrive_as_they_are_on_disk_are_named(desk, run):
    desk.hub.create("me/gulliver").commit("main", {".gitignore": Blob(len(b"report.html"), b"report.html")}, "ignore")
    outcome = desk.push(run)
    assert (outcome["error"], outcome["code"]) == ("UploadIncomplete", 5)
    assert "differs from the run in report.html" in outcome["message"]
    assert desk.hub.count("POST", "/commit/") == 1


def test_weights_of_another_model_are_taken_away_and_other_files_stay(desk, run):
    theirs = {"model.safetensors": b"old", "adapter_config.json": b"{}", "LICENSE": b"MIT", "figures/mine.png": b"png"}
    blobs = {name: Blob(len(content), content) for name, content in theirs.items()}
    desk.hub.create("me/gulliver").commit("main", blobs, "another model")
    outcome = desk.push(run)
    assert outcome["removed"] == ["adapter_config.json", "model.safetensors"]
    assert on_hub(desk) == {**on_disk(run), "LICENSE": b"MIT", "figures/mine.png": b"png"}


KINDS = {
    "full": ("config.json", "generation_config.json", "model.safetensors"),
    "sharded": ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    "delta": ("config.json", "generation_config.json", "delta.json", "delta.safetensors"),
    "lora": ("adapter_config.json", "adapter_model.safetensors"),
    "older": ("config.json", "pytorch_model.bin"),
}


@pytest.mark.parametrize("after", ["full", "delta", "lora"])
@pytest.mark.parametrize("before", KINDS)
def test_what_one_kind_of_model_leaves_is_taken_away_by_the_next(before, after, tmp_path):
    for name in (*KINDS[after], "README.md"):
        (tmp_path / name).write_text("after")
    there = [RepoFile(path=name, size=6, oid="0" * 40) for name in (*KINDS[before], "README.md", "LICENSE")]
    gap = gap_between(files_to_send(tmp_path), there)
    assert set(gap.stale) == set(KINDS[before]) - set(KINDS[after])
    assert set(gap.missing) == {*KINDS[after], "README.md"}


def test_adapters_over_a_whole_model_go_in_one_commit_that_takes_its_configuration_away(desk, run, tmp_path):
    theirs = {"config.json": b"{}", "generation_config.json": b"{}", "model.safetensors": b"old", "LICENSE": b"MIT"}
    desk.hub.create("me/gulliver").commit("main", {n: Blob(len(c), c) for n, c in theirs.items()}, "a whole model")
    for name in ("config.json", "generation_config.json", *(path.name for path in run.glob("model*"))):
        (run / name).unlink(missing_ok=True)
    (run / "adapter_config.json").write_text("{}")
    (run / "adapter_model.safetensors").write_bytes(b"adapters")
    outcome = desk.push(run)
    assert outcome["removed"] == ["config.json", "generation_config.json", "model.safetensors"]
    assert desk.hub.count("POST", "/commit/") == 1
    assert on_hub(desk) == {**on_disk(run), "LICENSE": b"MIT"}


def test_branches_and_organisations_can_be_pushed_to(desk, run):
    hub = desk.hub
    hub.create("guild/gulliver").tags["v0"] = "0" * 40
    to_branch = {"run": str(run), "repo_id": "guild/gulliver", "revision": "last-2-blocks"}
    new, again, tag = desk.call(to_branch, to_branch, {**to_branch, "revision": "v0"})
    assert new["url"] == f"{hub.endpoint}/guild/gulliver/tree/last-2-blocks"
    assert again["sent"] == []
    assert on_hub(desk, "guild/gulliver", "last-2-blocks") == on_disk(run)
    assert on_hub(desk, "guild/gulliver") == {}
    assert (tag["error"], "is a tag" in tag["message"]) == ("InputError", True)


def test_access_is_checked_before_any_training(desk):
    hub = desk.hub
    hub.create("me/mine")
    hub.create("you/theirs")
    hub.create("you/hidden", private=True)
    calls = [
        ({"repo_id": "me/new", "private": True}, None),
        ({"repo_id": "me/new", "revision": "trial"}, None),
        ({"repo_id": "me/mine", "token": BAD_TOKEN}, "does not accept the token"),
        ({"repo_id": "me/mine", "token": READ_TOKEN}, "The token can only read"),
        ({"repo_id": "me/other", "token": READ_TOKEN}, "The token can only read"),
        ({"repo_id": "you/theirs", "token": TOKEN}, "push to me/theirs"),
        ({"repo_id": "you/hidden"}, "The token is known in me, guild, not in you"),
        ({"repo_id": "nobody/x"}, "The token is known in me, guild, not in nobody"),
        ({"repo_id": "me/mine", "private": True}, "is public, and this run is to be private"),
        ({"repo_id": "mine"}, "NAMESPACE/mine"),
        ({"repo_id": "me/a--b"}, "no repository's name"),
        ({"repo_id": "me/mine", "revision": "0" * 40}, "name of a branch"),
        ({"repo_id": "me/mine", "token": "hf_with blank"}, "characters in it"),
        ({"repo_id": "me/mine", "token": " "}, "There is no Hugging Face token"),
    ]
    outcomes = desk.call(*[{"function": "check_access", **call} for call, _ in calls])
    for (call, problem), outcome in zip(calls, outcomes, strict=True):
        if problem is None:
            assert outcome["error"] is None, outcome
        else:
            assert (outcome["error"], outcome["code"]) == ("InputError", 2), call
            assert problem in outcome["message"], outcome
    assert set(hub.repositories) == {"me/mine", "you/theirs", "you/hidden", "me/new"}
    assert hub.repositories["me/new"].private
    assert set(hub.repositories["me/new"].branches) == {"main", "trial"}
    assert hub.count("POST", "/commit/") == 0
    assert "Traceback" not in desk.output


def test_a_server_that_repeats_the_token_does_not_get_it_into_a_message(desk):
    headers = {"X-Error-Message": f"The token {TOKEN} has no such right"}
    desk.hub.faults = [Fault("GET", "auth-check", "status", status=403, headers=headers)]
    outcome = desk.call({"function": "check_access", "repo_id": "me/new"})[0]
    assert "The token <token> has no such right" in outcome["message"]
    assert "Give the token write access to me/new" in outcome["message"]


def test_a_hub_that_does_not_answer_is_an_error_before_training(desk):
    desk.hub.faults = [Fault("GET", "whoami", "stall", times=99)]
    call = {"function": "check_access", "repo_id": "me/new", "answer_seconds": 0.3}
    outcome = desk.call(call)[0]
    assert (outcome["error"], outcome["code"]) == ("HubUnreachable", 2)
    assert "did not answer in time" in outcome["message"]
    assert desk.hub.count("GET", "whoami") == 4


def test_offline_mode_is_an_error_before_anything_is_asked(desk, run):
    outcome = desk.call({"function": "check_access", "repo_id": "me/new"}, HF_HUB_OFFLINE="1")[0]
    assert (outcome["error"], outcome["code"]) == ("InputError", 2)
    assert "HF_HUB_OFFLINE" in outcome["message"]
    assert desk.hub.seen == []


def test_access_that_was_lost_while_training_leaves_the_run_to_be_pushed_later(desk, run):
    arguments = {"run": str(run), "repo_id": "me/gulliver", "token": BAD_TOKEN}
    later, at_once = desk.call({"function": "push_after_training", **arguments}, arguments)
    assert (later["error"], later["code"]) == ("UploadIncomplete", 5)
    assert "does not accept the token" in later["message"]
    assert "partialtune push" in later["message"]
    assert (at_once["error"], at_once["code"]) == ("InputError", 2)
    assert desk.hub.repositories == {}


def test_a_failed_audit_is_published_only_when_that_is_allowed(desk, run):
    audit = json.loads((run / "audit.json").read_text())
    (run / "audit.json").write_text(json.dumps({**audit, "passed": False}))
    arguments = {"run": str(run), "repo_id": "me/gulliver"}
    refused, allowed = desk.call(arguments, {**arguments, "allow_failed_audit": True})
    assert (refused["error"], refused["code"]) == ("InputError", 2)
    assert "--allow_failed_audit" in refused["message"]
    assert allowed["error"] is None
    assert json.loads(desk.hub.files("me/gulliver")["audit.json"])["passed"] is False


FULL_DISK = """
import resource, sys
from partialtune.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))  # bytes that a file may have
print("exit", main(sys.argv[2:]))
"""


def test_a_full_disk_keeps_the_run_whole_and_the_next_push_names_its_repository(desk, run):
    card = run / "README.md"
    card.write_text(f"---\nlibrary_name: transformers\n---\nfrom_pretrained({UNNAMED!r})\n", encoding="utf-8")
    before = digest_of(run)
    words = ("push", str(run), "--repo_id", "me/gulliver")
    printed = desk.run(FULL_DISK, "10", *words)
    assert "exit 5" in printed
    assert "File too large" in printed
    assert digest_of(run) == before
    assert "exit 0" in desk.run(FULL_DISK, "100000", *words)
    assert card.read_text(encoding="utf-8").splitlines()[-1] == "from_pretrained('me/gulliver')"
    assert on_hub(desk) == on_disk(run)


def without_digests(run):
    plan = json.loads((run / "freeze_plan.json").read_text())
    for parameter in plan["parameters"]:
        parameter["sha256_after"] = None
    (run / "freeze_plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("damage", "lacking"),
    [
        (lambda run: (run / "report.html").unlink(), "report.html"),
        (lambda run: next(run.glob("model-00002-*")).unlink(), "model-00002-of-"),
        (lambda run: [path.unlink() for path in run.glob("model*")], "model.safetensors"),
        (lambda run: (run / "audit.json").unlink(), "audit.json"),
        (without_digests, "the digests after training"),
        (shutil.rmtree, "recipe.yaml"),
    ],
)
def test_a_folder_that_holds_no_finished_run_is_refused(run, damage, lacking):
    check_finished(run, allow_failed_audit=False)
    damage(run)
    with pytest.raises(InputError, match=lacking):
        check_finished(run, allow_failed_audit=False)


def test_files_are_digested_again_only_when_they_changed(run, monkeypatch):
    first = files_to_send(run)
    opened = []
    read = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": opened.append(path.name) or read(path, mode))
    assert files_to_send(run) == first
    assert opened == []
    with read(run / "report.html", "wb") as file:
        file.write(b"another page")
    assert files_to_send(run)["report.html"].sha256 == hashlib.sha256(b"another page").hexdigest()
    assert opened == ["report.html"]


LOAD = """
import os, sys, torch, json
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

ids = torch.arange(24).view(2, 12)
def logits(name, **where):
    model = AutoModelForCausalLM.from_pretrained(name, **where)
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr(), "the head is tied"
    with torch.no_grad():
        return model.eval()(ids).logits

local = logits(sys.argv[1])
for revision in json.loads(sys.argv[2]):
    assert torch.equal(logits("me/gulliver", revision=revision), local), revision
assert torch.equal(logits("me/gulliver"), local)
tokenizer = AutoTokenizer.from_pretrained("me/gulliver")
assert tokenizer("w5 w7")["input_ids"] == [5, 7]
generate = pipeline("text-generation", "me/gulliver")
print(generate("w5 w7", max_new_tokens=3, do_sample=False)[0]["generated_text"])
print("loaded alike")
"""


@pytest.mark.slow
def test_a_pushed_model_loads_back_with_the_same_logits_to_the_bit(desk, run):
    arguments = {"run": str(run), "repo_id": "me/gulliver", "private": True}
    on_main, on_branch = desk.call(arguments, {**arguments, "revision": "trial"})
    assert on_branch["error"] is None
    revisions = json.dumps(["trial", on_main["commit"]])
    shard = hashlib.sha256(sorted(run.glob("model-*.safetensors"))[0].read_bytes()).hexdigest()
    desk.hub.faults = [Fault("GET", f"/objects/{shard}", "truncate")]
    assert "loaded alike" in desk.run(LOAD, str(run), revisions)
    assert desk.hub.faults[0].times == 0, "the download was not cut short"
    asked = len(desk.hub.seen)
    assert "loaded alike" in desk.run(LOAD, str(run), revisions, HF_HUB_OFFLINE="1")
    assert len(desk.hub.seen) == asked


@pytest.mark.slow
def test_a_run_from_a_base_on_the_hub_ends_there_and_a_stranger_can_check_it(desk, tmp_path):
    files = {path.name: path.read_bytes() for path in builtin_folder("builtin:lilliput").iterdir() if path.is_file()}
    base = desk.hub.create("guild/lilliput")
    commit = base.commit("main", {name: Blob(len(body), body) for name, body in files.items()}, "the base")
    (tmp_path / "text.txt").write_text("A module holds functions and classes. " * 60)
    words = ["train", "builtin:quickstart", "--model_name_or_path", "guild/lilliput"]
    words += ["--text", str(tmp_path / "text.txt"), "--block_size", "32", "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "true", "--hub_model_id", "me/trained"]
    assert desk.partialtune(*words, HF_TOKEN=BAD_TOKEN)[0] == 2
    assert not (tmp_path / "run").exists()
    code, printed = desk.partialtune(*words)
    assert code == 0, printed
    assert {"model.safetensors", "audit.json"} <= set(desk.hub.files("me/trained"))
    about = ModelCard(desk.hub.files("me/trained")["README.md"].decode()).data.to_dict()
    assert (about["base_model"], about["base_model_revision"]) == ("guild/lilliput", commit)
    assert (about["license"], about["language"]) == ("apache-2.0", "en")
    _, again = desk.partialtune("push", str(tmp_path / "run"), "--repo_id", "me/trained")
    assert "Nothing was sent" in again
    code, stranger = desk.partialtune("verify", f"guild/lilliput@{commit}", "me/trained", HF_TOKEN=OTHER_TOKEN)
    assert code == 0, stranger
    assert "kept every bit" in stranger


@pytest.mark.slow
def test_new_tokens_go_to_the_hub_with_their_tokenizer_and_a_delta_is_made_whole_from_there(desk, tmp_path):
    (tmp_path / "text.txt").write_text("<poem> A module holds functions and classes. " * 60)
    words = ["train", "builtin:quickstart", "--text", str(tmp_path / "text.txt"), "--trainable", "[]"]
    words += ["--new_tokens", "[<poem>]", "--block_size", "32", "--max_steps", "1", "--checkpoint_format", "delta"]
    words += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "true", "--hub_model_id", "me/poems"]
    assert desk.partialtune(*words)[0] == 0, desk.output
    sent = desk.hub.files("me/poems")
    assert {"delta.safetensors", "delta.json", "tokenizer.json", "tokenizer_config.json"} <= set(sent)
    assert "<poem>" in [token["content"] for token in json.loads(sent["tokenizer.json"])["added_tokens"]]
    assert "row 4,096, from the mean of all rows" in sent["README.md"].decode()
    assert desk.partialtune("apply", "me/poems", str(tmp_path / "whole"))[0] == 0, desk.output
    assert desk.partialtune("verify", "builtin:lilliput", "me/poems")[0] == 0, desk.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert (tokenizer("<poem>")["input_ids"], len(tokenizer)) == ([4096], 4097)
    assert tuple(model.lm_head.weight.shape) == (4097, 192)


@pytest.mark.slow
def test_a_disk_that_is_full_while_a_base_is_downloaded_ends_in_words_and_the_next_run_gets_it_whole(desk, tmp_path):
    files = {path.name: path.read_bytes() for path in builtin_folder("builtin:lilliput").iterdir() if path.is_file()}
    desk.hub.create("guild/lilliput").commit("main", {name: Blob(len(b), b) for name, b in files.items()}, "the base")
    (tmp_path / "text.txt").write_text("A module holds functions and classes. " * 60)
    words = ["train", "builtin:quickstart", "--model_name_or_path", "guild/lilliput", "--prompts", "[]"]
    words += ["--text", str(tmp_path / "text.txt"), "--block_size", "32", "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "run")]
    code, refused = desk.partialtune(*words, file_bytes=2_000_000)  # the weights have 5 MB
    assert code == 2, refused
    assert "Traceback" not in refused
    assert "File too large" in refused
    assert not (tmp_path / "run").exists()
    assert desk.partialtune(*words, file_bytes=100_000_000)[0] == 0, desk.output
    whole = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in desk.home.rglob("model.safetensors")] == [whole]


PASTE = """
import contextlib, io, json, re, sys
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download

written = {}
for name in sys.argv[1:]:
    card = Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")
    (code,) = [block for block in re.findall("```python\\n(.*?)```", card, re.S) if "generate(" in block]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code.replace("written = ", "torch.manual_seed(3)\\nwritten = "), name, "exec"), {"torch": torch})
    written[name] = printed.getvalue()
print("written " + json.dumps(written))
"""


@pytest.mark.slow
def test_what_was_pushed_writes_from_the_hub_beside_its_base_by_the_command_and_by_the_card(desk, tmp_path):
    files = {path.name: path.read_bytes() for path in builtin_folder("builtin:lilliput").iterdir() if path.is_file()}
    desk.hub.create("guild/lilliput").commit("main", {name: Blob(len(b), b) for name, b in files.items()}, "the base")
    (tmp_path / "text.txt").write_text("A module holds functions and classes. " * 60)
    words = ["train", "builtin:quickstart", "--model_name_or_path", "guild/lilliput", "--prompts", "[A module]"]
    words += ["--text", str(tmp_path / "text.txt"), "--block_size", "32", "--max_steps", "2", "--eval_texts", "{}"]
    words += ["--trainable", "[attention]", "--learning_rate", "0.01", "--push_to_hub", "true"]
    kinds = {"me/whole": [], "me/delta": ["--checkpoint_format", "delta"], "me/adapters": ["--method", "lora"]}
    for name, more in kinds.items():
        there = ["--output_dir", str(tmp_path / name), "--hub_model_id", name, "--hub_private_repo", "true"]
        assert desk.partialtune(*words, *more, *there)[0] == 0, desk.output
    whole = desk.hub.repositories["me/whole"]
    whole.tags["v1"] = whole.branches["main"]
    whole.commit("main", {}, "all taken away")

    written, bases = {}, set()
    for name, at in {"me/whole": ["--revision", "v1"], "me/delta": [], "me/adapters": []}.items():
        asked = ["generate", name, *at, "--prompt", "A module", "--seed", "3", "--beside-base"]
        if name == "me/adapters":  # two files of it are asked for: its own, and the base's
            code, refused = desk.partialtune(*asked, HF_TOKEN=OTHER_TOKEN)
            assert (code, "the Hub does not give" in refused, "Traceback" in refused) == (2, True, False), refused
        code, printed = desk.partialtune(*asked)
        assert code == 0, printed
        of_base, written[name] = re.search(rf"--- guild/lilliput@\w+\n(.*)--- {name}\n(.*)", printed, re.S).groups()
        bases.add(of_base)
    assert written["me/whole"] == written["me/delta"] != written["me/adapters"]
    assert len(bases) == 1
    assert not bases & set(written.values())

    whole.commit("main", whole.commits[whole.tags["v1"]].files, "put back")
    pasted = desk.run(PASTE, *kinds)
    assert json.loads(pasted[pasted.index("written {") :].removeprefix("written ")) == written
