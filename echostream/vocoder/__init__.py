"""Training the vocoder: data, losses, discriminators and the loop. The generator itself is a part of the model, in
``echostream.models.decoders.vocoder``."""
