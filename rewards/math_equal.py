"""Mathematical equality of a completion's final answer and a reference, by math-verify."""

import math
import re
import threading
from functools import lru_cache

import sympy
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.grader import get_pct_val
from math_verify.utils import timeout
from sympy.functions.combinatorial.factorials import CombinatorialFunction
from sympy.functions.elementary.hyperbolic import HyperbolicFunction

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list

SECONDS = 2  # of reading and of comparing, where an alarm can be set
LONGEST_ANSWER = 1_000  # characters
LONGEST_TEXT = 10_000  # characters at the end of a completion in which an answer is looked for
LARGEST = 200_000  # bits of a number that is worked out; a larger one equals only what is written like it
MOST_TERMS = 300  # of an expression, multiplied out, that is simplified; a longer one is compared by its values
MOST_SOLVED = 20  # the same of an equation or inequality that is solved

_NAMES = "arccos arcsin arctan sin cos tan cot sec csc sinh cosh tanh log ln exp sqrt pi infty inf oo"
_FUNCTIONS = frozenset(_NAMES.split())
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_BRACED = re.compile(r"\\(?:begin|end|operatorname|text\w*|math\w+|mbox)\*?\s*\{[^{}]*\}")
_UNIT_LETTER = re.compile(r"(?<=[\d}%])\s+[gmshlLVWJNCFK]\s*$")
_UNIT_TEXT = re.compile(r"(?<=[\d})%])[\s~]*\\(?:text\w*|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?\s*$")
_MOST_OPEN = 20  # boxes tried, from the last: thousands left open would take minutes
_COMPUTED = re.compile(r"\\?\b(?:det|rank|rref|gcd|lcm)\b|\\xrightarrow")  # worked out while it is read
_EDGE = " \t\r\n,;:"
_STYLED = re.compile(r"\\(?:text\w*|math\w+|mbox|bm|boldsymbol)\{([^{}]*\d[^{}]*)\}")
_BOLD = re.compile(r"(?<![\w)])\*\*(.+?)\*\*(?![\w(])")
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?!\w)")
_ANSWER = re.compile(r"\banswer(?:\s+is\b|\s*[:=])(?=[\s:*]*[^\s:*])", re.IGNORECASE)
_DISPLAYED = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
_SENTENCE_END = re.compile(r"[.;](?=\s)")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_MATH = re.compile(r"(?<!\\)\$[^$]+\$|\\\(|\\\[")
_WRAPPED = (
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$((?:\\\$|[^$])+)\$"),
    re.compile(r"\\\((.+)\\\)", re.DOTALL),
    re.compile(r"\\\[(.+)\\\]", re.DOTALL),
    re.compile(r"`+([^`]+)`+"),
    re.compile(r"[*_]([^*_]+)[*_]"),
)


@reward(range=(0, 1), extra="math")
def math_equal(completion: str, references: list[str] | str) -> tuple[float | None, dict]:
    r"""Return 1 if the final answer is mathematically equal to a reference (as 1/2, 0.5 and \frac{1}{2} are), else 0.

    The final answer is the first of these that exists, within the last `<answer>` tags if there are any:

    1. the first line after the last `####`;
    2. the last `\boxed{...}`;
    3. what follows the last "answer is" or "answer:";
    4. the whole text, if it is a formula;
    5. what math-verify finds.

    Dollar signs, markdown, code fences and units after a number are ignored. References are read in the same way, with
    or without dollar signs. The reward abstains if no reference can be parsed.

    Numbers of more than 60,000 digits are compared as text, and so are sums, products, integrals and limits that take
    long to evaluate. Other long expressions, such as (x+1)^10000, are compared by their values at two points. In the
    main thread parsing and comparing are limited to 2 seconds each; an answer that takes longer is wrong.

    Returns:
        (value, details). The value is None if the reward abstains. `answer` of the details is the answer as parsed.
    """
    targets = [target for target in map(_read_reference, as_list(references)) if target]
    if not targets:
        return None, {"answer": None}
    answer = _read(completion)
    equal = any(_equal(target, answer) for target in targets)
    return float(equal), {"answer": _shown(answer)}


@lru_cache(maxsize=65536)
def _read_reference(text: str) -> list:
    return _read(text)


