#!/bin/bash
# Not run here. A fusion on two machines of eight GPUs: sbatch slurm.sh, with RECIPE and OUTPUT put in. See docs/scaling.md.

#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# An interrupted run leaves OUTPUT.training behind, from which a job that is started again goes on.
[ -d OUTPUT.training ] && RESUME=--resume
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$MASTER:29500" \
    -m zipper_lm fuse RECIPE.yaml $RESUME
