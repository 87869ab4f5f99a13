"""A worker without torch that does what a test says.

It replaces the real worker. It is a real process that starts in no time.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

_SCRIPT = """#!{python}
import itertools, json, os, resource, signal, sys, threading, time
from moebench.workload.case import Job
from moebench.machine.environment import Environment
from moebench.results.record import Status, record

option = dict(zip(sys.argv, sys.argv[1:]))
job_file = open(option["--jobs"])
head = json.loads(job_file.readline())
number_of_worker = int(option["--jobs"].rpartition("worker-")[2].partition(".")[0])
here = dict(env_id="e", device="cpu", os="o", cpu_model="c", cpu_cores=1, cpu_cores_usable=1, num_threads=1,
            memory_bytes=1, python="3", moebench="0", versions={{}})
events = open(option["--events"], "a")
jobs = []
started = set()
counts = itertools.count()

def end_with_supervisor():
    while os.read(0, 1):
        pass
    os._exit(1)

threading.Thread(target=end_with_supervisor, daemon=True).start()

def say(text):
    events.write(text)
    events.flush()

def line(kind, **fields):
    whose = dict(token=os.environ["MOEBENCH_WORKER"], rank=0, count=next(counts))
    return json.dumps(dict(kind=kind, **whose | fields)) + "\\n"

def ready(**fields):
    here.update(fields)
    say(line("ready", environment=Environment(**here).model_dump(mode="json")))

def next_job():
    text = ""
    while not text.endswith("\\n"):
        text += job_file.readline()
        time.sleep(0 if text else 0.001)
    jobs.append(Job.model_validate_json(text))

def start(number):
    if number in started:
        return
    started.add(number)
    while len(jobs) <= number:
        next_job()
    say(line("start", number=number))

def told(number, detail="stood in", status="unsupported"):
    ids = dict(run_id=head["run_id"], env_id=here["env_id"], round=head["round"])
    row = record(jobs[number], Status(status), detail=detail, **ids)
    return line("record", number=number, record=json.loads(row.to_json()))

def done(number, **said):
    start(number)
    say(told(number, **said))

def hang():
    threading.Event().wait()

print("the pid is", os.getpid(), flush=True)
{script}
"""

#: A script that does every job it is given.
ALL = "ready()\nfor number in itertools.count(): done(number)\n"

#: The command line. Its first argument is the program that it starts for its workers in place of Python.
_COMMAND_LINE = """
import sys
from types import SimpleNamespace
from moebench.cli import app
from moebench.run import supervisor
supervisor.sys = SimpleNamespace(executable=sys.argv.pop(1))
app.main()
"""


def write(path: Path, script: str) -> Path:
    """Write the stand-in as a program that runs `script`."""
    path.write_text(_SCRIPT.format(python=sys.executable, script=script))
    path.chmod(0o755)
    return path


def program(worker: Path) -> str:
    """Return the text of a program `moebench` that draws nothing and starts `worker` in place of Python."""
    without_pictures = "from moebench.report import folder\nfolder.finish = lambda results: folder.Written()\n"
    return f"#!{sys.executable}\nimport sys\nsys.argv.insert(1, {str(worker)!r})\n{without_pictures}{_COMMAND_LINE}"


def started(program: Path, *arguments: object, cwd: Path, **options: object) -> subprocess.Popen[str]:
    """Start `moebench …` in a process of its own, with that program for its workers."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _COMMAND_LINE, str(program), *map(str, arguments)]
    pipe = subprocess.PIPE
    variables = {**os.environ, "PYTHONPATH": path, "COLUMNS": "100"}
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload, no-any-return]
