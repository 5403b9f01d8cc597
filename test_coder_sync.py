"""Tests of coder_sync: rules with a fake clock, everything else on real processes, sockets and signals.

A banner begins each section: first the helpers, last the examples of the README.
"""

from __future__ import annotations

import atexit
import builtins
import concurrent.futures
import contextlib
import dis
import errno
import fcntl
import functools
import grp
import itertools
import json
import math
import os
import pty
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import coder_sync
from coder_sync import (
    AlreadyStarted,
    Client,
    CycleError,
    Dependency,
    DependencyFailed,
    Graph,
    InvalidParams,
    NotRegistered,
    Outcome,
    Owner,
    ParseError,
    Refused,
    TimedOut,
    Units,
    UnitStatus,
    Unreachable,
    UsageError,
)

HERE = Path(__file__).resolve().parent
FILE = HERE / "coder_sync.py"
PYTHON = [sys.executable, "-IS", "-c"]
LAUNCH = FILE.read_text(encoding="utf-8").split("'")[1]  # what sh hands to python3 -c
PATIENCE = 30.0  # seconds after which something that should happen never will
MARK = f"STARTED_BY_TESTS={os.getpid()}"  # in the environment of whatever a test starts
KILL_MARKED = """
import os, sys
sys.stdin.read()  # ends with the tests, however they end
for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if sys.argv[1].encode() in file.read().split(b"\\0"):
                os.kill(int(pid), 9)
    except OSError:
        pass
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
COUNT = itertools.count()
CATCH = """
import os, signal
numbers = [getattr(signal, "SIG" + name) for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2")]
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # handlers and pause() would race
os.write(1, b"ready\\n")
while True:
    number = signal.sigwait(numbers)
    os.write(1, b"got %d\\n" % number)
    if number == signal.SIGTERM:
        os._exit(9)
"""
SIGNALS = [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM]
for number in SIGNALS:  # in the background of a shell, or under nohup(1), what is tested would ignore some of them
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------
# Helpers: an agent; the command line as processes, or in this one; raw connections; waiting for an event.
# ---------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Return the first true result of a question about another process; fail after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.005)
    raise AssertionError(f"never happened: {what or condition}")


@functools.lru_cache(maxsize=None)
def installed() -> Path:
    """The installed copy, by the Python that runs the tests."""
    directory = tempfile.mkdtemp(prefix="coder-sync-tests-")
    atexit.register(shutil.rmtree, directory)
    path = Path(directory, "coder_sync.py")
    subprocess.run([sys.executable, "-IS", str(FILE), "install", "--quiet", str(path)], check=True)
    return path


def program() -> list[str]:
    """The beginning of a command line of the installed copy."""
    return [*PYTHON, LAUNCH, str(installed())]


class World:
    """A directory, a socket path in it, and commands that use it. Everything it started is killed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory / "agent.sock")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("CODER_", "LISTEN_", "NOTIFY_"))}
        self.env.update([MARK.split("=")], CODER_AGENT_SOCKET_PATH=self.path)
        self.processes: list[subprocess.Popen[str]] = []
        self.boots: list[str] = []  # what marks what they have started

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start `coder_sync.py ARGV...`; stdout and stderr are pipes unless said otherwise."""
        return self.spawn([*program(), *argv], **options)

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
        tools = self.directory / "bin"
        if not tools.exists():
            tools.mkdir()
            self.install(tools / "coder")
        path = [str(tools), os.path.dirname(sys.executable), self.env["PATH"]]
        return {**self.env, "PATH": os.pathsep.join(path)}

    def install(self, path: Path) -> None:
        """Make an executable copy of the file."""
        shutil.copy(installed(), path)

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

    def end(self, *names: str) -> None:
        """Start and complete units."""
        for name in names:
            self.client.start(name, timeout=PATIENCE)
            self.client.complete(name)

    def waiting(self, *names: str) -> None:
        """Return once a start or run of each of these units waits in the agent."""

        def all_wait() -> bool:
            kinds = {e.unit: e.kind for e in self.client.events()}
            return all(kinds.get(name) == "waiting" for name in names)

        until(all_wait, f"{names} waiting")

    def status(self, unit: str) -> str:
        return self.client.status(unit).status

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each is the leader of its session
            process.communicate(timeout=PATIENCE)
        for pid in (pid for mark in self.boots for pid in marked(mark)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests() -> Iterator[None]:
    """Kill what tests have started when they end, even if they are killed."""
    argv = [sys.executable, "-IS", "-c", KILL_MARKED, MARK]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True):
        yield


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process; return its status and output."""
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A World without an agent."""
    with World(tmp_path_factory.mktemp("w")) as world:
        yield world


@pytest.fixture
def agent(world: World) -> World:
    """A World with an agent in it."""
    world.serve()
    return world


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An agent that many badly behaved clients share."""
    with World(tmp_path_factory.mktemp("shared")) as world:
        world.serve()
        yield world


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


def shown_on(master: int, text: bytes, seen: bytes = b"") -> bytes:
    """What was seen of a terminal before and what is shown now, up to the moment when a text is in it."""
    while text not in seen:
        assert select.select([master], [], [], PATIENCE)[0], f"{text!r} never came after {seen!r}"
        seen += os.read(master, 4096)
    return seen


def line_of(pipe: Any) -> str:
    """The next line from a process, without reading ahead, so a short one."""
    data = b""
    while not data.endswith(b"\n"):
        assert select.select([pipe], [], [], PATIENCE)[0], f"nothing more after {data!r}"
        byte = os.read(pipe.fileno(), 1)
        if not byte:
            break
        data += byte
        assert len(data) < 10_000, "this takes long; read it otherwise"
    return data.decode()


def stopped(agent: subprocess.Popen[str], number: int = signal.SIGTERM) -> subprocess.CompletedProcess[str]:
    """Send a signal and wait for the end."""
    agent.send_signal(number)
    return finish(agent)


def altered(changes: str, *argv: str) -> list[str]:
    """A command line of coder_sync with some of the module's names set to other values."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import coder_sync\n{changes}\ncoder_sync.main(sys.argv[1:])"
    return [*PYTHON, code, *argv]


def limited(limit: str, *argv: str) -> list[str]:
    """A command line of coder_sync under an option of ulimit."""
    return ["sh", "-c", f'ulimit {limit}; exec "$@"', "-", *program(), *argv]


def answering(world: World, argv: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start an agent with this command line; return once it answers."""
    agent = world.spawn(argv, **options)
    world.client.ping(wait=PATIENCE)
    return agent


def stranger(*argv: str, uid: int = 65534, changes: str = "") -> list[str]:
    """A command line of coder_sync as another user, if we can be one. What it may import it imports before."""
    modules = (
        "contextlib, difflib, fcntl, grp, json.decoder, pwd, queue, resource, select, signal, socket, socketserver"
    )
    modules += ", tempfile, threading, logging.handlers"
    become = f"import os, {modules}, encodings.ascii\nif os.getuid() == 0: os.setgroups([]); os.setuid({uid})\n"
    return altered(become + changes, *argv)


def served(world: World) -> None:
    """Assert that another client is served as if nothing had happened."""
    unit = f"bystander-{next(COUNT)}"
    assert world.client.start(unit, timeout=PATIENCE).dependencies == []
    world.client.complete(unit)
    assert world.status(unit) == "completed"


def kinds_of(world: World, unit: str) -> list[str]:
    """What happened to a unit, in order."""
    return [e.kind for e in world.client.events() if e.unit == unit]


def happened(world: World, unit: str, kind: str) -> None:
    """Return once this happened to a unit."""
    until(lambda: kind in kinds_of(world, unit), f"{unit}: {kind}")


def alive(pid: int) -> bool:
    return bool(coder_sync.birth(pid))


def process_state(pid: int) -> str:
    """The letter of ps(1): S sleeps, T is stopped, Z is a zombie."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def at_rest(pid: int) -> None:
    """Return once a process uses no processor, where that can be seen."""

    def used() -> list[str]:
        stat = Path(f"/proc/{pid}/stat")
        return stat.read_text().rpartition(")")[2].split()[11:13] if Path("/proc/self/stat").exists() else []

    until(lambda: used() == (time.sleep(0.4), used())[1], "nothing to do")


def stop(process: subprocess.Popen[str]) -> None:
    """Stop a process, and return once it does nothing any more."""
    process.send_signal(signal.SIGSTOP)
    until(lambda: process_state(process.pid) == "T", "stopped")


def serves(world: World, pid: int = 0) -> bool:
    """Whether an agent answers, and is the one that is meant."""
    with contextlib.suppress(coder_sync.Unreachable):
        found = world.client.ping()["pid"]
        return bool(found == (pid or found))
    return False


class Ended(BaseException):
    """What posix._exit raises in `Call`."""


class Call:
    """A call of the command line inside this process: for what it says and how it ends, at no interpreter's start."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd, self.monkeypatch = capfd, monkeypatch
        self.main: Callable[[], Any] = coder_sync.main

    def __call__(self, world: World, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        def end(code: int) -> None:
            raise Ended(code)

        with self.monkeypatch.context() as patch:
            patch.setattr(coder_sync.posix, "_exit", end)
            patch.setattr(sys, "argv", [str(FILE), *words])
            for name, value in {"CODER_AGENT_SOCKET_PATH": world.path, **env}.items():
                patch.setenv(name, value)
            self.capfd.readouterr()
            with pytest.raises(Ended) as caught:
                self.main()
            out, err = self.capfd.readouterr()
        return subprocess.CompletedProcess(words, caught.value.args[0], out, err)

    def ok(self, world: World, *words: str, **env: str) -> str:
        """A call that must succeed; return what it printed."""
        done = self(world, *words, **env)
        assert done.returncode == 0, done
        return str(done.stdout)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return Call(capfd, monkeypatch)


@contextlib.contextmanager
def impostor(world: World, answer: bytes) -> Iterator[None]:
    """Something else that listens at the socket's path, and gives everybody one answer."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(answer)
                self.request.shutdown(socket.SHUT_WR)
                self.request.recv(65536)

    with socketserver.UnixStreamServer(world.path, Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            os.unlink(world.path)


# ---------------------------------------------------------------------------------------------------------
# Units: the rules, on a fake clock. A scenario is a line of steps and what they lead to: what was answered, where
# the units stand then, and what the last error says.
# ---------------------------------------------------------------------------------------------------------


class Step:
    """`start b #1 a!start held lock=k,l by=42` in parts; `#1` is a ticket, `a!start` a name and what is required."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.verb, *words = text.split()
        self.flags = {word for word in words if word in ("held", "late", "supervised", "running", "resume", "stopped")}
        self.tickets = [word for word in words if word.startswith("#")]
        given = dict(word.split("=") for word in words if "=" in word)
        self.locks = given["lock"].split(",") if "lock" in given else []
        self.by = Owner(int(given["by"]), f"script {given['by']}" * (given["by"] != "0")) if "by" in given else None
        self.seconds, self.jobs = float(given.get("within", 0)), int(given.get("jobs", 0))
        self.reason = given.get("reason", "").replace("_", " ")
        self.code = int(given["code"]) if "code" in given else None
        self.env = dict(pair.split(":") for pair in given["env"].split(",")) if "env" in given else {}
        names = [word for word in words if word not in (*self.flags, *self.tickets) and "=" not in word]
        self.requires = next((name.partition("!")[2] for name in names if "!" in name), "success")
        self.names = [name.partition("!")[0] for name in names]
        self.wants = dict.fromkeys(self.names[1:], self.requires)
        self.members: list[tuple[str, dict[str, str], list[str]]] = []
        for unit, _, locks in (word.partition("@") for word in names):  # of a boot: `b:a,c@apt` wants a and c
            name, _, wants = unit.partition(":")
            self.members.append((name, dict.fromkeys(filter(None, wants.split(",")), "success"), locks.split()))


class Rules:
    """Units driven by steps. An answer counts as delivered at once, unless its start was said to be `late`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.heard: list[coder_sync.Event] = []
        self.known: list[tuple[Any, Any]] = []  # claims and their answers, which nobody has taken yet
        self.dead: set[int] = set()
        self.units = Units(
            *(lambda: self.now, lambda: 1.7e9 + self.now, lambda owner: owner.pid not in self.dead),
            *(self.heard.append, lambda *known: self.known.append(known)),
        )
        self.claims: dict[str, Any] = {}
        self.late: set[str] = set()
        self.gone: set[str] = set()  # tickets of who is not there any more
        self.told: list[str] = []  # `#1 ok`, `#2 AlreadyStarted`; `!Refused` is the error of a step itself
        self.errors: dict[str, Exception] = {}
        self.shown: list[str] = []

    def play(self, steps: str) -> str:
        """Do all steps; return what was answered, and where the units stand."""
        for text in filter(None, map(str.strip, steps.split(";"))):
            try:
                self.do(Step(text))
            except coder_sync.SyncError as error:
                self.told.append(f"!{type(error).__name__}")
                self.errors["!"] = error
            self.take()
        stand = (f"{name}:{status.replace(' ', '-')}" for name, status in sorted(statuses(self.units).items()))
        return f"{', '.join(self.told)} | {' '.join(stand)}"

    def do(self, step: Step) -> None:
        units, names, by, flags = self.units, step.names, step.by, step.flags
        ticket: Any = step.tickets[0] if step.tickets else None
        claim: Any = self.claims.get(ticket)
        asked = {"owner": by, "held": "held" in flags, "supervisor": "supervised" in flags}
        completed = Outcome("completed", "", 0, running="running" in flags, env=step.env)
        failed = Outcome("failed", " ".join(names[1:]), step.code)
        self.late.update(step.tickets if "late" in flags else ())
        verbs: dict[str, Callable[[], Any]] = {
            "want": lambda: units.want(names[0], names[1:], step.requires),
            "start": lambda: units.start((names[0], step.wants, step.locks), ticket, step.seconds, **asked),
            "wait": lambda: units.wait(names, ticket, step.requires, step.seconds),
            "boot": lambda: units.boot(step.members, ticket, by, step.jobs, "resume" in flags),
            "complete": lambda: units.end(names[0], completed, by, claim),
            "fail": lambda: units.end(names[0], failed, by, claim),
            "exit": lambda: units.exit(claim, step.reason, step.code or 0, "stopped" in flags),
            "running": lambda: units.run_on(claim),
            "own": lambda: units.own(claim, by, "", step.reason),
            "retry": lambda: units.retry(claim, step.reason),
            "stop": lambda: units.stop(names, ticket, step.seconds),
            "reset": lambda: units.reset(names),
            "delivered": lambda: units.delivered(claim),
            "quit": lambda: units.end_claims([claim], "its process has ended"),
            "lose": lambda: self.lose(step.tickets),
            "die": lambda: self.dead.add(int(names[0])),
            "sleep": lambda: self.sleep(float(names[0])),
            "show": lambda: self.show(names[0], names[1:]),
            "lacks": lambda: self.shown.append(in_short(units.dependencies(units.units[names[0]], unmet_only=True))),
        }
        made = verbs[step.verb]()
        if step.verb in ("start", "wait", "stop"):
            self.claims[ticket] = made
        elif step.verb == "boot":
            self.claims.update((f"{ticket}.{claim.unit.name}", claim) for claim in made)

    def lose(self, tickets: list[str]) -> None:
        lost = [c for t, c in self.claims.items() if t in tickets or t.partition(".")[0] in tickets]
        self.units.end_claims(lost, "its caller went away")
        self.gone.update(tickets)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.units.end_late(self.claims.values())
        self.units.keep_time()

    def show(self, name: str, facts: list[str]) -> None:
        unit = self.units.status(name)
        self.shown.append(f"{name}: " + ", ".join(f"{fact} {in_short(getattr(unit, fact))}" for fact in facts))

    def take(self) -> None:
        """Take the answers, and what follows from their arrival."""
        answers = self.answers()
        while answers:
            for claim, answer in answers:
                self.told.append(f"{claim.ticket} {self.said(claim, answer)}")
                if claim.ticket not in self.late and not isinstance(answer, coder_sync.Notice):
                    self.units.delivered(claim)
            answers = self.answers()

    def said(self, claim: Any, answer: Any) -> str:
        """An answer in words."""
        if isinstance(answer, coder_sync.Notice):
            unit, what = answer.params.values()
            return f"stop {unit} in {what:g}" if answer.method == "stop" else f"told {unit}:{what}"
        if isinstance(answer, Exception):
            self.errors[claim.ticket] = answer
            return type(answer).__name__
        if isinstance(claim, coder_sync.Stop):  # `stopped a b left c(script 42) cannot d(-)`
            text = lambda row: row if isinstance(row, str) else f"{row.unit}({in_short(row.owner)})"  # noqa: E731
            rows = {what: [text(row) for row in answer[what]] for what in answer}
            return " ".join(" ".join([what, *rows[what]]) for what in rows if rows[what]) or "nothing"
        return f"{answer['unit']} {answer['status']}" if claim.boot else "ok"

    def answers(self) -> list[tuple[Any, Any]]:
        known, self.known = self.known, []
        return [(claim, answer) for claim, answer in known if claim.ticket not in self.gone]


@pytest.fixture
def rules() -> Rules:
    return Rules()


@pytest.fixture
def units(rules: Rules) -> Units:
    return rules.units


def statuses(units: Units) -> dict[str, str]:
    """All names and where they stand."""
    return {s.unit_name: s.status for s in units.snapshots(everything=True)}


def wants(units: Units, name: str) -> dict[str, str]:
    """The dependencies of a unit and what it requires of them."""
    return {d.depends_on: d.requirement for d in units.status(name).dependencies}


def in_short(value: Any) -> str:
    """A value as tables have it; of a dependency all values but `did_you_mean`, in their order."""
    if isinstance(value, Dependency):
        return "/".join(in_short(part) for name, part in vars(value).items() if name != "did_you_mean")
    if isinstance(value, Owner):
        return value.command + ("" if value.alive is not False else ", dead")
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, (list, dict)):
        value = " and ".join(f"{key} by {value[key]}" if isinstance(value, dict) else in_short(key) for key in value)
    return "-" if value in ("", None) else str(value)


def story(units: Units) -> list[tuple[str, str, str]]:
    """What happened: unit, kind, detail."""
    return [(e.unit, e.kind, e.detail) for e in units.events.values()]


def chain(units: Units, length: int, requires: str = "success", name: str = "u{}") -> list[str]:
    """A chain of registered units, each depending on the one before; return their names."""
    names = [name.format(i) for i in range(length)]
    for before, after in zip([None, *names], names):
        units.want(after, [before] if before else [], requires)
    return names


def scenarios(table: str) -> Any:
    """Parametrize a test by the rows `NAME: STEPS => OUTCOME` of a table; a row goes on in lines that are indented."""
    lines = "\n".join(line for line in table.splitlines() if line[:1] != "#")
    rows = [row.partition("=>") for row in re.sub(r"\n +", " ", lines).strip().split("\n")]
    cases = [(*left.rpartition(": ")[::2], right) for left, _, right in rows]
    params = [pytest.param(s.strip(), o.strip(), id=hyphenated(n or s.strip())) for n, s, o in cases]
    return pytest.mark.parametrize(("steps", "outcome"), params)


def hyphenated(value: object) -> str | None:
    """A text as the id of a test's parameter; pytest names what is none."""
    return re.sub(r"\W+", "-", value)[:80] if isinstance(value, str) else None


# What a random run of the model below finds as surely is not here: orders, locks, claims that end, services, stops.
@scenarios("""
# want
want is all or nothing when an edge closes a cycle:
    want b a; want a x b y => !CycleError | a:not-registered b:pending | says cycle detected: a -> b -> a
a unit cannot depend on itself:
    want a b a => !CycleError | | says cycle detected: a -> a; a unit cannot depend on itself
another requirement for an edge is refused whole: want b a; want b x!start a
    => !Refused | a:not-registered b:pending | says unit "b" wants "a" with requirement success already, not start
an unknown requirement is refused: want b a!perfection; wait #1 a!perfection
    => !Refused, !Refused | | says no such requirement: perfection; use one of success, completion, start
# start
a started unit is not started again, nor when its owner has gone: start a #1 by=42; start a #2 x; die 42; start a #3
    => #1 ok, !AlreadyStarted, !AlreadyStarted | a:started | says unit "a" is already started by script 42 (pid 42),
    which is no longer running; `complete a` or `fail a` lets others go on
# complete, fail
the outcome of an unregistered name is refused: want b a; complete a; fail ghost => !NotRegistered, !NotRegistered
    | a:not-registered b:pending | says unit "ghost" is not registered; call want, start or run on it first
the same outcome again is fine, another is not:
    want b; complete b; complete b; fail b; want a; fail a oops; fail a; complete a
    => !Refused, !Refused | a:failed b:completed | says unit "a" is failed (oops) and cannot become completed: others
    may have acted on that; start it again first
a start that waits is answered when another ends the unit: start b #1 a; complete b
    => #1 Refused | a:not-registered b:completed | says unit "b" was completed by another caller while its start waited
a second copy's report does not count: start a #1 by=10; start a #2 by=20; fail a by=20; complete a by=20
    => #1 ok, !AlreadyStarted, !Refused, !Refused | a:started | says unit "a": a report of process 20 (script 20) does
    not count: its start was refused, because the unit was started by script 10 (pid 10); if it is to be ended all the
    same, call from another shell
nor does that of one that lost while it waited:
    start b #1 a by=10; start b #2 by=20; want a; complete a; complete b by=20; complete b by=10
    => #1 ok, #2 AlreadyStarted, !Refused | a:completed b:completed
nor does that of the command of a run:
    start a #1 supervised by=10; own #1 by=20; start a #2 by=20; complete a by=20
    => #1 ok, !AlreadyStarted, !Refused | a:started | says unit "a": a report of process 20 (script 20) does not count:
    its start was refused, because the unit was started by run; if it is to be ended all the same, call from another
    shell
who started it may ask twice and report:
    start a #1 by=10; start a #2 by=10; complete a by=10 => #1 ok, !AlreadyStarted | a:completed
who was refused once may start it later, and report:
    start a #1 by=10; start a #2 by=20; complete a; start a #3 by=20; complete a by=20
    => #1 ok, !AlreadyStarted, #3 ok | a:completed
# skipping
whoever waits for what is skipped is answered: want b a; start c #1 b; start c #2; wait #3 c; want a; fail a
    => #1 DependencyFailed, #2 DependencyFailed, #3 DependencyFailed | a:failed b:skipped c:skipped | says dependency
    "c" was skipped: dependency "b" was skipped: dependency "a" failed
# claims: each ends in one way
time that is up ends a start, and fails the unit if it is held:
    start b #1 a within=5; start c #2 a within=5 held; sleep 4; sleep 1; want a; complete a
    => #1 TimedOut, #2 TimedOut | a:completed b:pending c:failed
    | says timeout waiting for dependencies of unit c: a not registered
time that is up ends a wait:
    wait #1 a c within=5; sleep 5 => #1 TimedOut | | says timeout waiting for a, c: a not registered, c not registered
time counts no more after the start, nor if none was given:
    start a #1 within=5 held; start b #2 x; wait #3 x; sleep 99999 => #1 ok | a:started b:pending x:not-registered
a start whose process ends is answered: start b #1 a held; quit #1
    => #1 Refused | a:not-registered b:failed | says unit "b" was not started: its process has ended
# locks
who gives up leaves a lock to the next:
    start a #1 lock=k; start b #2 lock=k within=5; start c #3 lock=k; sleep 5; complete a
    => #1 ok, #2 TimedOut, #3 ok | a:completed b:pending c:started | says timeout waiting for dependencies of unit b:
    lock k taken
# boot
a boot runs in order and is notified of every outcome:
    boot #b a b:a c:b; complete a; fail b
    => #b a started, #b a completed, #b b started, #b b failed, #b c skipped | a:completed b:failed c:skipped
while a unit is started a boot is refused whole: start b #1 by=42; boot #b a b
    => #1 ok, !Refused | b:started | says unit "b" is started by script 42 (pid 42); nothing was run: end that first
while one is claimed too: start b #1 x by=42; boot #b a b
    => !Refused | b:pending x:not-registered | says unit "b" is claimed by script 42 (pid 42); nothing was run: end that
    first
but not if who started it has gone: start b #1 by=42; die 42; boot #b a b => #1 ok, #b a started, #b b started |
    a:started b:started
with one name twice too: boot #b a a => !Refused | | says a boot names a unit twice
no more than so many jobs run at once: boot #b a b c jobs=2; start d #1; complete b; boot #c e
    => #b a started, #b b started, #1 ok, #b b completed, #b c started, #c e started | a:started b:completed c:started
    d:started e:started
a place goes to the first that can use it: start x #1 lock=k; boot #b a@k b c:b d jobs=1; complete b
    => #1 ok, #b b started, #b b completed, #b d started | a:pending b:completed c:pending d:started x:started
# reset
a started unit is not reset, nor anything with it: want a; complete a; start b #1 by=42; reset a b; die 42; reset
    => #1 ok, !Refused, !Refused | a:completed b:started | says unit "b" is started by script 42 (pid 42), which is no
    longer running, and cannot be reset; `complete b` or `fail b` lets others go on
# what runs on
a supervisor's claim lasts until the command has ended:
    start a #1 supervised by=42; complete a #1 running; start a #2; complete a; exit #1; start a #3
    => #1 ok, !AlreadyStarted, #3 ok | a:started | says unit "a" still runs (pid 42): stop it first
what dies has failed, and who waits is skipped:
    start db #1 supervised; complete db #1 running; start app #2 db x; want x; exit #1 code=1 reason=exit_code_1;
    complete x
    => #1 ok, #2 DependencyFailed | app:skipped db:failed x:completed | says unit "app" skipped: dependency "db" failed
    (died 0ms after it was ready: exit code 1)
what its supervisor was told to end was stopped: start db #1 supervised; complete db #1 running; exit #1 code=1 stopped;
    start app #2 db
    => #1 ok, #2 DependencyFailed | app:skipped db:failed | says unit "app" skipped: dependency "db" failed (stopped)
a boot is notified of a death: boot #b a; complete a #b.a running; exit #b.a code=1
    => #b a started, #b a completed, #b a failed | a:failed
what runs on keeps a boot from running:
    boot #a a b; own #a.a by=42; complete a #a.a running; complete b #a.b; boot #b b a
    => #a a started, #a b started, #a a completed, #a b completed, !Refused | a:completed b:completed | says unit "a"
    still runs (pid 42) from an earlier boot: stop it, or boot with --resume
what a lost boot has left keeps another from running, until it is dead:
    boot #a a; own #a.a by=42; complete a #a.a running; lose #a.a; boot #b a; die 42; boot #b a
    => #a a started, #a a completed, !Refused, #b a started | a:started | says unit "a"
    still runs (pid 42), and its supervisor is gone: end that process first
what has lost its connection may begin again: start a #1 held by=42; lose #1; boot #b a
    => #1 ok, #b a started | a:started
what another supervisor runs too, and it is not reset: start a #1 supervised by=42; complete a #1 running; boot #b a;
    reset a => #1 ok, !Refused, !Refused | a:completed | says unit "a" still runs (pid 42) and cannot be reset;
    stop it first
# stop
what runs is told to end, and has failed, whatever its command says:
    start a #1 supervised; stop #s a within=8; complete a #1; start b #2 a
    => #1 ok, #1 stop a in 8, #s stopped a, #2 DependencyFailed | a:failed b:skipped | says unit "b" skipped: dependency
    "a" failed (stopped)
what waits is ended at once: boot #b db app:db; stop #s within=8; fail db #b.db
    => #b db started, #b app failed, #b stop db in 8, #b db failed, #s stopped app db | app:failed db:failed
a start that waits is refused, and its unit has failed: start a #1 x; start b #2 a; start c #3 x; stop #s a
    => #1 Refused, #2 DependencyFailed, #s stopped a | a:failed b:skipped c:pending x:not-registered | says unit "b"
    skipped: dependency "a" failed (stopped)
what has no supervisor cannot be stopped: start a #1 by=42; start b #2 supervised; start c #3 held; stop #s within=8;
    fail b #2 => #1 ok, #2 ok, #3 ok, #2 stop b in 8, #s stopped b cannot a(script 42) c(-)
    | a:started b:failed c:started
what does not end is left, and not told again:
    start a #1 supervised by=42; stop #s a within=8; sleep 9.9; sleep 0.1; stop #t a within=8; fail a #1
    => #1 ok, #1 stop a in 8, #s left a(script 42), #t stopped a | a:failed
what a lost supervisor ran is left too, until it is dead: start a #1 supervised by=42; complete a #1 running;
    stop #s within=8; lose #1; stop #t; die 42; stop #u
    => #1 ok, #1 stop a in 8, #s left a(script 42), #t cannot a(script 42), #u nothing | a:failed
nor does what a script reports of it: start a #1 supervised; stop #s a within=8; complete a; fail a; fail a #1
    => #1 ok, #1 stop a in 8, !Refused, #s stopped a | a:failed | says unit "a" is being stopped and cannot become
    completed
""")
def test_rule(rules: Rules, steps: str, outcome: str) -> None:
    answers_and_statuses, _, message = outcome.partition(" | says ")
    assert rules.play(steps).strip() == answers_and_statuses.strip()
    assert not message or str(list(rules.errors.values())[-1]) == message


# What an edge asks of a dependency in each status, from DESIGN.md; "never" cannot be met any more, and skips.
BRING = {
    "not registered": "",
    "pending": "want a",
    "started": "start a #a",
    "completed": "want a; complete a",
    "failed": "want a; fail a oops",
    "skipped": "want a x; want x; fail x",
}
TABLE = {
    "success": ["waits", "waits", "waits", "met", "never", "never"],
    "completion": ["waits", "waits", "waits", "met", "met", "met"],
    "start": ["waits", "waits", "met", "met", "met", "never"],
}


@pytest.mark.parametrize("how", ["start finds it", "start waits", "wait finds it", "wait waits"], ids=hyphenated)
@pytest.mark.parametrize(
    ("requires", "status", "verdict"),
    [(r, s, v) for r, row in TABLE.items() for s, v in zip(BRING, row)],
    ids=hyphenated,
)
def test_requirement(rules: Rules, how: str, requires: str, status: str, verdict: str) -> None:
    ask = f"start b #1 a!{requires}" if how.startswith("start") else f"wait #1 a!{requires}"
    rules.play(f"{BRING[status]}; {ask}" if how.endswith("finds it") else f"{ask}; {BRING[status]}")
    expected = {"waits": [], "met": ["#1 ok"], "never": ["#1 DependencyFailed"]}[verdict]
    assert [answer for answer in rules.told if answer.startswith("#1")] == expected
    if verdict == "never":
        error: Any = rules.errors["#1"]
        assert (error.unit, error.reason) == ("a", {"failed": "oops", "skipped": 'dependency "x" failed'}[status])
    if how.startswith("start"):
        b = rules.units.status("b")
        row = b.dependencies[0]
        shown = {"success": "completed", "completion": "ended", "start": "started"}[requires]
        assert b.status == {"waits": "pending", "met": "started", "never": "skipped"}[verdict]
        assert (row.required_status, row.requirement, row.current_status) == (shown, requires, status)
        assert row.is_satisfied == b.is_ready == (verdict == "met")


# -- declarations, names and limits ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 50])
def test_a_cycle_is_named_whole_and_known_until_the_next_want(units: Units, length: int) -> None:
    names = [f"n{i}" for i in range(length)]
    for unit, dependency in random.Random(1).sample(list(zip(names, names[1:])), length - 1):
        units.want(unit, [dependency, f"aside-of-{unit}"])
    before = statuses(units)
    with pytest.raises(CycleError) as caught:
        units.want(names[-1], ["new", names[0]])
    assert caught.value.data == [names[-1], *names]  # closed by the new edge, its first name repeated last
    assert str(caught.value).partition(";")[0] == "cycle detected: " + " -> ".join(caught.value.data)
    assert statuses(units) == before
    refusal = {node.unit_name: node.refusal for node in units.graph().nodes}[names[-1]]
    assert "cycle detected" in refusal == units.status(names[-1]).refusal
    units.want(names[-1], [])
    assert units.status(names[-1]).refusal == ""


def test_what_was_refused_leaves_nothing_behind(rules: Rules) -> None:
    def kept() -> Any:
        units = rules.units
        return story(units), units.edges, units.waits, *(list(wants(units, name)) for name in statuses(units))

    rules.play("want b a; want z b y x; complete z; want b c a; want x; want y")
    before = kept()
    rules.play("boot #b z:new a:b; want b x a!start; want b new new2 z; start z #1 b!start; boot #b z:new z")
    assert rules.told == ["!CycleError", "!Refused", "!CycleError", "!Refused", "!Refused"]
    assert [*rules.units.refusals] == ["a", "b", "z"]  # of a boot, who is in the cycle
    with pytest.raises(Refused):
        rules.units.want("b", ["x", "", "y"])
    assert kept() == before
    assert set(statuses(rules.units)) == {"a", "b", "c", "x", "y", "z"}


def test_a_thousand_refusals_are_remembered(units: Units) -> None:
    for name in [f"n{i}" for i in range(1001)]:
        with pytest.raises(CycleError):
            units.want(name, [name])
    assert len(units.graph().nodes) == 1000
    assert [bool(units.status(name).refusal) for name in ("n0", "n1", "n1000")] == [False, True, True]


def test_the_order_of_declaration_is_kept_and_a_name_counts_once(units: Units) -> None:
    assert units.want("z", ["c", "a", "c"]).name == "z"
    before = story(units)
    units.want("z", ["c"])
    assert (story(units), units.edges) == (before, 2)
    units.want("z", ["b", "c"])
    assert list(wants(units, "z")) == ["c", "a", "b"]


GOOD_NAMES = [
    *("x", 'coder_script.startup_unit["health-check"]', "<module>.git-clone", "Clone repository", "a\\b", "--help"),
    *(" ", "%s%n{0}", "[[[{{{" * 20, "clone-\u00fc-\u65e5\u672c\u8a9e-\U0001f680", "x" * 255, "\u00fc" * 127),
]
BAD_NAMES = ["", "a\nb", "tab\t", "nul\0", "\x1b[31m", "\x7f", "\u202e", "a\u200bb", "\ud800", "\u2028"]
BAD_NAMES += ["x" * 256, "\u00fc" * 128]


def test_a_printable_name_of_up_to_255_bytes_is_taken(units: Units) -> None:
    for name in GOOD_NAMES:
        units.start((name, {name[:-1] + "!": "success"}, []), "t")
    assert [units.status(name).status for name in GOOD_NAMES] == ["pending"] * len(GOOD_NAMES)


def test_another_name_is_refused_in_one_printable_line(rules: Rules, units: Units) -> None:
    calls: list[Callable[[Any], Any]] = [
        *(lambda name: units.want(name, []), lambda name: units.want("good", [name]), units.status),
        *(lambda name: units.start((name, {}, []), "t"), lambda name: units.start(("good", {}, [name]), "t")),
        *(lambda name: units.wait(["good", name], "w"), lambda name: units.end(name, Outcome("completed"))),
        *(lambda name: units.reset([name]),),
        lambda name: units.boot([("good", {}, []), (name, {}, [])], "b", None, 0, False),
    ]
    for call, name in itertools.product(calls, BAD_NAMES):
        with pytest.raises(Refused) as caught:
            call(name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200
    assert (statuses(units), rules.answers()) == ({}, [])
    assert all(node.refusal.isprintable() for node in units.graph().nodes)
    with pytest.raises(InvalidParams, match="must be a string, not int"):
        units.want("a", [5])  # type: ignore[list-item]


@scenarios("""
MAX_UNITS 3: want a b; want c d; want b c d; boot #b x y; want c a b => !Refused, !Refused, !Refused
MAX_UNITS 2: want a b; wait #1 a b; wait #2 a c => !Refused
MAX_EDGES 3: want a b c; want d e f; boot #b d:e,f; want d a; boot #b d:e; want x a
    => !Refused, !Refused, !Refused
MAX_EDGES 2: want a b; wait #1 a b; wait #2 a; lose #2; want b c => !Refused
MAX_WAITS 2: start b #1 a; wait #2 b; start c #3 a; wait #4 a; boot #b x y:x z:y; lose #2; start c #5 a
    => !Refused, !Refused, #b x started
MAX_WAITS 1: start a #1 supervised; stop #2 a within=8; stop #3 a within=8; lose #2; stop #4 a within=8;
    stop within=8; fail a #1 => #1 ok, #1 stop a in 8, !Refused, #4 stopped a, None stopped a
MAX_LOCKS 2: start a #1 lock=k,l; start b #2 lock=k,l,m => #1 ok, !Refused
""")
def test_a_number_is_bounded(
    rules: Rules, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, steps: str, outcome: str
) -> None:
    name, limit = request.node.callspec.id.split("-")
    monkeypatch.setattr(coder_sync, name, int(limit))
    assert rules.play(steps).partition(" | ")[0] == outcome
    assert "limit" in str(rules.errors["!"]) or "too many" in str(rules.errors["!"])


def test_a_hundred_scripts_whose_start_was_refused_are_remembered(rules: Rules) -> None:
    rules.play("start a #0 late;" + ";".join(f"start a #{pid} by={pid}" for pid in range(1, 121)) + "; delivered #0")
    assert [owner.pid for owner in rules.units.units["a"].refused] == [*range(21, 121)]
    rules.play("start a #121 by=121")
    assert [owner.pid for owner in rules.units.units["a"].refused] == [*range(22, 122)]


def test_the_oldest_events_are_forgotten(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "MAX_EVENTS", 3)
    chain(units, 5)
    assert list(units.events) == [7, 8, 9]
    assert [e.seq for e in units.status("u4").history] == [8, 9]
    monkeypatch.setattr(coder_sync, "MAX_HISTORY", 1)
    assert [e.seq for e in units.status("u4").history] == [9]


@pytest.mark.parametrize("reason", ["exit code 1", "x" * 500, ""], ids=lambda r: f"{len(r)}")
def test_a_long_chain_of_skips_is_bounded_and_still_knows_what_failed(units: Units, reason: str) -> None:
    names = chain(units, 100, name="{}" + "n" * 245)
    units.end(names[0], Outcome("failed", reason))
    reasons = [units.status(n).reason for n in names]
    assert max(map(len, reasons)) <= 2 * coder_sync.MAX_REASON + 100
    assert all(r.startswith(f'dependency "{before}" ') for before, r in zip(names, reasons[1:]))
    assert f'dependency "{names[0]}" failed' + (f" ({reason[:20]}" if reason else "") in reasons[-1]


# -- questions ---------------------------------------------------------------------------------------------


@scenarios("""
dependencies say why a unit waits:
    want done; complete done; start slow #1 by=42; want stuck x1 x2 x3 x4 x5 x6; sleep 31.0004;
    start b #2 done slow stuck typo; die 42; lacks b; show b waits_for
    => slow/completed/started/False/success/31/-/script 42, dead/-
    and stuck/completed/pending/False/success/31/-/-/x1 and x2 and x3 and x4 and x5
    and typo/completed/not registered/False/success/0/-/-/-;
    b: waits_for slow and stuck and typo
who stands behind an answer that is on its way waits for what becomes of it, or for what is missing since:
    start a #1 late by=42 lock=k; sleep 2.0004; start a #2 lock=k; lacks a; want a b; lacks a; show a dependencies
    => a/free/started/False/start/2/-/script 42/- and lock k/free/taken/False/lock/2/a has it/script 42/-;
    b/completed/not registered/False/success/0/-/-/- and a/free/started/False/start/2/-/script 42/-;
    a: dependencies b/completed/not registered/False/success/0/-/-/-
a lock is shown as what a unit waits for:
    start a #1 lock=apt,k by=42; sleep 5; start b #2 lock=apt; sleep 1.0004; lacks b;
    show b waits_for locks blocked_by ready; show a waits_for locks blocked_by ready; complete a; complete b;
    show a locks; show b started released_by
    => lock apt/free/taken/False/lock/6/a has it/script 42/-;
    b: waits_for lock apt, which a has, locks apt, blocked_by apt by a, ready 5;
    a: waits_for -, locks apt and k, blocked_by -, ready 0; a: locks apt and k; b: started 6.0004, released_by a
so is who comes first:
    start a #1 lock=k; start b #2 lock=k,l; start c #3 lock=l by=43; sleep 1; lacks c; show c waits_for blocked_by
    => lock l/free/taken/False/lock/1/b is before it in line/-/lock k, which a has;
    c: waits_for lock l, which b is to have first, blocked_by l by b
the places of a boot are no locks by name:
    boot #b a b@k c:b@l jobs=1; show b locks blocked_by waits_for; show c locks blocked_by waits_for; sleep 1;
    complete a; show b waiting ready started released_by
    => b: locks k, blocked_by -, waits_for one of 1 places to run, which a has; c: locks l, blocked_by -, waits_for b;
    b: waiting 0, ready 0, started 1, released_by a
times say when a unit did what, and who let it go last:
    sleep 1; start b #1 z a; sleep 1; want a; complete a; sleep 1; want z; complete z; sleep 1; complete b;
    sleep 1; start c #2 x; sleep 0.1234567; show b registered waiting ready started ended status released_by wants age;
    show c registered waiting ready started ended is_waiting age; show x registered waiting started ended is_waiting
    => b: registered 1, waiting 1, ready 3, started 3, ended 4, status completed, released_by z,
    wants z by success and a by success, age 1.123;
    c: registered 5, waiting 5, ready -, started -, ended -, is_waiting True, age 0.123;
    x: registered -, waiting -, started -, ended -, is_waiting False
who waits for a lock is ready no more when a dependency begins again:
    start x #1 lock=k; want a; complete a; sleep 1; start b #2 a lock=k; show b ready; start a #3; sleep 1;
    show b ready; complete a; sleep 1; start b #4; sleep 1; complete x; show b waiting ready started released_by
    => b: ready 1; b: ready -; b: waiting 1, ready 2, started 4, released_by x
a re-run begins anew:
    start a #1; sleep 1; fail a oops; sleep 1; start a #2 b; sleep 1; want b; complete b;
    show a status registered waiting started ended reason exit_code age released_by;
    complete a; reset a; show a status registered waiting started ended owner released_by
    => a: status started, registered 2, waiting 2, started 3, ended -, reason -, exit_code -, age 0, released_by b;
    a: status pending, registered 3, waiting -, started -, ended -, owner -, released_by -
of a start whose answer found nobody no time is left:
    start c #1 late; sleep 1; lose #1; show c reason; start c #2 d; show c ready waiting
    => c: reason the client that asked for its start was gone; c: ready -, waiting 1
what runs, its tries and its probe are remembered: start a #1 held by=41; sleep 1; own #1 reason=tcp:1;
    show a owner reason probe; retry #1; own #1 by=42; show a reason; sleep 1; complete a; show a owner tries probe
    => a: owner script 41, reason not ready yet: tcp:1, probe tcp:1; a: reason -; a: owner script 42, tries 1, probe -
but not in place of why others have ended it:
    start a #1 supervised; fail a oops; own #1 reason=tcp:1; show a reason probe => a: reason oops, probe tcp:1
whether what ran for somebody is alive is looked at while it may be: start a #1 by=42; die 42; show a owner; complete a;
    show a owner => a: owner script 42, dead; a: owner script 42
a service is completed as long as it lives:
    start a #1 supervised by=42; sleep 1; complete a #1 running; sleep 5; show a status running_on ended exited;
    exit #1; show a status running_on ended exited exit_reason
    => a: status completed, running_on True, ended 1, exited -; a: status completed, running_on False, ended 1,
    exited 6, exit_reason -
and has failed when it dies: start a #1 supervised; sleep 1; complete a #1 running; sleep 240;
    exit #1 code=3 reason=exit_code_3; show a status running_on ended exited exit_reason reason exit_code
    => a: status failed, running_on False, ended 1, exited 241, exit_reason exit code 3,
    reason died 4m00s after it was ready: exit code 3, exit_code 3
what is being stopped says so, and ran until then: start a #1 supervised; complete a #1 running; show a stopping;
    sleep 2; stop #s a within=8; sleep 1; show a stopping status; exit #1; show a stopping ended exited exit_reason
    reason exit_code
    => a: stopping False; a: stopping True, status completed; a: stopping False, ended 0, exited 3, exit_reason stopped,
    reason stopped, exit_code -
# why a unit was not run
a lost boot leaves its processes: boot #b a c by=41; own #b.a by=42; complete a #b.a running; lose #b;
    show a reason owner; die 42; show a owner; show c reason
    => a: reason lost: the boot that ran process 42 (script 42) ended; that process may still run, owner script 42;
    a: owner script 42, dead; c: reason lost: process 41 (script 41) ended without completing
so does a run: start a #1 supervised by=41; sleep 1; complete a #1 running; sleep 5; lose #1; show a reason;
    show a ended exited exit_reason; start b #2 supervised; own #2 by=42; lose #2; show b reason
    => a: reason lost: process 41 (script 41) ended; its command may still run; a: ended 1, exited 6, exit_reason lost;
    b: reason lost: the run that ran process 42 (script 42) ended without completing
start a #1 held; lose #1; show a reason => a: reason lost: the process that held it ended without completing
start a #1 b held by=42; lose #1; show a reason
    => a: reason lost: process 42 (script 42) waited for b (not registered), and its caller went away
start a #1 b held; lose #1; show a reason
    => a: reason lost: its start waited for b (not registered), and its caller went away
start a #1 b c held within=1; want c; sleep 1; show a reason => a: reason timed out waiting for b (not registered), c
start x #1 lock=k; start a #2 lock=k held within=1; sleep 1; show a reason
    => a: reason timed out waiting for lock k, which x has
""")
def test_what_is_known_of_a_unit(rules: Rules, steps: str, outcome: str) -> None:
    rules.play(steps)
    assert "; ".join(rules.shown) == outcome


def test_an_unknown_name_stays_unknown(units: Units) -> None:
    assert units.status("ghost") == UnitStatus("ghost", "not registered", True)
    assert statuses(units) == {}


def test_a_list_is_of_registered_units_by_name_unless_everything_is_asked_for(rules: Rules) -> None:
    rules.play("want d c a; want b d; wait #1 w; want c; want no no; start e #2 by=42; die 42; sleep 0.1234567")
    shown = rules.units.snapshots()
    assert [u.unit_name for u in shown] == ["b", "c", "d", "e"]
    assert shown[-1].owner == Owner(42, "script 42", False)
    assert [u.unit_name for u in rules.units.snapshots(everything=True)] == ["a", "b", "c", "d", "e", "w"]
    graph = rules.units.graph()
    assert (graph.now, [u.unit_name for u in graph.nodes]) == (0.123457, ["d", "c", "a", "b", "w", "e", "no"])
    assert rules.units.candidates(["d", "ghost"]) == ["c", "e"]  # nor any that waits for it


@scenarios("""
each step is an event, one that changes nothing is none:
    start b #1 a; sleep 1; start a #2; sleep 2; complete a; complete a; sleep 4; fail b exit code 3
    => 0 b registered, 0 b wants a, 0 b waiting a, 1 a registered, 1 a started, 3 a completed, 3 b started,
    7 b failed exit code 3
events name requirements, and of a boot the edges that are new: want b a!completion c; boot #b b:a,c,d a
    => 0 b registered, 0 b wants a (completion), 0 b wants c (completion), 0 a registered, 0 b wants a, 0 b wants c,
    0 b wants d, 0 a started, 0 b waiting a, c, d
who gave up, and what was skipped and why:
    start c #1 a within=1; sleep 1; want a; fail a
    => 0 c registered, 0 c wants a, 0 c waiting a, 1 c gave up timed out; still missing: a (not registered),
    1 a registered, 1 a failed, 1 c skipped dependency "a" failed
the life of services: start a #1 supervised; retry #1 reason=try_2; complete a #1 running; exit #1 code=1 reason=oops;
    start b #2 supervised; complete b #2 running; exit #2; start c #3 supervised; stop #s c; fail c #3
    => 0 a registered, 0 a started, 0 a retry try 2, 0 a ready, 0 a completed, 0 a died 0ms after it was ready: oops,
    0 b registered, 0 b started, 0 b ready, 0 b completed, 0 b exited, 0 c registered, 0 c started, 0 c stopped
""")
def test_what_happens_is_told_and_remembered(rules: Rules, steps: str, outcome: str) -> None:
    rules.play(steps)
    heard = rules.heard
    assert ", ".join(f"{e.time - 1000:g} {e.unit} {e.kind} {e.detail}".strip() for e in heard) == outcome
    assert [e.seq for e in heard] == list(range(1, len(heard) + 1))
    assert {e.wall - e.time for e in heard} == {1.7e9}
    assert list(rules.units.events.values()) == heard
    for unit in {e.unit for e in heard}:
        assert rules.units.status(unit).history == [e for e in heard if e.unit == unit]


def test_the_environment_comes_from_all_that_a_unit_depends_on(rules: Rules) -> None:
    units = rules.units
    rules.play("want a; want c b; want b a; want d c x; want x; start e #1 d")
    rules.play("complete a env=ONE:a,TWO:a; complete b env=TWO:b; complete x env=X:x; start c #2 late; wait #3 a")
    assert units.environment("b") == {"ONE": "a", "TWO": "a"}
    with pytest.raises(NotRegistered):
        units.environment("ghost")
    units.start(("g", {"b": "success"}, []), "#g")
    units.boot([("f", {"b": "success"}, [])], "#f", None, 0, False)
    units.end("f", Outcome("failed", "oops"))
    env = {"ONE": "a", "TWO": "b"}
    assert [answer for _, answer in rules.answers()] == [
        {"dependencies": ["b"], "env": env},
        {"unit": "f", "status": "started", "reason": "", "env": env},
        {"unit": "f", "status": "failed", "reason": "oops", "env": {}},
    ]
    assert units.environment("d") == {**env, "X": "x"}
    rules.play("reset b; start b #1")
    assert units.environment("d") == {"ONE": "a", "TWO": "a", "X": "x"}


def test_what_all_units_leave_is_bounded(rules: Rules) -> None:
    rules.play("start a #1; want b; complete b env=ONE:b")
    for size, fits in ((coder_sync.MAX_ENVIRONMENT - 6, False), (coder_sync.MAX_ENVIRONMENT - 7, True)):
        outcome = Outcome("completed", env={"BIG": "x" * size})
        with contextlib.nullcontext() if fits else pytest.raises(Refused, match="environment"):
            rules.units.end("a", outcome)
            rules.units.end("a", outcome)  # that is the same environment again
    assert len(rules.units.units["a"].facts.environment["BIG"]) == coder_sync.MAX_ENVIRONMENT - 7


# -- size --------------------------------------------------------------------------------------------------


def test_the_environment_comes_through_many_diamonds_at_once(rules: Rules) -> None:
    rules.play("want n0; complete n0 env=A:1")
    for i in range(60):
        rules.play(f"want l{i} n{i}; want r{i} n{i}; want n{i + 1} l{i} r{i}")
    assert rules.units.environment("n60") == {"A": "1"}


def test_a_chain_of_3000_starts_or_is_skipped_in_one_go(rules: Rules) -> None:
    names = chain(rules.units, 3000, "start")
    rules.play(";".join(f"start {name} #{name} late" for name in reversed(names)))
    assert rules.told == [f"#{name} ok" for name in names]
    others = chain(rules.units, 3000, name="v{}")
    rules.told = []
    rules.play(";".join(f"start {name} #{name}" for name in others[1:]) + "; fail v0 oops")
    assert rules.told == [f"#{name} DependencyFailed" for name in others[1:]]
    with pytest.raises(CycleError) as caught:
        rules.units.want("v0", ["v2999"])
    assert caught.value.data == ["v0", *reversed(others)]


# ---------------------------------------------------------------------------------------------------------
# Units: random operations against a plain model of the rules. The model says which steps are allowed now and
# which must have been taken; among those allowed together, Units chooses the order.
# ---------------------------------------------------------------------------------------------------------


MET_BY, LOST_BY = (
    {requires: {status for status, is_so in zip(BRING, row) if is_so == verdict} for requires, row in TABLE.items()}
    for verdict in ("met", "never")
)
ENDED = ("completed", "failed", "skipped")


class Model:
    """The rules as DESIGN.md has them, from statuses and edges, everything computed again for every question."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}  # of registered units
        self.edges: dict[tuple[str, str], str] = {}  # (unit, dependency) -> requirement
        self.line: list[str] = []  # tickets of starts that wait, oldest first
        self.starts: dict[str, tuple[str, bool, list[str]]] = {}  # ticket -> unit, held, locks
        self.waits: dict[str, list[tuple[str, str]]] = {}  # ticket of a wait -> its needs
        self.holders: dict[str, str] = {}  # unit -> ticket of the start that is on
        self.arrived: set[str] = set()  # of those, the ones whose answer has arrived
        self.supervised: set[str] = set()  # tickets of starts whose command has to end, too
        self.last: dict[str, str] = {}  # unit -> ticket of its last start, in its present run
        self.running: set[str] = set()  # units that run on
        self.stopping: dict[str, tuple[float, float]] = {}  # unit -> when to have ended, when to be told at the latest
        self.stops: dict[str, tuple[float, dict[str, list[str]]]] = {}  # ticket -> end, and what became of its units
        self.told_to_stop: dict[str, float] = {}  # unit -> by when
        self.locks: dict[str, list[str]] = {}  # unit that is started, or has failed and runs -> the locks it has
        self.lines: dict[str, list[str]] = {}  # lock -> the units in its line
        self.claimed: dict[str, list[str]] = {}  # of these, the ticket of who was to be started
        self.told: dict[str, Any] = {}  # ticket of a start -> its answer: dependencies or a class of error
        self.may_tell: dict[str, list[Any]] = {}  # ticket of a wait -> answers that were right at some moment
        self.may_become: dict[str, str] = {}  # unit -> the status that this operation itself gives it
        self.now = 1000.0

    # -- questions

    def status(self, name: str) -> str:
        return self.statuses.get(name, "not registered")

    def needs(self, unit: str) -> list[tuple[str, str]]:
        return [(dependency, r) for (u, dependency), r in self.edges.items() if u == unit]

    def unmet(self, needs: list[tuple[str, str]]) -> list[str]:
        return [d for d, r in needs if self.status(d) not in MET_BY[r]]

    def hopeless(self, needs: list[tuple[str, str]]) -> bool:
        return any(self.status(d) in LOST_BY[r] for d, r in needs)

    def reaches(self, unit: str, goal: str) -> bool:
        behind = [unit]
        for name in behind:
            behind += [d for d, _ in self.needs(name) if d not in behind]
        return goal in behind

    def names(self) -> set[str]:
        waited = {d for needs in self.waits.values() for d, _ in needs}
        return {*self.statuses, *(d for _, d in self.edges), *waited}

    def line_of(self, unit: str) -> list[str]:
        return [t for t in self.line if self.starts[t][0] == unit]

    def blocked(self, ticket: str) -> bool:
        """Whether somebody has a lock that a start needs, or was in its line before."""
        unit, _, locks = self.starts[ticket]
        lines = {lock: self.lines.get(lock, []) for lock in locks}
        before = {lock: line[: line.index(unit)] if unit in line else line for lock, line in lines.items()}
        taken = any(lock in theirs for lock in locks for theirs in self.locks.values())
        return taken or any(self.queues(other, lock) for lock in locks for other in before[lock])

    def queues(self, unit: str, lock: str) -> bool:
        """Whether a unit waits for a lock, and for nothing but locks."""
        line = self.line_of(unit)
        waits = self.status(unit) == "pending" and line and not self.unmet(self.needs(unit))
        return bool(waits) and lock in self.starts[line[0]][2]

    def is_over(self, ticket: str) -> bool:
        unit = self.starts[ticket][0] if ticket in self.starts else ""
        return ticket not in (*self.waits, *self.stops, *self.line, self.holders.get(unit))

    # -- steps: each returns the kind of error it must be refused with, or None

    def want(self, step: Step) -> type[Exception] | None:
        return self.link({step.names[0]: step.wants})

    def link(self, members: dict[str, dict[str, str]], anew: bool = False) -> type[Exception] | None:
        edges = {edge: r for edge, r in self.edges.items() if not anew or edge[0] not in members}
        new = {(unit, dependency): r for unit, wants in members.items() for dependency, r in wants.items()}
        if any(edges.get(edge, r) != r for edge, r in new.items()):
            return Refused
        before, self.edges = self.edges, {**edges, **new}
        if any(self.reaches(dependency, unit) for unit, dependency in new):
            self.edges = before
            return CycleError
        for unit in members:
            self.statuses.setdefault(unit, "pending")
        return None

    def start(self, step: Step) -> type[Exception] | None:
        unit = step.names[0]
        on = self.holders.get(unit)
        if (on and self.status(unit) in ENDED) or (self.status(unit) == "started" and (not on or on in self.arrived)):
            return AlreadyStarted
        refusal = self.want(step)
        if refusal is None:
            self.supervised.update(step.tickets if "supervised" in step.flags else ())
            self.claim(step.tickets[0], unit, bool({"held", "supervised"} & step.flags), step.locks)
        return refusal

    def claim(self, ticket: str, unit: str, held: bool, locks: list[str]) -> None:
        self.starts[ticket] = (unit, held, locks)
        self.line.append(ticket)
        if self.status(unit) in ENDED:
            self.may_become[unit] = "pending"

    def wait(self, step: Step) -> None:
        self.waits[step.tickets[0]] = [(n, step.requires) for n in dict.fromkeys(step.names)]

    def boot(self, step: Step) -> type[Exception] | None:
        members = {name: wants for name, wants, _ in step.members}
        done = {u for u in members if "resume" in step.flags and self.status(u) == "completed"}
        if any(self.status(u) == "started" or self.line_of(u) or u in self.holders for u in members if u not in done):
            return Refused
        refusal = self.link(members, anew=True)
        for unit, _, locks in step.members if refusal is None else ():
            if unit not in done:
                self.supervised.add(f"{step.tickets[0]}.{unit}")
                self.claim(f"{step.tickets[0]}.{unit}", unit, True, locks)
        return refusal

    def complete(self, step: Step, outcome: str = "completed") -> type[Exception] | None:
        (unit,), status = step.names, self.status(step.names[0])
        if status == "not registered":
            return NotRegistered
        ticket, running = step.tickets[0] if step.tickets else "", "running" in step.flags
        holds = self.holders.get(unit, "-") == ticket
        running = running and holds and self.starts[ticket][1]
        if unit in self.stopping and (holds or status == "started"):
            if holds and not running:
                self.stopped(unit)
            return None if holds or outcome == "failed" else Refused
        if holds and unit in self.running and not running:
            self.exits(unit, outcome == "failed")
            return None
        if status not in ENDED:
            self.become(unit, outcome)
            self.tell(unit, Refused)
        if running:
            self.run_on(ticket, unit)
        elif holds or self.holders.get(unit) not in self.supervised:
            self.close(unit)
        return None if status not in ENDED or status == outcome else Refused

    def fail(self, step: Step) -> type[Exception] | None:
        return self.complete(step, "failed")

    def exit(self, step: Step) -> None:
        (ticket,) = step.tickets
        unit = self.starts[ticket][0]
        if self.holders.get(unit) == ticket and unit in self.stopping:
            self.stopped(unit)
        elif self.holders.get(unit) == ticket and self.status(unit) != "started":
            self.exits(unit, bool(step.code))

    def exits(self, unit: str, badly: bool) -> None:
        if unit in self.running and badly:
            self.may_become[unit] = "failed"
        self.close(unit)

    def stopped(self, unit: str) -> None:
        if self.status(unit) != "failed":
            self.may_become[unit] = "failed"
            self.tell(unit, Refused)
        self.close(unit)

    def run_on(self, ticket: str, unit: str) -> None:
        if self.status(unit) == "completed" and self.last.get(unit) == ticket and self.starts[ticket][1]:
            self.holders[unit] = ticket
            self.supervised.add(ticket)
            self.running.add(unit)

    def running_(self, step: Step) -> None:
        self.run_on(step.tickets[0], self.starts[step.tickets[0]][0])

    def close(self, unit: str, lost: bool = False) -> None:
        """The claim that is on is over."""
        held = self.starts[self.holders[unit]][1] if unit in self.holders else True
        self.holders.pop(unit, None)
        self.running.discard(unit)
        if held or self.status(unit) != "started":
            self.locks.pop(unit, None)
        self.told_to_stop.pop(unit, None)
        if self.stopping.pop(unit, None):
            for _, answer in self.stops.values():
                if unit in answer["units"]:
                    answer["units"].remove(unit)
                    answer["left" if lost else "stopped"].append(unit)

    def stop(self, step: Step) -> type[Exception] | None:
        named = step.names or list(self.statuses)
        if any(self.status(name) == "not registered" for name in named):
            return NotRegistered
        affected = [unit for unit in self.statuses if any(self.reaches(unit, name) for name in named)]
        runs = [unit for unit in affected if self.holders.get(unit) in self.supervised]
        for unit in runs:
            by, latest = self.stopping.get(unit, (math.inf, math.inf))
            self.stopping[unit] = min(by, self.now + step.seconds), min(latest, self.now + step.seconds / 2)
        failed = []
        for unit in affected:
            line = self.line_of(unit)
            if unit not in self.holders and any(unit in named or self.starts[t][1] for t in line):
                self.tell(unit, Refused)
                self.may_become[unit] = "failed"
                failed.append(unit)
        cannot = [unit for unit in affected if self.status(unit) == "started" and unit not in runs]
        answer = {"units": runs, "stopped": failed, "left": [], "cannot": cannot}
        self.stops[step.tickets[0]] = self.now + step.seconds + coder_sync.STOP_PATIENCE, answer
        return None

    def sleep(self, step: Step) -> None:
        self.now += float(step.names[0])

    def lose(self, step: Step) -> None:
        touched: dict[str, bool] = {}
        for ticket in step.tickets:
            self.waits.pop(ticket, None)
            self.stops.pop(ticket, None)
        for ticket, (unit, held, _) in self.starts.items():
            if not self.is_over(ticket) and {ticket, ticket.partition(".")[0]} & {*step.tickets}:
                touched[unit] = held or touched.get(unit, False)
                if ticket in self.line:
                    self.line.remove(ticket)
                else:
                    if unit in self.running:
                        self.may_become[unit] = "failed"
                    self.close(unit, lost=True)
        for unit, held in touched.items():
            if self.status(unit) not in ENDED and unit not in self.holders:
                if held and not self.line_of(unit):
                    self.may_become[unit] = "failed"
                elif self.status(unit) == "started":
                    self.may_become[unit] = "pending"

    def delivered(self, step: Step) -> None:
        (ticket,) = step.tickets
        unit, held, _ = self.starts.get(ticket, ("", False, []))
        if unit and self.holders.get(unit) == ticket and ticket not in self.arrived:
            self.arrived.add(ticket)
            self.tell(unit, AlreadyStarted)
            if not held:
                self.close(unit)

    def reset(self, step: Step) -> type[Exception] | None:
        todo = step.names or list(self.statuses)
        if any(self.status(n) == "not registered" for n in todo):
            return NotRegistered
        if any(self.status(n) == "started" or n in self.holders for n in todo):
            return Refused
        again = [n for n in todo if self.status(n) in ENDED]
        for name in again:
            again += [u for (u, d) in self.edges if d == name and self.status(u) == "skipped" and u not in again]
        self.may_become.update(dict.fromkeys(again, "pending"))
        return None

    # -- what follows

    def become(self, unit: str, status: str) -> None:
        self.statuses[unit] = status
        if status != "started" and not (status == "failed" and unit in self.holders):
            self.locks.pop(unit, None)
        if status == "pending":
            self.last.pop(unit, None)

    def tell(self, unit: str, answer: Any) -> None:
        for ticket in self.line_of(unit):
            self.line.remove(ticket)
            if "." not in ticket:  # a boot is notified instead
                self.told[ticket] = answer

    def follow(self, unit: str, kind: str) -> None:
        """Do what Units says it did; it must be allowed."""
        needs, status = self.needs(unit), self.status(unit)
        kind = "failed" if kind in ("died", "stopped") else kind
        if self.may_become.get(unit) == kind:
            self.become(unit, self.may_become.pop(unit))
        elif kind == "skipped":
            assert status == "pending"
            assert self.hopeless(needs)
            self.become(unit, "skipped")
            self.tell(unit, DependencyFailed)
        elif kind == "started":
            assert status == "pending"
            assert not self.unmet(needs)
            winner = self.line_of(unit)[0]
            assert not self.blocked(winner)
            self.line.remove(winner)
            self.told[winner] = [d for d, _ in needs]
            self.become(unit, "started")
            self.holders[unit] = self.last[unit] = winner
            self.locks[unit] = self.starts[winner][2]
        else:
            assert kind in ("registered", "wants", "waiting", "gave up", "ready", "exited") or status == kind
        self.look()

    def look(self) -> None:
        """See which waits have to be answered in the present moment."""
        for ticket, needs in self.waits.items():
            if self.hopeless(needs):
                self.may_tell.setdefault(ticket, []).append(DependencyFailed)
            elif not self.unmet(needs):
                self.may_tell.setdefault(ticket, []).append([])

    def tellings(self) -> dict[str, tuple[str, float]]:
        """Whom the supervisors are to be told to stop, and the seconds they have."""
        tellings = {}
        for unit, (by, latest) in self.stopping.items():
            above = any(self.reaches(other, unit) for other in self.stopping if other != unit)
            if self.told_to_stop.get(unit, math.inf) > by and (not above or latest <= self.now):
                self.told_to_stop[unit] = by
                tellings[self.holders[unit]] = unit, max(0.0, by - self.now)
        return tellings

    def ends_of_stops(self) -> dict[str, dict[str, list[str]]]:
        """What stops are answered."""
        over = [t for t, (end_by, answer) in self.stops.items() if end_by <= self.now or not answer["units"]]
        answers = {ticket: self.stops.pop(ticket)[1] for ticket in over}
        for answer in answers.values():
            answer["left"] += answer.pop("units")
        return {t: {what: sorted(units) for what, units in answer.items()} for t, answer in answers.items()}

    def settled(self, lines: dict[str, list[str]]) -> None:
        """Nothing that must happen is left to do. Take over the lines of locks; who stayed in one kept its place."""
        assert not self.may_become, self.may_become
        for lock, line in lines.items():
            stayed = [u for u in self.lines.get(lock, []) if u in line and self.claimed.get(u) == self.line_of(u)[:1]]
            assert [u for u in line if u in stayed] == stayed
            assert {*line} == {unit for unit in self.statuses if self.queues(unit, lock)}
        self.lines = lines
        self.claimed = {unit: self.line_of(unit)[:1] for line in lines.values() for unit in line}
        for ticket in self.line:
            unit = self.starts[ticket][0]
            if self.status(unit) == "started":  # whose answer is on its way
                assert self.holders[unit] not in self.arrived, f"{ticket} should have been answered"
            else:
                assert self.status(unit) == "pending"
                blocked = self.unmet(self.needs(unit)) or self.blocked(self.line_of(unit)[0])
                assert blocked, f"{unit} should have started"
        for unit, status in self.statuses.items():
            assert status != "pending" or not self.hopeless(self.needs(unit)), f"{unit} should be skipped"
        for ticket, needs in self.waits.items():
            assert self.unmet(needs), f"{ticket} should be over"
            assert not self.hopeless(needs), f"{ticket} should have failed"


class Play:
    """One random run of Units beside the Model."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rules, self.model = Rules(), Model()
        self.services = "supervised" if seed % 2 else ""  # whether there are any
        self.units = self.rules.units
        self.names = "abcdef"[: self.random.choice([2, 3, 4, 6])]
        self.requirements = self.random.choice([["success"], ["success", "success", "completion", "start"]])

    def step(self) -> Step:
        """Choose what to do next."""
        chance, pick, claims = self.random.random, self.random.choice, self.rules.claims
        some = self.random.choices(self.names, k=pick([0, 1, 1, 2, 3]))
        name, new = pick(self.names), f"#{self.units.seq}-{len(claims)}"
        waiting = [ticket for ticket, claim in claims.items() if not claim.is_over()]
        started = [t for t in waiting if t in self.model.starts and t not in self.model.line]
        started += [t for t in self.model.starts if claims[t].unit.last][:5]
        weights = {"want": 3, "start": 6, "complete": 5, "fail": 2, "wait": 2, "lose": 2, "boot": 1, "reset": 1}
        weights.update({"delivered": 4} if waiting else {})
        weights.update({"stop": 1, "sleep": 2} if self.services else {})
        weights.update({"exit": 4, "running": 1} if self.services and started else {})
        (verb,) = self.random.choices([*weights], [*weights.values()])
        words = [name]
        if verb in ("want", "wait", "start"):
            words = [f"{name}!{pick(self.requirements)}", *(some[:2] if verb != "start" or chance() < 0.4 else [])]
        if verb == "start":
            words += [pick(["", "", "held", self.services]), pick(["", "", "", "lock=k", "lock=l", "lock=k,l"])]
        elif verb in ("complete", "fail") and self.services and started and chance() < 0.6:
            ticket = pick(started)
            words = [self.model.starts[ticket][0], ticket, pick(["", "running"]) if verb == "complete" else ""]
        elif verb in ("exit", "running"):
            words = [pick(started), pick(["", "code=1"]) if verb == "exit" else ""]
        elif verb == "stop":
            words = [*dict.fromkeys(some), pick(["within=8", "within=8", "within=2", "within=0"])]
        elif verb == "sleep":
            words = [pick(["1", "4", "8"])]
        elif verb == "lose":
            words = self.random.sample(list(claims), min(len(claims), pick([1, 1, 2, 5])))
        elif verb == "delivered":
            words = [pick(waiting)]
        elif verb == "boot":
            units = dict.fromkeys(some or [name])
            words = [f"{u}:{pick(['', '', *self.names])}{pick(['', '', '', '@k'])}" for u in units]
            words += [pick(["", "", "resume"]) if self.services else ""]
        elif verb == "reset":
            words = sorted(set(some))
        return Step(" ".join([verb, *words, *([new] if verb in ("start", "wait", "stop", "boot") else [])]))

    def do(self, step: Step) -> None:
        """Do it on both sides and compare everything."""
        seen, model, units = self.units.seq, self.model, self.units
        model.told, model.may_tell, model.may_become = {}, {}, {}
        edges = {*model.edges, *((unit, d) for unit, wants, _ in step.members for d in wants)}
        edges.update((step.names[0], d) for d in step.names[1:])
        expected = getattr(model, step.verb.replace("running", "running_"))(step)
        model.look()
        result, cycle = None, []
        try:
            self.rules.do(step)
        except Refused as error:
            result, cycle = type(error), error.data if isinstance(error, CycleError) else []
        assert {*zip(cycle, cycle[1:])} <= edges  # one that the new edges would close
        assert cycle[:1] == cycle[-1:]
        assert len({*cycle}) == max(0, len(cycle) - 1)
        assert result == expected
        for number in range(seen + 1, units.seq + 1):
            model.follow(units.events[number].unit, units.events[number].kind)
        self.compare()

    def compare(self) -> None:
        model, units = self.model, self.units
        told: dict[str, Any] = {}
        tellings: dict[str, tuple[str, float]] = {}
        ends: dict[str, Any] = {}
        for claim, answer in self.rules.answers():
            ticket = claim.ticket
            if isinstance(answer, coder_sync.Notice) and answer.method == "stop":
                started = next(t for t, c in self.rules.claims.items() if c is claim)
                tellings[started] = (answer.params["unit"], answer.params["grace"])
            elif isinstance(answer, coder_sync.Notice):
                assert statuses(units)[answer.params["unit"]] == answer.params["status"]
            elif isinstance(claim, coder_sync.Stop):
                rows = {what: [row if isinstance(row, str) else row.unit for row in answer[what]] for what in answer}
                ends[ticket] = {what: sorted(names) for what, names in rows.items()}
            elif claim.boot:
                assert answer["status"] in ("started", *ENDED)
                if answer["status"] == "started":
                    told[f"{ticket}.{answer['unit']}"] = list(wants(units, answer["unit"]))
            else:
                told[ticket] = type(answer) if isinstance(answer, Exception) else answer.get("dependencies", [])
        for ticket in [t for t in told if t in model.waits]:
            assert told.pop(ticket) in model.may_tell[ticket]
            del model.waits[ticket]
        assert told == model.told
        assert tellings == model.tellings()
        assert ends == model.ends_of_stops()
        model.settled({name: [unit.name for unit in lock.line] for name, lock in units.locks.items()})
        assert {name: unit.status for name, unit in units.units.items()} == {n: model.status(n) for n in model.names()}
        assert {unit.name for unit in units.stopping} == {*model.stopping}
        assert units.edges == len(model.edges) + sum(map(len, model.waits.values()))
        assert units.waits == sum("." not in ticket for ticket in model.line) + len(model.waits) + len(model.stops)
        for name, unit in units.units.items():
            needs = model.needs(name)
            assert {d.name: r for d, r in unit.wants.items()} == dict(needs)
            assert unit.unmet == len(model.unmet(needs)), f"{name}: unmet"
            assert unit.facts.running_on == (name in model.running)
            assert {lock.name for lock in unit.locks if unit in lock.taken} == set(model.locks.get(name, []))
        for ticket, claim in self.rules.claims.items():
            assert claim.is_over() == model.is_over(ticket), ticket
        for lock in units.locks.values():
            assert all(lock in unit.locks for unit in lock.line)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_units_do_what_the_model_allows_and_demands(first: int) -> None:
    for seed in range(first, first + 50):
        play, steps = Play(seed), []
        for _ in range(60):
            step = play.step()
            steps.append(step.text)
            try:
                play.do(step)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}\n" + "; ".join(steps)) from error
        for shown in play.units.snapshots(everything=True):
            assert shown.status == play.model.status(shown.unit_name)
            assert shown.is_ready == (not play.model.unmet(play.model.needs(shown.unit_name)))


# ---------------------------------------------------------------------------------------------------------
# Protocol: lines out and in, with the C scanner used bare and with the json package.
# ---------------------------------------------------------------------------------------------------------

MESSAGES: list[dict[str, Any]] = [
    {},
    {"id": 1, "method": "ping", "params": {}},
    {"id": "a", "result": [None, True, False, 0, -1, 2**31, 1.5, 1e-9, "", [], {}]},
    {"method": 'Clone "repository" \\ / \u00fc \u65e5\u672c \U0001f680 \x00 \x1f \u2028 \n'},
    {"params": {"units": ["x" * 255] * 200}},
    *({"unit": text} for text in ("[" * 1000, "{" * 1000, '\\"[' * 300, "\\" * 301 + "[" * 99)),
]
LINES = [coder_sync.encode(message) for message in MESSAGES]


@pytest.fixture(params=["bare", "json-package"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read and write JSON: the second is for a Python without the C module."""
    if request.param == "json-package":
        monkeypatch.setitem(sys.modules, "_json", None)
        loads, dumps = coder_sync._codec()
        assert loads is not coder_sync._loads
        monkeypatch.setattr(coder_sync, "_loads", loads)
        monkeypatch.setattr(coder_sync, "_dumps", dumps)
    return str(request.param)


def test_what_is_encoded_is_decoded_and_both_codecs_write_the_same(codec: str) -> None:
    for message, line in zip(MESSAGES, LINES):
        assert coder_sync.encode(message) == line
        assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
        assert coder_sync.decode(line) == {"jsonrpc": "2.0", **message} == json.loads(line)
    for line in (b'{"a":[1]}', b' {"a" : [1]}\r\n', b'\t{"a":[1]}  ', b'{"a":[0],"a":[1]}'):
        assert coder_sync.decode(line) == {"a": [1]}


GARBAGE = [
    *(b"", b" \n", b"nope", b"GET / HTTP/1.1\r\n", b"\x00", b"\xff", b"{", b'{"a":1,}', b"{1:1}", b"}" * 100),
    *(b'"\x01"', b'"abc', b'"abc\\', b'"\\x"', b'"\xed\xa0\x80"', b'{"a":1}{"b":2}', b"1 2", b"01", b'{"a": NaN}'),
    *(b"[-Infinity]", b'{"id":' + b"9" * 5000),
]


def test_what_is_not_one_json_value_is_refused(codec: str) -> None:
    for line in GARBAGE:
        with pytest.raises(ParseError) as caught:
            print(line, "is taken for", coder_sync.decode(line))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_garbage_is_refused_where_nobody_has_imported_json() -> None:
    program = f"""import sys; sys.path.insert(0, {str(HERE)!r}); import coder_sync
print("json" in sys.modules)  # the scanner of 3.8 imports it for an error
for line in {GARBAGE!r}:
    try: print("accepted", line, coder_sync.decode(line))
    except coder_sync.ParseError: pass"""
    assert subprocess.check_output([*PYTHON, program]) == b"False\n"


def test_32_levels_are_read_and_33_are_not(codec: str) -> None:
    assert coder_sync.decode(b"[" * 32 + b"]" * 32)
    assert coder_sync.decode(b'{"a":' * 32 + b"1" + b"}" * 32)
    assert coder_sync.decode(b"[" + b"[]," * 1000 + b"{}]") == [[]] * 1000 + [{}]  # side by side they do not nest
    for line in (b"[" * 33 + b"]" * 33, b'{"a":' * 33 + b"1" + b"}" * 33, b'[{"a":' * 30_000):
        with pytest.raises(ParseError, match="deeper than 32 levels"):
            coder_sync.decode(line)


def test_a_line_of_brackets_and_open_strings_is_refused_quickly() -> None:
    line = b"[" * 33 + b'"' + b'\\"' * ((coder_sync.MAX_LINE - 34) // 2)
    began = time.process_time()
    with pytest.raises(ParseError):
        coder_sync.decode(line)
    assert time.process_time() - began < 0.5  # some milliseconds, unless each quote looks for its end


# -- records -----------------------------------------------------------------------------------------------

OWNER = Owner(4242, "bash setup.sh", True)
GONE = Owner(7, "sh", False)
DEPENDENCY = Dependency("a", "ended", "started", False, "completion", 1.5, "", OWNER, ["x"], "b")
EVENT = coder_sync.Event(1, 2.5, 1.7e9, "u", "wants", "v")
NODE = UnitStatus("u", "started", True, owner=OWNER, started=1.5, wants={"a": "success"}, tries=[2.0])
NODE.registered, NODE.waiting, NODE.released_by = 0.0, 0.5, "a"
FAILED = UnitStatus("u", "failed", False, reason="why", exit_code=3, dependencies=[DEPENDENCY] * 2, history=[EVENT])
RECORDS = [Owner(1, "init", None), DEPENDENCY, EVENT, FAILED, coder_sync.Graph(7.5, [NODE])]


def test_a_record_survives_the_wire_also_from_a_newer_or_older_agent() -> None:
    for value in RECORDS:
        data = json.loads(json.dumps(coder_sync.plain(value)))
        assert coder_sync.record(type(value), data) == value
        if data.get("owner"):
            data["owner"]["shoe_size"] = 43
        assert coder_sync.record(type(value), {**data, "mood": "good", "__class__": "x"}) == value
    oldest = {"unit_name": "u", "status": "pending", "is_ready": True}
    assert coder_sync.record(UnitStatus, oldest) == UnitStatus("u", "pending", True)
    rows = coder_sync.plain({"rows": (Owner(1, "init", True, "123"),)})  # when it was born stays with the agent
    assert rows == {"rows": [{"pid": 1, "command": "init", "alive": True}]}


ODD_PARTS: list[Any] = [None, True, 5, -0.5, 10**400, "text", "\033[0m", [], {}, [[]], {"x": 5}, ["x", None]]


def altered_parts(value: Any) -> Iterator[Any]:
    """What JSON could have in place of a value, and the value with each of its parts replaced so, or missing."""
    yield from ODD_PARTS
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: part} for part in altered_parts(value[key]))
    elif isinstance(value, list):
        for at in range(len(value)):
            yield from ([*value[:at], part, *value[at + 1 :]] for part in altered_parts(value[at]))


@pytest.mark.parametrize("value", RECORDS, ids=lambda value: type(value).__name__)
def test_what_is_wrong_in_an_answer_is_said_in_one_line_and_the_rest_can_be_shown(value: Any) -> None:
    kind, said = type(value), set()
    for data in altered_parts(coder_sync.plain(value)):
        try:
            found = coder_sync.record(kind, data)
        except Unreachable as error:
            said.add(str(error).partition("; ")[2])
            continue
        assert coder_sync.record(kind, coder_sync.plain(found)) == found
        if kind is UnitStatus:
            shown = coder_sync.status_text(found) + coder_sync.list_text([found])
            assert shown.replace("\n", "").isprintable() and found.age < 1e15
    assert said == {"are agent and client of one version?"}


# ---------------------------------------------------------------------------------------------------------
# Times and words on the command line and in what it prints.
# ---------------------------------------------------------------------------------------------------------

DURATIONS = """0=0 30=30 2.5=2.5 30s=30 1h30m=5400 1h1m1s1ms=3661.001 1.5h=5400 .5s=0.5 5.s=5 250us=0.00025
    250\u00b5s=0.00025 250\u03bcs=0.00025 100ns=1e-7 1m1m=120 999999999=999999999"""  # both mus
NO_DURATIONS = ["", " ", "s", "m5", ".", ".s", "-5", "+5", "5 s", " 5s", "5s\n", "1m30", "1.2.3s", "1e3", "5sm", "5S"]
NO_DURATIONS += ["1d", "inf", "nan", "1_000", "0x10", "\u0665s", "\u00b2", "\0", "1000000000", "9" * 400]
SPANS = """0=0ms 0.0004=0ms 0.9994=999ms 0.9996=1.0s 9.94=9.9s 9.96=10s 59.4=59s 59.6=1m00s 3599.4=59m59s
    3599.6=1h00m 3725=1h02m 90000=25h00m"""


def test_durations_of_go_and_bare_seconds_are_read_and_a_span_reads_well() -> None:
    for text, seconds in (pair.split("=") for pair in DURATIONS.split()):
        assert coder_sync.duration(text) == pytest.approx(float(seconds), abs=1e-12), text
    for seconds, text in (pair.split("=") for pair in SPANS.split()):
        assert coder_sync.span(float(seconds)) == text


def test_what_is_no_duration_is_refused_in_one_printable_line() -> None:
    for text in NO_DURATIONS:
        with pytest.raises(UsageError, match=r"^invalid duration .*: write 30 or 30s, 10m, 1h30m") as caught:
            pytest.fail(f"{text[:20]!a} is read as {coder_sync.duration(text)}")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200


STATES: list[tuple[str, dict[str, Any], str]] = [
    ("not registered", {"did_you_mean": "aa"}, 'a not registered, did you mean "aa"?'),
    ("pending", {"age": 12}, "a pending for 12s, not started yet"),
    ("pending", {"waits_for": ["x", "y"]}, "a pending for 0ms, waits for x, y"),
    ("started", {"age": 31}, "a started 31s ago"),
    ("started", {"owner": Owner(7, "")}, "a started 0ms ago by process (pid 7)"),
    ("started", {"owner": GONE}, "a started 0ms ago by sh (pid 7), which is no longer running"),
    ("completed", {"age": 2, "owner": OWNER}, "a completed 2.0s ago"),
    ("taken", {"requirement": "lock", "owner": OWNER, "reason": "b has it"}, "a taken 0ms ago (b has it)"),
    ("taken", {"requirement": "lock", "owner": GONE}, "a taken 0ms ago, whose process is no longer running"),
    ("failed", {"age": 2, "reason": "exit code 7"}, "a failed 2.0s ago (exit code 7)"),
]


def test_a_state_says_where_a_dependency_stands_and_why() -> None:
    for status, more, text in STATES:
        assert coder_sync.dependency_text(Dependency("a", "completed", status, False, **more)) == text


def test_a_wait_may_be_longer_than_the_system_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with coder_sync.Channel("x", sock=ours) as channel, theirs:
        monkeypatch.setattr(coder_sync, "LONGEST_POLL", 0.01)
        threading.Timer(0.1, theirs.sendall, [b'{"jsonrpc": "2.0"}\n']).start()
        assert (channel.receive(9e8), channel.receive(0.01)) == ({"jsonrpc": "2.0"}, None)


def test_what_does_not_block_takes_all_that_is_put(world: World) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    world.spawn(altered("coder_sync.put('x' * 200_000)", "--version"), stdout=write)
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read().startswith(b"x" * 200_000)


def test_a_timeout_as_text_says_what_was_missing_and_what_may_have_been_meant() -> None:
    missing = Dependency("c", "completed", "not registered", False, did_you_mean="cc")
    text = 'timeout waiting for a: b pending, c not registered (did you mean "cc"?)'
    assert str(TimedOut("timeout waiting for a", [Dependency("b", "completed", "pending", False), missing])) == text


def test_a_name_close_to_a_known_one_resembles_it() -> None:
    guesses = {"git-clon": "git-clone", "gitclone": "git-clone", "GIT": "", "db-2": "", "db_1": "db-1", "": ""}
    for name, guess in guesses.items():  # db-1 and db-2 are siblings, and no slips of the finger
        assert coder_sync.resembling(name, ["db-1", "git-clone", "pip", "db-22"]) == guess


NO_VALUES = {
    "complete a --exit-code=": ["", "-", "1.5", "0x1", "--1", "\u00b2", "1234567890", "9" * 5000],
    "serve --mode=": ["", "66", "8", "0o660", "66666", "\u00b2\u00b2\u00b2"],
    "serve --group=": ["no-such-group-here", "\u00b2", "-1", str((1 << 32) - 1), "9" * 5000, "\udcff"],
}


def test_a_number_a_mode_or_a_group_is_read_or_refused_in_one_line(call: Call, world: World) -> None:
    for text, number in {"007": 7, "-9": -9}.items():
        assert coder_sync.parse(["complete", "a", "--exit-code", text])[1].exit_code == number
    for text, mode in {"660": 0o660, "0600": 0o600, "4755": 0o755}.items():
        assert coder_sync.parse(["serve", "--mode", text])[1].mode == mode
    assert coder_sync.group_id("4242") == 4242
    for line, texts in NO_VALUES.items():
        for text in texts:
            done = call(world, *(line + text).split())
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch("error: .*(not a whole number|invalid mode|no such group).*\n", done.stderr)
            assert len(done.stderr) < 200


# -- the parser --------------------------------------------------------------------------------------------

VALUES = ["a", "x y", "5", "10s", "1h30m", "0", "table", "json", "success", "completion", "660", "/run/a.sock", ""]
MISTAKES = ["-", "-5", "-5s", "-x", "--nope", "1e3", "xml", "--unit", "---", "- a", "--a b", "\u00fc", "=", "a=b", "--"]


def random_words(chance: random.Random, name: str) -> list[str]:
    """Words for a command: mostly right and plain, some not."""
    arguments, tail = coder_sync.COMMANDS[name].arguments, coder_sync.COMMANDS[name].tail
    options = [a for a in arguments if a.is_option and a.dest != "help"]
    required = [a for a in arguments if not a.is_option and a.words.get("nargs") != "*" and chance.random() < 0.9]
    words = [chance.choice(a.words.get("choices", VALUES)) for a in required]
    for _ in range(chance.randrange(4)):
        option = chance.choice(options)
        flag, value = chance.choice(option.names), chance.choice(option.words.get("choices", VALUES))
        forms = [[flag, value]] * 6 + [[flag], [f"{flag}={value}"], [f"{flag}{value}"], [flag[:-2]]]
        form = chance.choice(forms if option.takes_value else [[flag]] * 6 + [[flag, value], [f"{flag}{flag[1:]}"]])
        form = form + chance.choice([[], [], [], [], [chance.choice(VALUES)], [chance.choice(MISTAKES)]])
        at = chance.randrange(len(words) + 1)
        words[at:at] = form
    return words + chance.choice([["--", "true", "-x"], ["--", "true", "-x"], [], ["--"]] if tail else [[]])


def read_alike(chance: random.Random, name: str, count: int) -> tuple[int, int]:
    """Assert that `quick` reads random words as argparse does, or not at all; return how many each has read."""
    quick = read = 0
    for _ in range(count):
        words = [name, *random_words(chance, name)]
        found = coder_sync.quick(words)
        try:
            command, args = coder_sync.parse(words)
        except UsageError:
            assert found is None, words
        else:
            read += 1
            if found:
                quick += 1
                assert (found[0], vars(found[1])) == (command, vars(args)), words
    return quick, read


@pytest.mark.parametrize("name", coder_sync.COMMANDS)
def test_a_plain_command_line_is_read_as_argparse_reads_it(name: str) -> None:
    quick, read = read_alike(random.Random(name), name, 300)
    assert 30 < quick < read


def test_words_after_two_dashes_are_names_or_the_command() -> None:
    args = coder_sync.parse(["want", "--quiet", "u", "--", "--dep", "-x", "--"])[1]
    assert (args.unit, args.deps, args.quiet) == ("u", ["--dep", "-x", "--"], True)
    for read in (coder_sync.quick, coder_sync.parse):
        args = read(["run", "u", "--", "sh", "-c", "exit 3", "--", "--quiet"])[1]
        assert (args.unit, args.command, args.quiet) == ("u", ["sh", "-c", "exit 3", "--", "--quiet"], False)


# -- help and completion -----------------------------------------------------------------------------------


def test_the_help_of_a_command_has_all_that_it_takes_and_an_example_that_is_right(call: Call, world: World) -> None:
    for name, about in coder_sync.COMMANDS.items():
        page = call.ok(world, name, "--help")
        text = " ".join(page.split())
        assert page.startswith(f"usage: {coder_sync.usage_of(about)}\n")
        assert about.help in page
        for argument in about.arguments:
            shown = (*argument.names, *argument.words.get("choices", ())) if argument.is_option else ()
            assert all(word in text for word in (argument.words["help"].replace("%%", "%"), *shown))
            default = argument.words.get("default")
            assert not default or f"(default: {default})" in text
        command, *words = shlex.split(re.split("[|>]", page.partition("\nexample: coder_sync.py ")[2])[0])
        assert command == name
        assert coder_sync.parse([name, *(word.replace("$?", "1") for word in words)])
    for line in ("start a -qh --nope", "help start", "exp sync start --help"):
        assert call.ok(world, *line.split()) == call.ok(world, "start", "--help")
    for line in ("--help", "-h", "help", "exp sync --help", "exp sync", "--socket-path /x --help"):
        out = call.ok(world, *line.split())
        assert all(f"\n  {name} " in out and about.help in out for name, about in coder_sync.COMMANDS.items())
        assert "`coder_sync.py --version`" in out


def first_words(table: str) -> set[str]:
    """The first word of each row of a table on a help page, without what follows it."""
    return {re.split(r"[: ]", line)[0] for line in table.partition("\n\n")[0].splitlines()[1:]}


def readme_words(title: str) -> set[str]:
    """The first words of the first column of a table of the README."""
    cells = [line.split("|")[1] for line in README.partition(f"\n| {title} |")[2].partition("\n\n")[0].splitlines()[2:]]
    return {word.split()[0] for cell in cells for word in cell.replace("`", "").split(",")}


def test_a_topic_of_the_help_and_the_readme_say_the_same(call: Call, world: World) -> None:
    pages = {topic: call.ok(world, "help", topic) for topic in coder_sync.TOPICS}
    assert first_words(pages["headers"].partition("HEADER ")[2]) == {*coder_sync.HEADERS} == readme_words("header")
    codes = {line.split()[0] for line in pages["exit-codes"].splitlines()}
    assert codes == readme_words("exit code") >= {str(kind.exit_code) for kind in coder_sync.ERRORS.values()}
    said = README.partition("\nPROBE is `tcp:")[2].partition("\n\n")[0]
    kinds = first_words(pages["probes"].partition("PROBE ")[2]) - {"COMMAND"}
    assert kinds == {"tcp", *re.findall("`(unix|http|file|notify)\\b", said)}
    assert all(re.search(rf"^  {name}\b", pages["protocol"], re.M) for name in coder_sync.METHODS)
    assert all(f"  {code}  " in pages["protocol"] for code in coder_sync.ERRORS)
    for topic, page in pages.items():
        assert f"`{topic}`" in README and max(map(len, page.splitlines())) <= 120
    assert "help headers" in call.ok(world, "boot", "--help")


def test_the_help_has_every_key_of_what_is_printed_as_json(call: Call, agent: World) -> None:
    agent.client.want("a", "b")
    agent.client.start("b")
    rows, *parts = re.split(r"\nKeys of .*:\n", call.ok(agent, "help", "json").partition("\nKEY ")[2])
    status = json.loads(call.ok(agent, "status", "a", "-o", "json"))
    listed = json.loads(call.ok(agent, "list", "-o", "json"))
    units = json.loads(call.ok(agent, "timeline", "-o", "json"))["units"]
    for mark, keys in (("s", status), ("l", listed[0]), ("t", units[0])):
        lines = [line.split() for line in rows.partition("\n\n")[0].splitlines()[1:]]
        assert [line[0] for line in lines if mark in line[1]] == sorted(keys, key=[*status].index)
    event = json.loads(call.ok(agent, "events").splitlines()[0])
    for part, example in zip(parts, (status["dependencies"][0], listed[1]["owner"], event)):
        assert [line.split()[0] for line in part.splitlines() if line] == [*example]


UNITS_THERE = ["a:b", "a:c", "apt", "it's $(exit)", "my unit", "pip", "x:only"]
COMPLETIONS = {
    "": [*coder_sync.COMMANDS],
    "--s": ["--socket-path"],
    "exp sync com": ["complete", "completion"],
    "help tim": ["timeline"],
    "--socket-path=PATH exp sync want a p": ["pip"],
    "--socket-path PATH want a p": ["pip"],
    "start --socket-path=/nowhere ": [],
    "start ": UNITS_THERE,
    "start a --w": ["--want"],
    "list -o ": ["table", "json"],
    "list --output=j": ["--output=json"],
    "completion ": ["bash", "zsh"],
    "run pip --quiet -- a": [],
    "serve --log-file ": [],
    "ls ": [],
}


def test_a_word_is_completed_to_what_may_stand_there(call: Call, agent: World) -> None:
    agent.client.want(*UNITS_THERE)
    for line, words in COMPLETIONS.items():
        found = call.ok(agent, "completion", "zsh", "--", *line.replace("PATH", agent.path).split(" "))
        assert found.splitlines() == words, line
    assert call.ok(agent, "completion", "bash", "--", "star") == "start\n"  # without the variables of bash
    assert coder_sync.bash_candidates("coder_sync.py completion 'ba", "'ba") == []  # a quote is open
    stop(agent.processes[0])
    began = time.monotonic()
    assert call.ok(agent, "completion", "zsh", "--", "start", "") == ""
    assert time.monotonic() - began < 5  # seconds; it does not hold completion up for longer


@pytest.fixture
def tool_there(agent: World) -> str:
    """The file under its own name in PATH, and units of all kinds."""
    agent.shell_env()
    agent.client.want(*UNITS_THERE, "a$(touch oops)")
    path = str(agent.directory / "bin" / "coder_sync.py")
    os.rename(agent.directory / "bin" / "coder", path)
    return path


ZSH = """
source <($TOOL completion zsh)  # before compinit it does nothing
autoload -U compinit && compinit -u -D && source <($TOOL completion zsh)
compadd() { print -l -- ${(P)2} }
_files() { print -l -- ${words[CURRENT]}*(N) }
words=("$@") CURRENT=$# && $_comps[coder_sync.py]
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh_completes_commands_units_and_files(agent: World, tool_there: str) -> None:
    def complete(*words: str) -> list[str]:
        argv = ["zsh", "-fc", ZSH, "zsh", tool_there, *words]
        done = finish(agent.spawn(argv, env={**agent.shell_env(), "TOOL": tool_there}))
        assert (done.returncode, done.stderr) == (0, "")
        return sorted(word for word in done.stdout.split("\n") if word)

    assert complete("st") == ["start", "status", "stop"]
    assert complete("start", "") == sorted([*UNITS_THERE, "a$(touch oops)"])
    assert complete("boot", "") == sorted(p.name for p in agent.directory.iterdir())
    assert not (agent.directory / "oops").exists()


TYPED = {  # before the Tab, and after
    "star": "start ",
    "start x:": "start x:only ",
    "start a:b": "start a:b ",
    "start my\\ ": "start my\\ unit ",
    "start my\\ u": "start my\\ unit ",
    "start it": "start it\\'s\\ \\$\\(exit\\) ",
    "list --output=j": "list --output=json ",
    "boot /dev/nul": "boot /dev/null ",
}


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_also_what_is_quoted_and_what_has_a_colon(agent: World, tool_there: str) -> None:
    agent.client.reset()
    shell, terminal = pty.openpty()
    env = {**agent.shell_env(), "PS1": "", "TERM": "dumb", "INPUTRC": "/dev/null"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    agent.spawn(["bash", "--norc", "--noprofile", "-i"], env=env, **streams)
    os.close(terminal)
    os.write(shell, b"bind 'set bell-style none'; source <(coder_sync.py completion bash); echo re''ady\n")
    shown_on(shell, b"ready")
    for line, whole in TYPED.items():
        os.write(shell, f"coder_sync.py {line}\t#".encode())
        shown_on(shell, f"coder_sync.py {whole}#".encode())
        os.write(shell, b"\x15")  # Ctrl-U
    os.close(shell)


# ---------------------------------------------------------------------------------------------------------
# Agent: many clients at once. What they were answered and what the agent says happened must agree, and what
# happened must be allowed by the rules, one step after another. And a clock that is set back.
# ---------------------------------------------------------------------------------------------------------

CROWD = "abcdefgh"
RESTLESS = "sys.setswitchinterval(1e-6)"  # another thread runs after every few steps: what lacks a lock is seen
MAY_FOLLOW = {  # status -> those that it may follow
    "registered": {"not registered"},
    "started": {"pending"},
    "skipped": {"pending"},
    "pending": {"completed", "failed", "skipped", "started"},
    "completed": {"pending", "started"},
    "failed": {"pending", "started"},
}


def talk(path: str, seed: int) -> list[list[Any]]:
    """Have several requests under way on a connection, and sometimes hang up amid them.

    Return rows: method, unit, when sent, when answered, "ok", the error's code, or "unknown".
    """
    chance, peer, log = random.Random(seed), Peer(path), []
    under_way: dict[int, list[Any]] = {}

    def take() -> None:
        message = peer.read()
        row = under_way.pop(message["id"])  # a KeyError: answered twice
        row[3:] = [time.monotonic(), message.get("error", {}).get("code", "ok")]

    for number in range(1, 401):
        method = chance.choice(["want", "start", "start", "start", "complete", "complete", "fail", "wait"])
        unit, other = chance.choice(CROWD), chance.choice(CROWD)
        params: dict[str, Any] = {"units": [unit, other]} if method == "wait" else {"unit": unit}
        if method == "want" or (method == "start" and chance.random() < 0.2):
            params.update(dependencies=[other], requires=chance.choice(["success", "success", "completion", "start"]))
        if method in ("start", "wait"):
            params["timeout"] = chance.choice([0.001, 0.01, 0.05])
        under_way[number] = [method, unit, time.monotonic(), None, "unknown"]
        log.append(under_way[number])
        peer.request(method, number, **params)
        while len(under_way) > 3 or (number in under_way and method not in ("start", "wait")):
            take()
        if chance.random() < 0.02:
            under_way.clear()
            peer.close()
            peer = Peer(path)
    while under_way:
        take()
    assert peer.call("ping", 0)["id"] == 0  # and nothing before it: nobody was answered twice
    peer.close()
    return log


def replayed(events: list[coder_sync.Event]) -> Model:
    """What the agent says happened, step by step, each of which the rules must allow."""
    model, waiting = Model(), dict.fromkeys(CROWD, 0)  # unit -> how many of its starts wait
    for number, event in enumerate(events, 1):
        assert event.seq == number
        unit, kind, status = event.unit, event.kind, model.status(event.unit)
        unmet = model.unmet(model.needs(unit))
        missing = ", ".join([*unmet, *([unit] if status == "started" else [])][:5])  # its answer is on its way
        if kind in ("completed", "failed", "gave up"):  # all that follows from earlier requests has happened
            assert not to_be_skipped(model), event
            assert not [n for n in CROWD if waiting[n] and not model.unmet(model.needs(n))], event
        if kind == "wants":
            dependency, _, requires = event.detail.partition(" (")
            assert not model.reaches(dependency, unit)
            model.edges[unit, dependency] = requires.rstrip(")") or "success"
        elif kind == "waiting":
            assert event.detail == missing != ""
            waiting[unit] += status == "pending"
        elif kind == "gave up":
            assert event.detail.partition("still missing: ")[2].replace(" (not registered)", "") == missing
            waiting[unit] -= bool(waiting[unit])
        else:
            assert status in MAY_FOLLOW[kind], event
            assert not (kind == "started" and unmet), event
            assert kind != "skipped" or model.hopeless(model.needs(unit)), event
            model.statuses[unit] = kind.replace("registered", "pending")
            waiting[unit] = 0
    return model


def to_be_skipped(model: Model) -> list[str]:
    return [name for name, s in model.statuses.items() if s == "pending" and model.hopeless(model.needs(name))]


def test_many_clients_at_once_see_one_order_of_events(world: World) -> None:
    answering(world, altered(RESTLESS, "serve", "--quiet"), stderr=subprocess.DEVNULL)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        log = [row for rows in pool.map(talk, [world.path] * 6, range(6)) for row in rows]
    codes = {row[-1] for row in log}
    assert {"ok", "unknown", -32001, -32002, -32006} <= codes <= {"ok", "unknown", -32006, *range(-32004, -31999)}

    def settled() -> list[coder_sync.Event]:
        events, units = list(world.client.events()), world.client.list()
        agree = {unit.unit_name: unit.status for unit in units} == replayed(events).statuses
        return events if agree and not any(unit.is_waiting for unit in units) else []

    events = until(settled, "those who hung up forgotten, and every unit where the events say")
    assert not to_be_skipped(replayed(events))
    assert sum(event.kind == "started" for event in events) > 50
    for unit in CROWD:
        starts = [row[2:] for row in log if row[:2] == ["start", unit]]
        granted = [(sent, at) for sent, at, said in starts if said == "ok"]
        began = [event.time for event in events if (event.unit, event.kind) == (unit, "started")]
        assert len(granted) <= len(began) <= len(granted) + sum(said == "unknown" for _, _, said in starts)
        assert all(any(sent <= moment <= at for moment in began) for sent, at in granted)
        for event in (e for e in events if e.unit == unit and e.kind in ("completed", "failed")):
            report = [{"completed": "complete", "failed": "fail"}[event.kind], unit]
            assert any(row[:2] == report and row[-1] == "ok" and row[2] <= event.time <= row[3] for row in log)


def test_nothing_but_the_log_follows_a_clock_that_is_set_back(world: World) -> None:
    changes = "import itertools, time; wall, calls = time.time, itertools.count()\n"
    changes += "time.time = lambda: wall() - 3600 * (next(calls) > 3)"  # of seven events; some Pythons log by it, too
    answering(world, altered(changes, "serve"), stderr=subprocess.DEVNULL)
    world.ok("start", "a")
    waits = world.popen("start", "b", "--want", "a", "--timeout", "20s")
    world.waiting("b")
    world.ok("complete", "a")
    assert finish(waits).returncode == 0
    events = list(world.client.events())
    assert max(e.wall for e in events) - min(e.wall for e in events) > 3000
    assert [e.time for e in events] == sorted(e.time for e in events)
    assert events[-1].time - events[0].time < 600
    assert world.client.status("b").age < 600


# ---------------------------------------------------------------------------------------------------------
# Bad input: a clear error for the one who caused it, and nothing changes for anyone else.
# ---------------------------------------------------------------------------------------------------------

PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
ODD_LINES = {  # after these nothing that follows can be trusted
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "not utf-8": b'{"jsonrpc":"2.0","id":1,"method":"p\xffng"}\n',
    "deep": b'{"a":' * 10_000 + b"\n",
    "deep parameter": PING[:-1] + b',"params":' + b"[" * 40 + b"]" * 40 + b"}\n",
    "a byte too many": PING.ljust(coder_sync.MAX_LINE + 1) + b"\n",
    "10 MB and no end": b"x" * 10_000_000,
}


def test_garbage_is_refused_and_hung_up_on_also_on_a_small_stack(world: World) -> None:
    agent = answering(world, limited("-s 256", "serve", "-q"))
    for kind, line in ODD_LINES.items():
        peer = world.connect()
        with contextlib.suppress(OSError):  # hung up on before it was read
            peer.send(line)
        answer = peer.read()
        assert (answer["id"], answer["error"]["code"]) == (None, -32700), kind
        assert ("65536 bytes" in answer["error"]["message"]) == (len(line) > coder_sync.MAX_LINE + 1), kind
        assert len(line) >= 10_000_000 or peer.read() is None, kind
        served(world)
    assert stopped(agent).returncode == 0
    with impostor(world, b"[" * 60_000 + b"\n"):
        done = finish(world.spawn(limited("-s 256", "ping")))
    assert done.returncode == 3 and "does not speak our protocol" in done.stderr


NO_REQUESTS = [
    *(b"1", b'"ping"', b"null", b"[%s]" % PING, b"{}", PING.replace(b"2.0", b"1.0"), b'{"id":1,"method":"ping"}'),
    *(b'{"jsonrpc":"2.0","id":1%s}' % method for method in (b"", b',"method":7', b',"method":["ping"]')),
    *(PING.replace(b"1", name) for name in (b"null", b"true", b"1.5", b"[]")),
    b'{"jsonrpc":"2.0","method":"start","params":{"unit":"never"}}',
    b'{"jsonrpc":"2.0","method":"wait","params":{"units":["never"]}}',
]
NO_METHODS = ["", "Ping", "_stop", "__init__", "x" * 1000, "a\nb"]


def test_json_that_is_no_request_is_refused_and_the_connection_goes_on(shared: World) -> None:
    peer = shared.connect()
    unknown = [json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}).encode() for method in NO_METHODS]
    for line in NO_REQUESTS + unknown:
        peer.send(line + b"\n")
        error = peer.read()["error"]
        assert error["code"] == (-32601 if line in unknown else -32600), line
        assert error["message"].startswith("no such method: ") == (line in unknown)
        assert error["message"].isprintable()
        assert peer.call("ping", "again")["id"] == "again"


WRONG: dict[str, list[Any]] = {  # what a parameter is declared as -> what it may not be
    "str": [None, True, 1, ["x"], {}],
    "int": [None, True, 2**31, -(2**31), 1.5, "x", []],
    "float": [None, True, -0.5, 1e9, "x", []],
    "bool": [None, 1, "x"],
    "Id": [None, True, 1.5, [], {}],
    "Object": [None, True, "x", ["x"]],
    "Sequence[str]": [None, "x", {}, [1], ["x", None]],
    "Sequence[Object]": [None, "x", {}, ["x"], [{}, 1]],
}


def test_wrong_unknown_missing_and_superfluous_parameters_are_refused(shared: World) -> None:
    peer = shared.connect()

    def refused(method: str, params: Any) -> str:
        peer.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
        error = peer.read()["error"]
        assert error["code"] == -32602, (method, params)
        return str(error["message"])

    for method, does in coder_sync.METHODS.items():
        declared = coder_sync.parameters(does)
        required = {name: "x" for name, (_, needed) in declared.items() if needed}
        for name, (kind, needed) in declared.items():
            for value in WRONG[kind]:
                assert f'"{name}"' in refused(method, {**required, name: value}), value
            if needed:
                assert f'"{name}"' in refused(method, {k: v for k, v in required.items() if k != name})
        for params in ({**required, "colour": 1}, ["x"] * (len(declared) + 1), "x", None):
            refused(method, params)


REFUSED_CALLS: list[tuple[str, dict[str, Any], str]] = [  # method, parameters, what the message begins with
    *(("want", {"unit": name}, "unit name " if name else "a unit name ") for name in BAD_NAMES),
    *(("boot", {"units": [{"unit": name}]}, "") for name in (None, 1, [], {}, "", "a\n")),
    *(
        ("boot", {"units": [{"unit": "even"}, {"unit": "odd", **more}]}, "a unit of a boot is ")
        for more in ({"wants": ["x"]}, {"wants": {"x": 1}}, {"locks": "x"}, {"colour": 1})
    ),
    *(
        (method, {**names, "requires": requires}, "no such requirement")
        for requires in ("", "completed", "luck" * 1000)
        for method, names in (("want", {"unit": "odd"}), ("start", {"unit": "odd"}), ("wait", {"units": ["x"]}))
    ),
    *(
        ("complete", {"unit": "kept", "env": {"A": value}}, ".*must have a text")
        for value in ("\ud800", "a\0b", None, 1)
    ),
    *(("complete", {"unit": "kept", "env": {name: "1"}}, ".*is no name for") for name in ("", "1A", "A-B", "\u00e4")),
    ("wait", {}, "wait: "),
    ("owner", {"unit": "kept"}, '.*"kept" is not held by this connection'),
    ("want", {"unit": "c3", "dependencies": ["innocent", "c1"]}, "cycle detected: c3 -> c1 -> c2 -> c3$"),
]


def test_what_cannot_be_meant_is_refused_in_one_printable_line_and_changes_nothing(shared: World) -> None:
    shared.client.want("c1", "c2")
    shared.client.want("c2", "c3")
    shared.client.start("kept")
    before = {u.unit_name: u.status for u in shared.client.list(everything=True)}
    peer = shared.connect()
    for method, params, said in REFUSED_CALLS:
        error = peer.call(method, **params)["error"]
        message = error["message"]
        assert re.match(said, message) and message.isprintable() and len(message) < 200, (method, params, message)
        assert message.count("luck") <= 15
        assert error.get("data", []) == (["c3", "c1", "c2", "c3"] if "cycle" in message else []), error
    assert {u.unit_name: u.status for u in shared.client.list(everything=True)} == before
    assert peer.call("boot")["result"]["units"] == 0  # those of a boot that was refused are not kept for the next
    shared.client.complete("kept")


def test_requests_may_come_in_any_pieces_and_end_anywhere(shared: World) -> None:
    peer, line = shared.connect(), PING.replace(b'"ping"', b'"want","params":{"unit":"half"}')
    peer.send(PING.ljust(coder_sync.MAX_LINE) + b"\n")
    assert "result" in peer.read()
    for byte in PING + b"\n":
        peer.send(bytes([byte]))
    assert peer.read()["id"] == 1
    peer.send(b"\r\n\n".join(PING.replace(b"1", b"%d" % i) for i in range(300)) + b"\n")
    assert [peer.read()["id"] for _ in range(300)] == list(range(300))
    for data, code, status in ((line[:-2], -32700, "not registered"), (line, None, "pending")):
        peer = shared.connect()
        peer.send(data)
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.read().get("error", {}).get("code") == code
        assert (peer.read(), shared.status("half")) == (None, status)


def test_an_id_is_in_use_until_its_answer_has_come(shared: World) -> None:
    peer = shared.connect()
    peer.request("start", 1, unit="first", dependencies=["later"])
    shared.waiting("first")
    for method, params in (("start", {"unit": "second"}), ("ping", {})):
        assert "in use" in peer.call(method, 1, **params)["error"]["message"]
    shared.end("later")
    assert peer.read()["result"]["dependencies"] == ["later"]
    assert "result" in peer.call("ping", 1)
    assert shared.status("second") == "not registered"


def test_a_start_that_is_to_be_confirmed_is_granted_only_then(shared: World) -> None:
    peer, other = shared.connect(), shared.connect()
    assert peer.call("confirm", 2, id=1)["result"] == {"confirmed": False}
    assert "result" in peer.call("start", 1, unit="unconfirmed", confirm=True)
    assert "in use" in peer.call("ping", 1)["error"]["message"]
    other.request("start", unit="unconfirmed", progress=True)
    (row,) = other.read()["params"]["missing"]
    assert (row["depends_on"], row["current_status"]) == ("unconfirmed", "started") and row["owner"]["pid"]
    assert [peer.call("confirm", 2, id=1)["result"] for _ in range(2)] == [{"confirmed": True}, {"confirmed": False}]
    assert other.read()["error"]["message"].startswith('unit "unconfirmed" is already started')
    assert "result" in peer.call("start", 1, unit="passed on", confirm=True)
    other.request("start", unit="passed on", progress=True)
    assert "waiting" in other.read()["method"]
    peer.close()  # and what it was granted goes to the next
    assert "result" in other.read()


def test_an_answer_that_is_never_confirmed_counts_as_delivered_after_a_time(world: World) -> None:
    answering(world, altered("coder_sync.CONFIRM_TIMEOUT = 0.1", "serve", "-q"))
    peer, other = world.connect(), world.connect()
    assert "result" in peer.call("start", unit="a", confirm=True)
    other.request("start", unit="a")
    assert other.read()["error"]["message"].startswith('unit "a" is already started')


# -- limits ------------------------------------------------------------------------------------------------


def fill(world: World, names: int) -> None:
    """Make an agent know this many names of 250 bytes."""
    peer = world.connect()
    for first in range(0, names, 200):
        dependencies = [f"{n:0250}" for n in range(first, first + 200)]
        assert "result" in peer.call("want", unit="everything", dependencies=dependencies)
    peer.close()


def test_who_is_silent_or_does_not_read_is_dropped_and_who_waits_or_holds_is_not(world: World) -> None:
    answering(world, altered("coder_sync.IDLE_TIMEOUT, coder_sync.SEND_TIMEOUT = 1, 0.5", "serve", "-q"))
    holder, waiting, talking, silent, waited, deaf, watcher, gone = (world.connect() for _ in range(8))
    holder.call("start", unit="held", hold=True)
    world.client.complete("held")  # whoever holds it has yet to be told
    assert "result" in waited.call("wait", units=["held"])
    waiting.request("start", 1, unit="a", dependencies=["b"])
    deaf.request("wait", 1, units=["never"])
    for follower in (watcher, gone):
        assert follower.call("events", follow=True, since=10**6)["result"] == []
    gone.close()
    fill(world, 2000)  # an event each
    deaf.request("list", 2, all=True)
    for _ in range(4):
        assert talking.call("ping")["result"]
        time.sleep(0.3)
    for idle in (silent, waited):
        assert "no request for 1 seconds" in idle.read()["error"]["message"]
        assert idle.read() is None
    assert "result" in holder.call("complete", unit="held")
    for peer in (deaf, watcher):
        hung_up = select.poll()
        hung_up.register(peer.sock, 0)
        assert hung_up.poll(PATIENCE * 1000)[0][1] & select.POLLHUP
    world.end("b")
    assert waiting.read()["id"] == 1
    assert "result" in waiting.call("ping", 2)  # its time began anew
    served(world)


def test_a_follower_that_is_too_far_behind_is_hung_up_on(world: World) -> None:
    answering(world, altered("coder_sync.MAX_EVENTS = 1000", "serve", "-q"))
    watcher = world.connect()
    assert watcher.call("events", follow=True)["result"] == []
    fill(world, 4000)  # an event each, and more than waits in its socket
    numbers = [message["params"]["seq"] for message in iter(watcher.read, None)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) < 4000


def test_a_connection_that_asks_for_much_may_go_on_and_keeps_what_it_holds(world: World) -> None:
    answering(world, altered("coder_sync.MANY_CLAIMS = 8", "serve", "-q"))
    peer = world.connect()
    assert "result" in peer.call("start", unit="kept", hold=True)
    for i in range(30):
        assert "result" in peer.call("start", unit=f"much {i}", hold=True)
        assert "result" in peer.call("complete", unit=f"much {i}")
    peer.close()
    until(lambda: world.status("kept") == "failed")
    assert world.status("much 0") == "completed"


@pytest.mark.parametrize("few", ["connections", pytest.param("descriptors", marks=LINUX)])
def test_connections_past_the_limit_are_told_so_and_the_others_go_on(call: Call, world: World, few: str) -> None:
    if few == "connections":
        agent = answering(world, altered("coder_sync.MAX_CONNECTIONS = 8", "serve"))
    else:  # 24 are for itself
        agent = answering(world, limited(f"-n {24 + 8 * (2 if hasattr(os, 'eventfd') else 3)}", "serve"))

    def admitted() -> Peer | None:  # the agent may not have seen yet that the last one has gone
        peer = world.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, KeyError, TypeError):
            return peer if peer.call("ping")["result"] else None
        return None

    peers = [until(admitted) for _ in range(8)]
    for extra in [world.connect() for _ in range(40)]:
        assert "limit of 8 connections" in extra.read()["error"]["message"]
        assert extra.read() is None
    done = call(world, "ping")
    assert done.returncode == 3 and "limit of 8 connections" in done.stderr
    assert "result" in peers[0].call("start", unit="a")
    for peer in peers[1:]:
        peer.close()
    peers[1:] = [until(admitted) for _ in range(7)]
    assert "refused: the agent has reached its limit" in stopped(agent).stderr


# -- clients that go away, or do not read -------------------------------------------------------------------


def test_what_is_asked_before_a_hang_up_is_done_and_starts_are_left_to_others(world: World) -> None:
    agent = world.serve("-v")
    stop(agent)
    peers = [world.connect() for _ in range(3)]
    for i, name in enumerate("abc"):
        peers[0].request("want", i, unit=name)
    for peer, hold in zip(peers[1:], (False, True)):
        peer.request("start", unit=f"start {hold}", hold=hold)
    for peer in peers:
        peer.close()
    agent.send_signal(signal.SIGCONT)
    until(lambda: world.status("c") == "pending")
    for name, end in (("start False", "pending"), ("start True", "failed")):
        until(lambda name=name, end=end: (kinds_of(world, name) or [""])[-1] in ("pending", end))
        assert world.client.start(name).dependencies == []


def test_clients_that_do_not_read_keep_no_agent_from_ending(agent: World) -> None:
    fill(agent, 1000)
    deaf = [agent.connect() for _ in range(2)]
    for peer in deaf:
        for i in range(10):
            peer.request("list", i, all=True)
        assert select.select([peer.sock], [], [], PATIENCE)[0]
    served(agent)
    assert len(deaf[0].read()["result"]) >= 1001  # late, but it gets its answer
    deaf[1].request("wait", "never", units=["never"])
    assert stopped(agent.processes[0]).returncode == 0
    assert os.listdir(agent.directory) == []


@LINUX
def test_answers_for_a_client_that_does_not_read_or_is_gone_do_not_pile_up(world: World) -> None:
    def memory() -> int:  # the most that it has had, in KiB
        return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{agent.pid}/status").read_text())[0])

    agent = answering(world, altered("coder_sync.SEND_TIMEOUT = 0.5", "serve", "-q"))
    fill(world, 1000)
    before = memory()
    peers = [world.connect() for _ in range(3)]
    for n, peer in enumerate(peers):
        request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "graph"}).encode() + b"\n"
        peer.send(request * 600 + request.replace(b"graph", b"events"))
        peer.request("want", unit=f"last-{n}")
    peers[0].close()
    for n in (1, 2):
        until(lambda n=n: world.status(f"last-{n}") == "pending")  # what it asked is done
    assert memory() - before < 60_000  # it was hung up on after the first answers


def test_a_boot_in_many_parts_is_bounded(world: World) -> None:
    answering(world, altered("coder_sync.MAX_BOOT = 1 << 20", "serve", "-q"))
    peer, part = world.connect(), [{"unit": "x" * 60_000}]
    answers = [peer.call("boot", units=part, more=True) for _ in range(18)]
    assert [("result" in answer) for answer in answers] == [True] * 17 + [False]
    assert answers[-1]["error"]["message"] == "a boot of more than 1 MiB is too large"
    peer.call("boot", units=[{"unit": "a"}])  # nothing of the other is left
    assert [unit.unit_name for unit in world.client.list()] == ["a"]


def test_an_error_that_is_not_the_peers_goes_to_the_log(world: World) -> None:
    broken = "def post(self, *what): raise OSError(22, 'Invalid argument')\ncoder_sync.Connection.post = post"
    agent = world.spawn(altered(broken, "serve"))
    done = world.run("ping", "--wait", "9s")
    assert done.returncode == 3 and "went away before it answered" in done.stderr
    said = stopped(agent).stderr
    assert re.search(r"internal error at line \d+: OSError\(22, 'Invalid argument'\); please report it", said)


# -- no descriptors, no threads -----------------------------------------------------------------------------


@LINUX
def test_an_agent_out_of_descriptors_says_so_serves_who_is_connected_and_recovers(world: World) -> None:
    agent, dying = world.serve("--log-file", "log"), world.spawn(["cat"], stdin=subprocess.PIPE)
    peer, more = world.connect(), [world.connect()]
    for name, pid in (("mine", os.getpid()), ("dying", dying.pid)):
        assert "result" in peer.call("start", unit=name, pid=pid)
    limits = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir(f"/proc/{agent.pid}/fd")))
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (min({*range(len(used) + 1)} - used), limits[1]))
    said = f"cannot accept connections: {os.strerror(errno.EMFILE)}"
    until(lambda: more.append(world.connect()) or said in (world.directory / "log").read_text(), "a word in the log")
    for method, unit in (("want", "a"), ("start", "c"), ("complete", "a"), ("status", "aa")):
        assert "result" in peer.call(method, unit=unit)
    answer = peer.call("start", unit="owned", pid=os.getpid())
    assert "not alive" not in answer.get("error", {}).get("message", "")
    dying.kill()
    dying.wait()
    if hasattr(os, "pidfd_open"):  # without it nobody can tell now
        until(lambda: ["dying", "failed"] in [[u["unit_name"], u["status"]] for u in peer.call("list")["result"]])
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, limits)
    served(world)
    happened(world, "dying", "failed")
    until(lambda: world.client.status("mine").owner.alive, "a descriptor to look at an owner with")
    assert world.status("mine") == "started"


NO_THREADS = """
import _thread, os, threading
def unless_told(start):
    def begin(*args):
        if os.path.exists("no thread"):
            raise RuntimeError("can't start new thread")
        return start(*args)
    return begin
_thread.start_new_thread = unless_told(_thread.start_new_thread)
threading.Thread.start = unless_told(threading.Thread.start)
"""


def test_an_agent_that_can_have_no_thread_or_descriptor_says_so_and_leaves_nothing(world: World) -> None:
    (world.directory / "no thread").touch()
    for argv in (altered(NO_THREADS, "serve"), *(limited(f"-n {n}", "serve", "-q") for n in (5, 6))):
        done = finish(world.spawn(argv))
        assert done.returncode == 1 and re.fullmatch("(error: cannot|OSError:.* Too many) .*\n", done.stderr), done
        assert os.listdir(world.directory) == ["no thread"]


def test_an_agent_without_threads_says_so_and_recovers(world: World) -> None:
    agent = answering(world, altered(NO_THREADS, "serve"))
    (world.directory / "no thread").touch()
    for _ in range(5):
        assert world.connect().read() is None
    (world.directory / "no thread").unlink()
    served(world)
    said = [re.sub(STAMP, "", line) for line in stopped(agent).stderr.splitlines()]
    assert said.count("cannot accept connections: can't start new thread; trying again until it works") == 1
    assert not [line for line in said if "please report" in line]


# ---------------------------------------------------------------------------------------------------------
# Daemon: its log, the background, who may serve where, signals, a command's agent, process 1, supervisors.
# ---------------------------------------------------------------------------------------------------------

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def without(*directories: str) -> list[str]:
    """The beginning of a command line that runs where these directories are empty."""
    code = "import os, sys\nfor d in sys.argv[1].split(): assert os.system(f'mount -t tmpfs none {d}') == 0"
    code += "\nos.execv(sys.argv[2], sys.argv[2:])"
    return ["unshare", "-m", *PYTHON, code, " ".join(directories)]


UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_unshare(*options: str) -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", *options, "true"]).returncode == 0


NAMESPACES = pytest.mark.skipif(not can_unshare("-m", "-fp", "--mount-proc"), reason="needs namespaces")


# -- the log ------------------------------------------------------------------------------------------------

LOGGED = r"""listening at .*/agent.sock \(pid \d+\)
a: started
a: completed
refused: unit "a" is completed .*
b: failed: no disk
shutdown was called by .+ \(pid PARENT\)
stopping: got SIGTERM
"""


@pytest.mark.parametrize("option", ["--quiet", "", "--verbose"])
def test_the_log_says_what_happens_one_line_each_with_a_time(world: World, option: str) -> None:
    agent = world.serve(*option.split(), stderr=subprocess.PIPE)
    world.client.start("a")
    world.connect().call("complete", unit="a", env={"TOKEN": "secret"})
    with pytest.raises(coder_sync.Refused):
        world.client.fail("a")
    world.client.want("b", "a")
    world.client.fail("b", "no disk")
    world.client.shutdown()
    done = finish(agent)
    assert (done.returncode, done.stdout) == (0, "")
    assert all(re.match(STAMP, line) for line in done.stderr.splitlines())
    text = re.sub(f"^{STAMP}", "", done.stderr, flags=re.M)
    if option == "--verbose":
        for part in ("request: complete {'unit': 'a'}\n", "b: registered", "b: wants: a", "a: started"):  # no secret
            assert part in text
    else:
        assert re.fullmatch(LOGGED.replace("PARENT", str(os.getppid())) if option == "" else "", text)


def test_an_agent_whose_log_nobody_reads_goes_on(world: World) -> None:
    read, write = os.pipe()
    agent = world.serve("-v", stderr=write)
    os.close(write)
    peer = world.connect()
    for i in range(500):  # more than a pipe holds
        peer.call("want", unit=f"u{i}", dependencies=["x" * 200])
    os.close(read)
    served(world)
    assert stopped(agent).returncode == 0


@LINUX
def test_an_agent_whose_disk_is_full_goes_on(world: World) -> None:
    agent = world.serve("--log-file", "/dev/full")
    served(world)
    assert stopped(agent).returncode == 0


def fill_log(path: Path) -> None:
    """Write a log that is longer than it may be."""
    log = coder_sync.Log(1, str(path))
    for i in range(60):
        log.say(f"line {i}")
    log.close(PATIENCE)
    assert log.lost == 0


@pytest.mark.parametrize("target", ["log", "target"], ids=["file", "link"])
def test_a_log_file_that_is_full_gets_a_successor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    monkeypatch.setattr(coder_sync, "MAX_LOG", 1000)
    if target != "log":
        (tmp_path / "log").symlink_to(target)
    fill_log(tmp_path / "log")
    older, newer = ((tmp_path / name).read_text() for name in (f"{target}.1", target))
    assert re.fullmatch(rf"({STAMP}line \d+\n)+", older + newer) and newer.endswith("line 59\n")
    assert max(len(older), len(newer)) < 1100
    assert stat.S_IMODE(os.stat(tmp_path / "log").st_mode) == 0o600
    assert {*os.listdir(tmp_path)} == {"log", target, f"{target}.1"}


def test_a_log_that_can_have_no_successor_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(coder_sync, "MAX_LOG", 1000)
    (tmp_path / "file.1").mkdir()
    fill_log(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    fill_log(tmp_path / "pipe")
    assert [text.count("\n") for text in ((tmp_path / "file").read_text(), read_now(reader))] == [60, 60]
    assert {*os.listdir(tmp_path)} == {"file", "file.1", "pipe"}
    os.close(reader)


def test_what_the_log_could_not_write_is_counted_in_its_next_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    log = coder_sync.Log(1, str(tmp_path / "log"))
    os.close(reader)
    for lost in (1, 2):
        log.say("unread")
        until(lambda lost=lost: log.lost == lost)
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    log.say("three")
    assert re.fullmatch(f"{STAMP}\\(2 lines lost here\\) three\n", until(lambda: read_now(reader)))
    log.close(PATIENCE)
    os.close(reader)


def test_the_queue_of_the_log_is_bounded_and_so_is_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "log")
    reader, text = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK), ""
    log = coder_sync.Log(1, str(tmp_path / "log"))
    for _ in range(60):  # more than a pipe takes
        log.say("x" * 3000)
    monkeypatch.setattr(coder_sync, "MAX_QUEUE", 3)
    log.say("no room")
    assert log.lost == 1
    began = time.monotonic()
    log.close(0.1)  # though its thread cannot go on
    assert time.monotonic() - began < 10
    while text.count("\n") < 60:
        text += until(lambda: read_now(reader))
    assert "lost" not in text
    os.close(reader)


def test_a_closed_log_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = coder_sync.Log(0)
    log.close()
    log.say("trouble of a thread that is left", 0)
    log.close(PATIENCE)
    assert capfd.readouterr().err == ""


def read_now(fd: int) -> str:
    """What there is to read."""
    with contextlib.suppress(BlockingIOError):
        return os.read(fd, 1 << 20).decode()
    return ""


# -- the background -------------------------------------------------------------------------------------------


def test_a_detached_agent_is_there_and_on_its_own(world: World) -> None:
    log, pid_file = world.directory / "log", world.directory / "pid"
    for _ in range(2):
        with open(log, "a") as held, open(log) as other:
            fcntl.flock(held, fcntl.LOCK_EX)
            process = world.popen("serve", "-d", "--log-file", "log", "--pid-file", "pid", pass_fds=[held.fileno()])
            done = finish(process)  # which waits for its pipes to be closed
            held.close()
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pid = world.client.ping()["pid"]  # no retries: it must be there
        assert os.getsid(pid) == pid == int(pid_file.read_text())
        assert os.readlink(f"/proc/{pid}/cwd") == "/" if sys.platform.startswith("linux") else True
        until(lambda pid=pid: f"listening at {world.path} (pid {pid})" in log.read_text())
        os.kill(pid, signal.SIGHUP)
        served(world)
        os.kill(pid, signal.SIGTERM)
        until(lambda pid=pid: not alive(pid), "the end of the detached agent")
        assert os.listdir(world.directory) == ["log"]
    assert re.fullmatch(f"({STAMP}.*\n)+", log.read_text())
    assert (log.read_text().count("stopping: got SIGTERM"), log.read_text().count("SIGHUP")) == (2, 0)


@NAMESPACES
def test_a_command_runs_where_dev_and_proc_are_empty(world: World) -> None:
    argv = [*without("/dev", "/proc"), *program()]
    done = finish(world.spawn([*argv, "serve", "--", *program(), "run", "a", "--", "sh", "-c", "echo ran; exit 3"]))
    assert (done.returncode, done.stdout) == (3, "ran\n")
    script = 'exec <&- >&- 2>&-; exec "$@" serve -- sh -c "exit 4"'
    assert finish(world.spawn(["sh", "-c", script, "-", *argv])).returncode == 4


def test_a_detached_agent_that_dies_before_it_is_ready_is_no_success(world: World) -> None:
    for trouble, code, message in (
        ("raise MemoryError", 125, "error: internal error .*"),
        ("import os; os.kill(os.getpid(), 9)", 137, "error: the agent ended before .*: killed by signal 9"),
    ):
        argv = altered(f"def notify(state):\n    {trouble}\ncoder_sync.notify = notify", "serve", "--detach")
        done = finish(world.spawn(argv, preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)))
        assert done.returncode == code
        assert re.fullmatch(message + "\n", done.stderr)


# -- who may serve where ----------------------------------------------------------------------------------------


NOT_SERVED = r"""
echo precious > agent.sock              | --detach | {0}/agent.sock exists and is not a socket; .*
ln -s elsewhere agent.sock              | --replace | {0}/agent.sock exists and is not a socket; .*
mkfifo agent.sock.lock                  | | {0}/agent.sock.lock is not a regular file; .*
ln -s elsewhere agent.sock.lock         | | cannot open {0}/agent.sock.lock: (Too many|Symbolic).*; .*
echo 1 > that; ln that agent.sock.lock  | | {0}/agent.sock.lock has another name, too, so that it may be any file; .*
:                                       | --socket-path {1} | .*/x+: too long for a socket path; .*
:> file                                 | --socket-path file/in/s | cannot make the directory {0}/file/in: Not a dir.*
mkfifo f                                | --quiet --log-file f | cannot write .*f: No such device .*
:                                       | --pid-file no/file --detach | cannot write .*no/file: No such file .*
ln -s /dev/full f                       | --pid-file f | cannot write .*f: No space left .*
"""


def test_what_serve_refuses_is_one_line_and_nothing_is_changed(world: World) -> None:
    for number, row in enumerate(NOT_SERVED.strip().splitlines()):
        place = world.directory / str(number)
        place.mkdir()
        prepare, options, message = row.format(place, "x" * 120).split("|", 2)
        subprocess.run(["sh", "-c", prepare], cwd=place, check=True)
        before = subprocess.check_output(["ls", "-linA"], cwd=place)  # with sizes and times
        env = {**world.env, "CODER_AGENT_SOCKET_PATH": str(place / "agent.sock")}
        done = world.run("serve", *options.split(), cwd=str(place), env=env)
        assert (done.returncode, done.stdout) == (1, ""), (row, done)
        assert re.fullmatch(f"error: {message.strip()}\n", done.stderr), (row, done)
        assert subprocess.check_output(["ls", "-linA"], cwd=place) == before, row


@contextlib.contextmanager
def open_directory(mode: int = 0o755) -> Iterator[str]:
    """A directory that everybody can enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="cs-") as directory:
        os.chmod(directory, mode)
        yield directory


def test_what_a_user_may_not_do_is_refused_and_nothing_is_left(world: World) -> None:
    for mode, words, message in (
        (0o555, "{0}/run/agent.sock", ".*{0}/.*: Permission denied; .*"),
        (0o777, "{0}/agent.sock --group 12", "cannot give {0}/agent.sock to group 12: be a member of the group, or.*"),
    ):
        with open_directory(mode) as directory:
            done = finish(world.spawn(stranger("serve", "--socket-path", *words.format(directory).split())))
            assert done.returncode == 1 and re.fullmatch(f"error: {message.format(directory)}\n", done.stderr), done
            assert os.listdir(directory) == []


@ROOT
def test_a_lock_of_another_user_is_named_as_such(call: Call, world: World) -> None:
    lock = Path(world.path + ".lock")
    with open(lock, "w+") as file:
        os.chown(lock, 65534, -1)
        file.write("1 but not the truth")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        held = call(world, "serve").stderr
    assert held.startswith(f"error: an agent (of user nobody) is serving {world.path} already; ")
    assert call(world, "serve").stderr.startswith(f"error: {lock} (of user nobody) is not ours; ")
    assert lock.read_text() == "1 but not the truth"


def test_the_socket_and_its_directories_have_the_permissions_asked_for(world: World) -> None:
    gid = grp.getgrall()[1].gr_gid if os.getuid() == 0 else os.getgid()
    world.path = str(world.directory / "run" / "user" / "agent.sock")
    for umask, options, mode, group in (
        (0, [], 0o600, os.getgid()),
        (0o077, ["--group", grp.getgrgid(gid).gr_name], 0o660, gid),
        (0o077, ["--group", str(gid), "--mode", "646"], 0o646, gid),
    ):
        agent = world.serve("--socket-path", world.path, *options, preexec_fn=lambda umask=umask: os.umask(umask))
        found = os.stat(world.path)
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (mode, group), options
        assert [stat.S_IMODE(os.stat(world.directory / d).st_mode) for d in ("run", "run/user")] == [0o700, 0o700]
        assert stopped(agent).returncode == 0
        assert os.listdir(world.directory / "run" / "user") == []


def test_an_agent_that_is_not_enabled_does_not_serve(call: Call, world: World) -> None:
    for enabled, code, said in (
        ("false", 0, "not serving: CODER_AGENT_SOCKET_SERVER_ENABLED is false\n"),
        ("NO", 0, "not serving: CODER_AGENT_SOCKET_SERVER_ENABLED is no\n"),
        ("maybe", 2, "error: CODER_AGENT_SOCKET_SERVER_ENABLED is 'maybe'; use true or false\n"),
    ):
        done = call(world, "serve", CODER_AGENT_SOCKET_SERVER_ENABLED=enabled)
        assert (done.returncode, done.stderr) == (code, said)
        assert os.listdir(world.directory) == []
    for enabled in ("", "True", "1", "yes"):
        done = call(world, "serve", "--detach", "--", "true", CODER_AGENT_SOCKET_SERVER_ENABLED=enabled)
        assert done.returncode == 2 and "--detach and -- COMMAND exclude each other" in done.stderr, enabled


@pytest.mark.parametrize(("value", "test"), [("0", "! -S"), ("1", "-S")], ids=["disabled", "enabled"])
def test_a_command_runs_with_an_agent_or_without_if_that_is_disabled(world: World, value: str, test: str) -> None:
    env = {**world.env, "CODER_AGENT_SOCKET_SERVER_ENABLED": value}
    done = world.run("serve", "--", "sh", "-c", f"test {test} $CODER_AGENT_SOCKET_PATH && echo ran; exit 5", env=env)
    assert (done.returncode, done.stdout) == (5, "ran\n")


# -- one agent after another ------------------------------------------------------------------------------------


def test_an_agent_whose_socket_is_removed_listens_there_again(world: World) -> None:
    agent = answering(world, altered("coder_sync.LOOK_AGAIN = 0.05", "serve", "--mode", "640"))
    peer = world.connect()
    for remove in (os.unlink, lambda path: shutil.rmtree(world.directory)):
        remove(world.path)
        until(lambda: serves(world, agent.pid))
        assert stat.S_IMODE(os.stat(world.path).st_mode) == 0o640
        assert "result" in peer.call("ping")
    agent.send_signal(signal.SIGSTOP)
    shutil.rmtree(world.directory)
    world.directory.write_text("")
    agent.send_signal(signal.SIGCONT)
    until(lambda: f"{world.path} was removed: cannot make the directory " in line_of(agent.stderr))
    assert stopped(agent).returncode == 0
    world.directory.unlink()


@LINUX
def test_an_agent_has_as_many_descriptors_as_it_may(world: World) -> None:
    agent = answering(world, limited("-S -n 64", "serve", "-q"))
    soft, hard = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
    assert soft == (10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240))


@NAMESPACES
def test_on_a_full_disk_no_lock_is_left(world: World) -> None:
    script = 'mount -t tmpfs -o size=4k none . && cd . && cd $PWD && echo > full && { "$@"; ls -A; }'
    done = finish(world.spawn(["unshare", "-m", "sh", "-c", script, "-", *program(), "serve"]))
    assert re.fullmatch("error: cannot open .*/agent.sock.lock: No space left on device; .*\n", done.stderr)
    assert done.stdout == "full\n"


def test_of_many_that_listen_at_the_same_instant_one_wins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: 0)  # it is for all threads
    together = threading.Barrier(10, timeout=PATIENCE)

    def listen(number: int) -> str:
        together.wait()
        with contextlib.ExitStack() as at_end:
            try:
                at_end.enter_context(coder_sync.listen(at_end, world.path, 0o600, -1, None))
                said = "serves"
            except coder_sync.Refused as error:
                said = str(error)
            together.wait()
        return said

    for left in [False, True] * 5:
        if left:  # by an agent that is dead
            listener(world.path).close()
            Path(world.path + ".lock").write_text("1\n")
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            said = list(pool.map(listen, range(10)))
        assert (said.count("serves"), sum("already" in text for text in said)) == (1, 9), said
        assert os.listdir(world.directory) == []


def test_replace_ends_an_agent_and_takes_its_place(call: Call, world: World) -> None:
    stopped(world.serve("--replace"), signal.SIGKILL)  # nobody was there: that is fine too
    first = world.serve()
    world.client.want("a")
    second = world.popen("serve", "--replace")
    assert finish(first).returncode == 0
    until(lambda: serves(world, second.pid))
    assert world.status("a") == "not registered"
    third = call(world, "serve")
    assert third.returncode == 1
    assert third.stderr.startswith(f"error: an agent (pid {second.pid}) is serving {world.path} already; end it")


SHORT = """
answer, coder_sync.REPLACE_TIMEOUT = coder_sync.Channel.result, 1.5
coder_sync.Channel.result = lambda self, request, timeout: answer(self, request, 0.3)
"""  # time for an agent to end that is to be replaced


@pytest.mark.parametrize("trouble", ["stopped", "without a lock", "no agent of ours"], ids=hyphenated)
def test_replace_takes_the_place_of_one_that_does_not_end(world: World, trouble: str) -> None:
    other: Any = listener(world.path) if trouble == "no agent of ours" else world.serve()
    if trouble == "stopped":
        stop(other)
    if trouble == "without a lock":
        os.unlink(world.path + ".lock")
        done = world.run("serve")
        assert done.returncode == 1 and f"error: somebody is serving {world.path} already; " in done.stderr
    before = os.stat(world.path).st_ctime_ns

    def replaced() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(world.path).st_ctime_ns != before
        return False

    second = world.spawn(altered(SHORT, "serve", "--replace"))
    until(replaced)
    until(lambda: serves(world, second.pid))
    if trouble == "no agent of ours":
        other.close()
    else:
        other.send_signal(signal.SIGCONT)
        assert stopped(other).returncode == 0
    assert serves(world, second.pid) and Path(world.path + ".lock").read_text() == f"{second.pid}\n"
    assert stopped(second).returncode == 0 and os.listdir(world.directory) == []


def test_of_several_that_replace_one_that_does_not_end_one_is_left(world: World) -> None:
    stop(world.serve())
    several = [world.spawn(altered(SHORT, "serve", "--replace")) for _ in range(4)]
    until(lambda: [process.poll() for process in several].count(0) == 3)
    until(lambda: serves(world, next(process.pid for process in several if process.poll() is None)))


def test_a_lock_that_is_anothers_by_the_time_its_holder_has_not_answered_is_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "s.lock")
    holders = [coder_sync.hold_lock(path, "s", None)]

    def ask(_: str) -> bool:
        if len(holders) == 1:
            os.unlink(path)
            time.sleep(0.02)  # the time of a file is not exact
            holders.append(coder_sync.hold_lock(path, "s", None))
            return False
        assert os.path.samestat(os.stat(path), os.fstat(holders[1].fileno()))
        holders[1].close()
        return True

    coder_sync.hold_lock(path, "s", ask).close()
    assert len(holders) == 2


# -- its end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_agent_that_is_stopped_tells_who_waits_and_leaves_nothing_behind(world: World, number: int) -> None:
    agent = world.serve(stderr=subprocess.PIPE)
    clients = [world.popen("wait", "never"), world.popen("start", "a", "--want", "never")]
    assert all("never not registered" in line_of(client.stdout) for client in clients)
    done = stopped(agent, number)
    assert done.returncode == 0 and f"stopping: got {signal.Signals(number).name}" in done.stderr
    assert os.listdir(world.directory) == []
    for client in map(finish, clients):
        assert (client.returncode, client.stderr) == (3, "error: the agent is shutting down\n")


# -- a command, under `serve` and under `run` -----------------------------------------------------------------


@pytest.fixture(params=["serve", "run"])
def words(request: pytest.FixtureRequest) -> list[str]:
    """What stands before `-- COMMAND`; run with an agent that is shared."""
    return ["serve"] if request.param == "serve" else ["run", f"unit-{next(COUNT)}"]


@pytest.fixture
def temporary(world: World) -> Path:
    """The directory that commands of this world use for temporary files."""
    directory = world.directory / "t"
    directory.mkdir()
    world.env["TMPDIR"] = str(directory)
    return directory


def test_serve_command_gives_it_an_agent_of_its_own_and_leaves_nothing_behind(world: World, temporary: Path) -> None:
    sync = " ".join(map(shlex.quote, program()))
    script = f"""
        echo "$CODER_AGENT_SOCKET_PATH"; test -S "$CODER_AGENT_SOCKET_PATH" || exit 99; test $(umask) = 0027 || exit 98
        {sync} start a && {sync} complete a; {sync} list; exit 7"""
    for named in ([], ["--socket-path", world.path]):
        done = world.run("serve", *named, "--", "sh", "-c", script, preexec_fn=lambda: os.umask(0o027))
        assert done.returncode == 7
        assert done.stderr == "" or named  # then its log is
        path, *rest = done.stdout.splitlines()
        assert path == world.path if named else path.startswith(f"{temporary}/")
        assert rest[-1].split()[:3] == ["a", "completed", "true"]
        assert os.listdir(temporary) == []
        assert os.listdir(world.directory) == ["t"]


def test_serve_says_that_there_is_no_directory_for_a_private_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "private_directory", lambda: "")
    command, args = coder_sync.parse(["serve", "--", "true"])
    with pytest.raises(coder_sync.SyncError, match="cannot make a private socket: ") as caught:
        command.run(args)
    assert caught.value.exit_code == 125


def test_our_own_failure_before_the_command_is_125(call: Call, agent: World, temporary: Path) -> None:
    taken = call(agent, "serve", "--socket-path", agent.path, "--", "echo", "ran")
    deep = temporary / ("x" * 110)
    deep.mkdir()
    deeper = agent.run("serve", "--socket-path", f"{deep}/socket", "--", "echo", "ran")
    assert agent.ok("serve", "--", "echo", "ran", env={**agent.env, "TMPDIR": str(deep)}) == "ran\n"  # not there
    pid = agent.client.ping()["pid"]
    for done, said in ((taken, f"(pid {pid})"), (deeper, "too long for a socket path")):
        assert (done.returncode, done.stdout) == (125, "") and said in done.stderr


def test_a_command_gets_its_streams_arguments_default_signals_and_nothing_else(shared: World, words: list[str]) -> None:
    code = """import os, signal, sys
print(sys.stdin.read(), os.environ.get("CODER_SYNC_UNIT", ""), os.environ["EXTRA"], sys.argv[1:])
print("err", file=sys.stderr)
default = [n for n in range(1, 32) if signal.getsignal(n) not in (signal.SIG_DFL, signal.default_int_handler)]
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), [n for n in default if n not in (13, 25)])
print([n for n in range(100) if os.path.exists(f"/dev/fd/{n}")][:4], flush=True)
sys.exit(255)"""
    argv = [*words, "-q", "--", *PYTHON, code, "a b", "--", "-o"]
    ignore = lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # noqa: E731
    env = {**shared.env, "EXTRA": "x"}
    process = shared.popen(*argv, env=env, stdin=subprocess.PIPE, preexec_fn=ignore)
    out, err = process.communicate("hello", timeout=PATIENCE)
    first, second, third = out.splitlines()
    unit = words[1] if words[0] == "run" else ""
    assert (process.returncode, first, err) == (255, f"hello {unit} x ['a b', '--', '-o']", "err\n")
    assert second == "[] []"
    assert third in ("[0, 1, 2]", "[0, 1, 2, 3]")  # the last is what lists them


def test_a_command_that_cannot_be_run_is_127_or_126(agent: World) -> None:
    (agent.directory / "plain").write_text("#!/bin/sh\n")
    for words in (["serve"], ["run", "a"]):
        for command, code in (("missing-command", 127), ("", 127), ("./missing", 127), ("./plain", 126)):
            done = agent.run(*words, "--", command)
            assert done.returncode == code, done
            assert re.fullmatch(f"error: .*cannot run {command}: .*\n", done.stderr), done
    failed = agent.client.status("a")
    assert (failed.status, failed.exit_code) == ("failed", 126) and "cannot run ./plain" in failed.reason


def test_signals_reach_the_command(shared: World, words: list[str]) -> None:
    process = shared.popen(*words, "--", *PYTHON, CATCH)
    assert line_of(process.stdout) == "ready\n"
    for number in SIGNALS:
        process.send_signal(number)
        assert line_of(process.stdout) == f"got {int(number)}\n"
    assert finish(process).returncode == 9


def test_a_key_reaches_the_command_once_and_a_signal_from_elsewhere_too(shared: World, words: list[str]) -> None:
    argv = [*program(), *words, "--", *PYTHON, CATCH]
    pid, master = pty.fork()
    if pid == 0:
        os.execve(argv[0], argv, shared.env)
    shown_on(master, b"ready")
    for key, number in ((b"\x03", 2), (b"\x1c", 3)):
        os.write(master, key)
        seen = shown_on(master, b"got %d" % number)
        os.kill(pid, signal.SIGUSR1)
        assert shown_on(master, b"got 10", seen).count(b"got %d" % number) == 1
    os.kill(pid, signal.SIGTERM)
    shown_on(master, b"got 15")
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 9
    os.close(master)


def test_a_run_that_cannot_report_its_commands_end_is_ended_by_a_signal_at_once(world: World) -> None:
    agent = world.serve()
    runs = [(number, *held(world, number.name)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    stop(agent)
    for number, process, pid in runs:
        os.kill(pid, signal.SIGKILL)
        until(lambda process=process, pid=pid: not alive(pid) and process_state(process.pid) == "S")
        process.send_signal(number)
    for number, process, _ in runs:
        assert process.wait(5) == 128 + number, number


def test_what_a_command_does_to_its_private_directory_changes_nothing(agent: World) -> None:
    agent.env["TMPDIR"] = str(agent.directory)
    for what in ("rm -r $dir", "mkdir -p $dir/a/b; touch $dir/a/b/c", "rm $NOTIFY_SOCKET"):
        script = f"dir=${{NOTIFY_SOCKET%/*}}; {what}; exit 7"
        assert agent.run("run", "a", "--ready", "notify", "--", "sh", "-c", script).returncode == 7
        assert agent.client.status("a").reason == "ended before it was ready (exit code 7)"
        assert not list(agent.directory.glob("coder-sync-*"))


def children_of(pid: int) -> dict[int, str]:
    """The living and dead children of a process, and the name of each; a dead one's begins with a cross."""
    found = {}
    for other in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            name, _, rest = Path(f"/proc/{other}/stat").read_text().partition("(")[2].rpartition(")")
            if rest.split()[1] == str(pid):
                found[int(other)] = "+" * (rest.split()[0] == "Z") + name
    return found


ORPHANS = "for i in 1 2 3; do (true & exec true); (sleep 0.01 & exec true); done"


@NAMESPACES
def test_process_1_with_a_command_takes_the_ends_of_orphans_and_obeys_term(shared: World, words: list[str]) -> None:
    outside = shared.spawn([*UNSHARE, *program(), *words, "--", "sh", "-c", f"{ORPHANS}; echo on; sleep 60"])
    assert line_of(outside.stdout) == "on\n"
    (inside,) = children_of(outside.pid)
    until(lambda: len(children_of(inside)) == 1, "neither orphans nor zombies")
    os.kill(inside, signal.SIGTERM)
    assert finish(outside).returncode == 143


@NAMESPACES
def test_an_agent_as_process_1_reaps_orphans_and_has_all_that_runs_ended(world: World) -> None:
    outside = world.spawn([*UNSHARE, *program(), "serve", "-q"])
    (inside,) = until(lambda: [pid for pid in children_of(outside.pid) if serves(world)])
    enter = ["nsenter", "-t", str(inside), "-p", "-m", "sh", "-c", ORPHANS]
    assert finish(world.spawn(enter)).returncode == 0
    until(lambda: children_of(inside) == {}, "neither orphans nor zombies")
    run = world.connect()
    assert "result" in run.call("start", unit="job", supervisor=True)
    os.kill(inside, signal.SIGTERM)
    assert run.read()["params"]["unit"] == "job"
    run.request("fail", unit="job")
    assert finish(outside).returncode == 0


@NAMESPACES
def test_a_proc_of_another_pid_namespace_counts_as_absent(world: World) -> None:
    startup(world, {"c": '@extern b\necho "$CODER_SYNC_ENV"; sleep 60 & exit 3'})
    script = """
        coder run a -- sh -c 'echo "$CODER_SYNC_ENV"; echo X=1 >> "$CODER_SYNC_ENV"'
        coder run b --want a -- sh -c 'echo $X'
        coder start owned --pid $$; coder list
        coder boot startup.d --grace 5s"""
    done = finish(world.spawn(["unshare", "-fp", *program(), "serve", "--", "sh", "-c", script], env=world.shell_env()))
    first, second, *rest = done.stdout.splitlines()
    assert second == "1" and rest[-1].startswith("c | ") and "/proc/" not in first + rest[-1], done
    assert "failed: c (exit code 3)" in done.stderr and done.returncode == 1, done


@NAMESPACES
def test_a_process_of_another_pid_namespace_is_not_taken_for_dead(agent: World) -> None:
    run = agent.spawn([*UNSHARE, *program(), "run", "a", "--ready", "true", "--", "sleep", "60"])
    until(lambda: agent.client.status("a").running_on)
    owner = agent.client.status("a").owner
    assert owner is not None and owner.pid < 100 and owner.alive is None
    assert f"runs on as sleep 60 (pid {owner.pid})" in agent.ok("list")
    assert agent.client.stop() == ["a"] and finish(run).returncode == 143


# -- supervisors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "detached", pytest.param("abstract", marks=LINUX)])
def test_a_supervisor_is_told_when_the_agent_is_ready_and_when_it_stops(world: World, kind: str) -> None:
    name = f"@coder-sync-{os.getpid()}-{next(COUNT)}" if kind == "abstract" else str(world.directory / "notify")
    env = {**world.env, "NOTIFY_SOCKET": name}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
        agent = world.popen("serve", *(["--detach"] if kind == "detached" else []), env=env)
        ready = sock.recv(1000).decode()
        pid = world.client.ping()["pid"]
        assert ready == f"READY=1\nMAINPID={pid}" and (pid == agent.pid) == (kind != "detached")
        os.kill(pid, signal.SIGTERM)
        assert sock.recv(1000).decode().splitlines()[0] == "STOPPING=1"
        assert finish(agent).returncode == 0


def test_a_supervisor_that_is_not_there_is_no_error(world: World) -> None:
    left = str(world.directory / "left")
    listener(left, socket.SOCK_DGRAM).close()
    for name in ("/no/such/socket", left, "@"):
        world.ok("serve", "--", "true", env={**world.env, "NOTIFY_SOCKET": name})


def listener(path: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    if kind == socket.SOCK_STREAM:
        sock.listen(16)
    return sock


# ---------------------------------------------------------------------------------------------------------
# Command line: what each command says and how it ends.
# ---------------------------------------------------------------------------------------------------------

TIME = r"\d[\d.]*(ms|s|m\d\ds|h\d\dm)"  # a span
FRESH = """
$ list -> no units yet
$ reset -> no unit has ended
$ ping -> agent at PATH: pid AGENT, version VERSION, up TIME
$ --version; version; exp sync --version -> coder_sync VERSION
$ want a b c b -> a: depends on b, c
$ start b -> b: started; it has no dependencies
$ complete b; complete b -> b: completed
$ start c -q; complete c -q --exit-code=0 ->
$ start a -> a: started; satisfied already: b, c
$ want a x -> a: depends on x; it has started already, so this counts the next time it starts
$ reset a -> 1: unit "a" is started...
$ complete a --exit-code 009 -> a: failed (exit code 9)
$ start d -q; env d; want e d -q ->
$ fail d "--reason=no disk" -> d: failed
$ reset d -> pending again: d, e
$ list -c unit,status ->
UNIT  STATUS
a     failed
b     completed
c     completed
d     pending
e     pending
$ wait -q b; fail -q d ->
$ reset -> pending again: a, b, c, d, e
$ start late --want z -t 1ms -q ->
! timeout waiting for dependencies of unit late
!   z not registered
exit 124
$ shutdown -> agent at PATH: ended
$ shutdown -> 3: cannot reach an agent at PATH: no such file...
"""
MIXED = """
$ want a b -q; want behind bad b -q; start on -q; start done -q; start bad -q; complete done -q ->
$ fail bad --reason 'no disk' -> bad: failed
$ want table b on -q; want table done --requires completion -q; want other on --requires start -q ->
$ status table ->
Unit: table
Status: pending
Ready: false

DEPENDS ON  REQUIRED STATUS  CURRENT STATUS  SATISFIED
b           completed        not registered  false
on          completed        started         false
done        ended            completed       true
...
$ status behind -c 'reason,depends on' ->
Unit: behind
Status: skipped
Ready: false
Reason: dependency "bad" failed (no disk)

REASON   DEPENDS ON
no disk  bad
         b
...
$ status behynd ->
Unit: behynd
Status: not registered
Ready: true
...
Did you mean: behind
...
$ list -c ready,UNIT,status,reason ->
READY  UNIT    STATUS     REASON
false  a       pending
true   bad     failed     no disk
false  behind  skipped    dependency "bad" failed (no disk)
true   done    completed
true   on      started
true   other   pending
false  table   pending
$ list -> UNIT ...  READY  AGE ...REASON
...
$ wait bad behind done --requires completion -> bad, behind, done: done...
$ wait on --requires start -> on: done...
$ wait dome -t 20ms ->
waiting for dome not registered, did you mean "done"?
! timeout waiting for dome
!   dome not registered, did you mean "done"?
exit 124
$ wait -t 1ms X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13 X14 X15 X16 X17 X18 X19 X20 X21 X22 ->
waiting for X1 not registered; ...; X20 not registered; and 2 more
! timeout waiting for X1, X2, ...
...
exit 124
$ start git-clone --pid PID -q; want apt disk -q ->
$ start ide -t 50ms --want gitclone --want git-clone --want apt ->
ide: waiting for gitclone not registered, did you mean "git-clone"?; git-clone started ...; apt ...
! timeout waiting for dependencies of unit ide
!   gitclone not registered, did you mean "git-clone"?
!   git-clone started TIME ago by ... (pid PID)
!   apt pending for TIME, waits for disk
exit 124
$ complete ide -> ide: completed
$ want apt-install apt-instal -q ->
$ run beside --want apt-instal -t 1ms -- echo ran ->
! beside: waiting for apt-instal not registered
! timeout waiting for dependencies of unit beside
!   apt-instal not registered
exit 124
"""
REFUSALS = """
$ want a a -> 1: cycle detected: a -> a; a unit cannot depend on itself
$ start a --want=\udcff -> 1: unit name '\\udcff' has a character that cannot be printed
$ start on -> 1: unit "on" is already started by ... (pid PARENT)
$ fail dome -> 1: unit "dome" is not registered; call want, start or run on it first; did you mean "done"?
$ graph dome -> 1: no unit "dome"; did you mean "done"?
$ fail done -> 1: unit "done" is completed and cannot become failed: ...start it again first
$ start x --pid -5 -> 2: start: argument --pid: not a whole number from 0 on: '-5' (usage: ...
$ list --socket-path /\udcff/x -> 3: cannot reach an agent at /\\udcff/x: no such file...
$ list --socket-path X200 -> 3: cannot reach an agent at X200: AF_UNIX path too long
$ start behind -> 4: unit "behind" skipped: dependency "bad" failed (no disk)
$ wait bad -> 4: dependency "bad" failed (no disk)
$ ; --socket-path -> 2: which command? want, start, ...; options follow it; see `coder_sync.py --help`
$ frobnicate; help frobnicate -> 2: no such command: 'frobnicate'; there are want, start, ...
$ stat -> 2: no such command: 'stat'; did you mean "start"?
$ X500 -> 2: no such command: 'X59; there are ...
$ exp list -> 2: after exp comes sync, as in `exp sync start UNIT`
$ start a --\udcff=x -> 2: start: no such option: '--\\udcff' (usage: coder_sync.py start UNIT [OPTION]...)
$ start a --requires start -> 2: --requires is about the units of --want, ...
$ list -c unit,,status -> 2: no such column: ...
$ wait -> 2: wait: name a unit, or what is to be --ready
$ wait --ready notify -> 2: wait: --ready notify is for `run`: it is the command of a unit that says so
$ run a --ready '' -- true -> 2: ready: what is to be probed is missing
$ run a --ready-timeout 5m -- true -> 2: run: --ready-timeout without --ready
$ run a --retry-delay 1s -- true -> 2: run: --retry-delay without --retry
$ timeline --blame -o json; timeline --compare x -o json -> 2: --output is the form of the timeline itself; ...
$ serve --timeline x.pdf -> 2: serve: argument --timeline: x.pdf: the name must end in .svg, .json or .txt (...
$ start -> 2: start: the following arguments are required: UNIT (usage: coder_sync.py start UNIT [OPTION]...)
$ start a b -> 2: start: unexpected 'b' (usage: ...
$ run a sh -> 2: run: unexpected 'sh'; did you forget -- before the command? (usage: ...
$ run a; run a -- -> 2: run: a command must follow -- (usage: coder_sync.py run UNIT [OPTION]... -- COMMAND ARG...)
$ serve -- -> 2: serve: a command must follow -- (usage: coder_sync.py serve [OPTION]... [-- COMMAND ARG...])
$ boot nowhere sleep 1 ->
! error: nothing was run:
...
! did you forget -- before the command?
exit 2
$ start a --timeout soon; start a -tsoon -> 2: start: argument -t/--timeout: invalid duration 'soon': write ...
$ want a b --requires X500 -> 2: want: argument --requires: invalid choice: 'xxx...
$ complete a --exit-code; fail a --reason -x -> 2: ...: expected one argument (usage: ...
$ start a --quiet=yes; start a -qx -> 2: start: ... (usage: ...
$ start a --wants b -> 2: start: no such option: '--wants'; did you mean "--want"? (usage: ...
"""


def as_written(expected: str, said: str) -> bool:
    """Whether a text is as expected, where `...` is anything in a line, or lines, and TIME a span of time."""
    lines = expected.splitlines(keepends=True)
    patterns = [re.escape(line).replace(r"\.\.\.", ".*").replace("TIME", TIME) for line in lines]
    return bool(re.fullmatch("".join("(.*\n)*" if p == ".*\\\n" else p for p in patterns), said))


def play(call: Call, world: World, transcript: str) -> None:
    """Make the calls of a transcript, `$ CALL; CALL -> TEXT`. Each is to print the text and the lines that follow.

    Those after `!` come on standard error. `4: TEXT` stands for `! error: TEXT` and exit status 4; X9 for nine x.
    """
    words = {"PID": os.getpid(), "PARENT": os.getppid(), "PATH": world.path, "VERSION": coder_sync.__version__}
    words["AGENT"] = world.processes[0].pid if world.processes else 0
    for word, meaning in words.items():
        transcript = transcript.replace(word, str(meaning))
    transcript = re.sub(r"X(\d+)", lambda match: "x" * int(match[1]), transcript)
    for part in re.split(r"^\$ ", transcript, flags=re.M)[1:]:
        lines, first, more = re.fullmatch("(.*?) -> ?(.*)\n((?:.*\n)*)", part).groups()  # type: ignore[union-attr]
        expected = re.sub(r"^(\d+): (.*)$", r"! error: \2\nexit \1", first) + "\n" * bool(first) + more
        for line in lines.split("; "):
            done = call(world, *shlex.split(line))
            said = done.stdout + "".join(f"! {complaint}" for complaint in done.stderr.splitlines(keepends=True))
            said += f"exit {done.returncode}\n" if done.returncode != 0 else ""
            assert as_written(expected, said), f"{line}\n{said}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An agent with a unit in every state."""
    with World(tmp_path_factory.mktemp("mixed")) as world:
        world.serve()
        client = world.client
        client.want("a", "b")
        client.want("behind", "bad", "b")
        for name in ("on", "done", "bad"):
            client.start(name)
        client.complete("done")
        client.fail("bad", "no disk")
        yield world


@pytest.mark.parametrize("transcript", [FRESH, MIXED], ids=["what-was-done", "how-units-stand"])
def test_what_commands_say(call: Call, agent: World, transcript: str) -> None:
    play(call, agent, transcript)
    assert os.path.exists(agent.path) == (transcript is MIXED)  # which does not end with shutdown


def test_a_refusal_is_one_line_and_changes_nothing(call: Call, mixed: World) -> None:
    before = {u.unit_name: u.status for u in mixed.client.list(everything=True)}
    play(call, mixed, REFUSALS)
    assert before.items() <= {u.unit_name: u.status for u in mixed.client.list(everything=True)}.items()


FORMS = """
exp sync want u a b
want u --connect-timeout=1s a b -q
want --requires success -- u a b
--connect-timeout 1s want u a b
exp sync --connect-timeout=1s want --connect-timeout 0 u a b
--socket-path=/x exp sync exp sync want u a b
"""


def test_options_may_stand_before_among_and_after_the_names() -> None:
    for form in FORMS.strip().splitlines():
        command, args = coder_sync.parse(form.split())
        assert (command.name, args.unit, args.deps, args.quiet) == ("want", "u", ["a", "b"], " -q" in form), form
        timeout = 0 if "timeout 0" in form else 1 if "timeout" in form else None
        assert (args.connect_timeout, args.socket_path) == (timeout, "/x" if "/x" in form else ""), form


def test_a_start_that_waits_says_for_what_again_and_again_and_then_that_it_is_done(world: World) -> None:
    answering(world, altered("coder_sync.REPORT_EVERY = 0.02", "serve", "-q"))
    world.client.start("clone")
    process = world.popen("start", "a", "--want", "clone", "--want", "apt", "--timeout", "0")
    started = f"clone started TIME ago by ... (pid {os.getppid()})"
    assert as_written(f"a: waiting for {started}; apt not registered\n", line_of(process.stdout))
    world.client.want("apt", "disk")
    expected = f"a: still waiting after TIME for {started}; apt pending for TIME, waits for disk\n"
    until(lambda: as_written(expected, line_of(process.stdout)))
    assert as_written(expected, line_of(process.stdout))
    world.client.complete("clone")
    world.client.complete("apt")
    done = finish(process)
    assert (done.returncode, done.stderr) == (0, "")
    assert as_written("...\na: started after TIME\n", done.stdout)


def test_a_probe_that_does_not_succeed_is_spoken_of_now_and_then(world: World) -> None:
    sooner = "coder_sync.FIRST_REPORT, coder_sync.REPORT_EVERY = 0.02, 0.01"
    world.serve()
    run = world.spawn(altered(sooner, "run", "a", "--ready", "file:up", "--ready-timeout", "1s", "--", "sleep", "60"))
    wait = world.spawn(altered(sooner, "wait", "--ready", "file:up", "--timeout", "1s"))
    for _ in range(2):  # at first the first try may not have ended
        until(lambda: as_written("a: not ready after TIME: file:up (no such file)\n", line_of(run.stderr)))
        until(lambda: as_written("still waiting after TIME for file:up (no such file)\n", line_of(wait.stdout)))
    ends = "error: a: not ready after 1.0s: file:up (no such file)\n", "  file:up: no such file\n"
    for done, end in zip((finish(run), finish(wait)), ends):
        assert done.returncode == 124 and done.stderr.endswith(end), done


def test_a_plain_call_imports_nothing_that_costs_more_than_the_call(agent: World) -> None:
    python = [sys.executable, "-IS", "-X", "importtime", "-c", LAUNCH, str(installed())]
    done = finish(agent.spawn([*python, "start", "a", "--want", "b", "--requires", "start", "-q", "-t", "1ms"]))
    assert done.returncode == 124
    imported = {line.split()[-1] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "_socket" in imported
    costly = {"argparse", "enum", "json", "os", "re", "select", "socket", "subprocess", "threading", "typing"}
    assert not imported & {*costly, "zipfile"}  # with that one it would run from the source


def test_env_prints_what_a_shell_takes_back(call: Call, agent: World, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"A": "it's $HOME `id` \\ \"", "B_2": "two\nlines", "C": ""}
    agent.client.want("a", "b")
    agent.client.start("b")
    agent.connect().call("complete", unit="b", env=values)
    out = call.ok(agent, "env", "a")
    done = finish(agent.spawn(["sh", "-c", 'eval "$1"; printf "%s|" "$A" "$B_2" "$C"', "sh", out]))
    assert (done.stdout, done.stderr) == ("|".join([*values.values(), ""]), "")
    for name in ("$(exit)", "1a", "", "\u00e4"):
        monkeypatch.setattr(Client, "env", lambda client, unit, name=name: {"GOOD": "1", name: "2"})
        play(call, agent, "$ env a -> 1: the agent knows a variable that no shell can take: ...\n")


def test_json_has_the_shape_that_scripts_expect(call: Call, agent: World) -> None:
    assert call.ok(agent, "list", "-o", "json") == "[]\n"
    agent.client.start("\u00e4", pid=os.getpid())
    agent.client.start("bad")
    agent.client.complete("bad", exit_code=9)
    agent.client.want("table", "nobody")
    agent.client.want("table", "\u00e4", requires="start")
    agent.client.want("table", "bad", requires="completion")
    text = call.ok(agent, "list", "-o", "json")
    assert '"\u00e4"' in text  # for people, too
    bad, table, started = json.loads(text)
    first = {"unit_name": "bad", "status": "failed", "is_ready": True, "reason": "exit code 9", "exit_code": 9}
    assert first.items() <= bad.items()
    nothing = {"unit_name": "table", "status": "pending", "is_ready": False, "exit_code": None, "owner": None}
    assert nothing.items() <= table.items() and "dependencies" not in table  # not []: it has some
    assert started["owner"].keys() == {"pid", "command", "alive"} and started["owner"]["pid"] == os.getpid()
    status = json.loads(call.ok(agent, "status", "table", "--output", "json"))
    assert (status["unit_name"], status["status"], status["is_ready"]) == ("table", "pending", False)
    keys = ("depends_on", "required_status", "current_status", "is_satisfied")
    assert [tuple(row[key] for key in keys) for row in status["dependencies"]] == [
        ("nobody", "completed", "not registered", False),
        ("\u00e4", "started", "started", True),
        ("bad", "ended", "failed", True),
    ]


def test_what_a_wait_is_trying_ends_with_it(world: World) -> None:
    waits, codes = {}, {"time is up": 124, "TERM": 143, "HUP": 129, "QUIT": 131, "INT": 130}
    for how in codes:
        probe = ["--ready", f"sleep 60 & echo $$ $! >> '{how}'; wait"]
        timeout = "500ms" if how == "time is up" else "60s"
        waits[how] = world.popen("wait", *probe, *probe, "--timeout", timeout), world.directory / how
    for how, (process, file) in waits.items():
        until(lambda file=file: file.exists() and "\n" in file.read_text(), f"a try for {how}")
        if how != "time is up":
            process.send_signal(getattr(signal, f"SIG{how}"))
        done = finish(process)
        assert done.returncode == codes[how], done
        until(lambda file=file: not any(alive(int(pid)) for pid in file.read_text().split()), f"no try for {how}")


# -- no agent, or not one of ours -------------------------------------------------------------------------


def test_only_what_coordinates_tries_again(call: Call, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(seconds: float) -> None:
        raise Ended(99 if seconds < 0.1 else 98)

    monkeypatch.setattr(time, "sleep", again)
    for line in ("ping", "status a", "list"):
        assert call(world, *line.split()).returncode == 3
    for line in ("want a b", "start a", "complete a", "fail a", "wait a"):
        words = line.split()
        assert call(world, *words).returncode == 99
        assert call(world, *words, "--connect-timeout", "0").returncode == 3
        assert call(world, *words, CODER_SYNC_CONNECT_TIMEOUT="0").returncode == 3
    done = call(world, "start", "never", CODER_SYNC_CONNECT_TIMEOUT="soon")
    assert done.returncode == 2
    assert done.stderr.startswith("error: CODER_SYNC_CONNECT_TIMEOUT: invalid duration 'soon'")


BOOTING = """import time
def first(seconds, sleep=time.sleep):
    import os
    os.write(1, b"tried\\n")
    time.sleep = sleep
time.sleep = first"""


def test_a_call_begun_before_its_agent_succeeds_also_beside_a_dead_socket(world: World) -> None:
    world.env["CODER_SYNC_CONNECT_TIMEOUT"] = "30s"

    def tried(line: str) -> subprocess.Popen[str]:
        process = world.spawn(altered(BOOTING, *line.split()))
        assert line_of(process.stdout) == "tried\n"
        return process

    processes = [*map(tried, ("start a", "list --connect-timeout 20s"))]
    with socket.socket(socket.AF_UNIX) as dead:  # it never listened: nobody could have reached it
        dead.bind(world.path)
    processes += map(tried, ("want b c", "ping --wait 30s", "ping"))
    world.serve()
    assert [finish(process).returncode for process in processes] == [0] * 5


NO_AGENT = "$ start a --connect-timeout 0; ping -> 3: ...PATH...{}\n"  # and why there is none


def test_what_there_is_instead_of_an_agent_is_said(call: Call, world: World) -> None:
    began = time.monotonic()
    play(call, world, NO_AGENT.format("no such file; ...serve --detach --socket-path PATH..."))
    assert time.monotonic() - began < coder_sync.CONNECT_TIMEOUT  # a question is asked once
    listener(world.path).close()
    play(call, world, NO_AGENT.format("connection refused; who made it is gone: build the tunnel..."))
    os.unlink(world.path)
    Path(world.path).write_text("x")
    play(call, world, NO_AGENT.format("not a socket; is the path right?"))
    os.unlink(world.path)
    with listener(world.path) as sock:
        sock.listen(0)
        queued = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(5)]
        for one in queued:
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(world.path)
        play(call, world, NO_AGENT.format("the agent does not take connections; is it stopped or overloaded?"))


def test_a_socket_that_one_may_not_use_names_its_owner_at_once(world: World) -> None:
    with open_directory() as directory:
        path = world.path = f"{directory}/agent.sock"
        world.serve("--socket-path", path, "--mode", "600" if os.getuid() == 0 else "000")
        began = time.monotonic()
        done = finish(world.spawn(stranger("start", "a", "--socket-path", path)))
        assert time.monotonic() - began < coder_sync.CONNECT_TIMEOUT  # although a start waits for an agent that starts
        assert done.returncode == 3
        owner = pwd.getpwuid(os.getuid()).pw_name
        assert re.search(rf"permission denied \(it belongs to {owner}, mode \d+\)", done.stderr)


@contextlib.contextmanager
def foreign_agent(world: World, uid: int = 65534) -> Iterator[str]:
    """An agent of another user for everybody at what is the default path with the statement that is given."""
    with open_directory(0o777) as directory:
        world.path = f"{directory}/agent.sock"
        world.env["CODER_AGENT_SOCKET_PATH"] = world.path
        answering(world, stranger("serve", "--mode", "666", uid=uid))
        yield f"coder_sync.DEFAULT_SOCKET = {world.path!r}"


@ROOT
def test_at_the_default_path_an_agent_is_ones_own_or_roots(world: World) -> None:
    def starts(uid: int, changes: str = "") -> None:
        done = finish(world.spawn(stranger("start", f"a{next(COUNT)}", uid=uid, changes=changes)))
        assert (done.returncode, done.stderr) == (0, "")

    with foreign_agent(world) as default:
        os.chown(world.path, 1, -1)  # whose file it is does not matter
        starts(65534, default)
        starts(0, default)  # root coordinates with any
        starts(1)  # who names another path has chosen
        script = Path(os.path.dirname(world.path), "a")
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        for words in (["start", "a"], ["list"], ["boot", str(script)]):
            done = finish(world.spawn(stranger(*words, uid=1, changes=default)))
            assert done.returncode == 3
            assert done.stderr.endswith(" belongs to nobody, not to you or root; choose another --socket-path\n")
    with foreign_agent(world, uid=0) as default:
        starts(1, default)


@ROOT
def test_root_takes_no_variables_from_an_agent_of_another_user(world: World) -> None:
    leave, take = "echo CODE=evil >> $CODER_SYNC_ENV", ["--", "sh", "-c", "echo got $CODE"]
    with foreign_agent(world) as default:
        world.ok("run", "evil", "--", "sh", "-c", leave)
        world.ok("want", "a", "evil")
        script = "@want evil\n@extern evil\necho got $CODE"
        boot = Boot(world, {"b": script, "d": f"@want b\n{script}"})
        for process, out in (
            (world.popen("env", "a"), ""),
            (world.popen("run", "c", "--want", "evil", *take), "got\n"),
            (world.spawn(altered(default, "env", "a")), ""),
            (boot.process, "b | got\nd | got\n"),
        ):
            done = finish(process)
            assert (done.returncode, done.stdout) == (0, out)
            who = f"the agent at {world.path}, which belongs to nobody"
            assert done.stderr.count(f"warning: root takes no environment variables from {who}\n") == 1
        assert world.client.env("a") == {}
        with world.client.unit("e", want=["evil"]) as start:
            assert start.environment == {}
    with foreign_agent(world, uid=0):
        world.ok("run", "good", "--", "sh", "-c", leave)
        assert world.ok("run", "a", "--want", "good", *take) == "got evil\n"


IMPOSTORS = {
    "does not speak our protocol...": [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"[1, 2]\n",
        b"\xff\xfe\x00\n",
        b"[" * 60_000 + b"\n",
        b'{"jsonrpc": "1.0", "id": 1, "result": {}}\n',
    ],
    "went away before it answered...": [b"", b'{"jsonrpc": "2.0", "id"'],
}
ODD_ANSWERS: list[Any] = [{"result": r} for r in (None, "x", {}, [1])] + [{"error": "x"}, {"error": {}}, {}]


def test_what_is_no_agent_of_ours_is_said_to_be_none_or_to_hang_up(call: Call, world: World) -> None:
    for complaint, answers in IMPOSTORS.items():
        for answer in answers:
            with impostor(world, answer):
                play(call, world, NO_AGENT.format(complaint))
    for odd in ODD_ANSWERS:
        for words in ("ping", "want a b", "start a", "status a", "list"):
            with impostor(world, json.dumps({"jsonrpc": "2.0", "id": 1, **odd}).encode() + b"\n"):
                done = call(world, *words.split())
            assert "internal error" not in done.stderr, (odd, words)
            assert done.returncode in (0, 1, 3)


SOON = "coder_sync.NAMED_AFTER, coder_sync.REPLY_TIMEOUT, coder_sync.REPORT_EVERY = 0.6, 2.0, 0.8"
WAITING = ["start a --want b -t 0", "wait b -t 0", "run c --want b -t 0 -- true", "events --follow"]
ASKING = ["ping", "list", "complete b", "want b d", "events", "env b", "reset", "shutdown", "run d --optional -- true"]


def waiting(world: World, under: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """Commands that wait for something of the agent, and have said so."""
    world.client.want("b")
    processes = [world.spawn([*under, *altered(SOON, *line.split())]) for line in WAITING]
    for process, pipe in zip(processes, ("stdout", "stdout", "stderr", "stdout")):
        assert line_of(getattr(process, pipe))
    return processes


def test_a_client_that_waits_ends_with_its_agent(world: World) -> None:
    agent = world.serve()
    processes = waiting(world)
    agent.kill()
    for process in processes:
        done = finish(process)
        assert done.returncode == 3 and re.search("^error: .*went away.*\n$", done.stderr)


def test_who_says_nothing_is_named_and_then_taken_for_gone(world: World) -> None:
    with listener(world.path):
        processes = {line: world.spawn(altered(SOON, *line.split())) for line in (*WAITING, *ASKING)}
        who = re.escape(f"the agent at {world.path} (pid {os.getpid()}) has not answered")
        said = (
            f"warning: {who} for 1 s; is it stopped[?]\n(error|warning: d: runs.*): {who} for 2 s; is it stopped[?]\n"
        )
        for line, process in processes.items():
            done = finish(process)
            assert done.returncode == (0 if "--optional" in line else 3), line
            assert re.fullmatch(said, done.stderr), line


def test_an_agent_that_does_not_end_when_told_to_is_named(world: World) -> None:
    deaf = "coder_sync.METHODS['shutdown'] = lambda agent, request: {}"
    agent = answering(world, altered(deaf, "serve"))
    done = finish(world.spawn(altered(SOON, "shutdown")))
    said = f"error: the agent at {world.path} (pid {agent.pid}) was told to end 2 s ago and has not; is it stopped?\n"
    assert (done.returncode, done.stderr) == (3, said)


def test_an_agent_that_stops_during_a_wait_is_noticed(world: World) -> None:
    agent = answering(world, altered(SOON, "serve", "-q"))
    processes = waiting(world)
    for _ in range(3):  # until it has been silent for longer than REPLY_TIMEOUT, as is normal
        assert "waiting after" in line_of(processes[0].stdout)
    assert [process.poll() for process in processes] == [None] * len(processes)
    agent.send_signal(signal.SIGSTOP)
    for process in processes:
        done = finish(process)
        assert done.returncode == 3
        said = [line for line in done.stderr.splitlines() if "still waiting" not in line]
        assert [line.partition(": the agent at")[0] for line in said] == ["warning", "error"]


@NAMESPACES
def test_without_proc_the_client_says_who_called_it(world: World) -> None:
    answering(world, [*without("/proc"), *program(), "serve", "-q"])
    tool = shlex.join(program())
    script = f"{tool} start a -q; {tool} status a -o json; read line; {tool} complete a"
    first = world.spawn([*without("/proc"), "/bin/sh", "-c", script], stdin=subprocess.PIPE)
    until(lambda: world.client.list() and world.status("a") == "started")
    assert world.client.status("a").owner == Owner(first.pid, "", None)
    second = finish(world.spawn([*without("/proc"), "/bin/sh", "-c", f"{tool} start a; {tool} complete a -q; echo"]))
    assert f'unit "a" is already started by process (pid {first.pid})' in second.stderr
    assert "does not count" in second.stderr
    assert world.status("a") == "started"
    first.communicate("go on\n", timeout=PATIENCE)
    assert world.status("a") == "completed"


@pytest.mark.parametrize("under", [[], pytest.param(UNSHARE, marks=NAMESPACES)], ids=["", "as-process-1"])
def test_a_client_that_waits_ends_at_a_signal(agent: World, under: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for process in waiting(agent, under):
            os.kill([*children_of(process.pid), process.pid][0], number)
            done = finish(process)
            expected = 128 + number if under or number == signal.SIGINT else -number
            assert (done.returncode, done.stderr) == (expected, "")
    served(agent)


# -- standard streams -------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(agent: World) -> None:
    fill(agent, 400)  # more than a pipe holds
    for line in ("list --all", "list --all -o json", "status everything", "events"):
        process = agent.popen(*line.split())
        with process, process.stdout as out:  # type: ignore[union-attr]
            assert os.read(out.fileno(), 10)
            out.close()
            assert process.wait(PATIENCE) in (0, 141)
            assert process.stderr.read() == ""  # type: ignore[union-attr]


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@FULL
def test_an_answer_that_cannot_be_written_is_an_error(mixed: World) -> None:
    for line in ("status a", "events", "--help", "--version"):
        with open("/dev/full", "w", encoding="ascii") as full:
            done = mixed.run(*line.split(), stdout=full)
        assert done.returncode == 1
        assert re.fullmatch("error: cannot write to standard output: No space left on device\n", done.stderr)


CALLS = ["want a b", "start b", "complete b", "wait b", "start a", "run c -- true", "complete x", "status a", "list"]


@pytest.mark.parametrize(
    "output",
    [pytest.param("> /dev/full 2> /dev/full", marks=FULL), ">&-", "<&- >&- 2>&-"],
    ids=["full", "one-closed", "all-closed"],
)
def test_what_is_done_is_done_even_if_nobody_can_read_it(agent: World, output: str) -> None:
    done = agent.shell("".join(f"coder {words} {output}\necho $?\n" for words in CALLS))
    codes = [0, 0, 0, 0, 0, 0, 1] + ([1, 1] if "full" in output else [0, 0])
    assert [int(code) for code in done.stdout.split()] == codes
    assert done.stderr.count("\n") == (output == ">&-")
    rows = [(u.unit_name, u.status) for u in agent.client.list()]
    assert rows == [("a", "started"), ("b", "completed"), ("c", "completed")]


@LINUX
def test_our_own_file_takes_the_place_of_no_closed_stream(agent: World) -> None:
    call = agent.spawn(["sh", "-c", f"exec '{FILE}' start b --want a <&- >&- 2>&-"], env=agent.shell_env())
    agent.waiting("b")
    assert [os.readlink(f"/proc/{call.pid}/fd/{fd}") for fd in range(3)] == ["/dev/null"] * 3


def test_names_are_written_in_any_locale(mixed: World) -> None:
    for locale in ("C", "POSIX", "C.UTF-8"):
        done = mixed.run("want", "\u00fcberschrift", locale, env={**mixed.env, "LC_ALL": locale})
        assert (done.returncode, done.stderr) == (0, "")
    assert mixed.status("\u00fcberschrift") == "pending"


# ---------------------------------------------------------------------------------------------------------
# Run and owners: nobody hangs when somebody dies.
# ---------------------------------------------------------------------------------------------------------

HANG = "import os, signal; os.write(1, b'%d\\n' % os.getpid()); signal.pause()"


def held(world: World, unit: str, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A run whose command goes on until it is killed, and the command's pid."""
    process = world.popen("run", unit, *options, "--", *PYTHON, HANG)
    return process, int(line_of(process.stdout))


def lost(process: subprocess.Popen[str], command: str = ".*") -> str:
    """The pattern of the reason of a unit whose owner ended; a run may have said which process its command is."""
    who = rf"(process {process.pid}|the run that ran process \d+)"
    return rf"lost: {who} \({command}\) (ended without completing|waited for .*, and its caller went away)"


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(PATIENCE)


def test_a_start_that_is_killed_before_it_has_said_so_is_undone(agent: World) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, bytes(4096)):
            pass
    os.set_blocking(write, True)
    process = agent.popen("start", "a", stdout=write)
    happened(agent, "a", "started")
    process.kill()
    until(lambda: agent.status("a") == "pending")
    os.close(read)
    os.close(write)


def test_run_declares_waits_starts_runs_and_completes(agent: World) -> None:
    process = agent.popen("run", "a", "--want", "b", "--want", "c", "--", "sh", "-c", "yes ran | head -n 1")
    assert line_of(process.stderr) == "a: waiting for b not registered; c not registered\n"
    agent.end("b", "c")
    done = finish(process)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert re.fullmatch("a: started after .*\n", done.stderr)  # SIGPIPE has ended yes(1), as usual
    assert kinds_of(agent, "a")[-2:] == ["started", "completed"]


def test_run_of_a_command_that_fails_fails_the_unit_and_skips_what_requires_it(agent: World) -> None:
    waiting = agent.popen("run", "b", "--want", "a", "--", "echo", "ran")
    agent.waiting("b")
    words = ["run", "a", "--retry", "2", "--retry-delay", "100ms", "--", "sh", "-c", "exit 100"]
    done = finish(agent.spawn(altered("coder_sync.LONGEST_DELAY = 0.15", *words)))
    tries = [f"a: try {n} of 3 after exit code 100, in {delay}s\n" for n, delay in ((2, 0.1), (3, 0.15))]
    assert (done.returncode, done.stderr) == (100, "".join(tries))
    assert kinds_of(agent, "a")[-4:] == ["started", "retry", "retry", "failed"]
    done = finish(waiting)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.endswith('error: unit "b" skipped: dependency "a" failed (exit code 100)\n')


def test_a_command_gets_the_whole_socket_path_with_an_agent_or_optionally_without(agent: World) -> None:
    env = {name: value for name, value in agent.env.items() if name != "CODER_AGENT_SOCKET_PATH"}
    words = ["run", "a", "--connect-timeout", "0", "--", "sh", "-c", 'cd /; echo "$CODER_AGENT_SOCKET_PATH"; exit 5']
    done = agent.run("--socket-path", "agent.sock", *words, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (5, f"{agent.path}\n", "")
    done = agent.run("--socket-path", "none", *words, env=env)
    assert (done.returncode, done.stdout) == (3, "")
    done = agent.run("--socket-path", "none", *words[:2], "--optional", *words[2:], env=env)
    assert (done.returncode, done.stdout) == (5, f"{agent.directory}/none\n")
    assert re.fullmatch("warning: a: runs without coordination: .*no such file.*\n", done.stderr)


@LINUX
def test_a_run_whose_unit_others_complete_looks_after_a_service(agent: World) -> None:
    process, pid = held(agent, "a", "--ready", "file:never", "--ready-timeout", "300ms")
    until(lambda: agent.client.status("a").owner.pid == pid)
    agent.ok("complete", "a")
    until(lambda: agent.client.status("a").running_on)
    until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 1, "no thread that probes")
    time.sleep(0.4)  # for longer than it may take to become ready
    assert agent.status("a") == "completed" and process.poll() is None
    os.kill(pid, signal.SIGKILL)
    assert finish(process).returncode == 137
    failed = agent.client.status("a")
    assert failed.status == "failed" and re.fullmatch("died .* after it was ready: killed by signal 9", failed.reason)


def test_a_run_that_may_not_complete_its_unit_ends_its_command(agent: World) -> None:
    process, _ = held(agent, "a", "--ready", f"file:{agent.directory}/up")
    agent.ok("fail", "a", "--reason", "no")
    (agent.directory / "up").touch()
    done = finish(process)
    assert done.returncode == 143
    assert done.stderr.startswith('error: a: unit "a" is failed (no) and cannot become completed: ')
    assert agent.client.status("a").reason == "no"


def test_a_run_whose_unit_others_have_failed_returns_the_status_of_its_command(agent: World) -> None:
    done = agent.run("run", "a", "--", sys.executable, "-IS", str(FILE), "fail", "a", "--reason", "no")
    assert (done.returncode, agent.client.status("a").reason) == (0, "no")
    assert done.stderr.startswith("warning: a: its outcome (exit code 0) may not have been reported: ")


def test_a_signal_to_a_run_before_or_between_its_tries_ends_it(agent: World) -> None:
    probed = agent.directory / "probed"
    before = agent.popen("run", "a", "--ready", f"touch {probed}; sleep 60", "--", "true")
    between = agent.popen("run", "b", "--retry", "5", "--retry-delay", "10m", "--", "false")
    until(probed.exists)
    assert line_of(between.stderr) == "b: try 2 of 6 after exit code 1, in 600s\n"
    for unit, run, reason in (("a", before, "stopped"), ("b", between, "stopped between two tries; exit code 1")):
        done = stopped(run)
        assert (done.returncode, done.stderr) == (143, f"error: {unit}: {reason}\n")
        assert agent.client.status(unit).reason == reason


@pytest.mark.parametrize("first", ["", "coder complete a -q; "], ids=["completed-by-run", "completed-by-itself"])
def test_a_run_does_not_wait_for_what_its_command_leaves(agent: World, first: str) -> None:
    script = f"{first}sleep 60 & echo $!; exec true"
    run = agent.popen("run", "a", "--", "sh", "-c", script, env=agent.shell_env())
    left = int(line_of(run.stdout))
    assert run.wait(PATIENCE) == 0 and agent.status("a") == "completed" and alive(left)
    os.kill(left, signal.SIGKILL)


def test_what_a_killed_run_leaves_is_named_and_not_taken_for_stopped(agent: World) -> None:
    process, pid = held(agent, "a")
    agent.ok("complete", "a")
    until(lambda: agent.client.status("a").running_on and agent.client.status("a").owner.pid == pid)
    killed(process)
    until(lambda: agent.status("a") == "failed")
    reason = agent.client.status("a").reason
    assert re.fullmatch(rf"lost: the run that ran process {pid} \(.*\) ended; that process may still run", reason)
    assert f"{reason} (it does)" in agent.ok("list") and f"(pid {pid})" in agent.run("stop", "a").stderr
    os.kill(pid, signal.SIGKILL)
    until(lambda: f"{reason} (it has ended)" in agent.ok("list"))


@pytest.mark.parametrize(
    ("ready", "what"),
    [([], r"its outcome \(exit code 6\)"), (["--ready", "true"], "its end")],
    ids=["a-command", "a-service"],
)
def test_an_agent_that_goes_away_does_not_disturb_a_running_command(world: World, ready: list[str], what: str) -> None:
    agent = world.serve()
    script = "echo running; read x; echo $x; exit 6"
    process = world.popen("run", "a", *ready, "--", "sh", "-c", script, stdin=subprocess.PIPE)
    assert line_of(process.stdout) == "running\n"
    until(lambda: world.client.status("a").owner.pid != process.pid)
    until(lambda: not ready or world.client.graph().nodes[0].running_on)
    at_rest(process.pid)
    killed(agent)
    at_rest(process.pid)
    out, err = process.communicate("still here\n", timeout=PATIENCE)
    assert (process.returncode, out) == (6, "still here\n")
    assert re.fullmatch(rf"(.*succeeds already.*\n)?warning: a: {what} may not have been reported: .*\n", err)


@pytest.mark.parametrize("dies", ["run", "command", "both", "run-that-waits"])
def test_whoever_is_killed_the_unit_fails_and_who_waits_is_told(agent: World, dies: str) -> None:
    if dies == "run-that-waits":
        process, pid = agent.popen("run", "a", "--want", "never", "--", "true"), 0
        agent.waiting("a")
    else:
        process, pid = held(agent, "a")
        until(lambda: agent.client.status("a").owner.pid == pid)
    waiting = agent.popen("start", "b", "--want", "a")
    agent.waiting("b")
    if dies == "both":
        stop(process)  # so that it cannot report its command's end
    if dies in ("command", "both"):
        os.kill(pid, signal.SIGKILL)
    if dies != "command":
        process.kill()
    done, failed = finish(waiting), agent.client.status("a")
    assert (done.returncode, done.stderr) == (4, f'error: unit "b" skipped: dependency "a" failed ({failed.reason})\n')
    if dies == "command":
        assert (failed.reason, failed.exit_code, finish(process).returncode) == ("killed by signal 9", 137, 137)
    else:
        assert re.fullmatch(lost(process), failed.reason)
    if dies == "run":
        assert alive(pid) and f"the run that ran process {pid} " in failed.reason
        refused = agent.connect().call("boot", units=[{"unit": "a"}])["error"]["message"]
        assert refused == f'unit "a" still runs (pid {pid}), and its supervisor is gone: end that process first'
        os.kill(pid, signal.SIGKILL)


@LINUX
def test_the_command_line_of_a_script_begins_with_its_name(world: World) -> None:
    path = Path(os.path.relpath(world.directory, "/")) / "setup.sh"
    (world.directory / "setup.sh").write_text("read x")
    for line, shown in (
        (f"{path} {'x' * 60}", f"sh setup.sh {'x' * 45}..."),
        ("-c 'read x; : /a/b' /c/d", "sh -c read x; : /a/b /c/d"),
    ):
        process = world.spawn(["sh", *shlex.split(line)], stdin=subprocess.PIPE, cwd="/")
        until(lambda process=process, shown=shown: coder_sync.command_of(process.pid) == shown)


@pytest.mark.parametrize("without", [[], ["pidfd_open", "eventfd"]], ids=["pidfd", "no-pidfd"])
def test_an_owner_that_dies_loses_its_unit_or_its_turn_and_others_do_not(world: World, without: list[str]) -> None:
    changes = f"import os\nfor name in {without}: vars(os).pop(name, 0)"
    agent = answering(world, altered(changes, "serve", "-q"))
    owner, turn, other = (world.spawn(["cat"], stdin=subprocess.PIPE) for _ in range(3))
    world.client.start("kept", pid=other.pid)
    world.client.start("a", pid=owner.pid)
    found = world.client.status("a").owner
    assert found and (found.pid, found.alive) == (owner.pid, True)
    waiting = world.popen("start", "b", "--want", "c", "--pid", str(turn.pid))
    world.waiting("b")
    for one in (owner, turn):
        killed(one)
    with pytest.raises(DependencyFailed, match=lost(owner, "cat")):
        world.client.wait("a", timeout=PATIENCE)
    done = finish(waiting)
    assert done.returncode == 1
    assert 'unit "b" was not started: the process that was to own it has ended' in done.stderr
    world.end("c")
    assert "started" not in kinds_of(world, "b") and world.status("kept") == "started"
    if not without:
        at_rest(agent.pid)


def test_a_pid_that_is_not_alive_is_refused(mixed: World) -> None:
    gone, zombie = mixed.spawn(["true"]), mixed.spawn(["true"])
    finish(gone)
    until(lambda: os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT))
    for process in (gone, zombie):
        with pytest.raises(Refused, match=f"process {process.pid} is not alive in the agent's process namespace"):
            mixed.client.start("never", pid=process.pid)
    assert mixed.status("never") == "not registered"


class Supervisor:
    """A raw connection that has started a unit, and says that it is ready and runs on."""

    def __init__(self, world: World, unit: str, **params: Any) -> None:
        self.peer, self.unit = world.connect(), unit
        assert "result" in self.peer.call("start", unit=unit, supervisor=True, **params)
        assert self.peer.call("complete", unit=unit, running=True)["result"]["status"] == "completed"

    def told(self) -> float:
        """How much time it is given when it is told to stop its unit."""
        message = self.peer.read()
        assert (message["method"], message["params"]["unit"]) == ("stop", self.unit)
        return float(message["params"]["grace"])

    def ended(self) -> None:
        assert "result" in self.peer.call("exited", unit=self.unit, code=143)


def test_stop_has_supervisors_end_what_runs_dependents_first_and_says_what(agent: World) -> None:
    db, app = Supervisor(agent, "db"), Supervisor(agent, "app", dependencies=["db"])
    stopping = agent.popen("stop", "db", "--grace", "1m")
    assert 59 < app.told() <= 60
    with pytest.raises(Refused, match='unit "app" still runs'):
        agent.client.start("app")
    app.ended()
    db.told()
    db.ended()
    done = finish(stopping)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped: app, db\n", "")
    assert agent.client.status("db").reason == "stopped"
    assert (agent.ok("stop"), agent.ok("stop", "-q")) == ("nothing runs\n", "")
    agent.client.start("script")
    done = agent.run("stop", "script")
    cannot = r'unit "script" cannot be stopped: it is .+ \(pid \d+\), which has no supervisor: end that process'
    assert done.returncode == 1 and re.fullmatch(f"error: {cannot}\n", done.stderr)


@pytest.mark.parametrize("how", ["TERM", "shutdown", "replace", "TERM twice"], ids=hyphenated)
def test_an_agent_that_is_to_end_has_its_services_ended_first(world: World, how: str) -> None:
    agent = world.serve(stderr=subprocess.PIPE)
    db, run, soon, waiting = Supervisor(world, "db"), world.connect(), world.connect(), world.connect()
    assert "result" in run.call("start", unit="job", supervisor=True)
    assert "result" in soon.call("start", unit="soon", supervisor=True)
    assert "result" in soon.call("owner", unit="soon", ready="tcp:1")
    waiting.request("start", unit="late", dependencies=["job"])
    words = {"shutdown": ["shutdown"], "replace": ["serve", "--replace"]}.get(how)
    other = world.popen(*words) if words else agent.terminate()
    assert coder_sync.GRACE - 2 < db.told() <= coder_sync.GRACE
    assert soon.read()["params"]["unit"] == "soon"  # a service that is not ready yet
    assert "result" in soon.call("fail", unit="soon")
    assert waiting.read()["error"]["message"] == "the agent is shutting down"
    assert world.client.ping()["pid"] == agent.pid  # it answers questions, but nothing begins
    with pytest.raises(Unreachable, match="the agent is shutting down"):
        world.client.start("new")
    if how == "TERM twice":
        agent.terminate()
        assert db.told() == 0
    db.ended()
    done = finish(agent)
    assert done.returncode == 0 and re.search("stopping db(, soon)?\n", done.stderr)  # unless that ended first
    assert run.read() is None  # nobody has told it to stop
    if other and how == "shutdown":
        assert finish(other).returncode == 0


def test_an_agent_that_is_to_end_tells_all_in_time_and_names_what_is_left(world: World) -> None:
    agent = answering(world, altered("coder_sync.GRACE, coder_sync.STOP_PATIENCE = 0.4, 0.1", "serve"))
    db, app = Supervisor(world, "db"), Supervisor(world, "app", dependencies=["db"])
    done = stopped(agent)
    app.told()
    db.told()
    assert done.returncode == 0 and done.stderr.endswith(" still running: db, app\n"), done


def test_a_command_that_ends_has_all_that_its_units_run_ended(world: World) -> None:
    command = ["sh", "-c", "echo on; read x; exit 3"]
    agent = world.popen("serve", "--socket-path", world.path, "--", *command, stdin=subprocess.PIPE)
    assert line_of(agent.stdout) == "on\n"
    db, run = Supervisor(world, "db"), world.connect()
    assert "result" in run.call("start", unit="job", dependencies=["db"], supervisor=True)
    assert agent.stdin
    agent.stdin.close()
    agent.stdin = None
    assert run.read()["params"]["unit"] == "job"
    assert "result" in run.call("fail", unit="job")
    db.told()
    db.ended()
    assert finish(agent).returncode == 3


@pytest.mark.parametrize("way", ["run u -- cat gate", "boot -q startup.d"], ids=["run", "boot"])
def test_who_holds_a_unit_may_report_and_a_parent_whose_start_was_refused_may_not(
    agent: World, gate: Gate, way: str
) -> None:
    startup(agent, {"u": "cat gate"})
    script = f"coder {way} & echo; read x; coder start u; coder complete u; wait $!"
    shell = agent.spawn(["sh", "-c", script], env=agent.shell_env(), stdin=subprocess.PIPE)
    gate.reached()
    assert shell.stdin
    shell.stdin.write("\n")
    shell.stdin.flush()
    until(lambda: "already started" in line_of(shell.stderr))
    assert "does not count" in line_of(shell.stderr) and agent.status("u") == "started"
    gate.open()
    assert finish(shell).returncode == 0
    assert agent.status("u") == "completed"


@pytest.mark.parametrize(
    ("options", "script", "code"),
    [
        ("--ready file:never", "echo on; exec sleep 60", 143),
        ("--ready file:up", "touch up; echo on; exec sleep 60", 143),
        ("--retry 1 --retry-delay 10m", "echo on; exit 3", 3),
        ("", "trap '' TERM; echo on; while :; do sleep 0.1; done", 137),
        ("", "trap 'exit 0' TERM; echo on; while :; do sleep 0.1; done", 1),
    ],
    ids=["not-ready", "ready", "between-two-tries", "deaf", "ends-well"],
)
def test_a_stop_ends_what_a_run_has_in_whatever_state(agent: World, options: str, script: str, code: int) -> None:
    run = agent.popen("run", "a", *options.split(), "--", "sh", "-c", script)
    assert line_of(run.stdout) == "on\n"
    if "retry" in options:
        assert "try 2 of 2" in line_of(run.stderr)
    if "up" in options:
        until(lambda: agent.status("a") == "completed")
    assert agent.connect().call("stop", units=["a"], grace=1.0)["result"]["stopped"] == ["a"]
    assert finish(run).returncode == code
    found = agent.client.status("a")
    assert (found.status, found.reason) == ("failed", "stopped")


def test_a_run_finds_its_command_in_the_path_that_a_dependency_has_left(agent: World) -> None:
    tools = agent.directory / "tools"
    tools.mkdir()
    (tools / "tool").write_text("#!/bin/sh\necho $0 $1\n")
    agent.ok("run", "pip", "--", "sh", "-c", f'echo "PATH={tools}:$PATH" >> "$CODER_SYNC_ENV"')
    run = ["run", "a", "--want", "pip", "--"]
    assert agent.run(*run, "tool", "x").returncode == 126
    (tools / "tool").chmod(0o755)
    assert agent.ok(*run, "tool", "x") == f"{tools}/tool x\n"
    assert agent.ok(*run, "sh", "-c", "echo sh") == "sh\n"
    missing = agent.run(*run, "echo hi")
    assert missing.returncode == 127 and missing.stderr.endswith("for a shell's command line write sh -c '...'\n")
    agent.popen("run", "b", "--want", "pip", "--ready", "tool x", "--", "sleep", "60")
    until(lambda: agent.status("b") == "completed")


def test_a_time_longer_than_poll_can_wait_is_no_trouble(agent: World, gate: Gate) -> None:
    words = ["run", "a", "--ready", "true", "--ready-timeout", "1000h", "--", "cat", "gate"]
    run = agent.spawn(altered("coder_sync.CHECK_EVERY = 600", *words))  # a service's end is reported at once
    agent.ok("wait", "a", "--ready", "sleep 0.1", "--timeout", "1000h")
    gate.open()
    assert finish(run).returncode == 0


def test_what_says_that_it_is_ready_and_ends_was_ready_whatever_is_seen_first(agent: World) -> None:
    unseen = """
watch = coder_sync.Loop.watch
def unless_probed(loop, fd, handler, for_writing=False):
    if handler.__name__ != "probed":
        watch(loop, fd, handler, for_writing)
coder_sync.Loop.watch = unless_probed"""
    says = "import os, socket; s = socket.socket(1, 2); s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); os._exit(3)"
    done = finish(agent.spawn(altered(unseen, "run", "a", "--ready", "notify", "--", *PYTHON, says)))
    assert (done.returncode, done.stderr) == (3, "")
    assert kinds_of(agent, "a")[-2:] == ["completed", "died"]


# ---------------------------------------------------------------------------------------------------------
# Scripts as people write them, with the file installed as `coder`.
# ---------------------------------------------------------------------------------------------------------

MY_SETUP = """UNIT_NAME="my-setup"
coder exp sync want "$UNIT_NAME" "git-clone"
coder exp sync start "$UNIT_NAME"
echo "Running after git-clone completes"; echo my-setup >> order
coder exp sync complete "$UNIT_NAME"
"""
SYNC_STARTED = """SYNC_STARTED=0
if coder exp sync start "$UNIT_NAME"; then
  SYNC_STARTED=1
fi
cleanup_sync() {
  if [ "$SYNC_STARTED" -eq 1 ]; then
    coder exp sync complete "$UNIT_NAME"
  fi
}
trap cleanup_sync EXIT
"""
COMMAND_V = """if command -v coder > /dev/null 2>&1; then
  coder exp sync start "$UNIT_NAME"
else
  echo "Coder CLI not available, continuing without coordination"
fi
"""


def test_the_scripts_of_the_documents_run_in_parallel_in_the_right_order(agent: World) -> None:
    def script_of(text: str, **env: str) -> subprocess.Popen[str]:
        return agent.spawn(["bash", "-c", text], env={**agent.shell_env(), **env})

    body = 'echo "$UNIT_NAME" >> order\n'
    ide_setup = "coder exp sync want ide-setup git-clone\ncoder exp sync want ide-setup env-setup\n"
    setup, ide = script_of(MY_SETUP), script_of(ide_setup + SYNC_STARTED + body, UNIT_NAME="ide-setup")
    agent.waiting("my-setup", "ide-setup")
    clone = script_of(SYNC_STARTED + body, UNIT_NAME="git-clone")
    env = script_of(COMMAND_V + body + 'coder exp sync complete "$UNIT_NAME"', UNIT_NAME="env-setup")
    for script in (clone, env, setup, ide):
        done = finish(script)
        assert (done.returncode, done.stderr) == (0, "")
    at = {name: n for n, name in enumerate((agent.directory / "order").read_text().split())}
    assert at["git-clone"] < at["my-setup"] and max(at["git-clone"], at["env-setup"]) < at["ide-setup"]
    assert [(u.unit_name, u.status) for u in agent.client.list()] == [(name, "completed") for name in sorted(at)]
    assert agent.shell(MY_SETUP, "bash").stdout.splitlines() == [  # again, with nothing to wait for
        "my-setup: depends on git-clone",
        "my-setup: started; satisfied already: git-clone",
        "Running after git-clone completes",
        "my-setup: completed",
    ]


def test_the_scripts_of_the_documents_end_in_their_trap(mixed: World) -> None:
    done = mixed.shell("UNIT_NAME=trap\n" + SYNC_STARTED + "set -e; false; echo not reached", "bash")
    assert done.returncode == 1 and "not reached" not in done.stdout
    assert mixed.status("trap") == "completed"
    assert mixed.shell("UNIT_NAME=on\n" + SYNC_STARTED, "bash").returncode == 0
    assert mixed.status("on") == "started"  # by somebody else, and left alone


# ---------------------------------------------------------------------------------------------------------
# Install: the plain file and the installed copy, however they are called; how a copy comes to be.
# ---------------------------------------------------------------------------------------------------------


def tool(world: World, form: str = "installed") -> str:
    """The file as somebody may have it in a directory of its own."""
    directory = world.directory / f"{form} tools"
    directory.mkdir(exist_ok=True)
    return str(shutil.copy(FILE if form == "plain" else installed(), directory / "coder"))


def command(world: World, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run any command with this Python as `python3` in PATH."""
    return finish(world.spawn(list(argv), **{"env": world.shell_env(), **options}))


def install(world: World, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return command(world, *program(), "install", *words, **options)


@functools.lru_cache(maxsize=None)
def pythons() -> dict[str, str]:
    """The other Pythons of this machine by version, as 3.08, oldest first."""
    found = {}
    named = [shutil.which(f"python3.{minor}") for minor in range(6, 15)]
    for path in filter(None, [*map(str, Path.home().glob(".pyenv/versions/*/bin/python")), *named]):
        ask = [path, "-c", "import sys; print('%d.%02d' % sys.version_info[:2])"]  # a shim may lead nowhere
        found[subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()] = path
    ours = f"{sys.version_info[0]}.{sys.version_info[1]:02}"
    return {version: found[version] for version in sorted(found) if version not in ("", ours)}


BOTH_FORMS = pytest.mark.parametrize("form", ["plain", "installed"])


@BOTH_FORMS
def test_every_way_of_calling_it_works(shared: World, world: World, form: str) -> None:
    path, python = tool(world, form), os.path.join(os.path.dirname(sys.executable), "python3")
    (world.directory / "link").symlink_to(path)
    (world.directory / "link of a link").symlink_to("link")
    env = {"PATH": world.shell_env()["PATH"], "CODER_AGENT_SOCKET_PATH": shared.path}  # no HOME, for one
    ways = [[path], [python, path], ["./link of a link"], [python, "link"], [os.path.relpath(path, world.directory)]]
    for shell in filter(shutil.which, ("sh", "bash", "dash", "zsh", "busybox")):
        ways.append([str(shutil.which(shell)), *["sh"] * (shell == "busybox"), path])
    name = "a 'b' \"c\" $d `e` \\ * \u00e4"
    for argv in ways:
        done = command(world, *argv, "exp", "sync", "graph", name, env=env)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f'error: no unit "{name}"; see `{os.path.basename(argv[-1])} list --all`\n'
    assert command(world, path, "ping", env={"PATH": "/nowhere"}).returncode == 127
    assert os.listdir(os.path.dirname(path)) == ["coder"]  # nothing is left beside it


@BOTH_FORMS
def test_it_is_not_led_astray_by_what_lies_about(shared: World, world: World, form: str) -> None:
    path = tool(world, form)
    for module in ("json", "socket", "argparse", "threading", "errno", "time", "coder_sync"):
        (world.directory / f"{module}.py").write_text("raise SystemExit(77)")
    planted = os.path.join(os.path.dirname(path), "__pycache__")
    os.mkdir(planted)
    for name in ("coder", "coder_sync"):
        Path(planted, f"{name}.{sys.implementation.cache_tag}.pyc").write_bytes(b"bytecode of somebody else")
    env = {**world.shell_env(), "CODER_AGENT_SOCKET_PATH": shared.path, "PYTHONPATH": str(world.directory)}
    env.update(PYTHONSTARTUP="x", PYTHONINSPECT="1", PYTHONHASHSEED="random")
    for words in (["list", "-o", "json"], ["list", "--help"]):
        done = command(world, path, *words, env=env)
        assert (done.returncode, done.stderr) == (0, "")


@BOTH_FORMS
@LINUX
def test_ps_shows_what_was_called(agent: World, form: str) -> None:
    run = agent.spawn([tool(agent, form), "run", "u", "--", "sleep", "60"], env=agent.shell_env())
    happened(agent, "u", "started")
    assert coder_sync.command_of(run.pid) == "coder run u -- sleep 60"
    assert Path(f"/proc/{run.pid}/comm").read_text() == "coder_sync\n"
    assert len(Path(f"/proc/{run.pid}/cmdline").read_bytes()) < 300


@BOTH_FORMS
@pytest.mark.parametrize("line", ["want a b", "list"], ids=["above-the-cut", "below-the-cut"])
def test_an_error_names_its_line(world: World, form: str, line: str) -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines(keepends=True)
    function = f"cmd_{line.split(maxsplit=1)[0]}"
    at = next(n for n, text in enumerate(lines) if text.startswith(f"def {function}(")) + 2
    lines[at] = "    raise RuntimeError('on purpose')\n"
    path = world.directory / "coder"
    path.write_text("".join(lines), encoding="utf-8")
    path.chmod(0o755)
    assert form == "plain" or command(world, sys.executable, str(path), "install").returncode == 0
    done = command(world, str(path), *line.split(), env={**world.shell_env(), "CODER_SYNC_DEBUG": "1"})
    assert f"line {at + 1}, in {function}\n" in done.stderr


HOOK = """
import builtins, marshal, os, signal
def hook(module, name):
    function = getattr(module, name)
    def then(*words):
        setattr(module, name, function)
        half = function(*words)
        os.kill(os.getpid(), signal.SIGINT)
        return half
    setattr(module, name, then)
hook(builtins, "compile")
hook(marshal, "loads")
"""  # a signal as soon as something has been loaded


@BOTH_FORMS
def test_ctrl_c_while_it_loads_ends_it_without_a_word(world: World, form: str) -> None:
    argv = [*PYTHON, HOOK + LAUNCH, tool(world, form), "--version"]
    done = command(world, *argv)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    done = command(world, *argv, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as nohup does
    assert (done.returncode, done.stdout) == (0, f"coder_sync {coder_sync.__version__}\n")


@NAMESPACES
@BOTH_FORMS
def test_a_signal_ends_process_1_while_it_loads(world: World, form: str) -> None:
    done = command(world, *UNSHARE, *PYTHON, HOOK.replace("SIGINT", "SIGTERM") + LAUNCH, tool(world, form), "serve")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@BOTH_FORMS
def test_garbage_is_collected_by_all_but_plain_calls(shared: World, world: World, form: str) -> None:
    spy = "import gc, posix; end = posix._exit; posix._exit = lambda code: end(50 + gc.isenabled())\n"
    env = {**world.shell_env(), "CODER_AGENT_SOCKET_PATH": shared.path}
    for words, code in ((["--version"], 51), (["complete", "nobody"], 50)):
        assert command(world, *PYTHON, spy + LAUNCH, tool(world, form), *words, env=env).returncode == code


@BOTH_FORMS
def test_a_damaged_file_is_said_to_be_one_in_one_line(world: World, form: str) -> None:
    path = Path(tool(world, form))
    whole = path.read_bytes()
    for size in (300, 8192, whole.index(b"\n# Client. ") - 1, whole.rindex(b"\ndef ")):
        if form == "plain" or size < 10_000:
            path.write_bytes(whole[:size])
            done = command(world, str(path), "list")
            assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "internal" not in done.stderr, size
    for at in (len(whole) // 8, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes(4096) + whole[at + 4096 :])
        done = command(world, str(path), "list", "--connect-timeout", "0")
        said = "cannot reach an agent" if form == "installed" else "is damaged: copy or install it again\n"
        assert said in done.stderr and done.stderr.count("\n") == 1  # an installed one has its source


def test_other_users_call_it_and_may_write_nothing(world: World) -> None:
    python, become = shutil.which("python3", path="/usr/bin:/bin"), ["setpriv", "--reuid=65534", "--clear-groups"]
    if os.getuid() or not python or not shutil.which("setpriv"):
        pytest.skip("only root can become somebody else")
    with open_directory() as directory:
        shutil.copy(FILE, f"{directory}/plain")
        assert install(world, f"{directory}/copy").returncode == 0
        for path in (f"{directory}/plain", f"{directory}/copy"):
            script = f"{path} serve -- {path} run x -- echo ran; {python} {path} --version"
            done = command(world, *become, "sh", "-c", script, env={"PATH": "/usr/bin:/bin"}, cwd="/")
            assert (done.stdout, done.stderr) == (f"ran\ncoder_sync {coder_sync.__version__}\n", "")
        done = command(world, *become, python, f"{directory}/plain", "install", env={}, cwd="/")
        assert done.returncode == 1 and "Permission denied; nothing was changed" in done.stderr
        assert sorted(os.listdir(directory)) == ["copy", "plain"]


def test_the_copy_is_an_archive_with_the_source_as_it_was_and_imported_from_as_any(agent: World) -> None:
    path = tool(agent)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("coder_sync.py") == FILE.read_bytes()
    env = {**agent.shell_env(), "PYTHONPATH": path}
    code = "import coder_sync as c; print(c.Client().ping()['pid'] > 0, c.Units.__doc__ > '', c.PROGRAM)"
    assert command(agent, sys.executable, "-c", code, env=env).stdout == "True True coder\n"
    assert command(agent, sys.executable, "-m", "coder_sync", "ping", env=env).stdout.startswith("agent at ")


def test_the_same_input_gives_the_same_copy(world: World) -> None:
    copy = world.directory / "copy"
    for source, seed in ((FILE, "1"), (copy, "2")):
        env = {**world.shell_env(), "PYTHONHASHSEED": seed}
        done = command(world, sys.executable, str(source), "install", str(copy), env=env)
        assert (done.returncode, done.stdout) == (0, f"{copy}: installed for {sys.executable}\n")
        assert copy.read_bytes() == installed().read_bytes()


@LINUX
def test_the_path_of_the_python_may_be_any(world: World) -> None:
    python = str(world.directory / "it's \udcff")
    os.symlink(sys.executable, python)
    assert install(world, "--python", python, "copy", errors="replace").returncode == 0
    assert command(world, "./copy", "--version").stdout == f"coder_sync {coder_sync.__version__}\n"


def test_another_python_runs_it_from_the_source_and_serve_says_so_once(world: World) -> None:
    others = [path for version, path in pythons().items() if "3.08" <= version < "3.14"]
    if not others:
        pytest.skip("there is no other Python")
    path, python = tool(world), others[-1]

    def said(*argv: str, verbose: str = "-v") -> int:
        done = command(world, *argv, "serve", *verbose.split(), "--", "true")
        assert done.returncode == 0
        return done.stderr.count("`coder install` would make every call faster")

    assert [said(path), said(python, path), said(sys.executable, tool(world, "plain"))] == [0, 1, 1]
    assert said(python, path, verbose="") == 0
    done = command(world, path, "install", "--python", python)
    assert (done.returncode, done.stdout) == (0, f"{path}: installed for {python}\n")
    assert [said(path), said(python, path)] == [0, 0]


def test_too_old_a_python_is_told_which_is_needed(world: World) -> None:
    old = [path for version, path in pythons().items() if version < "3.08"]
    if not old:
        pytest.skip("there is no old Python")
    plain = command(world, old[0], str(FILE), "ping")
    assert plain.returncode == 1 and '(NEEDED := "Python 3.8 or later")' in plain.stderr
    copy = command(world, old[0], tool(world), "ping")
    assert copy.returncode == 1 and copy.stderr.startswith("error: coder_sync needs Python 3.8 or later, and this")
    assert copy.stderr.count("\n") == 1
    done = install(world, "--python", old[0], "copy")
    assert done.returncode == 1 and "cannot run coder_sync, which needs Python 3.8 or later" in done.stderr
    assert not (world.directory / "copy").exists()


def test_install_keeps_mode_and_owner_follows_links_and_replaces_in_one_step(world: World) -> None:
    for before, after in ((0o640, 0o750), (0o600, 0o700)):
        real, link = world.directory / f"real-{before:o}", world.directory / f"link-{before:o}"
        shutil.copy(FILE, real)
        real.chmod(before)
        if os.getuid() == 0:
            os.chown(real, 65534, 65534)
        link.symlink_to(real.name)
        with real.open("rb") as opened:
            old = os.fstat(opened.fileno())
            assert command(world, sys.executable, str(link), "install").returncode == 0  # in place
            assert opened.read() == FILE.read_bytes()  # whoever reads goes on reading the old one
        now = link.stat()
        assert (stat.S_IMODE(now.st_mode), now.st_uid, now.st_gid) == (after, old.st_uid, old.st_gid)
        assert link.is_symlink() and link.read_bytes() == installed().read_bytes()
    for umask, mode in ((0o027, 0o750), (0, 0o755)):
        name = f"new-{umask:o}"
        assert install(world, name, preexec_fn=lambda umask=umask: os.umask(umask)).returncode == 0
        assert stat.S_IMODE((world.directory / name).stat().st_mode) == mode


OURS = "#!/bin/sh\n# coder_sync of our own\nexec /opt/coder_sync.py serve\n"
NEEDS = "cannot run coder_sync, which needs Python 3.8 or later: damaged"
TROUBLES: dict[str, tuple[str, str, Any]] = {  # words, what is said, what is in the way: a text, or what makes it
    "directory": ("there", "a directory is there", os.mkdir),
    "fifo": ("there", "no regular file is there", os.mkfifo),
    "no-directory": ("/nowhere/coder", "No such file or directory; nothing was changed", None),
    "full-disk": ("there", "File too large; nothing was changed", FILE.read_text(encoding="utf-8")),
    "another-program": ("there", "another program is there; remove it first", "old"),
    "a-script-that-calls-it": ("there", "another program is there", OURS),
    "no-python": ("new --python ./there", "cannot run", None),
    "broken-python": ("new --python ./there", NEEDS, "#!/bin/sh\necho damaged >&2; exit 1\n"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_keeps_install_from_its_work_is_said_in_one_line(world: World, trouble: str) -> None:
    def files() -> list[tuple[Path, object]]:
        return sorted((path, path.is_file() and path.read_bytes()) for path in world.directory.rglob("*"))

    def limit() -> None:
        size = installed().stat().st_size - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    words, complaint, what = TROUBLES[trouble]
    there = world.directory / "there"
    if callable(what):
        what(there)
    elif what:
        there.write_text(what, encoding="utf-8")
        there.chmod(0o755)
    world.shell_env()
    before = files()
    done = install(world, *words.split(), preexec_fn=limit if trouble == "full-disk" else None)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ") and complaint in done.stderr
    assert files() == before


def test_install_warns_when_calls_would_start_another_python(world: World) -> None:
    python, script = world.directory / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    env = {**world.shell_env(), "PATH": str(world.directory)}
    for text, words, warned in (
        (script, [], False),
        ("#!/bin/sh\necho cpython-30\n", [], True),
        ("", [], True),
        ("", ["--python", sys.executable], False),
    ):
        python.write_text(text)
        python.chmod(0o755 if text else 0o644)
        done = install(world, *words, "copy", env=env)
        assert (done.returncode, done.stderr.count("\n")) == (0, warned), text
        assert not warned or done.stderr.endswith(f"; if it is to be this one: --python {sys.executable}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_install_that_is_stopped_leaves_nothing(world: World, number: int) -> None:
    python, tried = world.directory / "python", world.directory / "tried"
    python.write_text(f'#!/bin/sh\n[ $1 != -IS ] || {{ : > {tried}; exec sleep 60; }}; exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    process = world.popen("install", "--python", str(python), "copy")
    until(tried.exists)
    assert len(os.listdir(world.directory)) == 3  # with the copy that is tried
    assert stopped(process, number).returncode == 128 + number
    assert set(os.listdir(world.directory)) == {"python", "tried"}


def test_calls_see_the_old_copy_or_the_new_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path, beside, source = tool(world), world.directory / "beside", world.directory / "newer.py"
    version = f'__version__ = "{coder_sync.__version__}"'
    source.write_text(FILE.read_text(encoding="utf-8").replace(version, '__version__ = "99"' + " # longer" * 999))
    monkeypatch.setattr(coder_sync, "FILE", str(source))
    monkeypatch.setattr(coder_sync, "__version__", "99")
    copies = itertools.cycle([coder_sync.application(""), installed().read_bytes()])
    loop = "for i in 1 2 3 4 5 6 7 8; do %s --version || exit; done"
    calls = [world.spawn(["sh", "-c", loop % c], env=world.shell_env()) for c in (f"'{path}'", f"python3 '{path}'")]
    while any(process.poll() is None for process in calls):
        beside.write_bytes(next(copies))
        beside.chmod(0o755)
        os.rename(beside, path)  # as install does
        time.sleep(0.01)  # so that calls get on
    for process in calls:
        done = finish(process)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"(coder_sync (0\.\d+\.\d+|99)\n){8}", done.stdout)


ABOVE = """
$ want b a -q ->
$ start a --want c --requires completion -t 10ms -> ...
...
exit 124
$ start c; complete c --exit-code 3; start a; complete a -> ...
$ complete a --exit-code 1 -> 1: ...
$ fail b --reason x -> ...
$ start d --want b -> 4: ...
$ complete e -> 1: ...
"""


def test_what_is_above_the_cut_is_all_that_its_commands_need(call: Call, agent: World) -> None:
    text = FILE.read_text(encoding="utf-8").partition("\n# Client. ")[0]
    above = compile(text, "above", "exec", dont_inherit=True)
    defined: dict[str, Any] = {"__name__": "above", "__file__": str(FILE)}
    exec(above, defined)
    missing, todo = set(), [above]
    for code in todo:
        todo += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        missing |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"} - defined.keys()
    assert missing <= vars(builtins).keys()
    call.main = defined["main"]
    play(call, agent, ABOVE)


# ---------------------------------------------------------------------------------------------------------
# Python: Client.
# ---------------------------------------------------------------------------------------------------------


def test_calls_return_typed_results(agent: World) -> None:
    client = agent.client
    assert client.ping()["version"] == coder_sync.__version__
    assert (client.want("a", "b"), client.want("a", "c")) == (["b"], ["b", "c"])
    assert client.declare("a", "c") == {"unit": "a", "dependencies": ["b", "c"], "status": "pending"}
    started = client.start("b")
    assert (started.unit, started.dependencies, started.waited >= 0) == ("b", [], True)
    client.complete("b")
    status = client.status("a")
    assert (status.unit_name, status.status, status.is_ready, status.exit_code) == ("a", "pending", False, None)
    assert (status.waiting, status.ready, status.started, status.ended, status.exited) == (None,) * 5
    rows = [(d.depends_on, d.is_satisfied, d.requirement) for d in status.dependencies]
    assert rows == [("b", True, "success"), ("c", False, "success")]
    assert [u.unit_name for u in client.list()] == ["a", "b"]
    assert [u.unit_name for u in client.list(everything=True)] == ["a", "b", "c"]
    assert client.wait("b") < PATIENCE
    assert [(e.unit, e.kind) for e in client.events()][:2] == [("a", "registered"), ("a", "wants")]
    calls: list[Any] = []

    def on_wait(missing: list[Dependency], waited: float) -> None:
        calls.append(([d.depends_on for d in missing], round(waited)))
        agent.end("c")

    client.start("a", on_wait=on_wait)
    assert calls == [(["c"], 0)]


def test_status_says_what_a_misspelt_dependency_may_mean(agent: World) -> None:
    agent.client.want("git-clone", "network")
    agent.client.want("ide", "git_clone")
    assert agent.client.status("ide").dependencies[0].did_you_mean == "git-clone"


ERRORS: list[tuple[type, int, Callable[[Client], Any], str]] = [
    (AlreadyStarted, 1, lambda client: client.start("on"), "already started"),
    (CycleError, 1, lambda client: client.want("a", "a"), "a -> a"),
    (NotRegistered, 1, lambda client: client.complete("nobody"), "nobody"),
    (Refused, 1, lambda client: client.want("", "a"), "empty"),
    (Refused, 1, lambda client: client.want("big", *[f"{i:0250}" for i in range(300)]), "too much"),
    (TimedOut, 124, lambda client: client.wait("nobody", timeout=0.01), "timeout waiting for .*nobody not registered"),
    (DependencyFailed, 4, lambda client: client.wait("bad"), "no disk"),
    (Unreachable, 3, lambda client: Client("/nowhere", 0).ping(), "/nowhere"),
    (UsageError, 2, lambda client: coder_sync.duration("x"), "x"),
]


def test_an_error_is_an_exception_of_its_own_and_says_what_it_is_about(mixed: World) -> None:
    before = mixed.client.list(everything=True)
    for kind, code, call, about in ERRORS:
        with pytest.raises(coder_sync.SyncError, match=about) as caught:
            call(mixed.client)
        assert (type(caught.value), caught.value.exit_code) == (kind, code)
        if isinstance(caught.value, DependencyFailed):
            assert (caught.value.unit, caught.value.reason) == ("bad", "no disk")  # type: ignore[attr-defined]
    assert len(mixed.client.list(everything=True)) == len(before)
    with pytest.raises(TimedOut) as late:
        mixed.client.start("late", want=["b-late", "c-late"], timeout=0.01)
    rows = [(d.depends_on, d.current_status) for d in late.value.data]
    assert rows == [("b-late", "not registered"), ("c-late", "not registered")]
    with pytest.raises(DependencyFailed), mixed.client.unit("block", want=["bad"]):
        pytest.fail("entered")


def test_every_exception_of_the_readme_can_be_imported_by_a_star() -> None:
    kinds = [name for name in dir(coder_sync) if isinstance(getattr(coder_sync, name), type)]
    errors = [name for name in kinds if issubclass(getattr(coder_sync, name), coder_sync.SyncError)]
    assert {"TimedOut", "DependencyFailed"} <= set(re.findall(r"\w+", README)) & set(errors) <= set(coder_sync.__all__)


ENDINGS: list[tuple[Any, str, str, int | None]] = [
    (None, "completed", "", 0),
    (ZeroDivisionError("no\nway"), "failed", "ZeroDivisionError: no way", None),
    (KeyboardInterrupt(), "failed", "KeyboardInterrupt", None),
    (RuntimeError("x" * 100_000), "failed", "RuntimeError: x+[.]{3}", None),
    (SystemExit(3), "failed", "exit code 3", 3),
    (SystemExit(True), "failed", "exit code 1", 1),
    (SystemExit("no disk"), "failed", ".*no disk", None),
    (SystemExit(0), "completed", "", 0),
    (SystemExit(None), "completed", "", 0),
]


def test_a_unit_ends_as_its_block_does(mixed: World) -> None:
    for n, (error, status, reason, code) in enumerate(ENDINGS):
        ending = pytest.raises(type(error)) if error else contextlib.nullcontext()
        with ending, mixed.client.unit(f"block-{n}") as start:
            assert (start.result.unit, mixed.status(f"block-{n}")) == (f"block-{n}", "started")
            if error:
                raise error
        ended = mixed.client.status(f"block-{n}")
        assert (ended.status, ended.exit_code) == (status, code) and re.fullmatch(reason, ended.reason)
    with mixed.client.unit("within"):
        mixed.client.complete("within")
    assert mixed.status("within") == "completed"


@pytest.mark.parametrize("kind", [ZeroDivisionError, Unreachable])
def test_an_exception_of_a_block_matters_more_than_that_its_agent_is_gone(world: World, kind: type) -> None:
    agent = world.serve()
    with pytest.raises(kind), world.client.unit("u"):
        assert stopped(agent, signal.SIGKILL) and (kind is Unreachable or 1 / 0)


BAD_ARGUMENTS: list[tuple[type, dict[str, Any]]] = [
    (TypeError, {"want": "database"}),  # not eight units of one letter
    (TypeError, {"locks": "apt"}),
    (InvalidParams, {"want": [1]}),
    (Refused, {"want": ["x"], "requires": "luck"}),
    (TypeError, {"want": ["x"], "timeout": "soon"}),
    (ValueError, {"want": ["x"], "timeout": -1}),
    (InvalidParams, {"want": ["x"], "timeout": True}),
    (ValueError, {"want": ["x"], "timeout": float("nan")}),
    (InvalidParams, {"unit": None}),
    (Refused, {"unit": ""}),
]


def test_a_bad_argument_is_refused_before_anything_is_registered(mixed: World) -> None:
    before = [unit.unit_name for unit in mixed.client.list(everything=True)]
    for kind, bad in BAD_ARGUMENTS:
        arguments = {"unit": "never", "timeout": 0.1, **bad}
        with pytest.raises(kind):
            mixed.client.start(**arguments)
        with pytest.raises(kind):
            mixed.client.unit(**arguments).__enter__()
    with pytest.raises(InvalidParams):
        mixed.client.start("never", pid="me")  # type: ignore[arg-type]
    assert [unit.unit_name for unit in mixed.client.list(everything=True)] == before


def test_a_client_may_be_used_from_many_threads(agent: World) -> None:
    client = Client(agent.path, 5)

    def work(n: int) -> None:
        with client.unit(f"t{n}", want=[f"t{n - 1}"] if n else [], timeout=PATIENCE):
            pass

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        list(pool.map(work, reversed(range(40))))
    assert [u.status for u in client.list()] == ["completed"] * 40


# ---------------------------------------------------------------------------------------------------------
# Views: startups written down as what each unit did when, and their pictures as expected; then what is true of the
# pictures of any startup.
# ---------------------------------------------------------------------------------------------------------


def unit(name: str, asked: Any = None, started: Any = None, ended: Any = None, wants: Any = (), **more: Any) -> Any:
    """A unit that was asked for, started and ended then, if ever; `wants` are names, or a dict with requirements."""
    status = "completed" if ended is not None else "started" if started is not None else "pending"
    since = min((t for t in (asked, started, ended) if t is not None), default=0)
    wants = wants if isinstance(wants, dict) else dict.fromkeys(wants, "success")
    fields = {"status": status, "is_ready": True, "registered": since, "waiting": asked, **more}
    fields["is_waiting"] = fields.get("is_waiting", fields["status"] == "pending" and asked is not None)
    for key in ("registered", "waiting", "ready", "exited"):
        fields[key] = None if fields.get(key) is None else float(fields[key])
    started, ended = (None if t is None else float(t) for t in (started, ended))
    return UnitStatus(name, started=started, ended=ended, wants=wants, **fields)


def startup_of(now: float, *units: UnitStatus) -> Graph:
    """A startup seen at `now`; names that are only wanted are not registered."""
    nodes = {one.unit_name: one for one in units}
    for one in units:
        died = one.exited if one.status == "failed" else None
        one.age = now - max(one.waiting or 0, one.started or 0, one.ended or 0, died or 0)
        for name in sorted(name for name in one.wants if name not in nodes):
            nodes[name] = UnitStatus(name, "not registered", False)
    return Graph(float(now), list(nodes.values()))


HOSTILE = "\"q\" 'x' [a] (b) {c} <script>&amp; \\n \\ #35; ; --> | %% `y`"
WAS_UP = "died 1m10s after it was ready: exit code 1"
MAY_RUN = "lost: the boot that ran process 43 ended; that process may still run"
STARTUPS = {
    "nothing": startup_of(7),
    "good": startup_of(
        252,
        unit("apt", 0, 0, 125, owner=Owner(41, "bash apt.sh")),
        unit("clone", 0, 0, 12),
        unit("db", 0, 0.5, 32),
        unit("pip", 0, 125, 252, ["apt"], released_by="apt"),
    ),
    "later": startup_of(
        282, unit("apt", 0, 0, 125), unit("lint", 0, 0, 20), unit("db", 0, 0, 31), unit("pip", 0, 125, 282, ["apt"])
    ),
    "broken": startup_of(
        30,
        unit("base", 0, 0, 10, owner=Owner(7, "bash base.sh")),
        unit("web", 0, 10, None, ["base"], released_by="base", owner=Owner(42, "bash web.sh", True)),
        unit("lint", 0, None, None, ["gone"], is_waiting=False),
        unit("cache", 0, 0, None, {"base": "start"}),
        unit("data", 10, 10, 15, status="failed", reason="disk full", exit_code=2),
        unit("report", 10, None, 15, ["data"], status="skipped", reason='dependency "data" failed (disk full)'),
        unit("mail", 10, None, 15, ["report", "web"], status="skipped", reason='dependency "report" was skipped'),
        unit("slow", 15, None, None, ["web"]),
        unit("idle", None, None, None, ["web"], registered=15),
    ),
    "before": startup_of(
        19,
        unit("base", 0, 0, 10),
        unit("web", 0, 10),
        unit("data", 0, 0, 15),
        unit("slow", 1, None, 15, status="failed"),
    ),
    "services": startup_of(  # locks, tries, and processes that run on, or did
        160,
        unit("apt-base", 0, 0, 40, ready=0, locks=["apt"]),
        unit("apt-tools", 0, 40, 60, ready=0, locks=["apt"], released_by="apt-base"),
        unit("clone", 0, 0, 40, tries=[10.0, 25.0]),
        unit("db", 0, 0, 20, running_on=True, owner=Owner(42, "postgres -D /data", True)),
        unit("proxy", 0, 1, 10, ["gate"], status="failed", exited=80, exit_reason="exit code 1", reason=WAS_UP),
        unit("gate", 0, 0, 1, exited=30),
        unit("ends", 0, 0, stopping=True),
        unit("cache", 0, 0, 1, status="failed", exited=100, exit_reason="stopped", reason="stopped"),
        unit("q", 0, 0, 1, status="failed", exited=90, exit_reason="lost", reason=MAY_RUN, owner=Owner(43, "", True)),
        unit("tools", 0, 60, 100, ["apt-tools"], released_by="apt-tools", tries=[90.0], log="/logs/tools.log"),
        unit("ide", 0, 100, None, ["tools"], released_by="tools", locks=["port"], owner=Owner(77, "")),
        unit("shell", 10, None, None, ["db"], ready=20, locks=["port"], blocked_by={"port": "ide"}),
        unit("web", 0, 100, reason="not ready yet: tcp:80", probe="tcp:80", probe_error="no route", tries=[156.0]),
        unit("site", 0, None, None, ["web"], waits_for=["web"]),
        unit("up", 0, 90, probe="file:up"),
    ),
    "edges": startup_of(  # bounds of what is shown, and a start a second after the first sign
        10,
        unit("<a>", 1, 1, 4, registered=0, ready=1, tries=[2.0, 3.5], locks=["l"]),
        unit("b", 1, 4, 9, {"<a>": "completion", "c": "success"}, ready=1.5, locks=["l", "m"], released_by="<a>"),
        unit("c", 2, 2.0009, 2.0009, status="failed", reason='say "&"'),
        unit("d", 2, None, 3, {"c": "start"}, status="skipped", reason="c", log="/d.log"),
        unit("f", 9, 9, None, {"b": "start"}, released_by="b", running_on=True),
    ),
    "it began before that ended": startup_of(30, unit("a", 0, 0, 20), unit("b", 0, 5, 30, {"a": "start"})),
    "by way of what was skipped": startup_of(
        61,
        unit("base", 0, 0, 60, status="failed"),
        unit("middle", None, None, 60, ["base"], status="skipped"),
        unit("report", 0, 60, 61, {"middle": "completion"}, released_by="middle"),
    ),
    "a long path": startup_of(
        66, *(unit(f"u{i}", 0, i * (i - 1) / 2, i * (i + 1) / 2, released_by=f"u{i - 1}") for i in range(1, 13))
    ),
    "odd ends": startup_of(
        185,
        unit("its dependency was never started", 0, wants={"never started": "start"}),
        unit("never started", registered=0),
        unit("its process is gone", 0, 0, owner=Owner(42, "bash a.sh", False)),
        unit("its cause has gone", None, None, 9, ["hardly waited"], status="skipped", reason="b failed"),
        unit("completed without a start", None, None, 180),
        unit("ran and failed", 0, 0, 2, ["hardly waited"], status="failed"),
        unit("hardly waited", 0, 0.04, None, ["gate"], released_by="gate"),
        UnitStatus("refused", "not registered", False, refusal="cycle detected: a -> b -> a"),
        unit("refused later", refusal="cycle detected: a -> b -> a"),
        unit("timed out", 0, None, 5, ["gate"], status="failed", reason="timed out waiting for gate"),
        unit("finds no place", 0),
        unit("is tried again", 0, 0, tries=[5.0]),
        unit("misspelt", 0, wants=["b_setup", "zzz"]),
        unit("b-setup", registered=0),
    ),
    "it has run for 30 s": startup_of(31, unit("a", 0, 1)),
    "it was over long ago": startup_of(
        3600, unit("a", 0, 0, 9), unit("b", 0, 0, 2, running_on=True), unit("c", 0, 0, 1, exited=5)
    ),
    "wide names": startup_of(
        *(12, unit("环境", 0, 0), unit("e\u0301tape", 0, 0, 9, status="failed", reason="no disk"), unit("b", 0, 0)),
        unit("tâche", 0, wants=["b"], waits_for=["b", "lock x"]),
    ),
    "all that status shows": startup_of(
        9,
        unit(
            *("c", 0),
            **{"tries": [1.0], "locks": ["x", "y"], "log": "/c.log", "waits_for": ["b", "lock x"], "reason": "why"},
            **{"owner": GONE, "refusal": "a cycle", "did_you_mean": "b"},
            dependencies=[coder_sync.Dependency("b", "completed", "started", False, reason="slow")],
            history=[coder_sync.Event(3, 5.0, 0, "c", "registered"), coder_sync.Event(9, 6.5, 0, "c", "wants", "b")],
        ),
        unit("alone", waits_for=["nobody yet"]),
    ),
}


def svg_of(graph: Graph) -> ElementTree.Element:
    """The picture, parsed; tags without their namespace."""
    root = ElementTree.fromstring(coder_sync.timeline_svg(graph))
    for element in root.iter():
        assert element.tag.startswith("{http://www.w3.org/2000/svg}")
        element.tag = element.tag.rpartition("}")[2]
    return root


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name, "nan"))


def elements(parent: ElementTree.Element) -> str:
    """What a picture has: rectangles by class and place, paths, texts, and a line a unit behind what is said of it."""
    lines = [""]
    for one in parent:
        get, what = one.get, f"{one.get('class', '')} {one.get('x', '')},{one.get('y', '')}"
        if one.tag == "rect":
            lines[-1] += f"; {what} {get('width')}x{get('height')}"
        elif one.tag in ("path", "text"):
            lines[-1] += f"; {get('class', '')} {get('d')}" if one.tag == "path" else f"; {what} {one.text}"
        elif one.tag == "g":
            lines += [" / ".join((one.findtext("title") or "").split("\n")), f"    {elements(one)}", ""]
    return "\n".join(line.lstrip("; ") if line[:1] == ";" else line for line in lines if line)


def saved(graph: Graph) -> coder_sync.Startup:
    return coder_sync.read_timeline(coder_sync.timeline_as("json", graph), "t.json")


VIEWS: dict[str, Callable[..., str]] = {
    "timeline": lambda graph, width: coder_sync.timeline_text(graph, int(width)),
    "summary": lambda graph: coder_sync.Startup(graph).summary() + "\n",
    "blame": lambda graph, width: coder_sync.blame_text(graph, int(width)),
    "compare": lambda graph, before: coder_sync.compare_text(saved(STARTUPS[before]), coder_sync.Startup(graph)),
    "tree": coder_sync.graph_tree,
    "dot": coder_sync.graph_dot,
    "mermaid": coder_sync.graph_mermaid,
    "svg": lambda graph: elements(svg_of(graph)) + "\n",
    "why": lambda graph, names="": coder_sync.why_text(graph, [name for name in names.split(", ") if name]),
    "list": lambda graph, columns="": coder_sync.list_text(graph.nodes, columns),
    "status": lambda graph, name: coder_sync.status_text(next(u for u in graph.nodes if u.unit_name == name)),
}
TEXTS = """
? timeline: broken: 60
         0         10s        20s
* base   ███████████                          10s completed
  cache  ████████████████████████████████     30s running
  data             ██████                    5.0s failed
* web    ░░░░░░░░░░██████████████████████     20s running
  lint   ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░     30s gave up
  mail             ░░░░░░                    5.0s skipped
  report           ░░░░░░                    5.0s skipped
  idle                                          - pending
  slow                   ░░░░░░░░░░░░░░░░     15s waiting

30s in all (1 failed, 2 skipped, 2 still running, 3 not
started); critical path: base 10s -> web 20s (100% of it)
? timeline: services: 74
            0            1m00s         2m00s
* apt-base  █████████                                 40s completed
  cache     █──────────────────────                  1.0s stopped at 1m40s
  clone     ██│██│███                                 40s completed
  db        █████────────────────────────────────     20s running on
  ends      █████████████████████████████████████   2m40s stopping
  gate      █──────                                  1.0s exited at 30s
  q         █────────────────────                    1.0s lost at 1m30s
  proxy     ██────────────────                       9.0s died at 1m20s
* apt-tools ▒▒▒▒▒▒▒▒▒█████                            20s completed
* tools     ░░░░░░░░░░░░░███████│██                   40s completed
  up        ░░░░░░░░░░░░░░░░░░░░█████████████████   1m10s probing
* ide       ░░░░░░░░░░░░░░░░░░░░░░░██████████████   1m00s running
  web       ░░░░░░░░░░░░░░░░░░░░░░░█████████████│   1m00s probing
  site      ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░   2m40s waiting
  shell       ░░▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒   2m30s waiting

─ runs on as a service, ▒ waits for a lock, │ another try
2m40s in all (1 died, 1 stopped, 1 lost, 4 still running, 2 not started);
critical path: apt-base 40s -> apt-tools 20s -> tools 40s -> ide 1m00s
(100% of it)
? timeline: nothing: 40
no units yet
? summary: it began before that ended
30s in all; critical path: b 25s (83% of it)
? summary: by way of what was skipped
1m01s in all (1 failed, 1 skipped); critical path: base 1m00s -> report 1.0s (100% of it)
? summary: a long path
1m18s in all; critical path: ... -> u3 3.0s -> u4 4.0s -> u5 5.0s -> u6 6.0s -> u7 7.0s -> u8 8.0s -> u9 9.0s -> u10 \
10s -> u11 11s -> u12 12s (100% of it)
? summary: it was over long ago
9.0s in all; critical path: a 9.0s (100% of it)
? blame: edges: 80
by how long they ran:
UNIT  RAN   OTHERS WAITED  STATUS
b     5.0s  0ms            completed
<a>   3.0s  500ms          completed
f     1.0s  0ms            started

by how long others waited for them:
UNIT  RAN   OTHERS WAITED  STATUS
<a>   3.0s  500ms          completed
c     0ms   500ms          failed

OTHERS WAITED adds up over all that waited, so it may exceed the whole.

10s in all (1 failed, 1 skipped, 1 still running); critical path: <a> 3.0s -> b
5.0s -> f 1.0s (90% of it)
? compare: later: good
UNIT   BEFORE  NOW    CHANGE  CRITICAL PATH
pip    2m07s   2m37s  +30s    before and now
lint   -       20s    came
clone  12s     -      went
db     32s     31s    -500ms
apt    2m05s   2m05s  0       before and now

4m12s in all before, 4m42s now: +30s
? compare: broken: before
UNIT    BEFORE        NOW          CHANGE  CRITICAL PATH
cache   -             30s started  -
data    15s           5.0s failed  -
idle    -             pending      -
lint    -             pending      -
mail    -             skipped      -
report  -             skipped      -
slow    failed        pending      -
web     9.0s started  20s started  -       before and now
base    10s           10s          0       now

19s in all before, 30s now: not every unit completed
? tree: broken
lint (pending)
└── gone (not registered)
cache (started)
└── base (completed)
mail (skipped: dependency "report" was skipped)
├── report (skipped: dependency "data" failed (disk full))
│   └── data (failed: disk full)
└── web (started)
    └── base (completed)
slow (pending)
└── web (see above)
idle (pending)
└── web (see above)
? tree: nothing
no units yet
? dot: edges
digraph startup {
  rankdir=LR; node [shape=box, style=filled];
  "<a>" [fillcolor="#bfe8c8", tooltip="completed", color=orangered, penwidth=3];
  "b" [fillcolor="#bfe8c8", tooltip="completed", color=orangered, penwidth=3];
  "c" [fillcolor="#f4b0b0", tooltip="failed: say \\"&\\""];
  "d" [fillcolor="#f3e2a0", tooltip="skipped: c"];
  "f" [fillcolor="#b9d8f5", tooltip="started: runs on", peripheries=2, color=orangered, penwidth=3];
  "<a>" -> "b" [label=completion, color=orangered, penwidth=3];
  "c" -> "b";
  "c" -> "d" [label=start];
  "b" -> "f" [label=start, color=orangered, penwidth=3];
}
? svg: edges
h 8.0,20 10s in all (1 failed, 1 skipped, 1 still running); critical path: <a> 3.0s -> b 5.0s -> f 1.0s (90% of it); \
g M38.2 54V162; m 38.2,48 0; g M114.2 54V162; m 114.2,48 1s; g M190.2 54V162; m 190.2,48 2s; g M266.2 54V162; m \
266.2,48 3s; g M342.2 54V162; m 342.2,48 4s; g M418.2 54V162; m 418.2,48 5s; g M494.2 54V162; m 494.2,48 6s; g M570.2 \
54V162; m 570.2,48 7s; g M646.2 54V162; m 646.2,48 8s; g M722.2 54V162; m 722.2,48 9s; g M798.2 54V162; m 798.2,48 10s
"<a>" completed 6.0s ago after running 3.0s in 3 tries; started at once
    y 0.0,62 987.2x20; h 8.0,76 <a>; completed k 114.2,66 228.0x12; t 190.2,64 2.0x16; t 304.2,64 2.0x16;  860.2,76 \
3.0s; m 868.2,76 completed
"c" failed 8.0s ago after running 0ms: say "&"; started at once
    z 0.0,82 987.2x20;  8.0,96 c; w 190.2,89 2.0x6; failed 190.3,86 2.0x12;  860.2,96 0ms; failed 868.2,96 failed: \
say "&"
"b" completed 1.0s ago after running 5.0s; started after waiting 3.0s, last for <a>
    y 0.0,102 987.2x20; h 8.0,116 b; w 114.2,109 38.0x6; l 152.2,109 190.0x6; completed k 342.2,106 380.0x12;  \
860.2,116 5.0s; m 868.2,116 completed
"f" started 1.0s ago, at once; it is runs on
    z 0.0,122 987.2x20; h 8.0,136 f; started k 722.2,126 76.0x12;  860.2,136 1.0s; m 868.2,136 running on
"d" was skipped 7.0s ago: c
    y 0.0,142 987.2x20;  8.0,156 d; skipped 190.2,149 76.0x6;  860.2,156 1.0s; m 868.2,156 skipped: c
c M342.2 78V106; c M722.2 118V126; started 8.0,183 24.0x3; m 38.0,188 runs on as a service; w 192.0,181 24.0x6; m \
222.0,188 waits; l 376.0,181 24.0x6; m 406.0,188 waits for a lock; started 560.0,178 24.0x12; m 590.0,188 runs; t \
744.0,176 2.0x16; m 774.0,188 another try; skipped 8.0,201 24.0x6; m 38.0,208 skipped; completed 192.0,198 24.0x12; m \
222.0,208 completed; failed 376.0,198 24.0x12; m 406.0,208 failed; completed k 560.0,198 24.0x12; m 590.0,208 on the \
critical path
? why: broken: mail, slow, catche, lint
"mail" was skipped 15s ago because of "report".
"slow" has not started: for 15s it has been waiting for "web".
"lint" has not started: its start gave up, and nobody has called start again; it would have to wait for "gone".
"report" was skipped 15s ago because of "data".
"data" failed 15s ago after running 5.0s: disk full; started at once.
    skipped: report, mail

"web" started 20s ago by bash web.sh (pid 42), after waiting 10s, last for base; it is still running.
    held up: slow

"gone" is not registered: nobody has called want, start or run on it; it is wanted by lint.
    held up: lint

"catche" is not registered: nobody has called want, start or run on it; did you mean "cache"?
? why: odd ends: completed without a start, refused, refused later
"refused" is not registered: its want was refused: cycle detected: a -> b -> a; did you mean "refused later"?
"refused later" has not started: nobody has called start on it; its last want was refused: cycle detected: a -> b -> \
a; it is ready.
"completed without a start" completed 5.0s ago without having started.
? why: nothing
no units yet
? why: good
nothing waits, runs long or was skipped
? why: it has run for 30 s
"a" started 30s ago, after waiting 1.0s; it is still running.
? why: odd ends: its dependency was never started
"its dependency was never started" has not started: for 3m05s it has been waiting for "never started" (start).
"never started" has not started: nobody has called start on it; it is ready.
    held up: its dependency was never started
? why: odd ends
"never started" has not started: nobody has called start on it; it is ready.
    held up: its dependency was never started

"gate" is not registered: nobody has called want, start or run on it; it is wanted by hardly waited, timed out.
    held up: timed out

"b_setup" is not registered: nobody has called want, start or run on it; it is wanted by misspelt; did you mean \
"b-setup"?
"zzz" is not registered: nobody has called want, start or run on it; it is wanted by misspelt.
    held up: misspelt

"its process is gone" started 3m05s ago by bash a.sh (pid 42), at once; that process is gone: it ended without \
complete.
"finds no place" has not started: for 3m05s it has been waiting for a place among those that may run at once.
"is tried again" started 3m05s ago, at once; it is still running (try 2).
"hardly waited" started 3m05s ago, at once; it is still running.
"ran and failed" failed 3m03s ago after running 2.0s; started at once.
"its cause has gone" was skipped 2m56s ago: b failed.
? why: services
"ide" started 1m00s ago by process (pid 77), after waiting 1m40s, last for tools; it is still running.
    held up: shell

"web" started 1m00s ago, after waiting 1m40s; it is probing tcp:80 for 4.0s (no route) (try 2).
    held up: site

"ends" started 2m40s ago, at once; it is being stopped.
"gate" completed 2m39s ago after running 1.0s; started at once; its process ended 2m10s ago.
"proxy" failed 1m20s ago after running 1m19s: died 1m10s after it was ready: exit code 1; started after waiting 1.0s.
"q" failed 1m10s ago after running 1m30s: lost: the boot that ran process 43 ended; that process may still run (it \
does); started by process (pid 43) at once.
"up" started 1m10s ago, after waiting 1m30s; it is probing file:up for 1m10s.
"cache" failed 1m00s ago after running 1m40s: stopped; started at once.
? list: wide names
UNIT   STATUS   READY  AGE   WAITS FOR  REASON
环境   started  true   12s
e\u0301tape  failed   true   3.0s             no disk
b      started  true   12s
tâche  pending  true   12s   b, lock x
? list: wide names: reason,waits_for, Unit
REASON   WAITS FOR  UNIT
                    环境
no disk             e\u0301tape
                    b
         b, lock x  tâche
? list: it was over long ago
UNIT  STATUS     READY  AGE     REASON
a     completed  true   59m51s
b     completed  true   59m58s  runs on
c     completed  true   59m59s  its process has ended
? list: nothing: unit
no units yet
? status: all that status shows: alone
Unit: alone
Status: pending
Ready: true

No dependencies.
? status: all that status shows: c
Unit: c
Status: pending
Ready: true
Reason: why
Started by: sh (pid 7), which is no longer running
Tries: 2
Locks: x, y
Waits for: b, lock x
Output: /c.log
Refused: a cycle
Did you mean: b

DEPENDS ON  REQUIRED STATUS  CURRENT STATUS  SATISFIED  REASON
b           completed        started         false      slow

TIME   EVENT       DETAIL
+0ms   registered
+1.5s  wants       b
"""
CASES = [part.rstrip("\n").partition("\n") for part in TEXTS.split("\n? ")[1:]]


IDS = [hyphenated(title) for title, *_ in CASES]


@pytest.mark.parametrize(("title", "text"), [(title, f"{text}\n") for title, _, text in CASES], ids=IDS)
def test_a_view(title: str, text: str) -> None:
    what, name, *more = title.split(": ")
    assert VIEWS[what](STARTUPS[name], *more) == text
    plain = text.translate(str.maketrans("█░▒─│├└", "#.:-||`"))
    if what == "timeline":
        assert coder_sync.timeline_text(STARTUPS[name], int(more[0]), unicode=False) == plain
    elif what == "tree":
        assert coder_sync.graph_tree(STARTUPS[name], unicode=False) == plain


def test_a_timeline_has_a_colour_for_each_outcome_and_the_path_in_bold() -> None:
    text = coder_sync.timeline_text(STARTUPS["broken"], 60, colour=True)
    assert re.sub(r"\033\[\d+m", "", text) == coder_sync.timeline_text(STARTUPS["broken"], 60)
    codes = [re.findall(r"\033\[(\d+)m", line) for line in text.splitlines()[1:10]]
    bold, off = "1", "0"
    assert codes[:4] == [[bold, off, "32", off], ["36", off], ["31", off], [bold, off, "36", off]]
    assert [code[0] for code in codes[4:]] == ["2", "33", "33", "2", "2"]


def test_a_timeline_lines_up_long_and_wide_names() -> None:
    names = [f'module.workspace.coder_script.startup_unit["health-check-{i}"]' for i in (1, 2)]
    graph = startup_of(2, *(unit(name, 0, 0) for name in [*names, "环境准备-安装依赖"]))
    lines = coder_sync.timeline_text(graph, 100).splitlines()
    assert [line.split(" █")[0] for line in lines[1:4]] == [
        '* module.workspace…health-check-1"]',
        '  module.workspace…health-check-2"]',
        "  环境准备-安装依赖                ",
    ]
    lines = coder_sync.timeline_text(graph, 40, unicode=False).splitlines()
    assert [line.split(" #")[0] for line in lines[1:4]] == ['* modu~1"]', '  modu~2"]', r"  \u73~d56"]
    assert lines[-2:] == ['module.workspace.cod~t["health-check-1"]', "2.0s (100% of it)"]


def test_the_axis_has_round_times() -> None:
    axes = [coder_sync.ticks(length, 8) for length in [0.004 * 1.03**i for i in range(665)]]
    assert " ".join(dict.fromkeys(axis[1][1] for axis in axes)) == (
        "1ms 1.5ms 2ms 3ms 4ms 6ms 8ms 10ms 15ms 20ms 30ms 40ms 60ms 80ms 100ms 150ms 200ms 300ms 400ms 600ms "
        "800ms 1s 1.5s 2s 3s 4s 6s 8s 10s 15s 20s 30s 45s 1m00s 1m30s 2m00s 3m00s 4m00s 5m00s 7m30s 10m00s 15m00s "
        "20m00s 30m00s 45m00s 1h00m 1h30m 2h00m 3h00m 4h00m 6h00m 8h00m 12h00m 24h00m 48h00m"
    )
    for axis, text in ((coder_sync.ticks(2.2, 5), "0 600ms 1.2s 1.8s"), (coder_sync.ticks(1e9, 10), "0 277777h46m")):
        assert " ".join(text for _, text in axis) == text


# -- what is true of any startup ----------------------------------------------------------------------------
LONG_NAMES = [*(f"{i:02}-" + "script-" * 8 + "x" for i in range(3)), "环境准备-" * 10, "a" * 127 + "b" * 128, HOSTILE]
ODD = [
    unit(name, 0, i * 60, i * 60 + 0.001, LONG_NAMES[:i], tries=[i * 60], running_on=i > 3)
    for i, name in enumerate(LONG_NAMES)
]
ANY = [*STARTUPS.values(), startup_of(300.002, *ODD)]


def test_a_timeline_fits_its_width_and_has_all_units_in_the_order_they_started() -> None:
    for graph, unicode, width in itertools.product(ANY, (True, False), (40, 47, 100, 400)):
        known = [u for u in graph.nodes if u.status != "not registered"]
        started = [math.inf if bar.unit.started is None else bar.unit.started for bar in coder_sync.Startup(graph).rows]
        assert started == sorted(started) and len(started) == len(known)
        lines = coder_sync.timeline_text(graph, width, unicode=unicode).splitlines()
        assert not known or width - 8 <= max(map(coder_sync.text_width, lines)) <= width, (width, unicode)
        assert not known or len(lines) >= len(known) + 3


def box(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text of 12 pixels in a font whose columns are 7.25 pixels wide."""
    x, y, width = number(text, "x"), number(text, "y"), 7.25 * coder_sync.text_width(text.text or "")
    x -= {"end": width, "middle": width / 2}.get(text.get("text-anchor", ""), 0.0)
    return x, y - 10, x + width, y + 3


def test_no_text_of_an_svg_is_covered_or_cut_off() -> None:
    for graph in ANY:
        root = svg_of(graph)
        boxes = [(*box(text), True) for text in root.iter("text")]
        for bar in root.iter("rect"):
            x, y = number(bar, "x"), number(bar, "y")
            if bar.get("class") not in ("y", "z"):
                boxes.append((x, y, x + number(bar, "width"), y + number(bar, "height"), False))
        boxes.sort(key=lambda b: b[1])
        for i, (left, top, right, bottom, is_text) in enumerate(boxes):
            assert 0 <= left < right <= number(root, "width") and 0 <= top < bottom <= number(root, "height")
            for other in itertools.takewhile(lambda b: b[1] < bottom, boxes[i + 1 :]):  # noqa: B023
                assert other[0] >= right or other[2] <= left or not (is_text or other[4]), (left, top, other)


def test_an_svg_stands_alone() -> None:
    root = svg_of(STARTUPS["services"])
    assert {element.tag for element in root.iter()} == {"svg", "title", "style", "g", "path", "rect", "text"}
    names = {name for element in root.iter() for name in element.keys()}  # noqa: SIM118
    assert names == {"width", "height", "viewBox", "class", "x", "y", "d", "text-anchor"}
    style = root.findtext("style") or ""
    assert "url(" not in style and "@import" not in style and "@media(prefers-color-scheme:dark){" in style
    used = {word for element in root.iter() for word in element.get("class", "").split()}
    assert used <= set(re.findall(r"\.(\w+)", style)) | {"pending"}


def test_a_mermaid_graph_has_all_names_and_edges_whatever_the_names_are() -> None:
    label = r'\["((?:[^"\[\](){}<>|`;%\\]|#\d+;)*)"\]'
    for graph in ANY:
        edges = [(d, u.unit_name, r) for u in graph.nodes for d, r in u.wants.items()]
        path = [bar.name for bar, _ in coder_sync.Startup(graph).path]
        text = coder_sync.graph_mermaid(graph)
        boxes = re.findall(rf"^  (u\d+)(\(?){label}\)?:::(\w+)$", text, re.M)
        names = {ident: re.sub(r"#(\d+);", lambda code: chr(int(code[1])), name) for ident, _, name, _ in boxes}
        states = [(names[ident], round == "(", status.replace("_", " ")) for ident, round, _, status in boxes]
        assert states == [(u.unit_name, u.running_on, u.status) for u in graph.nodes]
        lines = re.findall(r"^  (u\d+) ([-=])\2>(?:\|(\w+)\|)? (u\d+)$", text, re.M)
        assert [(names[a], names[b], r or "success") for a, _, r, b in lines] == edges
        bold = {(names[a], names[b]) for a, line, _, b in lines if line == "="}
        assert bold == set(zip(path, path[1:])) & {edge[:2] for edge in edges}
        assert [names[ident] for ident in re.findall(r"^  style (u\d+) stroke", text, re.M)] == path
        assert text.count("\n") == 7 + len(boxes) + len(lines) + len(path)


def test_the_timeline_as_json_has_times_since_the_first_sign() -> None:
    later = startup_of(
        130, *(unit(f"u{i}", 100, 100 + 10 * i, 110 + 10 * i, released_by="u0" * i, tries=[115.5]) for i in (0, 1))
    )
    data = json.loads(coder_sync.timeline_as("json", later))
    assert list(data) == ["version", "seconds", "summary", "critical_path", "units"]
    assert (data["version"], data["seconds"], data["summary"]) == (2, 20, coder_sync.Startup(later).summary())
    assert data["critical_path"] == [{"unit_name": name, "seconds": 10} for name in ("u0", "u1")]
    assert data["units"][1] == {
        **{"unit_name": "u1", "status": "completed", "reason": "", "registered": 0, "waiting": 0, "started": 10},
        **{"ended": 20, "ready": None, "exited": None, "tries": [15.5], "released_by": "u0", "wants": {}},
        **{"exit_code": None, "is_waiting": False, "locks": [], "blocked_by": {}, "running_on": False},
        "exit_reason": "",
    }
    assert coder_sync.timeline_data(STARTUPS["nothing"])["seconds"] == 0


def test_a_timeline_that_an_older_version_saved_is_read() -> None:
    data = coder_sync.timeline_data(STARTUPS["broken"])
    keys = ("unit_name", "status", "reason", "registered", "waiting", "started", "ended", "released_by", "wants")
    old = {"seconds": data["seconds"], "units": [{key: row[key] for key in keys} for row in data["units"]]}
    assert coder_sync.read_timeline(json.dumps(old), "t.json").summary() == data["summary"]
    units = [{"unit_name": name, "status": "pending", "registered": when} for name, when in (("a", 1.0), ("b", None))]
    assert [bar.name for bar in coder_sync.read_timeline(json.dumps({"seconds": 2, "units": units}), "").rows] == [
        "b",
        "a",
    ]


def test_what_is_no_saved_timeline_is_refused_in_a_line() -> None:
    foreign = [b"", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"seconds": 1}', b"<svg></svg>"]
    data = coder_sync.timeline_data(STARTUPS["services"])
    for key, value in itertools.product(("seconds", "units"), (None, "1", [5], [{}], {"a": 1}, math.inf, 10**400)):
        foreign.append(json.dumps({**data, key: value}).encode())
    damage = itertools.product(("unit_name", "status", "started", "ended"), ([[]], {"x": 1}, True, -1e16))
    for key, value in [*damage, ("started", "1"), ("wants", ["a"])]:
        foreign.append(json.dumps({**data, "units": [*data["units"][1:], {**data["units"][0], key: value}]}).encode())
    for text in foreign:
        with pytest.raises(UsageError, match=r"^t.json is not a timeline as `timeline -o json` prints it$"):
            coder_sync.read_timeline(text, "t.json")


# -- size -----------------------------------------------------------------------------------------------------
CHAIN = startup_of(60, *(unit(f"u{i}", 0, wants=[f"u{i + 1}"]) for i in range(4999)), unit("u4999", 0, 0))


def test_a_tree_is_bounded_in_depth_and_breadth() -> None:
    lines = coder_sync.graph_tree(CHAIN).splitlines()
    assert len(lines) == 41
    assert lines[-1].strip() == "└── u40 (pending); `graph u40` shows what is below"
    assert coder_sync.graph_tree(coder_sync.part_of(CHAIN, ["u4999"]), ["u4999"]) == "u4999 (started)\n"
    names = [(layer, i) for layer in range(12) for i in range(12)]
    graph = startup_of(0, *(unit(f"{n}.{i}", wants=[f"{n + 1}.{j}" for j in range(12)]) for n, i in names))
    assert len(coder_sync.graph_tree(graph).splitlines()) == 12 + 12 * 12 * 12  # not 12 ** 12


def test_why_goes_down_a_chain_to_its_end_and_names_not_too_many() -> None:
    lines = coder_sync.why_text(CHAIN, ["u0"]).splitlines()
    assert lines[:2] == [f'"u{i}" has not started: for 1m00s it has been waiting for "u{i + 1}".' for i in range(2)]
    assert lines[8:10] == ["(4991 more like these)", '"u4999" started 1m00s ago, at once; it is still running.']
    assert lines[10] == f"    held up: {', '.join(f'u{i}' for i in range(4998, 4978, -1))} and 4979 more"
    assert coder_sync.why_text(CHAIN).splitlines() == lines[9:]
    several = [unit(f"b{i}", wants=[f"c{j}" for j in range(30)]) for i in range(30)]
    graph = startup_of(0, unit("a", 0, wants=[f"b{i}" for i in range(30)]), *several)
    lines = coder_sync.why_text(graph, ["a"]).splitlines()
    assert len(lines) == 8 + 1 + 20 + 1 and lines[0].endswith('"b19" and 10 more.')
    assert lines[-1] == "(10 more like these)"


def test_why_without_a_name_is_quick_and_short_for_a_thousand_units() -> None:
    names = [[f"{layer}.{i}" for i in range(100)] for layer in range(10)]
    layers = [unit(name, 0, wants=names[n - 1]) for n in range(1, 10) for name in names[n]]
    began = time.process_time()
    assert coder_sync.why_text(startup_of(99, *(unit(name, 0, 0) for name in names[0]), *layers)).count("\n") == 7
    assert time.process_time() - began < 2
    pairs = [unit(f"task number {i}", 0, wants=[f"misspelt number {i}"]) for i in range(100)]
    lines = coder_sync.why_text(startup_of(99, *pairs)).splitlines()
    assert len(lines) == 50 * 3 + 1 and lines[-1] == "(50 more causes)"


# -- pictures of a real agent -------------------------------------------------------------------------------


def on_terminal(world: World, *argv: str, **env: str) -> str:
    """What a command writes on a terminal of 80 columns."""
    fd, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    world.popen(*argv, **streams, env={**world.env, "LC_ALL": "C.UTF-8", **env})
    os.close(terminal)
    data = b""
    with contextlib.suppress(OSError):  # EIO: the command has ended
        while select.select([fd], [], [], PATIENCE)[0]:
            data += os.read(fd, 65536)
    os.close(fd)
    return data.decode()


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An agent with a startup that no test changes: a is done, b runs, c waits."""
    with World(tmp_path_factory.mktemp("little")) as world:
        world.serve()
        world.client.want("b", "a")
        world.end("a")
        world.client.start("b")
        waits = world.connect()
        waits.request("start", unit="c", dependencies=["b"])
        world.waiting("c")
        yield world
        waits.close()


def test_events_are_a_json_object_a_line(little: World, call: Call) -> None:
    events = [json.loads(line) for line in call.ok(little, "events").splitlines()]
    words = ", ".join(f"{e['seq']} {e['unit']} {e['kind']} {e['detail']}".strip() for e in events)
    assert words == (
        "1 b registered, 2 b wants a, 3 a registered, 4 a started, 5 a completed, 6 b started, "
        "7 c registered, 8 c wants b, 9 c waiting b"
    )
    times = [e["time"] for e in events]
    assert times == sorted(times) and abs(events[-1]["wall"] - time.time()) < PATIENCE
    assert [e.seq for e in little.client.events(since=7)] == [8, 9]


def test_events_are_followed_until_the_agent_ends_or_nobody_reads_them(world: World) -> None:
    agent = world.serve()
    world.client.want("a")
    reads, goes_away = followers = [world.popen("events", "--follow") for _ in range(2)]
    assert [json.loads(line_of(process.stdout))["kind"] for process in followers] == ["registered"] * 2
    goes_away.stdout.close()  # type: ignore[union-attr]
    world.client.start("a")
    assert goes_away.wait(PATIENCE) == 0
    goes_away.stdout = None
    assert finish(goes_away).stderr == ""
    assert json.loads(line_of(reads.stdout))["kind"] == "started"
    agent.terminate()
    done = finish(reads)
    assert (done.returncode, done.stdout, done.stderr[:7], done.stderr.count("\n")) == (3, "", "error: ", 1)


def test_what_happens_while_a_follower_is_told_the_history_comes_after_it(agent: World) -> None:
    for i in range(20):
        agent.client.want(f"{i}", *(f"{i}.{j}" for j in range(100)))
    for i in range(10):
        peer = agent.connect()
        peer.request("events", follow=True)
        agent.client.want(f"meanwhile-{i}")
        answer = peer.read()
        assert "result" in answer
        if answer["result"][-1]["unit"] != f"meanwhile-{i}":
            assert peer.read()["params"]["seq"] == answer["result"][-1]["seq"] + 1
        peer.close()


def test_colours_are_for_terminals_and_pictures_plain_where_the_locale_is_not_utf8(little: World, call: Call) -> None:
    assert "\033[32m" in on_terminal(little, "timeline")
    assert "\033[" not in call.ok(little, "timeline") + on_terminal(little, "timeline", NO_COLOR="1")
    for command, locale in itertools.product(("timeline", "graph"), ("C.UTF-8", "C")):
        assert call.ok(little, command, LC_ALL=locale).isascii() == (locale == "C"), command
    assert little.ok("graph", env={**little.env, "LC_ALL": "C"}).isascii()


def test_the_width_is_that_of_the_terminal_or_of_columns(little: World, call: Call) -> None:
    for columns, width in (("60", 60), ("9", 40), ("\u00b2", 100), ("", 100)):
        text = call.ok(little, "timeline", COLUMNS=columns)
        assert max(map(len, text.splitlines())) in range(width - 3, width + 1), columns
    assert max(map(len, on_terminal(little, "timeline", NO_COLOR="1").splitlines())) in range(77, 81)


def test_every_form_of_a_picture_while_units_run(little: World, call: Call) -> None:
    text = call.ok(little, "timeline", LC_ALL="C.UTF-8")
    rows = [re.sub("[\u2588\u2591\u2592 ]+[\\d.]+m?s", "", line) for line in text.splitlines()[1:4]]
    assert rows == ["* a completed", "* b running", "  c waiting"]
    assert call.ok(little, "why").endswith("; it is still running.\n    held up: c\n")
    assert call.ok(little, "graph", LC_ALL="C") == "c (pending)\n`-- b (started)\n    `-- a (completed)\n"
    assert call.ok(little, "graph", "b", "-o", "dot").count("->") == 1
    assert call.ok(little, "graph", "c", "-o", "mermaid").count("> u") == 2
    data = json.loads(call.ok(little, "graph", "b", "-o", "json"))
    assert data["edges"] == [{"unit_name": "b", "depends_on": "a", "requirement": "success"}]
    assert data["units"][1:] == [{"unit_name": "a", "status": "completed", "reason": "", "running_on": False}]
    assert "nobody" in call(little, "graph", "nobody").stderr
    table = call.ok(little, "status", "c").split("\n\n")[-1].splitlines()
    assert [" ".join(line.split()[1:]) for line in table] == ["EVENT DETAIL", "registered", "wants b", "waiting b"]


def test_a_graph_that_no_agent_of_ours_has_is_refused_in_a_line(world: World, call: Call) -> None:
    odd: list[Any] = [{"status": "mad"}, {"wants": {"b": "success"}}, {"wants": {"a": 'start", URL="x'}}]
    odd += [{"tries": ["1"]}, *({"started": value} for value in (1e308 * 10, 10**400, "1", True))]
    commands = ("why", "timeline", "timeline --blame", "timeline -o svg", "graph", "graph -o dot", "graph -o mermaid")
    for change, line in zip(odd, itertools.cycle(commands)):
        nodes = [{"unit_name": "a", "status": "started", "is_ready": True, **change}]
        answer = json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"now": 9.0, "nodes": nodes}})
        with impostor(world, answer.replace("Infinity", "1e999").encode() + b"\n"):
            done = call(world, *line.split())
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), (change, line)
        assert "; are agent and client of one version?" in done.stderr


def test_a_saved_timeline_is_compared_with_the_present(little: World, call: Call, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(coder_sync.timeline_as("json", STARTUPS["good"]), encoding="utf-8")
    (tmp_path / "bad.json").write_bytes(b"\xff")
    compared = call.ok(little, "timeline", "--compare", f"{tmp_path}/good.json")
    assert re.search("^apt +2m05s +- +went", compared, re.M)
    transcript = """
$ timeline --compare DIR/none.json -> 2: cannot read DIR/none.json: No such file or directory
$ timeline --compare DIR -> 2: cannot read DIR: Is a directory
$ timeline --compare DIR/bad.json -> 2: DIR/bad.json is not a timeline as `timeline -o json` prints it
"""
    play(call, little, transcript.replace("DIR", str(tmp_path)))
    words = ("--compare", f"{tmp_path}/none.json", "--socket-path", f"{tmp_path}/none")
    assert call(little, "timeline", *words).returncode == 2  # the agent is asked last


def test_why_names_the_process_and_says_whether_it_runs(agent: World, call: Call) -> None:
    process = agent.spawn(["sh", "-c", "coder start a -q && echo ready && exec sleep 60"], env=agent.shell_env())
    assert line_of(process.stdout) == "ready\n"
    agent.client.want("b", "a")
    how = f'"a" started TIME ago by sh ... (pid {process.pid}), at once; '
    expected = '$ why b -> "b" has not started: nobody has called start on it; it would have to wait for "a".\n'
    play(call, agent, f"{expected}{how}it is still running.\n")
    process.kill()
    process.wait()
    play(call, agent, f"$ why a -> {how}that process is gone: it ended without complete.\n")
    play(call, agent, "$ list -c unit,reason ->\nUNIT  REASON\na     its process is gone\nb\n")


def test_the_agent_of_a_command_leaves_a_timeline_behind_or_says_why_not(world: World) -> None:
    for path, said in (("no/such/dir.svg", "warning: cannot write the timeline to "), ("t.txt", ""), ("t.json", "")):
        done = world.shell(f"coder serve --timeline {path} -- coder run a -- false")
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == (said != "")
    text = (world.directory / "t.txt").read_text(encoding="utf-8")
    assert "\n* a " in text and "failed" in text
    assert json.loads((world.directory / "t.json").read_bytes())["units"][0]["status"] == "failed"


# ---------------------------------------------------------------------------------------------------------
# Boot: helpers. Directories of scripts; a fifo at which scripts stop until the test lets them go on.
# ---------------------------------------------------------------------------------------------------------


def startup(world: World, files: Mapping[str, str | bytes], name: str = "startup.d") -> str:
    """Have a directory hold these executable files and no others; return its path.

    A text is for sh where it does not say otherwise, `@` at the start of a line begins a header, $SYNC calls us.
    The working directory of a script is the world's.
    """
    world.env["SYNC"] = f"{sys.executable} -IS {installed()}"
    directory = world.directory / name
    directory.mkdir(exist_ok=True)
    for file in directory.iterdir():
        if file.name not in files:
            file.unlink()
    for file_name, text in files.items():
        written = re.sub("^@", "# coder-sync: ", text, flags=re.M) if isinstance(text, str) else text
        if isinstance(written, str):
            written = (written if written.startswith("#!") else f"#!/bin/sh\n{written}\n").encode()
        (directory / file_name).write_bytes(written)
        (directory / file_name).chmod(0o755)
    return str(directory)


class Boot:
    """A boot that has begun, perhaps under a command; `patch` is code that changes something in the module before."""

    def __init__(
        self, world: World, files: Mapping[str, Any], *options: str, patch: str = "", under: Any = (), **popen: Any
    ) -> None:
        argv = [*under, *altered(patch, "boot", startup(world, files), *options)]
        self.out = self.told = ""
        self.mark = f"BOOT={os.urandom(8).hex()}"
        world.boots.append(self.mark)
        self.process = world.spawn(argv, env={**world.env, **dict([self.mark.split("=")])}, **popen)

    def prints(self, text: str) -> str:
        """The line, once it has printed one with this text."""
        return hear(self.process.stdout, text)

    def says(self, text: str) -> str:
        """The line, once it has said this on standard error."""
        return hear(self.process.stderr, text)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def left(self) -> list[int]:
        """What runs of all that it has started. Where there is no /proc to find it in, the test is skipped."""
        if not PROC:
            pytest.skip("no /proc here")
        return [pid for pid in marked(self.mark) if pid != self.process.pid]

    def background(self) -> int:
        """Its background process, once there is one."""

        def leads(pid: int) -> bool:
            with contextlib.suppress(OSError):  # it may have gone meanwhile
                return os.getsid(pid) == pid and str(HERE).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
            return False

        return int(until(lambda: [*filter(leads, self.left())])[0])

    def scripts(self) -> list[int]:
        """What runs of all that its scripts have started."""
        background = self.background()
        return [pid for pid in self.left() if pid != background]

    def gone(self) -> None:
        """Return once nothing is left of it."""
        until(lambda: not self.left(), "nothing left")

    def ends(self, code: int = 0, out: str | None = None, *told: str, leaves: bool = False) -> str:
        """Wait for its end: with this status, this output, this said among more, and nothing left running.

        Returns what it said on standard error.
        """
        done = finish(self.process)
        self.out, self.told = done.stdout, done.stderr
        assert done.returncode == code and out in (None, done.stdout), done
        assert [text for text in told if text not in done.stderr] == [], done.stderr
        assert leaves or not marked(self.mark), done.stderr
        return done.stderr

    def said(self) -> dict[str, list[str]]:
        """Once it has ended: the lines that each unit has printed."""
        lines: dict[str, list[str]] = {}
        for unit, _, text in (line.partition("| ") for line in self.out.splitlines()):
            lines.setdefault(unit.rstrip(), []).append(text)
        return lines

    def unsuccessful(self) -> dict[str, str]:
        """Once it has ended: how each unit ended that has not completed, as its report says."""
        found = re.findall(r"^(failed|died|skipped|not started): (\S+?)(?::| \() ?(.*?)(?:\); /.*)?$", self.told, re.M)
        return {unit: f"{how}: {why}" for how, unit, why in found}


def boot_on_terminal(world: World, files: Mapping[str, str | bytes], *options: str, **more: Any) -> tuple[Boot, int]:
    """A boot that leads the session of a terminal of 70 columns, and the terminal's other end."""

    def control() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    master, terminal = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 24, 70, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    boot = Boot(world, files, *options, **streams, **more, preexec_fn=control)
    os.close(terminal)
    return boot, master


class Gate:
    """A fifo in the world: a script that says `cat NAME` stops there until the gate is opened."""

    def __init__(self, world: World, name: str = "gate") -> None:
        self.path, self.fd = str(world.directory / name), -1
        os.mkfifo(self.path)

    def reached(self) -> Gate:
        """Return once a script stands there."""

        def somebody() -> bool:
            with contextlib.suppress(OSError):
                self.fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            return self.fd >= 0

        if self.fd < 0:
            until(somebody, f"a script at {self.path}")
        return self

    def open(self) -> None:
        self.reached()
        os.close(self.fd)
        self.fd = -1

    def keep_open(self, over: Callable[[], bool]) -> None:
        """Let everybody through who comes, until it is over."""
        until(lambda: (os.close(os.open(self.path, os.O_RDWR)), over())[1])


# What nobody takes is dropped sooner.
HURRY = "was = coder_sync.Output.write\ncoder_sync.Output.write = lambda *args, timeout=0.0: was(*args, timeout / 5)"


@pytest.fixture
def gate(world: World) -> Gate:
    return Gate(world)


PROC = os.path.exists("/proc/self/stat")
needs_proc = pytest.mark.skipif(not PROC, reason="no /proc here")


def marked(mark: str) -> list[int]:
    """The processes that have NAME=VALUE in their environment; a zombie has none."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc") if PROC else []):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
    return found


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def hear(pipe: Any, text: str) -> str:
    """Read a pipe until a line with this text has come, and return it; what follows it is left there."""

    def heard() -> str:
        line = line_of(pipe)
        assert line, f"never heard {text!r}"
        return line if text in line else ""

    return str(until(heard, text))


def planned(*paths: str) -> dict[str, coder_sync.Script]:
    """The scripts of directories by unit, in their order, as the headers say."""
    return {script.unit: script for script in coder_sync.plan(paths)}


def wanted(script: coder_sync.Script) -> list[tuple[str, str, int]]:
    return sorted((e.dependency, e.requires, int(e.place.rpartition(":")[2])) for e in script.want)


def mistakes(path: str) -> list[str]:
    """What the check says about a directory, without its path."""
    try:
        coder_sync.plan([path])
    except coder_sync.UsageError as error:
        return str(error).replace(path + "/", "").splitlines()
    return []


# ---------------------------------------------------------------------------------------------------------
# Boot: names and headers, and the check before anything runs.
# ---------------------------------------------------------------------------------------------------------


def test_a_unit_is_named_after_its_file_or_a_header_names_it(world: World) -> None:
    files = ["clone", "10-clone.sh", "10_clone.sh", "007-a-b_c.tar.py", "10clone.sh", "10", "clone-10.sh"]
    units = ["clone", "clone", "clone", "a-b_c.tar", "10clone", "10", "clone-10"]
    for file, unit in zip([*files, "10-Klone repo's \u00e9.sh"], [*units, "Klone repo's \u00e9"]):
        assert list(planned(startup(world, {file: ""}))) == [unit]
    for file, what in (("10-", "empty"), ("a\tb", "printed"), ("b\udcff", "printed")):
        (mistake,) = mistakes(startup(world, {file: ""}))
        assert mistake.startswith(f"{coder_sync.printable(file)}:1: ") and what in mistake
        assert mistake.endswith("or add: unit NAME")
        assert mistakes(startup(world, {file: "@unit x"})) == []


def test_a_header_stands_in_the_scripts_own_comment_syntax_with_any_line_end(world: World) -> None:
    words = ['unit "-it\'s mine,"', "want --requires=start 'a b' c\\ d", "timeout 1m30s", "extern 'a b' 'c d'"]
    words += ["lock l m", "retry 1000 500ms", "ready-timeout 2", "ready echo 'it''s  up\\"]
    for mark, end in itertools.product(("#", "//", "--", ";", "  #", "#  "), ("\n", "\r\n")):
        path = startup(world, {"x.sh": "".join(f"{mark} coder-sync: {line}{end}" for line in words)})
        script = planned(path)["-it's mine,"]
        assert wanted(script) == [("a b", "start", 3), ("c d", "start", 3)] and script.lock == ["l", "m"]
        assert script.limits == coder_sync.Limits("echo 'it''s  up\\", 2.0, 90.0, 1000, 0.5)
    assert planned(startup(world, {"x.sh": ""}))["x"].limits == coder_sync.Limits("", 300.0, 0.0, 0, 1.0)


def test_only_comments_in_the_first_50_lines_or_before_any_code_are_headers(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = ["echo coder-sync: want b", "x # coder-sync: want c", "# see coder-sync: want d", "* coder-sync: want e"]
    lines += ["# coder-sync runs this", "# coder-sync is what wants: us", "# coder_sync.py", "# coder-sync"]
    lines += ["coder-sync want f", *[":"] * (47 - len(lines)), "@want yes", "@want too-late"]
    path = startup(world, {"x": "\n".join(lines), "yes": ""})
    assert wanted(planned(path)["x"]) == [("yes", "success", 50)]
    told = f"warning: {path}/x:51: not read as a header: too far down; move it up\n"
    assert capfd.readouterr().err == told
    licence = "\n".join(["# All rights reserved", "", "  # and so on"] * 60)
    assert wanted(planned(startup(world, {"x": licence + "\n@want yes", "yes": ""}))["x"]) == [("yes", "success", 182)]


def test_what_is_a_script_in_a_directory_and_that_a_path_may_be_one(world: World) -> None:
    others = ["a~", "a.bak", "a.dpkg-old", "a.ucf-dist", "a.rpmsave", "a.sh.disabled", "a.off", "#a#", ".hidden"]
    path = Path(startup(world, dict.fromkeys([*others, "b"], "")))
    (path / "README.txt").write_text("about these scripts")
    (path / "c.d").mkdir()
    (path / "gone").symlink_to("nowhere")
    os.mkfifo(path / "pipe")
    shutil.copy("/bin/true", path / "10-true")  # a program needs no interpreter line
    assert list(planned(str(path))) == ["true", "b"]
    assert list(planned(f"{path}/b", f"{path}/a.off", startup(world, {"c": "@want b"}, "other"))) == ["b", "a", "c"]
    (path / "c.d" / "x").touch()
    for other, why in (("nowhere", "No such file"), ("pipe", "it is no file"), ("c.d", "no executable files")):
        assert why in "".join(mistakes(f"{path}/{other}"))
    assert mistakes("") == ["'': cannot be read: No such file or directory"]


# HEADERS => the mistake in the last of them; `...` is any text.
MISTAKES_IN_HEADERS = r"""
# coder-sync want a => not understood; a header is written `# coder-sync: WORD ...`
#Coder-Sync: want a => not understood; ...
// coder-syn: unit b => not understood; ...
@wants a => "wants a" is not a header; use unit NAME, want NAME... [--requires REQUIREMENT], ..., retry N [DELAY]
@ => "" is not a header; ...
@unit a b => unit: too many words; write unit NAME; a name with a blank needs quotes: unit "a b"
@retry 1 2 3 => retry: too many words; write retry N [DELAY]
@timeout => timeout: its value is missing
@ready true\n@ready-timeout 1\n@ready true => ready: line 3 says so already
@ready-timeout 1m => ready-timeout without ready
@want => want: a name is missing
@want --requires completion => want: a name is missing
@want a --requires => no such requirement: ; use one of success, completion, start
@want clone --require start => "--require" is neither an option (only want has one, --requires) nor a name; ...
@want clone, x => "clone," is neither ...
@after clone --requires start => "--requires" is neither ...
@timeout soon => invalid duration 'soon': ...
@retry -1 1s => retry: invalid number of retries: '-1'; write 3, or 3 10s
@want 'a => want: No closing quotation
@unit 'a	b' => unit name 'a\tb' has a character that cannot be printed
@want clon => no file provides "clon"; did you mean "clone"?
@want 10-clone.sh => no file provides "10-clone.sh"; did you mean "clone"?
@want 'the moon' => no file provides "the moon"; if it comes from outside, add: extern 'the moon'
@want clone --requires start\n@want clone => unit "x" wants "clone" with requirement start already, not success
@unit clone => unit "clone" is clone:1 already
@ready => ready: what is to be probed is missing
@ready file: => file:: what is to be probed is missing
@ready http://:80/ => ':80' is no address; write tcp:5432, tcp:HOST:5432 or http://HOST:PORT/PATH
@ready tcp:$PORT => 'tcp:$PORT': nothing is expanded in it; write it out, or write a command
@ready file:~/up => 'file:~/up': nothing is expanded in it; ...
@ready https://db/ => 'https://db/' is no probe; write a command: curl -fs https://db/
@ready a^@b => 'a b' has a NUL character
@ready udp:53 => 'udp:53' is no probe; use tcp:, unix:, http://, file:, notify or a command
@ready 5432 => '5432' is no probe; ...
"""


def test_a_mistake_in_a_header_is_told_with_file_and_line(world: World) -> None:
    for row in MISTAKES_IN_HEADERS.strip().split("\n"):
        line, _, mistake = row.replace("^@", "\0").replace(r"\n", "\n").partition(" => ")
        (told,) = mistakes(startup(world, {"clone": "", "x": f":\n{line}\n:"}))
        expected = f"x:{3 + line.count(chr(10))}: {mistake}"
        assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), told), (line, told)


def test_a_cycle_is_told_with_the_file_and_line_of_each_edge(world: World) -> None:
    files = {"10-a.sh": ":\n@want b", "20-b.sh": "@after c", "30-c.sh": "", "40-d.sh": ":\n:\n@after a\n@before c"}
    (mistake,) = mistakes(startup(world, files))
    assert re.fullmatch(r"[^ ]+: cycle detected: [a-d](?: -> [a-d]){4} \((.*)\)", mistake)
    assert set(mistake.split("(")[1][:-1].split(", ")) == {"10-a.sh:3", "20-b.sh:2", "40-d.sh:4", "40-d.sh:5"}


def test_a_file_that_is_no_script_is_a_mistake_if_it_is_wanted_or_has_a_header(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    path = startup(world, {"a": "", "b": "@want a\n@want e", "c d": "@unit d", "5-e.sh.off": "", "README": ""})
    Path(path, "README").write_text("about #!/bin/sh")
    for name in ("a", "c d", "README"):
        os.chmod(f"{path}/{name}", 0o644)
    no_script = ["a would, but is not executable", "5-e.sh.off would, but .off is not run"]
    no_script = [f'b:{n}: no file provides "{name}"; {why}' for n, name, why in zip((2, 3), "ae", no_script)]
    assert mistakes(path) == [f"c d:1: not executable; chmod +x '{path}/c d'".replace(path + "/", ""), *no_script]
    assert capfd.readouterr().err == f"warning: {path}/a: not run: not executable; chmod +x {path}/a\n"


@LINUX
def test_on_a_file_system_that_is_mounted_noexec_no_mode_is_advised(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = startup(world, {"a": "@unit b"})
    os.chmod(f"{path}/a", 0o644)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert mistakes(path) == ["a:1: not executable: its file system is mounted noexec"]


def test_an_empty_directory_is_no_mistake_with_a_command(world: World, call: Call) -> None:
    path = startup(world, {})
    Boot(world, {}, "--", "echo", "hello").ends(0, "hello\n")
    assert call.ok(world, "boot", path, "--check", "--", "true") == "0 scripts, no mistakes\n"
    wrong = [[path], [path + "x", "--", "true"], [path, "--check"], [], [path, "--jobs", "many"], [path, "--"]]
    for words in [*wrong, [path, "--timeline", "t.doc"]]:
        assert call(world, "boot", *words).returncode == 2, words


def test_what_cannot_be_printed_in_a_name_is_shown_as_an_escape(world: World, call: Call) -> None:
    name = "a\x1b[31m\n"
    headers = "@unit a\n@wants\n@want b\x1b\n@timeout \x1b\n@before d1\n@lock a\x1bb -\x1b\n@want e --requires \x1b"
    path = startup(world, {name: headers, "b\x1b": "#!/no/\x1b", "c\x1b.off": "", "d\x1b": "@want c"}, "\x1b.d")
    os.chmod(f"{path}/d\x1b", 0o644)
    said = call(world, "boot", path, path + "\n", "--check").stderr
    assert said.count("\n") > 7 and all(line.isprintable() for line in said.splitlines()), said
    assert f"{world.directory}/\\x1b.d/a\\x1b[31m\\n:3: " in said
    startup(world, {name: "@unit a\nexit 3"}, "\x1b.d")
    done = world.run("boot", path, "--log-dir", "/proc/\x1b", "--timeline", f"{path}/\x1b/x.svg")
    assert done.returncode == 1 and done.stderr.count("\n") == 5, done
    assert all(line.isprintable() for line in done.stderr.splitlines()), done


INTERPRETERS = [
    ("echo hello", "no interpreter: the first line must be #! and a program, as in #!/bin/sh"),
    ("#!/no/such/sh\n", "its interpreter /no/such/sh does not exist or cannot be run"),
    ("#!/etc/passwd\n", "its interpreter /etc/passwd does not exist or cannot be run"),
    ("#!\n", "its interpreter  does not exist or cannot be run"),
    ("#!/usr/bin/env nosuchpython -u\n", "its interpreter nosuchpython is not in PATH"),
    ("#!/usr/bin/env -S nosuchpython -u\n", "its interpreter nosuchpython is not in PATH"),
    ("\ufeff#!/bin/sh\n", "it begins with a byte-order mark; save it as UTF-8 without one"),
    ("#!/bin/sh\r\necho\r\n", "its first line ends in a carriage return; save it with Unix line ends"),
    ("#!/usr/bin/env -S A=1 sh -e\n", ""),
    ("#!/usr/bin/env -Ssh -e\n", ""),
    ("#! /bin/sh -e\n", ""),
]


def test_a_file_that_nothing_can_interpret_is_a_mistake(world: World) -> None:
    for text, mistake in INTERPRETERS:
        assert mistakes(startup(world, {"a": text.encode()})) == ([f"a:1: {mistake}"] if mistake else []), text


def test_every_mistake_is_told_in_one_go_and_nothing_runs(world: World, call: Call) -> None:
    files = {"10-good": "touch ran", "20-word": "@wants good", "30-twice": "@unit good", "50-cycle": "@want cycle"}
    files.update({"40-typo": "@want godo\n@timeout x", "60-shebang": "#!/no/such\n"})
    done = call(world, "boot", startup(world, files))
    first, *told = done.stderr.splitlines()
    expected = ["20-word:2", "30-twice:2", "40-typo:2", "40-typo:3", "50-cycle:2", "60-shebang:1"]
    assert sorted(os.path.basename(line.split(": ")[0]) for line in told) == expected
    assert (done.returncode, done.stdout, first) == (2, "", "error: nothing was run:")
    assert not (world.directory / "ran").exists() and not os.path.exists(world.path)


def test_check_shows_the_order_and_what_each_waits_for_and_runs_nothing(world: World, call: Call) -> None:
    files = {"a": "@after c\ntouch ran", "b": "@want a\n@want d --requires start\n@extern d", "c": "@lock x y"}
    path = startup(world, {**files, "e": "@ready http://me:secret@db/\n@before a"})
    expected = """\
UNIT  WANTS              LOCKS  READY WHEN
c                        x, y
e                               http://***@db/
a     e, c (completion)
b     a, d (start)
4 scripts, no mistakes
"""
    assert call.ok(world, "boot", path, "--check") == expected
    assert not (world.directory / "ran").exists() and not os.path.exists(world.path)


def test_after_and_before_count_for_parts_of_the_boot_unless_a_want_says_more(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"a": "@before x y nowhere clon", "x": "@after b c nowher", "y": "@want a --requires start"}
    path = startup(world, {**files, "b": "", "c": "@before x", "clone": ""})
    scripts = planned(path)
    assert wanted(scripts["x"]) == [("a", "success", 2), ("b", "completion", 2), ("c", "success", 2)]
    assert wanted(scripts["y"]) == [("a", "start", 2)] and wanted(scripts["clone"]) == []
    told = f'warning: {path}/a:2: no file provides "clon"; did you mean "clone"?\n'
    assert capfd.readouterr().err == told


# ---------------------------------------------------------------------------------------------------------
# Boot: one graph. Order, the agent it hosts or uses, what scripts and other terminals see.
# ---------------------------------------------------------------------------------------------------------


# UNIT: HEADERS AND SCRIPT => the lines that it prints, or how it ends without success. All are in one boot.
SCRIPTS = r"""
# the order is that of the headers
a: @want b c; ls b.done => b.done
b: @want d; ls d.done; cat gate; : > b.done => d.done / c runs
c: @want b --requires start; test ! -e b.done && echo c runs > gate =>
d: sleep 0.1; : > d.done =>
# a failure skips what requires success, also through others; after does not mind it
e: exit 3 => failed: exit code 3
f: @want e; echo f => skipped: dependency "e" failed (exit code 3)
g: @want f; echo g => skipped: dependency "f" was skipped: dependency "e" failed (exit code 3)
h: kill -9 $$ => failed: killed by signal 9
i: exec 2> /dev/null; exec /no/such/program => failed: exit code 127
j: @before l; sleep 0.1; : > j.done; exit 1 => failed: exit code 1
k: @want e --requires completion; @after f j; ls j.done => j.done
l: echo l => skipped: dependency "j" failed (exit code 1)
m: @extern disk; @want disk; echo m => m
# what a script is given: its unit, the socket, the environment, no input; signals and descriptors as usual
given: echo $CODER_SYNC_UNIT $CODER_AGENT_SOCKET_PATH $MINE $(cat | wc -c) $PWD $# $0
    => given DIR/agent.sock yes 0 DIR 0 DIR/startup.d/given
usual: grep -cE 'Sig(Blk|Ign):.[0-9a-f]{8}[08]0{7}$' /proc/self/status; ls /proc/self/fd => 2 / 0 / 1 / 2 / 3
# variables are those of its dependents; what is none fails the unit
v1: cd /; printf 'A=1\n\n' >> $CODER_SYNC_ENV; echo 'B=x y="z"' >> $CODER_SYNC_ENV =>
v2: @want v1; echo "$A $B"; echo A=2 > $CODER_SYNC_ENV => 1 x y="z"
v3: @want v2; echo "$A $B"; dirname $CODER_SYNC_ENV > private; test -e $CODER_SYNC_ENV || echo new => 2 x y="z" / new
v4: printf 'A=1\nnonsense' > $CODER_SYNC_ENV => failed: line 2 of its $CODER_SYNC_ENV is not NAME=VALUE
v5: printf '1A=secret' > $CODER_SYNC_ENV => failed: line 1 of its $CODER_SYNC_ENV is not NAME=VALUE
v6: printf 'A=\377' > $CODER_SYNC_ENV => failed: line 1 of its $CODER_SYNC_ENV is not UTF-8
v7: printf 'A=%40000d' 0 > $CODER_SYNC_ENV => failed: its $CODER_SYNC_ENV is larger than 32 KiB
v8: @retry 1 0; test -e v8.n && exit; echo A=3 > $CODER_SYNC_ENV; : > v8.n; exit 1 => try 2 of 2 after exit code 1
v9: @want v8; echo ${A-unset} => unset
v10: printf 'A=\000' > $CODER_SYNC_ENV => failed: line 1 of its $CODER_SYNC_ENV is not NAME=VALUE
v11: printf '\303\251=1' > $CODER_SYNC_ENV => failed: line 1 of its $CODER_SYNC_ENV is not NAME=VALUE
v12: printf 'A=%20000d' 0 | tr ' ' '"' > $CODER_SYNC_ENV => failed: its $CODER_SYNC_ENV is larger than 32 KiB
# a service that is never ready fails and ends
s1: @ready file:up; exit 0
    => failed: ended before it was ready (exit code 0): keep it in the foreground, or call `wait --ready` in it
s2: @ready notify; exit 3 => failed: ended before it was ready (exit code 3)
s3: @ready file:up; @ready-timeout 900ms; sleep 60 => failed: not ready after 900ms: file:up (no such file)
s4: @ready notify; @ready-timeout 900ms; sleep 60 => failed: not ready after 900ms: notify (it has not said READY=1)
s5: @ready tcp:1; @ready-timeout 900ms; sleep 60 => failed: not ready after 900ms: tcp:1 (Connection refused)
s6: @ready echo sec''ret && echo sec""ret >&2 && exit 7; @ready-timeout 900ms; sleep 60 & sleep 60
    => failed: not ready after 900ms: echo sec''ret && echo sec""ret >&2 && exit 7 (exit code 7)
s7: @ready sleep 60; @ready-timeout 900ms; sleep 60
    => failed: not ready after 900ms: sleep 60 (its first try has not ended)
s8: $SYNC complete s8 -q; echo oops; exit 3 => oops / died: completed, then ended: exit code 3
s9: @want s8; while $SYNC wait s8 -q 2>&-; do sleep 0.3; done; echo s9 => s9
# past its timeout, which bounds the run and not the waiting, a script and its children end, and what a failure leaves
t1: @timeout 200ms; exec sleep 60 => failed: timed out after 200ms
t3: @timeout 200ms; trap '' TERM INT; while :; do sleep 60; done => failed: timed out after 200ms
t4: @timeout 200ms; (trap '' TERM; exec sleep 60) & sleep 60 => failed: timed out after 200ms
t10: @ready file:t10; @timeout 900ms; : > t10; exec sleep 60 => died: completed, then ended: timed out after 900ms
t6: sleep 0.5 =>
t7: @want t6; @timeout 400ms; echo t7 => t7
t9: (trap '' TERM; exec sleep 60) & exit 3 => failed: exit code 3
# what fails is tried again, and only the last try counts
r1: @retry 3 100ms; echo n >> n; n=$(($(wc -l < n))); : > n$n; test $n = 3 && exit; sleep 60 & exit 9
    => try 2 of 4 after exit code 9 / try 3 of 4 after exit code 9
r2: @want r1; echo r2 => r2
r3: @retry 1 0; exit 4 => try 2 of 2 after exit code 4 / failed: exit code 4
r4: @retry 1 10ms; @ready file:r4.up; test -e r4.n || { : > r4.n; exit; }; mkfifo r4.end; : > r4.up; cat r4.end
    => try 2 of 2 after ended before it was ready (exit code 0): keep it in the foreground, or call `wait --ready` in it
r5: @want r4; : > r4.end; echo r5 => r5
# a script may tell its outcome, and need not start its unit
k1: $SYNC start k1 -q; $SYNC complete k1 -q => error: unit "k1" was started by boot; HINT
k2: $SYNC fail k2 --reason 'no disk' -q; echo tidied; sleep 60 & sleep 60 => tidied / failed: no disk
# what has one lock runs one at a time, in whatever way each ends
l1: @lock apt; mkdir held && sleep 0.02 && rmdir held =>
l2: @lock apt; mkdir held && sleep 0.02 && rmdir held; exit 1 => failed: exit code 1
l3: @lock apt; mkdir held && sleep 0.02 && rmdir held; kill -9 $$ => failed: killed by signal 9
l4: @lock apt; mkdir held && sleep 0.02 && rmdir held; echo last => last
# a line is shown as it can be
o1: printf 'no newline' => no newline
o2: printf 'one\n\nthree' => one /  / three
o3: printf 'dos\r\n' => dos
o4: printf '10%%\r50%%\r100%%\n' => 100%
o5: printf 'caf\351\n' => caf\xe9
o6: printf 'caf\303\251\000\n' => caféNUL
o7: echo out; echo err >&2 => out / err
o8: exec >&- 2>&-; sleep 0.05 =>
# a script that changes after the check runs as it is then, or fails alone
w1: cd startup.d; rm w2; chmod 644 w3; echo '#!/no/such' > w4; printf '#!/bin/sh\necho new\n' > w6 =>
w2: @want w1; echo old => failed: cannot run DIR/startup.d/w2: No such file or directory
w3: @want w1; echo old => failed: cannot run DIR/startup.d/w3: Permission denied
w4: @want w1; echo old => failed: cannot run DIR/startup.d/w4: the interpreter that its first line names does not exist
w6: @want w1; echo old => new
"""


def test_scripts_run_and_end_as_told(agent: World, gate: Gate) -> None:
    files, says, fails = {}, {}, {}
    rows = SCRIPTS.replace("\n ", "").replace("DIR", str(agent.directory)).replace("NUL", "\0")
    rows = rows.replace(
        "HINT", "its script need not call start; what it waits for is a header: # coder-sync: want NAME"
    )
    for unit, text, end in re.findall("^(\\w+): (.*) =>(.*)", rows, re.M):
        files[unit] = re.sub("(@[^;]*); ", r"\1\n", text)
        lines = end[1:].split(" / ") if end else []
        if end.rpartition(" / ")[2].strip().startswith(("failed: ", "skipped: ", "died: ")):
            fails[unit] = lines.pop()
        if lines:
            says[unit] = lines
    agent.env.update(MINE="yes", CODER_AGENT_SOCKET_PATH="", TMPDIR=".")
    options = ["--grace", "100ms", "--socket-path", agent.path, "--log-dir", "logs"]
    endless, _ = os.pipe()
    patch = "coder_sync.CHECK_EVERY = 600"
    boot = Boot(agent, files, *options, stdin=endless, patch=patch, encoding="utf-8")
    until(lambda: agent.client.list() and agent.status("m") == "pending", "m claimed, which waits for disk")
    agent.end("disk")
    assert "secret" not in boot.ends(1)  # which reads to the end of file
    assert (boot.said(), boot.unsuccessful()) == (says, fails)
    failed, skipped = (sum(end.startswith(how) for end in fails.values()) for how in ("failed", "skipped"))
    assert f"boot: {len(files) - failed - skipped} completed, {failed} failed, {skipped} skipped\n" in boot.told
    assert f"({failed} failed, 2 died, {skipped} skipped)" in boot.told
    assert "warning: s8: ended after its unit had completed (exit code 3)\n" in boot.told
    assert "    | oops\n" in boot.told
    assert agent.client.status("s8").exit_reason == "exit code 3"
    assert not os.path.exists((agent.directory / "private").read_text().strip())
    logs = [(agent.directory / "logs" / f"o{i}.log").read_bytes() for i in range(1, 9)]
    assert logs[:4] == [b"no newline", b"one\n\nthree", b"dos\r\n", b"10%\r50%\r100%\n"]
    assert logs[4:] == [b"caf\xe9\n", b"caf\xc3\xa9\0\n", b"out\nerr\n", b""]
    first, second = [event for event in agent.client.status("r1").history if event.kind == "retry"]
    assert [first.detail, second.detail] == says["r1"]
    second_at, third_at = ((agent.directory / name).stat().st_mtime for name in ("n2", "n3"))
    assert third_at - second_at >= 0.19  # of 200 ms, since the time of a file has steps
    assert len(agent.client.status("r1").tries) == 2
    assert read_lines(agent.directory / "logs" / "r1.log") == says["r1"]


def test_other_terminals_can_ask_while_it_boots(world: World, gate: Gate, call: Call) -> None:
    early = Gate(world, "early")
    files = {"10-a.sh": "cat gate", "b": "@want a", "z": "cat early &"}
    boot = Boot(world, files, "--log-dir", "logs", patch="coder_sync.CHECK_EVERY = 600")
    gate.reached(), early.reached()
    until(lambda: world.status("z") == "completed")
    pid = next(pid for pid in boot.scripts() if os.getpgid(pid) == pid)
    until(lambda: (world.client.status("a").owner or Owner(0, "")).pid == pid, "the script as owner")
    found = re.findall(r"^(\w+) +(\w+)", call.ok(world, "list"), re.M)[1:]
    assert found == [("a", "started"), ("b", "pending"), ("z", "completed")]
    assert f"(pid {pid})" in call.ok(world, "why", "b")
    assert world.client.graph().nodes[0].log == str(world.directory / "logs" / "a.log")
    early.open()
    until(lambda: len(boot.scripts()) == 2)  # and what z has left behind is not said to run on
    gate.open()
    boot.ends()
    assert not os.path.exists(world.path)


def test_a_boot_that_stays_serves_other_boots_until_a_signal(world: World) -> None:
    good = {"a": "echo a >> ran", "b": "@want a\necho b >> ran"}
    broken = {**good, "a": "echo a >> ran; exit 1"}
    stays = Boot(world, {**good, "c": "@ready file:up\n: > up; exec sleep 60"}, "--stay")
    stays.says("staying")
    for files, code in ((good, 0), (broken, 1), (broken, 1), (good, 0)):
        Boot(world, files).ends(code)
    assert read_lines(world.directory / "ran") == ["a", "b", "a", "b", "a", "a", "a", "b"]
    guest = Boot(world, {"d": ""}, "--stay")
    guest.says("staying")
    stays.signal()
    assert "warning" not in stays.ends(143)
    guest.ends(3, "", "went away", leaves=True)


def test_the_agent_of_a_boot_lives_as_long_as_another_boot_needs_it(world: World, gate: Gate) -> None:
    early = Gate(world, "early")
    one = Boot(world, {"a": "cat early"})
    early.reached()
    two = Boot(world, {"b": "cat gate; $SYNC status b"})
    gate.reached()
    early.open()
    one.ends(leaves=True)
    gate.open()
    two.ends()
    assert "Status: started" in two.said()["b"]
    one.gone()
    assert not os.path.exists(world.path)


def test_a_boot_at_an_agent_that_ends_before_it_answers_is_the_agent_itself(world: World, gate: Gate) -> None:
    late = "was = coder_sync.Agent.stop\ndef stop(agent):\n    open('gate').read()\n    was(agent)\n"
    one = Boot(world, {"a": "echo a"}, patch=late + "coder_sync.Agent.stop = stop")
    gate.reached()
    two = Boot(world, {"a": "echo a"})
    time.sleep(0.3)  # it asks again and again
    assert two.process.poll() is None
    gate.open()
    one.ends(0, "a | a\n")
    two.ends(0, "a | a\n")


def test_what_goes_on_behind_its_unit_is_heard_and_looked_after_until_it_ends(world: World) -> None:
    early, more, last, daemon = (Gate(world, name) for name in ("early", "more", "last", "daemon"))
    text = "$SYNC complete a -q; cat early; echo a; cat more; echo $CODER_SYNC_UNIT says more; printf end"
    files = {"a": text, "b": "(cat daemon; echo from the daemon; printf 'its end') &\necho script", "d": "cat last"}
    files["c"] = "@want a b\necho c"
    with open(world.directory / "out", "wb") as out:
        boot = Boot(world, files, "--log-dir", "logs", patch="coder_sync.CHECK_EVERY = 0.1", stdout=out)
    early.reached(), daemon.reached(), last.reached()
    until(lambda: "c | c" in read_lines(world.directory / "out"))
    until(lambda: world.client.graph().nodes[0].running_on, "a service that is known to run on")
    early.open()
    until(lambda: "a | a" in read_lines(world.directory / "out"))
    last.open()
    boot.ends(0, None, "\nstill running: a, b\n", leaves=True)
    assert world.status("a") == "completed"
    more.open(), daemon.open()
    boot.gone()
    boot.out = (world.directory / "out").read_text()
    said = {"a": ["a", "a says more", "end"], "b": ["script", "from the daemon", "its end"], "c": ["c"]}
    assert boot.said() == said
    assert (world.directory / "logs" / "b.log").read_text() == "script\nfrom the daemon\nits end"


def test_the_time_limit_of_a_script_does_not_end_what_it_leaves(world: World, gate: Gate) -> None:
    boot = Boot(world, {"a": "@timeout 1s\ncat gate &"}, patch="coder_sync.CHECK_EVERY = 0.1")
    boot.ends(0, leaves=True)
    time.sleep(1.2)
    assert world.status("a") == "completed"
    gate.open()
    boot.gone()


# ---------------------------------------------------------------------------------------------------------
# Boot: services, locks and further tries.
# ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_service_completes_when_its_probe_succeeds_and_runs_on(world: World) -> None:
    port, page = free_port(), free_port()
    probes = {"port": f"tcp:{port}", "host": f"tcp:localhost:{port}", "unix": "unix:./up.sock", "file": "file:up"}
    probes.update(http=f"http://127.0.0.1:{page}/health")
    probes.update(command="test -e up && test $CODER_SYNC_UNIT = command # 'it", notify="notify")
    end, notify = Gate(world, "end"), Gate(world, "notify")
    says = 'import os, socket; s = socket.socket(1, 2); s.sendto(b"STATUS=x\\nREADY=1", os.environ["NOTIFY_SOCKET"])'
    act = {"notify": f"cat notify; {sys.executable} -IS -c '{says}'\n"}
    services = {name: f"@ready {probe}\n{act.get(name, '')}exec cat end" for name, probe in probes.items()}
    users = {f"of-{name}": f"@want {name}\necho {name} is up" for name in probes}
    boot = Boot(world, {**services, **users})
    notify.reached()
    expected = {**dict.fromkeys(services, "started"), **dict.fromkeys(users, "pending")}
    until(lambda: {unit.unit_name: unit.status for unit in world.client.list()} == expected)
    until(lambda: [coder_sync.proc_line(pid, "Name:") for pid in boot.left()].count("cat") == len(services))
    web = socket.create_server(("127.0.0.1", page))
    with web, socket.create_server(("127.0.0.1", port)), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(world.directory / "up.sock"))
        listener.listen()
        (world.directory / "up").touch()
        notify.open()
        with web.accept()[0] as asked:
            assert asked.recv(1000).startswith(b"GET /health HTTP/1.")
            asked.sendall(b"HTTP/1.0 302 Found\r\n\r\n")
        assert boot.process.wait(PATIENCE) == 0
    until(lambda: len(boot.left()) == 8)  # the services, and what passes their output on; each takes signals
    until(lambda: {coder_sync.proc_line(pid, "SigBlk:").strip("0") for pid in boot.left()} == {""})
    end.keep_open(lambda: not boot.left())
    boot.ends(0, None, f"\nstill running: {', '.join(sorted(services))}\n", leaves=True)
    assert boot.said() == {f"of-{name}": [f"{name} is up"] for name in services}


def test_an_address_is_a_port_with_or_without_a_host_or_a_host_whose_port_is_known() -> None:
    assert coder_sync.address_of("65535") == ("", 65535)
    for text, host in (("d\u00e4.b.", "d\u00e4.b."), ("[fe80::1%eth0]", "fe80::1%eth0")):
        assert coder_sync.address_of(f"{text}:1") == coder_sync.address_of(f"{text}:1", 80) == (host, 1)
        assert coder_sync.address_of(text, 80) == (host, 80)
    assert coder_sync.Probe("tcp://db:5432/").address == coder_sync.Probe("tcp:db:5432").address
    odd = ["", ":", "http", "0", "65536", "-1", "1" * 5000, "\u0661", "a b:1", "[a]b:1", "[a:1", "a@b:1", "\x1b[31m:1"]
    for text in odd:
        with pytest.raises(UsageError, match="is no address") as caught:
            coder_sync.address_of(text)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 150


def test_a_port_without_a_host_may_also_be_one_of_ipv6() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no such protocol here")
    with server:
        coder_sync.connect(coder_sync.Probe(f"tcp:{server.getsockname()[1]}")).close()


WEB = "http://127.0.0.1:{}"


def answered(server: socket.socket, *answers: bytes) -> threading.Thread:
    """Answer the next request in these parts, slowly; the thread that does so has `asked` at its end."""

    def answer() -> None:
        with server.accept()[0] as peer, contextlib.suppress(OSError):
            thread.asked = peer.recv(1000)  # type: ignore[attr-defined]
            for part in answers:
                peer.sendall(part)
                time.sleep(0.02)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def test_a_try_of_http_ends_in_time_though_the_server_answers_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "TRY_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = answered(server, *[b"H"] * 1000)
        probe = coder_sync.Probe(WEB.format(server.getsockname()[1]))
        with coder_sync.connect(probe) as sock, pytest.raises(OSError, match="timed out"):
            coder_sync.http_status(sock, probe)
        thread.join()


def test_an_http_answer_of_400_or_more_and_what_is_no_http_are_not_ready() -> None:
    answers = {"HTTP/1.1 400 x": "HTTP status 400", "HTTP/1.1 399": "", "HTTP/1.1 " + "9" * 900: "HTTP status 9999"}
    answers.update(dict.fromkeys(("", "hello", "HTTP/1.1", "HTTP/1.1 OK", "ICY 200 OK"), "its answer is not HTTP"))
    for status, error in answers.items():
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = answered(server, status.encode() + b"\r\n\r\n")
            prober = coder_sync.Prober(WEB.format(server.getsockname()[1]), {})
            until(lambda: prober.error == error, error)  # noqa: B023
            thread.join()
        prober.close()


def test_the_user_and_password_of_an_address_are_sent_and_never_shown(agent: World, call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = WEB.format(server.getsockname()[1]).replace("//", "//me:s%65cret@") + "/a?b#c"
        thread = answered(server, b"HTTP/1.0 403 No\r\n\r\n")
        words = ["run", "a", "--ready", url, "--ready-timeout", "500ms", "--", "sleep", "60"]
        run = agent.popen(*words)
        said = until(lambda: agent.client.status("a").reason) + call.ok(agent, "list") + call.ok(agent, "why")
        said += call.ok(agent, "status", "a", "-o", "json") + call.ok(agent, "timeline", "-o", "json")
        thread.join()
        said += finish(run).stderr + agent.run("wait", "--ready", url, "--timeout", "1ms").stderr
        said += "".join(mistakes(startup(agent, {"a": f"@redy {url}\n@ready {url.replace('//', '//x ')}"})))
    asked = thread.asked.decode().splitlines()  # type: ignore[attr-defined]
    assert asked[0] == "GET /a?b HTTP/1.0" and "Authorization: Basic bWU6c2VjcmV0" in asked
    assert "cret" not in said and "not ready after 500ms: http://***@127.0.0.1:" in said, said


@needs_proc
def test_a_try_ends_with_all_that_it_started_also_if_it_hangs(world: World) -> None:
    fails = "test -e failed || { sleep 60 & echo $! > failed; exit 1; }"
    hangs = "timeout 60 sleep 60 & a=$!; setsid sleep 60 & echo $a $! $$ > pids; sleep 60"
    prober = coder_sync.Prober(f"cd {world.directory}; {fails}; {hangs}", coder_sync.environment())
    pids = until(lambda: " ".join(read_lines(world.directory / "pids")).split())
    assert not alive(int(read_lines(world.directory / "failed")[0]))
    prober.close()
    until(lambda: not any(alive(int(pid)) for pid in pids))


@needs_proc
def test_a_unit_whose_probe_succeeds_already_fails_before_its_command_is_run(world: World, shared: World) -> None:
    code = "import os, socket; s = [socket.create_server(('127.0.0.1', 0)), socket.socket(socket.AF_UNIX)]"
    code += "; s[1].bind('up.sock'); s[1].listen(); os.write(1, b'%d\\n' % s[0].getsockname()[1])\n"
    code += "while 1:\n c = s[0].accept()[0]; c.send(b'HTTP/1.0 200 x\\r\\n')"
    server = world.spawn([*PYTHON, code])
    port = int(line_of(server.stdout))
    who = f"end what listens there (pid {server.pid}, {Path(f'/proc/{server.pid}/comm').read_text().strip()}) first"
    probes = {"tcp": f"tcp:{port}", "host": f"tcp://localhost:{port}/", "unix": "unix:up.sock", "web": WEB.format(port)}
    files = {name: f"@ready {probe}\ntouch ran" for name, probe in probes.items()}
    boot = Boot(world, {**files, "z": "@want tcp\ntouch ran"})
    whys = {name: f"{probe} answers already, before the command was run: {who}" for name, probe in probes.items()}
    boot.ends(1, "", "skipped: z", *(f"failed: {name} ({why}); " for name, why in whys.items()))
    unit = f"old-{next(COUNT)}"
    done = shared.run("run", unit, "--ready", probes["tcp"], "--", "touch", str(world.directory / "ran"))
    assert (done.returncode, done.stderr) == (125, f"error: {unit}: {whys['tcp']}\n")
    assert not (world.directory / "ran").exists()


def test_each_try_of_a_command_is_preceded_by_one_of_its_probe(world: World, gate: Gate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as old:
        probe = f"@ready tcp:{old.getsockname()[1]}\n@retry 1000 20ms"
        serve = f"import socket; s = socket.create_server(('', {old.getsockname()[1]})); open('gate').read()"
        boot = Boot(world, {"a": f'{probe}\nexec {sys.executable} -IS -c "{serve}"', "b": "@want a\n: > gate"})
        for _ in range(3):
            old.accept()
    boot.ends(0, None, "boot: 2 completed", leaves=True)


def test_what_was_there_before_the_command_is_no_sign_that_it_is_ready(world: World) -> None:
    for name in ("up", "old"):
        (world.directory / name).touch()
    Gate(world, "end"), Gate(world, "end2")
    files = {"a": "@ready file:up\nsleep 0.2; echo > up; cat end", "b": "@ready true\ncat end"}
    files.update(c="@want a b\n: > end", d="@ready test -e up && sleep 0.2\n@want a\ncat end2")
    files.update(e="@want c d\n: > end2", f="@ready file:old\n@ready-timeout 200ms\nsleep 60")
    slow = "coder_sync.CHECK_TIMEOUT = 0.1"  # a probe that hangs is no reason to wait
    told = Boot(world, files, patch=slow).ends(1, "", "boot: 5 completed, 1 failed", leaves=True)
    assert "f (not ready after 200ms: file:old (it is as it was before the command was run)" in told
    assert "warning: b: true succeeds already, before the command is run: it says nothing about it\n" in told
    assert told.count("warning: ") == 1, told


def test_who_waits_for_a_service_is_told_what_it_lacks(agent: World, call: Call) -> None:
    code = agent.directory / "code"
    code.write_text("exit 3")
    often = "coder_sync.ERROR_EVERY = 0.1"
    Boot(agent, {"cache": f"@ready . {code}\nsleep 60"}, patch=often)
    run = agent.spawn(altered(often, "run", "db", "--ready", f". {code}", "--", "sleep", "60"))
    for name in ("cache", "db"):
        reason = until(lambda: agent.client.status(name).reason, name)  # noqa: B023
        assert reason == f"not ready yet: . {code}"
        peer = agent.connect()
        peer.request("start", unit=f"after {name}", dependencies=[name], progress=True)
        (row,) = peer.read()["params"]["missing"]
        text = coder_sync.dependency_text(coder_sync.record(Dependency, row))
        assert f"{name} started " in text and f" ago ({reason}) by " in text
        until(lambda: agent.client.status(name).probe_error == "exit code 3")  # noqa: B023
    code.write_text("exit 4")
    until(
        lambda: f"it is probing . {code} for " in (told := call.ok(agent, "why")) and told.count("(exit code 4)") == 2
    )
    code.write_text("exit 0")
    until(lambda: agent.status("cache") == agent.status("db") == "completed")
    assert [unit.reason for unit in agent.client.list()] == ["", "", "", ""]
    if PROC:
        until(lambda: len(os.listdir(f"/proc/{run.pid}/task")) == 1, "no thread that probes")


# Says each of its words, then what systemd-notify(1) does: fails unless the descriptor that it sends is taken.
NOTIFY = """
import array, os, select, socket, sys
if os.getuid() == 0:  # as a service does that starts as root
    os.setgroups([])
    os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.connect(os.environ["NOTIFY_SOCKET"])
for word in sys.argv[1:]:
    sock.send(word.encode())
read, write = os.pipe()
sock.sendmsg([b"BARRIER=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))])
os.close(write)
sys.exit(not select.select([read], [], [], 10)[0])
"""


def test_what_a_service_says_is_taken_until_it_has_ended_also_from_another_user(
    world: World, shared: World, gate: Gate
) -> None:
    notify = f"{sys.executable} -IS -c '{NOTIFY}'"
    service = f"set -e; umask 077; {notify} STATUS=x READY=1; {notify} READY=1 WATCHDOG=1; {notify} STOPPING=1"
    name = f"notify-{next(COUNT)}"
    done = shared.run("run", name, "--ready", "notify", "--", "sh", "-c", f"{service}; exit 5")
    assert (done.returncode, shared.status(name)) == (5, "failed"), done
    boot = Boot(world, {"a": f"@ready notify\n{service}; echo all > gate", "b": "@want a\ncat gate"})
    boot.ends(0, "b | all\n", leaves=True)


def test_a_service_that_speaks_without_end_is_slowed_down(world: World) -> None:
    path = str(world.directory / "notify")
    notified = coder_sync.NotifySocket(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", path)
    assert notified.ready()
    began = time.monotonic()
    assert all(notified.ready() for _ in range(20)) and time.monotonic() - began >= 0.1
    notified.close()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_what_is_no_file_is_refused_in_a_line_wherever_a_file_is_named(agent: World, make: Any) -> None:
    name = str(agent.directory / "it.svg")
    make(name)
    scripts = startup(agent, {"a": ""})
    calls = [["timeline", "--compare", name], ["boot", scripts, "-q", "--timeline", name], ["boot", name]]
    calls += [["serve", option, name, "--socket-path", "other"] for option in ("--pid-file", "--log-file")]
    for words in calls:
        said = agent.run(*words).stderr
        assert said.count(name) == 1 and len(said.splitlines()) <= 2 and "internal" not in said, (words, said)


# ---------------------------------------------------------------------------------------------------------
# Boot: how many at once, failures, what is told, exit status.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_than_so_many_jobs_run_at_once(world: World, gate: Gate, jobs: int) -> None:
    files = {f"x{i}": "sleep 0.02" if i < 6 else "@want x1 x2\nsleep 0.02" for i in range(9)}
    boot = Boot(world, {"a": "cat gate", **files}, "--jobs", f"{jobs}", "--timeline", "t.json")
    gate.reached()
    world.client.complete("x7")
    gate.open()
    boot.ends()
    rows = json.loads((world.directory / "t.json").read_text())["units"]
    rows = [row for row in rows if row["started"] is not None]
    ends = [(row["ended"], -1) for row in rows] + [(row["started"], 1) for row in rows]
    assert len(rows) == 9 and max(itertools.accumulate(step for _, step in sorted(ends))) == jobs
    ended = {row["unit_name"]: row["ended"] for row in rows}
    assert all(ended[name] <= row["started"] for row in rows for name in row["wants"])


def test_fail_fast_stops_what_runs_at_the_first_failure_or_death(world: World, gate: Gate) -> None:
    files = {"a": "cat gate; exit 3", "b": "exec sleep 60", "c": "@want b", "d": "echo d"}
    boot = Boot(world, files, "--fail-fast", "--jobs", "2")
    gate.open()
    told = boot.ends(1, "", "failed: a (exit code 3)", "failed: b (stopped: another unit failed)")
    assert re.search(r"(not started|skipped): c: .*stopped: another unit failed", told)
    counts = [re.findall(r"(\d) (failed|skipped)", line) for line in told.splitlines() if " failed" in line]
    assert counts[0] == counts[-1], "the report and the summary agree"
    boot = Boot(world, {"a": "$SYNC complete a -q; exit 3", "b": "@want a\nexec sleep 60"}, "--fail-fast")
    boot.ends(1, "", "died: a (completed, then ended: exit code 3); ")
    assert boot.unsuccessful()["b"].endswith("stopped: another unit ended")


def test_the_summary_shows_the_last_ten_lines_of_what_failed(world: World) -> None:
    files = {"a": "seq 1 30; printf 'the end' >&2; exit 2", "b": "$SYNC fail b -q"}
    boot = Boot(world, files, "--quiet", "--timeline", "t.svg")
    shown = "".join(f"    | {line}\n" for line in (*range(22, 31), "the end"))
    told = boot.ends(1, "", f"startup.d/a\n{shown}failed: b; /")
    assert re.search(r"in all \(2 failed\); critical path: [ab] ", told)
    assert (world.directory / "t.svg").read_text().startswith("<svg")


def test_a_quiet_boot_that_succeeds_says_nothing(world: World) -> None:
    files, quick = {"a": "echo a; sleep 0.1", "b": "sleep 60 &"}, "coder_sync.REPORT_EVERY = 0.01"
    (world.directory / "logs").mkdir()
    (world.directory / "logs" / "a.log").write_text("of an earlier boot\n")
    boot = Boot(world, files, "--quiet", "--log-dir", "logs", patch=quick)
    assert boot.ends(0, "", leaves=True) == ""  # which reads to the end of file
    assert (world.directory / "logs" / "a.log").read_text() == "a\n"


def test_what_runs_and_what_waits_for_what_is_told_now_and_then(agent: World, gate: Gate) -> None:
    somebody = agent.connect()
    somebody.call("start", unit="other", hold=True)
    files = {"a": "@lock apt\ncat gate", "b": "@want a\n@lock apt", "c": "@want disk other\n@extern disk other"}
    files.update(d="@want a --requires start\n@lock apt", e="@ready file:up\nsleep 60", f="@retry 1 10m\nexit 9")
    files.update(g="@ready file:g\n: > g; sleep 60", h="@retry 1 0\ntest -e tried && sleep 60; touch tried; exit 1")
    boot = Boot(agent, files, "--grace", "100ms", patch="coder_sync.REPORT_EVERY = 0.3")
    boot.says("to try again")
    line = until(lambda: re.search(".* h [^,]*try 2 of 2.*", boot.says("boot: 1 of 8 ended")))[0]
    assert "g " not in line
    assert re.match(r"boot: 1 of 8 ended after [\d.]+m?s; running: (a|e|h) ", line) and ", e " in ", " + line[10:]
    assert "(not ready: no such file)" in line and "b for a" in line and "f to try again after exit code 9" in line
    assert re.search(r"c for disk, not registered; other, started by .*? \(pid \d+\)", line)
    assert "d for lock apt, which a has" in line
    gate.reached()
    boot.signal()
    gate.open()
    boot.ends(143)


# ---------------------------------------------------------------------------------------------------------
# Boot: signals and time.
# ---------------------------------------------------------------------------------------------------------

STUBBORN = "trap '' TERM INT; echo on; cat gate; while :; do sleep 60; done"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_reaches_everything_and_nothing_is_left(world: World, gate: Gate, number: int, code: int) -> None:
    text = "@retry 1 10m\ntrap 'echo told; exit 1' INT TERM HUP; sleep 60 & cat gate; (sleep 60 & sleep 60); wait"
    files = {"a": text, "b": "@want a", "daemon": "sleep 60 &", "c": "@want daemon\ncat c", "r": "@retry 5 10m\nexit 1"}
    after = Gate(world, "c")
    boot = Boot(world, files, "--grace", "300ms", patch="coder_sync.REPORT_EVERY = 0.2")  # for those that ignore INT
    gate.open()
    after.reached()
    boot.says("r to try again after exit code 1")
    until(lambda: len(boot.left()) >= 7)
    boot.signal(number)
    boot.ends(code, None, f"stopped: boot got signal {number}", "b: ", f"failed: r (stopped: boot got signal {number})")


def test_a_unit_is_told_to_end_once_what_wants_it_has_gone_also_through_others(world: World) -> None:
    text = "trap 'cat {0}; echo {0}; exit' TERM\n: > up-{0}; sleep 60 & wait"
    wants = {"a": "extern x", "b": "want a", "c": "want j", "d": "want a"}
    gates = {name: Gate(world, name) for name in wants}
    files = {name: f"@{want}\n@ready file:up-{name}\n{text.format(name)}" for name, want in wants.items()}
    boot = Boot(world, {**files, "j": "@want b", "e": "@want b c d"}, "--stay")
    boot.says("staying")
    at_rest(boot.background())
    boot.signal()
    for name in "dcba":
        gates[name].open()
        boot.prints(f"{name} | {name}")
    boot.ends(143, "")


@needs_proc
@pytest.mark.parametrize("grace", ["200ms", "10m"])
def test_what_ignores_the_signal_is_killed_after_the_grace_or_at_a_second_one(world: World, grace: str) -> None:
    texts = [STUBBORN, f"({STUBBORN}) & wait", f"$SYNC complete $CODER_SYNC_UNIT -q; {STUBBORN}"]
    gates = [Gate(world, f"gate{i}") for i in range(len(texts))]
    files = {f"x{i}": text.replace("cat gate", f"cat gate{i}") for i, text in enumerate(texts)}
    files["told"] = "trap 'echo told > told' TERM; : > trapped; while :; do sleep 0.01; done"
    boot = Boot(world, files, "--grace", grace)
    for gate in gates:
        gate.open()
    until((world.directory / "trapped").exists)
    began = time.monotonic()
    boot.signal()
    until(lambda: read_lines(world.directory / "told"))
    if grace == "10m":
        boot.signal()
    boot.ends(143)
    assert grace == "10m" or time.monotonic() - began >= 0.2


def test_term_is_sent_once_and_what_kill_does_not_end_is_named(world: World, gate: Gate) -> None:
    spy = """
coder_sync.LAST_WAIT, signal_to = 0.5, coder_sync.signal_to
def spy(pid, *numbers):
    if numbers[0] != 0:
        with open("signals", "a") as file:
            print(pid, numbers[0], file=file)
    return numbers[0] == 9 or signal_to(pid, *numbers)  # no KILL arrives
coder_sync.signal_to = spy
"""
    files = {"left": "(trap '' TERM; : > up; cat end) & while ! test -e up; do :; done; exit 3"}
    files.update(deaf="@timeout 50ms\ntrap '' TERM; exec cat gate", obeys="@timeout 50ms\nsleep 60 & sleep 60")
    end = Gate(world, "end")
    told = Boot(world, files, "--grace", "500ms", patch=spy).ends(1, "", leaves=True)
    gate.open(), end.open()
    lines = read_lines(world.directory / "signals")
    pids = re.findall(r"(?:exit code 3|timed out after 50ms); cannot be killed: (\d+) \(", told)
    assert len(pids) == 2 and all(lines.count(f"{pid} 15") == 1 and f"{pid} 9" in lines for pid in pids), told
    others = {line.split()[0].lstrip("-") for line in lines} - {*pids}
    assert all(f"{pid} 9" not in lines for pid in others), "what has obeyed is left alone"


def test_signals_that_it_was_started_to_ignore_stay_ignored(world: World, gate: Gate) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # but this one, without which no end is ever seen

    boot = Boot(world, {"a": "cat gate; echo a"}, preexec_fn=ignore)
    gate.reached()
    boot.signal(signal.SIGHUP)
    gate.open()
    boot.ends(0, "a | a\n")


@needs_proc
def test_on_a_terminal_there_are_colours_a_status_line_and_control_c(world: World, gate: Gate) -> None:
    end, name = Gate(world, "end"), "a-unit-of-23-characters"
    boot, master = boot_on_terminal(world, {name: "cat gate; echo hello; exec cat end", "b": f"@want {name}"})
    seen = shown_on(master, f"\r\033[K[0/2 ended, 1 waiting] {name} ".encode())
    gate.open()
    seen = shown_on(master, b"hello", seen)
    end.reached()  # with no shell that SIGINT might find between two commands
    os.write(master, b"\x03")
    with contextlib.suppress(OSError):  # end of file on a terminal
        while True:
            seen += os.read(master, 4096)
    os.close(master)
    assert boot.process.wait(PATIENCE) == 130
    shown = seen.decode()
    assert re.search(rf"\r\033\[K\033\[3[2-6]m{name}\033\[0m \| hello\r\n", shown) and "not started: b" in shown
    summary = shown.rpartition("signal 2\r\n")[2].splitlines()
    assert len(summary) == 2 and max(map(len, summary)) <= 70, "the last lines are wrapped"


@needs_proc
def test_a_terminal_that_takes_no_more_holds_up_neither_scripts_nor_a_signal(world: World, gate: Gate) -> None:
    boot, master = boot_on_terminal(world, {"a": "yes | head -c 100000", "b": "@want a\ncat gate"}, patch=HURRY)
    gate.reached()
    boot.signal()
    assert boot.process.wait(PATIENCE) == 143
    os.close(master)


def test_the_status_line_has_what_fits_and_says_how_many_more_there_are() -> None:
    out = coder_sync.Output(["a"], quiet=False)
    out.columns = 24
    b12, a17 = 12 * "b", 17 * "a"
    lines = {"": "", "a": " a", "a b c": " a, b, c", f"a {b12}": f" a, {b12}", f"a {b12}b": " a, +1 more"}
    for items, shown in {**lines, f"{a17} b c": " +3 more"}.items():
        out.draw_status("0 ended", items.split(), 0.0)
        assert out.pending[1].rpartition(b"\r\033[K")[2].decode() == "0 ended" + shown
    out.columns = 10
    out.draw_status("0 ended", ["a", "b"], 0.0)
    assert out.pending[1].endswith(b"\r\033[K0 ended +2 more")


def test_after_the_startup_lines_that_nobody_takes_are_dropped() -> None:
    out = coder_sync.Output(["a"], quiet=False)
    out.may_drop = True
    for _ in range(1000):
        out.lines("a", ["x" * 1000])
    assert len(out.pending[1]) < coder_sync.FULL + 2000


def test_the_prefix_is_as_wide_as_the_longest_name_and_never_red() -> None:
    for names, width in ((["a"], 1), (["a", "abc"], 3), (["a", *(f"{i}" + "n" * 60 for i in range(50))], 24)):
        out = coder_sync.Output(names, quiet=False)
        for name in names:
            out.lines(name, ["x"])
        assert {line.index(" | x") for line in out.pending[1].decode().splitlines()} == {width}
        out._colour = True
        for name in names:
            out.lines(name, ["x"])
    assert {int(n) for n in re.findall(r"\033\[(\d+)m", out.pending[1].decode())} == {0, 32, 33, 34, 35, 36}


# ---------------------------------------------------------------------------------------------------------
# Ends of commands: of all their processes, and only then a lock passes on, the next try begins, it is reported.
# ---------------------------------------------------------------------------------------------------------

ESCAPES = {
    "timeout": "timeout 9 sleep 8.5",  # makes a process group of its own
    "session": "setsid -w sleep 9",
    "orphan": "(setsid sleep 9 &); sleep 8",
    "deaf": "trap '' TERM; sleep 9; sleep 8",
    "stopped": "sleep 9 & kill -STOP $!; kill -STOP $$; sleep 8",
    "forks": "trap '' TERM; f() { (sleep 0.02; f) & }; f; wait; sleep 9",
    "failed": "(setsid sleep 9 &); sleep 9 & exit 3",
    "unmarked": "env -i PATH=$PATH setsid sh -c 'echo $$ >> pids; exec sleep 9' & sleep 8",
}


@needs_proc
def test_no_process_of_a_failed_script_outlives_it_whatever_its_group_or_session(world: World) -> None:
    files = {name: f"@timeout 400ms\n@retry 1 0\necho {name}\n{script}" for name, script in ESCAPES.items()}
    boot = Boot(world, files, "--grace", "1s")
    boot.ends(1)
    assert {unit: lines.count(unit) for unit, lines in boot.said().items()} == dict.fromkeys(ESCAPES, 2)
    pids = read_lines(world.directory / "pids")
    assert len(pids) == 2 and not any(alive(int(pid)) for pid in pids)
    reasons = {reason.partition(";")[0] for reason in boot.unsuccessful().values()}
    assert reasons == {"failed: timed out after 400ms", "failed: exit code 3"}


@needs_proc
@pytest.mark.parametrize("escape", ["timeout", "failed"])
def test_a_try_of_a_run_leaves_nothing_to_the_next(agent: World, escape: str) -> None:
    script = ESCAPES[escape]
    mark = f"RUN={os.urandom(8).hex()}"
    count = f"for p in $(grep -lszxF {mark} /proc/[0-9]*/environ); do cat ${{p%environ}}comm; done | grep -c sleep"
    late = ["--ready", "notify", "--ready-timeout", "600ms", "--retry", "1", "--retry-delay", "0"]
    argv = altered("coder_sync.Task.grace = 1.0", "run", "a", *late, "--", "sh", "-c", f"{count} 2>/dev/null\n{script}")
    done = finish(agent.spawn(argv, env={**agent.env, **dict([mark.split("=")])}))
    assert done.returncode == (3 if "exit 3" in script else 124) and done.stdout == "0\n0\n", done
    assert marked(mark) == []


@needs_proc
def test_a_signal_to_a_run_that_ends_what_its_command_has_left_kills_that(agent: World) -> None:
    script = "(trap '' TERM; : > up; exec sleep 60) & echo $$; until test -e up; do sleep 0.01; done; exit 3"
    run = agent.popen("run", "a", "--", "sh", "-c", script)
    first, began = int(line_of(run.stdout)), time.monotonic()
    until(lambda: not alive(first))
    time.sleep(0.2)
    done = stopped(run)
    assert (done.returncode, done.stderr, agent.client.status("a").reason) == (3, "", "exit code 3")
    assert time.monotonic() - began < coder_sync.Task.grace / 2


@needs_proc
def test_a_signal_to_a_run_leaves_a_service_in_the_background_time_to_end(agent: World) -> None:
    daemon = "trap 'echo bye; exit' TERM; : > up; while :; do sleep 0.01; done"
    script = f'setsid sh -c "{daemon}" & echo $$; until test -e go; do sleep 0.01; done'
    run = agent.popen("run", "a", "--ready", "file:up", "--", "sh", "-c", script)
    first = int(line_of(run.stdout))
    happened(agent, "a", "completed")
    (agent.directory / "go").touch()
    until(lambda: not alive(first))
    done = stopped(run)
    assert (done.returncode, done.stdout, agent.client.status("a").reason) == (143, "bye\n", "stopped")


@needs_proc
def test_a_signal_to_a_run_ends_also_what_hides_from_its_command(agent: World) -> None:
    script = "env -i PATH=$PATH setsid sh -c 'echo $$; exec sleep 60' & sleep 60"
    run = agent.popen("run", "a", "--", "sh", "-c", script)
    pid = int(line_of(run.stdout))
    assert stopped(run).returncode == 143 and not alive(pid)


def test_a_lock_passes_on_when_nothing_is_left_of_a_failed_command(world: World) -> None:
    late = "@lock apt\n@timeout 300ms\nsh -c \"trap 'sleep 1; echo wound up; exit' TERM; sleep 60 & wait; sleep 1\""
    boot = Boot(world, {"a": f"{late}\necho never", "b": "@lock apt\necho b"})
    boot.ends(1, "a | wound up\nb | b\n", "failed: a (timed out after 300ms)")


def test_the_first_process_is_told_to_end_and_when_it_has_the_others(world: World, gate: Gate) -> None:
    worker = "sh -c \"trap 'echo worker ends; exit' TERM; echo on; sleep 60 & wait; sleep 1\" &"
    boot = Boot(world, {"a": f"trap 'cat gate; echo master ends; exit' TERM; {worker} wait"}, "--grace", "10m")
    boot.prints("a | on")
    boot.signal()
    gate.open()
    boot.ends(143, "a | master ends\na | worker ends\n")


def test_the_others_are_told_to_end_after_half_of_the_time_too(world: World) -> None:
    worker = "sh -c \"trap 'echo worker ends; exit' TERM; echo on; sleep 60 & wait; sleep 1\" &"
    script = f"exec 2> err\ntrap 'echo told' TERM; {worker} while :; do sleep 0.05; done"
    boot = Boot(world, {"a": script}, "--grace", "2s")
    boot.prints("a | on")
    boot.signal()
    boot.ends(143, "a | told\na | worker ends\n")


@needs_proc
def test_a_pid_that_is_another_process_by_now_is_left_alone(world: World) -> None:
    other = world.spawn(["sleep", "60"])
    for own in (True, False):
        family = coder_sync.Family(other.pid, own, "")
        family._known[other.pid] = int(coder_sync.stat_of(other.pid)[19]) - 1
        family.first_alive = False
        family.scan(coder_sync.Processes)
        assert family.pids() == []
        family.terminate_others(), family.kill()
    assert other.poll() is None


@NAMESPACES
def test_what_a_process_1_does_not_reap_counts_as_gone(world: World) -> None:
    lazy = ["sh", "-c", '"$@"; echo end; exec sleep 60', "-"]
    boot = Boot(world, {"a": "sleep 0.3 & exit 3"}, "--grace", "10m", under=[*UNSHARE, *lazy])
    boot.prints("end")
    boot.process.kill()


@NAMESPACES
def test_without_proc_the_processes_of_a_command_are_those_of_its_group(world: World) -> None:
    files = {
        "a": "@timeout 300ms\n(trap '' TERM; sleep 60; sleep 50) & sleep 60",
        "b": "sleep 0.2 & exit 3",
        "c": "@timeout 300ms\nsh -c \"trap 'echo ended; exit' TERM; sleep 60 & wait\" & exec sleep 60",
    }
    boot = Boot(world, files, "--grace", "1s", under=without("/proc"))
    boot.ends(1, None, "failed: a (timed out after 300ms)", "failed: b (exit code 3)")
    assert "c | ended\n" in boot.out


# ---------------------------------------------------------------------------------------------------------
# Boot: output.
# ---------------------------------------------------------------------------------------------------------


def test_lines_are_whole_in_order_and_never_mixed(world: World) -> None:
    text = f"""#!{sys.executable} -IS
import os, sys
data = "".join(f"{{os.environ['CODER_SYNC_UNIT']}} {{i}} {{'x' * (i % 300)}}.\\n" for i in range(3000)).encode()
while data:
    data = data[os.write(1 + len(data) % 2, data[:3001]) :]
"""
    boot = Boot(world, dict.fromkeys("abc", text))
    boot.ends()
    assert boot.said() == {name: [f"{name} {i} {'x' * (i % 300)}." for i in range(3000)] for name in "abc"}


def test_a_line_that_is_too_long_is_cut_between_characters(world: World) -> None:
    text = "x" + 100_000 * "\u20ac"
    (world.directory / "euros").write_text(text, encoding="utf-8")
    boot = Boot(world, {"a": "cat euros"}, encoding="utf-8")
    boot.ends()
    pieces = boot.said()["a"]
    assert "".join(pieces) == text and max(map(len, pieces)) < 80_000


def test_names_of_whatever_letters_have_a_prefix_a_path_and_a_log(world: World) -> None:
    units = ['it\'s a "b" $(x)', "x/y z", "x_y_z", "\u00e9" * 127]
    files = {f"{i}": f'@unit {shlex.quote(unit)}\necho {i} "$0"' for i, unit in enumerate(units)}
    path = startup(world, files, "my 'dir' $HOME")
    out = world.ok("boot", path, "--log-dir", "the logs'", encoding="utf-8")
    texts = [f"{i} {path}/{i}" for i in range(4)]
    assert sorted(line.split(" | ")[1] for line in out.splitlines()) == texts
    assert 'it\'s a "b" $(x)' in out and "x/y z  " in out
    assert sorted(log.read_text() for log in (world.directory / "the logs'").iterdir()) == [f"{t}\n" for t in texts]


def test_much_output_hurts_neither_the_memory_nor_the_others(world: World) -> None:
    many = f"#!{sys.executable} -IS\nfor _ in range(500): print(('x' * 999 + chr(10)) * 100, end='')"
    files = {"many": many, "long": "@want many\nhead -c 30000000 /dev/zero | tr '\\000' x", "b": "echo still here"}
    with open(world.directory / "out", "wb") as out:
        boot = Boot(world, files, "--stay", stdout=out)
    boot.says("staying")
    assert int(coder_sync.proc_line(boot.background(), "VmHWM:").split()[0]) < 40 * 1024
    boot.signal()
    boot.ends(143)
    seen = (world.directory / "out").read_bytes()
    assert seen.count(b"many | " + b"x" * 999 + b"\n") == 50000
    assert b"b    | still here\n" in seen and len(seen) > 80e6 and max(map(len, seen.split(b"\n"))) < 80_000


def test_a_stdout_that_is_closed_early_or_never_open_does_not_stop_the_boot(world: World) -> None:
    boot = Boot(world, {"a": "seq 1 100000", "b": "@want a\ntouch ran"})
    boot.prints("a | 1")
    boot.process.stdout.close()  # type: ignore[union-attr]
    assert boot.process.wait(PATIENCE) == 0 and (world.directory / "ran").exists()
    Boot(world, {"a": "echo a; touch ran-again"}, under=["sh", "-c", 'exec "$@" >&-', "-"]).ends(0, "")
    assert (world.directory / "ran-again").exists()


@needs_proc
def test_a_reader_that_stops_holds_up_scripts_but_no_signal(world: World) -> None:
    files = {"a": "echo $$ > pid; exec cat /dev/zero", "b": "exec sleep 60"}
    boot = Boot(world, files, patch=HURRY, stderr=subprocess.STDOUT)
    pid = int(until(lambda: read_lines(world.directory / "pid"))[0])
    at_rest(pid)
    assert int(re.findall(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[0]) < 2e6
    assert world.status("a") == "started"  # the agent answers all the while
    boot.signal()
    assert boot.process.wait(PATIENCE) == 143 and boot.left() == []


# ---------------------------------------------------------------------------------------------------------
# Boot: what comes after it, and process 1.
# ---------------------------------------------------------------------------------------------------------


def test_it_becomes_the_command_as_if_there_had_been_no_boot(world: World) -> None:
    script = 'echo $$ "$@"; test -e $CODER_AGENT_SOCKET_PATH && echo agent; ls /proc/self/fd | xargs; '
    script += "grep -E 'SigBlk|SigIgn' /proc/self/status; exit 7"
    boot = Boot(world, {"a": "echo a"}, "-q", "--", "sh", "-c", script, "sh", "--x", "")
    done = finish(boot.process)
    pid, descriptors, blocked, ignored = done.stdout.splitlines()
    ours = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
    usual = int(ours.split()[1], 16) & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)  # which Popen restores
    assert (done.returncode, pid, descriptors) == (7, f"{boot.process.pid} --x ", "0 1 2 3")
    assert blocked.split()[1].strip("0") == "" and int(ignored.split()[1], 16) == usual


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGWINCH])
def test_a_signal_while_it_boots_keeps_it_from_becoming_the_command(world: World, gate: Gate, number: int) -> None:
    boot = Boot(world, {"a": "cat gate"}, "-q", "--always", "--", "echo", "hello")
    gate.reached()
    boot.signal(number)
    if number == signal.SIGWINCH:  # another size of the terminal ends nothing
        gate.open()
        boot.ends(0, "hello\n")
    else:
        boot.ends(128 + number, "")


@pytest.mark.parametrize("hosted", [True, False])
def test_a_signal_is_not_lost_before_the_boot_or_the_command_has_begun(world: World, hosted: bool) -> None:
    if not hosted:
        world.serve()
    late = "import os\ndef late(*args, was=coder_sync.{0}):\n    return was(*args), os.kill(os.getpid(), 15)"
    for name in (
        "in_background",
        "Boot.finish",
        "remove_directory",
        "boot_at",
        "timeline_as",
        "Front.background_ended",
    ):
        patch = f"{late.format(name)}\ncoder_sync.{name} = lambda *args: late(*args)[0]"
        Boot(world, {"a": ""}, "--timeline", "t.txt", "--", "echo", "hello", patch=patch).ends(143, "")


def test_a_failed_boot_becomes_the_command_only_if_always_and_says_so(world: World) -> None:
    told = "boot: echo is not run, since not all went well; --always would\n"
    Boot(world, {**STACK, "a": "@want web\nexit 3"}, "--", "echo", "ran").ends(1, "", told)
    assert ended(world) == ["web", "api", "db"]
    Boot(world, {"a": "exit 3"}, "--always", "--", "echo", "ran").ends(0, "ran\n")
    Boot(world, {"a": ""}, "--stay", "--", "echo", "ran").ends(2, "", "--stay and -- COMMAND exclude each other")
    Boot(world, {"a": ""}, "-q", "--", "nosuchcommand").ends(127, None, "cannot run nosuchcommand: ")


@NAMESPACES
def test_as_process_1_it_reaps_orphans_and_becomes_the_command(world: World) -> None:
    orphan = "(setsid sh -c 'echo $$ > orphan' &)\nwhile ! test -s orphan; do :; done\n"
    orphan += "while kill -0 $(cat orphan) 2>/dev/null; do sleep 0.01; done; echo gone"
    command = ["sh", "-c", "echo $$; grep -l '^State:.Z' /proc/[0-9]*/status"]
    boot = Boot(world, {"a": orphan}, "--", *command, under=UNSHARE)
    assert finish(boot.process).stdout == "a | gone\n1\n"


@NAMESPACES
@pytest.mark.parametrize(
    "words", [[], ["--stay"], ["--", "sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.01; done"]]
)
def test_as_process_1_it_ends_services_in_order(world: World, words: list[str]) -> None:
    outer = Boot(world, STACK, *words, under=UNSHARE)
    until(lambda: len(read_lines(world.directory / "db.pid")) and world.status("web") == "completed")
    until(lambda: len(outer.left()) > 8 or "--" not in words)
    pid = outer.process.pid
    os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text()), signal.SIGTERM)
    outer.ends(143)
    assert ended(world) == ["web", "api", "db"]


# ---------------------------------------------------------------------------------------------------------
# Boot: the life of services, once the startup is over.
# ---------------------------------------------------------------------------------------------------------


def service(name: str, *wants: str, end: str = "", more: str = "") -> str:
    """The script of a service, which says what it is told and writes down that it has ended."""
    headers = f"@want {' '.join(wants)}\n" if wants else ""
    trap = f"trap '{end}echo {name} >> ends; exit' TERM"
    return f"{headers}@ready file:{name}.up\n{trap}\necho $$ > {name}.pid\n: > {name}.up\n{more}\nsleep 60 & wait"


STACK = {"db": service("db"), "api": service("api", "db"), "web": service("web", "api")}


def pid_of(world: World, name: str) -> int:
    """The pid of a service."""
    return int((world.directory / f"{name}.pid").read_text())


def ended(world: World) -> list[str]:
    """The services that were told to end, and have, in order."""
    return read_lines(world.directory / "ends")


def test_services_outlive_the_terminal_of_their_boot_and_end_with_the_agent(world: World) -> None:
    speaks = service("web", "api", more="while sleep 0.01; do echo x; done")
    boot, master = boot_on_terminal(world, {**STACK, "web": speaks})
    assert boot.process.wait(PATIENCE) == 0
    os.close(master)
    time.sleep(0.1)  # for some lines that find no terminal
    lasting = [boot.background(), *(pid_of(world, name) for name in STACK)]
    assert {coder_sync.stat_of(pid)[4] for pid in lasting} == {"0"}, "none has a terminal"
    world.client.shutdown()
    boot.gone()
    assert ended(world) == ["web", "api", "db"]


@pytest.mark.parametrize(("how", "code"), [("terminal", 129), ("process", -9)])
def test_the_end_of_its_terminal_or_process_while_it_boots_ends_everything(
    world: World, gate: Gate, how: str, code: int
) -> None:
    boot, master = boot_on_terminal(world, {"db": service("db"), "a": "@want db\ncat gate; echo a > ran"})
    gate.reached()
    if how == "terminal":
        os.close(master)
    else:
        boot.process.kill()
        shown_on(master, b"stopped: the process of boot has ended")
    assert boot.process.wait(PATIENCE) == code
    boot.gone()
    assert ended(world) == ["db"] and not (world.directory / "ran").exists()


@pytest.mark.parametrize("options", [[], ["--log-dir", "logs"]], ids=["plain", "with-logs"])
def test_what_reads_the_output_of_a_boot_finds_its_end_when_it_returns(world: World, options: list[str]) -> None:
    more = "while ! test -e go; do sleep 0.01; done; seq 1 100000; : > said"
    boot = Boot(world, {"db": service("db", more=more)}, *options)
    kept = "only in logs" if options else "lost; --log-dir would keep it"
    boot.ends(0, "", f"boot: standard output is a pipe: what db will print is {kept}\n", leaves=True)
    (world.directory / "go").touch()
    until((world.directory / "said").exists)
    assert not options or until(lambda: (world.directory / "logs" / "db.log").read_text().endswith("\n100000\n"))


def test_a_boot_that_has_returned_holds_nothing_of_its_caller(world: World) -> None:
    lock = os.open(world.directory / "lock", os.O_CREAT)
    os.set_inheritable(lock, True)
    boot = Boot(world, {"db": service("db")}, "-q", pass_fds=[lock], stdin=subprocess.PIPE)
    os.close(lock)
    boot.ends(0, "", leaves=True)
    held = Path(f"/proc/{boot.background()}")
    until(lambda: {os.readlink(held / "fd" / fd) for fd in "012"} == {"/dev/null"})
    assert os.readlink(held / "cwd") == "/"
    assert str(world.directory / "lock") not in [os.readlink(file) for file in (held / "fd").iterdir()]


def test_the_units_of_a_background_process_that_is_killed_are_lost(agent: World, gate: Gate) -> None:
    temporary = agent.env["TMPDIR"] = tempfile.mkdtemp(dir=agent.directory)
    boot = Boot(agent, {"db": service("db"), "a": "@want db\ncat gate", "b": "@want a"})
    gate.reached()
    until(lambda: "startup.d/a" in str(agent.client.status("a").owner))
    os.kill(boot.background(), signal.SIGKILL)
    boot.ends(137, None, "boot's background process was killed by signal 9; what it ran may run on", leaves=True)
    assert os.listdir(temporary) == []
    until(lambda: {unit.status for unit in agent.client.list()} == {"failed"})
    pid, reason = pid_of(agent, "db"), agent.client.status("db").reason
    assert re.match(rf"lost: the boot that ran .*\b{pid}\b.* may still run", reason)
    assert agent.client.status("a").reason.startswith("lost: the boot that ran process ")
    done = agent.run("stop")
    assert done.returncode == 1
    assert f'unit "db" cannot be stopped: it is startup.d/db (pid {pid}), which has no supervisor' in done.stderr


def test_term_to_the_background_process_stops_services_also_without_an_agent(world: World) -> None:
    server = world.serve()
    boot = Boot(world, STACK)
    boot.ends(0, leaves=True)
    server.kill()
    server.wait()
    os.kill(pid_of(world, "web"), signal.SIGKILL)
    until(lambda: not alive(pid_of(world, "web")))
    assert alive(pid_of(world, "db"))
    os.kill(boot.background(), signal.SIGTERM)
    boot.gone()
    assert ended(world) == ["api", "db"]


@pytest.mark.parametrize("options", [["--stay"], ["--stay", "--fail-fast"], []], ids=["stay", "fail-fast", "over"])
def test_a_service_that_dies_is_told_at_once_and_ends_others_with_fail_fast(world: World, options: list[str]) -> None:
    told = world.directory / "told"
    with open(told, "wb") as file:
        boot = Boot(world, STACK, *options, stderr=file)
    if options:
        until(lambda: "boot: staying until a signal" in read_lines(told))
    else:
        boot.ends(leaves=True)
    os.kill(pid_of(world, "db"), signal.SIGKILL)
    until(lambda: "warning: db: ended after its unit had completed (killed by signal 9)" in read_lines(told))
    if "--fail-fast" not in options:
        until(lambda: world.status("db") == "failed")
        assert world.status("web") == "completed"
        world.client.shutdown()
    boot.gone()
    assert not options or boot.process.wait(PATIENCE) == (1 if "--fail-fast" in options else 143)
    assert ended(world) == ["web", "api"]


def test_output_that_nobody_takes_holds_up_no_service_and_is_no_others_business(world: World) -> None:
    more = "while ! test -e go; do sleep 0.01; done; seq 1 200000; : > said"
    reader, writer = os.pipe()
    boot = Boot(world, {"db": service("db", more=more)}, "--stay", stdout=writer)
    boot.says("staying")
    (world.directory / "go").touch()
    until((world.directory / "said").exists)
    assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK, "what it shares with others keeps its flags"
    boot.signal()
    boot.ends(143)
    os.close(reader), os.close(writer)


def test_a_boot_is_refused_over_services_that_run_and_with_resume_runs_the_rest(world: World) -> None:
    job = {**STACK, "job": "@want db\necho job >> ran"}
    first = Boot(world, {**job, "bad": "exit 3"})
    first.ends(1, leaves=True)
    refused = f'unit "api" still runs (pid {pid_of(world, "api")}) from an earlier boot: stop it, or boot with --resume'
    Boot(world, STACK).ends(1, "", refused, leaves=True)
    resumed = Boot(world, {**job, "bad": "echo bad >> ran"}, "--resume")
    assert "no agent" not in resumed.ends(0, None, "boot: 1 completed, 4 done before\n", leaves=True)
    assert read_lines(world.directory / "ran") == ["job", "bad"]
    world.client.shutdown()
    first.gone()
    unknown = "boot: there was no agent, so nothing is known to have completed: all is run\n"
    Boot(world, {"a": "exit"}, "--resume").ends(0, "", unknown)


def test_a_stop_is_answered_though_the_agent_ends_with_what_it_stops(world: World) -> None:
    slow = """
import time
def send(connection, data, was=coder_sync.Connection.send):
    time.sleep(0.5 * (b'"cannot"' in data))
    was(connection, data)
coder_sync.Connection.send = send
"""
    boot = Boot(world, STACK, patch=slow)
    boot.ends(leaves=True)
    assert world.client.stop() == ["web", "api", "db"]
    boot.gone()


# -- COMMAND, while services run


@pytest.mark.parametrize(
    ("script", "code", "out"),
    [
        ("cat; ps -o pgid=,sid= -p $$; test -e ends || echo up; exit 7", 7, "input PID PID up"),
        ("kill -9 $$", 137, ""),
        ("", 127, ""),
        ("kill -9 $PPID", -9, ""),
    ],
    ids=["ends", "is-killed", "is-not-found", "kills-boot"],
)
def test_a_command_beside_services_runs_as_without_boot_and_its_end_is_theirs(
    world: World, script: str, code: int, out: str
) -> None:
    command = ["sh", "-c", script] if script else ["no-such-command"]
    boot = Boot(world, STACK, "-q", "--", *command, stdin=subprocess.PIPE)
    said, _ = boot.process.communicate("input ", timeout=PATIENCE)
    assert (boot.process.returncode, said.split()) == (code, out.replace("PID", str(boot.process.pid)).split())
    boot.gone()
    assert ended(world) == ["web", "api", "db"]


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGWINCH])
def test_a_signal_is_passed_on_to_the_command(world: World, number: signal.Signals) -> None:
    trap = f"trap 'echo urgent' URG; trap 'test -e ends || echo told; exit 5' {number.name[3:]}"
    boot = Boot(world, STACK, "-q", "--", "bash", "-c", f"{trap}; echo on; while :; do sleep 0.01; done")
    boot.prints("on")
    boot.signal(signal.SIGURG)  # which is nobody's business
    boot.signal(number)
    boot.ends(5, "told\n")
    assert ended(world) == ["web", "api", "db"]


def test_a_key_of_the_terminal_reaches_the_command_once(world: World) -> None:
    count = "n=0; trap 'n=$((n+1)); echo got $n' INT; echo on; while ! test -e go; do sleep 0.01; done; exit $n"
    boot, master = boot_on_terminal(world, STACK, "-q", "--", "bash", "-c", count)
    seen = b""
    while b"got 1" not in seen:
        if b"on\r" in seen and b"^C" not in seen:
            os.write(master, b"\x03")
        seen += os.read(master, 4096)
    time.sleep(0.2)  # for another one
    (world.directory / "go").touch()
    assert boot.process.wait(PATIENCE) == 1 and boot.left() == []
    os.close(master)


@needs_proc
@pytest.mark.parametrize("ready", [False, True])
def test_a_signal_is_obeyed_even_if_the_background_process_is_stopped(world: World, ready: bool) -> None:
    files = {"db": service("db") if ready else "echo $$ > db.pid; sleep 60"}
    boot = Boot(world, files, "--stay", "--grace", "0", patch="coder_sync.LAST_WAIT = 0.1")
    boot.says("staying") if ready else until(lambda: read_lines(world.directory / "db.pid"))
    background = boot.background()
    os.kill(background, signal.SIGSTOP)
    boot.signal()
    boot.says("error: boot's background process has not ended; is it stopped?")
    assert boot.process.wait(PATIENCE) == 143
    os.kill(background, signal.SIGCONT)
    boot.gone()


@needs_proc
def test_what_is_to_end_is_killed_though_the_background_process_was_stopped(world: World) -> None:
    files = {"db": service("db", end='trap "" TERM; : > told; exec sleep 60; ')}
    boot = Boot(world, files, "--stay", "--grace", "500ms", patch="coder_sync.LAST_WAIT = 0.1")
    boot.says("staying")
    background = boot.background()
    boot.signal()
    until((world.directory / "told").exists)
    os.kill(background, signal.SIGSTOP)
    time.sleep(0.7)
    os.kill(background, signal.SIGCONT)
    boot.gone()


@needs_proc
def test_a_second_signal_gives_services_no_more_time(world: World) -> None:
    files = {"db": service("db", end=": > told; sleep 60; ")}
    boot = Boot(world, files, "-q", "--grace", "1m", "--", "sh", "-c", "echo on; exec sleep 60")
    boot.prints("on")
    boot.signal()
    until((world.directory / "told").exists)
    boot.signal()
    boot.ends(143)


@needs_proc
def test_with_fail_fast_a_service_that_dies_ends_the_command_first(world: World) -> None:
    trap = "trap 'test -e ends || echo told; exit 5' TERM; echo on; while :; do sleep 0.01; done"
    boot = Boot(world, STACK, "--fail-fast", "--", "sh", "-c", trap)
    boot.prints("on")
    os.kill(pid_of(world, "api"), signal.SIGKILL)
    boot.ends(5, "told\n", "warning: api: ended after its unit had completed (killed by signal 9)")
    assert ended(world) == ["web", "db"]


def test_with_fail_fast_the_death_of_a_service_keeps_the_command_from_beginning(world: World) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        os.write(writer, b"-" * (1 << 20))  # so that the summary has to wait
    boot = Boot(world, STACK, "--fail-fast", "--", "echo", "on", stderr=writer)
    os.close(writer)
    until(lambda: serves(world) and world.status("web") == "completed")
    at_rest(boot.background())
    os.kill(pid_of(world, "api"), signal.SIGKILL)
    until(lambda: ended(world) == ["web", "db"])
    with open(reader, "rb") as file:
        assert b"\nboot: echo is not run, since not all went well" in file.read()
    boot.ends(1, "")


@pytest.mark.parametrize("files", [{"a": ""}, STACK], ids=["alone", "beside-services"])
def test_sockets_that_were_handed_over_are_for_the_command(world: World, files: dict[str, str]) -> None:
    become = "import os, sys; os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.dup2(2, 3)"
    under = [*PYTHON, f"{become}; os.execv(sys.argv[1], sys.argv[1:])"]
    script = "echo $((LISTEN_PID - $$)) $LISTEN_FDS; echo here >&3"
    boot = Boot(world, files, "-q", "--", "sh", "-c", script, under=under)
    assert "here\n" in boot.ends(0, "0 1\n")


def test_stay_tells_a_supervisor_from_the_process_that_was_called(world: World) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(str(world.directory / "notify"))
        listener.settimeout(PATIENCE)
        world.env["NOTIFY_SOCKET"] = str(world.directory / "notify")
        boot = Boot(world, STACK, "--stay")
        told, credentials, *_ = listener.recvmsg(100, 100)
    assert (told, struct.unpack("3i", credentials[0][2])[0]) == (b"READY=1", boot.process.pid)


# -- what it is short of, and what it does not expect


@pytest.mark.parametrize("name", ["os.fork", "threading.Thread.start"])
def test_a_boot_that_has_no_room_for_itself_says_so_in_a_line(world: World, name: str) -> None:
    error = "OSError(11, 'try again')" if name == "os.fork" else "RuntimeError('no thread')"
    full = f"import os, threading\ndef full(*args, **options):\n    raise {error}\n{name} = full"
    told = Boot(world, {"a": "touch ran"}, patch=f"{full}\ncoder_sync.CONNECT_TIMEOUT = 0.3").ends(1, "")
    assert told.startswith("error: ") and told.count("\n") == 1
    assert not (world.directory / "ran").exists()


@pytest.mark.parametrize("most", [6, 8, 10, 12, 14, 16])
def test_with_few_descriptors_a_boot_works_or_says_so_in_a_line(world: World, most: int) -> None:
    limit = ["sh", "-c", f'ulimit -n {most}; exec "$@"', "-"]
    boot = Boot(world, {"a": "exit"}, patch="coder_sync.CONNECT_TIMEOUT = 0.3", under=limit)
    done = finish(boot.process)
    assert boot.left() == [] and "internal error" not in done.stderr and "Traceback" not in done.stderr, done
    assert done.returncode == 0 or os.strerror(errno.EMFILE) in done.stderr, done


def test_a_working_directory_that_is_gone_is_said_to_be(world: World) -> None:
    gone = ["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "-"]
    for option in ("--socket-path", "--log-dir", "--timeline"):
        boot = Boot(world, {"a": "exit"}, option, "t.svg", under=gone)
        boot.ends(125, "", "error: cannot go on: the working directory is gone\n")
    Boot(world, {"a": "cd /; echo a"}, under=gone).ends(0)


@needs_proc
@pytest.mark.parametrize("where", ["Boot.finish", "Boot.keep_time", "Stream.feed", "Job.process_ended"])
def test_an_unexpected_error_leaves_nothing_behind(world: World, where: str) -> None:
    fails = f"""
import os
def fails(*args, was=coder_sync.{where}, **options):
    if os.path.exists("now"):
        raise KeyError("unexpected")
    return was(*args, **options)
coder_sync.{where} = fails
"""
    last = "while ! test -e db.up; do sleep 0.01; done; : > now; echo x"
    stubborn = "" if where == "Boot.finish" else "trap '' TERM; while :; do sleep 1; done"
    files = {"db": service("db"), "a": last, "b": stubborn}
    boot = Boot(world, files, "--grace", "300ms", patch=fails)
    boot.ends(125, None, "internal error in coder_sync")
    assert ended(world) == ["db"]


# ---------------------------------------------------------------------------------------------------------
# Boot: trouble to survive.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "at_once"), [([], 52), (["--log-dir", "logs"], 26)], ids=["plain", "with-logs"])
def test_as_many_scripts_as_have_descriptors_run_at_once(
    world: World, gate: Gate, options: list[str], at_once: int
) -> None:
    limit = ["sh", "-c", 'ulimit -n 100; exec "$@"', "-"]
    boot = Boot(world, {f"x{i}": f": < gate; echo {i}" for i in range(60)}, *options, under=limit)
    until(lambda: len(boot.scripts()) == at_once, "that all stand at the gate")
    gate.keep_open(lambda: boot.process.poll() is not None)
    assert "warning" not in boot.ends(0)
    assert sorted(int(line.split("| ")[1]) for line in boot.out.splitlines()) == list(range(60))
    assert not options or len(list((world.directory / "logs").iterdir())) == 60


def test_services_leave_each_other_the_descriptors_that_probes_need(world: World, gate: Gate) -> None:
    limit = ["sh", "-c", 'ulimit -n 50; exec "$@"', "-"]
    boot = Boot(world, {f"x{i}": "@ready file:up\nsleep 0.05; : > up; exec cat gate" for i in range(12)}, under=limit)
    assert boot.process.wait(PATIENCE) == 0
    gate.keep_open(lambda: not boot.left())
    boot.ends(0, "", leaves=True)


def test_a_script_that_the_system_has_no_room_for_starts_when_there_is_some(world: World, gate: Gate) -> None:
    full = """
import errno, os
def spawn(path, *args, was=os.posix_spawnp, **options):
    if path.endswith("late") and not os.path.exists("room"):
        open("refused", "w").close()
        raise OSError(errno.EMFILE, "Too many open files")
    return was(path, *args, **options)
os.posix_spawnp = spawn
"""
    boot = Boot(world, {"a": "cat gate", "late": "echo late"}, patch=full)
    until((world.directory / "refused").exists)
    (world.directory / "room").touch()
    gate.open()
    boot.ends(0, "late | late\n")
    (world.directory / "room").unlink()  # while only services run, which may never end, nobody waits for room
    boot = Boot(world, {"db": service("db"), "late": "@want db"}, "--", "true", patch=full)
    boot.ends(1, "", "failed: late (cannot run", "late: Too many open files); ")


def test_a_log_that_cannot_be_written_is_told_once_and_the_boot_goes_on(world: World) -> None:
    for logs, whose in {"fifo": "a", "full": "a", "directory": "b"}.items():
        (world.directory / logs).mkdir()
        log = world.directory / logs / f"{whose}.log"
        os.mkfifo(log) if logs == "fifo" else log.symlink_to("/dev/full") if logs == "full" else log.mkdir()
    (world.directory / "file").touch()
    whys = {"file": "File exists", "fifo": "No such device or address", "directory": "Is a directory"}
    for logs, why in {**whys, **({"full": "No space left on device"} if os.path.exists("/dev/full") else {})}.items():
        boot = Boot(world, {"a": "echo a", "b": "@want a\necho b"}, "--log-dir", logs)
        told = boot.ends(0, "a | a\nb | b\n", f"warning: no more logs in {logs}: {why}\n")
        assert told.count("warning") == 1


def test_many_units_are_claimed_in_one_step_though_it_takes_several_lines(agent: World) -> None:
    names = [f"u{i:03}-" + "n" * 240 for i in range(35)]  # in all some 150 KB
    files = {name: f"@want {' '.join(names[:i])}" if i else "" for i, name in enumerate(names)}
    somebody = agent.connect()
    somebody.call("start", unit=names[-1], hold=True)
    Boot(agent, files).ends(1, "", "nothing was run")
    assert [unit.unit_name for unit in agent.client.list()] == names[-1:]
    somebody.close()
    until(lambda: agent.status(names[-1]) == "failed")
    Boot(agent, files).ends(0, None, "boot: 35 completed")


def test_an_agent_refuses_nothing_of_a_boot_in_which_a_unit_is_skipped(world: World) -> None:
    agent = world.serve(stderr=subprocess.PIPE)
    Boot(world, {"a": "false", "b": "@want a"}).ends(1)
    said = stopped(agent).stderr
    assert "b: skipped" in said and "refused" not in said


def test_a_unit_that_is_skipped_as_it_is_claimed_does_not_hold_up_its_boot(agent: World) -> None:
    agent.client.start("x")
    agent.client.fail("x")
    files = {"a": "@extern x\n@want x", "b": "echo b"}
    Boot(agent, files).ends(1, "b | b\n")
    assert agent.status("a") == "skipped"


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_when_the_agent_goes_away_what_runs_ends_and_nothing_new_starts(world: World, gate: Gate, how: str) -> None:
    server = world.serve()
    files = {"a": "@retry 1 1ms\ncat gate; echo a; exit 2", "b": "@want a\necho b", "c": "@retry 1 10m\nexit 1"}
    impatient = "coder_sync.PING_AFTER, coder_sync.REPLY_TIMEOUT, coder_sync.REPORT_EVERY = 0.2, 1.0, 0.2"
    boot = Boot(world, files, patch=impatient)
    gate.reached()
    server.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    boot.says("went away" if how == "killed" else "has not answered for 1 s; is it stopped?")
    boot.says("; running: a ")
    at_rest(boot.background())
    gate.open()
    told = ("failed: a (exit code 2)", "not started: b: the agent went away", "failed: c (exit code 1)")
    boot.ends(3, "a | a\n", *told)


def test_scripts_that_go_elsewhere_find_the_agent_of_a_relative_path(world: World) -> None:
    boot = Boot(world, {"a": "cd /; $SYNC list -c unit; echo $CODER_AGENT_SOCKET_PATH"}, "--socket-path", "s")
    boot.ends(0, f"a | UNIT\na | a\na | {world.directory}/s\n")


def when_reported(code: str) -> str:
    """A patch: an agent that does this when the outcome of a unit is reported to it."""
    body = f"def end(*args, was=coder_sync.Units.end):\n    {code}\n    return was(*args)"
    return f"import os\n{body}\ncoder_sync.Units.end = end"


REFUSED = {"code": 1, "message": "refused"}


def test_a_service_that_ends_before_its_completion_is_answered_has_died(world: World, gate: Gate) -> None:
    late = Gate(world, "late")
    script = "@ready file:up\n: > up; cat gate; exit 3"
    boot = Boot(world, {"a": script}, patch=when_reported("open('late').read()"))
    late.reached()
    gate.open()
    until(lambda: not boot.scripts())
    at_rest(boot.background())
    late.open()
    boot.ends(1, "", "died: a (completed, then ended: exit code 3); ")


def test_a_unit_that_others_complete_between_its_tries_is_not_tried_again(world: World, gate: Gate) -> None:
    files = {"a": "@retry 1 10m\necho n >> n; exit 3", "b": "cat gate"}
    boot = Boot(world, files, patch="coder_sync.REPORT_EVERY = 0.1")
    boot.says("a to try again after exit code 3")
    world.client.complete("a")
    boot.says("boot: 1 of 2 ended after ")
    told = boot.says("boot: 1 of 2 ended")
    assert "running: b " in told and "try again" not in told
    gate.open()
    assert "died: " not in boot.ends(0)
    assert read_lines(world.directory / "n") == ["n"]


@pytest.mark.parametrize("ready", ["", "@ready file:up\n"], ids=["script", "service"])
def test_what_others_fail_just_before_it_completes_has_their_reason(world: World, gate: Gate, ready: str) -> None:
    others = "args[2].status == 'completed' and was(*args[:2], coder_sync.Outcome('failed', 'by others'))"
    boot = Boot(world, {"a": f"{ready}: > up; cat gate"}, patch=when_reported(others))
    if not ready:
        gate.open()
    boot.ends(1, "", "failed: a (by others); ")


@pytest.mark.parametrize("ready", ["", "@ready file:up\n"], ids=["script", "service"])
def test_what_completes_and_is_refused_is_ended_and_has_failed_for_good(world: World, gate: Gate, ready: str) -> None:
    refuses = when_reported("if args[2].status == 'completed': raise coder_sync.Refused('refused')")
    boot = Boot(world, {"a": f"{ready}@retry 1 0\n: > up; cat gate"}, patch=refuses)
    if not ready:
        gate.open()
    boot.ends(1, "", "failed: a (refused); ")


def test_an_agent_that_answered_while_boot_was_held_up_itself_is_not_lost() -> None:
    ours, theirs = socket.socketpair()
    lost: list[Any] = []
    link = coder_sync.Link(coder_sync.Loop(), print, lost.append, lambda: 1.0)
    link.open(coder_sync.Channel("", sock=ours))
    link.request("ping")
    theirs.sendall(b'{"jsonrpc": "2.0", "id": %d, "result": {}}\n' % json.loads(theirs.recv(1000))["id"])
    link.keep_time(time.monotonic() + 1000)
    assert not lost, "it is asked again"
    link.keep_time(time.monotonic() + 2000)
    assert len(lost) == 1


@pytest.mark.parametrize(
    ("script", "told"),
    [("exit 3", "1 failed\n"), ("@ready true\ncat gate", "1 completed\nstill running: a\n")],
    ids=["failed", "service"],
)
def test_an_outcome_that_the_agent_did_not_answer_any_more_is_the_units(
    world: World, gate: Gate, script: str, told: str
) -> None:
    answering(world, altered(when_reported("os._exit(0)"), "serve"))
    boot = Boot(world, {"a": script})
    assert boot.process.wait(PATIENCE) == 3
    if "gate" in script:
        gate.open()
    boot.ends(3, "", f"boot: {told}", leaves=True)


def test_a_boot_at_an_agent_that_is_stopped_says_so_once(world: World) -> None:
    stop(world.serve())
    patch = "coder_sync.REPLY_TIMEOUT, coder_sync.CONNECT_TIMEOUT = 0.3, 0.5"
    assert Boot(world, {"a": ""}, patch=patch).ends(3, "").count("is it stopped?") == 1


def test_an_agent_that_is_stopped_does_not_hold_up_the_end_of_a_boot(world: World, gate: Gate) -> None:
    server = world.serve()
    patch = "coder_sync.PING_AFTER, coder_sync.STOPPED_TIMEOUT = 0.2, 1.0"
    boot = Boot(world, {"a": "cat gate", "b": "@want a"}, patch=patch)
    gate.reached()
    stop(server)
    boot.signal()
    told = boot.ends(143, "", "failed: a (stopped: boot got signal 15)", "not started: b: stopped: boot got signal 15")
    assert "has not answered for 1 s; is it stopped?" in told


@pytest.mark.parametrize("tmpdir", ["no/such/directory", "d" * 100])
def test_a_temporary_directory_of_no_use_keeps_nobody_from_variables_and_notify(world: World, tmpdir: str) -> None:
    world.env["TMPDIR"] = str(world.directory / tmpdir)
    with contextlib.suppress(OSError):
        os.mkdir(world.env["TMPDIR"])
    service = f"@ready notify\necho A=1 > $CODER_SYNC_ENV\n{sys.executable} -IS -c '{NOTIFY}' READY=1"
    Boot(world, {"a": service, "b": "@want a\necho $A"}).ends(0, "b | 1\n", leaves=True)


def test_where_no_directory_can_be_written_it_is_said_that_there_are_no_variables(world: World) -> None:
    nowhere = "def mkdir(*args): raise PermissionError(13, 'no')\ncoder_sync.os.mkdir = mkdir"
    world.env["CODER_SYNC_ENV"] = "another-units"
    files = {"a": 'test -z "$CODER_SYNC_ENV"', "b": "@ready notify\nsleep 9"}
    boot = Boot(world, files, patch="coder_sync.has_proc = bool\n" + nowhere)
    told = "warning: $CODER_SYNC_ENV is empty: no directory for it can be written"
    boot.ends(1, "", told, "boot: 1 completed", "cannot be probed: no directory for its NOTIFY_SOCKET")


@LINUX
def test_a_reader_that_takes_nothing_of_what_boot_says_holds_up_nothing(world: World, gate: Gate) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * fcntl.fcntl(writer, 1032))  # F_GETPIPE_SZ, so that it is full
    after = Gate(world, "b")
    with open(reader, "rb"), open(writer, "wb") as stuck:
        files = {"a": "cat gate", "b": "@want a\necho b\ncat b"}
        boot = Boot(world, files, patch=f"{HURRY}\ncoder_sync.REPORT_EVERY = 0.05", stderr=stuck)
        gate.reached()
        time.sleep(0.3)  # for some reports
        gate.open()
        boot.prints("b | b")
        after.reached()
        boot.signal()
        assert boot.process.wait(PATIENCE) == 143


# ---------------------------------------------------------------------------------------------------------
# README: its examples are run as written. A block that starts an agent begins a new session, in a directory
# that holds only coder_sync.py; what differs from run to run (times, pids) is compared by its shape.
# ---------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def block(kind: str, words: str) -> str:
    """The example of the README that has these words."""
    found = [text for text in re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M) if words in text]
    assert len(found) == 1, words
    return str(found[0])


@pytest.fixture(params=["bash", "dash"])
def shell(request: pytest.FixtureRequest) -> str:
    if not shutil.which(request.param):
        pytest.skip(f"no {request.param} here")
    return str(request.param)


def with_copy(world: World) -> dict[str, str]:
    """The environment in which coder_sync.py is a command."""
    env = world.shell_env()
    world.install(world.directory / "bin" / "coder_sync.py")
    return env


def examples(text: str) -> list[list[tuple[str, str]]]:
    """Sessions of commands, each with the output it should have."""
    sessions: list[list[tuple[str, str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.S | re.M):
        for i, part in enumerate(re.split(r"^\$ ", block, flags=re.M)[1:]):
            more, output = re.fullmatch(r"((?:> .*\n)*)(.*)", part.partition("\n")[2], re.S).groups()  # type: ignore
            command = part.partition("\n")[0] + "\n" + re.sub("^> ", "", more, flags=re.M)
            if i == 0 and "serve --detach" in command:
                sessions.append([])
            sessions[-1].append((command, output))
    return sessions


def shape(text: str, world: World) -> str:
    """Output without what differs from run to run."""
    text = text.replace(world.path, "agent.sock")
    text = re.sub(r"\b\d+(\.\d+)?(ms|s|%)", "TIME", text)
    text = re.sub(r"by [^\n]{0,80}? \(pid \d+\)", "by WHOM", text).replace(str(world.directory) + "/", "")
    # the width of a column is that of a time
    return re.sub(r" {2,}", "  ", re.sub(r"pid \d+", "pid PID", text)).strip()


@pytest.mark.parametrize("session", examples(README), ids=lambda session: hyphenated(session[0][0]))
def test_the_readme_shows_what_really_happens(session: list[tuple[str, str]], world: World) -> None:
    if not shutil.which("nc") and any("nc -" in command for command, _ in session):
        pytest.skip("no nc here")
    world.install(world.directory / "coder_sync.py")
    script = "".join(f"{command}echo '=== next ==='\n" for command, _ in session)
    script += "kill $(./coder_sync.py ping | sed 's/.*pid \\([0-9]*\\),.*/\\1/')\n"
    real = world.shell(script, "bash", stderr=subprocess.STDOUT).stdout.split("=== next ===\n")
    assert [shape(out, world) for out in real[:-1]] == [shape(out, world) for _, out in session]


def test_the_readme_has_the_one_liner_that_runs_the_main_job(world: World) -> None:
    command = block("sh", "the IDE opens")
    done = world.shell(command.replace("sleep 1", "sleep 0.1"), cwd=str(HERE))
    assert done.returncode == 0
    assert [out[:2] for out in done.stdout.splitlines()] == ["1.", "2.", "3."]


def test_the_readme_names_every_command_and_is_as_narrow_and_short_as_a_page() -> None:
    for command in coder_sync.COMMANDS:
        assert f"`{command}" in README, command
    lines = README.splitlines()
    assert len(lines) <= 400 and max(map(coder_sync.text_width, lines)) <= 120


# A startup of the README, with stand-ins for what needs a network.
STAND_INS = {
    "git": """#!/bin/sh
sleep 0.03; test -e tried || { : > tried; echo "fatal: Could not resolve host: github.com" >&2; exit 128; }
mkdir app
""",
    "apt-get": '#!/bin/sh\ncase "$*" in *gcc*) sleep 0.2 ;; *) sleep 0.1 ;; esac\n',
    "python3": """#!/bin/sh
test "$2" = venv || exec PYTHON "$@"
mkdir -p venv/bin
printf '#!/bin/sh\\nsleep 0.2\\n' > venv/bin/pip
printf '#!/bin/sh\\ntest "${PWD##*/}" = app\\n' > venv/bin/alembic
chmod +x venv/bin/*
""",
    "setpriv": "#!/bin/sh\nexec answer 5432\n",
    "pg_isready": "#!PYTHON\nimport socket\nsocket.create_connection(('127.0.0.1', 5432)).close()\n",
    "code-server": "#!/bin/sh\nexec answer 8080\n",
    "answer": '#!/bin/sh\n: > healthz; exec PYTHON -m http.server --bind 127.0.0.1 "$1" 2> /dev/null\n',
}


def listed(timeline: str) -> set[tuple[str, str]]:
    """The units of a timeline with how they ended."""
    return set(re.findall(r"^[* ] ([\w-]+) +[\u2591-\u2593\u2588\u2500\u2502 ]+ [\d.]+m?s ([\w ]+)$", timeline, re.M))


def test_the_startup_of_the_readme_boots_and_boots_again(world: World) -> None:
    ports = [str(free_port()), str(free_port())]
    files = {f"bin/{name}": text.replace("PYTHON", sys.executable) for name, text in STAND_INS.items()}
    files.update(re.findall(r"^==> (\S+) <==\n(.*?)\n(?=\n==> |```)", README, re.S | re.M))
    assert len(files) == len(STAND_INS) + 8
    for name, text in files.items():
        file = world.directory / name
        file.parent.mkdir(exist_ok=True)
        ours = text.replace("5432", ports[0]).replace("8080", ports[1]).replace("retry 3 2s", "retry 3 0.2s")
        file.write_text(ours + "\n")
        file.chmod(0o755)
    env = with_copy(world)
    check = re.search(r"^RUN (coder_sync.py boot --check .*)$", README, re.M)
    begin = re.search(r'"postStartCommand": "(.*)"', README)
    assert check and begin
    commands = [match[1].replace("/etc/", "").replace("/tmp/", "") for match in (check, begin)]

    def shell(command: str) -> str:
        done = world.shell(command, env=env)
        assert done.returncode == 0, (done, (world.directory / "boot.log").read_text())
        return done.stdout

    assert shell(commands[0]).endswith("\n8 scripts, no mistakes\n")
    for again in (False, True):
        shell(commands[1])
        log = (world.directory / "boot.log").read_text()
        assert "boot: 8 completed\n" in log and "nothing waits" in log
        assert ("clone        | try 2 of 4 after exit code 128" in log) is not again
        assert listed(shell("coder_sync.py timeline")) == listed(block("text", "apt-build")) != set()
        assert {unit.unit_name for unit in world.client.list() if unit.running_on} == {"ide", "database"}
    assert set(world.client.stop()) == {"ide", "database"}
    world.client.shutdown()


def test_the_picture_of_the_readme_is_of_its_startup() -> None:
    assert "![" in README and "(.github/startup.svg)" in README
    picture = (HERE / ".github" / "startup.svg").read_text(encoding="utf-8")
    shown = listed(block("text", "apt-build"))
    assert shown and all(f">{unit}" in picture for unit, _ in shown)


DEPENDENCY_FAILS, COMMAND_FAILS, NO_TROUBLE = "dependency-fails", "command-fails", "no-trouble"


def test_the_script_of_the_readme_reports_its_end_whatever_happens(agent: World, shell: str) -> None:
    env, scripts = with_copy(agent), {}
    for name in ("HUP", "TERM", "PIPE", "USR1", "KILL", DEPENDENCY_FAILS, COMMAND_FAILS, NO_TROUBLE):
        gate = f"gate-{name}"
        command = f"true; cat {gate}" if name.isupper() else "false" if name == COMMAND_FAILS else "true"
        script = block("sh", "set -e\ncoder_sync.py start pip-install")
        script = script.replace("pip install -r requirements.txt", command)
        script = re.sub("pip-install|git-clone|apt-install", lambda word, name=name: f"{name}-{word[0]}", script)
        agent.end(f"{name}-git-clone")
        agent.client.want(f"{name}-apt-install")
        ends = agent.client.fail if name == DEPENDENCY_FAILS else agent.client.complete
        ends(f"{name}-apt-install")
        (agent.directory / name).write_text(script)
        scripts[name] = Gate(agent, gate), agent.spawn([shell, name], env=env)
    for name, (gate, process) in scripts.items():
        if name.isupper():
            gate.reached()
            process.send_signal(getattr(signal, f"SIG{name}"))
            process.wait(PATIENCE)
            gate.open()
        code, unit = finish(process).returncode, f"{name}-pip-install"
        outcome = {NO_TROUBLE: "completed", DEPENDENCY_FAILS: "skipped"}.get(name, "failed")
        until(lambda unit=unit, outcome=outcome: agent.status(unit) == outcome, f"{unit} {outcome}")
        assert (code == 0) == (name == NO_TROUBLE), name


def test_the_traps_of_the_readme_report_a_signal(agent: World, shell: str) -> None:
    env, scripts = with_copy(agent), {}
    for name in ("HUP", "INT", "TERM", "PIPE", "USR1", NO_TROUBLE):
        script = f"coder_sync.py start my-unit\n{block('sh', 'complete my-unit --exit-code')}true; cat gate\ntrue"
        script = script.replace("my-unit", name).replace("gate", f"gate-{name}")
        scripts[name] = Gate(agent, f"gate-{name}"), agent.spawn([shell, "-c", script], env=env)
    for name, (gate, process) in scripts.items():
        gate.reached()
        if name != NO_TROUBLE:
            process.send_signal(getattr(signal, f"SIG{name}"))
        gate.open()
        ended = finish(process).returncode, agent.status(name)
        assert ended == ((0, "completed") if name == NO_TROUBLE else (1, "failed")), name


def test_a_script_of_the_readme_goes_on_only_where_nothing_can_coordinate(world: World, shell: str) -> None:
    script = block("sh", "not coordinated").replace("make install", "echo installed")

    def done(change: tuple[str, str] = ("", ""), file: bool = True) -> tuple[bool, bool, bool]:
        """Whether it has installed, succeeded, said that nothing coordinates it."""
        env = {**(with_copy(world) if file else world.shell_env()), "CODER_SYNC_CONNECT_TIMEOUT": "0"}
        done = world.shell(script.replace(*change), shell, env=env)
        return "installed\n" in done.stdout, done.returncode == 0, "not coordinated" in done.stderr

    assert done(file=False) == done() == (True, True, True)
    world.serve()
    world.client.start("git-clone")
    assert done(("--pid", "--timeout 0.1 --pid")) == (False, False, False)
    world.client.fail("git-clone")
    assert done() == (False, False, False)
    world.end("git-clone")
    assert done() == (True, True, False)
    assert world.status("my-unit") == "completed"


def test_the_program_of_the_readme_runs(agent: World) -> None:
    agent.end("cache", "database")
    program = [sys.executable, "-c", block("python", "with client.unit")]
    env = {**agent.env, "PYTHONPATH": str(installed())}
    done = finish(agent.spawn(program, env=env))
    assert done.stdout.splitlines()[0] == "migrating" and "migrate completed" in done.stdout
    agent.client.start("database")
    agent.client.fail("database", "disk full")
    done = finish(agent.spawn(program, env=env))
    assert done.returncode == 1 and done.stderr.startswith("not migrated: ") and "disk full" in done.stderr


# ---------------------------------------------------------------------------------------------------------
# Attack: random input against real processes, for a time; `nox -s attack -- --minutes N` runs these, and nothing
# else does. A failure names its seed: ATTACK_SEED=N repeats what was sent.
# ---------------------------------------------------------------------------------------------------------


def rounds() -> Iterator[random.Random]:
    """Sources of chance until the time is up, each with a seed that is printed."""
    end, first = time.monotonic() + float(os.environ.get("ATTACK_SECONDS", "5")), os.environ.get("ATTACK_SEED")
    for seed in itertools.count(int(first) if first else random.randrange(1 << 32)):
        print(f"ATTACK_SEED={seed}", end="\r")
        yield random.Random(seed)
        if first or time.monotonic() > end:
            return


def odd_value(chance: random.Random, depth: int = 0) -> Any:
    """A value for a parameter: often of the right type, sometimes at a limit."""
    text = chance.choice(["a", "b", "c", "", "a\n", "\u00e9" * 130, "\ud800", "success", "completion", "x" * 70_000])
    number = chance.choice([0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, os.getpid()])
    if depth < 3 and chance.random() < 0.3:
        return chance.choice([[odd_value(chance, depth + 1) for _ in range(chance.randrange(4))], {text[:9]: number}])
    return chance.choice([text, text, number, True, False, None])


def odd_line(chance: random.Random) -> bytes:
    """A request, mutated more or less."""
    method = chance.choice([*(method for method in coder_sync.METHODS if method != "shutdown"), "shutdown?", ""])
    names = [*coder_sync.parameters(coder_sync.METHODS.get(method, coder_sync.Agent.do_ping)), "more"]
    params: Any = {name: odd_value(chance) for name in names if chance.random() < 0.7}
    if "unit" in params and chance.random() < 0.7:
        params.update(unit=chance.choice("abcdef"), requires="success", dependencies=chance.sample("abcdef", 2))
    message = {"jsonrpc": "2.0", "id": odd_value(chance, 2), "method": method, "params": params}
    message.update((key, odd_value(chance)) for key in [*message] if chance.random() < 0.05)
    line = bytearray(json.dumps(message).encode())
    for _ in range(chance.choice([0, 0, 0, 1, 1, 5, 100])):
        at = chance.randrange(len(line) + 1)
        line[at : at + chance.randrange(4)] = chance.choice([b"", b"{", b"[", b'"', b"\\", b"\0", b"\xff", b"1", b"\n"])
    return bytes(line[: chance.choice([-1, 10**9, 10**9, 10**9])]) + chance.choice([b"\n", b"\n", b"\r\n", b""])


@pytest.mark.attack
def test_attack_with_command_lines() -> None:
    for chance in rounds():
        read_alike(chance, chance.choice([*coder_sync.COMMANDS]), 1000)


@pytest.mark.attack
def test_attack_with_lines(world: World) -> None:
    log = world.directory / "log"
    agent = world.serve("--verbose", "--log-file", str(log))
    for chance in rounds():
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(chance.choice([0.001, 0.05]))
                sock.connect(world.path)
                with contextlib.suppress(OSError):  # it may hang up on us
                    sock.sendall(b"".join(odd_line(chance) for _ in range(chance.randrange(1, 20))))
                    if chance.random() < 0.5:
                        sock.shutdown(socket.SHUT_WR)
                    while chance.random() < 0.9 and sock.recv(1 << 16):
                        pass
        assert world.client.ping()["pid"] == agent.pid
        assert "internal error" not in log.read_text(errors="replace")
        if log.stat().st_size > 1 << 20:
            log.write_bytes(b"")
    assert stopped(agent).returncode == 0


HEADER_STARTS = ["# coder-sync:", "# coder-sync: ", "// coder-sync:", "#coder-sync", "--coder-sync: "]
HEADER_WORDS = ["unit", "want", "timeout", "extern", "unti", "a", "b", "''", '"', "\\", "--requires", "start", "10m",
                "-5", "\u00e9", "\x00", "\t", "#", "$(false)", "a" * 300, ",", "ready", "lock", "retry", "after",
                "before", "tcp:x"]  # fmt: skip


@pytest.mark.attack
def test_attack_with_headers(world: World) -> None:
    for chance in rounds():
        files: dict[str, bytes] = {}
        for _ in range(chance.randrange(1, 6)):
            lines = [chance.choice(["#!/bin/sh", "#!/usr/bin/env -S x", "\ufeff#!", "", "\x7fELF"])]
            for _ in range(chance.randrange(1, 6)):
                words = chance.choices(HEADER_WORDS, k=chance.randrange(5))
                lines.append(chance.choice(HEADER_STARTS) + " ".join(words))
            data = bytearray(chance.choice(["\n", "\n", "\r\n"]).join(lines).encode())
            for _ in range(chance.choice([0, 0, 3])):
                data[chance.randrange(len(data))] = chance.randrange(256)
            files[chance.choice(["10-a", "a.sh", "b", "20_b.py", "\udcff", "-", "c d"])] = bytes(data)
        directory = startup(world, files)
        os.chmod(os.path.join(directory, chance.choice([*files])), chance.choice([0o755, 0o644]))
        done = world.run("boot", "--check", directory, errors="replace")
        assert done.returncode in (0, 1, 2), done
        assert "internal error" not in done.stderr and "Traceback" not in done.stderr, done
