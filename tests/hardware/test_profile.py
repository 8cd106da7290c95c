import pytest
import yaml

from tersor.core.errors import InputError
from tersor.hardware.profile import Profile, profiles, read_profile, to_yaml


def data_of(name="phone"):
    return yaml.safe_load(to_yaml(read_profile(name)))


def figures(value):
    if isinstance(value, dict):
        if "basis" in value:
            yield value
        for part in value.values():
            yield from figures(part)


def test_the_profiles_cover_the_kinds_of_devices():
    kinds = {profile.kind for profile in profiles()}
    wanted = {"phone", "microcontroller", "single-board computer", "laptop", "server CPU", "NVIDIA GPU", "NPU"}
    assert wanted <= kinds
    servers = " ".join(profile.title for profile in profiles() if profile.kind == "server CPU")
    assert "without VNNI" in servers and "with VNNI" in servers and "AMX" in servers


@pytest.mark.parametrize("profile", profiles(), ids=lambda profile: profile.name)
def test_each_figure_says_where_it_comes_from_and_each_device_what_goes_wrong(profile):
    found = list(figures(profile.model_dump()))
    assert len(found) >= 3 and all(len(figure["source"].split()) >= 4 for figure in found)
    assert profile.cautions
    assert read_profile(yaml.safe_load(to_yaml(profile))) == profile


def test_names_and_aliases_mean_one_profile_each():
    names = [name for profile in profiles() for name in (profile.name, *profile.aliases)]
    assert len(names) == len(set(names)) and "this" not in names
    assert read_profile("iot").kind == "microcontroller"


def test_your_own_file_is_read(tmp_path):
    data = {**data_of(), "name": "mine", "aliases": []}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    found = read_profile(tmp_path / "mine.yaml")
    assert isinstance(found, Profile) and found.name == "mine"


FIGURE = {"value": 2, "basis": "assumed", "source": "made up for a test"}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(  # ten to the tenth, once it is spelt out
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def change(path, value):
    def made():
        data = data_of()
        *way, last = path.split(".")
        target = data
        for part in way:
            target = target[part]
        if value is None:
            del target[last]
        else:
            target[last] = value
        return yaml.safe_dump(data)

    return made


@pytest.mark.parametrize(
    "text, said",
    [
        (change("memory.value", -1), ["memory.value", "-1", "greater than 0"]),
        (change("memory.value", True), ["memory", "true and false"]),
        (change("weight_bits", [True]), ["true and false"]),
        (change("bandwidth.value", 1e-300), ["bandwidth.value", "greater than"]),
        (change("bandwidth.value", 1e300), ["bandwidth.value", "less than"]),
        (change("memory.source", None), ["memory.source", "required"]),
        (change("compute.int3", {"value": 1}), ["compute", "int3"]),
        (change("colour", "red"), ["colour", "no field of this name"]),
        (change("memroy", {"value": 3}), ["memroy", "Nearest names: memory"]),
        (change("kind", "toaster"), ["kind", "toaster"]),
        (change("activation_bits", []), ["int8 stands both"]),
        (change("sparsity.pattern", "2:4"), ["speedup belongs"]),
        (change("sparsity", {"pattern": "4:2", "speedup": FIGURE, "source": "made up for a test"}), ["fewer than all"]),
        (change("near", {"memory": {**FIGURE, "value": 1e15}, "bandwidth": {**FIGURE, "value": 1e15}}), ["smaller"]),
        (change("weight_bits", [64]), ["1 to 16 bits"]),
        (lambda: "- a list", ["not a profile", "list"]),
        (lambda: "name: [", ["not YAML"]),
        (lambda: "name: mine\nname: other", ["not YAML", "'name' stands twice"]),
        (lambda: "when: 2020-99-99", ["not YAML"]),
        (lambda: "a: " + "[" * 2000, ["not YAML"]),
        (lambda: "# " + "x" * 100_000, ["too large"]),
        (lambda: f"{BOMB}{change('kind', 'K')().replace('kind: K', 'kind: *j')}", ["kind", "[[[", "'phone'"]),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_place(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text())
    with pytest.raises(InputError) as caught:
        read_profile(path)
    message = str(caught.value)
    assert "mine.yaml" in message and all(part in message for part in said), message


def test_a_name_that_is_none_and_a_file_that_is_missing_are_told():
    with pytest.raises(InputError, match="no such profile.*'fridge'.*phone"):
        read_profile("fridge")
    with pytest.raises(InputError, match="Nearest names: raspberry-pi"):
        read_profile("Rasberry-Pi")
    with pytest.raises(InputError, match="cannot be read"):
        read_profile("nowhere.yaml")
