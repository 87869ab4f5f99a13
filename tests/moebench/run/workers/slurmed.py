"""Stand-ins for Slurm's `srun` and `scontrol`, and the environment variables of a job with several nodes.

The nodes are processes of this machine. The stand-in for `srun` takes only options that Slurm's manual has. It runs the
tasks of a step on nodes that are not down, and waits for them.
"""

import os
import sys

from tests.moebench.executed import python_path

_SRUN = """#!{python}
import argparse, os, signal, subprocess, sys
from pathlib import Path

parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node"):
    parser.add_argument(f"--{{name}}", type=int)
for name in ("nodelist", "mem", "kill-on-bad-exit"):
    parser.add_argument(f"--{{name}}")
for name in ("exact", "no-kill"):
    parser.add_argument(f"--{{name}}", action="store_true")
parser.add_argument("command", nargs=argparse.REMAINDER)
option = parser.parse_args()
nodes = option.nodelist.split(",")
assert len(nodes) == option.nodes == option.ntasks and option.ntasks_per_node == 1, sys.argv
if any(Path({folder!r}, f"{{node}}-is-down").exists() for node in nodes):
    sys.exit("srun: error: Unable to create step for job 7: Requested nodes are not available")
tasks = [
    subprocess.Popen(option.command, env={{**os.environ, "SLURM_NODEID": str(number), "SLURMD_NODENAME": node}})
    for number, node in enumerate(nodes)
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
_SCONTROL = """#!{python}
import sys
assert sys.argv[1:3] == ["show", "hostnames"] and sys.argv[3] == "node[1-{count}]", sys.argv
print(*(f"node{{number}}" for number in range(1, {count} + 1)), sep="\\n")
"""


def job(folder, count=2, cpus=1):
    """Write the programs into the folder. Return the variables of a batch script on the first of `count` nodes."""
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        program = folder / name
        program.write_text(text.format(python=sys.executable, folder=str(folder), count=count))
        program.chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "PYTHONPATH": python_path(),
        "SLURM_JOB_NODELIST": f"node[1-{count}]",
        "SLURM_JOB_NUM_NODES": str(count),
        "SLURM_CPUS_ON_NODE": str(cpus),
        "SLURMD_NODENAME": "localhost",  # the supervisor's address for the hosts
    }
