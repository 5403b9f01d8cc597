"""Tests of coder_sync: rules with a fake clock, everything else on real processes, sockets and signals.

Sections: helpers; Units (the rules); Protocol; Agent; Command line; Run and owners; Trouble; Load; README.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import fcntl
import functools
import grp
import itertools
import json
import os
import pty
import pwd
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import coder_sync
from coder_sync import (
    AlreadyStarted,
    Client,
    CycleError,
    DependencyFailed,
    Graph,
    InvalidParams,
    NotRegistered,
    Owner,
    ParseError,
    Refused,
    Units,
    Unreachable,
    UsageError,
)

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


@functools.lru_cache(maxsize=None)
def installed() -> Path:
    """The installed copy, by the Python that runs the tests."""
    directory = tempfile.mkdtemp(prefix="coder-sync-tests-")
    atexit.register(shutil.rmtree, directory)
    path = Path(directory, "coder_sync.py")
    subprocess.run([sys.executable, "-IS", str(FILE), "install", "--quiet", str(path)], check=True)
    return path


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
        return self.spawn([sys.executable, "-IS", "-c", coder_sync.START, str(installed()), *argv], **options)

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
            shutil.copy(installed(), bin_directory / "coder")
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
# Units: the rules, one at a time, on a fake clock. Strings are tickets.
# ---------------------------------------------------------------------------------------------------------


def bring(units: Units, name: str, status: str) -> None:
    """Bring a unit that nobody has asked to start to a status, by what a caller may do."""
    if status == "skipped":
        units.want(name, [f"cause-of-{name}"])
        units.want(f"cause-of-{name}", [])
        units.fail(f"cause-of-{name}")
    elif status != "not registered":
        units.want(name, [])
    if status == "started":
        units.start(name, f"start of {name}")
    if status == "completed":
        units.complete(name)
    if status == "failed":
        units.fail(name)
    assert units.status(name).status == status


def chain(units: Units, length: int, requires: str = "success") -> list[str]:
    """A chain of registered units, each depending on the one before; return their names."""
    names = [f"u{i}" for i in range(length)]
    units.want(names[0], [])
    for before, name in zip(names, names[1:]):
        units.want(name, [before], requires)
    return names


def statuses(units: Units) -> dict[str, str]:
    """All names and where they stand."""
    return {s.unit_name: s.status for s in units.snapshots(everything=True)}


def wants(units: Units, name: str) -> dict[str, str]:
    """The dependencies of a unit and what it requires of them."""
    return {d.depends_on: d.requirement for d in units.status(name).dependencies}


def story(units: Units) -> list[tuple[str, str, str]]:
    """What happened: unit, kind, detail."""
    return [(e.unit, e.kind, e.detail) for e in units.events]


# -- want --------------------------------------------------------------------------------------------------


def test_want_registers_the_unit_and_not_what_it_wants(units: Units) -> None:
    units.want("pip", ["apt", "git"])
    assert statuses(units) == {"pip": "pending", "apt": "not registered", "git": "not registered"}
    assert units.names() == ["pip"]


def test_a_name_only_wanted_may_be_registered_later(units: Units) -> None:
    units.want("pip", ["apt"])
    units.want("apt", [])
    assert statuses(units) == {"pip": "pending", "apt": "pending"}


def test_want_without_dependencies_registers_a_ready_unit(units: Units) -> None:
    units.want("apt", [])
    assert units.status("apt").is_ready


def test_want_is_all_or_nothing_when_one_edge_closes_a_cycle(units: Units) -> None:
    units.want("b", ["a"])
    before = statuses(units)
    with pytest.raises(CycleError):
        units.want("a", ["x", "b", "y"])
    assert statuses(units) == before
    assert wants(units, "a") == {}
    assert units.edges == 1


def test_want_is_all_or_nothing_when_one_name_is_bad(units: Units) -> None:
    with pytest.raises(Refused):
        units.want("a", ["x", "", "y"])
    assert statuses(units) == {}


def test_wanting_again_changes_nothing(units: Units) -> None:
    units.want("b", ["a"])
    before = story(units)
    units.want("b", ["a", "a"])
    assert (story(units), units.edges, wants(units, "b")) == (before, 1, {"a": "success"})


def test_one_want_may_name_a_dependency_twice(units: Units) -> None:
    units.want("b", ["a", "a"])
    assert (units.edges, [d.depends_on for d in units.status("b").dependencies]) == (1, ["a"])


def test_wanting_more_keeps_the_order_of_declaration(units: Units) -> None:
    units.want("z", ["c", "a"])
    units.want("z", ["b", "c"])
    assert list(wants(units, "z")) == ["c", "a", "b"]


def test_the_same_edge_with_another_requirement_is_refused_whole(units: Units) -> None:
    units.want("b", ["a"])
    with pytest.raises(Refused, match='unit "b" wants "a" with requirement success already, not start'):
        units.want("b", ["x", "a"], "start")
    assert (statuses(units), wants(units, "b")) == (
        {"a": "not registered", "b": "pending"},
        {"a": "success"},
    )


def test_an_unknown_requirement_is_refused(units: Units) -> None:
    with pytest.raises(Refused, match="no such requirement: perfection; use one of success, completion, start"):
        units.want("b", ["a"], "perfection")
    with pytest.raises(Refused, match="no such requirement: perfection"):
        units.wait(["a"], "w", "perfection")
    assert statuses(units) == {}


@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("order", ["first edge first", "last edge first", "shuffled"])
def test_a_cycle_is_named_whole(units: Units, length: int, order: str) -> None:
    names = [f"n{i}" for i in range(length)]
    edges = list(zip(names, names[1:]))
    if order == "last edge first":
        edges.reverse()
    if order == "shuffled":
        random.Random(length).shuffle(edges)
    for unit, dependency in edges:
        units.want(unit, [dependency, f"aside-of-{unit}"])
    before = statuses(units)

    with pytest.raises(CycleError) as caught:
        units.want(names[-1], [names[0]])

    cycle = [names[-1], *names]  # closed by the new edge, its first name repeated last
    assert caught.value.data == cycle
    assert str(caught.value).partition(";")[0] == "cycle detected: " + " -> ".join(cycle)
    assert statuses(units) == before


def test_a_cycle_is_found_through_a_wide_graph(units: Units) -> None:
    for i in range(50):
        units.want("top", [f"middle{i}"])
        units.want(f"middle{i}", ["bottom"] if i == 30 else [f"leaf{i}"])
    with pytest.raises(CycleError, match=r"^cycle detected: bottom -> top -> middle30 -> bottom$"):
        units.want("bottom", ["top"])


def test_requirements_do_not_make_a_cycle_acceptable(units: Units) -> None:
    units.want("b", ["a"], "start")
    with pytest.raises(CycleError, match="cycle detected: a -> b -> a"):
        units.want("a", ["b"], "completion")


def test_a_diamond_is_no_cycle(units: Units) -> None:
    units.want("d", ["b", "c"])
    units.want("b", ["a"])
    units.want("c", ["a"])
    assert statuses(units) == {"a": "not registered", "b": "pending", "c": "pending", "d": "pending"}


def test_a_dependency_added_after_the_start_counts_the_next_time(units: Units) -> None:
    bring(units, "b", "started")
    units.want("b", ["late"])
    assert units.status("b").status == "started"

    units.complete("b")
    assert units.start("b", "again") is True
    bring(units, "late", "completed")
    assert answers(units)["again"] == {"dependencies": ["late"]}


def test_a_dependency_added_while_a_start_waits_is_waited_for_too(units: Units) -> None:
    units.start("b", "t", ["a"])
    units.want("b", ["late"])
    bring(units, "a", "completed")
    assert answers(units) == {}
    bring(units, "late", "completed")
    assert answers(units) == {"t": {"dependencies": ["a", "late"]}}


def test_a_failed_dependency_added_while_a_start_waits_ends_the_wait(units: Units) -> None:
    bring(units, "broken", "failed")
    units.start("b", "t", ["a"])
    units.want("b", ["broken"])
    assert isinstance(answers(units)["t"], DependencyFailed)
    assert units.status("b").status == "skipped"


def test_a_failed_dependency_added_while_a_re_run_waits_ends_the_wait(units: Units) -> None:
    bring(units, "broken", "failed")
    bring(units, "b", "completed")
    units.start("b", "again", ["a"])
    units.want("b", ["broken"])
    assert isinstance(answers(units).get("again"), DependencyFailed)
    assert units.status("b").status == "completed"


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_wanting_what_has_failed_skips_at_once(units: Units, status: str) -> None:
    bring(units, "a", status)
    units.want("c", ["b"])
    units.want("b", ["a"])
    assert (units.status("b").status, units.status("c").status) == ("skipped", "skipped")


# -- names and limits --------------------------------------------------------------------------------------

GOOD_NAMES = [
    "x",
    'coder_script.startup_unit["health-check"]',
    "<module>.git-clone",
    "Clone repository",
    "clone-\u00fc-\u65e5\u672c\u8a9e-\U0001f680",
    "x" * 255,
    "\u00fc" * 127,
]
BAD_NAMES = ["", "a\nb", "tab\t", "nul\0", "\x1b[31m", "\u202e", "\ud800", "x" * 256, "\u00fc" * 128, "\u2028"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_printable_name_of_up_to_255_bytes_is_taken(units: Units, name: str) -> None:
    units.start(name, "t", [name[:-1] + "!"])
    assert units.status(name).status == "pending"


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_another_name_is_refused_in_one_printable_line(units: Units, name: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: units.want(name, []),
        lambda: units.want("good", [name]),
        lambda: units.start(name, "t"),
        lambda: units.wait(["good", name], "w"),
        lambda: units.complete(name),
        lambda: units.fail(name),
        lambda: units.status(name),
    ]
    for call in calls:
        with pytest.raises(Refused) as caught:
            call()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200
    assert (statuses(units), answers(units)) == ({}, {})


def test_a_name_that_is_no_string_is_a_wrong_parameter(units: Units) -> None:
    with pytest.raises(InvalidParams, match="must be a string, not int"):
        units.want("a", [5])  # type: ignore[list-item]


def test_the_number_of_units_is_bounded(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "MAX_UNITS", 3)
    units.want("a", ["b"])
    with pytest.raises(Refused, match="limit of 3 units"):
        units.want("c", ["d"])
    with pytest.raises(Refused, match="limit of 3 units"):
        units.want("b", ["c", "d"])
    assert statuses(units) == {"a": "pending", "b": "not registered"}
    units.want("c", ["a", "b"])  # exactly the limit
    units.want("b", [])


def test_at_the_limit_of_units_known_ones_can_still_be_waited_for(
    units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coder_sync, "MAX_UNITS", 2)
    units.want("a", ["b"])
    assert units.wait(["a", "b"], "w")
    with pytest.raises(Refused, match="limit of 2 units"):
        units.wait(["a", "c"], "w2")


def test_the_number_of_dependencies_is_bounded(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "MAX_EDGES", 3)
    units.want("a", ["b", "c"])
    with pytest.raises(Refused, match="limit of 3 dependencies"):
        units.want("d", ["e", "f"])
    with pytest.raises(Refused, match="limit of 3 dependencies"):
        units.wait(["b", "c"], "w")
    assert set(statuses(units)) == {"a", "b", "c"}
    units.want("d", ["a"])


def test_the_edges_of_a_wait_are_given_back(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "MAX_EDGES", 1)
    for i in range(3):
        units.wait(["a"], f"w{i}")
        units.cancel(f"w{i}")
    bring(units, "b", "failed")
    units.wait(["b"], "told")
    units.want("a", ["b"])
    assert units.edges == 1


def test_the_number_of_waiting_requests_is_bounded(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "MAX_WAITS", 2)
    units.start("b", "t1", ["a"])
    units.wait(["b"], "t2")
    with pytest.raises(Refused, match="limit of 2 waiting requests"):
        units.start("c", "t3", ["a"])
    with pytest.raises(Refused, match="limit of 2 waiting requests"):
        units.wait(["a"], "t3")
    units.cancel("t2")
    assert units.start("c", "t3", ["a"])


def test_the_oldest_events_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_sync, "MAX_EVENTS", 3)
    units = Units(clock, clock)
    chain(units, 5)
    assert [e.seq for e in units.events] == [7, 8, 9]


# -- start -------------------------------------------------------------------------------------------------


def test_start_of_a_ready_unit_is_answered_at_once(units: Units) -> None:
    assert units.start("a", "t") is False
    assert answers(units) == {"t": {"dependencies": []}}
    assert units.status("a").status == "started"


def test_start_registers_and_waits_until_all_dependencies_are_met(units: Units) -> None:
    assert units.start("c", "t", ["a", "b"]) is True
    assert statuses(units) == {"a": "not registered", "b": "not registered", "c": "pending"}
    bring(units, "a", "completed")
    assert answers(units) == {}
    bring(units, "b", "completed")
    assert answers(units) == {"t": {"dependencies": ["a", "b"]}}
    assert units.status("c").status == "started"


def test_start_is_answered_once(units: Units) -> None:
    units.start("a", "t")
    assert answers(units) == {"t": {"dependencies": []}}
    units.complete("a")
    assert answers(units) == {}


def test_start_of_a_started_unit_is_refused_and_says_by_whom(units: Units) -> None:
    units.start("a", "t", owner=coder_sync.Owner(4242, "bash setup.sh"))
    with pytest.raises(AlreadyStarted, match=r'^unit "a" is already started by bash setup.sh \(pid 4242\)$'):
        units.start("a", "t2")
    assert list(answers(units)) == ["t"]


def test_of_starts_that_wait_the_oldest_wins_and_all_others_are_told(units: Units) -> None:
    for ticket in ("t1", "t2", "t3"):
        units.start("b", ticket, ["a"])
    bring(units, "a", "completed")
    told = answers(units)
    assert told.pop("t1") == {"dependencies": ["a"]}
    assert list(told) == ["t2", "t3"]
    assert {(type(e), str(e)) for e in told.values()} == {(AlreadyStarted, 'unit "b" is already started')}


def test_start_with_a_cycle_changes_nothing(units: Units) -> None:
    units.want("b", ["a"])
    with pytest.raises(CycleError):
        units.start("a", "t", ["b"])
    assert (statuses(units), answers(units)) == ({"a": "not registered", "b": "pending"}, {})
    assert units.cancel("t") is None


@pytest.mark.parametrize("status", ["completed", "failed", "skipped"])
def test_an_ended_unit_may_be_started_again(units: Units, status: str) -> None:
    bring(units, "a", status)
    if status == "skipped":
        units.start("cause-of-a", "repaired")
        units.complete("cause-of-a")
        assert answers(units).keys() == {"repaired"}
    assert units.start("a", "again") is False
    row = units.status("a")
    assert (row.status, row.reason, row.exit_code) == ("started", "", None)
    assert "again" in answers(units)


def test_a_skipped_unit_started_again_waits_for_what_is_repaired(units: Units) -> None:
    bring(units, "a", "failed")
    units.want("b", ["a"])
    units.start("a", "repair")
    assert units.status("b").status == "skipped"  # keeps its outcome until it is started again
    assert units.start("b", "again") is True
    assert units.status("b").status == "pending"
    units.complete("a")
    assert answers(units) == {"repair": {"dependencies": []}, "again": {"dependencies": ["a"]}}


def test_a_skipped_unit_started_again_before_the_repair_is_skipped_again(units: Units) -> None:
    bring(units, "a", "failed")
    units.want("b", ["a"])
    assert units.start("b", "again") is False
    assert str(answers(units)["again"]) == 'unit "b" skipped: dependency "a" failed'
    assert units.status("b").status == "skipped"


def test_dependents_that_have_not_started_wait_again_for_a_re_run(units: Units) -> None:
    bring(units, "a", "completed")
    units.want("early", ["a"])
    units.start("early", "t1")
    units.want("late", ["a"])
    assert units.status("late").is_ready

    units.start("a", "again")

    assert not units.status("late").is_ready
    assert units.start("late", "t2") is True
    assert units.status("early").status == "started"
    units.complete("a")
    assert answers(units).keys() == {"t1", "again", "t2"}


def test_a_completed_unit_whose_re_run_waits_stays_completed(units: Units) -> None:
    bring(units, "a", "completed")
    assert units.start("a", "again", ["b"]) is True
    assert units.status("a").status == "completed"
    units.cancel("again")
    assert units.status("a").status == "completed"


# -- complete, fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["pending", "started"])
def test_complete_ends_a_registered_unit_started_or_not(units: Units, status: str) -> None:
    bring(units, "a", status)
    units.complete("a")
    row = units.status("a")
    assert (row.status, row.exit_code, row.reason) == ("completed", 0, "")


@pytest.mark.parametrize("status", ["pending", "started"])
def test_fail_ends_a_registered_unit_started_or_not(units: Units, status: str) -> None:
    bring(units, "a", status)
    units.fail("a", "exit code 100", 100)
    row = units.status("a")
    assert (row.status, row.exit_code, row.reason) == ("failed", 100, "exit code 100")


@pytest.mark.parametrize("known", [True, False])
def test_the_outcome_of_an_unregistered_name_is_refused(units: Units, known: bool) -> None:
    if known:
        units.want("b", ["a"])
    for end in (units.complete, units.fail):
        with pytest.raises(NotRegistered, match='unit "a" is not registered; call want, start or run on it first'):
            end("a")
    assert statuses(units).get("a", "not registered") == "not registered"


def test_completing_a_completed_unit_changes_nothing(units: Units, clock: Clock) -> None:
    bring(units, "a", "completed")
    before = story(units)
    clock.now += 5
    units.complete("a")
    assert (story(units), units.status("a").age) == (before, 5)


def test_failing_a_failed_unit_keeps_the_first_reason(units: Units) -> None:
    units.want("a", [])
    units.fail("a", "disk full", 28)
    units.fail("a", "exit trap", 1)
    row = units.status("a")
    assert (row.status, row.reason, row.exit_code) == ("failed", "disk full", 28)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [("completed", "failed"), ("failed", "completed"), ("skipped", "completed"), ("skipped", "failed")],
)
def test_an_ended_unit_refuses_another_outcome(units: Units, status: str, outcome: str) -> None:
    bring(units, "a", status)
    with pytest.raises(Refused, match=f'unit "a" is {status}.* and cannot become {outcome}: .*start it again first'):
        (units.complete if outcome == "completed" else units.fail)("a")
    assert units.status("a").status == status


@pytest.mark.parametrize("outcome", ["completed", "failed"])
def test_a_start_that_waits_is_told_when_another_caller_ends_the_unit(units: Units, outcome: str) -> None:
    units.start("b", "t", ["a"])
    (units.complete if outcome == "completed" else units.fail)("b")
    error = answers(units)["t"]
    assert (type(error), str(error)) == (Refused, f'unit "b" was {outcome} by another caller while its start waited')
    assert units.status("b").status == outcome


def test_a_reason_becomes_one_bounded_printable_line(units: Units) -> None:
    units.want("a", [])
    units.fail("a", "no\n  space\tleft\x1b[0m \u00fc" + "x" * 100_000)
    reason = units.status("a").reason
    assert reason.startswith("no space left [0m \u00fcx")
    assert reason.isprintable()
    assert len(reason) == coder_sync.MAX_REASON


# -- skipping ----------------------------------------------------------------------------------------------


def test_failure_skips_down_the_graph_each_with_its_reason(units: Units) -> None:
    units.want("app", ["pip"])
    units.want("pip", ["apt"])
    units.want("apt", [])

    units.fail("apt", "exit code 100", 100)

    assert statuses(units) == {"apt": "failed", "pip": "skipped", "app": "skipped"}
    assert units.status("pip").reason == 'dependency "apt" failed (exit code 100)'
    assert units.status("app").reason == 'dependency "pip" was skipped: dependency "apt" failed (exit code 100)'


def test_whoever_waits_is_told_at_once_with_the_reason(units: Units) -> None:
    units.want("pip", ["apt"])
    units.start("app", "t1", ["pip"])
    units.start("app", "t2")
    units.wait(["app"], "w")
    units.want("apt", [])

    units.fail("apt", "exit code 100", 100)

    why = 'dependency "pip" was skipped: dependency "apt" failed (exit code 100)'
    assert {t: (type(e), str(e)) for t, e in answers(units).items()} == {
        "t1": (DependencyFailed, f'unit "app" skipped: {why}'),
        "t2": (DependencyFailed, f'unit "app" skipped: {why}'),
        "w": (DependencyFailed, f'dependency "app" was skipped: {why}'),
    }


def test_failure_without_a_reason_reads_well(units: Units) -> None:
    units.want("b", ["a"])
    bring(units, "a", "failed")
    assert units.status("b").reason == 'dependency "a" failed'


def test_failure_leaves_what_has_started_or_ended_alone(units: Units) -> None:
    bring(units, "a", "completed")
    for status in ("started", "completed", "failed"):
        bring(units, status, status)
        units.want(status, ["a"])
    units.start("a", "again")
    units.fail("a")
    assert statuses(units) == {"a": "failed", "started": "started", "completed": "completed", "failed": "failed"}


def test_failure_skips_those_that_were_ready_but_not_started(units: Units) -> None:
    bring(units, "a", "completed")
    units.want("b", ["a"])
    units.start("a", "again")
    units.fail("a")
    assert units.status("b").status == "skipped"


def test_a_unit_that_one_branch_skips_is_not_started_by_the_other(units: Units) -> None:
    units.start("d", "t", ["b", "c"])
    units.want("b", [])
    units.want("c", [])
    units.fail("b")
    units.complete("c")
    assert units.status("d").status == "skipped"
    assert isinstance(answers(units)["t"], DependencyFailed)


def test_a_skip_meets_completion_and_starts_who_waits_for_it(units: Units) -> None:
    units.want("b", ["a"])
    units.start("cleanup", "t", ["b"], "completion")
    bring(units, "a", "failed")
    assert answers(units) == {"t": {"dependencies": ["b"]}}


# What an edge asks of a dependency in each status, from DESIGN.md; "never" cannot be met any more, and skips.
TABLE = [
    ("success", "not registered", "waits"),
    ("success", "pending", "waits"),
    ("success", "started", "waits"),
    ("success", "completed", "met"),
    ("success", "failed", "never"),
    ("success", "skipped", "never"),
    ("completion", "not registered", "waits"),
    ("completion", "pending", "waits"),
    ("completion", "started", "waits"),
    ("completion", "completed", "met"),
    ("completion", "failed", "met"),
    ("completion", "skipped", "met"),
    ("start", "not registered", "waits"),
    ("start", "pending", "waits"),
    ("start", "started", "met"),
    ("start", "completed", "met"),
    ("start", "failed", "met"),
    ("start", "skipped", "never"),
]
requirement_table = pytest.mark.parametrize(("requires", "status", "verdict"), TABLE)


def verdict_of(answer: Any) -> str:
    """The word of TABLE for the answer of a start or wait: None while there is none."""
    return "waits" if answer is None else "never" if isinstance(answer, DependencyFailed) else "met"


@requirement_table
def test_start_finds_a_dependency_in_a_status(units: Units, requires: str, status: str, verdict: str) -> None:
    bring(units, "a", status)
    units.start("b", "t", ["a"], requires)
    assert verdict_of(answers(units).get("t")) == verdict
    assert units.status("b").status == {"waits": "pending", "met": "started", "never": "skipped"}[verdict]


@requirement_table
def test_start_waits_while_a_dependency_comes_to_a_status(
    units: Units, requires: str, status: str, verdict: str
) -> None:
    units.start("b", "t", ["a"], requires)
    bring(units, "a", status)
    assert verdict_of(answers(units).get("t")) == verdict
    assert units.status("b").status == {"waits": "pending", "met": "started", "never": "skipped"}[verdict]


@requirement_table
def test_wait_finds_a_unit_in_a_status(units: Units, requires: str, status: str, verdict: str) -> None:
    bring(units, "a", status)
    assert units.wait(["a"], "w", requires) == (verdict == "waits")
    assert verdict_of(answers(units).get("w")) == verdict


@requirement_table
def test_status_shows_what_a_requirement_makes_of_a_status(
    units: Units, requires: str, status: str, verdict: str
) -> None:
    units.want("b", ["a"], requires)
    bring(units, "a", status)
    (row,) = units.status("b").dependencies
    assert (row.required_status, row.requirement, row.current_status, row.is_satisfied) == (
        {"success": "completed", "completion": "ended", "start": "started"}[requires],
        requires,
        status,
        verdict == "met",
    )
    assert units.status("b").is_ready == (verdict == "met")


# -- wait, cancel ------------------------------------------------------------------------------------------


def test_wait_of_several_units_ends_with_the_last(units: Units) -> None:
    assert units.wait(["a", "b", "a"], "w") is True
    bring(units, "a", "completed")
    assert answers(units) == {}
    bring(units, "b", "completed")
    assert answers(units) == {"w": {"dependencies": ["a", "b"]}}


def test_wait_of_several_units_ends_with_the_first_that_fails(units: Units) -> None:
    units.wait(["a", "b"], "w")
    bring(units, "b", "failed")
    assert str(answers(units)["w"]) == 'dependency "b" failed'


def test_a_wait_is_no_unit(units: Units) -> None:
    units.wait(["a"], "w")
    assert statuses(units) == {"a": "not registered"}
    assert story(units) == []
    bring(units, "a", "completed")
    assert statuses(units) == {"a": "completed"}


def test_a_wait_closes_no_cycle(units: Units) -> None:
    units.want("b", ["a"])
    units.wait(["a", "b"], "w")
    units.want("a", ["c"])
    assert wants(units, "a") == {"c": "success"}


def test_names_that_only_a_wait_knew_are_forgotten_with_it(units: Units) -> None:
    units.want("b", ["wanted"])
    units.wait(["only-waited", "wanted", "shared"], "w1")
    units.wait(["shared"], "w2")
    units.cancel("w1")
    assert set(statuses(units)) == {"b", "wanted", "shared"}
    units.cancel("w2")
    assert set(statuses(units)) == {"b", "wanted"}
    assert units.edges == 1


def test_names_of_a_failed_wait_are_forgotten_with_it(units: Units) -> None:
    bring(units, "a", "failed")
    units.wait(["never-registered", "a"], "w")
    assert set(statuses(units)) == {"a"}
    assert units.cancel("w") is None


def test_a_name_forgotten_and_registered_anew_is_an_ordinary_unit(units: Units) -> None:
    units.wait(["a"], "w")
    units.cancel("w")
    units.start("b", "t", ["a"])
    bring(units, "a", "completed")
    assert answers(units) == {"t": {"dependencies": ["a"]}}


def test_cancel_forgets_a_start_and_says_what_it_lacked(units: Units) -> None:
    bring(units, "done", "completed")
    units.start("b", "t", ["a", "done", "z"])
    missing = units.cancel("t")
    assert [d.depends_on for d in missing or []] == ["a", "z"]
    bring(units, "a", "completed")
    bring(units, "z", "completed")
    assert answers(units) == {}
    assert (units.status("b").status, units.status("b").is_ready) == ("pending", True)


def test_cancel_leaves_other_starts_of_the_unit_waiting(units: Units) -> None:
    units.start("b", "t1", ["a"])
    units.start("b", "t2")
    units.cancel("t1")
    bring(units, "a", "completed")
    assert answers(units) == {"t2": {"dependencies": ["a"]}}


def test_cancel_of_what_is_answered_or_unknown_changes_nothing(units: Units) -> None:
    units.start("a", "t")
    assert (units.cancel("t"), units.cancel("never asked"), units.cancel(None)) == (None, None, None)
    assert units.status("a").status == "started"
    assert list(answers(units)) == ["t"]


# -- lose, revoke, holds -----------------------------------------------------------------------------------


def test_a_unit_whose_holder_is_lost_fails_and_says_who_it_was(units: Units) -> None:
    units.start("a", "t", owner=coder_sync.Owner(4242, "bash setup.sh"))
    units.want("b", ["a"])
    units.lose("a", "t")
    assert units.status("a").reason == "lost: process 4242 (bash setup.sh) ended without completing"
    assert (units.status("a").status, units.status("b").status) == ("failed", "skipped")


def test_a_lost_holder_nobody_knows_is_named_so(units: Units) -> None:
    units.start("a", "t")
    units.lose("a", "t")
    assert units.status("a").reason == "lost: the process that held it ended without completing"


def test_a_start_that_waits_for_a_lost_owner_is_told_and_never_wins(units: Units) -> None:
    units.start("b", "t", ["a"])
    units.lose("b", "t")
    error = answers(units)["t"]
    assert (type(error), str(error)) == (
        Refused,
        'unit "b" was not started: the process that was to own it has ended',
    )
    bring(units, "a", "completed")
    assert (units.status("b").status, answers(units)) == ("failed", {})
    assert units.status("b").reason == "lost: the process that held it ended without completing"


def test_losing_one_of_two_starts_that_wait_leaves_the_unit_to_the_other(units: Units) -> None:
    units.start("b", "t1", ["a"])
    units.start("b", "t2")
    units.lose("b", "t1")
    bring(units, "a", "completed")
    assert answers(units)["t2"] == {"dependencies": ["a"]}


def test_losing_a_holder_that_has_completed_changes_nothing(units: Units) -> None:
    units.start("a", "t")
    units.complete("a")
    units.lose("a", "t")
    assert units.status("a").status == "completed"


def test_a_stale_ticket_of_an_earlier_start_does_not_fail_a_later_one(units: Units) -> None:
    units.start("a", "first")
    units.complete("a")
    units.start("a", "second")
    units.lose("a", "first")
    units.revoke("a", "first")
    assert units.status("a").status == "started"
    units.lose("a", "second")
    assert units.status("a").status == "failed"


def test_a_loser_of_two_starts_does_not_fail_the_winner(units: Units) -> None:
    units.start("b", "winner", ["a"])
    units.start("b", "loser")
    bring(units, "a", "completed")
    units.lose("b", "loser")
    assert units.status("b").status == "started"


def test_holds_says_whether_a_start_waits_or_is_on(units: Units) -> None:
    units.start("b", "t", ["a"])
    assert (units.holds("b", "t"), units.holds("b", "other"), units.holds("nobody", "t")) == (True, False, False)
    bring(units, "a", "completed")
    assert units.holds("b", "t")
    units.complete("b")
    assert not units.holds("b", "t")


def test_revoke_makes_a_start_undone(units: Units) -> None:
    units.start("a", "t", owner=coder_sync.Owner(4242, "sh"))
    units.want("b", ["a"], "start")
    units.revoke("a", "t")
    row = units.status("a")
    assert (row.status, row.owner, row.is_ready) == ("pending", None, True)
    assert not units.status("b").is_ready
    assert units.start("a", "t2") is False


def test_revoke_of_what_has_ended_changes_nothing(units: Units) -> None:
    units.start("a", "t")
    units.complete("a")
    units.revoke("a", "t")
    assert units.status("a").status == "completed"


def test_a_revoked_unit_whose_dependency_has_failed_meanwhile_is_skipped(units: Units) -> None:
    bring(units, "a", "completed")
    units.start("b", "t", ["a"])
    units.want("c", ["b"])
    units.start("a", "again")
    units.fail("a")
    units.revoke("b", "t")
    assert (units.status("b").status, units.status("c").status) == ("skipped", "skipped")


# -- questions ---------------------------------------------------------------------------------------------


def test_missing_says_what_a_ticket_still_lacks(units: Units, clock: Clock) -> None:
    bring(units, "done", "completed")
    units.start("slow", "s", owner=coder_sync.Owner(4242, "bash slow.sh"))
    units.want("stuck", ["x1", "x2", "x3", "x4", "x5"])
    units.start("b", "t", ["done", "slow", "stuck", "typo"])
    clock.now += 31
    slow, stuck, typo = units.missing("t")
    assert (slow.depends_on, slow.current_status, slow.age) == ("slow", "started", 31.0)
    assert slow.owner == coder_sync.Owner(4242, "bash slow.sh")
    assert (stuck.current_status, stuck.waits_for) == ("pending", ["x1", "x2", "x3", "x4"])
    assert (typo.current_status, typo.waits_for, typo.owner) == ("not registered", [], None)


def test_missing_of_a_ticket_that_is_answered_or_unknown_is_nothing(units: Units) -> None:
    units.start("a", "t")
    assert (units.missing("t"), units.missing("unknown"), units.missing(None)) == ([], [], [])


def test_dependencies_show_met_ones_and_reasons(units: Units, clock: Clock) -> None:
    bring(units, "good", "completed")
    units.want("bad", [])
    units.fail("bad", "exit code 7", 7)
    clock.now += 2.5
    units.want("b", ["good", "bad"], "completion")
    assert units.dependencies(units.units["b"]) == [
        coder_sync.Dependency("good", "ended", "completed", True, "completion", 2.5),
        coder_sync.Dependency("bad", "ended", "failed", True, "completion", 2.5, "exit code 7"),
    ]


def test_status_is_a_snapshot(units: Units) -> None:
    units.start("b", "t", ["a"])
    before = units.status("b")
    bring(units, "a", "completed")
    assert (before.status, before.is_ready, before.dependencies[0].current_status) == (
        "pending",
        False,
        "not registered",
    )


def test_status_of_a_name_nobody_knows_is_not_registered_and_leaves_no_trace(units: Units) -> None:
    assert units.status("ghost") == coder_sync.UnitStatus("ghost", "not registered", False)
    assert statuses(units) == {}


def test_status_says_whether_the_owner_still_runs(clock: Clock) -> None:
    living = {4242}
    units = Units(clock, clock, alive=lambda owner: owner.pid in living)
    units.start("a", "t", owner=coder_sync.Owner(4242, "sh"))
    assert units.status("a").owner == coder_sync.Owner(4242, "sh", True)
    living.clear()
    assert units.status("a").owner == coder_sync.Owner(4242, "sh", False)


def test_the_age_counts_from_the_last_change_of_status(units: Units, clock: Clock) -> None:
    units.want("a", [])
    clock.now += 10
    units.start("a", "t")
    clock.now += 2.0004
    assert units.status("a").age == 2.0


def test_snapshots_are_sorted_and_leave_out_names_only_wanted(units: Units) -> None:
    units.want("b", ["c"])
    units.want("a", ["d"])
    assert [s.unit_name for s in units.snapshots()] == ["a", "b"]
    assert [s.unit_name for s in units.snapshots(everything=True)] == ["a", "b", "c", "d"]


# -- events ------------------------------------------------------------------------------------------------


def test_every_step_is_recorded_with_its_times(clock: Clock) -> None:
    heard: list[coder_sync.Event] = []
    units = Units(clock, lambda: 1.7e9 + clock.now, tell=heard.append)
    units.start("b", "t", ["a"])
    clock.now += 1
    units.start("a", "s")
    clock.now += 2
    units.complete("a")
    clock.now += 4
    units.fail("b", "exit code 3", 3)

    assert [(e.time, e.unit, e.kind, e.detail) for e in units.events] == [
        (1000, "b", "registered", ""),
        (1000, "b", "wants", "a"),
        (1000, "b", "waiting", "a"),
        (1001, "a", "registered", ""),
        (1001, "a", "started", ""),
        (1003, "a", "completed", ""),
        (1003, "b", "started", ""),
        (1007, "b", "failed", "exit code 3"),
    ]
    assert [e.seq for e in units.events] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {e.wall - e.time for e in units.events} == {1.7e9}
    assert list(units.events) == heard


def test_events_name_requirements_skips_and_those_who_gave_up(units: Units) -> None:
    units.want("b", ["a"], "completion")
    units.start("c", "t", ["a"])
    units.cancel("t", "timed out")
    units.want("a", [])
    units.fail("a")
    assert [s for s in story(units) if s[1] not in ("registered", "waiting")] == [
        ("b", "wants", "a (completion)"),
        ("c", "wants", "a"),
        ("c", "gave up", "timed out; still missing: a"),
        ("a", "failed", ""),
        ("c", "skipped", 'dependency "a" failed'),
    ]


def test_the_history_of_a_unit_is_its_own(units: Units) -> None:
    units.start("b", "t", ["a"])
    bring(units, "a", "completed")
    assert [e.kind for e in units.history("b")] == ["registered", "wants", "waiting", "started"]
    assert [e.kind for e in units.history("a")] == ["registered", "completed"]
    assert units.history("ghost") == []


def test_a_graph_says_when_a_unit_did_what_and_who_let_it_go(units: Units, clock: Clock) -> None:
    clock.now += 1
    units.start("b", "t", ["z", "a"])
    clock.now += 1
    bring(units, "a", "completed")
    clock.now += 1
    bring(units, "z", "completed")
    clock.now += 1
    units.complete("b")
    clock.now += 1

    graph = units.graph()

    b = next(node for node in graph.nodes if node.unit_name == "b")
    assert (graph.now, b.registered, b.waiting, b.started, b.ended) == (5, 1, 1, 3, 4)
    assert (b.status, b.released_by, b.wants) == ("completed", "z", {"z": "success", "a": "success"})


def test_a_graph_has_no_times_for_what_has_not_happened(units: Units) -> None:
    units.start("b", "t", ["a"])
    assert {n.unit_name: (n.is_waiting, n.registered, n.waiting, n.started, n.ended) for n in units.graph().nodes} == {
        "b": (True, 0, 0, -1, -1),
        "a": (False, -1, -1, -1, -1),
    }


def test_a_re_run_begins_anew_in_a_graph(units: Units, clock: Clock) -> None:
    bring(units, "a", "failed")
    clock.now += 1
    units.start("a", "again", ["b"])
    clock.now += 1
    bring(units, "b", "completed")
    (a, _) = units.graph().nodes
    assert (a.status, a.registered, a.waiting, a.started, a.ended) == ("started", 0, 1, 2, -1)


# -- size --------------------------------------------------------------------------------------------------


def test_a_chain_of_10000_starts_in_one_go(units: Units) -> None:
    names = chain(units, 10_000, "start")
    for name in names[1:]:
        units.start(name, name)
    assert answers(units) == {}
    units.start("u0", "u0")
    assert list(answers(units)) == names
    assert set(statuses(units).values()) == {"started"}


def test_a_chain_of_10000_completes_one_by_one(units: Units) -> None:
    names = chain(units, 10_000)
    for name in reversed(names):
        units.start(name, name)
    for name in names:
        assert list(answers(units)) == [name]
        units.complete(name)
    assert set(statuses(units).values()) == {"completed"}


def test_a_chain_of_10000_is_skipped_in_one_go(units: Units) -> None:
    names = chain(units, 10_000)
    for name in names[1:]:
        units.start(name, name)
    units.fail("u0", "exit code 1")
    told = answers(units)
    assert list(told) == names[1:]
    assert {type(a) for a in told.values()} == {DependencyFailed}


def test_a_chain_of_10000_that_closes_is_refused(units: Units) -> None:
    names = chain(units, 10_000)
    with pytest.raises(CycleError) as caught:
        units.want("u0", ["u9999"])
    assert caught.value.data == ["u0", *reversed(names)]


@pytest.mark.parametrize(
    "reason", ["exit code 1", "x" * 10_000, "lost: " + "y: " * 200, ""], ids=["short", "long", "colons", "none"]
)
@pytest.mark.parametrize("name", ["u{}", "{}" + "n" * 245], ids=["short name", "long name"])
def test_reasons_stay_bounded_down_a_long_chain(units: Units, reason: str, name: str) -> None:
    names = [name.format(i) for i in range(500)]
    units.want(names[0], [])
    for before, after in zip(names, names[1:]):
        units.want(after, [before])
    units.fail(names[0], reason)
    reasons = [units.status(n).reason for n in names]
    assert max(map(len, reasons)) <= 2 * (coder_sync.MAX_REASON + coder_sync.MAX_NAME)
    assert all(r.startswith(f'dependency "{before}" ') for before, r in zip(names, reasons[1:]))


@pytest.mark.parametrize("reason", ["exit code 1", "x" * 10_000, "lost: it"], ids=["short", "long", "colon"])
def test_the_last_of_a_long_chain_still_knows_what_failed(units: Units, reason: str) -> None:
    names = chain(units, 500)
    units.fail("u0", reason)
    assert units.status(names[-1]).reason.startswith('dependency "u498" was skipped: ')
    assert f'dependency "u0" failed ({reason[:20]}' in units.status(names[-1]).reason


# ---------------------------------------------------------------------------------------------------------
# Units: random operations against a plain model of the rules. The model says which steps are allowed now and
# which must have been taken; among those allowed together, Units chooses the order.
# ---------------------------------------------------------------------------------------------------------


MET_BY = {
    "success": {"completed"},
    "completion": {"completed", "failed", "skipped"},
    "start": {"started", "completed", "failed"},
}
LOST_BY: dict[str, set[str]] = {"success": {"failed", "skipped"}, "completion": set(), "start": {"skipped"}}


class Model:
    """The rules as DESIGN.md has them, from statuses and edges, everything computed again for every question."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}  # of registered units
        self.edges: dict[tuple[str, str], str] = {}  # (unit, dependency) -> requirement
        self.starts: dict[str, str] = {}  # ticket of a start that waits -> unit; oldest first
        self.waits: dict[str, list[tuple[str, str]]] = {}  # ticket of a wait -> its needs
        self.holders: dict[str, str] = {}  # unit -> ticket of its last start
        self.told: dict[str, Any] = {}  # ticket of a start -> its answer: dependencies or a class of error
        self.may_tell: dict[str, list[Any]] = {}  # ticket of a wait -> answers that were right at some moment
        self.reopened = ""  # the unit that this operation makes pending again

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
        return unit == goal or any(self.reaches(d, goal) for d, _ in self.needs(unit))

    def names(self) -> set[str]:
        waited = {d for needs in self.waits.values() for d, _ in needs}
        return {*self.statuses, *(d for _, d in self.edges), *waited}

    # -- what callers may do: each returns the kind of error it must be refused with, or None

    def want(self, unit: str, dependencies: list[str], requires: str) -> type[Exception] | None:
        for dependency in dependencies:
            if self.reaches(dependency, unit):
                return CycleError
            if self.edges.get((unit, dependency), requires) != requires:
                return Refused
        self.edges.update({(unit, d): requires for d in dependencies})
        self.statuses.setdefault(unit, "pending")
        return None

    def start(self, unit: str, ticket: str, dependencies: list[str], requires: str) -> type[Exception] | None:
        refusal = self.want(unit, dependencies, requires)
        if refusal is None and self.status(unit) == "started":
            refusal = AlreadyStarted
        if refusal is None:
            self.reopened = unit  # if it has failed or was skipped; a completed one stays so until it starts
            self.starts[ticket] = unit
            if self.status(unit) != "skipped" or not self.hopeless(self.needs(unit)):
                self.holders.pop(unit, None)
            if self.status(unit) == "skipped" and self.hopeless(self.needs(unit)):
                self.tell(unit, DependencyFailed)
        return refusal

    def wait(self, names: list[str], ticket: str, requires: str) -> None:
        self.waits[ticket] = [(n, requires) for n in dict.fromkeys(names)]

    def end(self, unit: str, outcome: str) -> type[Exception] | None:
        status = self.status(unit)
        if status == "not registered":
            return NotRegistered
        if status in ("completed", "failed", "skipped"):
            return None if status == outcome else Refused
        self.statuses[unit] = outcome
        self.tell(unit, Refused)
        return None

    def lose(self, unit: str, ticket: str) -> None:
        if ticket in self.starts:
            del self.starts[ticket]
            self.told[ticket] = Refused
            if unit not in self.starts.values() and self.status(unit) == "pending":
                self.statuses[unit] = "failed"
        elif self.status(unit) == "started" and self.holders[unit] == ticket:
            self.statuses[unit] = "failed"
        elif self.status(unit) == "pending" and self.holders.get(unit) == ticket and unit not in self.starts.values():
            self.statuses[unit] = "failed"  # it had given up waiting

    def revoke(self, unit: str, ticket: str) -> None:
        if self.status(unit) == "started" and self.holders[unit] == ticket:
            self.statuses[unit] = "pending"
            self.reopened = unit
            del self.holders[unit]

    def cancel(self, ticket: str) -> list[str] | None:
        if ticket in self.starts:
            unit = self.starts.pop(ticket)
            if self.status(unit) == "pending":
                self.holders[unit] = ticket  # should its owner end now, nobody will start the unit
            return self.unmet(self.needs(unit))
        return self.unmet(self.waits.pop(ticket)) if ticket in self.waits else None

    # -- what follows from it

    def tell(self, unit: str, answer: Any) -> None:
        for ticket in [t for t, u in self.starts.items() if u == unit]:
            del self.starts[ticket]
            self.told[ticket] = answer

    def step(self, unit: str, kind: str) -> None:
        """Take a step that Units says it took; it must be allowed."""
        needs, status = self.needs(unit), self.status(unit)
        if kind == "pending":
            assert unit == self.reopened
            assert status in ("failed", "skipped", "pending")
            self.statuses[unit] = "pending"
        elif kind == "skipped":
            assert status == "pending"
            assert self.hopeless(needs)
            self.statuses[unit] = "skipped"
            self.tell(unit, DependencyFailed)
        elif kind == "started":
            assert status in ("pending", "completed")
            assert not self.unmet(needs)
            winner = next(t for t, u in self.starts.items() if u == unit)
            del self.starts[winner]
            self.told[winner] = [d for d, _ in needs]
            self.tell(unit, AlreadyStarted)
            self.statuses[unit], self.holders[unit] = "started", winner
        elif kind in ("completed", "failed"):
            assert status == kind
        self.look()

    def look(self) -> None:
        """See who has to be told in the present moment."""
        for unit, status in self.statuses.items():
            if status == "completed" and self.hopeless(self.needs(unit)):
                self.tell(unit, DependencyFailed)
        for ticket, needs in self.waits.items():
            if self.hopeless(needs):
                self.may_tell[ticket] = [*self.may_tell.get(ticket, []), DependencyFailed]
            elif not self.unmet(needs):
                self.may_tell[ticket] = [*self.may_tell.get(ticket, []), [d for d, _ in needs]]

    def settled(self) -> None:
        """Nothing that must happen is left to do."""
        for unit in self.starts.values():
            assert self.unmet(self.needs(unit)), f"{unit} should have started"
            assert self.status(unit) in ("pending", "completed"), f"{unit} should be pending"
        for unit, status in self.statuses.items():
            assert status != "pending" or not self.hopeless(self.needs(unit)), f"{unit} should be skipped"
        for ticket, needs in self.waits.items():
            assert self.unmet(needs), f"{ticket} should be over"
            assert not self.hopeless(needs), f"{ticket} should have failed"


