"""The conformance suite that every Method must pass: ``check_method(method, model, task)``."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tersor.core.apply import write
from tersor.core.edit import edit_from_json, edit_to_json
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.step import Context, Method, Result
from tersor.core.task import Task

__all__ = ["check_method"]


def check_method(method: Method, model: nn.Module, task: Task) -> Result:
    """Hold ``method`` against the contract of a Method on a small ``model`` and its ``task``; returns what it gave.

    * it is a frozen dataclass whose settings are plain data, so that a recipe can print, save and resume it;
    * ``plan`` writes nothing: no tensor, flag, hook or attribute of the model, and not the random state;
    * ``plan`` decides the same each time, whether the model is in train or eval mode;
    * neither ``plan`` nor ``run`` leaves a mode of torch behind, or turns gradients or the default type around;
    * skips say where and why, the plan's summary is plain JSON, and a plan without edits is said to the user;
    * ``run`` leaves the model given untouched, keeps train flags, and its model runs;
    * the edits survive JSON: replayed on a blank copy, with the result's state loaded, they give the same outputs.

    Raises AssertionError with a sentence that names the method and what it breaks.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from tersor.quantize.fold import FoldBatchNorm
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    >>> data = DataLoader(TensorDataset(torch.randn(6, 1, 4, 4), torch.arange(6) % 2), batch_size=3)
    >>> result = check_method(FoldBatchNorm(), model, Task(model, data, data, data))
    """
    task = task.complete()
    _check_settings(method)
    plan = _check_plan(method, model, task)
    result = _check_run(method, model, task, plan)
    _check_replay(method, model, task, result)
    return result


def _require(method: Method, holds: bool, broken: str) -> None:
    if not holds:
        raise AssertionError(f"{type(method).__name__} breaks the contract of a Method: {broken}")


def _check_settings(method: Any) -> None:
    _require(method, isinstance(method, Method), "it is no subclass of tersor.core.step.Method")
    _require(method, dataclasses.is_dataclass(method), "it is no dataclass")
    fields = dataclasses.fields(method)
    try:
        setattr(method, fields[0].name if fields else "anything", None)
    except dataclasses.FrozenInstanceError:
        pass
    else:
        _require(method, False, "its dataclass is not frozen")
    for field in fields:
        odd = _not_plain(getattr(method, field.name))
        _require(method, odd is None, f"its setting {field.name!r} holds {odd}, which a recipe cannot print and read")
    again = dataclasses.replace(method)
    _require(method, again == method and repr(again) == repr(method), "a copy of it is not equal to it")


def _not_plain(value: Any) -> str | None:
    """What in a setting is no plain data; None where all is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    if isinstance(value, (tuple, list, frozenset)):
        return next((odd for item in value if (odd := _not_plain(item))), None)
    if isinstance(value, Mapping):
        return _not_plain([*value.keys(), *value.values()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _not_plain([getattr(value, field.name) for field in dataclasses.fields(value)])
    return f"a {type(value).__name__}"


def _check_plan(method: Method, model: nn.Module, task: Task) -> Plan:
    before, dice, around = _fingerprint(model), _random_state(), _surroundings()
    plan = method.plan(model, task)
    _require(method, _surroundings() == around, "plan left torch in another mode (hooks that a broken-off pass skips?)")
    _require(method, isinstance(plan, Plan), f"plan gave a {type(plan).__name__} instead of a Plan")
    changed = _difference(before, _fingerprint(model))
    _require(method, changed is None, f"plan changed the model it was given ({changed})")
    _require(method, _same(dice, _random_state()), "plan disturbed the random state (fork it: torch.random.fork_rng)")
    _require(method, _same(plan, method.plan(model, task)), "two plans of the same model differ")
    flipped = copy.deepcopy(model)
    for module in flipped.modules():
        module.training = not module.training
    flags = _flags(flipped)
    other = method.plan(flipped, task)
    _require(method, _flags(flipped) == flags, "plan changed train flags of the model it was given")
    _require(method, _same(plan, other), "the plan depends on whether the model is in train or eval mode")
    _check_words(method, plan)
    return plan


def _check_words(method: Method, plan: Plan) -> None:
    _require(method, bool(plan.method.strip()), "its plan has no name")
    for skip in plan.skips:
        _require(method, bool(str(skip.place)), f"a skip says not where ({skip})")
        _require(method, len(skip.reason.split()) >= 2, f"the skip of {skip.place!r} gives no reason ({skip.reason!r})")
    try:
        json.dumps(plan.summary(), allow_nan=False)
    except (TypeError, ValueError) as error:
        _require(method, False, f"its plan's summary is no plain JSON: {error}")
    _require(method, bool(str(plan)), "its plan prints as nothing")


class _Heard(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def _check_run(method: Method, model: nn.Module, task: Task, plan: Plan) -> Result:
    before, heard, around = _fingerprint(model), _Heard(), _surroundings()
    result = method.run(model, task, Context(progress=heard))
    _require(method, _surroundings() == around, "run left torch in another mode (hooks that a broken-off pass skips?)")
    changed = _difference(before, _fingerprint(model))
    _require(method, changed is None, f"run changed the model it was given ({changed})")
    _require(method, result.model is not model, "run gave back the model it was given")
    _require(method, bool(plan.edits) or bool(heard.said), "it did nothing and said nothing")
    flags, kept = _flags(model), _flags(result.model)
    turned = [path for path in kept if path in flags and flags[path] != kept[path]]
    _require(method, not turned, f"run changed the train flags of {turned}")
    outputs = _outputs(result.model, task)
    _require(method, bool(torch.isfinite(outputs).all()), "the model it gave has outputs that are not finite")
    return result


def _check_replay(method: Method, model: nn.Module, task: Task, result: Result) -> None:
    blank = copy.deepcopy(model)
    for value in blank.state_dict().values():
        value.zero_()  # whatever the result needs must come out of its edits and its state
    for edit in (edit for plan in result.plans for edit in plan.edits):
        tensors: dict[str, Tensor] = {}
        text = json.dumps(edit_to_json(edit, "edit", tensors), allow_nan=False)
        write(blank, edit_from_json(json.loads(text), tensors))
    blank.load_state_dict(result.model.state_dict())
    same = torch.equal(_outputs(blank, task), _outputs(result.model, task))
    _require(method, same, "its edits, saved and replayed, give another model")


def _outputs(model: nn.Module, task: Task) -> Tensor:
    example = task.demand_example()
    with torch.no_grad():
        return task.output(copy.deepcopy(model).eval()(*example))


def _flags(model: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in model.named_modules()}


def _random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state(), random.getstate(), name, np.asarray(keys).tolist(), rest


def _surroundings() -> tuple[Any, ...]:
    """What torch keeps for a whole thread."""
    modes = [*map(id, _get_current_function_mode_stack())], [*map(id, _get_current_dispatch_mode_stack())]
    return modes, torch.is_grad_enabled(), torch.get_default_dtype()


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a plan could have changed: place → a value that compares by ==."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"module {path or '<model>'}"] = (type(module).__qualname__, id(module), module.training)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[f"{kind.strip('_')} of {path or '<model>'}"] = tuple(getattr(module, kind))
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple, type(None))):
                found[f"attribute {path}.{name}"] = repr(value)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[f"tensor {path}.{name}"] = (id(tensor), tensor.requires_grad, _digest(tensor))
                found[f"gradient of {path}.{name}"] = None if tensor.grad is None else _digest(tensor.grad)
    return found


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), str(tensor.dtype), hashlib.sha256(raw).hexdigest()


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first thing in which two fingerprints differ."""
    return next((key for key in {**before, **after} if before.get(key) != after.get(key)), None)


def _same(a: Any, b: Any) -> bool:
    """Deep equality that looks into dataclasses and compares tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return _digest(a) == _digest(b)
    if dataclasses.is_dataclass(a):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.compare)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)
