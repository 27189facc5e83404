"""``ULLME``, the embedding model, and ``WrappedULLME``, its mteb encoder. Each is imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME
    from ullme.models.wrapped import WrappedULLME

__all__ = ["ULLME", "WrappedULLME"]


def __getattr__(name: str) -> Any:
    if name == "ULLME":
        from ullme.models.ullme import ULLME

        return ULLME
    if name == "WrappedULLME":
        from ullme.models.wrapped import WrappedULLME

        return WrappedULLME
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
