"""Run an export as a user does, and see from outside what each stage takes: seconds, and memory by kind.

Memory is read from `/proc/PID/status`. At the end of a stage, which a tick line on stderr tells, the system's record of the
peak (VmHWM) is read and started anew, so that a stage's peak is exact and no sample has to meet it; what it is made of (memory
of the process's own, mapped files) is sampled.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EVERY = 0.05
"""Seconds between samples."""
_TICK = re.compile(r"^\[✓\] (\S.*?)\s+([\d.]+) s(?:  |$)")
_ENTRY = re.compile(r"^(VmHWM|VmRSS|RssAnon|RssFile|RssShmem):\s+(\d+) kB$", re.MULTILINE)
_LAST_LINES = 12


@dataclass
class Stage:
    """A stage: its seconds as the export tells them, and peaks in bytes.

    `peak` is of all resident memory. `own` is the most memory of the process's own that a sample saw, `mapped` the most of
    mapped files, which the system can take back and read again.
    """

    name: str
    seconds: float = 0.0
    peak: int = 0
    own: int = 0
    mapped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


@dataclass
class Watched:
    """A process that has ended.

    Attributes:
        code: its exit code.
        seconds: of the whole process, start of Python and imports included.
        stages: in order; the time before the first and after the last is in `start` and `finish`.
        printed: on stdout.
        said: the last lines on stderr.
    """

    code: int = 0
    seconds: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    printed: str = ""
    said: str = ""

    @property
    def peak(self) -> int:
        """Bytes of resident memory at the peak of the whole process."""
        return max((stage.peak for stage in self.stages), default=0)

    @property
    def own(self) -> int:
        """Bytes of memory of its own at their peak."""
        return max((stage.own for stage in self.stages), default=0)


def export_command(arguments: Sequence[str]) -> list[str]:
    """`clada-export` with these arguments, by this Python."""
    return [sys.executable, "-m", "clada_export.cli", "export", *arguments]


def watch(command: Sequence[str], **settings: Any) -> Watched:
    """Run a command to its end.

    Args:
        settings: of `subprocess.Popen`, such as `env`.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings) as process:
        try:
            found = _Watch(process, start).run()
        except BaseException:
            process.kill()
            raise
    found.code = process.returncode
    found.seconds = time.perf_counter() - start
    told = sum(stage.seconds for stage in found.stages)
    found.stages[-1].seconds = max(0.0, found.seconds - told)
    return found


class _Watch:
    def __init__(self, process: subprocess.Popen[bytes], start: float) -> None:
        self._process, self._start = process, start
        self._folder = Path("/proc") / str(process.pid)
        self._now = Stage("")
        self._before = 0.0
        self._found = Watched(stages=[Stage("start")])

    def run(self) -> Watched:
        """Read both streams and the memory until both streams end; no thread is needed for it."""
        streams = {self._process.stdout: b"", self._process.stderr: b""}
        lines: list[str] = []
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                assert stream is not None
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(timeout=EVERY):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                        continue
                    streams[key.fileobj] += data  # type: ignore[index]
                    if key.fileobj is self._process.stderr:
                        *whole, streams[self._process.stderr] = streams[self._process.stderr].split(b"\n")
                        for line in (each.decode("utf-8", "replace") for each in whole):
                            lines.append(line)
                            self._tick(line)
                self._sample()
            lines.append(streams[self._process.stderr].decode("utf-8", "replace"))
        self._process.wait()
        self._end("finish", 0.0)
        self._found.printed = streams[self._process.stdout].decode("utf-8", "replace")
        self._found.said = "\n".join(line for line in lines if line)[-4000:]
        return self._found

    def _tick(self, line: str) -> None:
        match = _TICK.match(line)
        if match is None:
            return
        self._sample()
        if len(self._found.stages) == 1:
            self._found.stages[0].seconds = max(0.0, time.perf_counter() - self._start - float(match[2]))
        self._end(match[1], float(match[2]))

    def _end(self, name: str, seconds: float) -> None:
        """Close a stage: what was seen since the one before is its."""
        self._now.name, self._now.seconds = name, seconds
        self._found.stages.append(self._now)
        self._now = Stage("")
        try:
            (self._folder / "clear_refs").write_text("5")  # VmHWM begins anew at what is resident
        except OSError:
            return  # it has ended

    def _sample(self) -> None:
        try:
            text = (self._folder / "status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return
        values = {name: int(size) << 10 for name, size in _ENTRY.findall(text)}
        now = self._now
        now.peak = max(now.peak, values.get("VmHWM", 0))
        now.own = max(now.own, values.get("RssAnon", 0))
        now.mapped = max(now.mapped, values.get("RssFile", 0) + values.get("RssShmem", 0))


def parsed(watched: Watched) -> dict[str, Any]:
    """What the export printed as JSON; empty if it ended in an error."""
    return dict(json.loads(watched.printed)) if watched.code == 0 and watched.printed.strip() else {}


def reason(watched: Watched) -> str:
    """Why it ended in an error."""
    if watched.code < 0:
        return f"ended by signal {-watched.code}"
    return "\n".join(watched.said.splitlines()[-_LAST_LINES:])
