"""Two tiers of ready answers: memory, then Redis."""

from src.cache.cache import Cache

__all__ = ["Cache"]