def _read(text: str) -> list:
    """What math-verify reads of the final answer: an expression and the text it was read from, or less."""
    text = text.strip()[-LONGEST_TEXT:]
    span = _final(text)
    return _parse(text) if span is None else _read_answer(span)


def _final(text: str) -> str | None:
    """The part of a text that is its final answer, or None where nothing says which it is."""
    text = [text, *_TAGGED.findall(text)][-1].strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].partition("\n")[2].strip()
    _, mark, rest = text.rpartition("####")
    if mark:
        rest = _first_line(rest)
        return _boxed(rest) or rest
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    said = list(_ANSWER.finditer(text))
    if said:
        return _SENTENCE_END.split(_first_line(text[said[-1].end() :]))[0]
    return text if "\n" not in text and len(text) <= LONGEST_ANSWER and not _is_prose(text) else None


def _first_line(text: str) -> str:
    """The first line that says something, or the displayed formula that begins there."""
    text = text.lstrip(" \t\r\n:*")
    displayed = _DISPLAYED.match(text)
    return displayed[0] if displayed else text.split("\n", 1)[0].strip()


def _boxed(text: str) -> str | None:
    r"""What the last \boxed or \fbox holds, if its braces are closed."""
    opened = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]
    for start in opened[: -_MOST_OPEN - 1 : -1]:
        depth = 1
        for place in range(start, len(text)):
            if text[place] in "{}" and text[place - 1] != "\\":
                depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start:place]
    return None


def _words(text: str) -> list[re.Match]:
    """The words of a text that are no mathematics; what stands in a command's braces is blanked out, not moved."""
    text = _BRACED.sub(lambda match: " " * len(match[0]), text)
    return [match for match in _WORD.finditer(text) if match[0] not in _FUNCTIONS]


def _is_prose(text: str) -> bool:
    """Whether words come before a formula or a number, so that the whole is no answer."""
    words = [word for word in _words(text) if word[0] not in ("and", "or")]
    if not words or (re.fullmatch(r"[A-Za-z ]+\.?", text) and len(words) <= 3):
        return False
    return words[0].start() == 0 or len(words) > 4 or bool(re.search(r"\d|\\[^])]", text[words[0].start() :]))


def _read_answer(span: str) -> list:
    """Read a text that is an answer alone, with its decoration and units."""
    span = _BOLD.sub(r"\1", span.strip())
    before = None
    while before != span:  # a formula in dollars in asterisks
        before, span = span, span.lstrip(f"{_EDGE}*").rstrip(f"{_EDGE}*.")
        for pattern in _WRAPPED:
            inside = pattern.fullmatch(span)
            span = inside[1].strip() if inside else span
    if not span or len(span) > LONGEST_ANSWER:
        return []
    if _MATH.search(span):  # text and formulas in turn
        return _parse(span)
    span = _STYLED.sub(r"\1", _UNIT_TEXT.sub("", re.sub(r"\\?\$", "", span)))
    span = re.sub(r"(?<=\d)\\[,;:! ](?=\d)", "", span)
    span = re.sub(r"(?<!\\)%", r"\%", span)
    span = re.sub(r"(?<=\d)\s*[x×]\s*(?=10\^)", r" \\cdot ", span)
    span = _EXPONENT.sub(r"\1 \\cdot 10^{\2}", span)
    if re.fullmatch(r"[A-Za-z][A-Za-z ]+", span) and span not in _FUNCTIONS:  # a word, not a product of its letters
        return _parse(rf"$\text{{{span}}}$")
    words = _words(span)
    if words and all(word[0] in ("and", "or") for word in words):
        span, words = re.sub(r",?\s*\b(?:and|or)\b\s*", ", ", span), []
    if words:
        head = span[: words[0].start()].rstrip(" (,;:")
        if not head:
            return _parse(span)
        span = head
    return _parse(f"${_UNIT_LETTER.sub('', span)}$")


def _parse(text: str) -> list:
    if _COMPUTED.search(text) and (len(text) > 60 or re.search(r"[\^!]|\d{20}", text)):
        text = _COMPUTED.sub(" ", text)
    return parse(text, parsing_timeout=_seconds())


