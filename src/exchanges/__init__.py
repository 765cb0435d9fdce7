"""The exchanges: ccxt clients behind budgets, circuit breakers and deadlines."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from src.exchanges.manager import ExchangeManager

__all__ = ["ExchangeManager"]


def __getattr__(name: str) -> Any:
    """Import `ExchangeManager` on first use: the market reader does not need it (PEP 562)."""
    if name != "ExchangeManager":
        raise AttributeError(name)
    from src.exchanges.manager import ExchangeManager

    return ExchangeManager
