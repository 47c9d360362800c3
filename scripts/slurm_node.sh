#!/usr/bin/env bash
# Starts and stops a Slurm cluster with one node, for tests.
#
#   slurm_node.sh start FOLDER   print "export NAME=VALUE" lines once the node is ready
#   slurm_node.sh stop FOLDER    stop everything that start has started; does nothing if nothing runs
#
# All files are in FOLDER: configuration, state, logs, the munge key and socket, and PID files.
# Uses its own ports and its own munged, so it does not affect a Slurm of the system.
# Runs as root, or as a normal user if the Debian packages slurm-wlm and munge are installed.
#
# Exit status: 0 success, 1 failure, 2 wrong usage, 77 Slurm is missing and cannot be installed.
set -euo pipefail

PROGRAMS=(munged slurmctld slurmd sbatch srun scancel scontrol sinfo squeue)
READY_S=30  # timeout in seconds for a daemon's answer, for an idle node, and for the first job

say() { printf 'slurm_node.sh: %s\n' "$*" >&2; }

# --- Packages -----------------------------------------------------------------------------------

missing_programs() {
  local program
  for program in "${PROGRAMS[@]}"; do
    command -v "$program" >/dev/null || printf '%s ' "$program"
  done
}

# Installs the packages without starting their services, by a policy-rc.d with exit status 101. An
# existing policy-rc.d is not changed.
apt_install() (
  log=$1
  policy=/usr/sbin/policy-rc.d
  apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=120)
  packages=(install --no-install-recommends slurm-wlm munge)
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  # If the package lists are missing or outdated, update them and try again.
  "${apt[@]}" "${packages[@]}" >"$log" 2>&1 </dev/null ||
    { "${apt[@]}" update && "${apt[@]}" "${packages[@]}"; } >>"$log" 2>&1 </dev/null
)

need_slurm() {
  local missing why
  missing=$(missing_programs)
  [[ -n $missing ]] || return 0
  if [[ $(id -u) != 0 ]]; then
    why="not root"
  elif ! command -v apt-get >/dev/null; then
    why="no apt-get"
  elif ! apt_install "$FOLDER/log/apt.log"; then
    why="apt-get failed: $(grep -E '^(E|Err)' "$FOLDER/log/apt.log" | tail -n 1 || true)"
  else
    missing=$(missing_programs)
    [[ -n $missing ]] || return 0
    why="the packages do not contain $missing"
  fi
  say "slurm-wlm is missing and cannot be installed: $why"
  exit 77
}

# --- Settings -----------------------------------------------------------------------------------

# Prints an unused TCP port of 127.0.0.1 below the kernel's ephemeral range.
free_port() {
  local port
  for _ in {1..50}; do
    port=$((20000 + (RANDOM % 12000)))
    if [[ $port != "${1:-}" ]] && ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  say "no free port"
  return 1
}

write_conf() {
  local user node cpus memory_mb ctld_port slurmd_port
  user=$(id -un)
  node=$(uname -n)
  node=${node%%.*}
  cpus=$(nproc)
  memory_mb=$(awk '/^MemTotal:/ {print int($2 / 1024)}' /proc/meminfo)
  ctld_port=$(free_port)
  slurmd_port=$(free_port "$ctld_port")

  # config_overrides: use the node line below instead of the values that slurmd measures.
  # DefMemPerCPU: otherwise, a job that requests no memory gets all of it, and the next job waits.
  # MinJobAge: squeue and scontrol show finished jobs for an hour.
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=$((memory_mb / cpus))
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory_mb State=UNKNOWN
PartitionName=debug Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
}

# --- Start --------------------------------------------------------------------------------------

# Runs a daemon, which moves to the background by itself. It must not keep our stdout open, or a
# process that reads it never returns.
quietly() {
  "$@" >>"$FOLDER/log/out.log" 2>&1 </dev/null || {
    say "$1 failed with status $?"
    return 1
  }
}

# wait_for WHAT COMMAND...: repeats the command until it succeeds, for at most READY_S seconds.
wait_for() {
  local what=$1 end=$((SECONDS + READY_S))
  shift
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= end)); then
      say "no $what after $READY_S s"
      return 1
    fi
    sleep 0.2
  done
}

node_is_idle() { [[ $(timeout 5 sinfo --noheader --format=%T) == idle ]]; }

