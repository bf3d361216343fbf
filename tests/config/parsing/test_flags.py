"""Flags made from dataclasses: `rlseq evaluate` reads them as recipes/evaluate.py does, by TRL's parser."""

import subprocess
import sys

import pytest
from test_dry_run import run

from rlseq.cli import evaluate
from rlseq.cli.main import Parser, main
from rlseq.config.arguments import EvaluationDataArguments
from rlseq.config.parsing.flags import from_flags
from rlseq.config.parsing.parser import RecipeParser
from rlseq.errors import ConfigError
from rlseq.evaluation.settings import ContrastSettings


def of_command():
    parser = Parser(prog="rlseq evaluate")
    evaluate.add_arguments(parser)
    return parser


def by_command(line):
    return from_flags(evaluate.ARGUMENTS, of_command().parse_args(line))


@pytest.fixture
def of_recipe(monkeypatch):
    """The parser that recipes/evaluate.py makes."""

    class Made(Exception):
        pass

    def parse(self):
        raise Made(self)

    with monkeypatch.context() as patch, pytest.raises(Made) as caught:
        patch.setattr(RecipeParser, "parse", parse)
        run(patch, "evaluate")
    return caught.value.args[0]


def declared(parser):
    """Every flag: its spellings, number of values, what it is without one, and what `--help` says of it."""
    return {
        action.dest: (
            action.option_strings,
            action.nargs,
            action.const,
            action.metavar,
            parser.formatter_class("p")._get_help_string(action),
            parser.formatter_class("p")._format_action_invocation(action),
        )
        for action in parser._actions
    }


def test_the_command_and_the_recipe_take_the_same_flags_with_the_same_defaults(of_recipe):
    recipe, evaluate = declared(of_recipe), declared(of_command())
    assert evaluate == recipe
    assert {"max_error_rate", "eval_reward_funcs", "models", "compare", "studies"} <= set(evaluate)
    assert all(help for *_, help, _ in evaluate.values())


LINES = [
    [],
    ["--models", "a=b", "c", "--compare", "d", "--output_dir", "e"],
    ["--merge_references", "--eval_rows", "3"],
    ["--merge_references", "true", "--eval-rows=4"],
    ["--merge-references", "No", "--eval_rows", "none", "--max_kv_gb", "NULL"],
    ["--dataset_name", "none", "--prompt-template", "null", "--primary", "wer:greedy"],
    ["--reward_funcs", "a", '{"func": "b"}', "--eval_reward_funcs", "c", "--max_error_rate", "1e-1"],
    ["--temperatures", "0.5", "1", "--prefix_lengths", "3", "--strategies", "sample:temperature=0.5/1"],
    ["--studies", "none", "--studies", "ranking", "lookahead", "--seed", "-1", "--max_kv_gb", "inf"],
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_line_is_read_as_the_recipes_parser_reads_it(line):
    assert by_command(line) == RecipeParser(evaluate.ARGUMENTS).parse(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--eval_rows", "x"], ["--eval_rows: ", "int", "'x'"]),
        (["--eval-rows", "2.5"], ["--eval_rows: ", "int", "'2.5'"]),
        (["--max_kv_gb", "much"], ["--max_kv_gb: ", "float", "'much'"]),
        (["--temperatures", "0.5", "nan"], ["temperatures", "nan", "a number"]),
        (["--max_error_rate", "nan"], ["max_error_rate", "nan", "a number"]),
        (["--merge_references", "perhaps"], ["--merge_references: ", "perhaps", "true"]),
        (["--models"], ["--models: ", "expected at least one argument"]),
        (["--max_error_rat", "0.1"], ["--max_error_rat", "'--max_error_rate'"]),
    ],
)
def test_what_one_refuses_the_other_refuses_too(line, words):
    for parse in (by_command, RecipeParser(evaluate.ARGUMENTS).parse):
        with pytest.raises(ConfigError) as caught:
            parse(line)
        assert all(word in str(caught.value) for word in words), str(caught.value)


FILE = """\
models: base=here   # one stands for a list of one
eval_rows: 3
dtype: bfloat16
max_error_rate: 1e-1
"""