def _equal(target: list, answer: list) -> bool:
    if not answer:
        return False
    gold, guess = target[0], answer[0]
    if isinstance(gold, str) or isinstance(guess, str):
        return verify(target, answer, timeout_seconds=_seconds())
    if max(_bits(gold), _bits(guess)) > LARGEST:
        return gold == guess
    most = MOST_SOLVED if isinstance(gold, sympy.core.relational.Relational) else MOST_TERMS
    if max(_terms(gold), _terms(guess)) > most:
        return _alike(gold, guess)
    if not verify(gold, guess, timeout_seconds=_seconds()):
        return target[1:] == answer[1:] != []
    try:
        apart = timeout(timeout_seconds=_seconds())(_apart)
        return not (apart(gold, guess) and apart(get_pct_val(gold, gold), get_pct_val(guess, guess)))  # 9% equals 9
    except TimeoutException:
        return False


def _bits(expression: sympy.Basic | sympy.MatrixBase) -> float:
    """An upper bound of the bits of the largest number in an expression, without working it out."""
    if isinstance(expression, sympy.MatrixBase):
        return max(map(_bits, expression.flat()), default=1)
    if isinstance(expression, sympy.Rational):
        return max(abs(expression.p).bit_length(), expression.q.bit_length())
    if isinstance(expression, sympy.Pow):
        base, exponent = expression.base, _power(expression)
        size = _bits(exponent)
        times = abs(int(exponent)) if exponent.is_Integer else 2.0**size if size < 64 else float("inf")
        return max(_bits(base), size, 1) * max(times, 1)
    inside = [_bits(argument) for argument in expression.args if isinstance(argument, sympy.Basic)]
    if isinstance(expression, sympy.exp):
        return 1.5 * 2.0 ** inside[0] if inside[0] < 64 else float("inf")
    if isinstance(expression, (CombinatorialFunction, HyperbolicFunction, sympy.gamma)):
        size = max(inside, default=1)
        return size * 2.0**size if size < 64 else float("inf")
    return max(1, sum(inside))


def _power(expression: sympy.Pow) -> sympy.Expr:
    """The exponent, worked out if it is a small number: 10^4 is read as a power of its own."""
    exponent = expression.exp
    return exponent.doit() if exponent.is_number and _bits(exponent) < 64 else exponent


def _terms(expression: sympy.Basic | sympy.MatrixBase) -> float:
    """About how many terms an expression has when it is multiplied out, without doing so."""
    if isinstance(expression, sympy.MatrixBase):
        return sum(map(_terms, expression.flat()))
    inside = [_terms(argument) for argument in expression.args if isinstance(argument, sympy.Basic)]
    if isinstance(expression, (sympy.Sum, sympy.Product, sympy.Integral)):
        return inside[0] * math.prod(_steps(expression, *limits.args) for limits in expression.limits)
    if isinstance(expression, (sympy.Limit, sympy.Derivative)):
        return 5 * sum(inside)
    if isinstance(expression, sympy.Pow):
        base, exponent = expression.base, _power(expression)
        if not exponent.is_Rational:
            return 3 * inside[0] * inside[1]
        terms, power = inside[0], math.ceil(abs(exponent))
        if isinstance(base, sympy.MatrixBase):
            return _ways(terms, power) if base.free_symbols else terms * power
        radical = 1 if exponent.is_Integer else 2
        return radical * (_ways(terms, power) if terms > 1 else 1 if base.is_number else max(1, power))
    if isinstance(expression, sympy.Mul):
        return math.prod(inside)
    if isinstance(expression, sympy.Function) and not isinstance(expression, CombinatorialFunction):
        return 3 * sum(inside)
    return max(1, sum(inside))


def _ways(terms: float, power: int) -> float:
    """The terms of a sum of some terms to a power."""
    return math.comb(power + int(terms) - 1, power) if max(terms, power) < 2**20 else float("inf")


def _steps(expression: sympy.Basic, variable: sympy.Symbol, *ends: sympy.Basic) -> float:
    """By how much a sum, product or integral over a variable multiplies the terms of what is in it."""
    inside = expression.args[0]
    if isinstance(expression, sympy.Integral):
        return 10
    if isinstance(expression, sympy.Sum) and inside.is_polynomial(variable):
        return 20
    if len(ends) == 2 and _whole(*ends):
        return max(1, int(ends[1].doit()) - int(ends[0].doit()) + 1)
    return float("inf") if inside.atoms(sympy.Function) - inside.atoms(CombinatorialFunction) else 100


