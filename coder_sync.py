#!/bin/sh
""":"
exec python3 -IS "$0" "$@"
"""

from __future__ import annotations

__doc__ = """Startup coordination for scripts that run in parallel: one file, agent and command line.

An agent keeps a graph of units in memory; scripts say what they depend on, wait until they may run, and
let others go on:

    coder_sync.py serve                  the agent; --detach to the background, -- COMMAND for one command
    coder_sync.py want UNIT DEP...       UNIT depends on DEP
    coder_sync.py start UNIT             wait until UNIT may run; then it is started
    coder_sync.py complete UNIT          UNIT is done; others may go on
    coder_sync.py fail UNIT              UNIT will not be done; what requires it is skipped
    coder_sync.py run UNIT -- COMMAND    start, COMMAND, complete or fail, in one process
    coder_sync.py wait UNIT...           wait for units without being one
    coder_sync.py status UNIT | list     what stands where;  ping: is there an agent?
    coder_sync.py install [PATH]         make every call faster

Exit codes: 0 done; 1 refused; 2 wrong usage; 3 agent unreachable or gone; 4 a required dependency failed or
was skipped; 124 timed out; `run` and `serve -- COMMAND` return the command's own status (128+N for signal N),
or 125 (our own failure before it ran), 126 (not executable), 127 (not found).

The file is also a module: `from coder_sync import Client`. How it reads, top to bottom; a room uses only
rooms above it:

    Errors          one hierarchy; each knows its exit code and its JSON-RPC code
    Units           the dependency graph and its rules, pure
    Protocol        newline-delimited JSON-RPC 2.0
    Agent           the daemon
    Client          the Python API
    Views           data to text, pure
    Install         a copy with its bytecode
    Command line    one small function a command

The first lines make the file an executable that starts the interpreter isolated and without site, on any
system with a `sh`; `install` writes a copy that is not compiled at each call. A client call is mostly interpreter
start, so nothing is imported here that a plain call does not need: `socket`, `json`, `argparse`, `threading` and
`typing` each cost more than everything the call does.
"""

import errno
import sys
import time

(NEEDED := "Python 3.8 or later")  # an older one stops here, and shows this line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from dataclasses import dataclass
    from typing import Any, NoReturn
else:

    class _Os:
        """`os`, but imported only for what its C half does not have: the import is a tenth of a whole call."""

        def __getattr__(self, name):
            import posix

            if name == "environ" or not hasattr(posix, name):
                import os as posix
            value = self.__dict__[name] = getattr(posix, name)
            return value

    os = _Os()

    def dataclass(cls):
        """Stand in for dataclasses.dataclass, whose import costs more than a whole client call."""
        names = tuple(cls.__annotations__)

        def __init__(self, *args, **kwargs):
            kwargs.update(zip(names, args))
            for name in names:
                setattr(self, name, kwargs.pop(name) if name in kwargs else getattr(cls, name))
            if kwargs or len(args) > len(names):
                raise TypeError(f"{cls.__name__}: unexpected arguments {sorted(kwargs)}")

        if "__init__" not in vars(cls):
            cls.__init__ = __init__
        cls.__repr__ = lambda self: f"{cls.__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"
        cls.__eq__ = lambda self, other: type(other) is cls and vars(self) == vars(other)
        cls.__hash__ = None
        return cls


__version__ = "0.1.0"
FILE: str = getattr(globals().get("__loader__"), "archive", "") or globals().get("__file__") or "coder_sync.py"
__all__ = ["Client", "Dependency", "Owner", "Started", "SyncError", "UnitStatus"]

DEFAULT_SOCKET = "/tmp/coder-agent.sock"
START_TIMEOUT = 300.0  # seconds; the same default as the system whose scripts we run
CONNECT_TIMEOUT = 3.0
REPLY_TIMEOUT = 30.0  # for answers that do not wait on other units
REPORT_EVERY = 30.0


def environment(**extra: str) -> dict[bytes, bytes]:
    """The environment for a command, and what is added to it."""
    base: dict[bytes, bytes] = os.environb if "os" in sys.modules else sys.modules["posix"].environ  # type: ignore
    code = sys.getfilesystemencoding(), "surrogateescape"
    return {**base, **{name.encode(*code): value.encode(*code) for name, value in extra.items()}}


def getenv(name: str) -> str:
    """An environment variable, empty if unset."""
    return environment().get(name.encode(), b"").decode(sys.getfilesystemencoding(), "surrogateescape")


# ----------------------------------------------------------------------------------------------------------
# Errors. One small hierarchy, shared by agent and client: the agent sends `code`, `message` and `data`, the
# client raises the same class again and exits with `exit_code`. Codes are those of JSON-RPC 2.0, section 5.1.
# ----------------------------------------------------------------------------------------------------------


class SyncError(Exception):
    """Anything that goes wrong here; `exit_code` is the command line's, `code` JSON-RPC's."""

    exit_code = 1
    code = -32000

    def __init__(self, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.data = data


class Refused(SyncError):
    """The rules say no: a bad name, another outcome than the one on record, a limit."""


class CycleError(Refused):
    """`data` is the cycle, its first name repeated last."""

    code = -32001


class AlreadyStarted(Refused):
    """Somebody else started the unit."""

    code = -32002


class NotRegistered(Refused):
    """Nobody has called `want`, `start` or `run` on the unit."""

    code = -32003


class DependencyFailed(SyncError):
    """A required dependency failed or was skipped, so waiting is over."""

    exit_code = 4
    code = -32004


class UsageError(SyncError):
    """The command line, an environment variable or an argument of the API is wrong."""

    exit_code = 2


class InvalidRequest(SyncError):
    """Not a JSON-RPC 2.0 request, or not one of ours."""

    code = -32600


class MethodNotFound(InvalidRequest):
    """There is no such method."""

    code = -32601


class InvalidParams(InvalidRequest):
    """A parameter is missing, unknown or of the wrong type."""

    code = -32602


class ParseError(InvalidRequest):
    """Not JSON, too long or too deep: the rest of the stream cannot be trusted."""

    code = -32700


class Unreachable(SyncError):
    """No agent could be reached, or it went away, or what answers is not one."""

    exit_code = 3
    code = -32005


class TimedOut(SyncError):
    """The caller's own time is up; `data` is the list of `Dependency` that were missing."""

    exit_code = 124


class CommandError(SyncError):
    """A command could not be run: 126 not executable, 127 not found, as in a shell."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# ----------------------------------------------------------------------------------------------------------
# Units. The dependency graph and its rules. Pure: no sockets, no files, no sleeping; the clocks are passed in.
# A caller that must wait hands in a ticket, any hashable object; whoever makes the wait end finds
# (ticket, result or SyncError) in `take_answers()`. Not thread-safe: the agent holds one lock around it.
# ----------------------------------------------------------------------------------------------------------

NOT_REGISTERED = "not registered"  # only ever wanted by others
PENDING = "pending"  # registered, not started
STARTED = "started"
COMPLETED = "completed"
FAILED = "failed"
SKIPPED = "skipped"  # will not start: something it requires failed, or was skipped itself
ENDED = (COMPLETED, FAILED, SKIPPED)

SUCCESS, COMPLETION, START = REQUIREMENTS = ("success", "completion", "start")
MEETS = {SUCCESS: (COMPLETED,), COMPLETION: ENDED, START: (STARTED, COMPLETED, FAILED)}
HOPELESS = {SUCCESS: (FAILED, SKIPPED), COMPLETION: (), START: (SKIPPED,)}  # cannot be met any more
REQUIRED_STATUS = {SUCCESS: COMPLETED, COMPLETION: "ended", START: STARTED}  # as `status` shows it

MAX_NAME = 255  # bytes of UTF-8
MAX_REASON = 500  # characters
MAX_UNITS = 50_000
MAX_EDGES = 500_000
MAX_WAITS = 20_000
MAX_EVENTS = 100_000


@dataclass
class Owner:
    """Who started a unit: a process id, its command line, and whether it still runs (None: unknown).

    `born` tells the process from a later one with the same pid; it stays with the agent.
    """

    pid: int
    command: str
    alive: bool | None = None
    born: str | None = None


@dataclass
class Dependency:
    """One edge as it stands now. `age` is seconds in the current status."""

    depends_on: str
    required_status: str
    current_status: str
    is_satisfied: bool
    requirement: str = SUCCESS
    age: float = 0.0
    reason: str = ""
    owner: Owner | None = None
    waits_for: list[str] = []  # noqa: RUF012  (never changed; what a pending dependency itself waits for)
    did_you_mean: str = ""


@dataclass
class UnitStatus:
    """A snapshot of one unit, without its dependencies where they were not asked for."""

    unit_name: str
    status: str
    is_ready: bool
    reason: str = ""
    exit_code: int | None = None
    age: float = 0.0
    owner: Owner | None = None
    dependencies: list[Dependency] = []  # noqa: RUF012
    did_you_mean: str = ""
    history: list[Event] = []  # noqa: RUF012


@dataclass
class Event:
    """Something that happened to a unit. `time` is monotonic, `wall` since the epoch, both in seconds."""

    seq: int
    time: float
    wall: float
    unit: str
    kind: str
    detail: str = ""

    def __init__(self, seq: int, time: float, wall: float, unit: str, kind: str, detail: str = "") -> None:
        self.seq, self.time, self.wall, self.unit, self.kind, self.detail = seq, time, wall, unit, kind, detail


@dataclass
class Node:
    """One unit as pictures need it. Times are seconds since the agent began, -1 for what has not been."""

    unit_name: str
    status: str
    is_ready: bool
    is_waiting: bool
    registered: float
    waiting: float
    started: float
    ended: float
    released_by: str  # the dependency that made it ready last
    reason: str
    wants: dict[str, str]  # dependency -> requirement
    owner: Owner | None = None


@dataclass
class Graph:
    """All units at one time, `now`, in seconds since the agent began."""

    now: float
    nodes: list[Node]


def check_name(name: object) -> str:
    """Return `name` if it may name a unit, else raise Refused."""
    if not isinstance(name, str):
        raise InvalidParams(f"a unit name must be a string, not {type(name).__name__}")
    if not name:
        raise Refused("a unit name must not be empty; was a variable unset?")
    if not name.isprintable():
        raise Refused(f"unit name {ascii(name)[:80]} has a character that cannot be printed")
    if len(name.encode()) > MAX_NAME:
        raise Refused(f'unit name "{name[:40]}..." is {len(name.encode())} bytes long; the limit is {MAX_NAME}')
    return name


def one_line(text: str) -> str:
    """Return free text as one printable, bounded line."""
    flat = "".join(c if c.isprintable() else " " for c in text[: 4 * MAX_REASON])
    flat = " ".join(flat.split())
    return flat if len(flat) <= MAX_REASON else flat[: MAX_REASON - 3] + "..."


class Unit:
    """One node of the graph. Only Units changes it. An anonymous unit (name "") is somebody's `wait`."""

    # fmt: off
    __slots__ = ("ended", "exit_code", "holder", "name", "owner", "pool", "reason", "registered", "released_by",
                 "since", "started", "starts", "status", "unmet", "waiting", "wanted_by", "wants")
    # fmt: on

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.status = NOT_REGISTERED
        self.since = now  # of the status
        self.reason = ""
        self.exit_code: int | None = None
        self.wants: dict[Unit, str] = {}  # dependency -> requirement
        self.wanted_by: dict[Unit, str] = {}  # the same edges, seen from the other end
        self.unmet = 0  # how many of `wants` are not met; kept by Units._set, never counted again
        self.starts: dict[Any, tuple[Owner | None, Pool | None]] = {}  # tickets that wait, oldest first
        self.pool: Pool | None = None  # whose place it takes while it is started
        self.holder: Any = None  # ticket of the start that won
        self.owner: Owner | None = None
        self.registered = self.waiting = self.started = self.ended = -1.0  # when, for pictures; -1: not yet
        self.released_by = ""  # the dependency that made it ready last


class Pool:
    """Units of which at most `limit` are to be started at once; `ready` are those that wait for nothing else.

    A start in a pool is that of a boot, and another boot of the same scripts may be on its way. So what somebody else
    has started, or completed while its owner lives, is waited for; the answer then names the unit itself.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.running = limit, 0
        self.ready: dict[Unit, None] = {}


class Units:
    """The dependency graph: `want`, `start`, `wait`, `complete`, `fail`, and questions about it.

    `clock` and `wall` return seconds; `alive` says whether an owner still runs (None: unknown); `tell` gets every
    event as it happens.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wall: Callable[[], float],
        alive: Callable[[Owner], bool | None] = lambda owner: None,
        tell: Callable[[Event], None] = lambda event: None,
    ) -> None:
        from collections import deque

        self.clock, self.wall, self.alive, self.tell = clock, wall, alive, tell
        self.began = clock()
        self.units: dict[str, Unit] = {}
        self.edges = 0
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.seq = 0
        self._freed: list[Pool] = []  # that have a place since their last unit was settled
        self._waits: dict[Any, Unit] = {}  # ticket -> the unit it wants started
        self._answers: list[tuple[Any, Any]] = []

    # -- what callers may do ------------------------------------------------------------------------------

    def want(self, name: str, dependencies: Iterable[str], requires: str = SUCCESS) -> Unit:
        """Register `name` and make it depend on `dependencies`: all of them, or none and an error.

        Raises CycleError, or Refused: a bad name, an edge that has another requirement, a limit.
        """
        if requires not in REQUIREMENTS:
            raise Refused(f'unit "{name}": no such requirement: {requires}; use one of {", ".join(REQUIREMENTS)}')
        unit = self.units.get(check_name(name)) or Unit(name, self.clock())
        new: dict[str, Unit] = {}
        for dependency in dependencies:
            other = self.units.get(check_name(dependency))
            if other is unit or dependency == name:
                raise CycleError(f"cycle detected: {name} -> {name}; a unit cannot depend on itself", [name, name])
            if other is None:
                new[dependency] = Unit(dependency, self.clock())
            elif other not in unit.wants:
                cycle = self._cycle(unit, other)
                if cycle:
                    raise CycleError(f"cycle detected: {' -> '.join(cycle)}", cycle)
                new[dependency] = other
            elif unit.wants[other] != requires:
                has = unit.wants[other]
                raise Refused(f'unit "{name}" wants "{dependency}" with requirement {has} already, not {requires}')
        self._admit(unit, new)
        for dependency, other in new.items():
            self._record(unit, "wants", dependency if requires == SUCCESS else f"{dependency} ({requires})")
            self._link(unit, other, requires)
        if (unit.status == PENDING or unit.starts) and self._settle(unit):
            self._propagate(unit)
        return unit

    def start(
        self,
        name: str,
        ticket: Any,
        dependencies: Iterable[str] = (),
        requires: str = SUCCESS,
        owner: Owner | None = None,
        pool: Pool | None = None,
    ) -> bool:
        """Ask for `name` to be started; the answer comes for `ticket`. Return whether it has to wait.

        Raises AlreadyStarted and what `want` raises; the answer may be DependencyFailed.
        """
        unit = self.want(name, dependencies, requires)
        done = pool and unit.status == COMPLETED and unit.owner and self.alive(unit.owner)
        if pool and (unit.status == STARTED or done):
            return self.wait([name], ticket)
        if unit.status == STARTED:
            raise AlreadyStarted(f'unit "{name}" is already started{self._by(unit)}')
        self._check_waits()
        verdict = self._verdict(unit) if unit.status == SKIPPED else ""
        if verdict:
            unit.reason = verdict
            self._answers.append((ticket, DependencyFailed(f'unit "{name}" skipped: {verdict}')))
            return False
        if unit.status in (FAILED, SKIPPED):  # another try: those behind it may hope again
            self._set(unit, PENDING)
        self._waits[ticket] = unit
        unit.starts[ticket] = (owner, pool)
        unit.waiting = self.clock()
        unit.released_by, unit.holder = "", None
        if self._settle(unit):
            self._propagate(unit)
        elif ticket in self._waits:
            self._record(unit, "waiting", ", ".join(d.name for d in self._unmet(unit, 5)))
        return ticket in self._waits

    def wait(self, names: Iterable[str], ticket: Any, requires: str = SUCCESS) -> bool:
        """Wait for units to meet `requires`, without being one. Return whether there is anything to wait for."""
        if requires not in REQUIREMENTS:
            raise Refused(f"no such requirement: {requires}; use one of {', '.join(REQUIREMENTS)}")
        self._check_waits()
        waiter = Unit("", self.clock())
        new = {n: self.units.get(check_name(n)) or Unit(n, self.clock()) for n in names}
        self._admit(waiter, new)
        for other in new.values():
            self._link(waiter, other, requires)
        self._waits[ticket] = waiter
        waiter.starts[ticket] = (None, None)
        self._settle(waiter)
        return ticket in self._waits

    def complete(self, name: str) -> None:
        """End `name` with success. Raises NotRegistered, or Refused if it has ended otherwise."""
        self._end(name, COMPLETED, "", 0)

    def fail(self, name: str, reason: str = "", exit_code: int | None = None) -> None:
        """End `name` without success: what requires it is skipped. Raises as `complete` does."""
        self._end(name, FAILED, one_line(reason), exit_code)

    def lose(self, name: str, ticket: Any) -> None:
        """The holder of a start is gone: its unit fails, unless it has ended, or another start of it waits."""
        unit = self.units.get(name)
        if unit is None or not self.holds(name, ticket):
            return
        waits = ticket in unit.starts
        owner = unit.starts[ticket][0] if waits else unit.owner
        who = f"process {owner.pid} ({owner.command})" if owner else "the process that held it"
        if waits:
            self._record(unit, "gave up", f"{who} ended while it waited")
            self._answer(ticket, Refused(f'unit "{name}" was not started: the process that was to own it has ended'))
            del unit.starts[ticket]
            self.give_up(name, f"lost: {who} ended without completing")
        elif unit.status == PENDING:
            self.give_up(name, "lost: the process that was to start it ended without completing")
        else:
            self._set(unit, FAILED, one_line(f"lost: {who} ended without completing"))
            self._propagate(unit)

    def give_up(self, name: str, reason: str) -> None:
        """The only one who was to start a unit has given up: it fails, unless it has ended, or another start waits."""
        unit = self.units[name]
        if unit.status == PENDING and not unit.starts:
            self._set(unit, FAILED, one_line(reason))
            self._propagate(unit)

    def revoke(self, name: str, ticket: Any) -> None:
        """Take back a start whose answer found nobody: the unit is pending again."""
        unit = self.units.get(name)
        if unit and unit.status == STARTED and unit.holder is ticket:
            self._set(unit, PENDING, "the client that asked for its start was gone")
            self._settle(unit)
            self._propagate(unit)

    def holds(self, name: str, ticket: Any) -> bool:
        """Whether the start that `ticket` asked for still waits or is still on."""
        unit = self.units.get(name)
        return unit is not None and (
            ticket in unit.starts or (unit.status in (PENDING, STARTED) and unit.holder is ticket)
        )

    def cancel(self, ticket: Any, why: str = "gone") -> list[Dependency] | None:
        """Forget a wait and return what it lacked; None if it was answered already."""
        unit = self._waits.pop(ticket, None)
        if unit is None:
            return None
        missing = self.missing(unit)
        del unit.starts[ticket]
        if unit.status == PENDING:
            unit.holder = ticket  # should its owner end now, nobody will start the unit
        if unit.name:
            self._record(unit, "gave up", f"{why}; still missing: {', '.join(d.depends_on for d in missing[:5])}")
        else:
            self._unlink(unit)
        return missing

    def take_answers(self) -> list[tuple[Any, Any]]:
        """Return the answers that became known since the last call."""
        answers, self._answers = self._answers, []
        return answers

    # -- questions ----------------------------------------------------------------------------------------

    def missing(self, what: Any) -> list[Dependency]:
        """What a unit, or the wait of a ticket, still lacks. The one place that says why something waits."""
        unit = what if isinstance(what, Unit) else self._waits.get(what)
        return self.dependencies(unit, unmet_only=True) if unit else []

    def dependencies(self, unit: Unit, unmet_only: bool = False) -> list[Dependency]:
        """The edges of a unit, in the order they were declared."""
        now, rows = self.clock(), []
        for other, requirement in unit.wants.items():
            met = other.status in MEETS[requirement]
            if met and unmet_only:
                continue
            row = Dependency(other.name, REQUIRED_STATUS[requirement], other.status, met, requirement)
            row.age, row.reason = round(now - other.since, 3), other.reason
            if not met:
                row.owner = self._owner(other)
                row.waits_for = [d.name for d in self._unmet(other, 4)] if other.status == PENDING else []
            rows.append(row)
        return rows

    def status(self, name: str) -> UnitStatus:
        """A snapshot of one unit with its dependencies; `not registered` for a name nobody knows."""
        unit = self.units.get(check_name(name)) or Unit(name, self.clock())
        snapshot = self._snapshot(unit, self.clock())
        snapshot.owner = self._owner(unit)
        snapshot.dependencies = self.dependencies(unit)
        return snapshot

    def snapshots(self, everything: bool = False) -> list[UnitStatus]:
        """Snapshots by name; `everything` includes names that were only ever wanted."""
        now = self.clock()
        shown = (u for u in self.units.values() if everything or u.status != NOT_REGISTERED)
        return [self._snapshot(u, now) for u in sorted(shown, key=lambda u: u.name)]

    def graph(self) -> Graph:
        """Everything, for pictures; owners as they were when they started their unit."""

        def since(t: float) -> float:
            return round(t - self.began, 6) if t >= 0 else -1.0

        nodes = []
        for u in self.units.values():
            asked = min(u.waiting, u.started) if u.started >= 0 else u.waiting  # a re-run that waits: not yet
            node = Node(u.name, u.status, u.unmet == 0, bool(u.starts), since(u.registered), since(asked),
                        since(u.started), since(u.ended), u.released_by, u.reason, {}, u.owner)  # fmt: skip
            node.wants = {d.name: requirement for d, requirement in u.wants.items()}
            nodes.append(node)
        return Graph(round(self.clock() - self.began, 6), nodes)

    def history(self, name: str) -> list[Event]:
        """What is remembered of one unit."""
        return [e for e in self.events if e.unit == name]

    def names(self) -> list[str]:
        """The registered names, for suggestions."""
        return [name for name, unit in self.units.items() if unit.status != NOT_REGISTERED]

    # -- the rules ----------------------------------------------------------------------------------------

    def _settle(self, unit: Unit, because: Unit | None = None) -> bool:
        """When may a unit start? Here. Return whether its status changed, so that others must be looked at.

        Its requirements are all met: the oldest waiting start wins, the others are told. One of them can not
        be met any more: it is skipped, and all who wait for it are told. Otherwise it goes on waiting.
        `because` is the dependency that just changed, if only that can have made a difference.
        """
        if unit.unmet == 0:
            if not unit.starts:
                return False
            unit.released_by = because.name if because else unit.released_by
            ticket, (owner, pool) = next(iter(unit.starts.items()))
            if pool and pool.running >= pool.limit:
                pool.ready[unit] = None
                return False
            if pool:
                pool.running += 1
                unit.pool = pool
            self._answer(ticket, {"dependencies": [d.name for d in unit.wants]})
            del unit.starts[ticket]
            unit.holder, unit.owner = ticket, owner
            self._set(unit, STARTED)
            for other in [t for t, (_, pool) in unit.starts.items() if pool]:
                del unit.starts[other], self._waits[other]
                self.wait([unit.name], other)
            self._tell(unit, AlreadyStarted, f'unit "{unit.name}" is already started{self._by(unit)}')
            if not unit.name:
                self._unlink(unit)
            return True
        reason = self._verdict(unit, because)
        if not reason:
            return False
        skip = unit.status == PENDING and bool(unit.name)
        if skip:
            self._set(unit, SKIPPED, reason)
        self._tell(unit, DependencyFailed, f'unit "{unit.name}" skipped: {reason}' if unit.name else reason)
        if not unit.name:
            self._unlink(unit)
        return skip

    @staticmethod
    def _verdict(unit: Unit, because: Unit | None = None) -> str:
        """Why a unit cannot be started any more; empty while there is hope."""
        causes = (because,) if because else unit.wants
        cause = next((d for d in causes if d.status in HOPELESS[unit.wants[d]]), None)
        if cause is None:
            return ""
        if cause.status == FAILED:
            return f'dependency "{cause.name}" failed' + (f" ({cause.reason})" if cause.reason else "")
        tail, root = cause.reason, cause.reason.rpartition(" was skipped: ")[2]
        if len(tail) >= MAX_REASON:  # what failed in the first place matters most
            tail = root if root.startswith("... ") else "... " + root
        return f'dependency "{cause.name}" was skipped: {tail}'

    def _propagate(self, changed: Unit) -> None:
        """Settle whoever depends on a changed unit, and so on; in a loop, since chains may be long."""
        from collections import deque

        todo = deque([changed])
        while todo:
            unit = todo.popleft()
            for dependent in list(unit.wanted_by):
                if (dependent.starts or dependent.status == PENDING) and self._settle(dependent, unit):
                    todo.append(dependent)
            for pool in self._freed:
                while pool.ready and pool.running < pool.limit:
                    next_one = next(iter(pool.ready))
                    del pool.ready[next_one]
                    if self._settle(next_one):
                        todo.append(next_one)
            self._freed.clear()

    def _set(self, unit: Unit, status: str, reason: str = "", exit_code: int | None = None) -> None:
        """Give a unit a status, and keep `unmet` of its dependents true. The only place that does either."""
        old, unit.status = unit.status, status
        if unit.pool and old == STARTED:
            unit.pool.running -= 1
            self._freed.append(unit.pool)
            unit.pool = None
        unit.since = self.clock()
        unit.reason, unit.exit_code = reason, exit_code
        if status == STARTED:
            unit.started, unit.ended = unit.since, -1.0
        elif status in ENDED:
            unit.ended = unit.since
        elif status == PENDING and old != NOT_REGISTERED:
            unit.started = unit.ended = -1.0
            unit.holder = unit.owner = None
        for dependent, requirement in unit.wanted_by.items():
            dependent.unmet += (old in MEETS[requirement]) - (status in MEETS[requirement])
        self._record(unit, "registered" if old == NOT_REGISTERED else status, reason)

    def _end(self, name: str, status: str, reason: str, exit_code: int | None) -> None:
        unit = self.units.get(check_name(name))
        if unit is None or unit.status == NOT_REGISTERED:
            raise NotRegistered(f'unit "{name}" is not registered; call want, start or run on it first')
        if unit.status == status:
            return
        if unit.status in ENDED:
            why = f" ({unit.reason})" if unit.reason else ""
            hint = "others may have acted on that; start it again first"
            raise Refused(f'unit "{name}" is {unit.status}{why} and cannot become {status}: {hint}')
        self._set(unit, status, reason, exit_code)
        self._tell(unit, Refused, f'unit "{name}" was {status} by another caller while its start waited')
        self._propagate(unit)

    # -- small parts --------------------------------------------------------------------------------------

    def _admit(self, unit: Unit, new: dict[str, Unit]) -> None:
        """Check the limits, then register `unit` and make the new names known."""
        names = [n for n in new if n not in self.units]
        if len(self.units) + len(names) + (unit.name != "" and unit.name not in self.units) > MAX_UNITS:
            raise Refused(f'unit "{unit.name}": the agent has reached its limit of {MAX_UNITS} units')
        if self.edges + len(new) > MAX_EDGES:
            raise Refused(f'unit "{unit.name}": the agent has reached its limit of {MAX_EDGES} dependencies')
        self.units.update((n, new[n]) for n in names)
        if unit.name and unit.status == NOT_REGISTERED:
            self.units[unit.name] = unit
            unit.registered = self.clock()
            self._set(unit, PENDING)

    def _check_waits(self) -> None:
        if len(self._waits) >= MAX_WAITS:
            raise Refused(f"the agent has reached its limit of {MAX_WAITS} waiting requests")

    def _link(self, unit: Unit, other: Unit, requirement: str) -> None:
        unit.wants[other] = other.wanted_by[unit] = requirement
        unit.unmet += other.status not in MEETS[requirement]
        self.edges += 1

    def _unlink(self, unit: Unit) -> None:
        """Forget a `wait`, and the names that nobody else has any use for."""
        for other in unit.wants:
            del other.wanted_by[unit]
            if other.status == NOT_REGISTERED and not other.wanted_by:
                self.units.pop(other.name, None)
        self.edges -= len(unit.wants)
        unit.wants.clear()

    def _cycle(self, unit: Unit, dependency: Unit) -> list[str] | None:
        """The cycle that an edge from `unit` to `dependency` would close, or None.

        Searches from both ends in turn and stops when either has nowhere to go, so that a chain costs the
        same whichever end it is declared from.
        """
        ahead: dict[Unit, Unit | None] = {dependency: None}  # reached -> from where
        behind: dict[Unit, Unit | None] = {unit: None}
        fronts, here = ([dependency], [unit]), 0
        while fronts[0] and fronts[1]:
            node = fronts[here].pop()
            for other in node.wanted_by if here else node.wants:
                seen, facing = (behind, ahead) if here else (ahead, behind)
                if other not in seen:
                    seen[other] = node
                    fronts[here].append(other)
                if other in facing:
                    path: list[Unit] = []
                    step: Unit | None = other
                    while step:
                        path.insert(0, step)
                        step = ahead[step]
                    step = behind[other]
                    while step:
                        path.append(step)
                        step = behind[step]
                    return [unit.name, *(u.name for u in path)]
            here = 1 - here
        return None

    def _unmet(self, unit: Unit, most: int) -> list[Unit]:
        from itertools import islice

        if not unit.unmet:
            return []
        return list(islice((d for d, r in unit.wants.items() if d.status not in MEETS[r]), most))

    def _answer(self, ticket: Any, result: Any) -> None:
        del self._waits[ticket]
        self._answers.append((ticket, result))

    def _tell(self, unit: Unit, error: type[SyncError], message: str) -> None:
        """Give all starts that still wait the same error."""
        for ticket in list(unit.starts):
            self._answer(ticket, error(message))
        unit.starts.clear()

    def _snapshot(self, unit: Unit, now: float) -> UnitStatus:
        ready = unit.unmet == 0 and unit.status != NOT_REGISTERED
        row = UnitStatus(unit.name, unit.status, ready, unit.reason, unit.exit_code)
        row.age, row.owner = round(now - unit.since, 3), unit.owner
        return row

    def _owner(self, unit: Unit) -> Owner | None:
        if unit.owner is None or unit.status != STARTED:
            return unit.owner
        return Owner(unit.owner.pid, unit.owner.command, self.alive(unit.owner), unit.owner.born)

    def _by(self, unit: Unit) -> str:
        return f" by {unit.owner.command} (pid {unit.owner.pid})" if unit.owner else ""

    def _record(self, unit: Unit, kind: str, detail: str) -> None:
        if unit.name:
            self.seq += 1
            event = Event(self.seq, self.clock(), self.wall(), unit.name, kind, detail)
            self.events.append(event)
            self.tell(event)


