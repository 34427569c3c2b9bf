"""The variables by which a launcher tells a process that it is one of several: whole, or left over from something else.

torch and accelerate believe them one by one. Where one of several processes is promised and nothing says where the
others are, torch ends in a ValueError about MASTER_ADDR or waits half an hour for processes that nobody started.
"""

import os
from collections.abc import Mapping

from partialtune.errors import InputError

# (how many processes, which of them) in the names of torch, MPICH and Intel MPI, OpenMPI, MVAPICH: as accelerate reads
SIZES = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
PLACE = "LOCAL_RANK"  # with it alone accelerate takes the process for one of several
ADDRESS = "MASTER_ADDR"  # where the first process is; every launcher that torch understands sets it


def left_over(variables: Mapping[str, str]) -> dict[str, str]:
    """Those variables that promise several processes although no launcher has started this one, with their values."""
    named = {name: variables[name].strip() for name in (*SIZES, PLACE) if variables.get(name, "").strip()}
    wrong = {name: value for name, value in named.items() if not _is_number(value)}
    if wrong or not _launched(variables):
        return {name: value for name, value in named.items() if name in wrong or (not wrong and _promises(name, value))}
    return {}


def check_launched() -> None:
    """Stop a run that is one of several processes by its environment, and was started by no launcher.

    Raises:
        InputError: Names the variables.
    """
    found = left_over(os.environ)
    if found:
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise InputError(
            f"The environment says that this process is one of several ({shown}), but no launcher started it: "
            f"{_lacking(found)}. For one process: unset {' '.join(found)}. For several: accelerate launch "
            f"--config_file accelerate_config.yaml --multi_gpu --num_processes N -m partialtune train RECIPE"
        )


def forget_left_over() -> None:
    """For commands that are one process each, and for those that they start: take such variables out."""
    for name in left_over(os.environ):
        del os.environ[name]


def _launched(variables: Mapping[str, str]) -> bool:
    return bool(variables.get(ADDRESS)) and any(rank in variables for rank in SIZES.values())


def _promises(name: str, value: str) -> bool:
    return int(value) >= 0 if name == PLACE else int(value) != 1


def _is_number(value: str) -> bool:
    return value.isascii() and value.removeprefix("-").isdigit() and len(value) < 10


def _lacking(found: Mapping[str, str]) -> str:
    wrong = [name for name, value in found.items() if not _is_number(value)]
    if wrong:
        return f"{wrong[0]} is no whole number"
    if os.environ.get(ADDRESS):
        return f"{' or '.join(SIZES.values())} is not set"
    return f"{ADDRESS} is not set"
