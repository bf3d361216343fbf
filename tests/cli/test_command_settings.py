"""`rlseq doctor` and `rlseq reward` read their settings as the recipes do: from flags and a YAML file, in one form."""

import json

import pytest

from rlseq.cli.main import main
from rlseq.config.commands import CheckArguments, DoctorArguments, TrainRowsArguments
from rlseq.config.parsing.parser import RecipeParser

COMMANDS = [["doctor"], ["reward", "check", "exact_match"], ["reward", "score", "exact_match"]]


def refusal(capsys, *argv):
    assert main([*map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_misspelled_key_of_a_config_file_is_named_with_its_line(tmp_path, capsys, command):
    file = tmp_path / "own.yaml"
    file.write_text("dataset_name: words.json\nprompt_colum: word\n")
    said = refusal(capsys, *command, "--config", file)
    assert said == f"error: {file}, line 2: unknown key 'prompt_colum'. Did you mean 'prompt_column'?"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["doctor"], "--model_name_or_path must be given, as a flag or in the --config file."),
        (
            ["doctor", "--model_name_or_path", "m", "--max_new_tokens", "0"],
            "--max_new_tokens is 0; expected at least 1",
        ),
        (["doctor", "--model_name_or_path", "m", "--eval_row", "3"], "Did you mean '--eval_rows'?"),
        (["reward", "check", "exact_match", "--train_rows", "0"], "--train_rows is 0; expected at least 1"),
        (["reward", "check", "exact_match", "--merge_references", "perhaps"], "expected true or false"),
        (["reward", "score", "exact_match"], "--rollouts must be given, as a flag or in the --config file."),
        (["reward", "compare", "a", "b"], "--rollouts must be given, as a flag or in the --config file."),
        (["reward", "replay", "run"], "--reward_funcs must be given, as a flag or in the --config file."),
        (["reward", "replay", "run", "--reward_funcs", "exact_match", "--reward_weights", "nan"], "expected a number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_or_out_of_range_is_said_in_one_line(capsys, argv, said):
    assert said in refusal(capsys, *argv)


def test_settings_from_a_file_are_those_of_flags(tmp_path, capsys):
    (tmp_path / "rollouts.jsonl").write_text('{"prompt": "a", "completion": "a", "references": ["a"]}\n')
    file = tmp_path / "own.yaml"
    file.write_text(f"rollouts: {tmp_path}/rollouts.jsonl\noutput: {tmp_path}/wrong.jsonl\n")
    assert main(["reward", "score", "exact_match", "--config", str(file), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["total"] == 1.0
    assert not (tmp_path / "wrong.jsonl").exists()


def test_the_recipes_parser_reads_the_same_dataclasses():
    line = ["--samples_per_row", "3", "--prompt-column", "word", "--merge_references"]
    model, rows = RecipeParser([CheckArguments, TrainRowsArguments]).parse(line)
    assert (model.samples_per_row, model.max_new_tokens) == (3, 256)
    assert (rows.prompt_column, rows.merge_references, rows.train_rows) == ("word", True, 32)
    assert RecipeParser([DoctorArguments]).parse(["--model_name_or_path", "m"])[0].max_new_tokens is None


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "command",
    [*COMMANDS, ["reward"], ["reward", "replay"], ["reward", "compare"], ["evaluate"], ["difficulty"]],
    ids=" ".join,
)
def test_help_fits_the_terminal_and_every_flag_says_something(monkeypatch, capsys, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    long = [line for line in rest.splitlines() if len(line) > columns and not line.startswith(("  rlseq", "data, "))]
    assert usage.startswith("usage: rlseq ") and not long
    assert "None" not in rest and "True" not in rest and "False" not in rest
