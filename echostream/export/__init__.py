"""The model as ONNX graphs, one per streaming stage, that run without torch.

``graphs`` exports the steps of ``models.graphs`` and puts weights in int8, ``voice`` writes the vocoder's graphs by
hand, ``directory`` makes the exported directory and ``check`` compares it with the torch model. What runs it is
``echostream.streaming.exported``.
"""
