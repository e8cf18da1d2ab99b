# How a batch script of dist_colorize begins and ends: where its tasks meet, and whether the job comes back.
#
# launch/slurm.py puts this text into the scripts that it writes; launch/torchrun.sbatch sources it. Bash and SLURM's
# own commands only, as tasks may run in a container that the batch script is not in. Set before:
#   NOTES     folder for the notes of this job; a shared one
#   RUN       run folder, or empty for a command that has none
#   RESUME    command by which the user resumes by hand
#   REQUEUES  how often the job may come back in all
#   RETRIES   how often after failures in a row without a new checkpoint between them

# The number of an array's last job is that of the whole array: address it by its index.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
JOB=${JOB:-$SLURM_JOB_ID}
STARTS=${SLURM_RESTART_COUNT:-0}
IDLE=10 # interruptions in a row without progress: a warning that comes before training has begun, every time

# The answer of a command of SLURM's, also while the controller restarts.
ask() {
  local attempt
  for attempt in {1..12}; do
    "$@" && return
    sleep 5
  done
  return 1
}

say() { echo "[$(date '+%F %T')] job $JOB: $*"; }

# The job's last line when it is not finished.
give_up() {
  say "$1; it does not come back. To go on: $RESUME"
  exit "$2"
}

begin() {
  if ((STARTS > REQUEUES)); then
    give_up "its budget of $REQUEUES requeues is spent (slurm.requeues)" 1
  fi
  echo "$STARTS" >"$NOTES/$SLURM_JOB_ID.owner" # tasks of an earlier start that still run somewhere leave
  touch "$NOTES/$SLURM_JOB_ID.start"
  # A port that nobody listens on. Jobs that share this node begin to look at different places.
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
  export MASTER_PORT
  say "start $STARTS on $SLURM_JOB_NODELIST"
}

# end CODE: what becomes of the job when its tasks have left with CODE
end() {
  local code=$1 why state newest count=0 at=
  if ((code == 0)) && { [[ -z $RUN ]] || run_is finished; }; then
    say "finished"
    exit 0
  elif ((code == 2)); then
    give_up "what it was asked to do cannot work (see the error above)" 2
  elif ((code == 75)) || run_is interrupted; then
    why="interrupted, its work is saved"
  elif ((code == 0)); then
    why="failed: srun lost its tasks"
    code=1
  else
    why="failed with exit code $code"
  fi
  # A requeue would raise a cancelled job from the dead.
  state=$(ask squeue --noheader --jobs="$JOB" --format=%T)
  if [[ $state != RUNNING && $state != SIGNALING ]]; then
    # Cancelled for good, or about to be started anew by SLURM itself, as after the failure of a node.
    say "$why; SLURM has ended it (${state:-gone}). If it does not come back: $RESUME"
    exit "$code"
  fi
  # Ends in a row between which there was no new checkpoint. Only training has some; other commands come back anyhow.
  newest=$(readlink "$RUN/checkpoints/latest")
  [[ -f $NOTES/$SLURM_JOB_ID.idle ]] && read -r count at <"$NOTES/$SLURM_JOB_ID.idle"
  [[ $at == "$newest" ]] || count=0
  if [[ $why == failed* ]] && ((count >= RETRIES)); then
    give_up "$why, for the $((count + 1)). time without a new checkpoint (slurm.retries=$RETRIES)" "$code"
  elif [[ -n $RUN ]] && ((count >= IDLE)); then
    give_up "$why, for the $((count + 1)). time without progress; is slurm.warning longer than the time limit?" "$code"
  fi
  echo "$((count + 1)) $newest" >"$NOTES/$SLURM_JOB_ID.idle"
  if ((STARTS >= REQUEUES)); then
    give_up "$why; its budget of $REQUEUES requeues is spent (slurm.requeues)" "$code"
  fi
  say "$why; requeued, $((REQUEUES - STARTS - 1)) more requeues left"
  ask scontrol requeue "$JOB" || give_up "$why; the cluster refused to requeue it" "$code"
  exit "$code"
}

# run_is STATE: what the run folder says since this start. torchrun hides the exit code of its ranks, and srun leaves with
# 0 when a node has failed.
run_is() {
  [[ $RUN/status.json -nt $NOTES/$SLURM_JOB_ID.start ]] && grep -q "\"state\": \"$1\"" "$RUN/status.json"
}