class Play:
    """One random run of Units beside the Model."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.units = Units(self.clock, self.clock)
        self.model = Model()
        self.names = "abcdef"[: self.random.choice([2, 3, 4, 6])]
        self.tickets: dict[str, str] = {}  # all that were ever used -> unit, empty for a wait
        self.requirements = self.random.choice([["success"], ["success", "success", "completion", "start"]])

    def operation(self) -> tuple[str, list[Any]]:
        """Choose what to do next."""
        some = self.random.choices(self.names, k=self.random.choice([0, 1, 1, 2, 3]))
        name, requires = self.random.choice(self.names), self.random.choice(self.requirements)
        ticket = self.random.choice(list(self.tickets)[-8:]) if self.tickets else "none"
        new = f"t{len(self.tickets)}"
        weights = {"want": 3, "start": 5, "complete": 5, "fail": 2, "wait": 2, "cancel": 2, "lose": 1, "revoke": 1}
        what = self.random.choices(list(weights), list(weights.values()))[0]
        if what == "want":
            return what, [name, some, requires]
        if what == "start":
            self.tickets[new] = name
            return what, [name, new, some[:2] if self.random.random() < 0.4 else [], requires]
        if what == "wait":
            self.tickets[new] = ""
            return what, [some or [name], new, requires]
        if what == "cancel":
            return what, [ticket]
        if what in ("lose", "revoke"):
            return what, [self.tickets.get(ticket) or name, ticket]
        return what, [name]

    def do(self, what: str, args: list[Any]) -> None:
        """Do it on both sides and compare everything."""
        seen, model, units = self.units.seq, self.model, self.units
        model.reopened, model.told, model.may_tell = "", {}, {}
        if what in ("complete", "fail"):
            expected: Any = model.end(args[0], "completed" if what == "complete" else "failed")
        else:
            expected = getattr(model, what)(*args)
        model.look()
        result: Any = None
        try:
            result = getattr(units, what)(*args)
        except Refused as error:
            result = type(error)
            if isinstance(error, CycleError):
                self.check_cycle(error.data, *((args[0], args[1]) if what == "want" else (args[0], args[2])))
        if what == "cancel":
            assert (None if result is None else [d.depends_on for d in result]) == expected
        elif expected is not None or isinstance(result, type):
            assert result == expected
        for event in list(units.events)[seen - units.seq :] if units.seq > seen else []:
            model.step(event.unit, event.kind)
        self.compare(what, args, result)

    def compare(self, what: str, args: list[Any], result: Any) -> None:
        model, units = self.model, self.units
        told = {t: type(a) if isinstance(a, Exception) else a["dependencies"] for t, a in units.take_answers()}
        for ticket in [t for t in told if t in model.waits]:
            assert told.pop(ticket) in model.may_tell[ticket]
            del model.waits[ticket]
        assert told == model.told
        model.settled()
        if what in ("start", "wait") and not isinstance(result, type):
            assert result == (args[1] in model.starts or args[1] in model.waits)
        assert statuses(units) == {n: model.status(n) for n in model.names()}
        assert units.edges == len(model.edges) + sum(map(len, model.waits.values()))
        for name, unit in units.units.items():
            needs = model.needs(name)
            assert [(d.name, r) for d, r in unit.wants.items()] == needs
            assert unit.unmet == len(model.unmet(needs)), f"{name}: unmet"
            assert units.status(name).is_ready == (name in model.statuses and not model.unmet(needs))
            assert [d.depends_on for d in units.missing(unit)] == model.unmet(needs)
        for ticket, name in self.tickets.items():
            on = name and model.status(name) in ("started", "pending") and model.holders.get(name) == ticket
            assert units.holds(name, ticket) == bool(on or (name and ticket in model.starts))

    def check_cycle(self, cycle: list[str], unit: str, dependencies: list[str]) -> None:
        """What the error names is a cycle that the new edges would close."""
        edges = {*self.model.edges, *((unit, d) for d in dependencies)}
        assert cycle[0] == cycle[-1] == unit
        assert set(zip(cycle, cycle[1:])) <= edges
        assert len(set(cycle)) == len(cycle) - 1


@pytest.mark.parametrize("first", range(0, 300, 30))
def test_units_do_what_the_model_allows_and_demands(first: int) -> None:
    for seed in range(first, first + 30):
        play, history = Play(seed), []
        for _ in range(60):
            what, args = play.operation()
            history.append(f"{what}{tuple(args)}")
            try:
                play.do(what, args)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(history)) from error


# ---------------------------------------------------------------------------------------------------------
# Protocol: lines out and in, with the C scanner used bare and with the json package.
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bare", "json package"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read and write JSON: the second is for a Python without the C module."""
    if request.param == "json package":
        monkeypatch.setitem(sys.modules, "_json", None)
        loads, dumps = coder_sync._codec()
        assert loads is not coder_sync._loads
        monkeypatch.setattr(coder_sync, "_loads", loads)
        monkeypatch.setattr(coder_sync, "_dumps", dumps)
    return str(request.param)


MESSAGES: list[dict[str, Any]] = [
    {},
    {"id": 1, "method": "ping", "params": {}},
    {"id": "a", "result": [None, True, False, 0, -1, 2**31, 1.5, 1e-9, "", [], {}]},
    {"method": 'Clone "repository" \\ / \u00fc \u65e5\u672c \U0001f680 \x00 \x1f \u2028 \n'},
    {"params": {"units": ["x" * 255] * 200}},
]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_what_is_encoded_is_decoded(codec: str, message: dict[str, Any]) -> None:
    line = coder_sync.encode(message)
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    assert coder_sync.decode(line) == {"jsonrpc": "2.0", **message} == json.loads(line)


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_both_codecs_write_the_same_bytes(monkeypatch: pytest.MonkeyPatch, message: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "_json", None)
    assert coder_sync._codec()[1](message) == coder_sync._dumps(message)


@pytest.mark.parametrize("line", [b'{"a":[1]}', b' {"a" : [1]}\r\n', b'\t{"a":[1]}  ', b'{"a":[0],"a":[1]}'])
def test_space_around_a_value_is_fine(codec: str, line: bytes) -> None:
    assert coder_sync.decode(line) == {"a": [1]}


GARBAGE = [
    b"",
    b" \n",
    b"{",
    b"nope",
    b"GET / HTTP/1.1\r\n",
    b"'a'",
    b'{"a":1,}',
    b'{"a" 1}',
    b"{1:1}",
    b'"\x01"',
    b'"abc',
    b'"abc\\',
    b'"\\x"',
    b"\xff",
    b'"\xc3"',
    b"\x00",
    b"\x80\x04K\x01.",
    b'{"a":1} x',
    b'{"a":1}{"b":2}',
    b"1 2",
    b"01",
    b"NaN",
    b'{"a": NaN}',
    b"Infinity",
    b"[-Infinity]",
    b"]",
    b"}" * 100,
    b'"' * 33,
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: ascii(line[:20]))
def test_what_is_not_one_json_value_is_refused(codec: str, line: bytes) -> None:
    with pytest.raises(ParseError) as caught:
        coder_sync.decode(line)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_garbage_is_refused_where_nobody_has_imported_json() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import coder_sync
assert "json" not in sys.modules
for line in {GARBAGE!r}:
    try:
        print("accepted", line, coder_sync.decode(line))
    except coder_sync.ParseError:
        pass
assert coder_sync.decode(b'{{"a": [1]}}') == {{"a": [1]}}
print("end")
"""
    done = subprocess.run([sys.executable, "-IS", "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "end\n"


def test_32_levels_are_read_and_33_are_not(codec: str) -> None:
    assert coder_sync.decode(b"[" * 32 + b"]" * 32)
    assert coder_sync.decode(b'{"a":' * 32 + b"1" + b"}" * 32)
    for line in (b"[" * 33 + b"]" * 33, b'{"a":' * 33 + b"1" + b"}" * 33, b"[" * 100_000, b'[{"a":' * 30_000):
        with pytest.raises(ParseError, match="deeper than 32 levels"):
            coder_sync.decode(line)


@pytest.mark.parametrize("text", ["[" * 1000, "{" * 1000, '"[{' * 300, '\\"[' * 300, "\\" * 301 + "[" * 99, "[\\"])
def test_brackets_inside_strings_do_not_nest(codec: str, text: str) -> None:
    assert coder_sync.decode(coder_sync.encode({"unit": text})) == {"jsonrpc": "2.0", "unit": text}


def test_brackets_side_by_side_do_not_nest(codec: str) -> None:
    assert coder_sync.decode(b"[" + b"[]," * 1000 + b"{}]") == [[]] * 1000 + [{}]


def test_a_line_of_brackets_and_open_strings_is_refused_quickly() -> None:
    line = b"[" * 33 + b'"' + b'\\"' * ((coder_sync.MAX_LINE - 34) // 2)
    began = time.process_time()
    with pytest.raises(ParseError):
        coder_sync.decode(line)
    assert time.process_time() - began < 0.5  # some milliseconds, unless each quote looks for its end


# -- records -----------------------------------------------------------------------------------------------

OWNER = coder_sync.Owner(4242, "bash setup.sh", True)
GONE = coder_sync.Owner(7, "sh", False)
DEPENDENCY = coder_sync.Dependency("a", "ended", "started", False, "completion", 1.5, "", OWNER, ["x"], "b")
EVENT = coder_sync.Event(1, 2.5, 1.7e9, "u", "wants", "v")
NODE = coder_sync.Node("u", "started", True, False, 0.0, -1.0, 1.5, -1.0, "a", "", {"a": "success"}, OWNER)
RECORDS = [
    OWNER,
    coder_sync.Owner(1, "init", None),
    DEPENDENCY,
    coder_sync.Dependency("a", "completed", "completed", True),
    coder_sync.UnitStatus("u", "failed", False, "why", 3, 2.0, OWNER, [DEPENDENCY, DEPENDENCY], "v"),
    coder_sync.UnitStatus("u", "pending", True),
    EVENT,
    coder_sync.UnitStatus("u", "pending", True, history=[EVENT, EVENT]),
    NODE,
    coder_sync.Graph(7.5, [NODE]),
]


@pytest.mark.parametrize("value", RECORDS, ids=lambda value: type(value).__name__)
def test_a_record_survives_the_wire(value: Any) -> None:
    assert coder_sync.record(type(value), json.loads(json.dumps(coder_sync.plain(value)))) == value


@pytest.mark.parametrize("value", RECORDS, ids=lambda value: type(value).__name__)
def test_keys_of_a_newer_agent_are_ignored(value: Any) -> None:
    data = {**coder_sync.plain(value), "mood": "good", "__class__": "x"}
    if data.get("owner"):
        data["owner"] = {**data["owner"], "shoe_size": 43}
    assert coder_sync.record(type(value), data) == value


def test_what_an_older_agent_leaves_out_has_its_default() -> None:
    data = {"unit_name": "u", "status": "pending", "is_ready": True}
    assert coder_sync.record(coder_sync.UnitStatus, data) == coder_sync.UnitStatus("u", "pending", True)


def test_when_an_owner_was_born_stays_with_the_agent() -> None:
    assert coder_sync.plain({"rows": (coder_sync.Owner(1, "init", True, "123"),)}) == {
        "rows": [{"pid": 1, "command": "init", "alive": True}]
    }


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (coder_sync.UnitStatus, None),
        (coder_sync.UnitStatus, 5),
        (coder_sync.UnitStatus, "text"),
        (coder_sync.UnitStatus, []),
        (coder_sync.UnitStatus, {}),
        (coder_sync.UnitStatus, {"unit_name": "u", "status": "pending"}),
        (coder_sync.UnitStatus, {"unit_name": "u", "status": "s", "is_ready": True, "dependencies": None}),
        (coder_sync.UnitStatus, {"unit_name": "u", "status": "s", "is_ready": True, "dependencies": [{}]}),
        (coder_sync.UnitStatus, {"unit_name": "u", "status": "s", "is_ready": True, "owner": "root"}),
        (coder_sync.UnitStatus, {"unit_name": "u", "status": "s", "is_ready": True, "owner": {"pid": 1}}),
        (coder_sync.Graph, {"now": 1.0, "nodes": [{"unit_name": "u"}]}),
        (coder_sync.Event, {"seq": 1}),
        (coder_sync.Event, ["seq", "time"]),
    ],
)
def test_a_malformed_answer_is_said_to_be_one(kind: Any, data: Any) -> None:
    with pytest.raises(Unreachable, match=r"the answer is not a \w+; are agent and client of one version"):
        coder_sync.record(kind, data)


def test_a_record_takes_no_unknown_or_surplus_arguments() -> None:
    with pytest.raises(TypeError):
        coder_sync.Owner(1, "init", mood="good")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        coder_sync.Owner(1, "init", None, "", "surplus")  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------------------
# Times and words on the command line and in what it prints.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("30", 30),
        ("2.5", 2.5),
        ("30s", 30),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h1m1s1ms", 3661.001),
        ("500ms", 0.5),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("5.s", 5),
        ("250us", 0.00025),
        ("250\u00b5s", 0.00025),  # micro sign
        ("250\u03bcs", 0.00025),  # Greek mu; Go takes both
        ("100ns", 1e-7),
        ("1m1m", 120),
        ("0s", 0),
        ("1000000000", 1e9),
    ],
)
def test_durations_of_go_and_bare_seconds_are_read(text: str, seconds: float) -> None:
    assert coder_sync.duration(text) == pytest.approx(seconds, abs=1e-12)


NO_DURATIONS = ["", " ", "s", "m5", ".", ".s", "-5", "-5s", "+5", "5 s", " 5s", "5s ", "5s\n", "1m30", "30m5", "1.2.3s"]
NO_DURATIONS += ["1e3", "5x", "5sm", "5S", "1d", "inf", "nan", "infinity", "1_000", "0x10", "\u0665s", "\u00b2", "\0"]
NO_DURATIONS += ["1000000001", "9" * 400]


@pytest.mark.parametrize("text", NO_DURATIONS, ids=lambda text: ascii(text[:20]))
def test_what_is_no_duration_is_refused_in_one_printable_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^invalid duration .*: write 30 or 30s, 10m, 1h30m") as caught:
        coder_sync.duration(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0004, "0ms"),
        (0.35, "350ms"),
        (0.9994, "999ms"),
        (0.9996, "1.0s"),
        (2.14, "2.1s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (31.2, "31s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (252, "4m12s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3725, "1h02m"),
        (90000, "25h00m"),
    ],
)
def test_a_span_reads_well(seconds: float, text: str) -> None:
    assert coder_sync.span(seconds) == text


@pytest.mark.parametrize(
    ("status", "more", "text"),
    [
        ("not registered", {}, "a not registered"),
        ("not registered", {"did_you_mean": "aa"}, 'a not registered, did you mean "aa"?'),
        ("pending", {"age": 12}, "a pending for 12s, not started yet"),
        ("pending", {"waits_for": ["x", "y"]}, "a pending for 0ms, waits for x, y"),
        ("started", {"age": 31}, "a started 31s ago"),
        ("started", {"age": 31, "owner": OWNER}, "a started 31s ago by bash setup.sh (pid 4242)"),
        ("started", {"owner": GONE}, "a started 0ms ago by sh (pid 7), which is no longer running"),
        ("completed", {"age": 2, "owner": OWNER}, "a completed 2.0s ago"),
        ("failed", {"age": 2, "reason": "exit code 7"}, "a failed 2.0s ago (exit code 7)"),
        ("skipped", {"reason": 'dependency "b" failed'}, 'a skipped 0ms ago (dependency "b" failed)'),
    ],
)
def test_a_state_says_where_a_dependency_stands_and_why(status: str, more: dict[str, Any], text: str) -> None:
    assert coder_sync.state(coder_sync.Dependency("a", "completed", status, False, **more)) == text


HEADER, ROWS = ["UNIT", "CURRENT STATUS", "READY"], [["pip", "pending", "false"], ["a-long-name", "", "true"]]


def test_a_table_has_its_columns_two_spaces_apart() -> None:
    assert coder_sync.table(HEADER, ROWS).split("\n") == [
        "UNIT         CURRENT STATUS  READY",
        "pip          pending         false",
        "a-long-name                  true",
        "",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert coder_sync.table(HEADER, []) == "UNIT  CURRENT STATUS  READY\n"


@pytest.mark.parametrize("columns", ["ready,current_status", "READY, Current Status", "Ready,current status"])
def test_a_table_shows_the_columns_asked_for_in_their_order(columns: str) -> None:
    assert coder_sync.table(HEADER, ROWS, columns) == "READY  CURRENT STATUS\nfalse  pending\ntrue\n"


@pytest.mark.parametrize("columns", ["status", "unit,", ",", "unit;ready", " "])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(columns: str) -> None:
    with pytest.raises(UsageError, match=r"no such column: .* there are unit, current status, ready"):
        coder_sync.table(HEADER, ROWS, columns)


@pytest.mark.parametrize(
    ("name", "guess"),
    [("git-clon", "git-clone"), ("gitclone", "git-clone"), ("GIT", ""), ("apt-instal", "apt-install"), ("", "")],
)
def test_a_name_close_to_a_known_one_resembles_it(name: str, guess: str) -> None:
    assert coder_sync.resembling(name, ["apt-install", "git-clone", "pip"]) == guess


def test_nothing_resembles_a_name_where_there_are_none() -> None:
    assert coder_sync.resembling("git-clone", []) == ""


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("42", 42), ("-1", -1), ("007", 7), ("999999999", 999999999)])
def test_a_whole_number_is_read(text: str, number: int) -> None:
    assert coder_sync.whole(text) == number


@pytest.mark.parametrize("text", ["", "-", "1.5", "1e3", "0x1", "x", "--1", "1-", "\u00b2", "1234567890", "9" * 5000])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a whole number"):
        coder_sync.whole(text)


@pytest.mark.parametrize(("text", "mode"), [("660", 0o660), ("0600", 0o600), ("4755", 0o755)])
def test_a_mode_is_read_in_octal(text: str, mode: int) -> None:
    assert coder_sync.mode_bits(text) == mode


@pytest.mark.parametrize("text", ["", "66", "8", "888", "0o660", "rw-", "66666", "\u00b2\u00b2\u00b2"])
def test_what_is_no_mode_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="invalid mode"):
        coder_sync.mode_bits(text)


def test_a_group_that_is_not_there_is_refused() -> None:
    assert coder_sync.group_id("4242") == 4242
    for name in ("no-such-group-here", "\u00b2"):
        with pytest.raises(UsageError, match="no such group"):
            coder_sync.group_id(name)


# -- the parser --------------------------------------------------------------------------------------------

VALUES = ["a", "x y", "5", "10s", "1h30m", "0", "table", "json", "success", "completion", "660", "/run/a.sock", ""]
MISTAKES = ["-", "-5", "-5s", "--", "-x", "--nope", "1e3", "xml", "--unit", "---", "- a", "--a b", "\u00fc", "="]


def random_words(chance: random.Random, command: coder_sync.Command) -> list[str]:
    """Words for a command: mostly right, some not."""
    options = coder_sync.options_of(command)
    words: list[str] = []
    for _ in range(chance.randrange(5)):
        option = chance.choice(options)
        flag, value = chance.choice(option.flags), chance.choice(option.choices or VALUES)
        forms = [[flag, value], [flag, value], [flag], [f"{flag}={value}"], [f"{flag}{value}"], [flag[:-2]]]
        words += chance.choice([[flag], [flag], [flag, value]] if option.convert is None else forms)
        words += chance.choice([[], [], [chance.choice(VALUES)], [chance.choice(MISTAKES)]])
    return words


@pytest.mark.parametrize("name", coder_sync.COMMANDS)
def test_the_plain_parser_reads_what_argparse_reads_or_leaves_it_alone(name: str) -> None:
    chance, command, read, left = random.Random(name), coder_sync.COMMANDS[name], 0, 0
    for _ in range(1000):
        words = random_words(chance, command)
        plainly = coder_sync.parse_plainly(command, words)
        if plainly is None:
            left += 1
        else:
            read += 1
            assert plainly == coder_sync.parse_with_argparse(name, words), words
    assert min(read, left) > 100


def test_the_plain_parser_reads_every_option_of_every_command() -> None:
    for command in coder_sync.COMMANDS.values():
        for option in coder_sync.options_of(command):
            for flag in option.flags:
                value = option.choices[0] if option.choices else "10" if option.dest() == "pid" else "660"
                words = [flag] if option.convert is None else [flag, value]
                assert coder_sync.parse_plainly(command, ["word", *words]) is not None, words


def test_a_repeatable_option_collects_and_leaves_its_default_alone() -> None:
    start = coder_sync.COMMANDS["start"]
    for _ in range(2):
        values, words = coder_sync.parse_plainly(start, ["--want", "a", "u", "--want", "b"]) or ({}, [])
        assert (values["want"], words) == (["a", "b"], ["u"])
    assert (coder_sync.parse_plainly(start, ["u"]) or ({}, []))[0]["want"] == []


def test_words_after_two_dashes_are_positionals_whatever_they_look_like() -> None:
    args = coder_sync.parse("want", ["--quiet", "u", "--", "--dep", "-x"])
    assert (args.unit, args.deps, args.quiet) == ("u", ["--dep", "-x"], True)


def test_words_after_two_dashes_are_the_command_where_one_is_taken() -> None:
    args = coder_sync.parse("run", ["u", "--", "sh", "-c", "exit 3", "--", "--quiet"])
    assert (args.unit, args.command, args.quiet) == ("u", ["sh", "-c", "exit 3", "--", "--quiet"], False)


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("start", [], "start: too few arguments; usage: "),
        ("start", ["a", "b"], "start: unexpected 'b'; usage: "),
        ("want", ["a"], "want: too few arguments"),
        ("run", ["a", "sh", "--", "x"], "unexpected 'sh'; did you forget -- before the command"),
        ("run", ["a", "sh"], "run: a command must follow --"),
        ("run", ["a"], "run: a command must follow --"),
        ("run", ["a", "--"], "run: a command must follow --"),
        ("serve", ["--"], "serve: a command must follow --"),
        ("start", ["a", "--timeout", "soon"], "start: .*invalid duration 'soon'"),
        ("start", ["a", "--tim", "5"], "start: .*--tim"),
        ("status", ["a", "-o", "xml"], "no such choice: 'xml'; use table, json"),
        ("complete", ["a", "--exit-code"], "complete: .*expected one argument"),
        ("complete", ["a", "--exit-code", "\u00b2"], "not a whole number"),
    ],
)
def test_a_mistake_is_a_usage_error_that_says_which(name: str, words: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        coder_sync.parse(name, words)
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------------
# Agent: many clients at once. What they were answered and what the agent says happened must agree, and what
# happened must be allowed by the rules, one step after another.
# ---------------------------------------------------------------------------------------------------------

CROWD = "abcdefgh"
CLIENT_PROGRAM = """
import json, random, sys, time
sys.path.insert(0, sys.argv[1])
import coder_sync
chance, client = random.Random(int(sys.argv[3])), coder_sync.Client(sys.argv[2])
for _ in range(int(sys.argv[4])):
    unit = chance.choice("abcdefgh")
    other = chance.choice("abcdefgh")
    method = chance.choice(["want", "start", "start", "complete", "complete", "fail", "wait"])
    options = {"timeout": chance.choice([0.001, 0.01])} if method in ("start", "wait") else {}
    sent, said = time.monotonic(), "ok"
    try:
        getattr(client, method)(unit, *([other] if method == "want" else []), **options)
    except coder_sync.SyncError as error:
        said = type(error).__name__
    print(json.dumps([method, unit, sent, time.monotonic(), said]))
"""


class Talker:
    """A client on raw connections that has several requests under way and sometimes hangs up amid them."""

    def __init__(self, path: str, seed: int) -> None:
        self.path, self.chance, self.peer = path, random.Random(seed), Peer(path)
        self.count = 0
        self.open: dict[int, tuple[str, str, float]] = {}  # request -> method, unit, when it was sent
        self.log: list[list[Any]] = []  # method, unit, when sent, when answered, what was said

    def talk(self, requests: int) -> list[list[Any]]:
        for _ in range(requests):
            self.one()
            if len(self.open) > 3 or self.chance.random() < 0.3:
                self.give_up()
            if self.chance.random() < 0.02:
                self.hang_up()
        while self.open:
            self.give_up()
        self.peer.request("ping", 0)
        assert self.peer.read()["id"] == 0  # and nothing before it: nobody was answered twice
        self.peer.close()
        return self.log

    def one(self) -> None:
        """Send a request; read on until it is answered, unless it may wait."""
        method = self.chance.choice(["want", "start", "start", "start", "complete", "complete", "fail", "wait"])
        unit, other = self.chance.choice(CROWD), self.chance.choice(CROWD)
        requires = self.chance.choice(["success", "success", "completion", "start"])
        more: dict[str, Any] = {}
        if method == "want" or (method == "start" and self.chance.random() < 0.2):
            more = {"dependencies": [other], "requires": requires}
        number = self.send(method, unit, {"units": [unit, other]} if method == "wait" else {"unit": unit, **more})
        while method not in ("start", "wait") and number in self.open:
            self.take()

    def send(self, method: str, unit: str, params: dict[str, Any]) -> int:
        self.count += 1
        self.open[self.count] = (method, unit, time.monotonic())
        self.peer.request(method, self.count, **params)
        return self.count

    def take(self) -> Any:
        """Read an answer to an open request."""
        message = self.peer.read()
        method, unit, sent = self.open.pop(message["id"])  # a KeyError: answered twice, or after its cancel
        code = message.get("error", {}).get("code")
        said = "ok" if code is None else code
        self.log.append([method, unit, sent, time.monotonic(), said])
        return message

    def give_up(self) -> None:
        """Cancel a request; it is cancelled or it is answered, never both and never neither."""
        if self.open:
            victim = self.chance.choice(list(self.open))
            cancel = self.send("cancel", "", {"id": victim})
            while cancel in self.open:
                message = self.take()
            if message["result"]["cancelled"]:
                assert message["result"]["missing"]
                del self.open[victim]
            while victim in self.open:
                self.take()

    def hang_up(self) -> None:
        self.log += [[method, unit, sent, None, "unknown"] for method, unit, sent in self.open.values()]
        self.open.clear()
        self.peer.close()
        self.peer = Peer(self.path)


class Replay:
    """What the agent says happened, checked step by step against the rules of the Model."""

    def __init__(self, events: list[coder_sync.Event]) -> None:
        self.model = Model()
        self.waiting = dict.fromkeys([*CROWD, "never"], 0)  # unit -> how many of its starts wait
        self.started: list[coder_sync.Event] = []
        for number, event in enumerate(events):
            assert event.seq == number + 1
            try:
                self.step(event)
            except AssertionError as error:
                before = "\n".join(map(str, events[max(0, number - 30) : number + 1]))
                raise AssertionError(f"{error}\n{before}") from error

    def step(self, event: coder_sync.Event) -> None:
        model, unit, status = self.model, event.unit, self.model.status(event.unit)
        if event.kind in ("completed", "failed", "gave up"):  # all that follows from earlier requests has happened
            self.settled()
        if event.kind == "registered":
            assert status == "not registered"
            model.statuses[unit] = "pending"
        elif event.kind == "wants":
            dependency, _, rest = event.detail.partition(" (")
            assert status != "not registered"
            assert not model.reaches(dependency, unit)
            assert (unit, dependency) not in model.edges
            model.edges[unit, dependency] = rest.rstrip(")") or "success"
        elif event.kind == "waiting":
            assert event.detail == ", ".join(model.unmet(model.needs(unit))[:5])
            assert status in ("pending", "completed")
            self.waiting[unit] += 1
        elif event.kind == "gave up":
            assert event.detail.partition("still missing: ")[2] == ", ".join(model.unmet(model.needs(unit))[:5])
            self.waiting[unit] -= 1
        else:
            self.change(event, status)
        for name, where in model.statuses.items():
            if where == "completed" and model.hopeless(model.needs(name)):
                self.waiting[name] = 0  # those who waited for a re-run were told

    def change(self, event: coder_sync.Event, status: str) -> None:
        needs = self.model.needs(event.unit)
        if event.kind == "started":
            assert status in ("pending", "completed")
            assert not self.model.unmet(needs)
            self.started.append(event)
        elif event.kind == "skipped":
            assert status == "pending"
            assert self.model.hopeless(needs)
        elif event.kind == "pending":
            assert status in ("failed", "skipped", "started")
        else:
            assert event.kind in ("completed", "failed")
            assert status in ("pending", "started")
        self.model.statuses[event.unit] = event.kind
        if event.kind != "pending":
            self.waiting[event.unit] = 0

    def settled(self) -> None:
        """Nobody waits who need not."""
        for name, status in self.model.statuses.items():
            needs = self.model.needs(name)
            assert not (status == "pending" and self.model.hopeless(needs)), f"{name} should be skipped"
            assert not self.waiting[name] or self.model.unmet(needs), f"{name} should have started"
            assert self.waiting[name] >= 0


RESTLESS_AGENT = """
import sys
sys.path.insert(0, sys.argv[1])
sys.setswitchinterval(1e-6)  # another thread runs after every few steps: what lacks a lock is seen
import coder_sync
coder_sync.main(["serve", "--quiet"])
"""


def test_many_clients_at_once_see_one_order_of_events(world: World) -> None:
    agent = world
    agent.spawn([sys.executable, "-c", RESTLESS_AGENT, str(HERE)], stderr=subprocess.DEVNULL)
    agent.client.ping(wait=PATIENCE)
    argv = [sys.executable, "-c", CLIENT_PROGRAM, str(HERE), agent.path]
    processes = [agent.spawn([*argv, str(seed), "200"]) for seed in range(2)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        talks = [pool.submit(Talker(agent.path, seed).talk, 300) for seed in range(6)]
    log = [row for talk in talks for row in talk.result()]
    for process in processes:
        done = finish(process)
        assert (done.returncode, done.stderr) == (0, "")
        log += map(json.loads, done.stdout.splitlines())

    peer = agent.connect()
    peer.request("start", unit="never", dependencies=["ever"])
    agent.waiting("never")
    peer.close()

    def everybody_left() -> Replay | None:
        replay = Replay(list(agent.client.events()))
        return None if any(replay.waiting.values()) else replay

    replay = until(everybody_left, "the waits of those who hung up forgotten")

    assert {row[-1] for row in log} >= {"ok", -32001, -32002, "AlreadyStarted", "TimedOut"}
    assert {row[-1] for row in log} <= {"ok", "unknown", "TimedOut", "Refused", *range(-32004, -31999)} | {
        kind.__name__ for kind in (AlreadyStarted, CycleError, DependencyFailed, NotRegistered)
    }
    assert len(replay.started) > 50
    assert {s.unit_name: s.status for s in agent.client.list()} == replay.model.statuses
    for unit in CROWD:
        mine = [row for row in log if row[1] == unit]
        check_starts(
            [e.time for e in replay.started if e.unit == unit],
            [(sent, answered) for method, _, sent, answered, said in mine if (method, said) == ("start", "ok")],
            sum(row[0] == "start" and row[-1] == "unknown" for row in mine),
        )
        for event in (e for e in agent.client.events() if e.unit == unit and e.kind in ("completed", "failed")):
            method = {"completed": "complete", "failed": "fail"}[event.kind]
            assert any(row[0] == method and row[-1] == "ok" and row[2] <= event.time <= row[3] for row in mine)


def check_starts(events: list[float], answered: list[tuple[float, float]], unknown: int) -> None:
    """Each answered start has a `started` event of its own, between question and answer."""
    assert len(answered) <= len(events) <= len(answered) + unknown
    left = sorted(answered, key=lambda interval: interval[1])
    for moment in events:
        mine = next((i for i in left if i[0] <= moment), None)
        if mine:
            assert moment <= mine[1], "an answer without its event"
            left.remove(mine)
    assert left == []


# ---------------------------------------------------------------------------------------------------------
# More helpers: lines from pipes, an agent with other constants, strangers, and a bystander.
# ---------------------------------------------------------------------------------------------------------

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
PYTHON = [sys.executable, "-IS", "-c"]
SIGNALS = [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM]


def line_of(pipe: Any) -> str:
    """The next line from a process, without reading ahead."""
    data = b""
    while not data.endswith(b"\n"):
        assert select.select([pipe], [], [], PATIENCE)[0], f"nothing more after {data!r}"
        byte = os.read(pipe.fileno(), 1)
        if not byte:
            break
        data += byte
    return data.decode()


def stopped(agent: subprocess.Popen[str], number: int = signal.SIGTERM) -> subprocess.CompletedProcess[str]:
    """Send a signal and wait for the end."""
    agent.send_signal(number)
    return finish(agent)


def altered(changes: str, *argv: str) -> list[str]:
    """A command line of coder_sync with some of the module's names set to other values."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import coder_sync\n{changes}\ncoder_sync.main(sys.argv[1:])"
    return [sys.executable, "-S", "-c", code, *argv]


