"""The whole comparison, one stage a line: recipes -> learning rates -> runs -> table, figure, page.

- `comparison.html`, `comparison.csv`, `comparison.json`, `frontier.png`: what came out.
- `runs/POLICY-lrRATE-seedSEED/`: the runs, each as `train` leaves it.
- `rates/POLICY.json`, `rates/text/`: how the learning rates were chosen.
- `logs/`: what each process printed.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partialtune.compare.comparable import check_recipes, check_runs, check_seeds, differing_lengths
from partialtune.compare.frontier import render_frontier
from partialtune.compare.learning_rates import RateTrial, Search, at_the_end_of_the_list, best_rate, write_training_text
from partialtune.compare.outcomes import Outcome, Row, failed_early, grouped, read_outcome
from partialtune.compare.policies import Job, Options, Policy, read_policies
from partialtune.compare.presentation import comparison_csv, comparison_json, render_page, subtitle
from partialtune.compare.run_queue import RunQueue, last_words, steps_of
from partialtune.compare.shared_prefix import SharedPrefixes, shared_prefixes
from partialtune.errors import FreezeViolation, InputError, PartialtuneError, TrainingDiverged
from partialtune.files import write_whole
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.recipe_plan import empty_base, plan_before_text
from partialtune.recipe.key_rules import training_defaults
from partialtune.run_folder import LOCK_FILE, locked, write_json

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"


def compare_recipes(recipes: Sequence[str], options: Options) -> list[Row]:
    """Run recipes and compare them. What has been run before, in the same folder, is not run again.

    Args:
        recipes: YAML files.
        options: Seeds, learning rates, folder.

    Raises:
        InputError: If a recipe is wrong, or they differ in base, text, windows or seeds; nothing is written then.
        Interrupted: If a signal came. The same command goes on.
    """
    folder = options.output_dir
    policies = read_policies(recipes, options.words)
    check_recipes(policies, own_seeds=not options.seeds)
    check_trials(policies, options)
    plans = plan_policies(policies)
    check_rates(policies, plans, options)
    check_folder(folder)
    seeds = options.seeds or [policies[0].recipe.training.get("seed", training_defaults()["seed"])]
    # all checks stand above: what is refused leaves nothing on disk
    with locked(folder):
        # the marker comes before the first run, or `check_folder` would refuse to go on after an interruption
        begin_folder(folder)
        shared = shared_prefixes(policies, plans, seeds, rates_to_try(options))
        searches = rate_searches(shared, options, seeds[0])
        for line in shared.words():
            logger.info(line)
        with RunQueue(total_steps(policies, seeds, searches)) as queue:
            trials = {search.policy.name: queue.search(search) for search in searches}
            outcomes = run_policies(queue, shared, seeds, options, trials)
        # Texts and bases may have changed between two calls: what the runs recorded is compared, not what recipes say.
        check_runs([outcome for own in outcomes.values() for outcome in own if outcome.measures])
        rows = [Row(policy.name, outcomes[policy.name], trials.get(policy.name, ())) for policy in policies]
        write_comparison(folder, rows, notes_on(rows))
    return rows


def compare_runs(folders: Sequence[str], output_dir: Path) -> list[Row]:
    """Read finished runs and compare them.

    Args:
        folders: The `output_dir` of each.
        output_dir: Folder of the comparison.

    Raises:
        InputError: If one has not ended, or they differ in base, text, windows or seeds; nothing is written then.
    """
    check_each_once(folders)
    outcomes = [read_outcome(name) for name in folders]
    check_runs(outcomes)
    rows = grouped(outcomes)
    check_seeds({row.name: [outcome.seed for outcome in row.outcomes] for row in rows})
    check_folder(output_dir)
    with locked(output_dir):
        write_comparison(output_dir, rows, notes_on(rows))
    return rows


def plan_policies(policies: Sequence[Policy]) -> dict[str, FreezePlan]:
    """Plan each policy on the model without weights: what would stop its run stops the comparison before the first.

    Raises:
        ModelError: If the model cannot be had.
        RecipeError: If a selector matches nothing.
    """
    base = policies[0].recipe.model
    model = empty_base(base)
    plans = {}
    for policy in policies:
        try:
            plans[policy.name] = plan_before_text(model, policy.recipe.freeze)
        except InputError as error:
            raise type(error)(f"{policy.path}: {error}") from error
    return plans


def check_trials(policies: Sequence[Policy], options: Options) -> None:
    """Stop where learning rates would be tried in fewer steps than a schedule has.

    Raises:
        InputError: Names the recipe.
    """
    if not options.trial_steps:
        return
    for policy in policies:
        for entry in policy.recipe.freeze.schedule:
            if entry.get("from_epoch") or entry.get("from_step", 0) >= options.trial_steps:
                raise InputError(
                    f"{policy.path}: a phase of its schedule begins after the {options.trial_steps} steps of a trial, "
                    f"or in epochs. Raise --trial_steps, or leave it out: a trial is then as long as a run."
                )


def check_rates(policies: Sequence[Policy], plans: Mapping[str, FreezePlan], options: Options) -> None:
    """Stop where --learning_rates would change nothing, since every part of a policy has a rate of its own.

    Raises:
        InputError: Names the recipe.
    """
    for policy in policies if options.learning_rates else ():
        plan = plans[policy.name]
        rates = {parameter.learning_rate for parameter in plan.parameters if parameter.trainable}
        if plan.part_learning_rates and None not in rates:
            raise InputError(
                f"{policy.path}: all that trains has a rate of its own (part_learning_rates), so that --learning_rates "
                f"would change nothing. Leave out --learning_rates, or take a part out of part_learning_rates."
            )


def check_each_once(folders: Sequence[str]) -> None:
    """Stop where a run is named twice: it would count twice.

    Raises:
        InputError: Names them.
    """
    resolved = [Path(folder).resolve() for folder in folders]
    twice = [name for name, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1]
    if twice:
        raise InputError(f"Named more than once: {', '.join(dict.fromkeys(twice))}. Name each run once.")


def check_folder(folder: Path) -> None:
    """Stop where the folder holds anything but a comparison.

    Raises:
        InputError: If it does.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file. Name a folder.")
    inside = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()
    if inside and COMPARISON_FILE not in inside:
        raise InputError(
            f"output_dir: {folder} is not empty and holds no comparison. Name another folder: --output_dir {folder}-2. "
            f"Nothing was touched."
        )


