"""Which groups of a model may be pruned, what the user asks of each, and why others stay."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import prune

from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import Intercept
from tersor.core.masked import Masked
from tersor.core.plan import Skip
from tersor.graph.group import Group


def check_plain(model: nn.Module) -> None:
    """Raise InputError where masks or quantisers stand on the model, or it is quantised."""
    for path, module in model.named_modules():
        if isinstance(module, (Masked, FakeQuantize, Intercept)):
            raise InputError(
                "channels cannot be removed under masks or quantisers", where=path or "<model>",
                got=f"a {type(module).__name__}", expected="a model without masks and quantisers",
                do="Prune channels first, then mask or quantise",
            )  # fmt: skip
        if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise InputError(
                "channels cannot be removed under masks", where=path or "<model>",
                got=f"a mask of torch.nn.utils.prune in a {type(module).__name__}", expected="a plain model",
                do="Call torch.nn.utils.prune.remove(module, name) first, or prune channels before masking",
            )  # fmt: skip
        if type(module).__module__.startswith("torch.ao.nn.") and ".quantized" in type(module).__module__:
            raise InputError(
                "channels of quantised layers cannot be removed", where=path or "<model>",
                got=f"{type(module).__module__}.{type(module).__name__}", expected="a model in floating point",
                do="Prune channels first, then quantise",
            )  # fmt: skip


def makers(group: Group) -> list[str]:
    """Paths of the modules that make the group's channels."""
    return list(dict.fromkeys(axis.place.module for axis in group.producers))


def open_groups(groups: Sequence[Group], chosen: Mapping[str, nn.Module], skips: list[Skip]) -> list[tuple[Group, ...]]:
    """The groups that may be pruned, those that must keep the same fraction together.

    Groups that are meant (by ``chosen`` modules) and may not go leave their reason in ``skips``.
    """
    opened = [group for group in groups if _is_open(group, chosen, skips)]
    classes: dict[Group, tuple[Group, ...]] = {}
    for group in opened:
        partners = [other for other in groups if other is group or _shared(group, other)]
        closed = [partner.name for partner in partners if partner not in opened]
        if closed:
            skips.append(Skip(group.name, f"must keep the same fraction as {', '.join(closed)}, which cannot go"))
        else:
            classes.setdefault(partners[0], tuple(partners))
    return list(classes.values())


def _shared(group: Group, other: Group) -> bool:
    return group.share is not None and group.share == other.share


def _is_open(group: Group, chosen: Mapping[str, nn.Module], skips: list[Skip]) -> bool:
    names = makers(group)
    meant = [maker for maker in names if maker in chosen]
    if not meant:
        return False
    if group.frozen is not None:
        skips.append(Skip(group.name, f"{group.channels} channels are frozen: {group.frozen}"))
        return False
    if len(meant) < len(names):
        others = ", ".join(maker for maker in names if maker not in chosen)
        skips.append(Skip(meant[0], f"goes only together with {others}, which where= leaves out"))
        return False
    return True


def explicit(
    sparsity: Mapping[str, float], groups: Sequence[Group], classes: Sequence[tuple[Group, ...]]
) -> list[float | None]:
    """The fraction that the first matching pattern asks of each class, None where none matches.

    A pattern is matched with the paths of all modules that make a group. Raises InputError where it matches none, or
    frozen groups only, or where a class is asked for two different fractions.
    """
    for pattern, asked in sparsity.items():
        _check_pattern(pattern, asked, groups)
    found: list[float | None] = []
    for members in classes:
        asked_of = [_asked(sparsity, group) for group in members]
        wanted = {value for value in asked_of if value is not None}
        if len(wanted) > 1:
            names = ", ".join(group.name for group in members)
            raise InputError(
                "layers that must keep the same fraction are asked for different ones", where="PruneChannels.sparsity",
                got=f"{sorted(wanted)} for {names}", expected="one fraction for all of them",
            )  # fmt: skip
        found.append(next(iter(wanted), None))
    return found


def _matches(pattern: str, group: Group) -> bool:
    return any(pattern == name or fnmatchcase(name, pattern) for name in (group.name, *makers(group)))


def _asked(sparsity: Mapping[str, float], group: Group) -> float | None:
    return next((asked for pattern, asked in sparsity.items() if _matches(pattern, group)), None)


def _check_pattern(pattern: str, asked: float, groups: Sequence[Group]) -> None:
    matched = [group for group in groups if _matches(pattern, group)]
    if not matched:
        names = list(dict.fromkeys(maker for group in groups for maker in makers(group)))
        near = difflib.get_close_matches(pattern, names, n=3) or names[:3]
        raise InputError(
            "the pattern matches no layer that makes channels", where="PruneChannels.sparsity", got=repr(pattern),
            do=f"Nearest names: {', '.join(near)}",
        )  # fmt: skip
    frozen = [group for group in matched if group.frozen is not None]
    if asked and len(frozen) == len(matched):
        raise InputError(
            f"its {frozen[0].channels} channels are frozen: {frozen[0].frozen}", where=frozen[0].name,
            got=f"sparsity {asked} by {pattern!r}", do="Leave it out, or widen the pattern: it is then skipped",
        )  # fmt: skip
