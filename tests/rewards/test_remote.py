"""`RemoteReward` against a server of its own, over HTTP."""

import json
import pickle
import threading
from datetime import date, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gvpo_lightning.rewards import RemoteReward, Rewards, RewardSettings


class Handler(BaseHTTPRequestHandler):
    """Rewards the length of a completion; what else a completion says is what becomes of the request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (text,) = body["completions"]
        with self.server.lock:
            self.server.seen.append((body, self.headers.get("Authorization"), self.client_address))
            tries = sum(seen["completions"] == [text] for seen, _, _ in self.server.seen)
        if text.startswith("status") and tries <= int(text.split()[2]):
            self.send_error(int(text.split()[1]))
            return
        if text == "lost" and tries == 1:
            self.close_connection = True
            return
        if text == "late":
            self.server.let_go.wait()
        answers = {"two": {"rewards": [1, 2]}, "none": {"rewards": [None]}, "text": {"rewards": ["high"]}, "bare": 1.0}
        data = json.dumps(answers.get(text, {"rewards": [len(text)]})).encode() if text != "no json" else b"<html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Tests are quiet."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.lock, running.seen, running.let_go = threading.Lock(), [], threading.Event()
        running.url = f"http://127.0.0.1:{running.server_port}/reward"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.let_go.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("gvpo_lightning.rewards.remote.BACKOFF", 0.01)


def ask(reward, completions, **settings):
    rewards = Rewards(reward, RewardSettings(**settings))
    prompts = [[{"role": "user", "content": f"prompt {n}"}] for n in range(len(completions))]
    return rewards(prompts, completions, {"answer": list(range(len(completions))), "other": completions})


def test_what_is_sent_and_what_comes_back(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    reward = RemoteReward(server.url, columns=["answer"], token_env="JUDGE_TOKEN", name="judge")
    for _ in range(2):  # each rollout has a session of its own
        found, tally = ask(reward, ["", "a", "bb", "none"])
        assert [rewarded.components["judge"] for rewarded in found[:3]] == [0, 1, 2]
        assert found[3].failure is None
        assert found[3].total != found[3].total
        assert not tally.counts
    assert len(server.seen) == 8
    sent = {body["completions"][0]: (body, token) for body, token, _ in server.seen}
    prompt = [{"role": "user", "content": "prompt 2"}]
    assert sent["bb"] == ({"prompts": [prompt], "completions": ["bb"], "answer": [2]}, "Bearer secret")
    assert b"secret" not in pickle.dumps(reward)


def test_what_json_does_not_have_is_sent_as_text_and_null_as_null(server):
    values = [datetime(2024, 1, 5), b"7", Decimal("7.50"), None, float("nan"), [date(2024, 1, 5)]]
    rewards = Rewards(RemoteReward(server.url, columns=["value"]), RewardSettings())
    _, tally = rewards(["p"] * len(values), list("abcdef"), {"value": values})
    assert not tally.counts
    sent = {body["completions"][0]: body["value"] for body, *_ in server.seen}
    assert [sent[c] for c in "abcdef"] == [["2024-01-05 00:00:00"], ["7"], ["7.50"], [None], [None], [["2024-01-05"]]]


def test_what_can_be_tried_again_is(server):
    texts = ["status 500 2", "status 429 1", "status 503 1", "lost", "status 500 3", "status 400 1", "fine"]
    found, tally = ask(RemoteReward(server.url, retries=2), texts)
    assert [rewarded.failure for rewarded in found] == [None] * 4 + ["reward_raised"] * 2 + [None]
    tries = [sum(body["completions"] == [text] for body, _, _ in server.seen) for text in texts]
    assert tries == [3, 2, 2, 2, 3, 1, 1]
    assert tally.counts == {("RemoteReward", "reward_raised"): 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two", r"must answer {\"rewards\": .*got {'rewards': \[1, 2\]}"),
        ("bare", "must answer"),
        ("text", "must give numbers or null"),
        ("no json", "JSONDecodeError"),
    ],
)
def test_other_answers_are_failures(server, text, message):
    found, tally = ask(RemoteReward(server.url), ["fine", text])
    assert [rewarded.failure for rewarded in found] == [None, "reward_raised"]
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        tally.check(0.1)


def test_late_answers_and_a_server_that_is_not_there(server):
    found, _ = ask(RemoteReward(server.url, retries=1, timeout=2.0), ["fine", "late"])
    assert [rewarded.failure for rewarded in found] == [None, "reward_raised"]
    found, _ = ask(RemoteReward(server.url, timeout=1000), ["fine", "late"], timeout=2.0)
    assert [rewarded.failure for rewarded in found] == [None, "reward_timeout"]
    found, tally = ask(RemoteReward("http://127.0.0.1:9/"), ["a"])
    assert found[0].failure == "reward_raised"
    assert "127.0.0.1:9" in tally.first["RemoteReward"]


def test_connections_are_kept(server):
    ask(RemoteReward(server.url), ["x"] * 40, max_concurrency=4)
    assert len(server.seen) == 40
    assert len({address for _, _, address in server.seen}) <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:80"}, "must begin with http"),
        ({"url": "http://x", "token_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, but that environment variable"),
        ({"url": "http://x", "retries": -1}, "retries >= 0"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(**settings)


def test_a_column_that_is_to_be_sent_must_be_there(server):
    with pytest.raises(ValueError, match=r"needs the columns \['level'\]"):
        ask(RemoteReward(server.url, columns=["level"]), ["a"])
