import pytest
import yaml

from tersor.core.errors import InputError
from tersor.core.place import ByName, ByType, Everything, Not
from tersor.core.step import Pipeline, Step
from tersor.distill.features import Hints
from tersor.distill.response import DecoupledSoftTargets, Distill
from tersor.prune.sparse.drop_and_grow import DropAndGrow
from tersor.prune.sparse.elements import Movement, Wanda
from tersor.prune.sparse.gradual import GradualSparsity
from tersor.prune.sparse.lottery import LotteryTicket
from tersor.prune.sparse.patterns import NM
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import ErdosRenyi, Global, PerType
from tersor.prune.sparse.unmask import Unmask
from tersor.prune.structured.amount import Keep
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.group_sparsity import GroupSparsity
from tersor.quantize.cast import Cast
from tersor.quantize.freeze import FreezeScales
from tersor.quantize.oscillation import FreezeOscillation
from tersor.quantize.quantize import Quantize
from tersor.quantize.ranges import MovingAverage
from tersor.quantize.schemes import Int
from tersor.quantize.spread import ScaleSpread
from tersor.recipes.built_in import BUILT_IN
from tersor.recipes.recipe import parts_of, read_recipe, to_yaml
from tersor.recipes.registry import STEPS
from tersor.train.adaptive import Adaptive, ValidationLoss
from tersor.train.conflict import Conflict
from tersor.train.finetune import Finetune
from tersor.train.objective import TaskLoss
from tersor.train.together import Together


def _recipe(part):
    return {"name": "mine", "steps": [{"name": "one", "parts": [part]}]}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_recipe_survives_being_printed_as_yaml(name):
    recipe = read_recipe(name)
    again = read_recipe(yaml.safe_load(to_yaml(recipe)))
    assert again.steps == recipe.steps and again.budgets == recipe.budgets
    assert recipe.explanation and all(step.title != step.name for step in recipe.steps)


def test_balanced_prunes_then_distils_then_quantises():
    kinds = [[type(part).__name__ for part in parts_of(step.step)] for step in read_recipe("balanced").steps]
    assert kinds == [
        ["PruneChannels", "Finetune"],
        ["Finetune"],
        ["FoldBatchNorm", "Quantize", "Finetune", "RoundBiases"],
    ]
    assert isinstance(parts_of(read_recipe("balanced").steps[1].step)[0].objective, Distill)


def test_settings_reach_the_dataclass():
    (step,) = read_recipe(_recipe({"prune_channels": {"sparsity": 0.3, "where": "~fc", "score": "magnitude"}})).steps
    assert isinstance(step.step, PruneChannels)
    assert step.step.sparsity == 0.3 and step.step.where == Not(ByName("fc"))
    assert not isinstance(step.step, Pipeline)


