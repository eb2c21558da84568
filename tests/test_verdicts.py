"""The rule that decides claims, against tables of Student's distribution and worked examples."""
import pytest

from verdicts import holm, interval, student_cdf, student_quantile, verdict


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093)])
def test_students_distribution(df, t):
    assert student_quantile(df) == pytest.approx(t, abs=6e-4)
    assert student_cdf(t, df) == pytest.approx(0.975, abs=3e-5)
    assert student_cdf(-t, df) == pytest.approx(0.025, abs=3e-5) and student_cdf(0, df) == 0.5


def test_an_interval_and_p_of_a_textbook():
    """Student's own sleep data (1908): mean 1.58, 0.70 to 2.46, p = 0.002833."""
    center, half, p = interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (center, center - half, p) == pytest.approx((1.58, 0.7001, 0.002833), abs=1e-4)


@pytest.mark.parametrize("differences, word", [
    ([0.02, 0.03, 0.04], "holds"), ([0.001, 0.002, 0.003, 0.002], "holds"),
    ([-0.02, -0.03, -0.04], "does not hold here"),
    ([0.001, -0.001, 0.002, -0.002], "does not hold here"),
    ([0.03, -0.03, 0.02], "undecided"), ([0.005, 0.025, -0.001], "undecided"),
    ([0.0, 0.0, 0.0], "does not hold here"),
])
def test_the_words(differences, word):
    assert verdict(differences) == word


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
