"""The exported model behind the streaming engine: numpy and ONNX Runtime, neither torch nor fairseq.

``model`` opens the graphs, ``hearing``, ``decoder`` (with ``pages``) and ``voice`` keep the streams' state and feed
them, ``stages`` answers the engine. The graphs themselves are described where they are written, in ``echostream.export``.
"""
