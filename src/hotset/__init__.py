"""hotset serves language models whose KV cache and experts do not fit in GPU memory."""

from typing import TYPE_CHECKING, Any

from hotset.request import SamplingParams

if TYPE_CHECKING:
    from hotset.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing LLM imports torch (seconds); `hotset plan` must not pay for it.
    if name == "LLM":
        from hotset.cpu_libraries import set_waiting

        set_waiting()
        from hotset.llm import LLM

        return LLM
    raise AttributeError(f"module 'hotset' has no attribute {name!r}")
