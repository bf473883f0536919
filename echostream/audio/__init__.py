"""Sound in, features out: files, resampling, log-mel filter banks, normalisation. numpy, and soundfile for files."""
