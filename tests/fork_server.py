"""Real agents of torch (`torchrun`) and the processes that they start, each forked where everything is imported.

    with ForkServer(warm, folder) as server:
        agent = server.agent(["--nproc_per_node", "2"], ["train", "recipe.yaml"], folder / "log")
        agent.end()

An agent is torch's own, `torch.distributed.run.main` in a process of its own. What it starts, watches, signals and
kills is this file as a script: it asks the server for a fork that runs `partialtune` with the agent's environment,
hands signals on to it, and ends as it ended. An agent takes 3 s to import, a process 8.
"""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

PARTIALTUNE, TORCHRUN = "partialtune.cli:main", "torch.distributed.run:main"
LOOK_SECONDS = 0.05


# ---- the server: a fork of the warm process --------------------------------------------------------------------------


def serve(path: str) -> None:
    """Answer each connection in a fork of its own, for ever."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        begun = Path(f"{path}.begun")
        begun.write_text(str(os.getpid()))
        begun.rename(f"{path}.process")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Fork what is asked for, tell its id and how it ended; kill it where who has asked is gone."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1_000_000, 2)
    process = os.fork()
    if process == 0:
        connection.close()
        _run(json.loads(message), descriptors)
    connection.send(str(process).encode())
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([connection], [], [], LOOK_SECONDS)[0]:
            os.kill(process, signal.SIGKILL)
            os._exit(0)


def _run(job: dict, descriptors: Sequence[int]) -> None:
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ |= job["environment"]
    os.chdir(job["folder"])
    code = 1
    try:
        module, function = job["function"].split(":")
        code = getattr(importlib.import_module(module), function)(job["words"]) or 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001  (it ends here, and says of what)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- the client: what an agent starts --------------------------------------------------------------------------------


def run_there(path: str, function: str, words: Sequence[str]) -> None:
    """Have the server run a function, and end as it does, by the same signal or with the same code."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(path)
    environment = {name: value for name, value in os.environ.items() if name != "PROCESS_FILE"}
    job = {"function": function, "words": list(words), "folder": os.getcwd(), "environment": environment}
    socket.send_fds(server, [json.dumps(job).encode()], [1, 2])
    process = int(server.recv(100))
    if file := os.environ.get("PROCESS_FILE"):
        Path(file).write_text(str(process))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    code = int(server.recv(100))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


def client(path: Path, function: str) -> list[str]:
    """The command line of a client."""
    return [sys.executable, "-I", "-S", __file__, str(path), function]


class Agent:
    """An agent that was started.

    Attributes:
        log: What it and its processes say.
    """

    def __init__(self, command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self.log, self._process_file = log, log.with_suffix(".process")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        variables["PROCESS_FILE"] = str(self._process_file)
        with log.open("a") as output:
            self.client = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=variables)

    def said(self) -> str:
        return self.log.read_text()

    def end(self, seconds: float = 120) -> int:
        """Wait for its end; its exit code."""
        return self.client.wait(timeout=seconds)

    def processes(self) -> list[int]:
        """The ids of what it has started."""
        import psutil

        found = psutil.Process(int(self._process_file.read_text())).children()
        return [one.pid for one in found if one.status() != psutil.STATUS_ZOMBIE]

    def lose_machine(self) -> None:
        """Kill it and all that it has started."""
        for process in [*self.processes(), self.client.pid]:
            os.kill(process, signal.SIGKILL)


class ForkServer:
    """A server that a warm process has forked; a context.

    Args:
        warm: A `cluster.WarmProcess`; it goes on with what is asked of it.
        folder: For the socket.
    """

    def __init__(self, warm, folder: Path) -> None:
        self.path, self._started = folder / "server", folder / "server.process"
        self._agents: list[Agent] = []
        warm.parent.stdin.write(json.dumps({"serve": str(self.path)}) + "\n")
        warm.parent.stdin.flush()
        while not self._started.exists():
            time.sleep(0.01)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        for agent in self._agents:
            if agent.client.poll() is None:  # its test has failed
                agent.lose_machine()
                agent.client.wait()
        os.kill(int(self._started.read_text()), signal.SIGTERM)

    def agent(
        self,
        options: Sequence[str],
        words: Sequence[str],
        log: Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Agent:
        """Start an agent with these options of `torchrun`, whose processes run `partialtune` with these words."""
        run = [*options, "--no-python", *client(self.path, PARTIALTUNE), *words]
        self._agents.append(Agent([*client(self.path, TORCHRUN), *run], log, folder or log.parent, environment or {}))
        return self._agents[-1]


if __name__ == "__main__":
    run_there(sys.argv[1], sys.argv[2], sys.argv[3:])
