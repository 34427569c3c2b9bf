"""Numbers and findings of a run -> the words in which figures, report and card say them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partialtune.metrics import HEADLINE, METRICS
from partialtune.pages.run_files import RunFiles, learning, runs_in_words
from partialtune.words import count, counted, joined, percent, significant

WITHHELD = (
    "The text does not come back from its tokens: this tokenizer cannot write it, and bytes would be counted that no "
    "token stands for. Perplexity compares between runs with this tokenizer alone."
)


@dataclass(frozen=True)
class ScoreChange:
    """One metric of one text before and after training, in words. `better` is None where nothing changed."""

    metric: str
    before: str
    after: str
    change: str
    better: bool | None


def score_changes(entry: Mapping[str, Mapping[str, Any]]) -> list[ScoreChange]:
    """Rows of an evaluation table for one text's `{before, after}`, one for each metric."""
    rows = []
    for key, metric in METRICS.items():
        before, after = entry["before"].get(key), entry["after"].get(key)
        words = (metric.words(before), metric.words(after), metric.change_words(before, after))
        rows.append(ScoreChange(metric.label, *words, metric.improved(before, after)))
    return rows


def text_label(name: str) -> str:
    """How a text of `evaluation.json` is called."""
    return {"validation": "held-out text", "training": "training text"}.get(name, name)


def trained_share(run: RunFiles) -> str:
    """39,385,344 of 124,439,808 parameters (31.7%)."""
    trainable, total = run.plan["trainable_parameters"], run.plan["total_parameters"]
    return f"{count(trainable)} of {count(total)} parameters ({percent(trainable / total)})"


def new_tokens_words(run: RunFiles) -> str:
    """What was added to the tokenizer, and that the scores before are not quite the base's; empty where nothing was."""
    tokens = run.plan.get("new_tokens", [])
    if not tokens:
        return ""
    starts = [f"{one['token']} (row {count(one['row'])}, from {_start_of(one)})" for one in tokens]
    return (
        f"New tokens: {', '.join(starts)}. The base has none of them: the scores before are those of the base with "
        f"these tokens and their start values."
    )


def quantized_words(run: RunFiles) -> str:
    """In which bits frozen matrices were held, and what the base scored so; empty where none were."""
    kind = run.plan.get("frozen_quantization")
    if not kind:
        return ""
    held = [parameter for parameter in run.plan["parameters"] if "sha256_packed" in parameter]
    scored = {name: entry for name, entry in run.texts.items() if "quantized_base" in entry}
    scores = [
        f"{text_label(name)} {HEADLINE.words(entry['before'][HEADLINE.key])} as it is, "
        f"{HEADLINE.words(entry['quantized_base'][HEADLINE.key])} in {kind}, "
        f"{HEADLINE.words(entry['after'][HEADLINE.key])} with what was trained over it"
        for name, entry in scored.items()
    ]
    return (
        f"While it trained, {counted(len(held), 'frozen weight')} of the blocks "
        f"({count(sum(parameter['numel'] for parameter in held))} values) were held in {kind}. What was trained is "
        f"saved over the base as it was, and both columns below are of that base. "
        f"{HEADLINE.label.capitalize()} of the base: {'; '.join(scores)}."
    )


def _start_of(token: Mapping[str, Any]) -> str:
    return f"the mean of “{token['init']}”" if token.get("init_rows") else "the mean of all rows"


def trained_title(run: RunFiles, limit: int = 104) -> str:
    """What trained, in a line of about `limit` characters: the selectors and the share of the parameters."""
    share = trained_share(run)
    return f"Trained: {joined(run.selectors, limit - len(share) - len('Trained:  · '))} · {share}"


@dataclass(frozen=True)
class Finding:
    """One line of the verdict. `level` is `good`, `bad`, `warning` or `plain`."""

    level: str
    title: str
    value: str
    detail: str