def test_a_config_file_gives_settings_and_flags_override_it(tmp_path):
    (tmp_path / "own.yaml").write_text(FILE)
    line = ["--config", str(tmp_path / "own.yaml"), "--eval_rows", "4"]
    read = by_command(line)
    assert read == RecipeParser(evaluate.ARGUMENTS).parse(line)
    assert (read[0].models, read[0].dtype, read[1].eval_rows) == (["base=here"], "bfloat16", 4)
    assert read[2].max_error_rate == 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train_row: 3", "own.yaml, line 1: unknown key 'train_row'. Did you mean 'tune_rows'?"),
        ("train_split: train", "own.yaml, line 1: unknown key 'train_split'."),  # evaluation reads none of training's
        ("train_rows: 3", "own.yaml, line 1: unknown key 'train_rows'."),
        ("seed: 1\neval_row: 3", "own.yaml, line 2: unknown key 'eval_row'. Did you mean 'eval_rows'?"),
        ("seed: 1\n\neval_rows: many", "own.yaml, line 3: eval_rows is 'many'; expected a whole number or null."),
        (
            "dtype: float23",
            "dtype is 'float23'; expected one of 'float32', 'bfloat16', 'float16', 'auto'. Did you mean",
        ),
        ("max_kv_gb: .nan", "max_kv_gb is nan; expected a number"),
        ("eval_rows: 0", "--eval_rows is 0; expected at least 1"),
        ("dataset_name: https://me:secret@host/x.json", "--dataset_name holds a password"),
    ],
)
def test_what_is_wrong_in_a_config_file_is_said_with_its_line_by_both(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    for parse in (by_command, RecipeParser(evaluate.ARGUMENTS).parse):
        with pytest.raises(ConfigError) as caught:
            parse(["--config", str(tmp_path / "own.yaml")])
        assert said in str(caught.value)


def test_both_evaluate_with_what_was_given(monkeypatch):
    line = [
        "--models", "a=b", "--dataset_name", "d", "--dataset_config", "c", "--eval_split", "test", "--eval_rows", "7",
        "--prompt_column", "q", "--reference_column", "r", "--prompt_template", "{{ q }}",
        "--reference_template", "{{ r }}", "--merge_references", "--reward_funcs", "x", "y", "--eval_reward_funcs", "z",
        "--max_error_rate", "0.2", "--strategies", "greedy", "--samples_per_row", "3", "--max_new_tokens", "9",
        "--seed", "5", "--resamples", "11", "--eval_batch_size", "13", "--max_kv_gb", "0.5",
        "--primary", "p:greedy", "--primary_against", "beam", "--map_rows", "2", "--map_max_nodes", "41",
        "--tune_split", "dev", "--tune_rows", "17", "--studies", "none", "--study_rows", "19",
        "--coverage_samples", "23", "--temperatures", "0.1", "--prefix_lengths", "6", "--likelihood_dataset", "l",
        "--likelihood_config", "m",
        "--likelihood_split", "n", "--likelihood_column", "o", "--likelihood_rows", "29", "--likelihood_stride", "31",
        "--likelihood_context", "37", "--output_dir", "out",
    ]  # fmt: skip
    settings = ContrastSettings(
        strategies=("greedy",), samples_per_row=3, max_new_tokens=9, seed=5, resamples=11, eval_batch_size=13,
        max_kv_gb=0.5, primary="p:greedy", primary_against="beam", map_rows=2, map_max_nodes=41, tune_split="dev",
        tune_rows=17, studies=(), study_rows=19, coverage_samples=23, temperatures=(0.1,), prefix_lengths=(6,),
        likelihood_dataset="l", likelihood_config="m", likelihood_split="n", likelihood_column="o", likelihood_rows=29,
        likelihood_stride=31, likelihood_context=37,
    )  # fmt: skip
    data = EvaluationDataArguments(
        dataset_name="d", dataset_config="c", eval_split="test", eval_rows=7, prompt_column="q", reference_column="r",
        prompt_template="{{ q }}", reference_template="{{ r }}", merge_references=True,
    )  # fmt: skip
    options = {"template_options": {}, "max_error_rate": 0.2, "settings": settings, "output_dir": "out"}
    calls = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *named, **given: calls.append((named, given)))
    assert main(["evaluate", *line]) == 0 and run(monkeypatch, "evaluate", *line) == 0
    assert calls == [((["a=b"], data, ["x", "y", "z"]), options)] * 2


def test_help_of_the_evaluation_imports_neither_torch_nor_trl():
    code = (
        "import sys\nfrom rlseq.cli.main import main\ntry:\n    main(['evaluate', '--help'])\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, sorted({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "0 []"
    assert "(default: greedy sample beam)" in " ".join(ended.stdout.split())


@pytest.mark.parametrize("given", ['{"enable_thinking": false}', None])
def test_chat_templates_are_told_the_same_by_command_and_recipe(given, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: asked.append(options["template_options"]))
    flags = [] if given is None else ["--chat_template_kwargs", given]
    assert main(["evaluate", "--models", "m", *flags]) == 0
    run(monkeypatch, "evaluate", "--models", "m", *flags)
    expected = {} if given is None else {"chat_template_kwargs": {"enable_thinking": False}}
    assert asked == [expected] * 2


@pytest.mark.parametrize(("given", "said"), [("{thinking", "is not JSON"), ("3", "expected a mapping")])
def test_what_chat_templates_are_told_is_a_mapping(given, said, capsys):
    assert main(["evaluate", "--models", "m", "--chat_template_kwargs", given]) == 2
    assert said in capsys.readouterr().err