show_logs() {
  local log
  for log in "$FOLDER"/log/*.log; do
    [[ -s $log ]] || continue
    printf -- '--- %s\n' "$log"
    tail -n 20 "$log"
  done >&2
}

start_failed() {
  trap - EXIT INT TERM
  say "start failed"
  show_logs
  stop || true
  exit 1
}

start() {
  local name
  for name in slurmctld slurmd munged; do
    if [[ -n $(running_pid "$name") ]]; then
      say "$name is already running in $FOLDER: stop it first"
      exit 1
    fi
  done
  mkdir -p "$FOLDER"/{log,munge,spool,state}
  rm -f "$FOLDER"/log/{apt,munged,slurmctld,slurmd,out}.log
  need_slurm

  trap start_failed EXIT
  trap 'exit 1' INT TERM
  write_conf
  (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge/key")

  # --force: ignore owners and modes of folders that munged considers insecure.
  # -c: discard the jobs of an earlier start in this folder, which would otherwise run again.
  quietly munged --force --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" \
    --seed-file="$FOLDER/munge/seed" --pid-file="$FOLDER/munged.pid" \
    --log-file="$FOLDER/log/munged.log"
  quietly slurmctld -c
  wait_for "answer from slurmctld" timeout 5 scontrol ping
  quietly slurmd -c
  wait_for "idle node" node_is_idle
  # Check that a job runs.
  quietly timeout -k 5 "$READY_S" srun --partition=debug --ntasks=1 --mem=1 --chdir=/ true
  wait_for "idle node after a first job" node_is_idle

  printf 'export SLURM_CONF=%s\n' "$SLURM_CONF"
  trap - EXIT INT TERM
}

# --- Stop ---------------------------------------------------------------------------------------

# Prints the PID in a PID file if that process is still the program that wrote it. Zombies, which
# process 1 of a container may never reap, count as ended.
running_pid() {
  local name=$1 pid
  pid=$(cat "$FOLDER/$name.pid" 2>/dev/null) || return 0
  [[ $pid =~ ^[0-9]+$ ]] || return 0
  if [[ $(cat "/proc/$pid/stat" 2>/dev/null) == "$pid ($name) "[!ZX]* ]]; then
    echo "$pid"
  fi
}

# Kills the remains of jobs if slurmd has died first: each slurmstepd that it started (recognized by
# the working folder that they share), with all processes of its session.
kill_orphans() {
  local process stat state session sessions=' '
  for process in /proc/[0-9]*; do
    if [[ $(cat "$process/comm" 2>/dev/null) == slurmstepd &&
      $(readlink "$process/cwd") == "$FOLDER/log" ]]; then
      stat=$(cat "$process/stat" 2>/dev/null) || continue
      read -r state _ _ session _ <<<"${stat##*) }"
      [[ $state == Z ]] || sessions+="$session "
    fi
  done
  [[ $sessions != ' ' ]] || return 0
  for process in /proc/[0-9]*; do
    stat=$(cat "$process/stat" 2>/dev/null) || continue
    read -r _ _ _ session _ <<<"${stat##*) }"
    if [[ $sessions == *" $session "* ]]; then kill -KILL "${process#/proc/}" 2>/dev/null || true; fi
  done
}

no_jobs() { [[ -z $(timeout 5 squeue --noheader) ]]; }

stop() {
  local name pid
  # Jobs outlive slurmd, so cancel them while slurmd can still stop them.
  if [[ -n $(running_pid slurmctld) && -n $(running_pid slurmd) ]]; then
    if ! no_jobs; then
      timeout 10 scancel --partition=debug >/dev/null 2>&1 || true
      READY_S=15 wait_for "end of the jobs" no_jobs || true
    fi
  fi
  for name in slurmd slurmctld munged; do
    pid=$(running_pid "$name")
    [[ -n $pid ]] || continue
    kill -TERM "$pid" 2>/dev/null || true
    for _ in {1..50}; do
      [[ -n $(running_pid "$name") ]] || break
      sleep 0.2
    done
    if [[ -n $(running_pid "$name") ]]; then kill -KILL "$pid" 2>/dev/null || true; fi
  done
  kill_orphans
  rm -f "$FOLDER"/{slurmd,slurmctld,munged}.pid
}

# --- Main ---------------------------------------------------------------------------------------

if [[ $# != 2 || ! $1 =~ ^(start|stop)$ ]]; then
  say "usage: slurm_node.sh start|stop FOLDER"
  exit 2
fi
PATH=$PATH:/usr/sbin:/sbin
FOLDER=$(realpath -m -- "$2")
# slurm.conf supports no quotes, and the path of a Unix socket has at most 107 characters.
if [[ ! $FOLDER =~ ^[A-Za-z0-9/._+-]{1,70}$ ]]; then
  say "FOLDER: expected at most 70 letters, digits or any of / . _ + -, got $FOLDER"
  exit 2
fi
# Variables of a surrounding Slurm job would misdirect our commands.
unset "${!SLURM_@}" "${!SRUN_@}"
export SLURM_CONF=$FOLDER/slurm.conf
"$1"
