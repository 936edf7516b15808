"""Rewards in worker processes: what goes wrong on one completion costs that one alone."""

import copy
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gvpo_lightning.rewards import ExactAnswer, Format, Rewards, RewardSettings
from gvpo_lightning.rewards.protocol import RewardContractError
from tests.forked import wait_until
from tests.rewards.rewards_for_tests import batch_size, by_text, child_of, modules, patient, process_id


@pytest.fixture(autouse=True)
def rewards_in_process():
    """As users have it: in workers."""


@pytest.fixture
def make():
    """Builds `Rewards` whose workers are ended with the test."""
    built = []

    def build(reward, num_workers=2, **settings):
        built.append(Rewards(reward, RewardSettings(num_workers=num_workers, **settings)))
        return built[-1]

    yield build
    for rewards in built:
        rewards.close()


def ask(rewards, completions, answers=None):
    found, tally = rewards(["p"] * len(completions), completions, {"answer": answers or ["7"] * len(completions)})
    return found, tally


FATES = {
    "raise": "reward_raised",
    "exit": "reward_raised",
    "hang": "reward_timeout",
    "hang in C": "reward_timeout",
    "hang with a child": "reward_timeout",
    "die": "reward_died",
    "crash": "reward_died",
    "nan": "reward_not_finite",
    "infinite": "reward_not_finite",
    "none": None,
}


def test_each_way_to_fail_costs_its_completion_alone_and_is_counted(make):
    texts = [text for fate in FATES for text in ("7", fate, "8")]
    found, tally = ask(make(by_text, num_workers=4, timeout=2.0), texts)
    for text, rewarded in zip(texts, found, strict=True):
        assert rewarded.failure == FATES.get(text)
        if text in FATES:
            assert math.isnan(rewarded.total)
        else:
            assert rewarded.total == float(text == "7")
    assert tally.counts == {
        ("by_text", "reward_raised"): 2,
        ("by_text", "reward_timeout"): 3,
        ("by_text", "reward_died"): 2,
        ("by_text", "reward_not_finite"): 2,
    }
    assert tally.asked == 30
    child = ["pgrep", "-fx", " ".join(child_of(os.getpid()))]
    wait_until(lambda: not subprocess.run(child, capture_output=True, check=False).stdout)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("raise", ["in _meet", "KeyError: 'no such answer'", "on the prompt 'p', completion 'raise'"]),
        ("hang", ["longer than 2 s (reward_settings.timeout)", "in _meet"]),
        ("hang in C", ["longer than 2 s", "in _meet"]),
        ("die", ["its process ended with status 3", "completion 'die'"]),
        ("crash", ["its process ended with status -11", "Segmentation fault", "in _meet"]),
        ("nan", ["it returned nan"]),
    ],
)
def test_the_first_failure_is_shown_with_its_place(make, text, shown):
    _, tally = ask(make(by_text, timeout=2.0, num_workers=1), ["7", text])
    ((name, description),) = tally.descriptions()
    assert name == "by_text"
    assert description.startswith(f"The reward by_text has failed on 50.0% of 2 completions ({FATES[text]} 1).")
    for part in shown:
        assert part in description


def test_the_results_do_not_depend_on_the_number_of_workers(make):
    rewards = [by_text, Format(r"\d", name="digit"), ExactAnswer(), patient]
    draw = random.Random(0)
    texts = draw.choices(["7", "8", "raise", "nan", "none", "19", ""], k=60)
    answers = draw.choices(["7", "8", "19"], k=60)
    results = [ask(make(rewards, count, weights=[1, 0.5, 2, -1]), texts, answers) for count in (0, 1, 2, 5)]
    expected = [pickle.dumps(rewarded) for rewarded in results[0][0]]
    for found, tally in results:
        assert [pickle.dumps(rewarded) for rewarded in found] == expected
        assert tally.counts == results[0][1].counts
    first = next(row for row, text in enumerate(texts) if text == answers[row])
    assert results[0][0][first].total == 1 + 0.5 * (len(texts[first]) == 1) + 2 - 1


