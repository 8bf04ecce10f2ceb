# An image for pods: `docker build --build-arg EXTRA=tpu -t mixcpt .`
FROM python:3.12-slim

# tpu, gpu, or empty for a CPU.
ARG EXTRA=tpu

WORKDIR /mixcpt_jax
COPY requirements.txt pyproject.toml README.md LICENSE NOTICE ./
COPY mixcpt_jax mixcpt_jax
COPY configs configs
RUN pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"

ENTRYPOINT ["mixcpt"]
