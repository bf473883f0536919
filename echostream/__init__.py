"""EchoStream: simultaneous speech-to-speech translation at a constant cost per second.

Importing this package is cheap: nothing heavier than the standard library is loaded here. The model lives in
``echostream.models``, the streaming engine in ``echostream.streaming``, the fairseq task in ``echostream.tasks``.
"""

__version__ = "0.1.0"
