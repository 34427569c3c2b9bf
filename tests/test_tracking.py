"""What trackers hold after a run: the groups' deltas under names that stay, step by step, and the audit's verdict."""

import json
import struct
import time

import pytest

import partialtune as pt
from conftest import tiny_gpt2
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.recipe_run.while_training import Samples
from test_deltas import make_trainer

pytest.importorskip("tensorboard", reason="needs the test extra's tensorboard")

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for: samples are taken
# A dashboard is built on these: a name that changes is a broken promise.
NAMES = {
    *("delta/frozen_l2", "delta/trainable_l2"),
    *("delta/embeddings.tokens", "delta/embeddings.positions", "delta/final_norm"),
    *(f"delta/block_{block:02}/{part}" for block in range(3) for part in ("attention", "mlp", "norms")),
}


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """The scalars of a run's event file by tag, (step, value) pairs, and the run's Trainer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("run")
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1].mlp", "final_norm"])
    apply_plan(model, plan)
    callback = WeightDeltaCallback(plan, delta_steps=2)
    trainer = make_trainer(folder, model, [callback], report_to=["tensorboard"], logging_steps=1)
    callback.attach(trainer)
    trainer.train()
    (file,) = folder.glob("runs/*/events.out.tfevents.*")  # deeper down lies that of the hyperparameters
    read = EventAccumulator(str(file)).Reload()
    scalars = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars, trainer


def test_the_event_file_has_every_group_under_its_stable_name_and_no_other_delta(events):
    scalars, _ = events
    assert {tag.removeprefix("train/") for tag in scalars if "delta/" in tag} == NAMES


def test_the_event_file_holds_the_values_of_the_log_at_their_steps(events):
    scalars, trainer = events
    entries = [entry for entry in trainer.state.log_history if "delta/frozen_l2" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    for name in NAMES:
        written = scalars[f"train/{name}"]
        assert [step for step, _ in written] == [2, 4, 5]
        assert [value for _, value in written] == pytest.approx([entry[name] for entry in entries], rel=1e-6)
    assert {value for _, value in scalars["train/delta/frozen_l2"]} == {0.0}
    assert scalars["train/delta/block_02/mlp"][-1][1] > 0.0


def test_the_trainers_own_loss_is_there_at_every_step(events):
    scalars, _ = events
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5]


# ---- with attach alone, every tracker -------------------------------------------------------------------------------

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """A run as the README has it, with all trackers. The folder, and the run's Trainer."""
    for name in TRACKERS:
        pytest.importorskip(name, reason=f"needs the integrations extra's {name}")
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setattr("trackio.utils.TRACKIO_DIR", folder / "trackio")  # read at import, which may be over
        patch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder / "trackio")
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.chdir(folder)  # MLflow's artifacts
        import mlflow
        import wandb

        model = tiny_gpt2()
        plan = plan_freeze(model, ["blocks[-1].mlp", "final_norm"])
        trainer = make_trainer(folder, model, [], report_to=list(TRACKERS), logging_steps=1)
        pt.attach(trainer, plan, delta_steps=2)
        Samples(lambda model: [" of text\nand on"], ["A line"], [" of the base"], folder, 2).attach(trainer)
        trainer.train()
        wandb.finish()
        mlflow.flush_async_logging()
        yield folder, trainer


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob("runs/*/events.out.tfevents.*")
    read = EventAccumulator(str(file)).Reload()
    for tag in read.Tags()["scalars"]:
        for event in read.Scalars(tag):
            yield event.step, tag, event.value


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("huggingface")
    for entry in SQLiteStorage.get_logs("huggingface", run):
        for name, value in entry.items():
            yield entry["train/global_step"], name, value


def wandb_records(file):
    """The records of W&B's file: after 7 bytes blocks of 32 KiB, in them checksum, length, kind and bytes of pieces."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for another head in the block
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece of one
            yield b"".join(parts)
            parts = []


def read_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    end, records = time.monotonic() + 30, []
    while not any(record.HasField("exit") for record in records) and time.monotonic() < end:
        time.sleep(0.1)  # its service is a process of its own, and writes when it comes to it
        records = [Record.FromString(data) for data in wandb_records(file)]
    for record in records:
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in values.items():
            yield values["train/global_step"], name, value


def read_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            yield metric.step, name, metric.value


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_with_attach_alone_every_tracker_holds_the_deltas_and_the_verdict(attached, tracker):
    folder, trainer = attached
    prefix = "" if tracker == "mlflow" else "train/"
    held = {}
    for step, name, value in globals()[f"read_{tracker}"](folder):
        held.setdefault(name.removeprefix(prefix), {})[step] = value
    assert {name for name in held if "delta/" in name} == NAMES
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "delta/frozen_l2" in entry}
    assert logged.keys() == {2, 4, 5}
    for name in NAMES:
        assert held[name] == pytest.approx({step: entry[name] for step, entry in logged.items()}, rel=1e-6)
    assert held["delta/block_02/mlp"][5] > 0
    assert held["delta/frozen_l2"] == {2: 0.0, 4: 0.0, 5: 0.0}
    assert held["audit/passed"] == {5: 1.0}
    assert held["loss"].keys() == {1, 2, 3, 4, 5}


SAMPLE_ROWS = [
    {"step": 0, "prompt": "A line", "continuation": " of the base"},
    *({"step": step, "prompt": "A line", "continuation": " of text\nand on"} for step in (2, 4)),
]


def sampled_by_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob("runs/*/events.out.tfevents.*")
    for event in EventAccumulator(str(file)).Reload().Tensors("samples/1/text_summary"):
        (text,) = event.tensor_proto.string_val
        lines = [line.removeprefix("    ") for line in text.decode().splitlines()]  # else it would be read as Markdown
        prompt, continuation = lines[0][:6], "\n".join([lines[0][6:], *lines[1:]])
        yield {"step": event.step, "prompt": prompt, "continuation": continuation}


def sampled_by_trackio(folder):
    for _, name, value in read_trackio(folder):
        if name.endswith("samples"):
            yield from value["_value"]


def sampled_by_wandb(folder):
    for file in sorted(
        folder.glob("wandb/offline-run-*/files/media/table/samples*.json"), key=lambda f: f.stat().st_mtime_ns
    ):
        table = json.loads(file.read_text())
        yield from (dict(zip(table["columns"], row, strict=True)) for row in table["data"])


def sampled_by_mlflow(folder):
    for file in sorted(folder.glob("**/artifacts/samples/step_*.json")):
        yield from json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_every_tracker_holds_the_samples_of_each_step_as_text(attached, tracker):
    folder, trainer = attached
    assert list(globals()[f"sampled_by_{tracker}"](folder)) == SAMPLE_ROWS
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == SAMPLE_ROWS
    assert not any("samples/" in key or key == "samples" for entry in trainer.state.log_history for key in entry)


@pytest.mark.slow
def test_each_tracker_has_one_run_and_one_file(attached):
    folder, _ = attached
    assert len(list(folder.glob("runs/*"))) == 1
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert [file.name for file in folder.glob("trackio/*.db")] == ["huggingface.db"]
