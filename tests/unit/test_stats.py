"""Statistics: input that cannot be is refused in one sentence."""
import pytest
from medvlthinker.core import stats
from medvlthinker.core.files import UserError

REFUSED = {
    "more right answers than questions": (lambda: stats.wilson(5, 4), "0 <= k <= n"),
    "half a question": (lambda: stats.wilson(1, 2.5), "whole counts"),
    "an average over no benchmark": (lambda: stats.macro_average({}), "at least one benchmark"),
    "a benchmark without questions": (lambda: stats.macro_average({"a": (0, 0)}), "n >= 1"),
    "a mean of nothing": (lambda: stats.clustered_mean([]), "at least one question"),
    "a value without its image": (lambda: stats.clustered_mean([1, 0], ["x"]), "2 values have 1"),
    "no benchmark to compare": (lambda: stats.paired_bootstrap({}), "at least one benchmark"),
    "a comparison on no question": (lambda: stats.paired_bootstrap({"a": []}), "a has none"),
    "a difference without its image": (lambda: stats.paired_bootstrap({"a": [1, 0]}, {"a": ["x"]}),
                                       "2 values have 1"),
    "two models on different questions": (lambda: stats.mcnemar([1], [1, 0]), "the same questions"),
    "more right answers than answers": (lambda: stats.pass_at_k(3, 2, 1), "right <= n"),
    "more tries than answers": (lambda: stats.pass_at_k(1, 2, 3), "k <= n"),
}


@pytest.mark.parametrize("call, part", REFUSED.values(), ids=REFUSED)
def test_impossible_input_is_refused_in_one_sentence(call, part):
    with pytest.raises(UserError, match=part) as refused:
        call()
    assert "\n" not in str(refused.value)
