"""Tests of coder_sync: rules with a fake clock, everything else on real processes, sockets and signals.

Sections: helpers; Units (the rules); Protocol; Agent; Command line; Run and owners; Trouble; Load; README.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import coder_sync
from coder_sync import Client, Units

HERE = Path(__file__).resolve().parent
FILE = HERE / "coder_sync.py"
PATIENCE = 30.0  # seconds after which something that should happen never will


# ---------------------------------------------------------------------------------------------------------
# Helpers: a fake clock; an agent; the command line as processes; raw connections; waiting for an event.
# ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def units(clock: Clock) -> Units:
    return Units(clock, lambda: 1.7e9 + clock.now)


def answers(units: Units) -> dict[Any, Any]:
    """The answers that became known, by ticket."""
    return dict(units.take_answers())


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Return the first true result of a question about another process; fail after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.005)
    raise AssertionError(f"never happened: {what or condition}")


class World:
    """A directory, a socket path in it, and commands that use it. Everything it started is killed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory / "agent.sock")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("CODER_", "LISTEN_", "NOTIFY_"))}
        self.env["CODER_AGENT_SOCKET_PATH"] = self.path
        self.processes: list[subprocess.Popen[str]] = []

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start `coder_sync.py ARGV...`; stdout and stderr are pipes unless said otherwise."""
        return self.spawn([sys.executable, "-IS", str(FILE), *argv], **options)

    def spawn(self, argv: list[str], **options: Any) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {"env": self.env, "cwd": str(self.directory), "text": True}
        settings.update(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        settings.update(start_new_session=True, **options)
        process = subprocess.Popen(argv, **settings)
        self.processes.append(process)
        return process

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `coder_sync.py ARGV...` to its end."""
        return finish(self.popen(*argv, **options))

    def ok(self, *argv: str, **options: Any) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.run(*argv, **options)
        assert done.returncode == 0, done
        return done.stdout

    def shell(self, script: str, shell: str = "sh", **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a script with `coder` in PATH: the executable form under the name of the original."""
        return finish(self.spawn([shell, "-c", script], **{"env": self.shell_env(), **options}))

    def shell_env(self) -> dict[str, str]:
        bin_directory = self.directory / "bin"
        if not bin_directory.exists():
            bin_directory.mkdir()
            (bin_directory / "coder").write_bytes(FILE.read_bytes())
            (bin_directory / "coder").chmod(0o755)
        path = [str(bin_directory), os.path.dirname(sys.executable), self.env["PATH"]]
        return {**self.env, "PATH": os.pathsep.join(path)}

    def serve(self, *options: str, **popen: Any) -> subprocess.Popen[str]:
        """Start an agent and wait until it answers."""
        agent = self.popen("serve", *options, **{"stderr": subprocess.DEVNULL, **popen})
        self.client.ping(wait=PATIENCE)
        return agent

    @property
    def client(self) -> Client:
        return Client(self.path, connect_timeout=0)

    def connect(self) -> Peer:
        return Peer(self.path)

    def waiting(self, *names: str) -> None:
        """Return once a start or run of each of these units waits in the agent."""

        def all_wait() -> bool:
            kinds = {e.unit: e.kind for e in map(coder_sync_event, self.connect().call("events")["result"])}
            return all(kinds.get(name) == "waiting" for name in names)

        until(all_wait, f"{names} waiting")

    def status(self, unit: str) -> str:
        return self.client.status(unit).status

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each is the leader of its session
            process.communicate(timeout=PATIENCE)


def coder_sync_event(data: dict[str, Any]) -> coder_sync.Event:
    return coder_sync.Event(**data)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process; return its status and output."""
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A World without an agent."""
    world = World(tmp_path_factory.mktemp("w"))
    yield world
    world.close()


@pytest.fixture
def agent(world: World) -> World:
    """A World with an agent in it."""
    world.serve()
    return world


class Peer:
    """A raw connection to an agent, for saying things a client would not say."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, method: str, request: Any = 1, **params: Any) -> None:
        message = {"jsonrpc": "2.0", "id": request, "method": method, "params": params}
        self.send(json.dumps(message).encode() + b"\n")

    def read(self) -> Any:
        """The next message; None at end of file."""
        line = self.file.readline()
        return json.loads(line) if line else None

    def call(self, method: str, request: Any = 1, **params: Any) -> Any:
        self.request(method, request, **params)
        return self.read()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


# ---------------------------------------------------------------------------------------------------------
# README: its examples are run as written. A block that starts an agent begins a new session, in a directory
# that holds only coder_sync.py; what differs from run to run (times, pids) is compared by its shape.
# ---------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def examples(text: str) -> list[list[tuple[str, str]]]:
    """Sessions of (command, expected output)."""
    sessions: list[list[tuple[str, str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.S | re.M):
        for i, part in enumerate(re.split(r"^\$ ", block, flags=re.M)[1:]):
            lines = part.splitlines()
            count = 1 + sum(1 for _ in itertools.takewhile(lambda line: line.startswith("> "), lines[1:]))
            command = "\n".join(line[2:] if n else line for n, line in enumerate(lines[:count]))
            if i == 0 and "serve --detach" in command:
                sessions.append([])
            sessions[-1].append((command, "\n".join(lines[count:])))
    return sessions


def shape(text: str, world: World) -> str:
    """Output without what differs from run to run."""
    text = text.replace(world.path, "agent.sock")
    text = re.sub(r"\b\d+(\.\d+)?(ms|s)\b", "TIME", text)
    text = re.sub(r"by .{0,80}? \(pid \d+\)", "by WHOM", text)
    return re.sub(r"pid \d+", "pid PID", text).strip()


def play(session: list[tuple[str, str]], world: World) -> list[tuple[str, str]]:
    """Run a session's commands in one bash; return them with their real output."""
    (world.directory / "coder_sync.py").write_bytes(FILE.read_bytes())
    (world.directory / "coder_sync.py").chmod(0o755)
    mark = "=== next ==="
    script = "".join(f"{command}\necho '{mark}'\n" for command, _ in session)
    script += "kill $(./coder_sync.py ping | sed 's/.*pid \\([0-9]*\\),.*/\\1/')\n"
    done = finish(world.spawn(["bash", "-c", script], env=world.shell_env(), stderr=subprocess.STDOUT))
    return [(command, out.strip()) for (command, _), out in zip(session, done.stdout.split(mark + "\n"))]


@pytest.mark.parametrize("session", examples(README), ids=lambda session: session[0][0][:20])
def test_the_readme_shows_what_really_happens(session: list[tuple[str, str]], world: World) -> None:
    if any(" nc " in command for command, _ in session) and not shutil.which("nc"):
        pytest.skip("no nc here")
    real = play(session, world)
    assert [(c, shape(out, world)) for c, out in real] == [(c, shape(out, world)) for c, out in session]


def test_the_readme_has_the_one_liner_that_runs_the_main_job(world: World) -> None:
    line = next(line for line in README.splitlines() if line.startswith("./coder_sync.py serve -- "))
    done = finish(world.spawn(["sh", "-c", line], cwd=str(HERE), env=world.shell_env()))
    assert done.returncode == 0
    assert [out[:2] for out in done.stdout.splitlines()] == ["1.", "2.", "3."]


def test_the_readme_documents_every_command_and_method() -> None:
    for command in coder_sync.COMMANDS:
        assert f"`{command}" in README or f"coder_sync.py {command}" in README, command
    for method, params in coder_sync.METHODS.items():
        assert f"`{method}`" in README, method
        assert all(param in README for param in params)
