# The project on NVIDIA's PyTorch, whose torch and TransformerEngine it uses as they are.
#
#   docker build --tag llama-pruning .                        # --build-arg TAG=... takes another of NVIDIA's tags
#   docker run --rm -it --gpus all --ipc host llama-pruning bash benchmarks/gpu/check.sh
ARG TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${TAG}
WORKDIR /opt/llama-pruning
COPY . .
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh
ENV PATH=/opt/llama-pruning/.venv/bin:$PATH
