"""accelerate_config.yaml resolves to what its comments say; launches that would train wrong are stopped."""

import argparse
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import REPOSITORY
from partialtune.cli import main
from partialtune.errors import InputError
from partialtune.launcher_environment import ADDRESS, PLACE, SIZES, left_over
from partialtune.training.launch import check_precision, check_processes, one_device_a_process, use_all_cores

CONFIG = REPOSITORY / "accelerate_config.yaml"


def resolved(*flags, config=CONFIG):
    """What accelerate makes of a configuration and these flags, without starting anything."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(config), *flags, "-m", "partialtune", "--help"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert isinstance(args, argparse.Namespace)
    return args


def test_the_configuration_alone_starts_one_process_on_whatever_device_there_is():
    args = resolved()
    assert (args.num_processes, args.num_machines) == (1, 1)
    assert not args.multi_gpu
    assert not args.use_cpu
    assert not args.cpu
    assert args.mixed_precision == "no"
    assert not any((args.use_deepspeed, args.use_fsdp, args.tpu))


def test_multi_gpu_and_num_processes_win_over_the_configuration():
    args = resolved("--multi_gpu", "--num_processes", "4")
    assert args.multi_gpu
    assert args.num_processes == 4


@pytest.mark.slow
def test_under_accelerate_a_cpu_only_machine_uses_all_its_cores():
    code = (
        "from partialtune.training.launch import use_all_cores; import torch; use_all_cores(); "
        "print('threads', torch.get_num_threads(), torch.accelerator.is_available())"
    )
    script = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--no_python"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [*script, sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    threads, accelerator = run.stdout.split("threads ")[1].split()
    assert accelerator == "True" or int(threads) == len(os.sched_getaffinity(0))


def test_threads_are_left_alone_where_the_user_set_them(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        monkeypatch.delenv(key)
    before = torch.get_num_threads()
    use_all_cores()
    assert torch.get_num_threads() == before


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    before = torch.get_num_threads()
    try:
        use_all_cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_processes_that_do_not_find_each_other_are_stopped(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="each runs alone"):
        check_processes(SimpleNamespace(world_size=1))
    check_processes(SimpleNamespace(world_size=2))


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LEFT_OVER = {
    "torchrun's": ({"WORLD_SIZE": "2"}, "unset WORLD_SIZE"),
    "OpenMPI's": ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "unset OMPI_COMM_WORLD_SIZE"),
    "MPICH's": ({"PMI_SIZE": "2"}, "unset PMI_SIZE"),
    "MVAPICH's": ({"MV2_COMM_WORLD_SIZE": "2"}, "unset MV2_COMM_WORLD_SIZE"),
    "two of them": ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "unset WORLD_SIZE LOCAL_RANK"),
    "a place alone": ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
    "an address without a rank": ({"WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "RANK or .* is not set"),
    "no number": ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is no whole number"),
    "a number in other digits": ({"WORLD_SIZE": "²"}, "WORLD_SIZE is no whole number"),
    "zero": ({"WORLD_SIZE": "0"}, "unset WORLD_SIZE"),
}


@pytest.fixture
def no_launcher(monkeypatch):
    """An environment in which no launcher has left anything."""
    for name in (*SIZES, *SIZES.values(), PLACE, ADDRESS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", LEFT_OVER)
def test_variables_of_a_launcher_that_did_not_start_us_are_named_before_anything_is_loaded(
    name, no_launcher, monkeypatch, capfd
):
    variables, said = LEFT_OVER[name]
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("partialtune.recipe.recipe.read_recipe", lambda *args: pytest.fail("it went on"))
    assert main(["train", "recipe.yaml"]) == 2
    err = capfd.readouterr().err
    assert re.search(said, err), err
    assert "accelerate launch" in err


def test_variables_of_a_launcher_that_did_start_us_are_believed(no_launcher):
    assert left_over({}) == left_over({"WORLD_SIZE": "1"}) == left_over({"WORLD_SIZE": ""}) == {}
    assert left_over(TORCHRUN) == left_over({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2"}) == {}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "MASTER_ADDR": "node1"}
    assert left_over(mpi) == {}


def test_commands_of_one_process_forget_what_a_launcher_left(no_launcher, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main(["report", "there/is/no/run"]) == 2
    assert "there/is/no/run" in capfd.readouterr().err
    assert "WORLD_SIZE" not in os.environ
    assert "OMPI_COMM_WORLD_SIZE" not in os.environ


@pytest.mark.slow
def test_processes_of_which_some_never_come_are_waited_for_no_longer_than_ddp_timeout(no_launcher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from partialtune.training.launch import join_processes; join_processes({'use_cpu': True, 'ddp_timeout': 1})"
    variables = {**os.environ, **TORCHRUN, "MASTER_PORT": str(port)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)
    assert "InputError: The 2 processes of this run (WORLD_SIZE) did not find each other within 1 seconds" in run.stderr


def test_one_process_that_sees_several_gpus_uses_one_and_says_how_to_use_all(caplog):
    args = SimpleNamespace(device="cuda:0", n_gpu=4, _n_gpu=4)
    one_device_a_process(args)
    assert args._n_gpu == 1
    assert "--multi_gpu --num_processes 4" in caplog.text


@pytest.mark.parametrize(
    ("launcher", "said", "accepted"),
    [
        ("no", {}, True),
        ("no", {"bf16": True}, True),
        ("bf16", {"bf16": True}, True),
        ("bf16", {}, False),
        ("fp16", {"bf16": True}, False),
    ],
)
def test_a_launchers_precision_that_contradicts_the_recipe_is_an_error(monkeypatch, launcher, said, accepted):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    if accepted:
        check_precision(said)
    else:
        with pytest.raises(InputError, match=f"mixed precision {launcher}"):
            check_precision(said)
