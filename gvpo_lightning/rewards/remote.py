"""Rewards from a server."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import aiohttp

from gvpo_lightning.rewards.values import as_json

BACKOFF = 0.5  # seconds before the first try again; doubled each time


class RemoteReward:
    """Asks a server for each completion's reward.

    It POSTs `{"prompts": [...], "completions": [...], "<column>": [...], ...}` as JSON, each list with one entry, and
    expects `{"rewards": [...]}` with one number or null. What JSON does not have, such as dates, is sent as text, and a
    null of the dataset as null. Completions are sent concurrently, at most
    `reward_settings.max_concurrency` of them a rank, over connections that are kept open for the rollout.

    A lost connection, a late answer and the statuses 408, 429 and 5xx are tried again; whatever is left fails
    on that completion.

    Args:
        url: of the server.
        columns: of the dataset, that are sent along; default: none.
        retries: further tries.
        timeout: seconds for one try; `reward_settings.timeout` is for all of them together.
        token_env: an environment variable whose value is sent as `Authorization: Bearer <value>`.
        name: in metrics.

    Raises:
        ValueError: a url that is not of HTTP, or an environment variable that is not set.
    """

    takes_text = True

    def __init__(
        self,
        url: str,
        columns: list[str] | None = None,
        retries: int = 2,
        timeout: float = 10.0,
        token_env: str | None = None,
        name: str = "RemoteReward",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"RemoteReward.url must begin with http:// or https://, got {url!r}.")
        if token_env is not None and token_env not in os.environ:
            raise ValueError(f"RemoteReward.token_env names {token_env}, but that environment variable is not set.")
        if retries < 0 or not timeout > 0:
            raise ValueError(f"RemoteReward needs retries >= 0 and timeout > 0, got {retries} and {timeout}.")
        self.url, self.retries, self.timeout, self.token_env = url, retries, timeout, token_env
        self.required_columns = columns or []
        self.name = name
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "RemoteReward":
        """Open a session, for the completions of one rollout."""
        token = None if self.token_env is None else os.environ[self.token_env]
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.timeout), connector=aiohttp.TCPConnector(limit=0), headers=headers
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close it."""
        assert self._session is not None
        await self._session.close()
        self._session = None

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One reward a completion."""
        asked = {name: columns[name] for name in self.required_columns}
        body = {"prompts": list(prompts), "completions": list(completions)} | asked
        for attempt in range(self.retries):
            try:
                return await self._ask(body)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError):
                pass
            except aiohttp.ClientResponseError as error:
                if error.status not in (408, 429) and error.status < 500:
                    raise
            await asyncio.sleep(BACKOFF * 2**attempt)
        return await self._ask(body)

    async def _ask(self, body: dict[str, Any]) -> list[float | None]:
        assert self._session is not None, "an async reward is entered before it is called"
        async with self._session.post(self.url, json=as_json(body)) as response:
            response.raise_for_status()
            answer = await response.json(content_type=None)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(body["completions"]):
            raise RuntimeError(f'{self.url} must answer {{"rewards": [one number or null]}}, got {str(answer)[:200]}.')
        if not all(value is None or isinstance(value, (int, float)) for value in rewards):
            raise RuntimeError(f"{self.url} must give numbers or null as rewards, got {str(rewards)[:200]}.")
        return rewards
