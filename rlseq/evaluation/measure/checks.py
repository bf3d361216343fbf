"""Whether checkpoints can read the data, by the doctor's checks that run no model: before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.data.chat import reference_ids
from rlseq.data.groups import check_groups
from rlseq.data.prompts import build_prompts
from rlseq.doctor.check import FAILED, WARNING
from rlseq.doctor.prompts import check_context
from rlseq.doctor.static import load_configs, static_checks
from rlseq.engine.model.auto_class import causal_class
from rlseq.engine.thoughts import check_ends
from rlseq.errors import ConfigError, ModelError
from rlseq.evaluation.measure.loading import load_tokenizer
from rlseq.evaluation.metrics import BUILT_IN
from rlseq.evaluation.results.primary import Primary
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.studies.table import STUDIES
from rlseq.scoring import RewardSuite
from rlseq.scoring.check.smoke_test import smoke_test_rewards, unused_values
from rlseq.types import Prompt

# What an evaluation cannot do without; the others are of training.
CHECKS = {"padding", "stop tokens", "BOS", "context", "vocabulary"}


def check_models(
    models: Mapping[str, str | Path],
    rows: Sequence[Mapping[str, Any]],
    prompt_options: Mapping[str, Any],
    settings: ContrastSettings,
    suite: RewardSuite,
    tuning_rows: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Refuse rows that cannot be evaluated, and a checkpoint that cannot: it lacks tokens or room, or never ends.

    Returns:
        Warnings about the references, as checkpoints' tokenizers make them.

    Raises:
        RewardError: a reward fails on a row that has something, or nothing, in a column.
        DataError: a row makes no prompt, or holds an image.
        ConfigError: the primary comparison is of answers that the rows do not have.
        ModelError: says which checkpoint, what was found and what to do.
    """
    warnings: list[str] = []
    for number, (name, path) in enumerate(models.items()):
        tokenizer = load_tokenizer(name, str(path))
        prompts = build_prompts(rows, tokenizer, **prompt_options)
        check_answers(settings, prompts)
        if settings.group_column is not None:
            check_groups(prompts, settings.group_column, "the rows to evaluate")
        check_ends(settings.stop_strings, settings.think_end, tokenizer)
        if number == 0:  # of another checkpoint the prompts differ in their ids alone
            smoke_test_rewards(suite, prompts, all_used=False)
            warnings += unused_values(suite, prompts)
            if tuning_rows:
                smoke_test_rewards(suite, build_prompts(tuning_rows, tokenizer, **prompt_options), all_used=False)
        try:
            model_config, generation_config = load_configs(str(path))
            causal_class(model_config)  # refuses some
        except ModelError as error:
            raise ModelError(f"cannot load model {name!r} from {str(path)!r}: {error}") from error
        options = {"generation_config": generation_config, "max_new_tokens": settings.max_new_tokens}
        results = static_checks(model_config, tokenizer, prompts, **options)
        if settings.think_end is not None:  # a reference stands behind a thought that may be as long as a completion
            known = [ids for prompt in prompts for ids in reference_ids(prompt, tokenizer, [tokenizer.eos_token_id])]
            room = settings.max_new_tokens + max(map(len, known), default=0)
            results.append(check_context(model_config, prompts, room, setting=None))
        failed = [r for r in results if r.status == FAILED and r.check in CHECKS]
        if failed:
            said = [f"model {name!r} ({path}) does not fit the data (`rlseq doctor` looks further)."]
            raise ModelError("\n  ".join([*said, *(r.sentence for r in failed)]))
        found = [r.sentence for r in results if r.check == "references" and r.status in (WARNING, FAILED)]
        warnings += [f"model {name!r}: {sentence}" for sentence in found]
        for study in settings.studies:
            STUDIES[study].check_model(model_config)
    return warnings


def check_answers(settings: ContrastSettings, prompts: Sequence[Prompt]) -> None:
    """Refuse a primary comparison by a metric of references where no prompt has one.

    Raises:
        ConfigError: names the metric.
    """
    primary = Primary.of(settings)
    metric = BUILT_IN.get(primary.metric) if primary else None
    if metric and metric.needs_references and not any(prompt.columns["references"] for prompt in prompts):
        raise ConfigError(
            f"--primary is {settings.primary!r}, but the data has no references to match. Name their column "
            "(--reference_column), or another metric."
        )
