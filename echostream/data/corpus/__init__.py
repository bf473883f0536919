"""From parallel text or ready recordings to a training directory; driven by ``echostream prepare``.

One file per concern: ``normalize`` and ``split`` (text), ``rows`` (the table of sentence pairs and its ledgers),
``sources`` (text files, ready speech, CVSS/Common Voice), ``tts`` (voices), ``speech`` (writing recordings),
``subwords`` (SentencePiece, dictionaries), ``manifests`` (the files that training reads).
"""
