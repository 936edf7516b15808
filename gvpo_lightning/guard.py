"""Guard rails of the theory: what takes away the promise of one optimum, said once and in plain words."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

# a residual RMS of so many times what rewards differ by; not the largest residual, since one completion that shoots
# over heals by itself
EXPLODING = 10.0


class Guard:
    """Warns once a run of each thing."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._largest_spread = 0.0  # of the rewards of one group, so far

    def say(self, name: str, message: str) -> None:
        """Warn, unless it has been said."""
        if name not in self._said:
            self._said.add(name)
            rank_zero_warn(message)

    def info(self, name: str, message: str) -> None:
        """Tell, unless it has been told."""
        if name not in self._said:
            self._said.add(name)
            rank_zero_info(message)

    def negligible(self, fractions: Mapping[str, float], vocab_size: int) -> None:
        """Of sources most of whose completions are practically impossible under the reference."""
        for source, fraction in fractions.items():
            if source != "policy" and fraction > 0.5:
                self.say(
                    f"negligible {source}",
                    f"{fraction:.0%} of the completions from '{source}' are less likely under the reference than "
                    f"random tokens (1 in {vocab_size} each): what the reference does say is not among the samples, so "
                    "they can't hold the policy near it. Are prompt template and tokenizer those of the recording? If "
                    "so, mix in fresh completions (sources.policy).",
                )

    def log_ratios(self, residual_rms: Tensor, reward_spread: Tensor) -> None:
        """Of an update whose implicit rewards have left what rewards can explain, while the loss is still finite."""
        rms, self._largest_spread = float(residual_rms), max(self._largest_spread, float(reward_spread))
        if self._largest_spread > 0 and rms > EXPLODING * self._largest_spread:
            self.say(
                "exploding",
                f"Log-ratios are exploding: implicit rewards miss the advantages by {rms:.3g} (residual/rms), where "
                f"the rewards of a group differ by {self._largest_spread:.3g} at most, so the policy is far past its "
                "optimum. Lower the learning rate or clip gradients; resume from a checkpoint before this.",
            )
