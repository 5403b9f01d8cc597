#!/bin/sh
""":"
exec python3 -IS -c \
    'import sys;sys.tracebacklimit=0;SELF=open(sys.argv[1],"rb",0);exec(SELF.read(9999).split(b"#:\n")[-2]);launch()' \
    "$0" "$@"
"""
# /// script
# requires-python = ">=3.8"
# ///

from __future__ import annotations

__doc__ = """Startup coordination for scripts that run in parallel: one file, agent and command line.

An agent keeps a graph of units in memory; scripts say what they depend on, wait until they may run, and let others
go on:

    coder_sync.py serve                  the agent; --detach to the background, -- COMMAND for one command
    coder_sync.py want UNIT DEP...       UNIT depends on DEP
    coder_sync.py start UNIT             wait until UNIT may run; then it is started
    coder_sync.py complete UNIT          UNIT is done; others may go on
    coder_sync.py fail UNIT              UNIT will not be done; what requires it is skipped
    coder_sync.py run UNIT -- COMMAND    start, COMMAND, complete or fail, in one process
    coder_sync.py boot PATH...           a directory of scripts in the order that their headers ask for
    coder_sync.py wait UNIT...           wait for units, or for probes, without being a unit
    coder_sync.py stop [UNIT...]         end the commands of units, dependents first
    coder_sync.py status UNIT | list     the state of a unit, or of all; also why, timeline, graph, events, ping
    coder_sync.py env UNIT               the variables with which UNIT would start
    coder_sync.py reset | shutdown       start again: units; the agent
    coder_sync.py install [PATH]         make every call faster; also completion SHELL
    coder_sync.py help [TOPIC]           more about a command, headers, probes, exit-codes, json, protocol

Exit codes:

    0      done
    1      refused: a cycle, already started, not registered, a bad name, ...; of boot: a unit did not complete
    2      wrong usage, or a mistake in a header
    3      the agent cannot be reached, or went away
    4      a required dependency failed or was skipped
    124    timed out
    125    another failure of our own before COMMAND ran; otherwise the status is that of COMMAND
    126    COMMAND is not executable
    127    COMMAND was not found
    128+N  signal N ended COMMAND, or us

The file is also a module: `from coder_sync import Client`. Its sections, top to bottom; each uses only those above it:

    Errors          one hierarchy; each class has an exit code and a JSON-RPC code
    Names and records
                    the words of the rules, and the data about a unit
    Protocol        newline-delimited JSON-RPC 2.0
    Terminal        standard output and error
    Connection      the client's side of the protocol
    Calls           plain command lines; want, start, complete, fail
    Client          the rest of the Python API
    Processes       what several sections need of the system
    Units           the dependency graph and its rules, pure
    Agent           the daemon
    Views           data to text, pure
    Run             a unit's command; run, wait
    Boot            a directory of scripts as one graph; a client like any other
    Install         a copy with its bytecode
    Command line    all other command lines, and the other commands

The first lines make the file an executable on any system with a `sh`: they start the interpreter isolated and without
site, and call `launch`. The file is cut above Client. Only what stands above the cut is needed for want, start,
complete and fail, so `launch` compiles no more for them; a copy made by `install` has both parts as bytecode. Most of
the time of a call is the start of the interpreter, so nothing is imported above the cut that such a call does not need:
`os`, `socket`, `json`, `argparse`, `threading` and `typing` each cost more than all the rest of the call.
"""

#:
# The first lines run only the code from here to the next `#:`, and so does `python3 COPY`. Python 2 can read it.
import errno
import gc
import posix  # what os is made of
import sys
import time

FUTURE = b"from __future__ import annotations"


def source_in(data):  # type: (bytes) -> bytes
    """Return the source text in the bytes of this file, or of an installed copy."""
    return data[data.rfind(b'#!/bin/sh\n"""') :].partition(b"PK\1\2")[0]


def halves(source):  # type: (bytes) -> tuple[bytes, bytes]
    """Return the source above the cut and below it, each to be compiled alone. Raises ValueError if it is damaged."""
    above, cut, below = source.partition(b"\n# Client. ")
    if not below.endswith(b"main()\n"):
        raise ValueError
    return above, FUTURE + b"\n" * above.count(b"\n") + cut + below  # with the line numbers of the file


def code_in(file, below):  # type: (Any, bool) -> list[Any]
    """Return the code above the cut, or below it, of this file or of an installed copy.

    A copy has bytecode, which is used if it is for this Python and undamaged. Source is compiled section by section,
    which takes less memory than the whole at once, and so less time.
    """
    from _frozen_importlib_external import MAGIC_NUMBER
    from _imp import source_hash
    from marshal import loads

    mark = MAGIC_NUMBER + b"\1\0\0\0"  # begins a .pyc that is not compared with its source (PEP 552)
    file.seek(0)
    data = file.read(-1 if below else 1 << 18)
    at = data.find(mark, data.find(mark) + 1 if below else 0)
    size = int.from_bytes(data[at + 8 : at + 12], "little")
    code = memoryview(data)[at + 16 : at + 16 + size]
    if at >= 0 and source_hash(0, code)[:4] == data[at + 12 : at + 16]:
        return [loads(code)]
    try:
        parts, start, lines = [], b"", 0
        for section in halves(source_in(data + file.read()))[below].split(b"\n\n\n# --"):
            parts.append(compile(start + section, sys.argv[0], "exec"))
            lines += section.count(b"\n") + 3
            start = FUTURE + b"\n" * lines + b"#"
        return parts
    except (SyntaxError, ValueError):
        sys.exit("error: " + sys.argv[0] + " is damaged: copy or install it again")


def exit_on_signals():  # type: () -> None
    """Have signals end this process, which is process 1: there they have no effect without a handler."""
    import _signal as signal  # type: ignore[import-not-found]

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, lambda got, frame: posix._exit(128 + got))  # a callback may drop an exception


def launch():  # type: () -> None
    """Run the code above the cut, whose last lines go on with what is below it."""
    if sys.version_info < (3, 8):  # noqa: UP036
        sys.exit("error: coder_sync needs Python 3.8 or later, and this is " + sys.version.split()[0])
    if posix.getpid() == 1:
        exit_on_signals()
    gc.disable()  # until all is loaded, since that stays
    if sys.argv[0] == "-c":
        del sys.argv[0]
    globals()["__file__"] = sys.argv[0]
    try:
        for part in code_in(SELF, False):  # the file that the first lines have opened
            exec(part, globals())
    except KeyboardInterrupt:
        posix._exit(130)


#:
(NEEDED := "Python 3.8 or later")  # older versions show this line in a SyntaxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import ExitStack
    from typing import Any, ClassVar, Literal, NoReturn, TypeVar, Union

    from typing_extensions import dataclass_transform

    Member = tuple[str, dict[str, str], Iterable[str]]  # of a plan: name, dependency -> requirement, locks
    Requirement = Literal["success", "completion", "start"]
    Id = Union[str, int]
    T = TypeVar("T")
    Object = dict[str, Any]
    R = TypeVar("R", bound="Record")

    @dataclass_transform()
    class Fields:
        """Has type checkers take the annotations of a subclass for the parameters of its __init__."""
else:
    Fields = object

__version__ = "0.3.0"
__all__ = [
    "AlreadyStarted",
    "Client",
    "CycleError",
    "Dependency",
    "DependencyFailed",
    "Event",
    "Graph",
    "NotRegistered",
    "Owner",
    "Refused",
    "Started",
    "SyncError",
    "TimedOut",
    "UnitStatus",
    "Unreachable",
    "UsageError",
]
INSTALLED = "installed coder_sync.py"  # the file name in tracebacks from a copy
SELF: Any = globals().get("SELF")  # this file, open while `launch` has loaded only what is above the cut
FILE: str = getattr(globals().get("__loader__"), "archive", __file__)

DEFAULT_SOCKET = "/tmp/coder-agent.sock"
START_TIMEOUT = 300.0  # seconds; the default of `coder exp sync`
CONNECT_TIMEOUT = 3.0
REPLY_TIMEOUT = 30.0  # for an answer that waits for no unit
STOPPED_TIMEOUT = 2.0  # for an answer to `run` or `boot` after a signal
REPORT_EVERY = 30.0
GRACE = 8.0  # seconds from TERM to KILL; docker kills a container after ten
STOP_PATIENCE = 2.0  # seconds after KILL for which a stop waits for the end of commands
NEVER = float("inf")  # a time
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)  # errors that pass when other processes end
LONGEST_POLL = 2e6  # seconds: the system counts milliseconds in an int

# ----------------------------------------------------------------------------------------------------------
# Errors. One small hierarchy, shared by agent and client: the agent sends `code`, `message` and `data`, the
# client raises the same class again and exits with `exit_code`. Codes are those of JSON-RPC 2.0, section 5.1.
# ----------------------------------------------------------------------------------------------------------

ERRORS: dict[int, type[SyncError]] = {}  # code -> class, of the errors that an agent sends


class SyncError(Exception):
    """The base class of all errors. `exit_code` is for the command line, `code` for JSON-RPC."""

    exit_code = 1
    code = -32000

    def __init_subclass__(cls, code: int = 0, exit_code: int = 0) -> None:
        cls.code, cls.exit_code = code or cls.code, exit_code or cls.exit_code
        if code:
            ERRORS[code] = cls

    def __init__(self, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.data = data


class Refused(SyncError, code=-32000):
    """The rules do not allow it: a bad name, a second outcome of a unit, a limit."""


class CycleError(Refused, code=-32001):
    """Dependencies would form a cycle: `data` is the list of its names, with the first repeated at the end."""


class AlreadyStarted(Refused, code=-32002):
    """Somebody else has started the unit."""


class NotRegistered(Refused, code=-32003):
    """Nobody has called `want`, `start` or `run` on the unit."""

    unit = ""  # its name; not sent to clients


class DependencyFailed(SyncError, code=-32004, exit_code=4):
    """A required dependency failed or was skipped: `unit` is its name, `reason` says why."""

    def __init__(self, message: str, data: Any = None) -> None:
        super().__init__(message, data)
        about = data if isinstance(data, dict) else {}
        self.unit, self.reason = str(about.get("unit", "")), str(about.get("reason", ""))


class Unreachable(SyncError, code=-32005, exit_code=3):
    """No agent could be reached, it went away, or another program answers."""


class Foreign(Unreachable):
    """The agent at the default path belongs to another user, who is not root."""


class TimedOut(SyncError, code=-32006, exit_code=124):
    """The timeout is over; `data` is the list of missing dependencies."""

    def __str__(self) -> str:
        missing = []
        for row in self.data or ():
            hint = f' (did you mean "{row.did_you_mean}"?)' if row.did_you_mean else ""
            missing.append(f"{row.depends_on} {row.current_status}{hint}")
        return str(self.args[0]) + (f": {', '.join(missing)}" if missing else "")


class InvalidRequest(SyncError, code=-32600):
    """Not a valid request of JSON-RPC 2.0."""


class MethodNotFound(InvalidRequest, code=-32601):
    """There is no such method."""


class InvalidParams(InvalidRequest, code=-32602):
    """A parameter is missing, unknown or of the wrong type."""


class ParseError(InvalidRequest, code=-32700):
    """Not JSON, too long or nested too deeply: the rest of the stream cannot be trusted."""


class UsageError(SyncError, exit_code=2):
    """An error in the command line, an environment variable or an argument of the API."""


class CommandError(SyncError):
    """A command could not be run: 126 not executable, 127 not found, as in a shell."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# ----------------------------------------------------------------------------------------------------------
# Names and records. The words of the rules, which names are valid, and the data about a unit that an agent sends.
# ----------------------------------------------------------------------------------------------------------

NOT_REGISTERED = "not registered"  # only named as a dependency
PENDING = "pending"  # registered, not started
STARTED = "started"
COMPLETED = "completed"
FAILED = "failed"
SKIPPED = "skipped"  # will not start: a unit that it requires failed or was skipped
ENDED = (COMPLETED, FAILED, SKIPPED)
STOPPED = "stopped"  # how a service ended, if not with an exit status: by `stop`
LOST = "lost"  # likewise: its supervisor is gone, and it may still run

SUCCESS: Requirement = "success"
COMPLETION: Requirement = "completion"
START: Requirement = "start"
REQUIREMENTS: tuple[str, ...] = (SUCCESS, COMPLETION, START)

MAX_NAME = 255  # bytes of UTF-8
MAX_REASON = 500  # characters

RECORDS: dict[str, type[Record]] = {}  # name -> class


class Record(Fields):
    """A base class for data: each annotated attribute is a field, and its value in the class is the default.

    Provides __init__, __repr__ and __eq__, as dataclasses.dataclass does, whose import costs more than a whole call.
    """

    _fields: ClassVar[dict[str, Any]]  # name -> default, or ... if there is none

    def __init_subclass__(cls) -> None:
        cls._fields = {name: vars(cls).get(name, ...) for name in cls.__annotations__}
        RECORDS[cls.__name__] = cls

    def __init__(self, *args: Any, **named: Any) -> None:
        values = {**self._fields, **dict(zip(self._fields, args)), **named}
        if len(values) > len(self._fields) or ... in values.values():
            raise TypeError(f"{type(self).__name__} takes {', '.join(self._fields)}")
        self.__dict__.update(values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]  # it may change


class Owner(Record):
    """The process that started a unit. `born` tells it from a later one with the same pid, and is not sent."""

    pid: int  # process id
    command: str  # its command line, shortened to 60 characters
    alive: bool | None = None  # whether it still runs; null if unknown
    born: str | None = None


class Dependency(Record):
    """A dependency of a unit, and its state."""

    depends_on: str  # name of the dependency
    required_status: str  # what it must be: started, completed or ended
    current_status: str  # what it is
    is_satisfied: bool  # whether that is enough
    requirement: str = SUCCESS  # success, completion or start
    age: float = 0.0  # seconds in its status
    reason: str = ""  # why it failed or was skipped
    owner: Owner | None = None  # who started it
    waits_for: list[str] = []  # what it lacks itself, at most five names
    did_you_mean: str = ""  # a name that resembles this one, which is not registered


class Waiting(Record):
    """The notification `waiting` of a start or a wait: the missing dependencies, and the seconds waited."""

    missing: list[Dependency]
    waited: float


class Running(Record):
    """A unit whose command still runs."""

    unit: str
    owner: Owner | None = None


class Result(Record):
    """The result of most requests, and the parameters of the notifications `unit` and `stop`."""

    unit: str = ""
    status: str = ""
    reason: str = ""
    dependencies: list[str] = []
    units: list[str] = []
    env: dict[str, str] = {}  # variables that its dependencies have left for it
    stopped: list[str] = []  # in the order in which they ended
    left: list[Running] = []  # still running
    cannot: list[Running] = []  # cannot be stopped: a script called `start` itself
    grace: float = 0.0  # seconds from TERM to KILL


def owner_text(owner: Owner | None, by: str = "", gone: str = ", which is no longer running") -> str:
    """Return the text for a process in a message, `bash setup.sh (pid 4242)`, after `by`; an empty text for None."""
    if owner is None:
        return ""
    return f"{by}{owner.command or 'process'} (pid {owner.pid})" + (gone if owner.alive is False else "")


def check_name(name: object, what: str = "unit") -> str:
    """Return `name` if it is a valid name of a unit or a lock. Raises Refused, or InvalidParams if it is not a str."""
    if not isinstance(name, str):
        raise InvalidParams(f"a {what} name must be a string, not {type(name).__name__}")
    if not name:
        raise Refused(f"a {what} name must not be empty; was a variable unset?")
    if not name.isprintable():
        raise Refused(f"{what} name {ascii(name)[:80]} has a character that cannot be printed")
    if len(name.encode()) > MAX_NAME:
        raise Refused(f'{what} name "{name[:40]}..." is {len(name.encode())} bytes long; the limit is {MAX_NAME}')
    return name


def printable(text: str) -> str:
    """Return a text with escapes for the characters that cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text as one printable line of at most MAX_REASON characters."""
    flat = "".join(c if c.isprintable() else " " for c in text[: 4 * MAX_REASON])
    flat = " ".join(flat.split())
    return flat if len(flat) <= MAX_REASON else flat[: MAX_REASON - 3] + "..."


# ----------------------------------------------------------------------------------------------------------
# Protocol. One JSON-RPC 2.0 object a line, UTF-8, over a Unix stream socket; requests at most 64 KiB. Answers
# may come out of order. Notifications: `waiting`, at once and then every 30 s, for `start` and `wait` with
# `"progress": true`; `unit` for each status of a unit of a `boot`; `stop` to a supervisor that must end a command;
# `event` for `events` with `"follow": true`.
# ----------------------------------------------------------------------------------------------------------

MAX_LINE = 65536  # bytes, of a request
MAX_REPLY = 256 << 20  # bytes, of an answer
MAX_DEPTH = 32  # of JSON brackets: deeper input overflows the C stack of a small thread, which is not an exception


class _Scanner:
    """The settings that json.decoder.JSONDecoder gives to the C scanner."""

    strict, object_hook, object_pairs_hook, array_hook = True, None, None, None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")


def _codec() -> tuple[Callable[[str], Any], Callable[[Any], str]]:
    """Return (loads, dumps), from the C part of the json package, without the package, which imports re and enum."""
    try:
        import _json

        scan = _json.make_scanner(_Scanner)  # type: ignore[arg-type]
        options: list[Any] = [None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, False]
        write = _json.make_encoder(*options)  # the arguments that json.JSONEncoder passes
    except (ImportError, AttributeError, TypeError):  # another Python than CPython
        from json import JSONDecoder, JSONEncoder

        decoder = JSONDecoder(parse_constant=_Scanner.parse_constant)
        return decoder.decode, JSONEncoder(allow_nan=False).encode

    def loads(text: str) -> Any:
        value, end = scan(text, 0)
        if text[end:].strip():
            raise ValueError("more than one value")
        return value

    return loads, lambda value: "".join(write(value, 0))


_loads, _dumps = _codec()


def encode(message: dict[str, Any]) -> bytes:
    """Return one message as a line."""
    return _dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"


def decode(line: bytes) -> Any:
    """Return the value of a line. Raises ParseError if it is not UTF-8, not JSON, or nested too deeply."""
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise ParseError(f"JSON nested deeper than {MAX_DEPTH} levels")
    try:
        return _loads(line.decode().strip())
    except (ValueError, StopIteration, RecursionError, SystemError):  # SystemError: 3.10 without json imported
        raise ParseError(f"not a line of JSON: {one_line(ascii(line[:60]))}") from None


def _depth(line: bytes) -> int:
    """Return how deeply the brackets of a line are nested, without those inside strings."""
    others = bytes(b for b in range(256) if b not in b"[]{}")
    outside = line.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    depth = deepest = 0
    for bracket in b"".join(outside).translate(None, others):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


NOT_SENT = ("born",)  # fields that only the agent has


def error_message(request: Any, error: SyncError) -> dict[str, Any]:
    """Return the answer to a request that has failed."""
    body = {"code": error.code, "message": str(error.args[0])}
    if error.data is not None:
        body["data"] = plain(error.data)
    return {"id": request, "error": body}


def plain(value: Any) -> Any:
    """Return a value with its records as dicts, for JSON."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, Record):
        return {k: plain(v) for k, v in vars(value).items() if k not in NOT_SENT}
    return value


def record(kind: type[R], data: Any) -> R:
    """Return a record from JSON; unknown keys, of a newer agent, are ignored. Raises Unreachable."""
    try:
        fields = kind.__annotations__
        return kind(**{name: typed(data[name], fields[name]) for name in fields if name in data})
    except (KeyError, TypeError):
        raise Unreachable(f"the answer is not a {kind.__name__}; are agent and client of one version?") from None


def typed(value: Any, annotation: str) -> Any:
    """Return a value from JSON, made printable, if it has the type of the annotation. Raises TypeError."""
    kind, optional, _ = annotation.partition(" | None")
    name, _, inner = kind.rstrip("]").partition("[")
    if optional and value is None:
        return None
    if name == "str" and isinstance(value, str):
        return printable(value)
    if name == "list" and isinstance(value, list):
        return [typed(each, inner) for each in value]
    if name == "dict" and isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
        return {printable(key): each for key, each in value.items()}
    if name in RECORDS:
        return record(RECORDS[name], value)
    if name == "float" and type(value) in (int, float) and -1e15 < value < 1e15:
        return value
    if type(value).__name__ == name and name != "float":
        return value
    raise TypeError


# ----------------------------------------------------------------------------------------------------------
# Terminal. Environment variables, standard output and error, and parts of messages.
# ----------------------------------------------------------------------------------------------------------

PROGRAM = FILE.rpartition("/")[2]


def encoded(text: str, fd: int) -> bytes:
    """Return a text in the encoding of standard output or error."""
    stream = sys.stdout if fd == 1 else sys.stderr
    return text.encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")


def put(text: str, fd: int = 1) -> bool:
    """Write to standard output or error; return False if the reader has gone. Raises SyncError."""
    data = encoded(text, fd)
    try:
        while data:
            try:
                data = data[posix.write(fd, data) :]
            except BlockingIOError:  # another process has set O_NONBLOCK on the same terminal or pipe
                time.sleep(0.01)
    except BrokenPipeError:
        posix.dup2(null(), fd)
        return False
    except OSError as error:
        if fd == 1:
            raise SyncError(f"cannot write to standard output: {error.strerror}") from None
    return True


def say(text: str, fd: int = 1, quiet: bool = False) -> None:
    """Print a line about what was done. That it cannot be written is no error."""
    if not quiet:
        try:
            put(text + "\n", fd)
        except SyncError:
            pass


def null() -> int:
    """Return a file descriptor for /dev/null, or for a closed connection if there is none."""
    try:
        return posix.open("/dev/null", posix.O_RDWR)
    except OSError:
        from _socket import socketpair

        one, other = socketpair()
        other.close()
        return one.detach()


def getenv(name: str) -> str:
    """Return an environment variable, or an empty text; honours changes made through os.environ."""
    if "os" in sys.modules:
        return str(sys.modules["os"].environ.get(name, ""))
    return posix.environ.get(name.encode(), b"").decode(sys.getfilesystemencoding(), "surrogateescape")


def span(seconds: float) -> str:
    """Return a duration for people: 350ms, 2.1s, 31s, 4m12s, 1h02m."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def some_names(names: Sequence[str]) -> str:
    """Return a list of names for a message, at most 20 of them."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def user_name(uid: int) -> str:
    """Return the name of a user, or its number if it has none."""
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return f"uid {uid}"


# ----------------------------------------------------------------------------------------------------------
# Connection. The client's side of a connection to the agent. Every call has its own connection, so a Client may be used
# from several threads; `unit` keeps one open while its block runs. Nothing is polled: the agent answers when a unit may
# start, or when the time is up. An agent that is silent for too long is taken for gone. Times are in seconds.
# ----------------------------------------------------------------------------------------------------------

LATE = 1.0  # seconds after a time-out for which a client still waits for the agent's answer
GO_UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
RETRIED = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.EACCES)  # errors while an agent starts
UNSHARED = 0.2  # seconds, at most, until an agent lets other users connect to the socket that it has made
NAMED_AFTER = 5.0  # seconds of silence before a warning; after REPLY_TIMEOUT the agent is taken for gone
COORDINATING = ("want", "start", "wait", "complete", "fail", "reset")  # methods that wait for an agent to start


def duration(text: str) -> float:
    """Return the seconds in a duration, written as for Go's time.ParseDuration (1h30m, 500ms) or as a bare number.

    Wherever a timeout is expected, 0 means no limit. Raises UsageError.
    """
    digits, total = "0123456789.", 0.0
    rest = text if text.strip(digits) else text + "s"
    try:
        while rest:
            amount = rest[: len(rest) - len(rest.lstrip(digits))]
            unit = next(unit for unit in GO_UNITS if rest.startswith(unit, len(amount)))
            total += float(amount) * GO_UNITS[unit]
            rest = rest[len(amount) + len(unit) :]
        if total >= 1e9:
            raise ValueError
        return total
    except (ValueError, StopIteration):
        hint = "write 30 or 30s, 10m, 1h30m, 500ms, 1.5h; 0 for no limit"
        raise UsageError(f"invalid duration {ascii(text)[:60]}: {hint}") from None


class Started(Record):
    """The result of `start`: the dependencies of the unit, and how many seconds it waited for them."""

    unit: str
    dependencies: list[str]
    waited: float


class Channel:
    """A connection to an agent: sends requests, receives messages."""

    def __init__(self, path: str, connect_timeout: float = 0.0, sock: Any = None) -> None:
        """Use the connected socket `sock`, or connect, trying for `connect_timeout` seconds. Raises Unreachable."""
        self.path = path
        self._last_id = 0
        self._buffer = bytearray()  # the beginning of a line
        self._lines: list[bytearray] = []  # complete lines, not yet returned by `receive`
        self.sock: Any = sock or connected(path, connect_timeout)
        pid, self.uid = peer_credentials(self.sock)
        self.agent = f"the agent at {path}" + (f" (pid {pid})" if pid else "")  # for messages
        self._foreign = self.uid not in (0, posix.geteuid())
        self._warned = False  # by `as_result`
        if self._foreign and posix.geteuid() and path == DEFAULT_SOCKET:  # any user can make a socket there
            self.close()
            who = f"{path} belongs to {user_name(self.uid)}, not to you or root"
            raise Foreign(f"{who}; choose another --socket-path")

    def request(self, method: str, **params: Any) -> int:
        """Send a request and return its id."""
        self._last_id += 1
        data = encode({"id": self._last_id, "method": method, "params": params})
        if len(data) > MAX_LINE:
            raise Refused(f"{method}: too much for one request ({len(data)} bytes of {MAX_LINE}); use several calls")
        deadline = time.monotonic() + REPLY_TIMEOUT
        while data:
            try:
                self.sock.settimeout(0)
                data = data[self.sock.send(data) :]
            except BlockingIOError:  # if the agent is blocked too, while it sends, it can go on when we read
                if time.monotonic() > deadline:
                    raise Unreachable(self.silence(REPLY_TIMEOUT)) from None
                self._read(0.01)
            except OSError:  # the next `receive` raises Unreachable, after what the agent sent before it closed
                break
        return self._last_id

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next message, or None if nothing comes within `timeout` seconds. Raises Unreachable."""
        deadline = time.monotonic() + timeout
        while not self._lines:
            if not self._read(deadline - time.monotonic()) and time.monotonic() >= deadline:
                return None
        line = bytes(self._lines.pop(0))
        try:
            message = decode(line)
        except ParseError:
            message = None
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            raise Unreachable(f"what answers at {self.path} does not speak our protocol: {line[:40]!a}")
        return message

    def expect(self, quiet: float = 0.0, deadline: float = NEVER) -> dict[str, Any] | None:
        """Return the next message, or None at `deadline`.

        The agent may be silent for `quiet` seconds. It is named in a warning NAMED_AFTER seconds later, and taken for
        gone REPLY_TIMEOUT seconds later: raises Unreachable.
        """
        due = time.monotonic() + quiet
        for late in (NAMED_AFTER, REPLY_TIMEOUT):
            message = self.receive(min(deadline, due + late) - time.monotonic())
            if message or time.monotonic() >= deadline:
                return message
            if late == NAMED_AFTER:
                say(f"warning: {self.silence(late)}", 2)
        raise Unreachable(self.silence(REPLY_TIMEOUT))

    def _read(self, timeout: float) -> bool:
        """Read what the agent has sent; return False if nothing comes within `timeout` seconds. Raises Unreachable."""
        longest = 1.0 if posix.getpid() == 1 else LONGEST_POLL  # process 1 handles its signals between two waits
        self.sock.settimeout(min(max(timeout, 0.0), longest))
        try:
            chunk = self.sock.recv(65536)
        except OSError as error:
            if error.errno in (None, errno.EAGAIN):  # None: after a wait
                return False
            chunk = b""
        if not chunk:
            raise Unreachable(f"the agent at {self.path} went away before it answered; is it still running?")
        self._buffer += chunk
        if b"\n" in chunk:
            *lines, self._buffer = self._buffer.split(b"\n")
            self._lines += lines
        elif len(self._buffer) > MAX_REPLY:
            raise Unreachable(f"what answers at {self.path} is not a coder_sync agent: it sent an endless line")
        return True

    def result(self, request: int, timeout: float = REPLY_TIMEOUT, quiet: float = 0.0) -> Any:
        """Return the result of a request, or raise the error in its answer.

        Raises Unreachable if there is no answer within `quiet` + `timeout` seconds.
        """
        deadline = time.monotonic() + quiet + timeout
        while message := self.expect(quiet, deadline):
            if is_answer(message, request):
                return unwrap(message)
        raise Unreachable(self.silence(timeout))

    def call(self, method: str, **params: Any) -> Any:
        """Send a request and return its result."""
        return self.result(self.request(method, **params))

    def as_result(self, data: Any) -> Result:
        """Return a result, or the parameters of a notification, as a record. Raises Unreachable.

        Environment variables are code: root takes none from the agent of another user, and prints one warning.
        """
        result = record(Result, data)
        if result.env and self._foreign and posix.geteuid() == 0:
            if not self._warned:
                whose = f"the agent at {self.path}, which belongs to {user_name(self.uid)}"
                say(f"warning: root takes no environment variables from {whose}", 2)
            self._warned, result.env = True, {}
        return result

    def close(self) -> None:
        """Close the connection, which ends its claims on units."""
        self.sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def silence(self, seconds: float) -> str:
        """Return the message about an agent that has been silent for so many seconds."""
        return f"{self.agent} has not answered for {seconds:.0f} s; is it stopped?"


def connected(path: str, connect_timeout: float) -> Any:
    """Return a socket connected to the agent at `path`; try for `connect_timeout` seconds. Raises Unreachable."""
    from _socket import AF_UNIX, SOCK_STREAM, socket  # the package module imports enum and selectors

    began, pause = time.monotonic(), 0.005
    while True:
        sock = socket(AF_UNIX, SOCK_STREAM)
        try:
            sock.settimeout(REPLY_TIMEOUT)
            sock.connect(path)
            return sock
        except OSError as error:
            sock.close()
            limit = min(connect_timeout, UNSHARED) if error.errno == errno.EACCES else connect_timeout
            if error.errno not in RETRIED or time.monotonic() >= began + limit:
                raise Unreachable(explain(path, error)) from None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def peer_credentials(sock: Any) -> tuple[int, int]:
    """Return pid and uid of the process at the other end of a connection, or 0 and -1 if they are unknown.

    A client gets those of the process that called listen(2).
    """
    import _socket

    try:
        if hasattr(_socket, "SO_PEERCRED"):  # pid, uid and gid
            data = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        else:  # macOS: LOCAL_PEERPID, and LOCAL_PEERCRED, which has the uid after a version number
            data = sock.getsockopt(0, 2, 4) + sock.getsockopt(0, 1, 76)[4:]
    except OSError:
        return 0, -1
    return int.from_bytes(data[:4], sys.byteorder, signed=True), int.from_bytes(data[4:8], sys.byteorder)


def parent_param() -> dict[str, int]:
    """Return the parameter for the pid of our parent, which an agent needs where there is no /proc."""
    return {} if posix.access("/proc/self", posix.F_OK) else {"caller": posix.getppid()}


def is_answer(message: dict[str, Any], request: int) -> bool:
    """Return whether a message is the answer to a request, or an error about the whole connection."""
    return "method" not in message and message.get("id", "none") in (request, None)


def unwrap(message: dict[str, Any]) -> Any:
    """Return the result in an answer, or raise the error in it."""
    error = message.get("error")
    if error is None:
        return message.get("result")
    if not isinstance(error, dict):
        raise Unreachable("the agent's answer has an error that is not an object")
    code, data = error.get("code"), error.get("data")
    kind = ERRORS.get(code, Refused) if isinstance(code, int) else Refused
    raise kind(printable(str(error.get("message"))), records(Dependency, data) if kind is TimedOut else data)


def records(kind: type[R], rows: Any) -> list[R]:
    """Return a list of records from JSON. Raises Unreachable."""
    return [record(kind, row) for row in (rows if isinstance(rows, list) else [rows])]


def agent_path(given: str) -> str:
    """Return the path of the agent's socket: `given`, else the one in the environment, else the default."""
    return given or getenv("CODER_AGENT_SOCKET_PATH") or DEFAULT_SOCKET


def explain(path: str, error: OSError) -> str:
    """Return a line that says why an agent cannot be reached, and what to do."""
    import stat

    start = f"start one with `{PROGRAM} serve --detach{'' if path == DEFAULT_SOCKET else f' --socket-path {path}'}`"
    try:
        found = posix.lstat(path)
    except OSError:
        found = None
    why = error.strerror or str(error)
    if error.errno == errno.ENOENT:
        why = f"no such file; is the agent running, and with this path? {start}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        belongs = f" (it belongs to {user_name(found.st_uid)}, mode {stat.S_IMODE(found.st_mode):o})" if found else ""
        why = f"permission denied{belongs}; run as its owner, or share it with `serve --mode 660 --group GROUP`"
    elif found and not stat.S_ISSOCK(found.st_mode) and not stat.S_ISLNK(found.st_mode):
        why = "not a socket; is the path right?"
    elif error.errno == errno.ECONNREFUSED:
        gone = "who made it is gone: build the tunnel again if it was one, else "
        gone = "the agent that made it is gone; " if posix.access(path + ".lock", posix.F_OK) else gone
        why = f"connection refused; {gone}{start}"
    elif error.errno == errno.EAGAIN:
        why = "the agent does not take connections; is it stopped or overloaded?"
    return f"cannot reach an agent at {path}: {why}"


def name_list(names: Iterable[str]) -> list[str]:
    """Return names as a list. Raises TypeError for a str, whose letters would be taken for names."""
    if isinstance(names, str):
        raise TypeError(f"a list of names is needed, not {names!r}")
    return list(names)


class BaseClient:
    """The part of Client above the cut: the calls that scripts make most."""

    def __init__(self, socket_path: str = "", connect_timeout: float | None = None) -> None:
        """Use `socket_path`, else $CODER_AGENT_SOCKET_PATH, else /tmp/coder-agent.sock.

        Each call tries to connect for `connect_timeout` seconds. The default is $CODER_SYNC_CONNECT_TIMEOUT, else 3
        seconds for calls that coordinate, and one try for questions.
        """
        self.socket_path = agent_path(socket_path)
        text = getenv("CODER_SYNC_CONNECT_TIMEOUT")
        try:
            self.connect_timeout = duration(text) if text and connect_timeout is None else connect_timeout
        except UsageError as error:
            raise UsageError(f"CODER_SYNC_CONNECT_TIMEOUT: {error}") from None

    def _channel(self, method: str) -> Channel:
        default = CONNECT_TIMEOUT if method in COORDINATING else 0.0
        return Channel(self.socket_path, default if self.connect_timeout is None else self.connect_timeout)

    def _call(self, method: str, **params: Any) -> Any:
        with self._channel(method) as channel:
            return channel.call(method, **params)

    def want(self, unit: str, *dependencies: str, requires: Requirement = SUCCESS) -> list[str]:
        """Make `unit` depend on `dependencies`, all or none; return all its dependencies. Raises CycleError."""
        return list(self.declare(unit, *dependencies, requires=requires)["dependencies"])

    def declare(self, unit: str, *dependencies: str, requires: Requirement = SUCCESS) -> dict[str, Any]:
        """Do the same as `want`, but return `dependencies` and `status` of the unit."""
        result = record(Result, self._call("want", unit=unit, dependencies=list(dependencies), requires=requires))
        return {"unit": result.unit, "dependencies": result.dependencies, "status": result.status}

    def start(
        self,
        unit: str,
        want: Iterable[str] = (),
        requires: Requirement = SUCCESS,
        timeout: float = START_TIMEOUT,
        pid: int = 0,
        on_wait: Callable[[list[Dependency], float], None] | None = None,
        locks: Iterable[str] = (),
    ) -> Started:
        """Wait until `unit` may run, and mark it started, in one step. `timeout` is in seconds; 0 is no limit.

        `want` adds dependencies first. If the process `pid` ends before the unit does, the unit fails. Only one of the
        units with the same lock is started at a time. `on_wait` is called with the missing dependencies and the seconds
        waited, when the wait begins and every 30 seconds. Raises AlreadyStarted, CycleError, DependencyFailed,
        TimedOut.
        """
        params: dict[str, Any] = {"dependencies": want, "requires": requires, "locks": locks, "pid": pid}
        return Start(self, unit, timeout, on_wait, **params).confirm()

    def complete(self, unit: str, exit_code: int = 0) -> None:
        """End `unit`, with success unless `exit_code` is not 0. Raises NotRegistered."""
        if exit_code:
            self._call("fail", unit=unit, exit_code=exit_code, **parent_param())
        else:
            self._call("complete", unit=unit, **parent_param())

    def fail(self, unit: str, reason: str = "") -> None:
        """End `unit` without success: units that require it are skipped. Raises NotRegistered."""
        self._call("fail", unit=unit, reason=one_line(reason), **parent_param())


class Start:
    """A unit started over a connection. With `hold` it fails if the connection closes before the unit has ended."""

    def __init__(
        self, client: BaseClient, unit: str, timeout: float, on_wait: Any = None, hold: bool = False, **params: Any
    ) -> None:
        """Wait until the agent has started the unit. `params` are further parameters of its method `start`."""
        params["dependencies"], params["locks"] = name_list(params["dependencies"]), name_list(params["locks"])
        params.update(unit=check_name(unit), hold=hold, confirm=not hold, **parent_param())
        began = time.monotonic()
        self.channel = client._channel("start")
        try:
            data = wait_for(self.channel, f"dependencies of unit {unit}", timeout, on_wait, "start", **params)
            result = self.channel.as_result(data)
        except BaseException:
            self.channel.close()
            raise
        self.result = Started(unit, result.dependencies, time.monotonic() - began)
        self.environment = result.env  # the variables that the unit's dependencies have left for it

    def confirm(self) -> Started:
        """Tell the agent that its answer has arrived: otherwise the next claim on the unit is granted."""
        with self.channel:
            self.channel.request("confirm", id=1)
        return self.result


def wait_for(
    channel: Channel, what: str, timeout: float, on_wait: Callable[..., None] | None, method: str, **params: Any
) -> Any:
    """Send a request whose answer may take `timeout` seconds, or any time if that is 0; return the result.

    `on_wait` is called with the missing dependencies whenever the agent sends them. The agent answers when the time is
    up; our own deadline, a little later, is for an agent that does not. Raises TimedOut, ValueError, and the error in
    the answer.
    """
    if not 0 <= timeout < 1e9:
        raise ValueError(f"a timeout is at least 0 (no limit) and less than 1e9 seconds, not {timeout}")
    deadline = time.monotonic() + timeout + LATE if timeout else NEVER
    request = channel.request(method, timeout=timeout, progress=True, **params)
    missing: list[Dependency] = []
    quiet = 0.0  # before the first notification `waiting`
    while message := channel.expect(quiet, deadline):
        if is_answer(message, request):
            return unwrap(message)
        if message.get("method") == "waiting":
            waiting = record(Waiting, message.get("params"))
            missing, quiet = waiting.missing, REPORT_EVERY
            if on_wait:
                on_wait(missing, waiting.waited)
    raise TimedOut(f"timeout waiting for {what}; the agent does not answer", missing)


# ----------------------------------------------------------------------------------------------------------
# Calls. The commands that scripts call most, `want`, `start`, `complete` and `fail`, and the parser of plain command
# lines. A command is a function, with a decorator that declares its arguments in the words of argparse: for `quick`,
# for argparse and for completion. The file is cut below this section.
# ----------------------------------------------------------------------------------------------------------


