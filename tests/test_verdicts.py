"""The rule that decides claims, against tables of Student's distribution and worked examples."""
import pytest

from verdicts import DELTA, Claim, holm, interval, p_of, student_cdf, student_quantile


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093)])
def test_students_distribution(df, t):
    assert student_quantile(df) == pytest.approx(t, abs=6e-4)
    assert student_cdf(t, df) == pytest.approx(0.975, abs=3e-5)
    assert student_cdf(-t, df) == pytest.approx(0.025, abs=3e-5) and student_cdf(0, df) == 0.5


SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_an_interval_and_p_of_a_textbook():
    """Student's own sleep data (1908): mean 1.58, 0.70 to 2.46, p = 0.002833."""
    center, half = interval(SLEEP)
    assert (center, center - half, p_of(SLEEP)) == pytest.approx((1.58, 0.7001, 0.002833), abs=1e-4)
    assert p_of([1.0, 1.0 + 1e-9, 1.0 - 1e-9]) == pytest.approx(0, abs=1e-5)
    assert p_of([1 + 2e-5 * i for i in range(10)]) == pytest.approx(0, abs=1e-9)
    assert interval([0.3]) == (0.3, float("inf")) and p_of([0.3]) == 1


def of(gains, **more):
    return Claim("", "", [0.5 + gain for gain in gains], [0.5] * len(gains), **more)


@pytest.mark.parametrize("gains, better, no_worse, equal", [
    ([0.02, 0.03, 0.04], "holds", "holds", "undecided"),
    ([0.001, 0.002, 0.003, 0.002], "holds", "holds", "holds"),
    ([-0.02, -0.03, -0.04], "does not hold here", "undecided", "undecided"),
    ([-0.02, -0.025, -0.03], "does not hold here", "does not hold here", "does not hold here"),
    ([0.001, -0.001, 0.002, -0.002], "does not hold here", "holds", "holds"),
    ([0.001, -0.03, 0.002, -0.04], "undecided", "undecided", "undecided"),
    ([-0.001, -0.012, -0.004, -0.018], "does not hold here", "undecided", "undecided"),
    ([0.03, -0.03, 0.02], "undecided", "undecided", "undecided"),
    ([0.5], "undecided", "undecided", "undecided"),
])
def test_the_words(gains, better, no_worse, equal):
    assert of(gains).verdict() == better
    assert of(gains, kind="no worse").verdict() == no_worse
    assert of(gains, kind="equal").verdict() == equal


def test_a_claim_is_on_the_side_that_it_says():
    loss = Claim("", "", [0.30, 0.31, 0.32], [0.33, 0.35, 0.37], smaller=True)
    assert loss.verdict() == "holds" and loss.gains() == pytest.approx([0.03, 0.04, 0.05])
    with pytest.raises(ValueError):
        Claim("", "", [0.3, 0.4], [0.3]).verdict()


def test_p_is_of_what_is_claimed():
    assert of(SLEEP).p() == pytest.approx(0.002833, abs=1e-4)
    shifted = [gain - DELTA for gain in SLEEP]
    assert of(shifted, kind="no worse").p() == pytest.approx(0.002833, abs=1e-4)
    for gains in (SLEEP, [-gain for gain in SLEEP]):                # at either limit
        assert of(gains, kind="equal", delta=1.58).p() == pytest.approx(1, abs=1e-4)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
