"""EchoStream: simultaneous speech-to-speech translation at a constant cost per second.

Importing this package is cheap: nothing heavier than the standard library is loaded here. The model lives in
``echostream.models``, the streaming engine in ``echostream.streaming``, the fairseq task in ``echostream.tasks``.

    bundle = echostream.from_pretrained("a directory, or owner/model on the Hugging Face hub")
    print(echostream.Session(bundle).translate("talk.wav").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echostream.hub import from_pretrained
    from echostream.streaming.session import StreamingSession as Session

__all__ = ["Session", "from_pretrained"]
__version__ = "0.1.0"
_LAZY = {
    "Session": ("echostream.streaming.session", "StreamingSession"),
    "from_pretrained": ("echostream.hub", "from_pretrained"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