def dependency_text(row: Dependency) -> str:
    """Return the state of a dependency in words: `git-clone started 31s ago by bash setup.sh (pid 4242)`."""
    text = f"{row.depends_on} {row.current_status}"
    if row.current_status == NOT_REGISTERED:
        return text + (f', did you mean "{row.did_you_mean}"?' if row.did_you_mean else "")
    if row.current_status == PENDING:
        lacks = f"waits for {', '.join(row.waits_for)}" if row.waits_for else "not started yet"
        return f"{text} for {span(row.age)}, {lacks}"
    text += f" {span(row.age)} ago" + (f" ({row.reason})" if row.reason else "")
    if row.requirement == "lock" and row.owner and row.owner.alive is False:
        text += ", whose process is no longer running"
    return text + (owner_text(row.owner, " by ") if row.current_status == STARTED else "")


class Args:
    """The parsed command line: an attribute for each option and positional."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


def base_client(args: Args) -> BaseClient:
    """Return a client for the common options, with the calls above the cut."""
    return BaseClient(args.socket_path, args.connect_timeout)


def number(text: str) -> int:
    """Return the number that a text has in decimal digits. Raises UsageError."""
    if text.isdecimal() and len(text) < 10:
        return int(text)
    raise UsageError(f"not a whole number from 0 on: {ascii(text)[:40]}")


def signed(text: str) -> int:
    """Return the exit status that a text has, -N for signal N, as in Python. Raises UsageError."""
    return -number(text[1:]) if text[:1] == "-" else number(text)


class Argument:
    """An option or a positional of a command, declared in the words of argparse's add_argument.

    Unlike in argparse, the default is an empty text, or an empty list if the argument may be repeated.
    """

    def __init__(self, *names: str, **words: Any) -> None:
        self.names, self.words = names, words
        self.dest = names[-1].lstrip("-").replace("-", "_")  # the attribute of Args for the value
        self.is_option = names[0][0] == "-"
        self.is_repeated = "nargs" in words or words.get("action") == "append"
        self.takes_value = self.is_repeated or "action" not in words
        self.default = words.get("default", [] if self.is_repeated else "" if self.takes_value else False)

    def convert(self, text: str) -> Any:
        """Convert a text to a value of the argument. Raises UsageError."""
        choices = self.words.get("choices", [text])
        try:
            if text not in choices:
                raise UsageError(f"invalid choice: {ascii(text)[:40]} (choose from {', '.join(choices)})")
            return self.words.get("type", str)(text)
        except UsageError as error:
            names = "/".join(self.names) if self.is_option else self.words["metavar"]
            raise UsageError(f"argument {names}: {error}") from None


def flag(*names: str, help: str) -> Argument:
    """Return an option without a value."""
    return Argument(*names, action="store_true", help=help)


class Command:
    """A decorator that makes a function `cmd_NAME` the command NAME, with an example and arguments.

    Only its last positional may be repeated. `tail` says whether the words after `--` are a command to run: "*" if they
    may be, "+" if they must be. The docstring of the function is its help; it returns the exit status, or None for 0.
    """

    parse: ClassVar[Callable[[Sequence[str]], tuple[Command, Args]]]  # with argparse; set below the cut

    def __init__(self, example: str, *arguments: Argument, tail: str = "") -> None:
        self.example, self.arguments, self.tail = example, (*arguments, *COMMON), tail
        self.positionals = [argument for argument in arguments if not argument.is_option]
        self.options = {name: argument for argument in self.arguments if argument.is_option for name in argument.names}

    def __call__(self, run: Callable[[Args], int | None]) -> Callable[[Args], int | None]:
        about = run.__doc__ or ""
        self.name, self.run, self.help = run.__name__[len("cmd_") :], run, about[:1].lower() + about[1:].rstrip(".")
        COMMANDS[self.name] = self
        return run

    def set_positionals(self, args: Args, names: Sequence[str]) -> None:
        """Set the positionals in `args` to `names`. Raises UsageError."""
        for argument in self.positionals:
            if not names and argument.words.get("nargs") != "*":
                raise UsageError(f"the following arguments are required: {argument.words['metavar']}")
            setattr(args, argument.dest, names if argument.is_repeated else argument.convert(names[0]))
            names = [] if argument.is_repeated else names[1:]
        if names:
            hint = "; did you forget -- before the command?" if self.tail and not args.command else ""
            raise UsageError(f"unexpected {ascii(names[0])[:60]}{hint}")


COMMON = (
    Argument(
        "--socket-path",
        metavar="PATH",
        help=f"where the agent listens (default: $CODER_AGENT_SOCKET_PATH, else {DEFAULT_SOCKET})",
    ),
    Argument(
        "--connect-timeout",
        type=duration,
        default=None,
        metavar="DURATION",
        help="how long to try to reach an agent that is still starting (default: $CODER_SYNC_CONNECT_TIMEOUT, else 3s; "
        "questions try once)",
    ),
    flag("-h", "--help", help="show this help"),
)
UNIT = Argument("unit", metavar="UNIT", help="name of the unit")
QUIET = flag("-q", "--quiet", help="say nothing but errors")
LIMIT = "how long to wait, as in 30s, 10m or 1h30m; 0: no limit"
TIMEOUT = Argument("-t", "--timeout", type=duration, default="5m", metavar="DURATION", help=LIMIT)
REQUIRES = Argument("--requires", choices=REQUIREMENTS, default=SUCCESS, help="what must become of the dependencies")
WANT = Argument("--want", action="append", metavar="DEP", help="depend on this unit as well; may be repeated")
LOCK = Argument("--lock", action="append", metavar="NAME", help="never be started with another that has this lock")
STARTING = (UNIT, WANT, REQUIRES, LOCK, TIMEOUT)

COMMANDS: dict[str, Command] = {}


class Reporter:
    """Prints the missing dependencies during a wait; `waited` is whether there has been one."""

    def __init__(self, prefix: str, quiet: bool, fd: int = 1) -> None:
        self.prefix, self.quiet, self.fd, self.waited = prefix, quiet, fd, False

    def __call__(self, missing: list[Dependency], waited: float) -> None:
        how = f"still waiting after {span(waited)}" if self.waited else "waiting"
        self.waited = True
        more = f"; and {len(missing) - 20} more" if len(missing) > 20 else ""
        text = f"{self.prefix}{how} for " + "; ".join(dependency_text(d) for d in missing[:20]) + more
        say(text, self.fd, self.quiet)

    def started(self, started: Started) -> str:
        """Return the line about a start."""
        if self.waited:
            return f"started after {span(started.waited)}"
        if not started.dependencies:
            return "started; it has no dependencies"
        return f"started; satisfied already: {some_names(started.dependencies)}"


def start_unit(args: Args, report: Reporter, **more: Any) -> Start:
    """Start a unit, for the options that `start` and `run` have in common. Raises UsageError."""
    if args.requires != SUCCESS and not args.want:
        raise UsageError("--requires is about the units of --want, and there is none; see `want --requires`")
    params = {"dependencies": args.want, "requires": args.requires, "locks": args.lock, **more}
    return Start(base_client(args), args.unit, args.timeout, report, **params)


@Command(
    "want pip-install git-clone apt-install",
    UNIT,
    Argument("deps", nargs="+", metavar="DEP", help="names of units that UNIT depends on"),
    REQUIRES,
    QUIET,
)
def cmd_want(args: Args) -> None:
    """Make UNIT depend on DEP..., all or none."""
    status = base_client(args).declare(args.unit, *args.deps, requires=args.requires).get("status")
    late = f"; it has {STARTED} already, so this counts the next time it starts" if status == STARTED else ""
    say(f"{args.unit}: depends on {some_names(list(dict.fromkeys(args.deps)))}{late}", quiet=args.quiet)


@Command(
    "start pip-install --want git-clone --timeout 10m",
    *STARTING,
    Argument("--pid", type=number, default=0, help="fail the unit if this process ends (default: none)"),
    QUIET,
)
def cmd_start(args: Args) -> None:
    """Wait until UNIT may run, and mark it started."""
    report = Reporter(f"{args.unit}: ", args.quiet)
    start = start_unit(args, report, pid=args.pid)
    say(f"{args.unit}: {report.started(start.result)}", quiet=args.quiet)
    start.confirm()  # last: if this process is killed before, the next claim on the unit is granted


@Command(
    "complete pip-install --exit-code $?",
    UNIT,
    Argument("--exit-code", type=signed, default="0", metavar="N", help="fail UNIT if N is not 0"),
    QUIET,
)
def cmd_complete(args: Args) -> None:
    """End UNIT, so that others may go on."""
    base_client(args).complete(args.unit, args.exit_code)
    say(f"{args.unit}: {f'failed (exit code {args.exit_code})' if args.exit_code else 'completed'}", quiet=args.quiet)


@Command(
    'fail git-clone --reason "no network"',
    UNIT,
    Argument("--reason", metavar="TEXT", help="why, for units that are skipped because of it"),
    QUIET,
)
def cmd_fail(args: Args) -> None:
    """End UNIT without success, so that what requires it is skipped."""
    base_client(args).fail(args.unit, args.reason)
    say(f"{args.unit}: failed", quiet=args.quiet)


def split_tail(command: Command, words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Split a command line at `--`. The second part is the command to run, None if it is needed and missing."""
    end = words.index("--") if command.tail and "--" in words else len(words)
    tail = list(words[end + 1 :])
    return list(words[:end]), None if not tail and (end < len(words) or command.tail == "+") else tail


def quick(argv: Sequence[str]) -> tuple[Command, Args] | None:
    """Parse a plain command line, `COMMAND NAME... --option VALUE -q`, with or without `exp sync` before it.

    Return None for others and for mistakes: these need argparse, whose import costs more than a whole call.
    """
    try:
        name, *words = argv[2:] if list(argv[:2]) == ["exp", "sync"] else argv
        command, args, names = COMMANDS[name], Args(), []
        values, options = vars(args), command.options
        words, values["command"] = split_tail(command, words)
        for argument in command.arguments:
            default = argument.default
            values[argument.dest] = argument.convert(default) if default and isinstance(default, str) else default
        while words:
            word = words.pop(0)
            if word[:1] != "-":
                names.append(word)
                continue
            option = options[word]
            if option.takes_value and words[0][:1] == "-":
                return None
            value = option.convert(words.pop(0)) if option.takes_value else True
            values[option.dest] = [*values[option.dest], value] if option.is_repeated else value
        command.set_positionals(args, names)
    except (UsageError, LookupError, ValueError):
        return None
    return None if args.help or args.command is None else (command, args)


def name_process() -> None:
    """Have ps(1) and top(1) show our name instead of python3, where the system lets us."""
    try:
        fd = posix.open("/proc/self/comm", posix.O_WRONLY)
        posix.write(fd, b"coder_sync")
        posix.close(fd)
    except OSError:
        pass


def shortage(error: Exception) -> str:
    """Return the resource whose lack has caused an error, or an empty text."""
    try:
        posix.getcwd()
    except OSError:
        return "the working directory is gone"
    lacks = (*map(posix.strerror, NO_ROOM), "can't start new thread")
    return next((text for text in lacks if text in str(error)), "")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit at once: to finalize the interpreter would take longer than the call."""
    code = 0
    try:
        for fd in (0, 1, 2):
            try:
                posix.fstat(fd)
            except OSError:  # closed: a socket must not get this number
                null()
        if argv is None and sys.getfilesystemencoding() != "utf-8" and sys.executable:  # names are UTF-8 in any locale
            posix.execv(sys.executable, [sys.executable, "-X", "utf8", "-IS", FILE, *sys.argv[1:]])
        if posix.getpid() == 1:
            exit_on_signals()
        name_process()
        words = sys.argv[1:] if argv is None else argv
        command, args = quick(words) or Command.parse(words)
        code = command.run(args) or 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # --help, and signals
        code = end.code if isinstance(end.code, int) else 2
    except SyncError as error:
        missing = error.data if isinstance(error, TimedOut) else None
        rows = "".join(f"  {dependency_text(row)}\n" for row in missing or ())
        put(f"error: {error}\n" if missing is None else f"{error.args[0]}\n{rows}", 2)
        code = error.exit_code
    except Exception as error:  # users see no traceback
        lack = shortage(error)
        defect = f"internal error in coder_sync {__version__}: {one_line(repr(error))}; please report it"
        put(f"error: {f'cannot go on: {lack}' if lack else defect}\n", 2)
        if getenv("CODER_SYNC_DEBUG"):
            vars(sys).pop("tracebacklimit", None)
            raise
        code = 125
    posix._exit(code)


if __name__ == "__main__" and quick(sys.argv[1:]):  # a plain call needs nothing from below
    SELF = None  # closed: it may be in the place of a standard stream
    main()
if SELF:  # by `launch`
    rest, SELF = code_in(SELF, True), None
    for part in rest:
        exec(part, globals())
elif launch.__code__.co_filename == INSTALLED:  # imported from a copy
    exec(globals()["__loader__"].get_code("below"), globals())


# ----------------------------------------------------------------------------------------------------------
# Client. The rest of the Python API, on which the command line is built; the records that it returns; did you mean?
# ----------------------------------------------------------------------------------------------------------


class Event(Record):
    """Something that happened to a unit."""

    seq: int  # its number, counted from 1
    time: float  # seconds, on the monotonic clock of the agent's system
    wall: float  # seconds since 1970
    unit: str  # name of the unit
    kind: str  # what happened
    detail: str = ""  # more about it


class UnitStatus(Record):
    """A snapshot of one unit. Times are in seconds since the agent began, or None for what has not happened.

    Only `status` fills `dependencies` and `history`.
    """

    unit_name: str  # name
    status: str  # pending, started, completed, failed, skipped or not registered
    is_ready: bool  # whether all dependencies meet their requirement
    reason: str = ""  # why it failed or was skipped
    exit_code: int | None = None  # status of its command, if that failed
    age: float = 0.0  # seconds in its status
    owner: Owner | None = None  # who started it
    is_waiting: bool = False  # whether a start of it waits
    waits_for: list[str] = []  # what it lacks while it waits, at most five names
    registered: float | None = None  # when it was first named by `want`, `start`, `run` or `boot`
    waiting: float | None = None  # when its start was asked for
    ready: float | None = None  # when its dependencies were met; after that it can only have waited for a lock
    started: float | None = None  # when it started
    ended: float | None = None  # when it completed, failed or was skipped
    released_by: str = ""  # the dependency that was met last
    wants: dict[str, str] = {}  # its dependencies, each with its requirement
    locks: list[str] = []  # names of its locks
    blocked_by: dict[str, str] = {}  # locks that others have, each with the unit that has it
    tries: list[float] = []  # when each further try began
    running_on: bool = False  # whether it completed and its command runs on, as a service
    stopping: bool = False  # whether its command is to end, or was told to
    exited: float | None = None  # when the command of a service ended
    exit_reason: str = ""  # how it ended
    probe: str = ""  # what says that a service is ready, while it is not
    probe_error: str = ""  # what the last try of it lacked
    log: str = ""  # file that has its output
    refusal: str = ""  # why the last `want` or `start` of it was refused
    environment: dict[str, str] = {}  # variables that it left for its dependents
    dependencies: list[Dependency] = []  # one object each: see below
    did_you_mean: str = ""  # a name that resembles this one, which is not registered
    history: list[Event] = []  # its events, as `events` prints them


class Pong(Record):
    """The result of `ping`; `uptime` is in seconds."""

    version: str
    pid: int
    uptime: float


class Graph(Record):
    """All units at the time `now`, in seconds since the agent began."""

    now: float
    nodes: list[UnitStatus]


class Client(BaseClient):
    """The Python API: requests to an agent. All times are in seconds.

    Every call may raise Unreachable (no agent, or it went away) and Refused (the rules do not allow it; CycleError,
    AlreadyStarted and NotRegistered are subclasses). `exit_code` of an error is the exit status of the command line.
    An agent that is silent for 5 seconds is named in a warning on standard error; after 30 it is taken for gone.
    """

    def ping(self, wait: float = 0.0) -> dict[str, Any]:
        """Return the agent's `version`, `pid` and `uptime`; try to reach it for `wait` seconds."""
        with Channel(self.socket_path, max(wait, self.connect_timeout or 0.0)) as channel:
            return vars(record(Pong, channel.call("ping")))

    def wait(
        self,
        *units: str,
        requires: Requirement = SUCCESS,
        timeout: float = START_TIMEOUT,
        on_wait: Callable[[list[Dependency], float], None] | None = None,
    ) -> float:
        """Wait until units meet `requires`; return the seconds waited. Raises DependencyFailed, TimedOut."""
        began = time.monotonic()
        with self._channel("wait") as channel:
            wait_for(channel, ", ".join(units), timeout, on_wait, "wait", units=list(units), requires=requires)
        return time.monotonic() - began

    def reset(self, *units: str) -> list[str]:
        """Make ended units pending again, and units that they caused to be skipped; all units if none is named.

        Return their names. Raises NotRegistered, or Refused while one of them is started.
        """
        return record(Result, self._call("reset", units=list(units))).units

    def env(self, unit: str) -> dict[str, str]:
        """Return the environment variables that dependencies have left for `unit`. Raises NotRegistered."""
        with self._channel("env") as channel:
            return channel.as_result(channel.call("env", unit=unit)).env

    def stop(self, *units: str, grace: float = GRACE) -> list[str]:
        """End the commands of units and of their dependents, dependents first; of all units if none is named.

        Return the names of the units when their commands have ended; those that ignore TERM are killed after `grace`
        seconds. Raises NotRegistered, or Refused if a command still runs.
        """
        result = self.halt(*units, grace=grace)
        if result.left or result.cannot:
            raise Refused(still_running(result), result.stopped)
        return result.stopped

    def halt(self, *units: str, grace: float = GRACE) -> Result:
        """Do the same as `stop`, but return the units that are `stopped`, are `left`, or `cannot` be stopped."""
        with self._channel("stop") as channel:
            request = channel.request("stop", units=list(units), grace=grace)
            return record(Result, channel.result(request, quiet=grace + STOP_PATIENCE))

    def shutdown(self) -> None:
        """End the agent, which stops services first; return when it has ended. Raises Unreachable after 30 seconds."""
        with self._channel("shutdown") as channel:
            channel.call("shutdown")
            try:
                channel.receive(REPLY_TIMEOUT)  # until the agent closes the connection
            except Unreachable:
                return
            raise Unreachable(f"{channel.agent} was told to end {REPLY_TIMEOUT:.0f} s ago and has not; is it stopped?")

    def status(self, unit: str) -> UnitStatus:
        """Return a snapshot of one unit and its dependencies."""
        return record(UnitStatus, self._call("status", unit=unit))

    def list(self, everything: bool = False) -> Sequence[UnitStatus]:
        """Return snapshots of all units, sorted by name; `everything` includes names that are not registered."""
        return records(UnitStatus, self._call("list", all=everything))

    def graph(self) -> Graph:
        """Return all units with their dependencies and times."""
        graph = record(Graph, self._call("graph"))
        names = {u.unit_name for u in graph.nodes}
        for u in graph.nodes:
            known = u.status in (NOT_REGISTERED, PENDING, STARTED, *ENDED) and {*u.wants.values()} <= {*REQUIREMENTS}
            if not known or not u.wants.keys() <= names:
                raise Unreachable("the answer is not a Graph; are agent and client of one version?")
        return graph

    def events(self, follow: bool = False, since: int = 0) -> Iterator[Event]:
        """Iterate over the events after number `since`, oldest first, and with `follow` over new ones as they happen.

        The agent remembers the last 100,000 events. Raises Unreachable when it ends, or if a follower reads too slowly.
        """
        with self._channel("events") as channel:
            yield from records(Event, channel.call("events", follow=follow, since=since))
            while follow:
                message = channel.receive(REPORT_EVERY)
                if message is None:  # no event, or the agent hangs
                    channel.request("ping")
                    message = channel.expect() or {}
                if message.get("method") == "event":
                    yield record(Event, message.get("params"))

    def unit(
        self,
        unit: str,
        want: Iterable[str] = (),
        requires: Requirement = SUCCESS,
        timeout: float = START_TIMEOUT,
        locks: Iterable[str] = (),
    ) -> Block:
        """Return a context manager that starts `unit`, and completes it at the end of the block.

        If the block raises, the unit fails, with the exception as the reason; also if the process ends. sys.exit() and
        sys.exit(0) complete it. Entering the block raises the same exceptions as `start`.
        """
        return Block(self, unit, timeout, hold=True, dependencies=want, requires=requires, locks=locks)


class Block:
    """The context manager of `Client.unit`."""

    def __init__(self, *args: Any, **params: Any) -> None:
        """Take the arguments of Start."""
        self.args, self.params = args, params

    def __enter__(self) -> Start:
        self.start = Start(*self.args, **self.params)
        return self.start

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        code: Any = error.code if isinstance(error, SystemExit) else error
        outcome: dict[str, Any] = {}
        if code not in (None, 0):
            text = one_line(f"{type(error).__name__}: {error}".rstrip(": "))
            outcome = {"exit_code": int(code)} if isinstance(code, int) else {"reason": text}
        with self.start.channel as channel:
            try:
                channel.call("fail" if outcome else "complete", unit=self.start.result.unit, **outcome)
            except SyncError:
                if error is None:  # otherwise the block's own exception matters more
                    raise


def gone_hint(unit: str, owner: Owner | None) -> str:
    """Return the end of a message about a unit: what to do if its owner has gone."""
    gone = owner is not None and owner.alive is False
    return f"; `complete {unit}` or `fail {unit}` lets others go on" if gone else ""


def still_running(result: Result) -> str:
    """Return the message about commands that `stop` has not ended."""
    texts = [f'unit "{row.unit}" still runs' + owner_text(row.owner, ": ", "") for row in result.left]
    for row in result.cannot:
        way = gone_hint(row.unit, row.owner) or ", which has no supervisor: end that process"
        texts.append(f'unit "{row.unit}" cannot be stopped' + owner_text(row.owner, ": it is ") + way)
    return "; ".join(texts)


def make_client(args: Args) -> Client:
    """Return a client for the common options."""
    return Client(args.socket_path, args.connect_timeout)


def resembling(name: str, names: Iterable[str]) -> str:
    """Return the one of `names` that `name` may be a misspelling of, or an empty text."""
    try:
        from difflib import get_close_matches
    except (ImportError, OSError):  # too many open files
        return ""
    from itertools import islice

    digits = str.maketrans("", "", "0123456789")  # db-1 is not a misspelling of db-2
    close = get_close_matches(name, list(islice(names, 5000)), 3, 0.7)
    return next((n for n in close if n.translate(digits) != name.translate(digits)), "")


def did_you_mean(guess: str, otherwise: str = "") -> str:
    """Return the end of a message about an unknown name: the name that it resembles, or `otherwise`."""
    return f'; did you mean "{guess}"?' if guess else otherwise


# ----------------------------------------------------------------------------------------------------------
# Processes. What several sections need of the system: the terminal, the identity of a process, file descriptors,
# signals, how a command is run, and which processes belong to it. /proc is used if it shows our own pid namespace.
# ----------------------------------------------------------------------------------------------------------

import _signal as signal  # noqa: E402  (the package module wraps each number in an enum)
import os  # noqa: E402  (a plain call, which needs only what is above, does without)


def terminal() -> tuple[int, bool, bool]:
    """Return the width of standard output, whether it takes colour, and whether it takes Unicode."""
    tty = os.isatty(1)
    try:
        width = os.get_terminal_size(1).columns
    except OSError:
        width = int(getenv("COLUMNS")[:9]) if getenv("COLUMNS").isdecimal() else 100
    codec = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    locale = next(filter(None, map(getenv, ("LC_ALL", "LC_CTYPE", "LANG"))), "utf-8")  # Python takes C for UTF-8
    unicode = codec == "utf8" and "utf" in locale.lower()
    return max(40, min(width, 400)), tty and not getenv("NO_COLOR"), unicode


def environment(base: dict[bytes, bytes] | None = None, /, **extra: str) -> dict[bytes, bytes]:
    """Return the environment for a command: `base` or ours, with the variables `extra`."""
    added = {os.fsencode(name): os.fsencode(value) for name, value in extra.items()}
    return {**(os.environb if base is None else base), **added}


# -- who a process is ---------------------------------------------------------------------------------------


def has_proc() -> bool:
    """Return whether /proc shows our own pid namespace; in any other, our pids belong to other processes."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def proc_file(pid: int, name: str) -> str:
    """Return the text of /proc/PID/NAME, at most 64 KiB of it. Raises OSError."""
    if not has_proc():
        raise FileNotFoundError(errno.ENOENT, "no /proc of ours")
    with open(f"/proc/{pid}/{name}", "rb", 0) as file:
        return file.read(1 << 16).decode(errors="replace")


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on, which proc(5) calls `state`. Raises OSError."""
    return proc_file(pid, "stat").rpartition(")")[2].split()


def birth(pid: int) -> str | None:
    """Return the start time of a process in clock ticks, which identifies it with its pid; empty if it has ended.

    None if unknown: there is no /proc, or no file descriptor is left.
    """
    try:
        fields = stat_of(pid)
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        return None if signal_to(pid, 0) else ""


def proc_text(pid: int, name: str) -> str:
    """Return the text of /proc/PID/NAME; empty if it cannot be read."""
    try:
        return proc_file(pid, name)
    except OSError:
        return ""


def proc_line(pid: int, prefix: str, name: str = "status", end: str = "\n") -> str:
    """Return the rest of the line of /proc/PID/NAME that begins with `prefix`; empty if there is none."""
    lines = proc_text(pid, name).split(end)
    return next((line[len(prefix) :].strip() for line in lines if line.startswith(prefix)), "")


def command_of(pid: int) -> str:
    """Return the command line of a process for a message; empty if unknown."""
    return command_text(proc_text(pid, "cmdline").rstrip("\0").split("\0")) or proc_line(pid, "Name:")


def command_text(args: list[str]) -> str:
    """Return a command line, short enough for a message."""
    if args[1:2] == ["-IS"]:  # our own executable form, installed or plain
        args = args[4:] if args[2:3] == ["-c"] else args[2:]
    names = [a if a[:1] == "-" or "://" in a else os.path.basename(a) or a for a in args[:2]]  # bash setup.sh
    text = one_line(without_password(" ".join([*names, *args[2:]])))
    return text if len(text) <= 60 else text[:57] + "..."


def without_password(text: str) -> str:
    """Return a text with the user and password of the first URL in it replaced by asterisks."""
    scheme, found, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    return f"{scheme}{found}***@{host}{slash}{path}" if at else text


# -- file descriptors ---------------------------------------------------------------------------------------
WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def open_file(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file by a path that we do not control, without waiting if it is a FIFO or a device. Raises OSError."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o644)


def max_descriptors() -> int:
    """Return how many file descriptors this process may have."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def in_background() -> tuple[int, int]:
    """Fork a background process; return its pid (0 in it), and a socket that connects the two processes.

    It has a session of its own, and keeps no file descriptors but standard output and error. Raises Refused.
    """
    from _socket import socketpair

    try:
        ours, theirs = socketpair()
        pid = os.fork()
    except OSError as error:
        raise Refused(f"cannot go to the background: {error_text(error)}") from None
    if pid:
        theirs.close()
        return pid, ours.detach()
    ours.close()
    signal.set_wakeup_fd(-1)  # a pipe of the other process
    os.setsid()
    os.dup2(null(), 0)
    front = theirs.detach()
    os.closerange(3, front)
    os.closerange(front + 1, min(max_descriptors(), 1 << 16))
    return 0, front


# -- signals, and how a command is run ---------------------------------------------------------------------
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # end an agent without a command
PASSED_ON = (*STOPS, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)  # go to the command, if there is one


def not_ignored(numbers: Iterable[int]) -> list[int]:
    """Return signals without those that our parent has set to be ignored, as nohup(1) does, but with TERM."""
    return [n for n in numbers if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]


class Processes:
    """All living processes, read from /proc. Raises OSError unless it could read all.

    The mark of a process is the $CODER_SYNC_ENV with which it was started: each unit has its own.
    """

    def __init__(self) -> None:
        self.births: dict[int, int] = {}  # pid -> start time in clock ticks
        self.related: dict[Any, list[int]] = {}  # parent, group, session or mark -> pids
        self.zombie_groups: set[int] = set()  # process groups that have zombies
        ours, seen = int(stat_of(os.getpid())[19]), set()  # type: tuple[int, set[str]]
        for _ in range(9):  # a process may have started another and ended since the listing
            new = {name for name in os.listdir("/proc") if name.isdigit()} - seen
            if sum(self._add(int(name), ours) for name in new) == len(new):
                return
            seen |= new
        raise BlockingIOError(errno.EAGAIN, "processes begin faster than they can be listed")

    def _add(self, pid: int, ours: int) -> bool:
        """Add a process, with its mark if it began after us; return False if it has ended."""
        try:
            state, parent, group, session, *more = stat_of(pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            self.zombie_groups.add(int(group))
            return False
        born = self.births[pid] = int(more[15])
        mark = proc_line(pid, "CODER_SYNC_ENV=", "environ", "\0") if born >= ours else ""
        for key in {int(parent), int(group), int(session), mark}:
            self.related.setdefault(key, []).append(pid)
        return True


class Family:
    """The processes of a command: the first one, its session or group, those with its mark, and all descendants.

    A process once found is remembered by its pid and start time, so that its parent may end. Without /proc, only the
    first process and its group are known. No pid is signalled that may have been given to another process.
    """

    def __init__(self, pid: int, leads: bool, mark: str) -> None:
        self.pid, self.leads, self.mark = pid, leads, mark  # of the first process; whether it leads a session or group
        self.first_alive = pid > 0  # whether the first process has not ended
        self._known: dict[int, int] = {}  # pid -> start time, as of the last scan

    def scan(self, processes: Callable[[], Processes]) -> bool:
        """Find the processes that are left; return False only if there is certainly none."""
        try:
            alive = processes()
        except FileNotFoundError:  # there is no /proc
            return self.first_alive or self.has_group()
        except OSError:  # no file descriptor is left, or processes begin too fast
            return True
        self.leads = self.leads and (self.first_alive or self.pid not in alive.births)  # else the pid is reused
        todo = [pid for pid, birth in self._known.items() if alive.births.get(pid) == birth]
        todo += [self.pid] * (self.first_alive or self.leads)
        todo += alive.related.get(self.mark, ()) if self.mark else ()
        found: set[int] = set()
        while todo:
            pid = todo.pop()
            if pid not in found:
                found.add(pid)
                todo += alive.related.get(pid, ())
        self._known = {pid: alive.births[pid] for pid in found if pid in alive.births}
        missed = self.has_group() and self.pid not in alive.zombie_groups
        return self.first_alive or bool(self._known) or missed

    def has_group(self) -> bool:
        """Return whether its own group has members, zombies included."""
        return self.leads and signal_to(-self.pid, 0)

    def terminate_first(self) -> None:
        """Send TERM to the first process, and CONT, since it may be stopped."""
        if self.first_alive:
            signal_to(self.pid, signal.SIGTERM, signal.SIGCONT)

    def pids(self) -> list[int]:
        """Return the pids of the known processes that are left."""
        return [self.pid] * self.first_alive + self._others()

    def _others(self) -> list[int]:
        others = [pid for pid in self._known if pid != self.pid or not self.first_alive]
        return [pid for pid in others if birth(pid) == str(self._known[pid])]

    def terminate_others(self) -> None:
        """Send TERM to all processes but the first."""
        group = [-self.pid] if not self._known and self.has_group() else []  # there is no /proc
        for pid in self._others() or group:
            signal_to(pid, signal.SIGTERM, signal.SIGCONT)

    def kill(self) -> None:
        """Send KILL to all processes; to the group in one step, in which it cannot start more."""
        for pid in [-self.pid] * self.leads + self.pids():
            signal_to(pid, 9)


class Loop:
    """The event loop of the main thread: signals, ends of children, file descriptors, and a time.

    Python writes the number of each signal to a pipe (signal.set_wakeup_fd), which `turn` polls with the other file
    descriptors: so no signal is missed between two polls. Until `restore_signals`, signals have no other effect.
    """

    def __init__(self, numbers: Iterable[int] = PASSED_ON) -> None:
        import select

        self.numbers = not_ignored(numbers)
        self.children: dict[int, Callable[[int], None]] = {}  # pid -> callback for its exit status
        self._handlers: dict[int, Callable[[], None]] = {}
        self._processes: Processes | None = None  # as of the present turn
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Our parent may have blocked signals, or ignored SIGCHLD, so that children would leave no exit status.
        ours = [*self.numbers, signal.SIGCHLD]
        self._before = {n: signal.signal(n, lambda number, frame: None) or signal.SIG_DFL for n in ours}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)

    def turn(self, due: float = NEVER) -> list[int]:
        """Wait for events until the time `due`, and handle them; return the signals received."""
        received, self._processes = b"", None
        for fd, _ in self._poll.poll(min(max(0.0, due - time.monotonic()), LONGEST_POLL) * 1000 + 1):
            if fd == self._read:
                received = os.read(fd, 4096)
            elif fd in self._handlers:  # else an earlier handler has removed it
                self._handlers[fd]()
        if signal.SIGCHLD in received:
            self._reap()
        return [n for n in received if n in self.numbers]

    def processes(self) -> Processes:
        """Return all living processes, read from /proc once a turn. Raises OSError."""
        self._processes = self._processes or Processes()
        return self._processes

    def watch(self, fd: int, handler: Callable[[], None], for_writing: bool = False) -> None:
        """Call `handler` in each turn in which a file descriptor can be read, or written to."""
        import select

        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLOUT if for_writing else select.POLLIN)

    def forget(self, *fds: int) -> None:
        """Stop watching file descriptors."""
        for fd in fds:
            if self._handlers.pop(fd, None):
                self._poll.unregister(fd)

    def restore_signals(self) -> None:
        """Restore the handlers of signals, as needed before exec.

        Raises SystemExit(128+N) if signal N, which is not SIGWINCH, was received after the last turn.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, self._before)  # a handler must not change while a signal waits for it
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        os.close(self._write)
        with open(self._read, "rb") as pipe:
            late = [n for n in pipe.read() or b"" if n in self.numbers and n != signal.SIGWINCH]
        if late:
            sys.exit(128 + late[0])

    def _reap(self) -> None:
        """Reap all children that have ended, and orphans if we are process 1. No other place calls waitpid."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self.children:
                self.children.pop(pid)(exit_code_of(status))


def sent_by_key(number: int) -> bool:
    """Return whether a signal may come from a key of our terminal, which signals its whole foreground group."""
    if number not in (signal.SIGINT, signal.SIGQUIT):
        return False
    try:
        with open("/dev/tty", "rb", 0) as tty:
            return os.tcgetpgrp(tty.fileno()) == os.getpgrp()
    except OSError:  # there is no terminal
        return False


def spawn(command: list[str], env: dict[bytes, bytes], own_session: bool = False, **options: Any) -> int:
    """Start a command with default signal handling, perhaps in a session of its own; return its pid.

    Raises OSError, and ValueError for an empty name.
    """
    options.update(setsigmask=[], setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD])
    program = in_path(command[0], env.get(b"PATH"))
    if own_session:
        try:
            return os.posix_spawnp(program, command, env, setsid=True, **options)
        except NotImplementedError:  # an older C library
            options["setpgroup"] = 0
    return os.posix_spawnp(program, command, env, **options)


def in_path(program: str, path: bytes | None) -> str:
    """Return where a program is in `path`; its name if that is our PATH, which spawn searches. Raises OSError."""
    if path == os.environb.get(b"PATH") or not program or "/" in program:
        return program
    from shutil import which

    places = os.fsdecode(path or os.defpath)
    found = which(program, path=places) or which(program, os.F_OK, places)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no such command")
    return found


def supervise(loop: Loop, command: list[str], env: dict[bytes, bytes]) -> int:
    """Run a command with our standard streams, pass signals on, and return its exit status, as a shell has it.

    Signals of keys are not passed on: the terminal sends them to the command itself. Raises CommandError.
    """
    try:
        pid = spawn(command, env)
    except (OSError, ValueError) as error:
        raise cannot_run(command[0], error) from None
    codes: list[int] = []
    loop.children[pid] = codes.append
    while not codes:
        for number in loop.turn():
            if not codes and not sent_by_key(number):
                signal_to(pid, number)
    return shell_status(codes[0])


def exit_code_of(status: int) -> int:
    """Return the exit status that waitpid reported, -N for signal N; Python 3.8 has no os.waitstatus_to_exitcode."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def exit_text(code: int) -> str:
    """Return an exit status that is not 0, or -N for signal N, in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def shell_status(code: int) -> int:
    """Return an exit status as a shell has it: 128+N for signal N, which is -N here."""
    return code if code >= 0 else 128 - code


def error_text(error: Exception) -> str:
    """Return the message of an error, without its number."""
    return one_line(getattr(error, "strerror", None) or str(error))


def cannot_run(program: str, error: Exception) -> CommandError:
    """Return the error for a command that could not be started."""
    missing = isinstance(error, FileNotFoundError) or not isinstance(error, OSError)
    why = getattr(error, "strerror", "no such command")
    if missing and os.path.isfile(program):
        why = "the interpreter that its first line names does not exist"
    elif missing and " " in program:
        why += "; for a shell's command line write sh -c '...'"
    return CommandError(f"cannot run {program}: {why}", 127 if missing else 126)


def signal_to(pid: int, *numbers: int) -> bool:
    """Send signals to a process, or to group N if `pid` is -N; return whether it exists, even if not permitted."""
    try:
        for number in numbers:
            os.kill(pid, number)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def remove(path: str, only: os.stat_result | None = None) -> None:
    """Unlink a file if it exists; with `only`, if it is still that file."""
    try:
        if only is None or os.path.samestat(os.lstat(path), only):
            os.unlink(path)
    except OSError:
        pass


def is_variable(name: str) -> bool:
    """Return whether this is a valid name for a shell variable."""
    return name.isidentifier() and name.isascii()


# ----------------------------------------------------------------------------------------------------------
# Units. The dependency graph and its rules. Pure: no sockets, no files, no sleeping; the clocks are passed in.
# Not thread-safe: the agent holds one lock.
#
# A request to start a unit has a claim. It waits in the line of the unit, is granted, and ends in one of these methods:
#     delivered       a plain claim, when the client has the answer; until then the other claims stay in line
#     end             a held claim, when its unit has ended
#     end, exit       a supervisor's claim, when its unit and the command have ended; the command of a service runs on
#     end_claims      any claim, also while it waits, when its time is up, or its client or its process is gone
# Invariants: a unit is started exactly while a claim was granted and the unit has not ended; `unmet` is the number
# of dependencies whose requirement is not met; a unit is in `taken` of its locks exactly while it is started, or has
# failed and its claim lasts; a unit whose command runs on has a holder; a unit in `stopping` has one, a supervisor's.
# ----------------------------------------------------------------------------------------------------------

MEETS: dict[str, tuple[str, ...]] = {SUCCESS: (COMPLETED,), COMPLETION: ENDED, START: (STARTED, COMPLETED, FAILED)}

# The statuses in which a dependency cannot meet a requirement any more:
HOPELESS: dict[str, tuple[str, ...]] = {SUCCESS: (FAILED, SKIPPED), COMPLETION: (), START: (SKIPPED,)}
REQUIRED_STATUS: dict[str, str] = {SUCCESS: COMPLETED, COMPLETION: "ended", START: STARTED}  # as `status` shows it
MAX_UNITS = 50_000
MAX_EDGES = 500_000
MAX_WAITS = 20_000
MAX_EVENTS = 100_000
MAX_LOCKS = 20  # of one unit
MAX_HISTORY = 200  # events that `status` shows
MAX_ENVIRONMENT = 100_000  # characters of all variables that units leave; the system limits what a command starts with
TIMED_OUT = "timed out"  # a reason to end a claim


def reached(starts: Iterable[T], onward: Callable[[T], Iterable[T] | None]) -> dict[T, None]:
    """Return nodes of a graph and all nodes that they lead to, the nearest first."""
    found = dict.fromkeys(starts)
    todo = [*found]
    for node in todo:
        new = [other for other in onward(node) or () if other not in found]
        found.update(dict.fromkeys(new))
        todo += new
    return found


def in_order(starts: Iterable[Unit], wants: Callable[[Unit], Iterable[Unit]]) -> dict[Unit, None]:
    """Return units and all units that they depend on, dependencies first. Raises CycleError."""
    done: dict[Unit, None] = {}
    for start in starts:
        path = {start: iter(wants(start))}  # from `start` to the current unit; no recursion, since chains may be long
        while path:
            unit, rest = next(reversed(path.items()))
            new = next((other for other in rest if other not in done), None)
            if new is None:
                done[unit] = None
                path.popitem()  # the unit; `del` would make long chains slow
            elif new in path:
                cycle = [*(unit.name for unit in path), new.name]
                cycle = cycle[cycle.index(new.name) :]
                own = "; a unit cannot depend on itself" if len(cycle) == 2 else ""
                raise CycleError(f"cycle detected: {' -> '.join(cycle)}{own}", cycle)
            else:
                path[new] = iter(wants(new))
    return done


def check_requirement(requires: str) -> str:
    """Return `requires` if it is a requirement, else raise Refused."""
    if requires not in REQUIREMENTS:
        raise Refused(f"no such requirement: {one_line(requires)[:40]}; use one of {', '.join(REQUIREMENTS)}")
    return requires


class Unit:
    """A node of the graph, changed by Units only. A `wait` and a `stop` have a unit of their own, without a name."""

    def __init__(self, name: str, since: float = 0.0) -> None:
        self.name = name
        self.status, self.since = NOT_REGISTERED, since  # and when it got this status
        self.wants: dict[Unit, str] = {}  # dependency -> requirement
        self.wanted_by: dict[Unit, str] = {}  # the same edges, seen from the other end
        self.unmet = 0  # number of dependencies whose requirement is not met
        self.line: dict[Claim, None] = {}  # claims that wait, oldest first
        self.holder: Claim | None = None  # the claim that was granted, until it ends
        self.locks: tuple[Lock, ...] = ()  # locks that it has or waits for
        self.refused: list[Owner] = []  # scripts whose start was refused since the unit was last started
        self.forget_run()

    def forget_run(self) -> None:
        """Forget what is known of the present run."""
        self.facts = object.__new__(UnitStatus)  # attributes that are not set have their defaults and take no memory
        self.root = ""  # the first failure that caused the unit to be skipped
        self.last: Claim | None = None  # the held claim that was granted last
        self.lost = False  # whether that claim ended while the command may have run on
        self.owner_is_command = False  # the owner in `facts` is the command itself, as its supervisor has said

    def first(self) -> Claim | None:
        """Return the claim that was granted, else the oldest in line."""
        return self.holder or next(iter(self.line), None)

    def is_taken(self) -> bool:
        """Return whether a further start is refused; while the answer to an earlier one is sent, it waits in line."""
        if self.status in ENDED:
            return self.holder is not None
        return self.status == STARTED and (self.holder is None or self.holder.delivered)

    def supervisor(self) -> Claim | None:
        """Return the claim that was granted if it is a supervisor's."""
        return self.holder if self.holder and self.holder.supervisor else None

    def may_run(self) -> bool:
        """Return whether its command may still run."""
        return self.status == STARTED or self.holder is not None or self.lost

    def still_runs(self) -> str:
        """Return the start of a message: the command still runs, although the unit has ended."""
        owner = self.facts.owner
        return f'unit "{self.name}" still runs' + (f" (pid {owner.pid})" if owner else "")

    def lacks(self) -> Iterator[tuple[Unit, str | Lock]]:
        """Iterate over what keeps the unit from starting.

        Yields (dependency, requirement that it does not meet); (this unit, START), while the answer to an earlier start
        is being delivered; and, if no dependency is unmet, (unit that has a lock or gets it first, lock).
        """
        if self.unmet:
            yield from ((d, requirement) for d, requirement in self.wants.items() if d.status not in MEETS[requirement])
        if self.status == STARTED and self.line:
            yield self, START
        for lock in () if self.unmet or not self.line else self.locks:
            blocker = lock.blocker(self)
            if blocker:
                yield blocker, lock


