"""Disguises of training speech that make clean synthetic voices resemble recordings of people (``--augment-speech``).

``speech.py`` holds the option and the chain; what it does stands in ``voice.py`` (formants), ``room.py``
(reverberation), ``noise.py`` (noise, babble, mains hum) and ``channel.py`` (bands, codecs, clipping, level). Samples
are float32 [N] at 16 kHz everywhere; every step gives as many as it gets, each word where it was.
"""

from echostream.data.augmentation.speech import SpeechAugment

__all__ = ["SpeechAugment"]
