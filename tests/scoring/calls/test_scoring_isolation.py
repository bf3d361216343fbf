"""What a reward changes of its process does not reach training, and what it says can be written."""

import asyncio
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlseq import load_rewards
from rlseq.common.escapes import visible
from rlseq.training.run.rollout_log import RolloutLog, rollout_records
from rlseq.types import Prompt, Rollout

needs_fp32_precision = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this torch has the old names alone"
)
ONE = Rollout("p", 0, (1,), (True,), (-0.5,), "a", "a", None, "stop", "s")

CHANGES = """
import random
import numpy as np
import torch

def change():
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cudnn.enabled = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.mkldnn.deterministic = True
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)

AT_LOAD
def r(completion):
    change()
    return random.random() + np.random.rand() + torch.rand(()).item()

async def later(completion):
    change()
    return 0.0
"""


def state():
    cudnn = torch.backends.cudnn
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        cudnn.benchmark,
        cudnn.enabled,
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.mkldnn.deterministic,
    )


def random_numbers():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("function", ["r", "later"])
@pytest.mark.parametrize("at_load", ["change()", ""])
def test_settings_of_torch_that_a_reward_file_changes_stay_as_they_were(tmp_path, function, at_load):
    path = tmp_path / "r.py"
    path.write_text(CHANGES.replace("AT_LOAD", at_load))
    before = state()
    suite = load_rewards([f"{path}:{function}"])
    assert state() == before
    suite.score([ONE], {"prompt": ["?"]})
    assert state() == before


@pytest.mark.parametrize(
    "set_by", ["allow_tf32 = True", pytest.param("fp32_precision = 'tf32'", marks=needs_fp32_precision)]
)
def test_precision_of_products_on_a_gpu_stays_as_it_was_by_its_old_and_its_new_name(set_by):
    def fast(completion):
        exec(f"torch.backends.cuda.matmul.{set_by}", {"torch": torch})
        return 0.0

    matmul = torch.backends.cuda.matmul
    load_rewards([fast]).score([ONE], {"prompt": ["?"]})
    assert (matmul.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
    assert getattr(matmul, "fp32_precision", "none") != "tf32"


def test_the_gpu_that_a_reward_sets_stays_the_one_of_training(monkeypatch):
    at = [1]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: at.__setitem__(0, device))

    def elsewhere(completion):
        torch.cuda.set_device(0)
        return 0.0

    load_rewards([elsewhere]).score([ONE], {"prompt": ["?"]})
    assert at == [1]


def test_a_reward_that_seeds_or_uses_random_numbers_does_not_change_those_of_training():
    def seeds(completion):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return random.random()

    def quiet(completion):
        return 0.0

    found = []
    for reward in (seeds, quiet):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        load_rewards([reward]).score([ONE], {"prompt": ["?"]})
        found.append(random_numbers())
    assert found[0] == found[1]


def test_a_noisy_reward_gets_other_noise_at_each_call_and_the_same_from_one_seed():
    def noisy(completion):
        return random.random() + np.random.rand() + torch.rand(()).item()

    suite, found = load_rewards([noisy]), []
    for _ in range(2):
        random.seed(5)
        found.append([suite.score([ONE], {"prompt": ["?"]}).totals[0] for _ in range(3)])
    assert found[0] == found[1] and len(set(found[0])) == 3


async def noise():
    return random.random() + np.random.rand() + torch.rand(()).item()


@pytest.mark.parametrize("in_background", [False, True])
def test_an_async_reward_that_seeds_or_uses_random_numbers_does_not_change_those_of_training(in_background):
    async def seeds(completion):
        random.seed(1)
        await asyncio.sleep(0.01)
        np.random.seed(1)
        return (await asyncio.gather(noise(), asyncio.create_task(noise())))[0]

    async def ends(completion):
        torch.manual_seed(1)
        await asyncio.wait_for(asyncio.sleep(10), 0.01)

    async def quiet(completion):
        return 0.0

    found = []
    for reward in (seeds, ends, quiet, quiet):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        suite = load_rewards([{"func": reward, "retries": 1, "on_error": "abstain"}], max_error_rate=1.0)
        rollouts, columns = [ONE] * 4, {"prompt": ["?"] * 4}
        submitted = suite.submit(rollouts, columns) if in_background else None
        meanwhile = [random_numbers() for _ in range(3)] if in_background else []  # training continues meanwhile
        table = suite.score(rollouts, columns, pending=submitted)
        assert (table.totals[0] is None) == (reward is ends)
        found.append((meanwhile, random_numbers()))
    assert found[0][1] == found[1][1] == found[2][1] and found[2] == found[3]


def test_a_noisy_async_reward_gets_other_noise_for_each_call_and_the_same_from_one_seed():
    async def noisy(completion):
        first = await noise()
        await asyncio.sleep(0)
        return first + await asyncio.create_task(noise())

    suite, found = load_rewards([noisy]), []
    for _ in range(2):
        random.seed(5)
        rounds = [suite.score([ONE] * 3, {"prompt": ["?"] * 3}).totals for _ in range(2)]
        found.append([value for totals in rounds for value in totals])
    assert found[0] == found[1] and len(set(found[0])) == 6


def test_random_states_are_restored_if_submitted_scores_are_never_asked_for():
    async def seeds(completion):
        random.seed(1)
        return 0.0

    suite, found = load_rewards([seeds]), []
    for begins in (1, 2):
        random.seed(5)
        for _ in range(begins):
            pending = suite.submit([ONE], {"prompt": ["?"]})
            pending.outcomes["seeds"].exception()  # waits
        suite.score([], {"prompt": []})
        if begins == 1:
            random.getrandbits(32)  # each takes one seed
        found.append(random.random())
    assert found[0] == found[1]


HARMFUL = "half \ud83d, esc \x1b[31m, turned \u202egpj.exe, line\u2028"


def test_text_that_cannot_be_encoded_is_logged_as_escapes_and_read_back_whole(tmp_path):
    def judged(completion):
        return 1.0, {"verdict": HARMFUL, HARMFUL: 1}

    table = load_rewards([judged]).score([ONE], {"prompt": ["?"]})
    RolloutLog(tmp_path).write(1, rollout_records(1, [Prompt("p", "?", (1,))], table.scored, [0.0]))
    text = (tmp_path / "000001.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1 and text[:-1].isprintable()
    assert json.loads(text)["details"]["judged"] == {"verdict": HARMFUL, HARMFUL: 1}


def test_escapes_leave_words_of_any_script_and_emoji_as_they_are():
    plain = "שלום é 👩\u200d👧\n\tx"
    assert visible(plain) == plain
    assert visible(HARMFUL) == "half \\ud83d, esc \\u001b[31m, turned \\u202egpj.exe, line\\u2028"


def test_errors_of_a_reward_show_what_they_hide():
    def sad(completion):
        raise ValueError(HARMFUL)

    table = load_rewards([{"func": sad, "on_error": "abstain"}]).score([ONE], {"prompt": ["?"]})
    assert "\\u202e" in table.messages["sad"][0] and table.messages["sad"][0].isprintable()


def test_a_worker_process_imports_no_torch_for_it():
    code = "import rlseq.scoring.calls.worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
