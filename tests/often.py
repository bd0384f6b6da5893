"""`torch_bregman` that looks and saves at every chance, and some faults, for tests: FAULT=NAME:STEP[:RANK]."""

import os
import signal
import sys
import time

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_bregman.cli import main
from torch_bregman.train import loop

loop.LOOK_EVERY = loop.SAVE_EVERY = 0.0
loop.SAVE_SHARE = 1e9
counted = [0]
fault, _, where = os.environ.get("FAULT", "").partition(":")
step, _, rank = where.partition(":")


def strike(optimizer, *_):
    counted[0] += 1
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if counted[0] != int(step) or int(os.environ["RANK"]) != int(rank or 1) or restarted:
        return
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == "nan":
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("nan"))
    elif fault == "late":
        time.sleep(2)
    elif fault == "hang":
        time.sleep(60)


if fault:
    register_optimizer_step_post_hook(strike)
main(sys.argv[1:])
