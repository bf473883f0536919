"""Where sentences end: what a segmenter is (``base``), the kinds there are, and how to get one (``factory``)."""