def _whole(*ends: sympy.Basic) -> bool:
    return all(_bits(end) < 64 and end.doit().is_Integer for end in ends)


def _alike(gold: sympy.Basic | sympy.MatrixBase, guess: sympy.Basic | sympy.MatrixBase) -> bool:
    """Whether two long expressions are the same text, or have equal values at two points; neither is simplified."""
    if gold == guess:
        return True
    if isinstance(guess, sympy.core.relational.Relational) and type(gold) is type(guess.reversed) is not type(guess):
        return _alike(gold, guess.reversed)
    if type(gold) is type(guess) and not isinstance(gold, sympy.Expr):
        parts = [side.flat() if isinstance(side, sympy.MatrixBase) else side.args for side in (gold, guess)]
        return len(parts[0]) == len(parts[1]) and all(map(_alike, *parts)) and bool(parts[0])
    if not (isinstance(gold, sympy.Expr) and isinstance(guess, sympy.Expr)):
        return False
    unworked = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative, sympy.MatrixBase)
    if gold.free_symbols != guess.free_symbols or gold.has(*unworked) or guess.has(*unworked):
        return False
    return all(_agree(gold, guess, step) for step in (4, 3))


def _agree(gold: sympy.Expr, guess: sympy.Expr, step: int) -> bool:
    """Whether two expressions have a value at a point, and the same."""
    point = {symbol: sympy.Rational(7 + step * n, 5) for n, symbol in enumerate(sorted(gold.free_symbols, key=str))}
    if step != 4:
        point = {symbol: value - 1 for symbol, value in point.items()}
    a, b = (side.evalf(20, subs=point) for side in (gold, guess))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) <= sympy.Rational(1, 10**12) * max(abs(a), abs(b)))


def _apart(gold: sympy.Basic | sympy.MatrixBase, guess: sympy.Basic | sympy.MatrixBase) -> bool:
    """Whether two expressions that math-verify calls equal, to some decimals, differ in what their size is.

    Its comparison is absolute, in which all tiny numbers are 0.
    """
    for kind in (sympy.MatrixBase, sympy.Tuple, sympy.FiniteSet, sympy.Interval, sympy.core.relational.Relational):
        if isinstance(gold, kind) and isinstance(guess, kind):
            return _parts_apart(gold, guess, kind)
    if not (isinstance(gold, sympy.Expr) and isinstance(guess, sympy.Expr)):
        return False
    symbols = sorted(gold.free_symbols | guess.free_symbols, key=str)
    if symbols and gold.free_symbols != guess.free_symbols:
        return False
    point = {symbol: sympy.Rational(7 + 4 * place, 5) for place, symbol in enumerate(symbols)}
    rounded = gold.has(sympy.Float) or guess.has(sympy.Float)
    a, b = (side.subs(point).doit().evalf(20) for side in (gold, guess))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False
    a, b = (sympy.Integer(0) if _is_noise(side) else side for side in (a, b))
    return bool(abs(a - b) > (1e-3 if rounded else sympy.Rational(1, 10**12)) * max(abs(a), abs(b)))


def _is_noise(value: sympy.Expr) -> bool:
    """Whether evaluation found no digit of a number: it is 0, as far as can be told."""
    return isinstance(value, sympy.Float) and value._prec == 1


def _parts_apart(gold: sympy.Basic, guess: sympy.Basic, kind: type) -> bool:
    if kind is sympy.MatrixBase:
        parts = gold.flat(), guess.flat()
    elif kind is sympy.FiniteSet:
        parts = [sorted(side.args, key=lambda part: sympy.default_sort_key(part.evalf())) for side in (gold, guess)]
    elif kind is sympy.core.relational.Relational:
        if gold.lhs != guess.lhs:  # the same in another form: nothing to compare side by side
            return False
        parts = (gold.rhs,), (guess.rhs,)
    else:
        parts = gold.args, guess.args
    if len(parts[0]) != len(parts[1]):
        return False
    return any(_apart(a, b) for a, b in zip(*parts, strict=True))


def _shown(answer: list) -> str | None:
    """The answer as read; a number too large to write stays as it was written."""
    return str(answer[-1])[:LONGEST_ANSWER] if answer else None


def _seconds() -> int | None:
    """Math-verify's own limit is an alarm, which works in the main thread only."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