def test_work_is_spread_and_processes_stay(make):
    rewards = make(process_id, num_workers=3)
    rewards.start()
    rewards.wait_until_loaded()  # or the first of them might do all the work
    first, second = ({rewarded.total for rewarded in ask(rewards, ["7"] * 60)[0]} for _ in range(2))
    assert first == second
    assert len(first) == 3
    assert os.getpid() not in first
    rewards.close()
    assert not first & {rewarded.total for rewarded in ask(rewards, ["7"] * 10)[0]}


def test_a_worker_imports_little_and_a_call_has_one_completion(make):
    rewards = make([modules, batch_size, Format("7")])
    assert [rewarded.components for rewarded in ask(rewards, ["7", "8"])[0]] == [
        {"modules": 0, "batch_size": 1, "Format": 1},
        {"modules": 0, "batch_size": 1, "Format": 0},
    ]


def test_a_reward_that_must_see_all_says_so(make):
    def ranking(prompts, completions, **columns):
        seen.append(list(completions))
        if "raise" in completions:
            raise KeyError("raise")
        return [sorted(completions).index(completion) for completion in completions]

    seen = []
    ranking.in_process = True
    assert [rewarded.total for rewarded in ask(make(ranking), ["b", "a", "c"])[0]] == [1, 0, 2]
    assert seen == [["b", "a", "c"]]
    found, tally = ask(make(ranking), ["b", "raise", "c"])  # each alone, to find which is to blame
    assert [rewarded.failure for rewarded in found] == [None, "reward_raised", None]
    assert tally.fraction("ranking") == 1 / 3
    assert seen[1:] == [["b", "raise", "c"], ["b"], ["raise"], ["c"]]


def test_closures_and_lambdas_are_sent_and_what_can_not_be_is_named(make):
    bonus, lock = 0.25, threading.Lock()
    reward = make(lambda prompts, completions, **columns: [len(c) + bonus for c in completions])
    assert [rewarded.total for rewarded in ask(reward, ["a", "bcd"])[0]] == [1.25, 3.25]

    def locked(prompts, completions, **columns):
        with lock:
            return [1.0]

    with pytest.raises(ValueError, match=r"locked can't be sent to a worker .*: set its attribute in_process = True"):
        make(locked).start()


def test_what_a_worker_can_not_load_stops_at_once(make, tmp_path, monkeypatch):
    (tmp_path / "unfinished.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import unfinished

    rewards = make(unfinished.reward)
    (tmp_path / "unfinished.py").write_text("import no_such_module\n")
    for pycache in (tmp_path / "__pycache__").glob("*"):
        pycache.unlink()
    rewards.start()
    with pytest.raises(RewardContractError, match=r"could not load the rewards: ModuleNotFoundError.*no_such_module"):
        rewards.wait_until_loaded()


def test_a_reward_that_warms_up_does_so_before_its_time_limits_begin(make):
    class Slow:
        def warm_up(self):
            time.sleep(2.5)
            self.is_warm = True

        def __call__(self, prompts, completions, **columns):
            return [float(self.is_warm)]

    assert [rewarded.total for rewarded in ask(make(Slow(), timeout=2.0), ["7"] * 4)[0]] == [1.0] * 4


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("answer", "message"),
    [("high", "must return numbers or None, got 'high'"), ([1.0, 2.0], r"numbers or None, got \[1.0, 2.0\]")],
)
def test_an_answer_that_is_no_reward_is_a_mistake_in_its_code(make, answer, message, num_workers):
    with pytest.raises(RewardContractError, match=message):
        ask(make(lambda prompts, completions, **columns: [answer] * len(completions), num_workers), ["7", "8"])
    with pytest.raises(RewardContractError, match="one entry a completion"):
        ask(make(lambda prompts, completions, **columns: [1.0] * 5, num_workers), ["7", "8"])


def test_an_idle_worker_that_has_been_killed_is_replaced_without_blame(make):
    rewards = make(process_id, num_workers=1)
    ((pid,),) = [{rewarded.total for rewarded in ask(rewards, ["7"])[0]}]
    os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: is_gone(int(pid)))
    found, tally = ask(rewards, ["7", "8"])
    assert not tally.counts
    assert {rewarded.total for rewarded in found} != {pid}


