"""Run a script as the ranks of a group on the CPU, as torch's launcher does, but torch is imported once.

    python -m tests.forked NUM_RANKS SCRIPT ARGUMENTS...

The launcher and each of its ranks would import torch, which takes longer than most scripts. Here the ranks are forks of
a process that has imported it. They see no GPU, because a fork cannot use what its parent may have initialized.
"""

import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch._dynamo  # noqa: F401  a rank imports it for its first DTensor
    import torch.distributed as dist


def command(num_ranks: int, script: Path, *arguments: object) -> list[str]:
    """Return the command line that runs the script. The folder that has `tests` must be the working directory."""
    return [sys.executable, "-m", "tests.forked", str(num_ranks), str(script), *map(str, arguments)]


def run_rank(rank: int, num_ranks: int, port: int, argv: list[str]) -> int:
    """Run the script as this rank, and return its exit status."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(num_ranks: int, argv: list[str]) -> int:
    """Fork the ranks and serve their store. Return 1 as soon as one of them fails, and end the others."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = set()
    for rank in range(num_ranks):
        if (pid := os.fork()) == 0:
            status = run_rank(rank, num_ranks, port, argv)
            sys.stdout.flush()
            os._exit(status)
        ranks.add(pid)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    del store
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
