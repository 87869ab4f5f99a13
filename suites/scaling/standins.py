"""Stand in for the workers of a run: few processes serve many workers, so that only the supervisor is measured.

The supervisor starts a worker as a program. The program of `launcher` tells a server through a pipe which files the
worker has, and then only waits until the supervisor ends it. A server reads the jobs of its workers, and reports each
job as measured after a time, in the events that a real worker writes.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from synthetic import PUBLISHED

from moebench.machine.environment import Environment
from moebench.results.files import ENVIRONMENT_NAME
from moebench.results.frame import load, to_records
from moebench.results.record import Status
from moebench.workload.case import CaseFields, Job

_LAUNCHER = """#!/bin/sh
echo "$MOEBENCH_WORKER" "$@" > {pipes}/$(($$ % {num_servers}))
exec cat
"""
#: A server looks for jobs once per this many seconds, as a worker does.
_POLL_S = 0.005


def launcher(folder: Path, num_servers: int) -> Path:
    """Write the program that the supervisor starts for each worker, and make the servers' pipes. Return its path."""
    for number in range(num_servers):
        os.mkfifo(folder / str(number))
    path = folder / "worker"
    path.write_text(_LAUNCHER.format(pipes=folder, num_servers=num_servers))
    path.chmod(0o755)
    return path


class _Worker:
    """A worker as its server sees it: its files, its job, and since when it waits for one."""

    def __init__(self, token: str, jobs: Path, events: Path) -> None:
        self.token = token
        self.jobs = jobs.open(encoding="utf-8")
        self.events = events.open("a", encoding="utf-8")
        self.head = json.loads(self.jobs.readline())
        self.waits_since = time.monotonic()
        self.number = 0
        self._num_events = 0
        self._line = self._row = ""

    def say(self, kind: str, fields: str) -> None:
        whose = f'"kind":"{kind}","token":"{self.token}","rank":0,"count":{self._num_events}'
        self.events.write(f"{{{whose},{fields}}}\n")
        self.events.flush()
        self._num_events += 1

    def next_job(self) -> Job | None:
        """Return the next job of the worker's file, if it is there."""
        self._line += self.jobs.readline()
        if not self._line.endswith("\n"):
            return None
        line, self._line = self._line, ""
        return Job.model_validate_json(line)

    def start(self, row: str) -> None:
        self._row = row
        self.say("start", f'"number":{self.number}')

    def end(self) -> None:
        self.say("record", f'"number":{self.number},"record":{self._row}')
        self.number += 1
        self.waits_since = time.monotonic()


class _Server:
    """Serves the workers that it hears of through its pipe. A job takes `seconds`, by chance half more or less."""

    def __init__(self, pipe: str, seconds: float) -> None:
        self._pipe, self._seconds = os.open(pipe, os.O_RDWR | os.O_NONBLOCK), seconds
        rows = (row for row in to_records(load(PUBLISHED)) if row.status is Status.ok and row.mode == "train")
        of_a_job = {*CaseFields.model_fields, "case_id", "backend", "dispatcher", "run_id", "env_id", "round"}
        measured = {name: cell for name, cell in json.loads(next(rows).to_json()).items() if name not in of_a_job}
        self._measured = json.dumps(measured)[1:-1]
        self._environment = Environment.from_file(PUBLISHED / ENVIRONMENT_NAME)
        self._draw = random.Random(0)
        self._busy: list[tuple[float, _Worker]] = []  # with the time at which the job ends
        self._free: list[_Worker] = []
        self.waits: list[float] = []  # how long workers waited for a job, in seconds

    def serve(self) -> None:
        while True:
            self._free += self._new()
            now = time.monotonic()
            due = [worker for end, worker in self._busy if end <= now]
            self._busy = [one for one in self._busy if one[0] > now]
            for worker in due:
                worker.end()
            self._free = [worker for worker in [*self._free, *due] if not self._starts(worker)]
            if not due:
                time.sleep(_POLL_S)

    def _new(self) -> Iterator[_Worker]:
        try:
            lines = os.read(self._pipe, 1 << 16).decode().splitlines()  # a shell writes a line in one piece
        except BlockingIOError:
            return
        for line in lines:
            token, *arguments = line.split()
            option = dict(itertools.pairwise(arguments))
            worker = _Worker(token, Path(option["--jobs"]), Path(option["--events"]))
            worker.say("ready", f'"environment":{self._environment.model_dump_json()}')
            yield worker

    def _starts(self, worker: _Worker) -> bool:
        """Start the next job of a worker, if it has one."""
        job = worker.next_job()
        if job is None:
            return False
        now = time.monotonic()
        if worker.number:
            self.waits.append(now - worker.waits_since)
        worker.start(self._row(worker, job))
        self._busy.append((now + self._draw.uniform(0.5, 1.5) * self._seconds, worker))
        return True

    def _row(self, worker: _Worker, job: Job) -> str:
        ids = {"case_id": job.case.case_id, "backend": job.backend, "dispatcher": job.dispatcher}
        ids |= {"run_id": worker.head["run_id"], "env_id": self._environment.env_id, "round": worker.head["round"]}
        return f"{{{json.dumps(ids)[1:-1]},{job.case.model_dump_json()[1:-1]},{self._measured}}}"


def main() -> None:
    """Serve workers until SIGTERM; then print how long workers waited for a job, in seconds."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pipe, seconds = sys.argv[1:]
    server = _Server(pipe, float(seconds))
    print("ready", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        json.dump(server.waits, sys.stdout)


if __name__ == "__main__":
    main()