@pytest.mark.parametrize(
    "given",
    [
        {"keep": {"macs": 0.45}, "scope": "stage"},
        {"keep": {"bytes": 250000}, "relative_to": "original"},
        {"sparsity": {"layer1.*": 0.3, "*": 0.5}, "heads": "inside", "multiple_of": 16},
    ],
)
def test_amounts_survive_being_printed_and_read(given):
    recipe = read_recipe(_recipe({"prune_channels": given}))
    method = recipe.steps[0].step
    assert STEPS.settings(method)["prune_channels"].items() >= {k: v for k, v in given.items() if k != "keep"}.items()
    assert method.keep == (Keep(**given["keep"]) if "keep" in given else None)
    assert (method.sparsity is None) == ("keep" in given)
    assert read_recipe(yaml.safe_load(to_yaml(recipe))).steps == recipe.steps


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ({"prune": {"sparsity": 0.9, "scope": "global"}}, Prune(0.9, scope=Global())),
        ({"prune": {"pattern": {"n_of_m": {"n": 1, "m": 4}}}}, Prune(pattern=NM(1, 4))),
        ({"prune": {"sparsity": {"layer1.*": 0.3}, "score": "wanda"}}, Prune({"layer1.*": 0.3}, score=Wanda())),
        ({"prune": {"scope": {"type": {"linear": 0.9}}}}, Prune(scope=PerType(linear=0.9))),
        (
            {"finetune": {"companion": {"gradual": {"prune": {"sparsity": 0.9, "score": "movement"}, "end": 0.5}}}},
            Finetune(companion=GradualSparsity(Prune(0.9, score=Movement()), end=0.5)),
        ),
        ({"finetune": {"companion": "drop_and_grow"}}, Finetune(companion=DropAndGrow())),
        (
            {"lottery_ticket": {"rounds": 2, "training": {"epochs": 4}, "prune": {"scope": "erdos_renyi"}}},
            LotteryTicket(rounds=2, training=Finetune(epochs=4), prune=Prune(scope=ErdosRenyi())),
        ),
        ({"unmask": {"weights": "stored"}}, Unmask(weights="stored")),
        (
            {"finetune": {"objective": ["task_loss", {"group_sparsity": {"strength": 0.005}, "weight": 2}]}},
            Finetune(objective=TaskLoss() + 2.0 * GroupSparsity(0.005)),
        ),
        (
            {"finetune": {"objective": [{"hints": {"pairs": {"a": "b.*"}, "loss": "cosine"}}]}},
            Finetune(objective=1.0 * Hints({"a": "b.*"}, "cosine")),
        ),
        (
            {
                "finetune": {
                    "objective": {
                        "adaptive": {
                            "objective": ["task_loss", {"decoupled": {"beta": 2}, "weight": 0.5}],
                            "rule": {"validation_loss": {"temperature": 3}},
                        }
                    }
                }
            },
            Finetune(objective=Adaptive(TaskLoss() + 0.5 * DecoupledSoftTargets(beta=2), ValidationLoss(3))),
        ),
        ({"cast": {"dtype": "bfloat16"}}, Cast("bfloat16")),
        (
            {
                "quantize": {
                    "weights": {"bits": 4, "group_size": 32},
                    "activation_range": {"moving_average": {"momentum": 0.8}},
                    "per_layer": {"fc": None, "layer1.*": {"bits": 3}},
                }
            },
            Quantize(
                weights=Int(4, group_size=32),
                activation_range=MovingAverage(0.8),
                per_layer={"fc": None, "layer1.*": Int(3)},
            ),
        ),
    ],
)
def test_a_part_is_read_and_survives_being_printed(part, step):
    recipe = read_recipe(_recipe(part))
    assert recipe.steps[0].step == step
    assert read_recipe(yaml.safe_load(to_yaml(recipe))).steps == recipe.steps


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_recipe({"prune_chanels": {}}), ["recipe.steps[0].parts[0]", "prune_chanels", "prune_channels", "quantize"]),
        (
            _recipe({"prune_channels": {"sparsty": 0.5}}),
            ["parts[0].prune_channels", "sparsty", "Did you mean 'sparsity'"],
        ),
        (_recipe({"prune_channels": {"sparsity": "much"}}), ["parts[0].prune_channels.sparsity", "much"]),
        (_recipe({"prune_channels": {"sparsity": {"conv*": "much"}}}), ["prune_channels.sparsity.conv*: ", "much"]),
        (_recipe({"prune_channels": {"sparsity": {"conv*": 1.5}}}), ["sparsity['conv*']", "1.5", "[0, 1)"]),
        (_recipe({"prune_channels": {"keep": {"mac": 0.5}}}), ["keep.mac", "Did you mean 'macs'"]),
        (_recipe({"prune_channels": {"keep": {"macs": 0.5, "bytes": 9}}}), ["parts[0]: Keep", "exactly one"]),
        (_recipe({"prune_channels": {"sparsity": 0.5, "keep": {"macs": 0.5}}}), ["one of sparsity and keep"]),
        (_recipe({"prune": {"scope": "globl"}}), ["prune.scope", "erdos_renyi"]),
        (_recipe({"prune": {"pattern": {"n_of_m": {"n": 5}}}}), ["NM", "5:4", "0 < n <= m"]),
        (_recipe({"prune_channels": {"scope": "block"}}), ["prune_channels.scope", "block", "stage"]),
        (_recipe({"finetune": {"objective": {"distil": {}}}}), ["finetune.objective", "distil", "task_loss, distill"]),
        (_recipe({"finetune": {"objective": {"distill": {"temperature": -1}}}}), ["emperature", "-1"]),
        (_recipe({"finetune": {}, "quantize": {}}), ["parts[0]", "one key"]),
        (_recipe({"finetune": {"objective": []}}), ["finetune.objective: ", "at least 1"]),
        (
            _recipe({"finetune": {"objective": ["task_loss", {"hnts": {"pairs": {"a": "b"}}}]}}),
            ["finetune.objective[1].hnts", "Did you mean 'hints'"],
        ),
        (_recipe({"finetune": {"objective": [{"hints": {"pair": {}}}]}}), ["objective[0].hints.pairs", "required"]),
        (_recipe({"finetune": {"objective": {"hints": {"pairs": {}}}}}), ["Hints.pairs", "no pairs of layers"]),
        (
            _recipe({"finetune": {"objective": [{"distill": {}, "weight": "much"}]}}),
            ["finetune.objective[0].weight", "much"],
        ),
        (_recipe({"finetune": {"objective": [{"distill": {}, "weight": -1}]}}), ["0 or more", "-1"]),
        (_recipe({"finetune": {"objective": [{"distill": {}, "weight": 0}]}}), ["all weights are zero"]),
        (
            _recipe({"finetune": {"objective": {"adaptive": {"objective": ["task_loss", "adaptive"]}}}}),
            ["objective.adaptive.objective[1].adaptive", "unknown name"],
        ),
        (_recipe({"finetune": {"precision": "fp8"}}), ["finetune.precision", "fp8", "bf16"]),
        (_recipe({"prune_channels": {"sparsity": 1.5}}), ["parsity", "1.5"]),
        ({"name": "mine", "steps": []}, ["recipe.steps"]),
        ({"steps": [{"name": "a", "parts": ["quantize"]}]}, ["recipe.name"]),
        ({"name": "x", "steps": [{"name": "a", "parts": ["quantize"]}] * 2}, ["own", "a"]),
        ({"name": "x", "steps": [{"name": "baseline", "parts": ["quantize"]}]}, ["baseline"]),
        ({"name": "x", "steps": [{"name": "A/../b", "parts": ["quantize"]}]}, ["steps[0].name"]),
        (
            {"name": "x", "budgets": {"max_drop": -1}, "steps": [{"name": "a", "parts": ["quantize"]}]},
            ["budgets.max_drop"],
        ),
    ],
)
def test_a_fault_is_named_by_its_path_and_what_is_allowed(data, words):
    with pytest.raises(InputError) as caught:
        read_recipe(data)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("text", ["steps: [", "- a\n- b\n", "", "!!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_recipe_is_an_input_error(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="mine.yaml"):
        read_recipe(path)


@pytest.mark.parametrize(
    "where",
    [
        ByName("layers.*") & ~ByType("Linear"),
        ByName("a") | ByName("b*"),
        ~(ByName("a") | ~ByName("b")),
        Everything(),
        ~Everything(),
    ],
)
def test_a_selector_survives_being_saved(where):
    settings = STEPS.settings(PruneChannels(where=where))
    assert STEPS.build(Step, yaml.safe_load(yaml.safe_dump(settings)), "recipe").where == where


def test_an_unknown_recipe_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="balanced, small, fast"):
        read_recipe("ballanced")
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_several_companions_are_a_list_and_come_back_as_one():
    listed = [{"gradual": {"prune": {"sparsity": 0.8}}}, "freeze_scales", {"freeze_oscillation": {"last": 0.02}}]
    data = {"name": "x", "steps": [{"name": "train", "parts": [{"finetune": {"companion": listed}}]}]}
    recipe = read_recipe(data)
    companion = recipe.steps[0].step.companion
    assert companion == Together((GradualSparsity(Prune(0.8)), FreezeScales(), FreezeOscillation(last=0.02)))
    again = read_recipe(yaml.safe_load(to_yaml(recipe)))
    assert again.steps[0].step == recipe.steps[0].step
    data["steps"][0]["parts"][0]["finetune"]["companion"] = "freeze_scales"
    assert read_recipe(data).steps[0].step.companion == FreezeScales()
    data["steps"][0]["parts"][0]["finetune"]["companion"] = [{"freeze_scales": {"begin": 1}}]
    with pytest.raises(InputError, match=r"companion\[0\]\.freeze_scales\.begin: unknown name"):
        read_recipe(data)


def test_objectives_that_hold_a_sum_are_read_and_hold_no_other_that_does():
    listed = ["task_loss", {"scale_spread": {"strength": 0.1}, "weight": 0.5}]
    data = {"name": "x", "steps": [{"name": "train", "parts": [{"finetune": {"objective": None}}]}]}
    for name, kind in (("conflict", Conflict), ("adaptive", Adaptive)):
        data["steps"][0]["parts"][0]["finetune"]["objective"] = {name: {"objective": listed}}
        recipe = read_recipe(data)
        assert recipe.steps[0].step.objective == kind(TaskLoss() + 0.5 * ScaleSpread(0.1))
        assert read_recipe(yaml.safe_load(to_yaml(recipe))).steps[0].step == recipe.steps[0].step
        data["steps"][0]["parts"][0]["finetune"]["objective"] = {name: {"objective": ["task_loss", "conflict"]}}
        with pytest.raises(InputError, match="unknown name"):
            read_recipe(data)
