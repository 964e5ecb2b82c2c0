# shellcheck shell=bash
# What a job of your site needs before Python starts. Copy this file, keep the lines that fit, and name the copy in
# `site=` of slurm/stage.sbatch, or for `python -m tdro_hpc.submit` in a profile: cluster.setup=[source <absolute path>].
# A line that fails stops the job before it has cost anything.

# Modules. A batch job has no login shell: some sites want the first line.
# source /etc/profile.d/modules.sh
# module load cuda/12.4 gcc/12

# conda, or a virtual environment. One of them.
# source "$HOME/miniconda3/etc/profile.d/conda.sh"
# conda activate tdro
# source "$HOME/tdro/.venv/bin/activate"

# Caches on the scratch disk: home directories are small and slow. Compute nodes often have no network:
# download models on the login node first, and forbid it here.
# export HF_HOME="/scratch/$USER/huggingface"
# export HF_HUB_OFFLINE=1
# export TORCHINDUCTOR_CACHE_DIR="/scratch/$USER/inductor"
# export TRITON_CACHE_DIR="/scratch/$USER/triton"

# Temporary files on the node's own disk, where Slurm makes a folder a job.
# export TMPDIR="${SLURM_TMPDIR:-/tmp}"

# The network between nodes, where NCCL picks the wrong one.
# export NCCL_SOCKET_IFNAME=ib0
