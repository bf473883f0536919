# EchoStream's server on a CPU: docker build -t echostream . && docker run --rm -p 8765:8765 echostream
# Another command of the program: docker run --rm -v "$PWD:/talks" echostream translate --checkpoint-dir /model /talks/talk.wav

# The shipped weights as int8 graphs, made by torch, which stays behind in this stage.
FROM python:3.11-slim-bookworm AS export
WORKDIR /src
COPY setup.py pyproject.toml README.md ./
COPY echostream echostream
# Versions are those of setup.py.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir '.[export]' \
    && echostream export /model --int8

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 echostream
WORKDIR /src
COPY setup.py pyproject.toml README.md ./
COPY echostream echostream
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[server]' && rm -rf build ./*.egg-info
COPY --from=export /model /model
ENV OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/echostream
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/healthz', timeout=4)"]
ENTRYPOINT ["echostream"]
CMD ["serve", "--host", "0.0.0.0", "--checkpoint-dir", "/model"]