def verdict(run: RunFiles) -> list[Finding]:
    """The run in a few findings: was the freeze kept, how far did the rest move, what did it bring."""
    if run.unfinished is not None and run.audit["passed"] is None:
        return progress(run)
    weights = [frozen_finding(run), *resting_finding(run), trainable_finding(run), *saved_finding(run)]
    return [*weights, *length_finding(run), *held_out_finding(run), *replay_finding(run), *forgetting_finding(run)]


def progress(run: RunFiles) -> list[Finding]:
    """A run that has no verdict yet in a few findings: how far it is, how far the weights moved, the losses."""
    found, at = run.unfinished, run.deltas.steps[-1] if run.deltas.steps else None
    if found is None:
        return []
    value = f"step {count(found.step)}" + (f" of {count(found.steps)}" if found.steps else "")
    share = f"{percent(found.step / found.steps)} of the steps. " if found.steps else ""
    trained = f"{counted(len(run.trained), 'tensor')}: {trained_share(run)}."
    findings = [Finding("plain", "Progress", value, f"{share}{trained}")]
    for key, title in (("loss", "Training loss"), ("eval_loss", "Held-out loss")):
        losses = [(one["step"], one[key]) for one in run.log if key in one]
        if losses:
            (first, before), (last, now) = losses[0], losses[-1]
            detail = f"At step {count(last)}; it was {significant(before)} at step {count(first)}."
            findings.append(Finding("plain", title, f"{significant(now)} nats/token", detail))
    if at is not None:
        frozen, moved = (run.deltas.l2_delta([p["name"] for p in part], at) for part in (run.frozen, run.trained))
        words = "no distance" if frozen == 0 else "an unknown distance" if frozen is None else significant(frozen)
        detail = f"At step {count(at)}. The frozen part has moved by {words}; its digests are compared at the end."
        findings.append(Finding("plain", "Trained part", f"L2 change {significant(moved)}", detail))
    return findings


def length_finding(run: RunFiles) -> list[Finding]:
    """Where early stopping has ended the run; nothing where it went on to its last step."""
    stopped = run.record.get("stopped_early")
    if not stopped:
        return []
    value = f"stopped at step {count(stopped['step'])} of {count(stopped['of'])}"
    detail = f"Held-out loss had not improved since step {count(stopped['best_step'])}; the weights are those of step "
    return [Finding("plain", "Early stopping", value, f"{detail}{count(stopped['weights_of_step'])}.")]


def frozen_finding(run: RunFiles) -> Finding:
    """Whether every frozen parameter kept every bit."""
    frozen, rows, audit = run.frozen, run.frozen_rows, run.audit["frozen"]
    if not run.freezes:
        return Finding("plain", "Frozen part", "none", "Nothing was frozen: every parameter trained.")
    size = f"{count(run.frozen_values)} frozen parameters in {count(len(frozen))} tensors"
    size += f" and in {joined(rows, 160)}" if rows else ""
    if changed_buffers(run) and not audit["changed"]:
        value = f"{counted(len(changed_buffers(run)), 'buffer')} changed"
        detail = f"{size} kept every bit, but these buffers, which nothing trains, changed: "
        return Finding("bad", "Frozen part", value, f"{detail}{joined(changed_buffers(run), 160)}.")
    if audit["changed"]:
        value = f"{counted(len(audit['changed']), 'tensor')} changed"
        moved = (
            "an unknown distance"
            if audit["l2_delta"] is None
            else f"an L2 distance of {significant(audit['l2_delta'])}"
        )
        tensors = f"{count(len(frozen))} frozen tensors" + (f" and the frozen rows of {len(rows)} more" if rows else "")
        detail = f"Of {tensors} these changed, by {moved}: {joined(audit['changed'], 160)}."
        return Finding("bad", "Frozen part", value, detail)
    strangers = [name for names in changed_names(run).values() for name in names]
    if strangers:
        detail = f"{size} kept every bit, but names are missing from the model or new: {joined(strangers, 160)}."
        return Finding("bad", "Frozen part", f"{counted(len(strangers), 'name')} changed", detail)
    exact = "exactly 0" if audit["l2_delta"] == 0 else significant(audit["l2_delta"])
    return Finding("good", "Frozen part", f"L2 change {exact}", f"{size} kept every bit.")


