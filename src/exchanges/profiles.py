"""What is specific to each exchange, in one place each. This module imports nothing of the project."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """One exchange: its name in settings and answers, and its budget as `weight/seconds`."""

    name: str
    default_budget: str


# Budgets are documented per egress address. Kraken documents none: about one call a second is what callers measure, and
# the small burst admits a cold batch without a higher mean.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="bybit", default_budget="600/5"),
        Profile(name="binance", default_budget="6000/60"),
        Profile(name="kraken", default_budget="5/5"),
    )
}
