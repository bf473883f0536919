"""Where a session's events go: a terminal, recordings and pipes, subtitles, a picture.

Every output has ``take(event)``, called with each event in order, and ``close()``, after which it is complete; it is
also complete, up to what was taken, when nothing follows.
"""
