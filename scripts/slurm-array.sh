#!/bin/bash
# A recipe on many GPUs by Slurm: sbatch --array=0-15 scripts/slurm-array.sh RECIPE FOLDER
#
# Every task of the array is one rank with one GPU. Ranks share nothing but FOLDER, which lies on a file system that all
# nodes see, or in an object store (s3://…). Any number of tasks may start, end or die at any time: whoever is there
# computes what is not recorded. Submit it again, with as many tasks as you like, until it says that it is complete.
#
#SBATCH --job-name=forebay
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
# Preempted tasks come back by themselves.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=forebay-%A_%a.log
# Two minutes before the end of its time a rank is asked to stop. It does so between two batches.
#SBATCH --signal=B:USR1@120

set -u
recipe=${1:?"which recipe?"}
folder=${2:?"which folder?"}

# One process a task here; for several a node, as with --ntasks-per-node=8 --gres=gpu:8, write `srun forebay run …`
# instead: `--rank auto` counts the processes of every task, and `--device auto` takes the GPU of each one's number.
forebay run "$recipe" --to "$folder" --rank auto --device auto &
rank=$!

# The shell hears Slurm's signals, and waits on when one has interrupted it.
trap 'kill -USR1 "$rank" 2>/dev/null' USR1
trap 'kill -TERM "$rank" 2>/dev/null' TERM
wait "$rank"
code=$?
while kill -0 "$rank" 2>/dev/null; do
    wait "$rank"
    code=$?
done

# 75: stopped early, there is more to do. A task whose time is over puts itself back into the queue.
if [ "$code" -eq 75 ] && [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"

# Without Slurm: the same ranks by torchrun, which says which rank each one is and on which GPU.
#   torchrun --nproc-per-node=8 --no-python forebay run RECIPE --to FOLDER --rank auto
# or by hand, on as many machines as there are, with any numbers:
#   forebay run RECIPE --to FOLDER --rank 3 --world 16