def test_an_interrupt_ends_the_workers(make):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    rewards = make(by_text, timeout=100.0)
    rewards.start()
    rewards.wait_until_loaded()
    workers = list(rewards._pool._workers)
    pids = [worker.process.pid for worker in workers]

    def interrupt():
        wait_until(lambda: all(worker.task is not None for worker in workers))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ask(rewards, ["hang"] * 4)
    signal.signal(signal.SIGINT, before)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert ask(rewards, ["7"])[0][0].total == 1.0


def test_copies_have_workers_of_their_own(make):
    rewards = make(process_id, num_workers=1)
    ask(rewards, ["7"])
    twin, sent = copy.deepcopy(rewards), pickle.loads(pickle.dumps(rewards))
    pids = {ask(each, ["7"])[0][0].total for each in (rewards, twin, sent)}
    assert len(pids) == 3
    twin.close()
    sent.close()


SCRIPT = """
import os, sys, time
print("started", flush=True)
from gvpo_lightning.rewards import Rewards, RewardSettings

class Judge:
    def __call__(self, prompts, completions, **columns):
        while completions[0] == "hang":
            pass
        return [float(os.getpid())]

rewards = Rewards(Judge(), RewardSettings(num_workers=2))
if sys.argv[1] == "hang":
    rewards.start(); rewards.wait_until_loaded()
    print(*(worker.process.pid for worker in rewards._pool._workers), flush=True)
    rewards(["p"] * 2, ["hang"] * 2, {})
print(*(int(r.total) for r in rewards(["p"] * 2, ["7"] * 2, {})[0]))
"""


@pytest.fixture
def script(tmp_path, root):
    """Starts a script without `if __name__ == "__main__"`."""
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = {"PYTHONPATH": f"{root}:{root / 'kernels'}"}

    def start(*arguments):
        command = [sys.executable, "script.py", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | paths, cwd=tmp_path)

    return start


def is_gone(pid):
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().split()[2] == "Z"


def test_workers_do_not_run_the_script_again_and_end_with_it(script):
    output = script("once").communicate(timeout=60)[0].split()
    assert output[0] == "started"
    assert len(output) == 3
    assert all(is_gone(pid) for pid in output[1:])


def test_workers_end_with_a_killed_run_even_where_they_hang(script):
    process = script("hang")
    assert process.stdout.readline() == "started\n"
    pids = process.stdout.readline().split()
    assert len(pids) == 2
    time.sleep(0.3)  # so that they are at their completions, most likely
    assert not any(is_gone(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids))


@pytest.mark.parametrize(("shown", "enough"), [(True, True), (True, False), (False, True)])
def test_slow_rewards_show_a_bar(make, monkeypatch, capfd, shown, enough):
    monkeypatch.setattr("gvpo_lightning.rewards.run.SLOW", 0.2 if enough else 1000.0)
    rewards = make(by_text, timeout=2.0, num_workers=1)
    rewards.shows_progress = shown
    ask(rewards, ["7", "hang", "8"])
    assert ("rewards: " in capfd.readouterr().err) == (shown and enough)


def test_the_bar_of_other_rewards_tells_the_time_and_what_they_tell_it(make, monkeypatch, capfd):
    shown = []

    def is_shown(text):
        shown.append(capfd.readouterr().err)
        return text in "".join(shown)

    class Slow:
        """It tells of two completions, and waits until that is to be seen."""

        name, in_process = "slow", True

        def track(self, advance):
            self.advance = advance

        def __call__(self, prompts, completions, **columns):
            self.advance(2)
            wait_until(lambda: self.advance(0) or is_shown("2/3"))
            return [1.0] * len(completions)

    monkeypatch.setattr("gvpo_lightning.rewards.run.SLOW", 0.2)
    rewards = make([Slow(), patient], timeout=2.0)
    rewards.shows_progress = True
    ask(rewards, ["7", "hang", "8"])
    assert is_shown("slow: ")
    assert is_shown("patient: ")