def resting_finding(run: RunFiles) -> list[Finding]:
    """Whether blocks that learn in turn kept every bit while they rested; nothing where none do."""
    if "sampling" not in run.plan:
        return []
    from partialtune.freeze.block_sampling import BlockSampling  # here: a page need not wait for torch

    sampling = BlockSampling.from_json(run.plan["sampling"])
    detail = f"{sampling.words()}."
    held = sum(parameter["numel"] for parameter in run.plan["parameters"] if parameter.get("in_turn"))
    if run.record.get("processes", 1) > 1:
        detail += f" On every process all candidates kept their gradient buckets (DDP): {count(held)} values."
    changed = changed_at_rest(run)
    if changed:
        value = f"{counted(len(changed), 'tensor')} changed at rest"
        return [Finding("bad", "Blocks in turn", value, f"{detail} While their block rested: {joined(changed, 160)}.")]
    value = counted(run.draws, "draw") if run.draws is not None else "0 changed at rest"
    return [Finding("good", "Blocks in turn", value, f"{detail} Blocks at rest kept every bit.")]


def changed_at_rest(run: RunFiles) -> list[str]:
    """Names of parameters that changed while their block rested."""
    return run.audit.get("resting", {}).get("changed", [])


def trainable_finding(run: RunFiles) -> Finding:
    """How far the trainable parameters moved, and which of them could not."""
    trained, audit = run.trained, run.audit["trainable"]
    detail = f"{count(sum(map(learning, trained)))} trainable parameters in {count(len(trained))} tensors"
    if run.deltas.steps:
        relative = run.deltas.relative_delta([p["name"] for p in trained], run.deltas.steps[-1])
        detail += f" moved by {percent(relative)} of their norm" if relative is not None else ""
    explained = run.audit["frozen"]["changed"] or changed_buffers(run) or any(changed_names(run).values())
    explained = explained or saved_otherwise(run) or changed_at_rest(run)
    failed = audit["not_in_optimizer"] or not (run.audit["passed"] or explained)
    warned = audit["unmoved"] or audit["below_precision"] or audit.get("rows_without_gradient")
    level = "bad" if failed else "warning" if warned else "good"
    return Finding(level, "Trained part", f"L2 change {significant(audit['l2_delta'])}", f"{detail}.")


def saved_finding(run: RunFiles) -> list[Finding]:
    """What the saved files, read back, hold otherwise than was audited; nothing where there is no such thing."""
    found = saved_otherwise(run)
    if not found:
        return []
    names = joined([name for name, _ in found], 160)
    detail = f"What was read back from disk is not what was audited in memory: {names}."
    return [Finding("bad", "Saved files", counted(len(found), "difference"), detail)]


def saved_otherwise(run: RunFiles) -> list[tuple[str, str]]:
    """(tensor or file, what is wrong with it) of the saved files; runs from before they were read back name none."""
    return [(one["name"], one["what"]) for one in run.audit.get("saved_files", {}).get("different", [])]


def changed_buffers(run: RunFiles) -> list[str]:
    """Names of persistent buffers that changed; runs from before they were audited name none."""
    return run.audit.get("buffers", {}).get("changed", [])


def changed_names(run: RunFiles) -> dict[str, list[str]]:
    """Names that went missing in the run, and new ones; runs from before these were audited have none."""
    return run.audit.get("names", {"missing": [], "new": []})


