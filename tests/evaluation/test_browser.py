"""`rlseq browse`: what the page holds, read from its bytes, and what a browser makes of it, where there is one."""

import base64
import gzip
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_report import HOSTILE, results, samples  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlseq.cli.main import main
from rlseq.evaluation.browser import page as browser
from rlseq.evaluation.browser.token_lengths import TokenLengths
from rlseq.evaluation.report.write import write_report

END_OF_SCRIPT = "</script><script>document.title='taken'</script><!--"
RIGHT_TO_LEFT = "שלום \u202e\"'&<b>"


def rollout(step, key, sample, **fields):
    return {
        "step": step,
        "prompt_key": key,
        "sample": sample,
        "prompt": f"spell {key}",
        "references": ["K AE T"],
        "completion": f"{key} {step}.{sample}",
        "values": {"accuracy": 0.25, "brevity": None},
        "status": {"accuracy": "ok", "brevity": "abstained"},
        "total": 0.25,
        "advantage": -0.5,
        "logprob": -1.25,
        "length": 4,
        "finish_reason": "stop",
        **fields,
    }


@pytest.fixture
def write_run(tmp_path):
    def written(records, name="run"):
        folder = tmp_path / name / "rollouts"
        folder.mkdir(parents=True)
        (folder / "000001.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    return written


class Scripts(HTMLParser):
    """The texts of the script elements, as an HTML parser finds them: by id, "" for the code."""

    def __init__(self, text):
        super().__init__()
        self.found, self.id, self.tags = {}, None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.id = dict(attrs).get("id", "") if tag == "script" else None

    def handle_data(self, data):
        if self.id is not None:
            self.found[self.id] = self.found.get(self.id, "") + data

    def handle_endtag(self, tag):
        self.id = None


def blocks(path):
    scripts = Scripts(path.read_text(encoding="utf-8"))
    data = {name: gzip.decompress(base64.b64decode(text)) for name, text in scripts.found.items() if name}
    return {name: block if name == "numbers" else json.loads(block) for name, block in data.items()}


def browse(*argv):
    return main(["browse", *map(str, argv)])


def test_the_page_holds_every_number_and_text_of_the_log(write_run, capsys):
    np = pytest.importorskip("numpy")
    run = write_run([rollout(1, "cat", 0), rollout(2, "dog", 1, total=0.75, finish_reason="length", advantage=None)])
    assert browse(run) == 0
    assert "2 rollouts in" in capsys.readouterr().out
    found = blocks(run / "rollouts.html")
    about = found["about"]
    assert about["count"] == 2 and about["prompts"] == 2 and about["runs"] == ["run"]
    assert about["status"] == ["ok", "abstained"] and about["finish"] == ["stop", "length"]
    columns, offset = {}, 0
    for name, code in about["columns"]:
        columns[name] = np.frombuffer(found["numbers"], {"i": "<i4", "f": "<f4", "B": "u1"}[code], 2, offset)
        offset += columns[name].nbytes
    assert offset == len(found["numbers"])
    assert columns["step"].tolist() == [1, 2] and columns["total"].tolist() == [0.25, 0.75]
    assert columns["advantage"][0] == -0.5 and np.isnan(columns["advantage"][1])  # none, which is not 0
    assert columns["reward accuracy"].tolist() == [0.25, 0.25] and np.isnan(columns["reward brevity"]).all()
    assert columns["finish"].tolist() == [0, 1] and columns["status"].tolist() == [0b11, 0b11]
    assert found["p0"][0] == ["spell cat", "spell dog"] and found["t0"][0] == ["cat 1.0", "dog 2.1"]


def test_a_reward_that_is_logged_later_has_no_value_before(write_run):
    np = pytest.importorskip("numpy")
    run = write_run([rollout(1, "cat", 0, values={"a": 1}), rollout(2, "cat", 0, values={"b": 2})])
    browse(run)
    found = blocks(run / "rollouts.html")
    names = [name for name, _ in found["about"]["columns"]]
    table = np.frombuffer(found["numbers"], "<f4", 2 * names.index("run")).reshape(-1, 2)
    np.testing.assert_equal(table[names.index("reward a")], [1, np.nan])
    np.testing.assert_equal(table[names.index("reward b")], [np.nan, 2])


def test_texts_are_cut_into_blocks_that_are_read_alone(write_run, monkeypatch):
    monkeypatch.setattr(browser, "BLOCK", 2)
    run = write_run([rollout(1, f"p{i}", 0) for i in range(5)])
    browse(run)
    found = blocks(run / "rollouts.html")
    assert [found[f"t{i}"][0] for i in range(3)] == [["p0 1.0", "p1 1.0"], ["p2 1.0", "p3 1.0"], ["p4 1.0"]]
    assert found["about"]["block"] == 2


@pytest.mark.parametrize("text", [HOSTILE, END_OF_SCRIPT, RIGHT_TO_LEFT, "\ud800", "\x00"])
def test_no_text_of_a_rollout_is_markup_or_code_of_the_page(write_run, text):
    texts = {"completion": text, "prompt": text, "references": [text], "finish_reason": text}
    run = write_run([rollout(1, "cat", 0, **texts, values={text: 1}, status={text: "ok"})])
    browse(run)
    plain = write_run([rollout(1, "cat", 0)], "plain")
    browse(plain)
    written, usual = ((path / "rollouts.html").read_text(encoding="utf-8") for path in (run, plain))
    assert [tag for tag, _ in Scripts(written).tags] == [tag for tag, _ in Scripts(usual).tags]
    found = blocks(run / "rollouts.html")
    assert found["t0"][0] == [text] and found["p0"] == [[text], [[text]]] and found["about"]["rewards"] == [text]


def test_the_page_loads_nothing(write_run):
    run = write_run([rollout(1, "cat", 0)])
    browse(run)
    scripts = Scripts((run / "rollouts.html").read_text(encoding="utf-8"))
    assert not [attrs for _, attrs in scripts.tags if {"src", "href"} & set(attrs)]
    code = scripts.found[""]
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|fetch\(|XMLHttpRequest|import\(", code)
    assert re.findall(r"https?://[^\"]*", code) == ["http://www.w3.org/2000/svg"]  # the name of a namespace


def test_what_cannot_be_browsed_is_said_in_one_line(write_run, tmp_path, capsys):
    run = write_run([rollout(1, "cat", 0)])
    empty = write_run([], "empty")
    for argv, said in (
        ((tmp_path / "none",), "is not a directory"),
        ((empty,), "has no rollouts"),
        ((run, empty), "has no rollouts"),
        ((run, "--output", tmp_path), "is a folder"),
    ):
        assert browse(*argv) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("**/*.html"))


def byte_tokenizer():
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_character_of_several_tokens_belongs_to_its_last_one():
    tokenizer = byte_tokenizer()
    lengths = TokenLengths(tokenizer).lengths(tokenizer.encode("aé€b").ids, "aé€b")
    assert lengths == [1, 0, 1, 0, 0, 1, 1]  # é is 2 bytes in UTF-8, € is 3


def test_tokens_that_do_not_spell_the_text_have_no_lengths():
    tokenizer = byte_tokenizer()
    assert TokenLengths(tokenizer).lengths(tokenizer.encode("ab").ids, "ac") is None
    assert TokenLengths(tokenizer).lengths(tokenizer.encode("ab").ids, "abc") is None
    assert TokenLengths(tokenizer).lengths(tokenizer.encode("aé").ids[:-1], "a") is None


def test_log_probs_are_kept_in_tenths(write_run):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("abc").ids
    run = write_run([rollout(1, "cat", 0, completion="abc", completion_ids=ids, logprobs=[0.0, -1.26, -30.0])])
    tokenizer.save(str(run / "tokenizer.json"))
    browse(run)
    lengths, logprobs, *_ = blocks(run / "rollouts.html")["d0"]
    assert [ord(c) - browser.FIRST for c in lengths[0]] == [1, 1, 1]
    assert [ord(c) - browser.FIRST for c in logprobs[0]] == [0, 13, 92]


def test_a_log_is_small_up_to_the_limit(write_run, tmp_path):
    run = write_run([rollout(1, "cat", i) for i in range(3)])
    assert browser.rollouts_at_most(run, 3) and not browser.rollouts_at_most(run, 2)
    assert not browser.rollouts_at_most(tmp_path, 3)


def test_the_report_links_to_the_page_where_there_is_one(results, samples, tmp_path):  # noqa: F811
    without = write_report(results, samples, tmp_path / "evaluation").read_text()
    assert "rollouts.html" not in without
    (tmp_path / "rollouts.html").write_text("")
    assert 'href="../rollouts.html"' in write_report(results, samples, tmp_path / "evaluation").read_text()


CHROMIUM = Path(__file__).parent.parent.parent / "benchmarks" / "chromium.py"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    found = importlib.util.spec_from_file_location("chromium", CHROMIUM)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if module.PATH is None:
        pytest.skip("no chromium on the path")
    with module.Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


TEXTS = "[...document.querySelectorAll('#space .text')].map(made => made.textContent)"


def shown(chromium, page, filters=""):
    """The status line of the page and the texts of its rows, once they are there."""
    chromium.open(page, filters)
    chromium.wait_for(f"!{TEXTS}.includes('…')")
    return chromium.evaluate("said.textContent"), chromium.evaluate(TEXTS)


@pytest.mark.parametrize(
    "filters, expected",
    [
        ("", ["cat 1.0", "cat 2.0", "dog 1.0", "dog 2.1"]),
        ("step_from=2", ["cat 2.0", "dog 2.1"]),
        ("reward_from=0.7", ["dog 2.1"]),
        ("reward=reward brevity&reward_from=0", []),  # it abstained everywhere: no value fits a bound
        ("sign=%2B", ["cat 2.0"]),
        ("finish=1", ["dog 2.1"]),
        ("length_to=3", ["dog 1.0"]),
        ("status=1", ["cat 1.0"]),  # timeout, the second status that is met
        ("text=SPELL%20dog", ["dog 1.0", "dog 2.1"]),
        ("text=2.0", ["cat 2.0"]),
        ("order=total-", ["dog 2.1", "cat 1.0", "cat 2.0", "dog 1.0"]),
        ("prompt_of=3", ["dog 1.0", "dog 2.1"]),
    ],
)
def test_a_browser_shows_what_the_filter_leaves(write_run, chromium, filters, expected):
    run = write_run(
        [
            rollout(1, "cat", 0, status={"accuracy": "ok", "brevity": "timeout"}),
            rollout(2, "cat", 0, advantage=0.5, status={"accuracy": "ok", "brevity": "abstained"}),
            rollout(1, "dog", 0, length=3),
            rollout(2, "dog", 1, total=0.75, finish_reason="length"),
        ]
    )
    browse(run)
    status, rows = shown(chromium, run / "rollouts.html", filters)
    assert status.startswith(f"{len(expected)} of 4 rollouts")
    assert rows == expected


def test_a_browser_shows_two_runs_on_the_same_prompts_side_by_side(write_run, chromium, tmp_path):
    a = write_run([rollout(1, "cat", 0), rollout(1, "dog", 0)], "a")
    b = write_run([rollout(3, "cat", 0), rollout(3, "cat", 1), rollout(3, "cow", 0)], "b")
    browse(a, b, "--output", tmp_path / "two.html")
    status, rows = shown(chromium, tmp_path / "two.html", "view=pairs")
    assert "1 prompts in both" in status
    assert rows == ["spell cat", "cat 1.0", "cat 3.0", "cat 3.1"]


def test_a_browser_shows_hostile_text_as_text_and_its_log_probs(write_run, chromium):
    tokenizer = byte_tokenizer()
    text = END_OF_SCRIPT + RIGHT_TO_LEFT
    ids = tokenizer.encode(text).ids
    texts = {"prompt": text, "completion": text, "references": [text]}
    run = write_run([rollout(1, text, 0, **texts, completion_ids=ids, logprobs=[-8.0, *[0.0] * (len(ids) - 1)])])
    tokenizer.save(str(run / "tokenizer.json"))
    browse(run)
    _, (row,) = shown(chromium, run / "rollouts.html", "open=0")
    visible = text.replace("\u202e", "\\u202e")
    assert row == visible and chromium.evaluate("document.title") == "Rollouts of run · rlseq"
    chromium.wait_for("document.querySelectorAll('#detail .whole').length === 3")
    assert (
        chromium.evaluate("[...document.querySelectorAll('#detail .whole')].map(p => p.textContent)") == [visible] * 3
    )
    tokens = chromium.evaluate(
        "[...document.querySelectorAll('#detail .whole span')].map(s => [s.textContent, s.title])"
    )
    assert tokens[0] == ["<", "log-prob -8.0"] and {title for _, title in tokens[1:]} == {"log-prob 0.0"}
    assert "".join(token for token, _ in tokens) == visible


def test_only_the_rows_in_sight_are_in_the_page(write_run, chromium):
    run = write_run([rollout(1, f"p{i}", 0) for i in range(3_000)])
    browse(run)
    _, rows = shown(chromium, run / "rollouts.html")
    assert rows[0] == "p0 1.0" and len(rows) < 50
    chromium.evaluate("list.scrollTop = list.scrollHeight")
    chromium.wait_for(f"{TEXTS}.includes('p2999 1.0')")
    assert len(chromium.evaluate(TEXTS)) < 50