class Lock:
    """A lock that one started unit can have at a time, or, without a name, the places for the `limit` jobs of a boot.

    A lock is kept for the first unit in its line even while that waits for another lock: else a unit that needs two
    might wait for ever. A place goes to the first unit in line that lacks nothing else.
    """

    def __init__(self, name: str, limit: int = 1) -> None:
        self.name, self.limit = name, limit
        self.label = f"lock {name}" if name else f"one of {limit} places to run"
        self.taken: dict[Unit, None] = {}  # units that have it
        self.line: dict[Unit, None] = {}  # units that wait for nothing but locks, in the order they became ready

    def blocker(self, unit: Unit) -> Unit | None:
        """Return the unit that keeps `unit` from having the lock: one that has it, or stands before it in line."""
        if len(self.taken) >= self.limit:
            return next(iter(self.taken))
        first = next(iter(self.line), unit) if self.name else unit
        return None if first is unit else first


class Claim:
    """A request to start a unit, or to wait: a plain one, a held one, or a supervisor's, which is held, too."""

    def __init__(
        self,
        unit: Unit,
        ticket: Any,  # any object of the caller's
        owner: Owner | None = None,
        held: bool = False,
        supervisor: bool = False,
        boot: bool = False,  # it is answered with each status of the unit, not once
        deadline: float = NEVER,  # when to give up in line
        locks: Sequence[str] = (),
        places: tuple[Lock, ...] = (),  # the places to run of its boot
    ) -> None:
        self.unit, self.ticket, self.owner, self.held = unit, ticket, owner, held or supervisor
        self.supervisor, self.boot, self.deadline = supervisor, boot, deadline
        self.locks, self.places = locks, places
        self.delivered = False  # the client has the answer

    def is_over(self) -> bool:
        """Return whether the claim has ended."""
        return self not in self.unit.line and self.unit.holder is not self


class Stop(Claim):
    """A request to stop units: it waits, in the line of a nameless unit, for their commands to end."""

    def __init__(self, ticket: Any, deadline: float, cannot: list[Running]) -> None:
        super().__init__(Unit(""), ticket)
        self.units: dict[Unit, None] = {}  # whose commands have not ended
        self.end_by = deadline + STOP_PATIENCE  # when to answer with those that are left
        self.result: dict[str, list[Any]] = {"stopped": [], "left": [], "cannot": cannot}


class StopOrder(Record):
    """The order to a supervisor to end the command of its unit, sent again if a further stop leaves less time."""

    supervisor: Claim
    deadline: float = NEVER
    send_by: float = NEVER  # when to send it even if units that depend on this one are still being stopped
    sent: float = NEVER  # the deadline that was sent


class Outcome(Record):
    """The status that a unit gets, and more about it."""

    status: str
    reason: str = ""
    exit_code: int | None = None
    event: str = ""  # the kind of the event, if that is not the status; the reason begins with it
    running: bool = False  # whether the command runs on
    env: dict[str, str] = {}  # variables for the units that depend on it


class Notice(Record):
    """A notification to a supervisor: `stop` the command of its unit, or: others have ended the `unit`."""

    method: str
    params: dict[str, Any]


class Units:
    """The dependency graph: `want`, `start`, `wait`, `boot`, `end`, `stop`, and questions about it.

    A method changes statuses by `_set`, which notes the units that this affects, and ends with `_settle_all`, which
    settles these. `alive` returns whether an owner still runs (None: unknown).
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wall: Callable[[], float],
        alive: Callable[[Owner], bool | None] = lambda owner: None,
        on_event: Callable[[Event], None] = lambda event: None,
        answer: Callable[[Claim, Any], None] = lambda claim, answer: None,
    ) -> None:
        self.clock, self.wall, self.alive, self.on_event, self.answer = clock, wall, alive, on_event, answer
        self.began = clock()
        self.units: dict[str, Unit] = {}
        self.edges = 0
        self.waits = 0  # claims in line, except those of boots
        self.events: dict[int, Event] = {}  # by number
        self.seq = 0  # number of the last event
        self.locks: dict[str, Lock] = {}  # locks that units have or wait for, by name
        self.has_environment = False  # whether any unit has left variables
        self.refusals: dict[str, str] = {}  # name -> why its last `want` or `start` was refused
        self.stopping: dict[Unit, StopOrder] = {}
        self.stops: list[Stop] = []  # that are not answered
        self._freed: list[tuple[Lock, Unit]] = []  # locks that have a place again, and the unit that gave it up
        self._affected: list[tuple[Unit, Unit]] = []  # units to settle, each with the dependency that has changed

    # -- what callers may do ------------------------------------------------------------------------------

    def want(self, name: str, dependencies: Iterable[str], requires: str = SUCCESS) -> Unit:
        """Register `name` and make it depend on all of `dependencies`, or on none and raise CycleError or Refused."""
        (unit,) = self._declare([(check_name(name), dict.fromkeys(dependencies, check_requirement(requires)), ())])
        self._settle_all(unit)
        return unit

    def start(self, member: Member, ticket: Any, timeout: float = 0.0, **options: Any) -> Claim:
        """Claim a unit, for at most `timeout` seconds in line (0: no limit). `options` are those of Claim.

        Raises AlreadyStarted and what `want` raises; the answer may be DependencyFailed or TimedOut.
        """
        unit = self.units.get(check_name(member[0]))
        if unit and unit.is_taken():
            raise self._already_started(unit, options.get("owner"))
        return self._claim([member], ticket, timeout, **options)[0]

    def wait(self, names: Iterable[str], ticket: Any, requires: str = SUCCESS, timeout: float = 0.0) -> Claim:
        """Wait until units meet `requires`, for at most `timeout` seconds (0: no limit)."""
        # Held, so that the nameless unit fails, and is forgotten, if the claim ends before its time.
        return self._claim([("", dict.fromkeys(names, requires), ())], ticket, timeout, held=True)[0]

    def boot(self, members: Sequence[Member], ticket: Any, owner: Owner | None, jobs: int, resume: bool) -> list[Claim]:
        """Claim all units of a plan in one step, and let them depend on what it says and on nothing else.

        At most `jobs` of them are started at once (0: no limit). A claim is answered whenever its unit starts or ends.
        With `resume`, completed units are left as they are. Raises Refused, and changes nothing: see `_check_free`.
        """
        if len({check_name(name) for name, _, _ in members}) < len(members):
            raise Refused("a boot names a unit twice")
        for unit in [self.units[name] for name, _, _ in members if name in self.units]:
            if not (resume and unit.status == COMPLETED):
                self._check_free(unit)
        return self._claim(members, ticket, 0.0, boot=True, jobs=jobs, resume=resume, owner=owner, supervisor=True)

    def delivered(self, claim: Claim) -> None:
        """Note that the client has the answer to its claim; answer the claims that stood behind it in line."""
        unit = claim.unit
        if unit.holder is claim and not claim.delivered:
            claim.delivered = True
            self._answer_line(unit, self._already_started(unit, *(other.owner for other in unit.line)))
            if not claim.held:
                self._end_claim(claim)

    def end_claims(self, claims: Iterable[Claim], why: str) -> None:
        """End claims before their time, all in one step. Nothing else ends them so.

        `why` is TIMED_OUT, or says what has become of the caller. The next claim in line goes on. If there is none, a
        unit that has not ended fails if the claim was held, else it is pending.
        """
        ended: dict[Unit, tuple[Claim, str]] = {}  # a held claim, if there is one, and the reason if the unit fails
        for claim in [claim for claim in claims if not claim.is_over()]:
            reason = self._give_up(claim, why) if claim in claim.unit.line else self._lose(claim)
            if claim.held or claim.unit not in ended:
                ended[claim.unit] = claim, reason
        for unit, (claim, reason) in ended.items():
            if unit.status in ENDED or unit.holder:
                continue
            if claim.held and not unit.line:
                self._set(unit, Outcome(FAILED, reason))
            elif unit.status == STARTED:
                facts = unit.facts
                self._set(unit, Outcome(PENDING, "the client that asked for its start was gone"))
                unit.facts.registered, unit.facts.waiting = facts.registered, facts.waiting
        self._settle_all(*ended)

    def end_late(self, claims: Iterable[Claim]) -> None:
        """End those claims in line whose deadline has passed."""
        now = self.clock()
        self.end_claims([c for c in claims if c in c.unit.line and c.deadline <= now], TIMED_OUT)

    def end(self, name: str, outcome: Outcome, by: Owner | None = None, claim: Claim | None = None) -> str:
        """End a unit, with the claim that holds it, unless that is a supervisor's whose command may still run.

        `by` and `claim` are the reporter and its claim, if any. Returns the status of the unit. Raises NotRegistered;
        Refused if the unit has another outcome, is being stopped or leaves too much, or if `by` may not report.
        """
        unit, status = self._registered(name), outcome.status
        before, reason, stopping = unit.status, unit.facts.reason, unit in self.stopping
        holder = claim if claim and claim.held and claim is unit.holder else None
        other = None if holder else unit.holder  # the claim of somebody else
        self._check_environment(unit, outcome.env)
        if not holder:
            self._check_report(unit, status, by)
        if before not in ENDED and not stopping:  # a unit that is being stopped fails for that reason
            if holder and outcome.running:
                self._record(unit, "ready", "")
            self._set(unit, outcome)
            self._answer_line(unit, Refused(f'unit "{name}" was {status} by another caller while its start waited'))
            if other and other.supervisor and not other.boot:  # a boot is notified of every status
                self.answer(other, Notice("unit", {"unit": name, "status": status}))
        if holder and not outcome.running:
            self.exit(holder, outcome.reason, outcome.exit_code or int(status == FAILED))
        elif holder and not stopping:
            self.run_on(holder)
        elif other and not other.supervisor:
            self._end_claim(other)
        self._settle_all()
        if before in ENDED and unit.status == before != status and not (holder and stopping):
            why = f" ({reason})" if reason else ""
            hint = "others may have acted on that; start it again first"
            raise Refused(f'unit "{name}" is {before}{why} and cannot become {status}: {hint}')
        return unit.status

    def exit(self, claim: Claim, reason: str, code: int, stopped: bool = False) -> None:
        """End the claim of a supervisor, since no process of the command is left.

        If it ran on, the unit fails: stopped, if the supervisor was told to end it, or died, if `code` is not 0.
        """
        unit, ran_on = claim.unit, claim.unit.facts.running_on
        stopped = unit in self.stopping or (stopped and ran_on)
        if unit.holder is not claim or (unit.status == STARTED and not stopped):
            return
        if stopped:
            self._stopped(unit)
        elif ran_on and code:
            ran = span(self._now() - (unit.facts.ended or 0.0))
            self._set(unit, Outcome(FAILED, f"died {ran} after it was ready: {reason}", code, "died"))
        elif ran_on:
            self._record(unit, "exited", reason)
        self._end_claim(claim, STOPPED if stopped else reason)
        self._settle_all()

    def run_on(self, claim: Claim) -> None:
        """Let a held claim last, or last again, since the command of its unit runs on after the unit has completed."""
        unit = claim.unit
        if unit.status == COMPLETED and unit.last is claim:
            claim.supervisor, unit.holder, unit.facts.running_on = True, claim, True

    def stop(self, names: Iterable[str], ticket: Any, grace: float) -> Stop:
        """Stop units (all if none is named) and all units that depend on them, within `grace` seconds.

        Units that wait fail at once. Supervisors of the others are told to end their commands: dependents first, and
        all of them when half of the time is over. The answer has the units that were `stopped`, in this order, those
        that are `left`, and those that `cannot` be stopped, since they have no supervisor. Raises NotRegistered.
        """
        self._check_waits(0 if ticket is None else 1)  # without a ticket it is the agent's own, at its end
        named = dict.fromkeys(self._selected(names))
        affected = [unit for unit in reached(named, lambda unit: unit.wanted_by) if unit.name]
        others = {unit: self._running(unit) for unit in affected if unit.may_run() and not unit.supervisor()}
        cannot = [row for unit, row in others.items() if unit.status == STARTED or (row.owner and row.owner.alive)]
        deadline = self.clock() + grace
        stop = Stop(ticket, deadline, cannot)
        self._join(stop)
        self.stops.append(stop)
        for unit in affected:
            supervisor = unit.supervisor()
            if supervisor:
                stop.units[unit] = None
                order = self.stopping.setdefault(unit, StopOrder(supervisor))
                order.deadline = min(order.deadline, deadline)
                order.send_by = min(order.send_by, deadline - grace / 2)
            elif not unit.holder and any(claim.held or unit in named for claim in unit.line):
                self._stopped(unit)
                stop.result["stopped"].append(unit.name)
        self._settle_all()
        return stop

    def keep_time(self) -> float:
        """Send the orders and answer the stops that are due; return when to call this again, on the clock."""
        now = self.clock()
        dependencies = reached([other for unit in self.stopping for other in unit.wants], lambda unit: unit.wants)
        for unit, order in self.stopping.items():
            if order.deadline < order.sent and (unit not in dependencies or order.send_by <= now):
                order.sent = order.deadline
                left = round(max(0.0, order.deadline - now), 3)
                self.answer(order.supervisor, Notice("stop", {"unit": unit.name, "grace": left}))
        for stop in self.stops:
            if not stop.is_over() and (not stop.units or stop.end_by <= now):
                stop.result["left"] += map(self._running, stop.units)
                self._leave(stop)
                self.answer(stop, stop.result)
        self.stops = [stop for stop in self.stops if not stop.is_over()]  # also without those whose client is gone
        times = [order.send_by for order in self.stopping.values() if order.deadline < order.sent]
        return min([*times, *(stop.end_by for stop in self.stops)], default=NEVER)

    def reset(self, names: Iterable[str] = ()) -> list[str]:
        """Make units that have ended (all if none is named) pending again, with those skipped because of them.

        Returns their names. Raises NotRegistered, or Refused while one of them is started or its command runs on.
        """
        selected = self._selected(names)
        for unit in selected:
            if unit.status == STARTED:
                owner = self._owner(unit)
                by = owner_text(owner, " by ", ", which is no longer running,")
                hint = gone_hint(unit.name, owner) or "; end it first"
                raise Refused(f'unit "{unit.name}" is started{by} and cannot be reset{hint}')
            if unit.holder:
                raise Refused(f"{unit.still_runs()} and cannot be reset; stop it first")
        ended = [unit for unit in selected if unit.status in ENDED]
        again = reached(ended, lambda unit: [other for other in unit.wanted_by if other.status == SKIPPED])
        for unit in again:
            self._set(unit, Outcome(PENDING))
        self._settle_all(*again)
        return [unit.name for unit in again]

    def own(self, claim: Claim, owner: Owner | None, log: str, ready: str) -> None:
        """Note the command that a supervisor runs, if known, the file with its output, and its probe, if it has one."""
        facts = claim.unit.facts
        claim.owner = facts.owner = owner or claim.owner
        claim.unit.owner_is_command |= owner is not None
        facts.log, facts.probe, facts.probe_error = log, ready, ""
        if claim.unit.status == STARTED:  # else others have ended it, and said why
            facts.reason = f"not ready yet: {ready}" if ready else ""

    def retry(self, claim: Claim, detail: str) -> None:
        """Note that one more try of a started unit begins."""
        facts = claim.unit.facts
        facts.tries = [*facts.tries[-999:], self._now()]
        self._record(claim.unit, "retry", detail)

    # -- questions ----------------------------------------------------------------------------------------

    def dependencies(self, unit: Unit, unmet_only: bool = False) -> list[Dependency]:
        """Return the dependencies of a unit as they were declared, or, with `unmet_only`, all that it lacks."""
        rows = []
        for other, need in unit.lacks() if unmet_only else unit.wants.items():
            age = round(self._now() - other.since, 3)
            if isinstance(need, Lock):
                has = f"{other.name} has it" if other in need.taken else f"{other.name} is before it in line"
                row = Dependency(need.label, "free", "taken", False, "lock", age, has)
            elif other is unit:
                row = Dependency(unit.name, "free", STARTED, False, "start", age)
            else:
                met, required = other.status in MEETS[need], REQUIRED_STATUS[need]
                row = Dependency(other.name, required, other.status, met, need, age, other.facts.reason)
            if not row.is_satisfied:
                row.owner = self._owner(other)
                row.waits_for = self._waits_for(other) if other.status == PENDING else []
            rows.append(row)
        return rows

    def status(self, name: str) -> UnitStatus:
        """Return a snapshot of a unit, also of an unknown one, with its dependencies and history."""
        unit = self.units.get(check_name(name)) or Unit(name, self._now())
        snapshot = self._snapshot(unit)
        snapshot.owner = self._owner(unit)
        snapshot.dependencies = self.dependencies(unit)
        snapshot.history = [event for event in self.events.values() if event.unit == name][-MAX_HISTORY:]
        return snapshot

    def graph(self) -> Graph:
        """Return all units in the order in which they became known, and names that were only refused."""
        refused = [Unit(name, self._now()) for name in self.refusals if name not in self.units]
        rows = {unit: self._snapshot(unit) for unit in [*self.units.values(), *refused]}
        for unit in [unit for unit in rows if unit.may_run()][:500]:  # to look at more processes would take too long
            rows[unit].owner = self._owner(unit)
        return Graph(self._now(), [*rows.values()])

    def snapshots(self, everything: bool = False) -> list[UnitStatus]:
        """Return snapshots of all units by name; `everything` includes names that are not registered."""
        shown = self.units if everything else {unit.name for unit in self._selected()}
        return sorted((row for row in self.graph().nodes if row.unit_name in shown), key=lambda row: row.unit_name)

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables left by all dependencies of a unit; the last in the graph wins. Raises NotRegistered."""
        unit = self._registered(name)
        merged: dict[str, str] = {}
        for other in in_order(unit.wants, lambda unit: unit.wants) if self.has_environment else ():
            merged.update(other.facts.environment)
        return merged

    def candidates(self, names: Iterable[str]) -> list[str]:
        """Return all registered names except these and those of units that depend on them, for suggestions."""
        asked = [self.units[name] for name in names if name in self.units]
        dependents = reached(asked, lambda unit: unit.wanted_by)
        return [unit.name for unit in self._selected() if unit not in dependents]

    # -- the rules ----------------------------------------------------------------------------------------

    def _settle(self, unit: Unit, because: Unit | None = None) -> None:
        """When may a unit start? Here.

        If all its requirements are met and all its locks have a place, the first claim in line is granted. If a
        requirement cannot be met any more, the unit is skipped and all claims are answered. Otherwise it goes on
        waiting. `because` is the dependency that just changed, if nothing else can have made a difference.
        """
        if unit.status != PENDING:  # claims in line wait until the answer to the one before is delivered
            return
        if unit.unmet or not unit.line:
            self._free(unit)
        if unit.unmet:
            unit.facts.ready = None
            causes = (because,) if because in unit.wants else unit.wants
            cause = next((d for d in causes if d.status in HOPELESS[unit.wants[d]]), None)
            if cause:
                self._skip(unit, cause)
        elif unit.line:
            self._grant(unit, because)

    def _skip(self, unit: Unit, cause: Unit) -> None:
        """Skip a unit because of a dependency that has failed or was skipped."""
        why = cause.facts.reason
        if cause.status == FAILED:
            reason = f'dependency "{cause.name}" failed' + (f" ({why})" if why else "")
        else:  # of a long chain the first failure matters most
            reason = f'dependency "{cause.name}" was skipped: '
            reason += why if len(reason + why) <= 2 * MAX_REASON else f"... {cause.root}"
        unit.root = cause.root or reason
        self._set(unit, Outcome(SKIPPED, reason))
        text = f'unit "{unit.name}" skipped: {reason}' if unit.name else reason
        self._answer_line(unit, DependencyFailed(text, {"unit": cause.name, "reason": why}))

    def _grant(self, unit: Unit, because: Unit | None) -> None:
        """Start a unit whose dependencies are met for the first claim in line, unless a lock has no place."""
        facts, claim = unit.facts, next(iter(unit.line))
        facts.ready = self._now() if facts.ready is None else facts.ready
        facts.released_by = because.name if because else facts.released_by
        if not unit.locks:
            facts.locks = [*claim.locks]
            unit.locks = (*(self.locks.setdefault(name, Lock(name)) for name in claim.locks), *claim.places)
        if any(unit.lacks()):
            for lock in unit.locks:
                lock.line.setdefault(unit)
            return
        self._leave(claim)
        facts.owner, unit.refused = claim.owner, []
        unit.holder = claim if unit.name else None
        unit.last = unit.holder if claim.held else None
        for lock in unit.locks:
            lock.line.pop(unit, None)
            lock.taken[unit] = None
        self._set(unit, Outcome(STARTED))
        if not claim.boot:
            wants = [d.name for d in unit.wants]
            answer = {"dependencies": wants, "env": self.environment(unit.name)} if unit.name else {}
            self.answer(claim, answer)

    def _settle_all(self, *units: Unit) -> None:
        """Settle these units, then the units that wait for freed locks, then the units that changes affect."""
        for unit in units:
            self._settle(unit)
        while self._freed or self._affected:  # no recursion, since chains may be long
            freed, self._freed = self._freed, []
            for lock, before in freed:
                for waiting in [*lock.line]:
                    if len(lock.taken) >= lock.limit:
                        break
                    self._settle(waiting, before)
            affected, self._affected = self._affected, []
            for unit, because in affected:
                self._settle(unit, because)
        if self.stops or self.stopping:
            self.keep_time()

    def _set(self, unit: Unit, outcome: Outcome) -> None:
        """Set the status of a unit; no other method does. Update `unmet` of its dependents."""
        old, status, event = unit.status, outcome.status, outcome.event
        unit.status, unit.since = status, self._now()
        if status != STARTED and not (status == FAILED and unit.holder):  # else its claim keeps the locks
            self._free(unit)
        if status == PENDING:
            unit.forget_run()
            unit.facts.registered = unit.since
        elif status == STARTED:
            unit.facts.started = unit.since
        elif unit.facts.ended is None:  # else it completed, and its command ran on
            unit.facts.ended = unit.since
        unit.facts.reason, unit.facts.exit_code = outcome.reason, outcome.exit_code
        if outcome.env:
            unit.facts.environment, self.has_environment = outcome.env, True
        for dependent, requirement in unit.wanted_by.items():
            was_met, met = old in MEETS[requirement], status in MEETS[requirement]
            dependent.unmet += was_met - met
            if was_met != met or status in HOPELESS[requirement]:
                self._affected.append((dependent, unit))
        if old != status:
            detail = outcome.reason[len(event) :].lstrip()
            self._record(unit, "registered" if old == NOT_REGISTERED else event or status, detail)
        claim = unit.first()
        if claim and claim.boot and status != PENDING:
            env = self.environment(unit.name) if status == STARTED else {}
            self.answer(claim, {"unit": unit.name, "status": status, "reason": outcome.reason, "env": env})
        if not unit.name and status != PENDING:  # a wait is over: forget the names that only it has mentioned
            waited_for = unit.wants
            self._link(unit, {})
            self._forget(waited_for)

    def _stopped(self, unit: Unit) -> None:
        """Fail a unit that was stopped, and refuse the claims in its line."""
        if unit.status != FAILED:
            self._set(unit, Outcome(FAILED, STOPPED, event=STOPPED))
        self._answer_line(unit, Refused(f'unit "{unit.name}" was not started: stopped'))

    def _end_claim(self, claim: Claim, how: str = "") -> None:
        """End a claim that was granted. `how` is how the command ended, if it ran on, or LOST if that is unknown."""
        unit = claim.unit
        unit.holder, unit.lost = None, how == LOST
        if unit.facts.running_on:
            unit.facts.running_on, unit.facts.exited, unit.facts.exit_reason = False, self._now(), how
        if unit.status != STARTED or claim.held:  # a unit that was started by a plain claim keeps its locks
            self._free(unit)
        if self.stopping.pop(unit, None):
            for stop in [stop for stop in self.stops if unit in stop.units]:
                del stop.units[unit]
                if unit.lost:
                    stop.result["left"].append(self._running(unit))
                else:
                    stop.result["stopped"].append(unit.name)

    def _give_up(self, claim: Claim, why: str) -> str:
        """End a claim in line; return the reason with which its unit fails if nobody else waits."""
        unit = claim.unit
        missing = ", ".join(self._waits_for(unit, mark=True))
        reason = one_line(f"lost: {self._process_text(claim.owner) or 'its start'} waited for {missing}, and {why}")
        answer: SyncError = Refused(f'unit "{unit.name}" was not started: {why}')
        if why == TIMED_OUT:
            reason = one_line(f"timed out waiting for {missing}")
            what = f"dependencies of unit {unit.name}" if unit.name else ", ".join(d.name for d in unit.wants)
            answer = TimedOut(f"timeout waiting for {what}", self.dependencies(unit, unmet_only=True))
        self._record(unit, "gave up", f"{why}; still missing: {missing}")
        if claim is unit.first():
            self._free(unit)
        self._leave(claim)
        if not claim.boot:
            self.answer(claim, answer)
        return reason

    def _lose(self, claim: Claim) -> str:
        """End a granted claim; return the reason for its unit to fail. If its command ran on, fail the unit at once."""
        unit, ran_on = claim.unit, claim.unit.facts.running_on
        by = f"the {'boot' if claim.boot else 'run'} that ran " if unit.owner_is_command else ""
        command = "that process" if unit.owner_is_command else "its command"
        end = f"ended; {command} may still run" if ran_on else "ended without completing"
        reason = one_line(f"lost: {by}{self._process_text(claim.owner) or 'the process that held it'} {end}")
        self._end_claim(claim, LOST)
        if ran_on:
            self._set(unit, Outcome(FAILED, reason))
        return reason

    def _free(self, unit: Unit) -> None:
        """Take a unit out of the lines of locks, and free those that it has."""
        for lock in unit.locks:
            lock.line.pop(unit, None)
            lock.taken.pop(unit, None)
            self._freed.append((lock, unit))
            if not lock.line and not lock.taken:
                self.locks.pop(lock.name, None)
        unit.locks = ()

    # -- declarations, and lines --------------------------------------------------------------------------

    def _declare(self, members: Sequence[Member], replace: bool = False) -> list[Unit]:
        """Register units and add their dependencies, all or none; `replace` drops the dependencies that they had.

        Raises CycleError or Refused, which is remembered for `why`.
        """
        count = len(self.units)
        try:
            units = [self._named(name) if name else Unit("", self._now()) for name, _, _ in members]
            edges = {unit: self._edges(unit, wants, replace) for unit, (_, wants, _) in zip(units, members)}
            if self.edges + sum(len(wants) - len(unit.wants) for unit, wants in edges.items()) > MAX_EDGES:
                raise Refused(f"the agent has reached its limit of {MAX_EDGES} dependencies")
            changed = [unit for unit, wants in edges.items() if wants != unit.wants]
            # A unit that nothing depends on is in no cycle.
            suspects = [unit for unit in changed if replace or unit.wanted_by or unit in edges[unit]]
            in_order(suspects, lambda unit: edges.get(unit, unit.wants))
        except SyncError as error:
            for new in [*self.units][count:]:
                del self.units[new]
            name = error.data[0] if isinstance(error, CycleError) else members[0][0]
            if name:
                self.refusals[name] = one_line(str(error))
                if len(self.refusals) > 1000:
                    del self.refusals[next(iter(self.refusals))]
            raise
        for unit in units:
            self.refusals.pop(unit.name, None)
            if unit.status == NOT_REGISTERED:
                self._set(unit, Outcome(PENDING))
        before = [other for unit in changed for other in unit.wants]
        for unit in changed:
            self._link(unit, edges[unit])
        self._forget(before)
        return units

    def _named(self, name: str) -> Unit:
        """Return the unit with this name; make it known if it is new."""
        if name not in self.units:
            check_name(name)
            if len(self.units) >= MAX_UNITS:
                raise Refused(f"the agent has reached its limit of {MAX_UNITS} units")
            self.units[name] = Unit(name, self._now())
        return self.units[name]

    def _edges(self, unit: Unit, wants: dict[str, str], replace: bool) -> dict[Unit, str]:
        """Return the edges that a unit is to have. Raises Refused."""
        edges = {} if replace else {**unit.wants}
        for name, requires in wants.items():
            there = edges.setdefault(self._named(name), check_requirement(requires))
            if there != requires:
                raise Refused(f'unit "{unit.name}" wants "{name}" with requirement {there} already, not {requires}')
        return edges

    def _link(self, unit: Unit, edges: dict[Unit, str]) -> None:
        """Replace the edges of a unit."""
        before, unit.wants = unit.wants, edges
        self.edges += len(edges) - len(before)
        unit.unmet = sum(other.status not in MEETS[requires] for other, requires in edges.items())
        for other, requires in edges.items():
            other.wanted_by[unit] = requires
            if before.get(other) != requires:
                self._record(unit, "wants", other.name if requires == SUCCESS else f"{other.name} ({requires})")
        for other in [other for other in before if other not in edges]:
            del other.wanted_by[unit]

    def _forget(self, units: Iterable[Unit]) -> None:
        """Forget units that are not registered and that no unit depends on any more."""
        for unit in units:
            if unit.status == NOT_REGISTERED and not unit.wanted_by:
                self.units.pop(unit.name, None)

    def _claim(
        self,
        members: Sequence[Member],
        ticket: Any,
        timeout: float,
        boot: bool = False,
        jobs: int = 0,
        resume: bool = False,
        **options: Any,
    ) -> list[Claim]:
        """Declare units, put a claim in the line of each, and settle them."""
        self._check_waits(0 if boot else len(members))
        locks = [tuple(dict.fromkeys(check_name(name, "lock") for name in names)) for _, _, names in members]
        if max(map(len, locks), default=0) > MAX_LOCKS:
            raise Refused(f"too many locks: a unit may have {MAX_LOCKS}")
        units = self._declare(members, replace=boot)
        options["deadline"] = self.clock() + timeout if timeout else NEVER
        options["places"] = (Lock("", jobs),) if jobs else ()
        claims = []
        for unit, names in zip(units, locks):
            if resume and unit.status == COMPLETED:
                continue
            if boot or unit.status in ENDED:  # it begins again, and units that depend on it wait again
                self._set(unit, Outcome(PENDING))
            if unit.first() is None:
                unit.facts.waiting, unit.facts.ready, unit.facts.released_by = self._now(), None, ""
                unit.facts.locks = [*names]
            claims.append(Claim(unit, ticket, boot=boot, locks=names, **options))
            self._join(claims[-1])
        self._settle_all(*units)
        for claim in claims:
            if claim in claim.unit.line:
                self._record(claim.unit, "waiting", ", ".join(self._waits_for(claim.unit)))
        return claims

    def _check_waits(self, more: int) -> None:
        """Raise Refused if there may not be `more` further claims in line."""
        if more and self.waits + more > MAX_WAITS:
            raise Refused(f"the agent has reached its limit of {MAX_WAITS} waiting requests")

    def _registered(self, name: str) -> Unit:
        unit = self.units.get(check_name(name))
        if unit is None or unit.status == NOT_REGISTERED:
            error = NotRegistered(f'unit "{name}" is not registered; call want, start or run on it first')
            error.unit = name
            raise error
        return unit

    def _selected(self, names: Iterable[str] = ()) -> list[Unit]:
        """Return units by name, or all registered units. Raises NotRegistered."""
        units = dict.fromkeys(self._registered(name) for name in names)
        return [*units] or [unit for unit in self.units.values() if unit.status != NOT_REGISTERED]

    def _waits_for(self, unit: Unit, mark: bool = False) -> list[str]:
        """Return in words what a unit lacks, five items at most; `mark` names that are not registered."""
        words = []
        for _, (other, need) in zip(range(5), unit.lacks()):
            if isinstance(need, Lock):
                words.append(f"{need.label}, which {other.name} {'has' if other in need.taken else 'is to have first'}")
            else:
                words.append(other.name + (" (not registered)" if mark and other.status == NOT_REGISTERED else ""))
        return words

    def _join(self, claim: Claim) -> None:
        """Put a claim at the end of the line of its unit."""
        claim.unit.line[claim] = None
        self.waits += not claim.boot

    def _leave(self, claim: Claim) -> None:
        """Take a claim out of the line of its unit."""
        del claim.unit.line[claim]
        self.waits -= not claim.boot

    def _answer_line(self, unit: Unit, error: SyncError) -> None:
        """End all claims in line with an error; a boot is notified of the status of the unit instead."""
        for claim in [*unit.line]:
            self._leave(claim)
            if not claim.boot:
                self.answer(claim, error)

    # -- owners -------------------------------------------------------------------------------------------

    def _check_free(self, unit: Unit) -> None:
        """Raise Refused if no boot may claim a unit: a living process has started or claimed it, or may run it."""
        started, claim, by = unit.status == STARTED, unit.first(), unit.facts.owner
        if unit.holder and not started:
            earlier = " from an earlier boot" if unit.holder.boot else ""
            raise Refused(f"{unit.still_runs()}{earlier}: stop it, or boot with --resume")
        if claim or (started and (by is None or self.alive(by) is not False)):
            how = ("started" if started else "claimed") + owner_text(claim.owner if claim else by, " by ")
            raise Refused(f'unit "{unit.name}" is {how}; nothing was run: end that first')
        if by and unit.lost and unit.owner_is_command and self.alive(by):
            raise Refused(f"{unit.still_runs()}, and its supervisor is gone: end that process first")

    def _already_started(self, unit: Unit, *by: Owner | None) -> AlreadyStarted:
        """Return the error for starts of a started unit; remember the last hundred processes that asked for one."""
        unit.refused = [*unit.refused, *filter(None, by)][-100:]
        owner, holder = self._owner(unit), unit.holder
        own = [other for other in by if other and owner and (other.pid, other.born) == (owner.pid, owner.born)]
        if own and holder and holder.supervisor:
            hint = "run; its command need not call start"
            if holder.boot:
                hint = "boot; its script need not call start; what it waits for is a header: # coder-sync: want NAME"
            return AlreadyStarted(f'unit "{unit.name}" was started by {hint}')
        if unit.status in ENDED:
            return AlreadyStarted(f"{unit.still_runs()}: stop it first")
        whose = owner_text(owner, " by ") + gone_hint(unit.name, owner)
        return AlreadyStarted(f'unit "{unit.name}" is already started{whose}')

    def _check_report(self, unit: Unit, status: str, by: Owner | None) -> None:
        """Raise Refused if a report does not count: from a second copy of a script, or during a stop."""
        owner, supervisor = unit.facts.owner, unit.supervisor()
        refused = [(other.pid, other.born) for other in unit.refused]
        own = by and owner and by.pid == owner.pid
        if by and (by.pid, by.born) in refused and not (own and (not supervisor or supervisor.boot)):
            whose = " by run" if own else owner_text(owner, " by ")
            why = f"its start was refused, because the unit was started{whose}"
            text = f"a report of {self._process_text(by)} does not count: {why}"
            hint = "if it is to be ended all the same, call from another shell"
            raise Refused(f'unit "{unit.name}": {text}; {hint}')
        if unit in self.stopping and unit.status == STARTED and status == COMPLETED:
            raise Refused(f'unit "{unit.name}" is being stopped and cannot become {status}')

    def _check_environment(self, unit: Unit, env: dict[str, str]) -> None:
        """Raise Refused if the variables of all units would be too large with those that a unit leaves."""
        left = [env, *(other.facts.environment for other in self.units.values() if other is not unit)] if env else []
        if sum(len(name) + len(value) for variables in left for name, value in variables.items()) > MAX_ENVIRONMENT:
            text = f"all units may leave an environment of {MAX_ENVIRONMENT} characters at most"
            raise Refused(f'unit "{unit.name}": {text}')

    @staticmethod
    def _process_text(owner: Owner | None) -> str:
        """Return a process for the beginning of a sentence, with its command in parentheses; nothing for None."""
        return f"process {owner.pid}" + (f" ({owner.command})" if owner.command else "") if owner else ""

    def _owner(self, unit: Unit) -> Owner | None:
        owner = unit.facts.owner
        if owner is None or not unit.may_run():
            return owner
        alive = self.alive(owner)
        if alive is False and unit.status == STARTED and unit.supervisor():  # it tries again, or reports the end
            alive = None
        return Owner(owner.pid, owner.command, alive, owner.born)

    def _running(self, unit: Unit) -> Running:
        return Running(unit.name, self._owner(unit))

    # -- snapshots and events -----------------------------------------------------------------------------

    def _now(self) -> float:
        """Return the seconds since the agent began."""
        return round(self.clock() - self.began, 6)

    def _snapshot(self, unit: Unit) -> UnitStatus:
        row = UnitStatus(unit.name, unit.status, unit.unmet == 0, **vars(unit.facts), stopping=unit in self.stopping)
        row.age = round(self._now() - unit.since, 3)
        if unit.status == PENDING:
            row.is_waiting, row.waits_for = bool(unit.line), self._waits_for(unit)
        row.wants = {d.name: requirement for d, requirement in unit.wants.items()}
        row.blocked_by = {need.name: other.name for other, need in unit.lacks() if isinstance(need, Lock) and need.name}
        row.refusal = self.refusals.get(unit.name, "")
        return row

    def _record(self, unit: Unit, kind: str, detail: str) -> None:
        """Add an event to the history, and call back with it."""
        if unit.name:
            self.seq += 1
            event = self.events[self.seq] = Event(self.seq, self.clock(), self.wall(), unit.name, kind, detail)
            self.events.pop(self.seq - MAX_EVENTS, None)
            self.on_event(event)


