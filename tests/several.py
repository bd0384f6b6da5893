"""Several processes that train together, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def together(module: str, function: str, size: int, *args: object, timeout: float = 400) -> None:
    """Call `function` of the test module in `size` processes with the rank as first argument; fails where one fails."""
    port = free_port()
    code = f"import sys, {module}; {module}.{function}(*sys.argv[1:])"
    processes = []
    for rank in range(size):
        environment = {
            **os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *map(str, args)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    for rank, (process, text) in enumerate(zip(processes, said, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {size} ended with {process.returncode}:\n{text}"


def torchrun(
    folder: Path, *args: object, size: int = 2, options: tuple[str, ...] = ("--standalone",), **more
) -> subprocess.Popen:
    """`torchrun … -m torch_bregman ARGS` in `folder`, with what it says on its standard output."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), *options,
        "-m", more.pop("module", "torch_bregman"), *map(str, args),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more.pop("env", {})
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def outcome(process: subprocess.Popen, timeout: float = 300) -> str:
    """All that it said, when it has ended."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
