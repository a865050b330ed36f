"""A real Slurm with three nodes on one machine, from Debian's packages: needs root, for Linux namespaces.

Each node has its own network, host name, processes and mounts, so that killing its first process is a power cut. The
controller and whoever submits share a fourth host. All see the same files, as on a cluster's shared file system.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
LOGIN, NODES = "login", ("n1", "n2", "n3")
ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate((LOGIN, *NODES), start=1)}
CPUS, GPUS = 4, 2  # of a node; the GPUs are device files of no use, so that Slurm has something to hand out
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Debian 12 has Slurm 22.05. The times are short, so that a test takes seconds where a cluster takes minutes.
CONFIGURATION = f"""
ClusterName=test
SlurmctldHost={LOGIN}({ADDRESSES[LOGIN]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={{folder}}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={{folder}}/state
SlurmdSpoolDir={{folder}}/spool-%n
SlurmctldPidFile={{folder}}/slurmctld.pid
SlurmdPidFile={{folder}}/slurmd-%n.pid
SlurmctldLogFile={{folder}}/slurmctld.log
SlurmdLogFile={{folder}}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MinJobAge=3600
MailProg=/bin/true
GresTypes=gpu
NodeName=DEFAULT CPUs={CPUS} Gres=gpu:{GPUS} State=UNKNOWN
"""
PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 State=UP
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=60 PreemptMode=CANCEL State=UP
"""


def why_not() -> str | None:
    """Why no Slurm can be had here, and what to do about it; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm with nodes of their own needs root, for namespaces: run the tests as root"
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install -y --no-install-recommends {PACKAGES}"
    tried = subprocess.run(["unshare", "-n", "-u", "-p", "-m", "-f", "--mount-proc", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"namespaces are not to be had: {tried.stderr.decode().strip()}"


@dataclass
class Host:
    """A host of the cluster: namespaces that live as long as their first process."""

    name: str
    starter: subprocess.Popen[bytes]
    first: int  # process id, as the machine counts

    def inside(self, command: Sequence[object]) -> list[str]:
        """The command line that runs `command` on this host."""
        own_processes = ["--pid"] if self.name != LOGIN else []
        return ["nsenter", f"--target={self.first}", "--net", "--uts", "--mount", *own_processes, *map(str, command)]


class Cluster:
    """The running cluster. Used as a context; its end leaves no process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}",
        }
        self._hosts: dict[str, Host] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._boot(LOGIN)
            key, socket = self.folder / "munge.key", self.folder / "munge.socket"
            munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}"]
            munged += [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
            self._serve(LOGIN, "munged", munged)
            until(socket.exists, 60, "munged's socket")
            self._serve(LOGIN, "slurmctld", ["slurmctld", "-D"])
            for node in NODES:
                self.power_on(node)
            until(lambda: self.sinfo().count("idle") == len(NODES), 300, "three idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *reason: object) -> None:
        for node in [*NODES, LOGIN]:
            if node in self._hosts:
                self.power_off(node)

    def run(self, *command: object, cwd: Path | None = None, status: int = 0, **environment: str) -> str:
        """What a command says on the login host, which it is to end with this exit status."""
        done = self.start(*command, cwd=cwd, **environment)
        said, error = done.communicate(timeout=120)
        assert done.returncode == status, f"{command} ended with {done.returncode}: {said}{error}"
        return said

    def start(self, *command: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Begin a command on the login host."""
        settings = {**self._environment, **environment}
        pipe = subprocess.PIPE
        line = self._hosts[LOGIN].inside(["env", f"--chdir={cwd or self.folder}", *command])
        return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, errors="replace", env=settings)

    def sinfo(self) -> str:
        """The state of each node."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T")

    def jobs(self) -> dict[str, str]:
        """The jobs that are not over, by number, or by `array_task`, with their state."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol` knows of a job, over or not."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def power_on(self, node: str) -> None:
        """Boot a node and start its slurmd."""
        self._boot(node)
        self.start_slurmd(node)

    def start_slurmd(self, node: str) -> None:
        """Start a node's slurmd."""
        self._serve(node, f"slurmd-{node}", ["slurmd", "-D", "-N", node])

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon alone; what it has started goes on."""
        pid = int((self.folder / f"slurmd-{node}.pid").read_text())
        subprocess.run(self._hosts[node].inside(["kill", "-KILL", pid]), check=True)
        self._daemons.pop(f"slurmd-{node}").wait()

    def power_off(self, node: str) -> None:
        """End all that runs on a host, at once and without a word."""
        host = self._hosts.pop(node)
        if node == LOGIN:  # has no processes of its own
            for daemon in self._daemons.values():
                daemon.kill()
        os.kill(host.first, signal.SIGKILL)
        host.starter.wait()
        for name in [name for name in self._daemons if name.endswith(node) or node == LOGIN]:
            self._daemons.pop(name).wait()
        if node != LOGIN:
            self._login(["ip", "link", "delete", f"to-{node}"], check=False)

    def _configure(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o600)
        nodes = "".join(f"NodeName={name} NodeAddr={ADDRESSES[name]}\n" for name in NODES)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder) + nodes + PARTITIONS)
        for number in range(GPUS):
            os.mknod(folder / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in ADDRESSES.items()))

    def _boot(self, name: str) -> None:
        own_processes = ["--pid", "--mount-proc"] if name != LOGIN else []
        # A node's first process has to take care of orphans, as a shell does.
        forever = "while :; do sleep 600 & wait; done" if name != LOGIN else "exec sleep infinity"
        commands = f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && ip link set lo up && "
        commands += f"touch {self.folder}/up-{name} && {forever}"
        (self.folder / f"up-{name}").unlink(missing_ok=True)
        line = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            *own_processes,
            "--fork",
            "--kill-child",
            "bash",
            "-c",
            commands,
        ]
        with open(self.folder / "hosts.out", "ab") as out:
            starter = subprocess.Popen(line, stdout=out, stderr=out, env=self._environment)
        until((self.folder / f"up-{name}").exists, 60, f"host {name}")
        first = int(Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text())
        self._hosts[name] = Host(name, starter, first)
        if name == LOGIN:
            self._login(["ip", "link", "add", "bridge", "type", "bridge"])
            self._login(["ip", "address", "add", f"{ADDRESSES[LOGIN]}/24", "dev", "bridge"])
            self._login(["ip", "link", "set", "bridge", "up"])
            return
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(first)]
        self._login(["ip", "link", "add", f"to-{name}", *peer])
        self._login(["ip", "link", "set", f"to-{name}", "master", "bridge", "up"])
        for command in (f"address add {ADDRESSES[name]}/24 dev eth0", "link set eth0 up"):
            subprocess.run(self._hosts[name].inside(["ip", *command.split()]), check=True)

    def _login(self, command: Sequence[str], check: bool = True) -> None:
        subprocess.run(self._hosts[LOGIN].inside(command), check=check, capture_output=not check)

    def _serve(self, host: str, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            line = self._hosts[host].inside(command)
            self._daemons[name] = subprocess.Popen(line, stdout=out, stderr=out, env=self._environment)


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something holds; fail where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
