"""`think_end` in training: what rewards are given, what is logged, and what is refused before a model loads."""

import json

import pytest
from test_dry_run import run
from tiny_ppo import tiny_ppo
from tiny_task import tiny_tokenizer, tiny_trainer, write_task

from rlseq.cli.main import main
from rlseq.config.training import GRPOConfig
from rlseq.errors import ConfigError

TOKENIZER = tiny_tokenizer()
SPECIAL = {*TOKENIZER.all_special_ids}
END = "A"
given = []


def answers(completion, thought, answer):
    given.append((completion, thought, answer))
    return float(len(answer))


@pytest.mark.parametrize("make", [tiny_trainer, tiny_ppo])
def test_rewards_read_the_parts_and_thoughts_are_logged(tmp_path, make):
    given.clear()
    trainer = make(tmp_path, rewards=(answers,), think_end=END, max_steps=1)
    trainer.train()
    ids = [scored.rollout.completion_ids for scored in trainer.batch.scored]
    assert len(given) == len(ids)
    end, lengths, unclosed = TOKENIZER.vocab[END], [], 0
    for tokens, (completion, thought, answer) in zip(ids, given, strict=True):
        letters = TOKENIZER.convert_ids_to_tokens([token for token in tokens if token not in SPECIAL])
        assert completion.split() == letters
        place = letters.index(END) if END in letters else len(letters)
        assert thought.split() == letters[:place]
        assert answer.split() == letters[place + 1 :]
        closed = end in tokens
        unclosed += not closed
        lengths.append(tokens.index(end) + 1 if closed else len(tokens))
    assert 0 < unclosed < len(ids)
    (logged,) = [line for line in trainer.state.log_history if "thoughts/mean_length" in line]
    assert logged["thoughts/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert logged["thoughts/unclosed_ratio"] == pytest.approx(unclosed / len(ids))


def test_without_it_nothing_is_logged_of_thoughts(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert not [name for line in trainer.state.log_history for name in line if "thought" in name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"think_end": ""}, "think_end is empty; name the text"),
        ({"stop_strings": ["B", "</"]}, r"holds one of the stop strings \['B', '</'\]"),
        ({"tools": ["calc.py:add"]}, "think_end splits a completion, which has turns with tools"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    common = {"per_device_train_batch_size": 8, "use_cpu": True, "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**(common | {"think_end": "</think>"} | settings))


def test_a_special_token_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--think_end '<eos>' holds the special token"):
        tiny_trainer(tmp_path, think_end="<eos>")


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_the_recipes_name_the_flag_before_a_model_loads_and_the_dry_run_shows_it(tmp_path, monkeypatch, capsys, recipe):
    write_task(tmp_path)
    (tmp_path / "own.py").write_text("def own(answer):\n    return float(len(answer))\n")
    arguments = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data", "--use_cpu", "true"]
    arguments += ["--reward_funcs", f"{tmp_path}/own.py:own", "--max_completion_length", "6", "--max_steps", "1"]
    arguments += ["--per_device_train_batch_size", "8", "--output_dir", tmp_path / "run", "--num_cpu_threads", "1"]
    arguments += ["--disable_tqdm", "true"]
    with monkeypatch.context() as patched:
        patched.setattr(f"rlseq.recipes.{recipe}.load_model", None)
        assert run(monkeypatch, recipe, *arguments) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "think_end" in line]
    assert "reward 'own' asks for 'answer'" in said
    assert run(monkeypatch, recipe, *arguments, "--think_end", END, "--dry_run", "true") == 0
    assert "Thoughts end with 'A' (1 token); own reads them." in capsys.readouterr().out
    assert run(monkeypatch, recipe, *arguments, "--think_end", END, "--evaluate", "false") == 0
    (first, *_) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 <= first["thoughts/unclosed_ratio"] <= 1
    capsys.readouterr()
    assert main(["reward", "replay", str(tmp_path / "run"), "--reward_funcs", f"{tmp_path}/own.py:own"]) == 0
    assert "0.0% of advantages change sign" in capsys.readouterr().out
