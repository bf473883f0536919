"""Rates and sizes that every part of EchoStream agrees on, each named with its unit."""

SAMPLE_RATE = 16_000  # samples per second, of the features and of the vocoder's output
FRAME_LENGTH = 400  # samples in an analysis window (25 ms)
FRAME_SHIFT = 160  # samples between two feature frames (10 ms)
NUM_MEL_BINS = 80
SUBSAMPLING = 4  # feature frames per encoder frame
# Two convolutions of kernel 3 and stride 2 make encoder frame t look at the features 4t-3 .. 4t+3: nothing beyond the
# four frames it replaces, and three frames before them.
SUBSAMPLING_CONTEXT = SUBSAMPLING - 1
# Whisper's log-mel: log10 of the energies, never below this floor (its own follows the loudest frame, future included,
# and lies here for speech of ordinary level), then (x + 4) / 4.
WHISPER_FLOOR = -6.5
WHISPER_MEAN, WHISPER_STD = -4.0, 4.0
WHISPER_SILENCE = (WHISPER_FLOOR - WHISPER_MEAN) / WHISPER_STD  # a normalised frame of silence
ENCODER_FRAME_MS = 40  # one encoder frame of source audio
UNIT_RATE = 50  # discrete units per second of target speech, before deduplication
UNIT_HOP = SAMPLE_RATE // UNIT_RATE  # samples of waveform per unit (320)

# The four special symbols that every fairseq dictionary starts with.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
NUM_SPECIALS = 4
BLANK = BOS  # the CTC blank of every head is <s>
