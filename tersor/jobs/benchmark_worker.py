"""The fresh process of a benchmark in which there are PyTorch models, which are opened here by their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.core.task import Task
from tersor.measure import latency_worker, memory_worker
from tersor.measure.fresh_process import Tick, serve
from tersor.measure.opened import FILES, Kinds, Opened, Opener, Spec
from tersor.measure.opened_module import OpenedModule, open_module, open_program
from tersor.measure.size import state_bytes

WORK = {"time": latency_worker.measure, "start": memory_worker.measure}


def open_named(spec: Spec) -> Opener:
    """A model by the name that the caller found it by, with its data's name. Spec: model, data, ``open_module``'s."""
    from tersor.jobs.find_data import find_data  # a second of imports, which models that were carried here do not need
    from tersor.jobs.find_model import OWN, find_model
    from tersor.measure.behaviour.data import NoModel

    task = find_data(spec["data"]).based if spec["data"] else Task(NoModel(), name="no data")

    def make() -> nn.Module:
        module = find_model(spec["model"], task).module
        assert module is not None, "the caller has seen that it is a module"
        return module

    opener = open_module(spec, make, spec["name"])
    if spec["model"] != OWN:
        return opener

    def with_the_data() -> Opened:
        opened = opener()
        assert isinstance(opened, OpenedModule)
        opened.came_open, opened.resident = True, state_bytes(opened.module)
        return opened

    return with_the_data


KINDS: Kinds = {**FILES, "program": open_program, "named": open_named}


def work(request: dict[str, Any], tick: Tick) -> Any:
    """What ``request["work"]`` says: time models, or start one."""
    return WORK[request["work"]](request, tick, KINDS)


if __name__ == "__main__":
    serve(work)