def begin_folder(folder: Path) -> None:
    """Mark the folder as a comparison's, before the first run."""
    if not (folder / COMPARISON_FILE).is_file():
        write_json(folder / COMPARISON_FILE, {"policies": [], "notes": ["This comparison has not ended yet."]})


def rates_to_try(options: Options) -> int:
    """How many trials each policy has: none where one rate is all that there is."""
    return len(options.learning_rates) if len(options.learning_rates) > 1 else 0


def rate_searches(shared: SharedPrefixes, options: Options, seed: int) -> list[Search]:
    """What finds the learning rate of each policy; empty where there is nothing to choose."""
    if not rates_to_try(options):
        return []
    folder = options.output_dir / "rates"
    text = write_training_text(shared.policies[0].recipe.text, folder / "text")
    return [
        Search(
            policy,
            sorted(options.learning_rates),
            text,
            seed,
            options.trial_steps,
            folder / f"{policy.name}.json",
            options.output_dir / "logs" / f"rates-{policy.name}.log",
            shared.has(policy, seed, trial=True),
        )
        for policy in shared.policies
    ]


def run_job(policy: Policy, seed: int, rate: float | None, folder: Path, shares_prefix: bool = False) -> Job:
    """One run that is compared."""
    name = f"{policy.name}{'' if rate is None else f'-lr{rate:g}'}-seed{seed}"
    changes: dict[str, Any] = {
        "output_dir": str(folder / "runs" / name),
        "seed": seed,
        "push_to_hub": False,
        "resume_from_checkpoint": "auto",
        **({} if rate is None else {"learning_rate": rate}),
    }
    title, log = f"{policy.name}, seed {seed}", folder / "logs" / f"{name}.log"
    return Job(policy, title, folder / "runs" / name, changes, log, shares_prefix)


def total_steps(policies: Sequence[Policy], seeds: Sequence[int], searches: Sequence[Search]) -> int:
    """Optimizer steps of all runs and trials."""
    runs = sum(steps_of(policy.recipe.values) for policy in policies) * len(seeds)
    return runs + sum(steps_of(search.values) * len(search.rates) for search in searches)


