"""What stands side by side: spelt out so that latex2sympy multiplies it, and mixed numbers as fractions."""

import pytest

from gvpo_lightning.rewards.side_by_side import Unclear, spell_out


@pytest.mark.parametrize(
    ("latex", "spelt"),
    [
        ("7(2)", "7^{1}(2)"),
        (r"\left(7\right) \left(2\right)", "(7) ^{1}(2)"),
        (r"\frac{12(13)}2", r"\frac{12^{1}(13)}{2}"),
        (r"3\binom52 4", r"3^{1}\binom{5}{2} ^{1}4"),
        (r"2\frac12x", r"\frac{5}{2}x"),
        (r"1,234 \dfrac{1}{2}", r"\frac{2469}{2}"),
        (r"2{\frac{1}{2}}", r"\frac{5}{2}"),
        ("1 1/2 + 2", r"\frac{3}{2} + 2"),
        (r"2\frac32", r"2^{1}\frac{3}{2}"),
        (r"2\frac{\pi}{2}", r"2^{1}\frac{\pi}{2}"),
        (r"2^3\frac12", r"2^3\frac{1}{2}"),
        (r"2^{10}(3)", "2^{10}(3)"),
        (r"2.5\frac12", r"2.5\frac{1}{2}"),
        (r"12\frac12\%", r"\frac{25}{2}^{1}\frac{1}{100}"),
        (r"\sqrt[3]{8}4", r"\sqrt[3]{8}^{1}4"),
        (r"2\pi(3)", r"2{\pi}^{1}(3)"),
        ("5!3", "5!3"),
        # no factors
        ("f(2) + x(3)", "f(2) + x(3)"),
        (r"\sin^2 3x", r"\sin^2 3x"),
        (r"\log_2 8", r"\log_2 8"),
        (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,4)"),
        (r"\begin{array}{cc}1 & 2\\3 & 4\end{array}", r"\begin{array}{cc}1 & 2\\3 & 4\end{array}"),
        (r"\text{a 2 3}", r"\text{a 2 3}"),
        (r"90^\circ", r"90^\circ"),
        ("2^-1", "2^{-1}"),
        ("", ""),
    ],
)
def test_products_and_mixed_numbers(latex, spelt):
    assert spell_out(latex) == spelt


@pytest.mark.parametrize(
    "latex", ["2 3", "2 3/2", "1.5 2", r"\sqrt{2 3}", r"\frac123", r"\sqrt12", r"\frac{3}56", "{2", "2}3", r"\frac{1"]
)
def test_what_is_meant_is_not_guessed(latex):
    with pytest.raises(Unclear):
        spell_out(latex)
