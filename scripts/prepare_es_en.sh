#!/bin/sh
# The Spanish-English corpus of the model in echostream/assets, from parallel text and packaged voices.
#   TEXT           tatoeba-es-en.tsv.gz (columns es, en)
#   DATA           where the corpus goes
#   KOKORO_VOICES  kokoro-js-1.2.1.tgz (npm pack kokoro-js@1.2.1)
#   READY          optional: sentences that Kokoro has already spoken (speech.tar, manifest.tsv)
# Needs espeak-ng and pip install 'echostream[corpus]'. Interrupted, the same command goes on where it was. On two cores
# the test and dev sets take half an hour, espeak-ng's 30,000 sentences ten minutes, their targets and units half an hour.
set -eu
: "${TEXT:?}" "${DATA:?}" "${KOKORO_VOICES:?}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE

step() { step_name=$1; shift; python "$(dirname "$0")/prepare_corpus.py" "$step_name" --output "$DATA" "$@"; }
kokoro() { step speech --engine kokoro --kokoro-voices "$KOKORO_VOICES" "$@"; }

step text --pairs "$TEXT" --source-lang es --target-lang en --vocab-size 1000 --source-vocab-size 160
kokoro --set test --split test ${READY:+--ready "$READY"}
kokoro --set dev --split dev --min-words 3 --max-words 12 --order hash --limit 300 ${READY:+--ready "$READY"}
if [ -n "${READY:-}" ]; then
    step speech --set kokoro --split train --ready "$READY"
    step target --sets kokoro --sample 1500   # what k-means is fitted on
    step units
fi
step speech --set espeak --split train --engine espeak --min-words 3 --max-words 12 --order rank --limit 30000
kokoro --set kokoro2 --split train --min-words 4 --max-words 12 --order rank --limit "${KOKORO_PAIRS:-12000}" --seed 2 \
    ${READY:+--exclude-set kokoro}
step target
step units
step manifests --manifest test=test dev=dev "train=${READY:+kokoro,}espeak" train_kokoro2=kokoro2
