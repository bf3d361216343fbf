r"""math_equal on answers as MATH's `answer` column, GSM8K and models write them: right by hand arithmetic."""

import threading
import time
from pathlib import Path

import pytest

from rlseq.scoring.specs.find import find

FORMS = (
    "{}",
    r"\boxed{{{}}}",
    "#### {}",
    "The answer is {}.",
    "${}$",
    "#### **{}**",
    "**Answer:** {}",
    "So we have\n$$\\boxed{{{}}}$$\nas wanted.",
    r"\[{}\]",
    "```\n{}\n```",
    "<think>\n3 + 4 = 7\n</think>\n<answer>{}</answer>",
)
# reference, a wrong neighbour, other ways to write the right answer
ANSWERS = [
    (r"\frac{1}{2}", r"\frac{1}{3}", ["0.5", "1/2"]),
    (r"\frac12", r"\frac13", [".5"]),
    (r"2\sqrt{2}", "2", [r"\sqrt{8}"]),
    (r"\text{(A)}", r"\text{(B)}", ["(A)", "A"]),
    (r"\text{Monday}", "dynamo", ["Monday"]),
    ("[1,2)", "(1,2)", []),
    ("(2,1)", "(3,1)", []),
    (r"(3,\frac{\pi}{2})", r"(3,\frac{\pi}{3})", []),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}", []),
    (r"(-\infty, 3) \cup (5,\infty)", r"(-\infty, 3) \cup (6,\infty)", []),
    ("10^{20}", "10^{20}+1", ["1e20"]),
    (r"3\pi", "3", []),
    ("x^2+1", "x^2-1", ["1+x^2"]),
    ("2x", "2", []),
    (r"12\%", r"13\%", ["12%"]),
    (r"\$5", r"\$6", ["5", "$5"]),
    ("1,000", "1", ["1000", r"1{,}000"]),
    ("2,-3", "2,3", ["-3 and 2"]),
    (r"18 \text{ dollars}", "19", ["18", "$18", "18 dollars"]),
    ("18", "19", ["18 g", "18 (dollars)", "18 meters per second", "18%"]),
    ("3/4", "3/5", ["3/4 cup", "0.75"]),
    (r"4^{9^{9^9}}", "4", []),
    ("1/2004!", "1/2006!", []),
    (r"(\frac{1}{2004!}, 2)", r"(\frac{1}{2006!}, 2)", []),
    (r"\frac{x}{2004!}", r"\frac{x}{2006!}", []),
    ("0.0000001", "0.0000002", ["10^{-7}"]),
    ("0.333333", "0.3", ["1/3"]),
    ("0", "1/2006!", [r"\sin(\pi)"]),
]


def math_equal(completion, reference):
    return find("math_equal", Path("/nowhere")).function(completion, [reference])[0]


@pytest.mark.parametrize(("reference", "wrong", "others"), ANSWERS)
def test_an_answer_earns_1_in_every_form_and_its_wrong_neighbour_0_in_every_form(reference, wrong, others):
    for form in FORMS:
        for right in [reference, *others]:
            assert math_equal(form.format(right), reference) == 1.0, (form, right)
        assert math_equal(form.format(wrong), reference) == 0.0, form


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("answer is 5. So the answer is 6", "6", 1.0),
        ("The answer is:\n$$\n12\n$$", "12", 1.0),
        ("She makes 9*2 = $18 every day.", "18", 1.0),
        ("The answer is 5 or 6", "5", 0.0),
        ("#### 5 x", "5", 0.0),
        (r"\boxed{5} is wrong; \boxed{6}", "6", 1.0),
        ("7", r"We add 3 and 4. So \boxed{7}", 1.0),
        (r"x = \frac{1}{2}", r"\frac{1}{2}", 1.0),
        ("<answer>4</answer> <answer>\nThe answer is 5\n</answer> (6 was wrong)", "5", 1.0),
        ("<answer>4</answer> <answer>", "4", 1.0),
        ("```python\n5\n```", "5", 1.0),
        ("```", "5", 0.0),
        ("5", "", None),
    ],
)
def test_the_final_answer_is_found_in_prose(completion, reference, expected):
    assert math_equal(completion, reference) == expected