# ----------------------------------------------------------------------------------------------------------
# Agent. Units behind one lock, and a thread for each connection.
#
# - Units is used only under `Agent.lock`; nothing is written to a socket or a log while the lock is held.
# - Only the thread of a connection reads from its socket and writes to it, and blocks for SEND_TIMEOUT at most. Any
#   other thread puts messages into the outbox of the connection and wakes its thread, both under the lock.
# - A thread that waits polls its socket and its wake-up descriptor, until something is due for one of its claims. So
#   the end of a client is noticed at once, and all its claims end in one step.
# - A claim is answered once. The answer counts as delivered when it was sent; if the request has `confirm`, when the
#   client confirms it, or CONFIRM_TIMEOUT after it was sent.
# - A follower of events reads them from the history; it has no queue of its own.
# ----------------------------------------------------------------------------------------------------------

import io  # noqa: E402  (os has loaded both)
import stat  # noqa: E402

MAX_CONNECTIONS = 4096
MAX_QUEUE = 200_000  # lines of the log that are not written yet
MAX_LOG = 16 << 20  # bytes of a --log-file, after which it becomes FILE.1
REPLACE_TIMEOUT = GRACE + 4.0  # seconds that an agent has to stop its services and end
MANY_CLAIMS = 10_000  # of one connection, which then forgets those that are over
MAX_BOOT = 64 << 20  # bytes of all requests of a boot
ANSWER_TIMEOUT = 3.0  # seconds after which an agent that is to be replaced counts as stopped
SEND_TIMEOUT = 10  # seconds for which a peer may read nothing that is sent to it
LOOK_AGAIN = 5.0  # seconds between two checks that the agent's socket still exists
IDLE_TIMEOUT = 60  # seconds for a connection that asks for nothing and waits for nothing
CONFIRM_TIMEOUT = 5  # seconds
PAUSE = 0.02  # seconds for which a follower's thread gathers events, so that it does not delay others
STACK = 256 * 1024  # bytes, of a thread
ELSEWHERE = "elsewhere"  # `born` of a process in another process namespace, whose pid means nothing here
NO_ENVIRONMENT: dict[str, str] = {}

KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # annotation -> name, test of a value
    "str": ("a string", lambda v: type(v) is str),
    "int": ("a whole number", lambda v: type(v) is int and abs(v) < 2**31),
    "float": ("a number of seconds", lambda v: type(v) in (int, float) and 0 <= v < 1e9),
    "bool": ("true or false", lambda v: type(v) is bool),
    "Id": ("a string or a whole number", lambda v: type(v) in (str, int)),
    "Object": ("an object", lambda v: type(v) is dict),
    "Sequence[str]": ("a list of strings", lambda v: type(v) is list and all(type(i) is str for i in v)),
    "Sequence[Object]": ("a list of objects", lambda v: type(v) is list and all(type(i) is dict for i in v)),
}


def parameters(method: Any) -> dict[str, tuple[str, bool]]:
    """Return the parameters of a method `Agent.do_...`: name -> (kind, whether it is required)."""
    code = method.__code__
    names = code.co_varnames[2 : code.co_argcount]
    optional = names[len(names) - len(method.__defaults__ or ()) :]
    return {name: (method.__annotations__[name], name not in optional) for name in names}


def check_params(method: Any, params: Any) -> dict[str, Any]:
    """Return the parameters of a request, an object or a list, by name. Raises InvalidParams."""
    known = parameters(method)
    names = f"there are {', '.join(known) or 'none'}"
    given = dict(zip(known, params)) if isinstance(params, list) else params
    if not isinstance(given, dict) or len(given) < len(params):
        raise InvalidParams(f'"params" must be an object, or a list of no more than there are; {names}')
    for name in given:
        if name not in known:
            raise InvalidParams(f"no such parameter: {one_line(name)[:60]}; {names}")
    for name, (kind, required) in known.items():
        what, fits = KINDS[kind]
        if name not in given and required:
            raise InvalidParams(f'parameter "{name}" is missing')
        if name in given and not fits(given[name]):
            raise InvalidParams(f'parameter "{name}" must be {what}')
    return given


