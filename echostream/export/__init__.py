"""The model as ONNX graphs, one per streaming stage, that run without torch.

``graph`` writes graphs, ``encoder``, ``decoders`` and ``voice`` say what is in them, ``directory`` makes the exported
directory and ``check`` compares it with the torch model. What runs it is ``echostream.streaming.onnx_stages``.
"""
