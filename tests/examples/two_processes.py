"""Run by torchrun, with the examples on PYTHONPATH: trains like train.py, then fails unless every process holds the
same parameters and buffers."""

import options
import torch
import train
from interrupt import StopRequest
from processes import Processes

args = options.parse()
processes = Processes.start(args.device)
run, train_loader, test_loader = train.prepare(args, processes)
with StopRequest() as stop:
    assert train.train(run, train_loader, test_loader, stop)
for states in zip(*processes.gather(list(run.model.state_dict().values())), strict=True):
    assert all(torch.equal(states[0], state) for state in states[1:])
if processes.first:
    print(f"{processes.world} processes agree")
processes.close()