def check_environment(env: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables in a request. Raises Refused if one of them cannot be one."""
    for name, value in env.items():
        if not is_variable(name):
            raise Refused(f"{ascii(name)[:60]} is no name for an environment variable: use letters, digits and _")
        if type(value) is not str or "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise Refused(f"the environment variable {name} must have a text for a value")
    return env


class Log:
    """The agent's log. A thread writes it, so that no caller waits; lost lines are counted in the next one."""

    def __init__(self, level: int = 1, path: str = "") -> None:
        """Open the file, if there is one. Raises OSError, or RuntimeError if no thread can be started."""
        self.level, self.path, self.lost = level, path, 0
        self._trouble, self._silent_until = "", 0.0
        self._listener: Any = self._start() if level > 0 or path else None  # else there may never be a line

    def say(self, text: str, level: int = 1) -> None:
        """Queue a line: of level 0 for trouble, once a minute; 1, unless --quiet; 2, with --verbose."""
        if level > self.level or (level == 0 and text == self._trouble and time.monotonic() < self._silent_until):
            return
        if level == 0:
            self._trouble, self._silent_until = text, time.monotonic() + 60
        try:
            from logging import makeLogRecord

            self._listener = self._listener or self._start()
            if self._listener.queue.qsize() >= MAX_QUEUE:
                raise BlockingIOError
        except (ImportError, OSError, RuntimeError):  # no descriptor or thread is left, or nobody reads the log
            self.lost += 1
            return
        lost, self.lost = self.lost, 0
        line = (f"({lost} lines lost here) " if lost else "") + text
        self._listener.queue.put(makeLogRecord({"msg": line[:3900], "lost": lost}))  # a pipe takes 4096 bytes at once

    def close(self, timeout: float = 0.5) -> None:
        """Write the queued lines, for at most `timeout` seconds, and no more from now on."""
        self.level = -1
        if self._listener:
            self._listener.enqueue_sentinel()
            self._listener._thread.join(timeout)

    def _start(self) -> Any:
        import logging.handlers
        from queue import SimpleQueue

        log = self

        class Handler(logging.handlers.RotatingFileHandler):
            def _open(self) -> Any:
                fd = 2
                if log.path:  # a pipe that has no reader is an error
                    fd = os.open(log.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
                    os.set_blocking(fd, True)
                return io.TextIOWrapper(io.FileIO(fd, "w", closefd=fd != 2), errors="backslashreplace")

            def doRollover(self) -> None:
                try:
                    super().doRollover()
                except OSError:  # the old file cannot be renamed, and is used on
                    pass

            def handleError(self, record: Any) -> None:
                log.lost += 1 + record.lost

        handler = Handler(os.path.realpath(self.path), backupCount=1)
        handler.maxBytes = MAX_LOG if os.path.isfile(self.path) else 0  # a pipe or a device is not rotated
        handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%Y-%m-%d %H:%M:%S"))
        writer = logging.handlers.QueueListener(SimpleQueue(), handler)
        writer.start()
        return writer


class Request:
    """A request, and the ticket of the claims that it makes. Without an id it gets no answer, but notifications."""

    id: Any = None
    confirm = False  # the client confirms that it has the answer
    answered = False
    report_at = NEVER  # when to send the next notification `waiting`
    confirm_by = NEVER  # when the answer, which was sent, counts as delivered

    def __init__(self, connection: Connection, size: int) -> None:
        self.connection, self.size, self.since = connection, size, time.monotonic()


class WakeUp:
    """A descriptor by which other threads wake a thread that polls. Raises OSError if none is left.

    The thread sets `awake` to False, then looks for work, then sleeps: so it misses no work.
    """

    awake = False

    def __init__(self) -> None:
        ends = (os.eventfd(0),) if hasattr(os, "eventfd") else os.pipe()
        self._ends = [io.FileIO(fd, "r+") for fd in ends]  # closed by their destructor if no thread starts

    def close(self) -> None:
        """Close the descriptors; from now on `wake` does nothing."""
        self.awake = True
        for end in self._ends:
            end.close()

    def wake(self) -> None:
        """Wake the thread, or keep it from going to sleep. Called under the agent's lock."""
        if not self.awake:
            self.awake = True
            self._ends[-1].write((1).to_bytes(8, sys.byteorder))  # for eventfd(2) a number; a pipe takes anything

    def sleep(self, fds: Iterable[int], seconds: float) -> set[int]:
        """Wait for `wake`, for descriptors, or for at most `seconds`; return the descriptors that can be read."""
        from select import POLLIN, poll

        poller, end = poll(), self._ends[0]
        for fd in (end.fileno(), *fds):
            poller.register(fd, POLLIN)
        ready = {fd for fd, _ in poller.poll(max(0, seconds) * 1000 + 1 if seconds < NEVER else None)}
        self.awake = True
        if end.fileno() in ready:
            end.read(4096)
        return ready - {end.fileno()}


class Connection:
    """The connection to one client. Other threads than its own only call `post`."""

    def __init__(self, sock: Any, wake_up: WakeUp) -> None:
        from collections import deque

        self.sock, self.wake_up = sock, wake_up
        self.outbox: deque[tuple[Claim | None, Any]] = deque()  # (claim, answer or Waiting), or (None, message)
        self.open: dict[Any, Claim] = {}  # id of a request -> its claim, until the answer is delivered
        self.claims: dict[Claim, None] = {}  # claims that end with the connection; some may have ended already
        self.members: list[Any] = []  # the first units of a boot, until the request with the last ones
        self.members_size = 0  # bytes
        self.following = -1  # the number of the last event that was sent, if the client follows them
        self.active_at = time.monotonic()  # when the client was last heard or answered
        self.gone = False  # nothing can be sent any more

    def idle_at(self) -> float:
        """Return when the connection will have been idle for too long, on the monotonic clock."""
        return NEVER if self.claims or self.following >= 0 else self.active_at + IDLE_TIMEOUT

    def due(self) -> float:
        """Return when the thread has something to do next, without being woken."""
        times = [self.idle_at()]
        for claim in self.open.values():
            times += claim.deadline, claim.ticket.report_at, claim.ticket.confirm_by
        return min(times)

    def send(self, data: bytes) -> None:
        """Send data. A peer that has gone or does not read gets nothing more, but its requests are done."""
        left = memoryview(data)
        try:
            while left:
                left = left[self.sock.send(left) :]
        except OSError as error:
            self.gone = True
            if not of_peer(error):
                raise
            try:
                self.sock.shutdown(2)  # both ways, so that no more is received
            except OSError:
                pass

    def post(self, content: Any, claim: Claim | None = None) -> None:
        """Put a message, or what a claim is answered, into the outbox. Called under the agent's lock."""
        if not self.gone:
            self.outbox.append((claim, content))
            self.wake_up.wake()

    def caller(self, hold: bool, parent: int = 0) -> Owner | None:
        """Return the peer, if it is to hold a unit, else the script that called it; without /proc that is `parent`."""
        pid = peer_credentials(self.sock)[0]
        if pid and not hold:
            pid = int(proc_line(pid, "PPid:") or 0) if has_proc() else parent
        return process(pid)


def of_peer(error: BaseException | None) -> bool:
    """Return whether a socket's peer caused an error, because it has gone or does not read."""
    late = isinstance(error, OSError) and error.errno is None  # Python 3.8: socket.timeout
    return late or isinstance(error, (ConnectionError, TimeoutError, BlockingIOError))


def process(pid: int, command: str = "") -> Owner | None:
    """Return a process as the owner of a unit, or None for pid 0."""
    return Owner(pid, command or command_of(pid), None, birth(pid)) if pid > 0 else None


class Agent:
    """The state of the daemon. Method M of the protocol is `do_M` here."""

    def __init__(self, log: Log) -> None:
        from threading import Lock, Thread

        self.lock = Lock()
        self.log = log
        self.units = Units(time.monotonic, time.time, self._alive, self._event, self._answer)
        self.connections: set[Connection] = set()
        self.followers: set[Connection] = set()
        self.leaving = False  # the agent is about to end, and takes no more claims
        self.owners: dict[Claim, io.FileIO | None] = {}  # claim of a `start --pid` -> pidfd of the process, if any
        self._owners_wake = WakeUp()
        Thread(target=self.for_ever, args=("watching processes", self._await_owners), daemon=True).start()

    def for_ever(self, doing: str, step: Callable[[], None]) -> None:
        """Call `step` for ever, whatever goes wrong: the body of a thread. `doing` is for the log."""
        while True:
            try:
                step()
            except Exception as error:
                self.log.say(f"trouble while {doing}: {one_line(repr(error))}; trying again", 0)
                time.sleep(0.2)

    # -- a connection's thread ----------------------------------------------------------------------------

    def disconnect(self, connection: Connection) -> None:
        """Close a connection and end its claims."""
        with self.lock:
            connection.gone = True
            self.followers.discard(connection)
            if connection in self.connections:  # else the agent itself is about to end
                self.connections.remove(connection)
                self.units.end_claims(list(connection.claims), "its caller went away")
            for claim in connection.claims:
                claim.ticket = None  # a unit keeps its last claim, which is not to keep the connection
            connection.open.clear()
            connection.claims.clear()
            connection.wake_up.close()
        connection.sock.close()

    def converse(self, connection: Connection) -> None:
        """Read requests and write answers until the peer closes the connection, or sends a line that is not JSON."""
        sock, buffer = connection.sock, b""
        sock.settimeout(SEND_TIMEOUT)
        while True:
            connection.wake_up.awake = False
            self._do_due(connection)
            self._flush(connection)
            if not connection.wake_up.sleep([sock.fileno()], connection.due() - time.monotonic()):
                if connection.following >= 0:
                    time.sleep(PAUSE)
                continue
            chunk = sock.recv(65536)
            connection.active_at = time.monotonic()
            *lines, buffer = (buffer + chunk).split(b"\n")
            if not chunk or len(buffer) > MAX_LINE:  # a last line without a newline, or one that is too long
                lines, buffer = [*lines, buffer], b""
            for line in lines:  # even if the answers cannot be sent any more
                if line.strip() and not self._line(connection, line):
                    return
            if not chunk:
                return

    def _do_due(self, connection: Connection) -> None:
        """End late claims, report what others lack, count answers as delivered. Raises TimeoutError if idle."""
        now = time.monotonic()
        if connection.due() > now:
            return
        with self.lock:
            claims = [*connection.open.values()]
            self.units.end_late(claims)
            for claim in claims:
                if claim.ticket.report_at <= now:
                    self._report_waiting(claim)
                if claim.ticket.confirm_by <= now:
                    self._delivered(claim)
        if connection.idle_at() <= now:
            error = InvalidRequest(f"no request for {IDLE_TIMEOUT} seconds; connect again when there is one")
            connection.send(encode(error_message(None, error)))
            raise TimeoutError

    def _line(self, connection: Connection, line: bytes) -> bool:
        """Do the request on a line and answer it; return False if the connection is to be closed."""
        request, trusted = Request(connection, len(line)), True
        try:
            result = self._call(request, line)
            if isinstance(result, UnitStatus):
                self._suggest(result.dependencies, result.unit_name)
                if result.status == NOT_REGISTERED:
                    result.did_you_mean = self._resembling(result.unit_name)
            if result is not None and request.id is not None:  # else it is answered later, or not at all
                connection.post({"id": request.id, "result": plain(result)})
        except SyncError as problem:
            error = problem
            if isinstance(error, NotRegistered):
                error = NotRegistered(f"{error}{did_you_mean(self._resembling(error.unit))}")
            self.log.say(f"refused: {one_line(str(error))}")
            connection.post(error_message(request.id, error))
            trusted = not isinstance(error, ParseError)
        self._flush(connection)
        return trusted

    def _call(self, request: Request, line: bytes) -> Any:
        """Return the result of a request; None if it is answered later."""
        if len(line) > MAX_LINE:
            raise ParseError(f"a request is one line of at most {MAX_LINE} bytes; use several calls")
        message = decode(line)
        if isinstance(message, dict) and type(message.get("id")) in (str, int):
            request.id = message["id"]
        name = message.get("method") if isinstance(message, dict) and message.get("jsonrpc") == "2.0" else None
        if not isinstance(name, str) or ("id" in message and request.id is None):
            form = '"jsonrpc", which is "2.0", "method", a string, "params", and "id", a string or a whole number'
            raise InvalidRequest(f"a request is one JSON object that has {form}; batches are not supported")
        method = METHODS.get(name)
        if method is None:
            raise MethodNotFound(f"no such method: {one_line(name)[:60]}; there are {', '.join(METHODS)}")
        if request.id in request.connection.open:
            taken = "is in use by a request that still waits for its answer, or is to be confirmed"
            raise InvalidRequest(f"id {one_line(ascii(request.id))[:60]} {taken}")
        params = check_params(method, message.get("params", {}))
        if request.connection.gone and name in QUESTIONS:
            return None
        if self.log.level > 1:
            shown = {name: value for name, value in params.items() if name != "env"}
            self.log.say(f"request: {name} {one_line(ascii(shown))[:200]}", 2)
        with self.lock:
            return method(self, request, **params)

    def _flush(self, connection: Connection) -> None:
        """Send the outbox, and then the new events to a follower."""
        while not connection.gone:
            batch = [connection.outbox[i] for i in range(min(len(connection.outbox), 200))]
            messages = [self._message(claim, content) for claim, content in batch] or self._new_events(connection)
            if not messages:
                return
            connection.send(b"".join(map(encode, messages)))
            for claim, content in batch:  # `stop` waits until the outbox is empty, that is until all was sent
                connection.outbox.popleft()
                if claim and not connection.gone and not isinstance(content, Waiting):
                    with self.lock:
                        if claim.ticket.confirm and isinstance(content, dict):
                            claim.ticket.confirm_by = time.monotonic() + CONFIRM_TIMEOUT
                        else:
                            self._delivered(claim)

    def _new_events(self, connection: Connection) -> list[dict[str, Any]]:
        """Return the next notifications for a follower of events. Raises TimeoutError if they are forgotten."""
        if connection.following < 0:
            return []
        with self.lock:
            events = [self.units.events.get(n) for n in range(connection.following + 1, self.units.seq + 1)[:1000]]
        connection.following += len(events)
        if not all(events):
            raise TimeoutError
        return [{"method": "event", "params": plain(event)} for event in events]

    def _message(self, claim: Claim | None, content: Any) -> Any:
        """Return the message for an entry of the outbox. Without a claim it is one already."""
        if claim is None:
            return content
        if isinstance(content, Waiting):
            self._suggest(content.missing, claim.unit.name)
            return {"method": "waiting", "params": {"id": claim.ticket.id, **plain(content)}}
        if isinstance(content, TimedOut):
            self._suggest(content.data, claim.unit.name)
        if isinstance(content, SyncError):
            return error_message(claim.ticket.id, content)
        if claim.boot:
            return {"method": "unit", "params": content}
        return {"id": claim.ticket.id, "result": plain(content)}

    def _suggest(self, rows: list[Dependency], asker: str) -> None:
        """Add to unregistered dependencies a registered name that resembles theirs."""
        for row in [row for row in rows if row.current_status == NOT_REGISTERED][:20]:
            row.did_you_mean = self._resembling(row.depends_on, asker)

    def _resembling(self, name: str, asker: str = "") -> str:
        """Return a registered name that resembles another; none of a unit that depends on it. Takes long."""
        with self.lock:
            names = self.units.candidates([name, asker])
        return resembling(name, names)

    # -- under the lock -----------------------------------------------------------------------------------

    def _answer(self, claim: Claim, answer: Any) -> None:
        """Post a notification, or the answer to a claim: one, unless it is a boot's."""
        request = claim.ticket
        if request is None:  # the connection is closed, or this is the agent's own stop
            return
        if isinstance(answer, Notice):
            request.connection.post(plain(answer))
        elif not request.answered:
            request.answered, request.report_at, claim.deadline = not claim.boot, NEVER, NEVER
            request.connection.post(answer, claim)

    def _event(self, event: Event) -> None:
        detail = f": {event.detail}" if event.detail else ""
        level = 2 if event.kind in ("registered", "wants", "waiting", PENDING) else 1
        self.log.say(f"{event.unit}: {event.kind}{detail}", level)
        for follower in self.followers:
            follower.wake_up.wake()

    def _report_waiting(self, claim: Claim) -> None:
        request = claim.ticket
        request.report_at += REPORT_EVERY
        missing = self.units.dependencies(claim.unit, unmet_only=True)
        request.connection.post(Waiting(missing, round(time.monotonic() - request.since, 3)), claim)

    def _delivered(self, claim: Claim) -> None:
        connection = claim.ticket.connection
        connection.active_at = time.monotonic()
        if not claim.boot:  # the request of a boot was answered before, so that its id may be in use again
            connection.open.pop(claim.ticket.id, None)
        self.units.delivered(claim)
        # A connection that holds a unit is not idle, even after others have ended that; a `start --pid` holds none.
        if not claim.held or not claim.unit.name or claim in self.owners:
            connection.claims.pop(claim, None)

    # -- methods of the protocol, under the lock; each returns its result, or None if the answer comes later ------

    def do_ping(self, request: Request) -> Any:
        return {"version": __version__, "pid": os.getpid(), "uptime": round(time.monotonic() - self.units.began, 3)}

    def do_want(self, request: Request, unit: str, dependencies: Sequence[str] = (), requires: str = SUCCESS) -> Any:
        node = self.units.want(unit, dependencies, requires)
        return {"unit": unit, "dependencies": [d.name for d in node.wants], "status": node.status}

    def do_start(
        self,
        request: Request,
        unit: str,
        dependencies: Sequence[str] = (),
        requires: str = SUCCESS,
        hold: bool = False,
        pid: int = 0,
        timeout: float = 0.0,
        progress: bool = False,
        locks: Sequence[str] = (),
        confirm: bool = False,
        supervisor: bool = False,
        caller: int = 0,
    ) -> None:
        """Claim a unit. With `hold` the unit fails if the connection closes before the unit has ended.

        A `supervisor` holds it until its command has ended, too, which `exited` reports. It gets the notification
        `stop` when it is to end the command, and `unit` when others have ended the unit.
        """
        request.confirm = confirm
        connection, held, supervisor = request.connection, hold or pid != 0, supervisor and pid == 0
        owner = self._owner(connection, pid) if pid else connection.caller(hold or supervisor, caller)
        member = (unit, dict.fromkeys(dependencies, check_requirement(requires)), locks)
        by: dict[str, Any] = {"owner": owner, "held": held, "supervisor": supervisor}
        claim = self._expect(request, lambda: self.units.start(member, request, timeout, **by), progress)
        if pid and owner:
            self._watch(claim, owner)

    def do_confirm(self, request: Request, id: Id) -> Any:
        claim = request.connection.open.get(id)
        confirmed = claim is not None and claim.ticket.answered
        if claim and confirmed:
            self._delivered(claim)
        return {"confirmed": confirmed}

    def do_wait(
        self,
        request: Request,
        units: Sequence[str] = (),
        requires: str = SUCCESS,
        timeout: float = 0.0,
        progress: bool = False,
    ) -> None:
        if not units:
            raise InvalidParams('wait: "units" must name at least one unit')
        self._expect(request, lambda: self.units.wait(units, request, requires, timeout), progress)

    def _expect(self, request: Request, ask: Callable[[], Claim], progress: bool = False) -> Claim:
        """Return the claim that `ask` makes, and keep it until it is answered. `progress` is for `waiting`."""
        if request.id is None:
            raise InvalidRequest('start, wait and stop need an "id"')
        self._may_begin()
        if progress:
            request.report_at = request.since  # that is at once
        claim = request.connection.open[request.id] = ask()
        self._keep(request.connection, [claim])
        return claim

    def _may_begin(self) -> None:
        if self.leaving:
            raise Unreachable("the agent is shutting down")

    def _keep(self, connection: Connection, claims: Iterable[Claim]) -> None:
        """Let claims end with a connection."""
        connection.claims.update(dict.fromkeys(claims))
        if len(connection.claims) > MANY_CLAIMS:
            connection.claims = {c: None for c in connection.claims if not c.is_over()}

    def do_boot(
        self, request: Request, units: Sequence[Object] = (), jobs: int = 0, more: bool = False, resume: bool = False
    ) -> Any:
        """Claim all units as their supervisor. `more`: the boot goes on in a further request. See Units.boot."""
        self._may_begin()
        connection = request.connection
        members, connection.members = connection.members, []  # forgotten after an error
        connection.members_size = request.size + (connection.members_size if members else 0)
        if connection.members_size > MAX_BOOT:
            raise Refused(f"a boot of more than {MAX_BOOT >> 20} MiB is too large")
        for row in units:
            name, wants, locks = row.get("unit"), row.get("wants", {}), row.get("locks", [])
            good = isinstance(wants, dict) and isinstance(locks, list) and not row.keys() - {"unit", "wants", "locks"}
            if not good or not all(isinstance(requires, str) for requires in wants.values()):
                raise InvalidParams('a unit of a boot is {"unit": NAME, "wants": {NAME: REQUIREMENT}, "locks": [NAME]}')
            members.append((name, wants, locks))
        if more:
            connection.members = members
            return {"units": len(members)}
        claims = self.units.boot(members, request, connection.caller(hold=True), max(0, jobs), resume)
        self._keep(connection, claims)
        claimed = {claim.unit.name for claim in claims}
        return {"units": len(members), "done": [name for name, _, _ in members if name not in claimed]}

    def do_complete(
        self, request: Request, unit: str, env: Object = NO_ENVIRONMENT, running: bool = False, caller: int = 0
    ) -> Any:
        """End a unit with success. `running`: its command runs on until the supervisor calls `exited`."""
        return self._end(request, unit, caller, Outcome(COMPLETED, "", 0, "", running, check_environment(env)))

    def do_fail(self, request: Request, unit: str, reason: str = "", exit_code: int = 0, caller: int = 0) -> Any:
        reason = reason or (f"exit code {exit_code}" if exit_code else "")
        return self._end(request, unit, caller, Outcome(FAILED, one_line(reason), exit_code or None))

    def _end(self, request: Request, unit: str, caller: int, outcome: Outcome) -> Any:
        """End a unit. The caller matters only if a start of the unit was refused."""
        node = self.units.units.get(unit)
        by = request.connection.caller(False, caller) if node and node.refused else None
        return {"unit": unit, "status": self.units.end(unit, outcome, by, self._last_claim(request, unit))}

    def _last_claim(self, request: Request, unit: str) -> Claim | None:
        """Return the held claim on a unit that was granted last, if it is the connection's."""
        node = self.units.units.get(unit)
        return node.last if node and node.last in request.connection.claims else None

    def _held(self, request: Request, unit: str) -> Claim:
        """As `_last_claim`, but raise Refused if there is none."""
        claim = self._last_claim(request, unit)
        if not claim:
            raise Refused(f'unit "{one_line(unit)[:60]}" is not held by this connection')
        return claim

    def do_owner(
        self, request: Request, unit: str, pid: int = 0, log: str = "", ready: str = "", command: str = ""
    ) -> Any:
        if self._knows_pids_of(request.connection):
            owner = process(pid, one_line(command))
        else:
            owner = Owner(pid, one_line(command), None, ELSEWHERE) if pid else None
        self.units.own(self._held(request, unit), owner, one_line(log), one_line(ready))
        return {"unit": unit}

    def do_probing(self, request: Request, unit: str, error: str = "") -> Any:
        """Note why the last try of the probe of a unit has failed."""
        self._held(request, unit).unit.facts.probe_error = one_line(error)
        return {"unit": unit}

    def do_retry(self, request: Request, unit: str, detail: str = "") -> Any:
        self.units.retry(self._held(request, unit), one_line(detail))
        return {"unit": unit}

    def do_running(self, request: Request, unit: str) -> Any:
        self.units.run_on(self._held(request, unit))
        return {"unit": unit}

    def do_exited(self, request: Request, unit: str, reason: str = "", code: int = 0, stopped: bool = False) -> Any:
        """End a supervisor's claim, since the command has ended. See Units.exit."""
        self.units.exit(self._held(request, unit), one_line(reason), code, stopped)
        return {"unit": unit}

    def do_stop(self, request: Request, units: Sequence[str] = (), grace: float = GRACE) -> None:
        """Stop units; this goes on if the connection closes. See Units.stop."""
        self._expect(request, lambda: self.units.stop(units, request, grace))
        self._owners_wake.wake()  # the owners' thread calls keep_time

    def do_reset(self, request: Request, units: Sequence[str] = ()) -> Any:
        return {"units": self.units.reset(units)}

    def do_status(self, request: Request, unit: str) -> Any:
        return self.units.status(unit)

    def do_list(self, request: Request, all: bool = False) -> Any:
        left_out = ("dependencies", "did_you_mean", "history", "environment")
        return [{k: v for k, v in vars(u).items() if k not in left_out} for u in self.units.snapshots(all)]

    def do_graph(self, request: Request) -> Any:
        return self.units.graph()

    def do_env(self, request: Request, unit: str) -> Any:
        return {"env": self.units.environment(unit)}

    def do_events(self, request: Request, since: int = 0, follow: bool = False) -> Any:
        """Return the events after number `since`. With `follow`, later ones are sent as notifications `event`."""
        if follow:
            request.connection.following = self.units.seq
            self.followers.add(request.connection)
        return [e for e in self.units.events.values() if e.seq > since]

    def do_shutdown(self, request: Request) -> Any:
        if not self.leaving:  # a second signal would leave services no time
            self.log.say("shutdown was called" + owner_text(request.connection.caller(False), " by "))
            os.kill(os.getpid(), signal.SIGTERM)  # ends the process, whether it is an agent only or a boot, too
            self.leaving = True
        return {}

    # -- owners -------------------------------------------------------------------------------------------

    @staticmethod
    def _knows_pids_of(connection: Connection) -> bool:
        """Return whether a peer is in our process namespace, so that a pid means the same process to both."""
        peer = peer_credentials(connection.sock)[0]
        return peer > 0 and len(proc_line(peer, "NSpid:").split()) <= 1

    def _owner(self, connection: Connection, pid: int) -> Owner | None:
        """Return the process with a pid, as an owner. Raises Refused if there is none."""
        if not self._knows_pids_of(connection):
            raise Refused(f"process {pid}: the caller is not in the agent's process namespace; start without --pid")
        if pid < 0 or birth(pid) == "":
            raise Refused(f"process {pid} is not alive in the agent's process namespace; --pid takes a script's $$")
        return process(pid)

    @staticmethod
    def _alive(owner: Owner) -> bool | None:
        now = None if owner.born == ELSEWHERE else birth(owner.pid)
        if not now:
            return None if now is None else False
        return now == owner.born if owner.born else None

    def _watch(self, claim: Claim, owner: Owner) -> None:
        """Let the owners' thread end a claim when its process has ended. Called under the lock."""
        self.owners[claim] = None
        try:
            self.owners[claim] = io.FileIO(getattr(os, "pidfd_open")(owner.pid))  # noqa: B009  (mypy has it from 3.9 on)
        except (AttributeError, OSError):  # before Python 3.9, Linux 5.3; not Linux; no descriptor left
            pass
        self._owners_wake.wake()

    def _await_owners(self) -> None:
        """Wait until an owner ends, or until Units.keep_time is due. Without a pidfd, check the owner each second."""
        self._owners_wake.awake = False
        with self.lock:
            self.owners = {claim: file for claim, file in self.owners.items() if not claim.is_over()}
            owners = dict(self.owners)
            pause = self.units.keep_time() - time.monotonic()
        fds = [file.fileno() for file in owners.values() if file]
        ready = self._owners_wake.sleep(fds, pause if len(fds) == len(owners) else min(pause, 1))
        gone = [claim for claim, file in owners.items() if file and file.fileno() in ready]
        gone += [c for c, file in owners.items() if not file and c.owner and self._alive(c.owner) is False]
        with self.lock:
            self.units.end_claims(gone, "the process that was to own it has ended")

    # -- for the process that hosts the agent --------------------------------------------------------------

    def retire(self) -> bool:
        """Take no more claims, unless a boot still has claims; return whether none has."""
        with self.lock:
            claims = [claim for connection in self.connections for claim in connection.claims if claim.boot]
            self.leaving = self.leaving or all(claim.is_over() for claim in claims)
            return self.leaving

    def stop_units(self, everything: bool, grace: float) -> Stop | None:
        """Begin to stop services, also those not ready yet, or all that have a supervisor. None if there are none."""
        with self.lock:
            self._refuse_claims()
            supervised = [unit for unit in self.units.units.values() if unit.supervisor()]
            names = [unit.name for unit in supervised if everything or unit.facts.running_on or unit.facts.probe]
            if not names:
                return None
            stop = self.units.stop([] if everything else names, None, grace)
        self._owners_wake.wake()
        return stop

    def _refuse_claims(self) -> None:
        """Take no more claims, and answer those that wait with Unreachable. Called under the lock."""
        self.leaving = True
        for claim in [claim for connection in self.connections for claim in connection.open.values()]:
            self._answer(claim, Unreachable("the agent is shutting down"))

    def stop(self) -> None:
        """Answer all claims that wait, and give the connections a second to send what is in their outboxes."""
        with self.lock:
            self._refuse_claims()
            connections, self.connections = self.connections, set()  # when these close no claim ends
        deadline = time.monotonic() + 1.0
        while any(c.outbox or c.wake_up.awake for c in connections if not c.gone) and time.monotonic() < deadline:
            time.sleep(0.002)


METHODS = {name[3:]: method for name, method in vars(Agent).items() if name.startswith("do_")}
QUESTIONS = ("ping", "status", "list", "graph", "env", "events")  # methods that change nothing


def make_server(agent: Agent, sock: Any, most: int, look: Callable[[], None]) -> Any:
    """Return a socketserver whose requests are Connections, at most `most`. It calls `look` every few seconds."""
    import _thread
    import socketserver

    def no_room(error: Exception) -> None:
        why = error_text(error) or "no memory"
        agent.log.say(f"cannot accept connections: {why}; trying again until it works", 0)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            agent.converse(self.request)

    class Server(socketserver.ThreadingUnixStreamServer):
        def accept(self) -> None:
            self.serve_forever(LOOK_AGAIN)

        def service_actions(self) -> None:
            look()

        def get_request(self) -> Any:
            try:
                wake_up = WakeUp()
                return Connection(sock.accept()[0], wake_up), ""
            except OSError as error:
                no_room(error)
                time.sleep(0.05)  # do not spin
                raise OSError from None  # socketserver tries again

        def verify_request(self, request: Any, client_address: Any) -> bool:
            if len(agent.connections) < most:
                return True
            limit = Unreachable(f"the agent has reached its limit of {most} connections")
            request.sock.setblocking(False)
            request.send(encode(error_message(None, limit)))
            agent.log.say(f"refused: {limit}")
            return False

        def process_request(self, request: Any, client_address: Any) -> None:
            with agent.lock:
                agent.connections.add(request)
            # Not threading.Thread: its start() waits for ever if there is no memory for the thread.
            _thread.start_new_thread(self.process_request_thread, (request, client_address))

        def shutdown_request(self, request: Any) -> None:
            agent.disconnect(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            error: Any = sys.exc_info()[1]
            if isinstance(error, MemoryError) or "start new thread" in str(error):
                no_room(error)
            elif not of_peer(error):
                trace = error.__traceback__
                while trace.tb_next:
                    trace = trace.tb_next
                where = f"internal error at line {trace.tb_lineno}"
                agent.log.say(f"{where}: {one_line(repr(error))}; please report it", 0)

    server = Server("", Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    return server


def listen(
    at_end: ExitStack, path: str, mode: int, group: int, replace: Callable[[str], bool] | None, again: bool = False
) -> Any:
    """Return a socket that listens at `path`. `at_end` will remove it, and PATH.lock. Raises Refused.

    Missing directories (a /run is empty at every boot) are made. They, and the socket until it gets its mode and its
    group (-1: none), are accessible to us only. `again`: we hold the lock already.
    """
    if len(os.fsencode(path)) > (103 if sys.platform == "darwin" else 107):
        raise Refused(f"{path}: too long for a socket path; choose a shorter --socket-path")
    doing, before = f"make the directory {os.path.dirname(path)}", os.umask(0o077)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not again:
            lock = path + ".lock"
            doing = f"open {lock}{file_owner(lock)}"
            held = at_end.enter_context(hold_lock(lock, path, replace))
            at_end.callback(remove, lock, os.fstat(held.fileno()))
            held.truncate(0)
            held.write(b"%d\n" % os.getpid())
        doing = f"listen at {path}"
        sock = bind(path, replace is not None)
        at_end.callback(remove, path, os.lstat(path))
        try:
            os.chown(path, -1, group)
        except PermissionError:
            raise Refused(f"cannot give {path} to group {group}: be a member of the group, or root") from None
        os.chmod(path, mode)
        sock.listen(4096)
        return sock
    except OSError as error:
        raise Refused(f"cannot {doing}: {error_text(error)}; choose another --socket-path") from None
    finally:
        os.umask(before)


END_IT = "end it with `shutdown`, take its place with `serve --replace`,"


def in_the_way(what: str, do: str = "remove it") -> Refused:
    """Return the error for a path that is in use."""
    return Refused(f"{what}; {do} or choose another --socket-path")


def hold_lock(lock: str, path: str, replace: Callable[[str], bool] | None) -> io.FileIO:
    """Lock the file `lock`, so that one agent at a time serves `path`; return the file.

    Raises Refused if another process has locked it, or, if that is to be replaced, ask it to end, and remove the file
    if it does not. Its holder removes the file, too: so start again if the file that was locked is not the one in the
    directory. Never write to a file that others may have put there.
    """
    import fcntl

    deadline, holder = time.monotonic() + REPLACE_TIMEOUT, modified(lock)
    while True:
        late = replace and (not replace(path) or time.monotonic() > deadline)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # do not wait for the other end of a pipe
        file = io.FileIO(os.open(lock, flags, 0o600), "r+")  # closed by its destructor
        found = os.fstat(file.fileno())
        try:
            if not stat.S_ISREG(found.st_mode):
                raise in_the_way(f"{lock}{file_owner(lock)} is not a regular file")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(found, os.lstat(lock)):
                if found.st_uid != os.geteuid():
                    raise in_the_way(f"{lock}{file_owner(lock)} is not ours")
                if found.st_nlink > 1:
                    raise in_the_way(f"{lock} has another name, too, so that it may be any file")
                return file
        except BlockingIOError:
            if replace is None:
                pid = (file.read(20) or b"").decode(errors="replace").strip()
                who = f" (pid {pid})" if pid.isdecimal() else ""
                raise in_the_way(f"an agent{who}{file_owner(lock)} is serving {path} already", END_IT) from None
            if found.st_mtime_ns != holder:  # another agent holds it now, and has as much time to end
                deadline = time.monotonic() + REPLACE_TIMEOUT
            elif late:
                remove(lock, found)
            holder = found.st_mtime_ns
            time.sleep(0.02)
        except FileNotFoundError:
            pass


def modified(path: str) -> int:
    """Return when a file was modified, in nanoseconds; 0 if there is none."""
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0


def file_owner(path: str) -> str:
    """Return the owner of a file, for a message; nothing if that is root or us."""
    try:
        uid = os.lstat(path).st_uid
    except OSError:
        return ""
    return "" if uid in (0, os.geteuid()) else f" (of user {user_name(uid)})"


def bind(path: str, replace: bool) -> Any:
    """Return a socket bound to `path`. Raises Refused, OSError.

    A socket that nobody listens on, or that is to be replaced, is removed; anything else at the path is left alone.
    """
    import socket

    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise in_the_way(f"{path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            answer = errno.ECONNREFUSED if replace else probe.connect_ex(path)
        if answer in (0, errno.EAGAIN):  # connections are accepted, or the backlog is full
            raise in_the_way(f"somebody is serving {path} already", END_IT)
        if answer != errno.ECONNREFUSED:
            raise OSError(answer, os.strerror(answer))
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    return sock


def notify(state: str) -> None:
    """Send a state to the service manager that started us, if any, as sd_notify(3) does."""
    import socket

    address = getenv("NOTIFY_SOCKET")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass


def detach() -> int:
    """Go on in a background process; return a descriptor to which it writes a byte when it is ready.

    The process that was called exits here: with 0 when the other is ready, or with the exit status of the other.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, waitpid has no exit status
    child, link = in_background()
    if child:
        code = 0 if os.read(link, 1) else exit_code_of(os.waitpid(child, 0)[1])
        if code < 0:
            put(f"error: the agent ended before it was ready: {exit_text(code)}\n", 2)
        sys.exit(shell_status(code))
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.dup2(0, 1)
    return link


class Host(Record):
    """An agent that listens at a path during a `with` block, and accepts connections from a call of `accept` on."""

    path: str  # absolute
    mode: int = 0o600
    group: int = -1
    level: int = 0  # of the log: 0 quiet, 1, 2 verbose
    log_file: str = ""
    pid_file: str = ""
    replace: Callable[[str], bool] | None = None  # called with the path while there is another agent
    timeline: Callable[[Graph], None] | None = None  # called with the graph at the end
    alone: bool = False  # the process is an agent only, so that its limit of file descriptors may be raised
    advice: str = ""  # a line for the log

    def __enter__(self) -> Host:
        """Listen. Raises Refused."""
        import threading
        from contextlib import ExitStack

        with ExitStack() as at_end:
            self.sock = listen(at_end, self.path, self.mode, self.group, self.replace)
            at_end.callback(self.sock.close)
            threading.stack_size(STACK)
            try:
                log = Log(self.level, self.log_file)
                at_end.callback(log.close)
                if self.pid_file:
                    with open(open_file(self.pid_file, WRITE), "w", encoding="ascii") as file:
                        if os.path.isfile(self.pid_file):  # not a device
                            at_end.callback(remove, self.pid_file, os.fstat(file.fileno()))
                        file.write(f"{os.getpid()}\n")
                self.agent = Agent(log)
                self.server = make_server(self.agent, self.sock, connection_limit(self.alone), self.look)
                self.accepting = threading.Event()
                threading.Thread(target=self._accept, daemon=True).start()  # now, since it can fail
            except (OSError, RuntimeError, ImportError) as error:  # RuntimeError: no thread is left
                path = getattr(error, "filename", None) or self.pid_file
                doing, hint = (f"write {path}", "") if path else ("serve", "; is there a limit?")
                raise Refused(f"cannot {doing}: {error_text(error)}{hint}") from None
            self._at_end = at_end.pop_all()
        log.say(f"listening at {self.path} (pid {os.getpid()})")
        if self.advice:
            log.say(self.advice)
        return self

    def accept(self) -> None:
        """Begin to accept connections."""
        self.accepting.set()

    def _accept(self) -> None:
        self.accepting.wait()
        self.agent.for_ever("accepting connections", self.server.accept)

    def look(self) -> None:
        """Listen anew if the file of the socket was removed, since clients cannot connect any more."""
        if not self.agent.leaving and not os.path.lexists(self.path):
            try:
                with listen(self._at_end, self.path, self.mode, self.group, None, again=True) as new:
                    os.dup2(new.fileno(), self.sock.fileno(), inheritable=False)
                self.agent.log.say(f"{self.path} was removed: listening there again")
            except (Refused, OSError) as error:
                self.agent.log.say(f"{self.path} was removed: {error}", 0)

    def stop_units(self, loop: Loop, everything: bool) -> None:
        """Stop services, or all commands, within GRACE, or at once if a signal comes."""
        stop = self.agent.stop_units(everything, GRACE)
        if stop:
            self.agent.log.say(f"stopping {some_names([unit.name for unit in stop.units])}")
        while stop in self.agent.units.stops:
            if loop.turn(time.monotonic() + 0.05):
                self.agent.stop_units(everything, 0.0)
        if stop and stop.result["left"]:
            self.agent.log.say(f"still running: {some_names([row.unit for row in stop.result['left']])}", 0)

    def __exit__(self, *error: object) -> None:
        """Answer all clients that wait, and remove the files."""
        self.agent.stop()
        if self.timeline:
            with self.agent.lock:
                graph = self.agent.units.graph()
            self.timeline(graph)
        self._at_end.close()


def serve(host: Host, background: bool = False) -> None:
    """Run an agent until a signal comes. Raises Refused."""
    ready = detach() if background else -1
    with host:
        loop = Loop(STOPS)
        host.accept()
        notify(f"READY=1\nMAINPID={os.getpid()}")
        if background:
            os.dup2(0, 2)
            os.write(ready, b"!")
            os.close(ready)
        from signal import Signals

        numbers: list[int] = []
        while not numbers:
            numbers = loop.turn()
        host.agent.log.say(f"stopping: got {Signals(numbers[0]).name}")
        notify("STOPPING=1")
        host.stop_units(loop, everything=os.getpid() == 1)


def serve_command(host: Host, command: list[str]) -> int:
    """Run an agent as long as a command runs; return the command's exit status. Raises Refused, CommandError."""
    with host:
        loop = Loop(PASSED_ON)
        host.accept()
        notify(f"READY=1\nMAINPID={os.getpid()}")
        try:
            return supervise(loop, command, environment(CODER_AGENT_SOCKET_PATH=host.path))
        finally:
            notify("STOPPING=1")
            host.stop_units(loop, everything=True)


def connection_limit(raise_it: bool) -> int:
    """Return how many connections the limit of file descriptors allows; with `raise_it`, raise the limit first."""
    import resource

    each = 2 if hasattr(os, "eventfd") else 3  # descriptors of a connection
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240)  # macOS gives no more
    if raise_it and max_descriptors() < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            pass
    return max(1, min(MAX_CONNECTIONS, (max_descriptors() - 24) // each))


# ----------------------------------------------------------------------------------------------------------
# Views. Pure functions from data to text: tables, sentences, pictures. All pictures of a startup are drawn from one
# Startup; `obstacles` decides what keeps a unit from starting.
# ----------------------------------------------------------------------------------------------------------

LONG = 30.0  # seconds after which `why` mentions a unit that runs


def text_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(0 if category(c) in ("Mn", "Me", "Cf") else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int, dots: str = "\u2026") -> str:
    """Return the text in exactly `width` columns; a long one loses its middle, since names differ at both ends."""
    if text_width(text) > width:
        head, tail = text[: len(text) // 2], text[len(text) // 2 :]
        while text_width(head) + text_width(tail) > width - len(dots):
            head, tail = (head[:-1], tail) if text_width(head) > text_width(tail) else (head, tail[1:])
        text = head + dots + tail
    return text + " " * (width - text_width(text))


def wrap(text: str, width: int, dots: str = "\u2026") -> list[str]:
    """Return the text in lines of at most `width` columns; textwrap counts characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and text_width(lines[-1]) + 1 + text_width(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + fit(word, min(text_width(word), width), dots)
    return lines


def json_text(value: Any) -> str:
    """Return a value as indented JSON."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], columns: str = "") -> str:
    """Return a table of the named columns, by default of those that are not empty. Raises UsageError."""
    lower = [title.lower() for title in titles]
    shown = [name for i, name in enumerate(lower) if not rows or any(row[i] for row in rows)]
    if columns:
        shown = [c.strip().lower().replace("_", " ") for c in columns.split(",")]
    for name in shown:
        if name not in lower:
            raise UsageError(f'no such column: "{name}"; there are {", ".join(lower)}')
    lines = [[row[lower.index(name)] for name in shown] for row in [titles, *rows]]
    widths = [max(map(text_width, column)) for column in zip(*lines)]
    return "".join("  ".join(map(fit, line, widths)).rstrip() + "\n" for line in lines)


# -- a unit in words ----------------------------------------------------------------------------------------


def is_gone(unit: UnitStatus) -> bool:
    """Return whether the process that started a unit has ended, and the unit has not."""
    return unit.status == STARTED and unit.owner is not None and unit.owner.alive is False


def state_word(unit: UnitStatus) -> str:
    """Return a word for what a unit does or how it ended, for timelines; it tells more than the status."""
    if unit.status == PENDING and unit.waiting is not None:
        return "waiting" if unit.is_waiting else "gave up"
    if unit.running_on or unit.stopping:
        return "stopping" if unit.stopping else "running on"
    if unit.exit_reason in (STOPPED, LOST):
        return unit.exit_reason
    if unit.exited is not None:
        return "exited" if unit.status == COMPLETED else "died"
    if is_gone(unit):
        return "gone"
    if unit.status == STARTED:
        return "probing" if unit.probe else "running"
    return unit.status


def reason_text(unit: UnitStatus) -> str:
    """Return the reason for the status of a unit, or what its process does, for tables and sentences."""
    if unit.stopping:
        return "being stopped"
    if is_gone(unit):
        return "its process is gone"
    if unit.status == STARTED and unit.probe:
        tried_after = unit.tries[-1] - (unit.started or 0.0) if unit.tries else 0.0
        error = f" ({unit.probe_error})" if unit.probe_error else ""
        return f"probing {unit.probe} for {span(unit.age - tried_after)}{error}"
    if unit.running_on:
        return "runs on" + owner_text(unit.owner, " as ")
    if unit.exit_reason == LOST and unit.owner and unit.owner.alive is not None:
        return unit.reason + (" (it does)" if unit.owner.alive else " (it has ended)")
    return unit.reason or unit.exit_reason or ("" if unit.exited is None else "its process has ended")


def status_and_reason(unit: UnitStatus) -> str:
    """Return the status of a unit and, if there is one, its reason."""
    return ": ".join(filter(None, (unit.status, reason_text(unit))))


def status_text(status: UnitStatus, columns: str = "") -> str:
    """Return a unit, the table of its dependencies, and its history."""
    facts = {
        "Unit": status.unit_name,
        "Status": status.status,
        "Ready": str(status.is_ready).lower(),
        "Reason": reason_text(status),
        "Started by": owner_text(status.owner),
        "Tries": str(len(status.tries) + 1) if status.tries else "",
        "Locks": ", ".join(status.locks),
        "Waits for": ", ".join(status.waits_for) if status.is_waiting else "",
        "Output": status.log,
        "Refused": status.refusal,
        "Did you mean": status.did_you_mean,
    }
    text = "".join(f"{title}: {fact}\n" for title, fact in facts.items() if fact) + "\n"
    rows = [
        [d.depends_on, d.required_status, d.current_status, str(d.is_satisfied).lower(), d.reason]
        for d in status.dependencies
    ]
    titles = ["DEPENDS ON", "REQUIRED STATUS", "CURRENT STATUS", "SATISFIED", "REASON"]
    text += table(titles, rows, columns) if rows else "No dependencies.\n"
    if status.history:
        first = status.history[0].time
        rows = [[f"+{span(e.time - first)}", e.kind, e.detail] for e in status.history]
        text += "\n" + table(["TIME", "EVENT", "DETAIL"], rows)
    return text


def list_text(units: Sequence[UnitStatus], columns: str = "") -> str:
    """Return the table of all units."""
    titles = ["UNIT", "STATUS", "READY", "AGE", "WAITS FOR", "REASON"]
    rows = []
    for u in units:
        ready, waits_for = str(u.is_ready).lower(), ", ".join(u.waits_for)
        rows.append([u.unit_name, u.status, ready, span(u.age), waits_for, reason_text(u)])
    return table(titles, rows, columns) if units else "no units yet\n"


LIST_KEYS = [
    *("unit_name", "status", "is_ready", "reason", "exit_code", "age", "owner", "waits_for"),
    *("running_on", "stopping", "exited", "exit_reason", "probe", "probe_error"),
]


def plain_units(units: Iterable[UnitStatus], keys: Iterable[str]) -> list[dict[str, Any]]:
    """Return some attributes of units, for JSON."""
    return [{key: plain(getattr(u, key)) for key in keys} for u in units]


# -- what all pictures of a startup share -------------------------------------------------------------------
PHASES = {  # of a unit: glyph and its ASCII form; in SVG the class (if empty, the status is the class), top and height
    "runs on as a service": ("\u2500-", "", 9, 3),
    "waits": ("\u2591.", "w", 7, 6),
    "waits for a lock": ("\u2592:", "l", 7, 6),
    "runs": ("\u2588#", "", 4, 12),
    "another try": ("\u2502|", "t", 2, 16),
}  # a later one is drawn over an earlier one
COLOURS = {  # of a status: on a terminal, and in a graph
    NOT_REGISTERED: ("2", "#eeeeee"),
    PENDING: ("2", "#ffffff"),
    STARTED: ("36", "#b9d8f5"),
    COMPLETED: ("32", "#bfe8c8"),
    FAILED: ("31", "#f4b0b0"),
    SKIPPED: ("33", "#f3e2a0"),
}


class Bar:
    """The times and phases of a unit in a picture that ends at `last`; an unknown time is that of the next event."""

    def __init__(self, unit: UnitStatus, last: float) -> None:
        self.unit, self.name = unit, unit.unit_name
        self.has_run = unit.started is not None and unit.status != NOT_REGISTERED
        self.ended = last if unit.ended is None else unit.ended
        self.started = self.ended if unit.started is None else unit.started
        self.asked = self.started if unit.waiting is None else unit.waiting
        self.ready = self.started if unit.ready is None else unit.ready
        self.ran = self.ended - self.started
        waited = "-" if unit.waiting is None else span(self.ended - self.asked)
        self.took = span(self.ran) if self.has_run else waited
        exited = self.ended if unit.exited is None else min(unit.exited, last)
        phases = [
            ("runs on as a service", self.ended, last if unit.running_on else exited),
            ("waits", self.asked, self.ready),
            ("waits for a lock", self.ready, self.started),
            ("runs", self.started, self.ended),
        ]
        shown = "runs" if self.has_run else "waits" if unit.waiting is not None else ""  # even if it took no time
        self.phases = [each for each in phases if each[2] > each[1] or each[0] == shown]
        self.phases += [("another try", time, time) for time in unit.tries]


class Startup:
    """A graph with what its pictures share: the axis of time, the units in order, and the critical path."""

    def __init__(self, graph: Graph) -> None:
        known = [u for u in graph.nodes if u.status != NOT_REGISTERED]
        self.first = min((u.registered or 0.0 for u in known), default=graph.now)
        times = [t for u in known for t in (u.waiting, u.started, u.ended) if t is not None]
        goes_on = any(u.status == STARTED or u.is_waiting for u in known) or all(u.ended is None for u in known)
        self.last = max([self.first, *times, *([graph.now] if goes_on else [])])
        self.length = self.last - self.first
        self.bars = {u.unit_name: Bar(u, self.last) for u in graph.nodes}
        known.sort(key=lambda u: (u.started is None, u.started or u.registered or 0.0, u.unit_name))
        self.rows = [self.bars[u.unit_name] for u in known]
        self.path = self._critical_path()
        names = [bar.name for bar, _ in self.path]
        self.critical, steps = set(names), set(zip(names, names[1:]))
        # each dependency, its dependent, the requirement, and whether this edge is on the critical path
        self.edges = [(d, u.unit_name, r, (d, u.unit_name) in steps) for u in graph.nodes for d, r in u.wants.items()]

    def _critical_path(self) -> list[tuple[Bar, float]]:
        """Return the chain of units that determined when the last one ended, each with its share in seconds.

        It leads from the unit that ended last back to the unit that released it or, if none did, to the dependency that
        ended last, and so on.
        """
        ran = [bar for bar in self.rows if bar.has_run]
        bar = max(ran, key=lambda b: (b.ended, b.started), default=None)
        path: list[tuple[Bar, float]] = []
        until = NEVER
        for _ in self.bars:
            if bar is None:
                break
            if bar.has_run:
                path.append((bar, max(0.0, min(bar.ended, until) - bar.started)))
            until = bar.started  # a skipped unit has its end here
            before = [self.bars[d] for d in bar.unit.wants if d in self.bars]
            before = [b for b in before if b.unit.ended is not None and b.ended <= until]
            bar = self.bars.get(bar.unit.released_by) or max(before, key=lambda b: b.ended, default=None)
        return path[::-1]

    def summary(self) -> str:
        """Return the whole time, how many units did not complete, and the last steps of the critical path."""
        if not self.bars:
            return "no units yet"
        words = {STARTED: "still running", PENDING: "not started"}
        units = [bar.unit for bar in self.bars.values()]
        states = [state_word(u) if u.status == FAILED else words.get(u.status, u.status) for u in units]
        order = (FAILED, "died", STOPPED, LOST, SKIPPED, *words.values())
        counts = [f"{states.count(state)} {state}" for state in order if state in states]
        text = f"{span(self.length)} in all" + (f" ({', '.join(counts)})" if counts else "")
        if not self.path or self.length <= 0:
            return text
        steps = [f"{bar.name} {span(share)}" for bar, share in self.path]
        steps = ["...", *steps[-10:]] if len(steps) > 10 else steps
        percent = 100 * sum(share for _, share in self.path) / self.length
        return f"{text}; critical path: {' -> '.join(steps)} ({percent:.0f}% of it)"


# -- the timeline -------------------------------------------------------------------------------------------
def ticks(length: float, most: int) -> list[tuple[float, str]]:
    """Return round times with labels for an axis of `length` seconds: 0 and at most `most` others, not many fewer."""
    steps = [m * 10.0**e for e in range(-3, 1) for m in (1, 1.5, 2, 3, 4, 6, 8)] + [10.0, 15.0, 20.0, 30.0, 45.0]
    steps += [60 * m for m in (1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480, 720)]
    step = next((s for s in [*steps, 86400.0, 2 * 86400.0] if length / s <= max(most, 1)), length or 1.0)
    times = [i * step for i in range(int(length / step + 1e-9) + 1)]
    exact = {t: f"{t:g}s" if t >= 1 else f"{t * 1000:g}ms" for t in times if t < 60}  # `span` rounds
    return [(t, exact.get(t, span(t)) if t else "0") for t in times]


def timeline_text(graph: Graph, width: int = 100, colour: bool = False, unicode: bool = True) -> str:
    """Draw each unit as a row on one axis of time; a star marks the units on the critical path."""
    glyphs = {phase: pair[0] if unicode else pair[1] for phase, (pair, *_) in PHASES.items()}
    startup, dots = Startup(graph), "\u2026" if unicode else "~"
    summary = wrap(startup.summary(), width, dots)
    if not startup.rows:
        return "\n".join(summary) + "\n"
    labels = [bar.name if unicode else ascii(bar.name)[1:-1] for bar in startup.rows]
    label_width = min(max(map(text_width, labels)), max(8, min(width // 3, width - 32)))
    outcomes = []
    for unit in (bar.unit for bar in startup.rows):
        outcomes.append(state_word(unit) + ("" if unit.exited is None else f" at {span(unit.exited - startup.first)}"))
    cells = width - label_width - 12 - max(10, *map(len, outcomes))
    scale = cells / (startup.length or 1.0)
    axis = " " * (label_width + 3)
    for tick, text in ticks(startup.length, cells // 10):
        at = int(tick * scale + 1e-9)
        if at + len(text) <= cells:
            axis = axis.ljust(label_width + 3 + at) + text
    lines, drawn = [axis], set()
    for bar, label, outcome in zip(startup.rows, labels, outcomes):
        row, is_critical = [" "] * cells, bar.name in startup.critical
        for phase, start, end in bar.phases:
            first = max(0, min(cells - 1, int((start - startup.first) * scale)))
            size = max(1, min(cells, round((end - startup.first) * scale)) - first)
            row[first : first + size] = glyphs[phase] * size
        drawn.update(row)
        name, text = fit(label, label_width, dots), "".join(row)
        if colour:
            name = f"\033[1m{name}\033[0m" if is_critical else name
            text = f"\033[{COLOURS[bar.unit.status][0]}m{text}\033[0m"
        lines.append(f"{'*' if is_critical else ' '} {name} {text} {bar.took:>7} {outcome}")
    legend = [f"{sign} {phase}" for phase, sign in glyphs.items() if sign in drawn and phase not in ("waits", "runs")]
    return "\n".join([*lines, "", *(wrap(", ".join(legend), width) if legend else []), *summary]) + "\n"


def blame_text(graph: Graph, width: int = 100) -> str:
    """List units by how long they ran, and by how long others waited for them while they did not wait themselves."""
    startup = Startup(graph)
    bars, text = startup.bars, ""
    ran, held_up = {bar.name: bar.ran for bar in bars.values()}, dict.fromkeys(bars, 0.0)
    for bar in bars.values():
        for name, requirement in bar.unit.wants.items():
            dependency = bars[name]
            met = dependency.started if requirement == START and dependency.has_run else dependency.ended
            end = min(bar.ready, met)
            own_wait = min(dependency.started, end) - max(dependency.asked, bar.asked)
            held_up[name] += max(0.0, end - bar.asked) - max(0.0, own_wait)
        holders = {bar.unit.released_by, *bar.unit.blocked_by.values()} - bar.unit.wants.keys()  # of its locks
        for name in holders & bars.keys():
            held_up[name] += bar.started - bar.ready
    for title, seconds in (("by how long they ran", ran), ("by how long others waited for them", held_up)):
        names = sorted((name for name in bars if seconds[name] > 0), key=lambda name: -seconds[name])
        rows = [[name, span(ran[name]), span(held_up[name]), bars[name].unit.status] for name in names]
        text += f"{title}:\n" + table(["UNIT", "RAN", "OTHERS WAITED", "STATUS"], rows) + "\n"
    hint = "OTHERS WAITED adds up over all that waited, so it may exceed the whole."
    return text + "\n".join([*wrap(hint, width), "", *wrap(startup.summary(), width)]) + "\n"


TIMES = ("registered", "waiting", "started", "ended", "ready", "exited")
TIMELINE_KEYS = [
    *("unit_name", "status", *TIMES, "tries", "reason", "released_by", "wants", "exit_code", "is_waiting"),
    *("locks", "blocked_by", "running_on", "exit_reason"),
]


def timeline_data(graph: Graph) -> dict[str, Any]:
    """Return the timeline for JSON; times are seconds since the first unit was registered, or None."""
    startup = Startup(graph)

    def since(t: float | None) -> float | None:
        return None if t is None else round(t - startup.first, 6)

    rows = plain_units((bar.unit for bar in startup.rows), TIMELINE_KEYS)
    for row in rows:
        row.update({key: since(row[key]) for key in TIMES}, tries=list(map(since, row["tries"])))
    path = [{"unit_name": bar.name, "seconds": round(share, 3)} for bar, share in startup.path]
    head = {"version": 2, "seconds": round(startup.length, 6), "summary": startup.summary()}
    return {**head, "critical_path": path, "units": rows}


def read_timeline(text: str | bytes, name: str) -> Startup:
    """Return the startup of a `.json` timeline; the text may be anything. Raises UsageError."""
    import json

    try:
        data = json.loads(text)
        units = [record(UnitStatus, {"is_ready": True, **row}) for row in data["units"]]
        return Startup(Graph(typed(data["seconds"], "float"), units))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, Unreachable):
        raise UsageError(f"{name} is not a timeline as `timeline -o json` prints it") from None


def compare_text(before: Startup, now: Startup) -> str:
    """Compare how long units took in two startups: the largest change first, after the units that did not complete."""

    def change(seconds: float) -> str:
        return "0" if abs(seconds) < 0.0005 else f"{'+' if seconds > 0 else '-'}{span(abs(seconds))}"

    def cell(bar: Bar | None) -> str:
        if bar is None:
            return "-"
        took = span(bar.ran) if bar.ran or bar.unit.status == COMPLETED else ""
        return took if bar.unit.status == COMPLETED else f"{took} {bar.unit.status}".lstrip()

    old_bars, new_bars = ({bar.name: bar for bar in startup.rows} for startup in (before, now))
    rows: list[tuple[float, list[str]]] = []
    for name in sorted({**old_bars, **new_bars}):
        old, new = old_bars.get(name), new_bars.get(name)
        seconds = (new.ran if new else 0.0) - (old.ran if old else 0.0)
        text = "came" if old is None else "went" if new is None else change(seconds)
        if any(bar and bar.unit.status != COMPLETED for bar in (old, new)):
            seconds, text = NEVER, "-"
        critical = [word for word, startup in (("before", before), ("now", now)) if name in startup.critical]
        rows.append((-abs(seconds), [name, cell(old), cell(new), text, " and ".join(critical)]))
    text = table(["UNIT", "BEFORE", "NOW", "CHANGE", "CRITICAL PATH"], [row for _, row in sorted(rows)])
    complete = all(bar.unit.status == COMPLETED for bar in (*before.rows, *now.rows))
    verdict = change(now.length - before.length) if complete else "not every unit completed"
    return f"{text}\n{span(before.length)} in all before, {span(now.length)} now: {verdict}\n"


STYLE = """
svg{font:12px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:#fff;fill:#222}
.w{fill:#d5d9e0}.l{fill:#e6c35c}.completed{fill:#3a8f5c}.failed{fill:#cc3b3b}.started{fill:#3f7fc4}
.skipped{fill:none;stroke:#999;stroke-dasharray:3 2}.g{stroke:#888;opacity:.3}.t{fill:#222}
.y{opacity:0}.z{fill:#888;opacity:.08}.h{font-weight:bold;fill:#b5500f}.m{fill:#777}
.c{fill:none}.c,.k{stroke:#d2641e;stroke-width:2}
@media(prefers-color-scheme:dark){svg{background:#16181d;fill:#ddd}.w{fill:#3a404b}.l{fill:#8a7430}
.completed{fill:#4fb37a}.failed{fill:#e26060}.t{fill:#ddd}.h{fill:#ff9a56}.c,.k{stroke:#ff8a3d}.m{fill:#999}}
"""
LEGEND = [(phase, phase, STARTED) for phase in PHASES]  # texts, each with the phase and the status that are drawn
LEGEND += [(SKIPPED, "waits", SKIPPED), (COMPLETED, "runs", COMPLETED), (FAILED, "runs", FAILED)]
LEGEND += [("on the critical path", "runs", COMPLETED + " k")]


def svg_text(x: float, y: float, text: str, css_class: str = "m", anchor: str = "start") -> str:
    """Return a text in SVG."""
    from html import escape  # printable text needs no more

    return f'<text x="{x:.1f}" y="{y:.0f}" class="{css_class}" text-anchor="{anchor}">{escape(text)}</text>'


def svg_phase(phase: str, status: str, x: float, y: float, width: float) -> str:
    """Return the rectangle of a phase in SVG; `y` is the top of its row."""
    _, css_class, top, height = PHASES[phase]
    css_class = SKIPPED if (phase, status) == ("waits", SKIPPED) else css_class or status
    return f'<rect class="{css_class}" x="{x:.1f}" y="{y + top}" width="{width:.1f}" height="{height}"/>'


def timeline_svg(graph: Graph) -> str:
    """Draw the timeline as one self-contained picture."""
    from html import escape

    startup, causes = Startup(graph), obstacles(graph)
    column, height, axis = 7.4, 20, 760.0  # pixels: width of a character, height of a row, length of the axis of time
    outcomes = []
    for unit in (bar.unit for bar in startup.rows):
        has_ended = unit.status in ENDED and not unit.running_on
        outcomes.append(fit(status_and_reason(unit) if has_ended else state_word(unit), 60).rstrip())
    left = 16 + column * min(max((text_width(bar.name) for bar in startup.rows), default=0), 60)
    right, scale = left + axis + 70, axis / (startup.length or 1.0)
    width = max(right + 8 + column * max(map(text_width, outcomes), default=0), 920 + left)
    summary = wrap(startup.summary(), int((width - 16) / column))
    top = 18 * len(summary) + 44
    bottom = top + height * len(startup.rows)
    body = [svg_text(8, 20 + 18 * i, line, "h") for i, line in enumerate(summary)]
    for tick, label in ticks(startup.length, 10) if startup.rows else ():
        x = left + tick * scale
        body.append(f'<path class="g" d="M{x:.1f} {top - 8}V{bottom}"/>')
        body.append(svg_text(x, top - 14, label, anchor="middle"))
    starts: dict[str, tuple[float, int]] = {}  # where each unit started
    for i, (bar, outcome) in enumerate(zip(startup.rows, outcomes)):
        y, status, is_critical = top + height * i, bar.unit.status, bar.name in startup.critical
        starts[bar.name] = left + (bar.started - startup.first) * scale, y
        body.append(f"<g><title>{escape(sentence(bar.unit, graph.now, causes[bar.name]))}</title>")
        body.append(f'<rect class="{"z" if i % 2 else "y"}" x="0.0" y="{y}" width="{width:.1f}" height="{height}"/>')
        body.append(svg_text(8, y + 14, fit(bar.name, 60).rstrip(), "h" if is_critical else ""))
        for phase, start, end in bar.phases:
            size = max((end - start) * scale, 2.0)
            x = left + min((start - startup.first) * scale, axis - size)
            css_class = f"{status} k" if is_critical and phase == "runs" else status
            body.append(svg_phase(phase, css_class, x, y, size))
        body.append(svg_text(right - 8, y + 14, bar.took, "", "end"))
        body.append(svg_text(right, y + 14, outcome, FAILED if status == FAILED else "m") + "</g>")
    for (before, _), (after, _) in zip(startup.path, startup.path[1:]):
        x, y = starts[after.name]
        body.append(f'<path class="c" d="M{x:.1f} {starts[before.name][1] + 16}V{y + 4}"/>')
    for i, (text, phase, status) in enumerate(LEGEND if startup.rows else ()):
        x, y = 8.0 + 184 * (i % 5), bottom + 12 + height * (i // 5)
        body.append(svg_phase(phase, status, x, y, 2 if phase == "another try" else 24))
        body.append(svg_text(x + 30, y + 14, text))
    sides = f'width="{width:.0f}" height="{bottom + 66}" viewBox="0 0 {width:.0f} {bottom + 66}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {sides}><title>startup timeline</title><style>{STYLE}</style>'
    return "\n".join([head, *body, "</svg>\n"])


def timeline_as(form: str, graph: Graph, *options: Any) -> str:
    """Return the timeline in one of its forms; `options` are those of `timeline_text`."""
    if form == "json":
        return json_text(timeline_data(graph))
    return timeline_svg(graph) if form == "svg" else timeline_text(graph, *options)


# -- the graph ----------------------------------------------------------------------------------------------
def part_of(graph: Graph, names: Sequence[str]) -> Graph:
    """Return the graph of some units and of all that they depend on. Raises NotRegistered."""
    if not names:
        return graph
    wants = {u.unit_name: u.wants for u in graph.nodes}
    for name in names:
        if name not in wants:
            hint = did_you_mean(resembling(name, wants), f"; see `{PROGRAM} list --all`")
            raise NotRegistered(f'no unit "{name}"{hint}')
    keep = reached(names, wants.get)
    return Graph(graph.now, [u for u in graph.nodes if u.unit_name in keep])


def graph_tree(graph: Graph, roots: Sequence[str] = (), unicode: bool = True) -> str:
    """Draw the dependencies of each unit below it, once."""
    nodes = {u.unit_name: u for u in graph.nodes}
    wanted = {name for u in graph.nodes for name in u.wants}
    drawn = ("\u251c\u2500\u2500 ", "\u2514\u2500\u2500 ", "\u2502   ")
    fork, last, bar = drawn if unicode else ("|-- ", "`-- ", "|   ")
    lines: list[str] = []
    shown: set[str] = set()

    def show(name: str, lead: str = "", below: str = "", level: int = 0) -> None:
        wants, more = list(nodes[name].wants), f" ({status_and_reason(nodes[name])})"
        if wants and name in shown:
            wants, more = [], " (see above)"
        elif wants and level >= 40:
            wants, more = [], f"{more}; `graph {name}` shows what is below"
        lines.append(lead + name + more)
        shown.add(name)
        for child in wants:
            is_last = child == wants[-1]
            show(child, below + (last if is_last else fork), below + ("    " if is_last else bar), level + 1)

    for name in roots or [name for name in nodes if name not in wanted]:
        show(name)
    return "\n".join(lines) + "\n" if lines else "no units yet\n"


def graph_dot(graph: Graph) -> str:
    """Return the graph for Graphviz: an arrow from each dependency to its dependent, the critical path in bold."""
    import json

    def quote(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    startup, bold = Startup(graph), ["color=orangered", "penwidth=3"]
    lines = ["digraph startup {", "  rankdir=LR; node [shape=box, style=filled];"]
    for u in graph.nodes:
        words = [f'fillcolor="{COLOURS[u.status][1]}"', f"tooltip={quote(status_and_reason(u))}"]
        words += ["style=dashed"] if u.status == NOT_REGISTERED else ["peripheries=2"] if u.running_on else []
        words += bold if u.unit_name in startup.critical else []
        lines.append(f"  {quote(u.unit_name)} [{', '.join(words)}];")
    for name, dependent, requirement, on_path in startup.edges:
        words = [] if requirement == SUCCESS else [f"label={requirement}"]
        words += bold if on_path else []
        lines.append(f"  {quote(name)} -> {quote(dependent)}" + (f" [{', '.join(words)}];" if words else ";"))
    return "\n".join(lines) + "\n}\n"


def graph_mermaid(graph: Graph) -> str:
    """Return the graph for Mermaid; characters of names that could have a meaning there become entity codes."""

    def quote(text: str) -> str:
        return '"' + "".join(c if c.isalnum() or c in " -_./" else f"#{ord(c)};" for c in text) + '"'

    ids = {u.unit_name: f"u{i}" for i, u in enumerate(graph.nodes)}
    startup, lines = Startup(graph), ["flowchart LR"]
    for u in graph.nodes:
        box = f"([{quote(u.unit_name)}])" if u.running_on else f"[{quote(u.unit_name)}]"
        lines.append(f"  {ids[u.unit_name]}{box}:::{u.status.replace(' ', '_')}")
    for name, dependent, requirement, on_path in startup.edges:
        label = "" if requirement == SUCCESS else f"|{requirement}|"
        lines.append(f"  {ids[name]} {'==>' if on_path else '-->'}{label} {ids[dependent]}")
    for status, (_, colour) in COLOURS.items():
        lines.append(f"  classDef {status.replace(' ', '_')} fill:{colour},color:#222")
    lines += [f"  style {ids[bar.name]} stroke:#d2641e,stroke-width:3px" for bar, _ in startup.path]
    return "\n".join(lines) + "\n"


def graph_data(graph: Graph) -> dict[str, Any]:
    """Return the graph for JSON."""
    edges = [
        {"unit_name": u.unit_name, "depends_on": d, "requirement": r} for u in graph.nodes for d, r in u.wants.items()
    ]
    return {"units": plain_units(graph.nodes, ("unit_name", "status", "reason", "running_on")), "edges": edges}


# -- why ----------------------------------------------------------------------------------------------------
def obstacles(graph: Graph) -> dict[str, dict[str, str]]:
    """Return for each unit the others that keep or kept it from starting, or made it skipped, each in words.

    These are the dependencies that do not meet their requirement or, if there are none, the units that have its locks.
    """
    statuses = {u.unit_name: u.status for u in graph.nodes}
    causes: dict[str, dict[str, str]] = {}
    for u in graph.nodes:
        unmet: list[str] = []
        if u.status == SKIPPED:
            unmet = [d for d, r in u.wants.items() if statuses[d] in HOPELESS[r]]
        elif u.status == PENDING or (u.status == FAILED and u.started is None and u.waiting is not None):
            unmet = [d for d, r in u.wants.items() if statuses[d] not in MEETS[r]]
        words = {d: f'"{d}"' + ("" if u.wants[d] == SUCCESS else f" ({u.wants[d]})") for d in unmet}
        if u.is_waiting and not unmet:
            words = {who: f'lock {lock}, which "{who}" has' for lock, who in u.blocked_by.items() if who in statuses}
        causes[u.unit_name] = words
    return causes


def is_notable(unit: UnitStatus, now: float) -> bool:
    """Return whether `why` without names mentions a unit that holds up no other."""
    if unit.status == STARTED:
        return is_gone(unit) or now - (unit.started or 0.0) >= LONG
    return unit.status in (FAILED, SKIPPED) or state_word(unit) in ("waiting", "gave up", "exited")


def why_text(graph: Graph, names: Sequence[str] = ()) -> str:
    """Say what keeps units from starting: each root cause with all units that it holds up, the longest list first.

    Without names: the root causes of all that is stuck, and what failed, gave up, has ended or runs long.
    """
    causes = obstacles(graph)
    units = {u.unit_name: u for u in graph.nodes}
    units.update({name: UnitStatus(name, NOT_REGISTERED, True) for name in names if name not in units})
    stuck = {u.unit_name: causes[u.unit_name] for u in graph.nodes if u.waiting is not None or u.status == SKIPPED}
    held_up: dict[str, list[str]] = {}  # by each unit, without others in between
    for name, found in stuck.items():
        for cause in found:
            held_up.setdefault(cause, []).append(name)
    chain = reached(names, causes.get)
    between = [units[name] for name in chain if causes.get(name)]
    roots = [units[name] for name in chain if not causes.get(name)]
    if not names:
        roots = [u for u in graph.nodes if u.unit_name in held_up or is_notable(u, graph.now)]
        roots = [u for u in roots if not stuck.get(u.unit_name)]
    groups: dict[tuple[str, ...], list[UnitStatus]] = {}  # causes that hold up the same units belong together
    for u in sorted(roots, key=lambda u: -u.age):
        groups.setdefault(tuple(held_up.get(u.unit_name, ())), []).append(u)
    parts = [([*reached(held, held_up.get)], group) for held, group in groups.items()]
    parts.sort(key=lambda part: -len(part[0]))
    texts = []
    for held, group in parts[:50]:
        lines = sentences(graph, group, causes, 5 if held else 20)
        for word, is_skipped in (("held up", False), ("skipped", True)):
            listed = [name for name in held if (units[name].status == SKIPPED) == is_skipped]
            lines += [f"    {word}: {some_names(listed)}"] if listed else []
        texts.append("\n".join(lines))
    texts += [f"({len(parts) - 50} more causes)"] if len(parts) > 50 else []
    nothing = "nothing waits, runs long or was skipped" if graph.nodes else "no units yet"
    lines = sentences(graph, between, causes, max(8, len(names)))
    return "\n".join([*lines, "\n\n".join(texts) or nothing]) + "\n"


def sentences(graph: Graph, units: Sequence[UnitStatus], causes: dict[str, dict[str, str]], most: int) -> list[str]:
    """Return a sentence on each of the first `most` units and its obstacles, and how many more units there are."""
    lines = []
    for u in units[:most]:
        if u.status != NOT_REGISTERED:
            lines.append(sentence(u, graph.now, causes[u.unit_name]) + ".")
            continue
        why = f"its want was refused: {u.refusal}" if u.refusal else "nobody has called want, start or run on it"
        wanted_by = [other.unit_name for other in graph.nodes if u.unit_name in other.wants]
        why += f"; it is wanted by {some_names(wanted_by)}" if wanted_by else ""
        known = {other.unit_name for other in graph.nodes if other.status != NOT_REGISTERED}
        guess = resembling(u.unit_name, known.difference(wanted_by))  # its name may be misspelt
        lines.append(f'"{u.unit_name}" is not registered: {why}{did_you_mean(guess, ".")}')
    return lines + ([f"({len(units) - most} more like these)"] if len(units) > most else [])


def sentence(unit: UnitStatus, now: float, causes: Mapping[str, str]) -> str:
    """Return a sentence on a registered unit and its obstacles, without a full stop."""
    name, bar, missing = f'"{unit.unit_name}"', Bar(unit, now), some_names([*causes.values()])
    reason = f": {reason_text(unit)}" if unit.reason else ""
    output = f"; its output is in {unit.log}" if unit.log else ""
    if unit.status == SKIPPED:
        return f"{name} was skipped {span(now - bar.ended)} ago" + (f" because of {missing}" if missing else reason)
    if unit.is_waiting:
        missing = missing or ", ".join(unit.waits_for) or "a place among those that may run at once"
        return f"{name} has not started: for {span(now - bar.asked)} it has been waiting for {missing}"
    if unit.status == PENDING:
        gave_up = "its start gave up, and nobody has called start again"
        why = "nobody has called start on it" if unit.waiting is None else gave_up
        why += f"; its last want was refused: {unit.refusal}" if unit.refusal else ""
        why += f"; it would have to wait for {missing}" if missing else "; it is ready"
        return f"{name} has not started: {why}"
    if not bar.has_run:
        lacked = f"; it lacked {missing}" if missing else ""
        return f"{name} {unit.status} {span(unit.age)} ago without having started{reason}{lacked}{output}"

    by, tries = owner_text(unit.owner, " by ", gone=""), len(unit.tries) + 1
    after, waited = "at once", bar.started - bar.asked
    if waited >= 0.05:
        after = f"after waiting {span(waited)}" + (f", last for {unit.released_by}" if unit.released_by else "")
    if unit.status == STARTED:
        gone = "that process is gone: it ended without complete"
        state = gone if is_gone(unit) else f"it is {reason_text(unit) or 'still running'}"
        state += f" (try {tries})" if tries > 1 else ""
        return f"{name} started {span(bar.ran)} ago{by}, {after}; {state}{output}"
    ran = span(max(0.0, now - unit.age - bar.started)) + (f" in {tries} tries" if tries > 1 else "")
    process = "; it is being stopped" if unit.stopping else "; its process runs on" if unit.running_on else ""
    if unit.status == COMPLETED and unit.exited is not None:
        process = f"; its process ended {span(now - unit.exited)} ago"
        process += f": {unit.exit_reason}" if unit.exit_reason else ""
    text = f"{name} {unit.status} {span(unit.age)} ago after running {ran}{reason}"
    return f"{text}; started{by} {after}{process}{output}"


# ----------------------------------------------------------------------------------------------------------
# Run. A unit's command: its probe, its variables for other units, its tries and deadlines; then `run` and `wait`.
# ----------------------------------------------------------------------------------------------------------

# -- probes -------------------------------------------------------------------------------------------------
TRY_TIMEOUT = 5.0  # seconds for one try over a network; a command has no limit of its own
CHECK_TIMEOUT = 1.0  # seconds for the check before the command is run
FIRST_REPORT = 3.0  # seconds until the first message that a probe has not succeeded yet
PROBE_FORMS = {  # when each succeeds
    "tcp:[HOST:]PORT": "the port accepts connections",
    "unix:PATH": "the socket accepts connections",
    "http://...": "the answer is below 400",
    "file:PATH": "it was made or changed since the command began",
    "notify": "the command says READY=1 on $NOTIFY_SOCKET, as for systemd",
    "COMMAND": "`sh -c COMMAND` exits with 0",
}
PROBES = ", ".join([*PROBE_FORMS][:4]) + ", or a command for `sh -c`"


def address_of(text: str, port: int = 0) -> tuple[str, int]:
    """Return the host and port of `[HOST:]PORT`, or of `HOST[:PORT]` if `port` is the default. No host: this machine.

    Raises UsageError.
    """
    host, _, number = text.rpartition(":")
    if port and (":" not in text or text[-1:] == "]"):
        host, number = text, str(port)
    if host[:1] == "[" and host[-1:] == "]":
        host = host[1:-1]
    is_host = host.isprintable() and not set(host) & set(" /@[]")
    is_port = number.isascii() and number.isdecimal() and 0 < int(number[:6]) < 65536
    if not is_port or not is_host or (port and not host):
        raise UsageError(f"{ascii(text)[:60]} is no address; write tcp:5432, tcp:HOST:5432 or http://HOST:PORT/PATH")
    return host, int(number)


def shown_probe(text: str) -> str:
    """Return a probe for a message: without password, and not too long."""
    text = one_line(without_password(text))
    return text if len(text) <= 100 else text[:97] + "..."


class Probe:
    """A probe in its parts. Raises UsageError if it is not valid."""

    def __init__(self, text: str) -> None:
        kind, colon, rest = text.partition(":")
        self.text, self.shown = text, shown_probe(text)
        self.kind = kind if colon and kind in ("tcp", "unix", "file", "http") else "command"
        self.address, self.path, self.header = ("", 0), rest, ""
        if "\0" in text:
            raise UsageError(f"{ascii(self.shown)[:60]} has a NUL character")
        if self.kind == "tcp":
            self.address = address_of(self.literal(rest.strip("/")))
        elif self.kind == "http" and rest[:2] == "//" and text.isprintable() and " " not in text:
            authority, _, path = rest[2:].partition("/")
            who, _, host = authority.rpartition("@")
            self.address, self.path = address_of(self.literal(host), 80), "/" + path.partition("#")[0]
            self.header = f"Host: {host}\r\n"
            if who:
                from base64 import b64encode
                from urllib.parse import unquote_to_bytes

                self.header += f"Authorization: Basic {b64encode(unquote_to_bytes(who)).decode()}\r\n"
        elif not text or (self.kind in ("unix", "file") and not self.literal(rest)):
            raise UsageError(f"{text or 'ready'}: what is to be probed is missing")
        elif self.kind == "http" or (self.kind == "command" and kind.isalnum() and (colon or kind.isdecimal())):
            hint = f"; write a command: curl -fs {self.shown}" if text.startswith("https://") else ""
            hint = hint or "; use tcp:, unix:, http://, file:, notify or a command"
            raise UsageError(f"{ascii(self.shown)[:60]} is no probe{hint}")

    def literal(self, text: str) -> str:
        """Return a part of the probe. Raises UsageError if a shell would expand it."""
        if text[:1] == "~" or set(text) & set("$`*"):
            raise UsageError(f"{ascii(self.shown)[:60]}: nothing is expanded in it; write it out, or write a command")
        return text


def connect(probe: Probe) -> Any:
    """Return a connected socket; without a host, try IPv6, then IPv4, of this machine. Raises OSError."""
    from socket import AF_UNIX, create_connection, socket

    host, port = probe.address
    if probe.kind == "unix":
        sock = socket(AF_UNIX)
        sock.settimeout(TRY_TIMEOUT)
        sock.connect(probe.path)
        return sock
    try:
        return create_connection((host or "::1", port), TRY_TIMEOUT)
    except OSError:
        if host:
            raise
    return create_connection(("127.0.0.1", port), TRY_TIMEOUT)


def http_status(sock: Any, probe: Probe) -> int:
    """Return the HTTP status of the answer, which must come within TRY_TIMEOUT in all. Raises OSError."""
    deadline, line = time.monotonic() + TRY_TIMEOUT, b""
    sock.sendall(f"GET {probe.path} HTTP/1.0\r\n{probe.header}Connection: close\r\n\r\n".encode())
    while b"\n" not in line and len(line) < 1024:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        line += sock.recv(1024) or b"\n"
    words = line.split(b"\n")[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise OSError(0, "its answer is not HTTP")
    return int(words[1][:4])


def listener(host: str, port: int) -> int:
    """Return the pid of the process that listens at a port of this machine; 0 if unknown."""
    ours = os.getpid()
    if host not in ("", "localhost", "127.0.0.1", "::1"):
        return 0
    rows = [row.split() for row in (proc_text(ours, "net/tcp") + proc_text(ours, "net/tcp6")).splitlines()]
    found = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    for pid in filter(str.isdigit, os.listdir("/proc") if found else ()):
        try:
            if any(os.readlink(entry.path) in found for entry in os.scandir(f"/proc/{pid}/fd")):
                return int(pid)
        except OSError:  # it has ended, or we may not read it
            pass
    return 0


def file_state(path: str) -> tuple[int, ...]:
    """Return values of a file that differ after any change; empty if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Prober:
    """Tries a probe until it succeeds, or `once`, in a thread of its own; `fileno` is readable afterwards.

    With `changed`, a file counts only if it has changed since. `error` says why the last try failed, and is empty if it
    succeeded. Raises OSError, RuntimeError.
    """

    def __init__(self, text: str, env: dict[bytes, bytes], once: bool = False, changed: bool = False) -> None:
        import threading

        self.error = "its first try has not ended"
        self.probe, self._env = Probe(text), env
        self._old = file_state(self.probe.path) if changed else ()
        self._peer = self._pid = 0  # pids: the listener at a Unix socket; the probe's command
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._ready, self._done = os.pipe()
        try:
            threading.Thread(target=self._run, args=(once,), daemon=True).start()
        except RuntimeError:
            os.close(self._ready)
            os.close(self._done)
            raise

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._ready

    def ready(self) -> bool:
        """Return whether a try has succeeded."""
        return not self.error

    def close(self) -> None:
        """Make no more tries, and kill the probe's command with all its processes."""
        self._closed.set()
        with self._lock:
            if self._pid:
                family = Family(self._pid, leads=True, mark="")
                family.scan(Processes)
                family.kill()
        os.close(self._ready)

    def _run(self, once: bool) -> None:
        pause = 0.1
        with open(self._done, "wb", 0):
            while not self._closed.is_set():
                self.error = self._try()
                if once or not self.error:
                    break
                self._closed.wait(pause)
                pause = min(2 * pause, 1.0)

    def listener_text(self) -> str:
        """Return the process that listens at the address, for a message; empty if unknown."""
        pid = self._peer or listener(*self.probe.address)
        return f" (pid {pid}, {proc_line(pid, 'Name:')})" if pid else ""

    def _try(self) -> str:
        """Try once; return why it failed."""
        probe = self.probe
        try:
            if probe.kind == "command":
                return self._command()
            if probe.kind == "file":
                found = file_state(probe.path)
                if found and found == self._old:
                    return "it is as it was before the command was run"
                return "" if found else "no such file"
            with connect(probe) as sock:
                if probe.kind == "unix":
                    self._peer = peer_credentials(sock)[0]
                status = http_status(sock, probe) if probe.kind == "http" else 0
            return "" if status < 400 else f"HTTP status {status}"
        except (OSError, ValueError) as error:
            return error_text(error)

    def _command(self) -> str:
        """Run the probe's command, and kill what is left of its process group; return why it failed.

        Its exit status comes through a pipe, since a Loop reaps all children.
        """
        command = ["sh", "-c", 'sh -c "$1" 3>&-; echo $? >&3; kill -9 0', "sh", self.probe.text]
        with open(null(), "rb", 0) as nothing:
            read, write = os.pipe()
            streams = [(os.POSIX_SPAWN_DUP2, nothing.fileno(), fd) for fd in (0, 1, 2)]
            streams.append((os.POSIX_SPAWN_DUP2, write, 3))
            with open(read, "rb", 0) as answer:
                with self._lock, open(write, "wb", 0):
                    if not self._closed.is_set():
                        self._pid = spawn(command, self._env, own_session=True, file_actions=streams)
                status = answer.read(16).strip()
        with self._lock:
            self._pid = 0
        if not status:
            return "it was killed"
        return "" if status == b"0" else exit_text(int(status))


class NotifySocket:
    """A Prober for `notify`: it succeeds when a process sends READY=1 to the socket at `path`, as in sd_notify(3).

    Any user may send, since a command may change its user, but the path cannot be guessed. The socket must be read
    until the command has ended: systemd-notify(1) sends a file descriptor after READY=1, and fails if it is not read.
    Raises OSError.
    """

    def __init__(self, path: str) -> None:
        from _socket import AF_UNIX, SOCK_DGRAM, socket

        if not path:
            raise OSError(errno.ENOENT, "no directory for its NOTIFY_SOCKET")
        self.error = "it has not said READY=1"
        self._path, self._sock = path, socket(AF_UNIX, SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.bind(path)
        os.chmod(path, 0o666)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._sock.fileno()

    def ready(self) -> bool:
        """Read messages, and close file descriptors in them; return whether READY=1 was ever received."""
        if not self.error:
            time.sleep(0.005)  # slow down a process that sends without end
        try:
            for _ in range(64):
                if b"READY=1" in self._sock.recv(4096).split(b"\n"):
                    self.error = ""
        except OSError:
            pass
        return not self.error

    def close(self) -> None:
        """Close and remove the socket."""
        self._sock.close()
        remove(self._path)


# -- variables for other units ------------------------------------------------------------------------------
MAX_ENV = 1 << 15  # bytes in the file that $CODER_SYNC_ENV names
NO_DIRECTORY = "$CODER_SYNC_ENV is empty: no directory for it can be written, not even /tmp or /dev/shm"


def private_directory() -> str:
    """Create a directory that others can enter but not list; return its path, empty if none can be created."""
    for parent in filter(None, (getenv("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm")):
        path = os.path.join(os.path.abspath(parent), f"coder-sync-{os.urandom(8).hex()}")
        if len(os.fsencode(path)) <= 80:  # short enough for the path of a socket in it
            try:
                os.mkdir(path)
                os.chmod(path, 0o711)
                return path
            except OSError:
                pass
    return ""


def remove_directory(path: str) -> None:
    """Remove a private directory with all that is in it."""
    try:
        os.rmdir(path)
    except OSError:
        import shutil  # a costly import

        shutil.rmtree(path, ignore_errors=True)


def exported(path: str) -> dict[str, str]:
    """Return the variables that a command has written to $CODER_SYNC_ENV. Raises Refused, without any value."""
    too_large = Refused(f"its $CODER_SYNC_ENV is larger than {MAX_ENV >> 10} KiB")
    try:
        with open(open_file(path), "rb") as file:
            data = file.read(MAX_ENV + 1) or b""
    except FileNotFoundError:  # or there is no path
        return {}
    except OSError as error:
        raise Refused(f"its $CODER_SYNC_ENV cannot be read: {error.strerror}") from None
    if len(data) > MAX_ENV:
        raise too_large
    values: dict[str, str] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            name, found, value = line.decode().partition("=")
        except UnicodeDecodeError:
            raise Refused(f"line {number} of its $CODER_SYNC_ENV is not UTF-8") from None
        if found and is_variable(name) and "\0" not in value:
            values[name] = value
        elif line:
            raise Refused(f"line {number} of its $CODER_SYNC_ENV is not NAME=VALUE")
    if len(encode(values)) > MAX_ENV:
        raise too_large
    return values


# -- a supervisor's connection to the agent ---------------------------------------------------------------------
PING_AFTER = 5.0  # seconds of silence


class Link:
    """A supervisor's connection to the agent, with a callback for the answer to each request.

    Each request gets one answer: the agent's, or, when the agent is lost, Unreachable, after `gone` was called with
    it. `notified` is called with each notification. `receive` and `keep_time` call back, but never `request`.
    The agent is lost when it has left a request unanswered for `patience()` seconds. A silent agent is pinged.
    """

    def __init__(
        self, loop: Loop, notified: Callable[..., None], gone: Callable[..., object], patience: Callable[[], float]
    ) -> None:
        self._loop, self._notified, self._gone, self._patience = loop, notified, gone, patience
        self._channel: Channel | None = None  # while there is an agent
        self.pending: dict[int, Callable[[Object], object]] = {}  # id of a request -> callback for its answer
        self._since = 0.0  # when the last message came, or the first of the pending requests was sent
        self.lost = ""  # why the agent is lost

    def open(self, channel: Channel) -> None:
        """Start to use a connection."""
        self._channel, self.lost = channel, ""
        self.pending, self._since = {}, time.monotonic()
        self._loop.watch(channel.sock.fileno(), self.receive)

    def close(self) -> None:
        """Stop using the connection."""
        if self._channel:
            self._loop.forget(self._channel.sock.fileno())
            self._channel = None

    def request(self, method: str, callback: Callable[[Object], object] = bool, **params: Any) -> None:
        """Send a request; call `callback` with the message that has its result or error."""
        number = min([0, *self.pending]) - 1  # if it cannot be sent
        if not self.pending:
            self._since = time.monotonic()
        try:
            if self._channel and not self.lost:
                number = self._channel.request(method, **params)
        except Unreachable as error:
            self.lost = str(error)
        self.pending[number] = callback

    def receive(self) -> None:
        """Handle the messages that have arrived."""
        try:
            while self._channel and (message := self._channel.receive(0)) is not None:
                self._since = time.monotonic()
                if "method" in message:
                    self._notified(str(message["method"]), self._channel.as_result(message.get("params")))
                elif message.get("id") in self.pending:
                    self.pending.pop(message["id"])(message)
        except Unreachable as error:
            self.lost = str(error)

    def keep_time(self, now: float) -> float:
        """Handle messages; ping a silent agent, or count it as lost. Return when to call this again."""
        self.receive()
        if self._channel and now >= self._due():
            if self.pending:
                self.lost = self.lost or self._channel.silence(self._patience())
            else:
                self.request("ping")
        if self.lost:
            error = Unreachable(self.lost)
            if self._channel:
                self.close()
                self._gone(error)
            while self.pending:
                self.pending.pop(next(iter(self.pending)))(error_message(None, error))
        return self._due()

    def _due(self) -> float:
        if not self._channel:
            return NEVER
        patience = self._patience()
        return self._since + (patience if self.pending else min(PING_AFTER, patience))


# -- a unit's command -------------------------------------------------------------------------------------------
LONGEST_DELAY = 30.0  # seconds between two tries, unless a longer one was asked for
CHECK_EVERY = 5.0  # seconds between two checks for processes that a successful command has left
CHECK_OFTEN = 0.05  # seconds between two checks for processes that are being ended
ERROR_EVERY = 1.0  # seconds between two reports of a probe's error to the agent
LAST_WAIT = 2.0  # seconds after KILL until a process counts as one that cannot be killed

WAITING = "waiting"  # for its first try, or the next one
CHECKING = "checking"  # whether the probe succeeds already, before the command is run
RUNNING = "running"
SETTLED = "settled"  # the unit has its outcome; the command, or a process that it has left, runs on
ENDING = "ending"  # its processes are being ended
GONE = "gone"  # none of its processes is left, and there will be no further try
FOLLOW = {  # state -> states that may follow it
    WAITING: (WAITING, CHECKING, RUNNING, GONE),
    CHECKING: (WAITING, RUNNING, GONE),
    RUNNING: (SETTLED, ENDING),
    SETTLED: (ENDING, GONE),
    ENDING: (WAITING, GONE),
    GONE: (),
}


class Limits(Record):
    """How a command is run. Times are in seconds, 0 for no limit."""

    ready: str = ""  # the probe
    ready_timeout: float = 300.0
    timeout: float = 0.0
    retries: int = 0
    delay: float = 1.0  # before the next try; it doubles


class Task:
    """A unit's command: its tries, its probe, its deadlines, its end, and the reports about it. Base of Run and Job.

    `due` has the actions of the present state, and their times; another state has another `due`. After `begin`, the
    Loop calls `probed` and `process_ended`, and the subclass calls `keep_time`. The outcome is reported once.
    """

    own_session = False  # whether the command gets a session of its own
    grace = 8.0  # seconds from TERM to KILL

    def __init__(self, loop: Loop, link: Link, unit: str, command: list[str], limits: Limits) -> None:
        self.loop, self.link, self.unit, self.command, self.limits = loop, link, unit, command, limits
        self.command_text = self.log = ""  # for the agent; `log` is the path of its output
        self.env: dict[bytes, bytes] = {}
        self.env_path = self.notify_path = ""  # its $CODER_SYNC_ENV and $NOTIFY_SOCKET
        self.state, self.due = WAITING, {}  # type: tuple[str, dict[Callable[[], None], float]]
        self.family = Family(0, False, "")  # the processes of the latest try
        self.code = 0  # exit status of its first process, -N for signal N
        self.status = 0  # exit status for `run` instead of `code`, unless 0
        self.tries, self.began = 0, 0.0  # how many tries, and when the latest one began
        self.prober: Prober | NotifySocket | None = None
        self.reported_error = ""  # of the probe, as the agent knows it
        self.why = ""  # why the latest try failed, or was ended
        self.kill_at = 0.0  # when to send KILL, in state ENDING
        self.give_up_at = NEVER  # when to go on although KILL, which was sent, has not ended all
        self.stopped = ""  # why there will be no further try
        self.reported = ""  # the outcome of the unit, COMPLETED or FAILED, that we or others have reported
        self.runs_on = False  # whether the unit has its outcome, and the agent waits for `exited`

    def use_directory(self, path: str) -> None:
        """Choose paths in a private directory that cannot be guessed; empty ones without a directory."""
        self.env_path, self.notify_path = (path and os.path.join(path, os.urandom(8).hex()) for _ in range(2))

    # -- hooks for subclasses

    def spawn(self, env: dict[bytes, bytes]) -> int:
        """Start the process; return its pid. Raises OSError or ValueError."""
        return spawn(self.command, env)

    def begun(self, detail: str) -> None:
        """Report the process of a new try; `detail` says which try it is and why, unless it is the first."""
        ready = shown_probe(self.limits.ready)
        self.report("owner", pid=self.family.pid, command=self.command_text, log=self.log, ready=ready)
        if detail:
            self.report("retry", detail=detail)

    def announce_retry(self, detail: str, delay: float) -> None:
        """Print that there will be a further try."""

    def warn(self, text: str) -> None:
        """Print a warning."""
        put(f"warning: {self.unit}: {text}\n", 2)

    def not_reported(self, method: str, params: Object, error: SyncError) -> None:
        """Handle an error as the answer to a report."""

    def others_run(self) -> bool:
        """Return whether other commands of ours run, and not as services, which may never end."""
        return False

    # -- life cycle

    def enter(self, state: str, due: dict[Callable[[], None], float]) -> None:
        """Change the state and the actions that are due."""
        if state not in FOLLOW[self.state]:
            raise RuntimeError(f"{self.unit}: from {self.state} to {state}")
        self.state, self.due = state, due
        if state in (WAITING, GONE):
            self.close_prober()

    def lives(self) -> bool:
        """Return whether a process of the command may run."""
        return self.state in (RUNNING, SETTLED, ENDING)

    def keep_time(self, now: float) -> None:
        """Call the actions that are due."""
        for action in [action for action, when in self.due.items() if now >= when]:
            if self.due.get(action, NEVER) <= now:  # unless an earlier action has changed that
                del self.due[action]
                action()

    def next_due(self) -> float:
        """Return when the next action is due."""
        return min(self.due.values(), default=NEVER)

    def begin(self) -> None:
        """Begin a try: check that the probe does not succeed yet, then run the command."""
        remove(self.env_path)
        if self.limits.ready in ("", "notify") or self.limits.ready.startswith("file:"):
            self.run()
            return
        self.enter(CHECKING, {self.checked: time.monotonic() + CHECK_TIMEOUT})
        try:
            self.probe(once=True)
        except CommandError as error:
            self.not_begun(error)

    def checked(self) -> None:
        """Run the command, unless another process answers the probe already."""
        prober = self.prober
        self.close_prober()
        if isinstance(prober, Prober) and prober.ready():
            shown = prober.probe.shown
            if prober.probe.kind != "command":
                answers = f"{shown} answers already, before the command was run"
                self.not_begun(CommandError(f"{answers}: end what listens there{prober.listener_text()} first", 125))
                return
            self.warn(f"{shown} succeeds already, before the command is run: it says nothing about it")
        self.run()

    def run(self) -> None:
        """Run the command and begin to probe it."""
        detail = self.retry_text() if self.tries else ""
        try:
            if self.limits.ready:
                self.probe()
            pid = self.spawn(self.environment())
        except (CommandError, OSError, ValueError) as error:
            self.not_begun(error)
            return
        self.loop.children[pid] = self.process_ended
        self.family = Family(pid, self.own_session, self.env_path)
        self.why, self.reported_error, self.began = "", "", time.monotonic()
        self.tries += 1
        due = {self.time_is_up: self.limits.timeout or NEVER}
        if self.prober:
            due.update({self.not_ready: self.limits.ready_timeout or NEVER, self.report_error: ERROR_EVERY})
        self.enter(RUNNING, {action: self.began + seconds for action, seconds in due.items()})
        self.begun(detail)

    def environment(self) -> dict[bytes, bytes]:
        """Return the environment of the command."""
        added = {"CODER_SYNC_UNIT": self.unit, "CODER_SYNC_ENV": self.env_path}  # not those of a unit that we are in
        if self.limits.ready == "notify":
            added["NOTIFY_SOCKET"] = self.notify_path
        return environment(self.env, **added)

    def not_begun(self, error: Exception) -> None:
        """Begin again soon if resources are short and others of ours will free some; else the try has failed."""
        wrong = error if isinstance(error, CommandError) else cannot_run(self.command[0], error)
        cause = error.__cause__ or error
        self.why, self.code = str(wrong), wrong.exit_code
        short = isinstance(cause, RuntimeError) or getattr(cause, "errno", 0) in NO_ROOM
        if short and self.others_run():
            self.enter(WAITING, {self.begin: time.monotonic() + CHECK_OFTEN})
        else:
            self.tries += 1
            self.try_failed()

    def probe(self, once: bool = False) -> None:
        """Begin to probe; `once` is for the check before the command is run. Raises CommandError."""
        try:
            if self.limits.ready == "notify":
                self.prober = NotifySocket(self.notify_path)
            else:
                self.prober = Prober(self.limits.ready, self.environment(), once, changed=not once)
        except (OSError, RuntimeError) as error:  # no descriptor, thread or directory
            raise CommandError(f"cannot be probed: {error_text(error)}", 125) from error
        self.loop.watch(self.prober.fileno(), self.checked if once else self.probed)

    def probed(self) -> None:
        """Report that the unit has completed, if its probe has succeeded."""
        if self.prober and self.prober.ready() and self.state == RUNNING:
            self.complete()

    def close_prober(self, ended: bool = True) -> None:
        """Stop probing; a notify socket is read until the command has `ended`."""
        if self.prober and (ended or isinstance(self.prober, Prober)):
            self.loop.forget(self.prober.fileno())
            self.prober.close()
            self.prober = None

    def report_error(self) -> None:
        """Report the error of the probe, if it has changed."""
        self.due[self.report_error] = time.monotonic() + ERROR_EVERY
        if self.probe_error() not in ("", self.reported_error):
            self.reported_error = self.probe_error()
            self.link.request("probing", unit=self.unit, error=self.reported_error)

    def probe_error(self) -> str:
        """Return why the last try of the probe failed; empty if it succeeded, or nothing is probed."""
        return self.prober.error if self.prober else ""

    def not_ready(self) -> None:
        """End the command, which is not ready in time."""
        self.status = TimedOut.exit_code
        probe = f"{shown_probe(self.limits.ready)} ({self.probe_error()})"
        self.end(f"not ready after {span(self.limits.ready_timeout)}: {probe}")

    def time_is_up(self) -> None:
        """End the command, which takes too long."""
        self.end(f"timed out after {span(self.limits.timeout)}")

    def process_ended(self, code: int) -> None:
        """Handle the end of the first process; its exit status is -N for signal N."""
        self.family.first_alive, self.code = False, code
        self.probed()  # it may have become ready just before
        if self.state == ENDING:
            self.due = dict.fromkeys(self.due, 0.0)
        elif self.state == RUNNING and self.limits.ready:
            to_background = code == 0 and self.limits.ready != "notify"
            hint = ": keep it in the foreground, or call `wait --ready` in it" if to_background else ""
            self.end(f"ended before it was ready ({exit_text(code)}){hint}")
        elif code or self.reported == FAILED:
            self.end(exit_text(code))
        elif self.state == RUNNING:
            self.complete()
            self.due.pop(self.time_is_up, None)
        if self.state == SETTLED and not self.own_session and not self.limits.ready:
            self.due[self.gone] = 0.0  # `run` without a probe does not wait for what its command has left
        elif self.state == SETTLED:
            self.due[self.check_left] = 0.0 if self.runs_on else time.monotonic() + CHECK_EVERY

    def end(self, why: str, deadline: float = NEVER) -> None:
        """End all processes of the command until the deadline, which is at most `grace` seconds from now.

        The first process gets TERM; the others get it when that has ended, or after half of the time, since servers
        end their workers themselves. KILL follows at the deadline. A second call can only bring it nearer.
        """
        now = time.monotonic()
        deadline = min(max(deadline, now), now + self.grace)
        if self.state == ENDING:
            self.kill_at = min(self.kill_at, deadline)
            return
        self.why, self.kill_at, self.give_up_at = why, deadline, NEVER
        others_at = (now + deadline) / 2 if self.family.first_alive else now
        self.enter(ENDING, {self.terminate_others: others_at, self.check_left: now})
        self.close_prober(ended=False)
        self.family.scan(self.loop.processes)  # while parents live, by which their children are found
        self.family.terminate_first()

    def terminate_others(self) -> None:
        """Send TERM to all processes but the first."""
        self.family.scan(self.loop.processes)
        self.family.terminate_others()

    def check_left(self) -> None:
        """Check whether a process is left, and go on accordingly."""
        now = time.monotonic()
        if not self.family.scan(self.loop.processes):
            self.gone()
        elif self.state == ENDING and now >= self.give_up_at:
            left = [f"{pid} ({command_of(pid)})" for pid in self.family.pids()]
            self.why += f"; cannot be killed: {some_names(left)}" if left else "; what is left of it cannot be seen"
            self.gone()
        elif self.state == ENDING:
            self.due[self.check_left] = now + CHECK_OFTEN
            if now >= self.kill_at:
                self.give_up_at = min(self.give_up_at, now + LAST_WAIT)
                self.family.kill()
        elif not self.family.first_alive:
            self.due[self.check_left] = now + CHECK_EVERY
            if not self.runs_on:
                self.runs_on = True
                self.report("running")

    def gone(self) -> None:
        """Handle the end of the last process of a try."""
        if not self.reported:
            self.try_failed()
            return
        self.enter(GONE, {})
        if self.runs_on:
            self.exited()

    def exited(self) -> None:
        """Report that the command has ended, after the outcome of the unit."""
        code = shell_status(self.code) or (143 if self.why else 0)
        self.report("exited", reason=self.why, code=code, stopped=bool(self.stopped and self.why))

    def try_failed(self) -> None:
        """Prepare the next try, or report that the unit has failed."""
        if self.tries <= self.limits.retries and not self.stopped:
            delay = self.limits.delay * 2.0 ** min(self.tries - 1, 32)
            delay = min(delay, max(self.limits.delay, LONGEST_DELAY))
            self.status = 0
            self.enter(WAITING, {self.begin: time.monotonic() + delay})
            self.announce_retry(self.retry_text(), delay)
        else:
            self.enter(GONE, {})
            self.fail(self.why)

    def retry_text(self) -> str:
        """Return which try is next, and why."""
        return f"try {self.tries + 1} of {self.limits.retries + 1} after {self.why}"

    def stop(self, why: str, deadline: float = NEVER) -> None:
        """End the command until the deadline; there will be no further try."""
        self.stopped = why
        if self.state in (WAITING, CHECKING):
            self.enter(GONE, {})
        if self.state != GONE:
            self.end(why, deadline)
        elif not self.reported:
            self.fail(why)

    # -- reports

    def complete(self) -> None:
        """Report that the unit has completed, with its variables for other units."""
        try:
            env = exported(self.env_path)
        except Refused as error:
            self.end(str(error))
            return
        runs_on = self.family.first_alive or self.family.has_group() or self.code != 0
        self.settle(COMPLETED, runs_on)
        self.report("complete", env=env, running=runs_on)

    def fail(self, reason: str) -> None:
        """Report that the unit has failed, and that nothing of its command is left."""
        self.reported = FAILED
        self.report("fail", reason=reason, exit_code=shell_status(self.code))

    def ended_by_others(self, outcome: str) -> None:
        """Handle an outcome that somebody else has reported."""
        if outcome == COMPLETED and self.lives():
            self.report("running")
        self.settle(outcome, runs_on=self.state != WAITING or bool(self.due))  # unless it has not begun

    def settle(self, outcome: str, runs_on: bool) -> None:
        """Note the outcome. A command whose unit has failed gets `grace` seconds to tidy up."""
        self.reported, self.runs_on = outcome, runs_on
        if self.state in (WAITING, CHECKING):
            self.why = ""
            self.gone()
        elif self.state == RUNNING:
            end_by = self.due[self.time_is_up]
            if outcome == FAILED:
                end_by = min(end_by, time.monotonic() + self.grace)
            self.enter(SETTLED, {self.time_is_up: end_by})
            self.close_prober(ended=False)

    def report(self, method: str, **params: Any) -> None:
        """Send a report to the agent."""
        self.link.request(method, lambda message: self.answered(method, params, message), unit=self.unit, **params)

    def answered(self, method: str, params: Object, message: Object) -> None:
        """Handle the answer to a report. If the unit may not complete, end the command, and report a failure."""
        try:
            unwrap(message)
        except SyncError as error:
            may_fail = self.lives() or self.own_session  # if the command of `run` has ended, its exit status counts
            if method == "complete" and may_fail and not isinstance(error, Unreachable):
                if self.reported == COMPLETED:
                    self.reported = ""
                self.stop(str(error))
            else:
                self.not_reported(method, params, error)


# -- the commands -------------------------------------------------------------------------------------------
@Command(
    "run pip-install --want git-clone -- pip install -r requirements.txt",
    *STARTING,
    Argument("--ready", default=None, metavar="PROBE", help=f"complete UNIT when PROBE succeeds: notify, {PROBES}"),
    Argument("--ready-timeout", type=duration, default=None, metavar="DURATION", help="limit for PROBE (default: 5m)"),
    Argument("--retry", type=number, default="0", metavar="N", help="run COMMAND again, N times, if it fails"),
    Argument("--retry-delay", type=duration, default=None, metavar="DURATION", help="doubles each time (default: 1s)"),
    flag("--optional", help="run COMMAND even if there is no agent"),
    QUIET,
    tail="+",
)
def cmd_run(args: Args) -> int:
    """Start UNIT, run COMMAND, complete UNIT or fail it, in one process."""
    report = Reporter(f"{args.unit}: ", args.quiet, 2)
    if args.ready is not None:
        Probe(args.ready)
    if args.ready_timeout is not None and args.ready is None:
        raise UsageError("run: --ready-timeout without --ready")
    if args.retry_delay is not None and not args.retry:
        raise UsageError("run: --retry-delay without --retry")
    try:
        start = start_unit(args, report, hold=True, supervisor=True)
    except Unreachable as error:
        if not args.optional:
            raise
        put(f"warning: {args.unit}: runs without coordination: {error}\n", 2)
        path = os.path.abspath(agent_path(args.socket_path))
        env = environment(CODER_SYNC_UNIT=args.unit, CODER_AGENT_SOCKET_PATH=path)
        return supervise(Loop(), args.command, env)
    if report.waited:
        say(f"{args.unit}: {report.started(start.result)}", 2, args.quiet)
    with start.channel:
        return Run(args, start).to_its_end()


class Run(Task):
    """The command of `run`, in the foreground; reports go over the connection that holds the unit."""

    def __init__(self, args: Args, start: Start) -> None:
        loop = Loop()
        link = Link(loop, self.notified, bool, self.patience)
        times = {"ready_timeout": args.ready_timeout, "delay": args.retry_delay}
        given = {name: seconds for name, seconds in times.items() if seconds is not None}
        limits = Limits(args.ready or "", retries=args.retry, **given)
        super().__init__(loop, link, args.unit, args.command, limits)
        link.open(start.channel)
        path = os.path.abspath(start.channel.path)
        self.env = environment(**{"CODER_AGENT_SOCKET_PATH": path, **start.environment})
        self.command_text = command_text(args.command)
        self.quiet = args.quiet
        self.directory = private_directory()
        self.use_directory(self.directory)
        if not self.directory:
            self.warn(NO_DIRECTORY)

    def to_its_end(self) -> int:
        """Run the command, with its retries; return its exit status once the agent has answered all reports."""
        try:
            self.begin()
            while True:
                now = time.monotonic()
                self.keep_time(now)
                due = self.link.keep_time(now)
                if self.state == GONE and not self.link.pending:
                    return self.status or shell_status(self.code) or int(self.reported == FAILED)
                for number in self.loop.turn(min(due, self.next_due())):
                    self.signalled(number)
        finally:
            remove(self.env_path)
            remove_directory(self.directory)

    def patience(self) -> float:
        """Return for how many seconds the agent may leave a report unanswered."""
        if self.state != GONE:
            return NEVER
        return STOPPED_TIMEOUT if self.stopped else REPLY_TIMEOUT

    def signalled(self, number: int) -> None:
        """Pass a signal on to the command, unless a key has sent it there, too; there will be no further try."""
        self.stopped = "stopped"
        if self.state in (WAITING, CHECKING, GONE):
            self.status = 128 + number
            self.stop(f"stopped between two tries; {self.why}" if self.tries else "stopped")
        elif self.family.first_alive:
            self.family.scan(self.loop.processes)  # as in `end`
            if not sent_by_key(number):
                signal_to(self.family.pid, number)
        elif self.state == SETTLED:  # only what a service has left
            self.status = 128 + number
            self.end("stopped")
        else:  # that is being ended: do it at once
            self.end("", deadline=0.0)

    def notified(self, method: str, params: Result) -> None:
        """Handle a notification: stop, or go on as a service, since others have completed the unit."""
        if method == "stop" and params.unit == self.unit:
            self.stop("stopped", time.monotonic() + params.grace)
        elif method == "unit" and params.status == COMPLETED and not self.reported:
            self.ended_by_others(COMPLETED)

    def begun(self, detail: str) -> None:
        super().begun(detail)
        if self.prober:
            self.due[self.say_not_ready] = self.began + FIRST_REPORT

    def say_not_ready(self) -> None:
        """Print why the command is not ready yet."""
        now = time.monotonic()
        self.due[self.say_not_ready] = now + REPORT_EVERY
        probe = f"{shown_probe(self.limits.ready)} ({self.probe_error()})"
        say(f"{self.unit}: not ready after {span(now - self.began)}: {probe}", 2, self.quiet)

    def announce_retry(self, detail: str, delay: float) -> None:
        put(f"{self.unit}: {detail}, in {delay:g}s\n", 2)

    def fail(self, reason: str) -> None:
        if reason != exit_text(self.code):  # else the exit status says it
            put(f"error: {self.unit}: {reason}\n", 2)
        super().fail(reason)

    def not_reported(self, method: str, params: Object, error: SyncError) -> None:
        outcome = f"its outcome (exit code {params.get('exit_code', 0)})"
        others = {"owner": "what says that it is ready", "exited": "its end"}
        if method != "owner" or self.limits.ready:
            self.warn(f"{params.get('detail') or others.get(method, outcome)} may not have been reported: {error}")


@Command(
    "wait pip-install --ready tcp:5432 --timeout 2m",
    Argument("units", nargs="*", metavar="UNIT", help="names of the units"),
    Argument("--ready", action="append", metavar="PROBE", help=f"wait for it as well: {PROBES}"),
    REQUIRES,
    TIMEOUT,
    QUIET,
)
def cmd_wait(args: Args) -> int:
    """Wait for units without being one, and for what is to be ready."""
    if not args.units and not args.ready:
        raise UsageError("wait: name a unit, or what is to be --ready")
    for probe in args.ready:
        Probe(probe)
        if probe == "notify":
            raise UsageError("wait: --ready notify is for `run`: it is the command of a unit that says so")
    began, report = time.monotonic(), Reporter("", args.quiet)
    if args.units:
        make_client(args).wait(*args.units, requires=args.requires, timeout=args.timeout, on_wait=report)
    code = probe_all(args.ready, began, began + (args.timeout or NEVER), args.quiet) if args.ready else 0
    if not code:
        took = time.monotonic() - began
        waited = f" after {span(took)}" if report.waited or took >= 0.1 else ""
        say(f"{some_names([*args.units, *map(shown_probe, args.ready)])}: done{waited}", quiet=args.quiet)
    return code


def probe_all(probes: list[str], began: float, end: float, quiet: bool) -> int:
    """Try probes until all have succeeded, a signal has come, or it is `end`; return the exit status."""
    from functools import partial

    loop, report_at = Loop((*STOPS, signal.SIGQUIT)), began + FIRST_REPORT
    probers: list[Prober] = []
    try:
        for probe in probes:
            probers.append(Prober(probe, environment()))
            fd = probers[-1].fileno()
            loop.watch(fd, partial(loop.forget, fd))
        while errors := {shown_probe(text): prober.error for text, prober in zip(probes, probers) if prober.error}:
            now = time.monotonic()
            if now >= end:
                rows = "".join(f"  {probe}: {error}\n" for probe, error in errors.items())
                put(f"timeout waiting for {some_names([*errors])}\n{rows}", 2)
                return TimedOut.exit_code
            if now >= report_at:
                report_at = now + REPORT_EVERY
                text = "; ".join(f"{probe} ({error})" for probe, error in errors.items())
                say(f"still waiting after {span(now - began)} for {text}", quiet=quiet)
            for number in loop.turn(min(end, report_at)):
                return 128 + number
        return 0
    finally:  # commands of probes do not outlive us
        for prober in probers:
            prober.close()
        loop.restore_signals()


# ----------------------------------------------------------------------------------------------------------
# Boot. A directory of scripts as one graph: all headers are read and checked, then one request claims all units at the
# agent, which says when each script may start.
#
# A boot is two processes. The front is the one that was called: it keeps the terminal and descriptors of its caller,
# and becomes or runs COMMAND. The background process leads a session of its own and is the parent of all scripts: one
# thread with one poll handles the agent, output, ends of processes, probes, signals and deadlines. A socket pair
# connects the two, so that each sees at once that the other has ended.
#
# A script has ended when its processes have, not when its output ends, since a daemon may keep that open. While our own
# output is not taken, the scripts have to wait; after the startup their output is dropped instead.
# ----------------------------------------------------------------------------------------------------------

HEADER_LINES = 50  # searched for headers, also below code; more if all of them are comments
LAST_LINES = 10  # of a unit that has failed, shown in the summary
LONGEST_LINE = 8192  # an incomplete line that is longer is printed at once
FULL = 1 << 18  # bytes of pending output
MARKS = ("#", "//", "--", ";")
# Endings of files that are not run: copies, scripts taken out of use, and what package managers leave.
NOT_RUN = (".bak", ".orig", ".rej", ".swp", ".old", ".save", ".disabled", ".disable", ".off")
PACKAGED = (".dpkg-", ".ucf-", ".rpm")
HEADERS = {  # word -> what follows it, and what it means
    "unit": ("NAME", "another name than the file's (that is without a leading NN- or NN_, and ending)"),
    "want": ("NAME... [--requires REQUIREMENT]", "run after these: success (the default), completion or start"),
    "after": ("NAME...", "run after these, however they end, if they are part of this boot"),
    "before": ("NAME...", "as if these, if they are part of this boot, wanted this one"),
    "extern": ("NAME...", "these names are registered by somebody else"),
    "lock": ("NAME...", "only one unit that holds this lock runs at a time"),
    "timeout": ("DURATION", "end a script that runs longer, a service too; the unit has failed"),
    "ready": ("PROBE", "a service: the unit completes when PROBE succeeds, and the script runs on"),
    "ready-timeout": ("DURATION", "how long that may take (5m); then the script is ended and has failed"),
    "retry": ("N [DELAY]", "try up to N times more, after DELAY (1s), doubled each time up to 30s"),
}


class Edge(Record):
    """A dependency of a script, and the file and line of its header."""

    dependency: str
    requires: str
    place: str


class Script(Record):
    """A file that `boot` runs, and the contents of its headers."""

    path: str
    unit: str
    place: str  # file and line of the unit's name
    limits: Limits
    want: list[Edge]
    after: list[Edge]
    before: list[Edge]
    extern: list[str]
    lock: list[str]


def warn(text: str) -> None:
    """Print a warning about a file."""
    say(f"warning: {printable(text)}", 2)


def read_script(path: str, text: bytes, mistakes: list[str]) -> Script:
    """Return a script from the start of its file; append each mistake with file and line."""
    script = Script(path, unit_of(os.path.basename(path)), f"{path}:1", Limits(), [], [], [], [], [])
    seen: dict[str, int] = {}  # the line of each header that is allowed once
    lines = text.decode(errors="replace").splitlines()
    code = (number for number, line in enumerate(lines) if line.strip() and not line.strip().startswith(MARKS))
    last = max(HEADER_LINES, next(code, len(lines)))
    for number, line in enumerate(lines[:last], 1):
        mark, found, rest = line.partition("coder-sync:")
        try:
            if found and mark.strip() in MARKS:
                read_header(script, rest.strip(), number, seen)
            elif looks_like_header(line):
                raise UsageError("not understood; a header is written `# coder-sync: WORD ...`")
        except SyncError as error:
            mistakes.append(f"{path}:{number}: {error}")
    for number, line in enumerate(lines[last:], last + 1):
        if looks_like_header(line):
            warn(f"{path}:{number}: not read as a header: too far down; move it up")
    if "ready-timeout" in seen and "ready" not in seen:
        mistakes.append(f"{path}:{seen['ready-timeout']}: ready-timeout without ready")
    try:
        check_name(script.unit)
    except Refused as error:
        mistakes.append(f"{script.place}: {error}; rename the file, or add: unit NAME")
    return script


def unit_of(name: str) -> str:
    """Return the unit name for a file name: without a leading number, and without the ending."""
    digits = len(name) - len(name.lstrip("0123456789"))
    if digits and name[digits : digits + 1] in ("-", "_"):
        name = name[digits + 1 :]
    return name.rpartition(".")[0] or name


def looks_like_header(line: str) -> bool:
    """Return whether a line seems to be meant as a header, perhaps a misspelt one."""
    words = line.strip().lstrip("#/-; ").lower().replace(":", " ").split()
    if not line.strip().startswith(MARKS) or len(words) < 2 or words[1] not in HEADERS:
        return False
    return words[0] == "coder-sync" or resembling(words[0], ["coder-sync"]) != ""


def read_header(script: Script, text: str, line: int, seen: dict[str, int]) -> None:
    """Add the contents of a header to its script. Raises UsageError, Refused."""
    word = "".join(text.split()[:1])
    if word not in HEADERS:
        known = ", ".join(f"{name} {form}" for name, (form, _) in HEADERS.items())
        raise UsageError(f'"{shown_probe(text)}" is not a header; use {known}')
    form, rest = HEADERS[word][0], text[len(word) :].strip()
    if word == "want":
        rest = rest.replace("--requires=", "--requires ")
    words = rest.split()
    if word == "ready":  # a shell splits it
        words = [rest]
    elif set(rest) & set("\"'\\"):
        import shlex

        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise UsageError(f"{word}: {error}") from None
    if not words:
        raise UsageError(f"{word}: {'a name' if 'NAME' in form else 'its value'} is missing")
    if "..." in form:
        read_names(script, word, words, f"{script.path}:{line}")
        return
    if len(words) > len(form.split()):
        hint = '; a name with a blank needs quotes: unit "a b"' if word == "unit" else ""
        raise UsageError(f"{word}: too many words; write {word} {form}{hint}")
    if seen.setdefault(word, line) != line:
        raise UsageError(f"{word}: line {seen[word]} says so already")
    if word == "unit":
        script.unit, script.place = check_name(words[0]), f"{script.path}:{line}"
    elif word == "ready":
        script.limits.ready = Probe(rest).text
    elif word == "retry":
        if not words[0].isdecimal():
            raise UsageError(f"retry: invalid number of retries: {ascii(words[0])[:20]}; write 3, or 3 10s")
        script.limits.retries = number(words[0])
        script.limits.delay = duration(words[1]) if words[1:] else script.limits.delay
    else:
        setattr(script.limits, word.replace("-", "_"), duration(words[0]))


def read_names(script: Script, word: str, names: list[str], place: str) -> None:
    """Add the names in a header to its script. Raises UsageError, Refused."""
    requires: str = COMPLETION if word == "after" else SUCCESS
    if word == "want" and "--requires" in names:
        at = names.index("--requires")
        requires = check_requirement("".join(names[at + 1 : at + 2]))
        del names[at : at + 2]
    if not names:
        raise UsageError(f"{word}: a name is missing")
    for name in names:
        if name[:1] == "-" or name[-1:] == ",":
            known = "an option (only want has one, --requires)"
            raise UsageError(f'"{name}" is neither {known} nor a name; blanks separate names')
        check_name(name)
    edges = [Edge(name, requires, place) for name in names]
    getattr(script, word).extend(names if word in ("extern", "lock") else edges)


def check_program(path: str, text: bytes) -> str:
    """Return why a file cannot be run; an empty text if it can. Raises OSError."""
    first = text.split(b"\n", 1)[0].split(b"\0", 1)[0].decode(errors="replace")  # the system stops at a NUL, too
    program, *words = first[2:].split() or [""]
    if not os.access(path, os.X_OK):
        import shlex

        noexec = os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0)
        hint = ": its file system is mounted noexec" if noexec else f"; chmod +x {shlex.quote(path)}"
        return f"not executable{hint}"
    if text.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it begins with a byte-order mark; save it as UTF-8 without one"
    if not first.startswith("#!"):
        return "" if b"\0" in text[:512] else "no interpreter: the first line must be #! and a program, as in #!/bin/sh"
    if first.endswith("\r"):
        return "its first line ends in a carriage return; save it with Unix line ends"
    if os.path.basename(program) != "env":
        good = os.path.isfile(program) and os.access(program, os.X_OK)
        return "" if good else f"its interpreter {program} does not exist or cannot be run"
    import shutil

    program = "".join(words[1:2] if words[:1] == ["-S"] else words[:1])
    for_env = program[:1] == "-" or "=" in program  # env(1) prints an error of its own
    return "" if for_env or shutil.which(program) else f"its interpreter {program} is not in PATH"


def plan(paths: Sequence[str], may_be_empty: bool = False) -> list[Script]:
    """Read and check all scripts, and return them. Raises UsageError with all mistakes, one a line."""
    mistakes: list[str] = []
    left_out: dict[str, str] = {}  # unit -> why the file that would provide it is not run
    scripts = [script for path in paths for script in scripts_at(path, mistakes, left_out)]
    by_name: dict[str, Script] = {}
    for script in scripts:
        other = by_name.setdefault(script.unit, script)
        if other is not script:
            mistakes.append(f'{script.place}: unit "{script.unit}" is {other.place} already')
    externs = {name for script in scripts for name in script.extern}
    for edge in (edge for script in scripts for edge in script.want):
        name = edge.dependency
        if name not in by_name and name not in externs:
            import shlex

            outside = f"; if it comes from outside, add: extern {shlex.quote(name)}"
            guess = unit_of(name) if unit_of(name) in by_name else resembling(name, list(by_name))
            hint = f"; {left_out[name]}" if name in left_out else did_you_mean(guess, outside)
            mistakes.append(f'{edge.place}: no file provides "{name}"{hint}')
    implied = [(e.dependency, Edge(script.unit, SUCCESS, e.place)) for script in scripts for e in script.before]
    implied += [(script.unit, edge) for script in scripts for edge in script.after]
    for unit, edge in implied:
        missing = next((name for name in (unit, edge.dependency) if name not in by_name), "")
        if missing:
            hint = did_you_mean(resembling(missing, list(by_name)))
            if hint:
                warn(f'{edge.place}: no file provides "{missing}"{hint}')
        elif edge.dependency not in [own.dependency for own in by_name[unit].want]:
            by_name[unit].want.append(edge)
    check_edges(scripts, mistakes)
    if not scripts and not mistakes and not may_be_empty:
        mistakes.append(f"{' '.join(paths)}: no executable files")
    if mistakes:
        raise UsageError("\n".join(map(printable, mistakes)))
    return scripts


def scripts_at(given: str, mistakes: list[str], left_out: dict[str, str]) -> Iterator[Script]:
    """Iterate over the scripts of a directory, or the one at a path; add to `mistakes` and `left_out`."""
    try:
        files = [os.path.join(given, name) for name in sorted(os.listdir(given)) if name[0] not in ".#"]
        files = [path for path in files if path[-1] != "~" and os.path.isfile(path)]
    except NotADirectoryError:
        files = [given]
    except OSError as error:
        mistakes.append(f"{given or repr('')}: cannot be read: {error.strerror}")
        return
    for path in files:
        name, ending = os.path.splitext(os.path.basename(path))
        if path != given and (ending in NOT_RUN or ending.startswith(PACKAGED)):
            left_out[unit_of(name)] = f"{path} would, but {ending} is not run"
            continue
        try:
            with open(open_file(path), "rb") as f:
                text = f.read(65536) or b""
            if not os.path.isfile(path):
                raise OSError(0, "it is no file")
            problem = check_program(path, text)
        except OSError as error:
            mistakes.append(f"{path}: cannot be read: {error.strerror}")
            continue
        if path != given and not os.access(path, os.X_OK) and b"coder-sync:" not in text:
            left_out[unit_of(name + ending)] = f"{path} would, but is not executable"
            if text.startswith(b"#!"):
                warn(f"{path}: not run: {problem}")
            continue
        if problem:
            mistakes.append(f"{os.path.abspath(path)}:1: {problem}")
        yield read_script(os.path.abspath(path), text, mistakes)


def check_edges(scripts: list[Script], mistakes: list[str]) -> None:
    """Append a mistake for each dependency that the rules of the graph forbid."""
    units = Units(time.monotonic, time.time)
    places = {(script.unit, edge.dependency): edge.place for script in scripts for edge in script.want}
    for script in scripts:
        for edge in script.want:
            try:
                units.want(script.unit, [edge.dependency], edge.requires)
            except CycleError as error:
                steps = [places.get(step, "") for step in zip(error.data, error.data[1:])]
                headers = ", ".join(os.path.basename(step) for step in steps)
                mistakes.append(f"{edge.place}: {error} ({headers})")
            except SyncError as error:
                mistakes.append(f"{edge.place}: {error}")


def plan_text(scripts: list[Script]) -> str:
    """Return scripts without mistakes as a table, each below its dependencies."""
    rows, todo = [], scripts
    while todo:
        missing = {script.unit for script in todo}
        free = [script for script in todo if missing.isdisjoint(edge.dependency for edge in script.want)]
        for script in free:
            wants = (e.dependency + (f" ({e.requires})" if e.requires != SUCCESS else "") for e in script.want)
            rows.append([script.unit, ", ".join(wants), ", ".join(script.lock), shown_probe(script.limits.ready)])
            missing.remove(script.unit)
        todo = [script for script in todo if script.unit in missing]
    text = table(["UNIT", "WANTS", "LOCKS", "READY WHEN"], rows) if rows else ""
    return text + f"{len(rows)} script{'s' * (len(rows) != 1)}, no mistakes\n"


class BootOptions(Record):
    """The options of `boot`."""

    jobs: int  # to run at once; 0 is no limit
    grace: float
    log_dir: str
    fail_fast: bool
    stay: bool
    quiet: bool
    always: bool
    resume: bool
    timeline: Callable[[Graph], None] | None  # writes it at the end of the startup
    command: str  # the program of COMMAND, if any


class Claimed(Record):
    """The agent's answer to a claim of a boot: the units that count as done, and are not claimed."""

    done: list[str] = []


class Output:
    """Standard output and error, written without blocking, so that a slow reader holds nothing up.

    Lines of scripts go to standard output, on a terminal with a status line below them; our own go to standard error.
    While much output is pending, the streams of scripts are paused; when `may_drop`, lines are dropped instead.
    """

    may_drop = paused = False

    def __init__(self, units: Iterable[str], quiet: bool, log_dir: str = "") -> None:
        self.quiet, self.log_dir = quiet, log_dir  # empty: no logs are written, or no more
        self.streams: list[Stream] = []
        self.pending = {1: b"", 2: b""}
        self._fds = {fd: opened_again(fd) for fd in self.pending}
        self._width = min(24, max(map(text_width, units), default=1))
        self.columns, self._colour, unicode = terminal()
        self._dots = "\u2026" if unicode else "~"
        self._logs: set[str] = set()  # names of files in --log-dir
        self._has_status = False  # whether the status line is shown
        self.status_at = 0.0 if os.isatty(1) and not quiet else NEVER  # when to draw it again

    def lines(self, unit: str, texts: list[str]) -> None:
        """Print lines of a unit."""
        if not self.quiet and not (self.may_drop and self.is_full()):
            name = fit(unit, self._width, self._dots)
            if self._colour:  # red is for failures
                name = f"\033[{32 + sum(map(ord, unit)) % 5}m{name}\033[0m"
            self.clear()
            self.pending[1] += "".join(f"{name} | {text}\n" for text in texts).encode(errors="backslashreplace")

    def say(self, text: str, quiet: bool = False) -> None:
        """Print one of our own lines."""
        self.clear()
        if not quiet and len(self.pending[2]) < FULL:
            self.pending[2] += encoded(text + "\n", 2)

    def log_path(self, unit: str) -> str:
        """Return the path of a unit's file in --log-dir; empty without that option."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in unit)[:60]
        while name in self._logs:
            name += "_"
        self._logs.add(name)
        return self.log_dir and os.path.abspath(os.path.join(self.log_dir, name + ".log"))

    def no_log(self, error: OSError) -> None:
        """Write no more log files after an error, and print it once."""
        if self.log_dir:
            self.say(f"warning: no more logs in {printable(self.log_dir)}: {error.strerror}")
        self.log_dir = ""

    def is_full(self) -> bool:
        """Return whether much output is pending."""
        return len(self.pending[1]) >= FULL

    def pipes(self) -> list[int]:
        """Return which of standard output and error are a pipe or socket, whose reader may wait for their end."""
        modes = {fd: os.fstat(fd).st_mode for fd in self.pending}
        return [fd for fd, mode in modes.items() if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)]

    def release(self, fd: int) -> None:
        """Close standard output or error; what is printed there is lost."""
        os.dup2(0, fd)  # /dev/null in a background process
        if self._fds[fd] != fd:
            os.close(self._fds[fd])
        self._fds[fd] = fd

    def turn(self, loop: Loop, due: float) -> list[int]:
        """Take a turn of a loop: write pending output, and read that of scripts unless they are paused."""
        pause = self.is_full() and not self.may_drop
        if pause != self.paused:
            self.paused = pause
            for stream in self.streams:
                stream.watch()
        waiting = {self._fds[fd]: fd for fd, data in self.pending.items() if data}
        for own, fd in waiting.items():
            loop.watch(own, lambda fd=fd: self.write(fd), for_writing=True)  # type: ignore[misc]
        try:
            return loop.turn(due)
        finally:
            loop.forget(*waiting)

    def write(self, fd: int, timeout: float = 0.0) -> None:
        """Write pending output without blocking: a pipe that can be written to has room for 4 KiB.

        With a timeout, wait so many seconds for a reader that takes nothing, then drop the rest.
        """
        import select

        data, at, ready = self.pending[fd], 0, select.poll()
        ready.register(self._fds[fd], select.POLLOUT)
        try:
            while at < len(data) and ready.poll(timeout * 1000):
                at += os.write(self._fds[fd], data[at : at + 4096])
        except BlockingIOError:  # less room than that
            pass
        except OSError:  # the reader or the terminal has gone; the boot goes on
            at = len(data)
            self.release(fd)
        self.pending[fd] = b"" if timeout else data[at:]

    def flush(self) -> None:
        """Write all pending output, but drop what a reader does not take."""
        for fd in self.pending:
            self.write(fd, timeout=1.0)

    def draw_status(self, head: str, items: list[str], now: float) -> None:
        """Draw the status line with as many items as fit."""
        for shown in range(min(len(items), self.columns), -1, -1):
            more = [f"+{len(items) - shown} more"] if shown < len(items) else []
            text = f"{head} {', '.join(items[:shown] + more)}".rstrip()
            if text_width(text) < self.columns:
                break
        self.pending[1] += ("\r\033[K" + text).encode(errors="backslashreplace")
        self._has_status, self.status_at = True, now + 1

    def clear(self) -> None:
        """Remove the status line."""
        if self._has_status:
            self.pending[1] += b"\r\033[K"
            self._has_status, self.status_at = False, 0.0


def opened_again(fd: int) -> int:
    """Open the terminal of `fd` again, non-blocking, which leaves it as it is for others; else return `fd`."""
    try:
        return os.open(os.ttyname(fd), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return fd


class Stream:
    """The output of a unit: read from a pipe, passed on to an Output in whole lines, and written to its log file."""

    def __init__(self, unit: str, loop: Loop, out: Output) -> None:
        from codecs import getincrementaldecoder

        self.unit, self.loop, self.out = unit, loop, out
        self.fd, self.log = -1, -1  # read end of the pipe, and the log file
        self.log_path = out.log_path(unit)
        self.decoder = getincrementaldecoder("utf-8")("backslashreplace")
        self.rest = ""  # an incomplete line
        self.last: list[str] = []  # lines, for the summary
        out.streams.append(self)

    def open(self, more: bool) -> int:
        """Make a pipe for the output of a try and return its write end; with `more`, append to the log file."""
        self.close()
        self.fd, write = os.pipe()
        os.set_blocking(self.fd, False)
        self.watch()
        if self.out.log_dir:
            try:
                os.makedirs(os.path.dirname(self.log_path), exist_ok=True)
                self.log = open_file(self.log_path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if more else os.O_TRUNC))
            except OSError as error:
                self.out.no_log(error)
        return write

    def watch(self) -> None:
        """Watch the pipe, unless streams are paused."""
        if self.out.paused:
            self.loop.forget(self.fd)
        elif self.fd >= 0:
            self.loop.watch(self.fd, self.read)

    def read(self, chunks: int = 1) -> None:
        """Read what is in the pipe, or a part of it."""
        for _ in range(chunks):
            try:
                chunk = os.read(self.fd, 65536) if self.fd >= 0 else b""
            except BlockingIOError:
                return
            if not chunk:
                self.close()
                return
            self.feed(chunk)

    def drain(self) -> None:
        """Read the pipe until it is empty, with a bound; print an incomplete line."""
        self.read(chunks=64)
        self.end_line()

    def feed(self, chunk: bytes) -> None:
        """Write a chunk to the log file, and print the lines that it completes."""
        if self.log >= 0 and self.out.log_dir:
            try:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self.log, view) :]
            except OSError as error:
                self.out.no_log(error)
        *lines, self.rest = (self.rest + self.decoder.decode(chunk)).split("\n")
        if len(self.rest) > LONGEST_LINE:
            lines.append(self.rest)
            self.rest = ""
        self.print(lines)

    def end_line(self) -> None:
        """Print an incomplete line."""
        self.rest += self.decoder.decode(b"", final=True)
        if self.rest:
            self.print([self.rest])
            self.rest = ""

    def print(self, lines: list[str]) -> None:
        """Print lines, and remember the last ones."""
        texts = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
        self.last = (self.last + [text[:500] for text in texts[-LAST_LINES:]])[-LAST_LINES:]
        self.out.lines(self.unit, texts)

    def close(self) -> None:
        """Close the pipe and the log file."""
        self.end_line()
        self.loop.forget(self.fd)
        for fd in (self.fd, self.log):
            if fd >= 0:
                os.close(fd)
        self.fd = self.log = -1


class Job(Task):
    """A script of a boot: a Task in a session of its own, whose output is read."""

    own_session = True

    def __init__(self, script: Script, boot: Boot) -> None:
        super().__init__(boot.loop, boot.link, script.unit, [script.path], script.limits)
        self.script, self.boot, self.grace = script, boot, boot.options.grace
        self.stream = Stream(script.unit, boot.loop, boot.out)
        self.command_text = "/".join(script.path.split("/")[-2:])
        self.log = os.fsencode(self.stream.log_path).decode(errors="replace")
        self.outcome, self.reason = "", ""  # of the unit
        self.died = False  # the command has failed after the unit had completed

    def running(self) -> bool:
        """Return whether the first process runs."""
        return self.lives() and self.family.first_alive

    def ending(self) -> bool:
        """Return whether the command is being ended, or may tidy up after a failure that others have reported."""
        return self.state == ENDING or (self.running() and self.outcome == FAILED)

    def spawn(self, env: dict[bytes, bytes]) -> int:
        write = self.stream.open(more=self.tries > 0)
        streams = [(os.POSIX_SPAWN_DUP2, write, fd) for fd in (1, 2)]  # 0 is /dev/null already
        try:
            return spawn(self.command, env, own_session=True, file_actions=streams)
        finally:
            os.close(write)

    def begun(self, detail: str) -> None:
        super().begun(detail)
        if detail:
            self.stream.feed(f"{detail}\n".encode())

    def warn(self, text: str) -> None:
        self.boot.out.say(f"warning: {self.unit}: {text}")

    def process_ended(self, code: int) -> None:
        self.stream.drain()
        super().process_ended(code)

    def gone(self) -> None:
        self.stream.drain()  # also what its last process has printed
        super().gone()

    def others_run(self) -> bool:
        return any(job.lives() and not job.outcome for job in self.boot.active.values())

    def fail(self, reason: str) -> None:
        self.reason = reason
        super().fail(reason)

    def not_reported(self, method: str, params: Object, error: SyncError) -> None:
        if method in ("complete", "fail"):  # without an outcome from the agent, the one reported counts
            self.set_outcome(self.reported, self.reason)

    def set_outcome(self, status: str, reason: str) -> None:
        """Set the outcome of the unit, unless it has one."""
        if self.outcome:
            return
        self.outcome, self.reason = status, reason or self.why or self.reason
        self.boot.unfinished -= 1
        if not self.reported:
            self.ended_by_others(status)
        elif self.reported == FAILED and status == COMPLETED:  # others have completed it: its service has died
            self.reported = COMPLETED
            self.report("running")
            self.exited()
        else:  # others may have failed it just before it completed
            self.reported = status
        if status != COMPLETED:
            self.boot.after_failure("failed")

    def exited(self) -> None:
        super().exited()
        if self.reported == COMPLETED and self.why and not self.stopped:  # else it ended well, or was stopped
            self.died = True
            self.warn(f"ended after its unit had completed ({self.why})")
            self.boot.after_failure("ended")


class Boot:
    """Runs scripts in the order of their graph, as an agent's client, in a background process.

    `front` is a descriptor that leads to the process that was called: see Front.
    """

    def __init__(self, scripts: list[Script], options: BootOptions, front: int, directory: str) -> None:
        loop = Loop()
        self.options, self.loop, self.front = options, loop, front
        loop.watch(front, self.front_gone)
        self.out = Output([script.unit for script in scripts], options.quiet, options.log_dir)
        self.link = Link(loop, self.notified, self.agent_gone, self.patience)
        self.jobs = {s.unit: Job(s, self) for s in scripts}
        self.wants = {s.unit: [edge.dependency for edge in s.want] for s in scripts}
        self.unfinished = len(scripts)
        self.active: dict[str, Job] = {}  # jobs that have begun and are not GONE
        self.answered = False  # whether the agent has granted or refused the claim
        self.began = time.monotonic()
        self.report_at = self.began + REPORT_EVERY if not options.quiet else NEVER
        self.signal = 0  # the signal that ends the boot
        self.stopping, self.stop_by = "", NEVER  # why everything is to end, and when
        self.started_up = False
        self.front_may_end = False  # else everything ends with it
        self.host: Host | None = None  # of our own agent
        self.retire_at = NEVER  # when to ask again whether another boot uses that
        for job in self.jobs.values():
            job.use_directory(directory)
        if not directory:
            self.out.say(f"warning: {NO_DIRECTORY}")

    # -- life cycle ---------------------------------------------------------------------------------------

    def run(self, channel: Channel, host: Host | None = None) -> int:
        """Boot against an agent, perhaps our own, and look after what runs on; return the exit status.

        Raises Refused, Unreachable. Unless `answered`, it may be called again, for another agent.
        """
        self.host = host
        self.env = environment(CODER_AGENT_SOCKET_PATH=channel.path)
        self.link.open(channel)
        try:
            self.claim()
            self.until(lambda: not self.unfinished and not self.link.pending and self.printed())
            return self.after_startup(self.finish())
        except BaseException:
            self.abandon()
            raise
        finally:
            self.out.flush()
            self.link.close()

    def after_startup(self, code: int) -> int:
        """Let the front go on, and be the parent of what still runs until it has ended; return the exit status."""
        self.report_at, self.out.status_at, self.out.may_drop = NEVER, NEVER, True
        command = self.options.command
        if self.options.stay and not self.signal:
            self.out.say("boot: staying until a signal", self.options.quiet)
            self.tell_front(code)
            self.until(lambda: bool(self.stopping or self.link.lost))
            code = 3 if self.link.lost else 1
        elif command and self.options.always:
            code = 0
        elif command and code and not self.signal:
            self.out.say(f"boot: {command} is not run, since not all went well; --always would", self.options.quiet)
        runs_on = self.runs() and not self.signal
        self.front_may_end = runs_on and not command and os.getppid() != 1  # process 1 waits for services
        if self.front_may_end:
            self.say_where_output_goes()
        self.until(self.printed)
        self.out.flush()
        if runs_on:
            self.started_up = True
            died = self.stopping and not self.options.always  # with --fail-fast, a service may have died meanwhile
            self.tell_front(code or int(bool(died)))
            os.chdir("/")
            self.until(lambda: not self.runs())
        return 128 + self.signal if self.signal else code

    def runs(self) -> bool:
        """Return whether a script runs or prints, or our own agent has still to answer, or another boot uses it."""
        if any(job.lives() for job in self.active.values()) or (self.printing() and not self.stopping):
            return True
        used = self.host and not self.stopping and not self.host.agent.retire()
        self.retire_at = time.monotonic() + 0.2 if used else NEVER
        return bool(used or (self.host and self.link.pending))

    def printing(self) -> list[str]:
        """Return the units whose output is still open."""
        return [unit for unit, job in self.jobs.items() if job.stream.fd >= 0]

    def abandon(self) -> None:
        """End all commands after an unexpected error, without the agent and the Loop."""
        families = [job.family for job in self.active.values() if job.lives()]
        for family in families:
            family.scan(Processes)
            family.terminate_first()
            family.terminate_others()
            family.first_alive = False  # nobody takes its exit status any more
        kill_at = time.monotonic() + self.options.grace
        while families and time.monotonic() < kill_at + LAST_WAIT:
            time.sleep(CHECK_OFTEN)
            families = [family for family in families if family.scan(Processes)]
            for family in families if time.monotonic() >= kill_at else ():
                family.kill()

    def until(self, done: Callable[[], bool]) -> None:
        """Handle events until `done` and no command is being ended."""
        while True:
            now = time.monotonic()
            due = self.keep_time(now)
            if done() and not any(job.ending() for job in self.active.values()):
                return
            if not any(self.out.pending.values()):
                if now >= self.out.status_at:
                    ended, running = len(self.jobs) - self.unfinished, self.running(now)
                    waiting = self.unfinished - len(running)
                    self.out.draw_status(f"[{ended}/{len(self.jobs)} ended, {waiting} waiting]", running, now)
                due = min(due, self.out.status_at)
            for number in self.out.turn(self.loop, due):
                self.stop_by_signal(number, f"boot got signal {number}")

    def printed(self) -> bool:
        """Return whether no output is pending; after a signal nobody waits for a reader that has stopped."""
        return not any(self.out.pending.values()) or bool(self.signal)

    def keep_time(self, now: float) -> float:
        """Do what is due; return when something is next."""
        if now >= self.report_at:
            self.report_at = now + REPORT_EVERY
            self.link.request("graph", lambda answer: self.say_progress(graph_in(answer)))
        for job in [job for job in self.active.values() if job.next_due() <= now or job.state == GONE]:
            job.keep_time(now)
            if job.state == GONE:
                del self.active[job.unit]
        if self.stopping:
            self.stop_in_order(now)
        due = min(self.report_at, self.retire_at, self.link.keep_time(now))
        return min([due, *(job.next_due() for job in self.active.values())])

    def patience(self) -> float:
        """Return for how many seconds the agent may leave a request unanswered."""
        return STOPPED_TIMEOUT if self.signal else REPLY_TIMEOUT

    # -- the front ----------------------------------------------------------------------------------------

    def tell_front(self, code: int) -> None:
        """Send the front an exit status: see Front."""
        try:
            os.write(self.front, bytes([code]))
        except OSError:  # it has gone
            pass

    def front_gone(self) -> None:
        """Go on without the front if it may end; else end everything, as if it had sent HUP."""
        self.loop.forget(self.front)
        if self.front_may_end:
            for fd in self.out.pipes():
                self.out.release(fd)
        elif not self.stopping:
            command = self.options.command if self.started_up else ""
            self.stop_by_signal(1, f"{command or 'the process of boot'} has ended")

    def stop_by_signal(self, number: int, why: str) -> None:
        """End everything; at a second signal, at once."""
        grace = 0.0 if self.signal else self.options.grace
        self.signal = number
        self.stop(f"stopped: {why}", grace)

    # -- units --------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Ask for all units at once, in as many requests as it takes."""
        limit = (max_descriptors() - 48) // (2 if self.options.log_dir else 1)  # a script has a pipe, and perhaps a log
        limit -= 3 * sum(bool(job.limits.ready) for job in self.jobs.values())
        jobs = max(1, min(self.options.jobs or limit, limit))
        rows: list[dict[str, Any]] = []
        size = 0
        for job in self.jobs.values():
            wants = {edge.dependency: edge.requires for edge in job.script.want}
            row = {"unit": job.unit, "wants": wants, "locks": job.script.lock}
            length = len(encode(row))
            if rows and size + length > MAX_LINE - 1024:
                self.link.request("boot", unwrap, units=rows, jobs=jobs, more=True)
                rows, size = [], 0
            rows.append(row)
            size += length
        self.link.request("boot", self.claim_answered, units=rows, jobs=jobs, more=False, resume=self.options.resume)

    def claim_answered(self, answer: Object) -> None:
        """Handle the answer to our claim. Raises Refused, Unreachable."""
        try:
            done = record(Claimed, unwrap(answer)).done
        except Refused:
            self.answered = True
            raise
        self.answered = True
        self.jobs = {unit: job for unit, job in self.jobs.items() if unit not in done}
        self.unfinished = sum(not job.outcome for job in self.jobs.values())  # a unit may be skipped as it is claimed
        if self.host:
            self.host.accept()
        if self.host and self.options.resume:
            self.out.say("boot: there was no agent, so nothing is known to have completed: all is run")

    def notified(self, method: str, params: Result) -> None:
        """Handle a notification: a unit has started or ended, or its command is to be stopped."""
        job, status = self.jobs.get(params.unit), params.status
        if job is None:
            return
        if method == "stop":
            job.stop("stopped", time.monotonic() + params.grace)
        elif method == "unit" and status in (COMPLETED, FAILED, SKIPPED):
            job.set_outcome(status, params.reason)
        elif method == "unit" and status == STARTED and not (job.tries or job.reported):
            job.env = environment(self.env, **params.env)
            self.active[job.unit] = job
            job.begin()

    def agent_gone(self, error: Unreachable) -> None:
        """Let what runs finish, and start nothing new. Raises the error if nothing was claimed."""
        if not self.answered:
            raise error
        self.out.say(f"error: {error}")
        for job in self.jobs.values():
            job.limits.retries = 0
            if job.reported:
                job.set_outcome(job.reported, job.reason)
            elif job.state in (WAITING, CHECKING):
                job.set_outcome(FAILED if job.tries else PENDING, job.why if job.tries else "the agent went away")

    def after_failure(self, what: str) -> None:
        """With --fail-fast, end everything after a unit has failed, or the command of a completed one has died."""
        if self.options.fail_fast and self.started_up and self.options.command:
            self.tell_front(1)  # the front ends COMMAND first
        elif self.options.fail_fast and not self.stopping:
            self.stop(f"stopped: another unit {what}", self.options.grace)

    def stop(self, why: str, grace: float) -> None:
        """End everything within so many seconds, and start nothing new. A second call can only shorten the time."""
        now = time.monotonic()
        self.stopping, self.stop_by = self.stopping or why, min(self.stop_by, now + grace)
        for job in self.jobs.values():
            job.stopped = self.stopping
            if job.state in (WAITING, CHECKING, ENDING):
                job.stop(self.stopping, self.stop_by)
        self.stop_in_order(now)

    def stop_in_order(self, now: float) -> None:
        """End the commands that no other running one wants, also through others; after half of the time, all."""
        early = now < self.stop_by - self.options.grace / 2
        living = [unit for unit, job in self.active.items() if early and job.lives()]
        wanted = reached((name for unit in living for name in self.wants[unit]), self.wants.get)
        for job in self.active.values():
            if job.state in (RUNNING, SETTLED) and job.unit not in wanted:
                job.end(self.stopping, self.stop_by)

    # -- reports ------------------------------------------------------------------------------------------

    def running(self, now: float) -> list[str]:
        """Return the units that run, for how long, in which try, and why a probe has not succeeded."""
        shown = []
        for job in self.active.values():
            if job.running() and not job.outcome:
                more = [f"try {job.tries} of {job.limits.retries + 1}"] if job.tries > 1 else []
                more += [f"not ready: {job.probe_error()}"] if job.probe_error() else []
                shown.append(f"{job.unit} {span(now - job.began)}" + (f" ({', '.join(more)})" if more else ""))
        return shown

    def say_progress(self, graph: Graph) -> None:
        """Print which units run, and which wait for what."""
        rows = {row.unit_name: row for row in graph.nodes}

        def described(name: str) -> str:
            row = rows.get(name)
            if name in self.jobs or row is None:
                return name
            return f"{name}, {row.status}" + (owner_text(row.owner, " by ") if row.status == STARTED else "")

        now = time.monotonic()
        running, waiting = self.running(now), []
        for unit, job in self.jobs.items():
            if job.state == WAITING and job.due:
                waiting.append(f"{unit} to try again after {job.why}")
            elif not job.outcome and not job.running() and unit in rows:
                missing = "; ".join(map(described, rows[unit].waits_for))
                waiting.append(f"{unit} for {missing}" if missing else unit)
        text = f"boot: {len(self.jobs) - self.unfinished} of {len(self.jobs)} ended after {span(now - self.began)}"
        text += f"; running: {some_names(running)}" if running else ""
        self.out.say(text + (f"; waiting: {some_names(waiting)}" if waiting else ""))

    def finish(self) -> int:
        """Print the summary and write the timeline; return the exit status."""
        for job in self.jobs.values():
            if job.outcome != COMPLETED:
                job.stream.close()
        lost, graphs = self.link.lost, []  # type: tuple[str, list[Graph]]
        for job in self.active.values():
            if job.lives():
                job.check_left()
        self.link.request("graph", lambda answer: graphs.append(graph_in(answer)))
        self.until(lambda: bool(graphs))
        self.out.clear()
        self.out.flush()
        graph = Graph(graphs[0].now, [node for node in graphs[0].nodes if node.unit_name in self.jobs])
        bad = any(job.outcome != COMPLETED or job.died for job in self.jobs.values())
        if bad or not self.options.quiet:
            self.out.say(self.summary(graph))
            self.until(self.printed)
        if self.options.timeline:
            self.options.timeline(graph)
        return 3 if lost else int(bad or bool(self.stopping))

    def summary(self, graph: Graph) -> str:
        """Return which units failed, with their last lines, which were skipped and why, and how long it took."""
        outcomes = [job.outcome for job in self.jobs.values()]
        words = {COMPLETED: COMPLETED, FAILED: FAILED, SKIPPED: SKIPPED, PENDING: "not started"}
        counts = [f"{outcomes.count(status)} {word}" for status, word in words.items() if status in outcomes]
        done = len(self.wants) - len(self.jobs)
        counts += [f"{done} done before"] if done else []
        failed, others = [f"boot: {', '.join(counts)}"], []
        for job in self.jobs.values():
            if job.died or (job.outcome == FAILED and (job.tries or not job.stopped)):
                how = f"completed, then ended: {job.why}" if job.died else job.reason
                how = f" ({how})" if how else ""
                failed.append(f"{'died' if job.died else 'failed'}: {job.unit}{how}; {printable(job.script.path)}")
                failed += [f"    | {line}" for line in job.stream.last]
            elif job.outcome != COMPLETED:
                others.append(f"{'skipped' if job.outcome == SKIPPED else 'not started'}: {job.unit}: {job.reason}")
        going_on = [job.unit for job in self.active.values() if job.lives()]
        others += [f"still running: {some_names(going_on)}"] if going_on else []
        last = Startup(graph).summary() if graph.nodes else ""
        return "\n".join([*failed, *others, *(wrap(last, self.out.columns) if os.isatty(2) else [last])]).rstrip()

    def say_where_output_goes(self) -> None:
        """Print what becomes of the output of services, if standard output is closed when boot returns."""
        names = sorted(self.printing())
        if names and 1 in self.out.pipes():
            kept = f"only in {self.options.log_dir}" if self.out.log_dir else "lost; --log-dir would keep it"
            text = f"boot: standard output is a pipe: what {some_names(names)} will print is {kept}"
            self.out.say(text, self.options.quiet)


def graph_in(answer: Object) -> Graph:
    """Return the graph in an agent's answer; an empty one if the agent has gone."""
    try:
        return record(Graph, unwrap(answer))
    except Unreachable:
        return Graph(0.0, [])


class Front:
    """The process that was called. It keeps its caller's terminal, session and descriptors; it becomes or runs COMMAND.

    It passes signals on to the background process, which ends everything and then itself. When the startup is over,
    the background process
    - ends with the exit status if nothing runs on: 0 lets COMMAND take the front's place;
    - else sends it as one byte: the front returns it, waits (--stay), or runs COMMAND if it is 0;
    - sends a second one to end that wait, or COMMAND.
    """

    def __init__(self, loop: Loop, pid: int, link: int, directory: str, command: list[str], grace: float) -> None:
        self.loop, self.pid, self.link, self.directory = loop, pid, link, directory
        self.command, self.grace = command, grace
        self.received = b""  # exit statuses
        self.ended: list[int] = []  # the exit status of the background process, once it has ended
        self.signal = 0
        loop.children[pid] = self.background_ended
        loop.watch(link, self.receive)

    def background_ended(self, code: int) -> None:
        """Note an exit status; clean up after a background process that was killed."""
        self.ended.append(code)
        if code < 0:
            say(f"error: boot's background process was {exit_text(code)}; what it ran may run on", 2)
            remove_directory(self.directory)

    def receive(self) -> None:
        """Receive an exit status; the second one ends COMMAND."""
        data = os.read(self.link, 100)
        self.received += data
        if not data:
            self.loop.forget(self.link)
        elif self.command and len(self.received) > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which is passed on

    def until(self, done: Callable[[], object], timeout: float = NEVER) -> None:
        """Pass signals on until `done`, or for so many seconds."""
        deadline = time.monotonic() + timeout
        while not done() and time.monotonic() < deadline:
            for number in self.loop.turn(deadline):
                if number != signal.SIGWINCH:  # which is for COMMAND
                    self.signal = number
                    if not self.ended:
                        signal_to(self.pid, number)

    def wait_for_end(self) -> None:
        """Wait until the background process has ended everything and itself, for as long as that may take."""
        self.until(lambda: self.ended, self.grace + 3 * LAST_WAIT)
        if not self.ended:
            say("error: boot's background process has not ended; is it stopped?", 2)

    def run(self, stay: bool) -> int:
        """Return the exit status, unless COMMAND takes our place. Raises CommandError."""
        self.until(lambda: self.ended or self.received or self.signal)
        if stay and self.received and not self.signal:
            notify("READY=1")
            self.until(lambda: self.ended or len(self.received) > 1 or self.signal)
        if os.getpid() == 1 and not self.command:  # the system would kill what still runs
            self.until(lambda: self.ended or self.signal)
        if self.signal:
            self.wait_for_end()
            return 128 + self.signal
        code = self.ended[0] if self.ended else self.received[-1]
        if self.command and not self.ended:
            return self.run_command(code)
        self.loop.restore_signals()
        if self.command and code == 0:
            become(self.command)
        return shell_status(code)

    def run_command(self, code: int) -> int:
        """Run COMMAND as a child if the startup went well, then have all services ended; return the exit status."""
        command = self.command
        if getenv("LISTEN_PID") == str(os.getpid()):  # sockets that a supervisor handed over are for COMMAND
            command = ["sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh", *command]
        try:
            return code or supervise(self.loop, command, environment())
        finally:
            self.loop.forget(self.link)
            os.close(self.link)  # which says that COMMAND has ended
            self.wait_for_end()


def become(command: list[str]) -> NoReturn:
    """Replace this process by a command. Raises CommandError."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        raise cannot_run(command[0], error) from None


def boot_at(path: str, boot: Boot) -> int:
    """Boot against the agent at a path; if there is none, host one as long as something runs."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            try:
                channel = Channel(path)
            except Foreign:
                raise
            except Unreachable:
                with Host(path) as host:
                    return boot.run(own_channel(host), host)
            with channel:
                return boot.run(channel)
        except (Refused, Unreachable) as error:  # an agent was faster, or is about to end
            if boot.answered or boot.signal or isinstance(error, Foreign) or time.monotonic() >= deadline:
                raise
        time.sleep(0.02)


def own_channel(host: Host) -> Channel:
    """Return a connection to our own agent, which takes others only when all units are claimed."""
    from socket import socketpair

    ours, theirs = socketpair()
    host.server.process_request(Connection(theirs, WakeUp()), "")
    return Channel(host.path, sock=ours)


# ----------------------------------------------------------------------------------------------------------
# Install. A copy of this file that is not compiled at each call is a zip application (PEP 441) of the source and its
# bytecode, behind the lines of sh that make it executable; its __main__ calls `launch`, as these lines do. The bytecode
# is two .pyc files, of the code above the cut and below it: the first is imported as the module and loads the second.
# In place of the hash of the source, they have their length and half of their own hash.
# ----------------------------------------------------------------------------------------------------------

PLACE = 2048  # bytes for the lines of sh, and for __main__, so that a new copy has it where a running Python looks
COMPILE = f"""\
import __future__
import sys
from _imp import source_hash
from importlib.util import MAGIC_NUMBER
from marshal import dumps
text = sys.stdin.buffer.read().replace({FUTURE!r}, b"", 1)  # it costs an import
code = dumps(compile(text, {INSTALLED!r}, "exec", __future__.annotations.compiler_flag))
head = MAGIC_NUMBER + bytes([1, 0, 0, 0]) + len(code).to_bytes(4, "little") + source_hash(0, code)[:4]
sys.stdout.buffer.write(head + code)
"""
# Without columns for tracebacks there is less to load.
COMPILING = ("-X", "no_debug_ranges", "-sSc", COMPILE)


def slowness() -> str:
    """Return advice for the log of `serve` if each call compiles the source: a plain file, or another Python's copy."""
    if slowness.__code__.co_filename == INSTALLED:
        return ""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"{PROGRAM} has no bytecode for Python {python}: `{PROGRAM} install` would make every call faster"


def ask_python(python: str, *words: str, data: bytes = b"") -> bytes:
    """Return the output of an interpreter (default: ours) in a fixed environment. Raises Refused if it fails."""
    import subprocess

    python = python or sys.executable
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONHASHSEED"] = "0"  # the order of a set is in the bytecode
    try:
        done = subprocess.run([python, *words], input=data, capture_output=True, env=env, cwd="/", check=False)
    except OSError as error:
        raise Refused(f"cannot run {python}: {error.strerror}") from None
    if done.returncode:
        why = one_line(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        raise Refused(f"{python} cannot run coder_sync, which needs {NEEDED}: {why}")
    return done.stdout


def application(python: str) -> bytes:
    """Return the bytes of a copy with the bytecode of an interpreter. Raises Refused, OSError."""
    import shlex
    import zipfile

    with open(FILE, "rb") as file:
        source = source_in(file.read())
    call = source.split(b"\n", 2)[2].partition(b'"""')[0]
    launcher = call.split(b"'")[1].replace(b"argv[1]", b"argv[0]")
    call = call.replace(b"python3", os.fsencode(shlex.quote(python or "python3")), 1)
    about = f"# coder_sync {__version__}, installed: a zip archive with its source (`unzip -p FILE coder_sync.py`)\n"
    data = io.BytesIO((b"#!/bin/sh\n" + about.encode() + call).ljust(PLACE, b"\n"))
    above, below = (ask_python(python, *COMPILING, data=half) for half in halves(source))
    members = {
        "__main__.py": launcher.ljust(PLACE, b"\n"),
        "launch.py": b"#:\n" + source.split(b"#:\n")[1] + b"#:\n",
        "coder_sync.pyc": above,
        "below.pyc": below,
        "coder_sync.py": source,
    }
    with zipfile.ZipFile(data, "a") as archive:
        for name, member in members.items():
            entry = zipfile.ZipInfo(name)  # of 1980: the same input gives the same bytes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, member)
    return data.getvalue()


def is_ours(data: bytes) -> bool:
    """Return whether a file is a version of this program, plain or installed, even if it is damaged."""
    is_plain = data.startswith(b'#!/bin/sh\n""":"\nexec python3 -IS ') and b"coder_sync.py serve" in data
    return is_plain or (data.startswith(b"#!/bin/sh\n# coder_sync ") and b", installed: a zip archive" in data[:100])


def install(path: str, python: str) -> str:
    """Write a copy to a temporary file, run it, and rename it to `path`; return the real path. Raises Refused."""
    path = os.path.realpath(path)
    exists = os.path.lexists(path)
    if exists and not os.path.isfile(path):
        raise Refused(f"cannot install {path}: {'a directory' if os.path.isdir(path) else 'no regular file'} is there")
    temporary = os.path.join(os.path.dirname(path), f".coder-sync-{os.getpid()}-{time.time_ns():x}")
    for number in not_ignored((signal.SIGTERM, signal.SIGHUP)):  # end by an exception, which removes the file
        signal.signal(number, lambda got, frame: sys.exit(128 + got))
    try:
        if exists:
            with open(path, "rb") as file:
                old = file.read()
            if old and not is_ours(old):
                raise Refused(f"cannot install {path}: another program is there; remove it first")
        data = application(python)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            model = os.stat(path if exists else temporary)
            os.chown(temporary, model.st_uid, model.st_gid)
            os.chmod(temporary, model.st_mode & 0o755 | (model.st_mode & 0o444) >> 2)  # who may read may execute
            os.fsync(file.fileno())
        if ask_python(python, "-IS", temporary, "--version") != f"coder_sync {__version__}\n".encode():
            raise Refused(f"cannot install {path}: the copy does not run")
        os.rename(temporary, path)
    except OSError as error:
        raise Refused(f"cannot install {path}: {error.strerror}; nothing was changed") from None
    finally:
        remove(temporary)
    return path


# ----------------------------------------------------------------------------------------------------------
# Command line. argparse reads all command lines that `quick` does not; then the other commands.
# ----------------------------------------------------------------------------------------------------------


def usage_of(command: Command) -> str:
    """Return the usage line of a command."""
    forms = {None: "{}", "+": "{}...", "*": "[{}]..."}
    names = [forms[a.words.get("nargs")].format(a.words["metavar"]) for a in command.positionals]
    tail = {"": "", "*": " [-- COMMAND ARG...]", "+": " -- COMMAND ARG..."}[command.tail]
    return " ".join([PROGRAM, command.name, *names, "[OPTION]..."]) + tail


def parser_of(command: Command, arguments: Iterable[Argument]) -> argparse.ArgumentParser:
    """Return a parser for some arguments of a command, which raises UsageError."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    usage, example = usage_of(command).replace("%", "%%"), f"example: {PROGRAM} {command.example}"
    parser = Parser(PROGRAM, usage, command.help, example, add_help=False, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # it does not wrap the example
    for argument in arguments:
        more: dict[str, Any] = {"default": argument.default, "type": argument.convert} if argument.takes_value else {}
        more["help"] = argument.words["help"] + (" (default: %(default)s)" if argument.words.get("default") else "")
        parser.add_argument(*argument.names, **{**argument.words, **more})
    return parser


def command_first(argv: Sequence[str]) -> list[str]:
    """Return a command line with the command moved in front of the options. Raises UsageError if there is none."""
    words: list[str] = [*argv]
    options: list[str] = []
    commands = {"-h": "help", "--help": "help", "--version": "version"}
    while words:
        name, equals, _ = words[0].partition("=")
        if words[:2] == ["exp", "sync"]:
            words = words[2:] or ["help"]
        elif name in ("--socket-path", "--connect-timeout"):
            size = 1 if equals else 2
            options, words = options + words[:size], words[size:]
        elif name[:1] == "-" and name not in commands:
            break
        else:
            return [commands.get(words[0], words[0]), *options, *words[1:]]
    hint = f"which command? {', '.join(COMMANDS)}; options follow it; see `{PROGRAM} --help`"
    raise UsageError(f"{ascii(words[0])[:60]}: {hint}" if words else hint)


def parse(argv: Sequence[str]) -> tuple[Command, Args]:
    """Parse a command line with argparse; print the help page and exit for --help. Raises UsageError."""
    name, *words = command_first(argv)
    command, args = command_named(name), Args()
    words, args.command = split_tail(command, words)
    end = words.index("--") if "--" in words else len(words)  # only names follow, even with a dash
    options = [argument for argument in command.arguments if argument.is_option]
    try:
        _, names = parser_of(command, options).parse_known_args(words[:end], args)
        if args.help:
            put(help_page(command))
            raise SystemExit(0)
        unknown = next((name.partition("=")[0] for name in names if name[:1] == "-"), "")
        if unknown:
            hint = did_you_mean(resembling(unknown, command.options))
            raise UsageError(f"no such option: {ascii(unknown)[:40]}{hint}")
        command.set_positionals(args, [*names, *words[end + 1 :]])
        if args.command is None:
            raise UsageError("a command must follow --")
    except UsageError as error:
        raise UsageError(f"{command.name}: {error} (usage: {usage_of(command)})") from None
    return command, args


Command.parse = parse


def help_page(command: Command) -> str:
    """Return the help page of a command."""
    return parser_of(command, command.arguments).format_help()


def command_named(name: str) -> Command:
    """Return the command with this name. Raises UsageError."""
    if name == "exp":
        raise UsageError("after exp comes sync, as in `exp sync start UNIT`")
    if name not in COMMANDS:
        hint = did_you_mean(resembling(name, COMMANDS), f"; there are {', '.join(COMMANDS)}")
        raise UsageError(f"no such command: {ascii(name)[:60]}{hint}")
    return COMMANDS[name]


def mode_bits(text: str) -> int:
    """Return permission bits from their octal form. Raises UsageError."""
    if len(text) in (3, 4) and not text.strip("01234567"):
        return int(text, 8) & 0o777
    raise UsageError(f"invalid mode {ascii(text)[:20]}: write it in octal, as in 660")


def group_id(name: str) -> int:
    """Return the number of a group. Raises UsageError."""
    import grp

    try:
        number = int(name[:20]) if name.isdecimal() else grp.getgrnam(name).gr_gid
        if number < (1 << 32) - 1:  # for chown(2), the last number means no change
            return number
    except KeyError:
        pass
    raise UsageError(f"no such group: {ascii(name)[:40]}")


def output_option(*forms: str) -> Argument:
    """Return the option --output; the first form is the default."""
    return Argument("-o", "--output", choices=forms, default=forms[0], help="form")


def units_argument(default: str) -> Argument:
    """Return the positional for any number of units; `default` says which units are meant without it."""
    return Argument("units", nargs="*", metavar="UNIT", help=f"names of units (default: {default})")


COLUMN = Argument("-c", "--column", metavar="COLUMNS", help="columns to show, separated by commas (default: all)")


def timeline_writer(path: str) -> Callable[[Graph], None]:
    """Return a function that writes the timeline to a file, in the form of its extension. Raises UsageError."""
    form = os.path.splitext(path)[1].lstrip(".")
    if form not in ("svg", "json", "txt"):
        raise UsageError(f"{printable(path)}: the name must end in .svg, .json or .txt")
    path = os.path.abspath(path)

    def write(graph: Graph) -> None:
        try:
            with open(open_file(path, WRITE), "w", encoding="utf-8") as f:
                f.write(timeline_as(form, graph))
        except OSError as error:
            put(f"warning: cannot write the timeline to {printable(path)}: {error.strerror}\n", 2)

    return write


WRITTEN = "write the timeline there at the end: .svg, .json or .txt"
TIMELINE = Argument("--timeline", type=timeline_writer, default=None, metavar="FILE", help=WRITTEN)


@Command(
    "serve --detach --log-file /tmp/coder-sync.log",
    QUIET,
    flag("-v", "--verbose", help="log every request"),
    flag("-d", "--detach", help="go to the background once connections are accepted"),
    flag("--replace", help=f"end the agent that serves there (its services have {GRACE:g} s), and take its place"),
    Argument("--log-file", metavar="FILE", help="write the log there (default: to standard error)"),
    Argument("--pid-file", metavar="FILE", help="write the process id there"),
    TIMELINE,
    Argument("--mode", type=mode_bits, default=0, help="permissions (default: 600, or 660 with --group)"),
    Argument("--group", type=group_id, default=None, help="group of the socket, by name or number (default: yours)"),
    tail="*",
)
def cmd_serve(args: Args) -> int:
    """Run the agent: until a signal, or for the life of COMMAND on a private socket."""
    enabled = os.environ.get("CODER_AGENT_SOCKET_SERVER_ENABLED", "").lower()
    if enabled in ("false", "0", "no"):
        put(f"not serving: CODER_AGENT_SOCKET_SERVER_ENABLED is {enabled}\n", 2)
        return supervise(Loop(), args.command, environment()) if args.command else 0
    if enabled not in ("", "true", "1", "yes"):
        raise UsageError(f"CODER_AGENT_SOCKET_SERVER_ENABLED is {enabled!a}; use true or false")
    if args.detach and args.command:
        raise UsageError("--detach and -- COMMAND exclude each other: the agent ends with the command")
    directory = private_directory() if args.command and not args.socket_path else ""
    if args.command and not (args.socket_path or directory):
        raise CommandError("cannot make a private socket: no directory is writable; name a --socket-path", 125)
    level = 0 if args.quiet or directory else 1  # a private agent is as quiet, so that COMMAND is heard
    level = 2 if args.verbose else level
    host = Host(
        f"{directory}/agent.sock" if directory else os.path.abspath(agent_path(args.socket_path)),
        mode=args.mode or (0o600 if args.group is None else 0o660),
        group=-1 if args.group is None else args.group,
        level=-1 if args.detach and not args.log_file else level,
        log_file=args.log_file and os.path.abspath(args.log_file),
        pid_file=args.pid_file and os.path.abspath(args.pid_file),
        replace=make_room if args.replace else None,
        timeline=args.timeline,
        alone=not args.command,
        advice=slowness(),
    )
    if not args.command:
        serve(host, args.detach)
        return 0
    try:
        return serve_command(host, args.command)
    except Refused as error:
        raise CommandError(str(error), 125) from None
    finally:
        remove_directory(directory)


def make_room(path: str) -> bool:
    """Tell the agent at a path, if there is one, to end; return False if it has not answered after 3 seconds."""
    answered, began = False, time.monotonic()
    try:
        with Channel(path) as channel:
            channel.result(channel.request("shutdown"), ANSWER_TIMEOUT)
            answered = True
            channel.receive(REPLACE_TIMEOUT)  # until it hangs up
    except SyncError:
        pass
    return answered or time.monotonic() - began < ANSWER_TIMEOUT


@Command(
    "ping --wait 10s", Argument("-w", "--wait", type=duration, default="0s", metavar="DURATION", help="how long to try")
)
def cmd_ping(args: Args) -> None:
    """Say whether an agent answers."""
    client = make_client(args)
    pong = client.ping(args.wait)
    put(f"agent at {client.socket_path}: pid {pong['pid']}, version {pong['version']}, up {span(pong['uptime'])}\n")


@Command(
    "boot /etc/startup.d --timeline startup.svg -- sleep infinity",
    Argument("paths", nargs="+", metavar="PATH", help="scripts, and directories of scripts"),
    Argument("-j", "--jobs", type=number, default="0", metavar="N", help="run at most N at once; 0: no limit"),
    flag("--check", help="only check the headers, and show the order"),
    flag("--resume", help="do not run again what the agent has as completed"),
    flag("--fail-fast", help="stop everything at the first failure"),
    Argument("--grace", type=duration, default=f"{GRACE:g}s", metavar="DURATION", help="time to end when told to"),
    Argument("--log-dir", metavar="DIR", help="keep each unit's output in a file there"),
    TIMELINE,
    flag("--always", help="become COMMAND even if a unit failed"),
    flag("--stay", help="go on serving until a signal, without COMMAND; the exit status is then 128+N"),
    QUIET,
    tail="*",
)
def cmd_boot(args: Args) -> int:
    """Run the scripts of a directory in the order that their headers ask for (`help headers`); then become COMMAND."""
    path = os.path.abspath(agent_path(args.socket_path))  # scripts may change their working directory
    try:
        scripts = plan(args.paths, may_be_empty=bool(args.command))
    except UsageError as error:
        may_be_command = not args.command and not all(map(os.path.exists, args.paths[1:]))
        hint = "\ndid you forget -- before the command?" if may_be_command else ""
        raise UsageError(f"nothing was run:\n{error}{hint}") from None
    if args.check:
        put(plan_text(scripts))
        return 0
    if args.stay and args.command:
        raise UsageError("boot: --stay and -- COMMAND exclude each other: with a COMMAND it stays as long as that runs")
    if not scripts:
        become(args.command)
    values = {**vars(args), "command": args.command[0] if args.command else ""}
    options = BootOptions(**{name: values[name] for name in BootOptions._fields})
    loop = Loop((*PASSED_ON, signal.SIGWINCH) if args.command else (*STOPS, signal.SIGQUIT))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, loop.numbers)  # until the background process has its own Loop
    directory, child = private_directory(), 0
    try:
        child, link = in_background()
        if child:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return Front(loop, child, link, directory, args.command, args.grace).run(args.stay)
        boot = Boot(scripts, options, link, directory)
        code = boot_at(path, boot)
    finally:
        if not child:
            remove_directory(directory)
    boot.loop.restore_signals()
    return code


@Command(
    "install /usr/local/bin/coder_sync",
    Argument("paths", nargs="*", metavar="PATH", help="where to (default: its own place)"),
    Argument("--python", metavar="PROGRAM", help="the interpreter that is to run it (default: python3)"),
    QUIET,
)
def cmd_install(args: Args) -> None:
    """Write a copy of this program to PATH, with its bytecode: calls of it are fast."""
    python = os.path.abspath(args.python) if "/" in args.python else args.python
    for path in args.paths or [FILE]:
        say(f"{install(path, python)}: installed for {python or sys.executable}", quiet=args.quiet)
    if python:
        return
    try:
        tag = ask_python("python3", "-IS", "-c", "import sys; print(sys.implementation.cache_tag)").decode().strip()
    except Refused:
        tag = ""
    if tag != sys.implementation.cache_tag:
        which = "which is another Python, or not there"
        put(f"warning: calls start `python3`, {which}; if it is to be this one: --python {sys.executable}\n", 2)


@Command("reset pip-install", units_argument("all"), QUIET)
def cmd_reset(args: Args) -> None:
    """Make units that have ended pending again, and those skipped because of them."""
    names = make_client(args).reset(*args.units)
    say(f"pending again: {some_names(names)}" if names else "no unit has ended", quiet=args.quiet)


@Command(
    "stop db --grace 30s",
    units_argument("all"),
    Argument("--grace", type=duration, default=f"{GRACE:g}s", metavar="DURATION", help="time to end before KILL"),
    QUIET,
)
def cmd_stop(args: Args) -> None:
    """End the commands of UNIT and of what depends on it, dependents first."""
    answer = make_client(args).halt(*args.units, grace=args.grace)
    if answer.stopped:
        say(f"stopped: {some_names(answer.stopped)}", quiet=args.quiet)
    if answer.left or answer.cannot:
        raise Refused(still_running(answer))
    if not answer.stopped:
        say("nothing runs", quiet=args.quiet)


@Command("shutdown", QUIET)
def cmd_shutdown(args: Args) -> None:
    """End the agent, and return when it has ended; services have 8 s to end."""
    client = make_client(args)
    client.shutdown()
    say(f"agent at {client.socket_path}: ended", quiet=args.quiet)


@Command("env pip-install", UNIT)
def cmd_env(args: Args) -> None:
    """Print the variables that UNIT would start with, as its dependencies have left them, for `eval`."""
    lines = []
    for name, value in make_client(args).env(args.unit).items():
        if not is_variable(name):
            raise SyncError(f"the agent knows a variable that no shell can take: {ascii(name)[:60]}")
        quoted = value.replace("'", "'\\''")
        lines.append(f"export {name}='{quoted}'\n")
    put("".join(lines))


@Command("status pip-install --output json", UNIT, output_option("table", "json"), COLUMN)
def cmd_status(args: Args) -> None:
    """Show UNIT and its dependencies."""
    status = make_client(args).status(args.unit)
    put(json_text(plain(status)) if args.output == "json" else status_text(status, args.column))


@Command(
    "list --column unit,status",
    flag("-a", "--all", help="also names that were only ever wanted"),
    output_option("table", "json"),
    COLUMN,
)
def cmd_list(args: Args) -> None:
    """Show all units."""
    units = make_client(args).list(args.all)
    put(json_text(plain_units(units, LIST_KEYS)) if args.output == "json" else list_text(units, args.column))


@Command("why pip-install", units_argument("all that is stuck"))
def cmd_why(args: Args) -> None:
    """Say why UNIT waits, was skipped, failed or took so long; without UNIT, what is stuck."""
    names = list(map(check_name, args.units))
    graph = make_client(args).graph()
    put(why_text(graph, names))


@Command(
    "timeline --output svg > startup.svg",
    output_option("text", "svg", "json"),
    flag("--blame", help="units by how long they ran, and how long others waited"),
    Argument("--compare", metavar="FILE", help="compare a saved .json timeline with the present"),
)
def cmd_timeline(args: Args) -> None:
    """Show where the time went."""
    if args.output != "text" and (args.blame or args.compare):
        raise UsageError("--output is the form of the timeline itself; --blame and --compare print text")
    client = make_client(args)
    if args.compare:
        try:
            with open(open_file(args.compare), "rb") as f:
                os.set_blocking(f.fileno(), True)  # the writer of a pipe may take its time
                before = read_timeline(f.read(MAX_REPLY), args.compare)
        except OSError as error:
            raise UsageError(f"cannot read {args.compare}: {error.strerror}") from None
        put(compare_text(before, Startup(client.graph())))
    elif args.blame:
        put(blame_text(client.graph(), terminal()[0]))
    else:
        put(timeline_as(args.output, client.graph(), *terminal()))


@Command("graph pip-install --output mermaid", units_argument("all"), output_option("tree", "dot", "mermaid", "json"))
def cmd_graph(args: Args) -> None:
    """Show what depends on what, for all units or for some."""
    graph = part_of(make_client(args).graph(), args.units)
    if args.output == "tree":
        put(graph_tree(graph, args.units, terminal()[2]))
    elif args.output == "json":
        put(json_text(graph_data(graph)))
    else:
        put(graph_dot(graph) if args.output == "dot" else graph_mermaid(graph))


@Command("events --follow", flag("-f", "--follow", help="go on with what happens next"))
def cmd_events(args: Args) -> None:
    """Print what happened, one JSON object a line."""
    for event in make_client(args).events(args.follow):
        if not put(_dumps(plain(event)) + "\n"):
            return


def help_headers() -> str:
    """Return the help on headers."""
    rows = [[f"{word} {form}", meaning] for word, (form, meaning) in HEADERS.items()]
    return f"""\
A script of `boot` says what it needs in lines of its first comment (#, //, -- or ;):

    # coder-sync: want git-clone apt-install

{table(["HEADER", "MEANING"], rows)}
Of `unit`, `timeout`, `ready`, `ready-timeout` and `retry` there may be one each. A name with a blank
is quoted: want "a b". A duration is 30 or 30s, 10m, 1h30m, 500ms. `boot --check` finds mistakes and
shows the plan; see also `help probes`.

A script inherits the directory, user, environment and umask of boot. Its input is empty, and its
output goes line by line to that of boot. It is given the variables
  CODER_SYNC_UNIT          its unit
  CODER_SYNC_ENV           a file: the lines NAME=VALUE that it writes there are in the environment of
                           all units that depend on it
  CODER_AGENT_SOCKET_PATH  where the agent listens
"""


def help_probes() -> str:
    """Return the help on probes."""
    return f"""\
A unit with a probe, by the header `ready PROBE` or `run --ready PROBE`, is a service: it completes
when the probe succeeds, and its command runs on.

{table(["PROBE", "SUCCEEDS WHEN"], [*map(list, PROBE_FORMS.items())])}
It is tried at once, then less and less often, down to once a second, for the time of `ready-timeout`,
and is given the variables of its unit. Without HOST, it is this machine, by IPv4 or IPv6. What answers
before the command began is not the service: the unit fails then. `wait --ready PROBE` waits for any
but notify, and needs no agent.
"""


def key_comments(source: str, kind: type[Record]) -> dict[str, str]:
    """Return the keys of a record in JSON, each with its comment in our source."""
    import re

    fields = source.partition(f"\nclass {kind.__name__}(Record):\n")[2].partition("\n\n\n")[0]
    comments = re.findall(r"^    (\w+): .*?(?:  # (.*))?$", fields, re.M)
    return {key: text for key, text in comments if key not in NOT_SENT}


def help_json() -> str:
    """Return the help on what is printed as JSON."""
    with open(FILE, "rb") as file:
        source = source_in(file.read()).decode()
    rows = []
    for key, comment in key_comments(source, UnitStatus).items():
        marks = "s" + ("l" if key in LIST_KEYS else "") + ("t" if key in TIMELINE_KEYS else "")
        rows.append([key, marks, comment])
    text = f"""\
`list -o json` is a list of units, `status UNIT -o json` one unit. `timeline -o json` has "version" of the
form, "seconds" in all, a "summary", the "critical_path" ("unit_name", "seconds" of each step), and "units".
Keys of a unit in status (s), list (l) and timeline (t):

{table(["KEY", "IN", "MEANING"], rows)}
Times, as "started", are seconds since the agent began, in a timeline since the first sign of a unit. What has
not been is null. Newer versions may add keys.
"""
    events = "what `events` prints, one object a line"
    for title, kind in (('each of "dependencies"', Dependency), ('"owner"', Owner), (events, Event)):
        lines = [f"  {key.ljust(17)} {comment}\n" for key, comment in key_comments(source, kind).items()]
        text += f"\nKeys of {title}:\n" + "".join(lines)
    return text


def help_protocol() -> str:
    """Return the help on the protocol."""
    import textwrap

    methods = (f"{name} {' '.join(parameters(method))}".rstrip() for name, method in METHODS.items())
    listed = "\n".join(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="      ") for line in methods)
    errors = "\n".join(f"  {code}  {kind.__name__}" for code, kind in sorted(ERRORS.items(), reverse=True))
    return f"""\
One JSON-RPC 2.0 object a line, UTF-8, at most {MAX_LINE >> 10} KiB a request, over the Unix socket of the agent:

  echo '{{"jsonrpc":"2.0","id":1,"method":"want","params":{{"unit":"b","dependencies":["a"]}}}}' | nc -NU SOCKET

Answers may come out of order. `start`, `wait`, `stop` are answered when their time has come, and forgotten when
their connection closes (but not `stop`). After a line that is not JSON, or too long, the agent hangs up.

Methods and their parameters:
{listed}

"timeout" is in seconds, 0 for no limit, and so is "grace", 0 for KILL at once. "progress" asks for a notification
"waiting" when the wait begins and every {REPORT_EVERY:.0f} s. With "hold" the connection holds the unit, which fails if
it closes first. With "confirm" a start is undone if the connection closes before `confirm`. "supervisor", `boot`,
`owner`, `probing`, `retry`, `running` and `exited` are for who runs the command of a unit, and is told by the
notifications "stop" and "unit": of a boot each status, else what others have ended.

Error codes:
{errors}
"""


TOPICS: dict[str, Callable[[], str]] = {
    "headers": help_headers,
    "probes": help_probes,
    "exit-codes": lambda: (__doc__ or "").partition("Exit codes:\n\n")[2].partition("\n\n")[0] + "\n",
    "json": help_json,
    "protocol": help_protocol,
}


@Command(
    "help headers",
    Argument("topics", nargs="*", metavar="TOPIC", help=f"a command, or one of {', '.join(TOPICS)} (default: all)"),
)
def cmd_help(args: Args) -> None:
    """Say what there is, or more about TOPIC."""
    for topic in args.topics:
        put(TOPICS[topic]() if topic in TOPICS else help_page(command_named(topic)))
    if args.topics:
        return
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    put(f"""usage: {PROGRAM} COMMAND [ARG]...

Startup coordination for scripts that run in parallel. A unit is a named phase of work,
usually one script; it starts when the units it depends on are done.

{chr(10).join(lines)}

`{PROGRAM} COMMAND --help` tells more; `{PROGRAM} --version` prints the version.
`{PROGRAM} help TOPIC` tells of {", ".join(TOPICS)}.
`{PROGRAM} exp sync COMMAND` does the same as `{PROGRAM} COMMAND`.
""")


@Command("version")
def cmd_version(args: Args) -> None:
    """Print the version."""
    put(f"coder_sync {__version__}\n")


SHELL_SCRIPTS = {
    "bash": """\
complete -o default -C 'FILE completion bash -- 2>/dev/null' PROGRAM
""",
    "zsh": """\
_coder_sync() {
    local -a found
    found=(${(f)"$(${(Q)words[1]} completion zsh -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
(( ! $+functions[compdef] )) || compdef _coder_sync PROGRAM
""",
}


@Command(
    "completion bash >> ~/.bashrc",
    Argument("shell", choices=tuple(SHELL_SCRIPTS), metavar="SHELL", help="bash or zsh"),
    tail="*",
)
def cmd_completion(args: Args) -> None:
    """Print a script with which a shell completes our command lines."""
    import shlex

    if not args.command:
        path = shlex.quote(os.path.abspath(FILE)).replace("'", "'\\''")
        put(SHELL_SCRIPTS[args.shell].replace("PROGRAM", shlex.quote(PROGRAM)).replace("FILE", path))
        return
    line = os.fsencode(getenv("COMP_LINE"))[: number(getenv("COMP_POINT") or "0")]
    if args.shell == "bash" and line:
        found = bash_candidates(line.decode(errors="surrogateescape"), [*args.command, ""][1])
    else:
        found = candidates(args.command)
    put("".join(word + "\n" for word in found))


def bash_candidates(line: str, word: str) -> list[str]:
    """Return what may replace `word`, quoted for bash; nothing if `line` ends inside quotes.

    To bash a word begins also behind a `:` or `=`, so that `word` may be the end of the last word of `line` only.
    """
    import re
    import shlex

    try:
        words = shlex.split(line + ".")  # so that there is a last word, also behind a blank or a backslash
    except ValueError:  # a quote is open
        return []
    words[-1] = words[-1][:-1]
    size = len(words[-1]) - len(word.replace("\\", ""))  # of the part that bash leaves as it is
    return [re.sub(r"([^\w@%+=:,./-])", r"\\\1", found[size:]) for found in candidates(words[1:])]


def candidates(words: Sequence[str]) -> list[str]:
    """Return what the last word of a command line may become: options, choices, commands, units."""
    before = [part for word in words[:-1] for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    option_name, equals, last = words[-1].rpartition("=") if words[-1][:2] == "--" else ("", "", words[-1])
    before += [option_name] if equals else []
    commands = {**COMMANDS, "": Command("", Argument("command", choices=tuple(COMMANDS)))}  # "": no command yet
    try:
        command = commands.get(command_first([*before, ""])[0])
    except UsageError:
        return []
    if command is None or "--" in before:
        return []
    option = command.options.get(before[-1]) if before else None
    arguments = [option] if option and option.takes_value else command.positionals
    found = [*command.options] if last[:1] == "-" else []
    found += [choice for argument in arguments for choice in argument.words.get("choices", ())]
    metavars = {argument.words.get("metavar") for argument in arguments}
    found += [*COMMANDS, *TOPICS] if "TOPIC" in metavars else []
    found += known_units(before) if metavars & {"UNIT", "DEP"} else []
    return [option_name + equals + word for word in found if word.startswith(last)]


def known_units(words: Sequence[str]) -> list[str]:
    """Return the units of the agent that a command line addresses; none if it does not answer within a second."""
    try:
        path = Client(dict(zip(words, words[1:])).get("--socket-path", "")).socket_path
        with Channel(path) as channel:
            rows = channel.result(channel.request("list", all=True), 1.0)
        return [unit.unit_name for unit in records(UnitStatus, rows)]
    except SyncError:
        return []


if __name__ == "__main__":
    gc.freeze()  # what is loaded stays: not to look through it saves half a millisecond
    gc.enable()
    main()
