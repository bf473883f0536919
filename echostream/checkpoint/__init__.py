"""Checkpoint directories (*bundles*): everything a trained model needs, in one place and without anybody's paths.

``layout`` says what lies where, ``bundle`` loads it, ``saving`` writes one from a training run's weights, ``fairseq``
reads those. ``echostream export`` makes of a bundle the form that is shipped (``export.directory``).
"""

from echostream.checkpoint.bundle import Bundle, load_bundle, use_threads
from echostream.checkpoint.layout import BACKENDS, DEFAULT_BUNDLE
from echostream.checkpoint.saving import save_bundle

__all__ = ["BACKENDS", "DEFAULT_BUNDLE", "Bundle", "load_bundle", "save_bundle", "use_threads"]
