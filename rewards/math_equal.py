"""Whether the final answer of a completion equals a reference mathematically, by math-verify."""

import re
import threading
from functools import lru_cache

import sympy
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.grader import get_pct_val
from math_verify.utils import timeout
from sympy.functions.combinatorial.factorials import CombinatorialFunction

from rlseq.scoring import reward
from rlseq.scoring.distance import as_list

SECONDS = 2  # of reading and of comparing, where an alarm can be set
LONGEST_ANSWER = 1_000  # characters
LONGEST_TEXT = 10_000  # characters at the end of a completion in which an answer is looked for
LARGEST = 200_000  # bits of a number that is worked out; a larger one equals only what is written like it

_NAMES = "arccos arcsin arctan sin cos tan cot sec csc sinh cosh tanh log ln exp sqrt pi infty inf oo"
_FUNCTIONS = frozenset(_NAMES.split())
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_BRACED = re.compile(r"\\(?:begin|end|operatorname|text\w*|math\w+|mbox)\*?\s*\{[^{}]*\}")
_UNIT_LETTER = re.compile(r"(?<=[\d}%])\s+[gmshlLVWJNCFK]\s*$")
_UNIT_TEXT = re.compile(r"(?<=[\d})%])[\s~]*\\(?:text\w*|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?\s*$")
_MOST_OPEN = 20  # boxes tried, from the last: thousands left open would take minutes
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
    r"""1 if the final answer equals a reference's as mathematics (1/2, 0.5 and \frac{1}{2} are equal), else
    0.

    The final answer is the first line after the last `####` if that mark is there, else the last `\boxed{...}`,
    else what follows the last "answer is" or "answer:", else the whole of a text that is a formula, else what
    math-verify finds; where there are `<answer>` tags, in the last of them. Dollars around it, markdown, a code block
    and units behind a number do not count. References are read in the same way, as LaTeX with dollars or without. A
    reference that cannot be read makes the reward abstain. A number of more than 60,000 digits equals only what is
    written like it. Reading and comparing take 2 seconds
    each at most, and the answer is wrong then; in a thread other than the main one there is no such limit: set
    `timeout`. Details: the answer as read.
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
    return parse(text, parsing_timeout=_seconds())


def _equal(target: list, answer: list) -> bool:
    if not answer:
        return False
    gold, guess = target[0], answer[0]
    if isinstance(gold, str) or isinstance(guess, str):
        return verify(target, answer, timeout_seconds=_seconds())
    if max(_bits(gold), _bits(guess)) > LARGEST:
        return gold == guess
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
        base, exponent = expression.args
        size = _bits(exponent)
        times = abs(int(exponent)) if exponent.is_Integer else 2.0**size if size < 64 else float("inf")
        return max(_bits(base), size, 1) * max(times, 1)
    inside = [_bits(argument) for argument in expression.args if isinstance(argument, sympy.Basic)]
    if isinstance(expression, CombinatorialFunction):
        size = max(inside, default=1)
        return size * 2.0**size if size < 64 else float("inf")
    return max(1, sum(inside))


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
