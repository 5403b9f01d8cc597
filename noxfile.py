"""Everything development needs: `nox` lints, checks types and tests; `nox -s bench` measures."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "uv|venv"  # uv makes an environment in a second, the interpreter's own venv in six
nox.options.download_python = "never"  # those that are there

PYTHONS = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, with ruff."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, with mypy."""
    session.install("mypy")
    session.run("mypy", "--strict", "coder_sync.py")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite, on every interpreter from 3.8 that is there."""
    session.install("pytest", "pytest-xdist")
    session.run("pytest", "-q", "-n", "3", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Which lines the in-process tests reach; processes started by tests are not counted."""
    session.install("pytest", "coverage")
    session.run("coverage", "run", "--include=coder_sync.py", "-m", "pytest", "-q", *session.posargs)
    session.run("coverage", "report", "-m")


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """Print the benchmark's table: ratios within one run. Fails nothing; a machine has good and bad hours."""
    Bench(Path(sys.executable).resolve(), session.posargs).run()  # the system's, with all that its `site` loads


@nox.session
def attack(session: nox.Session) -> None:
    """Random input against real processes: `nox -s attack -- --minutes N` for each attack, 1 if not said."""
    words = list(session.posargs)
    minutes = float(words.pop(words.index("--minutes") + 1)) if "--minutes" in words else 1.0
    words = [word for word in words if word != "--minutes"]
    session.install("pytest")
    session.run("pytest", "-q", "-m", "attack", *words, env={"ATTACK_SECONDS": str(60 * minutes)})