def run_policies(
    queue: RunQueue,
    shared: SharedPrefixes,
    seeds: Sequence[int],
    options: Options,
    trials: Mapping[str, Sequence[RateTrial]],
) -> dict[str, list[Outcome]]:
    """Run every policy with every seed, seed by seed, so that a comparison that is cut short has whole seeds.

    Within a seed policies with the same frozen prefix follow one another.
    """
    outcomes: dict[str, list[Outcome]] = {policy.name: [] for policy in shared.policies}
    for seed in seeds:
        for policy in shared.policies:
            tried = trials.get(policy.name)
            # one rate alone needs no trial: every policy runs with it
            rate = best_rate(tried) if tried else next(iter(options.learning_rates), None)
            job = run_job(policy, seed, rate, options.output_dir, shared.has(policy, seed, trial=False))
            outcomes[policy.name].append(outcome_of(job, queue.run(job), shared.plans[policy.name]))
    return outcomes


def outcome_of(job: Job, code: int, plan: FreezePlan) -> Outcome:
    """What a run left, and a line about it."""
    reason = last_words(job.log) if code else ""
    if code and not (job.folder / "freeze_plan.json").is_file():  # it ended before it had begun to train
        outcome = failed_early(job.folder, job.values, plan.total_parameters, plan.trainable_parameters, code, reason)
    else:
        outcome = read_outcome(job.folder, code, reason)
    if outcome.measures is None:
        logger.warning("%s failed with exit code %d: %s", job.title, outcome.code, outcome.reason)
    elif outcome.measures.after is not None:
        logger.info("%s: %.4f bits per byte", job.title, outcome.measures.after)
    return outcome


def notes_on(rows: Sequence[Row]) -> list[str]:
    """What a reader should know beside the figures."""
    notes = []
    for row in rows:
        end = at_the_end_of_the_list(row.learning_rate, row.trials)
        if end:
            notes.append(
                f"{row.name}: {row.learning_rate:g} is the {end} learning rate of the list; one beyond may do better."
            )
    for row in rows:
        own = [entry for entry in row.outcomes[0].values.get("schedule") or [] if "learning_rate" in entry]
        if own and row.trials:
            notes.append(f"{row.name}: {len(own)} phases of its schedule kept the learning rates that they name.")
        parts = row.outcomes[0].values.get("part_learning_rates") or {}
        if parts and row.trials:
            kept = ", ".join(f"{selector} {rate:g}" for selector, rate in parts.items())
            notes.append(f"{row.name}: its part_learning_rates were kept in every trial ({kept}).")
    for row in rows:
        for outcome in row.outcomes:
            stopped = outcome.facts["stopped_early"]
            if stopped:
                notes.append(
                    f"{row.name}, seed {outcome.seed}: stopped early at step {stopped['step']} of {stopped['of']}."
                )
    different = differing_lengths([outcome.values for row in rows for outcome in row.outcomes])
    if different:
        notes.append(f"The policies did not train alike: they differ in {', '.join(different)}.")
    if not any(row.trials for row in rows) and len({row.learning_rate for row in rows}) == 1 and len(rows) > 1:
        notes.append(
            f"All policies ran with the learning rate {rows[0].learning_rate:g}; --learning_rates A B C chooses one "
            f"for each."
        )
    return notes


def write_comparison(folder: Path, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Write page, figure, CSV and JSON; each file is there as a whole or not at all."""
    for note in notes:
        logger.warning("%s", note)
    figure = {name: render_frontier(rows, subtitle(rows), dark=name == "dark") for name in ("light", "dark")}
    page = render_page(folder.resolve().name, rows, notes, figure)
    for name, content in {
        "frontier.png": figure["light"],
        "comparison.html": page.encode("utf-8", errors="replace"),
        "comparison.csv": comparison_csv(rows).encode("utf-8", errors="replace"),
    }.items():
        write_whole(folder / name, content)
    # last: in a first comparison this file says till here that it has not ended
    write_json(folder / COMPARISON_FILE, comparison_json(rows, notes))


def raise_if_failed(rows: Sequence[Row]) -> None:
    """End with the code of the gravest failure, after everything is written: 3 before 4 before 1.

    Raises:
        FreezeViolation: If a run failed its audit.
        TrainingDiverged: Else, if one diverged.
        PartialtuneError: Else, if one failed in another way.
    """
    failed = [(row, run) for row in rows for run in row.failed]
    if not failed:
        return
    kinds = {kind.exit_code: kind for kind in (FreezeViolation, TrainingDiverged)}
    codes = [run.code for _, run in failed]
    kind = next((kinds[code] for code in kinds if code in codes), PartialtuneError)
    lines = [f"  {row.name}, seed {run.seed}: exit code {run.code}. {run.reason}" for row, run in failed]
    runs = sum(len(row.outcomes) for row in rows)
    raise kind("\n".join([f"{len(failed)} of {runs} runs failed; the others are compared.", *lines]))
