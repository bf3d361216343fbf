"""What a contrast is told: settings that cannot be measured, and models that cannot be meant, are refused by name."""

import pytest
from test_contrast import SETTINGS, letters, quick
from test_data import word_tokenizer
from tiny import tiny_model

from rlseq.cli.evaluate import evaluate, parse_models
from rlseq.config.arguments import DataArguments
from rlseq.engine.model import auto_class
from rlseq.errors import ConfigError, DataError, ModelError, RewardError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders that pass for checkpoints as long as no model is loaded from them."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        tiny_model("llama").config.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
        (folder / name / "model.safetensors").touch()
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(
        auto_class.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )


def asks(completion, colour):
    return 1.0


BAD_SETTINGS = {
    "an unknown metric": ({"primary": "wre:greedy"}, ConfigError, "'wre'.*Did you mean 'wer'?"),
    "an unknown strategy": ({"primary": "wer:gredy"}, ConfigError, "Did you mean 'greedy'?"),
    "a strategy not measured": ({"primary": "wer:beam:width=9"}, ConfigError, "'beam:width=9', which is not among"),
    "a chance of what is not sampled": (
        {"primary": "expected_accuracy:greedy"},
        ConfigError,
        "which does not sample; name a strategy that samples",
    ),
    "a metric alone": ({"primary": "wer"}, ConfigError, "expected METRIC:STRATEGY"),
    "an unknown start": ({"primary": "wer:greedy", "primary_against": "bem"}, ConfigError, "Did you mean 'beam'?"),
    "a start not measured": (
        {"primary": "wer:greedy", "primary_against": "sample:top_k=2"},
        ConfigError,
        "--primary_against names the strategy 'sample:top_k=2'",
    ),
    "a start of nothing": ({"primary_against": "greedy"}, ConfigError, "needs --primary"),
    "a strategy twice": ({"strategies": ("beam", "beam:width=5")}, ConfigError, "named twice"),
    "an unknown decoding": ({"strategies": ("bean",)}, ConfigError, "Did you mean 'beam'?"),
    "no samples": ({"samples_per_row": 0}, ConfigError, "--samples_per_row is 0; expected at least 1"),
    "no tokens": ({"max_new_tokens": 0}, ConfigError, "--max_new_tokens is 0; expected at least 1"),
    "no resamples": ({"resamples": 0}, ConfigError, "--resamples is 0; expected at least 1"),
    "no rows": ({"rows": []}, DataError, "the data set is empty"),
    "no such column": ({"options": {"prompt_column": "promt"}}, DataError, "Did you mean 'prompt'?"),
    "a reward without its column": ({"rewards": [asks]}, RewardError, "colour"),
    "nothing to match": (
        {"rows": [{"prompt": "a = "}], "rewards": [letters], "primary": "exact_match:greedy"},
        ConfigError,
        "no references to match",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(no_model, checkpoints, case):
    changes, error, message = BAD_SETTINGS[case]
    with pytest.raises(error, match=message):
        quick(checkpoints, **{"rewards": ["phoneme_accuracy"], **changes})


def test_no_models_and_models_that_do_not_load_are_named(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="no models were named"):
        quick({})
    word_tokenizer().save_pretrained(tmp_path / "hollow")
    with pytest.raises(ModelError, match=r"cannot load model 'x' from .*hollow"):
        quick({"x": str(tmp_path / "hollow")})


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_measured(no_model, checkpoints, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "a = ", "references": ["A"]}\n')
    (tmp_path / "file").touch()
    data, out = DataArguments(dataset_name=str(tmp_path / "test.jsonl"), eval_split="test"), tmp_path / "file/out"
    with pytest.raises(ConfigError, match=r"cannot make .*Give another --output_dir"):
        evaluate([f"x={checkpoints['one']}"], data, ["phoneme_accuracy"], settings=SETTINGS, output_dir=out)


def test_models_are_named_or_called_after_their_folder(checkpoints):
    one, two = checkpoints.values()
    assert parse_models([f"start={one}", two]) == {"start": one, "two": two}
    assert parse_models(["owner/model"]) == {"model": "owner/model"}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["x={one}", "x={one}"], "is given twice; seeds of a method are different checkpoints"),
        (["one={two}", "{one}"], "are both called 'one'; give NAME=PATH"),
        (["x="], "is not NAME=PATH"),
        (["={one}"], "is not NAME=PATH"),
        (["x={one}e"], "there is no model at .*Did you mean '{one}'?"),
        (["x={hollow}"], "holds no weights"),
        (["nowhere"], "there is no model at 'nowhere'"),
    ],
)
def test_models_that_cannot_be_meant_are_refused(checkpoints, tmp_path, specs, message):
    names = {**checkpoints, "hollow": str(tmp_path)}
    with pytest.raises(ConfigError, match=message.format(**names)):
        parse_models([spec.format(**names) for spec in specs])


@pytest.mark.parametrize(
    ("data", "rewards", "message"),
    [
        ({}, ["phoneme_accuracy"], "give --dataset_name"),
        ({"dataset_name": "x.csv"}, [], "give --reward_funcs"),
        ({"dataset_name": "x.csv", "eval_rows": 0}, ["phoneme_accuracy"], "--eval_rows is 0"),
    ],
)
def test_the_command_says_what_is_missing(no_model, checkpoints, tmp_path, data, rewards, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(
            [f"x={checkpoints['one']}"], DataArguments(**data), rewards, settings=SETTINGS, output_dir=str(tmp_path)
        )
