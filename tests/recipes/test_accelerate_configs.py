"""recipes/accelerate/*.yaml: accelerate reads each as it is meant."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).parents[2] / "recipes/accelerate"
ASKED = {
    "cpu-2proc": {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "use_cpu": True},
    "multi-gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "fsdp2": {"distributed_type": "FSDP", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "zero3": {"distributed_type": "DEEPSPEED", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "multi-node": {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2, "use_cpu": False},
}


def test_every_file_is_among_them():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_accelerate_reads_the_file_and_knows_every_key_of_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    shown = {**vars(config), "distributed_type": config.distributed_type.value}
    assert {key: shown[key] for key in ASKED[name]} == ASKED[name]
    known = vars(launch_command_parser().parse_args(["x.py"]))
    # FSDP's and DeepSpeed's blocks become flags of those names; accelerate accepts unknown ones silently.
    for key in [*config.fsdp_config, *config.deepspeed_config]:
        assert key in known, key


def test_sharded_models_are_loaded_and_saved_whole():
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert load_config_from_file(str(FOLDER / "zero3.yaml")).deepspeed_config["zero3_save_16bit_model"] is True


def test_the_estimate_of_docs_scaling_is_what_its_snippet_prints():
    page = (FOLDER.parent.parent / "docs/scaling.md").read_text(encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(page.split("```python\n")[1].split("```")[0], {})
    lines = [re.findall(r"[\d.]+", line) for line in printed.getvalue().splitlines()]
    rows = page.split("<!-- estimate -->\n")[1].split("<!-- end -->")[0].splitlines()
    shown = [re.findall(r"[\d.]+", row.split("|", 2)[2]) for row in [rows[0], *rows[2:]]]
    assert shown == [list(column) for column in zip(*lines, strict=True)]