def stranger(*argv: str) -> list[str]:
    """A command line of coder_sync as another user, if we can be one. What it may import it imports before."""
    modules = (
        "fcntl, grp, json.decoder, pwd, queue, resource, select, signal, socket, socketserver, tempfile, threading"
    )
    changes = f"import os, {modules}, encodings.ascii\nif os.getuid() == 0: os.setgroups([]); os.setuid(65534)"
    return altered(changes, *argv)


def served(world: World) -> None:
    """Assert that another client is served as if nothing had happened."""
    unit = f"bystander-{next(COUNT)}"
    assert world.client.start(unit, timeout=PATIENCE).dependencies == []
    world.client.complete(unit)
    assert world.status(unit) == "completed"


def run_waits(process: subprocess.Popen[str], world: World, *units: str) -> subprocess.Popen[str]:
    """Return the process once these units wait in the agent."""
    world.waiting(*units)
    return process


def use_up(world: World, pid: int) -> list[Peer]:
    """Leave an agent no descriptors; return the connections that have them."""
    descriptors = f"/proc/{pid}/fd"
    limit = max(map(int, os.listdir(descriptors))) + 4
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
    peers = [world.connect() for _ in range(30)]
    until(lambda: len(os.listdir(descriptors)) == limit, "descriptors used up")
    return peers


def free(world: World, pid: int, peers: list[Peer]) -> None:
    """Close connections, and return once the agent has closed them too."""
    for peer in peers:
        peer.close()
    world.client.ping(wait=PATIENCE)
    until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] - 3)


def kinds_of(world: World, unit: str) -> list[str]:
    """What happened to a unit, in order."""
    return [e.kind for e in world.client.events() if e.unit == unit]


def happened(world: World, unit: str, kind: str) -> None:
    """Return once this happened to a unit."""
    until(lambda: kind in kinds_of(world, unit), f"{unit}: {kind}")


def alive(pid: int) -> bool:
    return bool(coder_sync.birth(pid))


class Ended(BaseException):
    """What os._exit raises in `Call`."""


class Call:
    """A call of the command line inside this process: for what it says and how it ends, at no interpreter's start."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd, self.monkeypatch = capfd, monkeypatch

    def __call__(self, world: World, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        def end(code: int) -> None:
            raise Ended(code)

        with self.monkeypatch.context() as patch:
            patch.setattr(coder_sync.os, "_exit", end)
            patch.setattr(sys, "argv", [str(FILE), *words])
            for name, value in {"CODER_AGENT_SOCKET_PATH": world.path, **env}.items():
                patch.setenv(name, value)
            self.capfd.readouterr()
            with pytest.raises(Ended) as caught:
                coder_sync.main()
            out, err = self.capfd.readouterr()
        return subprocess.CompletedProcess(words, caught.value.args[0], out, err)

    def ok(self, world: World, *words: str) -> str:
        """A call that must succeed; return what it printed."""
        done = self(world, *words)
        assert done.returncode == 0, done
        return str(done.stdout)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return Call(capfd, monkeypatch)


@contextlib.contextmanager
def detached(world: World, *options: str, **popen: Any) -> Iterator[int]:
    """An agent in the background; gives its pid."""
    done = world.run("serve", "--detach", *options, **popen)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = world.client.ping()["pid"]  # no retries: it must be there
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        until(lambda: not alive(pid), "the end of the detached agent")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An agent that many badly behaved clients share."""
    world = World(tmp_path_factory.mktemp("shared"))
    world.serve()
    yield world
    world.close()


# ---------------------------------------------------------------------------------------------------------
# Bad input: a clear error for the one who caused it, and nothing changes for anyone else.
# ---------------------------------------------------------------------------------------------------------

ODD_LINES = {
    "text": b"garbage\n",
    "binary": bytes(range(14, 256)) + b"\n",
    "not utf-8": b'{"jsonrpc":"2.0","id":1,"method":"p\xffng"}\n',
    "surrogates": b'"\xed\xa0\x80"\n',
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half an object": b'{"jsonrpc":"2.0","id":1,\n',
    "two values": b'{"jsonrpc":"2.0","id":1,"method":"ping"} {}\n',
    "not a number": b'{"jsonrpc":"2.0","id":NaN,"method":"ping"}\n',
    "deep list": b"[" * 50_000 + b"\n",
    "deep objects": b'{"a":' * 10_000 + b"\n",
    "deep and closed": b"[" * 30_000 + b"]" * 30_000 + b"\n",
    "deep parameter": b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b"[" * 40 + b"]" * 40 + b"}\n",
    "nul bytes": b"\0\0\0\n",
    "huge number": b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"list","params":{}\n',
}


@pytest.mark.parametrize("data", ODD_LINES.values(), ids=ODD_LINES.keys())
def test_garbage_is_answered_with_an_error_and_hung_up_on(shared: World, data: bytes) -> None:
    peer = shared.connect()
    peer.send(data)
    answer = peer.read()
    assert answer["error"]["code"] == -32700
    assert answer["id"] is None
    assert peer.read() is None
    served(shared)


NO_REQUESTS = {
    "number": b"1",
    "string": b'"ping"',
    "null": b"null",
    "list": b"[]",
    "batch": b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]',
    "empty": b"{}",
    "version 1": b'{"jsonrpc":"1.0","id":1,"method":"ping"}',
    "no version": b'{"id":1,"method":"ping"}',
    "no method": b'{"jsonrpc":"2.0","id":1}',
    "method a number": b'{"jsonrpc":"2.0","id":1,"method":7}',
    "method a list": b'{"jsonrpc":"2.0","id":1,"method":["ping"]}',
    "id null": b'{"jsonrpc":"2.0","id":null,"method":"ping"}',
    "id true": b'{"jsonrpc":"2.0","id":true,"method":"ping"}',
    "id a fraction": b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}',
    "id a list": b'{"jsonrpc":"2.0","id":[],"method":"ping"}',
    "id an object": b'{"jsonrpc":"2.0","id":{},"method":"ping"}',
    "start without id": b'{"jsonrpc":"2.0","method":"start","params":{"unit":"never"}}',
}


@pytest.mark.parametrize("line", NO_REQUESTS.values(), ids=NO_REQUESTS.keys())
def test_json_that_is_no_request_is_refused_and_the_connection_goes_on(shared: World, line: bytes) -> None:
    peer = shared.connect()
    peer.send(line + b"\n")
    assert peer.read()["error"]["code"] == -32600
    assert peer.call("ping", "again")["id"] == "again"
    assert shared.status("never") == "not registered"


@pytest.mark.parametrize("method", ["", "Ping", "stop", "_stop", "__init__", "x" * 1000, "a\nb"])
def test_unknown_methods_are_refused(shared: World, method: str) -> None:
    answer = shared.connect().call(method)
    assert answer["error"]["code"] == -32601
    assert answer["error"]["message"].startswith("no such method: ")
    assert "\n" not in answer["error"]["message"]


ODD_VALUES: list[Any] = [None, True, 1, 2**31, -(2**31), 10**30, 1.5, "x", [], ["x"], [1], ["x", None], [["x"]], {}]


def fits(default: Any, value: Any) -> bool:
    """Whether a parameter of METHODS takes a value."""
    if default is object:
        return type(value) in (str, int)
    kind = default if isinstance(default, type) else type(default)
    if kind is list:
        return type(value) is list and all(type(v) is str for v in value)
    return type(value) is kind and (kind is not int or abs(value) < 2**31)


@pytest.mark.parametrize(
    ("method", "parameter"), [(m, p) for m, spec in coder_sync.METHODS.items() for p in spec], ids=str
)
def test_a_parameter_of_the_wrong_type_is_refused(shared: World, method: str, parameter: str) -> None:
    spec = coder_sync.METHODS[method]
    peer = shared.connect()
    for value in ODD_VALUES:
        if not fits(spec[parameter], value):
            required = {k: "x" for k, v in spec.items() if isinstance(v, type)}
            answer = peer.call(method, **{**required, parameter: value})
            assert answer["error"]["code"] == -32602, value
            assert f'"{parameter}"' in answer["error"]["message"]
    served(shared)


@pytest.mark.parametrize("method", coder_sync.METHODS)
def test_unknown_missing_and_superfluous_parameters_are_refused(shared: World, method: str) -> None:
    spec = coder_sync.METHODS[method]
    required = {k: "x" for k, v in spec.items() if isinstance(v, type)}
    peer = shared.connect()
    wrong: list[Any] = [{**required, "colour": 1}, ["x"] * (len(spec) + 1), "x", 7, None]
    wrong += [{k: v for k, v in required.items() if k != name} for name in required]
    for params in wrong:
        peer.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
        assert peer.read()["error"]["code"] == -32602, params


@pytest.mark.parametrize("requires", ["", "Success", "ended", "completed"])
@pytest.mark.parametrize("method", ["want", "start", "wait"])
def test_an_unknown_requirement_is_refused_by_the_agent(shared: World, method: str, requires: str) -> None:
    names = {"units": ["x"]} if method == "wait" else {"unit": "odd", "dependencies": ["x"]}
    answer = shared.connect().call(method, requires=requires, **names)
    assert "no such requirement" in answer["error"]["message"]
    assert shared.status("odd") == "not registered"


REFUSED_NAMES = {
    "empty": "",
    "too long": "x" * 256,
    "too long in bytes": "\u00e4" * 128,
    "line break": "a\nb",
    "tab": "a\tb",
    "escape": "\x1b[31m",
    "nul": "\0",
    "delete": "\x7f",
    "line separator": "a\u2028b",
    "right to left override": "\u202eabc",
    "lone surrogate": "\ud800",
    "zero width": "a\u200bb",
}


@pytest.mark.parametrize("name", REFUSED_NAMES.values(), ids=REFUSED_NAMES.keys())
def test_bad_names_are_refused_in_one_printable_line(shared: World, name: str) -> None:
    peer = shared.connect()
    for method in ("want", "start", "complete", "fail", "status", "wait"):
        key = {"units": [name]} if method == "wait" else {"unit": name}
        error = peer.call(method, **key)["error"]
        assert error["message"].startswith("a unit name" if not name else "unit name "), method
        assert error["message"].isprintable()
        assert len(error["message"]) < 200
    error = peer.call("want", unit="fine", dependencies=["one", name])["error"]
    assert "unit name" in error["message"]
    assert shared.status("one") == shared.status("fine") == "not registered"


TAKEN_NAMES = ["x" * 255, "\u00e4" * 127, 'coder_script.startup_unit["health-check"]', "<module>.git-clone", "a\\b"]
TAKEN_NAMES += [
    "Clone repository",
    "-",
    "--help",
    "--",
    "\u4f60\u597d \U0001f600",
    " ",
    "%s%n{0}",
    "$(id)",
    "[[[{{{" * 20,
]


@pytest.mark.parametrize("name", TAKEN_NAMES)
def test_every_printable_name_up_to_255_bytes_can_be_used(shared: World, name: str) -> None:
    shared.client.want(name, name + "!" if len(name) < 200 else "other")
    assert shared.client.status(name).unit_name == name
    assert name in [u.unit_name for u in shared.client.list()]


def test_a_request_of_64_KiB_is_taken_and_one_byte_more_is_not(shared: World) -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
    peer = shared.connect()
    peer.send(line.ljust(coder_sync.MAX_LINE) + b"\n")
    assert "result" in peer.read()
    peer.send(line.ljust(coder_sync.MAX_LINE + 1) + b"\n")
    assert peer.read()["error"]["code"] == -32700
    assert peer.read() is None


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["without end", "with end"])
def test_a_line_of_10_MB_is_refused_before_it_is_read(shared: World, end: bytes) -> None:
    peer = shared.connect()

    def send() -> None:
        with contextlib.suppress(OSError):
            peer.send(b"x" * 10_000_000 + end)

    sender = threading.Thread(target=send)
    sender.start()
    error = peer.read()["error"]
    sender.join(PATIENCE)
    assert error["code"] == -32700
    assert "65536 bytes" in error["message"]
    served(shared)


def test_a_request_in_single_bytes_is_put_together(shared: World) -> None:
    peer = shared.connect()
    for byte in b'{"jsonrpc":"2.0","id":"slow","method":"ping"}\n':
        peer.send(bytes([byte]))
    assert peer.read()["id"] == "slow"


def test_many_requests_at_once_are_all_answered(shared: World) -> None:
    peer = shared.connect()
    line = b'{"jsonrpc":"2.0","id":%d,"method":"status","params":{"unit":"x"}}\n'
    peer.send(b"\r\n\n".join(line % i for i in range(300)))
    assert [peer.read()["id"] for _ in range(300)] == list(range(300))


def test_half_a_line_and_its_end_is_an_error_and_does_nothing(shared: World) -> None:
    peer = shared.connect()
    peer.send(b'{"jsonrpc":"2.0","id":1,"method":"want","params":{"unit":"half"')
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.read()["error"]["code"] == -32700
    assert peer.read() is None
    assert shared.status("half") == "not registered"


def test_a_last_line_without_its_end_is_answered(shared: World) -> None:
    peer = shared.connect()
    peer.send(b'{"jsonrpc":"2.0","id":1,"method":"ping"}')
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.read()["id"] == 1


def test_a_duplicate_id_is_refused_while_the_first_still_waits(shared: World) -> None:
    peer = shared.connect()
    peer.request("start", 1, unit="first", dependencies=["later"])
    shared.waiting("first")
    assert "in use" in peer.call("start", 1, unit="second")["error"]["message"]
    assert "in use" in peer.call("ping", 1)["error"]["message"]
    shared.client.want("later")
    shared.client.complete("later")
    assert peer.read() == {"jsonrpc": "2.0", "id": 1, "result": {"dependencies": ["later"]}}
    assert peer.call("ping", 1)["id"] == 1
    assert shared.status("second") == "not registered"


def test_a_connection_may_wait_for_64_requests_and_no_more(shared: World) -> None:
    peer = shared.connect()
    for i in range(coder_sync.MAX_PENDING):
        peer.request("wait", i, units=["never done"])
    assert "at most" in peer.call("wait", "one more", units=["never done"])["error"]["message"]
    assert peer.call("cancel", "c", id=0)["result"]["cancelled"]
    peer.request("wait", "now", units=["never done"])
    assert "result" in peer.call("ping", "p")
    peer.close()
    served(shared)


def test_what_a_connection_does_not_wait_for_it_cannot_cancel(shared: World) -> None:
    mine, other = shared.connect(), shared.connect()
    mine.request("start", 1, unit="mine", dependencies=["theirs"])
    shared.waiting("mine")
    assert other.call("cancel", 2, id=1)["result"] == {"cancelled": False, "missing": []}
    assert other.call("missing", 3, id=1)["result"] == []
    assert [d["depends_on"] for d in mine.call("missing", 4, id=1)["result"]] == ["theirs"]


def test_300_connections_that_never_say_a_word_disturb_nobody(shared: World) -> None:
    silent = [shared.connect() for _ in range(300)]
    served(shared)
    for peer in silent:
        peer.close()
    served(shared)


def test_a_silent_connection_is_told_and_dropped_and_a_waiting_one_is_not(world: World) -> None:
    agent = world.spawn(altered("coder_sync.IDLE_TIMEOUT = 1", "serve", "-q"))
    world.client.ping(wait=PATIENCE)
    waiting = world.connect()
    waiting.request("start", 1, unit="a", dependencies=["b"])
    silent = world.connect()
    assert "no request for 1 seconds" in silent.read()["error"]["message"]
    assert silent.read() is None
    world.client.start("b")
    world.client.complete("b")
    assert waiting.read()["id"] == 1
    assert stopped(agent).returncode == 0


def test_connections_past_the_limit_are_told_so_and_the_others_go_on(world: World) -> None:
    agent = world.spawn(altered("coder_sync.MAX_CONNECTIONS = 10", "serve"))
    world.client.ping(wait=PATIENCE)

    def admitted() -> Peer | None:  # the agent may not have seen yet that the last one has gone
        peer = world.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, KeyError, TypeError):
            return peer if peer.call("ping")["result"] else None
        return None

    peers = [until(admitted) for _ in range(10)]
    extra = world.connect()
    assert "limit of 10 connections" in extra.read()["error"]["message"]
    assert extra.read() is None
    done = world.run("ping")
    assert done.returncode == 3
    assert "limit of 10 connections" in done.stderr
    for peer in peers[1:]:
        peer.close()
    assert "result" in peers[0].call("ping")
    until(admitted)
    assert "refused: the agent has reached its limit" in stopped(agent).stderr


def test_a_client_killed_while_it_waits_is_forgotten_at_once(agent: World) -> None:
    process = agent.popen("start", "a", "--want", "b")
    agent.waiting("a")
    process.kill()
    happened(agent, "a", "gave up")
    agent.client.start("b")
    agent.client.complete("b")
    assert agent.status("a") == "pending"
    assert agent.client.start("a").dependencies == ["b"]


def test_a_client_gone_before_its_start_is_read_does_not_start_the_unit(world: World) -> None:
    agent = world.serve()
    agent.send_signal(signal.SIGSTOP)
    peer = world.connect()
    peer.request("start", unit="a")
    peer.close()
    agent.send_signal(signal.SIGCONT)
    happened(world, "a", "pending")
    assert kinds_of(world, "a")[-2:] == ["started", "pending"]
    assert world.client.start("a").dependencies == []


def test_a_client_gone_before_its_hold_is_read_leaves_the_unit_to_others(world: World) -> None:
    agent = world.serve()
    agent.send_signal(signal.SIGSTOP)
    peer = world.connect()
    peer.request("start", unit="a", hold=True)
    peer.close()
    agent.send_signal(signal.SIGCONT)
    until(lambda: kinds_of(world, "a")[-1:] in (["pending"], ["failed"]))
    assert world.client.start("a").dependencies == []


def test_clients_killed_at_any_byte_of_their_request_disturb_nobody(shared: World) -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"start","params":{"unit":"cut","dependencies":["x"]}}\n'
    for cut in range(len(line)):
        peer = shared.connect()
        peer.send(line[:cut])
        peer.close()
    served(shared)


def fill(world: World, names: int) -> None:
    """Make an agent know this many names of 250 bytes."""
    peer = world.connect()
    for first in range(0, names, 200):
        dependencies = [f"{n:0250}" for n in range(first, first + 200)]
        assert "result" in peer.call("want", unit="everything", dependencies=dependencies)


def test_clients_that_ask_for_much_and_do_not_read_disturb_nobody(agent: World) -> None:
    fill(agent, 4000)
    deaf = [agent.connect() for _ in range(5)]
    for peer in deaf:
        for i in range(20):
            peer.request("list", i, all=True)
    served(agent)
    assert len(agent.client.list(everything=True)) == 4002
    for peer in deaf[1:]:
        peer.close()
    served(agent)
    assert len(deaf[0].read()["result"]) >= 4001  # late, but it gets its answer


def test_a_client_that_does_not_read_for_long_is_dropped(world: World) -> None:
    world.spawn(altered("coder_sync.SEND_TIMEOUT = 1", "serve", "-q"))
    world.client.ping(wait=PATIENCE)
    fill(world, 2000)
    peer = world.connect()
    hung_up = select.poll()
    hung_up.register(peer.sock, 0)
    peer.request("list", all=True)
    assert hung_up.poll(PATIENCE * 1000)[0][1] & select.POLLHUP
    served(world)


def test_a_watcher_that_does_not_read_is_dropped_and_holds_up_nobody(world: World) -> None:
    world.spawn(altered("coder_sync.SEND_TIMEOUT = 1", "serve", "-q"))
    world.client.ping(wait=PATIENCE)
    watcher = world.connect()
    assert watcher.call("events", follow=True)["result"] == []
    dropped = select.poll()
    dropped.register(watcher.sock, 0)
    fill(world, 8000)  # an event each
    assert dropped.poll(PATIENCE * 1000)[0][1] & select.POLLHUP
    served(world)


@LINUX
def test_an_agent_out_of_descriptors_says_so_and_recovers_when_they_are_freed(world: World) -> None:
    agent = world.serve("--log-file", "log")
    first = world.connect()
    assert "result" in first.call("ping")
    peers = use_up(world, agent.pid)
    log = world.directory / "log"
    until(lambda: "cannot accept connections: Too many open files" in log.read_text(), "a word in the log")
    assert "result" in first.call("start", unit="a")  # those who are in are served
    free(world, agent.pid, peers)
    served(world)


@LINUX
def test_an_agent_that_starts_with_few_descriptors_refuses_what_it_has_no_room_for(world: World) -> None:
    world.spawn(["sh", "-c", f"ulimit -n 40; exec {sys.executable} -IS {FILE} serve -q"])
    world.client.ping(wait=PATIENCE)
    peers = [world.connect() for _ in range(60)]
    refused = peers[-1].read()["error"]["message"]
    assert "limit of" in refused
    assert "result" in peers[0].call("start", unit="a")
    for peer in peers:
        peer.close()
    world.client.ping(wait=PATIENCE)
    served(world)


@LINUX
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open: without it nobody can tell then")
def test_an_owner_that_lives_is_not_taken_for_dead_when_descriptors_run_out(world: World) -> None:
    agent, dying = world.serve(), world.spawn(["cat"], stdin=subprocess.PIPE)
    peer = world.connect()
    assert "result" in peer.call("start", unit="owned", pid=os.getpid())
    assert "result" in peer.call("start", unit="dying", pid=dying.pid)
    peers = use_up(world, agent.pid)
    dying.kill()
    dying.wait()
    until(lambda: ["dying", "failed"] in [[u["unit_name"], u["status"]] for u in peer.call("list")["result"]])
    free(world, agent.pid, peers)
    served(world)
    owned = world.client.status("owned")
    assert (owned.status, owned.reason) == ("started", "")
    assert owned.owner is not None
    assert owned.owner.alive is True


@LINUX
def test_a_process_that_lives_is_not_called_dead_when_descriptors_run_out(world: World) -> None:
    agent = world.serve()
    peer = world.connect()
    assert "result" in peer.call("ping")
    use_up(world, agent.pid)
    answer = peer.call("start", unit="owned", pid=os.getpid())
    assert "not alive" not in answer.get("error", {}).get("message", "")


@LINUX
def test_who_is_connected_gets_answers_while_descriptors_run_out(world: World) -> None:
    agent = world.serve()
    peer = world.connect()
    assert "result" in peer.call("ping")
    peers = use_up(world, agent.pid)
    for method, params in (("want", {"dependencies": ["b"]}), ("complete", {}), ("fail", {}), ("status", {})):
        assert peer.call(method, unit="a", **params)["id"] == 1
    assert peer.call("status", unit="aa")["id"] == 1  # it looks for a name like it, which needs a file
    free(world, agent.pid, peers)
    served(world)


def test_an_agent_with_a_small_stack_survives_deep_json_and_garbage(world: World) -> None:
    agent = world.spawn(["sh", "-c", f"ulimit -s 256; exec {sys.executable} -IS {FILE} serve -q"])
    world.client.ping(wait=PATIENCE)
    for data in ODD_LINES.values():
        peer = world.connect()
        peer.send(data)
        assert peer.read()["error"]["code"] == -32700
    peer = world.connect()
    peer.request("want", unit="a", dependencies=["[{" * 100])
    assert "result" in peer.read()
    served(world)
    assert stopped(agent).returncode == 0


def test_a_client_with_a_small_stack_survives_a_deep_answer(world: World) -> None:
    with impostor(world, b"[" * 60_000 + b"\n"):
        done = finish(world.spawn(["sh", "-c", f"ulimit -s 256; exec {sys.executable} -IS {FILE} ping"]))
    assert done.returncode == 3
    assert "does not speak our protocol" in done.stderr


@pytest.mark.parametrize("length", [1, 2, 3, 60])
def test_a_cycle_of_any_length_is_refused_with_all_its_names(shared: World, length: int) -> None:
    names = [f"c{length}-{i}" for i in range(length)]
    for a, b in zip(names, names[1:]):
        shared.client.want(a, b)
    with pytest.raises(coder_sync.CycleError, match="cycle detected: ") as caught:
        shared.client.want(names[-1], f"innocent{length}", names[0])
    assert caught.value.data == [names[-1], *names]
    assert " -> ".join(caught.value.data) in str(caught.value)
    assert f"innocent{length}" not in [u.unit_name for u in shared.client.list(everything=True)]


@contextlib.contextmanager
def impostor(world: World, answer: bytes) -> Iterator[None]:
    """Something else that listens at the socket's path, and gives everybody one answer."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(world.path)
    listener.listen(8)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE)


# ---------------------------------------------------------------------------------------------------------
# Daemon: its log, the background, a command's agent, supervisors, signals, who may serve where.
# ---------------------------------------------------------------------------------------------------------

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "


def busy_log(world: World, *options: str) -> list[str]:
    """What an agent logs while a few things happen."""
    agent = world.serve(*options, stderr=subprocess.PIPE)
    world.client.start("a", want=[])
    world.client.complete("a")
    with pytest.raises(coder_sync.Refused):
        world.client.fail("a")
    world.client.want("b", "a")
    world.client.fail("b", "no disk")
    done = stopped(agent)
    assert done.returncode == 0
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_the_log_says_what_happens_one_line_each_with_a_time(world: World) -> None:
    lines = busy_log(world)
    assert all(re.match(STAMP, line) for line in lines)
    texts = [re.sub(STAMP, "", line) for line in lines]
    assert re.fullmatch(rf"listening at {world.path} \(pid \d+\)", texts[0])
    assert texts[1:3] == ["a: started", "a: completed"]
    assert texts[3].startswith('refused: unit "a" is completed')
    assert texts[4:] == ["b: failed: no disk", "stopping: got SIGTERM"]


def test_a_quiet_agent_logs_nothing(world: World) -> None:
    assert busy_log(world, "--quiet") == []


def test_a_verbose_agent_logs_requests_too(world: World) -> None:
    text = "\n".join(busy_log(world, "--verbose"))
    for part in ("request: start {", "b: registered", "b: wants: a", "a: started", "refused: "):
        assert part in text


def test_an_agent_whose_log_nobody_reads_goes_on(world: World) -> None:
    read, write = os.pipe()
    agent = world.serve("-v", stderr=write)
    os.close(write)
    peer = world.connect()
    for i in range(1500):  # more than a pipe holds
        peer.call("want", unit=f"u{i}", dependencies=["x" * 200])
    os.close(read)
    served(world)
    assert stopped(agent).returncode == 0


def test_detach_returns_when_the_socket_accepts_connections(world: World) -> None:
    for _ in range(2):
        with detached(world) as pid:
            assert os.getsid(pid) == pid
            assert os.readlink(f"/proc/{pid}/cwd") == "/" if sys.platform.startswith("linux") else True
        assert not os.path.lexists(world.path)


def test_a_detached_agent_lets_go_of_its_callers_pipes(world: World) -> None:
    process = world.popen("serve", "--detach", stdin=subprocess.PIPE)
    assert finish(process).returncode == 0  # and not: waits for the agent to close them
    os.kill(world.client.ping()["pid"], signal.SIGTERM)
    until(lambda: not os.path.lexists(world.path))


def test_a_detached_agent_writes_its_log_and_its_pid(world: World) -> None:
    log, pid_file = world.directory / "log", world.directory / "pid"
    with detached(world, "--log-file", "log", "--pid-file", "pid") as pid:
        assert int(pid_file.read_text()) == pid
        until(lambda: f"listening at {world.path} (pid {pid})" in log.read_text())
    assert not pid_file.exists()
    assert re.fullmatch(f"({STAMP}.*\n)+", log.read_text())
    assert stat.S_IMODE(log.stat().st_mode) & 0o077 == 0


def test_a_detached_agent_survives_sighup(world: World) -> None:
    with detached(world, "--log-file", "log") as pid:
        os.kill(pid, signal.SIGHUP)
        served(world)
    assert (world.directory / "log").read_text().count("stopping: got SIGTERM") == 1
    assert "SIGHUP" not in (world.directory / "log").read_text()


def test_a_foreground_agent_ends_on_sighup(world: World) -> None:
    assert stopped(world.serve(), signal.SIGHUP).returncode == 0
    assert os.listdir(world.directory) == []


@pytest.mark.parametrize("option", ["--log-file", "--pid-file"])
@pytest.mark.parametrize("how", [[], ["--detach"]], ids=["foreground", "detached"])
def test_a_file_that_cannot_be_written_is_said_at_once(world: World, how: list[str], option: str) -> None:
    done = world.run("serve", *how, option, "missing/file")
    assert done.returncode == 1
    assert re.fullmatch("error: cannot write .*missing/file: No such file or directory\n", done.stderr)
    assert os.listdir(world.directory) == []


@pytest.mark.parametrize("how", [[], ["--detach"]], ids=["foreground", "detached"])
def test_a_second_agent_is_refused_and_says_who_has_the_socket(world: World, how: list[str]) -> None:
    first = world.serve()
    done = world.run("serve", *how)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert f"(pid {first.pid})" in done.stderr
    assert world.path in done.stderr
    assert world.client.ping()["pid"] == first.pid


def test_a_socket_left_by_a_killed_agent_is_replaced(world: World) -> None:
    stopped(world.serve(), signal.SIGKILL)
    assert os.path.exists(world.path)
    agent = world.serve()
    assert world.client.ping()["pid"] == agent.pid
    assert stopped(agent).returncode == 0
    assert os.listdir(world.directory) == []


def test_of_ten_agents_that_start_at_the_same_instant_one_wins(world: World) -> None:
    modules = "fcntl, grp, json.decoder, queue, resource, select, signal, socket, socketserver, threading"
    gate = f"import os, {modules}; os.write(1, b'.'); os.read(0, 1)"
    for _ in range(2):  # the second finds a dead agent's socket and lock
        behind, ahead = os.pipe()
        racers = [world.spawn(altered(gate, "serve"), stdin=behind) for _ in range(10)]
        for racer in racers:
            assert os.read(racer.stdout.fileno(), 1) == b"."  # type: ignore[union-attr]
        os.close(ahead)
        os.close(behind)
        winner = world.client.ping(wait=PATIENCE)["pid"]
        for racer in racers:
            if racer.pid != winner:
                done = finish(racer)
                assert done.returncode == 1
                assert "already" in done.stderr
        assert world.client.ping()["pid"] == winner
        stopped(next(r for r in racers if r.pid == winner), signal.SIGKILL)


def test_an_agent_that_starts_while_another_ends_serves_or_says_why_not(world: World) -> None:
    old = world.serve()
    for _ in range(3):
        new = world.popen("serve", stderr=subprocess.PIPE)
        old.terminate()
        assert finish(old).returncode == 0
        if until(lambda new=new: new.poll() is not None or serves(world, new.pid)) and new.poll() is not None:
            assert new.returncode == 1
            assert "already" in finish(new).stderr
            new = world.serve()
        served(world)
        old = new


def serves(world: World, pid: int) -> bool:
    try:
        return bool(world.client.ping()["pid"] == pid)
    except coder_sync.Unreachable:
        return False


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "dangling link", "pipe"])
def test_what_is_not_a_socket_is_never_removed(world: World, kind: str) -> None:
    path = Path(world.path)
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("elsewhere")
        if kind == "link to a file":
            (world.directory / "elsewhere").write_text("precious")
    before = {name: os.lstat(world.directory / name).st_mode for name in os.listdir(world.directory)}
    done = world.run("serve")
    assert done.returncode == 1
    assert re.fullmatch(f"error: {world.path} exists and is not a socket; .*\n", done.stderr)
    assert {name: os.lstat(world.directory / name).st_mode for name in os.listdir(world.directory)} == before


def test_a_path_too_long_for_a_socket_is_refused(world: World) -> None:
    path = str(world.directory / ("x" * 120))
    done = world.run("serve", "--socket-path", path)
    assert done.returncode == 1
    assert re.fullmatch(f"error: {path}: too long for a socket path; .*\n", done.stderr)


def test_a_path_in_a_missing_directory_is_refused(world: World) -> None:
    done = world.run("serve", "--socket-path", "missing/agent.sock")
    assert done.returncode == 1
    assert re.fullmatch("error: .*missing/agent.sock.*: No such file or directory; .*\n", done.stderr)


def test_a_path_in_an_unwritable_directory_is_refused(world: World) -> None:
    with open_directory() as directory:
        os.chmod(directory, 0o555)
        done = finish(world.spawn(stranger("serve", "--socket-path", f"{directory}/agent.sock")))
        assert done.returncode == 1
        assert re.fullmatch(f"error: .*{directory}/agent.sock.*: Permission denied; .*\n", done.stderr)
        assert os.listdir(directory) == []
        os.chmod(directory, 0o755)


@contextlib.contextmanager
def open_directory() -> Iterator[str]:
    """A directory that everybody can enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="cs-") as directory:
        os.chmod(directory, 0o755)
        yield directory


def test_the_socket_is_its_owners_alone_whatever_the_umask(world: World) -> None:
    world.serve(preexec_fn=lambda: os.umask(0))
    assert stat.S_IMODE(os.stat(world.path).st_mode) == 0o600


@pytest.mark.parametrize(("mode", "bits"), [("660", 0o660), ("0666", 0o666)])
def test_mode_sets_the_permissions_of_the_socket(world: World, mode: str, bits: int) -> None:
    world.serve("--mode", mode, preexec_fn=lambda: os.umask(0o077))
    assert stat.S_IMODE(os.stat(world.path).st_mode) == bits


@pytest.mark.parametrize("form", ["name", "number"])
def test_group_shares_the_socket_with_a_group(world: World, form: str) -> None:
    gid = grp.getgrall()[1].gr_gid if os.getuid() == 0 else os.getgid()
    world.serve("--group", grp.getgrgid(gid).gr_name if form == "name" else str(gid))
    found = os.stat(world.path)
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, gid)


