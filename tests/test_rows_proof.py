"""Rows that train are proved like the rest: the other rows keep every bit, in memory, in the files and for verify."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import partialtune
from conftest import some_windows, tiny_gpt2
from partialtune import apply_plan, attach, audited, delta_checkpoint, plan_freeze
from partialtune.cli import main
from partialtune.delta_checkpoint import Base, read_delta, write_delta
from partialtune.errors import FreezeViolation, ModelError
from partialtune.model.digests import bit_sum, bit_sums, digest, digest_of_other_rows, digest_with_rows
from partialtune.model.rows import as_rows, other_rows_name, take_other_rows, take_rows
from partialtune.pages.run_files import learning
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.saved_files import saved_differences
from partialtune.proof.snapshot import measure_deltas, take_snapshot
from partialtune.recipe_run.finished_run import open_run
from partialtune.verify.comparison_table import comparison_table
from partialtune.verify.verify import verify
from test_audit import Fault, trainer_for
from test_delta import check_rebuilt
from two_processes import on_two_processes

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
ROWS = ((3, 5), (60, 61), (124, 128))  # of 128: something is frozen before, between and behind
SELECTED = "[3:5,60,-4:]"
OTHERS = "rows other than 3:5,60,124:128"
EDGES = [0, 2, 5, 59, 61, 123]  # frozen rows, each beside the ones that train or at the matrix' end


def tiny_model(tied=True):
    return tiny_gpt2(tie_word_embeddings=tied, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def flip(matrix, row, column=7):
    matrix.detach()[row].view(torch.int32)[column] ^= 1


def planned(tied=True, selector="embeddings.tokens", head="tied"):
    model = tiny_model(tied)
    plan = plan_freeze(model, [selector + SELECTED], head=head)
    apply_plan(model, plan)
    return model, plan


def moved_by_hand(model):
    """The rows' parameter of each matrix, moved by values that are known."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_rows"):
                parameter += torch.linspace(-0.02, 0.03, parameter.numel()).view_as(parameter)


