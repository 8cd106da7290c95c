import pytest

from tersor.core.errors import ArtifactError, GraphError, InputError, TersorError, TrainingError, VerificationError


@pytest.mark.parametrize(
    "parts, sentence",
    [
        ({}, "it broke."),
        ({"where": "fc1.weight"}, "fc1.weight: it broke."),
        ({"got": 3}, "it broke. Got 3."),
        ({"expected": [1, 2]}, "it broke. Expected [1, 2]."),
        (
            {"where": "fc1", "got": 64, "expected": "a divisor of 100", "do": "Use 50."},
            "fc1: it broke. Got 64; expected a divisor of 100. Use 50.",
        ),
    ],
)
def test_the_sentence_says_where_what_got_expected_and_what_to_do(parts, sentence):
    assert str(TersorError("it broke", **parts)) == sentence


def test_exit_codes_are_those_of_the_documentation():
    codes = {
        error: error("x").exit_code
        for error in (InputError, ArtifactError, GraphError, VerificationError, TrainingError)
    }
    assert codes == {InputError: 2, ArtifactError: 2, GraphError: 1, VerificationError: 1, TrainingError: 1}
    assert all(issubclass(error, TersorError) for error in codes)
