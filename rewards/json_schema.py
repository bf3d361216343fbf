"""Whether a completion is JSON that follows a schema."""

import json
from functools import lru_cache

from jsonschema.validators import validator_for

from rlseq.scoring import reward


@reward(range=(0, 1), extra="text")
def json_schema(completion: str, schema: dict | str) -> tuple[float, dict]:
    """1 if the completion is JSON that follows `schema` (a mapping, or its text), else 0.

    NaN and Infinity are not valid JSON. Details: the first thing that is wrong, or None.
    """
    validator = _validator(schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True))
    try:
        value = json.loads(completion, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return 0.0, {"problem": f"no JSON: {error}"}
    try:
        problem = next((f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)), None)
    except (RecursionError, OverflowError) as error:  # nested too deep, or a number that overflows, to be checked
        problem = f"cannot be checked: {error}"
    return float(problem is None), {"problem": problem}


@lru_cache(maxsize=64)
def _validator(schema: str):
    loaded = json.loads(schema)
    kind = validator_for(loaded)
    kind.check_schema(loaded)
    return kind(loaded)


def _refuse(constant: str):
    raise ValueError(f"{constant} is not valid JSON")
