"""The exported model behind the streaming engine: numpy and ONNX Runtime, neither torch nor fairseq.

``model`` opens the graphs, ``encoder``, ``decoder`` (with ``pages``) and ``voice`` keep the streams' state and feed
them, ``stages`` answers the engine. What the graphs compute is in ``models.graphs`` and ``export.voice``.
"""