class Bench:
    """Each row is a method that returns (what, figure, against, figure, ratio or other result, to reach)."""

    def __init__(self, python: Path, only: list[str]) -> None:
        self.only = only
        self.directory = tempfile.TemporaryDirectory(prefix="coder-sync-bench-")
        self.python = os.path.join(self.directory.name, "python3")
        os.symlink(python, self.python)
        self.env = dict(os.environ, PATH=os.path.dirname(self.python) + ":" + os.environ["PATH"])
        self.file = os.path.join(self.directory.name, "coder_sync.py")  # the installed copy, which people use
        subprocess.run([self.python, "coder_sync.py", "install", "-q", self.file], env=self.env, check=True)
        self.count = 0

    def run(self) -> None:
        rows = [name for name in dir(self) if name.startswith("row_")]
        print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
        print("| what | measured | against | measured | ratio | to reach |\n| --- | --- | --- | --- | --- | --- |")
        for name in rows:
            if not self.only or any(word in name for word in self.only):
                for row in getattr(self, name)():
                    print("| " + " | ".join(row) + " |", flush=True)
        self.directory.cleanup()

    # -- tools --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def agent(self) -> Iterator[subprocess.Popen]:
        """An agent on a new socket, which `self.env` names."""
        self.count += 1
        self.path = os.path.join(self.directory.name, f"{self.count}.sock")
        self.env["CODER_AGENT_SOCKET_PATH"] = self.path
        agent = subprocess.Popen([self.file, "serve", "--quiet"], env=self.env)
        subprocess.run([self.file, "ping", "--wait", "10s"], env=self.env, check=True, stdout=subprocess.DEVNULL)
        try:
            yield agent
        finally:
            agent.terminate()
            agent.wait()

    def connect(self) -> Callable[..., dict]:
        """An open connection: call(method, **params) returns the answer; call.send and call.read are its halves."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        file = sock.makefile("rb")

        def send(method: str, **params: object) -> None:
            sock.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")

        def call(method: str, **params: object) -> dict:
            send(method, **params)
            answer: dict = json.loads(file.readline())
            assert "error" not in answer, answer
            return answer

        call.send, call.read, call.sock = send, lambda: json.loads(file.readline()), sock
        return call

    def run_all(self, commands: list[list[str]]) -> Cost:
        """What these processes and all of theirs take, started at once, last first."""
        began, cpu = time.perf_counter(), 0.0
        running = [subprocess.Popen(c, env=self.env, stdout=subprocess.DEVNULL) for c in reversed(commands)]
        for process in running:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.WEXITSTATUS(status)
            assert status == 0, process.args
            cpu += usage.ru_utime + usage.ru_stime
        return Cost(time.perf_counter() - began, cpu)

    def costs(self, runs: int, *commands: list[str]) -> list[Cost]:
        """The median of each command, the runs interleaved."""
        taken = [[self.run_all([command]) for command in commands] for _ in range(runs)]
        return [median(costs) for costs in zip(*taken)]

    def commands(self, runs: int, *commands: list[str]) -> list[float]:
        """Median seconds of each command, the runs interleaved."""
        return [cost.wall for cost in self.costs(runs, *commands)]

    def resident(self, pid: int) -> float:
        """MB of memory."""
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
            return int(next(line for line in f if line.startswith("VmRSS")).split()[1]) / 1024

    @staticmethod
    def layers(layers: int, width: int) -> list[tuple[str, list[str]]]:
        """A layered graph: unit and dependencies."""
        deps = range(min(2, width))
        return [
            (f"u{i}-{j}", [f"u{i - 1}-{(j + k) % width}" for k in deps] if i else [])
            for i in range(layers)
            for j in range(width)
        ]

    # -- rows ---------------------------------------------------------------------------------------------

    def wake_up(self, others: int = 0) -> tuple[float, float]:
        """Median seconds from `complete` to the answered `start`, and of a ping."""
        with self.agent():
            waiter, worker = self.connect(), self.connect()
            follow = [self.file, "events", "--follow"]
            watchers = [subprocess.Popen(follow, env=self.env, stdout=subprocess.PIPE) for _ in range(others)]
            worker("want", unit="first")
            for watcher in watchers:
                watcher.stdout.readline()  # it follows
                threading.Thread(target=watcher.stdout.read).start()
            wakes, pings = [], []
            for i in range(1000):
                worker("start", unit=f"a{i}")
                waiter.send("start", unit=f"b{i}", dependencies=[f"a{i}"], progress=True)
                waiter.read()  # it waits
                began = time.perf_counter()
                worker.send("complete", unit=f"a{i}")
                waiter.read()
                wakes.append(time.perf_counter() - began)
                worker.read()
                began = time.perf_counter()
                worker("ping")
                pings.append(time.perf_counter() - began)
            for watcher in watchers:
                watcher.kill()
                watcher.wait()
        return statistics.median(wakes), statistics.median(pings)

    def row_1_wake_up(self) -> Iterator[tuple[str, ...]]:
        wake, ping = self.wake_up()
        yield ("wake-up: complete sent to start answered", us(wake), "ping on an open connection", us(ping),
               ratio(wake, ping), "4x")  # fmt: skip

    def row_2_complete(self) -> Iterator[tuple[str, ...]]:
        imports, call = "import argparse, json, socket", ["complete", "x"]
        questions = ("list", "status x", "ping")
        plain = shutil.copy("coder_sync.py", os.path.join(self.directory.name, "plain.py"))
        rows = [
            ("plain file, `FILE complete`", [plain, *call], ["-IS", "-c", "pass"], "3x"),
            ("plain file, `python3 FILE complete`", [self.python, plain, *call], ["-c", imports], "2.3x"),
            ("installed, `python3 PATH complete`", [self.python, self.file, *call], ["-c", "pass"], "1.15x"),
            ("installed, `PATH complete`", [self.file, *call], ["-IS", "-c", "pass"], "1.35x"),
            *(
                (f"installed, `PATH {ask}`", [self.file, *ask.split()], ["-IS", "-c", "pass"], "1.6x")
                for ask in questions
            ),
        ]
        with self.agent():
            self.connect()("want", unit="x")
            for what, ours, words, reach in rows:
                costs = self.costs(60, ours, [self.python, *words])
                yield from compare(what, costs[0], f"python3 {' '.join(words)}", costs[1], reach)

    def boot(self, line: str, me: str, instead: str = "") -> tuple[Cost, Cost]:
        """A boot of 20 units by scripts, and the same with other calls, or else the critical path alone."""

        def scripts(me: str) -> list[list[str]]:
            words = [
                (unit, " ".join(deps), "".join(f"--want {dep} " for dep in deps)) for unit, deps in self.layers(5, 4)
            ]
            return [["sh", "-c", line.format(me=me, unit=unit, deps=deps, wants=wants)] for unit, deps, wants in words]

        ours, other = [], []
        for _ in range(7):
            other.append(self.run_all(scripts(instead) if instead else [["sh", "-c", "; ".join(["sleep 0.05"] * 5)]]))
            with self.agent():
                ours.append(self.run_all(scripts(me)))
        return median(ours), median(other)

    def row_3_boot_calls(self) -> Iterator[tuple[str, ...]]:
        line = "test -z '{deps}' || {me} want {unit} {deps} && {me} start {unit} && sleep 0.05 && {me} complete {unit}"
        ours, other = self.boot(line, self.file)
        yield ("boot of 20 units, want/start/complete, `PATH`", ms(ours.wall), "critical path alone", ms(other.wall),
               ratio(ours.wall, other.wall), "2.8x")  # fmt: skip
        ours, other = self.boot(line, f"{self.python} {self.file}", f"{self.python} -c pass")
        what = "boot of 20 units, want/start/complete, `python3 PATH`"
        yield from compare(what, ours, "`python3 -c pass` for each", other, "1.15x")

    def row_4_thousand(self) -> Iterator[tuple[str, ...]]:
        with self.agent() as agent:
            worker = self.connect()
            worker("start", unit="gate")
            before = self.resident(agent.pid)
            waiters = [self.connect() for _ in range(1000)]
            for waiter in waiters:
                waiter.send("wait", units=["gate"], progress=True)
            for waiter in waiters:
                waiter.read()
            during = self.resident(agent.pid)
            began = time.perf_counter()
            worker("complete", unit="gate")
            for waiter in waiters:
                waiter.read()
            took = time.perf_counter() - began
        yield "1,000 waiting: agent's memory", mb(during), "idle", mb(before), f"+{during - before:.1f} MB", "+48 MB"
        yield "1,000 waiting: all released", ms(took), "", "", "", "1 s"

    def row_5_chain(self) -> Iterator[tuple[str, ...]]:
        for order, step in (("first to last", 1), ("last to first", -1)):
            cost: dict[int, list[float]] = {}
            for size in (100, 10_000):
                with self.agent():
                    call = self.connect()
                    began = time.perf_counter()
                    for i in range(1, size)[::step]:
                        call("want", unit=f"u{i}", dependencies=[f"u{i - 1}"])
                    middle = time.perf_counter()
                    call("want", unit="u0")
                    for i in range(size):
                        call("complete", unit=f"u{i}")
                    cost[size] = [(middle - began) / size, (time.perf_counter() - middle) / size]
            for i, verb in enumerate(("want", "complete")):
                a, b = cost[10_000][i], cost[100][i]
                yield f"one {verb}, chain of 10,000, {order}", us(a), "at 100", us(b), ratio(a, b), "3x"

    def row_6_boot_run(self) -> Iterator[tuple[str, ...]]:
        ours, other = self.boot("exec {me} run {wants} {unit} -q -- sleep 0.05", self.file)
        yield ("boot of 20 units, one `run` each", ms(ours.wall), "critical path alone", ms(other.wall),
               ratio(ours.wall, other.wall), "1.7x")  # fmt: skip

    def row_7_kill(self) -> Iterator[tuple[str, ...]]:
        took = []
        with self.agent():
            for i in range(30):
                run = subprocess.Popen([self.file, "run", f"a{i}", "-q", "--", "sleep", "60"], env=self.env)
                start = subprocess.Popen([self.file, "start", f"b{i}", "--want", f"a{i}"], env=self.env,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
                assert start.stdout
                start.stdout.readline()  # it waits
                while b"started" not in json.dumps(self.connect()("status", unit=f"a{i}")).encode():
                    pass
                child = ""
                while not child:  # it has been started, and soon has its command
                    of_run = ["ps", "-o", "pid=", "--ppid", str(run.pid)]
                    child = subprocess.run(of_run, stdout=subprocess.PIPE, text=True, check=False).stdout
                began = time.perf_counter()
                run.kill()
                assert start.wait() == 4
                took.append(time.perf_counter() - began)
                run.wait()
                subprocess.run(["kill", *child.split()], check=False)
            ours, ping = statistics.median(took), self.commands(30, [self.file, "ping"])[0]
        yield (
            "SIGKILL of a run to the end of the start behind it",
            ms(ours),
            "one `ping`",
            ms(ping),
            ratio(ours, ping),
            "1x",
        )

    def row_8_memory(self) -> Iterator[tuple[str, ...]]:
        with self.agent():
            code = "import argparse, json, socket; print(flush=True); input()"
            base = subprocess.Popen([self.python, "-IS", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            run = subprocess.Popen([self.file, "run", "a", "--want", "b", "--", "true"], env=self.env,
                                   stderr=subprocess.PIPE)  # fmt: skip
            assert base.stdout and run.stderr
            base.stdout.readline()
            run.stderr.readline()
            ours, other = self.resident(run.pid), self.resident(base.pid)
            base.kill()
            run.kill()
            run.wait()
            base.wait()
        yield (
            "resident memory of one waiting run",
            mb(ours),
            "python3 with argparse, json, socket",
            mb(other),
            ratio(ours, other),
            "1.15x",
        )

    def row_9_watchers(self) -> Iterator[tuple[str, ...]]:
        alone, watched = [], []
        for _ in range(3):
            alone.append(self.wake_up()[0])
            watched.append(self.wake_up(5)[0])
        a, b = statistics.median(watched), statistics.median(alone)
        yield "wake-up with 5 watchers", us(a), "without", us(b), ratio(a, b), "1.10x"

    def row_a_ten_thousand(self) -> Iterator[tuple[str, ...]]:
        with self.agent():
            call = self.connect()
            for i in range(10_000):
                call(
                    "start" if i % 3 else "want",
                    unit=f"unit-{i}",
                    dependencies=[f"unit-{i // 10}"] if i % 3 == 0 and i else [],
                )
            pings: list[float] = []
            done = threading.Event()

            def ping() -> None:
                other = self.connect()
                while not done.is_set():
                    began = time.perf_counter()
                    other("ping")
                    pings.append(time.perf_counter() - began)
                    done.wait(0.002)

            for words in (["list"], ["graph", "-o", "json"], ["timeline", "-o", "json"]):
                done.clear()
                pings.clear()
                beside = threading.Thread(target=ping)
                beside.start()
                took = self.commands(5, [self.file, *words])[0]
                done.set()
                beside.join()
                yield (
                    f"10,000 units: {' '.join(words)}",
                    ms(took),
                    "a ping beside it",
                    ms(statistics.median(pings)),
                    "",
                    "1 s; 50 ms",
                )

    def startup_d(self, graph: list[tuple[str, list[str]]], work: str) -> str:
        """A directory of scripts for `boot`."""
        directory = tempfile.mkdtemp(dir=self.directory.name)
        for unit, deps in graph:
            path = os.path.join(directory, unit)
            with open(path, "w", encoding="ascii") as f:
                f.write("#!/bin/sh\n" + (f"# coder-sync: want {' '.join(deps)}\n" if deps else "") + work + "\n")
            os.chmod(path, 0o755)
        return directory

    def row_b_boot(self) -> Iterator[tuple[str, ...]]:
        self.env["CODER_AGENT_SOCKET_PATH"] = os.path.join(self.directory.name, "boot.sock")
        for layers, width in ((5, 4), (10, 10)):
            directory = self.startup_d(self.layers(layers, width), "sleep 0.05")
            floor = ["sh", "-c", "; ".join(["sleep 0.05"] * layers)]
            ours, other = self.commands(7, [self.file, "boot", "-q", directory], floor)
            yield (
                f"boot of {layers * width} units, `boot`",
                ms(ours),
                "critical path alone",
                ms(other),
                ratio(ours, other),
                "1.18x",
            )

    def row_c_boot_thousand(self) -> Iterator[tuple[str, ...]]:
        self.env["CODER_AGENT_SOCKET_PATH"] = os.path.join(self.directory.name, "boot.sock")
        graph = self.layers(10, 100)
        directory = self.startup_d(graph, ":")
        with open(os.path.join(directory, "Makefile"), "w", encoding="ascii") as f:
            f.write("all: " + " ".join(unit for unit, _ in graph) + "\n")
            f.writelines(f"{unit}: {' '.join(deps)}\n\t@{directory}/./{unit}\n" for unit, deps in graph)
            f.write(".PHONY: all " + " ".join(unit for unit, _ in graph) + "\n")
        ours, other = self.commands(3, [self.file, "boot", "-q", directory], ["make", "-s", "-j1000", "-C", directory])
        yield (
            "boot of 1,000 units that do nothing, `boot`",
            ms(ours),
            "make -j1000",
            ms(other),
            ratio(ours, other),
            "3x",
        )

    def row_d_boot_memory(self) -> Iterator[tuple[str, ...]]:
        sizes = []
        for count in (1, 100):
            path = os.path.join(self.directory.name, f"memory{count}.sock")
            self.path = self.env["CODER_AGENT_SOCKET_PATH"] = path
            graph = [("gate", []), *((f"u{i}", ["gate"]) for i in range(count))]
            boot = subprocess.Popen([self.file, "boot", "-q", self.startup_d(graph, "sleep 60")], env=self.env,
                                    stderr=subprocess.DEVNULL)  # fmt: skip
            subprocess.run([self.file, "ping", "--wait", "10s"], env=self.env, check=True, stdout=subprocess.DEVNULL)
            call = self.connect()
            while (
                sum(u["status"] != "pending" for u in call("list")["result"]) != 1
                or len(call("list")["result"]) <= count
            ):
                pass
            sizes.append(self.resident(boot.pid))
            boot.terminate()
            boot.wait()
        yield (
            "boot's memory, 100 units wait",
            mb(sizes[1]),
            "1 waits",
            mb(sizes[0]),
            f"+{sizes[1] - sizes[0]:.1f} MB",
            "+4 MB",
        )


class Cost(NamedTuple):
    """Seconds of a process and of all that it started."""

    wall: float
    cpu: float


def median(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(statistics.median, zip(*costs)))


def compare(what: str, ours: Cost, against: str, other: Cost, reach: str) -> Iterator[tuple[str, ...]]:
    """A row of wall time and one of CPU time."""
    for kind, a, b in (("wall", ours.wall, other.wall), ("CPU", ours.cpu, other.cpu)):
        yield f"{what}, {kind}", ms(a), against, ms(b), ratio(a, b), reach


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def mb(size: float) -> str:
    return f"{size:.1f} MB"


def ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x"
