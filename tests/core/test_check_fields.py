from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

import tersor
from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.place import ByName, Everything, Selector


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Settings:
    many: int = 3
    share: float = 0.5
    deep: bool = False
    inner: Inner = field(default_factory=Inner)
    named: Mapping[str, Inner | None] = field(default_factory=dict)
    maybe: float | None = None
    sizes: Sequence[int] = (1, 2)
    where: Selector = field(default_factory=Everything)
    parts: Sequence[Inner] = ()
    ask: Callable[[int], int] | None = None

    def __post_init__(self):
        check_fields(self)


def test_what_fits_passes():
    Settings(4, 1, True, Inner(2), {"a": Inner(), "b": None}, 0.25, [3], ByName("fc"))
    Settings(share=np.float64(0.5), maybe=np.float32(1), sizes=(), parts=[Inner()], ask=abs)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"many": 3.0}, "Settings.many: wrong type. Got float 3.0; expected int."),
        ({"many": True}, "Settings.many: wrong type. Got bool True; expected int."),
        ({"share": "0.5"}, "Settings.share: wrong type. Got str '0.5'; expected float."),
        ({"deep": 1}, "Settings.deep: wrong type. Got int 1; expected bool."),
        ({"inner": 8}, "Settings.inner: wrong type. Got int 8; expected Inner."),
        ({"named": {"fc": 4}}, "Settings.named['fc']: wrong type. Got int 4; expected Inner or None."),
        ({"named": ["fc"]}, "Got list ['fc']; expected a mapping from str to Inner or None."),
        ({"maybe": "no"}, "Settings.maybe: wrong type. Got str 'no'; expected float or None."),
        ({"sizes": 8}, "Settings.sizes: wrong type. Got int 8; expected a tuple of int."),
        ({"sizes": (1, "2")}, "Settings.sizes[1]: wrong type. Got str '2'; expected int."),
        ({"where": "fc"}, "(Both, ByName, ByType, Either, Everything, Not). Write ByName('fc')."),
        ({"parts": (Inner(), 3)}, "Settings.parts[1]: wrong type. Got int 3; expected Inner."),
        ({"ask": 3}, "Settings.ask: wrong type. Got int 3; expected a function or None."),
        ({"inner": Inner}, "expected Inner. Write Inner(…), an object of the class."),
    ],
)
def test_another_type_is_refused_by_field_with_what_is_expected(wrong, said):
    with pytest.raises(InputError) as caught:
        Settings(**wrong)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tersor.Limits(max_drop="1%"), "Limits.max_drop: wrong type. Got str '1%'; expected float or None"),
        (lambda: tersor.Keep(macs="45%"), "Keep.macs: wrong type"),
        (lambda: tersor.Budgets(max_size="2 MB"), "Budgets.max_size: wrong type"),
        (lambda: tersor.Engines(names="eager"), "Engines.names: wrong type"),
        (lambda: tersor.Conditions(threads=("4",)), "Conditions.threads[0]: wrong type. Got str '4'; expected int"),
        (lambda: tersor.Stress(budgets=0.1), "Stress.budgets: wrong type"),
        (lambda: tersor.Probe(sparsities="0.5"), "Probe.sparsities: wrong type"),
        (lambda: tersor.NM("2", 4), "NM.n: wrong type"),
        (lambda: tersor.Metric("mine", 3), "Metric.per_sample: wrong type. Got int 3; expected a function"),
        (lambda: tersor.Pipeline([3]), "Pipeline.steps[0]: wrong type. Got int 3; expected a Step"),
        (lambda: tersor.Student(drop_layers="2"), "Student.drop_layers: wrong type"),
        (lambda: tersor.Pixels(mean="0.5"), "Pixels.mean: wrong type"),
        (lambda: tersor.Finetune(epochs="3"), "Finetune.epochs: wrong type"),
        (lambda: tersor.Distill(temperature="4"), "Distill.temperature: wrong type"),
        (lambda: tersor.GradualSparsity(updates="9"), "GradualSparsity.updates: wrong type"),
        (lambda: tersor.Prune(0.5, where="fc"), "Prune.where: wrong type. Got str 'fc'; expected a Selector"),
        (lambda: tersor.PruneChannels(where="fc"), "PruneChannels.where: wrong type. Got str 'fc'; expected a Sel"),
    ],
)
def test_public_settings_of_another_type_are_refused_by_field(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert said in str(caught.value)
    if ".where" in said:
        assert "Write ByName('fc')." in str(caught.value)
