"""Tests of coder_sync: rules with a fake clock, everything else on real processes, sockets and signals.

Sections: helpers; Units (the rules); Protocol; Agent; Command line; Run and owners; Trouble; Load; README.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
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
from coder_sync import (
    AlreadyStarted,
    Client,
    CycleError,
    DependencyFailed,
    InvalidParams,
    NotRegistered,
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

    def revoke(self, unit: str, ticket: str) -> None:
        if self.status(unit) == "started" and self.holders[unit] == ticket:
            self.statuses[unit] = "pending"
            self.reopened = unit

    def cancel(self, ticket: str) -> list[str] | None:
        if ticket in self.starts:
            return self.unmet(self.needs(self.starts.pop(ticket)))
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
            on = name and model.status(name) == "started" and model.holders[name] == ticket
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