# ---- digests and checksums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_digest_and_checksum_of_the_other_rows_see_each_bit_of_them_and_none_of_the_rows(dtype):
    matrix = torch.randn(128, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = matrix.clone()
    for start, stop in ROWS:
        moved[start:stop] += 1
    expected = digest(torch.cat(list(take_other_rows(matrix, ROWS))))
    assert digest_of_other_rows(matrix, ROWS) == expected == digest_of_other_rows(moved, ROWS)
    sums = bit_sums([("matrix", matrix), ("others", matrix)], {"others": ROWS})
    assert sums["matrix"] == bit_sum(matrix)
    assert bit_sums([("others", moved)], {"others": ROWS}) == {"others": sums["others"]}
    without = matrix.clone()
    for start, stop in ROWS:
        without[start:stop] = 0
    assert sums["others"] == bit_sum(without)  # each value at its place in the matrix
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[matrix.element_size()]
    for row in EDGES:
        other = matrix.clone()
        other[row].view(integers)[32] ^= 1
        assert digest_of_other_rows(other, ROWS) != expected, row
        assert bit_sums([("others", other)], {"others": ROWS}) != {"others": sums["others"]}, row
    exchanged = matrix.clone()
    exchanged[[0, 61]] = matrix[[61, 0]]
    assert bit_sums([("others", exchanged)], {"others": ROWS}) != {"others": sums["others"]}
    assert digest_with_rows(matrix, ROWS, take_rows(moved, ROWS)) == digest(moved)


@pytest.mark.parametrize(
    "runs",
    [[], [[5, 3]], [[3, 5], [5, 7]], [[7, 8], [3, 5]], [[-1, 2]], [[126, 129]], [["3", "5"]], [[3]], 7, [[3.0, 5.0]]],
)
def test_rows_in_a_file_that_are_no_runs_of_the_matrix_are_refused(runs):
    assert as_rows([[3, 5], [60, 61], [124, 128]], 128) == ROWS
    with pytest.raises((TypeError, ValueError)):
        as_rows(runs, 128)


# ---- snapshot and deltas --------------------------------------------------------------------------------------------


def test_the_snapshot_copies_the_rows_alone_and_the_distance_is_theirs():
    model, plan = planned()
    start = model.get_parameter(WTE).detach().clone()
    snapshot = take_snapshot(model, plan)
    assert {name: copy.shape for name, copy in snapshot.copies.items()} == {WTE: (7, 32)}
    assert snapshot.digests[WTE] == digest(start)
    assert snapshot.digests[f"{WTE} ({OTHERS})"] == digest_of_other_rows(start, ROWS)
    moved_by_hand(model)
    change = torch.linspace(-0.02, 0.03, 7 * 32).double()
    delta = {one.name: one for one in measure_deltas(model, snapshot)}[WTE]
    assert delta.l2_delta == pytest.approx(change.norm().item(), rel=1e-6)
    assert delta.relative_delta == delta.l2_delta / take_rows(start, ROWS).double().norm().item()
    assert delta.max_abs_delta == pytest.approx(0.03, rel=1e-5)
    assert sum(one.l2_delta for one in measure_deltas(model, snapshot)) == delta.l2_delta  # all else is exactly 0
    assert take_snapshot(model, plan, known=snapshot) is not snapshot
    assert take_snapshot(*planned(), known=snapshot) is snapshot


@pytest.mark.parametrize("row", EDGES)
def test_where_another_row_changed_the_distance_is_unknown(row):
    model, plan = planned()
    snapshot = take_snapshot(model, plan)
    flip(model.get_parameter(WTE), row)
    unknown = [one.name for one in measure_deltas(model, snapshot) if one.l2_delta is None]
    assert unknown == [WTE]


# ---- the audit ------------------------------------------------------------------------------------------------------


def attached_run(folder, model, plan, *faults, **changes):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    trainer = trainer_for(folder, model, list(faults), **settings)
    tuning = attach(trainer, plan)
    trainer.train()
    return tuning


@pytest.mark.parametrize(("tied", "selector"), [(True, "embeddings.tokens"), (True, "head"), (False, "head")])
def test_other_rows_keep_every_bit_under_decay_and_the_audit_says_so(tmp_path, tied, selector):
    model = tiny_model(tied)
    plan = plan_freeze(model, [selector + SELECTED])
    (name,) = plan.trainable
    start = model.get_parameter(name).detach().clone()
    tuning = attached_run(tmp_path, model, plan)
    matrix = model.get_parameter(name).detach()
    assert all(map(torch.equal, take_other_rows(matrix, ROWS), take_other_rows(start, ROWS)))
    change = (matrix - start).double()
    assert tuning.audit.trainable_l2_delta == pytest.approx(change.norm().item(), rel=1e-6)
    assert (take_rows(change, ROWS) != 0).all()
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["frozen"] == {"parameters": len(plan.frozen), "changed": [], "l2_delta": 0.0}
    nothing = ("unmoved", "below_precision", "not_in_optimizer", "rows_without_gradient")
    distance = tuning.audit.trainable_l2_delta
    assert audit["trainable"] == {"parameters": 1, "l2_delta": distance, **{key: [] for key in nothing}}
    after = tuning.audit_callback.digests_after
    assert after[name] == digest(matrix)
    assert after[f"{name} ({OTHERS})"] == digest_of_other_rows(start, ROWS)
    (entry,) = [
        entry for entry in plan.to_json(tuning.audit_callback.digests_before, after)["parameters"] if "rows" in entry
    ]
    assert entry["rows"] == [[3, 5], [60, 61], [124, 128]]
    assert entry["sha256_before"] == digest(start)
    assert entry["sha256_after"] == digest(matrix)
    assert entry["sha256_other_rows_before"] == entry["sha256_other_rows_after"] == digest_of_other_rows(start, ROWS)
    assert learning(entry) == 7 * 32 == plan.trainable_parameters


@pytest.mark.parametrize("row", EDGES)
@pytest.mark.parametrize("tied", [True, False])
def test_one_planted_bit_in_another_row_is_a_violation_that_is_named(tmp_path, tied, row):
    model = tiny_model(tied)
    name = WTE if tied else HEAD
    plan = plan_freeze(model, ["head" + SELECTED])
    fault = Fault(lambda model: flip(model.get_parameter(name), row))
    with pytest.raises(FreezeViolation, match="1 frozen parameters changed: ") as raised:
        attached_run(tmp_path, model, plan, fault)
    assert str(raised.value).endswith(f"{name} ({OTHERS}).")
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["frozen"]["changed"] == [f"{name} ({OTHERS})"]
    assert audit["frozen"]["l2_delta"] is None
    assert audit["trainable"]["l2_delta"] is None
    lines = [json.loads(line) for line in (tmp_path / "weight_deltas.jsonl").read_text().splitlines()]
    assert [line["l2_delta"] for line in lines if line["name"] == name] == [None]


def test_a_planted_bit_is_found_at_a_save_and_the_frozen_part_has_no_distance_then(tmp_path):
    model = tiny_model()
    plan = plan_freeze(model, ["embeddings.tokens" + SELECTED])
    trainer = trainer_for(
        tmp_path, model, [Fault(lambda model: flip(model.transformer.wte.weight, 61), step=1)],
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    tuning = attach(trainer, plan, delta_steps=1)
    with pytest.raises(FreezeViolation, match="at step 2"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "delta/frozen_l2" not in tuning.delta_callback.group_deltas(dict(tuning.deltas))


def test_a_loop_of_ones_own_is_stopped_by_it_too():
    model = tiny_model()
    plan = plan_freeze(model, ["embeddings.tokens" + SELECTED])
    apply_plan(model, plan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids = torch.tensor(some_windows(count=2)["input_ids"])

    def train(plant):
        with audited(model, plan, optimizer) as tuning:
            for step in range(3):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if plant and step == 1:
                    flip(model.get_parameter(WTE), 123)
        return tuning

    assert train(plant=False).audit.passed
    with pytest.raises(FreezeViolation, match="rows other than 3:5,60,124:128"):
        train(plant=True)


class KeepRows(TrainerCallback):
    """Puts the rows back after every step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = model.transformer.wte.weight_rows.detach().clone()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.transformer.wte.weight_rows.copy_(self.start)


def test_rows_that_were_due_to_move_and_kept_every_bit_are_a_violation(tmp_path):
    model = tiny_model()
    plan = plan_freeze(model, ["embeddings.tokens" + SELECTED])
    with pytest.raises(FreezeViolation, match=r"yet kept every bit: transformer\.wte\.weight"):
        attached_run(tmp_path, model, plan, KeepRows())


def test_rows_that_the_optimizer_does_not_hold_are_a_violation_before_the_first_step(tmp_path):
    model, plan = planned()
    optimizer = torch.optim.AdamW([model.transformer.ln_f.weight], lr=1e-2)
    audit = FreezeAuditCallback(plan)
    with pytest.raises(FreezeViolation, match=r"missing from the optimizer: transformer\.wte\.weight"):
        trainer_for(tmp_path, model, [audit], optimizer).train()


def windows_without(*tokens):
    windows = some_windows()
    return windows.map(lambda row: {"input_ids": [9 if token in tokens else token for token in row["input_ids"]]})


def untied_run_on(folder, windows, **changes):
    model = tiny_model(tied=False)
    plan = plan_freeze(model, ["embeddings.tokens" + SELECTED])
    trainer = trainer_for(folder, model, [], weight_decay=0.1, **changes)
    trainer.train_dataset = windows
    tuning = attach(trainer, plan)
    return trainer, tuning


def test_rows_of_tokens_that_no_window_holds_are_named_though_weight_decay_moved_them(tmp_path, caplog):
    trainer, tuning = untied_run_on(tmp_path, windows_without(4, 125, 126))
    trainer.train()
    assert tuning.audit.rows_without_gradient == {WTE: ((4, 5), (125, 127))}
    assert tuning.audit.passed
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["trainable"]["rows_without_gradient"] == [{"name": WTE, "rows": [[4, 5], [125, 127]]}]
    assert "3 of the rows of transformer.wte.weight that train never had a gradient other than 0" in caplog.text
    assert ": 4,125:127. Of an embedding these are tokens that the text does not hold" in caplog.text
    assert type(tuning.audit).from_json(audit) == tuning.audit


def test_what_had_a_gradient_before_a_checkpoint_is_known_after_it(tmp_path):
    only_first = windows_without(3, 4, 60, 124, 125, 126)  # of the rows 127 alone occurs
    trainer, _ = untied_run_on(tmp_path, only_first, save_strategy="steps", save_steps=2)
    trainer.train()
    kept = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["FreezeAuditCallback"]["attributes"]["rows_with_gradient"] == {WTE: [127]}
    others = windows_without(3, 4, 60, 127).map(lambda row: {"input_ids": [124, 125, 126, *row["input_ids"][3:]]})
    trainer, tuning = untied_run_on(tmp_path, others, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tuning.audit.passed
    assert tuning.audit.rows_without_gradient == {WTE: ((3, 5), (60, 61))}


# ---- two processes --------------------------------------------------------------------------------------------------


def flip_on_rank_one(model):
    if dist.get_rank() == 1:
        flip(model.get_parameter(WTE), 61)


def train_with_ddp(folder, with_fault):
    model = tiny_model()
    plan = plan_freeze(model, ["embeddings.tokens" + SELECTED])
    try:
        tuning = attached_run(folder, model, plan, *([Fault(flip_on_rank_one)] if with_fault else []))
    except FreezeViolation as violation:
        return str(violation)
    digests = tuning.audit_callback.digests_after
    return tuning.audit.passed, digests, digest(model.get_parameter(WTE)), dist.get_world_size()


@pytest.mark.slow
def test_on_two_processes_a_bit_in_a_frozen_row_of_one_replica_is_found(tmp_path):
    main_process, other = on_two_processes(train_with_ddp, tmp_path / "clean", False)
    assert main_process == other
    passed, digests, present, processes = main_process
    assert (passed, processes) == (True, 2)
    assert digests[WTE] == present
    for message in on_two_processes(train_with_ddp, tmp_path / "fault", True):
        assert f"frozen parameters changed: {WTE} ({OTHERS})" in message


# ---- what is saved --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tied", "untied", "left untied"])
def saved(request, tmp_path):
    """A base, the same with rows that moved, and its delta; the name of the matrix; what may move."""
    tied, head = request.param != "left untied", "untied" if request.param == "untied" else "tied"
    tiny_model(tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plan = plan_freeze(model, ["head" + SELECTED], head=head)
    apply_plan(model, plan)
    before = take_snapshot(model, plan).digests
    moved_by_hand(model)
    after = take_snapshot(model, plan).digests
    for kind in ("whole", "delta"):
        (tmp_path / kind).mkdir()
        content = json.dumps(plan.to_json(before, after))
        (tmp_path / kind / "freeze_plan.json").write_text(content)
    model.save_pretrained(tmp_path / "whole")
    write_delta(tmp_path / "delta", model, plan, before, after, Base(str(tmp_path / "base")))
    return tmp_path, model, plan, after


def test_a_delta_holds_only_the_rows_and_makes_the_whole_model_again(saved):
    folder, model, plan, after = saved
    (name,) = plan.trainable
    stored = load_file(folder / "delta" / "delta.safetensors")
    assert {key: values.shape for key, values in stored.items()} == {name: (7, 32)}
    assert torch.equal(stored[name], take_rows(model.get_parameter(name).detach(), ROWS))
    description = json.loads((folder / "delta" / "delta.json").read_text())
    assert description["format"] == 2
    (entry,) = [entry for entry in description["parameters"] if "rows" in entry]
    assert entry["rows"] == [[3, 5], [60, 61], [124, 128]]
    assert entry["shape"] == [128, 32]
    assert entry["sha256_other_rows"] == after[other_rows_name(name, ROWS)]
    check_rebuilt(folder / "whole", folder / "delta", folder / "out")
    for kind in ("whole", "delta"):
        assert saved_differences(folder / kind, model, after, {}, plan) == []
    for adapted in ("whole", "delta", "out"):
        assert main(["verify", str(folder / "base"), str(folder / adapted)]) == 0, adapted


def test_a_base_in_16_bits_gives_the_other_rows_widened(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plan = plan_freeze(model, ["embeddings.tokens" + SELECTED])
    apply_plan(model, plan)
    before = take_snapshot(model, plan).digests
    moved_by_hand(model)
    after = take_snapshot(model, plan).digests
    model.save_pretrained(tmp_path / "whole")
    write_delta(tmp_path / "delta", model, plan, before, after, Base(str(tmp_path / "base")))
    check_rebuilt(tmp_path / "whole", tmp_path / "delta", tmp_path / "out")
    comparison = verify(str(tmp_path / "base"), str(tmp_path / "delta"), ["head" + SELECTED])
    assert comparison.passed
    assert [parameter.name for parameter in comparison.moved] == [WTE]


def test_an_older_program_refuses_a_delta_with_rows_and_reads_others_as_before(saved, monkeypatch):
    monkeypatch.setattr(delta_checkpoint, "FORMAT", 1)  # as it was before there were rows
    with pytest.raises(ModelError, match=r"is a delta of format 2, written by .* which reads format 1\. Update it"):
        read_delta(saved[0] / "delta", "run")


def test_a_delta_without_rows_is_of_the_format_that_older_programs_read(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    plan = plan_freeze(model, ["final_norm"])
    digests = take_snapshot(model, plan).digests
    write_delta(tmp_path / "delta", model, plan, digests, digests, Base(str(tmp_path / "base")))
    description = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert description["format"] == 1
    keys = {"name", "shape", "trainable", "sha256_before", "sha256_after"}
    assert all(entry.keys() == keys for entry in description["parameters"])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[3, 5], [60, 61]], "do not belong together"),  # of fewer rows than are stored
        ([[3, 5], [61, 62], [124, 128]], "another model|damaged|is not what the run ended with"),
        ([[5, 3]], "the delta is damaged"),
        ([[125, 132]], "the delta is damaged"),
        ("3:5", "the delta is damaged"),
    ],
)
def test_a_delta_whose_rows_are_damaged_is_refused_in_words(saved, rows, words):
    file = saved[0] / "delta" / "delta.json"
    description = json.loads(file.read_text())
    next(entry for entry in description["parameters"] if "rows" in entry)["rows"] = rows
    file.write_text(json.dumps(description))
    with pytest.raises(ModelError, match=words):
        partialtune.load(saved[0] / "delta")


def test_a_matrix_of_which_a_frozen_row_changed_all_the_same_is_whole_in_the_delta(tmp_path):
    model, plan = planned()
    model.save_pretrained(tmp_path / "base")
    before = take_snapshot(model, plan).digests
    moved_by_hand(model)
    flip(model.get_parameter(WTE), 2)
    after = take_snapshot(model, plan).digests
    model.save_pretrained(tmp_path / "whole")
    write_delta(tmp_path / "delta", model, plan, before, after, Base(str(tmp_path / "base")))
    assert load_file(tmp_path / "delta" / "delta.safetensors")[WTE].shape == (128, 32)
    check_rebuilt(tmp_path / "whole", tmp_path / "delta", tmp_path / "out")
    assert saved_differences(tmp_path / "delta", model, after, {}, plan) == []


def plant(folder, name, row, file="model.safetensors"):
    tensors = load_file(folder / file)
    stored = name if name in tensors else WTE
    flip(tensors[stored], row)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("row", [0, 123])
def test_a_bit_in_a_frozen_row_of_the_saved_files_is_read_back(saved, row):
    folder, model, plan, after = saved
    (name,) = plan.trainable
    plant(folder / "whole", name, row)
    found = [one.name for one in saved_differences(folder / "whole", model, after, {}, plan)]
    assert found == [name, f"{name} ({OTHERS})"]
    # at a checkpoint, where what trains has other values meanwhile, the frozen rows alone are looked at
    kept = {key: sha256 for key, sha256 in after.items() if key != name}
    assert [one.name for one in saved_differences(folder / "whole", model, kept, {}, plan)] == [f"{name} ({OTHERS})"]


def test_a_bit_in_a_row_of_a_saved_delta_is_read_back(saved):
    folder, model, plan, after = saved
    (name,) = plan.trainable
    plant(folder / "delta", name, 6, "delta.safetensors")
    assert [one.name for one in saved_differences(folder / "delta", model, after, {}, plan)] == [name]


# ---- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", EDGES)
def test_verify_finds_one_planted_bit_in_a_frozen_row_and_names_the_row(saved, row, capsys):
    folder, _, plan, _ = saved
    (name,) = plan.trainable
    plant(folder / "whole", name, row)
    assert main(["verify", str(folder / "base"), str(folder / "whole")]) == 3
    words = capsys.readouterr()
    where = f"1 frozen parameter changed: {name} (1 value in {OTHERS}, first in row {row})."
    assert where in words.out
    assert where in words.err
    comparison = verify(str(folder / "base"), str(folder / "whole"))
    assert comparison.not_the_result == (name, f"{name} ({OTHERS})")
    content = comparison.to_json()
    assert content["changed_though_frozen"] == [f"{name} ({OTHERS})"]
    (entry,) = [entry for entry in content["parameters"] if entry["changed"]]
    assert entry["changed_values"] == 7 * 32 + 1
    assert entry["changed_other_values"] == 1
    assert entry["changed_other_rows"] == (row,)
    assert entry["rows"] == ROWS
    assert json.loads(json.dumps(content, allow_nan=False))["passed"] is False


def test_rows_as_a_claim_on_the_command_line(saved, capsys):
    folder = saved[0]
    (name,) = saved[2].trainable
    words = ["verify", str(folder / "base"), str(folder / "whole"), "--trainable"]
    assert main([*words, "head" + SELECTED]) == 0
    out = capsys.readouterr().out
    assert "rows 3:5,60,124:128 may move" in out
    assert f"and {name} ({OTHERS}), kept every bit." in out
    assert main([*words, "head[3:5,-4:]"]) == 3  # row 60 moved too
    assert "32 values in rows other than 3:5,124:128, first in row 60" in capsys.readouterr().err
    assert main([*words, "head"]) == 0
    assert main([*words, "head[:10]", "head[50:]"]) == 0


def test_the_relative_change_of_rows_is_that_of_the_deltas(saved):
    folder, model, plan, _ = saved
    (name,) = plan.trainable
    start = take_rows(verify_base(folder, name), ROWS).double()
    change = take_rows(model.get_parameter(name).detach(), ROWS).double() - start
    comparison = verify(str(folder / "base"), str(folder / "delta"))
    (parameter,) = comparison.moved
    assert parameter.name == name
    assert parameter.changed_values == 7 * 32
    assert parameter.norm_before == pytest.approx(start.norm().item(), rel=1e-12)
    assert parameter.l2_delta == pytest.approx(change.norm().item(), rel=1e-12)
    assert parameter.relative_delta == pytest.approx((change.norm() / start.norm()).item(), rel=1e-12)
    assert comparison_table(comparison).splitlines()[-1].startswith("verdict: passed. 1 of the 1 parameter")


def verify_base(folder, name):
    return AutoModelForCausalLM.from_pretrained(folder / "base").get_parameter(name).detach()


def test_the_digests_of_the_other_rows_in_the_plan_are_checked(saved):
    folder = saved[0]
    (name,) = saved[2].trainable
    file = folder / "whole" / "freeze_plan.json"
    content = json.loads(file.read_text())
    entry = next(entry for entry in content["parameters"] if "rows" in entry)
    for key, attribute in (
        ("sha256_other_rows_before", "not_the_base"),
        ("sha256_other_rows_after", "not_the_result"),
    ):
        right, entry[key] = entry[key], "0" * 64
        file.write_text(json.dumps(content))
        comparison = verify(str(folder / "base"), str(folder / "whole"))
        assert getattr(comparison, attribute) == (f"{name} ({OTHERS})",)
        assert comparison.passed is False
        entry[key] = right
    for damaged in ([[5, 3]], "all", [[0, 999]]):
        entry["rows"] = damaged
        file.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=r"freeze_plan\.json cannot be read as a freeze plan"):
            verify(str(folder / "base"), str(folder / "whole"))


def test_nothing_about_rows_is_in_a_verdict_without_rows(saved):
    folder = saved[0]
    shutil.copyfile(folder / "base" / "config.json", folder / "out.json")
    content = verify(str(folder / "base"), str(folder / "base"), ["final_norm"]).to_json()
    assert not {"rows", "changed_other_values", "changed_other_rows"} & content["parameters"][0].keys()


# ---- a whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """A recipe with rows of the bundled model, run twice through the command line: saved whole, and as a delta."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    recipe = {
        "model_name_or_path": "builtin:lilliput",
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["embeddings.tokens[-4:]"],
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "prompts": ["It was"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for kind in ("full", "delta"):
        words = ["--output_dir", str(folder / kind), "--checkpoint_format", kind]
        assert main(["train", str(folder / "recipe.yaml"), *words]) == 0
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_a_run_with_rows_is_proved_in_its_files_and_for_verify_saved_whole_and_as_a_delta(whole_runs, tmp_path, capsys):
    for kind in ("full", "delta"):
        run = whole_runs / kind
        audit = read(run, "audit.json")
        assert (audit["passed"], audit["frozen"]["changed"]) == (True, [])
        assert audit["saved_files"] == {"read_back": True, "different": []}
        (entry,) = [entry for entry in read(run, "freeze_plan.json")["parameters"] if entry["trainable"]]
        assert entry["rows"] == [[4092, 4096]]
        assert entry["sha256_before"] != entry["sha256_after"]
        assert entry["sha256_other_rows_before"] == entry["sha256_other_rows_after"]
        assert read(run, "freeze_plan.json")["trainable_parameters"] == 4 * 192
        assert main(["verify", "builtin:lilliput", str(run)]) == 0
        assert main(["verify", "builtin:lilliput", str(run), "--trainable", "head[-4:]"]) == 0
        assert main(["verify", "builtin:lilliput", str(run), "--trainable", "head[-3:]"]) == 3
        files = open_run(run).files
        assert (files.groups()[0].trainable, files.frozen_values) == (768, 2_664_576 - 768)
        insight = read(run, "insight.json")
        assert [one["id"] for one in insight["moved_tokens"]["matrices"][0]["most"]] == [4094, 4093, 4092, 4095]
        assert [one["shape"] for one in insight["effective_ranks"]["matrices"]] == [[4, 192]]
        card = (run / "README.md").read_text()
        assert "2,663,808 frozen parameters in 51 tensors and in transformer.wte.weight (rows other than" in card
        assert "768 trainable parameters in 1 tensors moved by" in card
        page = (run / "report.html").read_text()
        assert "embeddings.tokens[-4:], rows 4092:4096" in page
        assert f"other rows = {entry['sha256_other_rows_after'][:8]}" in page
    assert load_file(whole_runs / "delta" / "delta.safetensors")[WTE].shape == (4, 192)
    assert main(["apply", str(whole_runs / "delta"), str(tmp_path / "out")]) == 0
    whole, made = (folder / "model.safetensors" for folder in (whole_runs / "full", tmp_path / "out"))
    assert whole.read_bytes() == made.read_bytes()
    shutil.copytree(whole_runs / "full", tmp_path / "planted")
    for row in (0, 4091):
        shutil.copyfile(whole, tmp_path / "planted" / "model.safetensors")
        plant(tmp_path / "planted", WTE, row)
        capsys.readouterr()
        assert main(["verify", "builtin:lilliput", str(tmp_path / "planted")]) == 3
        assert f"{WTE} (1 value in rows other than 4092:4096, first in row {row})" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "delta"])
def test_the_check_in_the_card_looks_at_the_other_rows(whole_runs, tmp_path, monkeypatch, capsys, kind):
    shutil.copytree(whole_runs / kind, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    blocks = [block.split("```")[0] for block in Path("README.md").read_text().split("```python\n")[1:]]
    check = next(block for block in blocks if "hashlib" in block)
    exec(check, {})  # what a reader would paste
    assert "changed although frozen: nothing" in capsys.readouterr().out
    if kind == "full":
        plant(tmp_path / "run", WTE, 4091)
        exec(check, {})
        assert f"changed although frozen: ['{WTE}']" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 4091])
def test_a_bit_planted_during_a_run_ends_it_with_3(whole_runs, tmp_path, monkeypatch, capsys, row):
    step = Trainer.training_step

    def with_fault(self, model, *rest):
        if self.state.global_step == 1:
            flip(self.model.transformer.wte.weight, row)
        return step(self, model, *rest)

    monkeypatch.setattr(Trainer, "training_step", with_fault)
    assert main(["train", str(whole_runs / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]) == 3
    assert "transformer.wte.weight (rows other than 4092:4096)" in capsys.readouterr().err
    assert read(tmp_path / "run", "exit.json")["code"] == 3
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_proof(whole_runs, tmp_path):
    shutil.copytree(whole_runs / "full", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4"))
    for name in ("exit.json", "model.safetensors", "audit.json"):
        (tmp_path / "run" / name).unlink()
    words = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    assert main(["train", str(whole_runs / "recipe.yaml"), *words]) == 0
    for name in ("freeze_plan.json", "audit.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole_runs / "full" / name).read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole_runs / "full/model.safetensors").read_bytes()