@pytest.mark.parametrize("words", [["--mode", "rw"], ["--mode", "778"], ["--group", "no such group"]])
def test_a_bad_mode_or_group_is_a_usage_error(call: Call, world: World, words: list[str]) -> None:
    done = call(world, "serve", *words)
    assert done.returncode == 2
    assert words[1] in done.stderr
    assert os.listdir(world.directory) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_that_is_stopped_tells_who_waits_and_leaves_nothing_behind(world: World, number: int) -> None:
    agent = world.serve(stderr=subprocess.PIPE)
    peer = world.connect()
    peer.request("start", "s", unit="a", dependencies=["never"])
    peer.request("wait", "w", units=["never"])
    process = world.popen("start", "b", "--want", "never")
    world.waiting("a", "b")
    done = stopped(agent, number)
    assert done.returncode == 0
    assert f"stopping: got {signal.Signals(number).name}" in done.stderr
    assert os.listdir(world.directory) == []
    told = [peer.read(), peer.read()]
    assert {m["id"] for m in told} == {"s", "w"}
    assert {m["error"]["message"] for m in told} == {"the agent is shutting down"}
    assert peer.read() is None
    client = finish(process)
    assert (client.returncode, client.stderr) == (3, "error: the agent is shutting down\n")


def test_an_agent_that_has_deaf_clients_ends_all_the_same(agent: World) -> None:
    fill(agent, 2000)
    peer = agent.connect()
    peer.request("list", all=True)
    assert select.select([peer.sock], [], [], PATIENCE)[0]
    peer.request("wait", 2, units=["never"])
    assert stopped(agent.processes[0]).returncode == 0
    assert os.listdir(agent.directory) == []


def test_an_agent_does_not_remove_the_socket_of_its_successor(world: World) -> None:
    agent = world.serve()
    os.unlink(world.path)
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.bind(world.path)
    assert stopped(agent).returncode == 0
    assert os.path.exists(world.path)


@pytest.mark.parametrize("value", ["false", "0", "NO"])
def test_a_disabled_agent_says_so_and_is_no_error(world: World, value: str) -> None:
    env = {**world.env, "CODER_AGENT_SOCKET_SERVER_ENABLED": value}
    done = world.run("serve", env=env)
    assert done.returncode == 0
    assert "CODER_AGENT_SOCKET_SERVER_ENABLED" in done.stderr
    assert os.listdir(world.directory) == []
    done = world.run("serve", "--", "sh", "-c", "test ! -S $CODER_AGENT_SOCKET_PATH && echo ran; exit 5", env=env)
    assert (done.returncode, done.stdout) == (5, "ran\n")


@pytest.mark.parametrize("value", ["", "true", "1"])
def test_an_enabled_agent_serves(world: World, value: str) -> None:
    env = {**world.env, "CODER_AGENT_SOCKET_SERVER_ENABLED": value}
    world.ok("serve", "--", "sh", "-c", 'test -S "$CODER_AGENT_SOCKET_PATH"', env=env)


@pytest.mark.parametrize("value", ["maybe", " true"])
def test_an_agent_neither_enabled_nor_disabled_is_a_usage_error(call: Call, world: World, value: str) -> None:
    done = call(world, "serve", CODER_AGENT_SOCKET_SERVER_ENABLED=value)
    assert done.returncode == 2
    assert re.fullmatch("error: CODER_AGENT_SOCKET_SERVER_ENABLED is .*; use true or false\n", done.stderr)


# -- serve -- COMMAND -------------------------------------------------------------------------------------


@pytest.fixture
def temporary(world: World) -> Path:
    """The directory that commands of this world use for temporary files."""
    directory = world.directory / "t"
    directory.mkdir()
    world.env["TMPDIR"] = str(directory)
    return directory


def test_serve_command_gives_it_an_agent_of_its_own_and_leaves_nothing_behind(world: World, temporary: Path) -> None:
    script = f"""
        echo "$CODER_AGENT_SOCKET_PATH"; test -S "$CODER_AGENT_SOCKET_PATH" || exit 99
        {sys.executable} -IS {FILE} start a && {sys.executable} -IS {FILE} complete a; {sys.executable} -IS {FILE} list
        exit 7"""
    done = world.run("serve", "--", "sh", "-c", script)
    assert done.returncode == 7
    path, *rest = done.stdout.splitlines()
    assert path.startswith(str(temporary) + "/")
    assert rest[-1].split() == ["a", "completed", "true"]
    assert done.stderr == ""
    assert os.listdir(temporary) == []
    assert os.listdir(world.directory) == ["t"]


def test_serve_command_uses_a_socket_that_is_named(world: World) -> None:
    out = world.ok("serve", "--socket-path", world.path, "--", "sh", "-c", 'echo "$CODER_AGENT_SOCKET_PATH"')
    assert out == world.path + "\n"
    assert os.listdir(world.directory) == []


def test_serve_command_passes_standard_input_and_arguments(world: World) -> None:
    process = world.popen(
        "serve", "--", "sh", "-c", 'cat; echo "$#" "$@"', "-", "a b", "--", "-o", stdin=subprocess.PIPE
    )
    out, _ = process.communicate("hello\n", timeout=PATIENCE)
    assert (process.returncode, out) == (0, "hello\n3 a b -- -o\n")


CANNOT_RUN = [("missing-command", 127), ("./missing", 127), ("./plain", 126), ("./directory", 126), ("", 127)]


@pytest.mark.parametrize(("command", "code"), CANNOT_RUN)
@pytest.mark.parametrize("words", [["serve"], ["run", "a"]], ids=["serve", "run"])
def test_a_command_that_cannot_be_run_is_127_or_126(world: World, words: list[str], command: str, code: int) -> None:
    (world.directory / "plain").write_text("#!/bin/sh\n")
    (world.directory / "directory").mkdir()
    if words[0] == "run":
        world.serve()
    done = world.run(*words, "--", command)
    assert done.returncode == code
    assert re.fullmatch(f"error: .*cannot run {command}: .*\n", done.stderr)
    if words[0] == "run":
        failed = world.client.status("a")
        assert (failed.status, failed.exit_code) == ("failed", code)
        assert f"cannot run {command}" in failed.reason


@pytest.mark.parametrize("words", [["serve"], ["run", "a"]], ids=["serve", "run"])
@pytest.mark.parametrize(("script", "code"), [("exit 255", 255), ("kill -KILL $$", 137)])
def test_the_exit_status_of_a_command_is_returned(
    shared: World, temporary: Path, world: World, words: list[str], script: str, code: int
) -> None:
    env = {**world.env, "CODER_AGENT_SOCKET_PATH": shared.path}
    words = [words[0], *(f"{script} {next(COUNT)}" for _ in words[1:])]
    assert world.run(*words, "--", "sh", "-c", script, env=env).returncode == code
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("words", [["serve"], ["run", "a"]], ids=["serve", "run"])
def test_signals_are_passed_on_to_the_command(world: World, words: list[str]) -> None:
    if words[0] == "run":
        world.serve()
    process = world.popen(*words, "--", *PYTHON, CATCH)
    assert line_of(process.stdout) == "ready\n"
    for number in SIGNALS:
        process.send_signal(number)
        assert line_of(process.stdout) == f"got {int(number)}\n"
    assert finish(process).returncode == 9


@pytest.mark.parametrize("words", [["serve"], ["run", "a"]], ids=["serve", "run"])
def test_a_signal_to_the_whole_group_reaches_the_command(world: World, words: list[str]) -> None:
    if words[0] == "run":
        world.serve()
    process = world.popen(*words, "--", *PYTHON, CATCH)
    assert line_of(process.stdout) == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert line_of(process.stdout) == "got 2\n"
    process.terminate()
    assert "got 15" in finish(process).stdout


@pytest.mark.parametrize("words", [["serve"], ["run", "a"]], ids=["serve", "run"])
def test_a_command_starts_with_default_signals_and_no_stray_descriptors(world: World, words: list[str]) -> None:
    if words[0] == "run":
        world.serve()
    code = """import os, signal
default = [n for n in range(1, 32) if signal.getsignal(n) not in (signal.SIG_DFL, signal.default_int_handler)]
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), [n for n in default if n not in (13, 25)])
print([n for n in range(100) if os.path.exists(f"/dev/fd/{n}") and not os.get_inheritable(n) is None][:4])"""
    done = finish(world.popen(*words, "--", *PYTHON, code))
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first == "[] []"
    assert second in ("[0, 1, 2]", "[0, 1, 2, 3]")  # the last is what lists them


def test_our_own_failure_before_the_command_is_125(world: World) -> None:
    deep = world.directory / ("x" * 110)
    deep.mkdir()
    done = world.run("serve", "--", "echo", "ran", env={**world.env, "TMPDIR": str(deep)})
    assert (done.returncode, done.stdout) == (125, "")
    assert "too long for a socket path" in done.stderr


