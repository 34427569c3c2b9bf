"""Jobs -> runs, each in a process of its own, one after the other: its peak memory is its own, its time undisturbed.

A run that is finished is not repeated, one that was interrupted goes on, one that failed stays failed.
"""

import json
import logging
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from partialtune.compare.learning_rates import RateTrial, Search, progress_file
from partialtune.compare.policies import Job
from partialtune.compare.shared_prefix import told_to_share
from partialtune.errors import (
    FreezeViolation,
    InputError,
    Interrupted,
    RecipeError,
    TrainingDiverged,
)
from partialtune.files import lock
from partialtune.progress import progress_bar
from partialtune.run_folder import LOCK_FILE, exit_code_of
from partialtune.training.resume_check import Standing, standing_of
from partialtune.training.stopping import hears_signals
from partialtune.training.training_data import check_run_texts_unchanged

logger = logging.getLogger(__name__)

FAILURES = (FreezeViolation.exit_code, TrainingDiverged.exit_code)  # the same recipe would fail in the same way again
SECONDS_A_TICK = 1.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class RunQueue:
    """Carries out jobs one after the other under one bar that tells when all will be done.

    Use as a context manager.

    Args:
        total: Optimizer steps of all jobs together.
    """

    def __init__(self, total: int) -> None:
        # smoothing 0: the mean over all runs, since one policy's step takes several times as long as another's
        self._bar: tqdm = progress_bar(total, "comparing", "steps", bar_format=BAR, smoothing=0)
        self._held = ExitStack()

    def __enter__(self) -> "RunQueue":
        self._held.enter_context(logging_redirect_tqdm())  # a line about a run stands above the bar, not in it
        self._held.enter_context(self._bar)
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def run(self, job: Job) -> int:
        """Run a job to its end, unless it has ended before.

        Returns:
            The exit code of the run: 0, 3, 4, or another where it crashed.

        Raises:
            InputError: If the run refuses its recipe, or the folder holds another run.
            Interrupted: If a signal came; the run was told and has stopped.
        """
        done = ended_with(job)
        steps = steps_of(job.values)
        if done is not None:
            self._leave_out(steps)
            return done
        with told_to_share(job.shares_prefix):
            return self._child(job.title, job.command, job.log, steps, lambda: steps_done(job.folder))

    def search(self, search: Search) -> list[RateTrial]:
        """Try the learning rates of a policy, those left out that were tried before.

        A process that crashed leaves rates without a trial; those say so. One that outlived a comparison which was
        killed is waited for: it has inherited the lock.

        Raises:
            As `run`.
        """
        search.file.parent.mkdir(parents=True, exist_ok=True)
        # the child inherits this open file and with it the lock: it holds as long as one of the two lives
        with search.file.with_suffix(".lock").open("a") as held:
            lock(held, lambda: logger.info("%s: a process is still at work. Waiting for it.", search.title))
            with told_to_share(search.shares_prefix):
                return self._search(search, held)

    def _search(self, search: Search, held: IO) -> list[RateTrial]:
        missing, steps = search.missing(), steps_of(search.values)
        self._leave_out(steps * (len(search.rates) - len(missing)))
        if missing:
            code = self._child(
                search.title,
                search.command(missing),
                search.log,
                steps * len(missing),
                lambda: search.steps_done(missing, steps),
                held,
            )
            progress_file(search.file).unlink(missing_ok=True)
            if code:
                failure = f"exit code {code}: {last_words(search.log)}"
                logger.warning("%s: %s", search.title, failure)
                return search.trials(failure)
        return search.trials()

    def _leave_out(self, steps: int) -> None:
        """Take steps that are not run now out of the total: as done ones they would spoil the estimate of the rest."""
        self._bar.total -= steps
        self._bar.refresh()

    def _child(
        self, title: str, command: Sequence[str], log: Path, steps: int, done: Callable[[], int], *held: IO
    ) -> int:
        at_start = self._bar.n
        self._bar.set_postfix_str(title, refresh=False)
        code = run_child(command, log, lambda: self._show(at_start + min(steps, done())), *held)
        # a run that failed early, or counts epochs, still takes its planned share of the bar: the next one starts there
        self._show(at_start + steps)
        if code == InputError.exit_code:
            raise InputError(f"{title}: {last_words(log)}")
        return code

    def _show(self, steps: int) -> None:
        self._bar.update(steps - self._bar.n)


def steps_of(values: dict[str, Any]) -> int:
    """Optimizer steps of a run, 1 where its recipe counts epochs."""
    return max(1, int(values.get("max_steps", 1)))


def ended_with(job: Job) -> int | None:
    """The exit code of a run that has ended for good, None for one that is still to run.

    A run that another process is writing at this moment is waited for: it outlived a comparison that was killed.

    Raises:
        RecipeError: If the folder holds anything else.
    """
    wait_for_lock(job.folder, job.title)
    try:
        standing = standing_of(job.folder, job.values, resume="auto")
    except RecipeError as error:
        raise RecipeError(f"This is not the comparison that was begun there. {error}") from error
    if standing is Standing.FINISHED:
        check_run_texts_unchanged(job.folder, job.values)
        return 0
    code = exit_code_of(job.folder)
    holds_it = standing is not Standing.NEW
    if holds_it and code == 0:
        raise RecipeError(
            f"{job.folder} holds a run that ended after fewer max_steps. Going on with it would not be what a run of "
            f"this length is. Name another --output_dir."
        )
    return code if holds_it and code in FAILURES else None


def wait_for_lock(folder: Path, title: str) -> None:
    """Return when no process holds the lock of a run's folder."""
    if not (folder / LOCK_FILE).is_file():
        return
    with (folder / LOCK_FILE).open("a") as file:
        lock(file, lambda: logger.info("%s: a process is still at work in %s. Waiting for it.", title, folder))


def run_child(command: Sequence[str], log: Path, on_tick: Callable[[], None], *held: IO) -> int:
    """Run a command in a process of its own and return its exit code, 128 + N where signal N killed it.

    Args:
        command: The program and its arguments.
        log: File to which everything goes that the process prints, written anew.
        on_tick: Called about every second while it runs.
        held: Locked files that it keeps open: the lock ends with the last process that does.

    Raises:
        Interrupted: If SIGINT or SIGTERM came; the process was told once for each and has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # a session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on exactly once
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[file.fileno() for file in held],
        )
        with passed_on(child) as received:
            code = None
            while code is None:
                try:
                    code = child.wait(SECONDS_A_TICK)
                except subprocess.TimeoutExpired:
                    on_tick()
    if received:
        raise Interrupted(
            f"{signal.Signals(received[0]).name}: the comparison has stopped. The same command goes on with it.",
            128 + received[0],
        )
    # Popen says -N where signal N killed the child; 128 + N is what a shell would say
    return code if code >= 0 else 128 - code


@contextmanager
def passed_on(child: subprocess.Popen) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to a child; gives the list of those that came."""
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if hears_signals() else ()
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def steps_done(folder: Path) -> int:
    """The step of a run's newest delta report: how far it is."""
    try:
        with (folder / "weight_deltas.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))  # the end alone: the file grows with every report
            lines = file.read().splitlines()[1:-1]  # the first and the last may be torn
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def last_words(log: Path) -> str:
    """The message with which a process ended: what it printed last, from `partialtune:` on."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    _, found, message = text.rpartition("partialtune: ")
    return message if found else (text.splitlines() or ["it said nothing"])[-1]
