"""Guard rails of the theory: what takes away the promise of one optimum, said once and in plain words."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from gvpo_lightning.rollout.settings import GenerationSettings

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

    def sampler(self, settings: GenerationSettings, objective: str) -> None:
        """Of samplers that never draw some of what the reference allows."""
        cuts = {"top_k": settings.top_k != 0, "top_p": settings.top_p < 1, "min_p": settings.min_p > 0}
        cuts["temperature"] = settings.temperature == 0
        named = " and ".join(f"{name}={getattr(settings, name)}" for name, is_cut in cuts.items() if is_cut)
        if named:
            what_then = "GVPO's optimum is then not unique" if objective == "gvpo" else "that is not trained"
            self.say(
                "sampler",
                f"Sampling with {named} never draws some of what the reference allows: {what_then}. Set temperature > "
                "0, top_k=0, top_p=1.0 and min_p=0.0 to draw all of it.",
            )

    def on_policy(self, settings: GenerationSettings, temperature: float, objective: str) -> None:
        """Of samples that are not those of the policy whose log-probs an objective takes ratios to."""
        is_cut = settings.top_k != 0 or settings.top_p < 1 or settings.min_p > 0
        if is_cut or settings.temperature != temperature:
            self.say(
                "on policy",
                f"objective: {objective} takes completions to be the policy's at model.temperature={temperature}, but "
                f"they are sampled with temperature={settings.temperature}, top_k={settings.top_k}, top_p="
                f"{settings.top_p}, min_p={settings.min_p}: its gradient is biased. Set the temperatures equal, "
                "top_k=0, top_p=1.0 and min_p=0.0.",
            )

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