# ----------------------------------------------------------------------------------------------------------
# Protocol. One JSON-RPC 2.0 object a line, UTF-8, over a Unix stream socket; requests at most 64 KiB. Answers
# may come out of order. `start` and `wait` with `"progress": true` may first send the notification `waiting`.
# ----------------------------------------------------------------------------------------------------------

MAX_LINE = 65536  # bytes, of a request
MAX_REPLY = 256 << 20  # bytes; what a client takes from an agent
MAX_DEPTH = 32  # of JSON brackets: deeper input overflows the C stack of a small thread, which is not an exception


class _Scanner:
    """What json.decoder.JSONDecoder would tell the C scanner."""

    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")


def _codec() -> tuple[Callable[[str], Any], Callable[[Any], str]]:
    """Return (loads, dumps): the C halves of the json package without the package, which imports re and enum."""
    try:
        import _json

        scan = _json.make_scanner(_Scanner)  # type: ignore[arg-type]
        options: list[Any] = [None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, False]
        write = _json.make_encoder(*options)  # the arguments that json.JSONEncoder passes

        def loads(text: str) -> Any:
            value, end = scan(text, 0)
            if text[end:].strip():
                raise ValueError("more than one value")
            return value

        return loads, lambda value: "".join(write(value, 0))
    except (ImportError, AttributeError, TypeError):  # another Python than CPython
        import json

        return (
            lambda text: json.loads(text, parse_constant=_Scanner.parse_constant),
            lambda value: json.dumps(value, allow_nan=False),
        )


_loads, _dumps = _codec()


def encode(message: dict[str, Any]) -> bytes:
    """Return one message as a line."""
    return _dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"


def decode(line: bytes) -> Any:
    """Return the value on a line. Raises ParseError for what is not UTF-8, not JSON, or nested too deeply."""
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise ParseError(f"JSON nested deeper than {MAX_DEPTH} levels")
    try:
        return _loads(line.decode().strip())
    except (ValueError, StopIteration, RecursionError, SystemError):  # SystemError: 3.10 without json imported
        raise ParseError(f"not a line of JSON: {one_line(ascii(line[:60]))}") from None