def test_serve_command_on_a_socket_that_is_taken_is_125(agent: World) -> None:
    done = agent.run("serve", "--socket-path", agent.path, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert f"(pid {agent.processes[0].pid})" in done.stderr


@pytest.mark.parametrize("words", [["serve", "--"], ["serve", "--detach", "--", "true"], ["serve", "true"]])
def test_serve_with_a_command_wrongly_asked_for_is_a_usage_error(call: Call, world: World, words: list[str]) -> None:
    done = call(world, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


# -- supervisors ------------------------------------------------------------------------------------------


def notified(world: World, kind: str) -> tuple[socket.socket, str]:
    """A datagram socket for NOTIFY_SOCKET, and its value."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    name = str(world.directory / "notify") if kind == "path" else f"@coder-sync-{os.getpid()}-{next(COUNT)}"
    sock.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
    return sock, name


@pytest.mark.parametrize("kind", ["path", pytest.param("abstract", marks=LINUX)])
def test_a_supervisor_is_told_when_the_agent_is_ready_and_when_it_stops(world: World, kind: str) -> None:
    sock, name = notified(world, kind)
    with sock:
        agent = world.popen("serve", env={**world.env, "NOTIFY_SOCKET": name})
        ready = sock.recv(1000).decode().splitlines()
        assert ready[0] == "READY=1"
        assert world.client.ping()["pid"] == agent.pid
        agent.terminate()
        assert sock.recv(1000).decode().splitlines()[0] == "STOPPING=1"
        assert finish(agent).returncode == 0


def test_a_supervisor_is_told_the_pid_of_a_detached_agent(world: World) -> None:
    sock, name = notified(world, "path")
    with sock, detached(world, env={**world.env, "NOTIFY_SOCKET": name}) as pid:
        assert sock.recv(1000).decode().split() == ["READY=1", f"MAINPID={pid}"]


@pytest.mark.parametrize("value", ["/no/such/socket", "@"])
def test_a_supervisor_that_is_not_there_is_no_error(world: World, value: str) -> None:
    world.ok("serve", "--", "true", env={**world.env, "NOTIFY_SOCKET": value})


def hand_over(world: World, sock: Any, count: str = "1", pid: str = "", **popen: Any) -> subprocess.Popen[str]:
    """Start an agent as a supervisor does that hands over a listening socket at descriptor 3."""
    code = f"""import os, sys
n = int(sys.argv[1])
os.dup2(n, 3) if n != 3 else os.set_inheritable(3, True)
os.environ.update(LISTEN_PID={pid!r} or str(os.getpid()), LISTEN_FDS={count!r}, LISTEN_FDNAMES="x")
os.execv(sys.argv[2], sys.argv[2:])"""
    argv = [*PYTHON, code, str(sock.fileno()), sys.executable, "-IS", str(FILE), "serve"]
    return world.spawn(argv, pass_fds=[sock.fileno()], **popen)


def listener(path: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    if kind == socket.SOCK_STREAM:
        sock.listen(16)
    return sock


@pytest.mark.parametrize("blocking", [True, False])
def test_a_socket_that_was_handed_over_is_used_as_it_is(world: World, blocking: bool) -> None:
    path = str(world.directory / "given")
    with listener(path) as sock:
        os.chmod(path, 0o640)
        sock.setblocking(blocking)
        early = Peer(path)  # before there is an agent: nobody needs to retry
        agent = hand_over(world, sock)
        assert early.call("ping")["result"]["pid"] == agent.pid
        assert Client(path, 0).ping()["pid"] == agent.pid
        done = stopped(agent)
    assert done.returncode == 0
    assert f"listening at {path} " in done.stderr
    assert os.listdir(world.directory) == ["given"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_a_socket_that_was_handed_over_to_another_process_is_ignored(world: World) -> None:
    with listener(str(world.directory / "given")) as sock:
        agent = hand_over(world, sock, pid="1")
        assert world.client.ping(wait=PATIENCE)["pid"] == agent.pid


@pytest.mark.parametrize("kind", ["two", "file", "datagram", "tcp", "deaf"])
def test_a_bad_hand_over_is_refused(world: World, kind: str) -> None:
    sock: Any
    if kind == "file":
        sock = open(os.devnull, "rb")  # noqa: SIM115
    elif kind == "tcp":
        sock = socket.create_server(("127.0.0.1", 0))
    elif kind == "deaf":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        sock = listener(str(world.directory / "x"), socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
    with sock:
        done = finish(hand_over(world, sock, "2" if kind == "two" else "1"))
    assert done.returncode == 1
    assert re.fullmatch("error: LISTEN_FDS .*descriptor 3.*\n", done.stderr)


@LINUX
def test_a_command_does_not_inherit_what_was_meant_for_the_agent(world: World) -> None:
    env = {**world.env, "LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
    assert "LISTEN" not in world.ok("serve", "--", "env", env=env)


# ---------------------------------------------------------------------------------------------------------
# Command line: what each command says and how it ends.
# ---------------------------------------------------------------------------------------------------------


def test_ping_says_who_answers(call: Call, agent: World) -> None:
    pid = agent.processes[0].pid
    out = call.ok(agent, "ping")
    assert re.fullmatch(rf"agent at {agent.path}: pid {pid}, version {coder_sync.__version__}, up \S+\n", out)


def test_want_start_and_complete_say_what_they_did(call: Call, agent: World) -> None:
    assert call.ok(agent, "want", "a", "b", "c") == "a: depends on b, c\n"
    assert call.ok(agent, "start", "b") == "b: started; it has no dependencies\n"
    assert call.ok(agent, "complete", "b") == "b: completed\n"
    assert call.ok(agent, "complete", "b") == "b: completed\n"
    agent.client.start("c")
    agent.client.complete("c")
    assert call.ok(agent, "start", "a") == "a: started; satisfied already: b, c\n"


def test_a_start_that_waits_says_for_what_and_then_that_it_is_done(agent: World) -> None:
    agent.client.start("git-clone")
    process = agent.popen("start", "a", "--want", "git-clone", "--want", "apt")
    first = line_of(process.stdout)
    assert re.fullmatch(r"a: waiting for git-clone started \S+ ago by .* \(pid \d+\); apt not registered\n", first)
    agent.client.complete("git-clone")
    agent.client.start("apt")
    agent.client.complete("apt")
    done = finish(process)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"a: started after \S+\n", done.stdout)


def test_a_start_that_waits_for_long_says_so_again_and_again(agent: World) -> None:
    process = agent.spawn(altered("coder_sync.REPORT_EVERY = 0.02", "start", "a", "--want", "apt"))
    assert line_of(process.stdout) == "a: waiting for apt not registered\n"
    agent.client.want("apt", "disk")
    pattern = r"a: still waiting after \S+ for apt pending for \S+, waits for disk\n"
    until(lambda: re.fullmatch(pattern, line_of(process.stdout)))
    assert re.fullmatch(pattern, line_of(process.stdout))
    agent.client.complete("apt")
    assert finish(process).returncode == 0


def test_quiet_says_nothing(agent: World) -> None:
    flag = "-q"
    assert agent.ok("want", "a", "b", flag) == ""
    assert agent.ok("start", flag, "b") == ""
    assert agent.ok("complete", flag, "b") == ""
    assert agent.ok("wait", flag, "b") == ""
    assert agent.ok("run", flag, "a", "--", "echo", "ran") == "ran\n"
    done = agent.run("start", "c", "--want", "d", "-t", "1ms", flag)
    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr


REFUSALS = [
    (["want", "a", "a"], 1, "error: cycle detected: a -> a; a unit cannot depend on itself"),
    (["want", "b", "a"], 1, "error: cycle detected: b -> a -> b"),
    (["want", "a", "b", "--requires", "start"], 1, 'error: unit "a" wants "b" with requirement success already.*'),
    (["want", "x", ""], 1, "error: a unit name must not be empty; was a variable unset[?]"),
    (["want", "x" * 256, "b"], 1, 'error: unit name "xxx.*256 bytes long; the limit is 255'),
    (["start", "a\nb"], 1, r"error: unit name 'a\\nb' has a character that cannot be printed"),
    (["start", "on"], 1, r'error: unit "on" is already started by .* \(pid \d+\)'),
    (["complete", "nobody"], 1, 'error: unit "nobody" is not registered; call want, start or run on it first'),
    (["fail", "nobody"], 1, 'error: unit "nobody" is not registered; .*'),
    (["fail", "done"], 1, 'error: unit "done" is completed and cannot become failed: .*start it again first'),
    (["complete", "bad"], 1, r'error: unit "bad" is failed \(no disk\) and cannot become completed: .*'),
    (["start", "behind"], 4, r'error: unit "behind" skipped: dependency "bad" failed \(no disk\)'),
    (
        ["start", "new", "--want", "behind"],
        4,
        'error: unit "new" skipped: dependency "behind" was skipped: .*no disk.*',
    ),
    (["wait", "bad"], 4, r'error: dependency "bad" failed \(no disk\)'),
    (["wait", "behind"], 4, 'error: dependency "behind" was skipped: dependency "bad" failed .*'),
    (["run", "on", "--", "true"], 1, 'error: unit "on" is already started.*'),
    (["run", "behind", "--", "echo", "ran"], 4, 'error: unit "behind" skipped: .*'),
    (["start", "x", "--pid", "999999999"], 1, "error: process 999999999 is not alive in the agent's .*"),
    (["start", "x", "--pid", "-5"], 1, "error: process -5 is not alive.*"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An agent with a unit in every state, for questions and refusals."""
    world = World(tmp_path_factory.mktemp("mixed"))
    world.serve()
    client = world.client
    client.want("a", "b")
    client.want("behind", "bad", "b")
    for name in ("on", "done", "bad"):
        client.start(name)
    client.complete("done")
    client.fail("bad", "no disk")
    yield world
    world.close()


@pytest.mark.parametrize(
    ("words", "code", "pattern"), REFUSALS, ids=lambda v: " ".join(v)[:30] if type(v) is list else ""
)
def test_a_refusal_is_one_line_that_names_the_unit(
    call: Call, mixed: World, words: list[str], code: int, pattern: str
) -> None:
    before = mixed.client.list(everything=True)
    done = call(mixed, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(pattern + "\n", done.stderr)
    after = mixed.client.list(everything=True)
    assert {u.unit_name: u.status for u in after if u.unit_name in [b.unit_name for b in before]} == {
        u.unit_name: u.status for u in before
    }


USAGE = [
    [],
    ["frobnicate"],
    ["sync", "list"],
    ["exp"],
    ["exp", "sync"],
    ["want"],
    ["want", "a"],
    ["start"],
    ["start", "a", "b"],
    ["complete"],
    ["complete", "a", "b"],
    ["complete", "a", "--exit-code", "x"],
    ["complete", "a", "--exit-code"],
    ["wait"],
    ["status"],
    ["status", "a", "-o", "yaml"],
    ["status", "a", "-c", "colour"],
    ["list", "-c", "unit,,status"],
    ["list", "extra"],
    ["ping", "extra"],
    ["ping", "--wait", "soon"],
    ["start", "a", "--frobnicate"],
    ["start", "a", "--time", "1s"],
    ["start", "a", "--want"],
    ["want", "a", "b", "--requires", "luck"],
    ["run", "a"],
    ["run", "a", "--"],
    ["run", "a", "true"],
    ["run", "--", "true"],
    ["fail", "a", "b"],
    ["start", "a", "--pid", "me"],
    ["--frobnicate", "list"],
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage_is_2_and_one_line(call: Call, mixed: World, words: list[str]) -> None:
    done = call(mixed, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: .+\n", done.stderr)


@pytest.mark.parametrize(
    "text", ["", "5x", "m", "1h30", "-5s", "1.2.3s", "5 m", "inf", "nan", "1e3", "\u0665", "99999999999h"]
)
def test_a_bad_duration_is_refused_with_the_accepted_forms(call: Call, mixed: World, text: str) -> None:
    done = call(mixed, "start", "never", f"--timeout={text}")
    assert done.returncode == 2
    assert "write 30 or 30s, 10m, 1h30m, 500ms, 1.5h; 0 for no limit" in done.stderr
    assert mixed.status("never") == "not registered"


@pytest.mark.parametrize("name", list(coder_sync.COMMANDS))
def test_every_command_has_help(call: Call, mixed: World, name: str) -> None:
    out = call.ok(mixed, name, "--help")
    assert out.startswith("usage: ")
    assert coder_sync.COMMANDS[name].help in " ".join(out.split())
    for option in coder_sync.options_of(coder_sync.COMMANDS[name]):
        assert option.flags[-1] in out


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["exp", "sync", "--help"]], ids=" ".join)
def test_help_lists_every_command(call: Call, mixed: World, words: list[str]) -> None:
    out = call.ok(mixed, *words)
    assert all(f"\n  {name} " in out for name in coder_sync.COMMANDS)


@pytest.mark.parametrize("words", [["--version"], ["exp", "sync", "--version"]])
def test_version(call: Call, mixed: World, words: list[str]) -> None:
    assert call.ok(mixed, *words) == f"coder_sync {coder_sync.__version__}\n"


FORMS = [
    "exp sync want UNIT a b",
    "want --connect-timeout 1s UNIT a b",
    "want UNIT --connect-timeout=1s a b -q",
    "want UNIT a b --requires success",
    "want UNIT a --requires=success b",
    "want --requires success -- UNIT a b",
    "want -q UNIT -- a b",
    "--connect-timeout 1s want UNIT a b",
    "exp sync want --connect-timeout 0 UNIT a b",
]


@pytest.mark.parametrize("form", FORMS)
def test_options_may_stand_before_among_and_after_the_names(call: Call, shared: World, form: str) -> None:
    unit = f"form-{next(COUNT)}"
    call.ok(shared, *form.replace("UNIT", unit).split())
    assert [d.depends_on for d in shared.client.status(unit).dependencies] == ["a", "b"]


def test_names_that_look_like_options_go_behind_two_dashes(call: Call, shared: World) -> None:
    call.ok(shared, "want", "--", "--quiet", "-q", "--")
    assert [d.depends_on for d in shared.client.status("--quiet").dependencies] == ["-q", "--"]
    call.ok(shared, "complete", "--", "--quiet")
    assert shared.status("--quiet") == "completed"


def test_the_socket_path_of_the_command_line_comes_before_that_of_the_environment(call: Call, agent: World) -> None:
    nowhere = {"CODER_AGENT_SOCKET_PATH": "/nowhere"}
    assert call(agent, "ping", **nowhere).returncode == 3
    for words in (["ping", "--socket-path", agent.path], [f"--socket-path={agent.path}", "ping"]):
        assert call(agent, *words, **nowhere).returncode == 0


STATUS_TABLE = """\
DEPENDS ON  REQUIRED STATUS  CURRENT STATUS  SATISFIED
b           completed        not registered  false
on          started          started         true
done        completed        completed       true
"""


def test_status_shows_a_unit_and_the_table_of_its_dependencies(call: Call, mixed: World) -> None:
    client = mixed.client
    client.want("table", "b")
    client.want("table", "on", requires="start")
    client.want("table", "done")
    out = call.ok(mixed, "status", "table")
    assert out.startswith("Unit: table\nStatus: pending\nReady: false\n\n" + STATUS_TABLE)


def test_status_shows_the_columns_asked_for(call: Call, mixed: World) -> None:
    out = call.ok(mixed, "status", "a", "-c", "satisfied,depends on")
    assert "\nSATISFIED  DEPENDS ON\nfalse      b\n" in out
    assert call.ok(mixed, "status", "a", "--column=depends_on").splitlines()[4:6] == ["DEPENDS ON", "b"]


def test_status_of_a_failed_and_a_skipped_unit_says_why(call: Call, mixed: World) -> None:
    assert "Status: failed\n" in call.ok(mixed, "status", "bad")
    assert "Reason: no disk\n" in call.ok(mixed, "status", "bad")
    out = call.ok(mixed, "status", "behind")
    assert 'Status: skipped\nReady: false\nReason: dependency "bad" failed (no disk)\n' in out
    assert re.search(r"^bad +completed +failed +false +no disk$", out, re.M)


def test_status_of_a_name_nobody_registered(call: Call, mixed: World) -> None:
    out = call.ok(mixed, "status", "behynd")
    assert out.startswith("Unit: behynd\nStatus: not registered\nReady: false\n")
    assert "Did you mean: behind\n" in out


def test_status_as_json_has_the_shape_that_scripts_expect(call: Call, mixed: World) -> None:
    mixed.client.want("shape", "b")
    mixed.client.want("shape", "on", requires="start")
    mixed.client.want("shape", "bad", requires="completion")
    data = json.loads(call.ok(mixed, "status", "shape", "-o", "json"))
    assert {k: data[k] for k in ("unit_name", "status", "is_ready")} == {
        "unit_name": "shape",
        "status": "pending",
        "is_ready": False,
    }
    keys = ("depends_on", "required_status", "current_status", "is_satisfied")
    assert [tuple(d[k] for k in keys) for d in data["dependencies"]] == [
        ("b", "completed", "not registered", False),
        ("on", "started", "started", True),
        ("bad", "ended", "failed", True),
    ]


def test_status_as_json_has_reason_exit_code_and_owner(agent: World) -> None:
    agent.run("run", "a", "--", "sh", "-c", "exit 9")
    data = json.loads(agent.ok("status", "a", "--output", "json"))
    assert (data["status"], data["reason"], data["exit_code"]) == ("failed", "exit code 9", 9)
    assert set(data["owner"]) == {"pid", "command", "alive"}


def test_list_is_a_table_sorted_by_name(call: Call, agent: World) -> None:
    agent.client.want("b", "unseen")
    agent.client.start("a-longer-name")
    agent.client.complete("a-longer-name")
    lines = ["UNIT           STATUS     READY", "a-longer-name  completed  true", "b              pending    false"]
    assert call.ok(agent, "list").splitlines() == lines
    assert call.ok(agent, "list", "--all").splitlines()[-1].split() == ["unseen", "not", "registered", "false"]
    assert call.ok(agent, "list", "-c", "READY,unit").splitlines()[1] == "true   a-longer-name"


def test_list_shows_reasons_where_there_are_any(call: Call, mixed: World) -> None:
    lines = call.ok(mixed, "list").splitlines()
    assert lines[0].split() == ["UNIT", "STATUS", "READY", "REASON"]
    assert next(line for line in lines if line.startswith("bad ")).endswith("  no disk")
    assert next(line for line in lines if line.startswith("behind ")).endswith('  dependency "bad" failed (no disk)')


def test_list_as_json_has_the_shape_that_scripts_expect(call: Call, agent: World) -> None:
    for name in ("z", "a", "\u00e4"):
        agent.client.start(name)
    agent.client.complete("a")
    agent.client.fail("z", "no disk")
    rows = json.loads(call.ok(agent, "list", "-o", "json"))
    assert [(r["unit_name"], r["status"], r["is_ready"]) for r in rows] == [
        ("a", "completed", True),
        ("z", "failed", True),
        ("\u00e4", "started", True),
    ]
    assert rows[1]["reason"] == "no disk"
    assert {"exit_code", "owner"} <= rows[1].keys()


def test_list_as_json_names_the_owners(call: Call, agent: World) -> None:
    agent.client.start("a", pid=os.getpid())
    (row,) = json.loads(call.ok(agent, "list", "-o", "json"))
    assert row["owner"]["pid"] == os.getpid()


def test_list_as_json_does_not_deny_dependencies_that_there_are(call: Call, agent: World) -> None:
    agent.client.want("a", "b")
    (row,) = json.loads(call.ok(agent, "list", "-o", "json"))
    assert row.get("dependencies") != []


def test_list_of_nothing(call: Call, agent: World) -> None:
    assert call.ok(agent, "list") == "UNIT  STATUS  READY\n"
    assert json.loads(call.ok(agent, "list", "-o", "json")) == []


def test_a_timeout_is_124_and_names_what_was_missing(call: Call, agent: World) -> None:
    agent.client.start("git-clone", pid=os.getpid())
    agent.client.want("apt", "disk")
    wants = [word for name in ("gitclone", "git-clone", "apt", "zzz") for word in ("--want", name)]
    done = call(agent, "start", "ide", "--timeout", "50ms", *wants)
    assert done.returncode == 124
    first, *rest = done.stderr.splitlines()
    assert first == "timeout waiting for dependencies of unit ide"
    assert len(rest) == 4
    assert rest[0].strip() == 'gitclone not registered, did you mean "git-clone"?'
    assert re.fullmatch(rf" *git-clone started \S+ ago by .*\(pid {os.getpid()}\)", rest[1])
    assert re.fullmatch(r" *apt pending for \S+, waits for disk", rest[2])
    assert rest[3].strip() == "zzz not registered"
    assert agent.status("ide") == "pending"


def test_a_timeout_says_that_who_started_a_dependency_is_no_longer_running(agent: World) -> None:
    script = f"{sys.executable} -IS {FILE} start dep; echo $$"
    out = finish(agent.spawn(["sh", "-c", script])).stdout
    done = agent.run("start", "a", "--want", "dep", "-t", "50ms")
    pid = out.split()[-1]
    assert re.search(rf"dep started \S+ ago by sh .*\(pid {pid}\), which is no longer running\n", done.stderr)


def test_a_unit_whose_start_timed_out_is_not_started_later(call: Call, agent: World) -> None:
    assert call(agent, "start", "a", "--want", "b", "-t", "10ms").returncode == 124
    agent.client.start("b")
    agent.client.complete("b")
    assert agent.status("a") == "pending"
    assert "started" not in kinds_of(agent, "a")


def test_a_script_whose_start_timed_out_still_completes(call: Call, agent: World) -> None:
    assert call(agent, "start", "a", "--want", "b", "-t", "10ms").returncode == 124
    call.ok(agent, "complete", "a")
    assert agent.status("a") == "completed"


def test_no_timeout_waits_until_it_is_told(agent: World) -> None:
    process = agent.popen("start", "a", "--want", "b", "--timeout", "0")
    agent.waiting("a")
    agent.client.start("b")
    agent.client.complete("b")
    assert finish(process).returncode == 0


def test_wait_waits_for_all_and_registers_nothing(agent: World) -> None:
    process = agent.popen("wait", "a", "b")
    assert line_of(process.stdout) == "waiting for a not registered; b not registered\n"
    for name in ("a", "b"):
        assert process.poll() is None
        agent.client.start(name)
        agent.client.complete(name)
    done = finish(process)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a, b: done")
    assert [u.unit_name for u in agent.client.list(everything=True)] == ["a", "b"]


def test_a_wait_that_times_out_says_for_what(call: Call, agent: World) -> None:
    agent.client.start("git-clone")
    done = call(agent, "wait", "gitclone", "-t", "20ms")
    assert done.returncode == 124
    first, second = done.stderr.splitlines()
    assert first == "timeout waiting for gitclone"
    assert second.strip() == 'gitclone not registered, did you mean "git-clone"?'
    assert [u.unit_name for u in agent.client.list(everything=True)] == ["git-clone"]


def test_a_wait_for_any_ending_takes_a_failure(call: Call, mixed: World) -> None:
    assert call.ok(mixed, "wait", "bad", "behind", "done", "--requires", "completion").startswith(
        "bad, behind, done: done"
    )
    assert call.ok(mixed, "wait", "on", "--requires", "start").startswith("on: done")


def test_a_wait_ends_at_once_when_its_unit_fails(agent: World) -> None:
    process = agent.popen("wait", "a", "b")
    line_of(process.stdout)
    agent.client.start("b")
    agent.client.fail("b", "no disk")
    done = finish(process)
    assert (done.returncode, done.stderr) == (4, 'error: dependency "b" failed (no disk)\n')


# -- no agent, or not one of ours -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["ping"], ["status", "a"], ["list"]], ids=" ".join)
def test_questions_try_once(world: World, words: list[str]) -> None:
    stalled = "import time\ndef fail(*_): raise SystemExit(99)\ntime.sleep = fail"
    done = finish(world.spawn(altered(stalled, *words)))
    assert done.returncode == 3


@pytest.mark.parametrize("words", [["want", "a", "b"], ["start", "a"], ["complete", "a"], ["fail", "a"], ["wait", "a"]])
def test_what_coordinates_tries_again_unless_told_not_to(world: World, words: list[str]) -> None:
    tried = "import time\ndef fail(*_): raise SystemExit(99)\ntime.sleep = fail"
    assert finish(world.spawn(altered(tried, *words))).returncode == 99
    assert finish(world.spawn(altered(tried, *words, "--connect-timeout", "0"))).returncode == 3
    env = {**world.env, "CODER_SYNC_CONNECT_TIMEOUT": "0"}
    assert finish(world.spawn(altered(tried, *words), env=env)).returncode == 3


BOOTING = """import time
def first(seconds, sleep=time.sleep):
    import os
    os.write(1, b"tried\\n")
    time.sleep = sleep
time.sleep = first"""


@pytest.mark.parametrize("stale", [False, True], ids=["no socket", "stale socket"])
@pytest.mark.parametrize("words", [["start", "a"], ["want", "a", "b"], ["ping", "--wait", "30s"]], ids=" ".join)
def test_a_call_begun_before_the_agent_boots_succeeds(world: World, words: list[str], stale: bool) -> None:
    if stale:
        listener(world.path).close()
    more = [] if words[0] == "ping" else ["--connect-timeout", "30s"]
    process = world.spawn(altered(BOOTING, *words, *more))
    assert line_of(process.stdout) == "tried\n"
    world.serve()
    assert finish(process).returncode == 0


def test_a_bad_connect_timeout_in_the_environment_is_a_usage_error(call: Call, agent: World) -> None:
    done = call(agent, "start", "a", CODER_SYNC_CONNECT_TIMEOUT="soon")
    assert done.returncode == 2
    assert "invalid duration 'soon'" in done.stderr


def unreachable(call: Call, world: World, *words: str) -> str:
    """Why there is no agent, from a call that tries once."""
    done = call(world, *(words or ("start", "a", "--connect-timeout", "0")))
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(f"error: .*{world.path}.*\n", done.stderr)
    return done.stderr


def test_no_agent_no_socket(call: Call, world: World) -> None:
    text = unreachable(call, world)
    assert "no such file" in text
    assert f"serve --detach --socket-path {world.path}" in text


def test_no_agent_but_its_socket(call: Call, world: World) -> None:
    listener(world.path).close()
    assert "connection refused; the agent that made it is gone" in unreachable(call, world)


def test_a_file_where_the_socket_should_be(call: Call, world: World) -> None:
    Path(world.path).write_text("x")
    assert "not a socket" in unreachable(call, world)


def test_a_directory_where_the_socket_should_be(call: Call, world: World) -> None:
    os.mkdir(world.path)
    assert "not a socket" in unreachable(call, world)


def test_a_socket_path_too_long_to_reach(call: Call, world: World) -> None:
    world.path = f"{world.directory}/{'x' * 120}"
    assert "too long" in unreachable(call, world, "ping", "--socket-path", world.path)


def test_a_socket_of_somebody_else_names_the_owner(world: World) -> None:
    with open_directory() as directory:
        world.path = f"{directory}/agent.sock"
        world.serve("--socket-path", world.path, "--mode", "600" if os.getuid() == 0 else "000")
        owner = pwd.getpwuid(os.getuid()).pw_name
        done = finish(world.spawn(stranger("ping", "--socket-path", world.path)))
    assert done.returncode == 3
    assert re.search(rf"permission denied \(it belongs to {owner}, mode \d+\)", done.stderr)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be somebody else")
def test_a_shared_socket_serves_other_users(world: World) -> None:
    with open_directory() as directory:
        world.path = f"{directory}/agent.sock"
        world.serve("--socket-path", world.path, "--mode", "666")
        done = finish(world.spawn(stranger("start", "a", "--socket-path", world.path)))
    assert done.returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be somebody else")
def test_a_strangers_socket_on_the_default_path_is_refused(world: World) -> None:
    with open_directory() as directory:
        path = world.path = f"{directory}/agent.sock"
        world.serve("--socket-path", path, "--mode", "666")
        os.chown(path, 1, -1)
        there = stranger("ping", "--socket-path", path)
        there[3] = there[3].replace("coder_sync.main", f"coder_sync.DEFAULT_SOCKET = {path!r}\ncoder_sync.main")
        done = finish(world.spawn(there))
        assert done.returncode == 3
        assert f"belongs to {coder_sync.user_name(1)}, not to you or root" in done.stderr
        os.chown(path, 0, -1)
        assert finish(world.spawn(there)).returncode == 0


IMPOSTORS = {
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "other json": b'{"hello": "world"}\n',
    "list": b"[1, 2]\n",
    "binary": b"\xff\xfe\x00\n",
    "deep": b"[" * 60_000 + b"\n",
    "another version": b'{"jsonrpc": "1.0", "id": 1, "result": {}}\n',
}


@pytest.mark.parametrize("answer", IMPOSTORS.values(), ids=IMPOSTORS.keys())
def test_what_does_not_speak_our_protocol_is_said_to(call: Call, world: World, answer: bytes) -> None:
    with impostor(world, answer):
        assert "does not speak our protocol" in unreachable(call, world)
        assert "does not speak our protocol" in unreachable(call, world, "ping")


ODD_ANSWERS: list[Any] = [{"result": r} for r in (None, "x", {}, [1])] + [{"error": "x"}, {"error": {}}, {}]


@pytest.mark.parametrize(
    "words", [["ping"], ["want", "a", "b"], ["start", "a"], ["status", "a"], ["list"]], ids=" ".join
)
def test_an_answer_of_another_shape_is_no_internal_error(call: Call, world: World, words: list[str]) -> None:
    for answer in ODD_ANSWERS:
        with impostor(world, json.dumps({"jsonrpc": "2.0", "id": 1, **answer}).encode() + b"\n"):
            done = call(world, *words)
        assert "internal error" not in done.stderr, answer
        assert done.returncode in (0, 1, 3)
        os.unlink(world.path)


@pytest.mark.parametrize("answer", [b"", b'{"jsonrpc": "2.0", "id"'], ids=["nothing", "half a line"])
def test_a_peer_that_hangs_up_is_said_to_have_gone_away(call: Call, world: World, answer: bytes) -> None:
    with impostor(world, answer):
        assert "went away before it answered" in unreachable(call, world)


def test_an_agent_that_takes_no_connections(call: Call, world: World) -> None:
    with listener(world.path) as sock:
        sock.listen(0)
        queued = []
        for _ in range(5):
            queued.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            queued[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                queued[-1].connect(world.path)
        assert "does not take connections; is it stopped or overloaded?" in unreachable(call, world)


def test_an_agent_that_does_not_answer(world: World) -> None:
    agent = world.serve()
    agent.send_signal(signal.SIGSTOP)
    channel = coder_sync.Channel(world.path)
    with pytest.raises(coder_sync.Unreachable, match=r"has not answered for 0 s; is it stopped[?]"):
        channel.answer(channel.request("ping"), 0.01)


@pytest.mark.parametrize(
    "words", [["start", "a", "--want", "b"], ["wait", "b"], ["run", "a", "--want", "b", "--", "true"]]
)
def test_an_agent_killed_while_a_client_waits_is_3(world: World, words: list[str]) -> None:
    agent = world.serve()
    process = world.popen(*words)
    line_of(process.stderr if words[0] == "run" else process.stdout)
    agent.kill()
    done = finish(process)
    assert done.returncode == 3
    assert re.fullmatch("error: .*went away.*\n", done.stderr)


@pytest.mark.parametrize(
    "words", [["start", "a", "--want", "b"], ["wait", "b"], ["run", "a", "--want", "b", "--", "true"]]
)
def test_ctrl_c_while_waiting_is_130_without_a_word(agent: World, words: list[str]) -> None:
    process = agent.popen(*words)
    line_of(process.stderr if words[0] == "run" else process.stdout)
    done = stopped(process, signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    served(agent)


# -- standard streams -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An agent with more units than a pipe holds of their list."""
    world = World(tmp_path_factory.mktemp("crowd"))
    world.serve()
    fill(world, 2000)
    yield world
    world.close()


@pytest.mark.parametrize(
    "words", [["list", "--all"], ["list", "--all", "-o", "json"], ["status", "everything"], ["events"]]
)
def test_a_reader_that_goes_away_is_no_error(crowd: World, words: list[str]) -> None:
    process = crowd.popen(*words)
    line_of(process.stdout)
    process.stdout.close()  # type: ignore[union-attr]
    assert process.wait(PATIENCE) in (0, 141)
    assert process.stderr.read() == ""  # type: ignore[union-attr]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["list"], ["status", "a"], ["ping"], ["--help"], ["--version"]])
def test_an_answer_that_cannot_be_written_is_an_error(mixed: World, words: list[str]) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = mixed.run(*words, stdout=full)
    assert done.returncode == 1
    assert re.fullmatch("error: cannot write to standard output: No space left on device\n", done.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_was_done_is_done_even_if_nobody_can_read_it(agent: World) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        for words in (["want", "a", "b"], ["start", "b"], ["complete", "b"], ["wait", "b"], ["start", "a"]):
            done = agent.run(*words, stdout=full, stderr=full)
            assert done.returncode == 0, words
    assert (agent.status("a"), agent.status("b")) == ("started", "completed")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_disturb_no_command(agent: World, closed: str) -> None:
    call = f"{sys.executable} -IS {FILE}"
    script = f"""set -e
        {call} want a b {closed}
        {call} start b {closed}
        {call} complete b {closed}
        {call} start a {closed}
        {call} run c -- true {closed}
        {call} status a {closed}
        {call} list {closed}
        {call} complete nobody {closed} || exit $(($? + 40))"""
    done = finish(agent.spawn(["sh", "-c", script]))
    assert done.returncode == 41
    assert "Traceback" not in done.stderr
    assert [(u.unit_name, u.status) for u in agent.client.list()] == [
        ("a", "started"),
        ("b", "completed"),
        ("c", "completed"),
    ]


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_an_agent_with_closed_standard_streams_serves(world: World, closed: str) -> None:
    agent = world.spawn(["sh", "-c", f"exec {sys.executable} -IS {FILE} serve {closed}"])
    world.client.ping(wait=PATIENCE)
    served(world)
    assert stopped(agent).returncode == 0


def test_names_are_written_in_any_locale(shared: World) -> None:
    name = "\u00fcberschrift"
    for locale in ("C", "POSIX", "C.UTF-8"):
        done = shared.run("want", name, "x", env={**shared.env, "LC_ALL": locale})
        assert (done.returncode, done.stderr) == (0, "")
    assert name in [u.unit_name for u in shared.client.list()]


# ---------------------------------------------------------------------------------------------------------
# Run and owners: nobody hangs when somebody dies.
# ---------------------------------------------------------------------------------------------------------

HANG = "import os, signal; os.write(1, b'%d\\n' % os.getpid()); signal.pause()"


def held(world: World, unit: str, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A run whose command goes on until it is killed, and the command's pid."""
    process = world.popen("run", unit, *options, "--", *PYTHON, HANG)
    return process, int(line_of(process.stdout))


def end_of(*processes: subprocess.Popen[str], pids: Any = ()) -> None:
    """Kill processes that a test leaves."""
    for pid in [*(p.pid for p in processes), *pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lost(process: subprocess.Popen[str], command: str = ".*") -> str:
    """The pattern of the reason of a unit whose owner ended."""
    return rf"lost: process {process.pid} \({command}\) ended without completing"


def test_run_declares_waits_starts_runs_and_completes(agent: World) -> None:
    process = agent.popen("run", "a", "--want", "b", "--want", "c", "--", "echo", "ran")
    assert line_of(process.stderr) == "a: waiting for b not registered; c not registered\n"
    for name in ("b", "c"):
        agent.client.start(name)
        agent.client.complete(name)
    done = finish(process)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert kinds_of(agent, "a")[-2:] == ["started", "completed"]


def test_run_gives_its_command_standard_input_arguments_and_the_units_name(agent: World) -> None:
    script = 'cat; echo "$CODER_SYNC_UNIT:$EXTRA:$#:$2"; echo err >&2'
    env = {**agent.env, "EXTRA": "x"}
    process = agent.popen(
        "run", "my unit", "-q", "--", "sh", "-c", script, "0", "1", "--", env=env, stdin=subprocess.PIPE
    )
    out, err = process.communicate("hello\n", timeout=PATIENCE)
    assert (out, err) == ("hello\nmy unit:x:2:--\n", "err\n")


def test_run_of_a_command_that_fails_fails_the_unit_and_skips_what_requires_it(agent: World) -> None:
    waiting = agent.popen("run", "b", "--want", "a", "--", "echo", "ran")
    agent.waiting("b")
    assert agent.run("run", "a", "--", "sh", "-c", "exit 100").returncode == 100
    done = finish(waiting)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.endswith('error: unit "b" skipped: dependency "a" failed (exit code 100)\n')
    later = agent.client
    with pytest.raises(coder_sync.DependencyFailed, match=r'"b" was skipped: dependency "a" failed \(exit code 100\)'):
        later.start("c", want=["b"])


def test_run_of_a_unit_that_times_out_is_124_and_runs_nothing(agent: World) -> None:
    done = agent.run("run", "a", "--want", "b", "-t", "10ms", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (124, "")
    assert "timeout waiting for dependencies of unit a\n" in done.stderr


def test_run_with_optional_runs_without_an_agent_and_warns(world: World) -> None:
    words = ["run", "a", "--connect-timeout", "0", "--optional", "--", "sh", "-c", "echo ran; exit 5"]
    done = world.run(*words)
    assert (done.returncode, done.stdout) == (5, "ran\n")
    assert re.fullmatch("warning: a: runs without coordination: .*no such file.*\n", done.stderr)
    words.remove("--optional")
    done = world.run(*words)
    assert (done.returncode, done.stdout) == (3, "")


def test_an_agent_that_goes_away_does_not_disturb_a_running_command(world: World) -> None:
    agent = world.serve()
    process = world.popen("run", "a", "--", "sh", "-c", "echo running; read x; echo $x; exit 6", stdin=subprocess.PIPE)
    assert line_of(process.stdout) == "running\n"
    agent.kill()
    agent.wait()
    out, err = process.communicate("still here\n", timeout=PATIENCE)
    assert (process.returncode, out) == (6, "still here\n")
    assert re.fullmatch(r"warning: a: its outcome \(exit code 6\) could not be reported: .*\n", err)


def test_a_run_that_is_killed_fails_its_unit_and_its_waiters_are_told(agent: World) -> None:
    process, pid = held(agent, "a")
    waiting = agent.popen("start", "b", "--want", "a")
    agent.waiting("b")
    process.kill()
    done = finish(waiting)
    assert done.returncode == 4
    reason = agent.client.status("a").reason
    assert re.fullmatch(lost(process), reason)
    assert done.stderr == f'error: unit "b" skipped: dependency "a" failed ({reason})\n'
    end_of(pids=[pid])


def test_a_command_that_is_killed_fails_its_unit(agent: World) -> None:
    process, pid = held(agent, "a")
    os.kill(pid, signal.SIGKILL)
    assert finish(process).returncode == 137
    failed = agent.client.status("a")
    assert (failed.status, failed.reason, failed.exit_code) == ("failed", "killed by signal 9", 137)


def test_a_run_and_its_command_killed_at_once_fail_the_unit(agent: World) -> None:
    process, pid = held(agent, "a")
    process.send_signal(signal.SIGSTOP)  # so that it cannot report its command's end
    end_of(process, pids=[pid])
    until(lambda: agent.status("a") == "failed")
    assert re.fullmatch(lost(process), agent.client.status("a").reason)


def test_a_run_that_is_killed_while_it_waits_leaves_nobody_hanging(agent: World) -> None:
    process = agent.popen("run", "a", "--want", "never", "--", "true")
    behind = agent.popen("start", "b", "--want", "a", "--timeout", "10s")
    agent.waiting("a", "b")
    process.kill()
    done = finish(behind)
    assert done.returncode == 4
    assert re.search(r'dependency "a" failed \(lost: process', done.stderr)


def test_a_command_that_leaves_a_child_behind_is_done_when_it_ends_itself(agent: World) -> None:
    read, write = os.pipe()
    code = "import os, sys; os.fork() or os.execvp(sys.argv[1], sys.argv[1:]); os._exit(3)"
    hang = HANG.replace("write(1", f"write({write}")
    argv = [*PYTHON, code, *PYTHON, hang]
    process = agent.popen("run", "a", "--", *argv, pass_fds=[write], stdout=subprocess.DEVNULL)
    assert process.wait(PATIENCE) == 3  # not: until the child lets go of the pipes
    os.close(write)
    assert agent.client.status("a").reason == "exit code 3"
    with open(read, encoding="ascii") as pipe:
        os.kill(int(pipe.readline()), signal.SIGKILL)


def test_a_child_left_behind_does_not_hold_the_unit_of_a_killed_run(agent: World) -> None:
    process, pid = held(agent, "a")
    process.kill()
    until(lambda: agent.status("a") == "failed")
    assert alive(pid)
    end_of(pids=[pid])


def test_a_command_that_closes_its_standard_streams_is_served_to_its_end(agent: World) -> None:
    assert agent.run("run", "a", "--", "sh", "-c", "exec <&- >&- 2>&-; exit 4").returncode == 4
    assert agent.client.status("a").exit_code == 4


def test_a_process_that_stops_and_continues_keeps_its_unit(agent: World) -> None:
    process = agent.popen("run", "a", "--", *PYTHON, CATCH)
    assert line_of(process.stdout) == "ready\n"
    os.killpg(process.pid, signal.SIGSTOP)
    until(lambda: os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT | os.WNOHANG), "stopped")
    assert agent.status("a") == "started"
    os.killpg(process.pid, signal.SIGCONT)
    process.terminate()
    assert finish(process).returncode == 9


@LINUX
def test_a_run_stops_with_its_terminals_group_and_goes_on(agent: World) -> None:
    job = """import os, sys
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
os.write(1, b"%d\\n" % job)
os.waitpid(job, 0)"""  # what a shell with job control does; a group without a parent in its session would not stop
    shell = agent.spawn([*PYTHON, job, sys.executable, "-IS", str(FILE), "run", "a", "--", *PYTHON, HANG])
    run, pid = sorted(int(line_of(shell.stdout)) for _ in range(2))
    os.killpg(run, signal.SIGTSTP)
    for one in (run, pid):
        until(lambda one=one: Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] == "T", "stopped")
    assert agent.status("a") == "started"
    os.killpg(run, signal.SIGCONT)
    os.kill(pid, signal.SIGTERM)
    assert finish(shell).returncode == 0
    assert agent.client.status("a").reason == "killed by signal 15"


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_a_script_that_owns_its_unit_and_dies_fails_it(agent: World, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    script = 'set -e; coder start "$0" --pid $$; read x'
    process = agent.spawn([shell, "-c", script, "owned"], env=agent.shell_env(), stdin=subprocess.PIPE)
    line_of(process.stdout)
    waiting = agent.popen("wait", "owned")
    assert "owned started" in line_of(waiting.stdout)
    status = agent.client.status("owned")
    assert status.owner is not None
    assert (status.owner.pid, status.owner.alive) == (process.pid, True)
    process.kill()
    process.wait()
    done = finish(waiting)
    assert done.returncode == 4
    assert re.search(lost(process, f"{shell} .*"), done.stderr)


def test_a_script_that_ends_without_completing_fails_its_unit(agent: World) -> None:
    done = agent.shell("coder start a --pid $$; exit 0")
    assert done.returncode == 0
    until(lambda: agent.status("a") == "failed")
    assert "ended without completing" in agent.client.status("a").reason


def test_a_script_that_completes_and_ends_has_completed(agent: World) -> None:
    agent.shell("coder start a --pid $$ && coder complete a")
    agent.shell("coder start b --pid $$")
    until(lambda: agent.status("b") == "failed")  # by then the end of the first was seen as well
    assert agent.status("a") == "completed"


def test_an_owner_that_dies_while_its_start_waits_is_told_and_not_started(agent: World) -> None:
    owner = agent.spawn(["cat"], stdin=subprocess.PIPE)
    waiting = agent.popen("start", "a", "--want", "b", "--pid", str(owner.pid))
    agent.waiting("a")
    owner.kill()
    owner.wait()
    done = finish(waiting)
    assert done.returncode == 1
    assert 'unit "a" was not started: the process that was to own it has ended' in done.stderr
    agent.client.start("b")
    agent.client.complete("b")
    assert "started" not in kinds_of(agent, "a")


def test_a_pid_that_is_not_alive_is_refused(agent: World) -> None:
    gone = agent.spawn(["true"])
    finish(gone)
    with pytest.raises(coder_sync.Refused, match=f"process {gone.pid} is not alive in the agent's process namespace"):
        agent.client.start("a", pid=gone.pid)
    assert agent.status("a") == "not registered"


@LINUX
def test_a_zombie_is_not_alive(agent: World) -> None:
    zombie = agent.spawn(["true"])
    until(lambda: os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT))
    with pytest.raises(coder_sync.Refused, match="is not alive"):
        agent.client.start("a", pid=zombie.pid)


def test_without_pidfd_an_owner_that_dies_is_noticed_too(world: World) -> None:
    changes = "import os\nif hasattr(os, 'pidfd_open'): del os.pidfd_open"
    world.spawn(altered(changes, "serve", "-q"))
    world.client.ping(wait=PATIENCE)
    owner = world.spawn(["cat"], stdin=subprocess.PIPE)
    world.client.start("a", pid=owner.pid)
    owner.kill()
    owner.wait()
    with pytest.raises(coder_sync.DependencyFailed, match=lost(owner, "cat")):
        world.client.wait("a", timeout=PATIENCE)


def test_an_agent_stopped_and_continued_loses_nothing(world: World) -> None:
    agent = world.serve()
    dying, pid = held(world, "dying")
    waiting = world.popen("start", "behind", "--want", "a", "--want", "b")
    world.waiting("behind")
    agent.send_signal(signal.SIGSTOP)
    end_of(dying, pids=[pid])
    calls = [world.popen(*words) for words in (["run", "a", "--", "true"], ["start", "b"])]
    late = world.popen("start", "late", "--want", "dying")
    agent.send_signal(signal.SIGCONT)
    assert [finish(call).returncode for call in calls] == [0, 0]
    assert finish(late).returncode == 4
    world.client.complete("b")
    assert finish(waiting).returncode == 0
    assert [(u.unit_name, u.status) for u in world.client.list()] == [
        ("a", "completed"),
        ("b", "completed"),
        ("behind", "started"),
        ("dying", "failed"),
        ("late", "skipped"),
    ]


@pytest.mark.parametrize(("end", "status"), [("exit 0", "completed"), ("exit 7", "failed"), ("no-such", "failed")])
def test_an_exit_trap_reports_how_a_script_ended(agent: World, end: str, status: str) -> None:
    agent.shell(f"set -e; trap 'coder complete a --exit-code $?' EXIT; coder start a; {end}")
    found = agent.client.status("a")
    assert found.status == status
    assert found.reason == {"exit 0": "", "exit 7": "exit code 7", "no-such": "exit code 127"}[end]


def test_a_unit_that_was_skipped_is_revived_when_its_dependency_is_started_again(agent: World) -> None:
    assert agent.run("run", "a", "--", "false").returncode == 1
    assert agent.run("run", "b", "--want", "a", "--", "true").returncode == 4
    again = agent.popen("run", "a", "--", "sh", "-c", "echo on; read x", stdin=subprocess.PIPE)
    assert line_of(again.stdout) == "on\n"
    revived = agent.popen("run", "b", "--", "true")
    agent.waiting("b")
    again.communicate("\n", timeout=PATIENCE)
    assert agent.status("a") == "completed"
    assert finish(revived).returncode == 0


# ---------------------------------------------------------------------------------------------------------
# Scripts as people write them, with the file installed as `coder`.
# ---------------------------------------------------------------------------------------------------------

MY_SETUP = """#!/bin/bash
UNIT_NAME="my-setup"

# Declare dependency on git-clone
coder exp sync want "$UNIT_NAME" "git-clone"

# Wait for dependencies and mark as started
coder exp sync start "$UNIT_NAME"

# Do your work here
echo "Running after git-clone completes"

# Signal completion
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

IDE_SETUP = """# Depends on git-clone because we need .vscode/extensions.json
# Depends on env-setup because we need $NODE_PATH configured
coder exp sync want "ide-setup" "git-clone"
coder exp sync want "ide-setup" "env-setup"
"""

CIRCULAR = """# This will fail
coder exp sync want "unit-a" "unit-b"
coder exp sync want "unit-b" "unit-a"
"""

LONG = 'coder exp sync start "long-operation" --timeout 10m\n'


def script_of(world: World, text: str, shell: str = "bash", **env: str) -> subprocess.Popen[str]:
    """A script that runs with `coder` in its PATH."""
    return world.spawn([shell, "-c", text], env={**world.shell_env(), **env})


def test_the_scripts_of_the_documents_run_in_parallel_in_the_right_order(agent: World) -> None:
    body = 'echo "$UNIT_NAME" >> order\n'
    setup = script_of(agent, MY_SETUP.replace("# Signal", "echo my-setup >> order\n# Signal"))
    ide = script_of(agent, IDE_SETUP + SYNC_STARTED + body, UNIT_NAME="ide-setup")
    agent.waiting("my-setup", "ide-setup")
    clone = script_of(agent, SYNC_STARTED + body, UNIT_NAME="git-clone")
    env = script_of(agent, COMMAND_V + body + 'coder exp sync complete "$UNIT_NAME"', UNIT_NAME="env-setup")
    for script in (clone, env, setup, ide):
        done = finish(script)
        assert (done.returncode, done.stderr) == (0, "")
    order = (agent.directory / "order").read_text().split()
    assert sorted(order) == ["env-setup", "git-clone", "ide-setup", "my-setup"]
    assert order.index("git-clone") < order.index("my-setup")
    assert max(order.index("git-clone"), order.index("env-setup")) < order.index("ide-setup")
    assert {u.status for u in agent.client.list()} == {"completed"}


def test_the_first_script_of_the_documents_says_what_it_does(agent: World) -> None:
    agent.client.start("git-clone")
    agent.client.complete("git-clone")
    done = agent.shell(MY_SETUP, shell="bash")
    assert done.stdout.splitlines() == [
        "my-setup: depends on git-clone",
        "my-setup: started; satisfied already: git-clone",
        "Running after git-clone completes",
        "my-setup: completed",
    ]


def test_the_circular_script_of_the_documents_is_refused(agent: World) -> None:
    done = agent.shell(CIRCULAR, shell="bash")
    assert done.returncode == 1
    assert "cycle detected: unit-b -> unit-a -> unit-b" in done.stderr
    assert agent.client.status("unit-b").dependencies == []


def test_the_trap_of_the_documents_completes_a_script_that_fails(agent: World) -> None:
    done = agent.shell("UNIT_NAME=a\n" + SYNC_STARTED + "set -e; false; echo not reached", shell="bash")
    assert done.returncode == 1
    assert "not reached" not in done.stdout
    assert agent.status("a") == "completed"


def test_the_trap_of_the_documents_leaves_a_unit_alone_that_did_not_start(agent: World) -> None:
    agent.client.start("a")
    assert agent.shell("UNIT_NAME=a\n" + SYNC_STARTED, shell="bash").returncode == 0
    assert agent.status("a") == "started"


def test_a_script_goes_on_where_there_is_no_cli(agent: World) -> None:
    done = finish(agent.spawn(["/bin/sh", "-c", COMMAND_V], env={"PATH": "/nowhere", "UNIT_NAME": "a"}))
    assert (done.returncode, done.stdout) == (0, "Coder CLI not available, continuing without coordination\n")


WILD = {
    "trap first": """set -euo pipefail
        trap 'coder exp sync complete post-codex' EXIT
        coder exp sync want post-codex a b c
        coder exp sync start --timeout 30m post-codex""",
    "option after": "coder exp sync want post-codex a b c && coder exp sync start post-codex --timeout 10m && "
    "coder exp sync complete post-codex",
    "in one breath": """coder exp sync want post-codex a b c
        coder exp sync start post-codex && coder exp sync complete post-codex""",
    "silent": """coder exp sync want post-codex a b c > /dev/null 2>&1 || true
        coder exp sync start post-codex > /dev/null 2>&1 || true
        coder exp sync complete post-codex > /dev/null 2>&1 || true""",
    "a function": """sync() { coder exp sync "$@"; }
        sync want post-codex a b c; sync start post-codex; sync complete post-codex""",
    "run": "coder run post-codex --want a --want b --want c -- true",
}


@pytest.mark.parametrize("script", WILD.values(), ids=WILD.keys())
def test_the_forms_in_which_scripts_call_it(agent: World, script: str) -> None:
    for name in "abc":
        agent.client.start(name)
        agent.client.complete(name)
    done = agent.shell(script, shell="bash")
    assert (done.returncode, done.stderr) == (0, "")
    assert agent.status("post-codex") == "completed"
    assert len(agent.client.status("post-codex").dependencies) == 3


def test_a_barrier_unit(agent: World) -> None:
    barrier = script_of(
        agent, "coder exp sync want ready-x repo; coder exp sync start ready-x; coder exp sync complete ready-x"
    )
    behind = script_of(agent, "coder exp sync want x ready-x; coder exp sync start x")
    agent.waiting("ready-x", "x")
    agent.client.start("repo")
    agent.client.complete("repo")
    assert finish(barrier).returncode == finish(behind).returncode == 0


def test_scripts_that_must_go_on_go_on_without_an_agent(world: World) -> None:
    env = {**world.shell_env(), "CODER_SYNC_CONNECT_TIMEOUT": "0"}
    done = world.shell("set -e; coder exp sync start a > /dev/null 2>&1 || true; echo on", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_serve_runs_scripts(world: World) -> None:
    script = "coder exp sync run b --want a -- echo b & coder exp sync run a -- echo a; wait"
    done = world.shell(f"coder serve -- sh -c '{script}'")
    assert (done.returncode, done.stdout) == (0, "a\nb\n")


# ---------------------------------------------------------------------------------------------------------
# Install: the plain file and the installed copy, however they are called; how a copy comes to be.
# ---------------------------------------------------------------------------------------------------------


def tool(world: World, form: str = "installed", name: str = "coder") -> str:
    """The file as somebody may have it in a directory of its own."""
    directory = world.directory / f"{form} tools"
    directory.mkdir(exist_ok=True)
    shutil.copy(FILE if form == "plain" else installed(), directory / name)
    return str(directory / name)


def command(world: World, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run any command with this Python as `python3` in PATH."""
    return finish(world.spawn(list(argv), **{"env": world.shell_env(), **options}))


def install(world: World, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return command(world, sys.executable, "-IS", str(FILE), "install", *words, **options)


def pythons(oldest: str, newest: str) -> list[str]:
    """Other Pythons of this machine, from one version to before another."""
    found = [str(p) for p in Path.home().glob(".pyenv/versions/*/bin/python") if "venv" not in str(p)]
    found += filter(None, (shutil.which(f"python3.{minor}") for minor in range(6, 15)))
    versions: dict[str, str] = {}
    for python in found:
        ask = [python, "-c", "import sys; sys.stdout.write('%d.%02d' % sys.version_info[:2])"]
        version = subprocess.run(ask, capture_output=True, text=True).stdout
        if oldest <= version < newest and version != f"{sys.version_info[0]}.{sys.version_info[1]:02}":
            versions.setdefault(version, python)
    return list(versions.values())


@pytest.mark.parametrize("form", ["plain", "installed"])
def test_every_way_of_calling_it_works(shared: World, world: World, form: str) -> None:
    path, python = tool(world, form), os.path.join(os.path.dirname(sys.executable), "python3")
    (world.directory / "link").symlink_to(path)
    (world.directory / "link of a link").symlink_to("link")
    env = {"PATH": world.shell_env()["PATH"], "CODER_AGENT_SOCKET_PATH": shared.path}  # no HOME, for one
    for argv in (
        [path],
        [python, path],
        ["./link of a link"],
        [python, "link"],
        [os.path.relpath(path, world.directory)],
    ):
        done = command(world, *argv, "exp", "sync", "ping", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert command(world, *argv, "--help", env=env).stdout.startswith(
            f"usage: {os.path.basename(argv[-1])} COMMAND"
        )
        assert command(world, *argv, "frobnicate", env=env).returncode == 2
    assert os.listdir(os.path.dirname(path)) == ["coder"]  # nothing is left beside it


@pytest.mark.parametrize("form", ["plain", "installed"])
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "busybox sh"])
def test_any_shell_may_read_its_first_lines(shared: World, world: World, form: str, shell: str) -> None:
    program, *rest = shell.split()
    words = [shutil.which(program) or pytest.skip(f"there is no {shell}"), *rest]
    path, env = tool(world, form), {**world.shell_env(), "CODER_AGENT_SOCKET_PATH": shared.path}
    name = "a 'b' \"c\" $d `e` \\ * \u00e4"
    done = command(world, *words, path, "want", name, "-q", "x", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert name in [u.unit_name for u in shared.client.list()]
    assert command(world, *words, path, "ping", env={"PATH": "/nowhere"}).returncode == 127


@pytest.mark.parametrize("form", ["plain", "installed"])
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
    for words in (["ping"], ["list", "-o", "json"], ["list", "--help"]):
        done = command(world, path, *words, env=env)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("form", ["plain", "installed"])
def test_whoever_calls_it_is_shown_as_what_was_called(agent: World, form: str) -> None:
    run = agent.spawn([tool(agent, form), "run", "a", "--", "sleep", "60"], env=agent.shell_env())
    owner = until(lambda: agent.connect().call("list")["result"] and agent.client.status("a").owner)
    assert (owner.pid, owner.command) == (run.pid, "coder run a -- sleep 60")


def test_other_users_call_it_and_may_write_nothing(world: World) -> None:
    python, become = shutil.which("python3", path="/usr/bin:/bin"), ["setpriv", "--reuid=65534", "--clear-groups"]
    if os.getuid() or not python or not shutil.which("setpriv"):
        pytest.skip("only root can become somebody else")
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    try:
        shutil.copy(FILE, directory / "plain")
        assert install(world, str(directory / "copy")).returncode == 0
        for path in (directory / "plain", directory / "copy"):
            script = f"{path} serve -- {path} run x -- echo ran; {python} {path} --version"
            done = command(world, *become, "sh", "-c", script, env={"PATH": "/usr/bin:/bin"}, cwd="/")
            assert (done.stdout, done.stderr) == (f"ran\ncoder_sync {coder_sync.__version__}\n", "")
        done = command(world, *become, python, str(directory / "plain"), "install", env={}, cwd="/")
        assert done.returncode == 1 and "Permission denied; nothing was changed" in done.stderr
        assert sorted(os.listdir(directory)) == ["copy", "plain"]
    finally:
        shutil.rmtree(directory)


def test_the_copy_is_an_archive_with_the_source_as_it_was(world: World) -> None:
    path = tool(world)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("coder_sync.py") == FILE.read_bytes()
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-p", path, "coder_sync.py"], capture_output=True)
        assert (done.stdout, done.stderr) == (FILE.read_bytes(), b"")


def test_the_copy_is_imported_from_as_any_archive_is(shared: World, world: World) -> None:
    env = {**world.shell_env(), "CODER_AGENT_SOCKET_PATH": shared.path, "PYTHONPATH": tool(world)}
    code = "import coder_sync as c; print(c.Client().ping()['pid'] > 0, c.Client.unit.__doc__ > '', c.PROGRAM)"
    assert command(world, sys.executable, "-c", code, env=env).stdout == "True True coder\n"
    assert command(world, sys.executable, "-m", "coder_sync", "ping", env=env).returncode == 0


def test_the_same_input_gives_the_same_bytes(world: World) -> None:
    again, other = str(world.directory / "again"), str(world.directory / "other")
    for source, path, seed in ((str(FILE), again, "1"), (again, other, "2"), (other, other, "3")):
        env = {**world.shell_env(), "PYTHONHASHSEED": seed}
        done = command(world, sys.executable, source, "install", path, env=env)
        assert (done.returncode, done.stdout) == (0, f"{path}: installed for {sys.executable}\n")
        assert Path(path).read_bytes() == installed().read_bytes()


def test_another_python_runs_it_from_the_source_and_serve_says_so_once(world: World) -> None:
    others = pythons("3.08", "3.14")
    if not others:
        pytest.skip("there is no other Python")
    path, python = tool(world), others[-1]
    said = "`coder install` would make every call faster"
    assert said not in command(world, path, "serve", "-v", "--", "true").stderr
    for argv, expected in (([python, path], 1), ([sys.executable, tool(world, "plain")], 1)):
        done = command(world, *argv, "serve", "-v", "--", "true")
        assert (done.returncode, done.stderr.count(said)) == (0, expected)
    assert said not in command(world, python, path, "serve", "--", "true").stderr
    done = command(world, path, "install", "--python", python)
    assert (done.returncode, done.stdout) == (0, f"{path}: installed for {python}\n")
    for argv in ([path], [python, path]):
        assert said not in command(world, *argv, "serve", "-v", "--", "true").stderr
    assert command(world, path, "install").returncode == 0  # by the other Python, which `path` now calls
    assert said not in command(world, python, path, "serve", "-v", "--", "true").stderr


def test_too_old_a_python_is_told_which_is_needed(world: World) -> None:
    old = pythons("2.07", "3.08")
    if not old:
        pytest.skip("there is no old Python")
    for python in old:
        plain = command(world, python, str(FILE), "ping")
        assert plain.returncode == 1 and '(NEEDED := "Python 3.8 or later")' in plain.stderr
        copy = command(world, python, tool(world), "ping")
        assert copy.returncode == 1 and copy.stderr.startswith("error: coder_sync needs Python 3.8 or later, and this")
        assert copy.stderr.count("\n") == 1
        done = install(world, "--python", python, "copy")
        assert done.returncode == 1 and "cannot run coder_sync, which needs Python 3.8 or later" in done.stderr
    assert not (world.directory / "copy").exists()


def test_install_keeps_mode_and_owner_and_follows_links(world: World) -> None:
    real, link = world.directory / "real", world.directory / "link"
    real.write_bytes(FILE.read_bytes())
    link.symlink_to("real")
    for mode, expected in ((0o640, 0o750), (0o755, 0o755), (0o600, 0o700)):
        real.chmod(mode)
        if os.getuid() == 0:
            os.chown(real, 65534, 65534)
        before = real.stat()
        assert command(world, sys.executable, str(link), "install").returncode == 0  # in place
        after = real.stat()
        assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (expected, before.st_uid, before.st_gid)
        assert link.is_symlink() and real.read_bytes() == installed().read_bytes()
    world.spawn(["sh", "-c", f"umask 027; exec {sys.executable} {FILE} install new"]).wait()
    assert stat.S_IMODE((world.directory / "new").stat().st_mode) == 0o750


@pytest.mark.parametrize("trouble", ["directory", "fifo", "no directory", "full disk", "no python", "broken python"])
def test_what_keeps_install_from_its_work_is_said_in_one_line(world: World, trouble: str) -> None:
    path, words, options = tool(world), [], {}
    if trouble == "directory":
        path, said = os.path.dirname(path), "a directory is there"
    elif trouble == "fifo":
        os.unlink(path)
        os.mkfifo(path)
        said = "no regular file is there"
    elif trouble == "no directory":
        path, said = "/nowhere/coder", "No such file or directory; nothing was changed"
    elif trouble == "full disk":
        size = installed().stat().st_size - 1
        options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        said = "File too large; nothing was changed"
    else:
        words, said = ["--python", "./none"], "cannot run"
        if trouble == "broken python":
            (world.directory / "none").write_text("#!/bin/sh\necho damaged >&2; exit 1\n")
            (world.directory / "none").chmod(0o755)
            said = "cannot run coder_sync, which needs Python 3.8 or later: damaged"
    world.shell_env()
    before = sorted((p, p.is_file() and p.read_bytes()) for p in world.directory.rglob("*"))
    done = install(world, path, *words, **options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert sorted((p, p.is_file() and p.read_bytes()) for p in world.directory.rglob("*")) == before


def test_calls_see_the_old_copy_or_the_new_one(world: World) -> None:
    path, others = tool(world), pythons("3.08", "3.14")[:1] or [sys.executable]
    loop = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do %s --version || exit; done"
    calls = [world.spawn(["sh", "-c", loop % c], env=world.shell_env()) for c in (f"'{path}'", f"python3 '{path}'") * 2]
    while any(process.poll() is None for process in calls):
        for python in (others[0], sys.executable):
            assert install(world, "-q", "--python", python, path).returncode == 0
    for process in calls:
        done = finish(process)
        assert (done.returncode, done.stderr, set(done.stdout.splitlines())) == (0, "", {"coder_sync 0.1.0"})


# ---------------------------------------------------------------------------------------------------------
# Load: many runs in one layered graph, a third of them killed.
# ---------------------------------------------------------------------------------------------------------

RUNS = 200
LAYERS = 8


def test_of_many_runs_a_third_killed_each_ends_and_for_the_right_reason(world: World) -> None:
    world.serve("-q")
    chance = random.Random(20)
    size = RUNS // LAYERS
    layers = [[f"u{layer}-{i}" for i in range(size)] for layer in range(LAYERS)]
    wants = {name: chance.sample(layers[n - 1], 2) if n else ["go"] for n, layer in enumerate(layers) for name in layer}
    names = list(wants)
    chance.shuffle(names)
    fate = {name: chance.choice(["run", "command", "late"]) for name in chance.sample(names, RUNS // 3)}
    runs: dict[str, subprocess.Popen[str]] = {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for name in names:
        command = ["sh", "-c", "kill -9 $$"] if fate.get(name) == "command" else ["sleep", "0.02"]
        options = [word for dependency in wants[name] for word in ("--want", dependency)]
        runs[name] = world.popen("run", name, "-q", "--timeout", "60s", *options, "--", *command, **quiet)
    world.waiting(*names)
    early = [name for name in names if fate.get(name) == "run"]
    for name in early[::2]:  # while it waits
        runs[name].kill()
    todo = early[1::2] + [name for name in names if fate.get(name) == "late"]
    watch = Client(world.path, 0).events(follow=True)
    world.client.start("go")
    world.client.complete("go")
    for count, event in enumerate(watch):  # at any moment of the boot
        if count % 7 == 0 and todo:
            runs[todo.pop()].kill()
        if event.unit == names[-1] and event.kind in coder_sync.ENDED:
            break
    for name in todo:
        runs[name].kill()
    codes = {name: run.wait(PATIENCE) for name, run in runs.items()}
    until(lambda: all(u.status in coder_sync.ENDED for u in world.client.list()), "every unit ended")

    found = {u.unit_name: u for u in world.client.list()}
    for name in (name for layer in layers for name in layer):
        unit, bad = found[name], [d for d in wants[name] if found[d].status != "completed"]
        if unit.status == "completed":
            assert not bad
            assert codes[name] == 0 or (name in fate and codes[name] == -signal.SIGKILL)
        elif unit.status == "skipped":
            reasons = [
                f'dependency "{d}" ' + ("was skipped: " if found[d].status == "skipped" else "failed (") for d in bad
            ]
            ends = [found[d].reason + ("" if found[d].status == "skipped" else ")") for d in bad]
            assert unit.reason in [reason + end for reason, end in zip(reasons, ends)]
            assert codes[name] == 4 or (name in fate and codes[name] == -signal.SIGKILL)
        elif fate.get(name) == "command":
            assert not bad
            assert (unit.reason, codes[name]) == ("killed by signal 9", 137)
        else:
            assert name in fate
            assert re.fullmatch(lost(runs[name]), unit.reason)
            assert codes[name] == -signal.SIGKILL
    assert {u.status for u in found.values()} == {"completed", "failed", "skipped"}


# ---------------------------------------------------------------------------------------------------------
# Python: Client.
# ---------------------------------------------------------------------------------------------------------


def test_calls_return_typed_results(agent: World) -> None:
    client = agent.client
    assert client.ping()["version"] == coder_sync.__version__
    assert client.want("a", "b") == ["b"]
    assert client.want("a", "c") == ["b", "c"]
    started = client.start("b")
    assert (started.unit, started.dependencies) == ("b", [])
    assert started.waited >= 0
    assert client.complete("b") is None
    status = client.status("a")
    assert (status.unit_name, status.status, status.is_ready, status.exit_code) == ("a", "pending", False, None)
    assert [(d.depends_on, d.is_satisfied, d.requirement) for d in status.dependencies] == [
        ("b", True, "success"),
        ("c", False, "success"),
    ]
    assert [u.unit_name for u in client.list()] == ["a", "b"]
    assert [u.unit_name for u in client.list(everything=True)] == ["a", "b", "c"]
    assert client.wait("b") < PATIENCE
    assert [(e.unit, e.kind) for e in client.events()][:2] == [("a", "registered"), ("a", "wants")]


def test_errors_are_exceptions_of_their_own(agent: World) -> None:
    client = agent.client
    client.start("a")
    for kind, code, call in (
        (coder_sync.AlreadyStarted, 1, lambda: client.start("a")),
        (coder_sync.CycleError, 1, lambda: client.want("a", "a")),
        (coder_sync.NotRegistered, 1, lambda: client.complete("nobody")),
        (coder_sync.Refused, 1, lambda: client.want("", "a")),
        (coder_sync.TimedOut, 124, lambda: client.wait("nobody", timeout=0.01)),
        (coder_sync.Unreachable, 3, lambda: Client("/nowhere", 0).ping()),
        (coder_sync.UsageError, 2, lambda: coder_sync.duration("x")),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, coder_sync.SyncError)
        assert caught.value.exit_code == code
    client.fail("a", "no disk")
    with pytest.raises(coder_sync.DependencyFailed, match="no disk"):
        client.start("b", want=["a"])


def test_a_timeout_carries_what_was_missing(agent: World) -> None:
    with pytest.raises(coder_sync.TimedOut) as caught:
        agent.client.start("a", want=["b", "c"], timeout=0.01)
    assert [(d.depends_on, d.current_status) for d in caught.value.data] == [
        ("b", "not registered"),
        ("c", "not registered"),
    ]


def test_a_call_too_long_for_one_request_is_refused(agent: World) -> None:
    with pytest.raises(coder_sync.Refused, match="too much for one request"):
        agent.client.want("a", *[f"{i:0250}" for i in range(300)])
    assert agent.client.list() == []


def test_a_block_that_ends_completes_its_unit(agent: World) -> None:
    with agent.client.unit("a") as start:
        assert start.result.unit == "a"
        assert agent.status("a") == "started"
    assert agent.status("a") == "completed"


def test_a_block_that_raises_fails_its_unit_with_the_exceptions_text(agent: World) -> None:
    with pytest.raises(ZeroDivisionError), agent.client.unit("a"):
        raise ZeroDivisionError("no\nway")
    failed = agent.client.status("a")
    assert (failed.status, failed.reason) == ("failed", "ZeroDivisionError: no way")


def test_a_block_that_must_not_start_is_not_entered(agent: World) -> None:
    agent.client.start("b")
    agent.client.fail("b")
    with pytest.raises(coder_sync.DependencyFailed), agent.client.unit("a", want=["b"]):
        pytest.fail("entered")
    assert agent.status("a") == "skipped"


def test_a_process_that_ends_in_its_block_fails_the_unit(agent: World) -> None:
    code = f"""import os, sys; sys.path.insert(0, {str(HERE)!r})
from coder_sync import Client
with Client().unit("a"):
    os.write(1, b"in\\n"); os.read(0, 1); os._exit(0)"""
    process = agent.spawn([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
    assert line_of(process.stdout) == "in\n"
    assert agent.status("a") == "started"
    process.communicate(timeout=PATIENCE)
    until(lambda: agent.status("a") == "failed")
    assert re.fullmatch(lost(process), agent.client.status("a").reason)


def test_a_block_whose_unit_was_completed_within_is_fine(agent: World) -> None:
    with agent.client.unit("a"):
        agent.client.complete("a")
    assert agent.status("a") == "completed"


def test_a_client_may_be_used_from_many_threads(agent: World) -> None:
    client, errors = Client(agent.path, 5), []

    def work(n: int) -> None:
        try:
            with client.unit(f"t{n}", want=[f"t{n - 1}"] if n else [], timeout=PATIENCE):
                pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in reversed(range(40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == []
    assert {u.status for u in client.list()} == {"completed"}


def test_on_wait_is_told_what_is_missing(agent: World) -> None:
    told: list[Any] = []

    def on_wait(missing: list[coder_sync.Dependency], waited: float) -> None:
        told.append(([d.depends_on for d in missing], waited))
        agent.client.start("b")
        agent.client.complete("b")

    agent.client.start("a", want=["b"], on_wait=on_wait)
    assert told == [(["b"], 0.0)]


# ---------------------------------------------------------------------------------------------------------
# Two more troubles: a run that gives up, and a clock that is set back.
# ---------------------------------------------------------------------------------------------------------


def test_a_run_that_gives_up_waiting_fails_its_unit(agent: World) -> None:
    assert agent.run("run", "a", "--want", "b", "--timeout", "10ms", "--", "true").returncode == 124
    assert agent.client.status("a").reason == "timed out waiting for b"
    assert agent.run("start", "c", "--want", "a").returncode == 4


def test_a_start_that_gives_up_waiting_leaves_its_unit_pending(agent: World) -> None:
    assert agent.run("start", "a", "--want", "b", "--timeout", "10ms").returncode == 124
    assert agent.status("a") == "pending"


def test_a_script_that_ends_after_its_start_gave_up_fails_its_unit(agent: World) -> None:
    script = f"{sys.executable} -IS {FILE} start a --want b --timeout 10ms --pid $$; test $? = 124"
    assert finish(agent.spawn(["sh", "-c", script])).returncode == 0
    until(lambda: agent.status("a") == "failed")
    assert agent.client.status("a").reason == ("lost: the process that was to start it ended without completing")


def test_a_script_that_goes_on_after_its_start_gave_up_may_complete(agent: World) -> None:
    me = f"{sys.executable} -IS {FILE}"
    script = f"{me} start a --want b --timeout 10ms --pid $$; {me} complete a"
    assert finish(agent.spawn(["sh", "-c", script])).returncode == 0
    assert agent.status("a") == "completed"


def test_the_critical_path_goes_on_through_a_unit_that_was_skipped(units: Units, clock: Clock) -> None:
    units.want("middle", ["base"])
    units.want("report", ["middle"], "completion")
    units.start("base", "t1")
    units.start("report", "t2")
    clock.now += 60
    units.fail("base")
    clock.now += 1
    units.complete("report")
    assert [(n.unit_name, share) for n, share in coder_sync.critical_path(units.graph())] == [
        ("base", 60),
        ("report", 1),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("# coder-sync want a", ":2: not understood"),
        ("# codersync: want a", ":2: not understood"),
        ("// coder_sync: want a", ":2: not understood"),
        ("# coder-sync: want a --require start", '"--require" is neither an option'),
        ("# coder-sync: want a, b", '"a," is neither an option'),
    ],
)
def test_a_header_that_is_nearly_one_is_a_mistake(line: str, told: str) -> None:
    mistakes: list[str] = []
    coder_sync.read_script("x.sh", f"#!/bin/sh\n{line}\n".encode(), mistakes)
    assert len(mistakes) == 1 and told in mistakes[0]


def test_numbered_siblings_are_not_taken_for_slips_of_the_finger() -> None:
    assert coder_sync.resembling("db-2", ["db-1", "db-22"]) == ""
    assert coder_sync.resembling("db_1", ["db-2", "db-1"]) == "db-1"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["exp", "start", "a"], "after exp comes sync"),
        (["--quiet", "start", "a"], "Options other than --socket-path follow the command"),
        (["start", "a", "--requires", "start"], "--requires is about the units of --want"),
    ],
)
def test_a_call_that_cannot_mean_anything_says_what_was_meant(world: World, argv: list[str], told: str) -> None:
    done = world.run(*argv)
    assert done.returncode == 2 and told in done.stderr


CLOCK_SET_BACK = """
import time
wall, calls = time.time, []
def set_back():
    calls.append(1)
    return wall() - 3600 * (len(calls) > 6)
time.time = set_back
"""


def test_nothing_but_the_log_follows_a_clock_that_is_set_back(world: World) -> None:
    world.spawn(
        [sys.executable, "-IS", "-c", CLOCK_SET_BACK + coder_sync.START, str(installed()), "serve"],
        stderr=subprocess.DEVNULL,
    )
    world.client.ping(wait=PATIENCE)
    world.ok("start", "a")
    waits = world.popen("start", "b", "--want", "a", "--timeout", "20s")
    world.waiting("b")
    world.ok("complete", "a")
    assert finish(waits).returncode == 0
    world.ok("run", "c", "--want", "a", "--", "true")
    events = list(world.client.events())
    assert max(e.wall for e in events) - min(e.wall for e in events) > 3000
    assert [e.time for e in events] == sorted(e.time for e in events)
    assert events[-1].time - events[0].time < 600
    graph = world.client.graph()
    assert all(0 <= node.started <= node.ended or node.ended == -1 for node in graph.nodes)
    assert world.client.status("b").age < 600


# ---------------------------------------------------------------------------------------------------------
# Views: pictures of startups that are played on the fake clock, compared with expected text.
# ---------------------------------------------------------------------------------------------------------


def good_startup(units: Units, clock: Clock) -> Graph:
    """Two long scripts behind each other, and short ones beside them; all succeed."""
    units.want("pip-install", ["apt-install"])
    units.want("migrate", ["db"])
    units.want("serve", ["pip-install", "migrate"])
    units.start("apt-install", "apt-install", owner=Owner(41, "bash apt.sh"))
    for name in ("git-clone", "db", "pip-install", "migrate", "serve"):
        units.start(name, name)
    for name, seconds in (("git-clone", 12), ("db", 20), ("migrate", 9), ("apt-install", 84), ("pip-install", 118)):
        clock.now += seconds
        units.complete(name)
    clock.now += 9
    units.complete("serve")
    return units.graph()


def broken_startup(units: Units, clock: Clock) -> Graph:
    """One unit of every standing, half a minute after the beginning."""
    units.start("base", "base", owner=Owner(7, "bash base.sh"))
    units.start("web", "web", ["base"], owner=Owner(42, "bash web.sh", True))
    units.start("lint", "lint", ["gone"])
    units.start("cache", "cache", ["base"], "start")
    clock.now += 10
    units.complete("base")
    units.start("data", "data")
    units.start("report", "report", ["data"])
    units.start("mail", "mail", ["report", "web"])
    clock.now += 5
    units.cancel("lint", "timed out")
    units.fail("data", "disk full", 2)
    units.start("slow", "slow", ["web"])
    units.want("idle", ["web"])
    clock.now += 15
    return units.graph()


def uneven_startup(units: Units, clock: Clock) -> Graph:
    """A millisecond, five minutes, a millisecond, each asked for when the one before has ended."""
    for name, wants, seconds in (("quick", [], 0.001), ("slow", ["quick"], 300), ("last", ["slow"], 0.001)):
        units.start(name, name, wants)
        clock.now += seconds
        units.complete(name)
    return units.graph()


def wide_startup(units: Units, clock: Clock) -> Graph:
    """200 units, each wanting two before it."""
    for i in range(200):
        units.start(f"unit-{i:03}", i, {f"unit-{i // 2:03}", f"unit-{i * 2 // 3:03}"} - {f"unit-{i:03}"})
    for i in range(200):
        clock.now += i % 7
        units.complete(f"unit-{i:03}")
    return units.graph()


def long_names(units: Units, clock: Clock) -> Graph:
    """A pending_chain of names of 60 characters, one of 255, and wide ones."""
    names = [f"{i:02}-" + "script-" * 8 + "x" for i in range(8)] + ["环境准备-" * 10, "a" * 127 + "b" * 128]
    for i, name in enumerate(names):
        units.start(name, name, names[i - 1 : i])
    for name in names:
        clock.now += 33
        units.complete(name)
    return units.graph()


def pending_chain(units: Units, length: int) -> Graph:
    """u0 waits for u1, which waits for u2, and so on; the last one runs."""
    for i in reversed(range(length)):
        units.start(f"u{i}", i, [f"u{i + 1}"] if i < length - 1 else [])
    return units.graph()


def picture(text: str) -> str:
    """Expected text, as it stands in a test: indented, between lines of its own."""
    return textwrap.dedent(text)[1:]


def whys(graph: Graph, name: str) -> list[str]:
    return coder_sync.why_text(graph, name).splitlines()


def svg_of(graph: Graph) -> ElementTree.Element:
    """The picture, parsed; tags without their namespace."""
    root = ElementTree.fromstring(coder_sync.timeline_svg(graph))
    for element in root.iter():
        assert element.tag.startswith("{http://www.w3.org/2000/svg}")
        element.tag = element.tag.rpartition("}")[2]
    return root


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name, "nan"))


def box(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text of 12 pixels in a font whose columns are 7.25 pixels wide."""
    x, y, width = number(text, "x"), number(text, "y"), 7.25 * coder_sync.wide(text.text or "")
    x -= {"end": width, "middle": width / 2}.get(text.get("text-anchor", ""), 0.0)
    return x, y - 10, x + width, y + 3


def check_layout(root: ElementTree.Element) -> None:
    """No text overlaps another or a bar, and nothing sticks out of the picture."""
    width, height = number(root, "width"), number(root, "height")
    boxes = [(*box(text), True) for text in root.iter("text")]
    for bar in root.iter("rect"):
        x, y = number(bar, "x"), number(bar, "y")
        if bar.get("class") not in ("y", "z"):
            boxes.append((x, y, x + number(bar, "width"), y + number(bar, "height"), False))
    boxes.sort(key=lambda b: b[1])
    for i, (left, top, right, bottom, is_text) in enumerate(boxes):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for other in boxes[i + 1 :]:
            if other[1] >= bottom:
                break
            assert other[0] >= right or other[2] <= left or not (is_text or other[4]), (left, top, other)


def test_a_timeline_shows_waiting_and_running_and_marks_the_critical_path(units: Units, clock: Clock) -> None:
    assert coder_sync.timeline_text(good_startup(units, clock)) == picture(
        """
                      0              1m00s           2m00s           3m00s
        * apt-install █████████████████████████████████                                     2m05s completed
          db          █████████                                                               32s completed
          git-clone   ███                                                                     12s completed
          migrate     ░░░░░░░░███                                                            9.0s completed
        * pip-install ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░████████████████████████████████     1m58s completed
        * serve       ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░███    9.0s completed

        4m12s in all; critical path: apt-install 2m05s -> pip-install 1m58s -> serve 9.0s (100% of it)
        """
    )


def test_a_timeline_shows_every_standing(units: Units, clock: Clock) -> None:
    assert coder_sync.timeline_text(broken_startup(units, clock), 60) == picture(
        """
                 0               15s
        * base   ███████████                          10s completed
          cache  ████████████████████████████████     30s running
          data             ██████                    5.0s failed
        * web    ░░░░░░░░░░██████████████████████     20s running
          lint   ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░     30s gave up
          mail             ░░░░░░░                   5.0s skipped
          report           ░░░░░░░                   5.0s skipped
          idle                                          - pending
          slow                   ░░░░░░░░░░░░░░░░     15s waiting

        30s in all (1 failed, 2 skipped, 2 still running, 3 not
        started); critical path: base 10s -> web 20s (100% of it)
        """
    )


def test_a_timeline_makes_do_with_ascii(units: Units, clock: Clock) -> None:
    text = coder_sync.timeline_text(broken_startup(units, clock), 60)
    plain = coder_sync.timeline_text(units.graph(), 60, unicode=False)
    assert plain == text.replace("█", "#").replace("░", ".")


def test_a_timeline_has_a_colour_for_each_outcome_and_the_path_in_bold(units: Units, clock: Clock) -> None:
    graph = broken_startup(units, clock)
    text = coder_sync.timeline_text(graph, 60, colour=True)
    assert re.sub(r"\033\[\d+m", "", text) == coder_sync.timeline_text(graph, 60)
    codes = [re.findall(r"\033\[(\d+)m", line) for line in text.splitlines()[1:10]]
    bold, off = "1", "0"
    assert codes[:4] == [[bold, off, "32", off], ["36", off], ["31", off], [bold, off, "36", off]]
    assert [code[0] for code in codes[4:]] == ["2", "33", "33", "2", "2"]


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [40, 47, 60, 100, 200, 400])
def test_a_timeline_fits_its_width(units: Units, clock: Clock, width: int, unicode: bool) -> None:
    broken_startup(units, clock)
    pending_chain(units, 30)
    units.start('module.workspace.coder_script.startup_unit["health-check-1"]', 1, ["环境准备-安装依赖"])
    units.start("环境准备-安装依赖", 2)
    clock.now += 1
    lines = coder_sync.timeline_text(units.graph(), width, unicode=unicode).splitlines()
    assert max(map(coder_sync.wide, lines)) in range(width - 3, width + 1)


def test_a_timeline_lines_up_long_and_wide_names(units: Units, clock: Clock) -> None:
    for i in (1, 2):
        units.start(f'module.workspace.coder_script.startup_unit["health-check-{i}"]', i)
    units.start("环境准备-安装依赖", 3)
    clock.now += 2
    lines = coder_sync.timeline_text(units.graph(), 100).splitlines()
    assert [line.split(" █")[0] for line in lines[1:4]] == [
        '* module.workspace…health-check-1"]',
        '  module.workspace…health-check-2"]',
        "  环境准备-安装依赖                ",
    ]
    lines = coder_sync.timeline_text(units.graph(), 40, unicode=False).splitlines()
    assert [line.split(" #")[0] for line in lines[1:4]] == ['* modu~1"]', '  modu~2"]', r"  \u73~d56"]
    assert lines[-2:] == ['module.workspace.cod~t["health-check-1"]', "2.0s (100% of it)"]


def test_a_millisecond_is_seen_beside_five_minutes(units: Units, clock: Clock) -> None:
    uneven_startup(units, clock)
    assert coder_sync.timeline_text(units.graph(), 44) == picture(
        """
                0
        * quick █                     1ms completed
        * slow  █████████████████   5m00s completed
        * last                  █     1ms completed

        5m00s in all; critical path: quick 1ms ->
        slow 5m00s -> last 1ms (100% of it)
        """
    )


def test_a_timeline_of_one_unit(units: Units, clock: Clock) -> None:
    units.start("only", 1)
    assert coder_sync.timeline_text(units.graph(), 40) == picture(
        """
               0
        * only █                  0ms running

        0ms in all (1 still running)
        """
    )
    clock.now += 2.5
    units.complete("only")
    assert coder_sync.timeline_text(units.graph(), 40) == picture(
        """
               0
        * only ██████████████    2.5s completed

        2.5s in all; critical path: only 2.5s
        (100% of it)
        """
    )


def test_a_startup_that_is_over_does_not_get_longer(units: Units, clock: Clock) -> None:
    units.want("nobody-starts-it", ["serve"])
    good_startup(units, clock)
    clock.now += 3600
    assert coder_sync.summary(units.graph()).startswith("4m12s in all (1 not started); critical path: apt-install")
    units.start("again", 1, ["never"])
    assert coder_sync.summary(units.graph()).startswith("1h04m in all (2 not started)")


def test_no_picture_breaks_without_units(units: Units) -> None:
    graph = units.graph()
    assert coder_sync.timeline_text(graph) == coder_sync.graph_tree(graph) == "no units yet\n"
    assert [text.text for text in svg_of(graph).findall("text")] == ["no units yet"]
    assert coder_sync.timeline_data(graph)["units"] == coder_sync.timeline_trace(graph)["traceEvents"] == []
    assert coder_sync.graph_data(graph) == {"units": [], "edges": []}
    assert coder_sync.blame_text(graph).endswith("\n\nno units yet\n")
    assert coder_sync.graph_dot(graph).endswith("}\n")
    assert coder_sync.graph_mermaid(graph).startswith("flowchart LR\n")


def test_the_axis_has_round_times() -> None:
    assert coder_sync.ticks(0.004, 5) == [0, 0.001, 0.002, 0.003, 0.004]
    assert coder_sync.ticks(252, 5) == [0, 60, 120, 180, 240]
    assert coder_sync.ticks(86400 * 3, 3) == [0, 86400, 2 * 86400, 3 * 86400]
    assert len(coder_sync.ticks(1e9, 10)) == 2


# -- where the time went ------------------------------------------------------------------------------------


def path_of(graph: Graph) -> list[tuple[str, float]]:
    return [(node.unit_name, round(share, 3)) for node, share in coder_sync.critical_path(graph)]


def test_the_critical_path_goes_back_over_what_released_each_unit(units: Units, clock: Clock) -> None:
    assert path_of(good_startup(units, clock)) == [("apt-install", 125), ("pip-install", 118), ("serve", 9)]


def test_the_critical_path_counts_a_started_dependency_until_it_released_the_next(units: Units, clock: Clock) -> None:
    units.want("serve", ["setup"])
    units.start("app", 1, ["serve"], "start")
    for name in ("setup", "serve"):
        units.start(name, name)
    clock.now += 5
    units.complete("setup")
    clock.now += 10
    assert path_of(units.graph()) == [("setup", 5), ("serve", 10)]  # app runs as well, and started no earlier
    units.complete("serve")
    clock.now += 10
    assert path_of(units.graph()) == [("setup", 5), ("serve", 0), ("app", 20)]


def test_the_critical_path_passes_units_that_found_everything_done(units: Units, clock: Clock) -> None:
    uneven_startup(units, clock)  # in a script that starts each of them after the one before
    assert path_of(units.graph()) == [("quick", 0.001), ("slow", 300), ("last", 0.001)]


def test_the_summary_names_the_longest_steps_of_a_long_path(units: Units, clock: Clock) -> None:
    pending_chain(units, 40)
    for i in reversed(range(40)):
        clock.now += 20 if i in (11, 22, 30) else 10 if i % 5 == 0 else 0.5
        units.complete(f"u{i}")
    text = coder_sync.summary(units.graph())
    assert "critical path: ... -> u35 10s -> ... -> u30 20s -> ..." in text
    assert text.endswith("-> u11 20s -> u10 10s -> ... -> u5 10s -> ... -> u0 10s (100% of it)")


def test_the_summary_says_how_much_the_critical_path_explains(units: Units, clock: Clock) -> None:
    units.want("a", [])
    clock.now += 1  # nobody starts anything
    units.start("a", 1)
    clock.now += 3
    units.complete("a")
    assert coder_sync.summary(units.graph()) == "4.0s in all; critical path: a 3.0s (75% of it)"


def test_blame_orders_by_running_and_by_holding_up_others(units: Units, clock: Clock) -> None:
    text = coder_sync.blame_text(broken_startup(units, clock))
    tables, _, summary = text.rpartition("\n\n")
    assert summary == coder_sync.summary(units.graph()) + "\n"
    assert tables + "\n" == picture(
        """
        by how long they ran:
        UNIT   RAN   OTHERS WAITED  STATUS
        cache  30s   0ms            started
        web    20s   20s            started
        base   10s   10s            completed
        data   5.0s  5.0s           failed

        by how long others waited for them:
        UNIT  RAN   OTHERS WAITED  STATUS
        gone  0ms   30s            not registered
        web   20s   20s            started
        base  10s   10s            completed
        data  5.0s  5.0s           failed
        """
    )


def test_blame_is_not_for_units_that_wait_themselves(units: Units, clock: Clock) -> None:
    pending_chain(units, 3)
    clock.now += 60
    held = coder_sync.blame_text(units.graph()).split("for them:\n")[1].splitlines()
    assert [line.split() for line in held[1:3]] == [["u2", "1m00s", "1m00s", "started"], []]


def test_blame_ends_with_the_dependency(units: Units, clock: Clock) -> None:
    held = coder_sync.blame_text(good_startup(units, clock)).split("for them:\n")[1].splitlines()
    assert [line.split()[:3:2] for line in held[1:5]] == [
        *(["apt-install", "2m05s"], ["pip-install", "1m58s"], ["db", "32s"], ["migrate", "9.0s"])
    ]


def test_blame_shows_the_worst_and_counts_the_rest(units: Units, clock: Clock) -> None:
    for i in range(30):
        units.start(f"u{i}", i)
        clock.now += 1
    text = coder_sync.blame_text(units.graph())
    assert text.splitlines()[2].startswith("u0 ")
    assert text.splitlines()[27] == "and 5 more"


def test_the_timeline_as_json_has_times_since_the_first_sign(units: Units, clock: Clock) -> None:
    clock.now += 100
    data = json.loads(json.dumps(coder_sync.timeline_data(broken_startup(units, clock))))
    by_name = {unit.pop("unit_name"): unit for unit in data["units"]}
    assert list(by_name) == ["base", "cache", "data", "web", "lint", "mail", "report", "idle", "slow"]
    assert by_name["web"] == {
        **{"status": "started", "reason": "", "registered": 0, "waiting": 0, "started": 10, "ended": None},
        **{"released_by": "base", "wants": {"base": "success"}},
    }
    assert by_name["data"]["ended"] == 15
    assert data["seconds"] == 30
    assert data["summary"] == coder_sync.summary(units.graph())
    assert data["critical_path"] == [{"unit_name": "base", "seconds": 10}, {"unit_name": "web", "seconds": 20}]


def test_the_trace_is_what_trace_viewers_read(units: Units, clock: Clock) -> None:
    clock.now += 100
    trace = json.loads(json.dumps(coder_sync.timeline_trace(broken_startup(units, clock))))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    rows = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert list(rows.values()) == [node.unit_name for node in coder_sync.in_order(units.graph())]
    bars = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert all(type(e["ts"]) is type(e["dur"]) is int and e["dur"] >= 0 and e["pid"] == 1 for e in bars)
    assert [(rows[e["tid"]], e["cat"], e["ts"], e["dur"]) for e in bars] == [
        ("base", "running", 0, 10_000_000),
        ("cache", "running", 0, 30_000_000),
        ("data", "running", 10_000_000, 5_000_000),
        ("web", "waiting", 0, 10_000_000),
        ("web", "running", 10_000_000, 20_000_000),
        ("lint", "waiting", 0, 30_000_000),
        ("mail", "waiting", 10_000_000, 5_000_000),
        ("report", "waiting", 10_000_000, 5_000_000),
        ("slow", "waiting", 15_000_000, 15_000_000),
    ]


def test_the_trace_has_what_took_no_time(units: Units) -> None:
    units.start("a", 1)
    units.complete("a")
    event = coder_sync.timeline_trace(units.graph())["traceEvents"][-1]
    assert (event["name"], event["cat"], event["ts"], event["dur"]) == ("a", "running", 0, 0)


# -- the picture as SVG -------------------------------------------------------------------------------------


def test_the_svg_stands_alone(units: Units, clock: Clock) -> None:
    root = svg_of(good_startup(units, clock))
    assert {element.tag for element in root.iter()} == {"svg", "title", "style", "g", "path", "rect", "text"}
    names = {name for element in root.iter() for name in element.keys()}  # noqa: SIM118
    assert names == {"width", "height", "viewBox", "class", "x", "y", "d", "text-anchor"}
    style = root.findtext("style") or ""
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert "@media(prefers-color-scheme:dark){" in style
    used = {word for element in root.iter() for word in element.get("class", "").split()}
    assert used - set(re.findall(r"\.(\w+)", style)) <= {"started"}


def test_the_svg_says_the_sentence_and_all_about_each_unit_on_hover(units: Units, clock: Clock) -> None:
    root = svg_of(broken_startup(units, clock))
    assert root.findtext("text") == coder_sync.summary(units.graph())
    titles = {group.findtext("text"): group.findtext("title") for group in root.findall("g")}
    assert list(titles) == [node.unit_name for node in coder_sync.in_order(units.graph())]
    assert titles["web"] == "web: started\nwaited 10s, last for base\nran 20s\ndepends on base"
    assert titles["data"] == "data: failed (disk full)\nwaited 0ms\nran 5.0s"
    assert titles["mail"] == (
        'mail: skipped (dependency "report" was skipped: dependency "data" failed (disk full))\n'
        "waited 5.0s\ndepends on report, web"
    )


def test_the_svg_has_bars_to_scale_and_marks_the_critical_path(units: Units, clock: Clock) -> None:
    root = svg_of(good_startup(units, clock))
    bars = {g.findtext("text"): {r.get("class"): r for r in g.findall("rect")} for g in root.findall("g")}
    marked = [name for name, kinds in bars.items() if "completed k" in kinds]
    assert marked == ["apt-install", "pip-install", "serve"]
    assert len(root.findall("path[@class='c']")) == 2
    left, whole = number(bars["apt-install"]["completed k"], "x"), 760 / 252
    for name, kind, start, length in (
        ("apt-install", "completed k", 0, 125),
        ("pip-install", "w", 0, 125),
        ("pip-install", "completed k", 125, 118),
        ("migrate", "completed", 32, 9),
    ):
        bar = bars[name][kind]
        assert number(bar, "x") == pytest.approx(left + start * whole, abs=0.1)
        assert number(bar, "width") == pytest.approx(length * whole, abs=0.1)


@pytest.mark.parametrize("play", ["good_startup", "broken_startup", "uneven_startup", "wide_startup", "long_names"])
def test_nothing_in_the_svg_overlaps_or_is_cut_off(units: Units, clock: Clock, play: str) -> None:
    check_layout(svg_of(globals()[play](units, clock)))


def test_the_svg_shows_a_millisecond_beside_five_minutes(units: Units, clock: Clock) -> None:
    root = svg_of(uneven_startup(units, clock))
    bars = [r for r in root.iter("rect") if r.get("class") == "completed k"]
    assert [number(bar, "width") for bar in bars] == [2, 760, 2]
    assert number(bars[2], "x") + 2 == number(bars[1], "x") + 760


def test_the_svg_shows_names_of_sixty_characters_in_full(units: Units, clock: Clock) -> None:
    texts = [text.text for text in svg_of(long_names(units, clock)).iter("text")]
    assert {name for name in (node.unit_name for node in units.graph().nodes) if coder_sync.wide(name) <= 60} <= set(
        texts
    )
    assert "a" * 30 + "…" + "b" * 29 in texts


HOSTILE = "\"q\" 'x' [a] (b) {c} <script>&amp; \\n \\ #35; ; --> | %% `y`"


def test_names_cannot_say_anything_in_svg(units: Units) -> None:
    units.start(HOSTILE, 1, ["</text>"])
    units.start("</text>", 2)
    units.fail("</text>", "]]> <!-- \u2028\ufffe & co")
    root = svg_of(units.graph())
    assert [group.findtext("text") for group in root.findall("g")] == ["</text>", HOSTILE]
    assert (root.findall("g")[0].findtext("title") or "").startswith("</text>: failed (]]> <!-- ")
    assert all(c.isprintable() or c in "\n\ufffd" for c in coder_sync.xml("\x00\x1b\ud800\uffff\n<"))


# -- the graph ----------------------------------------------------------------------------------------------


def test_a_tree_shows_what_is_shared_once_and_refers_to_it(units: Units, clock: Clock) -> None:
    assert coder_sync.graph_tree(broken_startup(units, clock)) == picture(
        """
        lint (pending)
        └── gone (not registered)
        cache (started)
        └── base (completed)
        mail (skipped: dependency "report" was skipped: dependency "data" failed (disk full))
        ├── report (skipped: dependency "data" failed (disk full))
        │   └── data (failed: disk full)
        └── web (started)
            └── base (completed)
        slow (pending)
        └── web (see above)
        idle (pending)
        └── web (see above)
        """
    )


def test_a_tree_makes_do_with_ascii(units: Units) -> None:
    units.want("a", ["b", "c"])
    units.want("b", ["d"])
    assert coder_sync.graph_tree(units.graph(), unicode=False) == picture(
        """
        a (pending)
        |-- b (pending)
        |   `-- d (not registered)
        `-- c (not registered)
        """
    )


def test_a_deep_tree_ends_with_where_to_go_on(units: Units) -> None:
    graph = pending_chain(units, 5000)
    lines = coder_sync.graph_tree(graph).splitlines()
    assert len(lines) == 41
    assert lines[-1].strip() == "└── u40 (pending); `graph u40` shows what is below"
    assert coder_sync.graph_tree(coder_sync.part(graph, ["u4999"]), ["u4999"]) == "u4999 (started)\n"


def test_a_graph_of_layers_is_a_tree_of_bounded_size(units: Units) -> None:
    for layer in range(12):
        for i in range(12):
            units.want(f"{layer}.{i}", [f"{layer + 1}.{j}" for j in range(12)])
    assert len(coder_sync.graph_tree(units.graph()).splitlines()) == 12 + 12 * 12 * 12  # not 12 ** 12


def test_part_of_a_graph_is_what_some_units_depend_on(units: Units, clock: Clock) -> None:
    graph = broken_startup(units, clock)
    assert {n.unit_name for n in coder_sync.part(graph, ["mail"]).nodes} == {"mail", "report", "data", "web", "base"}
    assert {n.unit_name for n in coder_sync.part(graph, ["lint", "cache"]).nodes} == {"lint", "gone", "cache", "base"}
    assert coder_sync.part(graph, []) == graph
    with pytest.raises(coder_sync.NotRegistered, match='no unit "nix"'):
        coder_sync.part(graph, ["mail", "nix"])


def test_the_graph_as_json(units: Units) -> None:
    units.want("a", ["b"], "start")
    assert coder_sync.graph_data(units.graph()) == {
        "units": [
            {"unit_name": "b", "status": "not registered", "reason": ""},
            {"unit_name": "a", "status": "pending", "reason": ""},
        ],
        "edges": [{"unit_name": "a", "depends_on": "b", "requirement": "start"}],
    }


def test_names_cannot_say_anything_in_dot(units: Units) -> None:
    units.want(HOSTILE, ["plain"], "completion")
    text = coder_sync.graph_dot(units.graph())
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert [re.sub(r"\\(.)", r"\1", s) for s in strings] == [
        *("plain", "not registered", HOSTILE, "pending", HOSTILE, "plain", "completion")
    ]
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "ID", text)
    assert bare == picture(
        """
        digraph startup {
          rankdir=LR; node [shape=box, style=filled, fillcolor=white];
          ID [style=dashed, fillcolor=white, tooltip=ID];
          ID [style=filled, fillcolor=white, tooltip=ID];
          ID -> ID [label=ID];
        }
        """
    )


def test_names_cannot_say_anything_in_mermaid(units: Units) -> None:
    units.want(HOSTILE, ["环境"], "start")
    lines = coder_sync.graph_mermaid(units.graph()).splitlines()
    assert lines[1] == '  u0["环境"]:::not_registered'
    label = lines[2][len('  u1["') : -len('"]:::pending')]
    assert not re.sub(r"#\d+;", "", label).strip("abcdefghijklmnopqrstuvwxyz0123456789 -")
    assert re.sub(r"#(\d+);", lambda code: chr(int(code[1])), label) == HOSTILE
    assert lines[3] == "  u1 -->|start| u0"


def test_no_name_with_a_newline_gets_into_a_picture(agent: World) -> None:
    for method, params in (
        ("want", {"unit": "a\nb", "dependencies": []}),
        ("want", {"unit": "a", "dependencies": ["b\n"]}),
    ):
        assert "cannot be printed" in agent.connect().call(method, **params)["error"]["message"]
    assert agent.client.graph().nodes == []


# -- why ----------------------------------------------------------------------------------------------------


def test_why_a_unit_started_when_it_did(units: Units, clock: Clock) -> None:
    graph = broken_startup(units, clock)
    assert whys(graph, "cache") == ['"cache" started 30s ago, at once; it is still running.']
    assert whys(graph, "web") == [
        '"web" started 20s ago by bash web.sh (pid 42), after waiting 10s, last for base; it is still running.'
    ]


def test_why_a_unit_ended_as_it_did(units: Units, clock: Clock) -> None:
    graph = broken_startup(units, clock)
    assert whys(graph, "base") == [
        '"base" completed 20s ago after running 10s; started by bash base.sh (pid 7) at once.'
    ]
    assert whys(graph, "data") == ['"data" failed 15s ago after running 5.0s: disk full; started at once.']
    units.complete("idle")
    assert whys(units.graph(), "idle") == ['"idle" completed 0ms ago without having started.']


def test_why_a_unit_waits_for_one_that_runs(units: Units, clock: Clock) -> None:
    assert whys(broken_startup(units, clock), "slow") == [
        '"slow" has not started: for 15s it has been waiting for "web".',
        '"web" started 20s ago by bash web.sh (pid 42), after waiting 10s, last for base; it is still running.',
    ]


def test_why_a_unit_waits_for_a_process_that_is_gone(units: Units, clock: Clock) -> None:
    units.start("b", 1, ["a"])
    units.start("a", 2, owner=Owner(42, "bash a.sh", False))
    assert whys(units.graph(), "b")[1] == (
        '"a" started 0ms ago by bash a.sh (pid 42), at once; that process is gone: it ended without complete.'
    )


def test_why_a_unit_waits_for_a_misspelt_name(units: Units, clock: Clock) -> None:
    units.want("b-setup", [])
    units.start("a", 1, ["b_setup", "zzz"])
    clock.now += 185
    assert whys(units.graph(), "a") == [
        '"a" has not started: for 3m05s it has been waiting for "b_setup", "zzz".',
        '"b_setup" is not registered: nobody has called want, start or run on it; did you mean "b-setup"?',
        '"zzz" is not registered: nobody has called want, start or run on it.',
    ]


def test_why_a_unit_waits_for_one_that_nobody_starts(units: Units, clock: Clock) -> None:
    units.start("a", 1, ["b"], "start")
    units.want("b", [])
    assert whys(units.graph(), "a") == [
        '"a" has not started: for 0ms it has been waiting for "b" (start).',
        '"b" has not started: nobody has called start on it; it is ready.',
    ]


def test_why_goes_down_a_chain_to_its_end(units: Units, clock: Clock) -> None:
    pending_chain(units, 5000)
    clock.now += 60
    lines = whys(units.graph(), "u0")
    assert lines[:2] == [f'"u{i}" has not started: for 1m00s it has been waiting for "u{i + 1}".' for i in range(2)]
    assert lines[8:] == ["(4991 more like these)", '"u4999" started 1m00s ago, at once; it is still running.']


def test_why_names_each_unit_once_and_not_too_many(units: Units, clock: Clock) -> None:
    units.start("a", 1, [f"b{i}" for i in range(30)])
    for i in range(30):
        units.want(f"b{i}", [f"c{j}" for j in range(30)])
    lines = whys(units.graph(), "a")
    assert len(lines) == 8 + 1 + 20 + 1
    assert lines[0].endswith('"b19" and 10 more.')
    assert lines[-1] == "(10 more like these)"


def test_why_a_unit_was_skipped_down_to_the_root_cause(units: Units, clock: Clock) -> None:
    assert whys(broken_startup(units, clock), "mail") == [
        '"mail" was skipped 15s ago because of "report".',  # and not because of "web", which it wants as well
        '"report" was skipped 15s ago because of "data".',
        '"data" failed 15s ago after running 5.0s: disk full; started at once.',
    ]


def test_why_a_unit_was_skipped_is_told_after_its_cause_has_gone(units: Units, clock: Clock) -> None:
    units.want("b", ["a"])
    units.start("a", 1)
    units.fail("a")
    units.start("a", 2)  # another try
    assert whys(units.graph(), "b") == ['"b" was skipped 0ms ago: dependency "a" failed.']


def test_why_a_unit_gave_up(units: Units, clock: Clock) -> None:
    graph = broken_startup(units, clock)
    assert whys(graph, "lint") == [
        '"lint" has not started: its start gave up, and nobody has called start again; '
        'it would have to wait for "gone".',
        '"gone" is not registered: nobody has called want, start or run on it.',
    ]


def test_why_a_name_is_not_registered(units: Units, clock: Clock) -> None:
    graph = broken_startup(units, clock)
    assert whys(graph, "gone") == [
        '"gone" is not registered: nobody has called want, start or run on it.',
        "It is wanted by lint.",
    ]
    assert whys(graph, "catche") == [
        '"catche" is not registered: nobody has called want, start or run on it; did you mean "cache"?'
    ]


def test_why_a_ready_unit_waits_for_a_place(units: Units) -> None:
    pool = coder_sync.Pool(1)
    units.start("a", 1, pool=pool)
    units.start("b", 2, pool=pool)
    assert whys(units.graph(), "b") == [
        '"b" has not started: for 0ms it has been waiting for a place among those that may run at once.'
    ]


# -- pictures of a real agent -------------------------------------------------------------------------------


class Screen:
    """A command on a terminal of 80 columns, and what it has written there."""

    def __init__(self, world: World, *argv: str, rows: int = 24, **env: str) -> None:
        self.fd, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, 80, 0, 0))
        env = {**world.env, "LC_ALL": "C.UTF-8", **env}
        self.process = world.popen(*argv, stdin=terminal, stdout=terminal, stderr=terminal, env=env)
        os.close(terminal)
        self.data = b""

    def until(self, text: str) -> str:
        """Read until `text` has been written ("": until the end); return all up to there, and forget it."""
        while not text or text.encode() not in self.data:
            assert select.select([self.fd], [], [], PATIENCE)[0], self.data
            try:
                self.data += os.read(self.fd, 65536)
            except OSError:  # the other end is closed
                assert not text, self.data
                os.close(self.fd)
                return self.data.decode()
        got, _, self.data = self.data.partition(text.encode())
        return (got + text.encode()).decode()


def follower(world: World, *argv: str) -> subprocess.Popen[str]:
    """Start a command that follows events; return when it has shown one."""
    process = world.popen(*argv)
    assert process.stdout
    out, names = process.stdout, map("probe-{}".format, itertools.count())
    until(lambda: world.client.want(next(names)) or select.select([out], [], [], 0.02)[0], "an event")
    return process


def lines_until(process: subprocess.Popen[str], end: str) -> list[str]:
    """The lines that a process prints, to the one that ends so."""
    lines: list[str] = []
    while not (lines and lines[-1].endswith(end)):
        line = process.stdout.readline() if process.stdout else ""
        assert line, lines
        lines.append(line.rstrip("\n"))
    return lines


def a_little(agent: World) -> None:
    """A startup: one is done, one runs, one waits."""
    agent.ok("want", "b", "a", "-q")
    agent.client.start("a")
    agent.client.complete("a")
    agent.client.start("b")
    agent.popen("start", "c", "--want", "b")
    agent.waiting("c")


def test_events_are_a_json_object_a_line(agent: World) -> None:
    a_little(agent)
    events = [json.loads(line) for line in agent.ok("events").splitlines()]
    assert [(e["seq"], e["unit"], e["kind"], e["detail"]) for e in events] == [
        (1, "b", "registered", ""),
        (2, "b", "wants", "a"),
        (3, "a", "registered", ""),
        (4, "a", "started", ""),
        (5, "a", "completed", ""),
        (6, "b", "started", ""),
        (7, "c", "registered", ""),
        (8, "c", "wants", "b"),
        (9, "c", "waiting", "b"),
    ]
    times = [e["time"] for e in events]
    assert times == sorted(times)
    assert abs(events[-1]["wall"] - time.time()) < PATIENCE


def test_events_are_followed_until_the_agent_ends(world: World) -> None:
    agent = world.serve()
    world.client.want("a")
    process = world.popen("events", "--follow")
    assert json.loads(lines_until(process, "}")[0])["kind"] == "registered"
    world.client.start("a")
    assert json.loads(lines_until(process, "}")[0])["kind"] == "started"
    agent.terminate()
    done = finish(process)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [("events", "--follow"), ("timeline", "--watch")])
def test_a_follower_ends_when_nobody_reads_it(agent: World, argv: tuple[str, ...]) -> None:
    process = follower(agent, *argv)
    assert process.stdout
    process.stdout.close()
    agent.client.want("one-more")
    assert process.wait(PATIENCE) == 0
    process.stdout = None
    assert finish(process).stderr == ""


def test_the_client_iterates_over_events(agent: World) -> None:
    client = agent.client
    client.want("b", "a")
    assert [(e.seq, e.unit, e.kind) for e in client.events()] == [(1, "b", "registered"), (2, "b", "wants")]
    assert [e.seq for e in client.events(since=1)] == [2]
    following = client.events(follow=True, since=2)
    client.start("a")
    assert [(e.seq, e.kind) for e in itertools.islice(following, 2)] == [(3, "registered"), (4, "started")]
    client.complete("a")
    assert next(following).kind == "completed"


def test_what_happens_while_a_follower_is_told_the_history_comes_after_it(agent: World) -> None:
    for i in range(40):
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


def test_a_watcher_that_does_not_read_is_dropped_and_costs_nobody_anything(agent: World) -> None:
    deaf, reader = agent.connect(), agent.connect()
    for peer in (deaf, reader):
        peer.call("events", follow=True)
    hung_up = select.poll()
    hung_up.register(deaf.sock, select.POLLHUP)
    seen = 0
    for i in itertools.count():
        began = time.monotonic()
        agent.client.want(f"{i}-".ljust(250, "x"), *(f"{i}-{j}-".ljust(250, "y") for j in range(150)))
        assert time.monotonic() - began < PATIENCE / 10
        for seq in range(seen + 1, seen + 152):
            assert reader.read()["params"]["seq"] == seq
        seen += 151
        if hung_up.poll(0):
            break
    assert seen < 20_000


def test_watching_prints_a_line_an_event_where_there_is_no_terminal(agent: World) -> None:
    process = follower(agent, "timeline", "--watch")
    agent.client.start("a")
    agent.client.fail("a", "disk full")
    lines = lines_until(process, "disk full")
    assert re.fullmatch(r"\+0ms probe-\d+ registered", lines[0])
    assert [re.sub(r"^\+[\d.]+m?s ", "", line) for line in lines[-3:]] == [
        *("a registered", "a started", "a failed: disk full")
    ]


def test_watching_draws_after_each_event_and_gives_the_terminal_back(agent: World) -> None:
    a_little(agent)
    screen = Screen(agent, "timeline", "--watch")
    screen.until("\033[?1049h\033[?25l\033[H")  # the other screen, no cursor, top left
    assert "waiting" in screen.until("\033[J")
    agent.client.complete("b")
    until(lambda: "c\033[0m" in (frame := screen.until("\033[J")) and "waiting" not in frame, "a new picture")
    os.kill(screen.process.pid, signal.SIGINT)
    screen.until("\033[?25h\033[?1049l")
    assert "critical path:" in screen.until("")  # the last picture stays
    assert screen.process.wait(PATIENCE) == 130


@pytest.mark.parametrize("ends", ["the watcher", "the agent"])
def test_watching_gives_the_terminal_back_however_it_ends(world: World, ends: str) -> None:
    agent = world.serve()
    screen = Screen(world, "timeline", "--watch")
    screen.until("no units yet")
    (agent if ends == "the agent" else screen.process).terminate()
    screen.until("\033[?25h\033[?1049l")
    rest = screen.until("")
    assert screen.process.wait(PATIENCE) == {"the watcher": 143, "the agent": 3}[ends]
    assert rest.startswith("no units yet") and ("error: " in rest) == (ends == "the agent")


def test_watching_fits_the_terminal_and_shows_the_end_of_a_long_picture(agent: World) -> None:
    for i in range(50):
        agent.client.start(f"unit-{i}-" + "x" * 40)
    screen = Screen(agent, "timeline", "--watch", rows=10)
    screen.until("\033[H")
    lines = re.sub(r"\033\[\d*\w", "", screen.until("\033[J")).split("\r\n")
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[0] == "0"
    assert "unit-49-" in "".join(lines) and "(50 still running)" in "".join(lines)


def test_colours_are_for_terminals_and_not_under_no_color(agent: World) -> None:
    a_little(agent)
    assert "\033[" not in agent.ok("timeline")
    assert "\033[32m" in Screen(agent, "timeline").until("")
    assert "\033[" not in Screen(agent, "timeline", NO_COLOR="1").until("")


def test_pictures_are_plain_where_the_locale_is_not_utf8(agent: World) -> None:
    a_little(agent)
    for argv in (("timeline",), ("graph",)):
        assert not agent.ok(*argv, env={**agent.env, "LC_ALL": "C.UTF-8"}).isascii()
        assert agent.ok(*argv, env={**agent.env, "LC_ALL": "C"}).isascii()


def test_the_width_is_that_of_the_terminal_or_of_columns(agent: World) -> None:
    a_little(agent)
    for columns, width in (("60", 60), ("9", 40), ("\u00b2", 100), ("", 100)):
        text = agent.ok("timeline", env={**agent.env, "COLUMNS": columns})
        assert max(map(len, text.splitlines())) in range(width - 3, width + 1)
    lines = Screen(agent, "timeline", NO_COLOR="1").until("").splitlines()
    assert max(map(len, lines)) in range(77, 81)


def test_every_form_of_a_picture_while_units_run(agent: World) -> None:
    a_little(agent)
    text = agent.ok("timeline", env={**agent.env, "LC_ALL": "C.UTF-8"})
    rows = [re.sub("[\u2588\u2591 ]+[\\d.]+m?s", "", line) for line in text.splitlines()[1:4]]
    assert rows == ["* a completed", "* b running", "  c waiting"]
    assert ElementTree.fromstring(agent.ok("timeline", "-o", "svg")).tag.endswith("svg")
    assert [u["unit_name"] for u in json.loads(agent.ok("timeline", "-o", "json"))["units"]] == ["a", "b", "c"]
    assert json.loads(agent.ok("timeline", "-o", "trace"))["traceEvents"]
    assert agent.ok("timeline", "--blame").startswith("by how long they ran:\n")
    assert agent.ok("graph", env={**agent.env, "LC_ALL": "C"}) == (
        "c (pending)\n`-- b (started)\n    `-- a (completed)\n"
    )
    assert agent.ok("graph", "b", "-o", "dot").count("->") == 1
    assert agent.ok("graph", "c", "-o", "mermaid").count("-->") == 2
    assert len(json.loads(agent.ok("graph", "a", "-o", "json"))["units"]) == 1
    assert "nobody" in agent.run("graph", "nobody").stderr


def test_why_names_the_process_and_says_whether_it_runs(agent: World) -> None:
    process = agent.spawn(["sh", "-c", f"{sys.executable} -IS {FILE} start a && echo ready && exec sleep 60"])
    lines_until(process, "ready")
    agent.popen("start", "b", "--want", "a")
    agent.waiting("b")
    waits, runs = agent.ok("why", "b").splitlines()
    assert re.fullmatch(r'"b" has not started: for \S+ it has been waiting for "a"\.', waits)
    assert re.fullmatch(rf'"a" started \S+ ago by sh .* \(pid {process.pid}\), at once; it is still running\.', runs)
    process.kill()
    process.wait()
    assert agent.ok("why", "b").endswith("that process is gone: it ended without complete.\n")
    assert agent.ok("why", "nobody") == '"nobody" is not registered: nobody has called want, start or run on it.\n'


def test_status_shows_the_history_of_a_unit(agent: World) -> None:
    a_little(agent)
    agent.client.complete("b")
    until(lambda: agent.status("c") == "started", "c started")
    table = agent.ok("status", "c").split("\n\n")[-1]
    assert [line.split()[1:] for line in table.splitlines()] == [
        ["EVENT", "DETAIL"],
        ["registered"],
        ["wants", "b"],
        ["waiting", "b"],
        ["started"],
    ]
    assert re.fullmatch(r"\+[\d.]+m?s", table.splitlines()[-1].split()[0])


@pytest.mark.parametrize(("ending", "end"), [("svg", signal.SIGTERM), ("json", signal.SIGINT), ("txt", signal.SIGTERM)])
def test_the_agent_leaves_a_timeline_behind(world: World, ending: str, end: int) -> None:
    path = world.directory / f"startup.{ending}"
    agent = world.serve("--timeline", str(path))
    world.client.start("a")
    agent.send_signal(end)
    assert agent.wait(PATIENCE) == 0
    text = path.read_text(encoding="utf-8")
    if ending == "svg":
        assert ElementTree.fromstring(text).tag.endswith("svg")
    elif ending == "json":
        assert json.loads(text)["units"][0]["status"] == "started"
    else:
        assert text.splitlines()[1].startswith("* a ")


def test_the_agent_of_a_command_leaves_a_timeline_behind(world: World) -> None:
    script = f"{sys.executable} -IS {FILE} run a -- sh -c 'exit 3'"
    done = world.run("serve", "--timeline", "t.txt", "--", "sh", "-c", script)
    assert done.returncode == 3
    assert "failed" in (world.directory / "t.txt").read_text(encoding="utf-8")


def test_a_timeline_of_unknown_form_is_refused_at_once(world: World) -> None:
    done = world.run("serve", "--timeline", "startup.png", "--", "touch", "ran")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert ".svg, .json or .txt" in done.stderr
    assert not (world.directory / "ran").exists()


def test_a_timeline_that_cannot_be_written_is_a_warning(world: World) -> None:
    done = world.run("serve", "--timeline", "no/such/dir.svg", "--", "true")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: cannot write the timeline to ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", ["timeline", "events", "status a"])
def test_pictures_do_not_mind_a_closed_standard_output(agent: World, argv: str) -> None:
    agent.client.start("a")
    command = f"{sys.executable} -IS {FILE} {argv}"
    done = finish(agent.spawn(["sh", "-c", f"{command} >&-"]))
    assert (done.returncode, done.stderr) == (0, "")
    if os.path.exists("/dev/full"):
        done = finish(agent.spawn(["sh", "-c", f"{command} >/dev/full"]))
        assert (done.returncode, done.stderr) == (
            1,
            "error: cannot write to standard output: No space left on device\n",
        )


# ---------------------------------------------------------------------------------------------------------
# Boot: helpers. Directories of scripts; a fifo at which scripts stop until the test lets them go on.
# ---------------------------------------------------------------------------------------------------------


def startup(world: World, files: dict[str, str], name: str = "startup.d") -> str:
    """Write executable files, for sh where they do not say otherwise, and return their directory.

    A script calls us as $SYNC, and its working directory is the world's.
    """
    world.env["SYNC"] = f"{sys.executable} -IS {FILE}"
    directory = world.directory / name
    directory.mkdir(exist_ok=True)
    for file, text in files.items():
        (directory / file).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (directory / file).chmod(0o755)
    return str(directory)


def booting(world: World, files: dict[str, str], *options: str, **popen: Any) -> subprocess.Popen[str]:
    return world.popen("boot", startup(world, files), *options, **popen)


def booted(world: World, files: dict[str, str], *options: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    return finish(booting(world, files, *options, **popen))


def boots(world: World, files: dict[str, str], *options: str, **popen: Any) -> str:
    """Boot what must succeed; return what was printed."""
    done = booted(world, files, *options, **popen)
    assert done.returncode == 0, done
    return done.stdout


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

    def keep_open(self, process: subprocess.Popen[str]) -> None:
        """Let everybody through who comes, until a process ends."""

        def ended() -> bool:
            with contextlib.suppress(OSError):
                os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
            return process.poll() is not None

        until(ended, f"the end of {process.args!r}")


def session(process: subprocess.Popen[str]) -> list[int]:
    """What still runs of all that a process started: the members of its session, but itself."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = file.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == process.pid and state != "Z" and int(file.parent.name) != process.pid:
                found.append(int(file.parent.name))
    return found


def end_session(process: subprocess.Popen[str]) -> None:
    """Kill what a process left behind on purpose."""
    for pid in session(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def hear(stream: Any, text: str) -> None:
    """Read a pipe until a line with this text has come; what follows it is left there."""
    heard, deadline = b"", time.monotonic() + PATIENCE
    while text.encode() not in heard.rpartition(b"\n")[0].rpartition(b"\n")[2]:
        assert select.select([stream], [], [], deadline - time.monotonic())[0], f"never heard {text!r}: {heard!r}"
        byte = os.read(stream.fileno(), 1)
        assert byte, f"never said {text!r}: {heard!r}"
        heard += byte


def peak_memory(pid: int) -> float:
    """The most memory that a process has had, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


def most_at_once(timeline: Path) -> int:
    """How many units ran at the same time at most."""
    rows = json.loads(timeline.read_text())["units"]
    ends = [(row["ended"], -1) for row in rows] + [(row["started"], 1) for row in rows]
    return max(itertools.accumulate(step for _, step in sorted(ends)))


def mistakes_of(world: World, files: dict[str, str]) -> list[str]:
    """What the check says about a directory, without its path."""
    path = startup(world, files)
    try:
        coder_sync.plan([path])
    except coder_sync.UsageError as error:
        return str(error).replace(path + "/", "").splitlines()
    return []


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc here")


# ---------------------------------------------------------------------------------------------------------
# Pool: a start that takes one of so many places.
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> coder_sync.Pool:
    return coder_sync.Pool(2)


def running(units: Units) -> list[str]:
    return [unit.name for unit in units.units.values() if unit.status == "started"]


def test_a_pool_starts_as_many_as_it_has_places_and_the_next_as_one_ends(units: Units, pool: coder_sync.Pool) -> None:
    assert [units.start(name, name, pool=pool) for name in "abcd"] == [False, False, True, True]
    assert list(answers(units)) == ["a", "b"]
    units.complete("b")
    assert list(answers(units)) == ["c"] and running(units) == ["a", "c"]
    units.fail("a")
    assert list(answers(units)) == ["d"]


def test_a_place_is_taken_in_the_order_of_becoming_ready(units: Units) -> None:
    pool = coder_sync.Pool(1)
    units.start("first", "first", pool=pool)
    units.want("late", ["outside"])
    for name in ("late", "early"):
        units.start(name, name, pool=pool)
    units.want("outside", [])
    units.complete("outside")
    assert list(answers(units)) == ["first"]
    units.complete("first")
    assert list(answers(units)) == ["early"]
    units.complete("early")
    assert list(answers(units)) == ["late"]


def test_a_dependent_takes_the_place_that_its_dependency_leaves(units: Units) -> None:
    pool = coder_sync.Pool(1)
    units.want("b", ["a"])
    for name in "ba":
        units.start(name, name, pool=pool)
    assert list(answers(units)) == ["a"]
    units.complete("a")
    assert list(answers(units)) == ["b"]
    assert units.units["b"].released_by == "a"


def test_a_start_outside_the_pool_takes_no_place(units: Units) -> None:
    pool = coder_sync.Pool(1)
    units.start("a", "a", pool=pool)
    assert not units.start("x", "x")
    units.complete("x")
    assert units.start("b", "b", pool=pool)


def test_each_pool_has_its_own_places(units: Units) -> None:
    one, other = coder_sync.Pool(1), coder_sync.Pool(1)
    assert [units.start(n, n, pool=p) for n, p in (("a", one), ("b", other), ("c", one))] == [False, False, True]
    units.complete("b")
    assert running(units) == ["a"]


@pytest.mark.parametrize("how", ["complete", "fail", "cancel", "want"])
def test_who_goes_away_while_it_waits_for_a_place_leaves_it_to_the_next(units: Units, how: str) -> None:
    pool = coder_sync.Pool(1)
    for name in "abc":
        units.start(name, name, pool=pool)
    if how == "cancel":
        units.cancel("b")
    elif how == "want":
        units.want("b", ["something more"])
    else:
        getattr(units, how)("b")
    units.complete("a")
    assert running(units) == ["c"]


@pytest.mark.parametrize("how", ["lose", "revoke"])
def test_a_start_that_is_undone_gives_its_place_back(units: Units, how: str) -> None:
    pool, ticket = coder_sync.Pool(1), object()
    units.start("a", ticket, pool=pool)
    units.start("b", "b", pool=pool)
    getattr(units, how)("a", ticket)
    assert running(units) == ["b"] and pool.running == 1


def test_a_pool_is_never_too_full_nor_idle_while_somebody_is_ready(units: Units) -> None:
    rng = random.Random(5)
    for round_ in range(60):
        pool, names = coder_sync.Pool(rng.randint(1, 4)), [f"{round_}-{i}" for i in range(12)]
        for i, name in enumerate(names):
            units.want(name, rng.sample(names[:i], min(i, rng.randint(0, 2))), rng.choice(["success", "completion"]))
        for name in rng.sample(names, 12):
            units.start(name, name, pool=pool)
        while any(units.units[name].status in ("pending", "started") for name in names):
            here = [units.units[name] for name in names]
            busy = [u for u in here if u.status == "started"]
            ready = [u for u in here if u.status == "pending" and not u.unmet and u.starts]
            assert len(busy) == pool.running <= pool.limit
            assert not ready or len(busy) == pool.limit
            rng.choice([units.complete, units.complete, units.fail])(rng.choice([*busy, *ready[:1]]).name)


@pytest.mark.parametrize(("alive", "again"), [(True, False), (None, True), (False, True)])
def test_what_a_pools_living_owner_has_completed_is_not_started_again_in_another(
    clock: Clock, alive: bool | None, again: bool
) -> None:
    units = Units(clock, clock, lambda owner: alive)
    units.start("a", 1, owner=coder_sync.Owner(1, "boot"), pool=coder_sync.Pool(1))
    units.complete("a")
    assert not units.start("a", 2, pool=coder_sync.Pool(1))
    assert running(units) == (["a"] if again else [])
    assert answers(units)[2] == {"dependencies": [] if again else ["a"]}
    units.complete("a")
    assert not units.start("a", 3)  # a plain start is a re-run in any case
    assert running(units) == ["a"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", ["complete", "fail"])
def test_a_start_in_a_pool_waits_for_the_end_of_what_another_has_started(units: Units, how: str, before: bool) -> None:
    units.want("a", ["dep"])
    units.want("dep", [])
    tickets = ["winner", "loser"]
    for ticket in tickets if before else tickets[:1]:
        units.start("a", ticket, pool=coder_sync.Pool(1))
    units.complete("dep")
    if not before:
        assert units.start("a", "loser", pool=coder_sync.Pool(1))
    assert answers(units) == {"winner": {"dependencies": ["dep"]}}
    getattr(units, how)("a")
    answer = answers(units)["loser"]
    assert answer == {"dependencies": ["a"]} if how == "complete" else 'dependency "a" failed' in str(answer)
    assert units.cancel("loser") is None


# ---------------------------------------------------------------------------------------------------------
# Boot: names and headers, and the check before anything runs.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "unit"),
    [
        ("clone", "clone"),
        ("10-clone.sh", "clone"),
        ("10_clone.sh", "clone"),
        ("007-a-b_c.tar.py", "a-b_c.tar"),
        ("10clone.sh", "10clone"),
        ("10", "10"),
        ("clone-10.sh", "clone-10"),
        ("10-Klone repo's \u00e9.sh", "Klone repo's \u00e9"),
    ],
)
def test_a_unit_is_named_after_its_file(world: World, file: str, unit: str) -> None:
    assert [s.unit for s in coder_sync.plan([startup(world, {file: ""})])] == [unit]


@pytest.mark.parametrize("mark", ["#", "//", "--", ";", "  #", "#  "])
def test_a_header_stands_in_the_scripts_own_comment_syntax(world: World, mark: str) -> None:
    header = "\n".join(f"{mark} coder-sync: {words}" for words in ("unit b", "want a c", "timeout 1m30s", "extern a c"))
    (script,) = coder_sync.plan([startup(world, {"x.sh": header})])
    assert (script.unit, script.wants, script.timeout) == ("b", [("a", "success", 3), ("c", "success", 3)], 90.0)


@pytest.mark.parametrize(
    "words",
    ["want 'a b' --requires completion", 'want --requires completion "a b"', "want a\\ b --requires 'completion'"],
)
def test_header_words_may_be_quoted_as_in_a_shell(world: World, words: str) -> None:
    files = {"a b": "", "x": f'# coder-sync: {words}\n# coder-sync: unit "it\'s mine"'}
    script = coder_sync.plan([startup(world, files)])[1]
    assert (script.unit, script.wants) == ("it's mine", [("a b", "completion", 2)])


def test_only_comments_in_the_first_50_lines_are_headers(world: World) -> None:
    lines = ["echo coder-sync: want b", "x # coder-sync: want c", "# see coder-sync: want d", "* coder-sync: want e"]
    lines += [":"] * (48 - len(lines)) + ["# coder-sync: want yes", "# coder-sync: want too-late"]
    (script, _) = coder_sync.plan([startup(world, {"x": "\n".join(lines), "yes": ""})])
    assert script.wants == [("yes", "success", 50)]


def test_windows_line_ends_in_headers_do_no_harm(world: World) -> None:
    (script,) = coder_sync.plan(
        [startup(world, {"x": "#!/bin/sh\n# coder-sync: unit y\r\n# coder-sync: timeout 1s\r\n"})]
    )
    assert (script.unit, script.timeout) == ("y", 1.0)


def test_hidden_files_backups_directories_and_what_is_not_executable_are_left_out(world: World) -> None:
    names = [".hidden", "a~", "a.bak", "a.dpkg-old", "#a#", "b"]
    path = Path(startup(world, dict.fromkeys(names, "")))
    (path / "README.txt").write_text("about these scripts")
    (path / "c.d").mkdir()
    (path / "gone").symlink_to("nowhere")
    os.mkfifo(path / "pipe")
    assert [s.unit for s in coder_sync.plan([str(path)])] == ["b"]


def test_paths_may_be_files_and_directories(world: World) -> None:
    one, other = startup(world, {"a": "", "b": ""}, "one"), startup(world, {"c": "# coder-sync: want a"}, "other")
    assert [s.unit for s in coder_sync.plan([f"{one}/a", other])] == ["a", "c"]


def test_a_program_needs_no_interpreter_line(world: World) -> None:
    path = startup(world, {})
    shutil.copy("/bin/true", path + "/10-true")
    assert [s.unit for s in coder_sync.plan([path])] == ["true"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (
            "# coder-sync: wants a",
            '"wants a" is not a header; use unit NAME, want DEP..., timeout DURATION, extern NAME',
        ),
        ("# coder-sync:", '"" is not a header; use unit NAME, want DEP..., timeout DURATION, extern NAME'),
        (
            "# coder-sync: unit a b",
            '"unit a b" is not a header; use unit NAME, want DEP..., timeout DURATION, extern NAME',
        ),
        ("# coder-sync: want", "want: a name is missing"),
        ("# coder-sync: extern", "extern: a name is missing"),
        ("# coder-sync: want --requires completion", "want: a name is missing"),
        ("# coder-sync: want a --requires", 'no such requirement: ""; use one of success, completion, start'),
        ("# coder-sync: want a --requires done", 'no such requirement: "done"; use one of success, completion, start'),
        (
            "# coder-sync: timeout soon",
            "invalid duration 'soon': write 30 or 30s, 10m, 1h30m, 500ms, 1.5h; 0 for no limit",
        ),
        ("# coder-sync: want 'a", "No closing quotation"),
        ("# coder-sync: unit ''", "a unit name must not be empty; was a variable unset?"),
        ("# coder-sync: unit a\u200bb", "unit name 'a\\u200bb' has a character that cannot be printed"),
        ("# coder-sync: want clon", 'no file provides "clon"; did you mean "clone"?'),
        ("# coder-sync: want mars", 'no file provides "mars"; if it comes from outside, add: extern mars'),
        ("# coder-sync: want x", "cycle detected: x -> x; a unit cannot depend on itself (x -> x)"),
        ("# coder-sync: unit clone", 'unit "clone" is clone:1 already'),
    ],
)
def test_a_mistake_in_a_header_is_told_with_file_and_line(world: World, text: str, mistake: str) -> None:
    assert mistakes_of(world, {"clone": "", "x": f":\n{text}\n:"}) == [f"x:3: {mistake}"]


def test_an_edge_with_two_requirements_is_a_mistake(world: World) -> None:
    text = "# coder-sync: want a\n# coder-sync: want a --requires start"
    (mistake,) = mistakes_of(world, {"a": "", "x": text})
    assert mistake == 'x:3: unit "x" wants "a" with requirement success already, not start'


def test_a_cycle_is_told_with_all_its_files(world: World) -> None:
    files = {f"{i}0-{name}.sh": f"# coder-sync: want {dep}" for i, (name, dep) in enumerate(["ab", "bc", "ca"], 1)}
    (mistake,) = mistakes_of(world, files)
    assert mistake == "30-c.sh:2: cycle detected: c -> a -> b -> c (30-c.sh -> 10-a.sh -> 20-b.sh -> 30-c.sh)"


def test_two_files_with_one_name_are_a_mistake(world: World) -> None:
    assert mistakes_of(world, {"10-a.sh": "", "20-a.py": ""}) == ['20-a.py:1: unit "a" is 10-a.sh:1 already']


def test_a_wanted_file_that_is_not_executable_is_named(world: World) -> None:
    path = startup(world, {"a": "", "b": "# coder-sync: want a"})
    os.chmod(path + "/a", 0o644)
    assert mistakes_of(world, {}) == [
        f'b:2: no file provides "a"; {path}/a would, but is not executable'.replace(path + "/", "")
    ]


def test_a_file_with_a_header_that_is_not_executable_is_a_mistake(world: World) -> None:
    path = startup(world, {"a": "# coder-sync: unit b"})
    os.chmod(path + "/a", 0o644)
    assert mistakes_of(world, {}) == ["a:1: not executable; chmod +x a"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("echo hello", "no interpreter: the first line must be #! and a program, as in #!/bin/sh"),
        ("", "no interpreter: the first line must be #! and a program, as in #!/bin/sh"),
        ("#!/no/such/sh\n", "its interpreter /no/such/sh does not exist or cannot be run"),
        ("#!/etc/passwd\n", "its interpreter /etc/passwd does not exist or cannot be run"),
        ("#!\n", "its interpreter  does not exist or cannot be run"),
        ("#!/usr/bin/env nosuchpython -u\n", "its interpreter nosuchpython is not in PATH"),
        ("#!/usr/bin/env -S A=1 nosuchpython -u\n", "its interpreter nosuchpython is not in PATH"),
        ("#!/bin/sh\r\necho\r\n", "its first line ends in a carriage return; save it with Unix line ends"),
        ("#!/usr/bin/env -S A=1 sh -e\n", ""),
        ("#! /bin/sh -e\n", ""),
    ],
)
def test_a_file_that_nothing_can_interpret_is_a_mistake(world: World, text: str, mistake: str) -> None:
    path = Path(startup(world, {"a": ""}))
    (path / "a").write_bytes(text.encode())
    assert mistakes_of(world, {}) == ([f"a:1: {mistake}"] if mistake else [])


def test_a_path_without_anything_to_run_is_a_mistake(world: World) -> None:
    os.mkfifo(world.directory / "pipe")
    for path, why in (("nowhere", "cannot be read"), ("pipe", "cannot be read"), (".", "no executable files")):
        done = world.run("boot", path)
        assert done.returncode == 2 and f"{path}: {why}" in done.stderr, done


def test_every_mistake_is_told_in_one_go_and_nothing_runs(world: World) -> None:
    files = {
        "10-good": "touch ran",
        "20-word": "# coder-sync: after good",
        "30-twice": "# coder-sync: unit good",
        "40-typo": "# coder-sync: want godo\n# coder-sync: timeout x",
        "50-cycle": "# coder-sync: want cycle",
        "60-shebang": "#!/no/such\n",
    }
    done = booted(world, files)
    told = [os.path.basename(line.split(": ")[0]) for line in done.stderr.splitlines()]
    assert done.returncode == 2 and done.stdout == "" and not (world.directory / "ran").exists()
    expected = {"20-word:2", "30-twice:2", "40-typo:2", "40-typo:3", "50-cycle:2", "60-shebang:1"}
    assert told[0] == "error" and set(told[1:]) == expected and len(told) == 7, done.stderr


def test_check_only_checks(world: World) -> None:
    files = {"a": "touch ran", "b": "# coder-sync: want a"}
    assert booted(world, files, "--check").stdout == "2 scripts, no mistakes\n"
    files["b"] = "# coder-sync: want c"
    assert booted(world, files, "--check").returncode == 2
    assert not (world.directory / "ran").exists() and not os.path.exists(world.path)


def test_dry_run_shows_the_order_as_graph_does(world: World) -> None:
    files = {"a": "touch ran", "b": "# coder-sync: want a", "c": "# coder-sync: want b --requires completion"}
    out = booted(world, files, "--dry-run", env={**world.env, "PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8"}).stdout
    assert [re.sub(r"\W*(\w+).*", r"\1", line) for line in out.splitlines()] == ["c", "b", "a"]
    assert not (world.directory / "ran").exists()


# ---------------------------------------------------------------------------------------------------------
# Boot: one graph. Order, the agent it hosts or joins, what scripts and other terminals see.
# ---------------------------------------------------------------------------------------------------------


def test_scripts_run_in_the_order_of_their_headers(world: World) -> None:
    files = {
        "10-last": "# coder-sync: want middle one\necho last",
        "20-middle": "# coder-sync: want first\necho middle",
        "30-first": "echo first",
        "40-one": "# coder-sync: want middle --requires start\necho one",
    }
    out = [line.split("| ")[1] for line in boots(world, files).splitlines()]
    assert out.index("first") < out.index("middle") < out.index("last") == 3 and out.index("one") < 3


def test_independent_scripts_run_at_the_same_time(world: World) -> None:
    one, other = Gate(world, "one"), Gate(world, "other")
    boot = booting(world, {"a": "cat one", "b": "cat other"})
    other.reached(), one.reached()
    other.open(), one.open()
    assert finish(boot).returncode == 0


def test_a_script_sees_its_unit_the_socket_the_environment_and_no_input(world: World) -> None:
    script = 'echo "$CODER_SYNC_UNIT,$CODER_AGENT_SOCKET_PATH,$MINE,$(cat | wc -c),$PWD,$#,$0"'
    env = {**world.env, "MINE": "yes", "CODER_AGENT_SOCKET_PATH": ""}
    endless, _ = os.pipe()
    done = booted(world, {"10-a.sh": script}, "--socket-path", world.path, env=env, stdin=endless)
    directory = world.directory
    assert done.stdout == f"a | a,{world.path},yes,0,{directory},0,{directory}/startup.d/10-a.sh\n"


def test_a_script_starts_with_signals_and_descriptors_as_usual(world: World) -> None:
    script = "grep -E 'SigBlk|SigIgn' /proc/self/status; ls /proc/self/fd"
    lines = [line.split("| ")[1] for line in boots(world, {"a": script}).splitlines()]
    masks = [int(line.split()[1], 16) & (1 << 31) - 1 for line in lines[:2]]  # above are those of the C library
    assert masks == [0, 0] and lines[2:] == ["0", "1", "2", "3"]


def test_other_terminals_can_ask_while_it_boots_and_the_socket_goes_with_it(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "cat gate", "b": "# coder-sync: want a"})
    gate.reached()
    assert re.findall(r"^(\w+) +(\w+)", world.ok("list"), re.M)[1:] == [("a", "started"), ("b", "pending")]
    assert "a" in world.ok("why", "b") and "a" in world.ok("timeline") and "a" in world.ok("graph", "b")
    gate.open()
    assert finish(boot).returncode == 0 and not os.path.exists(world.path)


def test_it_joins_the_agent_that_is_there(agent: World) -> None:
    boots(agent, {"a": "", "b": "# coder-sync: want a"})
    assert [agent.status("a"), agent.status("b")] == ["completed", "completed"]
    assert agent.client.ping()["pid"] == agent.processes[0].pid


def test_a_boot_may_be_repeated_on_an_agent_that_stays(agent: World) -> None:
    for _ in range(2):
        boots(agent, {"a": "echo a >> ran", "b": "# coder-sync: want a\necho b >> ran"})
    assert read_lines(agent.directory / "ran") == ["a", "b", "a", "b"]


def test_a_unit_from_outside_is_waited_for(world: World) -> None:
    boot = booting(world, {"a": "# coder-sync: want disk\n# coder-sync: extern disk\necho a"})
    until(lambda: world.run("status", "a").returncode == 0)
    world.ok("run", "disk", "--", "true")
    assert finish(boot).stdout == "a | a\n"


def test_a_script_may_complete_early_and_go_on(world: World) -> None:
    gate = Gate(world)
    go = Gate(world, "go")
    boot = booting(
        world, {"a": "$SYNC complete a -q; cat gate; echo a", "b": "# coder-sync: want a\necho b", "c": "cat go"}
    )
    go.reached(), gate.reached()
    hear(boot.stdout, "b | b")
    assert world.status("a") == "completed"
    gate.open()
    hear(boot.stdout, "a | a")
    go.open()
    assert finish(boot).returncode == 0


def test_the_boot_is_over_when_every_unit_has_ended_though_a_service_goes_on(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "echo up; $SYNC complete a -q; cat gate; echo $CODER_SYNC_UNIT says more; printf end"})
    assert boot.wait(PATIENCE) == 0
    gate.open()
    assert finish(boot).stdout == "a | up\na | a says more\na | end\n"


def test_what_goes_on_printing_keeps_nothing_of_the_agent(world: World) -> None:
    gate, ready = Gate(world), Gate(world, "ready")
    boot = booting(world, {"a": "$SYNC complete a -q; cat gate", "b": "cat ready"})
    ready.reached()
    peer = world.connect()
    peer.call("ping")
    ready.open()
    assert boot.wait(PATIENCE) == 0 and peer.read() is None
    gate.open()


def test_a_script_may_want_more_and_start_again(world: World) -> None:
    more = "$SYNC complete a -q; $SYNC want a b -q; $SYNC start a -q; cat b.done"
    gate = Gate(world)
    boot = booting(world, {"a": more, "b": "cat gate; echo b ran > b.done"})
    gate.reached()
    world.waiting("a")
    gate.open()
    hear(boot.stdout, "a | b ran")


def test_an_outcome_told_by_the_script_counts(world: World) -> None:
    done = booted(world, {"a": "$SYNC fail a --reason 'no disk' -q", "b": "# coder-sync: want a"})
    assert done.returncode == 1
    assert "failed: a (dependency" in done.stderr and "no disk" in done.stderr and "skipped: b" in done.stderr


def test_a_failure_after_an_early_complete_is_told(world: World) -> None:
    done = booted(world, {"a": "$SYNC complete a -q; exit 3", "b": "# coder-sync: want a\nsleep 0.3"})
    assert done.returncode == 0 and "warning: a: exit code 3, after the unit had ended" in done.stderr


def test_a_unit_ended_from_outside_leaves_its_place_to_the_next(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "cat gate", "b": "echo b", "c": "echo c"}, "--jobs", "1")
    gate.reached()
    world.ok("complete", "b")
    gate.open()
    assert finish(boot).stdout == "c | c\n"


# ---------------------------------------------------------------------------------------------------------
# Boot: how many at once, failures, exit status.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_than_so_many_jobs_run_at_once(world: World, jobs: int) -> None:
    files = {f"{i}-x{i}": "sleep 0.02" if i < 6 else "# coder-sync: want x1 x2\nsleep 0.02" for i in range(12)}
    boots(world, files, "--jobs", str(jobs), "--timeline", "t.json")
    assert most_at_once(world.directory / "t.json") == jobs


def test_without_jobs_all_run_at_once(world: World) -> None:
    gates = [Gate(world, f"gate{i}") for i in range(12)]
    boot = booting(world, {f"x{i}": f"cat gate{i}" for i in range(12)})
    for gate in gates:
        gate.reached()
    for gate in gates:
        gate.open()
    assert finish(boot).returncode == 0


def test_a_failure_skips_its_dependents_and_independent_work_goes_on(world: World) -> None:
    files = {"a": "exit 3", "b": "# coder-sync: want a\necho b", "c": "# coder-sync: want b", "d": "echo d"}
    files.update(e="# coder-sync: want a --requires completion\necho e", f="kill -9 $$", g="exec /no/such/program")
    done = booted(world, files)
    assert done.returncode == 1 and {"d | d", "e | e"} <= set(done.stdout.splitlines())
    assert "boot: 2 completed, 3 failed, 2 skipped" in done.stderr
    for told in ("a (exit code 3); ", "f (killed by signal 9); ", "g (exit code 127); "):
        assert f"failed: {told}" in done.stderr
    assert 'skipped: b: dependency "a" failed (exit code 3)' in done.stderr
    assert 'skipped: c: dependency "b" was skipped: dependency "a" failed' in done.stderr


def test_fail_fast_stops_what_runs_at_the_first_failure(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "cat gate; exit 3", "b": "exec sleep 60", "c": "# coder-sync: want b"}, "--fail-fast")
    gate.open()
    done = finish(boot)
    assert done.returncode == 1 and session(boot) == []
    assert "failed: a (exit code 3)" in done.stderr and "failed: b (stopped: another unit failed)" in done.stderr
    assert "not started: c: stopped: another unit failed" in done.stderr


def test_the_summary_shows_the_last_ten_lines_of_what_failed(world: World) -> None:
    done = booted(world, {"a": "seq 1 30; printf 'the end' >&2; exit 2"}, "--quiet")
    assert done.stdout == ""
    shown = [line.strip("| ") for line in done.stderr.splitlines() if line.startswith("    | ")]
    assert shown == [*map(str, range(22, 31)), "the end"]
    assert re.search(r"in all \(1 failed\); critical path: a ", done.stderr)


def test_a_quiet_boot_that_succeeds_says_nothing(world: World) -> None:
    done = booted(world, {"a": "echo a"}, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_timeline_is_written_at_the_end(world: World) -> None:
    boots(world, {"a": "", "b": "# coder-sync: want a"}, "--timeline", "t.svg")
    assert (world.directory / "t.svg").read_text().startswith("<svg")


def test_wrong_usage_is_refused(world: World) -> None:
    for words in (["boot"], ["boot", ".", "--jobs", "many"], ["boot", ".", "--timeline", "t.doc"], ["boot", ".", "--"]):
        assert world.run(*words).returncode == 2, words


# ---------------------------------------------------------------------------------------------------------
# Boot: signals and time.
# ---------------------------------------------------------------------------------------------------------

STUBBORN = "trap '' TERM INT; echo on; cat gate; while :; do sleep 60; done"


@needs_proc
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_reaches_everything_and_nothing_is_left(world: World, number: int, code: int) -> None:
    gate = Gate(world)
    text = "trap 'echo told; exit 1' INT TERM HUP; sleep 60 & cat gate; (sleep 60 & sleep 60); wait"
    boot = booting(
        world, {"a": text, "b": "# coder-sync: want a"}, "--grace", "300ms"
    )  # for those that sh has ignore INT
    gate.open()
    until(lambda: len(session(boot)) >= 4)
    boot.send_signal(number)
    done = finish(boot)
    assert done.returncode == code and session(boot) == []
    assert f"stopped: boot got signal {number}" in done.stderr and "not started: b" in done.stderr


@needs_proc
def test_what_ignores_the_signal_is_killed_after_the_grace(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": STUBBORN}, "--grace", "200ms")
    gate.open()
    began = time.monotonic()
    boot.terminate()
    assert finish(boot).returncode == 143 and session(boot) == []
    assert time.monotonic() - began >= 0.2


@needs_proc
def test_a_second_signal_kills_at_once(world: World) -> None:
    gate = Gate(world)
    boot = booting(
        world,
        {"a": STUBBORN, "b": "trap 'echo told > told' INT; : > trapped; while :; do sleep 0.01; done"},
        "--grace",
        "10m",
    )
    gate.open()
    until((world.directory / "trapped").exists)
    boot.send_signal(signal.SIGINT)
    until(lambda: read_lines(world.directory / "told"))
    boot.send_signal(signal.SIGINT)
    assert finish(boot).returncode == 130 and session(boot) == []


@needs_proc
def test_a_grandchild_that_ignores_the_signal_is_killed_though_its_script_obeyed(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": f"({STUBBORN}) & wait"}, "--grace", "200ms")
    gate.open()
    boot.terminate()
    assert finish(boot).returncode == 143 and session(boot) == []


@needs_proc
@pytest.mark.parametrize(
    "text",
    ["exec sleep 60", "sleep 60 & sleep 60", STUBBORN.replace("cat gate;", ""), "(trap '' TERM; sleep 60) & sleep 60"],
)
def test_past_its_timeout_a_script_and_its_children_end_and_it_has_failed(world: World, text: str) -> None:
    files = {"a": "# coder-sync: timeout 100ms\n" + text, "b": "# coder-sync: want a"}
    boot = booting(world, files, "--grace", "100ms")
    done = finish(boot)
    assert done.returncode == 1 and session(boot) == []
    assert "failed: a (timed out after 100ms)" in done.stderr and "skipped: b" in done.stderr


def test_a_timeout_bounds_the_run_and_not_the_waiting(world: World) -> None:
    files = {"a": "sleep 0.5", "b": "# coder-sync: want a\n# coder-sync: timeout 400ms\necho b"}
    assert boots(world, files) == "b | b\n"


def test_signals_that_it_was_started_to_ignore_stay_ignored(world: World) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # but this one, without which no end is ever seen

    gate = Gate(world)
    boot = booting(world, {"a": "cat gate; echo a"}, preexec_fn=ignore)
    gate.reached()
    boot.send_signal(signal.SIGHUP)
    gate.open()
    done = finish(boot)
    assert (done.returncode, done.stdout) == (0, "a | a\n")


@needs_proc
def test_on_a_terminal_there_are_colours_a_status_line_and_control_c(world: World) -> None:
    path = startup(world, {"a": "echo hello; sleep 60", "b": "# coder-sync: want a"})
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-IS", str(FILE), "boot", path], {**world.env, "TERM": "xterm"})
    seen = b""
    while b"[0/2 ended, 1 waiting] a " not in seen or b"hello" not in seen:
        seen += os.read(master, 4096)
    os.write(master, b"\x03")
    with contextlib.suppress(OSError):  # end of file on a terminal
        while True:
            seen += os.read(master, 4096)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 130
    assert re.search(rb"\033\[3\dma\033\[0m \| hello\r\n", seen) and b"not started: b" in seen
    os.close(master)


# ---------------------------------------------------------------------------------------------------------
# Boot: output.
# ---------------------------------------------------------------------------------------------------------


def test_lines_are_whole_in_order_and_never_mixed(world: World) -> None:
    text = """#!/usr/bin/env python3
import os, sys
data = "".join(f"{os.environ['CODER_SYNC_UNIT']} {i} {'x' * (i % 300)}.\\n" for i in range(3000)).encode()
while data:
    data = data[os.write(1 + len(data) % 2, data[:3001]) :]
"""
    names = [f"unit-{i}" for i in range(4)]
    lines = boots(world, dict.fromkeys(names, text)).splitlines()
    assert len(lines) == 12000
    for name in names:
        assert [f"{name} | {name} {i} {'x' * (i % 300)}." for i in range(3000)] == [
            n for n in lines if n.startswith(name)
        ]


def test_the_prefix_is_as_wide_as_the_longest_name_up_to_a_limit(world: World) -> None:
    out = boots(world, {"a": "echo 1", "abc": "# coder-sync: want a\necho 2"})
    assert out == "a   | 1\nabc | 2\n"
    assert boots(world, {"n" * 60: "# coder-sync: want abc\necho 3"}).splitlines()[2].index(" | 3") == 24


def test_a_line_is_shown_as_it_can_be(world: World) -> None:
    shown = {
        "printf 'no newline'": ["no newline"],
        "printf 'one\\n\\nthree'": ["one", "", "three"],
        "printf 'dos\\r\\n'": ["dos"],
        "printf '10%%\\r50%%\\r100%%\\n'": ["100%"],
        "printf 'caf\\351\\n'": ["caf\\xe9"],
        "printf 'caf\\303\\251\\n'": ["caf\u00e9"],
        "echo out; echo err >&2": ["out", "err"],
        "exec >&- 2>&-; sleep 0.05": [],
    }
    said = boots(world, {f"x{i}": script for i, script in enumerate(shown)}, encoding="utf-8").splitlines()
    for i, expected in enumerate(shown.values()):
        assert [line[5:] for line in said if line.startswith(f"x{i} | ")] == expected


def test_a_log_dir_keeps_a_file_a_unit_byte_for_byte(world: World) -> None:
    files = {"a": "printf 'a\\000\\377\\r\\nend'", "b": "echo b >&2", "c": "# coder-sync: unit 'x/y z'\necho c"}
    files["d"] = "# coder-sync: unit x_y_z\necho d"
    files["e"] = "# coder-sync: unit " + "\u00e9" * 127 + "\necho e"
    assert len(boots(world, files, "--log-dir", "logs/deep").splitlines()) == 6
    logs = world.directory / "logs" / "deep"
    assert (logs / "a.log").read_bytes() == b"a\0\xff\r\nend" and (logs / "b.log").read_bytes() == b"b\n"
    assert sorted(p.read_bytes() for p in logs.iterdir() if p.name[0] not in "ab") == [b"c\n", b"d\n", b"e\n"]


def test_quiet_with_a_log_dir_prints_none_of_it(world: World) -> None:
    assert boots(world, {"a": "echo a"}, "--log-dir", "logs", "--quiet") == ""
    assert (world.directory / "logs" / "a.log").read_text() == "a\n"


@needs_proc
@pytest.mark.parametrize(
    "script",
    [
        "#!/usr/bin/env python3\nfor _ in range(1000): print(('x' * 999 + chr(10)) * 100, end='')",
        "head -c 30000000 /dev/zero | tr '\\000' x",
        "head -c 3000000 /dev/urandom",
    ],
    ids=["100 MB", "a line of 30 MB", "binary"],
)
def test_much_output_hurts_neither_the_memory_nor_the_others(world: World, script: str) -> None:
    with open(world.directory / "out", "wb") as out:
        boot = booting(world, {"a": script, "b": "echo still here"}, "--stay", stdout=out)
    hear(boot.stderr, "staying")
    assert peak_memory(boot.pid) < 40
    boot.terminate()
    assert finish(boot).returncode == 0
    seen = (world.directory / "out").read_bytes()
    assert b"b | still here\n" in seen and len(seen) > 3e6 and max(map(len, seen.split(b"\n"))) < 80_000


def test_a_stdout_that_is_closed_early_does_not_stop_the_boot(world: World) -> None:
    boot = booting(world, {"a": "seq 1 100000", "b": "# coder-sync: want a\ntouch ran"})
    hear(boot.stdout, "a | 1")
    assert boot.stdout
    boot.stdout.close()
    assert boot.wait(PATIENCE) == 0 and (world.directory / "ran").exists()


def test_a_stdout_that_was_never_open_does_not_stop_the_boot(world: World) -> None:
    path = startup(world, {"a": "echo a; touch ran"})
    done = finish(world.spawn(["sh", "-c", f"exec {world.env['SYNC']} boot {path} >&-"]))
    assert done.returncode == 0 and (world.directory / "ran").exists()


@needs_proc
@pytest.mark.parametrize("together", [False, True], ids=["stdout", "both"])
def test_a_reader_that_stops_does_not_keep_it_from_obeying(world: World, together: bool) -> None:
    stderr = subprocess.STDOUT if together else subprocess.PIPE
    boot = booting(world, {"a": "echo $$ > pid; exec cat /dev/zero", "b": "exec sleep 60"}, stderr=stderr)
    assert boot.stdout

    def full() -> bool:
        size = struct.unpack("i", fcntl.ioctl(boot.stdout, termios.FIONREAD, b"1234"))[0]
        return bool(size > 60000)

    def stands_still() -> bool:
        io = Path(f"/proc/{(world.directory / 'pid').read_text().strip()}/io")
        before = io.read_text()
        world.ok("list")  # the agent answers all the while
        return before == io.read_text()

    until(full)
    until(stands_still, "a script that has to wait for the reader")
    boot.terminate()
    assert boot.wait(PATIENCE) == 143 and session(boot) == []


def test_a_reader_that_takes_its_time_gets_everything(world: World) -> None:
    boot = booting(world, {"a": "seq 1 30000"}, "--stay")
    until(lambda: world.run("status", "a", "-c", "status").stdout.endswith("completed\n"))
    assert boot.stdout
    lines = [boot.stdout.readline() for _ in range(30000)]
    assert lines[-1] == "a | 30000\n"


# ---------------------------------------------------------------------------------------------------------
# Boot: what comes after it, and process 1.
# ---------------------------------------------------------------------------------------------------------


def test_it_becomes_the_command_in_the_same_process(world: World) -> None:
    path = startup(world, {"a": "echo a"})
    boot = world.popen(
        "boot", path, "-q", "--", "sh", "-c", 'echo $$ "$@"; grep SigBlk /proc/self/status; exit 7', "sh", "--x", ""
    )
    pid, blocked = finish(boot).stdout.splitlines()
    assert pid == f"{boot.pid} --x " and blocked.split()[1].strip("0") == "" and boot.returncode == 7


def test_the_command_has_no_agent_and_the_usual_signals(world: World) -> None:
    script = "test -e $CODER_AGENT_SOCKET_PATH && echo agent; grep SigIgn /proc/self/status; ls /proc/self/fd | xargs"
    lines = boots(world, {"a": ""}, "-q", "--", "sh", "-c", script).splitlines()
    ours = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
    ignored = int(ours.split()[1], 16) & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)  # which Popen restores
    assert int(lines[0].split()[1], 16) == ignored and lines[1:] == ["0 1 2 3"]


def test_a_failed_boot_becomes_the_command_only_if_always(world: World) -> None:
    command = ["--", "echo", "hello"]
    done = booted(world, {"a": "exit 3"}, *command)
    assert (done.returncode, done.stdout) == (1, "")
    done = booted(world, {"a": "exit 3"}, "--always", *command)
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_a_signal_while_it_boots_keeps_it_from_becoming_the_command(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "cat gate"}, "--always", "--", "echo", "hello")
    gate.reached()
    boot.terminate()
    done = finish(boot)
    assert (done.returncode, done.stdout) == (143, "")


@pytest.mark.parametrize(("command", "code"), [("nosuchcommand", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_run(world: World, command: str, code: int) -> None:
    done = booted(world, {"a": ""}, "-q", "--", command)
    assert done.returncode == code and f"cannot run {command}: " in done.stderr


def test_stay_goes_on_serving_until_a_signal(world: World) -> None:
    boot = booting(world, {"a": "echo a"}, "--stay")
    until(lambda: world.run("status", "a", "-c", "status").stdout.endswith("completed\n"))
    assert world.ok("run", "more", "--want", "a", "--", "echo", "more") == "more\n"
    boot.terminate()
    done = finish(boot)
    assert done.returncode == 0 and "staying" in done.stderr


@needs_proc
def test_services_end_with_a_boot_that_stays_and_no_warning_is_made_of_it(world: World) -> None:
    boot = booting(world, {"a": "$SYNC complete a -q; exec sleep 60"}, "--stay")
    hear(boot.stderr, "staying")
    boot.terminate()
    done = finish(boot)
    assert done.returncode == 0 and "warning" not in done.stderr and session(boot) == []


def as_process_one(world: World, path: str, *words: str) -> subprocess.Popen[str]:
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no process namespaces here")
    return world.spawn([*unshare, sys.executable, "-IS", str(FILE), "boot", path, *words])


def test_as_process_1_it_reaps_orphans_and_becomes_the_command(world: World) -> None:
    orphan = "(setsid sh -c 'echo $$ > orphan' &)\nwhile ! test -s orphan; do :; done\n"
    path = startup(world, {"a": orphan + "while kill -0 $(cat orphan) 2>/dev/null; do sleep 0.01; done; echo $PPID"})
    done = finish(as_process_one(world, path, "--", "sh", "-c", "echo $$; grep -l '^State:.Z' /proc/[0-9]*/status"))
    assert done.stdout == "a | 1\n1\n", done


def test_as_process_1_it_passes_signals_on(world: World) -> None:
    gate = Gate(world)
    path = startup(world, {"a": "trap 'echo told; exit' TERM; cat gate; while :; do sleep 0.01; done"})
    outer = as_process_one(world, path)
    gate.open()
    boot = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
    os.kill(boot, signal.SIGTERM)
    done = finish(outer)
    assert (
        done.stdout.endswith("a | told\n") and "stopped: boot got signal 15" in done.stderr and done.returncode == 143
    )


# ---------------------------------------------------------------------------------------------------------
# Boot: trouble to survive.
# ---------------------------------------------------------------------------------------------------------


@needs_proc
def test_a_daemon_that_keeps_the_output_open_holds_nothing_up_and_is_still_heard(world: World) -> None:
    gate = Gate(world)
    daemon = "(cat gate; echo from the daemon; printf 'its end') &\necho script"
    boot = booting(world, {"a": daemon, "b": "# coder-sync: want a\necho b"}, "--log-dir", "logs")
    gate.reached()
    assert boot.wait(PATIENCE) == 0
    gate.open()
    assert finish(boot).stdout == "a | script\nb | b\na | from the daemon\na | its end\n"
    assert (world.directory / "logs" / "a.log").read_text() == "script\nfrom the daemon\nits end"
    until(lambda: session(boot) == [])


@needs_proc
def test_a_quiet_boot_leaves_no_output_open_behind_a_daemon(world: World) -> None:
    boot = booting(world, {"a": "sleep 60 &"}, "--quiet")
    assert finish(boot).returncode == 0  # which reads to the end of file
    end_session(boot)


@needs_proc
def test_a_daemon_is_stopped_with_a_boot_that_is_stopped(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "sleep 60 &", "b": "# coder-sync: want a\ncat gate"})
    gate.reached()
    boot.terminate()
    assert finish(boot).returncode == 143 and session(boot) == []


@pytest.mark.parametrize("options", [[], ["--log-dir", "logs"]], ids=["", "with logs"])
def test_300_scripts_at_once_under_a_limit_of_256_descriptors(world: World, options: list[str]) -> None:
    path = startup(world, {f"x{i}": f": < hold; echo {i}" for i in range(300)})
    gate = Gate(world, "hold")
    command = f"ulimit -n 256; exec {world.env['SYNC']} boot {path} {' '.join(options)}"
    boot = world.spawn(["sh", "-c", command])
    world.client.ping(wait=PATIENCE)
    until(lambda: len(world.client.list()) == 300)
    at_once = sum(unit.status == "started" for unit in world.client.list())
    until(lambda: len(session(boot)) == at_once >= 100, "that all stand at the gate")
    gate.keep_open(boot)
    done = finish(boot)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert sorted(int(line.split("| ")[1]) for line in done.stdout.splitlines()) == list(range(300))
    assert not options or len(list((world.directory / "logs").iterdir())) == 300


HOG = """#!/usr/bin/env python3
import json, os, socket
def connect():
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(0.3)
    peer.connect(os.environ["CODER_AGENT_SOCKET_PATH"])
    return peer
def call(peer, method, **params):
    peer.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\\n")
    return peer.recv(65536)
peers = [connect()]
try:
    while call(peers[-1], "ping"):
        peers.append(connect())
except OSError:
    print("no descriptor is left")
peers[0].settimeout(None)
call(peers[0], "complete", unit="hog")
while b'"started"' not in call(peers[0], "status", unit="late"):
    pass
open("gate", "w").close()
"""


def test_a_script_that_finds_no_descriptor_left_starts_when_there_is_one(world: World) -> None:
    files = {f"x{i}": ": < hold" for i in range(30)}
    gate = Gate(world, "hold")
    os.mkfifo(world.directory / "gate")
    files["hog"] = HOG.replace("\n", f"\n# coder-sync: want {' '.join(files)} --requires start\n", 1)
    files["late"] = "# coder-sync: want hog\necho late"
    files["open"] = "cat gate"
    path = startup(world, files)
    boot = world.spawn(["sh", "-c", f"ulimit -n 90; exec {world.env['SYNC']} boot {path}"])
    hear(boot.stdout, "no descriptor is left")
    gate.keep_open(boot)
    done = finish(boot)
    assert done.returncode == 0 and "late | late" in done.stdout, done


def test_a_log_dir_that_cannot_be_written_is_told_once_and_the_boot_goes_on(world: World) -> None:
    (world.directory / "file").touch()
    for path in ("file", "file/logs"):
        done = booted(world, {"a": "echo a", "b": "# coder-sync: want a\necho b"}, "--log-dir", path)
        assert done.returncode == 0 and done.stdout == "a | a\nb | b\n"
        assert done.stderr.count(f"warning: no more logs in {path}: ") == 1, done.stderr


def test_a_full_disk_under_the_logs_is_told_once_and_the_boot_goes_on(world: World) -> None:
    logs = world.directory / "logs"
    logs.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {logs} && "
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    fill = "head -c 60000 /dev/zero; sleep 0.05; head -c 6000 /dev/zero"  # what is cut off is at the very end
    path = startup(world, {"a": fill, "b": "# coder-sync: want a\nseq 1 30000"})
    script = mount + f"{world.env['SYNC']} boot {path} --log-dir {logs}; echo $?; wc -c < {logs}/a.log; ls {logs}"
    done = finish(world.spawn(["unshare", "--mount", "sh", "-c", script]))
    assert done.stdout.splitlines()[-4:] == ["b | 30000", "0", "65536", "a.log"]
    assert done.stderr.count(f"warning: no more logs in {logs}: No space left on device") == 1


def test_a_script_edited_between_the_check_and_its_start_runs_as_it_is_then(world: World) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "cat gate", "b": "# coder-sync: want a\necho old"})
    gate.reached()
    startup(world, {"b": "echo new"})
    gate.open()
    assert finish(boot).stdout == "b | new\n"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "cannot be run: No such file or directory"),
        (lambda path: path.chmod(0o644), "cannot be run: Permission denied"),
        (lambda path: path.write_text("#!/no/such\n"), "cannot be run: No such file or directory"),
        (lambda path: path.write_text("echo no interpreter\n"), "cannot be run: Exec format error"),
    ],
    ids=["deleted", "not executable", "no such interpreter", "no interpreter"],
)
def test_a_script_that_cannot_be_run_any_more_fails_alone(world: World, harm: Any, reason: str) -> None:
    gate = Gate(world)
    boot = booting(world, {"a": "cat gate", "b": "# coder-sync: want a", "c": "# coder-sync: want a\necho c"})
    gate.reached()
    harm(world.directory / "startup.d" / "b")
    gate.open()
    done = finish(boot)
    assert done.returncode == 1 and done.stdout == "c | c\n" and f"failed: b ({reason}); " in done.stderr


def test_paths_with_spaces_and_quotes_are_paths(world: World) -> None:
    path = startup(world, {'10-it\'s a "b" $(x).sh': 'echo "$0"'}, "my 'dir' $HOME")
    out = world.ok("boot", path, "--log-dir", "the logs'")
    assert out == f'it\'s a "b" $(x) | {path}/10-it\'s a "b" $(x).sh\n'
    assert len(list((world.directory / "the logs'").iterdir())) == 1


def test_of_two_boots_at_the_same_time_each_script_runs_once_and_both_end_well(world: World) -> None:
    gate = Gate(world)
    files = {f"x{i}": f"echo x{i} >> ran" for i in range(5)}
    files["b"] = "# coder-sync: want " + " ".join(files) + "\necho b >> ran; cat gate"
    files["c"] = "# coder-sync: want b\necho c >> ran"
    one = booting(world, files)
    gate.reached()  # all x have completed
    other = booting(world, files)
    until(lambda: sum(e.kind == "waiting" and e.unit == "c" for e in world.client.status("c").history) == 2)
    gate.open()
    done = [finish(one), finish(other)]
    assert [d.returncode for d in done] == [0, 0], done
    assert sorted(read_lines(world.directory / "ran")) == sorted(files)
    assert all("boot: 7 completed" in d.stderr for d in done)


def test_two_boots_at_the_same_instant_both_end_well(world: World) -> None:
    files = {f"x{i}": "" if i < 2 else f"# coder-sync: want x{i - 2}" for i in range(8)}
    path = startup(world, files)
    for _ in range(3):
        both = [world.popen("boot", path) for _ in range(2)]
        done = [finish(process) for process in both]
        assert [d.returncode for d in done] == [0, 0], done


def test_a_failure_in_one_boot_is_told_by_the_other(world: World) -> None:
    gate = Gate(world)
    files = {"a": "cat gate; exit 3", "b": "# coder-sync: want a"}
    one = booting(world, files)
    gate.reached()
    other = booting(world, files)
    until(lambda: sum(e.kind == "waiting" and e.unit == "b" for e in world.client.status("b").history) == 2)
    gate.open()
    for done in (finish(one), finish(other)):
        assert done.returncode == 1 and "boot: 1 failed, 1 skipped" in done.stderr and "exit code 3" in done.stderr


def test_when_the_agent_it_joined_goes_away_what_runs_ends_and_nothing_new_starts(world: World) -> None:
    server, gate = world.serve(), Gate(world)
    boot = booting(world, {"a": "cat gate; echo a", "b": "# coder-sync: want a\necho b"})
    gate.reached()
    server.kill()
    hear(boot.stderr, "went away")
    gate.open()
    done = finish(boot)
    assert done.returncode == 3 and done.stdout == "a | a\n" and "not started: b: the agent went away" in done.stderr


def test_when_the_agent_it_joined_goes_away_before_anything_began_it_begins_again(world: World) -> None:
    server = world.serve()
    boot = booting(world, {"a": "# coder-sync: want x\n# coder-sync: extern x\necho a"})
    world.waiting("a")
    server.kill()
    until(lambda: world.run("run", "x", "--", "true").returncode == 0)
    assert finish(boot).stdout == "a | a\n"


@needs_proc
def test_a_boot_killed_on_the_agent_it_joined_fails_what_it_ran(agent: World) -> None:
    gate = Gate(agent)
    boot = booting(agent, {"a": "cat gate", "b": "# coder-sync: want a"})
    gate.reached()
    boot.kill()
    until(lambda: agent.status("b") == "skipped")
    assert agent.status("a") == "failed"
    gate.open()


# ---------------------------------------------------------------------------------------------------------
# Boot: ten real startup scripts, ordered by header lines only.
# ---------------------------------------------------------------------------------------------------------

TEN = {
    "01-fetch.sh": "mkdir -p src && printf 'int main(void){}' > src/main.c && tar cf src.tar src && echo fetched",
    "02-fetch-data.py": """#!/usr/bin/env python3
# coder-sync: unit data
import json
json.dump([1, 2], open("data.json", "w"))
""",
    "03-unpack.sh": "# coder-sync: want fetch\nmkdir -p work && tar xf src.tar -C work && ls work/src",
    "04-users.sh": "echo dev > user",
    "05-configure.sh": """# coder-sync: want unpack users
printf 'user=%s\\n' "$(cat user)" > config && test -f work/src/main.c
""",
    "06-build.sh": """# coder-sync: want unpack configure
# coder-sync: timeout 10m
cp work/src/main.c built && echo built
""",
    "07-migrate.py": """#!/usr/bin/env python3
# coder-sync: want data configure
import json
print("rows", len(json.load(open("data.json"))))
""",
    "08-serve.sh": "# coder-sync: want build migrate\ntest -f built && echo up > service && echo serving",
    "09-health.sh": "# coder-sync: want serve\ngrep up service",
    "10-report.sh": "# coder-sync: want health --requires completion\necho done",
}


def test_ten_real_scripts_are_ordered_by_headers_only(world: World) -> None:
    out = boots(world, TEN, "--timeline", "t.json")
    said = [tuple(re.split(r" +\| ", line)) for line in out.splitlines()]
    assert {("fetch", "fetched"), ("migrate", "rows 2"), ("serve", "serving"), ("health", "up")} <= set(said)
    assert said[-1] == ("report", "done")
    rows = {row["unit_name"]: row for row in json.loads((world.directory / "t.json").read_text())["units"]}
    assert all(rows[dep]["ended"] <= row["started"] for row in rows.values() for dep in row["wants"])


def test_with_one_of_ten_broken_a_newcomer_is_told_what_to_fix(world: World) -> None:
    broken = {**TEN, "05-configure.sh": TEN["05-configure.sh"].replace("cat user", "cat usr")}
    broken["05-configure.sh"] += "\ncat usr || exit 4"
    done = booted(world, broken)
    assert done.returncode == 1 and "failed: configure (exit code 4); " in done.stderr
    assert "05-configure.sh\n" in done.stderr and re.search(r"    \| cat: .?usr.?: No such file", done.stderr)
    assert 'skipped: build: dependency "configure" failed (exit code 4)' in done.stderr
    assert "5 completed, 1 failed, 4 skipped" in done.stderr


def test_a_boot_takes_as_long_as_its_critical_path(world: World) -> None:
    layers = [[f"x{layer}-{i}" for i in range(4)] for layer in range(4)]
    files = dict.fromkeys(layers[0], "sleep 0.1")
    for before, layer in zip(layers, layers[1:]):
        files.update((n, f"# coder-sync: want {' '.join(before)}\nsleep 0.1") for n in layer)
    boots(world, files, "--timeline", "t.json")
    data = json.loads((world.directory / "t.json").read_text())
    assert data["seconds"] >= 0.4  # how much more is the benchmark's business
    assert [step["unit_name"][:2] for step in data["critical_path"]] == ["x0", "x1", "x2", "x3"]


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
    text = re.sub(r"\b\d+(\.\d+)?(ms|s|%)", "TIME", text)
    text = re.sub(r"by [^\n]{0,80}? \(pid \d+\)", "by WHOM", text).replace(str(world.directory) + "/", "")
    return re.sub(r"pid \d+", "pid PID", text).strip()


def play(session: list[tuple[str, str]], world: World) -> list[tuple[str, str]]:
    """Run a session's commands in one bash; return them with their real output."""
    shutil.copy(installed(), world.directory)
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
    method = chance.choice([*coder_sync.METHODS, *coder_sync.METHODS, "shutdown?", ""])
    names = [*coder_sync.METHODS.get(method, {}), "more"]
    params: Any = {name: odd_value(chance) for name in names if chance.random() < 0.7}
    if "unit" in params and chance.random() < 0.7:
        params.update(unit=chance.choice("abcdef"), requires="success", dependencies=chance.sample("abcdef", 2))
    message = {"jsonrpc": "2.0", "id": odd_value(chance, 2), "method": method, "params": params}
    for key in list(message):
        if chance.random() < 0.05:
            message[key] = odd_value(chance)
    line = bytearray(json.dumps(message).encode())
    for _ in range(chance.choice([0, 0, 0, 1, 1, 5, 100])):
        at = chance.randrange(len(line) + 1)
        line[at : at + chance.randrange(4)] = chance.choice([b"", b"{", b"[", b'"', b"\\", b"\0", b"\xff", b"1", b"\n"])
    return bytes(line[: chance.choice([-1, 10**9, 10**9, 10**9])]) + chance.choice([b"\n", b"\n", b"\r\n", b""])


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


HEADER_WORDS = ["unit", "want", "timeout", "extern", "unti", "a", "b", "''", '"', "\\", "--requires", "start", "10m",
                "-5", "\u00e9", "\x00", "\t", "#", "$(false)", "a" * 300, ","]  # fmt: skip


@pytest.mark.attack
def test_attack_with_headers(world: World) -> None:
    directory = world.directory / "startup.d"
    for chance in rounds():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for _ in range(chance.randrange(1, 6)):
            lines = [chance.choice(["#!/bin/sh", "#!/usr/bin/env -S x", "\ufeff#!", "", "\x7fELF"])]
            for _ in range(chance.randrange(1, 6)):
                start = chance.choice(
                    ["# coder-sync:", "# coder-sync: ", "// coder-sync:", "#coder-sync", "--coder-sync: "]
                )
                lines.append(start + " ".join(chance.choices(HEADER_WORDS, k=chance.randrange(5))))
            data = bytearray(chance.choice(["\n", "\n", "\r\n"]).join(lines).encode())
            for _ in range(chance.choice([0, 0, 3])):
                data[chance.randrange(len(data))] = chance.randrange(256)
            file = (
                os.fsencode(directory)
                + b"/"
                + chance.choice([b"10-a", b"a.sh", b"b", b"20_b.py", b"\xff", b"-", b"c d"])
            )
            with open(file, "wb") as f:
                f.write(data)
            os.chmod(file, chance.choice([0o755, 0o755, 0o755, 0o644]))
        for how in ("--check", "--dry-run"):
            done = world.run("boot", how, str(directory), errors="replace")
            assert done.returncode in (0, 1, 2), done
            assert "internal error" not in done.stderr and "Traceback" not in done.stderr, done
