"""A parameter's name without what wrappers have put into it."""

# what FSDP1, activation checkpointing and torch.compile put into the names of parameters
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def policy_name(key: str) -> str | None:
    """The name within the policy of a Lightning module's parameter or buffer; None for what is not the policy's."""
    first, _, rest = unwrapped_name(key).partition(".")
    return rest if first == "policy" and rest else None


def unwrapped_name(key: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
