#!/bin/bash
# Two machines of four GPUs: sbatch examples/accelerate_configs/slurm.sh --output_dir runs/mine --loss pals ...
# Two minutes before its time is over, or when it is preempted, the run saves and ends; submitted again, it goes on.
#SBATCH --job-name=pals
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
flags=$(printf '%q ' "$@")
srun bash -c "exec accelerate launch --config_file examples/accelerate_configs/several_machines.yaml \
    --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * 4)) --machine_rank \$SLURM_PROCID \
    --main_process_ip $first examples/run_seg_pals.py --resume_from_checkpoint auto $flags"
