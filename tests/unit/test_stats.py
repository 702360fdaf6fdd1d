"""Statistics: input that cannot be is refused in one sentence."""
import numpy as np
import pytest
from medvlthinker.core import stats
from medvlthinker.core.files import UserError

REFUSED = {
    "more right answers than questions": (lambda: stats.wilson(5, 4), "0 <= k <= n"),
    "an average over no benchmark": (lambda: stats.macro_average({}), "at least one benchmark"),
    "a benchmark without questions": (lambda: stats.macro_average({"a": (0, 0)}), "n >= 1"),
    "no benchmark to compare": (lambda: stats.paired_bootstrap({}), "at least one benchmark"),
    "two models on different questions": (lambda: stats.mcnemar([1], [1, 0]), "the same questions"),
}


@pytest.mark.parametrize("call, part", REFUSED.values(), ids=REFUSED)
def test_impossible_input_is_refused_in_one_sentence(call, part):
    with pytest.raises(UserError, match=part) as refused:
        call()
    assert "\n" not in str(refused.value)


NO_NUMBER = [lambda: stats.clustered_mean([]), lambda: stats.clustered_mean([1, 0], ["x"]),
             lambda: stats.paired_bootstrap({"a": []}), lambda: stats.paired_bootstrap({"a": [1, 0]}, {"a": ["x"]}), lambda: stats.pass_at_k(1, 2, 3)]


@pytest.mark.parametrize("call", NO_NUMBER)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_computed_gives_no_number(call):
    with pytest.raises((ValueError, ArithmeticError)):
        call()


def test_images_that_are_all_alike_leave_the_difference_uncertain():
    "Ten images, each with one question gained and one that both models answer: no resample differs."
    for values, images in (([1, 0] * 10, np.arange(20) // 2), ([2 / 3] * 7, range(7))):
        value, low, high = stats.paired_bootstrap({"a": values}, {"a": images})
        assert low < value - .05 and high > value + .05


@pytest.mark.parametrize("images, questions", [(2, 20), (5, 10)])
def test_an_interval_of_few_images_covers_the_truth(images, questions):
    rng, ids, covered = np.random.default_rng(0), np.arange(images * questions) // questions, 0
    for _ in range(400):
        alike = rng.random(images) < .3  # the luck of some images is that of one question
        values = rng.choice([1, -1, 0], (images, questions), p=[.15, .15, .7])
        values[alike] = values[alike, :1]
        _, low, high = stats.paired_bootstrap({"a": values.ravel()}, {"a": ids}, repeats=400)
        covered += low <= 0 <= high
    assert covered / 400 >= .93


def test_equal_models_seldom_differ_though_their_luck_goes_by_image():
    rng, ids, small, plain = np.random.default_rng(0), np.arange(384) // 4, 0, 0
    for _ in range(400):
        luck = rng.choice([1, -1, 0], 96, p=[.15, .15, .7])[ids]
        own = rng.choice([1, -1, 0], 384, p=[.15, .15, .7])
        change = np.where((rng.random(96) < .7)[ids], luck, own)
        small += stats.mcnemar(change > 0, change < 0, ids)[2] < .05
        plain += stats.mcnemar(change > 0, change < 0)[2] < .05
    assert small <= .07 * 400 and plain > .15 * 400

