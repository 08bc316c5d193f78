# The image jobs run in:   scripts/docker/build.sh        then   scripts/docker/import.sh dockerd://berth:0.1.0 /images/berth.sqsh
#
# The base holds PyTorch, NCCL, apex and Transformer Engine built for one another (26.03: PyTorch 2.11, CUDA 13.2, Python 3.12); nothing of it is
# replaced. CUDA 13 knows no GPU before Turing: for V100 give --base an image with PyTorch 2.10 or newer built for CUDA 12.6, or work
# without a container.
ARG FROM_IMAGE_NAME=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${FROM_IMAGE_NAME}

ARG GIT_REVISION=unknown
ARG BERT_UID=10001
LABEL org.opencontainers.image.title="berth" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_REVISION}"

# anybody may run the image (docker --user, Enroot): the home folder is everybody's
RUN useradd --uid "${BERT_UID}" --create-home --shell /bin/bash bert && chmod 1777 /home/bert && mkdir -p /workspace/bert/results
ENV HOME=/home/bert

WORKDIR /workspace/bert

# Every package of the base becomes a constraint, so that pip can add to it but change nothing. A package that the base has is taken as it is there,
# whatever requirements.txt pins.
COPY scripts/docker/requirements.txt scripts/docker/requirements.txt
RUN set -eu; \
    unset PIP_CONSTRAINT; \
    python3 -m pip list --format=freeze > /etc/berth-constraint.txt; \
    sed 's/==.*//; s/_/-/g' /etc/berth-constraint.txt | tr '[:upper:]' '[:lower:]' > /etc/berth-base-names.txt; \
    awk -F == 'NR == FNR { base[$1] = 1; next } /^[a-z]/ { if ($1 in base) print $1; else print }' \
        /etc/berth-base-names.txt scripts/docker/requirements.txt > /etc/berth-requirements.txt; \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --only-binary :all: --constraint /etc/berth-constraint.txt \
        --requirement /etc/berth-requirements.txt
ENV PIP_CONSTRAINT=/etc/berth-constraint.txt

COPY LICENSE README.md pyproject.toml setup.cfg ./
COPY convert_checkpoint.py create_pretraining_data.py modeling.py optimization.py run_pretraining.py ./
COPY bert_configs bert_configs
COPY berth berth
COPY data data
COPY scripts scripts
COPY slurm slurm

# --no-deps: what berth needs is there; the second command makes sure of it, versions included
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . && \
    python3 scripts/docker/check_requirements.py && \
    chown -R bert: /workspace/bert

ENV BERT_PREP_WORKING_DIR=/workspace/bert/data \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false

USER bert
CMD ["bash"]
