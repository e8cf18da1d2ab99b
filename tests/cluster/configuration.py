"""The files that a cluster for tests is made of: slurm.conf, gres.conf, a munge key, a hosts file for each host."""

from __future__ import annotations

import os
import pwd
import stat
import time
from pathlib import Path

NETWORK = "10.77.0."
"""Of the bridge between the hosts; it exists within the cluster's namespace only."""
LOGIN = NETWORK + "254"


def write_configuration(folder: Path, nodes: int, cpus: int, gpus: int, user_signal: bool) -> None:
    """Everything that login host and nodes read, below `folder`."""
    for part in ("etc", "munge", "state", "log", "dev", "run", *(f"spool/node{i}" for i in range(1, nodes + 1))):
        (folder / part).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "munge").chmod(0o711)
    everybody = {f"node{i}": f"{NETWORK}{i}" for i in range(1, nodes + 1)} | {"login": LOGIN}
    for host in everybody:
        # As Debian and Ubuntu do it: a host's own name means this host only. Who listens there is heard by nobody else.
        lines = [f"{'127.0.1.1' if name == host else address} {name}" for name, address in everybody.items()]
        (folder / "etc" / f"hosts.{host}").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    (folder / "etc" / "nodes").write_text(f"{nodes}\n")
    (folder / "etc" / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={_devices(folder, gpus)}\n")
    (folder / "etc" / "slurm.conf").write_text(_slurm_conf(folder, nodes, cpus, gpus, user_signal))


def _devices(folder: Path, gpus: int) -> str:
    """Character devices that stand for GPUs; without such files SLURM sets no CUDA_VISIBLE_DEVICES."""
    try:
        for number in range(gpus):
            device = folder / "dev" / f"nvidia{number}"
            if not device.exists():
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        return f"{folder}/dev/nvidia[0-{gpus - 1}]"
    except OSError:  # not root
        return f"/dev/tty[0-{gpus - 1}]"


def _slurm_conf(folder: Path, nodes: int, cpus: int, gpus: int, user_signal: bool) -> str:
    user = pwd.getpwuid(os.geteuid()).pw_name
    return f"""ClusterName=test
SlurmctldHost=login({LOGIN})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again; 120 s by default
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# nodes claim more than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=2,bf_interval=1,batch_sched_delay=0
# answer at once when a job can never run, instead of leaving it in the queue
EnforcePartLimits=ALL
# without it a job gets all the memory of its nodes, and there is one job per node
DefMemPerCPU=500
# 30 and 300 on real clusters
KillWait=10
SlurmdTimeout=10
InactiveLimit=0
MessageTimeout=10
TCPTimeout=2
MinJobAge=3600
ReturnToService=2
JobRequeue=0
FirstJobId={int(time.time()) % 50_000_000 + 1}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{"SlurmctldParameters=preempt_send_user_signal" if user_signal else ""}
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr={NETWORK}[1-{nodes}] CPUs={cpus} RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