def audit_problems(run: RunFiles) -> list[tuple[str, str]]:
    """(parameter, what is wrong with it) of every entry in the audit's lists."""
    frozen, trainable, names = run.audit["frozen"], run.audit["trainable"], changed_names(run)
    gone = set(names["missing"])
    return [
        *((name, "is frozen, but changed") for name in frozen["changed"] if name not in gone),
        *((name, "changed while its block rested") for name in changed_at_rest(run) if name not in gone),
        *(
            (name, "is a buffer, which nothing trains, but changed")
            for name in changed_buffers(run)
            if name not in gone
        ),
        *((name, "was in the model at the start, but is no longer there") for name in names["missing"]),
        *((name, "is in the model, but was not in it when the plan was made") for name in names["new"]),
        *((name, "is trainable, but was not in the optimizer") for name in trainable["not_in_optimizer"]),
        *((entry["name"], f"is trainable, but did not move: {entry['reason']}") for entry in trainable["unmoved"]),
        *((name, "is trainable, but its updates are below its precision") for name in trainable["below_precision"]),
        *(
            (entry["name"], f"trains in part, but its rows {runs_in_words(entry['rows'])} never had a gradient")
            for entry in trainable.get("rows_without_gradient", [])
        ),
        *saved_otherwise(run),
    ]


def is_withheld(pair: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a text has a loss and yet no bits per byte: it does not come back from its tokens."""
    before = pair["before"]
    return before[HEADLINE.key] is None and before.get("loss") is not None


def held_out_finding(run: RunFiles) -> list[Finding]:
    """Bits per byte of the held-out text before and after; of the training text where nothing was held out."""
    for name in ("validation", "training"):
        entry = run.texts.get(name)
        if entry:
            before, after = entry["before"][HEADLINE.key], entry["after"][HEADLINE.key]
            if is_withheld(entry):
                return [Finding("plain", f"Bits per byte, {text_label(name)}", "withheld", WITHHELD)]
            fell = None not in (before, after) and after < before
            value = f"{HEADLINE.words(before)} → {HEADLINE.words(after)}"
            detail = f"{HEADLINE.change_words(before, after)}; lower is better."
            if name == "training":
                detail += " No text was held out, so this does not show what the model learnt beyond it."
            level = "good" if fell and name == "validation" else "plain"
            return [Finding(level, f"Bits per byte, {text_label(name)}", value, detail)]
    return []


def replayed_share(run: RunFiles) -> str:
    """1 of the 4 windows of each step; empty where nothing is replayed."""
    replay = run.record.get("replay")
    if not replay:
        return ""
    return f"{count(replay['windows_a_step'])} of the {count(replay['of_a_step'])} windows of each step"


def replay_finding(run: RunFiles) -> list[Finding]:
    """Bits per byte of the text that was replayed, before and after."""
    entry = run.texts.get("replay")
    if not entry or not run.replays:
        return []
    before, after = entry["before"][HEADLINE.key], entry["after"][HEADLINE.key]
    share = replayed_share(run)
    detail = f"{HEADLINE.change_words(before, after)}; trained on as well{f', {share}' if share else ''}."
    value = f"{HEADLINE.words(before)} → {HEADLINE.words(after)}"
    return [Finding("plain", "Bits per byte, replayed text", value, detail)]


def forgetting_finding(run: RunFiles) -> list[Finding]:
    """Bits per byte of the recipe's `eval_texts`: the one that lost most, and how many others there are."""
    pairs = {
        name: (entry["before"][HEADLINE.key], entry["after"][HEADLINE.key])
        for name, entry in run.texts.items()
        if name not in ("validation", "training") and not (name == "replay" and run.replays)
    }
    known = {name: pair for name, pair in pairs.items() if None not in pair and pair[0]}
    if not known:
        return []
    worst = max(known, key=lambda name: known[name][1] / known[name][0])
    before, after = known[worst]
    value = " → ".join(HEADLINE.words(bits) for bits in (before, after))
    fate = "so much was forgotten" if after > before else "nothing was forgotten"
    others = f", and it fared worst of {len(known)} such texts" if len(known) > 1 else ""
    detail = f"{HEADLINE.change_words(before, after)}; {fate}{others}."
    return [Finding("plain", f"Bits per byte, {joined([worst], 30)}", value, detail)]