@pytest.mark.parametrize("tower", ["9^{9^{9^{9}}}", "9^9^9^9^9", "10^{10^{10}}+1", "(9^{9})!", "((((9!)!)!)!)!"])
def test_a_number_too_large_to_work_out_is_not_worked_out(tower):
    start = time.process_time()
    assert [math_equal(form.format(tower), "5") for form in FORMS] == [0.0] * len(FORMS)
    assert time.process_time() - start < 4.5  # one alone took 5 s


def in_a_thread(answer, references):
    """The rewards of an answer and their CPU seconds in a thread, where no alarm can be set."""
    found = []

    def compare():
        start = time.thread_time()
        found.append([math_equal(rf"\boxed{{{answer}}}", reference) for reference in references])
        found.append(time.thread_time() - start)

    thread = threading.Thread(target=compare, daemon=True)
    thread.start()
    thread.join(120)
    assert len(found) == 2, "it does not end, or raised"
    return found


@pytest.mark.parametrize(
    "answer",
    [
        r"\sum_{n=1}^{10^9} n^{-3}",
        r"\sum_{n=1}^{10^6} \sin(n^2)",
        r"\sum_{i=1}^{99}\sum_{j=1}^{99} \frac{1}{i+j}",
        r"\sum_{n=1}^{\infty} \frac{1}{n^5+n+1}",
        r"\prod_{n=1}^{10^6} (n+1/n)",
        "(x+1)^{10000}",
        "(x+1)^{10^4}-x",
        "(a+b+c+d+e+f)^{20}",
        r"\frac{1}{(x+1)^{500}}+\frac{1}{(x-1)^{500}}",
        r"\frac{x^{1000}-1}{x-1}",
        r"((((x^2+1)^2+1)^2+1)^2+1)^{20}",
        r"(\sqrt{2}+\sqrt{3})^{10000}",
        r"(\sin x+\cos x)^{100}",
        r"\cos(1)^{10000}",
        r"\sin(\cos(\sin(\cos(\sin(\cos(\sin(\cos(x+y))))))))",
        "e^{e^{e^{e^{e}}}}",
        r"\lfloor e^{10^6} \rfloor",
        r"\int_0^\infty e^{-x^2} \sin(x^3) dx",
        r"\begin{pmatrix}x&y\\z&w\end{pmatrix}^{50}",
        r"\gcd(10^{10^5}, 7^{10^5})",
        r"\det\begin{pmatrix}a&b&c&d&e\\f&g&h&i&j\\k&l&m&n&o\\p&q&r&s&t\\u&v&w&x&y\end{pmatrix}",
        "x^{100}+x^{37}-3x+1=0",
    ],
)
def test_what_would_take_long_is_not_worked_out_in_any_thread(answer):
    values, seconds = in_a_thread(answer, ["x+1", answer])
    assert values == [0.0, 1.0]
    assert seconds < 4  # each of them took more than 10 s, or never ended


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("(1+x)^{10000}", "(x+1)^{10^4}", 1.0),
        ("(x+2)^{10000}", "(x+1)^{10^4}", 0.0),
        (r"\frac{1-x^{1000}}{1-x}", r"\frac{x^{1000}-1}{x-1}", 1.0),
        (r"\frac{x^{1000}-2}{x-1}", r"\frac{x^{1000}-1}{x-1}", 0.0),
        (r"(\sqrt3+\sqrt2)^{1000}", r"(\sqrt2+\sqrt3)^{1000}", 1.0),
        ("2<x^{400}", "x^{400}>2", 1.0),
        ("3<x^{400}", "x^{400}>2", 0.0),
        ("x^{50}+y=4", "x^{50}+y=3", 0.0),
        (r"\sum_{k=1}^{1000} k", "500500", 1.0),
        (r"\prod_{k=1}^{5} k", "120", 1.0),
        (r"\int_0^1 x^2 dx", "1/3", 1.0),
        (r"\gcd(12,18)", "6", 1.0),
    ],
)
def test_long_expressions_are_compared_by_their_values_and_short_ones_worked_out(answer, reference, expected):
    assert in_a_thread(answer, [reference])[0] == [expected]