def _depth(line: bytes) -> int:
    """How deep the brackets of a line nest, those inside strings left out."""
    others = bytes(b for b in range(256) if b not in b"[]{}")
    outside = line.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    depth = deepest = 0
    for bracket in b"".join(outside).translate(None, others):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def plain(value: Any) -> Any:
    """Return records as what JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (Owner, Dependency, UnitStatus, Event, Node, Graph)):
        return {k: plain(v) for k, v in vars(value).items() if k != "born"}
    return value


def record(kind: type[Any], data: dict[str, Any]) -> Any:
    """Return a record from JSON; keys of a newer agent are ignored."""
    try:
        known = {k: data[k] for k in kind.__annotations__ if k in data}
        if known.get("owner"):
            known["owner"] = record(Owner, known["owner"])
        for field, inner in (("dependencies", Dependency), ("history", Event), ("nodes", Node)):
            if field in known:
                known[field] = [record(inner, row) for row in known[field]]
        return kind(**known)
    except (AttributeError, TypeError):
        raise Unreachable(f"the answer is not a {kind.__name__}; are agent and client of one version?") from None


# ----------------------------------------------------------------------------------------------------------
# Agent. Units behind one lock, served by socketserver.ThreadingUnixStreamServer, a thread a connection.
#
# What keeps it safe:
# - Units is touched only under `Agent.lock`; nothing is written to a socket or a log while it is held.
# - A thread stays in its connection's read loop. A `start` that must wait leaves only its ticket behind, and
#   is answered by whichever thread makes the unit ready. So the end of a client is seen at once, as end of
#   file, by the thread that owns the connection; it cancels the tickets under the lock. A ticket is answered
#   or cancelled, never both: both happen under the lock, and each removes it from Units.
# - A thread blocks only on its own connection, and then for SEND_TIMEOUT at most; on others' it never does:
#   what their socket does not take at once is left to the mail thread, within bounds of time and size.
# - Log lines and events for watchers go through a queue to the mail thread as well.
# ----------------------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 4096
MAX_PENDING = 10_000  # requests of one connection that wait
MAX_BACKLOG = 4 << 20  # bytes that may wait for one connection
MAX_QUEUE = 200_000  # log lines and events on their way out
MAX_LOG = 16 << 20  # bytes of a --log-file, after which it becomes FILE.1
SEND_TIMEOUT = 10  # seconds
IDLE_TIMEOUT = 60  # seconds for a connection that asks for nothing and waits for nothing
PAUSE = 0.02  # seconds that the mail thread gathers events for, or waits before it tries a late peer again
STACK = 256 * 1024

METHODS: dict[str, dict[str, Any]] = {  # method -> parameter -> its default, or its type if it is required
    "ping": {},
    "want": {"unit": str, "dependencies": [], "requires": SUCCESS},
    "start": {
        "unit": str,
        "dependencies": [],
        "requires": SUCCESS,
        "hold": False,
        "pid": 0,
        "jobs": 0,
        "progress": False,
    },
    "wait": {"units": [], "requires": SUCCESS, "progress": False},
    "complete": {"unit": str},
    "fail": {"unit": str, "reason": "", "exit_code": 0},
    "status": {"unit": str},
    "list": {"all": False},
    "graph": {},
    "missing": {"id": object},
    "cancel": {"id": object},
    "events": {"since": 0, "follow": False},
}


def check_params(spec: dict[str, Any], params: Any) -> dict[str, Any]:
    """Return all parameters of a method with its defaults, else raise InvalidParams. A list is by position."""
    if isinstance(params, list):
        if len(params) > len(spec):
            raise InvalidParams(f"too many parameters; there are {', '.join(spec) or 'none'}")
        params = dict(zip(spec, params))
    if not isinstance(params, dict):
        raise InvalidParams('"params" must be an object')
    for name in params:
        if name not in spec:
            raise InvalidParams(f"no such parameter: {one_line(name)[:60]}; there are {', '.join(spec) or 'none'}")
    checked = {}
    for name, default in spec.items():
        kind = default if isinstance(default, type) else type(default)
        if name not in params and kind is default:
            raise InvalidParams(f'parameter "{name}" is missing')
        value = params.get(name, default)
        if kind is object:  # the id of a request
            good = type(value) in (str, int)
        elif kind is list:
            good = type(value) is list and all(type(v) is str for v in value)
        else:
            good = type(value) is kind and (not isinstance(value, int) or abs(value) < 2**31)
        if not good:
            what = {str: "a string", int: "a whole number", bool: "true or false", list: "a list of strings"}
            raise InvalidParams(f'parameter "{name}" must be {what.get(kind, "a string or a whole number")}')
        checked[name] = value
    return checked


def error_line(request: Any, error: SyncError) -> bytes:
    """An error as an answer."""
    body = {"code": error.code, "message": str(error)}
    if error.data is not None:
        body["data"] = plain(error.data)
    return encode({"id": request, "error": body})


def resembling(name: str, names: Sequence[str]) -> str:
    """The one of `names` that `name` may have been meant to be, or nothing."""
    try:
        from difflib import get_close_matches
    except (ImportError, OSError):  # no descriptor left to read it with
        return ""
    digits = str.maketrans("", "", "0123456789")  # db-1 is no slip of the finger for db-2
    others = [n for n in get_close_matches(name, names[:5000], 3, 0.7) if n.translate(digits) != name.translate(digits)]
    return others[0] if others else ""


class Connection:
    """One client. `pending` maps its requests that wait to their tickets, `held` tickets to the units they hold.

    What is sent goes through one queue, in order. Our own thread may block on it; any other sends what the
    socket takes, and what is left is late: the mail thread tries again until it is taken, or too old, or too much.
    """

    def __init__(self, sock: Any, mail: Mail) -> None:
        from threading import Lock

        self.sock, self.mail = sock, mail
        self.pending: dict[Any, Ticket] = {}
        self.held: dict[Ticket, str] = {}
        self.pool: Pool | None = None  # of the starts that have a limit of "jobs"
        self.owner: Owner | None = None  # who started a unit here last
        self._mutex = Lock()  # guards the three below; never held while blocking
        self._busy = False  # our own thread is sending and may block
        self._first = b""  # what was late when it began
        self._queue: list[bytes] = []
        self._size = 0  # bytes in the queue

    def hold_back(self) -> None:
        """Keep what other threads push until the next `reply`."""
        with self._mutex:
            self._busy, self._first = True, self._take()

    def reply(self, data: bytes) -> bool:
        """Send from the connection's own thread; may block for SEND_TIMEOUT."""
        with self._mutex:
            first = self._first if self._busy else self._take()  # what was pushed since hold_back comes after
            self._busy, self._first = True, b""
            data = first + data
        while data:
            try:
                self.sock.sendall(data)
            except OSError:
                self.drop()
                return False  # and `_busy` stays: nobody sends any more
            with self._mutex:
                data = self._take()
                self._busy = bool(data)
        return True

    def push(self, data: bytes) -> bool:
        """Send from any thread; never blocks. False if the peer is gone, or has let too much pile up."""
        with self._mutex:
            self._queue.append(data)
            self._size += len(data)
            if (self._busy or self._send()) and self._size <= MAX_BACKLOG:
                return True
        self.drop()
        return False

    def retry(self) -> bool:
        """Send more of what is late, from the mail thread; whether all of it is on its way now."""
        with self._mutex:
            if not self._busy and not self._send():
                self.drop()
                return True
            return self._busy or not self._queue

    def _take(self) -> bytes:
        data = b"".join(self._queue)
        self._queue.clear()
        self._size = 0
        return data

    def _send(self) -> bool:
        """Send what the socket takes at once, under the mutex."""
        from socket import MSG_DONTWAIT

        data = self._take()
        try:
            sent = self.sock.send(data, MSG_DONTWAIT) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent < len(data):
            self._queue, self._size = [data[sent:]], len(data) - sent
            self.mail.retry_later(self)
        return True

    def drop(self) -> None:
        """End the connection; its own thread sees end of file and cleans up."""
        from socket import SHUT_RDWR

        try:
            self.sock.shutdown(SHUT_RDWR)
        except OSError:
            pass

    def peer(self) -> int:
        """The process id at the other end, 0 if the system does not say or it is in another namespace."""
        import socket
        import struct

        try:
            if hasattr(socket, "SO_PEERCRED"):
                return int(struct.unpack("3i", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
            return int(struct.unpack("i", self.sock.getsockopt(0, 2, 4))[0])  # macOS: SOL_LOCAL, LOCAL_PEERPID
        except (OSError, struct.error):
            return 0


class Ticket:
    """A request whose answer comes later."""

    __slots__ = ("connection", "id", "unit")

    def __init__(self, connection: Connection, request: Any, unit: str) -> None:
        self.connection, self.id, self.unit = connection, request, unit


class Mail:
    """The mail thread: what nobody who coordinates should wait for. Lines for people, each with a time; events for
    those who follow them; what a client did not take at once. Events go out in batches, so that a follower costs
    those who coordinate nothing.
    """

    def __init__(self, level: int, path: str | None = None) -> None:
        from _queue import SimpleQueue

        self.level, self.path, self.fd = level, path, 2
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.watchers: dict[Connection, int] = {}  # who follows the events -> the last one it has
        self.late: dict[Connection, float] = {}  # who has not taken all -> when it must have
        self.size = self.lost = 0
        if path:
            self._open()

    def _open(self) -> None:
        assert self.path
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.fd, self.size = fd, os.fstat(fd).st_size

    def say(self, text: str, level: int = 1) -> None:
        """Queue a line; level 0 shows always, 1 unless --quiet, 2 with --verbose."""
        if level <= self.level and self.queue.qsize() < MAX_QUEUE:
            self.queue.put((time.time(), text))

    def event(self, event: Event) -> None:
        """Queue something that happened to a unit."""
        if self.queue.qsize() < MAX_QUEUE:
            self.queue.put(event)

    def retry_later(self, connection: Connection) -> None:
        """Try again to send what a connection did not take."""
        self.late.setdefault(connection, time.monotonic() + SEND_TIMEOUT)
        self.queue.put(())

    def run(self) -> None:
        """Write until None comes; the body of the thread."""
        from _queue import Empty

        batch: list[Any] = []
        while None not in batch:
            batch = []
            try:
                batch.append(self.queue.get(timeout=PAUSE if self.late else None))
                if self.watchers:
                    time.sleep(PAUSE)
                while batch[-1] is not None and len(batch) < 10_000:
                    batch.append(self.queue.get_nowait())
            except Empty:
                pass
            events = [(e.seq, encode({"method": "event", "params": plain(e)})) for e in batch if isinstance(e, Event)]
            for watcher, seen in list(self.watchers.items()) if events else ():
                watcher.push(b"".join(data for seq, data in events if seq > seen))
            for item in batch:
                if isinstance(item, Event):
                    if self.level >= (2 if item.kind in ("registered", "wants", "waiting", PENDING) else 1):
                        self._write(
                            item.wall, f"{item.unit}: {item.kind}" + (f": {item.detail}" if item.detail else "")
                        )
                elif item:
                    self._write(*item)
            for connection, limit in list(self.late.items()):
                if connection.retry():
                    self.late.pop(connection, None)
                elif time.monotonic() > limit:
                    connection.drop()
                    self.late.pop(connection, None)

    def _write(self, when: float, text: str) -> None:
        from select import POLLOUT, poll

        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) + f".{int(when % 1 * 1000):03d} "
        lost = f"({self.lost} lines lost here) " if self.lost else ""
        line = (stamp + lost + text + "\n").encode(errors="backslashreplace")[:4000]  # a pipe takes 4096 or says no
        try:
            ready = poll()
            ready.register(self.fd, POLLOUT)
            if not ready.poll(0 if self.lost else 200):
                raise BlockingIOError
            os.write(self.fd, line)
            self.lost, self.size = 0, self.size + len(line)
            if self.path and self.size > MAX_LOG:
                os.rename(self.path, self.path + ".1")
                os.close(self.fd)
                self._open()
        except OSError:  # nobody reads, or the disk is full: coordination goes on
            self.lost += 1


def birth(pid: int) -> str | None:
    """When a process started, as the system counts it, to tell it from a later one; empty when it is gone.

    None when it cannot be told: no /proc, or no descriptor left to look.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # the 22nd in proc(5); two stand before the name's end
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            return None
    except IndexError:
        return None
    try:
        os.kill(pid, 0)  # there may be no /proc at all
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "" if os.path.exists("/proc/self/stat") else None


def proc_line(pid: int, what: str) -> str:
    """One value of /proc/PID/status, empty where there is none."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
            return next((line.split(":", 1)[1].strip() for line in f if line.startswith(what + ":")), "")
    except OSError:
        return ""


def command_of(pid: int) -> str:
    """The command line of a process, short enough for a message; empty if unknown."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            args = f.read(4096).decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ""
    if args[1:2] == ["-IS"]:  # our own executable form, installed or plain
        args = args[4:] if args[2:3] == ["-c"] else args[2:]
    args[:1] = [os.path.basename(a) for a in args[:1]]
    text = one_line(" ".join(args)) or proc_line(pid, "Name")
    return text if len(text) <= 60 else text[:57] + "..."


class Agent:
    """The daemon's state and its answers; `serve_connection` is the body of a connection's thread."""

    def __init__(self, mail: Mail) -> None:
        from threading import Lock

        if sys.version_info[:2] == (3, 10):  # its C scanner looks for its exception there, and does not import it
            import json.decoder  # noqa: F401

        self.lock = Lock()
        self.mail = mail
        self.units = Units(time.monotonic, time.time, self._alive, mail.event)
        self.connections: set[Connection] = set()
        self.max_connections = MAX_CONNECTIONS
        self.began = time.monotonic()
        self.stopping = False
        self.active = 0  # requests being answered
        self.owners: dict[Ticket, tuple[Owner, int]] = {}  # of `start --pid`: owner and its pidfd or -1
        self._woken, self._wake = os.pipe()  # to the owners' thread
        os.set_blocking(self._wake, False)
        self._watching = False  # whether there is one

    # -- a connection's thread ----------------------------------------------------------------------------

    def serve_connection(self, sock: Any) -> None:
        """Answer one client until it goes away."""
        import socket
        import struct

        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", IDLE_TIMEOUT, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT, 0))
        connection = Connection(sock, self.mail)
        with self.lock:
            self.connections.add(connection)
        try:
            self._read(connection)
        except OSError:  # the peer vanished
            pass
        finally:
            self._gone(connection)

    def _read(self, connection: Connection) -> None:
        buffer = b""
        while True:
            try:
                chunk = connection.sock.recv(8192)
            except BlockingIOError:  # IDLE_TIMEOUT
                if connection.pending or connection.held or connection in self.mail.watchers:
                    continue
                idle = InvalidRequest(f"no request for {IDLE_TIMEOUT} seconds; connect again when there is one")
                connection.reply(error_line(None, idle))
                return
            lines = (buffer + chunk).split(b"\n")
            buffer = lines.pop()
            if not chunk and buffer:  # end of file after half a line, or a last line without its newline
                lines, buffer = [*lines, buffer], b""
            for line in lines:
                if line.strip() and not self.line(connection, line):
                    return
            if len(buffer) > MAX_LINE:
                self.line(connection, buffer)
                return
            if not chunk:
                return

    def line(self, connection: Connection, line: bytes) -> bool:
        """Answer one request; False if the rest of the stream cannot be trusted."""
        with self.lock:
            self.active += 1
        try:
            return self._line(connection, line)
        finally:
            with self.lock:
                self.active -= 1

    def _line(self, connection: Connection, line: bytes) -> bool:
        request = None
        try:
            if len(line) > MAX_LINE:
                raise ParseError(f"a request is one line of at most {MAX_LINE} bytes; use several calls")
            message = decode(line)
            if isinstance(message, list):
                raise InvalidRequest("batches are not supported; send one request a line")
            if not isinstance(message, dict):
                raise InvalidRequest("a request must be a JSON object")
            if isinstance(message.get("id"), (str, int)) and not isinstance(message["id"], bool):
                request = message["id"]
            result = self._call(connection, request, message)
        except SyncError as error:
            self._flush()
            self.mail.say(f"refused: {one_line(str(error))}")
            return connection.reply(error_line(request, error)) and not isinstance(error, ParseError)
        self._flush()
        if result is None or request is None:  # the answer comes later, or nobody asked for one
            return True
        return connection.reply(encode({"id": request, "result": plain(result)}))

    def _call(self, connection: Connection, request: Any, message: dict[str, Any]) -> Any:
        if message.get("jsonrpc") != "2.0":
            raise InvalidRequest('"jsonrpc" must be "2.0"')
        if "id" in message and request is None:
            raise InvalidRequest('"id" must be a string or a whole number')
        method = message.get("method")
        if not isinstance(method, str):
            raise InvalidRequest('"method" must be a string')
        spec = METHODS.get(method)
        if spec is None:
            raise MethodNotFound(f"no such method: {one_line(method)[:60]}; there are {', '.join(METHODS)}")
        if request in connection.pending:
            raise InvalidRequest(f"id {one_line(ascii(request))[:60]} is in use by a request that still waits")
        params = check_params(spec, message.get("params", {}))
        if self.mail.level > 1:
            self.mail.say(f"request: {method} {one_line(ascii(params))[:200]}", 2)
        if method in ("start", "wait", "missing", "cancel", "events"):
            if request is None:
                raise InvalidRequest(f'{method} needs an "id"')
            return getattr(self, "_" + method)(connection, request, **params)
        return self.graph() if method == "graph" else getattr(self, "_" + method)(**params)

    def _flush(self) -> None:
        """Send the answers that became known, without the lock."""
        while True:
            with self.lock:
                answers = self.units.take_answers()
            for ticket, result in answers:
                ticket.connection.pending.pop(ticket.id, None)
                if isinstance(result, SyncError):
                    ticket.connection.push(error_line(ticket.id, result))
                elif not ticket.connection.push(encode({"id": ticket.id, "result": result})) and ticket.unit:
                    with self.lock:  # nobody is there to run it
                        self.units.revoke(ticket.unit, ticket)
            if not answers:
                return

    def _gone(self, connection: Connection) -> None:
        """The peer is gone: forget what it waits for, and fail what it held."""
        with self.lock:
            self.connections.discard(connection)
            self.mail.watchers.pop(connection, None)
            self.mail.late.pop(connection, None)
            for ticket, unit in connection.held.items():
                self.units.lose(unit, ticket)
            for ticket in list(connection.pending.values()):
                self.units.cancel(ticket, "its caller went away")
        self._flush()

    # -- the methods --------------------------------------------------------------------------------------

    def _ping(self) -> dict[str, Any]:
        return {"version": __version__, "pid": os.getpid(), "uptime": round(time.monotonic() - self.began, 3)}

    def _want(self, unit: str, dependencies: list[str], requires: str) -> dict[str, Any]:
        with self.lock:
            self.units.want(unit, dependencies, requires)
            return {"unit": unit, "dependencies": [d.name for d in self.units.units[unit].wants]}

    def _start(
        self,
        connection: Connection,
        request: Any,
        unit: str,
        dependencies: list[str],
        requires: str,
        progress: bool,
        hold: bool,
        pid: int,
        jobs: int,
    ) -> None:
        ticket = Ticket(connection, request, unit)
        if jobs and connection.pool is None:
            connection.pool = Pool(max(1, jobs))
        owner = self._caller(connection, pid, hold)
        with self.lock:
            self._expect(ticket)
            try:
                waits = self.units.start(unit, ticket, dependencies, requires, owner, connection.pool if jobs else None)
            except SyncError:
                del connection.pending[request]
                raise
            missing = self.units.missing(ticket) if waits and progress else []
            if hold:
                connection.held[ticket] = unit
                if len(connection.held) > MAX_PENDING:
                    connection.held = {t: u for t, u in connection.held.items() if self.units.holds(u, t)}
            if pid and owner:
                self._watch(ticket, owner)
        self._progress(connection, request, missing)

    def _wait(self, connection: Connection, request: Any, units: list[str], requires: str, progress: bool) -> None:
        if not units:
            raise InvalidParams('wait: "units" must name at least one unit')
        ticket = Ticket(connection, request, "")
        with self.lock:
            self._expect(ticket)
            try:
                waits = self.units.wait(units, ticket, requires)
            except SyncError:
                del connection.pending[request]
                raise
            missing = self.units.missing(ticket) if waits and progress else []
        self._progress(connection, request, missing)

    def _expect(self, ticket: Ticket) -> None:
        if self.stopping:
            raise Unreachable("the agent is shutting down")
        if len(ticket.connection.pending) >= MAX_PENDING:
            raise Refused(f"a connection may wait for {MAX_PENDING} requests at most")
        ticket.connection.pending[ticket.id] = ticket

    def _progress(self, connection: Connection, request: Any, missing: list[Dependency]) -> None:
        self._flush()
        if missing:
            self._suggest(missing)
            connection.reply(encode({"method": "waiting", "params": {"id": request, "missing": plain(missing)}}))

    def _complete(self, unit: str) -> dict[str, Any]:
        with self.lock:
            self.units.complete(unit)
        return {"unit": unit, "status": COMPLETED}

    def _fail(self, unit: str, reason: str, exit_code: int) -> dict[str, Any]:
        with self.lock:
            self.units.fail(unit, reason or (f"exit code {exit_code}" if exit_code else ""), exit_code or None)
        return {"unit": unit, "status": FAILED}

    def _status(self, unit: str) -> UnitStatus:
        with self.lock:
            status = self.units.status(unit)
            status.history = self.units.history(unit)
            names = self.units.names() if status.status == NOT_REGISTERED else []
        status.did_you_mean = resembling(unit, names)
        self._suggest(status.dependencies)
        return status

    def _list(self, all: bool) -> list[dict[str, Any]]:
        with self.lock:
            units = self.units.snapshots(all)
        left_out = ("dependencies", "did_you_mean", "history")
        return [{k: v for k, v in vars(u).items() if k not in left_out} for u in units]

    def graph(self) -> Graph:
        """Everything, for pictures."""
        with self.lock:
            graph = self.units.graph()
        running = [n for n in graph.nodes if n.owner and n.status == STARTED]
        for node in running[:500]:
            assert node.owner
            node.owner = Owner(node.owner.pid, node.owner.command, self._alive(node.owner))
        return graph

    def _missing(self, connection: Connection, request: Any, id: Any) -> list[Dependency]:
        with self.lock:
            missing = self.units.missing(connection.pending.get(id))
        return self._suggest(missing)

    def _cancel(self, connection: Connection, request: Any, id: Any) -> dict[str, Any]:
        """Give up a wait, unless its answer is under way already; one or the other, never both."""
        with self.lock:
            ticket = connection.pending.get(id)
            missing = self.units.cancel(ticket, "timed out")
            if ticket and missing is not None:
                del connection.pending[id]
                if ticket in connection.held:  # nobody else is to run it
                    names = ", ".join(d.depends_on for d in missing[:5])
                    self.units.give_up(ticket.unit, f"timed out waiting for {names}")
        return {"cancelled": missing is not None, "missing": self._suggest(missing or [])}

    def _events(self, connection: Connection, request: Any, since: int, follow: bool) -> list[Event]:
        """What happened after event `since`; with `follow`, what happens next comes as notifications `event`."""
        if follow:
            connection.hold_back()
        with self.lock:
            if follow:
                self.mail.watchers[connection] = self.units.seq
            return [e for e in self.units.events if e.seq > since]

    def _suggest(self, rows: list[Dependency]) -> list[Dependency]:
        """Say which registered name each unregistered one may have meant."""
        unknown = [row for row in rows if row.current_status == NOT_REGISTERED]
        if unknown:
            with self.lock:
                names = self.units.names()
            for row in unknown[:20]:
                row.did_you_mean = resembling(row.depends_on, names)
        return rows

    # -- owners -------------------------------------------------------------------------------------------

    def _caller(self, connection: Connection, pid: int, hold: bool) -> Owner | None:
        """Who starts the unit: the named process, the caller itself if it holds the unit, else its script."""
        if hold and connection.owner and not pid:
            return connection.owner
        peer = connection.peer()
        if pid:
            if not peer or len(proc_line(peer, "NSpid").split()) > 1:
                raise Refused(f"process {pid}: the caller is not in the agent's process namespace; start without --pid")
            if pid < 0 or birth(pid) == "":
                raise Refused(f"process {pid} is not alive in the agent's process namespace; --pid takes a script's $$")
        else:
            pid = peer if hold or not peer else int(proc_line(peer, "PPid") or 0)
        connection.owner = Owner(pid, command_of(pid), None, birth(pid)) if pid else None
        return connection.owner

    @staticmethod
    def _alive(owner: Owner) -> bool | None:
        now = birth(owner.pid)
        return None if now is None or not (owner.born or now == "") else now == owner.born

    def _watch(self, ticket: Ticket, owner: Owner) -> None:
        """Have the owners' thread notice when the process ends. Called under the lock."""
        from threading import Thread

        try:
            fd: int = getattr(os, "pidfd_open")(owner.pid)  # noqa: B009  (mypy knows it only from 3.9 on)
        except (AttributeError, OSError):  # before Python 3.9, Linux 5.3; not Linux; no descriptor left
            fd = -1
        self.owners[ticket] = (owner, fd)
        if not self._watching:
            Thread(target=self._watch_owners, args=(self._woken,), daemon=True).start()
            self._watching = True
        try:
            os.write(self._wake, b"!")
        except BlockingIOError:  # it has been woken often enough
            pass

    def _watch_owners(self, wake: int) -> None:
        """The owners' thread: asleep until an owner ends; where there is no pidfd it looks every second."""
        from select import POLLIN, poll

        while True:
            with self.lock:
                for ticket in [t for t in self.owners if not self.units.holds(t.unit, t)]:
                    fd = self.owners.pop(ticket)[1]
                    if fd >= 0:
                        os.close(fd)
                owners = dict(self.owners)
            waiting = poll()
            waiting.register(wake, POLLIN)
            for _, fd in owners.values():
                if fd >= 0:
                    waiting.register(fd, POLLIN)
            ready = {fd for fd, _ in waiting.poll(1000 if any(fd < 0 for _, fd in owners.values()) else None)}
            if wake in ready:
                os.read(wake, 4096)
            for ticket, (owner, fd) in owners.items():
                if fd in ready or (fd < 0 and self._alive(owner) is False):
                    with self.lock:
                        self.units.lose(ticket.unit, ticket)
            self._flush()

    def stop(self) -> None:
        """Tell everybody who waits that it is over."""
        with self.lock:
            self.stopping = True
            tickets = [t for c in self.connections for t in list(c.pending.values())]
        for ticket in tickets:
            ticket.connection.push(error_line(ticket.id, Unreachable("the agent is shutting down")))
        deadline = time.monotonic() + 0.5
        while self.active and time.monotonic() < deadline:  # whose request made us end may still wait for its answer
            time.sleep(0.002)


def make_server(agent: Agent, sock: Any) -> Any:
    """Return a socketserver that hands each connection on a listening socket to the agent, in its own thread."""
    import socketserver

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            agent.serve_connection(self.request)

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        block_on_close = False  # else the mixin remembers every thread there ever was
        exhausted = False

        def get_request(self) -> Any:
            try:
                request = super().get_request()
                self.exhausted = False
                return request
            except OSError as error:  # out of descriptors or memory: say so once, and do not spin
                if not self.exhausted:
                    agent.mail.say(f"cannot accept connections: {error.strerror}; trying again until it works", 0)
                self.exhausted = True
                time.sleep(0.05)
                raise

        def verify_request(self, request: Any, client_address: Any) -> bool:
            if len(agent.connections) < agent.max_connections:
                return True
            limit = Unreachable(f"the agent has reached its limit of {agent.max_connections} connections")
            Connection(request, agent.mail).push(error_line(None, limit))
            agent.mail.say(f"refused: {limit}")
            return False

        def handle_error(self, request: Any, client_address: Any) -> None:
            _, error, trace = sys.exc_info()
            while trace and trace.tb_next:
                trace = trace.tb_next
            where = f"line {trace.tb_lineno}" if trace else "an unknown line"
            agent.mail.say(f"internal error at {where}: {one_line(repr(error))}; please report it", 0)

    server = Server("", Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    return server


def claim(path: str) -> int:
    """Hold PATH.lock, so that of two agents starting at once one wins. Return its descriptor.

    Raises Refused if another process holds it. The file is removed by its holder, so the one that was locked
    may not be the one that is there now; then it begins again.
    """
    import fcntl

    lock = path + ".lock"
    while True:
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refused(f"cannot create {lock}: {error.strerror}; choose another --socket-path") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(lock) and os.path.samestat(os.fstat(fd), os.lstat(lock)):
                return fd
        except BlockingIOError:
            pid = os.read(fd, 20).decode(errors="replace").strip()
            who = f" (pid {pid})" if pid else ""
            os.close(fd)
            raise Refused(f"an agent{who} is serving {path} already; stop it or choose another --socket-path") from None
        except FileNotFoundError:
            pass
        os.close(fd)


def listen(path: str, mode: int = 0o600, group: int = -1) -> Any:
    """Return a socket that listens at `path`, and was never open to more than `mode`. Raises Refused.

    A socket that nobody listens on is replaced; anything else at the path is left alone.
    """
    import socket
    import stat

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise Refused(f"{path} exists and is not a socket; remove it or choose another --socket-path")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1)
                try:
                    probe.connect(path)
                    raise Refused(f"somebody is serving {path} already; stop it or choose another --socket-path")
                except ConnectionRefusedError:
                    os.unlink(path)
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        if group != -1:
            os.chown(path, -1, group)
        if mode != 0o600:
            os.chmod(path, mode)
        sock.listen(4096)
        return sock
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise Refused(f"cannot listen at {path}: {why}; choose another --socket-path") from None


def remove(path: str) -> None:
    """Unlink a file that may be gone already."""
    try:
        os.unlink(path)
    except OSError:
        pass


def inherited_socket() -> Any:
    """The listening socket that a supervisor handed over, or None; the protocol is that of sd_listen_fds(3)."""
    import socket

    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or count == "0":
        return None
    try:
        sock = socket.socket(fileno=3)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise Refused(f"LISTEN_FDS is set, but descriptor 3 is no socket: {error.strerror}") from None
    if count != "1" or sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
        raise Refused("LISTEN_FDS must hand over one listening Unix stream socket, at descriptor 3")
    sock.set_inheritable(False)
    sock.setblocking(True)
    return sock


def notify(state: str) -> None:
    """Tell the supervisor; the protocol is that of sd_notify(3). Nobody there is no error."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass


def detach() -> int:
    """Go on in a child of its own session; return there a pipe to say b"ready" or an error on.

    The parent returns -1 when the child is ready. Raises Refused with what the child said.
    """
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with open(read, "rb") as pipe:
            answer = pipe.read()
        if answer != b"ready":
            raise Refused(answer.decode(errors="replace") or "the agent ended before it was ready")
        return -1
    os.close(read)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    return write


PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def supervise(command: list[str], env: dict[bytes, bytes]) -> int:
    """Run a command with our own standard streams, pass signals on, return its exit status, -N for signal N.

    Raises CommandError if it cannot be run. What the terminal sends (Ctrl-C) goes to the whole foreground group,
    so the command has it already; only what somebody sent to us alone is passed on, and the two are told apart
    by who sent it, where the system says so (not on macOS).
    """
    import _signal as signal  # type: ignore[import-not-found]  # the package module wraps each number in an enum, which costs as much as a call

    mine = [getattr(signal, name) for name in PASSED_ON]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*mine, signal.SIGCHLD])
    try:
        # Python ignores these two, and `serve` blocks some for its threads; the command starts with neither.
        pid = os.posix_spawnp(command[0], command, env, setsigmask=[], setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
    except (OSError, ValueError) as error:  # ValueError: an empty name
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise cannot_run(command[0], error) from None
    while True:
        if hasattr(signal, "sigwaitinfo"):
            got = signal.sigwaitinfo([*mine, signal.SIGCHLD])
            number, sent = got.si_signo, got.si_code <= 0  # SI_USER and its kin; the kernel's own are positive
        else:
            number, sent = signal.sigwait([*mine, signal.SIGCHLD]), True
        if number != signal.SIGCHLD:
            if sent:
                os.kill(pid, number)
            continue
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return exit_code_of(status)


def exit_code_of(status: int) -> int:
    """The exit status in what waitpid returned, -N for signal N; os.waitstatus_to_exitcode is not in 3.8."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def ending(code: int) -> str:
    """The reason for a unit whose command did not end well."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def shell_status(code: int) -> int:
    """The exit status that a shell gives for what `supervise` returned."""
    return code if code >= 0 else 128 - code


def cannot_run(program: str, error: Exception) -> CommandError:
    """The error for a command that could not be started."""
    known = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return CommandError(f"cannot run {program}: {getattr(error, 'strerror', 'no such command')}", 126 if known else 127)


@dataclass
class Serving:
    """What `serve` was asked for."""

    path: str
    mode: int = 0o600
    group: int = -1
    level: int = 1  # 0 quiet, 1, 2 verbose
    log_file: str = ""
    pid_file: str = ""
    timeline: Callable[[Graph], None] = lambda graph: None  # called at the end
    detach: bool = False
    advice: str = ""  # goes to the log
    command: list[str] = []  # noqa: RUF012
    body: Callable[[str, Agent], int] | None = None  # called with the path, for the agent's life


def serve(wish: Serving) -> int:
    """Be the agent until a signal or the end of the command; return the exit status. Raises Refused."""
    sock = inherited_socket()
    path = sock.getsockname() if sock else os.path.abspath(wish.path)
    mine = sock is None
    lock = -1
    ready = -1
    try:
        if mine:
            if len(os.fsencode(path)) > (103 if sys.platform == "darwin" else 107):
                raise Refused(f"{path}: too long for a socket path; choose a shorter --socket-path")
            lock = claim(path)
            sock = listen(path, wish.mode, wish.group)
            inode = os.lstat(path).st_ino
        if wish.detach:
            held, lock = lock, -1  # whatever happens, it is the child's to remove
            ready = detach()
            if ready < 0:
                return 0
            lock = held
        if mine:
            os.ftruncate(lock, 0)
            os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        try:
            return _serve(wish, sock, path, ready)
        finally:
            sock.close()
            if mine and os.path.lexists(path) and os.lstat(path).st_ino == inode:
                remove(path)
    except Refused as error:
        if ready < 0:
            raise
        os.write(ready, str(error).encode())
        return error.exit_code
    finally:
        if lock >= 0:
            remove(path + ".lock")
            os.close(lock)


def _serve(wish: Serving, sock: Any, path: str, ready: int) -> int:
    import _signal as signal
    import threading

    stops = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    passed_on = {getattr(signal, name) for name in PASSED_ON} if wish.command or wish.body else set()
    signal.pthread_sigmask(signal.SIG_BLOCK, stops | passed_on | {signal.SIGCHLD})  # for all threads to come
    try:
        mail = Mail(wish.level, wish.log_file or None)
        if wish.pid_file:
            with open(wish.pid_file, "w", encoding="ascii") as f:
                f.write(f"{os.getpid()}\n")
    except OSError as error:
        raise Refused(f"cannot write {error.filename}: {error.strerror}") from None
    agent = Agent(mail)
    agent.max_connections = _connection_limit(raise_it=not (wish.command or wish.body))
    threading.stack_size(STACK)
    writer = threading.Thread(target=mail.run, daemon=True)
    writer.start()
    server = make_server(agent, sock)
    mail.say(f"listening at {path} (pid {os.getpid()})")
    if wish.advice:
        mail.say(wish.advice)
    threading.Thread(target=server.serve_forever, args=(None,), daemon=True).start()
    notify(f"READY=1\nMAINPID={os.getpid()}")
    if ready >= 0:
        os.write(ready, b"ready")
        os.close(ready)
    try:
        if wish.body:
            return wish.body(path, agent)
        if wish.command:
            return shell_status(supervise(wish.command, environment(CODER_AGENT_SOCKET_PATH=path)))
        while True:
            number = signal.sigwait(stops)
            if number != signal.SIGHUP or not wish.detach:
                mail.say(f"stopping: got {next(name for name in PASSED_ON if getattr(signal, name) == number)}")
                return 0
    finally:
        notify("STOPPING=1")
        agent.stop()
        wish.timeline(agent.graph())
        if wish.pid_file:
            remove(wish.pid_file)
        mail.queue.put(None)
        writer.join(0.5)


def _connection_limit(raise_it: bool) -> int:
    """How many connections the descriptor limit leaves room for; the limit is raised if only we are to have it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 64
    if raise_it and soft < wanted:
        try:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (ValueError, OSError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - 24))


