from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

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

    def __post_init__(self):
        check_fields(self)


def test_what_fits_passes():
    Settings(4, 1, True, Inner(2), {"a": Inner(), "b": None}, 0.25, [3], ByName("fc"))
    Settings(share=np.float64(0.5), maybe=np.float32(1), sizes=())


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
        ({"where": "fc"}, "(Both, ByName, ByType, Either, Everything, Not). Write ByName('fc')."),
        ({"inner": Inner}, "expected Inner. Write Inner(…), an object of the class."),
    ],
)
def test_another_type_is_refused_by_field_with_what_is_expected(wrong, said):
    with pytest.raises(InputError) as caught:
        Settings(**wrong)
    assert said in str(caught.value)
