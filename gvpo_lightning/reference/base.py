"""The reference, what the implicit reward is measured against: which weights, when they are refreshed.

| kind            | in memory beside the policy            | a checkpoint holds            | refreshed                |
|-----------------|----------------------------------------|-------------------------------|--------------------------|
| `frozen`        | the trained weights' first values (2)  | their fingerprint (1)         | never                    |
| `previous`      | nothing                                | nothing                       | every rollout            |
| `every_n_steps` | one copy of the trained weights        | that copy                     | after n updates or more  |
| `ema`           | one copy of the trained weights        | that copy                     | every rollout, by average|
| `adapter_off`   | nothing                                | the fingerprint of the rest   | never                    |
| `cached`        | nothing                                | the cache's fingerprint       | never                    |

(1) and the values themselves where the policy was a model object, which can't be loaded again. (2) nothing with an
adapter from the run's settings (`lora`): without it the policy is what it started as, as in `adapter_off`. Another
`model` is held whole beside the policy: in host memory while it is not asked, or under FSDP2 on the device, sharded.

Copies hold the weights that are trained and no others, so with LoRA only the adapter's, sharded as the policy is,
and lie in host memory: their values take the place of the policy's while it is asked as the reference. A reference
changes only at the start of a rollout, so all completions of a group are measured against one version of it;
log-probs are computed once a completion, with the training forward, and kept with it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gvpo_lightning.distributed.placement import Placement


class Reference:
    """Scores completions as the reference would; this one is the policy itself, at the start of each rollout.

    `version` changes with every refresh: log-probs of another version are out of date.
    """

    is_fixed = False

    def __init__(self) -> None:
        self.version = 0

    def identify(self, policy: Any, placement: Placement, original: Callable[[], Any]) -> None:
        """Note which weights a fit starts from, before they are sharded; called again, it does nothing.

        `original` gives the whole policy as it lies where it comes from, whatever was loaded into it since; of one that
        was given as an object the policy itself.
        """

    def prepare(self, policy: Any, placement: Placement) -> None:
        """Take what is needed of the policy, as it is sharded, before it is trained; called again, it does nothing."""

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """At the start of a rollout, after so many updates."""
        self.version = rollout

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """Inside, the model that the reference is; the policy must not be trained there."""
        yield policy

    def state_dict(self, policy: Any) -> dict[str, Any]:
        """What a checkpoint holds of it: tensors, numbers and strings; every rank must call this."""
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any], policy: Any) -> None:
        """Take up what `state_dict` left; ValueError where it belongs to another reference."""
        self.version = state["version"]