# ----------------------------------------------------------------------------------------------------------
# Client. The Python API and what the command line is made of. Every call has a connection of its own, so a
# Client may be used from several threads; `unit` keeps one open while its block runs. Waits are told, not
# polled. Times are in seconds.
# ----------------------------------------------------------------------------------------------------------


def duration(text: str) -> float:
    """Return seconds from a duration as Go's time.ParseDuration has it (1h30m, 500ms) or bare seconds.

    0 means no limit wherever a timeout is asked for. Raises UsageError.
    """
    units = {"": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    units.update({"\u00b5s": 1e-6, "\u03bcs": 1e-6})  # micro sign and Greek mu, as in Go
    total, rest = 0.0, text
    try:
        while rest or not text:
            number = rest[: len(rest) - len(rest.lstrip("0123456789."))]
            rest = rest[len(number) :]
            unit = rest[: len(rest) - len(rest.lstrip("nu\u00b5\u03bcmsh"))]
            rest = rest[len(unit) :]
            if not unit and number != text:
                raise ValueError
            total += float(number) * units[unit]
        if total > 1e9:
            raise ValueError
        return total
    except (ValueError, KeyError):
        hint = "write 30 or 30s, 10m, 1h30m, 500ms, 1.5h; 0 for no limit"
        raise UsageError(f"invalid duration {ascii(text)[:60]}: {hint}") from None


@dataclass
class Started:
    """What `start` returns: the dependencies of the unit, and how many seconds it waited for them."""

    unit: str
    dependencies: list[str]
    waited: float


class Channel:
    """One connection to an agent: requests out, messages in."""

    def __init__(self, path: str, connect_timeout: float = 0.0) -> None:
        """Connect, trying again for `connect_timeout` seconds. Raises Unreachable with the reason."""
        from _socket import AF_UNIX, SOCK_STREAM, socket  # the package module imports enum and selectors

        self.path = path
        self._next = 0
        self._buffer = b""
        self._messages: list[Any] = []
        deadline, pause = time.monotonic() + connect_timeout, 0.005
        while True:
            self.sock = socket(AF_UNIX, SOCK_STREAM)
            try:
                refuse_strangers(path)
                self.sock.settimeout(REPLY_TIMEOUT)
                self.sock.connect(path)
                return
            except OSError as error:
                self.sock.close()
                if time.monotonic() >= deadline or error.errno not in RETRIED:
                    raise Unreachable(explain(path, error)) from None
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def request(self, method: str, **params: Any) -> int:
        """Send a request and return its id."""
        self._next += 1
        data = encode({"id": self._next, "method": method, "params": params})
        if len(data) > MAX_LINE:
            raise Refused(f"{method}: too much for one request ({len(data)} bytes of {MAX_LINE}); use several calls")
        deadline = time.monotonic() + REPLY_TIMEOUT
        while data:
            try:
                self.sock.settimeout(0)
                data = data[self.sock.send(data) :]
            except BlockingIOError:  # it may be busy answering: take what it says, so that both can go on
                if time.monotonic() > deadline:
                    raise self._gone() from None
                self._read(0.01)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # else it may have said why before it hung up
                    raise self._gone() from None
                break
        return self._next

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next message, or None if none comes within `timeout` seconds. Raises Unreachable."""
        deadline = time.monotonic() + timeout
        while not self._messages:
            if not self._read(deadline - time.monotonic()):
                return None
        message: dict[str, Any] = self._messages.pop(0)
        return message

    def _read(self, timeout: float) -> bool:
        """Take what has come; False if nothing does within `timeout` seconds. Raises Unreachable."""
        self.sock.settimeout(max(timeout, 0.0))
        try:
            chunk = self.sock.recv(65536)
        except OSError as error:
            if isinstance(error, (BlockingIOError, TimeoutError)) or error.errno is None:  # 3.8: socket.timeout
                return False
            raise self._gone() from None
        if not chunk:
            raise self._gone()
        self._buffer += chunk
        if b"\n" in chunk:
            *lines, self._buffer = self._buffer.split(b"\n")
            self._messages += [self._message(line) for line in lines]
        elif len(self._buffer) > MAX_REPLY:
            raise Unreachable(f"what answers at {self.path} is not a coder_sync agent: it sent an endless line")
        return True

    def _message(self, line: bytes) -> dict[str, Any]:
        try:
            message = decode(line)
        except ParseError:
            message = None
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            raise Unreachable(f"what answers at {self.path} does not speak our protocol: {line[:40]!a}")
        return message

    def answer(self, request: int, timeout: float = REPLY_TIMEOUT) -> Any:
        """Return the result of a request. Raises what the agent answered, or Unreachable."""
        deadline = time.monotonic() + timeout
        while True:
            message = self.receive(deadline - time.monotonic())
            if message is None:
                raise Unreachable(f"the agent at {self.path} has not answered for {timeout:.0f} s; is it stopped?")
            if message.get("id") == request or (message.get("id") is None and "error" in message):
                return result_of(message)

    def call(self, method: str, **params: Any) -> Any:
        """Send a request and return its result."""
        return self.answer(self.request(method, **params))

    def more(self) -> bool:
        """Whether a message has come that was not received yet."""
        return bool(self._messages)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self.sock.fileno()

    def close(self) -> None:
        """Hang up; the agent forgets what the connection waits for."""
        self.sock.close()

    def _gone(self) -> Unreachable:
        return Unreachable(f"the agent at {self.path} went away before it answered; is it still running?")


RETRIED = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.EACCES)  # an agent that boots passes through these


def result_of(message: dict[str, Any]) -> Any:
    """Return the result in an answer or raise its error as the class it was on the agent's side."""
    error = message.get("error")
    if error is None:
        return message.get("result")
    if not isinstance(error, dict):
        raise Unreachable("the agent's answer has an error that is none")
    kinds: list[type[SyncError]] = [CycleError, AlreadyStarted, NotRegistered, DependencyFailed, Unreachable]
    kinds += [ParseError, MethodNotFound, InvalidParams, InvalidRequest]
    kind = next((k for k in kinds if k.code == error.get("code")), Refused)
    raise kind(str(error.get("message")), error.get("data"))


def expect(kind: type[Any], answer: Any) -> Any:
    """Return an answer that is of the kind it should be: a list of objects, or an object. Raises Unreachable."""
    rows = answer if isinstance(answer, list) else [answer]
    if not isinstance(answer, kind) or not all(isinstance(row, dict) for row in rows):
        raise Unreachable(f"the agent's answer is not one of ours: {one_line(ascii(answer))[:60]}; one version?")
    return answer


def missing_of(answer: Any) -> list[Dependency]:
    """The dependencies that an answer or a notification says are missing."""
    return [record(Dependency, row) for row in expect(list, expect(dict, answer).get("missing"))]


def user_name(uid: int) -> str:
    """The name of a user, or its number."""
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return f"uid {uid}"


def refuse_strangers(path: str) -> None:
    """On the shared default path, refuse a socket that is neither ours nor root's: anybody may create one there."""
    if path == DEFAULT_SOCKET and os.geteuid() != 0:
        uid = os.lstat(path).st_uid
        if uid not in (0, os.geteuid()):
            raise Unreachable(f"{path} belongs to {user_name(uid)}, not to you or root; choose another --socket-path")


def explain(path: str, error: OSError) -> str:
    """Why an agent could not be reached, and what to do, in one line."""
    import stat

    start = f"start one with `{PROGRAM} serve --detach`"
    if os.path.basename(DEFAULT_SOCKET) != os.path.basename(path):
        start = f"start one with `{PROGRAM} serve --detach --socket-path {path}`"
    try:
        found = os.lstat(path)
    except OSError:
        found = None
    if error.errno == errno.ENOENT:
        why = f"no such file; is the agent running, and with this path? {start}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        whose = f" (it belongs to {user_name(found.st_uid)}, mode {stat.S_IMODE(found.st_mode):o})" if found else ""
        why = f"permission denied{whose}; run as its owner, or share it with `serve --mode 660 --group GROUP`"
    elif found and not stat.S_ISSOCK(found.st_mode) and not stat.S_ISLNK(found.st_mode):
        why = f"not a socket; remove it and {start}" if stat.S_ISREG(found.st_mode) else "not a socket"
    elif error.errno == errno.ECONNREFUSED:
        why = f"connection refused; the agent that made it is gone; {start}"
    elif error.errno == errno.EAGAIN:
        why = "the agent does not take connections; is it stopped or overloaded?"
    else:
        why = error.strerror or str(error)
    return f"cannot reach an agent at {path}: {why}"


class Client:
    """Talk to an agent. All times in seconds.

    Every call may raise Unreachable (no agent, or it went away) and Refused (the rules say no; CycleError,
    AlreadyStarted and NotRegistered are kinds of it). `exit_code` of an error is the command line's.
    """

    def __init__(self, socket_path: str = "", connect_timeout: float | None = None) -> None:
        """Use `socket_path`, else $CODER_AGENT_SOCKET_PATH, else /tmp/coder-agent.sock.

        Calls that coordinate try for `connect_timeout` to reach an agent that may still be booting, default
        $CODER_SYNC_CONNECT_TIMEOUT or 3 seconds; questions try once. Nothing is connected yet.
        """
        self.socket_path = socket_path or getenv("CODER_AGENT_SOCKET_PATH") or DEFAULT_SOCKET
        if connect_timeout is None:
            text = getenv("CODER_SYNC_CONNECT_TIMEOUT")
            connect_timeout = duration(text) if text else CONNECT_TIMEOUT
        self.connect_timeout = connect_timeout

    def _call(self, kind: type[Any], method: str, patience: float, **params: Any) -> Any:
        channel = Channel(self.socket_path, patience)
        try:
            return expect(kind, channel.call(method, **params))
        finally:
            channel.close()

    def ping(self, wait: float = 0.0) -> dict[str, Any]:
        """Return the agent's `version`, `pid` and `uptime`; keep trying for `wait` seconds."""
        answer: dict[str, Any] = self._call(dict, "ping", wait)
        return answer

    def want(self, unit: str, *dependencies: str, requires: str = SUCCESS) -> list[str]:
        """Make `unit` depend on `dependencies`, all or none; return all it depends on now. Raises CycleError."""
        answer = self._call(
            dict, "want", self.connect_timeout, unit=unit, dependencies=list(dependencies), requires=requires
        )
        return [str(name) for name in expect(dict, answer).get("dependencies") or ()]

    def start(
        self,
        unit: str,
        want: Iterable[str] = (),
        requires: str = SUCCESS,
        timeout: float = START_TIMEOUT,
        pid: int = 0,
        on_wait: Callable[[list[Dependency], float], None] | None = None,
    ) -> Started:
        """Wait until `unit` may run and mark it started, in one step. `timeout` 0 waits without limit.

        `want` adds dependencies first; `pid` names a process whose end fails the unit if it is still started
        then; `on_wait` is called with what is missing, and the seconds waited, when the wait begins and every
        30 seconds. Raises AlreadyStarted, CycleError, DependencyFailed, TimedOut.
        """
        with Start(self, unit, want, requires, timeout, pid, on_wait=on_wait, hold=False) as start:
            return start.result

    def wait(
        self,
        *units: str,
        requires: str = SUCCESS,
        timeout: float = START_TIMEOUT,
        on_wait: Callable[[list[Dependency], float], None] | None = None,
    ) -> float:
        """Wait for units without being one; return the seconds it took. Raises DependencyFailed, TimedOut."""
        began = time.monotonic()
        channel = Channel(self.socket_path, self.connect_timeout)
        try:
            wait_for(channel, ", ".join(units), timeout, on_wait, "wait", units=list(units), requires=requires)
        finally:
            channel.close()
        return time.monotonic() - began

    def complete(self, unit: str, exit_code: int = 0) -> None:
        """End `unit`: with success, or as failed if `exit_code` is not 0. Raises NotRegistered."""
        if exit_code:
            self._call(dict, "fail", self.connect_timeout, unit=unit, exit_code=exit_code)
        else:
            self._call(dict, "complete", self.connect_timeout, unit=unit)

    def fail(self, unit: str, reason: str = "") -> None:
        """End `unit` without success: units that require it are skipped. Raises NotRegistered."""
        self._call(dict, "fail", self.connect_timeout, unit=unit, reason=reason)

    def status(self, unit: str) -> UnitStatus:
        """Return a snapshot of one unit and its dependencies."""
        status: UnitStatus = record(UnitStatus, self._call(dict, "status", 0, unit=unit))
        return status

    def list(self, everything: bool = False) -> Sequence[UnitStatus]:
        """Return snapshots of all units by name; `everything` includes names that were only ever wanted."""
        return [record(UnitStatus, row) for row in self._call(list, "list", 0, all=everything)]

    def graph(self) -> Graph:
        """Return all units with their edges and times."""
        graph: Graph = record(Graph, self._call(dict, "graph", 0))
        return graph

    def events(self, follow: bool = False, since: int = 0) -> Iterator[Event]:
        """Iterate over what happened after event `since`, oldest first, and with `follow` over what happens next.

        The agent remembers the last 100,000 events. A follower that does not read in time is dropped; it ends
        with Unreachable, as it does when the agent ends.
        """
        channel = Channel(self.socket_path)
        try:
            for row in channel.call("events", follow=follow, since=since):
                yield record(Event, row)
            while follow:
                message = channel.receive(3600.0)
                if message and message.get("method") == "event":
                    yield record(Event, message["params"])
        finally:
            channel.close()

    def unit(self, unit: str, want: Iterable[str] = (), requires: str = SUCCESS, timeout: float = 300.0) -> Start:
        """Return a context manager that starts `unit`, and completes it at the end of its block.

        A block that raises fails the unit, with the exception's text as the reason; so does the end of the
        process. Entering raises as `start` does.
        """
        return Start(self, unit, want, requires, timeout, 0, None, hold=True)


class Start:
    """A start and the connection it was asked on, which holds the unit if `hold`; see Client.unit."""

    def __init__(
        self,
        client: Client,
        unit: str,
        want: Iterable[str],
        requires: str,
        timeout: float,
        pid: int,
        on_wait: Callable[[list[Dependency], float], None] | None,
        hold: bool,
    ) -> None:
        self.client, self.unit, self.timeout, self.on_wait = client, unit, timeout, on_wait
        self.params = {"unit": unit, "dependencies": list(want), "requires": requires, "pid": pid, "hold": hold}

    def __enter__(self) -> Start:
        began = time.monotonic()
        self.channel = Channel(self.client.socket_path, self.client.connect_timeout)
        try:
            result = wait_for(self.channel, f"unit {self.unit}", self.timeout, self.on_wait, "start", **self.params)
        except BaseException:
            self.channel.close()
            raise
        names = [str(name) for name in expect(dict, result).get("dependencies") or ()]
        self.result = Started(self.unit, names, time.monotonic() - began)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if self.params["hold"]:
                if error is None:
                    self.channel.call("complete", unit=self.unit)
                else:
                    self.channel.call("fail", unit=self.unit, reason=f"{type(error).__name__}: {error}".rstrip(": "))
        except SyncError:
            if error is None:  # else the block's own exception matters more
                raise
        finally:
            self.channel.close()


def wait_for(
    channel: Channel,
    what: str,
    timeout: float,
    on_wait: Callable[[list[Dependency], float], None] | None,
    method: str,
    **params: Any,
) -> Any:
    """Send a request that may wait; report what is missing now and then; return its result.

    The time is ours: when it is up the agent is asked to cancel, and either does, and says what was missing,
    or has just answered. So a unit is never started for a caller who has given up. Raises TimedOut.
    """
    request = channel.request(method, progress=on_wait is not None, **params)
    began = time.monotonic()
    deadline = began + timeout if timeout else float("inf")
    report_at, report = began + REPORT_EVERY, 0
    while True:
        now = time.monotonic()
        message = channel.receive(max(0.0, min(deadline, report_at) - now))
        if message is None and time.monotonic() >= deadline:
            break
        if message is None:
            report_at += REPORT_EVERY
            report = channel.request("missing", id=request) if on_wait else 0
        elif message.get("method") == "waiting" and on_wait:
            on_wait(missing_of(message.get("params")), 0.0)
        elif message.get("id") == request or message.get("id") is None:
            return result_of(message)
        elif message.get("id") == report and on_wait:
            on_wait(missing_of({"missing": result_of(message)}), time.monotonic() - began)
    cancel, missing = channel.request("cancel", id=request), []
    message = channel.receive(5.0)
    while message is not None:
        if message.get("id") == request:
            return result_of(message)
        if message.get("id") == cancel:
            missing = missing_of(result_of(message))
            break
        message = channel.receive(5.0)
    raise TimedOut(f"timeout waiting for {'dependencies of ' if method == 'start' else ''}{what}", missing)


# ----------------------------------------------------------------------------------------------------------
# Views. Pure functions from data to text.
# ----------------------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """A duration for people: 350ms, 2.1s, 31s, 4m12s, 1h02m."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def names_of(names: Sequence[str]) -> str:
    """Names for a message, not too many."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def state(row: Dependency) -> str:
    """Where a dependency stands and why: `git-clone started 31s ago by bash setup.sh (pid 4242)`."""
    status, ago = row.current_status, f"{span(row.age)} ago"
    if status == NOT_REGISTERED:
        text = f"{row.depends_on} not registered"
        return text + (f', did you mean "{row.did_you_mean}"?' if row.did_you_mean else "")
    if status == PENDING:
        text = f"{row.depends_on} pending for {span(row.age)}"
        return text + (f", waits for {', '.join(row.waits_for)}" if row.waits_for else ", not started yet")
    text = f"{row.depends_on} {status} {ago}"
    if row.reason:
        text += f" ({row.reason})"
    if row.owner and status == STARTED:
        gone = ", which is no longer running" if row.owner.alive is False else ""
        text += f" by {row.owner.command} (pid {row.owner.pid}){gone}"
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]], columns: str = "") -> str:
    """Rows in columns two spaces apart; `columns` names those to show, in that order. Raises UsageError."""
    lower = [h.lower() for h in header]
    wanted = [c.strip().lower().replace("_", " ") for c in columns.split(",")] if columns else lower
    for name in wanted:
        if name not in lower:
            raise UsageError(f'no such column: "{name}"; there are {", ".join(lower)}')
    picked = [[row[lower.index(name)] for name in wanted] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*picked)]
    return "".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() + "\n" for row in picked)


def status_text(status: UnitStatus, columns: str = "") -> str:
    """A unit and the table of its dependencies."""
    text = f"Unit: {status.unit_name}\nStatus: {status.status}\nReady: {str(status.is_ready).lower()}\n"
    if status.reason:
        text += f"Reason: {status.reason}\n"
    if status.owner:
        gone = ", which is no longer running" if status.owner.alive is False else ""
        text += f"Started by: {status.owner.command} (pid {status.owner.pid}){gone}\n"
    if status.did_you_mean:
        text += f"Did you mean: {status.did_you_mean}\n"
    if status.dependencies:
        header = ["DEPENDS ON", "REQUIRED STATUS", "CURRENT STATUS", "SATISFIED"]
        rows = [
            [d.depends_on, d.required_status, d.current_status, str(d.is_satisfied).lower(), d.reason]
            for d in status.dependencies
        ]
        if any(d.reason for d in status.dependencies) or "reason" in columns.lower():
            header.append("REASON")
        text += "\n" + table(header, rows, columns)
    else:
        text += "\nNo dependencies.\n"
    if status.history:
        first = status.history[0].time
        lines = [[f"+{span(e.time - first)}", e.kind, e.detail] for e in status.history]
        text += "\n" + table(["TIME", "EVENT", "DETAIL"], lines)
    return text


def list_text(units: Sequence[UnitStatus], columns: str = "") -> str:
    """The table of all units; the reason has a column where anything failed or was skipped."""
    header = ["UNIT", "STATUS", "READY"]
    if any(u.reason for u in units) or "reason" in columns.lower():
        header.append("REASON")
    return table(header, [[u.unit_name, u.status, str(u.is_ready).lower(), u.reason] for u in units], columns)


# -- pictures of a whole startup: all from one Graph --------------------------------------------------------


def begin(node: Node) -> float:
    """When a unit first showed up."""
    return min(t for t in (node.registered, node.waiting, node.started) if t >= 0)


def end(node: Node, now: float) -> float:
    """When a unit ended, or now."""
    return node.ended if node.ended >= 0 else now


def phases(node: Node, last: float) -> tuple[float, float, float]:
    """When a unit was asked for, when it started, when it ended; what has not been comes with what came next."""
    to = end(node, last)
    start = node.started if node.started >= 0 else to
    return node.waiting if node.waiting >= 0 else start, start, to


def took(node: Node, last: float) -> str:
    """How long a unit ran, or waited if it has not started."""
    asked, start, to = phases(node, last)
    return span(to - start) if node.started >= 0 else span(start - asked) if node.waiting >= 0 else "-"


def standing(node: Node) -> str:
    """The status in a word for pictures, which show what is on its way."""
    if node.status == PENDING:
        return "waiting" if node.is_waiting else "gave up" if node.waiting >= 0 else "pending"
    return "running" if node.status == STARTED else node.status


def in_order(graph: Graph) -> list[Node]:
    """Registered units in the order they started; those that have not, behind."""
    units = [n for n in graph.nodes if n.status != NOT_REGISTERED]
    return sorted(units, key=lambda n: (n.started < 0, n.started if n.started >= 0 else begin(n), n.unit_name))


def critical_path(graph: Graph) -> list[tuple[Node, float]]:
    """The chain of units that determined when the last one ended, each with its share in seconds.

    From the unit that ended last back to the dependency that released it (or, if none held it up, that ended last),
    and so on: what really held up what, not what might have.
    """
    nodes = {n.unit_name: n for n in graph.nodes}
    node = max((n for n in graph.nodes if n.started >= 0), key=lambda n: end(n, graph.now), default=None)
    path: list[tuple[Node, float]] = []
    until = float("inf")
    for _ in nodes:
        if node is None:
            break
        if node.started >= 0:
            path.append((node, max(0.0, min(end(node, graph.now), until) - node.started)))
        until = node.started if node.started >= 0 else node.ended  # what was skipped ended with what it required
        before = [nodes[d] for d in node.wants if d in nodes and 0 <= nodes[d].ended <= until]
        before.sort(key=lambda one: one.ended)
        node = nodes.get(node.released_by) or (before[-1] if before else None)
    return path[::-1]


def extent(graph: Graph) -> tuple[float, float]:
    """From the first sign of a unit to the end of the last, or now while any runs or waits."""
    units = [n for n in graph.nodes if n.status != NOT_REGISTERED]
    going = any(n.status == STARTED or n.is_waiting for n in units)
    last = max((n.ended for n in units), default=0.0)
    return min(map(begin, units), default=0.0), graph.now if units and (going or last < 0) else last


def summary(graph: Graph) -> str:
    """The sentence people want; of a long critical path it names the longest steps."""
    first, last = extent(graph)
    path = critical_path(graph)
    count = {s: sum(n.status == s for n in graph.nodes) for s in (FAILED, SKIPPED, STARTED, PENDING)}
    words = {STARTED: "still running", PENDING: "not started"}
    rest = [f"{n} {words.get(s, s)}" for s, n in count.items() if n]
    text = f"{span(last - first)} in all" + (f" ({', '.join(rest)})" if rest else "")
    if path and last > first:
        longest = {n.unit_name for n, _ in sorted(path, key=lambda step: -step[1])[:10]}
        steps: list[str] = []
        for n, share in path:
            if n.unit_name in longest:
                steps.append(f"{n.unit_name} {span(share)}")
            elif steps[-1:] != ["..."]:
                steps.append("...")
        percent = 100 * sum(share for _, share in path) / (last - first)
        text += f"; critical path: {' -> '.join(steps)} ({percent:.0f}% of it)"
    return text if graph.nodes else "no units yet"


def wide(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int, dots: str = "\u2026") -> str:
    """The text in exactly `width` columns; what is too long loses its middle, since names differ at both ends."""
    if wide(text) > width:
        head, tail = text[: len(text) // 2], text[len(text) // 2 :]
        while wide(head) + wide(tail) > width - len(dots):
            head, tail = (head[:-1], tail) if wide(head) > wide(tail) else (head, tail[1:])
        text = head + dots + tail
    return text + " " * (width - wide(text))


def wrap(text: str, width: int, dots: str = "\u2026") -> list[str]:
    """The text in lines of at most `width` columns."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and wide(lines[-1]) + 1 + wide(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + fit(word, min(wide(word), width), dots)
    return lines


def ticks(length: float, most: int) -> list[float]:
    """Round numbers of seconds for an axis, at most `most` of them."""
    steps = [m * 10.0**e for e in range(-3, 1) for m in (1, 2, 5)] + [15.0, 30.0]
    steps += [60.0 * m for m in (1, 2, 5, 10, 15, 30, 60, 120, 360, 720, 1440)]
    step = next((s for s in steps if length / s <= max(most, 1)), length or 1.0)
    return [i * step for i in range(int(length / step + 1e-9) + 1)]


COLOURS = {COMPLETED: "32", FAILED: "31", SKIPPED: "33", STARTED: "36", PENDING: "2"}


def timeline_text(graph: Graph, width: int = 100, colour: bool = False, unicode: bool = True) -> str:
    """Every unit on one time axis: waiting, running, outcome; a star for those on the critical path."""
    wait, run, dots = ("\u2591", "\u2588", "\u2026") if unicode else (".", "#", "~")
    units, (first, last) = in_order(graph), extent(graph)
    if not units:
        return summary(graph) + "\n"
    path = {n.unit_name for n, _ in critical_path(graph)}
    label = {n.unit_name: n.unit_name if unicode else ascii(n.unit_name)[1:-1] for n in units}
    names = min(max(map(wide, label.values())), max(8, min(width // 3, width - 32)))
    bars = max(10, width - names - 22)
    scale = bars / (last - first) if last > first else 0.0
    axis = [" "] * bars
    for tick in ticks(last - first, min(10, bars // 10)):
        at, mark = int(tick * scale), span(tick) if tick else "0"
        if at + len(mark) <= bars:
            axis[at : at + len(mark)] = mark
    lines = [" " * (names + 3) + "".join(axis).rstrip()]
    for n in units:
        asked, start, to = phases(n, last)
        a, b = (min(bars - 1, int((t - first) * scale)) for t in (asked, start))
        c = max(b + 1, min(bars, round((to - first) * scale)))
        ends = run if n.started >= 0 else wait if n.waiting >= 0 else " "
        bar = (" " * a + wait * (b - a) + ends * (c - b)).ljust(bars)
        name = fit(label[n.unit_name], names, dots)
        if colour:
            name = f"\033[1m{name}\033[0m" if n.unit_name in path else name
            bar = f"\033[{COLOURS[n.status]}m{bar}\033[0m"
        lines.append(f"{'*' if n.unit_name in path else ' '} {name} {bar} {took(n, last):>7} {standing(n)}")
    return "\n".join([*lines, "", *wrap(summary(graph), width, dots)]) + "\n"


def blame_text(graph: Graph, most: int = 25) -> str:
    """Units by how long they ran, and by how long others waited for them while they did not wait themselves."""
    _, last = extent(graph)
    nodes = {n.unit_name: n for n in graph.nodes}
    held = dict.fromkeys(nodes, 0.0)
    for n in graph.nodes:
        asked, start, _ = phases(n, last)
        for name, requirement in n.wants.items():
            d = nodes[name]
            met = d.started if requirement == START and d.started >= 0 else end(d, last)
            upto, (its, began, _) = min(start, met), phases(d, last)
            held[name] += max(0.0, upto - asked) - max(0.0, min(began, upto) - max(its, asked))
    ran = {n.unit_name: end(n, last) - n.started if n.started >= 0 else 0.0 for n in graph.nodes}
    text = ""
    for title, by in (("by how long they ran", ran), ("by how long others waited for them", held)):
        best = sorted((n for n in graph.nodes if by[n.unit_name] > 0), key=lambda n: -by[n.unit_name])
        body = [[n.unit_name, span(ran[n.unit_name]), span(held[n.unit_name]), n.status] for n in best[:most]]
        more = f"and {len(best) - most} more\n" if len(best) > most else ""
        text += f"{title}:\n" + table(["UNIT", "RAN", "OTHERS WAITED", "STATUS"], body) + more + "\n"
    return text + summary(graph) + "\n"


def timeline_data(graph: Graph) -> dict[str, Any]:
    """The timeline for programs; times in seconds since the first sign of a unit, null for what has not been."""
    first, last = extent(graph)
    path = [{"unit_name": n.unit_name, "seconds": round(share, 3)} for n, share in critical_path(graph)]
    units = []
    for n in in_order(graph):
        times: dict[str, float] = {k: getattr(n, k) for k in ("registered", "waiting", "started", "ended")}
        row: dict[str, Any] = {"unit_name": n.unit_name, "status": n.status, "reason": n.reason}
        row.update((k, round(t - first, 6) if t >= 0 else None) for k, t in times.items())
        units.append({**row, "released_by": n.released_by, "wants": n.wants})
    return {"seconds": round(last - first, 6), "summary": summary(graph), "critical_path": path, "units": units}


def timeline_trace(graph: Graph) -> dict[str, Any]:
    """The timeline in Chrome's Trace Event Format, which Perfetto reads too: a row a unit, times in microseconds."""
    first, last = extent(graph)
    events: list[dict[str, Any]] = []
    for row, n in enumerate(in_order(graph), 1):
        where = {"pid": 1, "tid": row}
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": n.unit_name}})
        events.append({"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": row}})
        args = {"status": n.status, "reason": n.reason, "released_by": n.released_by, "wants": list(n.wants)}
        times = [round((t - first) * 1e6) for t in phases(n, last)]
        for kind, name, i in (("waiting", f"{n.unit_name} waits", 0), ("running", n.unit_name, 1)):
            if times[i + 1] > times[i] or (i and n.started >= 0):
                what = {"ph": "X", "cat": kind, "name": name, "ts": times[i], "dur": times[i + 1] - times[i]}
                events.append({**what, **where, "args": args})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def xml(text: str) -> str:
    """Text for XML; what XML cannot hold is replaced."""
    text = "".join(
        c if (c >= " " and not 0xD800 <= ord(c) < 0xE000 and c not in "\ufffe\uffff") or c == "\n" else "\ufffd"
        for c in text
    )
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


STYLE = """
svg{font:12px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:#fff;fill:#222}
.w{fill:#d5d9e0}.completed{fill:#3a8f5c}.failed{fill:#cc3b3b}.started{fill:#3f7fc4}.g{stroke:#888;opacity:.3}
.y{opacity:0}.z{fill:#888;opacity:.08}.h{font-weight:bold;fill:#b5500f}.m{fill:#777}
.c{fill:none}.c,.k{stroke:#d2641e;stroke-width:2}
@media(prefers-color-scheme:dark){svg{background:#16181d;fill:#ddd}.w{fill:#3a404b}.completed{fill:#4fb37a}
.failed{fill:#e26060}.h{fill:#ff9a56}.c,.k{stroke:#ff8a3d}.m{fill:#999}}
"""


def timeline_svg(graph: Graph) -> str:
    """The timeline as one self-contained picture."""
    units, (first, last), path = in_order(graph), extent(graph), critical_path(graph)
    marked = {n.unit_name for n, _ in path}
    left = 16 + 7.4 * min(max((wide(n.unit_name) for n in units), default=0), 60)
    bars, row, width = 760.0, 20, left + 910
    scale = bars / (last - first) if last > first else 0.0
    body = []

    def text(x: float, y: float, content: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.0f}"{more}>{xml(content)}</text>'

    def rect(kind: str, x: float, y: float, width: float, height: float) -> str:
        return f'<rect class="{kind}" x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{height:.0f}"/>'

    said = wrap(summary(graph), int((width - 16) / 7.4))
    body += [text(8, 20 + 18 * i, line, ' class="h"') for i, line in enumerate(said)]
    top = 18 * len(said) + 44
    foot = top + row * len(units)
    for tick in ticks(last - first, 10) if units else ():
        at = left + tick * scale
        body.append(f'<path class="g" d="M{at:.1f} {top - 8}V{foot}"/>')
        for y in (top - 14, foot + 14)[: 1 + (len(units) > 30)]:
            body.append(text(at, y, span(tick) if tick else "0", ' class="m" text-anchor="middle"'))
    for i, n in enumerate(units):
        asked, start, to = phases(n, last)
        about = [f"{n.unit_name}: {n.status}" + (f" ({n.reason})" if n.reason else "")]
        about += [f"waited {span(start - asked)}" + (f", last for {n.released_by}" if n.released_by else "")]
        about += [f"ran {span(to - start)}"] if n.started >= 0 else []
        about += ["depends on " + names_of(list(n.wants))] if n.wants else []
        at, key = top + row * i, " k" if n.unit_name in marked else ""
        body.append(f"<g><title>{xml(chr(10).join(about))}</title>")
        body.append(rect("z" if i % 2 else "y", 0, at, width, row))
        body.append(text(8, at + 14, fit(n.unit_name, 60).rstrip(), ' class="h"' if key else ""))
        if start > asked:
            body.append(rect("w", left + (asked - first) * scale, at + 7, (start - asked) * scale, 6))
        if n.started >= 0:
            size = max(2.0, (to - start) * scale)
            body.append(rect(n.status + key, min(left + (start - first) * scale, left + bars - size), at + 4, size, 12))
        body.append(text(left + bars + 62, at + 14, took(n, last), ' text-anchor="end"'))
        body.append(text(left + bars + 70, at + 14, standing(n), ' class="m"') + "</g>")
    rows = {n.unit_name: top + row * i for i, n in enumerate(units)}
    for (a, _), (b, _) in zip(path, path[1:]):
        at = left + (b.started - first) * scale
        body.append(f'<path class="c" d="M{at:.1f} {rows[a.unit_name] + 16}V{rows[b.unit_name] + 4}"/>')
    sides = f'width="{width:.0f}" height="{foot + 24}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {sides} viewBox="0 0 {width:.0f} {foot + 24}">'
        f"<title>startup timeline</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


def part(graph: Graph, names: Sequence[str]) -> Graph:
    """The part of a graph that consists of some units and all they depend on. Raises NotRegistered."""
    if not names:
        return graph
    nodes = {n.unit_name: n for n in graph.nodes}
    todo = list(names)
    keep: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in nodes:
            raise NotRegistered(f'no unit "{name}"; see `{PROGRAM} list --all`')
        if name not in keep:
            keep.add(name)
            todo.extend(nodes[name].wants)
    return Graph(graph.now, [n for n in graph.nodes if n.unit_name in keep])


def graph_tree(graph: Graph, roots: Sequence[str] = (), unicode: bool = True, depth: int = 40) -> str:
    """Dependencies under each unit; what was shown already is only named."""
    nodes = {n.unit_name: n for n in graph.nodes}
    wanted = {name for n in graph.nodes for name in n.wants}
    tops = list(roots) or [n.unit_name for n in graph.nodes if n.unit_name not in wanted]
    fork, last, bar = (
        ("\u251c\u2500\u2500 ", "\u2514\u2500\u2500 ", "\u2502   ") if unicode else ("|-- ", "`-- ", "|   ")
    )
    lines: list[str] = []
    shown: set[str] = set()
    todo = [(name, "", "", 0) for name in reversed(tops)]
    while todo:
        name, lead, below, level = todo.pop()
        node = nodes[name]
        below_these = list(node.wants)
        text = f"{lead}{name} ({node.status}{': ' + node.reason if node.reason else ''})"
        if name in shown and below_these:
            lines.append(f"{lead}{name} (see above)")
            continue
        if level >= depth and below_these:
            lines.append(f"{text}; `graph {name}` shows what is below")
            continue
        lines.append(text)
        shown.add(name)
        for i, child in enumerate(reversed(below_these)):
            todo.append((child, below + (fork if i else last), below + (bar if i else "    "), level + 1))
    return "\n".join(lines) + "\n" if lines else "no units yet\n"


def graph_dot(graph: Graph) -> str:
    """The graph for Graphviz: an arrow from each unit to what it waits for."""

    def quote(text: str) -> str:
        return '"' + "".join(c if c >= " " else " " for c in text).replace("\\", "\\\\").replace('"', '\\"') + '"'

    fill = {COMPLETED: "palegreen", FAILED: "salmon", SKIPPED: "khaki", STARTED: "lightblue"}
    lines = ["digraph startup {", "  rankdir=LR; node [shape=box, style=filled, fillcolor=white];"]
    for n in graph.nodes:
        style = "dashed" if n.status == NOT_REGISTERED else "filled"
        lines.append(f"  {quote(n.unit_name)} [style={style}, fillcolor={fill.get(n.status, 'white')}, "
                     f"tooltip={quote(n.status + (': ' + n.reason if n.reason else ''))}];")  # fmt: skip
    for n in graph.nodes:
        for name, requirement in n.wants.items():
            label = "" if requirement == SUCCESS else f" [label={quote(requirement)}]"
            lines.append(f"  {quote(n.unit_name)} -> {quote(name)}{label};")
    return "\n".join(lines) + "\n}\n"


def graph_mermaid(graph: Graph) -> str:
    """The graph for Mermaid; names become entity codes wherever they could mean something."""

    def quote(text: str) -> str:
        return '"' + "".join(c if c.isalnum() or c in " -_./" else f"#{ord(c)};" for c in text) + '"'

    ids = {n.unit_name: f"u{i}" for i, n in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for n in graph.nodes:
        lines.append(f"  {ids[n.unit_name]}[{quote(n.unit_name)}]:::{n.status.replace(' ', '_')}")
    for n in graph.nodes:
        for name, requirement in n.wants.items():
            label = "" if requirement == SUCCESS else f"|{requirement}|"
            lines.append(f"  {ids[n.unit_name]} -->{label} {ids[name]}")
    fill = {COMPLETED: "#bfe8c8", FAILED: "#f4b0b0", SKIPPED: "#f3e2a0", STARTED: "#b9d8f5", "not_registered": "#eee"}
    lines += [f"  classDef {status} fill:{colour},color:#222" for status, colour in fill.items()]
    return "\n".join(lines) + "\n"


def graph_data(graph: Graph) -> dict[str, Any]:
    """The graph for programs."""
    nodes = [{"unit_name": n.unit_name, "status": n.status, "reason": n.reason} for n in graph.nodes]
    edges = [
        {"unit_name": n.unit_name, "depends_on": d, "requirement": r} for n in graph.nodes for d, r in n.wants.items()
    ]
    return {"units": nodes, "edges": edges}


def why_text(graph: Graph, name: str) -> str:
    """Why a unit stands where it stands, in sentences: what holds it up, and at the end the root causes."""
    nodes = {n.unit_name: n for n in graph.nodes}
    nodes.setdefault(name, Node(name, NOT_REGISTERED, False, False, -1.0, -1.0, -1.0, -1.0, "", "", {}))
    known = [n.unit_name for n in graph.nodes if n.status != NOT_REGISTERED]
    held_up: list[str] = []
    roots: list[str] = []
    todo, seen = [name], {name}
    for each in todo:
        node = nodes[each]
        stop = HOPELESS if node.status == SKIPPED else MEETS
        causes = {d: r for d, r in node.wants.items() if (nodes[d].status in stop[r]) == (stop is HOPELESS)}
        causes = causes if node.status in (PENDING, SKIPPED) else {}
        new = [d for d in causes if d not in seen]
        todo += new
        seen.update(new)
        guess = resembling(each, known) if node.status == NOT_REGISTERED and len(roots) < 20 else ""
        (held_up if causes else roots).append(
            story(node, graph.now, causes) + (f'; did you mean "{guess}"?' if guess else ".")
        )
    wanted = [n.unit_name for n in graph.nodes if name in n.wants]
    if nodes[name].status == NOT_REGISTERED and wanted:
        roots.append(f"It is wanted by {names_of(wanted)}.")
    for lines, most in ((held_up, 8), (roots, 20)):
        lines[most:] = [f"({len(lines) - most} more like these)"] if len(lines) > most else []
    return "\n".join(held_up + roots) + "\n"


def story(node: Node, now: float, causes: dict[str, str]) -> str:
    """One unit in one sentence without its full stop; `causes` are the dependencies that keep it from starting."""
    name, reason = f'"{node.unit_name}"', f": {node.reason}" if node.reason else ""
    what = names_of([f'"{d}"' + (f" ({r})" if r != SUCCESS else "") for d, r in causes.items()])
    if node.status == NOT_REGISTERED:
        return f"{name} is not registered: nobody has called want, start or run on it"
    if node.status == SKIPPED:
        return f"{name} was skipped {span(now - node.ended)} ago" + (f" because of {what}" if what else reason)
    if node.status == PENDING and node.is_waiting:
        what = what or "a place among those that may run at once"
        return f"{name} has not started: for {span(now - node.waiting)} it has been waiting for {what}"
    if node.status == PENDING:
        gave_up = "its start gave up, and nobody has called start again"
        who = gave_up if node.waiting >= 0 else "nobody has called start on it"
        return f"{name} has not started: {who}" + (f"; it would have to wait for {what}" if what else "; it is ready")
    by = f" by {node.owner.command} (pid {node.owner.pid})" if node.owner else ""
    waited = node.started - node.waiting
    how = f"after waiting {span(waited)}" if waited >= 0.05 else "at once"
    how += f", last for {node.released_by}" if node.released_by and waited >= 0.05 else ""
    if node.status == STARTED:
        gone = node.owner is not None and node.owner.alive is False
        still = "that process is gone: it ended without complete" if gone else "it is still running"
        return f"{name} started {span(now - node.started)} ago{by}, {how}; {still}"
    if node.started < 0:
        return f"{name} {node.status} {span(now - node.ended)} ago without having started{reason}"
    length = span(node.ended - node.started)
    return f"{name} {node.status} {span(now - node.ended)} ago after running {length}{reason}; started{by} {how}"


# ----------------------------------------------------------------------------------------------------------
# Boot. A directory of scripts as one graph: headers are read and checked as a whole, then every script is a
# `start` that waits in the agent like any other, on one connection that holds them all; when one is answered
# its script is spawned. One thread and one poll do everything: answers, output, ends, signals, time.
#
# What keeps it safe: a script's end is what the system reports of its process, not the end of its output,
# which a daemon may keep open. Every group of processes is signalled until it is gone, with a bound. Output is
# bounded a line, and read only while our own standard output takes it.
# ----------------------------------------------------------------------------------------------------------

HEADER_LINES = 50
LAST_LINES = 10
CUT = 8192  # bytes after which a line of output is cut in two
MARKS = ("#", "//", "--", ";")
BACKUPS = ("~", ".bak", ".orig", ".rej", ".swp", ".old", ".dpkg-old", ".dpkg-dist", ".rpmsave", ".rpmnew")


@dataclass
class Script:
    """One file that `boot` runs: its unit, what it wants (dependency, requirement, line), its limit in seconds."""

    path: str
    unit: str
    wants: list[tuple[str, str, int]]
    externs: list[str]
    timeout: float = 0.0
    line: int = 1  # that names it


def read_script(path: str, text: bytes, mistakes: list[str]) -> Script:
    """A script from the start of its file; mistakes are added with file and line."""
    name = os.path.basename(path)
    digits = len(name) - len(name.lstrip("0123456789"))
    if digits and name[digits : digits + 1] in ("-", "_"):
        name = name[digits + 1 :]
    script = Script(path, name.rpartition(".")[0] or name, [], [])
    for number, line in enumerate(text.decode(errors="replace").splitlines()[:HEADER_LINES], 1):
        mark, found, rest = line.partition("coder-sync:")
        if not found or mark.strip() not in MARKS:
            text_ = line.strip().lstrip("#/-; ").lower().replace("_", "-").replace("codersync", "coder-sync")
            if line.strip().startswith(MARKS) and text_.startswith(("coder-sync ", "coder-sync:")):
                mistakes.append(f"{path}:{number}: not understood; a header is written `# coder-sync: WORD ...`")
            continue
        words = rest.split()
        if '"' in rest or "'" in rest:
            import shlex

            try:
                words = shlex.split(rest)
            except ValueError as error:
                mistakes.append(f"{path}:{number}: {error}")
                continue
        try:
            header(script, words, number)
        except SyncError as error:
            mistakes.append(f"{path}:{number}: {error}")
    return script


def header(script: Script, words: list[str], number: int) -> None:
    """Take one header line. Raises UsageError or Refused."""
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb == "want":
        requires = SUCCESS
        if "--requires" in rest:
            at = rest.index("--requires")
            requires, rest = "".join(rest[at + 1 : at + 2]), rest[:at] + rest[at + 2 :]
        if requires not in REQUIREMENTS:
            raise UsageError(f'no such requirement: "{requires}"; use one of {", ".join(REQUIREMENTS)}')
        odd = [w for w in rest if w[0] == "-" or w[-1] == ","]
        if odd:
            raise UsageError(f'"{odd[0]}" is neither an option (there is --requires) nor a name; blanks separate names')
        script.wants += [(check_name(name), requires, number) for name in rest]
    elif verb == "extern":
        script.externs += map(check_name, rest)
    elif verb == "unit" and len(rest) == 1:
        script.unit, script.line = check_name(rest[0]), number
    elif verb == "timeout" and len(rest) == 1:
        script.timeout = duration(rest[0])
    else:
        raise UsageError(
            f'"{" ".join(words)}" is not a header; use unit NAME, want DEP..., timeout DURATION, extern NAME'
        )
    if not rest:
        raise UsageError(f"{verb}: a name is missing")


def check_interpreter(path: str, text: bytes) -> str:
    """What keeps a file from being run, or nothing."""
    if not os.access(path, os.X_OK):
        return f"not executable; chmod +x {path}"
    first = text.split(b"\n", 1)[0].decode(errors="replace")
    if not first.startswith("#!"):
        return "" if b"\0" in text[:512] else "no interpreter: the first line must be #! and a program, as in #!/bin/sh"
    if first.endswith("\r"):
        return "its first line ends in a carriage return; save it with Unix line ends"
    words = first[2:].split()
    program = words[0] if words else ""
    if os.path.basename(program) == "env":
        import shutil

        program = next((w for w in words[1:] if w[0] != "-" and "=" not in w), "")
        return "" if program and shutil.which(program) else f"its interpreter {program} is not in PATH"
    return "" if os.access(program, os.X_OK) else f"its interpreter {program} does not exist or cannot be run"


def plan(paths: Sequence[str]) -> list[Script]:
    """Read and check everything. Raises UsageError with every mistake, a line each."""
    mistakes: list[str] = []
    scripts: list[Script] = []
    left_out: dict[str, str] = {}
    for given in paths:
        files = [given]
        try:
            if os.path.isdir(given):
                names = sorted(n for n in os.listdir(given) if n[0] not in ".#" and not n.endswith(BACKUPS))
                files = [f for f in (os.path.join(given, n) for n in names) if os.path.isfile(f)]
            elif not os.path.isfile(given):  # a pipe, say, which would block
                raise OSError(0, "no such file or directory")
        except OSError as error:
            mistakes.append(f"{given}: cannot be read: {error.strerror}")
            continue
        for path in files:
            try:
                with open(path, "rb") as f:
                    text = f.read(65536)
            except OSError as error:
                mistakes.append(f"{path}: cannot be read: {error.strerror}")
                continue
            script = read_script(os.path.abspath(path), text, mistakes)
            wrong = check_interpreter(path, text)
            if path != given and not os.access(path, os.X_OK) and b"coder-sync:" not in text:
                left_out[script.unit] = path
                continue
            if wrong:
                mistakes.append(f"{script.path}:1: {wrong}")
            scripts.append(script)
    by_name: dict[str, Script] = {}
    for script in scripts:
        if script.unit in by_name:
            other = by_name[script.unit]
            mistakes.append(f'{script.path}:{script.line}: unit "{script.unit}" is {other.path}:{other.line} already')
        by_name.setdefault(script.unit, script)
    externs = {name for script in scripts for name in script.externs}
    units = Units(time.monotonic, time.time)
    for script in scripts:
        for name, requires, number in script.wants:
            where = f"{script.path}:{number}"
            try:
                units.want(script.unit, [name], requires)
            except CycleError as error:
                files = [os.path.basename(by_name[n].path) for n in error.data if n in by_name]
                mistakes.append(f"{where}: {error} ({' -> '.join(files)})")
            except SyncError as error:
                mistakes.append(f"{where}: {error}")
            if name not in by_name and name not in externs:
                guess = resembling(name, list(by_name))
                hint = f'; did you mean "{guess}"?' if guess else "; if it comes from outside, add: extern " + name
                if name in left_out:
                    hint = f"; {left_out[name]} would, but is not executable"
                mistakes.append(f'{where}: no file provides "{name}"{hint}')
    if not scripts and not mistakes:
        mistakes.append(f"{' '.join(paths)}: no executable files")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return scripts


class Job:
    """A script on its way: its process, its output, its end."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.pid = 0  # its own process and the number of its group, once there is one
        self.out = -1  # read end of its output
        self.log = -1  # its file in --log-dir
        self.rest = b""  # a line that has not ended yet
        self.last: list[str] = []
        self.began = 0.0
        self.running = False
        self.kill_at = self.stop_at = float("inf")
        self.why = ""  # why we stopped it
        self.outcome = ""  # the unit's, as the agent has it
        self.reason = ""


class Local(Connection):
    """A boot's connection to the agent in its own process: a Channel whose requests are calls, without a socket."""

    def __init__(self, agent: Agent) -> None:
        from collections import deque
        from threading import get_ident

        super().__init__(None, agent.mail)
        self._agent, self._thread, self._ident = agent, get_ident(), get_ident
        self._messages: deque[Any] = deque()
        self._next = 0
        self._ends = os.pipe()  # for what other threads push
        for fd in self._ends:
            os.set_blocking(fd, False)
        agent.connections.add(self)

    def peer(self) -> int:
        return os.getpid()

    def reply(self, data: bytes) -> bool:
        self._messages.append(_loads(data.decode()))
        return True

    def push(self, data: bytes) -> bool:
        self.reply(data)
        if self._ident() != self._thread:
            try:
                os.write(self._ends[1], b"!")
            except BlockingIOError:  # it has been woken often enough
                pass
        return True

    def request(self, method: str, **params: Any) -> int:
        self._next += 1
        self._agent.line(self, encode({"id": self._next, "method": method, "params": params}))
        return self._next

    def call(self, method: str, **params: Any) -> Any:
        request = self.request(method, **params)
        return result_of(next(m for m in self._messages if m.get("id") == request))

    def receive(self, timeout: float) -> dict[str, Any] | None:
        if not self._messages:
            try:
                os.read(self._ends[0], 4096)
            except BlockingIOError:
                pass
        return self._messages.popleft() if self._messages else None

    def more(self) -> bool:
        return bool(self._messages)

    def fileno(self) -> int:
        return self._ends[0]

    def close(self) -> None:
        for fd in self._ends:
            os.close(fd)


class Boot:
    """Runs scripts in the order of their graph against an agent, hosted in the same process or not."""

    def __init__(self, scripts: list[Script], args: Args) -> None:
        self.jobs = {s.unit: Job(s) for s in scripts}
        self.unfinished = len(scripts)
        self.path = ""  # of the agent's socket, once it is used
        self.args = args
        self.by_pid: dict[int, Job] = {}
        self.by_fd: dict[int, Job] = {}
        self.groups: dict[int, float] = {}  # of ended scripts that left processes behind -> when to kill them
        self.later: list[Job] = []  # that may start, once the system has room for them
        self.signals = -1  # a pipe with the numbers of those that came
        self.log_names: dict[str, str] = {}  # unit -> its file in --log-dir
        taken = set()
        for unit in self.jobs:
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in unit)[:60]
            while name in taken:
                name += "_"
            taken.add(name)
            self.log_names[unit] = name
        self.asked: dict[int, tuple[str, Job]] = {}  # id of a request -> what it was
        self.printed = b""  # on its way to standard output
        self.signal = 0  # that told us to stop
        self.stopping = False
        self.status_shown = False
        self.status_at = 0.0
        self.width = min(24, max(map(wide, self.jobs)))
        self.columns, self.colour, _ = terminal(args)
        self.tty = os.isatty(1) and not args.quiet
        self.log_trouble = self.paused = False
        self.lost = ""  # why there is no agent any more
        self.graph: Graph | None = None

    def run(self, path: str, agent: Agent | None = None) -> int:
        """Boot against the agent at `path`, or in this process; return the exit status.

        Raises Unreachable if the agent goes away before any script has begun.
        """
        import select

        self.path, self.env = path, environment(CODER_AGENT_SOCKET_PATH=path)
        self.jobs, self.asked = {unit: Job(job.script) for unit, job in self.jobs.items()}, {}
        self.unfinished = len(self.jobs)
        self.channel = Local(agent) if agent else Channel(path, CONNECT_TIMEOUT)
        self.catch_signals()
        self.poll = select.poll()
        self.poll.register(self.channel.fileno(), select.POLLIN)
        self.poll.register(self.signals, select.POLLIN)
        limit = (open_files() - 48) // (2 if self.args.log_dir else 1)  # a script has a pipe, and perhaps a log
        most = max(1, min(self.args.jobs or limit, limit))
        if self.args.log_dir:
            try:
                os.makedirs(self.args.log_dir, exist_ok=True)
            except OSError as error:
                self.no_log(error)
        for job in self.jobs.values():
            for requires in REQUIREMENTS:
                names = [name for name, r, _ in job.script.wants if r == requires]
                if names:
                    self.ask("want", job, unit=job.script.unit, dependencies=names, requires=requires)
        for job in self.jobs.values():
            self.ask("start", job, unit=job.script.unit, hold=True, jobs=most)
        self.answers()
        code = self.loop()
        if self.args.stay and not self.signal:
            say(self.args, "boot: staying until a signal", 2)
            self.loop(stay=True)
            code = code if self.signal else 1
        self.write(patience=1)
        if self.by_fd and not self.signal and os.fork() == 0:  # somebody must go on reading what services print
            self.pump()
        return code

    def catch_signals(self) -> None:
        """Have a thread put them into a pipe; those that we were started to ignore stay ignored."""
        import _signal as signal
        import threading

        if self.signals >= 0:
            return
        stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        taken = [signal.SIGCHLD, *(n for n in stops if signal.getsignal(n) != signal.SIG_IGN)]
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, there would be no ends to wait for
        signal.pthread_sigmask(signal.SIG_BLOCK, taken)
        self.signals, write = os.pipe()

        def wait_for_signals() -> None:
            while True:
                os.write(write, bytes([signal.sigwait(taken)]))

        threading.Thread(target=wait_for_signals, daemon=True).start()

    # -- the loop -----------------------------------------------------------------------------------------

    def loop(self, stay: bool = False) -> int:
        """Handle whatever happens until every unit has ended, or, to stay, until a signal has been obeyed."""
        import select

        while not self.over(stay) or (self.printed and not self.signal):
            if self.channel.more():
                self.answers()
                continue
            now = time.monotonic()
            due = self.keep_time(now)
            self.show_status(now)
            want_out = [(1, select.POLLOUT)] if self.printed else []
            for fd, mask in want_out:
                self.poll.register(fd, mask)
            due = min(due, self.status_at) if self.tty and not self.printed else due
            ready = self.poll.poll(max(0, due - now) * 1000 + 1)
            for fd, _ in want_out:
                self.poll.unregister(fd)
            for fd, event in ready:
                if fd == self.channel.fileno():
                    self.answers()
                elif fd == self.signals:
                    for number in os.read(fd, 4096):
                        self.got_signal(number)
                elif fd == 1 and fd not in self.by_fd:
                    self.write(broken=bool(event & select.POLLERR))
                elif fd in self.by_fd and len(self.printed) < 1 << 18:
                    self.output(self.by_fd[fd])
            self.pause(len(self.printed) >= 1 << 18)
        return self.finish() if not stay else 0

    def over(self, stay: bool) -> bool:
        """Whether every unit has its outcome (to stay: a signal came) and nothing that was told to end still runs."""
        done = bool(self.signal or self.lost) if stay else not self.unfinished
        return done and not (self.stopping and self.by_pid) and not self.doomed()

    def ask(self, method: str, job: Job, **params: Any) -> None:
        """Send a request about a job's unit; `answers` gets what comes back."""
        if not self.lost:
            try:
                self.asked[self.channel.request(method, **params)] = (method, job)
            except Unreachable as error:
                self.gone(error)

    def answers(self) -> None:
        """Handle what the agent says."""
        try:
            message = self.channel.receive(0)
            while message is not None:
                if message.get("id") in self.asked:
                    self.answer(message, *self.asked.pop(message["id"]))
                message = self.channel.receive(0) if self.channel.more() else None
        except Unreachable as error:
            self.gone(error)

    def gone(self, error: Unreachable) -> None:
        """An agent we joined has ended: what runs may finish, nothing new starts."""
        if not self.signal and not any(job.pid for job in self.jobs.values()):
            raise error  # we may begin again
        self.lost = str(error)
        self.poll.unregister(self.channel.fileno())
        put(f"error: {error}\n", 2)
        for job in self.jobs.values():
            if not job.running:
                self.ended(job, PENDING, "the agent went away")

    def answer(self, message: dict[str, Any], method: str, job: Job) -> None:
        """Handle one answer about a job."""
        name = job.script.unit
        try:
            result = result_of(message)
            if method == "start" and result["dependencies"] == [name]:  # another boot has run it
                self.ended(job, COMPLETED, "")
            elif method == "start" and self.stopping:
                self.ask("fail", job, unit=name, reason="the boot was stopped")
            elif method == "start" and not job.outcome:
                self.spawn(job)
            elif method == "wait":  # for the end of the unit, which its script, or another, may have reported
                self.ended(job, COMPLETED, "")
        except DependencyFailed as error:
            status = FAILED if str(error).startswith(f'dependency "{name}" failed') else SKIPPED
            self.ended(job, status, str(error).replace(f'unit "{name}" skipped: ', ""))
        except Refused as error:
            if method == "fail" and not job.why:  # it had completed before its script went wrong
                put(f"warning: {name}: {job.reason}, after the unit had ended\n", 2)
            elif method not in ("complete", "fail"):
                self.ended(job, FAILED, str(error))

    def ended(self, job: Job, status: str, reason: str) -> None:
        """A unit has its outcome."""
        if job.outcome:
            return
        job.outcome, job.reason = status, job.reason or reason
        self.unfinished -= 1
        if status != COMPLETED and self.args.fail_fast and not self.stopping:
            self.stop_all(15, "stopped: another unit failed")

    # -- processes ----------------------------------------------------------------------------------------

    def spawn(self, job: Job) -> None:
        """Start a script in a process group of its own."""
        import _signal as signal
        import select

        script = job.script
        env = {**self.env, b"CODER_SYNC_UNIT": script.unit.encode()}
        job.began = time.monotonic()
        try:
            job.out, write = os.pipe()
            try:
                actions = [
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, write, 1),
                    (os.POSIX_SPAWN_DUP2, write, 2),
                ]
                job.pid = os.posix_spawn(
                    script.path,
                    [script.path],
                    env,
                    file_actions=actions,
                    setpgroup=0,
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
                )
            finally:
                os.close(write)
        except OSError as error:
            if job.out >= 0:
                os.close(job.out)
                job.out = -1
            if self.by_pid and error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
                self.later.append(job)
                return
            job.reason = f"cannot be run: {error.strerror}"
            self.ask("fail", job, unit=script.unit, reason=job.reason)
            self.ended(job, FAILED, job.reason)
            return
        os.set_blocking(job.out, False)
        job.running = True
        job.stop_at = job.began + script.timeout if script.timeout else float("inf")
        self.by_pid[job.pid] = self.by_fd[job.out] = job
        if not self.paused:
            self.poll.register(job.out, select.POLLIN)
        self.ask("wait", job, units=[script.unit])
        if self.args.log_dir and not self.log_trouble:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                path = os.path.join(self.args.log_dir, self.log_names[script.unit] + ".log")
                job.log = os.open(path, flags, 0o644)
            except OSError as error:
                self.no_log(error)

    def reap(self) -> None:
        """Take the ends of all processes that have one: scripts, and, as pid 1, whatever was left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            job = self.by_pid.pop(pid, None)
            if job is None:
                continue
            job.running = False
            if alive_groups([pid]):
                self.groups[pid] = job.kill_at
            self.output(job, last=True)
            code = exit_code_of(status)
            if code == 0 and not job.why:
                self.ask("complete", job, unit=job.script.unit)
                if self.lost:
                    self.ended(job, COMPLETED, "")
            else:
                job.reason = job.why or ending(code)
                self.ask("fail", job, unit=job.script.unit, reason=job.reason, exit_code=shell_status(code))
                if self.lost:
                    self.ended(job, FAILED, job.reason)

    def doomed(self) -> list[int]:
        """Groups left behind that were told to end; one that outlives KILL by a second is given up."""
        late, doomed = time.monotonic() - 1, [group for group, at in self.groups.items() if at < float("inf")]
        alive = alive_groups(doomed)
        for group in doomed:
            if self.groups[group] < late or group not in alive:
                del self.groups[group]
        return [group for group in doomed if group in self.groups]

    def got_signal(self, number: int) -> None:
        import _signal as signal

        if number == signal.SIGCHLD:
            self.reap()
            return
        again, self.signal = self.signal, number
        self.stop_all(9 if again else number, f"stopped: boot got signal {number}")

    def stop_all(self, number: int, why: str) -> None:
        """Signal everything that runs; what is still there after --grace is killed. Nothing new starts."""
        self.stopping = True
        for job in self.by_pid.values():
            self.stop(job, number, why)
        for group, at in self.groups.items():
            self.groups[group] = min(at, time.monotonic() + self.args.grace)
        for group in self.doomed():
            signal_group(group, number)
        for job in self.later:
            self.ask("fail", job, unit=job.script.unit, reason=why)
            self.ended(job, PENDING, why)
        self.later.clear()
        for request, (method, job) in list(self.asked.items()):
            if method == "start" or (method == "wait" and not job.pid):
                self.channel.request("cancel", id=request)
                self.ended(job, PENDING, why)

    def stop(self, job: Job, number: int, why: str) -> None:
        job.why = job.why or why
        job.kill_at = min(job.kill_at, time.monotonic() + self.args.grace)
        job.stop_at = float("inf")
        signal_group(job.pid, number)

    def keep_time(self, now: float) -> float:
        """Do what is due; return when something is next."""
        due = now + 3600
        for job in self.by_pid.values():
            if now >= job.stop_at:
                self.stop(job, 15, f"timed out after {span(job.script.timeout)}")
            if now >= job.kill_at:
                signal_group(job.pid, 9)
                job.kill_at = now + 1
            due = min(due, job.stop_at, job.kill_at)
        later, self.later = self.later, []
        for job in later:
            self.spawn(job)
        doomed = self.doomed()
        for group in doomed:
            if now >= self.groups[group]:
                signal_group(group, 9)
        return min(due, now + 0.05) if doomed or self.later else due

    # -- output -------------------------------------------------------------------------------------------

    def output(self, job: Job, last: bool = False) -> None:
        """Take what a script has printed: whole lines go on with its name in front, the rest waits."""
        for _ in range(64 if last else 1):  # a script has ended: what is left is in the pipe, which is bounded
            try:
                chunk = os.read(job.out, 65536) if job.out >= 0 else b""
            except BlockingIOError:
                break
            if not chunk:
                self.close_output(job)
                last = True
                break
            if job.log >= 0:
                try:
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(job.log, view) :]
                except OSError as error:
                    self.no_log(error)
            *lines, job.rest = (job.rest + chunk).split(b"\n")
            while len(job.rest) > CUT:
                lines.append(job.rest[:CUT])
                job.rest = job.rest[CUT:]
            self.lines(job, lines)
        if last and job.rest:
            self.lines(job, [job.rest])
            job.rest = b""

    def lines(self, job: Job, lines: list[bytes]) -> None:
        name = fit(job.script.unit, self.width)
        if self.colour:
            number = 31 + sum(map(ord, job.script.unit)) % 6
            name = f"\033[{number}m{name}\033[0m"
        if self.args.quiet:
            lines = lines[-LAST_LINES:]
        texts = [line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="backslashreplace") for line in lines]
        job.last = (job.last + [t[:500] for t in texts[-LAST_LINES:]])[-LAST_LINES:]
        if not self.args.quiet:
            self.clear_status()
            self.printed += "".join(f"{name} | {text}\n" for text in texts).encode(errors="backslashreplace")

    def close_output(self, job: Job) -> None:
        if job.out >= 0:
            del self.by_fd[job.out]
            if not self.paused:
                self.poll.unregister(job.out)
            os.close(job.out)
            job.out = -1
        if job.log >= 0:
            os.close(job.log)
            job.log = -1

    def pause(self, full: bool) -> None:
        """Read no output while our own is not taken."""
        import select

        if full != self.paused:
            self.paused = full
            for fd in self.by_fd:
                if full:
                    self.poll.unregister(fd)
                else:
                    self.poll.register(fd, select.POLLIN)

    def write(self, broken: bool = False, patience: float = 0) -> None:
        """Hand on what standard output takes without blocking, or, with patience, with pauses of so many seconds."""
        self.printed = b"" if broken else hand_on(self.printed, 1, patience)

    def no_log(self, error: OSError) -> None:
        """Say once that log files cannot be written; the boot goes on."""
        if not self.log_trouble:
            put(f"warning: no more logs in {self.args.log_dir}: {error.strerror}\n", 2)
        self.log_trouble = True
        for job in self.jobs.values():
            if job.log >= 0:
                os.close(job.log)
                job.log = -1

    def show_status(self, now: float) -> None:
        """The live line on a terminal: what runs and for how long, how many wait."""
        if not self.tty or self.printed or now < self.status_at:
            return
        self.status_at = now + 1
        running = [f"{j.script.unit} {span(now - j.began)}" for j in self.by_pid.values() if not j.outcome]
        done = sum(bool(j.outcome) for j in self.jobs.values())
        text = f"[{done}/{len(self.jobs)} ended, {len(self.jobs) - done - len(running)} waiting] {', '.join(running)}"
        put("\r\033[K" + fit(text, self.columns - 1).rstrip())
        self.status_shown = True

    def clear_status(self) -> None:
        if self.status_shown:
            put("\r\033[K")
            self.status_shown, self.status_at = False, 0.0

    def pump(self) -> NoReturn:
        """In a child of its own: print what services go on printing, until they end."""
        import _signal as signal
        import select

        try:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2) if self.args.quiet else (0, 2):
                os.dup2(null, fd)
            logs = [job.log for job in self.by_fd.values()]
            for fd in map(int, os.listdir("/dev/fd")):
                if fd > 2 and fd not in self.by_fd and fd not in logs:  # the agent's, whose clients wait for its end
                    try:
                        os.close(fd)
                    except OSError:
                        pass
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            self.poll, self.paused = select.poll(), True
            self.pause(False)
            while self.by_fd:
                for fd, _ in self.poll.poll():
                    self.output(self.by_fd[fd])
                    self.write(patience=1e6)
        finally:  # and never into the parent's ways out
            os._exit(0)

    # -- the end ------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Say how it went; return the exit status."""
        self.clear_status()
        self.write(patience=1)
        whole = Graph(0.0, [])
        try:
            whole = whole if self.lost else record(Graph, self.channel.call("graph"))
        except Unreachable:  # the agent of another boot, which had no more to do either
            pass
        mine = Graph(whole.now, [n for n in whole.nodes if n.unit_name in self.jobs])
        bad = [j for j in self.jobs.values() if j.outcome != COMPLETED]
        if bad or not self.args.quiet:
            report = self.report(mine)
            if self.signal:  # told to stop, we do not wait for a reader that has
                hand_on(report.encode(errors="backslashreplace"), 2, 1)
            else:
                put(report, 2)
        self.graph = mine
        return 128 + self.signal if self.signal else 3 if self.lost else 1 if bad else 0

    def report(self, graph: Graph) -> str:
        """What failed with its last lines, what was skipped and why, how long it took."""
        count = {s: sum(j.outcome == s for j in self.jobs.values()) for s in (COMPLETED, FAILED, SKIPPED, PENDING)}
        words = [f"{n} {'not started' if s == PENDING else s}" for s, n in count.items() if n]
        text = f"boot: {', '.join(words)}\n"
        for job in self.jobs.values():
            if job.outcome == FAILED:
                text += f"failed: {job.script.unit} ({job.reason}); {job.script.path}\n"
                text += "".join(f"    | {line}\n" for line in job.last)
        for job in self.jobs.values():
            if job.outcome in (SKIPPED, PENDING):
                text += f"{'not started' if job.outcome == PENDING else SKIPPED}: {job.script.unit}: {job.reason}\n"
        going_on = [job.script.unit for job in self.by_pid.values()]
        text += f"still running: {names_of(going_on)}\n" if going_on else ""
        return text + (summary(graph) + "\n" if graph.nodes else "")


def hand_on(data: bytes, fd: int, patience: float) -> bytes:
    """Write what can be written without blocking: a pipe that is writable has room for 4 KiB. Return the rest.

    Waits for a slow reader, but drops what one does not take for `patience` seconds, or ever.
    """
    import select

    out, at = select.poll(), 0
    out.register(fd, select.POLLOUT)
    while at < len(data):
        if not out.poll(patience * 1000):
            return b"" if patience else data[at:]
        try:
            at += os.write(fd, data[at : at + 4096])
        except OSError:  # nobody reads any more; the boot goes on
            break
    return b""


def alive_groups(groups: Iterable[int]) -> set[int]:
    """Those process groups that have members; a zombie, which a poor process 1 does not reap, is none."""
    alive = set()
    for group in groups:
        try:
            os.killpg(group, 0)
            alive.add(group)
        except ProcessLookupError:
            pass
        except OSError:
            alive.add(group)
    if not alive or not os.path.isdir("/proc/self"):
        return alive
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:
                state, _, its_group = f.read().rpartition(b")")[2].split()[:3]
        except OSError:
            continue
        if state != b"Z":
            found.add(int(its_group))
    return alive & found


def signal_group(group: int, number: int) -> None:
    """Signal a process group that may be gone."""
    try:
        os.killpg(group, number)
    except OSError:
        pass


def open_files() -> int:
    """How many descriptors this process may have."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


# ----------------------------------------------------------------------------------------------------------
# Install. A copy of this file that is not compiled at each call: a zip application (PEP 441) of its source and its
# bytecode behind the lines of sh that make it executable. However it is called, START runs, which reads the file
# once: a call that is made while the file is replaced sees all of the old one or all of the new one. `python3 PATH`
# looks for START where it was a moment before, so it has its place and its size in every copy.
# ----------------------------------------------------------------------------------------------------------

HEAD = """\
#!/bin/sh
# coder_sync {version}, installed: a zip archive with its source (`unzip -p FILE coder_sync.py`) and its bytecode
exec {python} -IS -c '{start}' "$0" "$@"
"""

START = """\
import gc
import sys

if sys.version_info < (3, 8):
    sys.exit("error: coder_sync needs Python 3.8 or later, and this is " + sys.version.split()[0])

from _frozen_importlib_external import MAGIC_NUMBER
from marshal import loads

if sys.argv[0] == "-c":
    del sys.argv[0]
__file__, __name__ = sys.argv[0], "coder_sync"


def code():
    with open(__file__, "rb", 0) as file:
        data = file.read()
    at = data.find(MAGIC_NUMBER + bytes([1, 0, 0, 0]))  # of a .pyc that is not to be compared with its source
    if at >= 0:
        return loads(memoryview(data)[at + 16 :])
    from io import BytesIO
    from zipfile import ZipFile

    return compile(ZipFile(BytesIO(data)).read("coder_sync.py"), __file__, "exec")


gc.disable()  # all that comes now stays
exec(code())
gc.enable()
main()
"""

PLACE = 2048  # bytes for the first lines, and for START

COMPILE = """\
import sys
from importlib.util import MAGIC_NUMBER, source_hash
from marshal import dumps

source = sys.stdin.buffer.read()
code = compile(source, "coder_sync.py", "exec", dont_inherit=True)
sys.stdout.buffer.write(MAGIC_NUMBER + bytes([1, 0, 0, 0]) + source_hash(source) + dumps(code))
"""


def slowness() -> str:
    """What `serve` says in its log if each call compiles the source: the plain file, or not for this Python."""
    from _frozen_importlib_external import MAGIC_NUMBER

    try:
        with open(FILE, "rb") as file:
            if MAGIC_NUMBER + bytes([1, 0, 0, 0]) in file.read():
                return ""
    except OSError:
        return ""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"{PROGRAM} has no bytecode for Python {python}: `{PROGRAM} install` would make every call faster"


def ask_python(python: str, *words: str, data: bytes = b"") -> bytes:
    """What an interpreter prints, in the same environment each time. Raises Refused if it fails."""
    import subprocess

    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONHASHSEED"] = "0"  # the order of a set is in the bytecode
    streams: Any = {"input": data, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        done: Any = subprocess.run([python, *words], **streams, env=env, cwd="/", check=False)
    except OSError as error:
        raise Refused(f"cannot run {python}: {error.strerror}") from None
    if done.returncode:
        why = one_line(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        raise Refused(f"{python} cannot run coder_sync, which needs {NEEDED}: {why}")
    return done.stdout  # type: ignore[no-any-return]


def application(python: str) -> bytes:
    """The copy to install, with the bytecode of this interpreter. Raises Refused, OSError."""
    import io
    import shlex
    import zipfile

    if zipfile.is_zipfile(FILE):
        with zipfile.ZipFile(FILE) as archive:
            source = archive.read("coder_sync.py")
    else:
        with open(FILE, "rb") as file:
            source = file.read()
    bytecode = ask_python(python or sys.executable, "-sSc", COMPILE, data=source)
    head = HEAD.format(version=__version__, python=shlex.quote(python or "python3"), start=START)
    data = io.BytesIO(head.encode().ljust(PLACE, b"\n"))
    with zipfile.ZipFile(data, "a") as archive:
        start = START.encode().ljust(PLACE, b"\n")
        for name, part in (("__main__.py", start), ("coder_sync.py", source), ("coder_sync.pyc", bytecode)):
            entry = zipfile.ZipInfo(name)  # of 1980: the same input gives the same bytes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, part)
    return data.getvalue()


def install(path: str, python: str) -> str:
    """Write the copy beside a path, try it, rename it; return where. Raises Refused."""
    import tempfile

    path = os.path.realpath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise Refused(f"cannot install {path}: {'a directory' if os.path.isdir(path) else 'no regular file'} is there")
    beside = ""
    try:
        data = application(python)
        fd, beside = tempfile.mkstemp(prefix=".coder-sync-", dir=os.path.dirname(path))
        with open(fd, "wb") as file:
            file.write(data)
            mode = 0o777 & ~os.umask(0o077)
            os.umask(0o777 & ~mode)
            if os.path.exists(path):
                old = os.stat(path)
                mode = old.st_mode & 0o777
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(fd, old.st_uid, old.st_gid)
            os.chmod(fd, mode | (mode & 0o444) >> 2)  # who may read may execute
            os.fsync(fd)
        if ask_python(python or sys.executable, "-IS", beside, "--version") != f"coder_sync {__version__}\n".encode():
            raise Refused(f"cannot install {path}: the copy does not run")
        os.rename(beside, path)
        beside = ""
    except OSError as error:
        raise Refused(f"cannot install {path}: {error.strerror}; nothing was changed") from None
    finally:
        if beside:
            os.unlink(beside)
    return path


# ----------------------------------------------------------------------------------------------------------
# Command line. One small function a command, one table that says what each takes. A plain call is parsed from
# the table directly; whatever that does not understand (help, mistakes) goes to argparse, built from the same
# table, because importing argparse costs more than the call.
# ----------------------------------------------------------------------------------------------------------

PROGRAM = FILE.rpartition("/")[2]


def put(text: str, fd: int = 1) -> bool:
    """Write to standard output or error. A reader that has gone away is no error, and no trouble later on: False."""
    stream = sys.stdout if fd == 1 else sys.stderr
    data = text.encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        return False
    except OSError as error:
        if fd == 1:
            raise SyncError(f"cannot write to standard output: {error.strerror}") from None
    return True


class Args:
    """The parsed command line: an attribute an option and a positional."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def client_of(args: Args) -> Client:
    """The client that the common options describe."""
    return Client(args.socket_path, args.connect_timeout)


def say(args: Args, text: str, fd: int = 1) -> None:
    """Tell what was done, unless --quiet. What was done stays done if nobody can read it."""
    if not args.quiet:
        try:
            put(text + "\n", fd)
        except SyncError:
            pass


class Reporter:
    """Says what a wait lacks; `waited` is whether there was one."""

    def __init__(self, args: Args, who: str, fd: int = 1) -> None:
        self.args, self.who, self.fd, self.waited = args, who, fd, False

    def __call__(self, missing: list[Dependency], waited: float) -> None:
        self.waited = True
        how = f"still waiting after {span(waited)}" if waited else "waiting"
        more = f"; and {len(missing) - 20} more" if len(missing) > 20 else ""
        say(self.args, f"{self.who}{how} for " + "; ".join(state(d) for d in missing[:20]) + more, self.fd)

    def started(self, started: Started) -> str:
        """What a start found."""
        if not started.dependencies:
            return "started; it has no dependencies"
        if self.waited:
            return f"started after {span(started.waited)}"
        return f"started; satisfied already: {names_of(started.dependencies)}"


def cmd_serve(args: Args) -> int:
    """Run the agent."""
    enabled = os.environ.get("CODER_AGENT_SOCKET_SERVER_ENABLED", "").lower()
    if enabled in ("false", "0", "no"):
        put("not serving: CODER_AGENT_SOCKET_SERVER_ENABLED is " + enabled + "\n", 2)
        return shell_status(supervise(args.command, environment())) if args.command else 0
    if enabled not in ("", "true", "1", "yes"):
        raise UsageError(f"CODER_AGENT_SOCKET_SERVER_ENABLED is {enabled!a}; use true or false")
    if args.detach and args.command:
        raise UsageError("--detach and -- COMMAND exclude each other: the agent ends with the command")
    wish = Serving(args.socket_path or os.environ.get("CODER_AGENT_SOCKET_PATH") or DEFAULT_SOCKET)
    wish.detach, wish.command, wish.level = args.detach, args.command, 2 * args.verbose or int(not args.quiet)
    wish.log_file = args.log_file and os.path.abspath(args.log_file)
    wish.pid_file = args.pid_file and os.path.abspath(args.pid_file)
    wish.timeline = timeline_writer(args.timeline) if args.timeline else wish.timeline
    wish.mode = args.mode or (0o660 if args.group else 0o600)
    wish.group = group_id(args.group) if args.group else -1
    wish.advice = slowness()
    if not args.command:
        return serve(wish)
    import tempfile

    try:
        if args.socket_path:
            return serve(wish)
        with tempfile.TemporaryDirectory(prefix="coder-sync-") as private:
            wish.path = os.path.join(private, "agent.sock")
            wish.level = 2 * args.verbose  # the command's output is what matters here
            return serve(wish)
    except OSError as error:
        raise CommandError(f"cannot make a private socket: {error.strerror}; name a --socket-path", 125) from None
    except Refused as error:
        raise CommandError(str(error), 125) from None


def timeline_writer(path: str) -> Callable[[Graph], None]:
    """What writes the timeline to a file, in the form that its ending names. Raises UsageError, at once."""
    form = os.path.splitext(path)[1].lstrip(".")
    if form not in ("svg", "json", "txt"):
        raise UsageError(f"--timeline {path}: the name must end in .svg, .json or .txt")
    path = os.path.abspath(path)

    def write(graph: Graph) -> None:
        try:
            with open(path, "w", encoding="utf-8") as f:
                f.write(timeline_as(form, graph))
        except OSError as error:
            put(f"warning: cannot write the timeline to {path}: {error.strerror}\n", 2)

    return write


def group_id(name: str) -> int:
    """The number of a group. Raises UsageError."""
    import grp

    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"no such group: {name}") from None


def mode_bits(text: str) -> int:
    """Permission bits from their octal form. Raises UsageError."""
    if len(text) in (3, 4) and not text.strip("01234567"):
        return int(text, 8) & 0o777
    raise UsageError(f"invalid mode {ascii(text)[:20]}: write it in octal, as in 660")


def cmd_ping(args: Args) -> int:
    """Say whether an agent answers."""
    client = client_of(args)
    answer = client.ping(args.wait)
    up = answer.get("uptime")
    about = f"pid {answer.get('pid')}, version {answer.get('version')}"
    about += f", up {span(up)}" if isinstance(up, (int, float)) else ""
    put(f"agent at {client.socket_path}: {about}\n")
    return 0


def cmd_want(args: Args) -> int:
    """Declare dependencies."""
    client_of(args).want(args.unit, *args.deps, requires=args.requires)
    say(args, f"{args.unit}: depends on {names_of(list(dict.fromkeys(args.deps)))}")
    return 0


def refuse_lonely_requires(args: Args) -> None:
    """--requires says something about --want, and about nothing else. Raises UsageError."""
    if args.requires != SUCCESS and not args.want:
        raise UsageError("--requires is about the units of --want, and there is none; see `want --requires`")


def cmd_start(args: Args) -> int:
    """Wait until a unit may run, and mark it started."""
    refuse_lonely_requires(args)
    report = Reporter(args, f"{args.unit}: ")
    on_wait = None if args.quiet else report
    started = client_of(args).start(args.unit, args.want, args.requires, args.timeout, args.pid, on_wait)
    say(args, f"{args.unit}: {report.started(started)}")
    return 0


def cmd_complete(args: Args) -> int:
    """End a unit."""
    client_of(args).complete(args.unit, args.exit_code)
    say(args, f"{args.unit}: {f'failed (exit code {args.exit_code})' if args.exit_code else 'completed'}")
    return 0


def cmd_fail(args: Args) -> int:
    """End a unit without success."""
    client_of(args).fail(args.unit, args.reason)
    say(args, f"{args.unit}: failed")
    return 0


def cmd_wait(args: Args) -> int:
    """Wait for units without being one."""
    report = Reporter(args, "")
    took = client_of(args).wait(*args.units, requires=args.requires, timeout=args.timeout, on_wait=report)
    say(args, f"{names_of(args.units)}: done" + (f" after {span(took)}" if report.waited else ""))
    return 0


def cmd_status(args: Args) -> int:
    """Show a unit and its dependencies."""
    status = client_of(args).status(args.unit)
    put(json_text(plain(status)) if args.output == "json" else status_text(status, args.column))
    return 0


def cmd_list(args: Args) -> int:
    """Show all units."""
    units = client_of(args).list(args.all)
    if args.output == "json":
        keys = ("unit_name", "status", "is_ready", "reason", "exit_code", "age", "owner")
        put(json_text([{k: plain(getattr(u, k)) for k in keys} for u in units]))
    else:
        put(list_text(units, args.column))
    return 0


def json_text(value: Any) -> str:
    """JSON for other programs; indented where a person may be reading, since that takes ten times as long."""
    text = _dumps(value)
    if len(text) < 1 << 16:
        import json

        text = json.dumps(value, indent=2, ensure_ascii=False)
    return text + "\n"


def cmd_events(args: Args) -> int:
    """Print what happened, one JSON object a line."""
    for event in client_of(args).events(args.follow):
        if not put(_dumps(plain(event)) + "\n"):
            break
    return 0


def terminal(args: Args) -> tuple[int, bool, bool]:
    """The width of standard output, whether it takes colour, and whether it shows more than ASCII."""
    tty = os.isatty(1)
    try:
        width = os.get_terminal_size(1).columns
    except OSError:
        width = int(getenv("COLUMNS")) if getenv("COLUMNS").isdecimal() else 100
    codec = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    locale = next(filter(None, map(getenv, ("LC_ALL", "LC_CTYPE", "LANG"))), "utf-8")  # Python takes C for UTF-8
    unicode = codec == "utf8" and "utf" in locale.lower()
    return max(40, min(width, 400)), tty and not getenv("NO_COLOR"), unicode


def cmd_timeline(args: Args) -> int:
    """Show where the time went."""
    client = client_of(args)
    if args.watch:
        return watch(args, client)
    graph = client.graph()
    if args.blame:
        put(blame_text(graph))
    elif args.output == "text":
        put(timeline_text(graph, *terminal(args)))
    else:
        put(timeline_as(args.output, graph))
    return 0


def timeline_as(form: str, graph: Graph) -> str:
    """The timeline in one of its forms for files."""
    if form == "svg":
        return timeline_svg(graph)
    if form in ("json", "trace"):
        return json_text(timeline_data(graph) if form == "json" else timeline_trace(graph))
    return timeline_text(graph)


def watch(args: Args, client: Client) -> int:
    """Follow the agent's events: a picture redrawn in place on a terminal, a line an event elsewhere."""
    import signal

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    channel = Channel(client.socket_path)
    channel.call("events", follow=True, since=(1 << 31) - 1)
    if not os.isatty(1):
        began = 0.0
        while True:
            message = channel.receive(3600.0)
            if message and message.get("method") == "event":
                event: Event = record(Event, message["params"])
                began = began or event.time
                detail = f": {event.detail}" if event.detail else ""
                if not put(f"+{span(event.time - began)} {event.unit} {event.kind}{detail}\n"):
                    return 0
    graph, taken = client.graph(), time.monotonic()
    put("\033[?1049h\033[?25l")  # the terminal's other screen, no cursor
    try:
        while True:
            shown = Graph(graph.now + time.monotonic() - taken, graph.nodes)
            rows = os.get_terminal_size(1).lines
            lines = timeline_text(shown, *terminal(args)).splitlines()
            if len(lines) > rows:  # the end matters most: what runs and waits, and the summary
                lines = [lines[0], *lines[len(lines) - rows + 1 :]]
            put("\033[H" + "".join(line + "\033[K\n" for line in lines)[:-1] + "\033[J")
            if channel.receive(1.0) is not None:
                burst = time.monotonic() + 0.2  # is one redraw
                while time.monotonic() < burst and channel.receive(0.05) is not None:
                    pass
                graph, taken = client.graph(), time.monotonic()
    finally:
        put("\033[?25h\033[?1049l" + timeline_text(graph, *terminal(args)))


def cmd_graph(args: Args) -> int:
    """Show what depends on what."""
    graph = part(client_of(args).graph(), args.units)
    if args.output == "tree":
        put(graph_tree(graph, args.units, terminal(args)[2]))
    elif args.output == "json":
        put(json_text(graph_data(graph)))
    else:
        put(graph_dot(graph) if args.output == "dot" else graph_mermaid(graph))
    return 0


def cmd_why(args: Args) -> int:
    """Say why a unit stands where it stands."""
    put(why_text(client_of(args).graph(), check_name(args.unit)))
    return 0


def cmd_boot(args: Args) -> int:
    """Run scripts in the order that their headers ask for."""
    try:
        scripts = plan(args.paths)
    except UsageError as error:
        put(f"error: nothing was run:\n{error}\n", 2)
        return error.exit_code
    if args.check or args.dry_run:
        units = Units(time.monotonic, time.time)
        for script in scripts:
            units.want(script.unit, [])
            for name, requires, _ in script.wants:
                units.want(script.unit, [name], requires)
        put(
            graph_tree(units.graph(), (), terminal(args)[2])
            if args.dry_run
            else f"{len(scripts)} scripts, no mistakes\n"
        )
        return 0
    boot = Boot(scripts, args)
    write = timeline_writer(args.timeline) if args.timeline else None
    wish = Serving(args.socket_path or getenv("CODER_AGENT_SOCKET_PATH") or DEFAULT_SOCKET, level=0, body=boot.run)
    for tries in range(100):
        try:
            code = boot.run(wish.path) if agent_at(wish.path) else serve(wish)
            break
        except (Refused, Unreachable) as error:  # another agent was faster, is about to begin, or to end
            other = tries < 3 or agent_at(wish.path) or os.path.lexists(wish.path + ".lock")
            if tries == 99 or (isinstance(error, Refused) and (boot.path or not other)):
                raise
            boot.path = ""
            time.sleep(0.03)
    if write and boot.graph:
        write(boot.graph)
    if args.command and not boot.signal and (code == 0 or args.always):
        import _signal as signal

        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        try:
            os.execvp(args.command[0], args.command)
        except (OSError, ValueError) as error:
            raise cannot_run(args.command[0], error) from None
    return code


def agent_at(path: str) -> bool:
    """Whether an agent answers."""
    try:
        Client(path, 0).ping()
        return True
    except Unreachable:
        return False


def cmd_run(args: Args) -> int:
    """Declare, wait, start, run a command, complete or fail: one process."""
    refuse_lonely_requires(args)
    env = environment(CODER_SYNC_UNIT=args.unit)
    client = client_of(args)
    report = Reporter(args, f"{args.unit}: ", 2)
    on_wait = None if args.quiet else report
    start = Start(client, args.unit, args.want, args.requires, args.timeout, 0, on_wait, hold=True)
    try:
        start.__enter__()
    except Unreachable as error:
        if not args.optional:
            raise
        put(f"warning: {args.unit}: runs without coordination: {error}\n", 2)
        return shell_status(supervise(args.command, env))
    if report.waited:
        say(args, f"{args.unit}: {report.started(start.result)}", 2)
    try:
        code, why = supervise(args.command, env), ""
    except CommandError as error:
        code, why = error.exit_code, str(error)
        put(f"error: {args.unit}: {error}\n", 2)
    try:
        if code:
            start.channel.call("fail", unit=args.unit, reason=why or ending(code), exit_code=shell_status(code))
        else:
            start.channel.call("complete", unit=args.unit)
    except SyncError as error:
        put(f"warning: {args.unit}: its outcome (exit code {shell_status(code)}) could not be reported: {error}\n", 2)
    return shell_status(code)


def cmd_install(args: Args) -> int:
    """Write a copy that is not compiled at each call."""
    python = os.path.abspath(args.python) if "/" in args.python else args.python
    for path in args.paths or [FILE]:
        say(args, f"{install(path, python)}: installed for {python or sys.executable}")
    return 0


@dataclass
class Option:
    """One option: its spellings, how its value is read (None: it takes none), its default, its help.

    A default that is a list makes it repeatable.
    """

    flags: tuple[str, ...]
    convert: Callable[[str], Any] | None
    default: Any
    help: str
    metavar: str = "VALUE"
    choices: tuple[str, ...] = ()

    def dest(self) -> str:
        """The attribute of Args."""
        return self.flags[-1].lstrip("-").replace("-", "_")

    def read(self, text: str) -> Any:
        """The value of a text. Raises UsageError."""
        if self.choices and text not in self.choices:
            raise UsageError(f"no such choice: {ascii(text)[:40]}; use {', '.join(self.choices)}")
        return self.convert(text) if self.convert else True


@dataclass
class Command:
    """One command: what runs it, its positionals (the last may take one "+" or no "*" or more words), options."""

    run: Callable[[Args], int]
    positionals: tuple[str, ...]
    options: tuple[Option, ...]
    help: str
    takes_command: str = ""  # "-- COMMAND": "may" or "must" follow
    questions: bool = False  # asks only: tries to connect once, and is not quiet


def whole(text: str) -> int:
    """A whole number. Raises UsageError."""
    if text[text[:1] == "-" :].isdecimal() and len(text) < 10:
        return int(text)
    raise UsageError(f"not a whole number: {ascii(text)[:40]}")


WHERE = f"where the agent listens (CODER_AGENT_SOCKET_PATH, else {DEFAULT_SOCKET})"
SOCKET = Option(("--socket-path",), str, "", WHERE, "PATH")
PATIENT = "how long to try to reach an agent that still boots (CODER_SYNC_CONNECT_TIMEOUT, else 3s)"
PATIENCE = Option(("--connect-timeout",), duration, None, PATIENT, "DURATION")
QUIET = Option(("-q", "--quiet"), None, False, "say nothing but errors")
TIMEOUT = Option(("-t", "--timeout"), duration, START_TIMEOUT, "how long to wait (5m); 0: no limit", "DURATION")
REQUIRES = Option(("--requires",), str, SUCCESS, "what to require of the dependencies", "WHAT", REQUIREMENTS)
WANT = Option(("--want",), str, [], "depend on this unit as well; may be given several times", "DEP")
OUTPUT = Option(("-o", "--output"), str, "table", "table or json", "FORMAT", ("table", "json"))
COLUMN = Option(("-c", "--column"), str, "", "which columns of the table to show, separated by commas", "COLUMNS")

COMMANDS = {
    "serve": Command(
        cmd_serve,
        (),
        (
            QUIET,
            Option(("-v", "--verbose"), None, False, "log every request"),
            Option(("-d", "--detach"), None, False, "go to the background once the socket accepts connections"),
            Option(("--log-file",), str, "", "write the log there, not to standard error", "FILE"),
            Option(("--pid-file",), str, "", "write the process id there", "FILE"),
            Option(("--timeline",), str, "", "write the timeline there at the end: .svg, .json or .txt", "FILE"),
            Option(("--mode",), mode_bits, 0, "permissions of the socket (600; 660 with --group)", "MODE"),
            Option(("--group",), str, "", "group of the socket", "GROUP"),
        ),
        "run the agent: until a signal, or for the life of COMMAND on a private socket",
        "may",
    ),
    "ping": Command(
        cmd_ping,
        (),
        (Option(("-w", "--wait"), duration, 0.0, "how long to wait for an agent (0: try once)", "DURATION"),),
        "say whether an agent answers",
        questions=True,
    ),
    "want": Command(cmd_want, ("unit", "deps+"), (REQUIRES, QUIET), "make UNIT depend on DEP..., all or none"),
    "start": Command(
        cmd_start,
        ("unit",),
        (WANT, REQUIRES, TIMEOUT, Option(("--pid",), whole, 0, "fail the unit if this process ends", "PID"), QUIET),
        "wait until UNIT may run, and mark it started",
    ),
    "complete": Command(
        cmd_complete,
        ("unit",),
        (Option(("--exit-code",), whole, 0, "fail the unit if N is not 0", "N"), QUIET),
        "end UNIT, so that others may go on",
    ),
    "fail": Command(
        cmd_fail,
        ("unit",),
        (Option(("--reason",), str, "", "why, for those who are skipped because of it", "TEXT"), QUIET),
        "end UNIT without success, so that what requires it is skipped",
    ),
    "run": Command(
        cmd_run,
        ("unit",),
        (
            WANT,
            REQUIRES,
            TIMEOUT,
            Option(("--optional",), None, False, "run COMMAND even if there is no agent"),
            QUIET,
        ),
        "start UNIT, run COMMAND, complete UNIT or fail it, in one process",
        "must",
    ),
    "boot": Command(
        cmd_boot,
        ("paths+",),
        (
            Option(("-j", "--jobs"), whole, 0, "how many scripts may run at once (0: no limit)", "N"),
            Option(("--check",), None, False, "only check the headers"),
            Option(("--dry-run",), None, False, "only show the order"),
            Option(("--fail-fast",), None, False, "stop everything at the first failure"),
            Option(("--grace",), duration, 10.0, "how long a script may take to end when told to (10s)", "DURATION"),
            Option(("--log-dir",), str, "", "keep each unit's output in a file there", "DIR"),
            Option(("--timeline",), str, "", "write the timeline there at the end: .svg, .json or .txt", "FILE"),
            Option(("--always",), None, False, "become COMMAND even if a unit failed"),
            Option(("--stay",), None, False, "go on serving until a signal"),
            QUIET,
        ),
        "run the scripts of a directory in the order that their headers ask for; then become COMMAND",
        "may",
    ),
    "wait": Command(cmd_wait, ("units+",), (REQUIRES, TIMEOUT, QUIET), "wait for units without being one"),
    "status": Command(cmd_status, ("unit",), (OUTPUT, COLUMN), "show UNIT and its dependencies", questions=True),
    "list": Command(
        cmd_list,
        (),
        (Option(("-a", "--all"), None, False, "also names that were only ever wanted"), OUTPUT, COLUMN),
        "show all units",
        questions=True,
    ),
    "why": Command(cmd_why, ("unit",), (), "say why UNIT waits, was skipped, failed or took so long", questions=True),
    "timeline": Command(
        cmd_timeline,
        (),
        (
            Option(
                ("-o", "--output"), str, "text", "text, svg, json or trace", "FORMAT", ("text", "svg", "json", "trace")
            ),
            Option(("--blame",), None, False, "units by how long they ran, and by how long others waited for them"),
            Option(("--watch",), None, False, "live, until interrupted"),
        ),
        "show where the time went",
        questions=True,
    ),
    "graph": Command(
        cmd_graph,
        ("units*",),
        (
            Option(
                ("-o", "--output"),
                str,
                "tree",
                "tree, dot, mermaid or json",
                "FORMAT",
                ("tree", "dot", "mermaid", "json"),
            ),
        ),
        "show what depends on what, for all units or for some",
        questions=True,
    ),
    "install": Command(
        cmd_install,
        ("paths*",),
        (Option(("--python",), str, "", "the interpreter that is to run it (python3)", "PROGRAM"), QUIET),
        "write a copy of this program to PATH (its own place), with its bytecode: calls of it are fast",
    ),
    "events": Command(
        cmd_events,
        (),
        (Option(("-f", "--follow"), None, False, "go on with what happens next"),),
        "print what happened, one JSON object a line",
        questions=True,
    ),
}


def options_of(command: Command) -> tuple[Option, ...]:
    """The options of a command with those that all have."""
    return (*command.options, SOCKET, PATIENCE)


def usage_of(name: str) -> str:
    """The positionals of a command as its usage line has them."""
    shown = {
        "unit": "UNIT",
        "deps+": "DEP...",
        "units+": "UNIT...",
        "units*": "[UNIT]...",
        "paths+": "PATH...",
        "paths*": "[PATH]...",
    }
    text = " ".join([name, *(shown[word] for word in COMMANDS[name].positionals)])
    tail = {"may": " [-- COMMAND ARG...]", "must": " -- COMMAND ARG..."}
    return f"{PROGRAM} {text} [OPTION]..." + tail.get(COMMANDS[name].takes_command, "")


def parse(name: str, argv: Sequence[str]) -> Args:
    """Parse the words after the command. Raises UsageError; argparse ends the process for --help."""
    command = COMMANDS[name]
    before, after = list(argv), None
    if "--" in before:
        cut = before.index("--")
        before, after = before[:cut], before[cut + 1 :]
    parsed = parse_plainly(command, before) or parse_with_argparse(name, before)
    values, words = parsed
    if command.takes_command:
        values["command"] = after or []
        if after == [] or (command.takes_command == "must" and not after):
            raise UsageError(f"{name}: a command must follow --; usage: {usage_of(name)}")
    else:
        words += after or []
    *single, last = command.positionals or ("",)
    many = last[-1:] in ("+", "*")
    least = len(command.positionals) - (last[-1:] == "*")
    over = len(words) > len(command.positionals) and not many
    if len(words) < least or over:
        what = f"unexpected {words[len(command.positionals)]!a}" if over else "too few arguments"
        hint = "; did you forget -- before the command?" if command.takes_command and over else ""
        raise UsageError(f"{name}: {what}{hint}; usage: {usage_of(name)}")
    values.update(zip(single, words))
    if last:
        values[last.rstrip("+*")] = words[len(single) :] if many else words[-1]
    if command.questions:
        values["connect_timeout"], values["quiet"] = 0.0, False
    return Args(values)


def parse_plainly(command: Command, words: Sequence[str]) -> tuple[dict[str, Any], list[str]] | None:
    """Options spelt out and positionals; None for anything else, which argparse understands or explains."""
    options = options_of(command)
    values: dict[str, Any] = {o.dest(): list(o.default) if type(o.default) is list else o.default for o in options}
    flags = {flag: option for option in options for flag in option.flags}
    rest: list[str] = []
    todo = iter(words)
    for word in todo:
        if word[:1] != "-" or word == "-":
            rest.append(word)
            continue
        option = flags.get(word)
        text = "" if option is None or option.convert is None else next(todo, "-")
        if option is None or text[:1] == "-":
            return None
        try:
            value = option.read(text)
        except UsageError:
            return None
        if type(option.default) is list:
            values[option.dest()].append(value)
        else:
            values[option.dest()] = value
    return values, rest


def parse_with_argparse(name: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The same by argparse."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{name}: {message}; see `{PROGRAM} {name} --help`")

    command = COMMANDS[name]
    parser = Parser(prog=f"{PROGRAM} {name}", usage=usage_of(name), description=command.help, allow_abbrev=False)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for option in options_of(command):
        if option.convert is None:
            parser.add_argument(*option.flags, action="store_true", default=False, help=option.help)
            continue

        def convert(text: str, option: Option = option) -> Any:
            try:
                return option.read(text)
            except UsageError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        parser.add_argument(
            *option.flags,
            type=convert,
            action="append" if type(option.default) is list else "store",
            default=list(option.default) if type(option.default) is list else option.default,
            metavar=option.metavar,
            help=option.help.replace("%", "%%"),
        )
    values = vars(parser.parse_intermixed_args(words))
    return values, values.pop("words")


def overview() -> str:
    """The page that --help prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    return f"""usage: {PROGRAM} COMMAND [ARG]...

Startup coordination for scripts that run in parallel. A unit is a named phase of work,
usually one script; it starts when the units it depends on are done.

{chr(10).join(lines)}

`{PROGRAM} COMMAND --help` tells more. `{PROGRAM} exp sync COMMAND` does the same.
"""


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line; return the exit status. Raises SyncError."""
    words = list(argv)
    if words[:2] == ["exp", "sync"]:
        words = words[2:]
    moved: list[str] = []  # options before the command
    while words and words[0].startswith("--") and words[0].partition("=")[0] in ("--socket-path", "--connect-timeout"):
        count = 1 if "=" in words[0] else 2
        moved, words = moved + words[:count], words[count:]
    if not words:
        raise UsageError("which command? " + ", ".join(COMMANDS) + f"; see `{PROGRAM} --help`")
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        put(overview())
        return 0
    if name in ("--version", "version"):
        put(f"coder_sync {__version__}\n")
        return 0
    if name not in COMMANDS:
        if name == "exp":
            raise UsageError("after exp comes sync, as in `exp sync start UNIT`")
        if name[0:1] == "-":
            raise UsageError(f"{name!a}: which command? Options other than --socket-path follow the command")
        guess = resembling(name, list(COMMANDS))
        hint = f'did you mean "{guess}"?' if guess else "there are " + ", ".join(COMMANDS)
        raise UsageError(f"no such command: {ascii(name)[:60]}; {hint}")
    return COMMANDS[name].run(parse(name, [*moved, *rest]))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line. Ends the process at once: tidying up an interpreter takes longer than the call."""
    code = 0
    try:
        for fd in (0, 1, 2):
            try:
                os.fstat(fd)
            except OSError:  # closed: no socket of ours must take its place
                os.open(os.devnull, os.O_RDWR)
        code = dispatch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # argparse's --help
        code = end.code if isinstance(end.code, int) else 2
    except TimedOut as error:
        missing = "".join(f"  {state(d)}\n" for d in error.data)
        put(f"{error}\n{missing}", 2)
        code = error.exit_code
    except SyncError as error:
        put(f"error: {error}\n", 2)
        code = error.exit_code
    except Exception as error:  # a defect of ours; no traceback reaches a user
        put(f"error: internal error in coder_sync {__version__}: {one_line(repr(error))}; please report it\n", 2)
        code = 125 if os.environ.get("CODER_SYNC_DEBUG") is None else _reraise(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
    os._exit(code)


def _reraise(error: BaseException) -> NoReturn:
    raise error


if __name__ == "__main__":
    main()
